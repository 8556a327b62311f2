//! What is said of a map that has no room for more.

use std::io;

use anyhow::{Context, Result};

/// Names the map in the error of a write to it.
pub fn written<T>(map: &str, result: io::Result<T>) -> Result<T> {
    let is_full = result.as_ref().is_err_and(|error| {
        // Hash maps say the first, tries the second.
        matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC))
    });
    result.with_context(|| {
        if is_full {
            format!("map {map} is full")
        } else {
            format!("writing {map}")
        }
    })
}
