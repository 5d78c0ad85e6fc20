//! CONNECT-TCP on the daemon's side: the upgrade, every row of the table of ends in its second column, and what
//! capsules may not do. For every input: properties.rs.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::connect::{Connect, LOCAL};
use crate::support::*;

/// How often each row is run.
const RUNS: u64 = 50;

/// From nothing to more than the sockets' buffers hold, with the borders of a capsule's lengths.
const SIZES: [usize; 12] = [
    0, 1, 63, 64, 4_095, 4_096, 16_383, 16_384, 70_000, 300_000, 1_500_000, 6_000_000,
];

pub const DATA: u64 = 0x2028_d7f2;
pub const FINAL_DATA: u64 = 0x2028_d7f3;

/// Of those that RFC 9297 §5.4 keeps for trying whether unknown types are skipped.
const UNKNOWN: u64 = 0x29 * 77 + 0x17;

/// An integer of RFC 9000 §16 in `length` bytes.
fn integer(value: u64, length: usize) -> Vec<u8> {
    let mut bytes = value.to_be_bytes()[8 - length..].to_vec();
    bytes[0] |= (length.trailing_zeros() as u8) << 6;
    bytes
}

fn capsule_header(of_type: u64, payload: u64) -> Vec<u8> {
    let length = match payload {
        0..64 => 1,
        64..16_384 => 2,
        16_384..0x4000_0000 => 4,
        _ => 8,
    };
    [integer(of_type, 4), integer(payload, length)].concat()
}

pub fn capsule(of_type: u64, payload: &[u8]) -> Vec<u8> {
    [
        capsule_header(of_type, payload.len() as u64),
        payload.to_vec(),
    ]
    .concat()
}

/// The type of the capsule that `bytes` begin with, and the lengths of its header and its payload.
pub fn header_of(bytes: &[u8]) -> Option<(u64, usize, usize)> {
    let integer = |bytes: &[u8]| {
        let length = 1 << (bytes.first()? >> 6);
        let mut value = [0; 8];
        value[8 - length..].copy_from_slice(bytes.get(..length)?);
        value[8 - length] &= 0x3f;
        Some((u64::from_be_bytes(value), length))
    };
    let (of_type, first) = integer(bytes)?;
    let (payload, second) = integer(&bytes[first..])?;
    Some((of_type, first + second, payload as usize))
}

/// How what the peer sends ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// FINAL_DATA.
    Final,
    /// The TCP connection's orderly end, with no FINAL_DATA before.
    Eof,
    Reset,
}

/// A client after the upgrade.
pub struct Capsules {
    pub stream: TcpStream,
    buffer: Vec<u8>,
    /// Capsules without payload.
    empty: usize,
}

impl Capsules {
    pub fn open(daemon: &Daemon, port: u16) -> Capsules {
        let head = request(
            "GET",
            &format!("/tunnel?port={port}"),
            &UPGRADE_TO_CONNECT_TCP,
        );
        Capsules::upgrade(daemon.connect(), head.as_bytes())
    }

    pub fn upgrade(mut stream: TcpStream, head: &[u8]) -> Capsules {
        stream.write_all(head).unwrap();
        let answer = head_of(&mut stream);
        assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        for line in [
            "Connection: Upgrade",
            "Upgrade: connect-tcp-12",
            "Capsule-Protocol: ?1",
            "Proxy-Status: tunneld",
        ] {
            assert!(answer.contains(&format!("\r\n{line}\r\n")), "{answer}");
        }
        Capsules {
            stream,
            buffer: Vec::new(),
            empty: 0,
        }
    }

    pub fn send(&mut self, of_type: u64, payload: &[u8]) {
        self.stream.write_all(&capsule(of_type, payload)).unwrap();
    }

