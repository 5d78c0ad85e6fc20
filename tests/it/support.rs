//! The words the tests are written in: a real daemon on a free port, real targets, and a WebSocket client
//! that does exactly what it is told, right or wrong.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, ErrorKind, PipeReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Socket, Type};

/// The limit of every wait in the tests. Generous: it is only reached when something is wrong.
pub const LIMIT: Duration = Duration::from_secs(30);

pub const TOKEN: &str = "s3cret-t0ken";

/// Waits until `condition` gives a value.
pub fn within<T>(limit: Duration, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Says that the running test can't be run here and for want of what; it is to return then. To cargo it passes, so that
/// `scripts/test.sh` names a file in which the skipped ones are counted.
pub fn skip(needs: &str) {
    let line = format!(
        "{}: needs {needs}\n",
        thread::current().name().unwrap_or("a test")
    );
    print!("skipped {line}");
    if let Some(path) = std::env::var_os("TUNNELD_TEST_SKIPS") {
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
}

/// A running daemon. It is killed when dropped.
pub struct Daemon {
    child: Child,
    pub address: SocketAddr,
    log: Arc<Mutex<String>>,
}

impl Daemon {
    /// An open daemon with these options.
    pub fn start(options: &[&str]) -> Daemon {
        Daemon::spawn(Daemon::command(options))
    }

    /// A daemon that wants [`TOKEN`].
    pub fn start_closed(options: &[&str]) -> Daemon {
        let mut command = Daemon::command(options);
        command.env("TUNNELD_ACCESS_TOKEN", TOKEN);
        Daemon::spawn(command)
    }

    /// An open daemon in a mount namespace of its own, which sees `text` as the file at `path`. `None` where that
    /// can't be made, and the test is skipped.
    pub fn start_with_file(path: &str, text: &str, options: &[&str]) -> Option<Daemon> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text).unwrap();
        let mount = format!("mount --bind {} {path}", file.path().display());
        let can = Command::new("unshare")
            .args(["--mount", "sh", "-c", &mount])
            .output();
        if !can.is_ok_and(|output| output.status.success()) {
            skip("root and mount namespaces");
            return None;
        }
        let inner = Daemon::command(options);
        let mut command = Command::new("unshare");
        let script = format!("{mount} && exec \"$0\" \"$@\"");
        command.args(["--mount", "sh", "-c", &script]);
        command.arg(inner.get_program()).args(inner.get_args());
        Some(Daemon::spawn(command))
    }

    /// On a free port, unless `options` say where to listen.
    pub fn command(options: &[&str]) -> Command {
        let mut command = Daemon::bare_command(options);
        if !options.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        command
    }

    /// Where the daemon listens by itself, or is told to later.
    pub fn bare_command(options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunneld"));
        let inherited =
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TUNNELD_"));
        for (name, _) in inherited {
            command.env_remove(name);
        }
        command.env_remove("RUST_LOG").env_remove("NOTIFY_SOCKET");
        command.args(options);
        command
    }

    pub fn spawn(command: Command) -> Daemon {
        Daemon::spawn_until(command, |log| {
            let addresses = log.lines().filter_map(|line| {
                let (_, address) = line.split_once("listening on ")?;
                // In JSON it is quoted.
                address.split('"').next()?.parse().ok()
            });
            addresses.reduce(|_, address| address)
        })
    }

    /// Waits until `address` finds in the log where it listens.
    pub fn spawn_until(
        mut command: Command,
        address: impl Fn(&str) -> Option<SocketAddr>,
    ) -> Daemon {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, copy) = (child.stderr.take().unwrap(), Arc::clone(&log));
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                writeln!(copy.lock().unwrap(), "{line}").unwrap();
            }
        });
        let mut daemon = Daemon {
            child,
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
            log,
        };
        daemon.address = within(LIMIT, "the daemon listens", || {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("the daemon ended with {status}");
            }
            address(&daemon.log())
        });
        daemon
    }

    /// A daemon that listens on the Unix socket at `path` and nowhere else.
    pub fn spawn_on_unix(mut command: Command, path: &Path) -> Daemon {
        let listen = format!("unix:{}", path.display());
        command.args(["--listen", &listen]);
        Daemon::spawn_until(command, |log| {
            let is_there = log.contains(&format!("listening on {listen}"));
            is_there.then_some(SocketAddr::from(([0, 0, 0, 0], 0)))
        })
    }

    /// A daemon whose stderr, a pipe with room for a page, is read up to its address and left to the caller.
    pub fn spawn_unread(mut command: Command) -> (Daemon, BufReader<PipeReader>) {
        let (reader, writer) = std::io::pipe().unwrap();
        rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
        let child = command.stderr(writer).spawn().unwrap();
        // It holds the other end.
        drop(command);
        let mut daemon = Daemon {
            child,
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
            log: Arc::default(),
        };
        let mut reader = BufReader::new(reader);
        let addresses = reader
            .by_ref()
            .lines()
            .map_while(Result::ok)
            .filter_map(listening_on);
        daemon.address = { addresses }.next().unwrap();
        (daemon, reader)
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for `count` log lines with all of `parts`, and returns the last of them.
    pub fn logged(&self, count: usize, parts: &[&str]) -> String {
        within(
            LIMIT,
            &format!("{count} log lines with {parts:?} in {}", self.log()),
            || {
                let log = self.log();
                let lines = log
                    .lines()
                    .filter(|line| parts.iter().all(|part| line.contains(part)));
                let lines: Vec<_> = lines.collect();
                (lines.len() >= count).then(|| lines[lines.len() - 1].to_owned())
            },
        )
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// Sends `head` as it is and reads the answer until EOF.
    pub fn ask(&self, head: impl AsRef<[u8]>) -> Answer {
        let mut stream = self.connect();
        stream.write_all(head.as_ref()).unwrap();
        Answer::read(&mut stream)
    }

    /// A GET with these header lines.
    pub fn get(&self, target: &str, headers: &[&str]) -> Answer {
        self.ask(request("GET", target, headers))
    }

    /// A GET that asks for an upgrade.
    pub fn get_upgrade(&self, target: &str, headers: &[&str]) -> Answer {
        self.get(target, &[&UPGRADE, headers].concat())
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    pub fn exit(&mut self) -> ExitStatus {
        let child = &mut self.child;
        within(LIMIT, "the daemon ends", || child.try_wait().unwrap())
    }

    /// The number of open descriptors.
    pub fn descriptors(&self) -> usize {
        self.open_descriptors().len()
    }

    /// The open descriptors. One that is held for a waiting accept(2) is not among them.
    pub fn open_descriptors(&self) -> BTreeSet<u32> {
        let directory = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let names = directory.map(|entry| entry.unwrap().file_name());
        names
            .map(|name| name.to_str().unwrap().parse().unwrap())
            .collect()
    }
}

impl Daemon {
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// The number of threads.
    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.child.id()))
            .unwrap()
            .count()
    }

    /// Resident memory in KiB.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Waits until there are no more threads and descriptors than in `before`.
    pub fn is_back_at(&self, before: (usize, usize)) {
        within(
            LIMIT,
            &format!("threads and descriptors are back at {before:?}"),
            || (self.threads() <= before.0 && self.descriptors() <= before.1).then_some(()),
        );
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let status = self.child.wait();
        if thread::panicking() && !self.log().is_empty() {
            eprintln!("--- the daemon's log ({status:?})\n{}", self.log());
        }
    }
}

