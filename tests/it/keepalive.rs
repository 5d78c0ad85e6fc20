//! Pings, and who they find dead.

use std::time::{Duration, Instant};

use crate::support::*;

#[test]
fn an_idle_tunnel_is_pinged_and_stays() {
    let daemon = Daemon::start(&["--ping-interval", "100ms", "--ping-timeout", "5s"]);
    let target = Target::echo();
    let mut client = Client::open(&daemon, target.port);
    for _ in 0..5 {
        let Seen::Ping(payload) = client.see() else {
            panic!("no ping")
        };
        client.send_frame(0x8a, &payload);
    }
    client.send(b"x");
    assert_eq!(client.see_all_of(1), b"x");
}

#[test]
fn a_client_that_does_not_answer_is_gone_after_the_ping_timeout() {
    let daemon = Daemon::start(&["--ping-interval", "200ms", "--ping-timeout", "300ms"]);
    let target = Target::listen();
    let client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let start = Instant::now();
    assert_eq!(read_to_end(&mut server), (vec![], false));
    assert!(
        start.elapsed() >= Duration::from_millis(450),
        "{:?}",
        start.elapsed()
    );
    daemon.logged(1, &["tunnel closed:", "no pong within the ping timeout"]);
    drop(client);
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