    /// Sends `bytes` in capsules of any size on another thread, with FINAL_DATA last, or not; whether all of it could
    /// be sent. A reset is reported once: to this write or to a read.
    fn upload(&self, bytes: Vec<u8>, mut random: Random, finish: bool) -> thread::JoinHandle<bool> {
        let mut stream = self.stream.try_clone().unwrap();
        thread::spawn(move || {
            let mut left = &bytes[..];
            while !left.is_empty() {
                let size = (1 + random.below(200_000)).min(left.len());
                let of_type = if finish && size == left.len() && random.below(2) == 0 {
                    FINAL_DATA
                } else {
                    DATA
                };
                let sent = stream.write_all(&capsule(of_type, &left[..size])).is_ok();
                if !sent || of_type == FINAL_DATA {
                    return sent;
                }
                left = &left[size..];
                if stream.write_all(&capsule(UNKNOWN, &[7; 300])).is_err() {
                    return false;
                }
            }
            !finish || stream.write_all(&capsule(FINAL_DATA, b"")).is_ok()
        })
    }

    /// The payload up to the end, and the end.
    pub fn see_all(&mut self) -> (Vec<u8>, End) {
        let mut bytes = Vec::new();
        loop {
            while let Some((of_type, payload)) = self.next_capsule() {
                match of_type {
                    DATA if payload.is_empty() => self.empty += 1,
                    DATA => bytes.extend(payload),
                    FINAL_DATA => {
                        bytes.extend(payload);
                        return (bytes, End::Final);
                    }
                    other => panic!("a capsule of type {other:#x}"),
                }
            }
            let mut more = [0; 64 * 1024];
            match self.stream.read(&mut more) {
                Ok(0) => return (self.rest_of(bytes), End::Eof),
                Ok(count) => self.buffer.extend(&more[..count]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return (self.rest_of(bytes), End::Reset);
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// What came of a capsule that is not whole.
    fn rest_of(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        if let Some((DATA, header, _)) = header_of(&self.buffer) {
            bytes.extend(&self.buffer[header..]);
        }
        bytes
    }

    fn next_capsule(&mut self) -> Option<(u64, Vec<u8>)> {
        let (of_type, header, payload) = header_of(&self.buffer)?;
        if self.buffer.len() < header + payload {
            return None;
        }
        let payload = self.buffer.drain(..header + payload).skip(header).collect();
        Some((of_type, payload))
    }

    /// What comes behind FINAL_DATA.
    fn see_eof(&mut self) {
        assert_eq!(self.see_all(), (vec![], End::Eof));
    }
}

/// A tunnel, its target's side, and what to send through it: a different size in each of the runs.
struct Run {
    client: Capsules,
    server: TcpStream,
    random: Random,
    up: Vec<u8>,
    down: Vec<u8>,
}

fn runs(daemon: &Daemon) -> impl Iterator<Item = Run> + '_ {
    let target = Target::listen();
    (0..RUNS).map(move |run| {
        let mut random = Random::new(run + 1);
        let down = SIZES[run as usize % SIZES.len()];
        let up = SIZES[random.below(SIZES.len())];
        let (down, up) = (random.bytes(down), random.bytes(up));
        Run {
            client: Capsules::open(daemon, target.port),
            server: target.accept(),
            random,
            up,
            down,
        }
    })
}

fn reading(server: &TcpStream) -> thread::JoinHandle<(Vec<u8>, bool)> {
    let mut server = server.try_clone().unwrap();
    thread::spawn(move || read_to_end(&mut server))
}

/// Sends `bytes` and the FIN on another thread.
fn sending(server: &TcpStream, bytes: Vec<u8>) -> thread::JoinHandle<()> {
    let mut server = server.try_clone().unwrap();
    thread::spawn(move || {
        server.write_all(&bytes).unwrap();
        server.shutdown(Shutdown::Write).unwrap();
    })
}

fn assert_all(what: &str, bytes: &[u8], all: &[u8]) {
    assert!(
        bytes == all,
        "{what}: {} of {} bytes",
        bytes.len(),
        all.len()
    );
}

fn ended(daemon: &Daemon, count: usize, label: &str) {
    daemon.logged(count, &["tunnel closed:", &format!(" end={label} ")]);
}

// The table of ends

#[test]
fn target_eof_is_every_byte_and_final_data_and_the_upload_goes_on() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        random,
        up,
        down,
    } in runs(&daemon)
    {
        let sender = sending(&server, down.clone());
        let (bytes, end) = client.see_all();
        assert_all("download", &bytes, &down);
        assert_eq!(end, End::Final);
        sender.join().unwrap();
        let upload = client.upload(up.clone(), random, true);
        let (bytes, orderly) = read_to_end(&mut server);
        assert_all("upload", &bytes, &up);
        assert!(orderly);
        client.see_eof();
        assert!(upload.join().unwrap());
    }
    ended(&daemon, RUNS as usize, "orderly");
}

#[test]
fn final_data_is_every_byte_and_fin_and_the_download_goes_on() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        random,
        up,
        down,
    } in runs(&daemon)
    {
        let upload = client.upload(up.clone(), random, true);
        let (bytes, orderly) = read_to_end(&mut server);
        assert_all("upload", &bytes, &up);
        assert!(orderly);
        assert!(upload.join().unwrap());
        let sender = sending(&server, down.clone());
        let (bytes, end) = client.see_all();
        assert_all("download", &bytes, &down);
        assert_eq!(end, End::Final);
        client.see_eof();
        sender.join().unwrap();
    }
    ended(&daemon, RUNS as usize, "orderly");
}

