//! The client: `tunneld connect`, between its own streams or its local port and the real daemon.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
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
            let text = name.to_string_lossy().to_lowercase();
            if text.starts_with("tunneld_") || text.ends_with("_proxy") {
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

    /// A client of `daemon` with these options.
    pub fn with(daemon: &Daemon, options: &[&str]) -> Connect {
        let url = format!("ws://{}", daemon.address);
        Connect::spawn(Connect::command(&url, options))
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

    /// Waits for a signal to end the process, and says which.
    pub fn killed_by(&mut self) -> Option<i32> {
        let child = &mut self.child;
        let status = within(LIMIT, "the client ends", || child.try_wait().unwrap());
        status.signal()
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
        listening_on(self.logged("listening on ")).unwrap()
    }

    /// The first addresses of `count` local ports, in the order of the log.
    pub fn addresses(&self, count: usize) -> Vec<SocketAddr> {
        within(LIMIT, &format!("{count} ports in {}", self.log()), || {
            let addresses: Vec<_> = self.log().lines().filter_map(listening_on).collect();
            (addresses.len() == count).then_some(addresses)
        })
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

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
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
    let stream = target.accept();
    // Before, the target's reset is an answer: 502.
    daemon.logged(1, &["tunnel opened"]);
    reset(stream);
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
fn with_no_close_the_end_of_stdin_ends_nothing() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    for option in ["-n", "--no-close"] {
        let mut client = Connect::to(&daemon, target.port, &[option]);
        let mut stream = target.accept();
        client.stdin().write_all(b"request").unwrap();
        assert_eq!(take(&mut stream, 7), b"request");
        stream
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        stream.write_all(b"answer").unwrap();
        drop(stream);
        assert_eq!(client.rest(), b"answer");
        assert_eq!(client.ended(), (0, String::new()));
    }
    daemon.logged(2, &["tunnel closed", "closed in order"]);
    // A hangup is an end, and a reset is one.
    let mut client = Connect::to(&daemon, target.port, &["-n"]);
    let mut stream = target.accept();
    drop(client.stdin());
    within(LIMIT, "the tunnel is open", || {
        catches(client.pid(), Signal::HUP).then_some(())
    });
    client.signal(Signal::HUP);
    assert_eq!(read_to_end(&mut stream), (Vec::new(), true));
    drop(stream);
    assert_eq!(client.ended().0, 0);
    let mut client = Connect::to(&daemon, target.port, &["-n"]);
    drop(client.stdin());
    let stream = target.accept();
    daemon.logged(4, &["tunnel opened"]);
    reset(stream);
    client.broke("target failed");
    crate::forward::is_wrong(&["-L", "80", "-n"], "-n is about the end of stdin");
}

#[test]
fn on_a_terminal_it_says_once_how_to_use_it() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let daemon = Daemon::start(&[]);
    let port = Target::echo().port;
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let stdin = std::fs::File::options()
        .read(true)
        .open(name.to_str().unwrap())
        .unwrap();
    let spawn = |options: &[&str]| {
        let port = port.to_string();
        let options = [&["-W", &port], options].concat();
        let mut command = Connect::command(&format!("ws://{}", daemon.address), &options);
        command
            .stdin(stdin.try_clone().unwrap())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        rustix::io::write(&terminal, b"hello\n\x04").unwrap();
        assert_eq!(take(child.stdout.as_mut().unwrap(), 6), b"hello\n");
        child
    };
    let says = |stderr: &str, key: &str| {
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        let parts = [
            format!("connected to localhost:{port}"),
            format!("and {key} ends it"),
            format!("use -L {port}:localhost:{port}"),
        ];
        assert!(parts.iter().all(|part| stderr.contains(part)), "{stderr}");
    };
    let output = spawn(&[]).wait_with_output().unwrap();
    assert!(output.status.success());
    let stderr = String::from_utf8(output.stderr).unwrap();
    says(&stderr, "Ctrl-D at the beginning of a line");
    let mut child = spawn(&["-n"]);
    let mut line = String::new();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    stderr.read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    says(&line, "Ctrl-C");
}

/// ssh ends its ProxyCommand so, after each healthy session.
#[test]
fn a_hangup_is_the_end_of_stdin() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &[]);
    let mut stream = target.accept();
    let mut stdin = client.stdin();
    stdin.write_all(b"last words").unwrap();
    assert_eq!(take(&mut stream, 10), b"last words");
    client.signal(Signal::HUP);
    assert_eq!(read_to_end(&mut stream), (Vec::new(), true));
    stream.write_all(b"answer").unwrap();
    drop(stream);
    assert_eq!(take(&mut client.stdout(), 6), b"answer");
    assert_eq!(client.ended(), (0, String::new()));
    daemon.logged(1, &["tunnel closed", "end=orderly"]);
}

