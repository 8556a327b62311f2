//! Node mode: one daemon per node captures the pods of the mesh as they come and go.

pub mod api;
