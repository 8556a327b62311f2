//! Called as istio-iptables is: by that name, or as `redirect istio-iptables`; with its exit codes.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Error, Result};

use super::Codes;
use crate::istio_iptables::{self, validation};
use crate::options::{IstioIptablesFlags, OptionError, process_env};

const NAME: &str = "istio-iptables";

/// What Istio's own flag parser ends with: `os.Exit(-1)`.
const UNPARSABLE: u8 = 255;
/// The pod is not captured: what Istio's repair looks for.
const NOT_CAPTURED: u8 = 126;

pub(super) const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed or a refused value, 126 the pod is not captured \
                                     (--run-validation), 255 wrong usage.";

pub(super) const CODES: Codes = Codes {
    usage: UNPARSABLE,
    of_error,
};

fn of_error(error: &Error) -> u8 {
    if error.is::<validation::Failed>() {
        NOT_CAPTURED
    } else if error
        .downcast_ref()
        .is_some_and(OptionError::is_unparsable_flag)
    {
        UNPARSABLE
    } else {
        1
    }
}

/// A program called istio-iptables needs no subcommand.
pub(super) fn by_name(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let called = arguments
        .first()
        .and_then(|path| Path::new(path).file_name());
    if called == Some(OsStr::new(NAME)) {
        arguments.insert(1, NAME.into());
    }
    arguments
}

/// Whether it is such a call.
pub(super) fn is_called(arguments: &[OsString]) -> bool {
    arguments.get(1).is_some_and(|command| command == NAME)
}

/// Does what the flags say.
pub(super) fn execute(flags: &IstioIptablesFlags) -> Result<ExitCode> {
    istio_iptables::run(flags.validate(&process_env)?)?;
    Ok(ExitCode::SUCCESS)
}
