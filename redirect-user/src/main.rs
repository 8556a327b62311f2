//! The `redirect` command.

use std::io::{IsTerminal, stderr};
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .with_target(false)
        .with_env_filter(
            EnvFilter::try_from_env("REDIRECT_LOG").unwrap_or_else(|_| EnvFilter::new("warn")),
        )
        .init();
    redirect_user::cli::main()
}
