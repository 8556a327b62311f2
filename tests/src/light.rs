//! Pods by the hundred: with what attaching one takes, and nobody in them who connects.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use crate::{cgroup::Cgroup, kubernetes, namespace::Namespace};

/// A network namespace with an address and a default route, a cgroup, and a process in both, which has listeners where a proxy would.
#[derive(Debug)]
pub struct LightPod {
    process: Child,
    /// What the daemon knows it by.
    uid: String,
    _cgroup: Cgroup,
    netns: Namespace,
}

impl LightPod {
    /// A pod with its cgroup below that one. `number` tells it from others of this process.
    pub fn new(above: &Cgroup, number: u16) -> Self {
        let process = std::process::id();
        let uid = format!("{process:08x}-0000-4000-8000-1{number:011x}");
        let netns = Namespace::new(&format!("rd-{process}-light-{number}"));
        // Otherwise link-local addresses appear seconds later, and routes change under a test.
        netns.sysctl(&[("ipv6/conf/default/disable_ipv6", "1")]);
        let [x, y] = number.to_be_bytes();
        let (own, gateway) = (Ipv4Addr::new(10, x, y, 2), Ipv4Addr::new(10, x, y, 1));
        netns.ip(&format!(
            "link add eth0 type veth peer name eth1\naddr add {own}/24 dev eth0\nlink set eth0 up\n\
             link set eth1 up\nroute add default via {gateway}"
        ));
        let cgroup = Cgroup::below(above, &format!("pod{uid}"));
        let process = netns.enter(|| {
            let listener = |port| {
                let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
                Stdio::from(OwnedFd::from(listener))
            };
            Command::new("sleep")
                .arg("3600")
                .stdin(listener(15001))
                .stdout(listener(15006))
                .spawn()
                .unwrap()
        });
        fs::write(cgroup.path().join("cgroup.procs"), process.id().to_string()).unwrap();
        Self {
            process,
            uid,
            _cgroup: cgroup,
            netns,
        }
    }

    /// The pod's object after injection.
    pub fn object(&self) -> Value {
        kubernetes::object_of(self.netns.name(), &self.uid, &[])
    }
}

impl Drop for LightPod {
    fn drop(&mut self) {
        let _already_gone = self.process.kill();
        let _reaped = self.process.wait();
    }
}
