//! Where a value comes from: the command line, before the environment, before the default.

use super::error::{Entry, Fault, OptionError};

/// Reads the process' own environment, for [`CaptureFlags::validate`](super::CaptureFlags::validate).
///
/// Bytes that are not UTF-8 become U+FFFD, which no option accepts.
pub fn process_env(name: &str) -> Option<String> {
    Some(std::env::var_os(name)?.to_string_lossy().into_owned())
}

/// A value that was given, and where.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    /// `--flag` or the variable's name.
    pub(super) origin: String,
    pub(super) value: String,
}

impl Setting {
    /// The flag if it was given, else the last of the variables that is set: Istio lets later ones overwrite earlier ones.
    /// A variable set to the empty string counts, as there.
    pub(super) fn find(
        flag: &Option<String>,
        name: &str,
        variables: &[&str],
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Option<Self> {
        if let Some(value) = flag {
            return Some(Self {
                origin: format!("--{name}"),
                value: value.clone(),
            });
        }
        variables.iter().rev().find_map(|variable| {
            Some(Self {
                origin: (*variable).to_owned(),
                value: env(variable)?,
            })
        })
    }

    /// Parses the value; a bad entry becomes an error that names this setting.
    pub(super) fn read<T>(
        &self,
        allowed: &'static str,
        parse: impl FnOnce(&str) -> Result<T, Entry>,
    ) -> Result<T, OptionError> {
        parse(&self.value).map_err(|entry| OptionError::NotAllowed {
            origin: self.origin.clone(),
            fault: Fault {
                value: self.value.clone(),
                entry,
            },
            allowed,
        })
    }

    /// Refuses a list that is too long.
    pub(super) fn at_most(&self, max: usize) -> Result<(), OptionError> {
        let got = entries(&self.value).count();
        if got <= max {
            return Ok(());
        }
        Err(OptionError::TooMany {
            origin: self.origin.clone(),
            value: self.value.clone(),
            max,
            got,
        })
    }

    /// Refuses the setting beside another one.
    pub(super) fn not_with(&self, why: &'static str) -> OptionError {
        OptionError::NotWith {
            origin: self.origin.clone(),
            value: self.value.clone(),
            why,
        }
    }
}

/// Entries of a comma list: trimmed (iptables-restore skips those blanks too), empty ones dropped.
pub(super) fn entries(text: &str) -> impl Iterator<Item = &str> {
    text.split(',')
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
}

/// Decimal digits only. A leading zero is refused: iptables reads it as octal, people do not.
pub(super) fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let plain = digits && (text.len() == 1 || !text.starts_with('0'));
    if plain { text.parse().ok() } else { None }
}
