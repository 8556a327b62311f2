//! Whose DNS queries are captured, and the servers that `resolv.conf` names.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Where Istio reads the servers.
pub(super) const RESOLV_CONF: &str = "/etc/resolv.conf";
/// More than any resolver configuration holds, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// DNS capture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dns {
    /// None.
    #[default]
    Off,
    /// Queries to these servers; sorted, each once, never empty, IPv4-mapped ones as IPv4.
    Servers(Vec<IpAddr>),
    /// Queries to any server.
    All,
}

impl Dns {
    /// The servers whose queries are captured, unless those to any server are.
    pub fn servers(&self) -> &[IpAddr] {
        match self {
            Self::Servers(servers) => servers,
            Self::Off | Self::All => &[],
        }
    }
}

/// Reads the servers of a `resolv.conf`. The error is a reason that follows the file's name.
pub(super) fn servers_of(path: &Path) -> Result<Vec<IpAddr>, String> {
    let read = || {
        // Asked before it is opened: a FIFO would wait for a writer.
        if !path.metadata()?.is_file() {
            return Err(std::io::Error::other("not a regular file"));
        }
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| format!("cannot be read: {error}"))?;
    Ok(servers_in(&String::from_utf8_lossy(&bytes)))
}

/// The addresses of all `nameserver` lines; what is not an address is ignored, as by Istio.
pub(super) fn servers_in(text: &str) -> Vec<IpAddr> {
    let mut servers: Vec<IpAddr> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let server = (words.next()? == "nameserver").then(|| words.next())??;
            // A link-local server has its interface behind it.
            let address = server.split('%').next()?.parse::<IpAddr>().ok()?;
            Some(address.to_canonical())
        })
        .collect();
    servers.sort_unstable();
    servers.dedup();
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameserver_lines_are_read_and_everything_else_is_not() {
        let text = "\
search example.com
nameserver 10.96.0.10
 nameserver\tfd00::10 trailing words
nameserver fe80::1%eth0
nameserver ::ffff:10.96.0.11
nameserver 10.96.0.10
nameserver
nameserver dns.example.com
nameserver 10.96.0
nameservers 192.0.2.1
; nameserver 192.0.2.2
#nameserver 192.0.2.3
NAMESERVER 192.0.2.4
options ndots:5";
        let expected = ["10.96.0.10", "10.96.0.11", "fd00::10", "fe80::1"]
            .map(|address| address.parse::<IpAddr>().expect("an address"));
        assert_eq!(servers_in(text), expected);
        assert_eq!(servers_in("search only"), [] as [IpAddr; 0]);
    }

    #[test]
    fn what_is_no_file_is_an_error() {
        for (path, reason) in [
            ("/no/such/resolv.conf", "No such file"),
            ("/etc", "not a regular file"),
            ("/dev/zero", "not a regular file"),
        ] {
            let error = servers_of(Path::new(path)).expect_err(path);
            assert!(error.contains(reason), "{path}: {error}");
        }
    }
}
