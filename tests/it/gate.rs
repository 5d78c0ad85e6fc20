//! What reaches the gate before and beside a request: bytes in every shape, and clients that leave.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::connect::{Connect, LOCAL, take};
use crate::support::*;

#[test]
fn a_head_in_single_bytes_is_served() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let head = request("GET", &format!("/tunnel?port={}", target.port), &UPGRADE);
    let mut stream = daemon.connect();
    stream.set_nodelay(true).unwrap();
    for byte in head.bytes() {
        stream.write_all(&[byte]).unwrap();
    }
    let mut client = Client::expect_101(stream);
    client.send(b"x");
    assert_eq!(client.see(), Seen::Binary(b"x".to_vec()));
}

#[test]
fn bytes_sent_along_with_the_head_belong_to_the_tunnel() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let data = Random::new(1).bytes(150_000);
    for early in [1, 100, 5000, 16_000, 150_000] {
        let head = request("GET", &format!("/tunnel?port={}", target.port), &UPGRADE);
        let bytes = [
            head.as_bytes(),
            &frame(0x02, &data[..early]),
            &frame(0x80, b"end"),
            &frame(0x88, b""),
        ]
        .concat();
        let mut client = Client::upgrade(daemon.connect(), &bytes);
        let (echoed, end) = client.see_all();
        assert!(
            echoed == [&data[..early], b"end"].concat(),
            "{early}: {} bytes",
            echoed.len()
        );
        assert_eq!(end, CLOSE_1000);
    }
}

#[test]
fn pipelined_requests_never_become_a_second_request() {
    let daemon = Daemon::start(&[]);
    let first = request("GET", "/health", &[]);
    let answer = daemon.ask(first.clone() + &first + &first);
    assert_eq!((answer.status, answer.body.as_str()), (204, ""));
    let hidden = request("POST", "/health", &["Content-Length: 0"]) + &first;
    let answer = daemon.ask(hidden);
    assert_eq!(answer.status, 405);
    assert!(!answer.body.contains("HTTP/1.1"));
}

#[test]
fn a_forged_request_id_is_not_believed() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let mut tunnel = Client::open(&daemon, target.port);
    for id in 0..5 {
        let answer = daemon.get("/health", &[&format!("X-Tunneld-Request-Id: {id}")]);
        assert_eq!(answer.status, 204);
    }
    tunnel.send(b"x");
    assert_eq!(tunnel.see(), Seen::Binary(b"x".to_vec()));
}

#[test]
fn a_client_that_leaves_at_once_or_in_its_head_costs_nothing() {
    let daemon = Daemon::start(&[]);
    daemon.get("/health", &[]);
    let before = daemon.descriptors();
    for _ in 0..20 {
        drop(daemon.connect());
        daemon.connect().write_all(b"GET /hea").unwrap();
    }
    within(LIMIT, "descriptors are back", || {
        (daemon.descriptors() <= before).then_some(())
    });
    assert_eq!(daemon.get("/health", &[]).status, 204);
}

#[test]
fn a_client_that_leaves_during_the_dial_leaves_no_trace() {
    let daemon = Daemon::start(&[]);
    daemon.get("/health", &[]);
    let before = daemon.descriptors();
    let target = Target::listen();
    let head = request("GET", &format!("/tunnel?port={}", target.port), &UPGRADE);
    for _ in 0..20 {
        daemon.connect().write_all(head.as_bytes()).unwrap();
        let (bytes, orderly) = read_to_end(&mut target.accept());
        assert!(bytes.is_empty() && !orderly, "the target sees a reset");
    }
    within(LIMIT, "descriptors are back", || {
        (daemon.descriptors() <= before).then_some(())
    });
}

#[test]
fn an_answer_is_not_lost_to_bytes_that_come_behind_the_request() {
    let daemon = Daemon::start(&[]);
    for _ in 0..20 {
        let mut stream = daemon.connect();
        stream
            .write_all(
                &[
                    request("POST", "/health", &[]).into_bytes(),
                    vec![b'x'; 100_000],
                ]
                .concat(),
            )
            .unwrap();
        thread::sleep(Duration::from_millis(5));
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    }
}

#[test]
fn a_burst_of_connections_is_served_to_the_last() {
    let daemon = Daemon::start(&[]);
    for _ in 0..8 {
        let mut streams: Vec<_> = (0..60).map(|_| daemon.connect()).collect();
        for stream in &mut streams {
            stream
                .write_all(request("GET", "/health", &[]).as_bytes())
                .unwrap();
        }
        for stream in &mut streams {
            assert_eq!(Answer::read(stream).status, 204);
        }
    }
}

/// Connects `count` times. A connection that finds the queue full takes a second at least.
fn burst(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    let connect = || {
        let stream = TcpStream::connect_timeout(&address, Duration::from_millis(900)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    };
    (0..count).map(|_| connect()).collect()
}

#[test]
fn a_burst_while_nothing_is_accepted_waits_in_the_queue() {
    let daemon = Daemon::start(&["--max-connections", "1000"]);
    daemon.signal(Signal::STOP);
    let mut streams = burst(daemon.address, 600);
    daemon.signal(Signal::CONT);
    for stream in &mut streams {
        let _ = stream.write_all(request("GET", "/health", &[]).as_bytes());
    }
    for stream in &mut streams {
        assert_eq!(Answer::read(stream).status, 204);
    }
}

#[test]
fn a_burst_at_the_local_port_is_served_though_the_target_speaks_first() {
    let target = Target::listen();
    let port = target.port;
    thread::spawn(move || {
        let greet = |mut stream: TcpStream| stream.write_all(b"hello").map(|()| stream);
        let mut greeted = Vec::new();
        for _ in 0..200 {
            greeted.push(greet(target.accept()).unwrap());
        }
    });
    let daemon = Daemon::start(&[]);
    let client = Connect::to(&daemon, port, &LOCAL);
    let address = client.address();
    client.signal(Signal::STOP);
    let mut streams = burst(address, 200);
    client.signal(Signal::CONT);
    for stream in &mut streams {
        assert_eq!(take(stream, 5), b"hello");
    }
}
