//! The table of ends, row by row, each many times and in many sizes; the linger; and that no direction waits
//! for the other.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use socket2::{Domain, Socket, Type};

use crate::support::*;

/// How often each row is run.
const RUNS: u64 = 50;

/// From nothing to more than the sockets' buffers hold, with the borders of the frame formats.
const SIZES: [usize; 12] = [
    0, 1, 125, 126, 4096, 32_768, 32_769, 65_535, 65_536, 300_000, 1_500_000, 6_000_000,
];

/// A tunnel, its target's side, and what to send through it: a different size in each of the runs.
struct Run {
    client: Client,
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
        let client = Client::open(daemon, target.port);
        Run {
            client,
            server: target.accept(),
            random,
            up,
            down,
        }
    })
}

/// Sends `bytes` in messages of any size, then a Close, on another thread.
fn upload_and_close(client: &Client, bytes: Vec<u8>, mut random: Random) -> thread::JoinHandle<()> {
    let mut client = client.clone_writer();
    thread::spawn(move || {
        let mut left = &bytes[..];
        while !left.is_empty() {
            let size = (1 + random.below(200_000)).min(left.len());
            client.send(&left[..size]);
            left = &left[size..];
        }
        client.send_close(1000);
    })
}

fn reading(server: &TcpStream) -> thread::JoinHandle<(Vec<u8>, bool)> {
    let mut server = server.try_clone().unwrap();
    thread::spawn(move || read_to_end(&mut server))
}

// The target sends EOF

#[test]
fn target_eof_is_every_byte_and_close_1000() {
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
            server.write_all(&sent).unwrap();
            server.shutdown(Shutdown::Write).unwrap();
            server
        });
        let (bytes, end) = client.see_all();
        assert!(bytes == down, "{} of {} bytes", bytes.len(), down.len());
        assert_eq!(end, CLOSE_1000);
        client.finish();
        assert_eq!(read_to_end(&mut sender.join().unwrap()), (vec![], true));
    }
}

#[test]
fn after_target_eof_the_clients_bytes_still_reach_it() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        random,
        up,
        down,
        ..
    } in runs(&daemon)
    {
        let upload = upload_and_close(&client, up.clone(), random);
        let download = down.clone();
        let mut sender = server.try_clone().unwrap();
        thread::spawn(move || {
            sender.write_all(&download).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let (bytes, end) = client.see_all();
        assert!(
            bytes == down,
            "download: {} of {} bytes",
            bytes.len(),
            down.len()
        );
        assert_eq!(end, CLOSE_1000);
        let (bytes, orderly) = read_to_end(&mut server);
        assert!(
            bytes == up && orderly,
            "upload: {} of {} bytes, orderly: {orderly}",
            bytes.len(),
            up.len()
        );
        upload.join().unwrap();
        assert_eq!(client.see(), Seen::Eof);
    }
    daemon.logged(RUNS as usize, &["tunnel closed:", "closed in order"]);
}

#[test]
fn a_target_that_closes_while_the_client_uploads_loses_none_of_its_own_bytes() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        down,
        ..
    } in runs(&daemon)
    {
        let mut uploader = client.stream.try_clone().unwrap();
        let upload = thread::spawn(move || {
            let chunk = frame(0x82, &[7; 10_000]);
            loop {
                if let Err(error) = uploader.write_all(&chunk) {
                    return (error.kind(), Instant::now());
                }
            }
        });
        let download = down.clone();
        let sender = thread::spawn(move || {
            server.write_all(&download).unwrap();
            server.shutdown(Shutdown::Write).unwrap();
            // What has come until now is read, and what comes later is answered with a reset.
            let _ = server.read(&mut [0; 1000]);
            server
        });
        let (bytes, end) = client.see_all();
        assert!(bytes == down, "{} of {} bytes", bytes.len(), down.len());
        assert_eq!(end, CLOSE_1000);
        let closed = Instant::now();
        drop(sender.join().unwrap());
        let (error, told) = upload.join().unwrap();
        let told = told.saturating_duration_since(closed);
        assert!(told < Duration::from_secs(5), "{told:?}");
        // A reset is told once, to the one or the other.
        if error != ErrorKind::ConnectionReset {
            assert_eq!(client.see_all().1, Seen::Reset, "and the upload: {error}");
        }
    }
    daemon.logged(RUNS as usize, &["tunnel closed:", "end=upload_cut_short"]);
}