/// The target has closed, and the daemon is about to say so: what the shell sees must not be success.
#[test]
fn an_upload_that_is_cut_short_is_a_broken_end_within_a_second() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Connect::to(&daemon, target.port, &[]);
    let mut stream = target.accept();
    let mut stdin = client.stdin();
    let writing = thread::spawn(move || while stdin.write_all(&[b'y'; 10_000]).is_ok() {});
    take(&mut stream, 10);
    stream.write_all(b"enough").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(take(&mut client.stdout(), 6), b"enough");
    drop(stream);
    client.broke("not every byte could be sent: ");
    writing.join().unwrap();
    daemon.logged(1, &["tunnel closed", "end=upload_cut_short"]);
}

#[test]
fn an_upload_is_not_complete_before_the_server_has_closed_behind_it() {
    for (how, part) in [
        ("eof", "not every byte could be sent"),
        ("reset", "not every byte could be sent"),
    ] {
        let (url, server) = fake_server(b"\x82\x05hello\x88\x02\x03\xe8");
        let mut client = Connect::spawn(Connect::command(&url, &[]));
        let (stream, _) = server.join().unwrap();
        let mut stdin = client.stdin();
        assert_eq!(take(&mut client.stdout(), 5), b"hello");
        // Never idle, so the upload goes on.
        let writing = thread::spawn(move || while stdin.write_all(&[b'y'; 1000]).is_ok() {});
        take(&mut stream.try_clone().unwrap(), 50_000);
        match how {
            "eof" => stream.shutdown(Shutdown::Write).unwrap(),
            _ => reset(stream),
        }
        client.broke(part);
        writing.join().unwrap();
    }
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
fn after_its_own_end_the_client_waits_for_as_long_as_the_daemon_is_there() {
    let daemon = Daemon::start(&["--linger", "100ms"]);
    let target = Target::listen();
    let options = [
        "--linger",
        "100ms",
        "--ping-interval",
        "50ms",
        "--ping-timeout",
        "50ms",
    ];
    let mut client = Connect::to(&daemon, target.port, &options);
    let mut stream = target.accept();
    drop(client.stdin());
    assert_eq!(read_to_end(&mut stream), (Vec::new(), true));
    // Many lingers and ping timeouts.
    thread::sleep(Duration::from_secs(1));
    stream.write_all(b"answer").unwrap();
    drop(stream);
    assert_eq!(client.rest(), b"answer");
    assert_eq!(client.ended(), (0, String::new()));
    daemon.logged(1, &["tunnel closed", "end=orderly"]);
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
    client.broke("the server gave no sign of life, nor answered a ping");
    assert!(stopped.elapsed() < Duration::from_secs(5));
    daemon.signal(Signal::CONT);
    assert_eq!(read_to_end(&mut stream), (Vec::new(), false));
}

#[test]
fn a_daemon_that_falls_silent_behind_the_targets_end_is_given_up_too() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let options = ["--ping-interval", "300ms", "--ping-timeout", "200ms"];
    let client = Connect::to(&daemon, target.port, &[&LOCAL[..], &options].concat());
    let mut local = client.dial();
    let stream = target.accept();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(local.read(&mut [0]).unwrap(), 0);
    daemon.signal(Signal::STOP);
    client.logged("the server gave no sign of life, nor answered a ping");
    daemon.signal(Signal::CONT);
}

