//! How long tests wait for what happens at once, or does not happen at all.

use std::{env, sync::OnceLock, time::Duration};

/// How many times slower than usual this machine is, which an emulator sets.
const VARIABLE: &str = "REDIRECT_SLOWNESS";

/// A limit that is right for a usual machine, as it is on this one.
pub fn patience(limit: Duration) -> Duration {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    let slowness = SLOWNESS.get_or_init(|| match env::var(VARIABLE) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|error| panic!("{VARIABLE}={text}: {error}")),
        Err(_) => 1,
    });
    limit * *slowness
}

/// The same, from milliseconds.
pub fn patience_ms(limit: u64) -> Duration {
    patience(Duration::from_millis(limit))
}