/// Much has been sent to the client, which reads it slowly, and all of it arrives before the reset.
#[test]
fn an_upload_that_is_cut_short_costs_a_slow_reader_none_of_the_download() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let down = Random::new(40).bytes(400_000);
    let sent = down.clone();
    let sending = thread::spawn(move || {
        server.write_all(&sent).unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        // Long enough for the daemon to have read it all: what the target itself resets is lost over TCP too.
        let _ = server.read_exact(&mut [0; 2_000_000]);
    });
    let mut uploader = client.stream.try_clone().unwrap();
    let upload = thread::spawn(move || {
        let chunk = frame(0x82, &[7; 10_000]);
        while uploader.write_all(&chunk).is_ok() {}
    });
    let mut bytes = Vec::new();
    while bytes.len() < down.len() {
        bytes.extend(client.see_all_of((down.len() - bytes.len()).min(8 * 1024)));
        thread::sleep(Duration::from_millis(30));
    }
    assert!(bytes == down);
    sending.join().unwrap();
    upload.join().unwrap();
    daemon.logged(
        1,
        &["tunnel closed:", "end=upload_cut_short", "down=400000"],
    );
}

// The client sends Close

#[test]
fn client_close_is_every_byte_and_fin_and_the_answer_comes_back() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        random,
        up,
        down,
    } in runs(&daemon)
    {
        let upload = upload_and_close(&client, up.clone(), random);
        let (bytes, orderly) = read_to_end(&mut server);
        assert!(
            bytes == up && orderly,
            "{} of {} bytes, orderly: {orderly}",
            bytes.len(),
            up.len()
        );
        let answer = down.clone();
        thread::spawn(move || server.write_all(&answer).unwrap());
        let (bytes, end) = client.see_all();
        assert!(bytes == down, "{} of {} bytes", bytes.len(), down.len());
        assert_eq!(end, CLOSE_1000);
        assert_eq!(client.see(), Seen::Eof);
        upload.join().unwrap();
    }
    daemon.logged(RUNS as usize, &["tunnel closed:", "closed in order"]);
}

#[test]
fn both_ends_at_the_same_moment_lose_nothing() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        random,
        up,
        down,
    } in runs(&daemon)
    {
        let uploaded = reading(&server);
        let upload = upload_and_close(&client, up.clone(), random);
        let download = down.clone();
        thread::spawn(move || {
            server.write_all(&download).unwrap();
            server.shutdown(Shutdown::Write).unwrap();
        });
        let (bytes, end) = client.see_all();
        assert!(
            bytes == down,
            "download: {} of {} bytes",
            bytes.len(),
            down.len()
        );
        assert_eq!((end, client.see()), (CLOSE_1000, Seen::Eof));
        upload.join().unwrap();
        let (bytes, orderly) = uploaded.join().unwrap();
        assert!(
            bytes == up && orderly,
            "upload: {} of {} bytes, orderly: {orderly}",
            bytes.len(),
            up.len()
        );
    }
    daemon.logged(RUNS as usize, &["tunnel closed:", "closed in order"]);
}

#[test]
fn a_close_without_a_code_is_an_orderly_end_too() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    for payload in [&b""[..], &[3, 0xe8], b"\x03\xe8bye"] {
        let mut client = Client::open(&daemon, target.port);
        client.send(b"x");
        client.send_frame(0x88, payload);
        assert_eq!(client.see_all(), (b"x".to_vec(), CLOSE_1000), "{payload:?}");
    }
    daemon.logged(3, &["tunnel closed:", "closed in order"]);
}

#[test]
fn any_other_close_of_the_clients_breaks_the_upload_off() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let codes = [
        1001, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 3000, 4999u16,
    ];
    for (run, code) in (0..RUNS).zip(codes.iter().cycle()) {
        let mut random = Random::new(run);
        let up = random.bytes(SIZES[run as usize % SIZES.len()]);
        let mut client = Client::open(&daemon, target.port);
        let mut server = target.accept();
        let uploaded = reading(&server);
        client.send(&up);
        client.send_frame(0x88, &[&code.to_be_bytes()[..], b"why"].concat());
        assert_eq!(client.see_all().1, Seen::Close(Some(*code), String::new()));
        assert_eq!(client.see(), Seen::Eof);
        let (bytes, orderly) = uploaded.join().unwrap();
        assert!(up.starts_with(&bytes) && !orderly, "{code}");
        assert!(server.write_all(b"x").is_err());
    }
    daemon.logged(
        RUNS as usize,
        &["tunnel closed:", "end=client_aborted", "why"],
    );
}