/// The address in a line of the log, or the first of two.
pub fn listening_on(line: impl AsRef<str>) -> Option<SocketAddr> {
    let (_, addresses) = line.as_ref().split_once("listening on ")?;
    let end = addresses.find([',', ' ']).unwrap_or(addresses.len());
    addresses[..end].parse().ok()
}

/// `command`, started with `signal` ignored, as by nohup(1).
pub fn with_ignored(signal: Signal, command: &Command) -> Command {
    let script = format!("trap '' {}; exec \"$0\" \"$@\"", signal.as_raw());
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]);
    started_by(shell, command)
}

/// `command`, started with these limits, which are options of prlimit(1).
pub fn with_limits(limits: &[&str], command: &Command) -> Command {
    let mut prlimit = Command::new("prlimit");
    prlimit.args(limits).arg("--");
    started_by(prlimit, command)
}

fn started_by(mut starter: Command, command: &Command) -> Command {
    starter.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => starter.env(name, value),
            None => starter.env_remove(name),
        };
    }
    starter
}

/// Whether a process ignores `signal`.
pub fn ignores(process: Pid, signal: Signal) -> bool {
    is_in_mask(process, "SigIgn:", signal)
}

/// Whether a process has a handler for `signal`.
pub fn catches(process: Pid, signal: Signal) -> bool {
    is_in_mask(process, "SigCgt:", signal)
}

