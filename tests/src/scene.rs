//! A pod with its cast: a proxy, an application, a service outside; and the check of one connection between them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use crate::{
    actor::Actor,
    backend::Backend,
    judge::Judge,
    loader,
    options::Options,
    pod::{ELSEWHERE4, ELSEWHERE6, Pod, Shape, service},
    protocol::{Dial, Dialed, Family, Identity, Listen, Probe},
};

/// Ports on which the application listens in the pod, and the service outside.
pub const PORTS: [u16; 17] = [
    53, 80, 443, 5000, 7999, 8000, 8005, 8010, 8011, 8080, 9000, 9090, 15007, 15008, 15020, 15021,
    15090,
];
/// The service also answers where the pod has its proxy.
pub const PROXY_PORTS: [u16; 2] = [15001, 15006];

/// The name of the application's listeners.
pub const APP: &str = "app";
/// The name of the listeners outside.
pub const SERVICE: &str = "service";

/// Where a connection is to end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lands {
    /// Where it was sent.
    Direct,
    /// At the proxy's outbound listener.
    Outbound,
    /// At the proxy's inbound listener.
    Inbound,
    /// At the proxy's inbound listener, with the address and port that it was sent to: TPROXY.
    InPlace,
}

/// A destination, in terms of the scene.
#[derive(Clone, Copy, Debug)]
pub enum To {
    /// The service outside.
    Service(u16),
    /// The service in another network.
    Elsewhere(u16),
    /// The pod's own address.
    Own(u16),
    /// 127.0.0.1 or ::1.
    Localhost(u16),
    /// 0.0.0.0 or ::.
    Unspecified(u16),
    /// This address, in tests of its own family only.
    Address(IpAddr, u16),
}

/// One connection and its expected end.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Who dials; `None` is somebody outside the pod.
    pub from: Option<Identity>,
    /// The source to bind.
    pub bind: Option<SocketAddr>,
    /// `SO_MARK`; 0 for none.
    pub mark: u32,
    /// The destination.
    pub to: To,
    /// Where it ends once captured.
    pub lands: Lands,
}

/// A connection made by a process of the pod.
pub const fn out(from: Identity, to: To, lands: Lands) -> Attempt {
    Attempt {
        from: Some(from),
        bind: None,
        mark: 0,
        to,
        lands,
    }
}

/// A connection made from outside to the pod's address.
pub const fn inward(port: u16, lands: Lands) -> Attempt {
    Attempt {
        from: None,
        bind: None,
        mark: 0,
        to: To::Own(port),
        lands,
    }
}

impl Attempt {
    /// Marks the connection, which needs a superuser.
    pub const fn mark(mut self, mark: u32) -> Self {
        self.mark = mark;
        self
    }

    /// Binds to an address first.
    pub const fn source(mut self, address: IpAddr) -> Self {
        self.bind = Some(SocketAddr::new(address, 0));
        self
    }
}

/// A pod with its cast.
pub struct Scene {
    attached: Option<Backend>,
    /// Owner of the proxy's listeners.
    pub proxy: Actor,
    /// Owner of the application's listeners.
    pub app: Actor,
    /// In the peer's namespace and in no cgroup of ours.
    pub outside: Actor,
    others: BTreeMap<Identity, Actor>,
    options: Options,
    /// The pod.
    pub pod: Pod,
}

impl Scene {
    /// A dual-stack pod and its cast; nothing is captured yet.
    pub fn new() -> Self {
        Self::with(Pod::new(), &Options::ISTIO)
    }

    /// A pod of that shape.
    pub fn shaped(shape: Shape) -> Self {
        Self::with(Pod::shaped(shape), &Options::ISTIO)
    }

    /// The proxy listens where `options` say.
    pub fn with(pod: Pod, options: &Options) -> Self {
        let mut scene = Self::without_proxy(pod, options);
        scene.open_proxy();
        scene
    }

