//! Bytes that go through a pipe of the kernel's, and what happens where they can't: at either end they arrive whole.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;

use rustix::net::SendFlags;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

use crate::connect::{Connect, LOCAL};
use crate::support::*;

/// Each way, and more than a pipe or a socket's buffer holds.
const MUCH: usize = 2_500_000;

/// What `start` starts gets `errno` from splice(2), as from a container's seccomp profile. A filter is of a thread, and
/// of the processes that this one starts.
fn without_splice<T: Send>(errno: i32, start: impl FnOnce() -> T + Send) -> T {
    let rules = BTreeMap::from([(libc::SYS_splice, Vec::new())]);
    let refuse = SeccompAction::Errno(errno as u32);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap();
    let program = BpfProgram::try_from(filter).unwrap();
    let start = || {
        apply_filter(&program).unwrap();
        start()
    };
    thread::scope(|scope| scope.spawn(start).join().unwrap())
}

/// Sends `bytes` and the end behind them on another thread, while the other direction is read.
fn sending(stream: &TcpStream, bytes: Vec<u8>) -> thread::JoinHandle<()> {
    let mut stream = stream.try_clone().unwrap();
    thread::spawn(move || {
        stream.write_all(&bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    })
}

fn reading(stream: &TcpStream) -> thread::JoinHandle<(Vec<u8>, bool)> {
    let mut stream = stream.try_clone().unwrap();
    thread::spawn(move || read_to_end(&mut stream))
}

fn is_whole((bytes, orderly): (Vec<u8>, bool), expected: &[u8]) {
    let (count, all) = (bytes.len(), expected.len());
    assert!(
        bytes == expected && orderly,
        "{count} of {all} bytes, in order: {orderly}"
    );
}

/// Much goes both ways at once through a tunnel, in small messages and in large ones.
fn exchange(mut client: Client, server: &TcpStream) {
    let (up, down) = (Random::new(1).bytes(MUCH), Random::new(2).bytes(MUCH));
    let sent = sending(server, down.clone());
    let received = reading(server);
    let (mut writer, upload) = (client.clone_writer(), up.clone());
    let uploaded = thread::spawn(move || {
        let mut random = Random::new(3);
        let mut left = &upload[..];
        while !left.is_empty() {
            let size = (1 + random.below(500_000)).min(left.len());
            writer.send(&left[..size]);
            left = &left[size..];
        }
        writer.send_close(1000);
    });
    let (bytes, end) = client.see_all();
    is_whole((bytes, end == CLOSE_1000), &down);
    is_whole(received.join().unwrap(), &up);
    sent.join().unwrap();
    uploaded.join().unwrap();
}

/// The same between two TCP connections.
fn exchange_tcp(local: &TcpStream, server: &TcpStream) {
    let (up, down) = (Random::new(1).bytes(MUCH), Random::new(2).bytes(MUCH));
    let sent = [sending(server, down.clone()), sending(local, up.clone())];
    let received = [(reading(server), up), (reading(local), down)];
    for (received, expected) in received {
        is_whole(received.join().unwrap(), &expected);
    }
    for sent in sent {
        sent.join().unwrap();
    }
}

/// How many pipes a process has made. They can't be opened: a splice that waits holds the kernel's lock of its pipe.
fn pipes(process: Pid) -> usize {
    let path = format!("/proc/{}/fd", process.as_raw_nonzero());
    let entries = std::fs::read_dir(path).unwrap().map_while(Result::ok);
    let names = entries.filter_map(|entry| {
        let is_stdio = ["0", "1", "2"]
            .map(Some)
            .contains(&entry.file_name().to_str());
        let name = std::fs::read_link(entry.path()).ok()?;
        (!is_stdio && name.to_str()?.starts_with("pipe:")).then_some(name)
    });
    names.collect::<BTreeSet<_>>().len()
}

#[test]
fn a_daemon_that_may_not_splice_reads_and_writes() {
    let target = Target::listen();
    for errno in [libc::EPERM, libc::ENOSYS, libc::EACCES, libc::EINVAL] {
        let daemon = without_splice(errno, || Daemon::start(&[]));
        let client = Client::open(&daemon, target.port);
        exchange(client, &target.accept());
        daemon.logged(1, &["tunnel closed:", "end=orderly"]);
    }
}

#[test]
fn a_client_that_may_not_splice_reads_and_writes() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    for errno in [libc::EPERM, libc::ENOSYS, libc::EACCES, libc::EINVAL] {
        let client = without_splice(errno, || Connect::to(&daemon, target.port, &LOCAL));
        let local = client.dial();
        exchange_tcp(&local, &target.accept());
        // And between its own streams.
        let mut client = without_splice(errno, || Connect::to(&daemon, target.port, &[]));
        let down = Random::new(4).bytes(MUCH);
        let server = target.accept();
        let sent = sending(&server, down.clone());
        is_whole((client.rest(), true), &down);
        assert_eq!(client.ended(), (0, String::new()));
        sent.join().unwrap();
    }
    daemon.logged(8, &["tunnel closed:", "end=orderly"]);
}

