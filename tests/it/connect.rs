//! The client: `tunneld connect`, between its own streams or its local port and the real daemon.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use socket2::SockRef;

use crate::support::*;

/// A running client. It is killed when dropped.
pub struct Connect {
    child: Child,
    stderr: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Connect {
    pub fn command(url: &str, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunneld"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("TUNNELD_") {
                command.env_remove(name);
            }
        }
        command.env_remove("RUST_LOG").arg("connect").arg(url);
        command.args(options);
        command
    }

    /// A client of `daemon` that leads to `port` on its localhost.
    pub fn to(daemon: &Daemon, port: u16, options: &[&str]) -> Connect {
        let url = format!("ws://{}", daemon.address);
        let port = port.to_string();
        Connect::spawn(Connect::command(
            &url,
            &[&["--port", &port], options].concat(),
        ))
    }

    pub fn spawn(mut command: Command) -> Connect {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = Arc::new(Mutex::new(String::new()));
        let (mut pipe, copy) = (child.stderr.take().unwrap(), Arc::clone(&stderr));
        let reader = thread::spawn(move || {
            let mut more = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut more) {
                let text = String::from_utf8_lossy(&more[..count]).into_owned();
                copy.lock().unwrap().push_str(&text);
            }
        });
        Connect {
            child,
            stderr,
            reader: Some(reader),
        }
    }

    pub fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().unwrap()
    }

    pub fn stdout(&mut self) -> ChildStdout {
        self.child.stdout.take().unwrap()
    }

    /// Closes stdin and reads stdout to its end.
    pub fn rest(&mut self) -> Vec<u8> {
        drop(self.child.stdin.take());
        let mut bytes = Vec::new();
        self.stdout().read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// Waits for the process to end: its exit code and its stderr.
    pub fn ended(&mut self) -> (i32, String) {
        let child = &mut self.child;
        let status = within(LIMIT, "the client ends", || child.try_wait().unwrap());
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        (status.code().unwrap(), self.log())
    }

    /// Expects the exit code of a broken end, and one line with `part`.
    pub fn broke(&mut self, part: &str) -> String {
        let (code, stderr) = self.ended();
        assert_eq!((code, stderr.lines().count()), (1, 1), "{stderr}");
        assert!(
            stderr.starts_with("tunneld: ") && stderr.contains(part),
            "{stderr:?} without {part:?}"
        );
        stderr
    }

    pub fn log(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    pub fn logged(&self, part: &str) -> String {
        within(LIMIT, &format!("{part} in {}", self.log()), || {
            let log = self.log();
            let line = log.lines().find(|line| line.contains(part))?;
            Some(line.to_owned())
        })
    }

    /// The local port.
    pub fn address(&self) -> SocketAddr {
        let line = self.logged("listening on ");
        let (_, address) = line.split_once("listening on ").unwrap();
        address.parse().unwrap()
    }

    pub fn dial(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// The number of threads.
    pub fn threads(&self) -> usize {
        let path = format!("/proc/{}/task", self.child.id());
        std::fs::read_dir(path).unwrap().count()
    }

    /// How much CPU it has used, in clock ticks.
    pub fn ticks(&self) -> u64 {
        let path = format!("/proc/{}/stat", self.child.id());
        let stat = std::fs::read_to_string(path).unwrap();
        let (_, behind_name) = stat.rsplit_once(')').unwrap();
        let fields = behind_name.split_whitespace().skip(11).take(2);
        fields.map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Connect {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- the client's stderr\n{}", self.log());
        }
    }
}

pub const LOCAL: [&str; 2] = ["--listen", "127.0.0.1:0"];

fn reset(stream: TcpStream) {
    SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
}

/// Reads exactly `count` bytes.
pub fn take(stream: &mut impl Read, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

// --- stdin and stdout ---------------------------------------------------------------------------------

#[test]
fn bytes_of_stdin_come_back_on_stdout_at_once() {
    let daemon = Daemon::start(&[]);
    let mut client = Connect::to(&daemon, Target::echo().port, &[]);
    let (mut stdin, mut stdout) = (client.stdin(), client.stdout());
    for line in ["one", "\0\r\n\u{1b}", "three"] {
        stdin.write_all(line.as_bytes()).unwrap();
        assert_eq!(take(&mut stdout, line.len()), line.as_bytes());
    }
    drop(stdin);
    assert_eq!(client.ended(), (0, String::new()));
    daemon.logged(1, &["tunnel closed", "closed in order"]);
}

#[test]
fn the_end_of_stdin_is_a_fin_and_the_answer_still_comes() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &[]);
    let mut stream = target.accept();
    client.stdin().write_all(b"request").unwrap();
    assert_eq!(read_to_end(&mut stream), (b"request".to_vec(), true));
    stream.write_all(b"answer").unwrap();
    drop(stream);
    assert_eq!(client.rest(), b"answer");
    assert_eq!(client.ended(), (0, String::new()));
}

#[test]
fn the_end_of_the_target_ends_the_client_though_stdin_is_open() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &[]);
    let mut stream = target.accept();
    let _stdin = client.stdin();
    stream.write_all(b"bye").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut stream), (Vec::new(), true));
    assert_eq!(client.ended(), (0, String::new()));
    assert_eq!(client.rest(), b"bye");
    daemon.logged(1, &["tunnel closed", "closed in order"]);
}

