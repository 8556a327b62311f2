//! The `redirect` command.

use std::process::ExitCode;

/// Gives memory back. Loading the programs takes ten times what the daemon needs from then on, and the C library's
/// allocator keeps it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    redirect_user::cli::main()
}
