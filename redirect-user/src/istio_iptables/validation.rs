//! Istio's check that a pod is captured: the proxy's user calls an address of loopback that nobody listens on, and the call has
//! to arrive on one of the proxy's ports with the port called as its original destination.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::observe::netns::NetworkNamespace;
use crate::observe::routes::{Family, first_global_family};
use crate::options::{Ipv6, Policy, Validation};
use crate::output::say;

/// Pause between two calls, and the longest one of them: a second, as in Istio.
const ROUND: Duration = Duration::from_secs(1);
/// Longest queue of connections that were not looked at yet.
const BACKLOG: u32 = 128;

/// The pod is not captured, as far as this process can tell. Istio's repair looks for this beginning and for exit code 126.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "iptables validation failed; workload is not ready for Istio. {reason}. With Istio CNI, a pod that was started before its node was \
     ready is restarted if cni.repair.deletePods=true is set; otherwise it has to be deleted by hand"
)]
pub struct Failed {
    reason: String,
}

/// Checks that connections of this process are captured; an error is a [`Failed`] if they are not.
pub fn run(policy: &Policy, netns: &NetworkNamespace, validation: Validation) -> Result<()> {
    // The family Istio looks at, whether or not IPv6 is captured too.
    let family = match policy.ipv6 {
        Ipv6::Off => Family::V4,
        _ => first_global_family(netns, false)?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the event loop")?;
    runtime.block_on(validate(policy, family, validation))?;
    say("validation passed")
}

async fn validate(policy: &Policy, family: Family, validation: Validation) -> Result<(), Failed> {
    let (local, service) = addresses(family);
    let service = SocketAddr::new(service, validation.port);
    let mut arrivals = JoinSet::new();
    let mut refusals = Vec::new();
    for port in [policy.outbound_port, policy.inbound_port] {
        let address = SocketAddr::new(local, port);
        match listen(address) {
            Ok(listener) => {
                arrivals.spawn(arrival(listener, validation.port));
            }
            Err(error) => refusals.push(format!("{address}: {error}")),
        }
    }
    if arrivals.is_empty() {
        let reason = format!("no listener available: {}", refusals.join(", "));
        return Err(Failed { reason });
    }
    let timeout = tokio::time::sleep(validation.timeout);
    tokio::select! {
        _ = arrivals.join_next() => Ok(()),
        never = call_again_and_again(local, service) => match never {},
        () = timeout => Err(Failed { reason: timed_out(policy, service, validation) }),
    }
}

fn timed_out(policy: &Policy, service: SocketAddr, validation: Validation) -> String {
    let user = rustix::process::geteuid().as_raw();
    let is_proxy = |id: &crate::options::IdRange| (id.first..=id.last).contains(&user);
    let hint = if policy.proxy_uids.iter().any(is_proxy) {
        String::new()
    } else {
        format!(" (uid {user} is not the proxy's, which validation has to run as)")
    };
    format!(
        "validation timeout: no connection to {service} arrived on port {} or {} within {:?}{hint}",
        policy.outbound_port, policy.inbound_port, validation.timeout
    )
}

/// Where to listen and call from, and whom to call.
fn addresses(family: Family) -> (IpAddr, IpAddr) {
    match family {
        Family::V4 => (
            Ipv4Addr::LOCALHOST.into(),
            Ipv4Addr::new(127, 0, 0, 6).into(),
        ),
        Family::V6 => (
            Ipv6Addr::LOCALHOST.into(),
            Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into(),
        ),
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = socket(address.ip())?;
    // As Istio's: a validator that was killed, or the proxy itself, may have the port.
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Ends with the first connection that was meant for `port`.
async fn arrival(listener: TcpListener, port: u16) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if original_port(&stream) == Some(port) => return,
            // Somebody else's connection.
            Ok(_) => {}
            Err(error) => {
                tracing::warn!("accepting a connection: {error}");
                tokio::time::sleep(ROUND).await;
            }
        }
    }
}

fn original_port(stream: &TcpStream) -> Option<u16> {
    match stream.local_addr().ok()? {
        SocketAddr::V4(_) => Some(rustix::net::sockopt::ip_original_dst(stream).ok()?.port()),
        SocketAddr::V6(_) => Some(rustix::net::sockopt::ipv6_original_dst(stream).ok()?.port()),
    }
}

async fn call_again_and_again(from: IpAddr, service: SocketAddr) -> Infallible {
    loop {
        if let Ok(Err(error)) = tokio::time::timeout(ROUND, call(from, service)).await {
            tracing::info!("connecting to {service}: {error}");
        }
        tokio::time::sleep(ROUND).await;
    }
}

async fn call(from: IpAddr, service: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = socket(from)?;
    socket.bind(SocketAddr::new(from, 0))?;
    socket.connect(service).await
}

fn socket(address: IpAddr) -> std::io::Result<TcpSocket> {
    match address {
        IpAddr::V4(_) => TcpSocket::new_v4(),
        IpAddr::V6(_) => TcpSocket::new_v6(),
    }
}