fn is_in_mask(process: Pid, mask: &str, signal: Signal) -> bool {
    let path = format!("/proc/{}/status", process.as_raw_nonzero());
    let status = std::fs::read_to_string(path).unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix(mask));
    let mask = u64::from_str_radix(mask.unwrap().trim(), 16).unwrap();
    mask >> (signal.as_raw() - 1) & 1 == 1
}

/// Runs a daemon that is expected not to start: its exit code and what it printed to stderr.
pub fn fails_to_start(mut command: Command) -> (i32, String) {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    let code = output
        .status
        .code()
        .unwrap_or_else(|| -output.status.signal().unwrap_or(0));
    (code, String::from_utf8(output.stderr).unwrap())
}

/// The headers of an upgrade, with the sample key of RFC 6455 §1.3.
pub const UPGRADE: [&str; 4] = [
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
];

/// The headers of an upgrade to CONNECT-TCP.
pub const UPGRADE_TO_CONNECT_TCP: [&str; 3] = [
    "Connection: Upgrade",
    "Upgrade: connect-tcp-12",
    "Capsule-Protocol: ?1",
];

pub fn request(method: &str, target: &str, headers: &[&str]) -> String {
    let mut head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n");
    for header in headers {
        write!(head, "{header}\r\n").unwrap();
    }
    head + "\r\n"
}

/// Reads a head, its blank line included, and nothing behind it.
pub fn head_of(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        let count = stream.read(&mut byte).unwrap();
        assert_eq!(count, 1, "{}", String::from_utf8_lossy(&head));
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    /// Reads until EOF. An answer that is cut off by a reset fails the test.
    pub fn read(stream: &mut TcpStream) -> Answer {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("no answer: {text:?}"));
        let answer = Answer {
            body: body.to_owned(),
            ..Answer::parse(head)
        };
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        answer
    }

    fn parse(head: &str) -> Answer {
        let (line, headers) = head.split_once("\r\n").unwrap();
        let status = line.split(' ').nth(1).unwrap().parse().unwrap();
        let headers = headers
            .split("\r\n")
            .map(|line| line.split_once(": ").unwrap());
        let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned()));
        Answer {
            status,
            headers: headers.collect(),
            body: String::new(),
        }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let mut named = self.headers.iter().filter(|(header, _)| header == name);
        let value = named.next().map(|(_, value)| value.as_str());
        assert_eq!(named.next(), None, "{name} is repeated");
        value
    }

    /// The message of a refusal, whose form is checked.
    pub fn message(&self) -> String {
        assert_eq!(
            self.header("content-type"),
            Some("application/json; charset=utf-8")
        );
        assert_eq!(
            self.header("content-length"),
            Some(self.body.len().to_string().as_str())
        );
        assert!(self.header("connection").unwrap().starts_with("close"));
        let body: serde_json::Value = serde_json::from_str(&self.body).unwrap();
        assert_eq!(body["code"], self.status);
        assert_eq!(body.as_object().unwrap().len(), 2);
        body["message"].as_str().unwrap().to_owned()
    }
}

/// A connection to a Unix socket, as the one to TCP that the rest of the words know.
pub fn connect_unix(path: &Path) -> TcpStream {
    let stream = TcpStream::from(OwnedFd::from(UnixStream::connect(path).unwrap()));
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

/// A frame or an end, as the client saw it.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    Binary(Vec<u8>),
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    Close(Option<u16>, String),
    /// The TCP connection's orderly end.
    Eof,
    /// The TCP connection was reset.
    Reset,
}

/// A WebSocket client after the upgrade.
pub struct Client {
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    /// A tunnel to `port` on localhost through an open daemon.
    pub fn open(daemon: &Daemon, port: u16) -> Client {
        Client::open_with(daemon, &format!("/tunnel?port={port}"), &[])
    }

    pub fn open_with(daemon: &Daemon, target: &str, headers: &[&str]) -> Client {
        let head = request("GET", target, &[&UPGRADE, headers].concat());
        Client::upgrade(daemon.connect(), head.as_bytes())
    }