#[test]
fn without_a_descriptor_for_a_pipe_bytes_are_read_and_written() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    // The poll of two descriptors is allowed under that limit, and none can be made.
    let limit = Rlimit {
        current: Some(3),
        maximum: Some(3),
    };
    let (client, server) = (Client::open(&daemon, target.port), target.accept());
    let mut spliced = (Client::open(&daemon, target.port), target.accept());
    spliced.1.write_all(&[1; 500_000]).unwrap();
    spliced.0.see_all_of(500_000);
    let before = pipes(daemon.pid());
    assert!(before > 0, "where it can be had, there is one");
    prlimit(Some(daemon.pid()), Resource::Nofile, limit).unwrap();
    exchange(client, &server);
    daemon.logged(1, &["tunnel closed:", "end=orderly"]);
    assert!(pipes(daemon.pid()) <= before);
}

/// The first 32 pipes are large, the others are not.
#[test]
fn more_downloads_than_there_are_large_pipes_arrive_whole() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let down = Random::new(5).bytes(MUCH);
    let before = pipes(daemon.pid());
    let tunnels: Vec<_> = (0..40)
        .map(|_| {
            let client = Client::open(&daemon, target.port);
            (client, sending(&target.accept(), down.clone()))
        })
        .collect();
    // Nobody reads, so each of them waits with bytes in its pipe.
    within(LIMIT, "each of them has a pipe", || {
        (pipes(daemon.pid()) == before + 40).then_some(())
    });
    for (mut client, sent) in tunnels {
        let (bytes, end) = client.see_all();
        is_whole((bytes, end == CLOSE_1000), &down);
        sent.join().unwrap();
        client.finish();
    }
    within(LIMIT, "the pipes are given back", || {
        (pipes(daemon.pid()) == before).then_some(())
    });
}

#[test]
fn an_urgent_byte_is_a_byte_in_its_place_through_a_local_port_too() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let client = Connect::to(&daemon, target.port, &LOCAL);
    for (before, behind) in [(0, 0), (5, 5), (1 << 20, 1 << 20)] {
        let (local, server) = (client.dial(), target.accept());
        for (from, to) in [(&local, &server), (&server, &local)] {
            let mut sender = from.try_clone().unwrap();
            let sent = thread::spawn(move || {
                sender.write_all(&vec![1; before]).unwrap();
                assert_eq!(rustix::net::send(&sender, b"!", SendFlags::OOB), Ok(1));
                sender.write_all(&vec![2; behind]).unwrap();
            });
            let expected = [&vec![1; before][..], b"!", &vec![2; behind]].concat();
            let mut bytes = vec![0; expected.len()];
            { to }.read_exact(&mut bytes).unwrap();
            assert!(bytes == expected, "{before} and {behind} bytes");
            sent.join().unwrap();
        }
    }
}
