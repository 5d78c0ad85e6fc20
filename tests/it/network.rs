//! A network that goes away: a client in a network namespace of its own, behind a link on which packets get
//! lost, so that neither a FIN nor a RST ever comes.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::support::*;

const SERVER: &str = "192.0.2.1";
const CLIENT: &str = "192.0.2.2";

/// Two namespaces with a cable between them, removed when dropped.
struct Network {
    server: String,
    client: String,
}

impl Network {
    /// `None`, and a line that says so, where namespaces can't be made.
    fn new(name: &str) -> Option<Network> {
        let id = std::process::id();
        let network = Network {
            server: format!("td{id}{name}s"),
            client: format!("td{id}{name}c"),
        };
        let (server, client) = (&network.server, &network.client);
        let made = [
            format!("netns add {server}"),
            format!("netns add {client}"),
            format!("-n {server} link add cable type veth peer name cable netns {client}"),
            format!("-n {server} address add {SERVER}/24 dev cable"),
            format!("-n {client} address add {CLIENT}/24 dev cable"),
            format!("-n {server} link set lo up"),
            format!("-n {server} link set cable up"),
            format!("-n {client} link set cable up"),
        ];
        if made.iter().all(|command| ip(command)) {
            return Some(network);
        }
        println!("skipped: network namespaces can't be made here (needs root and iproute2)");
        None
    }

    /// Sends every packet on to nobody, in both directions.
    fn cut(&self) {
        for (side, peer) in [(&self.server, CLIENT), (&self.client, SERVER)] {
            assert!(ip(&format!(
                "-n {side} neighbour replace {peer} lladdr 02:00:00:00:00:99 dev cable nud permanent"
            )));
        }
    }

    fn daemon(&self, options: &[&str]) -> Daemon {
        let inner = Daemon::command(&[&["--no-auth", "--listen", "192.0.2.1:0"], options].concat());
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.server])
            .arg(inner.get_program())
            .args(inner.get_args());
        Daemon::spawn(command)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for side in [&self.server, &self.client] {
            ip(&format!("netns delete {side}"));
        }
    }
}

fn ip(arguments: &str) -> bool {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    output.is_ok_and(|output| output.status.success())
}

/// Runs `make` in a namespace. The sockets it makes stay there.
fn inside<T: Send>(namespace: &str, make: impl FnOnce() -> T + Send) -> T {
    let file = File::open(format!("/run/netns/{namespace}")).unwrap();
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            make()
        });
        inside.join().unwrap()
    })
}

/// Opens a tunnel, cuts the network, lets the target do `meanwhile`, which says whether it saw the reset, and
/// returns how long the target waited for it, with the log's line.
fn cut_off(
    name: &str,
    options: &[&str],
    meanwhile: impl FnOnce(&mut TcpStream) -> bool,
) -> Option<(Duration, String)> {
    let network = Network::new(name)?;
    let daemon = network.daemon(options);
    let address: SocketAddr = daemon.address;
    inside(&network.client, || {
        within(LIMIT, "the cable carries", || {
            TcpStream::connect(address).ok()
        })
    });
    let target = inside(&network.server, Target::listen);
    let head = request("GET", &format!("/tunnel?port={}", target.port), &UPGRADE)
        .replace("Host: localhost", "Host: 192.0.2.1");
    let (before, client) = inside(&network.client, || {
        within(LIMIT, "earlier connections are gone", || {
            (daemon.threads() <= 9).then_some(())
        });
        let before = (daemon.threads(), daemon.descriptors());
        let stream = TcpStream::connect(address).unwrap();
        (before, Client::upgrade(stream, head.as_bytes()))
    });
    let mut server = target.accept();
    network.cut();
    let start = Instant::now();
    let was_reset = meanwhile(&mut server) || !read_to_end(&mut server).1;
    assert!(was_reset, "the target sees a reset");
    let waited = start.elapsed();
    let line = daemon.logged(1, &["tunnel closed:"]);
    daemon.is_back_at(before);
    drop(client);
    Some((waited, line))
}

const OPTIONS: [&str; 6] = [
    "--ping-interval",
    "500ms",
    "--ping-timeout",
    "500ms",
    "--stall-timeout",
    "3s",
];

#[test]
fn an_idle_client_that_is_cut_off_is_gone_within_ping_interval_and_timeout() {
    let Some((waited, line)) = cut_off("i", &OPTIONS, |_| false) else {
        return;
    };
    assert!(line.contains("no pong within the ping timeout"), "{line}");
    assert!(waited < Duration::from_secs(3), "{waited:?}");
}

#[test]
fn a_client_that_is_cut_off_with_bytes_on_their_way_is_gone_within_the_stall_timeout() {
    let Some((waited, line)) = cut_off("b", &OPTIONS, |server| {
        server.write_all(&[1; 1000]).is_err()
    }) else {
        return;
    };
    assert!(
        line.contains("no sign of life within the stall timeout"),
        "{line}"
    );
    assert!(
        waited > Duration::from_secs(2) && waited < Duration::from_secs(6),
        "{waited:?}"
    );
}

#[test]
fn a_client_that_is_cut_off_with_megabytes_on_their_way_is_gone_within_the_stall_timeout() {
    let flood = |server: &mut TcpStream| {
        let error = std::iter::repeat_with(|| server.write_all(&[1; 50_000])).find_map(Result::err);
        error.is_some_and(|error| error.kind() == ErrorKind::ConnectionReset)
    };
    let Some((waited, line)) = cut_off("m", &OPTIONS, flood) else {
        return;
    };
    assert!(
        line.contains("no sign of life within the stall timeout"),
        "{line}"
    );
    assert!(
        waited > Duration::from_secs(2) && waited < Duration::from_secs(6),
        "{waited:?}"
    );
}