#[test]
fn what_is_on_stdin_goes_on_after_the_end_of_the_target() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &[]);
    let mut stream = target.accept();
    let mut stdin = client.stdin();
    let bytes = Random::new(1).bytes(20_000_000);
    let copy = bytes.clone();
    let writer = thread::spawn(move || stdin.write_all(&copy));
    // More is there all the time from now on: stdin isn't idle when the target's end comes.
    let mut got = take(&mut stream, 1000);
    stream.shutdown(Shutdown::Write).unwrap();
    let (rest, orderly) = read_to_end(&mut stream);
    got.extend(rest);
    assert!(
        orderly && got == bytes,
        "{} of {} bytes",
        got.len(),
        bytes.len()
    );
    assert_eq!(client.ended(), (0, String::new()));
    writer.join().unwrap().unwrap();
}

#[test]
fn a_client_that_was_stopped_for_longer_than_the_linger_loses_nothing() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &["--linger", "1s"]);
    let mut stream = target.accept();
    drop(client.stdin());
    assert_eq!(read_to_end(&mut stream), (Vec::new(), true));
    client.signal(Signal::STOP);
    stream.write_all(&[7; 60_000]).unwrap();
    drop(stream);
    daemon.logged(1, &["tunnel closed", "closed in order"]);
    thread::sleep(Duration::from_millis(1200));
    client.signal(Signal::CONT);
    assert_eq!(client.rest(), [7; 60_000]);
    assert_eq!(client.ended(), (0, String::new()));
}

#[test]
fn a_reset_of_the_target_is_a_broken_end() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &[]);
    let _stdin = client.stdin();
    reset(target.accept());
    client.broke("the tunnel broke: target failed: Connection reset by peer");
    assert!(client.log().contains("(close code 1011)"));
}

#[test]
fn an_end_of_the_process_is_no_end_of_the_upload() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &[]);
    let mut stream = target.accept();
    let mut stdin = client.stdin();
    stdin.write_all(b"half of").unwrap();
    assert_eq!(take(&mut stream, 7), b"half of");
    client.signal(Signal::TERM);
    assert_eq!(read_to_end(&mut stream), (Vec::new(), false));
}

#[test]
fn a_closed_stdout_is_a_broken_end() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &[]);
    let mut stream = target.accept();
    let _stdin = client.stdin();
    drop(client.stdout());
    stream.write_all(b"lost").unwrap();
    client.broke("cannot write to stdout: Broken pipe");
    assert_eq!(read_to_end(&mut stream), (Vec::new(), false));
}

#[test]
fn much_in_both_directions_at_once_arrives_whole() {
    const SIZE: usize = 20_000_000;
    let daemon = Daemon::start(&["--ping-interval", "20ms"]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &["--ping-interval", "20ms"]);
    let stream = target.accept();
    let (mut stdin, mut stdout) = (client.stdin(), client.stdout());
    let (up, down) = (Random::new(1).bytes(SIZE), Random::new(2).bytes(SIZE));
    let (up_copy, down_copy) = (up.clone(), down.clone());
    let mut answers = stream.try_clone().unwrap();
    let answering = thread::spawn(move || {
        answers.write_all(&down_copy).unwrap();
    });
    let asking = thread::spawn(move || stdin.write_all(&up_copy).unwrap());
    let mut stream = stream;
    let reading = thread::spawn(move || read_to_end(&mut stream) == (up, true));
    assert!(take(&mut stdout, SIZE) == down, "downloaded other bytes");
    assert!(reading.join().unwrap(), "uploaded other bytes");
    answering.join().unwrap();
    asking.join().unwrap();
    assert_eq!(client.ended(), (0, String::new()));
}