    /// Sends `head`, and whatever is behind it, on `stream` and expects a 101.
    pub fn upgrade(mut stream: TcpStream, head: &[u8]) -> Client {
        stream.write_all(head).unwrap();
        Client::expect_101(stream)
    }

    pub fn expect_101(stream: TcpStream) -> Client {
        let (client, subprotocol) = Client::expect_101_of(stream);
        assert_eq!(subprotocol, None);
        client
    }

    /// The same with the subprotocol that was chosen.
    pub fn expect_101_of(mut stream: TcpStream) -> (Client, Option<String>) {
        let text = head_of(&mut stream);
        let answer = Answer::parse(text.trim_end());
        assert_eq!(answer.status, 101, "{text}");
        assert_eq!(answer.header("upgrade"), Some("websocket"));
        assert_eq!(
            answer
                .header("connection")
                .map(str::to_lowercase)
                .as_deref(),
            Some("upgrade")
        );
        assert_eq!(
            answer.header("sec-websocket-accept"),
            Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
        );
        let subprotocol = answer.header("sec-websocket-protocol").map(str::to_owned);
        let buffer = Vec::new();
        (Client { stream, buffer }, subprotocol)
    }

    /// Another handle, to send or receive on another thread. What was received but not seen stays here.
    pub fn clone_writer(&self) -> Client {
        Client {
            stream: self.stream.try_clone().unwrap(),
            buffer: Vec::new(),
        }
    }

    /// Sends a binary message of one frame.
    pub fn send(&mut self, payload: &[u8]) {
        self.stream.write_all(&frame(0x82, payload)).unwrap();
    }

    pub fn send_frame(&mut self, first: u8, payload: &[u8]) {
        self.stream.write_all(&frame(first, payload)).unwrap();
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn send_close(&mut self, code: u16) {
        self.send_frame(0x88, &code.to_be_bytes());
    }

    /// The next frame or the end. Checks what holds for every frame of the daemon's.
    pub fn see(&mut self) -> Seen {
        let header = match self.take(2) {
            Ok(header) => header,
            Err(end) => return end,
        };
        assert_eq!(header[0] & 0x70, 0, "reserved bits");
        assert_eq!(header[0] & 0x80, 0x80, "a fragment");
        assert_eq!(header[1] & 0x80, 0, "a masked frame");
        let length = match header[1] {
            126 => u16::from_be_bytes(self.take(2).unwrap().try_into().unwrap()) as usize,
            127 => u64::from_be_bytes(self.take(8).unwrap().try_into().unwrap()) as usize,
            short => short as usize,
        };
        assert!(length <= 32 * 1024, "a message of {length} bytes");
        let payload = match self.take(length) {
            Ok(payload) => payload,
            Err(end) => return end,
        };
        match header[0] & 0x0f {
            2 => {
                assert!(
                    length > 0,
                    "an empty message, which websocat 1 takes for EOF"
                );
                Seen::Binary(payload)
            }
            8 if length == 0 => Seen::Close(None, String::new()),
            8 => {
                let code = u16::from_be_bytes([payload[0], payload[1]]);
                assert!(![1005, 1006, 1015].contains(&code));
                Seen::Close(
                    Some(code),
                    String::from_utf8(payload[2..].to_vec()).unwrap(),
                )
            }
            9 => Seen::Ping(payload),
            10 => Seen::Pong(payload),
            opcode => panic!("opcode {opcode}"),
        }
    }

    /// Every byte up to the next frame that is no data, leaving out pings, and that frame or end.
    pub fn see_all(&mut self) -> (Vec<u8>, Seen) {
        let mut bytes = Vec::new();
        loop {
            match self.see() {
                Seen::Binary(payload) => bytes.extend(payload),
                Seen::Ping(payload) => {
                    let _ = self.stream.write_all(&frame(0x8a, &payload));
                }
                other => return (bytes, other),
            }
        }
    }

    /// The next `count` bytes, leaving out pings.
    pub fn see_all_of(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            match self.see() {
                Seen::Binary(payload) => bytes.extend(payload),
                Seen::Ping(payload) => self.send_frame(0x8a, &payload),
                other => panic!("{other:?} after {} bytes", bytes.len()),
            }
        }
        bytes
    }

    /// Answers a Close and sees the connection closed.
    pub fn finish(&mut self) {
        self.send_close(1000);
        assert_eq!(self.see(), Seen::Eof);
    }

