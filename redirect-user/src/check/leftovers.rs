//! Istio's iptables rules in a network namespace, which would capture what redirect lets pass, and what it has captured again.

use std::fs;
use std::io::ErrorKind;
use std::process::{Command, Stdio};

use super::{Finding, Level};
use crate::observe::netns::NetworkNamespace;

/// Programs that list rules and, where the kernel has one, its own list of the tables in use.
const WAYS: &[(&str, Option<&str>)] = &[
    ("iptables-nft-save", None),
    ("ip6tables-nft-save", None),
    ("iptables-legacy-save", Some("ip_tables_names")),
    ("ip6tables-legacy-save", Some("ip6_tables_names")),
];

pub(super) fn findings(netns: Option<&NetworkNamespace>) -> Vec<Finding> {
    let look = || WAYS.iter().map(|way| look(*way)).collect();
    match netns {
        None => look(),
        Some(netns) => netns.run_inside(look).unwrap_or_else(|error| {
            vec![Finding::new(
                "iptables",
                Level::Warning,
                format!("not checked: {error}"),
            )]
        }),
    }
}

fn look((program, tables): (&str, Option<&str>)) -> Finding {
    let what = program.trim_end_matches("-save");
    // The program itself would load the kernel's modules to find nothing in them.
    if let Some(tables) = tables {
        let tables = fs::read_to_string(format!("/proc/thread-self/net/{tables}"));
        let none = match &tables {
            Ok(tables) => tables.trim().is_empty(),
            Err(error) => error.kind() == ErrorKind::NotFound,
        };
        if none {
            return Finding::new(what, Level::Ok, "no tables");
        }
    }
    // A child runs in the network namespace of the thread that starts it.
    let output = Command::new(program)
        .stdin(Stdio::null())
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .output();
    match output {
        Ok(output) if output.status.success() => {
            judge(what, &String::from_utf8_lossy(&output.stdout))
        }
        Ok(output) => {
            let error = String::from_utf8_lossy(&output.stderr);
            let detail = format!("not checked: {program}: {}", error.trim());
            Finding::new(what, Level::Warning, detail)
        }
        Err(error) => Finding::new(
            what,
            Level::Warning,
            format!("not checked: {program} cannot be run: {error}"),
        ),
    }
}

/// Reads what `iptables-save` writes. Chains of Istio's that no rule leads to do nothing.
fn judge(what: &str, rules: &str) -> Finding {
    let of_istio = |line: &&str| {
        line.split_once("-j ")
            .is_some_and(|(_, target)| target.starts_with("ISTIO_"))
            && line.starts_with("-A ")
            && !line.starts_with("-A ISTIO_")
    };
    let active: Vec<&str> = rules.lines().filter(of_istio).collect();
    if let Some(first) = active.first() {
        return Finding::new(
            what,
            Level::Bad,
            format!(
                "Istio's rules are in force here ({first}): connections would be captured twice; remove them with `istio-clean-iptables`, or leave out istio-init"
            ),
        );
    }
    if rules.lines().any(|line| line.starts_with(":ISTIO_")) {
        return Finding::new(
            what,
            Level::Note,
            "chains of Istio's are left, and no rule leads to them",
        );
    }
    Finding::new(what, Level::Ok, "no rules of Istio's")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_in_force_are_told_from_chains_that_are_left() {
        let chains = "*nat\n:PREROUTING ACCEPT [0:0]\n:ISTIO_OUTPUT - [0:0]\n-A ISTIO_OUTPUT -j ISTIO_REDIRECT\nCOMMIT\n";
        assert_eq!(judge("iptables-nft", chains).level, Level::Note);
        let active = format!("{chains}-A OUTPUT -p tcp -j ISTIO_OUTPUT\n");
        let finding = judge("iptables-nft", &active);
        assert_eq!(finding.level, Level::Bad);
        assert!(
            finding.detail.contains("-A OUTPUT -p tcp -j ISTIO_OUTPUT"),
            "{}",
            finding.detail
        );
        assert_eq!(
            judge("iptables-nft", "*nat\n-A OUTPUT -j KUBE\n").level,
            Level::Ok
        );
    }
}

#[cfg(test)]
mod fuzz {
    use prop::collection::vec;
    use prop::sample::select;
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{config, edits, text};

    const CHAINS: &[&str] = &["PREROUTING", "OUTPUT", "KUBE", "ISTIO_OUTPUT", "ISTIO_IN"];

    /// The chain a rule is in, and where it leads.
    type Rule = (&'static str, &'static str);

    fn leads_to_istio((chain, target): &Rule) -> bool {
        !chain.starts_with("ISTIO_") && target.starts_with("ISTIO_")
    }

    proptest! {
        #![proptest_config(config(1))]

        #[test]
        fn rules_that_lead_to_istios_chains_are_found(
            chains in vec(select(CHAINS), 0..4),
            rules in vec((select(CHAINS), select(CHAINS)), 0..6),
            edits in edits(),
        ) {
            let chains: String = chains.iter().map(|chain| format!(":{chain} - [0:0]\n")).collect();
            let lines: String = rules
                .iter()
                .map(|(chain, target)| format!("-A {chain} -p tcp -j {target}\n"))
                .collect();
            let saved = format!("*nat\n{chains}{lines}COMMIT\n");
            let expected = if rules.iter().any(leads_to_istio) {
                Level::Bad
            } else if chains.contains(":ISTIO_") {
                Level::Note
            } else {
                Level::Ok
            };
            prop_assert_eq!(judge("iptables-nft", &saved).level, expected, "{}", saved);
            prop_assert!(!judge("iptables-nft", &edits.of(&saved)).detail.contains('\n'));
        }

        #[test]
        fn any_output_is_judged_in_one_line(text in text()) {
            prop_assert!(!judge("iptables-nft", &text).detail.contains('\n'));
        }
    }
}