#[test]
fn a_killed_daemon_is_a_broken_end() {
    let mut daemon = Daemon::start(&[]);
    let mut client = Connect::to(&daemon, Target::echo().port, &[]);
    let (mut stdin, mut stdout) = (client.stdin(), client.stdout());
    stdin.write_all(b"x").unwrap();
    assert_eq!(take(&mut stdout, 1), b"x");
    daemon.signal(Signal::KILL);
    daemon.exit();
    client.broke("the tunnel broke: the server's connection");
}

#[test]
fn a_daemon_that_shuts_down_is_a_broken_end() {
    let daemon = Daemon::start(&["--shutdown-grace", "0s"]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &[]);
    let _stdin = client.stdin();
    let _stream = target.accept();
    daemon.logged(1, &["tunnel opened"]);
    daemon.signal(Signal::TERM);
    client.broke("(close code 1001)");
}

#[test]
fn nothing_moving_behind_one_end_is_a_broken_end() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &["--linger", "100ms"]);
    let mut stream = target.accept();
    drop(client.stdin());
    client.broke("nothing moved for 100ms");
    let (bytes, _) = read_to_end(&mut stream);
    assert_eq!(bytes, b"");
}

// --- keepalive ----------------------------------------------------------------------------------------

#[test]
fn an_idle_tunnel_stays() {
    let daemon = Daemon::start(&[]);
    let options = ["--ping-interval", "50ms", "--ping-timeout", "2s"];
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &options);
    let (mut stdin, mut stdout) = (client.stdin(), client.stdout());
    let mut stream = target.accept();
    stream
        .set_read_timeout(Some(Duration::from_millis(2500)))
        .unwrap();
    let ticks = client.ticks();
    let silence = stream.read(&mut [0]).unwrap_err();
    assert_eq!(silence.kind(), ErrorKind::WouldBlock);
    let used = client.ticks() - ticks;
    assert!(used < 50, "{used} ticks for doing nothing");
    stdin.write_all(b"up").unwrap();
    assert_eq!(take(&mut stream, 2), b"up");
    stream.write_all(b"down").unwrap();
    assert_eq!(take(&mut stdout, 4), b"down");
}

#[test]
fn a_daemon_that_falls_silent_is_given_up() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let options = ["--ping-interval", "300ms", "--ping-timeout", "200ms"];
    let mut client = Connect::to(&daemon, target.port, &options);
    let _stdin = client.stdin();
    let mut stream = target.accept();
    daemon.logged(1, &["tunnel opened"]);
    daemon.signal(Signal::STOP);
    let stopped = Instant::now();
    client.broke("gave no sign of life for 500ms");
    assert!(stopped.elapsed() < Duration::from_secs(5));
    daemon.signal(Signal::CONT);
    assert_eq!(read_to_end(&mut stream), (Vec::new(), false));
}

#[test]
fn a_target_that_takes_nothing_is_not_taken_for_a_dead_daemon() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let options = ["--ping-interval", "100ms", "--ping-timeout", "100ms"];
    let mut client = Connect::to(&daemon, target.port, &options);
    let mut stream = target.accept();
    let mut stdin = client.stdin();
    let bytes = Random::new(3).bytes(30_000_000);
    let copy = bytes.clone();
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    let writer = thread::spawn(move || {
        for chunk in copy.chunks(10_000) {
            stdin.write_all(chunk).unwrap();
            count.fetch_add(chunk.len(), Ordering::SeqCst);
        }
    });
    let pings = Duration::from_secs(1);
    let mut last = (0, Instant::now());
    within(LIMIT, "every buffer is full for several pings", || {
        let now = taken.load(Ordering::SeqCst);
        if now != last.0 {
            last = (now, Instant::now());
        }
        (last.1.elapsed() > pings).then_some(())
    });
    assert!(read_to_end(&mut stream) == (bytes, true));
    writer.join().unwrap();
    drop(stream);
    assert_eq!(client.ended(), (0, String::new()));
}

// --- refusals -----------------------------------------------------------------------------------------

