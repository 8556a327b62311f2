//! Compares what client, proxy and server saw of each connection with what iptables would have shown them.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use comfy_table::{Table, presets};

use super::access_log::Line;
use super::client::Seen;
use super::scenario::{Origin, Request, Route};
use super::{INBOUND_PORT, OUTBOUND_PORT, PEER_IP, POD_IP};
use crate::ui;

pub struct Row {
    title: String,
    connected_to: String,
    client: String,
    landed: String,
    original: String,
    answered: String,
    wrong: Vec<String>,
}

impl Row {
    pub fn is_ok(&self) -> bool {
        self.wrong.is_empty()
    }
}

pub fn judge(request: &Request, seen: Result<Seen>, log: &[Line]) -> Row {
    let mut row = Row {
        title: request.title.clone(),
        connected_to: request.to.to_string(),
        client: "-".to_owned(),
        landed: "-".to_owned(),
        original: "-".to_owned(),
        answered: "-".to_owned(),
        wrong: Vec::new(),
    };
    let seen = match seen {
        Ok(seen) => seen,
        Err(error) => {
            row.wrong.push(format!("{error:#}"));
            return row;
        }
    };
    let client = plain(seen.local);
    // An accepted connection is found in the log by the client's own port, kept all the way.
    let path = hops(client, log);
    row.client = client.to_string();
    row.landed = landed(&path);
    row.original = original(&path);
    row.answered = format!("{} (saw {})", seen.answer.name, plain(seen.answer.peer));
    row.wrong = faults(request, &seen, &path);
    row
}

/// The lines of the log that this client's connection caused: its own, and the one of a second pass.
fn hops(client: SocketAddr, log: &[Line]) -> Vec<&Line> {
    let from = |address| {
        log.iter()
            .find(|line| line.downstream_remote == Some(address))
    };
    let Some(first) = from(client) else {
        return Vec::new();
    };
    let second = first.upstream_local.and_then(from);
    std::iter::once(first).chain(second).collect()
}

fn faults(request: &Request, seen: &Seen, path: &[&Line]) -> Vec<String> {
    let mut faults = Faults(Vec::new());
    let client = plain(seen.local);
    let to = plain(request.to);

    faults.expect("getpeername of the client", plain(seen.peer), to);
    faults.expect("getsockname of the client", client.ip(), source_ip(request));
    faults.expect(
        "answered by",
        seen.answer.name.as_str(),
        request.answered_by,
    );
    let listeners: Vec<&str> = path.iter().map(|line| line.listener.as_str()).collect();
    let wanted: &[&str] = match request.route {
        Route::Direct => &[],
        Route::Outbound => &["outbound"],
        Route::Inbound => &["inbound"],
        Route::OwnService => &["outbound", "inbound"],
    };
    faults.expect(
        "listeners of the proxy",
        format!("{listeners:?}"),
        format!("{wanted:?}"),
    );

    // Whoever called the server last: the client itself, or the proxy on its behalf.
    let server_saw = plain(seen.answer.peer);
    match path {
        [] => faults.expect("the server's peer", server_saw, client),
        [first, ..] => {
            faults.expect(
                "SO_ORIGINAL_DST",
                show(first.downstream_local),
                to.to_string(),
            );
            let last = path[path.len() - 1];
            faults.expect("the server's peer", Some(server_saw), last.upstream_local);
            let by_proxy: IpAddr = if last.listener == "inbound" {
                [127, 0, 0, 6].into()
            } else {
                POD_IP.into()
            };
            faults.expect("the proxy's source", server_saw.ip(), by_proxy);
        }
    }
    if let [first, second] = path {
        faults.expect(
            "SO_ORIGINAL_DST of the second pass",
            show(second.downstream_local),
            show(first.upstream_host),
        );
    }
    faults.0
}

/// The address a client must see as its own: never one that the capture brought in.
fn source_ip(request: &Request) -> IpAddr {
    match request.from {
        Origin::Peer => PEER_IP.into(),
        Origin::App | Origin::Proxy if request.to.ip().is_loopback() => request.to.ip(),
        Origin::App | Origin::Proxy => POD_IP.into(),
    }
}

struct Faults(Vec<String>);

impl Faults {
    fn expect<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, got: T, wanted: T) {
        if got != wanted {
            self.0
                .push(format!("{what}: {got:?}, should be {wanted:?}"));
        }
    }
}

/// A mapped socket names IPv4 addresses as `::ffff:a.b.c.d`; everybody else sees plain IPv4.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn show(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "nothing".to_owned(), |address| address.to_string())
}

fn landed(path: &[&Line]) -> String {
    let port = |line: &&Line| match line.listener.as_str() {
        "outbound" => OUTBOUND_PORT.to_string(),
        "inbound" => INBOUND_PORT.to_string(),
        other => other.to_owned(),
    };
    if path.is_empty() {
        "server".to_owned()
    } else {
        path.iter().map(port).collect::<Vec<_>>().join(" > ")
    }
}

fn original(path: &[&Line]) -> String {
    if path.is_empty() {
        return "-".to_owned();
    }
    path.iter()
        .map(|line| show(line.downstream_local))
        .collect::<Vec<_>>()
        .join(" > ")
}

pub fn print(rows: &[Row]) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "connection",
        "connected to",
        "client's own",
        "landed on",
        "SO_ORIGINAL_DST",
        "answered by",
        "",
    ]);
    for row in rows {
        let verdict = if row.is_ok() { "OK" } else { "FAIL" };
        let cells = [
            &row.title,
            &row.connected_to,
            &row.client,
            &row.landed,
            &row.original,
            &row.answered,
        ];
        table.add_row(cells.into_iter().map(String::as_str).chain([verdict]));
    }
    for line in table.to_string().lines() {
        let line = line.trim_end();
        let style = match line {
            _ if line.ends_with("FAIL") => ui::BAD,
            _ if line.ends_with("OK") => anstyle::Style::new(),
            _ => ui::BOLD,
        };
        anstream::println!("{style}{line}{style:#}");
    }
    // Where the columns are found in the access log.
    anstream::println!(
        "{faint}client's own = its getsockname = downstream_remote; SO_ORIGINAL_DST = downstream_local{faint:#}",
        faint = ui::FAINT
    );
    for row in rows.iter().filter(|row| !row.is_ok()) {
        for fault in &row.wrong {
            anstream::println!(
                "  {style}FAIL{style:#} {}: {fault}",
                row.title,
                style = ui::BAD
            );
        }
    }
}