#[test]
fn a_target_that_takes_nothing_is_not_taken_for_a_dead_daemon() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let options = ["--ping-interval", "100ms", "--ping-timeout", "2s"];
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
    let held = closed_port();
    let port = held.port;
    let sentence = Connect::to(&daemon, port, &[]).broke(&format!(
        "refused with 502: cannot reach localhost:{port}: "
    ));
    assert!(sentence.contains("Connection refused"), "{sentence}");
    let url = format!("ws://{}/?port=1&host=a%20b", daemon.address);
    Connect::spawn(Connect::command(&url, &[])).broke("refused with 400: ");
    let closed = Daemon::start_closed(&[]);
    Connect::to(&closed, port, &[]).broke("refused with 401: ");
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let closed = closed_port();
    let url = format!("ws://127.0.0.1:{}", closed.port);
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
    std::fs::write(&file, format!("\n{TOKEN}\n")).unwrap();
    let mut client = Connect::to(
        &daemon,
        target.port,
        &[&["--access-token-file", path][..], &LOCAL].concat(),
    );
    client.address();
    std::fs::write(&file, "\nwrong\n").unwrap();
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
fn headers_go_with_the_request_and_the_token_as_a_bearers() {
    let asked = |options: &[&str], token: Option<&str>| {
        let (url, server) = serve_one(|stream, _| {
            stream.write_all(b"HTTP/1.1 400 x\r\n\r\n").unwrap();
        });
        let mut command = Connect::command(&url, options);
        if let Some(token) = token {
            command.env("TUNNELD_ACCESS_TOKEN", token);
        }
        let client = Connect::spawn(command);
        let (_, head) = server.join().unwrap();
        drop(client);
        head
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "CF-Access-Client-Secret: from a file\n").unwrap();
    let from_file = format!("@{}", file.path().display());
    let head = asked(
        &[
            "-H",
            "host: edge.example",
            "-HX-Id:7",
            "-H",
            &from_file,
            "-H",
            "User-Agent: me",
        ],
        Some(TOKEN),
    );
    for line in [
        "host: edge.example",
        "X-Id: 7",
        "CF-Access-Client-Secret: from a file",
        "User-Agent: me",
    ] {
        assert_eq!(
            head.matches(&format!("\r\n{line}\r\n")).count(),
            1,
            "{line} in {head}"
        );
    }
    assert_eq!(
        head.to_lowercase().matches("\r\nhost: ").count(),
        1,
        "{head}"
    );
    assert_eq!(head.matches("User-Agent").count(), 1, "{head}");
    assert!(
        head.contains(&format!("\r\nX-Access-Token: {TOKEN}\r\n")),
        "{head}"
    );
    let head = asked(&["--bearer"], Some(TOKEN));
    assert!(
        head.contains(&format!("\r\nAuthorization: Bearer {TOKEN}\r\n")),
        "{head}"
    );
    assert!(!head.contains("X-Access-Token"), "{head}");
    // The daemon takes it.
    let daemon = Daemon::start_closed(&[]);
    let mut command = Connect::command(
        &format!("ws://{}", daemon.address),
        &["-W", &Target::echo().port.to_string(), "--bearer"],
    );
    command.env("TUNNELD_ACCESS_TOKEN", TOKEN);
    let mut client = Connect::spawn(command);
    client.stdin().write_all(b"hello").unwrap();
    assert_eq!(client.rest(), b"hello");
}

#[test]
fn a_value_of_a_header_is_not_shown() {
    for header in ["X-Key: s3cret-value", "Authorization: Basic s3cret-value"] {
        let (url, server) = serve_one(|stream, _| {
            stream
                .write_all(b"HTTP/1.1 400 x\r\n\r\nyou said s3cret-value")
                .unwrap();
        });
        let mut client = Connect::spawn(Connect::command(&url, &["-H", header]));
        drop(server.join().unwrap());
        let sentence = client.broke("(a header's value)");
        assert!(!sentence.contains("s3cret"), "{sentence}");
    }
    for options in [
        &["-H", "s3cret"][..],
        &["-H", "Connection: s3cret"],
        &["-H", "X-Access-Token: s3cret"],
        &["-H", "@/nonexistent"],
    ] {
        crate::forward::is_wrong(&[&["-W", "1"], options].concat(), "header");
    }
    crate::forward::is_wrong(&["-W", "1", "--bearer"], "TUNNELD_ACCESS_TOKEN");
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
    let mut command = Connect::command("ws://localhost:1", &["--port", "1"]);
    command.env("TUNNELD_ACCESS_TOKEN", "");
    let (code, stderr) = fails_to_start(command);
    assert!(
        code == 2 && stderr.contains("TUNNELD_ACCESS_TOKEN is empty"),
        "{stderr}"
    );
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
    let stream = target.accept();
    client.logged("tunnel opened: id=0");
    reset(stream);
    assert_eq!(read_to_end(&mut local), (Vec::new(), false));
    client.logged("target failed: Connection reset by peer (os error 104) (close code 1011)");
    let local = client.dial();
    let mut stream = target.accept();
    client.logged("tunnel opened: id=1");
    reset(local);
    assert_eq!(read_to_end(&mut stream), (Vec::new(), false));
    client.logged("the local client failed: Connection reset by peer");
}

