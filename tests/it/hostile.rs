//! Clients without good intentions, with a real client beside them that must not notice.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::*;

/// A tunnel that works while something else goes on.
struct Bystander {
    client: Client,
}

impl Bystander {
    fn of(daemon: &Daemon, target: &Target) -> Bystander {
        Bystander {
            client: Client::open(daemon, target.port),
        }
    }

    fn works(&mut self) {
        let bytes = [1, 2, 3, 4, 5];
        self.client.send(&bytes);
        assert_eq!(self.client.see_all_of(bytes.len()), bytes);
    }
}

/// The same daemon under other limits of the system, set by `prlimit`.
fn limited(limits: &[&str], options: &[&str]) -> Command {
    with_limits(limits, &Daemon::command(options))
}

/// What a stream still brings, whatever its end.
fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

// Heads

#[test]
fn an_endless_head_costs_16_kib() {
    let daemon = Daemon::start(&[]);
    daemon.get("/health", &[]);
    let before = daemon.resident();
    let attack = || {
        let mut stream = daemon.connect();
        stream.write_all(b"GET /health HTTP/1.1\r\nX: ").unwrap();
        let mut sent = 0;
        while sent < 50_000_000 && stream.write_all(&[b'x'; 50_000]).is_ok() {
            sent += 50_000;
        }
        sent
    };
    let sent: Vec<_> = (0..20).map(|_| attack()).collect();
    assert!(
        sent.iter().all(|&sent| sent < 20_000_000),
        "cut off in time: {sent:?}"
    );
    assert!(
        daemon.resident() < before + 2048,
        "{before} KiB, then {}",
        daemon.resident()
    );
    assert_eq!(daemon.get("/health", &[]).status, 204);
}

#[test]
fn slow_heads_beside_a_real_client_do_not_slow_it() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let mut slow: Vec<_> = (0..300).map(|_| daemon.connect()).collect();
    for stream in &mut slow {
        stream.write_all(b"GET /health HTTP/1.1\r\nX").unwrap();
    }
    let mut bystander = Bystander::of(&daemon, &target);
    for stream in &mut slow {
        stream.write_all(b":").unwrap();
        bystander.works();
    }
    assert_eq!(daemon.get("/health", &[]).status, 204);
}

#[test]
fn more_slow_heads_than_the_limit_keep_no_real_client_out() {
    let daemon = Daemon::start(&["--max-connections", "50"]);
    let target = Target::echo();
    let mut bystander = Bystander::of(&daemon, &target);
    let mut slow = Vec::new();
    for _ in 0..300 {
        let mut stream = daemon.connect();
        let _ = stream.write_all(b"GET /health HTTP/1.1\r\nX");
        slow.push(stream);
        if slow.len() % 20 == 0 {
            assert_eq!(
                daemon.get("/health", &[]).status,
                204,
                "beside {} slow heads",
                slow.len()
            );
            bystander.works();
        }
    }
    Bystander::of(&daemon, &target).works();
    let let_go = rest(&mut slow[0]);
    assert!(
        let_go.starts_with(b"HTTP/1.1 408 "),
        "{}",
        String::from_utf8_lossy(&let_go)
    );
    daemon.logged(1, &["refused:", "status=408", "connection limit"]);
}

#[test]
fn a_burst_of_500_connections_is_served() {
    let daemon = Daemon::start(&[]);
    let mut streams: Vec<_> = (0..500).map(|_| daemon.connect()).collect();
    for stream in &mut streams {
        stream
            .write_all(request("GET", "/health", &[]).as_bytes())
            .unwrap();
    }
    let served = streams
        .iter_mut()
        .filter(|stream| rest(&mut stream.try_clone().unwrap()).starts_with(b"HTTP/1.1 204 "));
    assert_eq!(served.count(), 500);
}

#[test]
fn over_the_limit_503_needs_no_thread() {
    let daemon = Daemon::start(&["--max-connections", "2"]);
    let target = Target::echo();
    let mut bystanders = [
        Bystander::of(&daemon, &target),
        Bystander::of(&daemon, &target),
    ];
    thread::sleep(Duration::from_millis(50));
    // Beside the one that sums up the log.
    let threads = daemon.threads() + 1;
    let mut held: Vec<_> = (0..200).map(|_| daemon.connect()).collect();
    assert!(
        daemon.threads() <= threads,
        "{threads} threads, then {}",
        daemon.threads()
    );
    for stream in held.iter_mut().skip(190) {
        assert!(rest(stream).starts_with(b"HTTP/1.1 503 "));
    }
    bystanders.iter_mut().for_each(Bystander::works);
}