#[test]
fn both_ends_at_once_lose_nothing() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        server,
        random,
        up,
        down,
    } in runs(&daemon)
    {
        let upload = client.upload(up.clone(), random, true);
        let (sender, reader) = (sending(&server, down.clone()), reading(&server));
        let (bytes, end) = client.see_all();
        assert_all("download", &bytes, &down);
        assert_eq!(end, End::Final);
        let (bytes, orderly) = reader.join().unwrap();
        assert_all("upload", &bytes, &up);
        assert!(orderly);
        client.see_eof();
        assert!(upload.join().unwrap());
        sender.join().unwrap();
    }
    ended(&daemon, RUNS as usize, "orderly");
}

/// A peer may end its side of the TCP connection behind its FINAL_DATA, as that is all it has to say.
#[test]
fn a_fin_behind_final_data_takes_nothing_from_the_download() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        down,
        ..
    } in runs(&daemon)
    {
        client.send(FINAL_DATA, b"request");
        client.stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&mut server), (b"request".to_vec(), true));
        let sender = sending(&server, down.clone());
        let (bytes, end) = client.see_all();
        assert_all("download", &bytes, &down);
        assert_eq!(end, End::Final);
        client.see_eof();
        sender.join().unwrap();
    }
    ended(&daemon, RUNS as usize, "orderly");
}

#[test]
fn target_reset_is_a_reset_behind_the_bytes_before() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        down,
        ..
    } in runs(&daemon)
    {
        let sent = down.clone();
        let sender = thread::spawn(move || {
            let _ = server.write_all(&sent);
            reset(server);
        });
        let (bytes, end) = client.see_all();
        assert!(down.starts_with(&bytes), "{} bytes", bytes.len());
        assert_eq!(end, End::Reset);
        sender.join().unwrap();
    }
    ended(&daemon, RUNS as usize, "target_failed");
}

#[test]
fn target_reset_behind_final_data_is_an_end_of_its_own() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        ..
    } in runs(&daemon)
    {
        client.send(FINAL_DATA, b"bye");
        assert_eq!(read_to_end(&mut server), (b"bye".to_vec(), true));
        reset(server);
        assert_eq!(client.see_all(), (vec![], End::Reset));
    }
    ended(&daemon, RUNS as usize, "target_failed_after_close");
}

