//! How long tests wait for what happens at once, or does not happen at all; and how much they do.

use std::{env, sync::OnceLock, time::Duration};

/// How many times slower than usual this machine is, which an emulator sets.
const VARIABLE: &str = "REDIRECT_SLOWNESS";

fn slowness() -> u32 {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    *SLOWNESS.get_or_init(|| match env::var(VARIABLE) {
        Ok(text) => match text.parse() {
            Ok(slowness) if slowness > 0 => slowness,
            _ => panic!("{VARIABLE}={text}: allowed are whole numbers from 1"),
        },
        Err(_) => 1,
    })
}

/// A limit that is right for a usual machine, as it is on this one.
pub fn patience(limit: Duration) -> Duration {
    limit * slowness()
}

/// How much of something to do: as much as usual, or on a slow machine so much.
pub fn amount(usual: u32, slow: u32) -> u32 {
    if slowness() == 1 { usual } else { slow }
}

/// The same, from milliseconds.
pub fn patience_ms(limit: u64) -> Duration {
    patience(Duration::from_millis(limit))
}
