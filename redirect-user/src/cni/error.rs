//! Errors as the CNI specification wants them: one JSON object on standard output.

use serde_json::json;

/// Why a call failed.
///
/// The numbers are the specification's ("Error", well-known codes); those from 100 on are the plugin's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// A version of the specification that is not spoken here, or a command that it does not have.
    Version = 1,
    /// An environment variable is missing or wrong.
    Environment = 4,
    /// Standard input cannot be read.
    Io = 5,
    /// Standard input is not what it should be.
    Undecodable = 6,
    /// A field of the network configuration is missing or wrong.
    Config = 7,
    /// The daemon is away or asks for patience.
    TryAgain = 11,
    /// `ADD` would fail.
    NotAvailable = 50,
    /// The daemon refuses.
    Refused = 100,
}

/// A failed call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub code: Code,
    /// For people; the runtime shows it in the pod's events.
    pub message: String,
}

/// Result of this module's callers.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// With that message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code, message }
    }

    /// The JSON object, in the words of that version.
    pub fn to_json(&self, version: &str) -> String {
        json!({ "cniVersion": version, "code": self.code as u32, "msg": self.message }).to_string()
    }
}
