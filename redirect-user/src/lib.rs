//! The loader: attaches, detaches and shows what is captured.
//!
//! [`options`] makes a policy of what the user typed, [`observe`] reads the pod, [`settings`] turns
//! both into map entries, [`attach`] puts them in place.

mod assembler;
pub mod attach;
pub mod check;
pub mod cli;
pub mod cni;
mod collect;
pub mod detach;
mod digest;
pub mod follow;
mod full;
#[cfg(test)]
mod fuzz;
pub mod istio_iptables;
pub mod kernel;
mod layouts;
pub mod machines;
pub mod node;
pub mod observe;
pub mod options;
mod output;
mod passthrough;
mod pins;
pub mod programs;
pub mod proxy;
pub mod record;
pub mod run;
mod settings;
pub mod status;
mod sys;
mod tables;
pub mod tproxy;
