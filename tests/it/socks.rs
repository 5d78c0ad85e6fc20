//! `tunneld connect -D`: a SOCKS5 port that leads wherever it is asked to.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use crate::connect::{Connect, take};
use crate::forward::has_ipv6;
use crate::support::*;

/// A request for `host`, as a name.
fn request(host: &str, port: u16) -> Vec<u8> {
    let length = u8::try_from(host.len()).unwrap();
    let mut bytes = vec![5, 1, 0, 3, length];
    bytes.extend(host.as_bytes());
    bytes.extend(port.to_be_bytes());
    bytes
}

/// Greets, sends `request`, and returns the connection and the code of the reply.
fn ask(client: &Connect, request: &[u8]) -> (TcpStream, u8) {
    let mut stream = client.dial();
    stream.write_all(&[5, 2, 2, 0]).unwrap();
    assert_eq!(take(&mut stream, 2), [5, 0]);
    stream.write_all(request).unwrap();
    let reply = take(&mut stream, 10);
    assert_eq!((reply[0], &reply[2..]), (5, &[0, 1, 0, 0, 0, 0, 0, 0][..]));
    (stream, reply[1])
}

fn socks(daemon: &Daemon) -> Connect {
    Connect::with(daemon, &["-D", "127.0.0.1:0"])
}

#[test]
fn a_name_and_addresses_of_both_kinds_are_reached() {
    let daemon = Daemon::start(&[]);
    let client = socks(&daemon);
    let (v4, v6) = (
        Target::echo(),
        has_ipv6().then(|| Target::listen_on("[::1]:0")),
    );
    let port = v4.port.to_be_bytes();
    let mut requests = vec![
        request("localhost", v4.port),
        request("127.0.0.1", v4.port),
        [&[5, 1, 0, 1, 127, 0, 0, 1][..], &port].concat(),
    ];
    for request in requests.drain(..) {
        let (mut stream, code) = ask(&client, &request);
        assert_eq!(code, 0);
        stream.write_all(b"hello").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut stream), (b"hello".to_vec(), true));
    }
    if let Some(target) = v6 {
        let loopback = std::net::Ipv6Addr::LOCALHOST.octets();
        let request = [&[5, 1, 0, 4][..], &loopback, &target.port.to_be_bytes()].concat();
        assert_eq!(ask(&client, &request).1, 0);
        target.accept();
    }
    client.logged(&format!("target=127.0.0.1:{}", v4.port));
    assert!(!client.log().contains("WARN"), "{}", client.log());
}

/// A client that doesn't wait for any answer.
#[test]
fn what_comes_behind_the_request_is_for_the_target() {
    let daemon = Daemon::start(&[]);
    let client = socks(&daemon);
    let mut stream = client.dial();
    let request = [
        &[5, 1, 0][..],
        &request("localhost", Target::echo().port),
        b"at once",
    ]
    .concat();
    stream.write_all(&request).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let (bytes, orderly) = read_to_end(&mut stream);
    assert_eq!(
        (&bytes[..4], &bytes[12..], orderly),
        (&[5, 0, 5, 0][..], &b"at once"[..], true)
    );
}

#[test]
fn the_daemons_refusal_becomes_the_code_of_the_reply() {
    let daemon = Daemon::start(&["--deny-target", "*:81"]);
    let client = socks(&daemon);
    let closed = closed_port();
    for (request, code, part) in [
        (request("localhost", 81), 2, "refused with 403"),
        (request("no-such-name.invalid", 80), 4, "does not resolve"),
        (request("localhost", closed.port), 5, "Connection refused"),
        (request("a b", 80), 4, "not a valid host"),
        (
            vec![5, 2, 0, 1, 127, 0, 0, 1, 0, 80],
            7,
            "only CONNECT is served",
        ),
        (vec![5, 3, 0, 1, 0, 0, 0, 0, 0, 0], 7, "no UDP"),
        (vec![5, 1, 0, 9, 1, 1, 1, 1, 0, 80], 8, "kind 9"),
    ] {
        let (mut stream, got) = ask(&client, &request);
        assert_eq!(got, code, "{part}");
        // And then its end, not a reset that may overtake it.
        assert_eq!(read_to_end(&mut stream), (Vec::new(), true), "{part}");
        client.logged(part);
    }
}

#[test]
fn a_header_that_shares_words_with_the_daemon_changes_no_code() {
    let daemon = Daemon::start(&[]);
    let header = "X-Note: Connection pool, does not work";
    let client = Connect::with(&daemon, &["-D", "127.0.0.1:0", "-H", header]);
    let closed = closed_port();
    assert_eq!(ask(&client, &request("localhost", closed.port)).1, 5);
    assert_eq!(ask(&client, &request("no-such-name.invalid", 80)).1, 4);
    // It is masked all the same.
    client.logged("(a header's value)");
}

#[test]
fn an_unreachable_daemon_is_a_failure_of_the_reply() {
    let daemon = Daemon::start(&[]);
    let client = socks(&daemon);
    client.address();
    drop(daemon);
    assert_eq!(ask(&client, &request("localhost", 80)).1, 1);
}

#[test]
fn a_target_that_never_answers_is_a_timeout() {
    let daemon = Daemon::start(&["--dial-timeout", "300ms"]);
    let client = socks(&daemon);
    let (target, _queued) = crate::connect::port_that_drops_syns();
    let port = target.local_addr().unwrap().port();
    assert_eq!(ask(&client, &request("127.0.0.1", port)).1, 6);
}

#[test]
fn what_is_no_socks5_is_told_so() {
    let daemon = Daemon::start(&[]);
    let client = socks(&daemon);
    for (sent, answer, part) in [
        (
            &b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00"[..],
            &b"\x00\x5b"[..],
            "SOCKS4",
        ),
        (
            b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n",
            b"HTTP/1.1 501 ",
            "speaks HTTP",
        ),
        (
            b"\x05\x01\x02",
            b"\x05\xff",
            "insists on a user and a password",
        ),
        (b"\x16\x03\x01\x00\x00", b"", "does not speak SOCKS5"),
    ] {
        let mut stream = client.dial();
        stream.write_all(sent).unwrap();
        let (bytes, orderly) = read_to_end(&mut stream);
        assert!(
            bytes.starts_with(answer) && orderly,
            "{part}: {bytes:?} {orderly}"
        );
        client.logged(part);
    }
    // One that only looks whether somebody listens is no event.
    drop(client.dial());
    let before = client.log();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(client.log(), before);
}

#[test]
fn a_client_that_does_not_finish_its_request_is_let_go_and_holds_no_place() {
    let daemon = Daemon::start(&[]);
    let client = Connect::with(&daemon, &["-D", "127.0.0.1:0", "--max-connections", "1"]);
    let mut slow = client.dial();
    slow.write_all(&[5]).unwrap();
    client.dial();
    client.logged("see --max-connections");
    // Bytes that come one by one don't put the end off.
    let mut writer = slow.try_clone().unwrap();
    thread::spawn(move || {
        while writer.write_all(&[255]).is_ok() {
            thread::sleep(Duration::from_millis(500));
        }
    });
    let ended = slow.read_to_end(&mut Vec::new());
    assert!(ended.is_ok() || ended.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset));
    client.logged("no complete SOCKS5 request");
    within(LIMIT, "the place is free", || {
        let mut next = client.dial();
        next.write_all(&[5, 1, 0]).ok()?;
        next.read_exact(&mut [0; 2]).ok()
    });
}