#[test]
fn clients_that_never_read_their_answer_are_let_go() {
    let daemon = Daemon::start(&[]);
    daemon.get("/health", &[]);
    let before = (daemon.threads(), daemon.descriptors());
    let ask = || {
        let mut stream = daemon.connect();
        stream
            .write_all(request("GET", "/openapi.yaml", &[]).as_bytes())
            .unwrap();
        stream
    };
    let _held: Vec<_> = (0..50).map(|_| ask()).collect();
    daemon.is_back_at(before);
}

// Descriptors and threads

#[test]
fn running_out_of_descriptors_is_survived() {
    let daemon = Daemon::spawn(limited(&["--nofile=48"], &[]));
    daemon.logged(1, &["WARN", "48 descriptors allow", "raise RLIMIT_NOFILE"]);
    let target = Target::echo();
    let mut bystander = Bystander::of(&daemon, &target);
    for _ in 0..3 {
        let held: Vec<_> = (0..100).map(|_| daemon.connect()).collect();
        bystander.works();
        drop(held);
        within(LIMIT, "it serves again", || {
            let mut stream = daemon.connect();
            stream
                .write_all(request("GET", "/health", &[]).as_bytes())
                .ok()?;
            rest(&mut stream)
                .starts_with(b"HTTP/1.1 204 ")
                .then_some(())
        });
        bystander.works();
    }
    // A line for each connection that was turned away, and few beside them.
    let log = daemon.log();
    let others = log.lines().filter(|line| !line.contains("refused:"));
    assert!(others.count() < 50, "{log}");
}

#[test]
fn more_listeners_than_the_soft_limit_of_descriptors_are_listened_on() {
    let listen = ["--listen", "127.0.0.1:0"].repeat(40);
    let daemon = Daemon::spawn(limited(&["--nofile=48:256"], &listen));
    daemon.logged(40, &["listening on"]);
}

#[test]
fn too_few_descriptors_for_one_connection_are_said_at_start() {
    let (code, stderr) = fails_to_start(limited(&["--nofile=24"], &[]));
    assert!(code == 1 || code == 2, "{code}: {stderr}");
    assert!(stderr.contains("RLIMIT_NOFILE"), "{stderr}");
}

/// Lowers a limit of the running daemon.
fn set_limit(daemon: &Daemon, limit: &str) {
    let pid = daemon.pid().as_raw_nonzero().to_string();
    assert!(
        Command::new("prlimit")
            .args(["--pid", &pid, limit])
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn parsing_a_head_takes_no_descriptor() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let mut bystander = Bystander::of(&daemon, &target);
    bystander.works();
    let without_a_connection = daemon.open_descriptors();
    let is_idle = || {
        within(LIMIT, "the connection's descriptor is free", || {
            (daemon.open_descriptors() == without_a_connection).then_some(())
        })
    };
    let connection = daemon.connect();
    let of_the_connection = within(LIMIT, "the connection has a descriptor", || {
        let open = daemon.open_descriptors();
        open.difference(&without_a_connection).next().copied()
    });
    drop(connection);
    for version in ["HTTP/1.0", "HTTP/1.1", "HTTP/1.0"] {
        let health = request("GET", "/health", &[]).replace("HTTP/1.1", version);
        is_idle();
        assert_eq!(daemon.ask(&health).status, 204);
        is_idle();
        // All lower ones are taken, so that there is room for the client's connection and for nothing else.
        let room = of_the_connection + 1;
        set_limit(&daemon, &format!("--nofile={room}:"));
        assert_eq!(daemon.ask(&health).status, 204, "{version}");
        bystander.works();
        set_limit(&daemon, "--nofile=1024:");
    }
    assert!(!daemon.log().contains("tiny_http"), "{}", daemon.log());
}

/// A daemon of a user of its own, as RLIMIT_NPROC counts all threads of a user and does not bind root. `None` without
/// root. The text makes a `setpriv` that user, and the program lies in the directory.
fn of_another_user(limits: &[&str]) -> Option<(Daemon, String, TempDir)> {
    static USERS: AtomicU32 = AtomicU32::new(0);
    let number = USERS.fetch_add(1, Ordering::SeqCst);
    let user = format!(
        "--reuid={}",
        61_000 + std::process::id() % 1000 * 4 + number
    );
    let can = Command::new("setpriv")
        .args([&user, "--clear-groups", "--", "true"])
        .status();
    if !can.is_ok_and(|status| status.success()) {
        skip("root, to become another user");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("tunneld");
    std::fs::copy(env!("CARGO_BIN_EXE_tunneld"), &program).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory.path(), open).unwrap();
    let mut command = Command::new("setpriv");
    command.args([&user, "--clear-groups", "--", "prlimit"]);
    command.args(limits).arg("--").arg(&program);
    command.args(["--listen", "127.0.0.1:0"]);
    Some((Daemon::spawn(command), user, directory))
}

#[test]
fn silent_connections_under_a_limit_of_threads_keep_no_tunnel_out() {
    let Some((daemon, _user, _directory)) = of_another_user(&["--nproc=300"]) else {
        return;
    };
    daemon.logged(1, &["WARN", "300 threads allow", "RLIMIT_NPROC"]);
    let target = Target::echo();
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut silent = VecDeque::new();
            while !ended.load(Ordering::SeqCst) {
                silent.push_back(daemon.connect());
                if silent.len() > 295 {
                    silent.pop_front();
                }
                thread::sleep(Duration::from_millis(5));
            }
        });
        daemon.logged(100, &["refused:", "status=408"]);
        for _ in 0..40 {
            Bystander::of(&daemon, &target).works();
        }
        ended.store(true, Ordering::SeqCst);
    });
    assert!(!daemon.log().contains("status=503"), "{}", daemon.log());
}