// The target resets or fails

#[test]
fn a_target_reset_is_the_bytes_read_so_far_and_close_1011() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        down,
        ..
    } in runs(&daemon)
    {
        let (download, wait) = (down.clone(), client.clone_writer());
        let sender = thread::spawn(move || {
            server.write_all(&download).unwrap();
            reset(server);
            drop(wait);
        });
        let (bytes, end) = client.see_all();
        assert!(
            down.starts_with(&bytes),
            "{} of {} bytes",
            bytes.len(),
            down.len()
        );
        assert!(
            matches!(&end, Seen::Close(Some(1011), why) if why.contains("reset")),
            "{end:?}"
        );
        // Clients answer with the same code or with 1000, and either way it was the target.
        client.send_close(if down.len() % 2 == 0 { 1011 } else { 1000 });
        assert_eq!(client.see(), Seen::Eof);
        sender.join().unwrap();
    }
    daemon.logged(
        RUNS as usize,
        &["tunnel closed:", "end=target_failed ", "reset"],
    );
}

#[test]
fn a_target_reset_in_the_middle_of_an_upload_is_never_an_orderly_end() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        mut random,
        ..
    } in runs(&daemon)
    {
        let mut uploader = client.clone_writer();
        let upload = thread::spawn(move || {
            let chunk = frame(0x82, &[7; 10_000]);
            while uploader.stream.write_all(&chunk).is_ok() {}
        });
        let read = random.below(400_000);
        server.read_exact(&mut vec![0; read]).unwrap();
        reset(server);
        let (bytes, end) = client.see_all();
        assert!(bytes.is_empty());
        assert!(
            matches!(&end, Seen::Close(Some(1011), why) if why.contains("reset")),
            "{end:?}"
        );
        // The daemon may have reset it by now, as it goes on sending.
        let _ = client.stream.shutdown(Shutdown::Both);
        upload.join().unwrap();
    }
}

// The client vanishes

#[test]
fn a_vanished_client_is_a_reset_for_the_target() {
    let daemon = Daemon::start(&[]);
    for (
        run,
        Run {
            mut client,
            mut server,
            up,
            ..
        },
    ) in runs(&daemon).enumerate()
    {
        let uploaded = reading(&server);
        client.send(&up);
        match run % 3 {
            0 => drop(client),
            1 => reset(client.stream),
            _ => {
                // In the middle of a frame.
                client.send_raw(&frame(0x82, &[1; 100])[..50]);
                client.stream.shutdown(Shutdown::Write).unwrap();
                assert!(matches!(client.see(), Seen::Eof | Seen::Reset));
            }
        }
        let (bytes, orderly) = uploaded.join().unwrap();
        assert!(
            up.starts_with(&bytes[..bytes.len().min(up.len())]) && !orderly,
            "run {run}"
        );
        assert!(server.write_all(b"x").is_err(), "run {run}");
    }
    daemon.logged(RUNS as usize, &["tunnel closed:", "client vanished"]);
}

#[test]
fn a_client_that_vanishes_while_the_target_sends_is_a_reset_too() {
    let daemon = Daemon::start(&[]);
    for (
        run,
        Run {
            mut client,
            mut server,
            mut random,
            ..
        },
    ) in runs(&daemon).enumerate()
    {
        let sender = thread::spawn(move || {
            let chunk = [1; 50_000];
            while server.write_all(&chunk).is_ok() {}
            read_to_end(&mut server).1
        });
        client.see_all_of(1 + random.below(500_000));
        if run % 2 == 0 {
            drop(client)
        } else {
            reset(client.stream)
        }
        sender.join().unwrap();
    }
    daemon.logged(RUNS as usize, &["tunnel closed:", "client vanished"]);
}