/// As over TCP, though neither the client nor the daemon can send anything more to the next.
#[test]
fn a_local_reset_comes_through_an_upload_that_the_target_does_not_take() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    for protocol in ["websocket", "connect-tcp"] {
        let options = [&LOCAL[..], &["--protocol", protocol]].concat();
        let client = Connect::to(&daemon, target.port, &options);
        let mut local = client.dial();
        let stream = target.accept();
        local
            .set_write_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        while local.write(&[7; 50_000]).is_ok() {}
        reset(local);
        // Nothing is read, so only an error tells.
        within(LIMIT, "the target is reset", || {
            let error = stream.take_error().unwrap();
            error.map(|error| assert_eq!(error.kind(), ErrorKind::ConnectionReset))
        });
        client.logged("the local client failed: Connection reset by peer");
    }
}

#[test]
fn a_local_client_learns_within_a_second_that_its_target_has_closed() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let client = Connect::to(&daemon, target.port, &LOCAL);
    let mut waited = [Duration::ZERO; 10];
    for waited in &mut waited {
        let mut local = client.dial();
        let stream = target.accept();
        drop(stream);
        // Its end first, and then, to whoever goes on writing, an error.
        assert_eq!(local.read(&mut [0]).unwrap(), 0);
        let start = Instant::now();
        while local.write_all(&[7; 1000]).is_ok() {
            thread::sleep(Duration::from_millis(1));
        }
        *waited = start.elapsed();
    }
    // A machine that stands still for a moment delays one of them, not most; the linger would be 30 s.
    waited.sort();
    assert!(waited[5] < Duration::from_secs(1), "{waited:?}");
    assert!(waited[9] < Duration::from_secs(15), "{waited:?}");
}

/// It has written, sent its FIN and closed, and the target talks all the while.
#[test]
fn what_lies_in_the_local_connection_is_read_on_whatever_happens_to_the_other_direction() {
    let mut command = Daemon::command(&[]);
    command.env("RUST_LOG", "debug");
    let daemon = Daemon::spawn(command);
    let target = Target::listen();
    let client = Connect::to(&daemon, target.port, &LOCAL);
    for run in 0..60 {
        // No more than what the system takes at once: its own close loses what it has not sent.
        let up = Random::new(run).bytes(1 + 500 * run as usize);
        let mut local = client.dial();
        let mut stream = target.accept();
        let mut talker = stream.try_clone().unwrap();
        let talking = thread::spawn(move || while talker.write_all(&[1; 1000]).is_ok() {});
        local.write_all(&up).unwrap();
        local.shutdown(Shutdown::Write).unwrap();
        drop(local);
        let (bytes, orderly) = read_to_end(&mut stream);
        assert!(
            bytes == up && orderly,
            "run {run}: {} of {}, {orderly}",
            bytes.len(),
            up.len()
        );
        talking.join().unwrap();
    }
}

/// psql over TLS does so: the server resets behind the client's end, and nothing is wrong.
#[test]
fn a_reset_behind_the_local_clients_end_is_no_warning() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let client = Connect::to(&daemon, target.port, &LOCAL);
    let local = client.dial();
    let mut stream = target.accept();
    local.shutdown(Shutdown::Write).unwrap();
    assert!(read_to_end(&mut stream).1);
    reset(stream);
    daemon.logged(1, &["tunnel closed", "end=target_failed_after_close"]);
    assert!(!read_to_end(&mut { local }).1);
    assert!(!client.log().contains("WARN"), "{}", client.log());
}

