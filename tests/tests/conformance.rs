//! The quick part of the differential test, and what shows that it notices.

use std::{fs, ops::ControlFlow};

use redirect_tests::{
    conformance::{
        News, Plan,
        known::KNOWN,
        observe::OUTCOME,
        report::{Difference, Repeats},
        run,
    },
    options::Options,
    skip,
};
use rstest::rstest;

/// `cargo xtask conformance` makes twenty times as many.
const ATTEMPTS: u64 = 1000;
/// The same attempts each time.
const SEED: u64 = 1;

/// With what this machine has of iptables; `None` without any.
fn plan(seed: u64, attempts: u64) -> Option<Plan> {
    let mut plan = Plan::new(seed, attempts);
    plan.variants.retain(|variant| variant.works());
    (!plan.variants.is_empty()).then_some(plan)
}

#[test]
fn random_connections_end_as_with_iptables() {
    let Some(plan) = plan(SEED, ATTEMPTS) else {
        skip!("neither iptables-nft nor iptables-legacy works");
    };
    let report = run(&plan, &mut |_| ControlFlow::Continue(()));
    println!("{report}");
    assert!(report.agrees(), "{report}");
    // Agreement about nothing but failures would be worth nothing.
    for (who, least) in [
        ("TCP 15001", 30),
        ("TCP 15006", 30),
        ("TCP app", 100),
        ("TCP service", 50),
        ("UDP dns", 5),
    ] {
        let met = report.outcomes.get(who);
        assert!(
            met.is_some_and(|met| *met >= least),
            "{who} answered {met:?} times:\n{report}"
        );
    }
}

/// A difference that was not seen again does not end a run: that may be the machine's fault.
fn until_it_disagrees(news: News<'_>) -> ControlFlow<()> {
    match news {
        News::SetDone(report) if !report.agrees() => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    }
}

/// Negative control: redirect is given one option more, and the smallest case that shows it is found.
#[test]
fn an_option_that_only_redirect_has_is_found_and_made_small() {
    let Some(plan) = plan(SEED, ATTEMPTS) else {
        skip!("neither iptables-nft nor iptables-legacy works");
    };
    let plan = Plan {
        distortion: |options| Options {
            exclude_outbound: "80",
            ..options
        },
        ..plan
    };
    let report = run(&plan, &mut until_it_disagrees);
    let to_80 = |difference: &&Difference| difference.attempt.port == 80;
    let Some(found) = report.differences.iter().find(to_80) else {
        panic!("not noticed: {report}");
    };
    assert_eq!(found.repeats, Repeats::Alone, "{report}");
    assert_eq!(found.unknown.first(), Some(&OUTCOME), "{report}");
    let options = &found.setting.options;
    for given in [
        options.proxy_port,
        options.exclude_inbound,
        options.exclude_cidrs,
        options.include_outbound,
        options.exclude_outbound,
        options.owner_groups_exclude,
        options.loopback_cidr,
        options.exclude_interfaces,
    ] {
        assert_eq!(given, "", "an option is left that plays no part: {report}");
    }
    assert!(!options.tproxy && !options.redirect_dns, "{report}");
    let again = run(&found.again, &mut |_| ControlFlow::Continue(()));
    assert_eq!((again.attempts, again.differences.len()), (1, 1), "{again}");
    let command = found.again.command();
    assert_eq!(again.differences[0].again.command(), command);
    assert_eq!(again.differences[0].words, found.words, "{again}");
    assert!(
        found.attempt.source.is_none() && found.attempt.mark == 0,
        "{report}"
    );
}

/// Negative control: redirect is not given what the rules are, and the smallest case has that option alone.
#[rstest]
#[case::dns(|options| Options { redirect_dns: false, ..options }, |options: &Options| options.redirect_dns)]
#[case::tproxy(|options| Options { tproxy: false, ..options }, |options: &Options| options.tproxy)]
#[case::interface(
    |options| Options { exclude_interfaces: "", ..options },
    |options: &Options| !options.exclude_interfaces.is_empty()
)]
fn an_option_that_redirect_lacks_is_found(
    #[case] distortion: fn(Options) -> Options,
    #[case] has: fn(&Options) -> bool,
) {
    let Some(plan) = plan(SEED, ATTEMPTS) else {
        skip!("neither iptables-nft nor iptables-legacy works");
    };
    let report = run(&Plan { distortion, ..plan }, &mut until_it_disagrees);
    assert!(!report.differences.is_empty(), "not noticed: {report}");
    for found in &report.differences {
        assert!(has(&found.setting.options), "{report}");
    }
}

/// The documentation has the list of the code, in its order and its words.
#[test]
fn documented_differences_are_those_of_the_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/behaviour.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, section) = text
        .split_once("\n## Where redirect differs from iptables\n")
        .unwrap();
    let section = section.split("\n## ").next().unwrap();
    let documented: Vec<&str> = section
        .lines()
        .filter(|line| line.starts_with("* "))
        .collect();
    let coded: Vec<String> = KNOWN
        .iter()
        .map(|known| format!("* **{}** {}", known.name, known.explanation))
        .collect();
    assert_eq!(documented, coded);
}
