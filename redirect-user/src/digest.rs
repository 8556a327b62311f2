//! Short names for long contents.

use sha2::{Digest as _, Sha256};

/// The first 64 bits of a SHA-256: enough that nobody finds contents with the same name.
pub fn first_64_bits(hash: Sha256) -> u64 {
    let bytes = hash.finalize();
    bytes
        .iter()
        .take(8)
        .fold(0, |digest, byte| digest << 8 | u64::from(*byte))
}
