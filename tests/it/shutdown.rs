//! SIGTERM, SIGINT and SIGHUP.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::connect::Connect;
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
fn a_client_whose_head_is_awaited_at_shutdown_is_told_to_come_again() {
    let mut daemon = Daemon::start(&["--shutdown-grace", "1m"]);
    let mut stream = daemon.connect();
    stream.write_all(b"GET /tunnel?port=1 HT").unwrap();
    // By then it has been accepted.
    assert_eq!(daemon.get("/health", &[]).status, 204);
    daemon.signal(Signal::TERM);
    let answer = Answer::read(&mut stream);
    assert_eq!(answer.status, 503);
    assert!(answer.message().starts_with("shutting down"));
    assert_eq!(answer.header("retry-after"), Some("1"));
    let why = Some("tunneld; error=proxy_internal_error");
    assert_eq!(answer.header("proxy-status"), why);
    assert_eq!(daemon.exit().code(), Some(0));
}

/// The signals, each with another one.
const PAIRS: [(Signal, Signal); 3] = [
    (Signal::HUP, Signal::TERM),
    (Signal::INT, Signal::HUP),
    (Signal::TERM, Signal::INT),
];

#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
    for (ignored, other) in PAIRS {
        let mut daemon = Daemon::spawn(with_ignored(ignored, &Daemon::command(&[])));
        daemon.signal(ignored);
        assert_eq!(daemon.get("/health", &[]).status, 204, "{ignored:?}");
        assert!(ignores(daemon.pid(), ignored) && daemon.is_running());
        daemon.signal(other);
        assert_eq!(daemon.exit().code(), Some(0), "{other:?}");
    }
}

#[test]
fn a_local_port_ends_at_any_signal_that_was_not_ignored_at_the_start() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let options = ["--port", &target.port.to_string(), "--listen", "[::1]:0"];
    let command = Connect::command(&format!("ws://{}", daemon.address), &options);
    for (ignored, other) in PAIRS {
        let mut client = Connect::spawn(with_ignored(ignored, &command));
        client.address();
        client.signal(ignored);
        let mut stream = client.dial();
        stream.write_all(b"still here").unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        assert!(ignores(client.pid(), ignored), "{ignored:?}");
        client.signal(other);
        let (code, log) = client.ended();
        assert_eq!(code, 0, "{other:?}: {log}");
        assert!(log.ends_with("shut down\n"), "{log}");
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
    no_new_connections(&daemon);
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

/// Tunnels that move data when the signal comes may end by themselves, and lose nothing.
#[test]
fn under_load_tunnels_that_end_within_the_grace_lose_nothing() {
    let mut daemon = Daemon::start(&["--shutdown-grace", "300s"]);
    let signalled = Arc::new(AtomicBool::new(false));
    let work = under_load(&daemon, |client, n| {
        let signalled = Arc::clone(&signalled);
        move || echoes_until(&signalled, client, n)
    });
    daemon.signal(Signal::TERM);
    no_new_connections(&daemon);
    signalled.store(true, Ordering::SeqCst);
    for work in work {
        work.join().unwrap();
    }
    assert_eq!(daemon.exit().code(), Some(0));
    daemon.logged(TUNNELS, &["tunnel closed:", "closed in order"]);
}

/// Tunnels that go on moving data get Close 1001 behind whole messages.
#[test]
fn under_load_tunnels_that_outlast_the_grace_get_close_1001() {
    let mut daemon = Daemon::start(&["--shutdown-grace", "300ms"]);
    let work = under_load(&daemon, |client, n| move || echoes_until_closed(client, n));
    daemon.signal(Signal::TERM);
    no_new_connections(&daemon);
    for work in work {
        work.join().unwrap();
    }
    assert_eq!(daemon.exit().code(), Some(0));
    daemon.logged(TUNNELS, &["tunnel closed:", "shutting down"]);
}

const TUNNELS: usize = 25;

/// So many tunnels to an echo, each used on a thread of its own for a while already.
fn under_load<W: FnOnce() + Send + 'static>(
    daemon: &Daemon,
    work: impl Fn(Client, usize) -> W,
) -> Vec<thread::JoinHandle<()>> {
    let target = Target::echo();
    let clients: Vec<_> = (0..TUNNELS)
        .map(|_| Client::open(daemon, target.port))
        .collect();
    let threads = clients
        .into_iter()
        .enumerate()
        .map(|(n, client)| thread::spawn(work(client, n)))
        .collect();
    thread::sleep(Duration::from_millis(300));
    threads
}

fn no_new_connections(daemon: &Daemon) {
    within(LIMIT, "no new connections", || {
        TcpStream::connect(daemon.address).is_err().then_some(())
    });
}

/// Echoes blocks until the signal has come, then closes and expects every byte.
fn echoes_until(signalled: &AtomicBool, mut client: Client, n: usize) {
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

/// Sends blocks, and sees them echoed, until it is told to stop.
fn echoes_until_closed(mut client: Client, n: usize) {
    let block = Random::new(n as u64).bytes(20_000);
    let mut writer = client.clone_writer();
    let bytes = frame(0x82, &block);
    let writer = thread::spawn(move || while writer.stream.write_all(&bytes).is_ok() {});
    let (echoed, end) = client.see_all();
    assert!(
        echoed
            .chunks(block.len())
            .all(|chunk| block.starts_with(chunk))
    );
    assert!(matches!(end, Seen::Close(Some(1001), _)), "{end:?}");
    // Unless the daemon was first.
    let _ = client.stream.shutdown(Shutdown::Both);
    writer.join().unwrap();
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
