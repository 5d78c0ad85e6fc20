//! Tunnels opened, used and ended in every way at random, every byte accounted for. Run by `scripts/soak.sh`.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::net::sockopt;

use crate::support::*;

const WORKERS: u64 = 12;

type End = fn(&mut Random, Tunnel);

/// The ways a tunnel can end.
const ENDS: [(&str, End); 10] = [
    ("target eof, client close", target_first),
    ("client close, target eof", client_first),
    ("both at once", both_at_once),
    ("target reset", target_reset),
    ("client reset", |random, tunnel| {
        client_vanishes(random, tunnel, true)
    }),
    ("client eof without close", |random, tunnel| {
        client_vanishes(random, tunnel, false)
    }),
    ("text frame", |random, tunnel| {
        refused(random, tunnel, &frame(0x81, b"x"), 1003)
    }),
    ("protocol error", |random, tunnel| {
        refused(random, tunnel, &frame(0x83, b"x"), 1002)
    }),
    ("bytes with the head, silence, pings", quiet),
    ("client close with another code", closed_otherwise),
];

struct Tunnel {
    client: Client,
    server: TcpStream,
}

static MOVED: AtomicU64 = AtomicU64::new(0);

fn payload(random: &mut Random) -> Vec<u8> {
    let size = [0, 1, 100, 5_000, 70_000, 400_000, 2_000_000][random.below(7)];
    let size = size + random.below(100);
    MOVED.fetch_add(size as u64, Ordering::Relaxed);
    random.bytes(size)
}

fn upload(
    client: &Client,
    bytes: &[u8],
    random: &mut Random,
    close: bool,
) -> thread::JoinHandle<()> {
    let mut messages = Vec::new();
    let mut left = bytes;
    while !left.is_empty() {
        let size = (1 + random.below(150_000)).min(left.len());
        messages.extend(frame(0x82, &left[..size]));
        left = &left[size..];
    }
    if close {
        messages.extend(frame(0x88, &[3, 0xe8]));
    }
    let mut stream = client.stream.try_clone().unwrap();
    thread::spawn(move || {
        let _ = stream.write_all(&messages);
    })
}

/// Whether everything could be sent. A reset is reported once: to this write or to a read.
fn download(server: &TcpStream, bytes: &[u8], finish: bool) -> thread::JoinHandle<bool> {
    let (mut server, bytes) = (server.try_clone().unwrap(), bytes.to_vec());
    thread::spawn(move || {
        server.write_all(&bytes).is_ok() && (!finish || server.shutdown(Shutdown::Write).is_ok())
    })
}

fn target_first(
    random: &mut Random,
    Tunnel {
        mut client,
        mut server,
    }: Tunnel,
) {
    let (up, down) = (payload(random), payload(random));
    let downloading = download(&server, &down, true);
    let (bytes, end) = client.see_all();
    assert!(
        bytes == down && end == CLOSE_1000,
        "{} of {} bytes, {end:?}",
        bytes.len(),
        down.len()
    );
    let uploading = upload(&client, &up, random, true);
    let (bytes, orderly) = read_to_end(&mut server);
    assert!(
        bytes == up && orderly,
        "{} of {} bytes, {orderly}",
        bytes.len(),
        up.len()
    );
    assert_eq!(client.see_all(), (vec![], Seen::Eof));
    assert!(downloading.join().unwrap());
    uploading.join().unwrap();
}

fn client_first(
    random: &mut Random,
    Tunnel {
        mut client,
        mut server,
    }: Tunnel,
) {
    let (up, down) = (payload(random), payload(random));
    let uploading = upload(&client, &up, random, true);
    let (bytes, orderly) = read_to_end(&mut server);
    assert!(
        bytes == up && orderly,
        "{} of {} bytes, {orderly}",
        bytes.len(),
        up.len()
    );
    let downloading = download(&server, &down, true);
    let (bytes, end) = client.see_all();
    assert!(
        bytes == down && end == CLOSE_1000,
        "{} of {} bytes, {end:?}",
        bytes.len(),
        down.len()
    );
    assert!(downloading.join().unwrap());
    uploading.join().unwrap();
}

