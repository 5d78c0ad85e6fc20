//! What ends by itself when nothing happens: a tunnel with `--idle-timeout`, the daemon with `--exit-when-idle`.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::connect_tcp::{Capsules, DATA, End, FINAL_DATA};
use crate::support::*;

fn idle() -> Seen {
    Seen::Close(Some(1001), "idle".into())
}

#[test]
fn an_idle_tunnel_is_closed_with_1001_and_its_target_reset() {
    let daemon = Daemon::start(&["--idle-timeout", "2s", "--ping-interval", "50ms"]);
    let target = Target::listen();
    // Whatever the client answers.
    for answer in [1001, 1000] {
        let mut client = Client::open(&daemon, target.port);
        let mut stream = target.accept();
        client.send(b"up");
        stream.write_all(b"down").unwrap();
        assert_eq!(client.see_all(), (b"down".to_vec(), idle()));
        client.send_close(answer);
        assert_eq!(client.see(), Seen::Eof);
        assert_eq!(read_to_end(&mut stream), (b"up".to_vec(), false));
    }
    let line = daemon.logged(2, &["tunnel closed:", "up=2 down=4", " end=idle "]);
    assert!(line.contains("idle timeout"), "{line}");
    let metrics = daemon.get("/metrics", &[]).body;
    assert!(
        metrics.contains("tunneld_tunnels_closed_total{end=\"idle\"} 2"),
        "{metrics}"
    );
}

#[test]
fn a_half_closed_tunnel_is_idle_too() {
    let daemon = Daemon::start(&["--idle-timeout", "2s"]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut stream = target.accept();
    client.send(b"up");
    client.send_close(1000);
    assert_eq!(client.see(), idle());
    // What was finished stays finished, and behind it comes a reset, for a target that has more to say.
    assert_eq!(read_to_end(&mut stream), (b"up".to_vec(), true));
    is_reset_behind_fin(&stream);
    daemon.logged(1, &["end=idle"]);

    let mut client = Client::open(&daemon, target.port);
    target.accept().shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.see(), CLOSE_1000);
    assert_eq!(client.see(), Seen::Eof);
    daemon.logged(2, &["end=idle"]);
}

#[test]
fn an_idle_tunnel_of_connect_tcp_is_a_reset_on_both_sides() {
    let daemon = Daemon::start(&["--idle-timeout", "1s", "--ping-interval", "50ms"]);
    let target = Target::listen();
    for half_closed in [None, Some("client"), Some("target")] {
        let mut client = Capsules::open(&daemon, target.port);
        let mut stream = target.accept();
        client.send(DATA, b"up");
        stream.write_all(b"down").unwrap();
        match half_closed {
            Some("client") => client.send(FINAL_DATA, b""),
            Some(_) => {
                stream.shutdown(Shutdown::Write).unwrap();
                assert_eq!(client.see_all(), (b"down".to_vec(), End::Final));
            }
            None => {}
        }
        let (bytes, end) = client.see_all();
        assert!(b"down".starts_with(&bytes), "{bytes:?}");
        assert_eq!(end, End::Reset, "{half_closed:?}");
        let is_finished = half_closed == Some("client");
        assert_eq!(read_to_end(&mut stream), (b"up".to_vec(), is_finished));
        is_reset_behind_fin(&stream);
    }
    daemon.logged(3, &["tunnel closed:", "up=2 down=4", " end=idle "]);
}

/// Waits until nothing can be written any more, without trying.
fn is_reset_behind_fin(stream: &TcpStream) {
    within(LIMIT, "the target is reset", || {
        stream.peer_addr().is_err().then_some(())
    });
}

#[test]
fn bytes_in_one_direction_keep_a_tunnel_open_and_pongs_do_not() {
    let daemon = Daemon::start(&["--idle-timeout", "2s", "--ping-interval", "20ms"]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut stream = target.accept();
    let reading = thread::spawn(move || {
        let (bytes, end) = client.see_all();
        (bytes.len(), end)
    });
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(4) {
        stream.write_all(b"x").unwrap();
        thread::sleep(Duration::from_millis(100));
    }
    assert!(!reading.is_finished(), "{}", daemon.log());
    assert_eq!(reading.join().unwrap().1, idle());
    daemon.logged(1, &["end=idle"]);
}

#[test]
fn bytes_that_a_slow_side_still_takes_keep_a_tunnel_open() {
    let daemon = Daemon::start(&["--idle-timeout", "2s"]);
    let target = Target::listen();
    let client = Client::open(&daemon, target.port);
    let mut stream = target.accept();
    // More than the sockets hold, so that nothing is written for as long as the target takes what is there.
    let mut sender = client.clone_writer();
    thread::spawn(move || sender.stream.write_all(&frame(0x82, &[0; 20_000_000])));
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(6) {
        stream.read_exact(&mut [0; 8 * 1024]).unwrap();
        thread::sleep(Duration::from_millis(50));
    }
    assert!(!daemon.log().contains("tunnel closed"), "{}", daemon.log());
    daemon.logged(1, &["tunnel closed:", "end=idle"]);
}

#[test]
fn without_the_option_a_silent_tunnel_stays() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut stream = target.accept();
    thread::sleep(Duration::from_secs(1));
    stream.write_all(b"late").unwrap();
    assert_eq!(client.see_all_of(4), b"late");
}

#[test]
fn a_daemon_without_a_connection_ends_with_0() {
    let mut daemon = Daemon::start(&["--exit-when-idle", "300ms"]);
    assert_eq!(daemon.exit().code(), Some(0));
    daemon.logged(1, &["no connection for"]);
    daemon.logged(1, &["shut down"]);
}

#[test]
fn a_daemon_with_a_connection_stays_until_that_is_over() {
    let mut daemon = Daemon::start(&["--exit-when-idle", "400ms"]);
    let target = Target::echo();
    let mut client = Client::open(&daemon, target.port);
    // A connection that has sent nothing is one, too.
    let waiting = daemon.connect();
    thread::sleep(Duration::from_millis(1200));
    client.send(b"echo");
    assert_eq!(client.see_all_of(4), b"echo");
    client.send_close(1000);
    assert_eq!(client.see(), CLOSE_1000);
    drop(client);
    thread::sleep(Duration::from_millis(1200));
    assert!(daemon.is_running());
    drop(waiting);
    assert_eq!(daemon.exit().code(), Some(0));
    assert!(TcpStream::connect(daemon.address).is_err());
}

#[test]
fn without_the_option_a_daemon_stays() {
    let mut daemon = Daemon::start(&[]);
    thread::sleep(Duration::from_millis(700));
    assert!(daemon.is_running());
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit().code(), Some(0));
}
