//! The API as a pod calls it: by TLS, with what a kubelet mounts for the pod's service account.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use axum::{
    extract::Request,
    http::{StatusCode, header},
    middleware::{Next, from_fn},
    response::{IntoResponse as _, Response},
    serve::Listener,
};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
    server::TlsStream,
};

use super::{ApiServer, router};
use crate::namespace::succeed;

const TOKEN: &str = "token-of-the-test";
const AUTHORITY: &str = "ca.crt";

/// What a pod is given to call the API.
pub struct ServiceAccount {
    address: SocketAddr,
    /// Holds `ca.crt`, `token` and `namespace`.
    mounted: TempDir,
}

impl ServiceAccount {
    /// Where a kubelet mounts it.
    pub const MOUNT_POINT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

    /// What is mounted there.
    pub fn directory(&self) -> &Path {
        self.mounted.path()
    }

    /// The variables by which a kubelet tells every container where the API is.
    pub fn environment(&self) -> [(&str, String); 2] {
        [
            ("KUBERNETES_SERVICE_HOST", self.address.ip().to_string()),
            ("KUBERNETES_SERVICE_PORT", self.address.port().to_string()),
        ]
    }
}

impl ApiServer {
    /// Serves also by TLS, whoever has the token of a service account of that namespace, at an address of the caller's network
    /// namespace; until this server ends.
    pub fn serve_pods_of(&self, namespace: &str) -> ServiceAccount {
        let mounted = TempDir::new().unwrap();
        let keys = TempDir::new().unwrap();
        let [certificate, key] = certificate(&mounted.path().join(AUTHORITY), keys.path());
        fs::write(mounted.path().join("token"), TOKEN).unwrap();
        fs::write(mounted.path().join("namespace"), namespace).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_file(certificate).unwrap()],
                PrivateKeyDer::from_pem_file(key).unwrap(),
            )
            .unwrap();
        let runtime = self.runtime.as_ref().expect("a server that listens");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = Tls {
            listener,
            acceptor: TlsAcceptor::from(Arc::new(config)),
        };
        let router = router(self.shared.clone()).layer(from_fn(authorise));
        runtime.spawn(async move { axum::serve(listener, router).await.unwrap() });
        ServiceAccount { address, mounted }
    }
}

/// Writes an authority's certificate, and below `keys` that of 127.0.0.1, which it has signed, and its key.
fn certificate(authority: &Path, keys: &Path) -> [PathBuf; 2] {
    let openssl = |subject: &str, key: &Path, out: &Path| {
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"]);
        command.args(["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", subject]);
        command.arg("-keyout").arg(key).arg("-out").arg(out);
        command
    };
    let [authority_key, certificate, key] =
        ["ca.key", "tls.crt", "tls.key"].map(|name| keys.join(name));
    succeed(&mut openssl("/CN=authority", &authority_key, authority));
    let mut signed = openssl("/CN=kubernetes", &key, &certificate);
    signed.arg("-CA").arg(authority);
    signed.arg("-CAkey").arg(authority_key);
    signed.args(["-addext", "subjectAltName=IP:127.0.0.1"]);
    signed.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
    succeed(&mut signed);
    [certificate, key]
}

async fn authorise(request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION);
    if given.is_some_and(|given| given == &format!("Bearer {TOKEN}")) {
        next.run(request).await
    } else {
        StatusCode::UNAUTHORIZED.into_response()
    }
}

struct Tls {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            // Who hangs up, or does not trust us, calls again.
            if let Ok((stream, peer)) = self.listener.accept().await
                && let Ok(stream) = self.acceptor.accept(stream).await
            {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}
