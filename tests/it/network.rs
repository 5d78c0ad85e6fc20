//! A network that goes away: a client in a network namespace of its own, behind a link on which packets get
//! lost, so that neither a FIN nor a RST ever comes.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::connect_tcp::{Capsules, End, FINAL_DATA};
use crate::support::*;

const SERVER: &str = "192.0.2.1";
const CLIENT: &str = "192.0.2.2";

/// Two namespaces with a cable between them, removed when dropped.
struct Network {
    server: String,
    client: String,
}

impl Network {
    /// `None` where namespaces can't be made, and the test is skipped.
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
        skip("root, network namespaces and iproute2");
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

    /// Has nothing come any more that the client's side sends, or has it come again.
    fn mute_client(&self, is_muted: bool) {
        let nobody = if is_muted {
            "replace 192.0.2.1 lladdr 02:00:00:00:00:99 dev cable nud permanent"
        } else {
            "delete 192.0.2.1 dev cable"
        };
        assert!(ip(&format!("-n {} neighbour {nobody}", self.client)));
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

/// Opens a tunnel of `upgrade`, cuts the network, lets the target do `meanwhile`, which says whether it saw the reset, and
/// returns how long the target waited for it, with the log's line.
fn cut_off(
    name: &str,
    upgrade: &[&str],
    meanwhile: impl FnOnce(&mut TcpStream) -> bool,
) -> Option<(Duration, String)> {
    let network = Network::new(name)?;
    let daemon = network.daemon(&OPTIONS);
    let address: SocketAddr = daemon.address;
    let idle = daemon.threads();
    inside(&network.client, || {
        within(LIMIT, "the cable carries", || {
            TcpStream::connect(address).ok()
        })
    });
    let target = inside(&network.server, Target::listen);
    let head = request("GET", &format!("/tunnel?port={}", target.port), upgrade)
        .replace("Host: localhost", "Host: 192.0.2.1");
    let (before, client) = inside(&network.client, || {
        within(LIMIT, "earlier connections are gone", || {
            (daemon.threads() <= idle).then_some(())
        });
        let before = (daemon.threads(), daemon.descriptors());
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        assert!(head_of(&mut stream).starts_with("HTTP/1.1 101 "));
        (before, stream)
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
    let Some((waited, line)) = cut_off("i", &UPGRADE, |_| false) else {
        return;
    };
    assert!(line.contains("no pong within the ping timeout"), "{line}");
    assert!(waited < Duration::from_secs(3), "{waited:?}");
}

#[test]
fn a_client_that_is_cut_off_with_bytes_on_their_way_is_gone_within_the_stall_timeout() {
    let Some((waited, line)) = cut_off("b", &UPGRADE, |server| {
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
    let Some((waited, line)) = cut_off("m", &UPGRADE, flood) else {
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

/// No pong is owed there, but the empty capsule of the next ping interval is not acknowledged.
#[test]
fn an_idle_client_of_connect_tcp_that_is_cut_off_is_gone_within_the_stall_timeout() {
    let Some((waited, line)) = cut_off("c", &UPGRADE_TO_CONNECT_TCP, |_| false) else {
        return;
    };
    assert!(line.contains("end=client_vanished"), "{line}");
    assert!(
        waited > Duration::from_secs(2) && waited < Duration::from_secs(8),
        "{waited:?}"
    );
}

/// A target that has closed answers what still comes with a reset, which takes a round trip. Until then both ends look
/// orderly.
#[test]
fn a_reset_that_comes_a_moment_behind_both_ends_is_an_upload_cut_short() {
    let Some(network) = Network::new("late") else {
        return;
    };
    let daemon = network.daemon(&[]);
    let target = inside(&network.client, || {
        within(LIMIT, "the address is there", || {
            std::net::TcpListener::bind((CLIENT, 0)).ok().map(drop)
        });
        Target::listen_on("192.0.2.2:0")
    });
    let path = format!("/tunnel?host={CLIENT}&port={}", target.port);
    let open = |upgrade| {
        let head = request("GET", &path, upgrade).replace("Host: localhost", "Host: 192.0.2.1");
        let stream = inside(&network.server, || daemon.connect());
        (stream, head)
    };
    let behind_the_end = |finish: &mut dyn FnMut()| {
        network.mute_client(true);
        finish();
        // The daemon's system sends it again in a while, and hears the answer then.
        thread::sleep(Duration::from_millis(100));
        network.mute_client(false);
    };

    let (stream, head) = open(&UPGRADE);
    let mut client = Client::upgrade(stream, head.as_bytes());
    drop(target.accept());
    assert_eq!(client.see(), CLOSE_1000);
    behind_the_end(&mut || {
        client.send(b"late");
        client.send_close(1000);
    });
    assert_eq!(client.see(), Seen::Reset);

    let (stream, head) = open(&UPGRADE_TO_CONNECT_TCP);
    let mut client = Capsules::upgrade(stream, head.as_bytes());
    drop(target.accept());
    assert_eq!(client.see_all(), (vec![], End::Final));
    behind_the_end(&mut || client.send(FINAL_DATA, b"late"));
    assert_eq!(client.see_all(), (vec![], End::Reset));
    daemon.logged(2, &["tunnel closed:", "up=4", "end=upload_cut_short"]);
}

/// The target's system has forgotten the connection by then (FIN_WAIT2), and answers the daemon's FIN with a reset.
#[test]
fn a_client_that_closes_long_after_its_target_has_an_orderly_end() {
    let Some(network) = Network::new("later") else {
        return;
    };
    let daemon = network.daemon(&["--linger", "2s"]);
    let target = inside(&network.client, || {
        std::fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "1").unwrap();
        within(LIMIT, "the address is there", || {
            std::net::TcpListener::bind((CLIENT, 0)).ok().map(drop)
        });
        Target::listen_on("192.0.2.2:0")
    });
    let path = format!("/tunnel?host={CLIENT}&port={}", target.port);
    let head = request("GET", &path, &UPGRADE).replace("Host: localhost", "Host: 192.0.2.1");
    let stream = inside(&network.server, || daemon.connect());
    let mut client = Client::upgrade(stream, head.as_bytes());
    let mut server = target.accept();
    client.send(b"request");
    server.read_exact(&mut [0; 7]).unwrap();
    server.write_all(b"answer").unwrap();
    drop(server);
    assert_eq!(client.see_all(), (b"answer".to_vec(), CLOSE_1000));
    for _ in 0..4 {
        let Seen::Ping(payload) = client.see() else {
            panic!("no ping");
        };
        client.send_frame(0x8a, &payload);
    }
    client.send_close(1000);
    assert_eq!(client.see(), Seen::Eof);
    daemon.logged(1, &["tunnel closed:", "up=7 down=6", "end=orderly"]);
}

#[test]
fn a_closed_port_among_those_the_system_gives_away_stays_closed_and_free() {
    let Some(network) = Network::new("p") else {
        return;
    };
    // So few that an attempt to connect is soon given the port that it is for.
    let (first, last, port) = (40_000, 40_019, 40_010);
    let range = "/proc/sys/net/ipv4/ip_local_port_range";
    inside(&network.server, || {
        std::fs::write(range, format!("{first} {last}")).unwrap();
    });
    let daemon = network.daemon(&[]);
    let address = daemon.address;
    let head = request("GET", &format!("/tunnel?port={port}"), &UPGRADE)
        .replace("Host: localhost", "Host: 192.0.2.1");
    let ask = || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        Answer::read(&mut stream)
    };
    inside(&network.client, || {
        within(LIMIT, "the cable carries", || {
            TcpStream::connect(address).ok()
        });
        for _ in 0..200 {
            let answer = ask();
            assert_eq!(answer.status, 502);
            assert!(answer.message().contains("Connection refused"));
        }
    });
    let service = inside(&network.server, || {
        std::net::TcpListener::bind(("127.0.0.1", port))
    });
    service.unwrap();
}
