//! The kernels that are booted: Debian's packages, kept under the target directory, or any image.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, bail};

use super::keep;
use crate::cargo;
use crate::debian::{self, PrivateApt};
use crate::ui::{self, Mark};

/// Where backports of newer kernels come from.
const NEWER: &str = "trixie-backports";

/// What `--kernel` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The newest package of `major.minor`.
    Version(u32, u32),
    /// A bzImage; its modules, if it needs any, are in `lib/modules` beside it.
    Image(PathBuf),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let version = || {
            let (major, minor) = text.split_once('.')?;
            Some(Self::Version(major.parse().ok()?, minor.parse().ok()?))
        };
        match version() {
            Some(version) => Ok(version),
            None if Path::new(text).is_file() => Ok(Self::Image(text.into())),
            None => {
                Err("allowed are a version such as 6.12, and the path of a kernel image".to_owned())
            }
        }
    }
}

/// A kernel that is here.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As in tables: the version, or the image's path.
    pub name: String,
    pub image: PathBuf,
    /// The directory of its modules, `lib/modules/<release>`; None if it has none.
    pub modules: Option<PathBuf>,
}

impl Kernel {
    /// As `uname -r` tells it, if its modules do.
    pub fn release(&self) -> Option<String> {
        let name = self.modules.as_deref()?.file_name()?;
        Some(name.to_string_lossy().into_owned())
    }

    /// Major and minor version, from the release.
    pub fn version(&self) -> Option<(u32, u32)> {
        version_of(&self.release()?)
    }

    /// Its name, as a part of a path.
    pub fn file_name(&self) -> String {
        self.name.replace('/', "_")
    }
}

/// The major and minor version of a release such as `6.12.41+deb13-cloud-amd64`.
pub fn version_of(release: &str) -> Option<(u32, u32)> {
    let (major, rest) = release.split_once('.')?;
    let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

impl fmt::Display for Wanted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(major, minor) => write!(formatter, "{major}.{minor}"),
            Self::Image(path) => write!(formatter, "{}", path.display()),
        }
    }
}

impl Wanted {
    /// Whether it is an image of one's own.
    pub fn is_image(&self) -> bool {
        matches!(self, Self::Image(_))
    }

    /// Finds it, or fetches it.
    pub fn get(&self) -> Result<Kernel> {
        if std::env::consts::ARCH != "x86_64" {
            bail!("--kernel {self}: guests are booted on x86_64 only");
        }
        match self {
            Self::Image(image) => Ok(Kernel {
                name: self.to_string(),
                image: image.clone(),
                modules: beside(image)?,
            }),
            Self::Version(major, minor) => packaged(*major, *minor),
        }
    }
}

fn beside(image: &Path) -> Result<Option<PathBuf>> {
    let folder = image.with_file_name("lib/modules");
    folder.is_dir().then(|| only_entry(&folder)).transpose()
}

fn packaged(major: u32, minor: u32) -> Result<Kernel> {
    let folder = cargo::workspace()?
        .target
        .join(format!("vm/linux-{major}-{minor}"));
    let lock = keep::lock()?;
    if !folder.is_dir() {
        fetch(major, minor, &folder)?;
    }
    drop(lock);
    let release = only_entry(&folder.join("lib/modules"))?;
    Ok(Kernel {
        name: format!("{major}.{minor}"),
        image: only_entry(&folder.join("boot"))?,
        modules: Some(release),
    })
}

fn fetch(major: u32, minor: u32, folder: &Path) -> Result<()> {
    let apt = PrivateApt::of_suite(suite(major, minor))?;
    let names = apt.cache(&["pkgnames", "linux-image-"])?;
    let Some(package) = newest(&names, major, minor) else {
        bail!(
            "--kernel {major}.{minor}: Debian {} has no such kernel; it has {}",
            apt.suite(),
            offered(&names).join(", ")
        );
    };
    let mut tree = apt.fetch(package)?;
    for part in parts(&names_of_parts(&apt)?, package) {
        tree = apt.fetch(&part)?;
    }
    let modules = ["usr/lib/modules", "lib/modules"]
        .map(|path| tree.join(path))
        .into_iter()
        .find(|path| path.is_dir())
        .with_context(|| format!("{package} has no modules"))?;
    // In older packages it is in /boot, in newer ones with its modules.
    let image = [tree.join("boot"), only_entry(&modules)?]
        .iter()
        .find_map(|folder| image_in(folder))
        .with_context(|| format!("{package} has no vmlinuz"))?;
    // Only these two: a package has its documentation too.
    let kept = tree.with_file_name("kept");
    fs::create_dir(&kept)?;
    fs::create_dir(kept.join("boot"))?;
    fs::rename(&image, kept.join("boot/vmlinuz"))?;
    fs::create_dir(kept.join("lib"))?;
    fs::rename(modules, kept.join("lib/modules"))?;
    debian::put_in_place(&kept, folder)?;
    ui::step(
        Mark::Did,
        "kernel",
        &format!("{package}, from Debian {}", apt.suite()),
    );
    Ok(())
}