    /// Nobody listens on the proxy's ports yet.
    pub fn without_proxy(pod: Pod, options: &Options) -> Self {
        let inside = |role: &str, identity: Identity| {
            Actor::start(
                &pod.netns.path(),
                Some(pod.cgroup.child(role)),
                identity.shifted(pod.id_offset),
            )
        };
        let proxy = inside("proxy", Identity::PROXY);
        let mut app = inside("app", Identity::APP);
        let mut outside = Actor::start(&pod.peer.path(), None, Identity::ROOT);
        for port in PORTS {
            for address in wildcards(port) {
                app.listen(Listen::new(APP, address));
            }
        }
        for port in PORTS.into_iter().chain(PROXY_PORTS) {
            for address in wildcards(port) {
                outside.listen(Listen::new(SERVICE, address));
            }
        }
        Self {
            attached: None,
            proxy,
            app,
            outside,
            others: BTreeMap::new(),
            options: *options,
            pod,
        }
    }

    /// Opens the proxy's listeners, as wildcards of both families. Each is named after its port.
    ///
    /// iptables' TPROXY reaches transparent listeners only, which take a superuser to open.
    pub fn open_proxy(&mut self) {
        if self.options.tproxy {
            let options = self.options;
            for port in [options.outbound_listener(), options.inbound_listener()] {
                for address in wildcards(port) {
                    let listen = Listen::new(&port.to_string(), address).transparent();
                    self.actor(&Identity::TPROXY).listen(listen);
                }
            }
            return;
        }
        for port in [
            self.options.outbound_listener(),
            self.options.inbound_listener(),
        ] {
            for address in wildcards(port) {
                self.proxy.listen(Listen::new(&port.to_string(), address));
            }
        }
    }

    /// Starts capturing, or changes the options.
    pub fn attach(&mut self, backend: Backend, options: &Options) {
        backend.attach(&self.pod, options);
        self.options = *options;
        self.attached = Some(backend);
    }

    /// Takes over a capture that something else began: expects its marks, and ends it.
    pub fn adopt(&mut self, options: &Options) {
        self.options = *options;
        self.attached = Some(Backend::Redirect);
    }

    /// Who captures.
    pub const fn captured_by(&self) -> Option<Backend> {
        self.attached
    }

    /// Stops capturing.
    pub fn detach(&mut self) {
        if let Some(backend) = self.attached.take() {
            backend.detach(&self.pod);
        }
    }

    /// The process of the pod with that identity.
    pub fn actor(&mut self, identity: &Identity) -> &mut Actor {
        match identity {
            identity if *identity == Identity::PROXY => &mut self.proxy,
            identity if *identity == Identity::APP => &mut self.app,
            identity => {
                let pod = &self.pod;
                self.others.entry(identity.clone()).or_insert_with(|| {
                    let cgroup = pod.cgroup.child("others");
                    Actor::start(
                        &pod.netns.path(),
                        Some(cgroup),
                        identity.clone().shifted(pod.id_offset),
                    )
                })
            }
        }
    }

    /// A destination as an address.
    pub fn address(&self, family: Family, to: To) -> SocketAddr {
        to.address(&self.pod, family)
    }

    /// Dials and compares who answered, and what both ends saw, with what iptables' REDIRECT shows.
    pub fn attempt(&mut self, family: Family, attempt: &Attempt) -> Result<(), String> {
        let to = self.address(family, attempt.to);
        let mut dial = Dial::new(family, to);
        dial.bind = attempt.bind;
        dial.mark = attempt.mark;
        let dialed = match &attempt.from {
            Some(identity) => self.actor(identity).dial(&dial),
            None => self.outside.dial(&dial),
        };
        self.judge(&dialed, to, attempt)
            .map_err(|wrong| format!("{family:?} {attempt:?}: {wrong}\n    {dialed:?}"))
    }