#[test]
fn a_refused_tunnel_is_a_reset_of_the_local_connection() {
    let daemon = Daemon::start(&[]);
    let closed = closed_port();
    let client = Connect::to(&daemon, closed.port, &LOCAL);
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
fn the_soft_limit_of_descriptors_is_raised_before_the_ports_are_bound() {
    let command = Connect::command("ws://127.0.0.1:1", &["-L", "127.0.0.1:0:1"].repeat(40));
    let client = Connect::spawn(with_limits(&["--nofile=48:256"], &command));
    client.addresses(40);
    client.logged("WARN  tunneld::limits");
    client.logged("256 descriptors allow 45 connections instead of 512: raise RLIMIT_NOFILE");
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

/// What a client with a token, or without, says before it listens, but that its daemon isn't there.
fn said_before_listening(url: &str, listen: &str, token: Option<&str>) -> String {
    let options = ["--port", "1", "--listen", listen, "--dial-timeout", "100ms"];
    let mut command = Connect::command(url, &options);
    if let Some(token) = token {
        command.env("TUNNELD_ACCESS_TOKEN", token);
    }
    let client = Connect::spawn(command);
    client.address();
    let log = client.log();
    let (said, _) = log.split_once("listening on ").unwrap();
    let (said, _) = said.rsplit_once('[').unwrap();
    let lines = said.lines().filter(|line| !line.contains("not there yet"));
    lines.collect()
}

#[test]
fn a_local_port_that_lends_a_token_or_is_not_local_says_so() {
    let (here, everywhere) = ("127.0.0.1:0", "0.0.0.0:0");
    let url = if cfg!(feature = "tls") {
        "wss://box.example"
    } else {
        "ws://box.example"
    };
    let local = "ws://localhost:1";
    assert_eq!(said_before_listening(local, here, None), "");
    assert_eq!(said_before_listening("ws://192.0.2.1", here, None), "");
    let line = said_before_listening(local, here, Some(TOKEN));
    assert!(
        line.contains("every user of this machine and every web page"),
        "{line}"
    );
    assert!(line.contains("your access token"), "{line}");
    let line = said_before_listening(url, everywhere, None);
    assert!(
        line.contains("everyone who can connect to 0.0.0.0:"),
        "{line}"
    );
    assert!(!line.contains("token"), "{line}");
    let line = said_before_listening(local, everywhere, Some(TOKEN));
    assert!(
        line.contains("everyone who can connect to 0.0.0.0:"),
        "{line}"
    );
    assert!(line.contains("your access token"), "{line}");
}

#[test]
fn a_token_that_crosses_a_network_in_the_clear_is_warned_about() {
    let is_warned = |url: &str, token| {
        let said = said_before_listening(url, "127.0.0.1:0", token);
        assert!(!said.contains(TOKEN), "{said}");
        said.contains(" unencrypted,")
    };
    for url in [
        "ws://192.0.2.1:80",
        "ws://box.example",
        "http://[2001:db8::1]",
    ] {
        assert!(is_warned(url, Some(TOKEN)), "{url}");
        assert!(!is_warned(url, None), "{url}");
    }
    for url in [
        "ws://localhost:1",
        "ws://127.0.0.2",
        "ws://[::1]",
        "ws://[::ffff:127.0.0.1]",
    ] {
        assert!(!is_warned(url, Some(TOKEN)), "{url}");
    }
    if cfg!(feature = "tls") {
        assert!(!is_warned("wss://box.example", Some(TOKEN)));
    }
    // Without --listen it is one line before everything else.
    let mut command = Connect::command("ws://192.0.2.1", &["--port", "1", "--dial-timeout", "1ms"]);
    command.env("TUNNELD_ACCESS_TOKEN", TOKEN);
    let (code, stderr) = Connect::spawn(command).ended();
    assert_eq!((code, stderr.lines().count()), (1, 2), "{stderr}");
    assert!(
        stderr.lines().next().unwrap().contains(" unencrypted,"),
        "{stderr}"
    );
}

// --- servers that are no tunneld ----------------------------------------------------------------------

/// Serves one connection: reads the request, has `answer` written with the value of its Sec-WebSocket-Accept, and
/// returns the connection and the request's head.
fn serve_one(
    answer: impl FnOnce(&mut TcpStream, &str) + Send + 'static,
) -> (String, JoinHandle<(TcpStream, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("ws://{}/x?port=1", listener.local_addr().unwrap());
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            head.push(char::from(take(&mut stream, 1)[0]));
        }
        let key = head
            .lines()
            .find_map(|line| line.strip_prefix("Sec-WebSocket-Key: "));
        let accept = tungstenite::handshake::derive_accept_key(key.unwrap().as_bytes());
        answer(&mut stream, &accept);
        (stream, head)
    });
    (url, server)
}

/// The head of a 101 with these lines besides.
pub fn head_101(accept: &str, lines: &str) -> String {
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n{lines}\r\n\r\n"
    )
}

/// Serves one connection with `behind` right behind the 101.
fn fake_server(behind: &'static [u8]) -> (String, JoinHandle<(TcpStream, String)>) {
    serve_one(move |stream, accept| {
        let head = head_101(accept, "Connection: Upgrade");
        stream
            .write_all(&[head.as_bytes(), behind].concat())
            .unwrap();
    })
}

/// What a client with [`TOKEN`] says of a server that gives this answer and closes.
fn refused(answer: impl AsRef<[u8]> + Send + 'static) -> String {
    let (url, server) = serve_one(move |stream, _| stream.write_all(answer.as_ref()).unwrap());
    let mut command = Connect::command(&url, &[]);
    command.env("TUNNELD_ACCESS_TOKEN", TOKEN);
    let mut client = Connect::spawn(command);
    drop(server.join().unwrap());
    let sentence = client.broke("");
    sentence
        .trim_end()
        .replace(&url[5..url.len() - 9], "SERVER")
}

