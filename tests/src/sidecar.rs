//! A real Envoy as the container `istio-proxy` of a pod that a container runtime runs.

use std::{
    fs::{self, Permissions},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use crate::{
    containerd::{Containerd, Mount, Sandbox, Security},
    envoy::{ARGUMENTS, AccessLog, Inbound, READY_PORT, configuration},
    namespace::enter,
};

/// Whom Istio runs it as.
const ID: i64 = 1337;

/// A running Envoy, which ends with its pod.
pub struct Sidecar {
    /// Where it notes connections.
    pub log: AccessLog,
    _folder: TempDir,
}

impl Sidecar {
    /// Starts it as the pod's first container, and waits until it serves.
    pub fn start(containerd: &mut Containerd, envoy: &Path, sandbox: &Sandbox) -> Self {
        let folder = TempDir::new().unwrap();
        // Envoy writes its access log there, unprivileged.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
        let log = AccessLog(folder.path().join("access.log"));
        let file = folder.path().join("envoy.yaml");
        let address = containerd.address(sandbox);
        fs::write(&file, configuration(address, &log.0, Inbound::Redirected)).unwrap();

        let security = Security {
            user: Some(ID),
            group: Some(ID),
            drop: vec!["ALL".to_owned()],
            no_new_privileges: true,
            seccomp: true,
            ..Security::default()
        };
        let mut config = Containerd::of_host("istio-proxy", 0, &security);
        config.command = vec![
            "/envoy/envoy".to_owned(),
            "--config-path".to_owned(),
            file.display().to_string(),
        ];
        config.args = ARGUMENTS.split(' ').map(str::to_owned).collect();
        config.mounts.extend([
            Mount::of_host(folder.path(), false),
            Mount {
                container_path: "/envoy".to_owned(),
                ..Mount::of_host(envoy.parent().unwrap(), true)
            },
        ]);
        let container = containerd.start_container(sandbox, config);
        let netns = PathBuf::from(format!("/proc/{}/ns/net", containerd.pid(&container)));
        let ready = SocketAddr::from((Ipv4Addr::LOCALHOST, READY_PORT));
        containerd.wait_until("Envoy serves", |containerd| {
            let ended = containerd.exit(&container);
            assert!(ended.is_none(), "{ended:?}: {}", container.log());
            enter(&netns, || TcpStream::connect(ready).is_ok())
        });
        Self {
            log,
            _folder: folder,
        }
    }
}