#[test]
fn a_refusal_is_shown_with_its_message() {
    let daemon = Daemon::start(&[]);
    let port = closed_port();
    let sentence = Connect::to(&daemon, port, &[]).broke(&format!(
        "refused with 502: cannot reach localhost:{port}: "
    ));
    assert!(sentence.contains("Connection refused"), "{sentence}");
    let mut client = Connect::to(&daemon, 1, &["--host", "a b"]);
    client.broke("refused with 400: ");
    let closed = Daemon::start_closed(&[]);
    Connect::to(&closed, port, &[]).broke("refused with 401: ");
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let url = format!("ws://127.0.0.1:{}", closed_port());
    let mut client = Connect::spawn(Connect::command(&url, &["--port", "1"]));
    client.broke("cannot connect to 127.0.0.1:");
}

#[test]
fn the_token_comes_from_the_environment_or_a_file() {
    let daemon = Daemon::start_closed(&[]);
    let target = Target::echo();
    let url = format!("ws://{}/?port={}", daemon.address, target.port);
    let mut command = Connect::command(&url, &[]);
    command.env("TUNNELD_ACCESS_TOKEN", TOKEN);
    command.env("RUST_LOG", "trace");
    let mut client = Connect::spawn(command);
    let mut stdin = client.stdin();
    stdin.write_all(b"hello").unwrap();
    assert_eq!(take(&mut client.stdout(), 5), b"hello");
    let arguments = std::fs::read(format!("/proc/{}/cmdline", client.child.id())).unwrap();
    assert!(!String::from_utf8(arguments).unwrap().contains(TOKEN));
    drop(stdin);
    let (code, stderr) = client.ended();
    assert!(code == 0 && !stderr.contains(TOKEN), "{stderr}");

    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    std::fs::write(&file, "\nwrong\n").unwrap();
    let mut client = Connect::to(
        &daemon,
        target.port,
        &[&["--access-token-file", path][..], &LOCAL].concat(),
    );
    let mut stream = client.dial();
    assert_eq!(read_to_end(&mut stream), (Vec::new(), false));
    client.logged("refused with 401");
    std::fs::write(&file, format!("\n{TOKEN}\nanother\n")).unwrap();
    let mut stream = client.dial();
    stream.write_all(b"hello").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut stream), (b"hello".to_vec(), true));
    client.signal(Signal::TERM);
    let (code, stderr) = client.ended();
    assert!(code == 0 && !stderr.contains(TOKEN), "{stderr}");
}

#[test]
fn wrong_options_are_one_line_and_exit_code_2() {
    for (arguments, part) in [
        (&["ws://localhost:1"][..], "--port"),
        (&["ws://localhost:1", "--port", "0"], "--port"),
        (&["ws://localhost:1?port=1", "--port", "1"], "--port 1"),
        (&["ftp://localhost", "--port", "1"], "ftp:"),
        (
            &["ws://a:s3cret@localhost", "--port", "1"],
            "TUNNELD_ACCESS_TOKEN",
        ),
        (&["--port", "1"], "URL"),
        (
            &["ws://localhost:1", "--port", "1", "--token", "x"],
            "--token",
        ),
        (
            &[
                "ws://localhost:1",
                "--port",
                "1",
                "--access-token-file",
                "/nonexistent",
            ],
            "/nonexistent",
        ),
        (
            &["ws://localhost:1", "--port", "1", "--ping-interval", "0s"],
            "at least 1ms",
        ),
    ] {
        let (code, stderr) = fails_to_start(Connect::command(arguments[0], &arguments[1..]));
        assert_eq!(
            (code, stderr.lines().count()),
            (2, 1),
            "{arguments:?}: {stderr}"
        );
        assert!(
            stderr.contains(part) && !stderr.contains("s3cret"),
            "{stderr}"
        );
    }
    let target = Target::listen();
    let taken = format!("127.0.0.1:{}", target.port);
    let options = ["--port", "1", "--listen", &taken];
    let (code, stderr) = fails_to_start(Connect::command("ws://localhost:1", &options));
    assert!(code == 2 && stderr.contains(&taken), "{stderr}");
}