    /// Receives what has come, at most 4 KiB, to be seen later.
    pub fn receive_some(&mut self) {
        let mut more = [0; 4096];
        let count = self.stream.read(&mut more).unwrap();
        self.buffer.extend_from_slice(&more[..count]);
    }

    fn take(&mut self, count: usize) -> Result<Vec<u8>, Seen> {
        while self.buffer.len() < count {
            let mut more = [0; 64 * 1024];
            match self.stream.read(&mut more) {
                Ok(0) => return Err(Seen::Eof),
                Ok(read) => self.buffer.extend(&more[..read]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Err(Seen::Reset);
                }
                Err(error) => panic!("{error}"),
            }
        }
        Ok(self.buffer.drain(..count).collect())
    }
}

pub const CLOSE_1000: Seen = Seen::Close(Some(1000), String::new());

/// A masked frame with `first` as its first byte.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x9b, 0x1f, 0x00, 0xe6];
    let mut frame = vec![first];
    match payload.len() {
        n @ 0..=125 => frame.push(0x80 | n as u8),
        n @ 126..=65535 => {
            frame.push(0xfe);
            frame.extend((n as u16).to_be_bytes());
        }
        n => {
            frame.push(0xff);
            frame.extend((n as u64).to_be_bytes());
        }
    }
    frame.extend(mask);
    frame.extend(
        payload
            .iter()
            .zip(mask.iter().cycle())
            .map(|(byte, mask)| byte ^ mask),
    );
    frame
}

/// A listening target.
pub struct Target {
    listener: TcpListener,
    pub port: u16,
}

impl Target {
    pub fn listen() -> Target {
        Target::listen_on("127.0.0.1:0")
    }

    pub fn listen_on(address: &str) -> Target {
        let listener = TcpListener::bind(address).unwrap();
        let port = listener.local_addr().unwrap().port();
        Target { listener, port }
    }

    /// The next connection.
    pub fn accept(&self) -> TcpStream {
        self.listener.set_nonblocking(true).unwrap();
        let stream = within(LIMIT, "the target is dialed", || self.try_accept());
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// Whether it has been dialed.
    pub fn was_dialed(&self) -> bool {
        self.listener.set_nonblocking(true).unwrap();
        self.try_accept().is_some()
    }

    fn try_accept(&self) -> Option<TcpStream> {
        match self.listener.accept() {
            Ok((stream, _)) => Some(stream),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// A target that sends every connection's bytes back, and its end behind them.
    pub fn echo() -> Target {
        Target::echo_on("127.0.0.1:0")
    }

    pub fn echo_on(address: &str) -> Target {
        let target = Target::listen_on(address);
        let listener = target.listener.try_clone().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || {
                    let _ = std::io::copy(&mut &stream, &mut &stream);
                    let _ = stream.shutdown(Shutdown::Write);
                });
            }
        });
        target
    }
}

/// A port on which nothing listens, on either loopback address, and nobody else will while this is held.
pub struct ClosedPort {
    pub port: u16,
    _held: [Option<Socket>; 2],
}

pub fn closed_port() -> ClosedPort {
    let bound = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).ok()?;
        socket.bind(&address.into()).ok()?;
        Some(socket)
    };
    within(LIMIT, "a port is free", || {
        let v4 = bound(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let port = v4.local_addr().ok()?.as_socket()?.port();
        let v6 = bound(SocketAddr::from((Ipv6Addr::LOCALHOST, port)));
        let has_v6 = || bound(SocketAddr::from((Ipv6Addr::LOCALHOST, 0))).is_some();
        (v6.is_some() || !has_v6()).then_some(ClosedPort {
            port,
            _held: [Some(v4), v6],
        })
    })
}

/// Reads a target's connection to its end: the bytes, and whether the end was orderly.
pub fn read_to_end(stream: &mut TcpStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => (bytes, true),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => (bytes, false),
        Err(error) => panic!("{error}"),
    }
}

/// Bytes and numbers that look random and are the same each time (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.number() % limit as u64) as usize
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..count.div_ceil(8))
            .flat_map(|_| self.number().to_le_bytes())
            .collect();
        bytes.truncate(count);
        bytes
    }
}

/// Closes a connection with a RST.
pub fn reset(stream: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
}
