//! Node mode: one daemon per node captures the pods of the mesh as they come and go.
//!
//! [`pods`] follows the Kubernetes API, [`decision`] says what is wanted of a pod, [`keeper`] compares that with what is
//! attached and acts through [`place`]. [`socket`] lets the CNI plugin ask for a pod before its containers start.

pub mod api;
pub mod daemon;
pub mod decision;
#[cfg(test)]
mod fuzz;
mod http;
mod keeper;
mod metrics;
mod place;
mod pods;
mod reports;
mod socket;