#[test]
fn bytes_right_behind_the_101_are_not_lost() {
    let (url, server) = fake_server(b"\x82\x05early\x88\x02\x03\xe8");
    let mut client = Connect::spawn(Connect::command(&url, &[]));
    let _stdin = client.stdin();
    let (stream, head) = server.join().unwrap();
    assert!(head.starts_with("GET /x?port=1 HTTP/1.1\r\n"), "{head}");
    let version = concat!("User-Agent: tunneld/", env!("CARGO_PKG_VERSION"), "\r\n");
    assert!(head.contains(version), "{head}");
    assert!(!head.to_lowercase().contains("sec-websocket-protocol"));
    let mut stdout = client.stdout();
    assert_eq!(take(&mut stdout, 5), b"early");
    // Stdin is idle, so the client sends its Close, and sees the server close the connection.
    let mut stream = stream;
    assert_eq!(take(&mut stream, 8)[..2], [0x88, 0x82]);
    drop(stream);
    assert_eq!(client.ended(), (0, String::new()));
}

/// A proxy that sees a FIN may close both of its connections, with bytes of the upload on their way.
#[test]
fn behind_both_ends_it_is_the_server_that_closes_the_connection() {
    let (url, server) = fake_server(b"\x88\x02\x03\xe8");
    let mut client = Connect::spawn(Connect::command(&url, &[]));
    let (mut stream, _) = server.join().unwrap();
    assert_eq!(take(&mut stream, 8)[..2], [0x88, 0x82]);
    stream
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(client.ended(), (0, String::new()));
}

#[test]
fn a_server_that_leaves_the_connection_open_has_not_shown_that_the_upload_arrived() {
    let (url, server) = fake_server(b"\x88\x02\x03\xe8");
    let mut client = Connect::spawn(Connect::command(&url, &["--linger", "300ms"]));
    let (mut stream, _) = server.join().unwrap();
    assert_eq!(take(&mut stream, 8)[..2], [0x88, 0x82]);
    // A ping is a sign of life.
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(100));
        stream.write_all(b"\x89\x00").unwrap();
        assert_eq!(take(&mut stream, 6)[..2], [0x8a, 0x80]);
    }
    client.broke("the server did not close its connection behind both ends");
}

/// Message boundaries mean nothing, not even a last one that is missing.
#[test]
fn bytes_of_an_unfinished_message_are_not_lost() {
    let (url, server) = fake_server(b"\x02\x05early\x88\x02\x03\xe8");
    let mut client = Connect::spawn(Connect::command(&url, &[]));
    let _stdin = client.stdin();
    let (stream, _) = server.join().unwrap();
    assert_eq!(take(&mut client.stdout(), 5), b"early");
    let mut stream = stream;
    assert_eq!(take(&mut stream, 8)[..2], [0x88, 0x82]);
    drop(stream);
    assert_eq!(client.ended(), (0, String::new()));
}