fn both_at_once(
    random: &mut Random,
    Tunnel {
        mut client,
        mut server,
    }: Tunnel,
) {
    let (up, down) = (payload(random), payload(random));
    let uploading = upload(&client, &up, random, true);
    let downloading = download(&server, &down, true);
    let received = thread::spawn(move || read_to_end(&mut server));
    let (bytes, end) = client.see_all();
    assert!(
        bytes == down && end == CLOSE_1000,
        "{} of {} bytes, {end:?}",
        bytes.len(),
        down.len()
    );
    let (bytes, orderly) = received.join().unwrap();
    assert!(
        bytes == up && orderly,
        "{} of {} bytes, {orderly}",
        bytes.len(),
        up.len()
    );
    assert!(downloading.join().unwrap());
    uploading.join().unwrap();
}

fn target_reset(
    random: &mut Random,
    Tunnel {
        mut client,
        mut server,
    }: Tunnel,
) {
    let (up, down) = (payload(random), payload(random));
    let uploading = upload(&client, &up, random, false);
    server.write_all(&down).unwrap();
    if !up.is_empty() {
        let _ = server.read(&mut vec![0; 1 + random.below(50_000)]);
    }
    sockopt::set_socket_linger(&server, Some(Duration::ZERO)).unwrap();
    drop(server);
    let (bytes, end) = client.see_all();
    assert!(
        down.starts_with(&bytes) && matches!(end, Seen::Close(Some(1011), _)),
        "{end:?}"
    );
    uploading.join().unwrap();
    client.send_close(1000);
}

fn client_vanishes(
    random: &mut Random,
    Tunnel {
        mut client,
        mut server,
    }: Tunnel,
    by_reset: bool,
) {
    let (up, down) = (payload(random), payload(random));
    let uploading = upload(&client, &up, random, false);
    let downloading = download(&server, &down, false);
    let received = thread::spawn(move || read_to_end(&mut server));
    if random.below(2) == 0 && !down.is_empty() {
        client.see_all_of(1 + random.below(down.len()));
    }
    if by_reset {
        sockopt::set_socket_linger(&client.stream, Some(Duration::ZERO)).unwrap();
    } else {
        uploading.join().unwrap();
    }
    let _ = client.stream.shutdown(Shutdown::Both);
    drop(client);
    let (bytes, orderly) = received.join().unwrap();
    let was_reset = !downloading.join().unwrap() || !orderly;
    assert!(
        up.starts_with(&bytes) && was_reset,
        "{} of {} bytes",
        bytes.len(),
        up.len()
    );
}

fn refused(
    random: &mut Random,
    Tunnel {
        mut client,
        mut server,
    }: Tunnel,
    bytes: &[u8],
    code: u16,
) {
    let up = payload(random);
    let received = thread::spawn(move || read_to_end(&mut server));
    upload(&client, &up, random, false).join().unwrap();
    client.send_raw(bytes);
    let (_, end) = client.see_all();
    assert!(
        matches!(end, Seen::Close(Some(seen), _) if seen == code),
        "{end:?}"
    );
    let (bytes, orderly) = received.join().unwrap();
    assert!(up.starts_with(&bytes) && !orderly);
}

fn quiet(
    random: &mut Random,
    Tunnel {
        mut client,
        mut server,
    }: Tunnel,
) {
    let (payload, silence) = (random.bytes(60), random.below(300));
    client.send_frame(0x89, &payload);
    thread::sleep(Duration::from_millis(silence as u64));
    loop {
        match client.see() {
            Seen::Ping(ping) => client.send_frame(0x8a, &ping),
            Seen::Pong(pong) => break assert_eq!(pong, payload),
            other => panic!("{other:?}"),
        }
    }
    client.send_close(1000);
    assert!(read_to_end(&mut server).1);
    drop(server);
    assert_eq!(client.see_all(), (vec![], CLOSE_1000));
}

