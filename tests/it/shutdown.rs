//! SIGTERM, SIGINT and SIGHUP.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
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

/// Of 50 tunnels that move data when the signal comes, half end within the grace and lose nothing; the
/// others get Close 1001 behind whole messages.
#[test]
fn under_load_tunnels_lose_nothing_within_the_grace_and_the_rest_get_close_1001() {
    const TUNNELS: usize = 50;
    let mut daemon = Daemon::start(&["--shutdown-grace", "3s"]);
    let target = Target::echo();
    let clients: Vec<_> = (0..TUNNELS)
        .map(|_| Client::open(&daemon, target.port))
        .collect();
    let signalled = Arc::new(AtomicBool::new(false));
    let work = clients.into_iter().enumerate().map(|(n, client)| {
        let signalled = Arc::clone(&signalled);
        thread::spawn(move || {
            if n % 2 == 0 {
                ends_by_itself(client, n, &signalled)
            } else {
                goes_on(client, n)
            }
        })
    });
    let work: Vec<_> = work.collect();
    thread::sleep(Duration::from_millis(300));
    daemon.signal(Signal::TERM);
    within(LIMIT, "no new connections", || {
        TcpStream::connect(daemon.address).is_err().then_some(())
    });
    signalled.store(true, Ordering::SeqCst);
    for work in work {
        work.join().unwrap();
    }
    assert_eq!(daemon.exit().code(), Some(0));
    daemon.logged(TUNNELS / 2, &["tunnel closed:", "closed in order"]);
    daemon.logged(TUNNELS / 2, &["tunnel closed:", "shutting down"]);
}

/// Echoes blocks until the signal has come, then closes and expects every byte.
fn ends_by_itself(mut client: Client, n: usize, signalled: &AtomicBool) {
    let block = Random::new(n as u64).bytes(50_000);
    let mut rounds = 0;
    while !signalled.load(Ordering::SeqCst) || rounds < 3 {
        client.send(&block);
        assert!(client.see_all_of(block.len()) == block);
        rounds += 1;
    }
    client.send(&block);
    client.send_close(1000);
    let (bytes, end) = client.see_all();
    assert!(bytes == block);
    assert_eq!(end, CLOSE_1000);
}

/// Echoes blocks until it is told to stop.
fn goes_on(mut client: Client, n: usize) {
    let block = Random::new(n as u64).bytes(20_000);
    let mut writer = client.clone_writer();
    let bytes = frame(0x82, &block);
    thread::spawn(move || while writer.stream.write_all(&bytes).is_ok() {});
    let (echoed, end) = client.see_all();
    assert!(
        echoed
            .chunks(block.len())
            .all(|chunk| block.starts_with(chunk))
    );
    assert!(matches!(end, Seen::Close(Some(1001), _)), "{end:?}");
}

#[test]
fn a_daemon_that_is_killed_resets_its_targets() {
    let target = Target::listen();
    for how in [&[Signal::KILL][..], &[Signal::TERM, Signal::TERM]] {
        let mut daemon = Daemon::start(&["--shutdown-grace", "300s"]);
        let mut client = Client::open(&daemon, target.port);
        let mut server = target.accept();
        client.send(b"half of an upload");
        let mut received = [0; 17];
        server.read_exact(&mut received).unwrap();
        for signal in how {
            daemon.signal(*signal);
            // Two signals within 10 ms count as one, delivered twice.
            thread::sleep(Duration::from_millis(50));
        }
        daemon.exit();
        assert_eq!(read_to_end(&mut server), (vec![], false), "{how:?}");
    }
}
