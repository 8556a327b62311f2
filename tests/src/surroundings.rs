//! What of a pod's network namespace is not the loader's own, but may be changed by it.

use std::collections::BTreeSet;

use crate::namespace::{Namespace, errors};

/// One fact a line.
const SCRIPT: &str = r"
    for family in -4 -6; do
        ip $family rule show
        ip $family route show table all
    done
    ip -o addr show dev lo
    tc qdisc show | grep clsact
    for interface in $(ls /sys/class/net); do
        for direction in ingress egress; do
            tc filter show dev $interface $direction | sed s/^/$interface' '$direction': '/
        done
    done
    cd /proc/sys/net && grep . ipv4/tcp_fwmark_accept ipv4/fwmark_reflect ipv6/fwmark_reflect";

/// Rules, routes, addresses of `lo`, qdiscs and filters for programs, and the parameters that TPROXY needs, as text.
pub fn of(netns: &Namespace) -> BTreeSet<String> {
    // By a mount namespace of its own: the interfaces in sysfs are those of the namespace that mounted it.
    let mut command = netns.command("unshare");
    command.args(["-m", "sh", "-c"]);
    command.arg(format!("mount -t sysfs none /sys\n{SCRIPT}"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", errors(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(without_id).collect()
}

/// The ids of programs are new each time.
fn without_id(line: &str) -> String {
    let mut words = Vec::new();
    let mut all = line.split_whitespace();
    while let Some(word) = all.next() {
        words.push(word);
        if word == "id" {
            all.next();
        }
    }
    words.join(" ")
}