/// Any Close but 1000 breaks the upload off: what came is the front of it, and a reset follows.
fn closed_otherwise(
    random: &mut Random,
    Tunnel {
        mut client,
        mut server,
    }: Tunnel,
) {
    let up = payload(random);
    let uploading = upload(&client, &up, random, false);
    let received = thread::spawn(move || read_to_end(&mut server));
    uploading.join().unwrap();
    client.send_close([1001, 1011, 3000][random.below(3)]);
    let (bytes, orderly) = received.join().unwrap();
    assert!(
        up.starts_with(&bytes) && !orderly,
        "{} of {} bytes, {orderly}",
        bytes.len(),
        up.len()
    );
}

fn work(daemon: &Daemon, seed: u64, until: Instant) -> u64 {
    let (mut random, target) = (Random::new(seed), Target::listen());
    let mut tunnels = 0;
    while Instant::now() < until {
        let (name, end) = ENDS[random.below(ENDS.len())];
        let client = Client::open(daemon, target.port);
        let tunnel = Tunnel {
            client,
            server: target.accept(),
        };
        let step =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| end(&mut random, tunnel)));
        assert!(step.is_ok(), "seed {seed}, tunnel {tunnels}: {name}");
        tunnels += 1;
    }
    tunnels
}

/// Runs the workers until the time is over; how many tunnels that were.
fn all_work(daemon: &Daemon, seed: u64, until: Instant) -> u64 {
    thread::scope(|scope| {
        let start = |worker| scope.spawn(move || work(daemon, seed + worker, until));
        let workers: Vec<_> = (0..WORKERS).map(start).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .sum()
    })
}

fn environment(name: &str, default: f64) -> f64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

#[test]
#[ignore = "takes as long as it is told to: scripts/soak.sh"]
fn soak() {
    let minutes = environment("SOAK_MINUTES", 2.0);
    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .subsec_micros();
    let seed = environment("SOAK_SEED", f64::from(clock)) as u64;
    println!("soak: {minutes} minutes, SOAK_SEED={seed}");
    let daemon = Daemon::start(&[
        "--ping-interval",
        "500ms",
        "--ping-timeout",
        "20s",
        "--linger",
        "5s",
    ]);
    // The first tunnels bring the allocator and the thread pools to their size.
    all_work(&daemon, 1, Instant::now() + Duration::from_secs(3));
    let settled = settle(&daemon);
    MOVED.store(0, Ordering::Relaxed);
    let tunnels = all_work(
        &daemon,
        seed,
        Instant::now() + Duration::from_secs_f64(minutes * 60.0),
    );
    let after = settle(&daemon);
    println!(
        "{tunnels} tunnels, {} MiB of payload",
        MOVED.load(Ordering::Relaxed) >> 20
    );
    println!("            before   after");
    println!("threads     {:6}  {:6}", settled.0, after.0);
    println!("descriptors {:6}  {:6}", settled.1, after.1);
    println!("memory, KiB {:6}  {:6}", settled.2, after.2);
    assert!(
        after.0 <= settled.0 && after.1 <= settled.1,
        "threads and descriptors are back"
    );
    assert!(
        after.2 <= settled.2 + 4096,
        "memory is back, but for what the allocator keeps"
    );
    let opened = daemon.log().matches("tunnel opened:").count();
    within(LIMIT, "every tunnel's end is logged once", || {
        (daemon.log().matches("tunnel closed:").count() == opened).then_some(())
    });
}

/// Threads, descriptors and memory once the last tunnel has gone. tiny_http's idle threads leave after 5 s.
fn settle(daemon: &Daemon) -> (usize, usize, u64) {
    thread::sleep(Duration::from_secs(7));
    within(LIMIT, "all tunnels are gone", || {
        (daemon.threads() <= 11).then_some(())
    });
    (daemon.threads(), daemon.descriptors(), daemon.resident())
}
