//! Debian's rust-src package.

use std::path::Path;

use anyhow::{Result, anyhow, bail};

use crate::debian::{self, PrivateApt};

/// The suite whose rust-src follows current stable releases.
const SUITE: &str = "trixie-backports";

/// Puts the library of exactly this rustc at `library`.
pub fn fetch(version: &str, library: &Path) -> Result<()> {
    let apt = PrivateApt::of_suite(SUITE)?;
    let listing = apt.cache(&["madison", "rust-src"])?;
    let package = matching_version(&listing, version)
        .ok_or_else(|| anyhow!("{SUITE} has no rust-src {version}: {:?}", listing.trim()))?;
    let tree = apt.fetch(&format!("rust-src={package}"))?;
    let source = tree.join(format!("usr/src/rustc-{version}/library"));
    if !source.is_dir() {
        bail!("the package has no {}", source.display());
    }
    debian::put_in_place(&source, library)
}

/// Which line of `apt-cache madison` has this rustc: `rust-src | 1.95.0+dfsg1-2~bpo13+1 | …`.
fn matching_version<'a>(listing: &'a str, rustc: &str) -> Option<&'a str> {
    listing
        .lines()
        .filter_map(|line| line.split('|').nth(1).map(str::trim))
        .find(|package| {
            package
                .strip_prefix(rustc)
                .is_some_and(|rest| rest.starts_with(['+', '-', '~']))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_version_must_be_exactly_rustcs() {
        let listing = " rust-src | 1.95.1+dfsg1-1 | x\n rust-src | 1.95.0+dfsg1-2~bpo13+1 | http://m trixie-backports/main\n";
        assert_eq!(
            matching_version(listing, "1.95.0"),
            Some("1.95.0+dfsg1-2~bpo13+1")
        );
        assert_eq!(matching_version(listing, "1.9"), None);
        assert_eq!(matching_version(listing, "1.95"), None);
    }
}