#[test]
fn a_client_that_ends_without_final_data_is_a_reset_to_the_target() {
    let daemon = Daemon::start(&[]);
    for Run {
        client,
        server,
        mut random,
        up,
        ..
    } in runs(&daemon)
    {
        let way = random.below(3);
        let reader = reading(&server);
        client.upload(up.clone(), random, false).join().unwrap();
        match way {
            0 => client.stream.shutdown(Shutdown::Write).unwrap(),
            // In the midst of a capsule.
            1 => {
                let mut stream = &client.stream;
                stream.write_all(&capsule(DATA, &[1; 500])[..7]).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            }
            _ => reset(client.stream.try_clone().unwrap()),
        }
        let sent = client;
        drop(sent);
        let (bytes, orderly) = reader.join().unwrap();
        assert!(
            up.starts_with(&bytes) || bytes.starts_with(&up),
            "{} bytes",
            bytes.len()
        );
        assert!(!orderly);
    }
    ended(&daemon, RUNS as usize, "client_vanished");
}

#[test]
fn a_bare_eof_is_answered_with_a_reset() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        ..
    } in runs(&daemon)
    {
        client.send(DATA, b"x");
        let mut byte = [0];
        server.read_exact(&mut byte).unwrap();
        client.stream.shutdown(Shutdown::Write).unwrap();
        let (bytes, end) = client.see_all();
        assert!(bytes.is_empty() && end != End::Final, "{end:?}");
        assert!(!read_to_end(&mut server).1);
    }
}

#[test]
fn what_follows_final_data_is_a_reset_but_no_byte_is_taken_back() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        up,
        ..
    } in runs(&daemon)
    {
        let up = &up[..up.len().min(300_000)];
        let reader = reading(&server);
        client.send(FINAL_DATA, up);
        client.send(UNKNOWN, b"skipped");
        client.send(DATA, b"");
        assert_eq!(client.see_all(), (vec![], End::Reset));
        let (bytes, orderly) = reader.join().unwrap();
        assert_all("upload", &bytes, up);
        assert!(orderly);
        // It is told by a reset that nobody reads any more.
        within(LIMIT, "the target can't write", || {
            server.write_all(&[0; 1000]).is_err().then_some(())
        });
    }
    ended(&daemon, RUNS as usize, "protocol_error");
}

#[test]
fn a_target_that_closes_while_the_client_uploads_loses_none_of_its_own_bytes() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        random,
        down,
        ..
    } in runs(&daemon)
    {
        let sender = sending(&server, down.clone());
        let (bytes, end) = client.see_all();
        assert_all("download", &bytes, &down);
        assert_eq!(end, End::Final);
        sender.join().unwrap();
        let upload = client.upload(vec![1; 6_000_000], random, true);
        let mut some = [0; 1000];
        server.read_exact(&mut some).unwrap();
        drop(server);
        let (bytes, end) = client.see_all();
        let sent = upload.join().unwrap();
        let is_reset = end == End::Reset || !sent;
        assert!(bytes.is_empty() && is_reset, "{end:?}, sent: {sent}");
    }
    ended(&daemon, RUNS as usize, "upload_cut_short");
}

#[test]
fn shutdown_is_a_reset_behind_the_bytes_before() {
    let target = Target::listen();
    let mut daemon = Daemon::start(&["--shutdown-grace", "100ms"]);
    let mut client = Capsules::open(&daemon, target.port);
    let mut server = target.accept();
    server.write_all(b"last words").unwrap();
    client.send(DATA, b"up");
    let mut two = [0; 2];
    server.read_exact(&mut two).unwrap();
    daemon.signal(Signal::TERM);
    assert_eq!(client.see_all(), (b"last words".to_vec(), End::Reset));
    assert!(!read_to_end(&mut server).1);
    assert!(daemon.exit().success());
    assert!(daemon.log().contains(" end=shutdown "), "{}", daemon.log());
}

// Half-closed, and the keepalive

#[test]
fn either_half_may_be_silent_for_longer_than_any_clock() {
    let daemon = Daemon::start(&[
        "--linger",
        "100ms",
        "--ping-interval",
        "50ms",
        "--ping-timeout",
        "50ms",
        "--stall-timeout",
        "200ms",
    ]);
    let target = Target::listen();
    let pause = || thread::sleep(Duration::from_millis(700));

    let mut client = Capsules::open(&daemon, target.port);
    let mut server = target.accept();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.see_all(), (vec![], End::Final));
    pause();
    client.send(FINAL_DATA, b"late");
    assert_eq!(read_to_end(&mut server), (b"late".to_vec(), true));
    client.see_eof();

    let mut client = Capsules::open(&daemon, target.port);
    let mut server = target.accept();
    client.send(FINAL_DATA, b"");
    assert_eq!(read_to_end(&mut server), (vec![], true));
    pause();
    server.write_all(b"late").unwrap();
    drop(server);
    assert_eq!(client.see_all(), (b"late".to_vec(), End::Final));
    ended(&daemon, 2, "orderly");
}