#[test]
fn a_client_that_vanishes_while_its_target_does_not_read_is_noticed() {
    let daemon = Daemon::start(&["--ping-interval", "200ms", "--linger", "500ms"]);
    let target = Target::listen();
    for _ in 0..5 {
        let client = Client::open(&daemon, target.port);
        let mut server = target.accept();
        fill(&client);
        reset(client.stream);
        daemon.logged(1, &["tunnel closed:", "client vanished"]);
        assert!(!read_to_end(&mut server).1);
    }
}

/// Sends messages until nothing more is taken for a while, and returns how many bytes were.
fn fill(client: &Client) -> usize {
    let (chunk, mut sent) = (frame(0x82, &[7; 10_000]), 0);
    let mut stream = client.stream.try_clone().unwrap();
    stream
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut left = &chunk[..];
    while let Ok(count) = stream.write(left) {
        sent += count;
        left = if count == left.len() {
            &chunk
        } else {
            &left[count..]
        };
    }
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    sent
}

/// PostgreSQL over TLS does so after each session.
#[test]
fn a_target_reset_behind_the_clients_close_has_an_end_of_its_own() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        random,
        up,
        ..
    } in runs(&daemon)
    {
        let upload = upload_and_close(&client, up.clone(), random);
        assert!(read_to_end(&mut server) == (up, true));
        reset(server);
        let (_, end) = client.see_all();
        assert!(matches!(end, Seen::Close(Some(1011), _)), "{end:?}");
        upload.join().unwrap();
    }
    daemon.logged(
        RUNS as usize,
        &["tunnel closed:", "end=target_failed_after_close"],
    );
}

/// As over TCP: the reset comes through, though nobody reads.
#[test]
fn a_client_reset_while_both_directions_are_blocked_is_noticed_within_a_second() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    for _ in 0..5 {
        let client = Client::open(&daemon, target.port);
        let server = target.accept();
        fill(&client);
        server.set_nonblocking(true).unwrap();
        let deadline = Instant::now() + Duration::from_millis(300);
        while Instant::now() < deadline {
            let _ = (&server).write(&[1; 10_000]);
        }
        let start = Instant::now();
        reset(client.stream);
        // Nothing is read, so only an error tells.
        within(LIMIT, "the target is reset", || {
            let error = server.take_error().unwrap();
            error.map(|error| assert_eq!(error.kind(), ErrorKind::ConnectionReset))
        });
        let took = start.elapsed();
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
    daemon.logged(
        5,
        &["tunnel closed:", "end=client_vanished", "reset by peer"],
    );
}

#[test]
fn a_target_reset_behind_a_download_that_the_client_does_not_take_ends_the_tunnel() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    server
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    while server.write(&[1; 50_000]).is_ok() {}
    reset(server);
    daemon.logged(
        1,
        &["tunnel closed:", "end=target_failed ", "reset by peer"],
    );
    // What the sockets hold can still be read, and its end is no orderly one.
    let (bytes, end) = client.see_all();
    assert!(bytes.iter().all(|&byte| byte == 1));
    assert_ne!(end, CLOSE_1000);
}

#[test]
fn what_was_finished_in_order_is_not_taken_back_when_the_client_vanishes() {
    let mut command = Daemon::command(&[]);
    command.env("RUST_LOG", "debug");
    let daemon = Daemon::spawn(command);
    let target = Target::listen();
    for run in 0..10 {
        let up = Random::new(run).bytes(900_000);
        let mut client = Client::open(&daemon, target.port);
        let mut server = target.accept();
        client.send(&up);
        client.send_close(1000);
        daemon.logged(run as usize + 1, &["to_stream ended", "how=Closed"]);
        // Much of it lies in the daemon's system, and the client vanishes while the target talks.
        server.write_all(&[1; 100_000]).unwrap();
        client.see_all_of(50_000);
        reset(client.stream);
        let (bytes, orderly) = read_slowly(&mut server);
        assert!(bytes == up && orderly, "{} bytes, {orderly}", bytes.len());
    }
}

