//! A real Envoy as the pod's proxy, configured as Istio's sidecar is: original-destination listeners and clusters.

use std::{
    env,
    fs::{self, Permissions},
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{
    actor::Actor,
    patience::patience,
    pod::Pod,
    protocol::{Dial, Family},
    target::in_target,
};

/// How long Envoy may take to listen, and then to write a log line.
const PATIENCE: Duration = Duration::from_secs(30);
/// Answers as soon as Envoy runs.
pub const READY_PORT: u16 = 15099;
/// What it is called with, besides its configuration.
pub const ARGUMENTS: &str =
    "--disable-hot-restart --concurrency 2 --log-level warning --file-flush-interval-msec 20";
/// Connections to this port go to the pod's own application, as when a load balancer picks the caller's own pod.
pub const SELF_PORT: u16 = 9999;

/// Where Envoy is: `REDIRECT_ENVOY`, or `envoy/envoy` in a target directory; else what was looked at.
pub fn find() -> Result<PathBuf, String> {
    if let Some(path) = env::var_os("REDIRECT_ENVOY") {
        return Ok(path.into());
    }
    in_target("envoy/envoy").ok_or_else(|| {
        "no envoy/envoy in the target directory: `cargo xtask setup` puts it there".to_owned()
    })
}

/// How inbound connections get there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Inbound {
    /// By REDIRECT.
    Redirected,
    /// By TPROXY.
    Transparent,
}

impl Inbound {
    /// Whom Istio runs it as.
    const fn user(self) -> &'static str {
        match self {
            Self::Redirected => "1337",
            Self::Transparent => "0",
        }
    }
}

/// A running Envoy, ended with this value.
#[derive(Debug)]
pub struct Envoy {
    child: Child,
    folder: PathBuf,
}

impl Envoy {
    /// Runs Envoy as 1337 in the pod and waits until it listens. `app` has to live in the pod.
    pub fn start(program: &Path, pod: &Pod, app: &mut Actor) -> Self {
        Self::run(program, pod, app, Inbound::Redirected)
    }

    /// Runs Envoy for TPROXY: as a superuser with the group 1337, with a transparent inbound listener, which calls the
    /// application from its client's address.
    pub fn start_transparent(program: &Path, pod: &Pod, app: &mut Actor) -> Self {
        Self::run(program, pod, app, Inbound::Transparent)
    }

