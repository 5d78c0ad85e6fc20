//! Where the daemon listens: several addresses, and Unix sockets, over which a tunnel is the same as over TCP.

use std::fs;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::*;

/// A daemon on a Unix socket alone.
fn start(options: &[&str]) -> (Daemon, PathBuf, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tunneld.sock");
    let daemon = Daemon::spawn_on_unix(Daemon::bare_command(options), &path);
    (daemon, path, directory)
}

fn open(path: &Path, port: u16) -> Client {
    let head = request("GET", &format!("/tunnel?port={port}"), &UPGRADE);
    Client::upgrade(connect_unix(path), head.as_bytes())
}

fn listen_at(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// What a daemon that should listen at `path` says instead.
fn refuses(path: &Path) -> String {
    let (code, message) = fails_to_start(Daemon::command(&["--listen", &listen_at(path)]));
    assert_eq!(code, 2, "{message}");
    assert!(message.contains(&listen_at(path)), "{message}");
    message
}

#[test]
fn a_tunnel_over_a_unix_socket_ends_in_order_from_either_side() {
    let (daemon, path, _directory) = start(&[]);
    let target = Target::listen();
    let mut client = open(&path, target.port);
    let mut stream = target.accept();
    client.send(b"up");
    client.send_close(1000);
    assert_eq!(read_to_end(&mut stream), (b"up".to_vec(), true));
    stream.write_all(b"down").unwrap();
    drop(stream);
    assert_eq!(client.see_all(), (b"down".to_vec(), CLOSE_1000));
    assert_eq!(client.see(), Seen::Eof);
    daemon.logged(1, &["up=2 down=4", "end=orderly"]);

    let mut client = open(&path, target.port);
    let mut stream = target.accept();
    stream.write_all(b"down").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.see_all(), (b"down".to_vec(), CLOSE_1000));
    client.send(b"up");
    client.finish();
    assert_eq!(read_to_end(&mut stream), (b"up".to_vec(), true));
    daemon.logged(2, &["end=orderly"]);
}

#[test]
fn the_log_says_which_process_a_client_is() {
    let (daemon, path, _directory) = start(&[]);
    let target = Target::echo();
    let mut client = open(&path, target.port);
    client.finish_echo();
    let uid = rustix::process::getuid().as_raw();
    let peer = format!("peer=unix:uid={uid},pid={} ", std::process::id());
    daemon.logged(1, &["tunnel opened:", &peer]);
    daemon.logged(1, &["tunnel closed:", &peer]);
    let mut stream = connect_unix(&path);
    stream
        .write_all(request("GET", "/nothing", &[]).as_bytes())
        .unwrap();
    assert_eq!(Answer::read(&mut stream).status, 404);
    daemon.logged(1, &["refused:", &peer, "status=404"]);
}

trait FinishEcho {
    fn finish_echo(&mut self);
}

impl FinishEcho for Client {
    fn finish_echo(&mut self) {
        self.send(b"echo");
        assert_eq!(self.see_all_of(4), b"echo");
        self.send_close(1000);
        assert_eq!(self.see(), CLOSE_1000);
        assert_eq!(self.see(), Seen::Eof);
    }
}

#[test]
fn much_goes_through_both_ways_at_once() {
    let (daemon, path, _directory) = start(&[]);
    let target = Target::echo();
    let mut client = open(&path, target.port);
    let data = Random::new(1).bytes(8 << 20);
    let (mut writer, sent) = (client.clone_writer(), data.clone());
    let sending = thread::spawn(move || {
        for chunk in sent.chunks(60_000) {
            writer.send(chunk);
        }
        writer.send_close(1000);
    });
    let (received, end) = client.see_all();
    sending.join().unwrap();
    assert!(received == data && end == CLOSE_1000, "{end:?}");
    let size = data.len();
    daemon.logged(1, &[&format!("up={size} down={size}"), "end=orderly"]);
}

