//! Kernel modules: which are carried into the guest, what they need, and in what order they load.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use object::{Object as _, ObjectSection as _};

/// What the tests and the reference rules use, by name; nothing loads on demand in the guest. One
/// that a kernel does not have is missed by whatever needs it.
const WANTED: &[&str] = &[
    // Devices of pods.
    "veth",
    "dummy",
    "bridge",
    "tun",
    "macvlan",
    "vrf",
    // Finding listeners.
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    // iptables, both implementations.
    "ip_tables",
    "ip6_tables",
    "iptable_nat",
    "iptable_mangle",
    "iptable_raw",
    "iptable_filter",
    "ip6table_nat",
    "ip6table_mangle",
    "ip6table_raw",
    "ip6table_filter",
    "nf_tables",
    "nft_compat",
    "nft_chain_nat",
    "nft_ct",
    "nft_redir",
    "nft_nat",
    "nft_log",
    "nft_limit",
    "xt_owner",
    "xt_REDIRECT",
    "xt_tcpudp",
    "xt_mark",
    "xt_connmark",
    "xt_conntrack",
    "xt_addrtype",
    "xt_multiport",
    "xt_comment",
    "xt_socket",
    "xt_TPROXY",
    "xt_CT",
    "xt_nat",
    "xt_state",
    "xt_LOG",
    "nf_tproxy_ipv4",
    "nf_tproxy_ipv6",
    "nf_socket_ipv4",
    "nf_socket_ipv6",
    "nf_conntrack_netlink",
    // Filters on interfaces.
    "sch_ingress",
    "cls_bpf",
    "act_bpf",
    "sch_netem",
];

/// A module, decompressed.
#[derive(Debug)]
pub struct Module {
    pub name: String,
    pub content: Vec<u8>,
}

/// The modules in load order, and the names of those that this kernel has neither as a module nor built in.
pub fn in_load_order(folder: &Path) -> Result<(Vec<Module>, Vec<&'static str>)> {
    let files = files(folder)?;
    let built_in = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
    let is_built_in = |name: &str| {
        built_in.lines().any(|line| {
            let file = line.rsplit('/').next().unwrap_or_default();
            file.strip_suffix(".ko")
                .is_some_and(|file| file.replace('-', "_") == name)
        })
    };
    let (mut order, mut seen, mut missing) = (Vec::new(), HashSet::new(), Vec::new());
    for name in WANTED {
        if files.contains_key(*name) {
            add(name, &files, &mut seen, &mut order)?;
        } else if !is_built_in(name) {
            missing.push(*name);
        }
    }
    Ok((order, missing))
}

fn add(
    name: &str,
    files: &HashMap<String, PathBuf>,
    seen: &mut HashSet<String>,
    order: &mut Vec<Module>,
) -> Result<()> {
    // Before its dependencies: a circle would otherwise not end.
    if !seen.insert(name.to_owned()) {
        return Ok(());
    }
    // What another module needs and is no file is built in.
    let Some(path) = files.get(name) else {
        return Ok(());
    };
    let content = read(path)?;
    for dependency in dependencies(&content).with_context(|| format!("{}", path.display()))? {
        add(&dependency, files, seen, order)?;
    }
    order.push(Module {
        name: name.to_owned(),
        content,
    });
    Ok(())
}

/// Every module by its name, in which the kernel writes `-` as `_`.
fn files(folder: &Path) -> Result<HashMap<String, PathBuf>> {
    let (mut found, mut pending) = (HashMap::new(), vec![folder.join("kernel")]);
    while let Some(folder) = pending.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() {
                pending.push(entry.path());
            } else if let Some((name, "ko" | "ko.xz")) = name.split_once('.') {
                found.insert(name.replace('-', "_"), entry.path());
            }
        }
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let file = fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut file = BufReader::new(file);
    let mut content = Vec::new();
    if path.extension().is_some_and(|extension| extension == "xz") {
        lzma_rs::xz_decompress(&mut file, &mut content)
            .map_err(|error| anyhow!("cannot unpack {}: {error:?}", path.display()))?;
    } else {
        std::io::copy(&mut file, &mut content)?;
    }
    Ok(content)
}

/// The list in the module itself (`depends=a,b` in `.modinfo`): packages have no `modules.dep`, that is made on installation.
/// Soft dependencies count too, where they come before.
fn dependencies(module: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(module)?;
    let Some(section) = file.section_by_name(".modinfo") else {
        return Ok(Vec::new());
    };
    Ok(dependencies_in(section.data()?))
}

fn dependencies_in(modinfo: &[u8]) -> Vec<String> {
    let fields = modinfo
        .split(|byte| *byte == 0)
        .map(String::from_utf8_lossy);
    let mut names: Vec<String> = Vec::new();
    for field in fields {
        if let Some(list) = field.strip_prefix("depends=") {
            names.extend(list.split(',').map(str::to_owned));
        } else if let Some(list) = field.strip_prefix("softdep=pre:") {
            let before = list.split("post:").next().unwrap_or_default();
            names.extend(before.split_whitespace().map(str::to_owned));
        }
    }
    names.retain(|name| !name.is_empty());
    names.iter().map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let modinfo = b"license=GPL\0depends=nf_nat,x-tables\0softdep=pre: a b post: c\0depends=\0";
        assert_eq!(dependencies_in(modinfo), ["nf_nat", "x_tables", "a", "b"]);
    }
}