/// At about 2 MB/s.
fn read_slowly(stream: &mut TcpStream) -> (Vec<u8>, bool) {
    let (mut bytes, mut piece) = (Vec::new(), vec![0; 40_000]);
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return (bytes, true),
            Ok(count) => bytes.extend(&piece[..count]),
            Err(_) => return (bytes, false),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The client's last bytes and its Close lie in the daemon when a write to the client fails.
#[test]
fn what_a_client_sent_before_it_closed_its_connection_is_read_on() {
    let daemon = Daemon::start(&[]);
    for Run {
        client,
        mut server,
        up,
        ..
    } in runs(&daemon)
    {
        let mut talker = server.try_clone().unwrap();
        let talking = thread::spawn(move || while talker.write_all(&[1; 1000]).is_ok() {});
        let mut stream = client.stream;
        let mut reader = stream.try_clone().unwrap();
        let is_done = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&is_done);
        let reading = thread::spawn(move || {
            let mut piece = [0; 64 * 1024];
            while !until.load(Ordering::SeqCst) && matches!(reader.read(&mut piece), Ok(1..)) {}
        });
        stream.write_all(&frame(0x82, &up)).unwrap();
        stream.write_all(&frame(0x88, &[3, 0xe8])).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let (bytes, orderly) = read_to_end(&mut server);
        assert!(
            bytes == up && orderly,
            "{} of {} bytes",
            bytes.len(),
            up.len()
        );
        is_done.store(true, Ordering::SeqCst);
        reading.join().unwrap();
        drop(stream);
        talking.join().unwrap();
    }
}

// An urgent byte

#[test]
fn an_urgent_byte_is_a_byte_in_its_place() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let urgent = |stream: &TcpStream| {
        let sent = rustix::net::send(stream, b"!", rustix::net::SendFlags::OOB);
        assert_eq!(sent, Ok(1));
    };
    for (before, behind) in [(0, 0), (5, 5), (1 << 20, 1 << 20), (100_000, 0)] {
        let mut client = Client::open(&daemon, target.port);
        let mut server = target.accept();
        let sending = thread::spawn(move || {
            server.write_all(&vec![1; before]).unwrap();
            urgent(&server);
            server.write_all(&vec![2; behind]).unwrap();
            server.shutdown(Shutdown::Write).unwrap();
            server
        });
        let (bytes, end) = client.see_all();
        let expected = [&vec![1; before][..], b"!", &vec![2; behind]].concat();
        assert!(
            bytes == expected,
            "{} of {} bytes",
            bytes.len(),
            expected.len()
        );
        assert_eq!(end, CLOSE_1000);
        let mut server = sending.join().unwrap();
        // In the middle of a frame, whose last byte it is.
        let wire = frame(0x82, b"upload");
        client.send_raw(&wire[..wire.len() - 1]);
        let last = [wire[wire.len() - 1]];
        rustix::net::send(&client.stream, &last, rustix::net::SendFlags::OOB).unwrap();
        client.send_close(1000);
        assert_eq!(read_to_end(&mut server), (b"upload".to_vec(), true));
    }
}

// Text frames and protocol errors

#[test]
fn a_text_frame_is_close_1003_and_a_reset_target() {
    let daemon = Daemon::start(&[]);
    for Run {
        mut client,
        mut server,
        up,
        ..
    } in runs(&daemon)
    {
        let uploaded = reading(&server);
        client.send(&up);
        client.send_frame(if up.len() % 2 == 0 { 0x81 } else { 0x01 }, b"text \xff");
        let hint = "binary frames only (websocat: --binary)".to_owned();
        assert_eq!(client.see(), Seen::Close(Some(1003), hint));
        assert_eq!(client.see(), Seen::Eof);
        let (bytes, orderly) = uploaded.join().unwrap();
        assert!(up.starts_with(&bytes) && !orderly);
        assert!(server.write_all(b"x").is_err());
    }
    let parts = ["tunnel closed:", "end=protocol_error", "binary frames only"];
    daemon.logged(RUNS as usize, &parts);
}
/// RFC 6455 §1.4: whoever has received a Close discards what still comes.
#[test]
fn data_behind_the_clients_close_is_discarded_whatever_its_kind() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    for behind in [
        frame(0x81, b"text"),
        [frame(0x01, b"te"), frame(0x80, b"xt")].concat(),
        frame(0x82, b"binary"),
        frame(0x81, &[0xff; 100_000]),
    ] {
        let mut client = Client::open(&daemon, target.port);
        let mut server = target.accept();
        client.send(b"upload");
        client.send_raw(&[frame(0x88, &1000u16.to_be_bytes()), behind].concat());
        assert_eq!(read_to_end(&mut server), (b"upload".to_vec(), true));
        server.write_all(b"answer").unwrap();
        drop(server);
        let (answer, end) = client.see_all();
        assert_eq!(answer, b"answer");
        assert_eq!(end, Seen::Close(Some(1000), String::new()));
    }
    daemon.logged(4, &["tunnel closed:", "up=6 down=6", "end=orderly"]);
}