#[test]
fn an_empty_capsule_comes_every_ping_interval_until_final_data() {
    let daemon = Daemon::start(&["--ping-interval", "50ms"]);
    let target = Target::listen();
    let mut client = Capsules::open(&daemon, target.port);
    let server = target.accept();
    let begin = Instant::now();
    thread::sleep(Duration::from_millis(600));
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.see_all(), (vec![], End::Final));
    let most = begin.elapsed().as_millis() as usize / 50 + 1;
    assert!(
        (2..=most).contains(&client.empty),
        "{} of {most}",
        client.empty
    );
    // And none behind it, where no DATA may be.
    thread::sleep(Duration::from_millis(200));
    client.send(FINAL_DATA, b"");
    client.see_eof();
}

// What capsules may be

#[test]
fn any_lawful_form_of_an_integer_is_taken() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Capsules::open(&daemon, target.port);
    let mut server = target.accept();
    let mut expected = Vec::new();
    for type_length in [4, 8] {
        for length in [1, 2, 4, 8] {
            let payload = vec![length as u8; 10 * length];
            let header = [
                integer(DATA, type_length),
                integer(payload.len() as u64, length),
            ]
            .concat();
            // Byte by byte.
            for byte in header.iter().chain(&payload) {
                client.stream.write_all(&[*byte]).unwrap();
            }
            expected.extend(payload);
        }
    }
    for (of_type, length) in [(0, 1), (UNKNOWN, 2), (1 << 40, 8), (DATA - 1, 4)] {
        let skipped = [integer(of_type, length), integer(5, 8), b"what?".to_vec()].concat();
        client.stream.write_all(&skipped).unwrap();
    }
    client.send(FINAL_DATA, b"");
    assert_eq!(read_to_end(&mut server), (expected, true));
}

#[test]
fn payload_goes_on_before_its_capsule_is_whole() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Capsules::open(&daemon, target.port);
    let mut server = target.accept();
    let header = capsule_header(DATA, (1 << 62) - 1);
    client.stream.write_all(&header).unwrap();
    let mut seen = [0; 1000];
    for size in [1, 10, 1000] {
        client.stream.write_all(&vec![size as u8; size]).unwrap();
        server.read_exact(&mut seen[..size]).unwrap();
        assert_eq!(seen[size - 1], size as u8);
    }
}

#[test]
fn no_capsule_costs_memory() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Capsules::open(&daemon, target.port);
    let mut server = target.accept();
    let before = daemon.resident();
    // One of an unknown type that has no end.
    let mut endless = Capsules::open(&daemon, target.port);
    let _silent = target.accept();
    endless
        .stream
        .write_all(&capsule_header(UNKNOWN, (1 << 62) - 1))
        .unwrap();
    for _ in 0..50 {
        endless.stream.write_all(&[0; 1 << 20]).unwrap();
    }
    // Many without payload.
    let empty = capsule(DATA, b"").repeat(10_000);
    for _ in 0..100 {
        client.stream.write_all(&empty).unwrap();
    }
    client.send(FINAL_DATA, b"alive");
    assert_eq!(read_to_end(&mut server), (b"alive".to_vec(), true));
    let after = daemon.resident();
    assert!(after < before + 2048, "{before} KiB, then {after} KiB");
}

// The upgrade

