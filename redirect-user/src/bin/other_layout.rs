//! The `redirect` command of a build whose maps have another layout: tests upgrade to it and back.

use std::process::ExitCode;

fn main() -> ExitCode {
    redirect_user::cli::main()
}
