//! What the machine must offer before anything is worth trying; each failure is one line that says what to do.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::ui::{self, Mark};
use crate::vm::version_of;

const BTF: &str = "/sys/kernel/btf/vmlinux";
/// SK_STORAGE from cgroup programs, sk_lookup, bpf_sk_assign and BTF relocation are all there from here on.
pub const OLDEST_KERNEL: (u32, u32) = (5, 15);

/// Checks everything and returns the cgroup2 mount point.
pub fn check(what: &str) -> Result<PathBuf> {
    ui::heading("preflight");
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "not root: `cargo xtask {what}` loads eBPF and makes namespaces; run it with sudo or in a root shell"
        );
    }
    ui::step(Mark::Ok, "root", "");

    let release = fs::read_to_string("/proc/sys/kernel/osrelease")
        .context("cannot read the kernel's version")?;
    kernel_is_new_enough(release.trim())?;
    ui::step(Mark::Ok, "kernel", release.trim());

    let mountinfo =
        fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let Some(cgroup2) = cgroup2_mount(&mountinfo) else {
        bail!(
            "no cgroup2 mount: run `mount -t cgroup2 none /sys/fs/cgroup` (or /sys/fs/cgroup/unified beside v1)"
        );
    };
    ui::step(Mark::Ok, "cgroup2", &cgroup2.display().to_string());

    if !Path::new(BTF).exists() {
        bail!("no {BTF}: this kernel has no BTF; boot one built with CONFIG_DEBUG_INFO_BTF=y");
    }
    ui::step(Mark::Ok, "BTF", BTF);

    match (find_program("ip"), find_program("apt-get")) {
        (Some(ip), _) => ui::step(Mark::Ok, "ip", &ip.display().to_string()),
        (None, Some(_)) => ui::step(Mark::Warn, "ip", "missing; setup installs iproute2"),
        (None, None) => {
            bail!("no `ip` program: install iproute2 with this system's package manager")
        }
    }
    Ok(cgroup2)
}

fn kernel_is_new_enough(release: &str) -> Result<()> {
    let Some(version) = version_of(release) else {
        bail!("cannot read a version out of kernel release {release:?}");
    };
    let (want_major, want_minor) = OLDEST_KERNEL;
    if version < OLDEST_KERNEL {
        bail!("kernel {release} is too old: boot {want_major}.{want_minor} or newer");
    }
    Ok(())
}

/// The first cgroup2 mount whose root is the hierarchy's (or this cgroup namespace's) root.
///
/// Fields of a mountinfo line: proc_pid_mountinfo(5). Blanks in paths are written as `\040`.
fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let is_cgroup2 = filesystem.split(' ').next() == Some("cgroup2");
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (is_cgroup2 && root == "/").then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}

/// Looks a program up as the shell would, and in the sbin directories that a user's PATH may lack.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = crate::cargo::path_with_cargo_bin();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(usual)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_mount_beside_v1_is_found() {
        let text = "37 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                    38 31 0:38 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            cgroup2_mount(text),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
    }

    #[test]
    fn cgroup2_mount_of_a_subtree_is_not_taken() {
        assert_eq!(
            cgroup2_mount("38 31 0:38 /a /mnt rw - cgroup2 cgroup2 rw\n"),
            None
        );
    }

    #[test]
    fn kernel_version_is_compared_as_numbers() {
        assert!(kernel_is_new_enough("5.15.0-91-generic").is_ok());
        assert!(kernel_is_new_enough("6.1.0").is_ok());
        assert!(kernel_is_new_enough("5.4.0").is_err());
        assert!(kernel_is_new_enough("4.19.0-cloud").is_err());
        assert!(kernel_is_new_enough("unknown").is_err());
    }
}