#[test]
fn the_default_template_leads_to_the_target_too() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    for path in [
        format!("/.well-known/masque/tcp/127.0.0.1/{}/", target.port),
        format!("/.well-known/masque/tcp/localhost/{}/", target.port),
        format!(
            "/.well-known/masque/tcp/%3A%3Affff%3A127.0.0.1/{}/",
            target.port
        ),
    ] {
        let head = request("GET", &path, &UPGRADE_TO_CONNECT_TCP);
        let mut client = Capsules::upgrade(daemon.connect(), head.as_bytes());
        client.send(FINAL_DATA, path.as_bytes());
        assert_eq!(read_to_end(&mut target.accept()).0, path.as_bytes());
    }
    for path in [
        "/.well-known/masque/tcp/localhost/0/",
        "/.well-known/masque/tcp/localhost/",
        "/.well-known/masque/tcp/a%20b/80/",
    ] {
        assert_eq!(
            daemon.get(path, &UPGRADE_TO_CONNECT_TCP).status,
            400,
            "{path}"
        );
    }
}

#[test]
fn bytes_sent_along_with_the_head_are_not_lost() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut head = request(
        "GET",
        &format!("/tunnel?port={}", target.port),
        &UPGRADE_TO_CONNECT_TCP,
    )
    .into_bytes();
    head.extend(capsule(DATA, b"early "));
    head.extend(capsule(FINAL_DATA, b"bird"));
    let _client = Capsules::upgrade(daemon.connect(), &head);
    assert_eq!(
        read_to_end(&mut target.accept()),
        (b"early bird".to_vec(), true)
    );
}

#[test]
fn the_first_protocol_of_a_list_that_is_spoken_here_is_taken() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let path = format!("/tunnel?port={}", target.port);
    for (list, expected) in [
        ("Upgrade: h2c, Connect-TCP-12, websocket", "connect-tcp-12"),
        ("Upgrade: websocket, connect-tcp-12", "websocket"),
    ] {
        let headers = [UPGRADE[0], list, UPGRADE[2], UPGRADE[3]];
        let mut stream = daemon.connect();
        stream
            .write_all(request("GET", &path, &headers).as_bytes())
            .unwrap();
        let head = head_of(&mut stream);
        assert!(
            head.contains(&format!("\r\nUpgrade: {expected}\r\n")),
            "{head}"
        );
    }
}