#[test]
fn a_head_that_is_awaited_gives_its_thread_to_a_request() {
    let Some((daemon, user, _directory)) = of_another_user(&["--nproc=1000"]) else {
        return;
    };
    let target = Target::echo();
    // Others of the user have taken all threads but so many.
    let threads = daemon.threads() + 6;
    let lowered = Command::new("setpriv")
        .args([&user, "--clear-groups", "--", "prlimit"])
        .args(["--pid", &daemon.pid().as_raw_nonzero().to_string()])
        .arg(format!("--nproc={threads}"))
        .status();
    assert!(lowered.unwrap().success());
    let mut silent: VecDeque<_> = (0..40).map(|_| daemon.connect()).collect();
    for _ in 0..20 {
        assert_eq!(daemon.get("/health", &[]).status, 204);
    }
    assert!(daemon.threads() <= threads);
    let evicted = rest(&mut silent.pop_front().unwrap());
    assert!(evicted.starts_with(b"HTTP/1.1 408 "));
    assert!(String::from_utf8_lossy(&evicted).contains("no thread left"));
    // A tunnel needs three more at once, and a look-up one, which new heads do not get meanwhile.
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::SeqCst) {
                silent.push_back(daemon.connect());
                silent.pop_front();
                thread::sleep(Duration::from_millis(5));
            }
        });
        for _ in 0..10 {
            Bystander::of(&daemon, &target).works();
            let unknown = daemon.get_upgrade("/tunnel?host=nowhere.invalid&port=1", &[]);
            assert_eq!(unknown.status, 502, "{}", unknown.body);
        }
        ended.store(true, Ordering::SeqCst);
    });
}

#[test]
fn threads_that_cannot_start_are_survived() {
    let Some((mut daemon, _user, _directory)) = of_another_user(&["--nproc=24"]) else {
        return;
    };
    let target = Target::echo();
    let mut bystander = Bystander::of(&daemon, &target);
    for _ in 0..3 {
        let mut held: Vec<_> = (0..60).map(|_| daemon.connect()).collect();
        for stream in &mut held {
            let _ = stream.write_all(
                request("GET", &format!("/tunnel?port={}", target.port), &UPGRADE).as_bytes(),
            );
        }
        bystander.works();
        drop(held);
        within(LIMIT, "it serves again", || {
            let mut stream = daemon.connect();
            let _ = stream.write_all(request("GET", "/health", &[]).as_bytes());
            rest(&mut stream)
                .starts_with(b"HTTP/1.1 204 ")
                .then_some(())
        });
        bystander.works();
    }
    assert!(daemon.is_running());
    assert!(daemon.log().lines().count() < 1000);
}

// Frames

/// The most that one tunnel may cost, as the README says.
const TUNNEL_KIB: u64 = 384;

