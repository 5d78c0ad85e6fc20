//! A stderr that nobody reads, or nobody reads any more, holds up nobody.

use std::io::{BufRead, PipeWriter, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::connect::Connect;
use crate::support::*;

/// A daemon that logs more than a kilobyte for each tunnel.
fn talkative() -> Command {
    let mut command = Daemon::command(&["--shutdown-grace", "10s"]);
    command.env("RUST_LOG", "debug");
    command
}

fn use_a_tunnel(daemon: &Daemon, target: &Target) {
    let mut client = Client::open(daemon, target.port);
    client.send(b"12345");
    client.send_close(1000);
    assert_eq!(client.see_all(), (b"12345".to_vec(), CLOSE_1000));
}

fn ends_in_time(mut daemon: Daemon) {
    let start = Instant::now();
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(9), "within the grace");
}

#[test]
fn a_stderr_that_nobody_reads_holds_up_neither_tunnels_nor_the_end() {
    let (daemon, _unread) = Daemon::spawn_unread(talkative());
    let target = Target::echo();
    for _ in 0..400 {
        use_a_tunnel(&daemon, &target);
        assert_eq!(daemon.get("/nothing", &[]).status, 404);
    }
    ends_in_time(daemon);
}

#[test]
fn a_reader_that_comes_back_is_told_how_many_lines_it_missed() {
    const TUNNELS: u64 = 1000;
    let (mut daemon, reader) = Daemon::spawn_unread(Daemon::command(&[]));
    let target = Target::echo();
    for _ in 0..TUNNELS {
        use_a_tunnel(&daemon, &target);
    }
    let (mut read, mut missed) = (0, 0);
    for line in reader.lines().map(Result::unwrap) {
        assert!(line.starts_with("[20"), "a torn line: {line:?}");
        let (_, text) = line.split_once("] ").unwrap();
        if let Some((count, _)) = text.split_once(" log lines were dropped") {
            if missed == 0 {
                daemon.signal(Signal::TERM);
            }
            missed += count.parse::<u64>().unwrap();
        } else if text.starts_with("tunnel ") {
            read += 1;
        }
    }
    assert!(missed > 0, "{read} lines were read");
    assert_eq!(read + missed, 2 * TUNNELS);
    assert_eq!(daemon.exit().code(), Some(0));
}

#[test]
fn a_stderr_whose_reader_is_gone_holds_up_neither_tunnels_nor_the_end() {
    let (daemon, reader) = Daemon::spawn_unread(talkative());
    drop(reader);
    let target = Target::echo();
    for _ in 0..20 {
        use_a_tunnel(&daemon, &target);
    }
    ends_in_time(daemon);
}

/// A pipe into which nothing more goes.
fn full_pipe() -> (std::io::PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    writer.write_all(&[b'x'; 4096]).unwrap();
    (reader, writer)
}

#[test]
fn a_failure_that_nobody_reads_ends_all_the_same() {
    let closed = closed_port();
    let nowhere = format!("ws://127.0.0.1:{}", closed.port);
    for (mut command, code) in [
        (Daemon::command(&["--nonsense"]), 2),
        (
            Daemon::command(&["--listen", "192.0.2.1:1", "--no-auth"]),
            2,
        ),
        (Connect::command(&nowhere, &["--port", "1"]), 1),
    ] {
        let (_reader, full) = full_pipe();
        let mut child = command.stderr(full).spawn().unwrap();
        let ended = within(LIMIT, "it ends", || child.try_wait().unwrap());
        assert_eq!(ended.code(), Some(code), "{command:?}");
    }
}
