//! What the kernel offers, by asking it: a version number says little about a distribution's kernel.

use std::fs;

use aya::maps::MapType;
use aya::programs::ProgramType;
use aya::sys::{is_helper_supported, is_map_supported, is_program_supported};
use aya_obj::generated::bpf_func_id;

use super::{Finding, Level};
use crate::kernel::{self, Offsets};

const PROGRAMS: &[(ProgramType, &str)] = &[
    (ProgramType::CgroupSockAddr, "cgroup_sock_addr"),
    (ProgramType::CgroupSockopt, "cgroup_sockopt"),
    (ProgramType::SockOps, "sock_ops"),
    (ProgramType::SkLookup, "sk_lookup"),
];

const MAPS: &[(MapType, &str)] = &[
    (MapType::LruHash, "LRU hash"),
    (MapType::LpmTrie, "LPM trie"),
    (MapType::SockHash, "sockhash"),
    (MapType::SkStorage, "socket storage"),
    (MapType::RingBuf, "ring buffer"),
];

/// Helpers that came later than the programs they are called from.
const HELPERS: &[(ProgramType, bpf_func_id, &str)] = &[
    (
        ProgramType::SockOps,
        bpf_func_id::BPF_FUNC_get_netns_cookie,
        "network namespace cookies in sockops programs (Linux 5.15)",
    ),
    (
        ProgramType::CgroupSockopt,
        bpf_func_id::BPF_FUNC_get_netns_cookie,
        "network namespace cookies in sockopt programs (Linux 5.15)",
    ),
    (
        ProgramType::CgroupSockAddr,
        bpf_func_id::BPF_FUNC_sk_storage_get,
        "socket storage in connect programs (Linux 5.8)",
    ),
    (
        ProgramType::SkLookup,
        bpf_func_id::BPF_FUNC_sk_assign,
        "choosing a socket in sk_lookup programs (Linux 5.9)",
    ),
];

pub(super) fn findings() -> Vec<Finding> {
    vec![version(), features(), btf(), set_retval(), lockdown()]
}

fn version() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let (level, detail) = match kernel::require_version() {
        Ok(()) => (Level::Ok, format!("Linux {}", release.trim())),
        Err(error) => (Level::Bad, error.to_string()),
    };
    Finding::new("kernel", level, detail)
}

/// An answer is not always to be had: without privileges the kernel refuses the question itself.
fn features() -> Finding {
    let programs = PROGRAMS.iter().map(|(kind, name)| {
        let answer = is_program_supported(*kind).map_err(|error| error.to_string());
        (format!("{name} programs"), answer)
    });
    let maps = MAPS.iter().map(|(kind, name)| {
        let answer = is_map_supported(*kind).map_err(|error| error.to_string());
        (format!("{name} maps"), answer)
    });
    let helpers = HELPERS.iter().map(|(kind, helper, name)| {
        let answer = is_helper_supported(*kind, *helper).map_err(|error| error.to_string());
        ((*name).to_owned(), answer)
    });
    summary(programs.chain(maps).chain(helpers))
}

fn summary(answers: impl Iterator<Item = (String, Result<bool, String>)>) -> Finding {
    let (mut there, mut missing, mut unknown) = (0, Vec::new(), Vec::new());
    for (name, answer) in answers {
        match answer {
            Ok(true) => there += 1,
            Ok(false) => missing.push(name),
            Err(error) => unknown.push(format!("{name} ({error})")),
        }
    }
    let (level, detail) = if !missing.is_empty() {
        let detail = format!("missing: {}; boot a newer kernel", missing.join(", "));
        (Level::Bad, detail)
    } else if !unknown.is_empty() {
        let detail = format!("cannot be told: {}", unknown.join(", "));
        (Level::Warning, detail)
    } else {
        let detail = format!("all {there} program types, map types and helpers are there");
        (Level::Ok, detail)
    };
    Finding::new("features", level, detail)
}

fn btf() -> Finding {
    let (level, detail) = match Offsets::of_running_kernel() {
        Ok(_) => (Level::Ok, "tells where sockets keep their owner".to_owned()),
        Err(error) => (
            Level::Bad,
            format!("{error:#}; redirect needs CONFIG_DEBUG_INFO_BTF=y"),
        ),
    };
    Finding::new("BTF", level, detail)
}

fn set_retval() -> Finding {
    const WHAT: &str = "error numbers";
    let helper = bpf_func_id::BPF_FUNC_set_retval;
    match is_helper_supported(ProgramType::CgroupSockAddr, helper) {
        Ok(true) => Finding::new(WHAT, Level::Ok, "refused connections get the right one"),
        Ok(false) => Finding::new(
            WHAT,
            Level::Note,
            "refused connections get EPERM; the right one takes Linux 5.18",
        ),
        Err(error) => Finding::new(WHAT, Level::Warning, format!("cannot be told: {error}")),
    }
}

/// In confidentiality mode `bpf_probe_read_kernel` is off, which tells who created a socket.
fn lockdown() -> Finding {
    const FOLDER: &str = "/sys/kernel/security";
    let read = |name: &str| fs::read_to_string(format!("{FOLDER}/{name}")).ok();
    let (modes, modules) = (read("lockdown"), read("lsm"));
    let modules = modules.as_deref().map(str::trim);
    let (level, detail) = match (modes.as_deref().and_then(chosen), modules) {
        (Some("confidentiality"), _) => (
            Level::Bad,
            "lockdown=confidentiality forbids reading who created a socket: boot with lockdown=integrity or none"
                .to_owned(),
        ),
        (None, None) => (
            Level::Note,
            format!("cannot be told, nothing is mounted at {FOLDER}; the rehearsal shows what is in the way"),
        ),
        (mode, modules) => (
            Level::Ok,
            format!(
                "{}; security modules: {}",
                mode.map_or_else(|| "no lockdown".to_owned(), |mode| format!("lockdown={mode}")),
                modules.unwrap_or("unknown")
            ),
        ),
    };
    Finding::new("lockdown", level, detail)
}

/// `none [integrity] confidentiality` is integrity.
fn chosen(modes: &str) -> Option<&str> {
    let (_, rest) = modes.split_once('[')?;
    rest.split_once(']').map(|(mode, _)| mode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_features_are_named_before_unknown_ones() {
        let of = |answers: &[(&str, Result<bool, &str>)]| {
            let answers = answers
                .iter()
                .map(|(name, answer)| ((*name).to_owned(), answer.map_err(str::to_owned)));
            let finding = summary(answers.collect::<Vec<_>>().into_iter());
            (finding.level, finding.detail)
        };
        let (level, detail) = of(&[("a", Ok(true)), ("b", Ok(false)), ("c", Err("EPERM"))]);
        assert_eq!(level, Level::Bad);
        assert_eq!(detail, "missing: b; boot a newer kernel");
        let (level, detail) = of(&[("a", Ok(true)), ("c", Err("EPERM"))]);
        assert_eq!(
            (level, detail.as_str()),
            (Level::Warning, "cannot be told: c (EPERM)")
        );
        assert_eq!(of(&[("a", Ok(true))]).0, Level::Ok);
    }

    #[test]
    fn lockdown_mode_is_the_one_in_brackets() {
        assert_eq!(chosen("[none] integrity confidentiality\n"), Some("none"));
        assert_eq!(
            chosen("none integrity [confidentiality]\n"),
            Some("confidentiality")
        );
        assert_eq!(chosen(""), None);
    }
}