    fn run(program: &Path, pod: &Pod, app: &mut Actor, inbound: Inbound) -> Self {
        let folder = env::temp_dir().join(pod.netns.name());
        fs::create_dir(&folder).unwrap();
        // Envoy writes its access log there, unprivileged.
        fs::set_permissions(&folder, Permissions::from_mode(0o777)).unwrap();
        let config = folder.join("envoy.yaml");
        fs::write(
            &config,
            configuration(pod.ipv4.into(), &folder.join("access.log"), inbound),
        )
        .unwrap();
        let script = format!(
            "echo 0 > \"$0/cgroup.procs\"; exec nsenter \"--net=$1\" \
             setpriv --reuid \"$4\" --regid 1337 --clear-groups \"$2\" --config-path \"$3\" {ARGUMENTS}"
        );
        let child = Command::new("sh")
            .args(["-c", &script])
            .arg(pod.cgroup.child("envoy"))
            .arg(pod.netns.path())
            .args([program, &config])
            .arg(inbound.user())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.join("envoy.log")).unwrap())
            .spawn()
            .unwrap();
        let mut envoy = Self { child, folder };
        envoy.wait(app);
        envoy
    }

    fn wait(&mut self, app: &mut Actor) {
        let ready = ([127, 0, 0, 1], READY_PORT).into();
        let mut dial = Dial::new(Family::V4, ready);
        dial.greeting = false;
        let deadline = Instant::now() + patience(PATIENCE);
        while app.dial(&dial).error.is_some() {
            let ended = self.child.try_wait().unwrap();
            if ended.is_some() || Instant::now() > deadline {
                panic!(
                    "Envoy {ended:?}: {}",
                    fs::read_to_string(self.folder.join("envoy.log")).unwrap()
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the access log line of a connection from `downstream_remote`, and returns its words.
    pub fn access_log(&self, downstream_remote: &str) -> Vec<String> {
        let log = AccessLog(self.folder.join("access.log"));
        log.wait_for(&format!("a connection from {downstream_remote}"), |words| {
            words[2] == downstream_remote
        })
    }
}

/// The file that Envoy notes each connection in when it has ended.
#[derive(Debug)]
pub struct AccessLog(pub PathBuf);

impl AccessLog {
    /// The words of each line: listener, downstream_local, downstream_remote, upstream_host, upstream_local.
    pub fn lines(&self) -> Vec<Vec<String>> {
        let log = fs::read_to_string(&self.0).unwrap_or_default();
        let whole = log
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        whole
            .map(|line| line.trim_end().split(' ').map(str::to_owned).collect())
            .collect()
    }

    /// Waits for the line that is meant, and returns its words.
    pub fn wait_for(&self, what: &str, is_it: impl Fn(&[String]) -> bool) -> Vec<String> {
        let deadline = Instant::now() + patience(PATIENCE);
        loop {
            let lines = self.lines();
            if let Some(line) = lines.iter().find(|line| is_it(line)) {
                return line.clone();
            }
            assert!(
                Instant::now() < deadline,
                "not in the access log: {what}\n{lines:#?}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
        let _left_in_tmp = fs::remove_dir_all(&self.folder);
    }
}

/// A configuration for the pod of that address; connections are noted in `access_log`.
pub fn configuration(own: IpAddr, access_log: &Path, mode: Inbound) -> String {
    let log = |listener: &str| {
        format!(
            r#"access_log: [{{ name: envoy.access_loggers.file, typed_config: {{
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {path:?},
              log_format: {{ text_format_source: {{ inline_string: "{listener} %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %UPSTREAM_HOST% %UPSTREAM_LOCAL_ADDRESS%\n" }} }} }} }}]"#,
            path = access_log.display().to_string()
        )
    };
    let chain = |listener: &str, cluster: &str, matching: &str| {
        format!(
            r#"{{ {matching} filters: [{{ name: envoy.filters.network.tcp_proxy, typed_config: {{
              "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy,
              stat_prefix: {cluster}, cluster: {cluster}, {} }} }}] }}"#,
            log(listener)
        )
    };
    let transparent = mode == Inbound::Transparent;
    let listener = |name: &str, port: u16, chains: &str| {
        let (options, filter) = if transparent && name == "inbound" {
            (
                "transparent: true",
                r#", { name: envoy.filters.listener.original_src, typed_config: {
      "@type": type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc, mark: 1337 } }"#,
            )
        } else {
            ("transparent: false", "")
        };
        format!(
            r#"
  - name: {name}
    address: {{ socket_address: {{ address: 0.0.0.0, port_value: {port} }} }}
    additional_addresses: [{{ address: {{ socket_address: {{ address: "::", port_value: {port} }} }} }}]
    {options}
    listener_filters: [{{ name: envoy.filters.listener.original_dst, typed_config: {{
      "@type": type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst }} }}{filter}]
    filter_chains: [{chains}]"#
        )
    };
    let to_self = chain(
        "outbound",
        "self",
        &format!("filter_chain_match: {{ destination_port: {SELF_PORT} }},"),
    );
    let outbound = listener(
        "outbound",
        15001,
        &format!("{to_self}, {}", chain("outbound", "original", "")),
    );
    let inbound = listener(
        "inbound",
        15006,
        &chain("inbound", "inbound_passthrough", ""),
    );
    // Else the connection comes from where the original_src filter says.
    let bind = if transparent {
        ""
    } else {
        r#"
    upstream_bind_config:
      source_address: { address: 127.0.0.6, port_value: 0 }
      extra_source_addresses: [{ address: { address: "::6", port_value: 0 } }]"#
    };
    format!(
        r#"
static_resources:
  listeners:{outbound}{inbound}
  - name: ready
    address: {{ socket_address: {{ address: 127.0.0.1, port_value: {READY_PORT} }} }}
    filter_chains: [{{ filters: [{{ name: envoy.filters.network.direct_response, typed_config: {{
      "@type": type.googleapis.com/envoy.extensions.filters.network.direct_response.v3.Config,
      response: {{ inline_string: "ready\n" }} }} }}] }}]
  clusters:
  - {{ name: original, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: 2s }}
  - name: inbound_passthrough
    type: ORIGINAL_DST
    lb_policy: CLUSTER_PROVIDED
    connect_timeout: 2s{bind}
  - name: self
    type: STATIC
    connect_timeout: 2s
    load_assignment:
      cluster_name: self
      endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: {own}, port_value: 8080 }} }} }} }}] }}]
"#
    )
}
