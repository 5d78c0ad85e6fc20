//! Bytes go through as they are, in every amount, in both directions at once.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;

use crate::support::*;

#[test]
fn bytes_are_relayed_both_ways_at_once() {
    const TOTAL: usize = 100 * 1024 * 1024;
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();

    let mut uploader = client.clone_writer();
    let upload = thread::spawn(move || {
        let mut random = Random::new(3);
        let mut sent = Vec::with_capacity(TOTAL);
        while sent.len() < TOTAL {
            let size = random.below(200_001).min(TOTAL - sent.len());
            let bytes = random.bytes(size);
            uploader.send(&bytes);
            sent.extend(bytes);
        }
        uploader.send_close(1000);
        sent
    });
    let mut sink = server.try_clone().unwrap();
    let uploaded = thread::spawn(move || read_to_end(&mut sink));
    let download = thread::spawn(move || {
        let sent = Random::new(4).bytes(TOTAL);
        server.write_all(&sent).unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        sent
    });

    let (downloaded, end) = client.see_all();
    assert_eq!(end, CLOSE_1000);
    assert!(downloaded == download.join().unwrap(), "download");
    let (received, orderly) = uploaded.join().unwrap();
    assert!(received == upload.join().unwrap() && orderly, "upload");
    daemon.logged(
        1,
        &[
            "tunnel closed:",
            &format!("up={TOTAL} down={TOTAL}"),
            "closed in order",
        ],
    );
}

#[test]
fn a_hundred_tunnels_at_once_do_not_mix() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let mut clients: Vec<_> = (0..100)
        .map(|_| Client::open(&daemon, target.port))
        .collect();
    let data: Vec<_> = (0..100)
        .map(|seed| Random::new(seed).bytes(20_000))
        .collect();
    for (client, data) in clients.iter_mut().zip(&data) {
        client.send(data);
        client.send_close(1000);
    }
    for (client, data) in clients.iter_mut().zip(&data) {
        let (echoed, end) = client.see_all();
        assert!(echoed == *data);
        assert_eq!(end, CLOSE_1000);
    }
}

#[test]
fn the_default_host_is_loopback_of_both_families() {
    let daemon = Daemon::start(&[]);
    for (address, hosts) in [
        (
            "127.0.0.1:0",
            &[
                "",
                "&host=",
                "&host=localhost",
                "&host=LOCALHOST.",
                "&host=127.0.0.1",
            ][..],
        ),
        (
            "[::1]:0",
            &[
                "",
                "&host=",
                "&host=localhost",
                "&host=::1",
                "&host=[::1]",
                "&host=%5B::1%5D",
            ],
        ),
    ] {
        let target = Target::listen_on(address);
        for host in hosts {
            let mut client =
                Client::open_with(&daemon, &format!("/tunnel?port={}{host}", target.port), &[]);
            target.accept().write_all(b"x").unwrap();
            assert_eq!(
                client.see(),
                Seen::Binary(b"x".to_vec()),
                "{address} {host}"
            );
        }
    }
}

#[test]
fn the_daemon_listens_on_ipv6_too() {
    let daemon = Daemon::start(&["--listen", "[::1]:0"]);
    let target = Target::echo();
    let mut client = Client::open(&daemon, target.port);
    client.send(b"x");
    assert_eq!(client.see(), Seen::Binary(b"x".to_vec()));
}

#[test]
fn empty_messages_and_fragments_are_no_bytes_and_no_borders() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    for (first, payload) in [
        (0x82, &b""[..]),
        (0x02, b"a"),
        (0x00, b""),
        (0x89, b"p"),
        (0x00, b"b"),
        (0x80, b"c"),
        (0x82, b"d"),
        (0x82, b""),
    ] {
        client.send_frame(first, payload);
    }
    client.send_close(1000);
    let (bytes, orderly) = read_to_end(&mut target.accept());
    assert_eq!((bytes.as_slice(), orderly), (&b"abcd"[..], true));
    assert_eq!(client.see(), Seen::Pong(b"p".to_vec()));
}

#[test]
fn the_first_bytes_of_a_long_message_arrive_before_its_last_are_sent() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let bytes = frame(0x82, &[7; 300_000]);
    let mut received = [0; 150_000];
    client.send_raw(&bytes[..150_014]);
    server.read_exact(&mut received).unwrap();
    client.send_raw(&bytes[150_014..]);
    server.read_exact(&mut received).unwrap();
    assert_eq!(received, [7; 150_000]);
}

#[test]
fn small_writes_go_on_at_once() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let mut client = Client::open(&daemon, target.port);
    for n in 0..200u8 {
        client.send(&[n]);
        assert_eq!(client.see(), Seen::Binary(vec![n]));
    }
}

#[test]
fn a_target_that_closes_at_once_is_a_tunnel_that_ends_at_once() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    for _ in 0..50 {
        let mut client = Client::open(&daemon, target.port);
        drop(target.accept());
        assert_eq!(client.see(), CLOSE_1000);
        client.finish();
    }
}

#[test]
fn no_bytes_wait_for_what_comes_behind_them() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let long_ping = frame(0x89, &[1; 100]);
    let message = frame(0x82, b"abc");
    for (name, behind) in [
        ("nothing", vec![]),
        ("an empty message", frame(0x82, b"")),
        (
            "two empty fragments",
            [frame(0x02, b""), frame(0x80, b"")].concat(),
        ),
        ("half a header", vec![0x82]),
        ("a header", message[..6].to_vec()),
        ("half a ping", long_ping[..50].to_vec()),
        (
            "a ping and half a one",
            [&long_ping[..], &long_ping[..7]].concat(),
        ),
        (
            "an empty message and half a header",
            [frame(0x82, b""), vec![0x82]].concat(),
        ),
    ] {
        for size in [3, 5000, 40_000, 70_000, 200_000] {
            let mut client = Client::open(&daemon, target.port);
            let mut server = target.accept();
            let data = Random::new(size as u64).bytes(size);
            client.send_raw(&[frame(0x82, &data), behind.clone()].concat());
            let mut received = vec![0; size];
            server.read_exact(&mut received).unwrap();
            assert!(received == data, "{size} bytes and {name}");
        }
    }
}
