//! The quick part of the differential test, and what shows that it notices.

use std::ops::ControlFlow;

use redirect_tests::conformance::{Plan, run};

/// `cargo xtask conformance` makes twenty times as many.
const ATTEMPTS: u64 = 1000;

#[test]
fn random_connections_end_as_with_iptables() {
    let report = run(&Plan::new(1, ATTEMPTS), &mut |report| {
        eprintln!("{}", report.attempts);
        ControlFlow::Continue(())
    });
    println!("{report}");
    assert!(report.agrees(), "{report}");
}