    /// Compares one connection with its expectation.
    pub fn judge(&self, dialed: &Dialed, to: SocketAddr, attempt: &Attempt) -> Result<(), String> {
        let judge = Judge {
            pod: &self.pod,
            options: &self.options,
            attached: self.attached,
        };
        judge.judge(dialed, to, attempt)
    }

    /// Runs a table: uncaptured first, when everything has to be direct; then captured; then uncaptured again.
    pub fn run(backend: Backend, family: Family, options: Options, attempts: &[Attempt]) {
        Self::run_in(Pod::new(), backend, family, &options, attempts);
    }

    /// As [`Self::run`], in a pod of that kind.
    pub fn run_in(
        pod: Pod,
        backend: Backend,
        family: Family,
        options: &Options,
        attempts: &[Attempt],
    ) {
        let mut scene = Self::with(pod, options);
        // Addresses the loader adds (::6) are sources in some tables.
        scene.pod.netns.ip("addr replace ::6/128 dev lo nodad");
        let control: Vec<Attempt> = attempts
            .iter()
            .map(|attempt| Attempt {
                lands: Lands::Direct,
                ..attempt.clone()
            })
            .collect();
        scene.all("before attach", family, &control);
        scene.attach(backend, options);
        scene.all("attached", family, attempts);
        scene.detach();
        scene.all("after detach", family, &control);
    }

    /// Every attempt has to go as expected; all that do not are reported together.
    pub fn all(&mut self, when: &str, family: Family, attempts: &[Attempt]) {
        let wrong: Vec<String> = attempts
            .iter()
            .filter_map(|attempt| self.attempt(family, attempt).err())
            .collect();
        assert!(wrong.is_empty(), "{when}:\n  {}", wrong.join("\n  "));
    }
}

impl Default for Scene {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        match self.attached.take() {
            Some(Backend::Redirect) if std::thread::panicking() => {
                drop(loader::detach(self.pod.cgroup.path()));
            }
            Some(Backend::Redirect) => Backend::Redirect.detach(&self.pod),
            // The rules go with the namespace.
            Some(Backend::Iptables) | None => (),
        }
    }
}

impl To {
    /// As an address, seen from that pod.
    pub fn address(self, pod: &Pod, family: Family) -> SocketAddr {
        let (ipv4, ipv6): (IpAddr, IpAddr) = match self {
            Self::Service(_) => return SocketAddr::new(service(family), self.port()),
            Self::Elsewhere(_) => (ELSEWHERE4.into(), ELSEWHERE6.into()),
            Self::Own(_) => (pod.ipv4.into(), pod.ipv6.into()),
            Self::Localhost(_) => (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()),
            Self::Unspecified(_) => (Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()),
            Self::Address(address, _) => (address, address),
        };
        SocketAddr::new(if family.is_ipv4() { ipv4 } else { ipv6 }, self.port())
    }

    /// The port.
    pub const fn port(self) -> u16 {
        match self {
            Self::Service(port)
            | Self::Elsewhere(port)
            | Self::Own(port)
            | Self::Localhost(port)
            | Self::Unspecified(port)
            | Self::Address(_, port) => port,
        }
    }
}

/// 0.0.0.0 and ::.
pub fn wildcards(port: u16) -> [SocketAddr; 2] {
    [
        (Ipv4Addr::UNSPECIFIED, port).into(),
        (Ipv6Addr::UNSPECIFIED, port).into(),
    ]
}

/// 127.0.0.1 or ::1, as the family of `like`.
pub const fn loopback(like: SocketAddr, port: u16) -> SocketAddr {
    let ip = if like.is_ipv4() {
        IpAddr::V4(Ipv4Addr::LOCALHOST)
    } else {
        IpAddr::V6(Ipv6Addr::LOCALHOST)
    };
    SocketAddr::new(ip, port)
}

/// An answer of `SO_ORIGINAL_DST` that gave this address.
pub const fn answered(address: SocketAddr, length: usize) -> Probe {
    Probe {
        errno: None,
        address: Some(address),
        length,
    }
}
