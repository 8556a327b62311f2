//! The chained CNI plugin: tells the node's daemon about each sandbox before its containers start, and [`install`]s itself.

mod call;
mod config;
mod daemon;
mod error;
#[cfg(test)]
mod fuzz;
pub mod install;
mod plugin;
mod result;
mod trouble;

pub use plugin::run;
pub use trouble::failed_open;

/// Its name: that of the program in the CNI directory, and the `type` in a network configuration.
pub const NAME: &str = "redirect-cni";