fn image_in(folder: &Path) -> Option<PathBuf> {
    fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
        })
}

/// Newer kernels are split: the image is in `linux-binary-…`, its modules in `linux-modules-…`.
const PARTS: [&str; 2] = ["linux-binary-", "linux-modules-"];

fn names_of_parts(apt: &PrivateApt) -> Result<String> {
    Ok(PARTS
        .map(|part| apt.cache(&["pkgnames", part]))
        .into_iter()
        .collect::<Result<Vec<_>>>()?
        .join("\n"))
}

/// Those of a package's parts that there are.
fn parts(names: &str, package: &str) -> Vec<String> {
    let version = package.strip_prefix("linux-image-").unwrap_or(package);
    PARTS
        .map(|part| format!("{part}{version}"))
        .into_iter()
        .filter(|part| names.lines().any(|name| name == part))
        .collect()
}

/// Which suite has it, for all that is known; newer ones are backported.
fn suite(major: u32, minor: u32) -> &'static str {
    match (major, minor) {
        (..=5, _) => "bullseye",
        (6, ..=1) => "bookworm",
        (6, 2..=12) => "trixie",
        _ => NEWER,
    }
}

/// `linux-image-6.12.41+deb13-cloud-amd64` is 6.12, and the 41 orders its updates.
fn version(package: &str) -> Option<(u32, u32, Vec<u32>)> {
    let rest = package.strip_prefix("linux-image-")?;
    let rest = rest.strip_suffix("-cloud-amd64")?;
    let mut numbers = rest
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok());
    let (major, minor) = (numbers.next()?, numbers.next()?);
    Some((major, minor, numbers.collect()))
}

fn newest(names: &str, major: u32, minor: u32) -> Option<&str> {
    names
        .lines()
        .filter_map(|name| version(name).map(|version| (version, name)))
        .filter(|((a, b, _), _)| (*a, *b) == (major, minor))
        .max()
        .map(|(_, name)| name)
}

fn offered(names: &str) -> Vec<String> {
    let mut versions: Vec<(u32, u32)> = names
        .lines()
        .filter_map(version)
        .map(|(major, minor, _)| (major, minor))
        .collect();
    versions.sort_unstable();
    versions.dedup();
    versions
        .iter()
        .map(|(major, minor)| format!("{major}.{minor}"))
        .collect()
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let mut entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let entry = entries
        .next()
        .with_context(|| format!("{} is empty", folder.display()))??;
    if entries.next().is_some() {
        bail!(
            "{} has more than one entry: only one is expected",
            folder.display()
        );
    }
    Ok(entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: &str = "linux-image-6.12.9+deb13-cloud-amd64\nlinux-image-cloud-amd64\n\
                         linux-image-6.12.41+deb13-cloud-amd64\nlinux-image-6.12.50+deb13-amd64\n\
                         linux-image-6.12.60+deb13-cloud-amd64-unsigned\nlinux-image-7.2.1+deb13-cloud-amd64\n";

    #[test]
    fn newest_update_of_a_version_is_taken() {
        let found = newest(NAMES, 6, 12);
        assert_eq!(found, Some("linux-image-6.12.41+deb13-cloud-amd64"));
        assert_eq!(newest(NAMES, 6, 1), None);
        assert_eq!(offered(NAMES), ["6.12", "7.2"]);
    }

    #[test]
    fn parts_of_a_split_package_are_found() {
        let names = "linux-modules-7.2.1+deb13-cloud-amd64\nlinux-binary-7.2.1+deb13-cloud-amd64\n";
        let found = parts(names, "linux-image-7.2.1+deb13-cloud-amd64");
        assert_eq!(
            found,
            [
                "linux-binary-7.2.1+deb13-cloud-amd64",
                "linux-modules-7.2.1+deb13-cloud-amd64"
            ]
        );
        assert!(parts(names, "linux-image-6.12.9+deb13-cloud-amd64").is_empty());
    }

    #[test]
    fn version_is_that_of_the_modules() {
        let kernel = |modules: Option<&str>| Kernel {
            name: String::new(),
            image: PathBuf::new(),
            modules: modules.map(PathBuf::from),
        };
        let folder = "/lib/modules/6.12.41+deb13-cloud-amd64";
        assert_eq!(kernel(Some(folder)).version(), Some((6, 12)));
        assert_eq!(kernel(None).version(), None);
    }

    #[test]
    fn kernel_is_a_version_or_a_file() {
        assert_eq!("6.1".parse(), Ok(Wanted::Version(6, 1)));
        assert_eq!(
            "/proc/version".parse(),
            Ok(Wanted::Image("/proc/version".into()))
        );
        assert!("bookworm".parse::<Wanted>().is_err());
    }
}
