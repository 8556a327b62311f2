//! The short version of `cargo xtask soak`, and what shows that it notices.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::{ops::ControlFlow, time::Duration};

use redirect_tests::{
    options::Options,
    soak::{Plan, report::Report, run},
};

/// The same schedule each time.
const SEED: u64 = 1;

fn plan(seconds: u64) -> Plan {
    Plan {
        held: 1_000,
        round_ms: 3_000,
        ..Plan::new(SEED, Duration::from_secs(seconds))
    }
}

#[test]
fn connections_of_every_kind_end_where_they_should_while_everything_changes() {
    let report = run(&plan(30), &mut |_| ControlFlow::Continue(()));
    println!("{report}");
    assert!(report.is_clean(), "{report}");
}