#[test]
fn a_100_comes_before_the_dial_and_only_if_the_request_may_pass() {
    let daemon = Daemon::start(&["--dial-timeout", "30s"]);
    let target = Target::listen();
    let path = format!("/tunnel?port={}", target.port);
    let headers = [&UPGRADE_TO_CONNECT_TCP[..], &["Expect: 100-Continue"]].concat();
    for headers in [
        headers.clone(),
        [&UPGRADE[..], &["Expect: 100-continue"]].concat(),
    ] {
        let mut stream = daemon.connect();
        stream
            .write_all(request("GET", &path, &headers).as_bytes())
            .unwrap();
        assert_eq!(head_of(&mut stream), "HTTP/1.1 100 Continue\r\n\r\n");
        let head = head_of(&mut stream);
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    }
    assert_eq!(daemon.get("/tunnel?port=0", &headers).status, 400);
    assert_eq!(daemon.get("/health", &["Expect: 100-continue"]).status, 204);
    let closed = closed_port();
    let mut stream = daemon.connect();
    let path = format!("/tunnel?port={}", closed.port);
    stream
        .write_all(request("GET", &path, &headers).as_bytes())
        .unwrap();
    assert_eq!(head_of(&mut stream), "HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(Answer::read(&mut stream).status, 502);
}

#[test]
fn another_version_of_the_draft_is_426() {
    let daemon = Daemon::start(&[]);
    for token in ["connect-tcp", "connect-tcp-11"] {
        let upgrade = format!("Upgrade: {token}");
        let answer = daemon.get("/tunnel?port=80", &["Connection: Upgrade", &upgrade]);
        assert_eq!(answer.status, 426);
        assert_eq!(answer.header("upgrade"), Some("websocket, connect-tcp-12"));
    }
    let answer = daemon.get("/tunnel?port=80", &["Upgrade: connect-tcp-12"]);
    assert_eq!(answer.status, 426);
}

#[test]
fn a_header_says_why_a_request_was_refused() {
    let options = [
        "--deny-target",
        "192.0.2.0/24",
        "--deny-target",
        "secret.example",
    ];
    let daemon = Daemon::start(&options);
    let closed = closed_port();
    for (target, status, error) in [
        ("/tunnel?port=0".to_owned(), 400, "http_request_error"),
        ("/nothing".to_owned(), 404, "http_request_error"),
        (
            "/tunnel?port=80&host=192.0.2.1".to_owned(),
            403,
            "destination_ip_prohibited",
        ),
        (
            format!("/tunnel?port={}", closed.port),
            502,
            "connection_refused",
        ),
        (
            "/tunnel?port=80&host=no.such.name.invalid".to_owned(),
            502,
            "dns_error",
        ),
    ] {
        let answer = daemon.get(&target, &UPGRADE_TO_CONNECT_TCP);
        let expected = format!("tunneld; error={error}");
        assert_eq!(answer.status, status, "{target}");
        assert_eq!(
            answer.header("proxy-status"),
            Some(expected.as_str()),
            "{target}"
        );
    }
}

// Both ends: tunneld connect --protocol connect-tcp

pub const CAPSULES: [&str; 2] = ["--protocol", "connect-tcp"];

#[test]
fn stdin_and_stdout_carry_every_byte_and_both_ends() {
    let daemon = Daemon::start(&[]);
    for size in SIZES {
        let target = Target::listen();
        let mut client = Connect::to(&daemon, target.port, &CAPSULES);
        let server = target.accept();
        let bytes = Random::new(size as u64).bytes(size);
        let (sender, reader) = (sending(&server, bytes.clone()), reading(&server));
        let mut stdin = client.stdin();
        let up = bytes.clone();
        let feeder = thread::spawn(move || stdin.write_all(&up).unwrap());
        let mut down = Vec::new();
        client.stdout().read_to_end(&mut down).unwrap();
        feeder.join().unwrap();
        assert_all("download", &down, &bytes);
        let (up, orderly) = reader.join().unwrap();
        assert_all("upload", &up, &bytes);
        assert!(orderly);
        sender.join().unwrap();
        assert_eq!(client.ended(), (0, String::new()));
    }
    ended(&daemon, SIZES.len(), "orderly");
}

/// psql over TLS does so: it does not wait for the server's last bytes.
#[test]
fn a_local_client_that_closes_after_its_end_is_no_warning() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let (url, port) = (format!("ws://{}", daemon.address), target.port.to_string());
    for protocol in [&[][..], &CAPSULES] {
        let options = [&["--port", &port], &LOCAL[..], protocol].concat();
        let mut command = Connect::command(&url, &options);
        command.env("RUST_LOG", "debug");
        let client = Connect::spawn(command);
        let local = client.dial();
        let mut server = target.accept();
        drop(local);
        assert!(read_to_end(&mut server).1);
        within(LIMIT, "the target learns it", || {
            server.write_all(b"more").err().map(drop)
        });
        client.logged("the local client has closed its connection");
        assert!(!client.log().contains("WARN"), "{}", client.log());
    }
}

#[test]
fn a_local_port_is_half_closed_as_tcp_is() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let client = Connect::to(&daemon, target.port, &[&LOCAL[..], &CAPSULES].concat());
    for (up, down) in [
        (0, 0),
        (1, 2_000_000),
        (2_000_000, 1),
        (3_000_000, 3_000_000),
    ] {
        let (up, down) = (Random::new(1).bytes(up), Random::new(2).bytes(down));
        // The local side first, then the target.
        let mut local = client.dial();
        let mut server = target.accept();
        let (sender, reader) = (sending(&local, up.clone()), reading(&server));
        assert_eq!(reader.join().unwrap(), (up.clone(), true));
        sender.join().unwrap();
        let sender = sending(&server, down.clone());
        assert_eq!(read_to_end(&mut local), (down.clone(), true));
        sender.join().unwrap();
        // And the other way round.
        let mut local = client.dial();
        server = target.accept();
        let sender = sending(&server, down.clone());
        assert_eq!(read_to_end(&mut local), (down, true));
        sender.join().unwrap();
        let sender = sending(&local, up.clone());
        assert_eq!(read_to_end(&mut server), (up, true));
        sender.join().unwrap();
    }
    ended(&daemon, 8, "orderly");
    assert!(!client.log().contains("WARN"), "{}", client.log());
}