#[test]
fn no_frames_make_a_tunnel_bigger_than_its_bound() {
    let daemon = Daemon::start(&["--stall-timeout", "5m"]);
    let target = Target::echo();
    Bystander::of(&daemon, &target).works();
    let mut bystander = Bystander::of(&daemon, &target);
    let before = daemon.resident();
    let huge =
        |first: u8, length: u64| [&[first, 0xff][..], &length.to_be_bytes(), &[0; 4]].concat();
    let attacks: Vec<(&str, Vec<u8>, Vec<u8>)> = vec![
        (
            "a frame of 2^62 bytes",
            huge(0x82, 1 << 62),
            vec![0; 60_000],
        ),
        (
            "a frame of 2^63 bytes",
            huge(0x82, 1 << 63),
            vec![0; 60_000],
        ),
        ("a ping of 2^40 bytes", huge(0x89, 1 << 40), vec![0; 60_000]),
        ("a ping of 32 KiB", huge(0x89, 32 * 1024), vec![0; 60_000]),
        (
            "a text of 2^50 bytes",
            huge(0x81, 1 << 50),
            vec![b'x'; 60_000],
        ),
        (
            "endless fragments",
            frame(0x02, b"x"),
            frame(0x00, b"y").repeat(5000),
        ),
        (
            "endless empty fragments",
            frame(0x02, b""),
            frame(0x00, b"").repeat(5000),
        ),
        (
            "a flood of pings",
            vec![],
            frame(0x89, &[1; 125]).repeat(500),
        ),
        (
            "a flood of pongs",
            vec![],
            frame(0x8a, &[1; 125]).repeat(500),
        ),
        (
            "a flood of empty frames",
            vec![],
            frame(0x82, b"").repeat(10_000),
        ),
    ];
    let clients: Vec<_> = attacks
        .iter()
        .map(|(_, first, flood)| {
            let mut client = Client::open(&daemon, target.port);
            client
                .stream
                .set_write_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            let _ = client.stream.write_all(first);
            let until = Instant::now() + Duration::from_millis(300);
            while Instant::now() < until && client.stream.write_all(flood).is_ok() {}
            client
        })
        .collect();
    let bound = before + TUNNEL_KIB * attacks.len() as u64;
    assert!(
        daemon.resident() < bound,
        "{before} KiB, then {} KiB",
        daemon.resident()
    );
    bystander.works();
    drop(clients);
    assert_eq!(daemon.get("/health", &[]).status, 204);
}

#[test]
fn random_bytes_after_the_upgrade_end_only_their_own_tunnel() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let mut bystander = Bystander::of(&daemon, &target);
    daemon.get("/health", &[]);
    let before = (daemon.threads() + 4, daemon.descriptors());
    let mut random = Random::new(77);
    for _ in 0..200 {
        let mut client = Client::open(&daemon, target.port);
        let size = 1 + random.below(3000);
        let bytes = random.bytes(size);
        let _ = client.stream.write_all(&bytes);
        let _ = client.stream.shutdown(std::net::Shutdown::Write);
        match client.stream.read_to_end(&mut Vec::new()) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
        bystander.works();
    }
    daemon.is_back_at(before);
}

// The log

#[test]
fn a_flood_of_refusals_is_summarised() {
    let daemon = Daemon::start(&[]);
    for _ in 0..400 {
        assert_eq!(daemon.get("/nothing", &[]).status, 404);
    }
    // No further line is needed for it. The flood may take several seconds, each with its sum.
    within(LIMIT, "all are logged or summed up", || {
        let log = daemon.log();
        let sums = log
            .lines()
            .filter(|line| line.contains("more refusals with status=404 were not logged"));
        let left_out = sums.filter_map(|line| line.split(' ').rev().nth(7)?.parse::<usize>().ok());
        (log.matches("refused:").count() + left_out.sum::<usize>() == 400).then_some(())
    });
    daemon.logged(
        1,
        &["WARN", "more refusals with status=404 were not logged"],
    );
}

#[test]
fn a_flood_of_one_status_hides_no_other() {
    let daemon = Daemon::start_closed(&["--deny-target", "192.0.2.1"]);
    let token = format!("X-Access-Token: {TOKEN}");
    let denied = "/tunnel?host=192.0.2.1&port=22";
    for _ in 0..20 {
        for _ in 0..20 {
            assert_eq!(daemon.get_upgrade(denied, &[]).status, 401);
        }
        assert_eq!(daemon.get_upgrade(denied, &[&token]).status, 403);
    }
    daemon.logged(20, &["refused:", "status=403", "192.0.2.1:22"]);
    daemon.logged(
        1,
        &["WARN", "more refusals with status=401 were not logged"],
    );
}

#[test]
fn no_request_makes_a_long_log_line_or_a_long_answer() {
    let daemon = Daemon::start(&[]);
    let long = "\"".repeat(15_000);
    for head in [
        request("GET", &format!("http://[{long}"), &[]),
        request("GET", &format!("/{long}"), &[]),
        request(&"M".repeat(15_000), "/health", &[]),
        request("GET", &format!("/tunnel?port={long}"), &[]),
        request("GET", &format!("/tunnel?port=1&host={long}"), &[]),
        request("GET", "/metrics", &[&format!("Origin: {long}")]),
        request("GET", "/metrics", &[]).replace("localhost", &"h".repeat(15_000)),
        request(
            "GET",
            "/tunnel?port=1",
            &[
                "Connection: Upgrade",
                "Upgrade: websocket",
                &format!("Sec-WebSocket-Version: {long}"),
            ],
        ),
    ] {
        let answer = daemon.ask(&head);
        assert!((400..500).contains(&answer.status), "{}", answer.status);
        assert!(answer.body.len() < 2000, "{}", answer.body);
    }
    daemon.logged(8, &["refused:"]);
    let log = daemon.log();
    assert!(log.lines().all(|line| line.len() < 2000), "{log}");
}
