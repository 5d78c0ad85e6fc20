//! SIGTERM, SIGINT and SIGHUP.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::*;

#[test]
fn a_signal_ends_an_idle_daemon_with_exit_code_0() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut daemon = Daemon::start(&[]);
        daemon.signal(signal);
        assert_eq!(daemon.exit().code(), Some(0), "{signal:?}");
    }
}

#[test]
fn tunnels_get_the_grace_and_then_close_1001() {
    let mut daemon = Daemon::start(&["--shutdown-grace", "300ms"]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let start = Instant::now();
    daemon.signal(Signal::TERM);
    let (_, end) = client.see_all();
    assert!(matches!(end, Seen::Close(Some(1001), _)), "{end:?}");
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert!(!read_to_end(&mut server).1);
    client.finish();
    assert_eq!(daemon.exit().code(), Some(0));
    daemon.logged(1, &["tunnel closed:", "shutting down"]);
}

#[test]
fn a_tunnel_that_ends_within_the_grace_ends_in_order() {
    let mut daemon = Daemon::start(&["--shutdown-grace", "30s"]);
    let target = Target::echo();
    let mut client = Client::open(&daemon, target.port);
    daemon.signal(Signal::TERM);
    within(LIMIT, "no new connections", || {
        TcpStream::connect(daemon.address).is_err().then_some(())
    });
    client.send(b"last words");
    client.send_close(1000);
    assert_eq!(client.see_all(), (b"last words".to_vec(), CLOSE_1000));
    drop(client);
    assert_eq!(daemon.exit().code(), Some(0));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut daemon = Daemon::start(&["--shutdown-grace", "300s"]);
    let target = Target::echo();
    let _client = Client::open(&daemon, target.port);
    daemon.signal(Signal::TERM);
    daemon.logged(1, &["shutting down"]);
    // Two signals within 10 ms count as one, delivered twice.
    std::thread::sleep(Duration::from_millis(50));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit().code(), Some(1));
}
