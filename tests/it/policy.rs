//! `--allow-target` and `--deny-target`, attacked: 403, and nothing is dialed.

use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread;

use socket2::{Domain, Socket, Type};

use crate::support::*;

/// Asks for a tunnel that must be refused by the policy, and returns why.
fn forbidden(daemon: &Daemon, host: &str, port: u16) -> String {
    let host = host.replace('[', "%5B").replace(']', "%5D");
    let answer = daemon.get_upgrade(&format!("/tunnel?host={host}&port={port}"), &[]);
    assert_eq!(answer.status, 403, "{host}:{port} {}", answer.body);
    answer.message()
}

fn permitted(daemon: &Daemon, host: &str, target: &Target) {
    let url = format!("/tunnel?host={host}&port={}", target.port);
    let mut client = Client::open_with(daemon, &url, &[]);
    client.send(b"x");
    assert_eq!(client.see(), Seen::Binary(b"x".to_vec()));
}

/// Every way to say loopback.
const LOOPBACK: [&str; 11] = [
    "",
    "localhost",
    "db.localhost",
    "127.0.0.1",
    "127.9.9.9",
    "0x7f.1",
    "2130706433",
    "0.0.0.0",
    "::1",
    "[::]",
    "::ffff:127.0.0.1",
];

#[test]
fn a_denied_address_is_403_in_every_spelling_and_never_dialed() {
    let daemon = Daemon::start(&["--deny-target", "localhost"]);
    let target = Target::listen();
    for host in LOOPBACK {
        let message = forbidden(&daemon, host, target.port);
        assert!(message.contains("--deny-target"), "{message}");
    }
    assert!(!target.was_dialed());
    daemon.logged(LOOPBACK.len(), &["refused:", "status=403"]);
}

/// The recipe for a daemon beside an agent that trusts whoever is local.
#[test]
fn one_port_of_loopback_is_closed_in_every_spelling_and_others_are_open() {
    let (agent, other) = (Target::listen(), Target::echo());
    for rule in [
        format!("localhost:{}", agent.port),
        format!("*:{}", agent.port),
    ] {
        let daemon = Daemon::start(&["--deny-target", &rule]);
        for host in LOOPBACK {
            forbidden(&daemon, host, agent.port);
        }
        permitted(&daemon, "localhost", &other);
    }
    assert!(!agent.was_dialed());
}

#[test]
fn only_what_is_allowed_is_dialed() {
    let target = Target::echo();
    let (port, beside) = (target.port, target.port.wrapping_add(1).max(1));
    let rule = format!("127.0.0.1:{port}");
    let daemon = Daemon::start(&["--allow-target", &rule]);
    for host in ["localhost", "127.0.0.1", "0.0.0.0", "::ffff:127.0.0.1"] {
        permitted(&daemon, host, &target);
    }
    for (host, port) in [("localhost", beside), ("::1", port), ("127.0.0.2", port)] {
        forbidden(&daemon, host, port);
    }
}

#[test]
fn a_range_of_ports_ends_where_it_says() {
    let target = Target::echo();
    let port = target.port;
    let daemon = Daemon::start(&["--allow-target", &format!("*:{port}-{port}")]);
    permitted(&daemon, "localhost", &target);
    for beside in [port - 1, port + 1] {
        forbidden(&daemon, "localhost", beside);
    }
    let daemon = Daemon::start(&[
        "--allow-target",
        "localhost",
        "--deny-target",
        &format!("*:{}-{}", port - 2, port - 1),
        "--deny-target",
        &format!("*:{}-{}", port + 1, port + 2),
    ]);
    permitted(&daemon, "localhost", &target);
    for beside in [port - 1, port + 1] {
        forbidden(&daemon, "localhost", beside);
    }
}

const HOSTS: &str =
    "127.0.0.1 both.test\n127.0.0.9 both.test hidden.test\n127.0.0.1 open.test a.sub.test\n";

/// Takes a port of 127.0.0.1, so that nothing else listens there or connects to itself. `None` if it is taken.
fn refuse(port: u16) -> Option<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    socket.bind(&address.into()).ok().map(|()| socket)
}

#[test]
fn a_name_is_judged_by_what_it_resolves_to() {
    let options = ["--deny-target", "127.0.0.9"];
    let Some(daemon) = Daemon::start_with_file("/etc/hosts", HOSTS, &options) else {
        return;
    };
    let target = Target::echo();
    let (hidden, _refusing) = within(LIMIT, "a port that is free on both addresses", || {
        let hidden = Target::listen_on("127.0.0.9:0");
        let refusing = refuse(hidden.port)?;
        Some((hidden, refusing))
    });
    let message = forbidden(&daemon, "hidden.test", hidden.port);
    assert!(message.contains("127.0.0.9"), "{message}");
    permitted(&daemon, "open.test", &target);
    permitted(&daemon, "both.test", &target);
    // Only the denied address listens at this port.
    let url = format!("/tunnel?host=both.test&port={}", hidden.port);
    assert_eq!(daemon.get_upgrade(&url, &[]).status, 502);
    assert!(!hidden.was_dialed());
}

