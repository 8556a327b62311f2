//! Where messages go: standard error, `warn` and above unless `REDIRECT_LOG` says otherwise.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

use super::daemon::LogFormat;

/// For one call of a command.
pub(super) fn of_a_command() {
    start("warn", LogFormat::Text);
}

/// For the daemon, which also says what it does.
pub(super) fn of_the_daemon(format: LogFormat) {
    // That crate tells each failed call as an error of its own, which is told with its context here.
    start("warn,redirect_user=info,kube_client=off", format);
}

fn start(default: &str, format: LogFormat) {
    let filter =
        EnvFilter::try_from_env("REDIRECT_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let subscriber = tracing_subscriber::fmt()
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .with_target(false)
        .with_env_filter(filter);
    match format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
    }
}
