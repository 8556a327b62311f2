//! The `redirect` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    redirect_user::cli::main()
}