#[test]
fn help_names_every_option_and_the_daemon_names_the_client() {
    let output = Connect::command("--help", &[]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    for part in [
        "--listen",
        "--access-token-file",
        "TUNNELD_ACCESS_TOKEN",
        "Exit codes",
    ] {
        assert!(help.contains(part), "{part} in {help}");
    }
    let output = Daemon::command(&["--help"]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(help.contains("tunneld connect --help"), "{help}");
}

// --- the local port -----------------------------------------------------------------------------------

#[test]
fn each_local_connection_has_a_tunnel_whose_directions_end_alone() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let client = Connect::to(&daemon, target.port, &LOCAL);
    let (mut first, mut second) = (client.dial(), client.dial());
    let mut targets = [target.accept(), target.accept()];
    first.write_all(b"first").unwrap();
    first.shutdown(Shutdown::Write).unwrap();
    second.write_all(b"other").unwrap();
    let mut head = take(&mut targets[0], 5);
    if head != b"first" {
        targets.swap(0, 1);
        assert_eq!(head, b"other");
        head = take(&mut targets[0], 5);
        assert_eq!(head, b"first");
    } else {
        assert_eq!(take(&mut targets[1], 5), b"other");
    }
    let [mut of_first, mut of_second] = targets;
    assert_eq!(read_to_end(&mut of_first), (Vec::new(), true));
    of_first.write_all(b"answer").unwrap();
    drop(of_first);
    assert_eq!(read_to_end(&mut first), (b"answer".to_vec(), true));
    of_second.write_all(b"early").unwrap();
    of_second.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut second), (b"early".to_vec(), true));
    second.write_all(b"late").unwrap();
    drop(second);
    assert_eq!(read_to_end(&mut of_second), (b"late".to_vec(), true));
    daemon.logged(2, &["tunnel closed", "closed in order"]);
    assert!(!client.log().contains("WARN"), "{}", client.log());
}

#[test]
fn a_broken_end_is_a_reset_on_the_other_side() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let client = Connect::to(&daemon, target.port, &LOCAL);
    let mut local = client.dial();
    reset(target.accept());
    assert_eq!(read_to_end(&mut local), (Vec::new(), false));
    client.logged("target failed: Connection reset by peer (os error 104) (close code 1011)");
    let local = client.dial();
    let mut stream = target.accept();
    reset(local);
    assert_eq!(read_to_end(&mut stream), (Vec::new(), false));
    client.logged("the local client failed: Connection reset by peer");
}

#[test]
fn a_refused_tunnel_is_a_reset_of_the_local_connection() {
    let daemon = Daemon::start(&[]);
    let client = Connect::to(&daemon, closed_port(), &LOCAL);
    let mut local = client.dial();
    assert_eq!(read_to_end(&mut local), (Vec::new(), false));
    client.logged("refused with 502: cannot reach localhost:");
}

#[test]
fn fifty_local_connections_at_once() {
    const COUNT: usize = 50;
    let daemon = Daemon::start(&[]);
    let client = Connect::to(&daemon, Target::echo().port, &LOCAL);
    let address = client.address();
    let idle = client.threads();
    let barrier = Arc::new(Barrier::new(COUNT));
    let one = |index: usize| {
        let barrier = Arc::clone(&barrier);
        thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            let bytes = Random::new(index as u64).bytes(100_000);
            stream.write_all(&bytes[..1]).unwrap();
            assert_eq!(take(&mut stream, 1), &bytes[..1]);
            barrier.wait();
            let mut writer = stream.try_clone().unwrap();
            let copy = bytes.clone();
            let writing = thread::spawn(move || {
                writer.write_all(&copy[1..]).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let (got, orderly) = read_to_end(&mut stream);
            writing.join().unwrap();
            orderly && got == bytes[1..]
        })
    };
    let threads: Vec<_> = (0..COUNT).map(one).collect();
    assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
    daemon.logged(COUNT, &["tunnel closed", "closed in order"]);
    within(LIMIT, "every thread has ended", || {
        (client.threads() <= idle).then_some(())
    });
    assert!(!client.log().contains("WARN"), "{}", client.log());
}

#[test]
fn one_connection_too_many_is_reset_and_its_place_comes_back() {
    let daemon = Daemon::start(&[]);
    let options = [&LOCAL[..], &["--max-connections", "1"]].concat();
    let client = Connect::to(&daemon, Target::echo().port, &options);
    let mut first = client.dial();
    first.write_all(b"x").unwrap();
    assert_eq!(take(&mut first, 1), b"x");
    assert_eq!(read_to_end(&mut client.dial()), (Vec::new(), false));
    client.logged("see --max-connections");
    drop(first);
    within(LIMIT, "the place is free", || {
        let mut next = client.dial();
        next.write_all(b"y").ok()?;
        let mut byte = [0];
        next.read_exact(&mut byte).ok()
    });
}

#[test]
fn a_signal_ends_the_local_port_and_what_is_open_looks_cut_off() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &LOCAL);
    let mut local = client.dial();
    let mut stream = target.accept();
    local.write_all(b"x").unwrap();
    assert_eq!(take(&mut stream, 1), b"x");
    client.signal(Signal::TERM);
    assert_eq!(client.ended().0, 0);
    assert_eq!(read_to_end(&mut local), (Vec::new(), false));
    assert_eq!(read_to_end(&mut stream), (Vec::new(), false));
}