#[test]
fn a_protocol_error_is_close_1002_and_a_reset_target() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    for (name, bytes) in [
        ("unmasked", vec![0x82, 0x01, b'x']),
        ("reserved bit", frame(0xc2, b"x")),
        ("reserved opcode", frame(0x83, b"x")),
        ("reserved control opcode", frame(0x8b, b"x")),
        ("continuation of nothing", frame(0x80, b"x")),
        (
            "message in a message",
            [frame(0x02, b"x"), frame(0x82, b"y")].concat(),
        ),
        ("fragmented ping", frame(0x09, b"x")),
        ("long ping", frame(0x89, &[0; 126])),
        (
            "length with the top bit",
            [&[0x82, 0xff][..], &[0xff; 8], &[0; 20]].concat(),
        ),
        ("one byte of a close code", frame(0x88, &[3])),
        ("close code 1005", frame(0x88, &1005u16.to_be_bytes())),
        ("close code 999", frame(0x88, &999u16.to_be_bytes())),
        (
            "close reason that is not UTF-8",
            frame(0x88, &[3, 0xe8, 0xff, 0xfe]),
        ),
    ] {
        for data in [0, 1000, 100_000, 500_000] {
            let mut client = Client::open(&daemon, target.port);
            let mut server = target.accept();
            let uploaded = reading(&server);
            client.send(&vec![1; data]);
            client.send_raw(&bytes);
            let (_, end) = client.see_all();
            assert!(
                matches!(&end, Seen::Close(Some(1002), why) if !why.is_empty()),
                "{name}: {end:?}"
            );
            assert_eq!(client.see(), Seen::Eof, "{name}");
            assert!(
                !uploaded.join().unwrap().1,
                "{name}: the target sees a reset"
            );
            assert!(server.write_all(b"x").is_err(), "{name}");
        }
    }
}

// The linger

#[test]
fn a_client_that_never_answers_a_close_is_let_go() {
    let daemon = Daemon::start(&["--linger", "300ms"]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    server.write_all(b"bye").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    let start = Instant::now();
    assert_eq!(client.see_all(), (b"bye".to_vec(), CLOSE_1000));
    let end = std::iter::repeat_with(|| client.see()).find(|seen| !matches!(seen, Seen::Ping(_)));
    assert_eq!(end, Some(Seen::Eof));
    assert!(
        start.elapsed() >= Duration::from_millis(300),
        "{:?}",
        start.elapsed()
    );
    assert!(
        !read_to_end(&mut server).1,
        "an upload without an end must not look finished"
    );
    daemon.logged(1, &["tunnel closed:", "end=linger"]);
}

#[test]
fn after_the_clients_close_the_target_takes_as_long_as_it_likes() {
    let daemon = Daemon::start(&[
        "--linger",
        "100ms",
        "--ping-interval",
        "100ms",
        "--ping-timeout",
        "100ms",
        "--stall-timeout",
        "1s",
    ]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    client.send(b"x");
    client.send_close(1000);
    assert_eq!(read_to_end(&mut server), (b"x".to_vec(), true));
    // Pings go on, for proxies, and need no answer.
    for _ in 0..20 {
        assert!(matches!(client.see(), Seen::Ping(_)));
    }
    server.write_all(b"answer").unwrap();
    drop(server);
    assert_eq!(client.see_all(), (b"answer".to_vec(), CLOSE_1000));
    daemon.logged(1, &["tunnel closed:", "end=orderly"]);
}

#[test]
fn a_client_that_answers_pings_may_be_silent_behind_the_targets_end() {
    let daemon = Daemon::start(&["--linger", "400ms"]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.see(), CLOSE_1000);
    for _ in 0..10 {
        let Seen::Ping(payload) = client.see() else {
            panic!("no ping");
        };
        client.send_frame(0x8a, &payload);
    }
    client.send(b"late");
    client.send_close(1000);
    assert_eq!(read_to_end(&mut server), (b"late".to_vec(), true));
    daemon.logged(1, &["tunnel closed:", "end=orderly"]);
}

#[test]
fn a_daemon_that_stood_still_relays_first_and_lets_go_then() {
    let daemon = Daemon::start(&["--linger", "1s"]);
    let target = Target::listen();
    let mut tunnels: Vec<_> = (0..10)
        .map(|_| (Client::open(&daemon, target.port), target.accept()))
        .collect();
    for (client, server) in &mut tunnels {
        client.send_close(1000);
        assert_eq!(read_to_end(server), (vec![], true));
    }
    daemon.signal(Signal::STOP);
    for (_, server) in &mut tunnels {
        server.write_all(&[7; 60_000]).unwrap();
        server.shutdown(Shutdown::Write).unwrap();
    }
    thread::sleep(Duration::from_millis(1200));
    daemon.signal(Signal::CONT);
    for (client, _) in &mut tunnels {
        assert_eq!(client.see_all(), (vec![7; 60_000], CLOSE_1000));
    }
}

#[test]
fn a_trickle_of_answer_keeps_the_linger_going() {
    let daemon = Daemon::start(&["--linger", "400ms"]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    client.send_close(1000);
    thread::spawn(move || {
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(100));
            server.write_all(b"x").unwrap();
        }
    });
    assert_eq!(client.see_all(), (vec![b'x'; 20], CLOSE_1000));
}

#[test]
fn a_trickle_of_upload_keeps_the_linger_going() {
    let daemon = Daemon::start(&["--linger", "400ms"]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.see(), CLOSE_1000);
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(100));
        client.send(b"x");
    }
    client.send_close(1000);
    assert_eq!(read_to_end(&mut server), (vec![b'x'; 20], true));
}