#[test]
fn a_reset_on_either_side_is_a_reset_on_the_other() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let client = Connect::to(&daemon, target.port, &[&LOCAL[..], &CAPSULES].concat());
    // Open before it is broken off: a target that resets at once has refused.
    let open = || {
        let (mut local, mut server) = (client.dial(), target.accept());
        local.write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();
        (local, server)
    };
    for _ in 0..RUNS {
        let (mut local, server) = open();
        reset(server);
        assert!(!read_to_end(&mut local).1);
        let (local, mut server) = open();
        reset(local);
        assert!(!read_to_end(&mut server).1);
    }
    ended(&daemon, RUNS as usize, "target_failed");
    ended(&daemon, RUNS as usize, "client_vanished");
}

#[test]
fn a_broken_end_is_exit_code_1_and_a_sentence() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    // The target is dialed before the client has its answer.
    let open = || {
        let mut client = Connect::to(&daemon, target.port, &CAPSULES);
        let mut server = target.accept();
        server.write_all(b"x").unwrap();
        client.stdout().read_exact(&mut [0]).unwrap();
        (client, server)
    };
    let (mut client, server) = open();
    reset(server);
    client.broke("the target or the server broke it off");
    // The target closes in order, but before it was given everything.
    let mut client = Connect::to(&daemon, target.port, &CAPSULES);
    let mut server = target.accept();
    let mut stdin = client.stdin();
    let feeder = thread::spawn(move || while stdin.write_all(&[1; 65_536]).is_ok() {});
    let mut some = [0; 1000];
    server.read_exact(&mut some).unwrap();
    drop(server);
    client.broke("");
    feeder.join().unwrap();
    // The daemon is killed.
    let (mut client, mut server) = open();
    daemon.signal(Signal::KILL);
    client.broke("the target or the server broke it off");
    assert!(!read_to_end(&mut server).1);
}

/// Whether or not its own end has been sent before.
#[test]
fn a_client_that_has_lost_its_stdout_resets_the_server() {
    for has_ended in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("ws://{}", listener.local_addr().unwrap());
        let options = [&["--port", "1"], &CAPSULES[..]].concat();
        let mut client = Connect::spawn(Connect::command(&url, &options));
        let (mut server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(LIMIT)).unwrap();
        head_of(&mut server);
        let answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: connect-tcp-12\r\nCapsule-Protocol: ?1\r\n\r\n";
        server.write_all(answer).unwrap();
        let stdin = client.stdin();
        let end = capsule(FINAL_DATA, b"");
        if has_ended {
            drop(stdin);
            server.read_exact(&mut vec![0; end.len()]).unwrap();
        }
        drop(client.stdout());
        server.write_all(&capsule(DATA, b"lost")).unwrap();
        assert_eq!(read_to_end(&mut server), (vec![], false), "{has_ended}");
        client.broke("cannot write to stdout");
    }
}

#[test]
fn a_server_that_does_not_speak_it_is_told_as_that() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let answer = b"HTTP/1.1 426 Upgrade Required\r\nConnection: close, upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n";
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let head = head_of(&mut stream);
        stream.write_all(answer).unwrap();
        head
    });
    let mut client = Connect::spawn(Connect::command(
        &url,
        &[&["--port", "1"], &CAPSULES[..]].concat(),
    ));
    client.broke("does not speak connect-tcp-12: leave out --protocol connect-tcp");
    let head = server.join().unwrap();
    assert!(head.contains("\r\nUpgrade: connect-tcp-12\r\n"), "{head}");
    assert!(head.contains("\r\nCapsule-Protocol: ?1\r\n"), "{head}");
}
