//! Who is told what.

use redirect_common::log::Follower;

#[test]
fn request_ends_by_itself() {
    let follower = Follower {
        until_ns: 1000,
        ..Follower::default()
    };
    assert!(follower.wants(7) && follower.reads_at(999));
    assert!(!follower.reads_at(1000));
    // Nobody: the time is not even asked.
    assert!(!Follower::default().wants(7));
}

#[test]
fn request_may_be_for_one_namespace() {
    let follower = Follower {
        until_ns: 1000,
        netns_cookie: 7,
        ..Follower::default()
    };
    assert!(follower.wants(7));
    assert!(!follower.wants(8));
}