/// How many frames of 10,000 bytes a client can send until every buffer up to its target is full.
fn frames_until_full(client: &mut Client) -> usize {
    let chunk = frame(0x82, &[b'x'; 10_000]);
    let (mut frames, mut unsent) = (0, &chunk[..]);
    client.stream.set_nonblocking(true).unwrap();
    let mut progress = Instant::now();
    while progress.elapsed() < Duration::from_millis(500) {
        match client.stream.write(unsent) {
            Ok(count) => {
                unsent = &unsent[count..];
                progress = Instant::now();
            }
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
        if unsent.is_empty() {
            frames += 1;
            unsent = &chunk;
        }
    }
    frames
}

/// Over a Unix socket a close is known at once, in both directions, and what was sent before it is there to be read.
#[test]
fn what_lies_unread_when_a_client_closes_behind_its_close_arrives_as_a_whole() {
    let (daemon, path, _directory) = start(&[]);
    let target = Target::listen();
    let mut client = open(&path, target.port);
    let _stream = target.accept();
    let full = frames_until_full(&mut client);
    let mut client = open(&path, target.port);
    let mut stream = target.accept();
    // So that some of it lies in the Unix socket.
    let sent = full - 12;
    let sending = thread::spawn(move || {
        for _ in 0..sent {
            client.send(&[b'x'; 10_000]);
        }
        client.send_close(1000);
    });
    // Mostly they are as large as before. If not, the client is still there when the target goes on.
    let deadline = Instant::now() + Duration::from_secs(1);
    while !sending.is_finished() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    // For longer than a broken connection has.
    thread::sleep(Duration::from_millis(1000));
    let (bytes, is_orderly) = read_to_end(&mut stream);
    let whole = (sent * 10_000, true);
    assert_eq!((bytes.len(), is_orderly), whole, "{}", daemon.log());
    daemon.logged(1, &["tunnel closed:", &format!("up={}", whole.0)]);
}

/// Nobody can tell what it has taken, only that it is there.
#[test]
fn a_slow_reader_behind_the_targets_end_has_more_than_the_linger() {
    let (daemon, path, _directory) = start(&["--linger", "200ms"]);
    let target = Target::listen();
    let mut client = open(&path, target.port);
    let mut stream = target.accept();
    let down = Random::new(3).bytes(100_000);
    stream.write_all(&down).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(client.see_all(), (down, CLOSE_1000));
    client.send(b"late");
    client.send_close(1000);
    assert_eq!(read_to_end(&mut stream), (b"late".to_vec(), true));
    daemon.logged(1, &["end=orderly"]);
}

#[test]
fn a_client_that_is_gone_without_a_close_resets_the_target() {
    let (daemon, path, _directory) = start(&[]);
    let target = Target::listen();
    let mut client = open(&path, target.port);
    let mut stream = target.accept();
    client.send(b"half");
    drop(client);
    assert!(!read_to_end(&mut stream).1);
    daemon.logged(
        1,
        &[
            "end=client_vanished",
            "its connection ended without a Close",
        ],
    );
    // Also with bytes that it has not read, while neither it nor the target takes anything.
    let mut client = open(&path, target.port);
    let mut stream = target.accept();
    stream.set_nonblocking(true).unwrap();
    while stream.write(&[0; 100_000]).is_ok() {}
    stream.set_nonblocking(false).unwrap();
    frames_until_full(&mut client);
    drop(client);
    daemon.logged(2, &["end=client_vanished"]);
    assert!(!read_to_end(&mut stream).1);
}

#[test]
fn the_targets_reset_is_close_1011() {
    let (daemon, path, _directory) = start(&[]);
    let target = Target::listen();
    let mut client = open(&path, target.port);
    let mut stream = target.accept();
    stream.write_all(b"bytes").unwrap();
    assert_eq!(client.see_all_of(5), b"bytes");
    reset(stream);
    assert!(matches!(client.see(), Seen::Close(Some(1011), _)));
    client.send_close(1011);
    assert_eq!(client.see(), Seen::Eof);
    daemon.logged(1, &["end=target_failed"]);
}

#[test]
fn what_a_target_does_not_take_ends_the_tunnel_without_a_close() {
    let (daemon, path, _directory) = start(&[]);
    let target = Target::listen();
    let mut client = open(&path, target.port);
    let mut stream = target.accept();
    stream.write_all(b"answer").unwrap();
    // It is done, and takes nothing more.
    drop(stream);
    client.stream.set_write_timeout(Some(LIMIT)).unwrap();
    while client.stream.write_all(&frame(0x82, &[0; 1000])).is_ok() {
        thread::sleep(Duration::from_millis(1));
    }
    let mut seen = Vec::new();
    let end = loop {
        match client.see() {
            Seen::Binary(bytes) => seen.extend(bytes),
            Seen::Close(Some(1000), _) => {}
            end => break end,
        }
    };
    assert_eq!(seen, b"answer");
    assert!(matches!(end, Seen::Eof | Seen::Reset), "{end:?}");
    daemon.logged(1, &["end=upload_cut_short"]);
}

#[test]
fn a_shutdown_is_close_1001_and_leaves_no_file() {
    let (mut daemon, path, _directory) = start(&["--shutdown-grace", "0s"]);
    let target = Target::listen();
    let mut client = open(&path, target.port);
    let _stream = target.accept();
    daemon.signal(Signal::TERM);
    assert!(matches!(client.see(), Seen::Close(Some(1001), _)));
    client.send_close(1001);
    assert_eq!(daemon.exit().code(), Some(0));
    assert!(!path.exists());
    // Whatever the client answers.
    daemon.logged(1, &["end=shutdown"]);
}

#[test]
fn the_socket_is_for_its_owner_and_its_group() {
    let (_daemon, path, _directory) = start(&[]);
    let file = fs::metadata(&path).unwrap();
    assert!(file.file_type().is_socket());
    assert_eq!(file.permissions().mode() & 0o777, 0o660);
}

#[test]
fn a_dead_daemons_socket_is_replaced_and_nothing_else_is() {
    let (mut daemon, path, directory) = start(&[]);
    assert!(refuses(&path).contains("another process listens there"));
    daemon.signal(Signal::KILL);
    daemon.exit();
    assert!(path.exists());
    let again = Daemon::spawn_on_unix(Daemon::bare_command(&[]), &path);
    let target = Target::echo();
    open(&path, target.port).finish_echo();

    let file = directory.path().join("file");
    fs::write(&file, "data").unwrap();
    assert!(refuses(&file).contains("not a socket"));
    assert_eq!(fs::read_to_string(&file).unwrap(), "data");
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(refuses(&link).contains("not a socket"));
    refuses(directory.path());
    refuses(&directory.path().join("nowhere/tunneld.sock"));
    refuses(&directory.path().join("x".repeat(200)));
    drop(again);

    // One that isn't ours any more stays.
    let mut third = Daemon::spawn_on_unix(Daemon::bare_command(&[]), &path);
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    third.signal(Signal::TERM);
    assert_eq!(third.exit().code(), Some(0));
    UnixStream::connect(&path).unwrap();
}

#[test]
fn it_listens_on_every_address_it_is_given() {
    let directory = tempfile::tempdir().unwrap();
    let paths = [directory.path().join("a"), directory.path().join("b")];
    let [a, b] = [listen_at(&paths[0]), listen_at(&paths[1])];
    let options = [
        "--listen",
        &a,
        "--listen",
        &b,
        "--listen",
        "[::1]:0",
        "--listen",
        "127.0.0.1:0",
    ];
    let daemon = Daemon::spawn(Daemon::command(&options));
    let mut by_variable = Daemon::bare_command(&[]);
    let c = listen_at(&directory.path().join("c"));
    by_variable.env("TUNNELD_LISTEN", format!("{c},127.0.0.1:0"));
    let by_variable = Daemon::spawn(by_variable);
    let target = Target::echo();
    Client::open(&daemon, target.port).finish_echo();
    Client::open(&by_variable, target.port).finish_echo();
    for path in paths.iter().chain([&directory.path().join("c")]) {
        open(path, target.port).finish_echo();
    }
    let line = daemon.logged(1, &["listening on [::1]:"]);
    let v6 = line.split_once("listening on ").unwrap().1;
    let stream = std::net::TcpStream::connect(v6).unwrap();
    let head = request("GET", &format!("/tunnel?port={}", target.port), &UPGRADE);
    Client::upgrade(stream, head.as_bytes()).finish_echo();
}

#[test]
fn every_address_is_checked_before_any_is_listened_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a");
    let options = ["--listen", &listen_at(&path), "--listen", "0.0.0.0:0"];
    let (code, message) = fails_to_start(Daemon::command(&options));
    assert_eq!(code, 2);
    assert!(
        message.contains("refusing to listen on 0.0.0.0:0"),
        "{message}"
    );
    assert!(!path.exists());
    let twice = ["--listen", &listen_at(&path), "--listen", &listen_at(&path)];
    assert_eq!(fails_to_start(Daemon::command(&twice)).0, 2);
    assert!(!path.exists());
}

/// It has no address that others have, so it takes no part in what they share by address.
#[test]
fn a_body_behind_a_refused_request_costs_the_client_no_answer() {
    let (_daemon, path, _directory) = start(&[]);
    let mut stream = connect_unix(&path);
    stream
        .write_all(b"POST /tunnel HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        .unwrap();
    let _ = stream.write_all(&[b'x'; 100_000]);
    assert_eq!(Answer::read(&mut stream).status, 405);
}