#[test]
fn names_are_allowed_and_denied_by_name() {
    let options = ["--allow-target", "*.test", "--deny-target", "open.test"];
    let Some(daemon) = Daemon::start_with_file("/etc/hosts", HOSTS, &options) else {
        return;
    };
    let target = Target::echo();
    permitted(&daemon, "a.sub.test", &target);
    permitted(&daemon, "BOTH.test", &target);
    for host in ["open.test", "OPEN.test.", "localhost", "127.0.0.1"] {
        forbidden(&daemon, host, target.port);
    }
}

#[test]
fn a_rule_that_is_none_is_said_at_start() {
    for option in ["--allow-target", "--deny-target"] {
        for rule in ["localhost:0", "10.0.0.0/40", "a b", "localhost:9-1"] {
            let output = Daemon::command(&[option, rule]).output().unwrap();
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{stderr}");
            assert!(
                stderr.contains(option) && stderr.lines().count() == 1,
                "{stderr}"
            );
        }
    }
}

#[test]
fn what_the_variable_denies_an_option_does_not_allow() {
    let mut command = Daemon::command(&["--deny-target", "10.0.0.0/8"]);
    command.env("TUNNELD_DENY_TARGET", "localhost,192.0.2.1");
    let daemon = Daemon::spawn(command);
    for host in ["localhost", "192.0.2.1", "10.1.1.1"] {
        forbidden(&daemon, host, 80);
    }
    let mut command = Daemon::command(&["--deny-target", "10.0.0.0/8"]);
    let output = command.env("TUNNELD_DENY_TARGET", "a b").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(2) && stderr.contains("TUNNELD_DENY_TARGET"),
        "{stderr}"
    );
}

#[test]
fn a_name_that_can_only_be_forbidden_is_not_looked_up() {
    let daemon = Daemon::start(&["--allow-target", "10.0.0.0/8:1", "--allow-target", "*.test"]);
    forbidden(&daemon, "does-not-resolve.invalid", 80);
}

/// Answers each query for an address with 127.0.0.1, and keeps the names that were asked for.
fn name_server(socket: UdpSocket) -> Arc<Mutex<Vec<String>>> {
    let names = Arc::new(Mutex::new(Vec::new()));
    let asked = Arc::clone(&names);
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, peer)) = socket.recv_from(&mut query) {
            let question = &query[12..length];
            let (mut labels, mut at) = (Vec::new(), 0);
            while question[at] > 0 {
                let end = at + 1 + question[at] as usize;
                labels.push(String::from_utf8_lossy(&question[at + 1..end]).into_owned());
                at = end;
            }
            asked.lock().unwrap().push(labels.join("."));
            let is_ipv4 = question[at + 1..at + 3] == [0, 1];
            let head = [
                &query[..2],
                &[0x81, 0x80, 0, 1, 0, is_ipv4.into(), 0, 0, 0, 0],
            ]
            .concat();
            let answer = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1];
            let answer = if is_ipv4 { &answer[..] } else { &[] };
            let _ = socket.send_to(&[&head, &question[..at + 5], answer].concat(), peer);
        }
    });
    names
}

#[test]
fn no_name_is_completed_to_a_denied_one() {
    let options = ["--deny-target", "*.corp.internal"];
    let Ok(socket) = UdpSocket::bind("127.53.53.55:53") else {
        skip("port 53 on loopback");
        return;
    };
    let text = "nameserver 127.53.53.55\nsearch corp.internal\noptions ndots:5\n";
    let Some(daemon) = Daemon::start_with_file("/etc/resolv.conf", text, &options) else {
        return;
    };
    let asked = name_server(socket);
    let target = Target::echo();
    for host in ["secret", "SECRET"] {
        let message = forbidden(&daemon, host, target.port);
        assert!(message.contains("a dot at its end"), "{message}");
    }
    forbidden(&daemon, "db.corp.internal", target.port);
    assert!(
        asked.lock().unwrap().is_empty(),
        "a refused name is looked up"
    );
    for host in ["secret.svc", "secret.", "a.example"] {
        permitted(&daemon, host, &target);
    }
    let asked = asked.lock().unwrap();
    assert!(!asked.is_empty());
    for name in &*asked {
        assert!(
            ["secret.svc", "secret", "a.example"].contains(&name.as_str()),
            "{asked:?}"
        );
    }
}

#[test]
fn names_of_the_hosts_file_are_found_while_others_are_denied() {
    let options = ["--deny-target", "*.corp.internal"];
    let Some(daemon) = Daemon::start_with_file("/etc/hosts", HOSTS, &options) else {
        return;
    };
    let target = Target::echo();
    for host in ["open.test", "A.sub.test", "open.test."] {
        permitted(&daemon, host, &target);
    }
}