#[test]
fn a_slow_reader_keeps_the_linger_going() {
    let daemon = Daemon::start(&["--linger", "1s"]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    client.send_close(1000);
    assert!(read_to_end(&mut server).1);
    let data = Random::new(9).bytes(8_000_000);
    let sent = data.clone();
    thread::spawn(move || server.write_all(&sent).unwrap());
    let mut bytes = Vec::new();
    while bytes.len() < data.len() {
        // About 1.5 MB/s, far longer than the linger.
        bytes.extend(client.see_all_of((data.len() - bytes.len()).min(32 * 1024)));
        thread::sleep(Duration::from_millis(20));
    }
    assert!(bytes == data);
    assert_eq!(client.see(), CLOSE_1000);
}

// A tunnel's last bytes, which are on their way when it has ended

/// A tunnel that is over for the daemon, and whose client has yet to read what the sockets hold. It answers pings.
struct Tail {
    client: Client,
    data: Vec<u8>,
}

impl Tail {
    fn of(daemon: &Daemon) -> Tail {
        let target = Target::listen();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // Some 70 KB lie before it then, and each read makes room for more segments.
        socket.set_recv_buffer_size(4096).unwrap();
        socket.set_tcp_mss(512).unwrap();
        socket.connect(&daemon.address.into()).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let head = request("GET", &format!("/tunnel?port={}", target.port), &UPGRADE);
        let mut client = Client::upgrade(stream, head.as_bytes());
        client.send_close(1000);
        let mut server = target.accept();
        let data = Random::new(21).bytes(1_000_000);
        let sent = data.clone();
        thread::spawn(move || server.write_all(&sent).unwrap());
        within(LIMIT, "the tunnel is over", || {
            client.receive_some();
            daemon.log().contains("tunnel closed:").then_some(())
        });
        daemon.logged(1, &["tunnel closed:", "down=1000000", "end=orderly"]);
        Tail { client, data }
    }

    /// Reads a little and answers a ping, so many times, and then the rest.
    fn arrives(mut self, times: u32, pause: Duration) {
        for _ in 0..times {
            self.client.send_frame(0x8a, b"");
            thread::sleep(pause);
            self.client.receive_some();
        }
        assert!(self.client.see_all_of(self.data.len()) == self.data);
        assert_eq!(self.client.see(), CLOSE_1000);
    }
}

#[test]
fn refused_connections_cost_a_tunnel_none_of_its_last_bytes() {
    let daemon = Daemon::start(&[]);
    let tail = Tail::of(&daemon);
    let refused: Vec<_> = (0..300).map(|_| daemon.connect()).collect();
    for mut stream in &refused {
        stream
            .write_all(request("GET", "/none", &[]).as_bytes())
            .unwrap();
    }
    daemon.logged(10, &["refused:", "status=404"]);
    tail.arrives(4, Duration::from_millis(50));
}

#[test]
fn a_slow_reader_of_a_tunnels_last_bytes_has_more_than_the_linger() {
    let daemon = Daemon::start(&["--linger", "2s"]);
    Tail::of(&daemon).arrives(14, Duration::from_millis(200));
}

#[test]
fn a_client_that_takes_none_of_a_tunnels_last_bytes_has_the_linger() {
    let daemon = Daemon::start(&["--linger", "1s"]);
    let before = daemon.descriptors();
    let _tail = Tail::of(&daemon);
    within(LIMIT, "descriptors are back", || {
        (daemon.descriptors() <= before).then_some(())
    });
}

#[test]
fn a_daemon_that_is_to_end_waits_for_its_tunnels_last_bytes() {
    let mut daemon = Daemon::start(&["--shutdown-grace", "30s"]);
    let tail = Tail::of(&daemon);
    daemon.signal(Signal::TERM);
    daemon.logged(1, &["shutting down"]);
    thread::sleep(Duration::from_millis(300));
    tail.arrives(4, Duration::from_millis(50));
    assert_eq!(daemon.exit().code(), Some(0));

    let mut daemon = Daemon::start(&["--exit-when-idle", "200ms"]);
    let tail = Tail::of(&daemon);
    thread::sleep(Duration::from_millis(500));
    tail.arrives(4, Duration::from_millis(50));
    assert_eq!(daemon.exit().code(), Some(0));
}

// No direction waits for the other

#[test]
fn a_client_that_does_not_read_is_still_listened_to() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let mut sender = server.try_clone().unwrap();
    let data = Random::new(10).bytes(24_000_000);
    let sent = data.clone();
    let sending = thread::spawn(move || sender.write_all(&sent));
    // Outbound is blocked once this many bytes, more than the client's side can hold, wait in the daemon.
    thread::sleep(Duration::from_millis(300));
    let up = Random::new(11).bytes(3_000_000);
    let upload = upload_and_close(&client, up.clone(), Random::new(12));
    client.clone_writer().send_frame(0x89, b"in the middle");
    let (bytes, orderly) = read_to_end(&mut server);
    assert!(
        bytes == up && orderly,
        "the upload and the Close went through: {} bytes",
        bytes.len()
    );
    upload.join().unwrap();
    assert!(!sending.is_finished(), "the download still waits");
    let (mut bytes, mut end) = client.see_all();
    if end == Seen::Pong(b"in the middle".to_vec()) {
        drop(server);
        let (more, last) = client.see_all();
        bytes.extend(more);
        end = last;
    } else {
        panic!("{end:?} instead of the pong");
    }
    assert!(bytes == data, "{} bytes", bytes.len());
    assert_eq!(end, CLOSE_1000);
    sending.join().unwrap().unwrap();
}

#[test]
fn a_target_that_does_not_read_is_still_relayed_from() {
    let daemon = Daemon::start(&["--ping-interval", "200ms", "--ping-timeout", "200ms"]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    let sent = fill(&client);
    assert!(sent > 100_000, "{sent}");
    let data = Random::new(13).bytes(5_000_000);
    let download = data.clone();
    let mut sender = server.try_clone().unwrap();
    thread::spawn(move || sender.write_all(&download).unwrap());
    let mut pings = 0;
    let mut bytes = Vec::new();
    while bytes.len() < data.len() || pings < 3 {
        match client.see() {
            Seen::Binary(payload) => bytes.extend(payload),
            Seen::Ping(_) => pings += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(bytes == data);
    let received = thread::spawn(move || read_to_end(&mut server));
    // Whatever of the last frame was not taken by `fill` is lost with the client; the rest is not.
    drop(client);
    let (bytes, orderly) = received.join().unwrap();
    assert!(bytes.iter().all(|&byte| byte == 7) && !orderly);
}
