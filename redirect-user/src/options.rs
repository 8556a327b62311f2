//! From istio-iptables' flags and environment variables to a validated [`Policy`], before the kernel is touched.
//!
//! [`CaptureFlags`] keeps what was typed; [`CaptureFlags::validate`] adds the environment and the defaults, and answers with a
//! [`Policy`] or with one [`OptionError`] that names the flag or the variable, the value and what is allowed.

mod cidrs;
mod dns;
mod error;
mod flags;
mod identity;
mod interception;
mod interfaces;
mod istio_iptables;
mod names;
mod policy;
mod ports;
mod ranges;
mod setting;
mod switches;
mod validate;

#[cfg(test)]
mod tests;

pub use dns::Dns;
pub use error::{Entry, Fault, OptionError};
pub use flags::CaptureFlags;
pub use interception::Mode;
pub use interfaces::InterfacePattern;
pub use istio_iptables::{Change, DryRun, IstioIptables, IstioIptablesFlags, Validation};
pub use names::{Names, SystemNames, tcp_service_in};
pub use policy::{Ipv6, Policy};
pub use ranges::{IdRange, PortRange, Scope};
pub use setting::process_env;
pub(crate) use switches::boolean;