#[test]
fn a_local_port_for_everyone_is_warned_about() {
    let options = ["--port", "1", "--listen", "0.0.0.0:0"];
    let client = Connect::spawn(Connect::command("ws://127.0.0.1:1", &options));
    client.logged("everyone who can connect to 0.0.0.0:");
}

// --- servers that are no tunneld ----------------------------------------------------------------------

/// Serves one connection: reads the request, answers with `behind` right behind the 101, and returns the
/// connection.
fn fake_server(behind: &'static [u8]) -> (String, JoinHandle<(TcpStream, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("ws://{}/x?port=1", listener.local_addr().unwrap());
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            head.push(char::from(take(&mut stream, 1)[0]));
        }
        let key = head
            .lines()
            .find_map(|line| line.strip_prefix("Sec-WebSocket-Key: "));
        let accept = tungstenite::handshake::derive_accept_key(key.unwrap().as_bytes());
        let mut answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
        )
        .into_bytes();
        answer.extend(behind);
        stream.write_all(&answer).unwrap();
        (stream, head)
    });
    (url, server)
}

#[test]
fn bytes_right_behind_the_101_are_not_lost() {
    let (url, server) = fake_server(b"\x82\x05early\x88\x02\x03\xe8");
    let mut client = Connect::spawn(Connect::command(&url, &[]));
    let _stdin = client.stdin();
    let (stream, head) = server.join().unwrap();
    assert!(head.starts_with("GET /x?port=1 HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("user-agent: tunneld/"), "{head}");
    assert!(!head.to_lowercase().contains("sec-websocket-protocol"));
    let mut stdout = client.stdout();
    assert_eq!(take(&mut stdout, 5), b"early");
    drop(stream);
    assert_eq!(client.ended(), (0, String::new()));
}

#[test]
fn what_is_no_tunnel_is_a_broken_end() {
    for (behind, part) in [
        (&b"\x81\x02hi"[..], "a text message"),
        (
            b"\x82\x7f\x00\x00\x00\x00\x7f\xff\xff\xff",
            "a message of more than 16 MiB",
        ),
        (b"\x82\x82\x00\x00\x00\x00hi", "broke the protocol"),
        (&[0xff; 20], "broke the protocol"),
        (b"\x82\x05earl", "without a Close"),
        (b"\x88\x00", "without saying why"),
        (b"\x88\x05\x03\xf3\x1b[m", "\\u{1b}[m (close code 1011)"),
    ] {
        let (url, server) = fake_server(behind);
        let mut client = Connect::spawn(Connect::command(&url, &[]));
        let _stdin = client.stdin();
        let (stream, _) = server.join().unwrap();
        if part == "without a Close" {
            drop(stream);
        }
        client.broke(part);
    }
}

#[test]
fn an_endless_refusal_is_read_to_a_bound_and_cannot_steer_a_terminal() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("ws://{}?port=1", listener.local_addr().unwrap());
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\n\r\n\x1b[2J");
        while stream.write_all(&[b'x'; 4096]).is_ok() {}
    });
    let mut client = Connect::spawn(Connect::command(&url, &[]));
    let sentence = client.broke("refused with 404: \\u{1b}[2Jxxx");
    assert!(sentence.len() < 70_000, "{}", sentence.len());
}

#[test]
fn a_silent_server_is_given_up_after_the_dial_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let options = ["--port", "1", "--dial-timeout", "300ms"];
    let mut client = Connect::spawn(Connect::command(&format!("ws://{address}"), &options));
    client.broke(&format!("no answer from {address} within 300ms"));
    // One that trickles its answer, too.
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut second, _) = listener.accept().unwrap();
        let _ = stream.shutdown(Shutdown::Both);
        let _ = second.write_all(b"HTTP/1.1 101 Switching Protocols\r\n");
        while second.write_all(b"X: y\r\n").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = stream.write_all(b"");
    });
    let mut client = Connect::spawn(Connect::command(&format!("ws://{address}"), &options));
    client.broke("");
}

/// Arguments that the client doesn't know must not become the daemon's.
#[test]
fn connect_is_the_client_only_in_the_first_place() {
    let (code, _) = fails_to_start(Daemon::command(&["--no-auth", "connect"]));
    assert_eq!(code, 2);
}
