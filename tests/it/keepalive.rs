//! Pings: who they find dead, and whom they spare.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::*;

const HASTY: [&str; 4] = ["--ping-interval", "200ms", "--ping-timeout", "200ms"];

#[test]
fn an_idle_client_that_answers_stays() {
    let daemon = Daemon::start(&["--ping-interval", "200ms", "--ping-timeout", "1s"]);
    let target = Target::echo();
    let mut client = Client::open(&daemon, target.port);
    for _ in 0..8 {
        let Seen::Ping(payload) = client.see() else {
            panic!("no ping")
        };
        client.send_frame(0x8a, &payload);
    }
    client.send(b"x");
    assert_eq!(client.see_all_of(1), b"x");
}

#[test]
fn an_idle_client_that_does_not_answer_is_gone_after_the_ping_timeout() {
    let daemon = Daemon::start(&["--ping-interval", "200ms", "--ping-timeout", "300ms"]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let start = Instant::now();
    assert_eq!(read_to_end(&mut server), (vec![], false));
    assert!(
        start.elapsed() >= Duration::from_millis(450),
        "{:?}",
        start.elapsed()
    );
    daemon.logged(1, &["tunnel closed:", "no pong within the ping timeout"]);
    assert!(matches!(client.see(), Seen::Ping(_)));
    let end = std::iter::repeat_with(|| client.see()).find(|seen| !matches!(seen, Seen::Ping(_)));
    assert!(matches!(end, Some(Seen::Eof | Seen::Reset)));
}

/// As by a container that is frozen, or a machine that is suspended: what came meanwhile counts.
#[test]
fn a_daemon_that_stood_still_hears_first_and_judges_then() {
    let daemon = Daemon::start(&["--ping-interval", "1s", "--ping-timeout", "1s"]);
    let target = Target::echo();
    let mut clients: Vec<_> = (0..10)
        .map(|_| Client::open(&daemon, target.port))
        .collect();
    let pings: Vec<_> = clients.iter_mut().map(Client::see).collect();
    daemon.signal(Signal::STOP);
    for (client, ping) in clients.iter_mut().zip(pings) {
        let Seen::Ping(payload) = ping else {
            panic!("{ping:?} instead of a ping")
        };
        client.send_frame(0x8a, &payload);
    }
    thread::sleep(Duration::from_millis(1500));
    daemon.signal(Signal::CONT);
    for client in &mut clients {
        client.send(b"x");
        assert_eq!(client.see_all_of(1), b"x");
    }
}

#[test]
fn a_busy_download_is_pinged_between_its_messages() {
    let daemon = Daemon::start(&["--ping-interval", "100ms"]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let streaming = thread::spawn(move || while server.write_all(&[7; 100_000]).is_ok() {});
    let mut between = 0u64;
    for _ in 0..10 {
        let ping = loop {
            match client.see() {
                Seen::Binary(bytes) => between += bytes.len() as u64,
                other => break other,
            }
        };
        let Seen::Ping(payload) = ping else {
            panic!("{ping:?} instead of a ping")
        };
        assert!(between > 0, "nothing came before it");
        between = 0;
        client.send_frame(0x8a, &payload);
    }
    drop(client);
    streaming.join().unwrap();
}

#[test]
fn bytes_that_were_answered_for_do_not_lengthen_the_ping_timeout() {
    let daemon = Daemon::start(&[&HASTY[..], &["--stall-timeout", "300s"]].concat());
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    server.write_all(&[1; 100_000]).unwrap();
    assert_eq!(client.see_all_of(100_000).len(), 100_000);
    let Seen::Ping(payload) = client.see() else {
        panic!("no ping")
    };
    client.send_frame(0x8a, &payload);
    assert_eq!(read_to_end(&mut server), (vec![], false));
    daemon.logged(1, &["tunnel closed:", "no pong within the ping timeout"]);
}

#[test]
fn a_slow_reader_gets_every_byte() {
    let daemon = Daemon::start(&[&HASTY[..], &["--stall-timeout", "60s"]].concat());
    let target = Target::listen();
    let data = Random::new(20).bytes(20_000_000);
    let sent = data.clone();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let sender = thread::spawn(move || server.write_all(&sent));
    // Many pings' worth of silence, with megabytes ahead of each.
    thread::sleep(Duration::from_millis(1500));
    let (bytes, end) = client.see_all();
    assert!(bytes == data, "{} bytes, then {end:?}", bytes.len());
    assert_eq!(end, CLOSE_1000);
    sender.join().unwrap().unwrap();
}

#[test]
fn a_client_that_takes_nothing_is_gone_after_the_stall_timeout() {
    let daemon = Daemon::start(&[&HASTY[..], &["--stall-timeout", "1s"]].concat());
    let target = Target::listen();
    let _client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let start = Instant::now();
    let chunk = [1; 50_000];
    while server.write_all(&chunk).is_ok() {}
    assert!(
        start.elapsed() >= Duration::from_millis(900),
        "{:?}",
        start.elapsed()
    );
    daemon.logged(
        1,
        &["tunnel closed:", "no sign of life within the stall timeout"],
    );
}

#[test]
fn a_few_bytes_before_a_silent_client_get_the_stall_timeout_too() {
    let daemon = Daemon::start(&[&HASTY[..], &["--stall-timeout", "1s"]].concat());
    let target = Target::listen();
    let _client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let start = Instant::now();
    server.write_all(b"x").unwrap();
    assert_eq!(read_to_end(&mut server), (vec![], false));
    assert!(
        start.elapsed() >= Duration::from_millis(900),
        "{:?}",
        start.elapsed()
    );
    daemon.logged(
        1,
        &["tunnel closed:", "no sign of life within the stall timeout"],
    );
}

#[test]
fn a_parked_target_does_not_cost_its_client_the_upload() {
    let daemon = Daemon::start(&[&HASTY[..], &["--stall-timeout", "300ms"]].concat());
    let target = Target::listen();
    let data = Random::new(21).bytes(20_000_000);
    let sent = [frame(0x82, &data), frame(0x88, b"")].concat();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let sender = thread::spawn(move || {
        client.send_raw(&sent);
        client
    });
    thread::sleep(Duration::from_millis(1500));
    let (bytes, orderly) = read_to_end(&mut server);
    assert!(
        bytes == data && orderly,
        "{} bytes, orderly: {orderly}",
        bytes.len()
    );
    drop(server);
    assert_eq!(sender.join().unwrap().see_all().1, CLOSE_1000);
}

#[test]
fn any_bytes_are_a_sign_of_life() {
    let daemon = Daemon::start(&["--ping-interval", "200ms", "--ping-timeout", "600ms"]);
    let target = Target::echo();
    for (first, payload) in [
        (0x82, &b"data"[..]),
        (0x8a, b"foreign pong"),
        (0x89, b"ping"),
        (0x82, b""),
    ] {
        let mut client = Client::open(&daemon, target.port);
        for _ in 0..15 {
            client.send_frame(first, payload);
            thread::sleep(Duration::from_millis(100));
        }
        client.send_close(1000);
        loop {
            match client.see() {
                Seen::Close(code, _) => break assert_eq!(code, Some(1000)),
                Seen::Eof | Seen::Reset => panic!("given up in spite of {payload:?}"),
                _ => {}
            }
        }
    }
}

#[test]
fn a_ping_of_the_clients_is_answered_with_its_payload() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let mut client = Client::open(&daemon, target.port);
    for payload in [&b""[..], b"hello", &[0xff; 125]] {
        client.send_frame(0x89, payload);
        assert_eq!(client.see(), Seen::Pong(payload.to_vec()));
    }
}
