//! Saying aloud that a test could not run.

use std::{env, fs::OpenOptions, io::Write as _};

/// Prints why a test is skipped and adds the line to the file named by `REDIRECT_SKIP_LOG`, where a run's driver counts them.
pub fn record(test: &str, probe: &str) {
    let line = format!("SKIP {test}: {probe}");
    eprintln!("{line}");
    if let Some(path) = env::var_os("REDIRECT_SKIP_LOG") {
        let mut log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        writeln!(log, "{line}").unwrap();
    }
}

/// Ends the test with a record of what a probe found: `skip!("no Envoy at {path}")`.
#[macro_export]
macro_rules! skip {
    ($($probe:tt)+) => {{
        let test = std::thread::current().name().unwrap_or("?").to_owned();
        $crate::skip::record(&test, &format!($($probe)+));
        return;
    }};
}