#[test]
fn what_is_no_tunnel_is_a_broken_end() {
    for (behind, part) in [
        (&b"\x81\x02hi"[..], "a text message"),
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
fn a_refusal_in_any_version_of_http_is_told() {
    for (answer, sentence) in [
        (
            "HTTP/1.0 503 Service Unavailable\r\nConnection: close\r\n\r\ncome back later\n",
            "tunneld: refused with 503: come back later",
        ),
        (
            "HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
            "tunneld: refused with 503 Service Unavailable",
        ),
        (
            "HTTP/1.1 204\r\n\r\n",
            "tunneld: answered without an upgrade, with 204",
        ),
        (
            "HTTP/2 400\r\n\r\n",
            "tunneld: SERVER does not speak HTTP/1.1: it answered HTTP/2 400",
        ),
        (
            "SSH-2.0-OpenSSH_9.2\r\nmore",
            "tunneld: SERVER does not speak HTTP/1.1: it answered SSH-2.0-OpenSSH_9.2",
        ),
    ] {
        assert_eq!(refused(answer), sentence, "{answer}");
    }
}

#[test]
fn a_refusal_is_readable_text_on_one_line() {
    for (answer, sentence) in [
        (
            "HTTP/1.1 404 Not Found\r\nContent-Length: 23\r\n\r\nno such\r\n\r\n   tunnel\n!!behind it",
            "refused with 404: no such tunnel !!",
        ),
        (
            "HTTP/1.1 502 Bad Gateway\r\ntransfer-encoding: Chunked\r\n\r\n8\r\nno answe\r\n6;a=b\r\nr from\r\n4\r\n app\r\n0\r\n\r\n",
            "refused with 502: no answer from app",
        ),
        (
            "HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{\"\r\n14\r\nmessage\":\"no app\"}  \r\n0\r\n\r\n",
            "refused with 502: no app",
        ),
        (
            "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1></center>",
            "refused with 502: 502 Bad Gateway",
        ),
        (
            "HTTP/1.1 403 Forbidden\r\nContent-Type: text/html\r\n\r\n<p>Not from\n<b>here</b> &amp; now</p>",
            "refused with 403: Not from here & now",
        ),
    ] {
        assert_eq!(refused(answer), format!("tunneld: {sentence}"), "{answer}");
    }
}

#[test]
fn a_redirect_is_shown_and_not_followed() {
    let (url, server) = serve_one(|stream, _| {
        let host = stream.local_addr().unwrap();
        let answer =
            format!("HTTP/1.1 308 Permanent Redirect\r\nLocation: https://{host}/x?port=1\r\n\r\n");
        stream.write_all(answer.as_bytes()).unwrap();
    });
    let mut client = Connect::spawn(Connect::command(&url, &[]));
    drop(server.join().unwrap());
    client.broke(&format!(
        "; use wss{}\n",
        url.strip_prefix("ws")
            .unwrap()
            .strip_suffix("?port=1")
            .unwrap()
    ));
    for status in [301, 302, 303, 307] {
        let sentence = refused(format!(
            "HTTP/1.1 {status} Moved\r\nLocation: https://login.example/\x3fnext={TOKEN}\r\n\r\n"
        ));
        assert_eq!(
            sentence,
            format!(
                "tunneld: refused with {status}: a redirect to https://login.example/?next=(the token); redirects are not followed, use the daemon's own URL"
            )
        );
    }
}

#[test]
fn a_101_in_any_lawful_form_is_taken() {
    for (before, lines) in [
        ("", "Connection: Upgrade, Keep-Alive"),
        ("", "connection: keep-alive\r\nCONNECTION: close ,uPGRADE"),
        ("HTTP/1.1 100 Continue\r\n\r\n", "Connection: Upgrade"),
        (
            "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n",
            "Connection: Upgrade\r\nSec-WebSocket-Extensions: ",
        ),
    ] {
        let (url, server) = serve_one(move |stream, accept| {
            let heads = [before, &head_101(accept, lines)].concat();
            let answer = [heads.as_bytes(), b"\x82\x02hi\x88\x02\x03\xe8"].concat();
            // Byte by byte, each a packet of its own.
            for byte in answer.chunks(1) {
                stream.write_all(byte).unwrap();
            }
        });
        let mut client = Connect::spawn(Connect::command(&url, &[]));
        drop(client.stdin());
        assert_eq!(take(&mut client.stdout(), 2), b"hi", "{lines}");
        let (mut stream, _) = server.join().unwrap();
        assert_eq!(take(&mut stream, 8)[..2], [0x88, 0x82]);
        drop(stream);
        assert_eq!(client.ended(), (0, String::new()), "{lines}");
    }
}

#[test]
fn a_101_to_something_else_is_refused() {
    let upgrade = "Connection: Upgrade";
    for (answer, part) in [
        (head_101("ACCEPT", ""), "lacks Connection: Upgrade"),
        (
            head_101("ACCEPT", "Connection: keep-alive"),
            "lacks Connection: Upgrade",
        ),
        (
            head_101("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", upgrade),
            "Sec-WebSocket-Accept does not match",
        ),
        (
            head_101("ACCEPT", upgrade).replace("Sec-WebSocket-Accept", "X"),
            "Sec-WebSocket-Accept does not match",
        ),
        (
            head_101("ACCEPT", upgrade).replace(": websocket", ": h2c"),
            "its 101 switches to h2c",
        ),
        (
            head_101("ACCEPT", upgrade).replace("Upgrade: websocket\r\n", ""),
            "names no protocol",
        ),
        (
            head_101(
                "ACCEPT",
                &format!("{upgrade}\r\nSec-WebSocket-Extensions: permessage-deflate; x=1, y"),
            ),
            "the extension permessage-deflate; x=1, which was not requested",
        ),
        (
            head_101(
                "ACCEPT",
                &format!("{upgrade}\r\nSec-WebSocket-Protocol: binary"),
            ),
            "the subprotocol binary, which was not requested",
        ),
        (
            "HTTP/1.1 100 Continue\r\n\r\n".repeat(100),
            "keeps sending interim responses",
        ),
        (
            format!("HTTP/1.1 101 x\r\nX: {}", "x".repeat(40_000)),
            "a head of more than 32 KiB",
        ),
        (
            "HTTP/1.1 101 Switching".into(),
            "closed the connection before its answer was complete",
        ),
        ("HTTP/1.1 1001\r\n\r\n".into(), "a malformed HTTP head"),
        (
            String::new(),
            "closed the connection without an answer: is it a TLS port (wss://)",
        ),
        (
            "\u{15}\u{3}\u{1}\u{0}\u{2}\u{2}\u{46}".into(),
            "answered with TLS: use wss://",
        ),
    ] {
        let (url, server) = serve_one(move |stream, accept| {
            let _ = stream.write_all(answer.replace("ACCEPT", accept).as_bytes());
        });
        let mut client = Connect::spawn(Connect::command(&url, &[]));
        drop(server.join().unwrap());
        client.broke(part);
    }
}

#[test]
fn the_token_is_masked_in_whatever_a_server_says() {
    let encoded: String = TOKEN.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let json: String = TOKEN
        .chars()
        .map(|c| format!("\\u{:04x}", u32::from(c)))
        .collect();
    for echo in [
        TOKEN.to_owned(),
        encoded,
        json,
        // Where its beginning is the last that would be shown.
        format!("{}{TOKEN}", "x".repeat(485)),
        // Where the server has cut it.
        TOKEN[..TOKEN.len() - 1].to_owned(),
    ] {
        let sentence = refused(format!("HTTP/1.1 400 Bad Request\r\n\r\nyou said {echo}"));
        let shown = sentence.replace("(the token)", "*");
        assert!(sentence.contains("(the token)"), "{sentence}");
        assert!(
            !shown.contains(&TOKEN[..4]) && !shown.contains("%74") && !shown.contains("u0074"),
            "{sentence}"
        );
        let (url, server) = serve_one(move |stream, accept| {
            let head = head_101(accept, "Connection: Upgrade");
            let reason = &echo[echo.len().saturating_sub(100)..];
            let length = u8::try_from(reason.len() + 2).unwrap();
            let frame = [&[0x88, length, 0x03, 0xf3], reason.as_bytes()].concat();
            stream
                .write_all(&[head.as_bytes(), &frame].concat())
                .unwrap();
        });
        let mut command = Connect::command(&url, &[]);
        command.env("TUNNELD_ACCESS_TOKEN", TOKEN);
        let mut client = Connect::spawn(command);
        let _stdin = client.stdin();
        drop(server.join().unwrap());
        client.broke("(the token) (close code 1011)");
    }
    let answer = format!("HTTP/1.1 418 {TOKEN}\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(refused(answer), "tunneld: refused with 418 (the token)");
    let answer = format!("{TOKEN}\r\n");
    assert!(refused(answer).ends_with("it answered (the token)"));
}

#[test]
fn a_silent_server_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let options = ["--port", "1", "--dial-timeout", "100ms"];
    let mut client = Connect::spawn(Connect::command(&format!("ws://{address}"), &options));
    client.broke(&format!(
        "no answer from {address} within 300ms, 3 times --dial-timeout"
    ));
    // One that trickles its answer, too.
    thread::spawn(move || {
        let (_silent, _) = listener.accept().unwrap();
        let (mut second, _) = listener.accept().unwrap();
        let _ = second.write_all(b"HTTP/1.1 101 Switching Protocols\r\n");
        while second.write_all(b"X: y\r\n").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let mut client = Connect::spawn(Connect::command(&format!("ws://{address}"), &options));
    client.broke(&format!("no answer from {address} within 300ms"));
}

/// A port whose listener takes no more connections: the kernel drops what comes.
pub fn port_that_drops_syns() -> (TcpListener, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        queued.push(stream);
    }
    (listener, queued)
}

#[test]
fn a_target_that_never_answers_is_told_by_the_daemon_with_equal_dial_timeouts() {
    let timeout = ["--dial-timeout", "500ms"];
    let daemon = Daemon::start(&timeout);
    let (target, _queued) = port_that_drops_syns();
    let port = target.local_addr().unwrap().port();
    let options = [&timeout[..], &["--host", "127.0.0.1"]].concat();
    let mut client = Connect::to(&daemon, port, &options);
    client.broke(&format!(
        "refused with 502: cannot reach 127.0.0.1:{port}: "
    ));
}

/// Arguments that the client doesn't know must not become the daemon's.
#[test]
fn connect_is_the_client_only_in_the_first_place() {
    let (code, _) = fails_to_start(Daemon::command(&["--no-auth", "connect"]));
    assert_eq!(code, 2);
}
