//! Standard output of the commands.

use std::fmt::Display;
use std::io::{ErrorKind, Write as _};

use anyhow::{Context as _, Result};

/// Writes a line, or several, without colours where they are not shown. A reader that goes before the end, such as `head`,
/// has read enough: what the command does, and how it ends, is the same.
pub(crate) fn say(text: impl Display) -> Result<()> {
    match writeln!(anstream::stdout(), "{text}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        said => said.context("writing to standard output"),
    }
}
