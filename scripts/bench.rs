//! The benchmark behind `scripts/bench.sh`: tunneld and its peers on the same work, in turns.
//!
//! A lean client and a lean target run in this process; the servers under test are child processes, and their
//! cost is the CPU time the kernel accounts to them. Prints Markdown. The target does what the first byte of
//! a connection says: count what comes (`U`), send (`D`), both (`B`), echo (`E`), or answer each 100 bytes (`W`).

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const GIB: f64 = (1u64 << 30) as f64;

/// The kernel counts CPU time in ticks of this many a second (`getconf CLK_TCK`).
const TICKS: f64 = 100.0;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tunneld,
    /// The same, asked for CONNECT-TCP.
    TunneldCapsules,
    Haproxy,
    Websocat,
    Websockify,
    /// The client's local port, with a tunneld behind it that isn't counted.
    Connect,
    /// The same with --protocol connect-tcp.
    ConnectCapsules,
    /// The same of websocat.
    WebsocatClient,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Tunneld => "tunneld",
            Kind::TunneldCapsules => "tunneld, CONNECT-TCP",
            Kind::Haproxy => "HAProxy, plain TCP relay",
            Kind::Websocat => "websocat 1.14",
            Kind::Websockify => "websockify",
            Kind::Connect => "tunneld connect",
            Kind::ConnectCapsules => "the same, CONNECT-TCP",
            Kind::WebsocatClient => "websocat 1.14 at both ends",
        }
    }

    /// What clients speak to it.
    fn framing(self) -> Framing {
        match self {
            Kind::Tunneld | Kind::Websocat | Kind::Websockify => Framing::WebSocket,
            Kind::TunneldCapsules => Framing::Capsules,
            _ => Framing::None,
        }
    }

    /// Whether it is ours.
    fn is_ours(self) -> bool {
        matches!(
            self,
            Kind::Tunneld | Kind::TunneldCapsules | Kind::Connect | Kind::ConnectCapsules
        )
    }

    /// Whose local port it is.
    fn server(self) -> Option<Kind> {
        match self {
            Kind::Connect => Some(Kind::Tunneld),
            Kind::ConnectCapsules => Some(Kind::TunneldCapsules),
            Kind::WebsocatClient => Some(Kind::Websocat),
            _ => None,
        }
    }

    /// What serves `port`. For a client, `target` is its server's port, which leads to `end`.
    fn command(self, port: u16, target: u16, end: u16) -> Result<Command> {
        let program =
            || std::env::var_os("TUNNELD").unwrap_or_else(|| "target/release/tunneld".into());
        let (listen, dial) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{target}"));
        let mut command;
        match self {
            Kind::Tunneld | Kind::TunneldCapsules => {
                command = Command::new(program());
                command
                    .args(["--listen", &listen, "--max-connections", "4000"])
                    .env("RUST_LOG", "warn");
            }
            Kind::Haproxy => {
                let config = std::env::temp_dir().join(format!("tunneld-bench-{port}.cfg"));
                let text = format!(
                    "global\n maxconn 5000\ndefaults\n mode tcp\n option splice-auto\n timeout connect 5s\n timeout client 10m\n \
                     timeout server 10m\nlisten bench\n bind {listen}\n server target {dial}\n"
                );
                fs::write(&config, text)?;
                command = Command::new("haproxy");
                command.args(["-db", "-f"]).arg(config);
            }
            Kind::Websocat => {
                command = Command::new("target/tools/bin/websocat");
                command.args([
                    "--binary",
                    &format!("ws-l:{listen}"),
                    &format!("tcp:{dial}"),
                ]);
            }
            Kind::Websockify => {
                command = Command::new("target/venv/bin/websockify");
                command.args([&listen, &dial]);
            }
            Kind::Connect | Kind::ConnectCapsules => {
                command = Command::new(program());
                let capsules = self == Kind::ConnectCapsules;
                let protocol: &[&str] = if capsules {
                    &["--protocol", "connect-tcp"]
                } else {
                    &[]
                };
                command
                    .args([
                        "connect",
                        &format!("ws://{dial}"),
                        "--port",
                        &end.to_string(),
                    ])
                    .args(["--listen", &listen, "--max-connections", "4000"])
                    .args(protocol)
                    .env("RUST_LOG", "error");
            }
            Kind::WebsocatClient => {
                command = Command::new("target/tools/bin/websocat");
                command.args([
                    "--binary",
                    &format!("tcp-l:{listen}"),
                    &format!("ws://{dial}"),
                ]);
            }
        }
        Ok(command)
    }
}

/// A server under test, with all its processes in a group of their own.
struct Server {
    kind: Kind,
    child: Child,
    port: u16,
    target: u16,
    /// A client's server.
    _behind: Option<Box<Server>>,
}

impl Server {
    fn start(kind: Kind, target: u16) -> Result<Server> {
        let port = free_port()?;
        let behind = kind
            .server()
            .map(|server| Server::start(server, target))
            .transpose()?;
        let next = behind.as_ref().map_or(target, |server| server.port);
        let mut command = kind.command(port, next, target)?;
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let server = Server {
            kind,
            child: command.spawn()?,
            port,
            target,
            _behind: behind.map(Box::new),
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if Instant::now() > deadline {
                return Err(format!("{} does not listen", kind.name()).into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        thread::sleep(Duration::from_millis(200));
        Ok(server)
    }

    /// The numbers of /proc/PID/stat of every process of the group.
    fn stats(&self) -> Vec<(u32, Vec<u64>)> {
        let group = u64::from(self.child.id());
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let stat = |pid: u32| {
            let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let fields = text
                .rsplit_once(") ")?
                .1
                .split(' ')
                .map(|field| field.trim().parse().unwrap_or(0));
            Some((pid, fields.collect::<Vec<u64>>()))
        };
        pids.filter_map(stat)
            .filter(|(_, fields)| fields[2] == group)
            .collect()
    }

    /// CPU seconds so far, those of ended children included.
    fn cpu(&self) -> f64 {
        let ticks: u64 = self
            .stats()
            .iter()
            .map(|(_, fields)| fields[11..15].iter().sum::<u64>())
            .sum();
        ticks as f64 / TICKS
    }

    /// A field of /proc/PID/status, in KiB, of all its processes.
    fn memory(&self, field: &str) -> f64 {
        let of = |pid: u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
                .map(str::to_owned);
            line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok())
                .unwrap_or(0.0)
        };
        self.stats().iter().map(|(pid, _)| of(*pid)).sum()
    }

    fn connect(&self) -> Result<Tunnel> {
        Tunnel::open(self.port, self.target, self.kind.framing())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let group = format!("-{}", self.child.id());
        let _ = Command::new("kill")
            .args(["-9", "--", &group])
            .stderr(Stdio::null())
            .status();
        let _ = self.child.wait();
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// What a client puts its bytes in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Framing {
    None,
    WebSocket,
    Capsules,
}

impl Framing {
    /// The headers that ask for it.
    fn upgrade(self) -> &'static str {
        match self {
            Framing::None => "",
            Framing::WebSocket => {
                "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                 Sec-WebSocket-Protocol: binary\r\n"
            }
            Framing::Capsules => "Upgrade: connect-tcp-12\r\nCapsule-Protocol: ?1\r\n",
        }
    }

    /// What ends a direction in order.
    fn end(self) -> &'static [u8] {
        match self {
            Framing::None => b"",
            Framing::WebSocket => &[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8],
            Framing::Capsules => &[0xa0, 0x28, 0xd7, 0xf3, 0],
        }
    }
}

/// The client's end of a tunnel: bytes in, bytes out, framed where the server speaks WebSocket.
struct Tunnel {
    stream: TcpStream,
    framing: Framing,
    /// Payload bytes left of the frame being read.
    left: u64,
    buffer: Vec<u8>,
    at: usize,
    end: usize,
}

const MASK: [u8; 4] = [0x12, 0x34, 0x56, 0x78];

impl Tunnel {
    fn open(port: u16, target: u16, framing: Framing) -> Result<Tunnel> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        if framing != Framing::None {
            let upgrade = framing.upgrade();
            write!(
                stream,
                "GET /tunnel?port={target} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n{upgrade}\r\n"
            )?;
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                head.push(byte[0]);
            }
            if !head.starts_with(b"HTTP/1.1 101 ") {
                return Err(String::from_utf8_lossy(&head).into_owned().into());
            }
        }
        Ok(Tunnel {
            stream,
            framing,
            left: 0,
            buffer: vec![0; 256 * 1024],
            at: 0,
            end: 0,
        })
    }

    fn message(&self, payload: &[u8]) -> Vec<u8> {
        match self.framing {
            Framing::None => return payload.to_vec(),
            Framing::Capsules => {
                let length = (0x8000_0000 | payload.len() as u32).to_be_bytes();
                return [&[0xa0, 0x28, 0xd7, 0xf2][..], &length, payload].concat();
            }
            Framing::WebSocket => {}
        }
        let mut frame = vec![0x82];
        match payload.len() {
            n @ 0..=125 => frame.push(0x80 | n as u8),
            n @ 126..=65535 => frame.extend([&[0xfe][..], &(n as u16).to_be_bytes()].concat()),
            n => frame.extend([&[0xff][..], &(n as u64).to_be_bytes()].concat()),
        }
        frame.extend(MASK);
        frame.extend(
            payload
                .iter()
                .zip(MASK.iter().cycle())
                .map(|(byte, mask)| byte ^ mask),
        );
        frame
    }

    fn send(&mut self, payload: &[u8]) -> Result<()> {
        let message = self.message(payload);
        Ok(self.stream.write_all(&message)?)
    }

    fn fill(&mut self) -> Result<()> {
        self.buffer.copy_within(self.at..self.end, 0);
        (self.at, self.end) = (0, self.end - self.at);
        let read = self.stream.read(&mut self.buffer[self.end..])?;
        if read == 0 {
            return Err("the tunnel ended".into());
        }
        self.end += read;
        Ok(())
    }

    fn byte(&mut self) -> Result<u8> {
        while self.at == self.end {
            self.fill()?;
        }
        self.at += 1;
        Ok(self.buffer[self.at - 1])
    }

    /// RFC 9000 §16.
    fn integer(&mut self) -> Result<u64> {
        let first = self.byte()?;
        let mut value = u64::from(first & 0x3f);
        for _ in 1..1 << (first >> 6) {
            value = value << 8 | u64::from(self.byte()?);
        }
        Ok(value)
    }

    /// Receives `count` payload bytes and drops them.
    fn receive(&mut self, mut count: u64) -> Result<()> {
        while count > 0 {
            if self.framing == Framing::Capsules && self.left == 0 {
                self.integer()?;
                self.left = self.integer()?;
                continue;
            }
            if self.framing == Framing::WebSocket && self.left == 0 {
                let opcode = self.byte()? & 0x0f;
                self.left = match self.byte()? {
                    126 => (0..2).try_fold(0, |n, _| {
                        Ok::<_, Box<dyn Error + Send + Sync>>(n << 8 | u64::from(self.byte()?))
                    })?,
                    127 => (0..8).try_fold(0, |n, _| {
                        Ok::<_, Box<dyn Error + Send + Sync>>(n << 8 | u64::from(self.byte()?))
                    })?,
                    short => u64::from(short),
                };
                if opcode == 9 {
                    let payload = (0..self.left)
                        .map(|_| self.byte())
                        .collect::<Result<Vec<u8>>>()?;
                    self.left = 0;
                    let pong = [
                        &[0x8a, 0x80 | payload.len() as u8, 0, 0, 0, 0][..],
                        &payload,
                    ]
                    .concat();
                    self.stream.write_all(&pong)?;
                    continue;
                }
            }
            if self.at == self.end {
                self.fill()?;
            }
            let available = (self.end - self.at) as u64;
            let left = match self.framing {
                Framing::None => u64::MAX,
                _ => self.left,
            };
            let taken = count.min(available).min(left);
            self.at += taken as usize;
            self.left = self.left.saturating_sub(taken);
            count -= taken;
        }
        Ok(())
    }
}

/// Serves every kind of work on `listener`.
fn target(listener: TcpListener) {
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let _ = work(stream);
            });
        }
    });
}

fn work(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut head = [0; 9];
    stream.read_exact(&mut head[..1])?;
    if head[0] == b'E' {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                count => stream.write_all(&buffer[..count])?,
            }
        }
    }
    if head[0] == b'W' {
        let mut request = [0; 100];
        loop {
            stream.read_exact(&mut request)?;
            stream.write_all(&request)?;
        }
    }
    stream.read_exact(&mut head[1..])?;
    let total = u64::from_be_bytes(head[1..].try_into()?);
    let sink = |mut stream: TcpStream| -> Result<()> {
        let (mut buffer, mut left) = (vec![0; 256 * 1024], total);
        while left > 0 {
            let count = stream.read(&mut buffer)? as u64;
            left = left
                .checked_sub(count)
                .filter(|_| count > 0)
                .ok_or("not what was announced")?;
        }
        stream.write_all(b"!")?;
        // Some servers drop what they have not sent yet when the target ends.
        let _ = stream.read(&mut [0]);
        Ok(())
    };
    let source = move |mut stream: TcpStream| -> Result<()> {
        let (buffer, mut left) = (vec![7; 256 * 1024], total);
        while left > 0 {
            let count = left.min(buffer.len() as u64);
            stream.write_all(&buffer[..count as usize])?;
            left -= count;
        }
        Ok(())
    };
    match head[0] {
        b'U' => sink(stream),
        b'D' => source(stream),
        _ => {
            let other = stream.try_clone()?;
            thread::spawn(move || source(other))
                .join()
                .map_err(|_| "panicked")??;
            sink(stream)
        }
    }
}

fn announce(what: u8, total: u64) -> Vec<u8> {
    [&[what][..], &total.to_be_bytes()].concat()
}

/// Sends `total` bytes in messages of `size` bytes.
fn upload(tunnel: &mut Tunnel, total: u64, size: usize) -> Result<()> {
    let payload = vec![7; size];
    let message = tunnel.message(&payload);
    for _ in 0..total / size as u64 {
        tunnel.stream.write_all(&message)?;
    }
    let rest = (total % size as u64) as usize;
    tunnel.send(&payload[..rest])
}

#[derive(Clone, Copy)]
enum Way {
    Up,
    Down,
    Both,
}

fn transfer(tunnel: &mut Tunnel, way: Way, total: u64, size: usize) -> Result<()> {
    match way {
        Way::Up => {
            tunnel.send(&announce(b'U', total))?;
            upload(tunnel, total, size)?;
            tunnel.receive(1)
        }
        Way::Down => {
            tunnel.send(&announce(b'D', total))?;
            tunnel.receive(total)
        }
        Way::Both => {
            tunnel.send(&announce(b'B', total))?;
            let mut reader = Tunnel {
                stream: tunnel.stream.try_clone()?,
                buffer: vec![0; 256 * 1024],
                ..*tunnel
            };
            let reading = thread::spawn(move || reader.receive(total));
            upload(tunnel, total, size)?;
            reading.join().map_err(|_| "panicked")?
        }
    }
}

/// CPU seconds and wall seconds a GiB.
fn bulk(server: &Server, way: Way, total: u64, size: usize) -> Result<(f64, f64)> {
    let mut tunnel = server.connect()?;
    let (cpu, start) = (server.cpu(), Instant::now());
    transfer(&mut tunnel, way, total, size)?;
    let wall = start.elapsed().as_secs_f64();
    let bytes = total as f64 * if matches!(way, Way::Both) { 2.0 } else { 1.0 };
    Ok(((server.cpu() - cpu) * GIB / bytes, wall * GIB / bytes))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values
        .get(values.len() * percent / 100)
        .copied()
        .unwrap_or(f64::NAN)
}

/// Round trips of 64 bytes: microseconds.
fn round_trips(server: &Server, count: usize) -> Result<Vec<f64>> {
    let mut tunnel = server.connect()?;
    tunnel.send(b"E")?;
    let mut times = Vec::with_capacity(count);
    for n in 0..count + 100 {
        let start = Instant::now();
        tunnel.send(&[1; 64])?;
        tunnel.receive(64)?;
        if n >= 100 {
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(times)
}

/// One handshake and an orderly end: milliseconds to the 101.
fn handshake(server: &Server) -> Result<f64> {
    let start = Instant::now();
    let mut tunnel = server.connect()?;
    let time = start.elapsed().as_secs_f64() * 1e3;
    tunnel.stream.write_all(server.kind.framing().end())?;
    tunnel.stream.shutdown(Shutdown::Write)?;
    let _ = tunnel.stream.read(&mut [0; 64]);
    Ok(time)
}

/// Handshakes, `beside` at a time: CPU microseconds each, handshakes a second, and the times of each in ms.
fn handshakes(server: &Server, count: usize, beside: usize) -> Result<(f64, f64, Vec<f64>)> {
    let (cpu, start) = (server.cpu(), Instant::now());
    let times = thread::scope(|scope| {
        let many = move || {
            (0..count / beside)
                .map(|_| handshake(server))
                .collect::<Result<Vec<f64>>>()
        };
        let workers: Vec<_> = (0..beside).map(|_| scope.spawn(many)).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| "panicked")?)
            .collect::<Result<Vec<_>>>()
    })?;
    let rate = count as f64 / start.elapsed().as_secs_f64();
    Ok((
        (server.cpu() - cpu) * 1e6 / count as f64,
        rate,
        times.concat(),
    ))
}

/// KiB of resident memory for each of `count` idle tunnels that have been used once.
fn idle_memory(server: &Server, count: usize) -> Result<f64> {
    let before = server.memory("VmRSS");
    let mut tunnels = Vec::new();
    for _ in 0..count {
        let mut tunnel = server.connect()?;
        tunnel.buffer = vec![0; 1024];
        tunnel.send(b"E")?;
        tunnel.send(&[1; 100])?;
        tunnel.receive(100)?;
        tunnels.push(tunnel);
    }
    thread::sleep(Duration::from_millis(500));
    Ok((server.memory("VmRSS") - before) / count as f64)
}

/// How much the peak of resident memory grows while one message of 1 GiB goes up, in KiB.
fn huge_message(server: &Server) -> Result<f64> {
    let total = 1 << 30;
    let mut tunnel = server.connect()?;
    tunnel.send(&announce(b'U', total))?;
    thread::sleep(Duration::from_millis(200));
    let before = server.memory("VmHWM");
    tunnel
        .stream
        .write_all(&[&[0x82, 0xff][..], &total.to_be_bytes(), &MASK].concat())?;
    let chunk = vec![7; 1 << 20];
    for _ in 0..total >> 20 {
        tunnel.stream.write_all(&chunk)?;
    }
    tunnel.receive(1)?;
    Ok(server.memory("VmHWM") - before)
}

/// Write, write, read through a websocat in front, which leaves Nagle's algorithm on: milliseconds, median.
fn write_write_read(server: &Server, count: usize) -> Result<f64> {
    let port = free_port()?;
    let mut command = Command::new("target/tools/bin/websocat");
    let url = format!(
        "ws://127.0.0.1:{}/tunnel?port={}",
        server.port, server.target
    );
    command.args(["--binary", &format!("tcp-l:127.0.0.1:{port}"), &url]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let result = (|| {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut stream = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"W")?;
        let mut times = Vec::new();
        for n in 0..count + 10 {
            let start = Instant::now();
            stream.write_all(&[1; 50])?;
            thread::sleep(Duration::from_micros(300));
            stream.write_all(&[2; 50])?;
            stream.read_exact(&mut [0; 100])?;
            if n >= 10 {
                times.push(start.elapsed().as_secs_f64() * 1e3 - 0.3);
            }
        }
        Ok(median(&mut times))
    })();
    let _ = child.kill();
    let _ = child.wait();
    result
}

/// `count` tunnels at once, each moving its share of `total` bytes in turn: CPU seconds a GiB, up and down.
fn scale(server: &Server, count: usize, total: u64) -> Result<(f64, f64)> {
    let mut tunnels = (0..count)
        .map(|_| server.connect())
        .collect::<Result<Vec<_>>>()?;
    for tunnel in &mut tunnels {
        tunnel.buffer = vec![0; 64 * 1024];
    }
    let share = total / count as u64;
    let mut costs = Vec::new();
    for way in [Way::Up, Way::Down] {
        // A connection's target does one piece of work.
        if matches!(way, Way::Down) {
            tunnels = (0..count)
                .map(|_| server.connect())
                .collect::<Result<Vec<_>>>()?;
        }
        let cpu = server.cpu();
        for tunnel in &mut tunnels {
            transfer(tunnel, way, share, 64 * 1024)?;
        }
        costs.push((server.cpu() - cpu) * GIB / total as f64);
        tunnels.clear();
        thread::sleep(Duration::from_secs(1));
    }
    Ok((costs[0], costs[1]))
}

/// One row of the table: what is measured, and each server's figure.
struct Row {
    what: String,
    figures: Vec<Option<f64>>,
    digits: usize,
}

struct Plan {
    /// Only rows whose name holds this are measured.
    only: Option<String>,
    kinds: Vec<Kind>,
    total: u64,
    runs: usize,
    quick: bool,
}

impl Plan {
    /// The same for clients, with HAProxy beside them.
    fn of_clients(&self) -> Plan {
        let client = |&kind: &Kind| match kind {
            Kind::Tunneld => Some(Kind::Connect),
            Kind::TunneldCapsules => Some(Kind::ConnectCapsules),
            Kind::Websocat => Some(Kind::WebsocatClient),
            Kind::Haproxy => Some(Kind::Haproxy),
            _ => None,
        };
        Plan {
            kinds: self.kinds.iter().filter_map(client).collect(),
            only: self.only.clone(),
            ..*self
        }
    }
}

/// Measures `what` on all servers in turns, `runs` times, and takes the median of each.
fn in_turns(
    plan: &Plan,
    servers: &[Server],
    what: &str,
    digits: usize,
    measure: impl Fn(&Server) -> Result<f64>,
) -> Row {
    let mut values = vec![Vec::new(); servers.len()];
    let runs = if plan.only.as_deref().is_none_or(|only| what.contains(only)) {
        plan.runs
    } else {
        0
    };
    if runs > 0 {
        eprintln!("measuring {what}");
    }
    for _ in 0..runs {
        for (server, values) in servers.iter().zip(&mut values) {
            match measure(server) {
                Ok(value) => values.push(value),
                Err(error) => eprintln!("  {}: {error}", server.kind.name()),
            }
        }
    }
    let figures = values
        .iter_mut()
        .map(|values| (!values.is_empty()).then(|| median(values)))
        .collect();
    Row {
        what: what.to_owned(),
        figures,
        digits,
    }
}

fn bulk_rows(plan: &Plan, servers: &[Server]) -> Vec<Row> {
    // websockify is slower by an order of magnitude.
    let total = |server: &Server| {
        if server.kind == Kind::Websockify {
            plan.total / 16
        } else {
            plan.total
        }
    };
    let mut rows = Vec::new();
    for (way, name) in [
        (Way::Up, "up"),
        (Way::Down, "down"),
        (Way::Both, "both ways"),
    ] {
        let cpu = |server: &Server| bulk(server, way, total(server), 64 * 1024).map(|(cpu, _)| cpu);
        rows.push(in_turns(
            plan,
            servers,
            &format!("CPU s/GiB, {name}, frames of 64 KiB"),
            2,
            cpu,
        ));
        let rate = |server: &Server| {
            bulk(server, way, total(server), 64 * 1024).map(|(_, wall)| 1024.0 / wall)
        };
        if !plan.quick {
            rows.push(in_turns(
                plan,
                servers,
                &format!("MiB/s, {name}, frames of 64 KiB"),
                0,
                rate,
            ));
        }
    }
    for (size, name) in [(1 << 10, "1 KiB"), (16 << 10, "16 KiB"), (1 << 20, "1 MiB")] {
        let total = move |server: &Server| {
            if size == 1 << 10 {
                total(server) / 8
            } else {
                total(server)
            }
        };
        let cpu = |server: &Server| bulk(server, Way::Up, total(server), size).map(|(cpu, _)| cpu);
        rows.push(in_turns(
            plan,
            servers,
            &format!("CPU s/GiB, up, frames of {name}"),
            2,
            cpu,
        ));
    }
    rows
}

fn latency_rows(plan: &Plan, servers: &[Server]) -> Vec<Row> {
    let trips = if plan.quick { 3000 } else { 10_000 };
    let shakes = if plan.quick { 400 } else { 2000 };
    vec![
        in_turns(
            plan,
            servers,
            "round trip of 64 bytes, p50, µs",
            0,
            |server| Ok(percentile(&mut round_trips(server, trips)?, 50)),
        ),
        in_turns(
            plan,
            servers,
            "round trip of 64 bytes, p99, µs",
            0,
            |server| Ok(percentile(&mut round_trips(server, trips)?, 99)),
        ),
        in_turns(plan, servers, "handshake and end, CPU µs", 0, |server| {
            Ok(handshakes(server, shakes, 1)?.0)
        }),
        in_turns(
            plan,
            servers,
            "handshakes a second, 4 at a time",
            0,
            |server| Ok(handshakes(server, shakes, 4)?.1),
        ),
        in_turns(
            plan,
            servers,
            "handshake, 4 at a time, p99, ms",
            2,
            |server| Ok(percentile(&mut handshakes(server, shakes, 4)?.2, 99)),
        ),
    ]
}

/// The client, with its server behind it. CPU is the client's alone; the rest is through both ends.
fn client_rows(plan: &Plan, servers: &[Server]) -> Vec<Row> {
    let mut rows = Vec::new();
    for (way, name) in [(Way::Up, "up"), (Way::Down, "down")] {
        let cpu = |server: &Server| bulk(server, way, plan.total, 64 * 1024).map(|(cpu, _)| cpu);
        let what = format!("client: CPU s/GiB, {name}");
        rows.push(in_turns(plan, servers, &what, 2, cpu));
        let rate = |server: &Server| {
            bulk(server, way, plan.total, 64 * 1024).map(|(_, wall)| 1024.0 / wall)
        };
        let what = format!("both ends: MiB/s, {name}");
        rows.push(in_turns(plan, servers, &what, 0, rate));
    }
    let (trips, shakes) = if plan.quick {
        (3000, 400)
    } else {
        (10_000, 2000)
    };
    let trip = |server: &Server| Ok(percentile(&mut round_trips(server, trips)?, 50));
    let what = "both ends: round trip of 64 bytes, p50, µs";
    rows.push(in_turns(plan, servers, what, 0, trip));
    let what = "both ends: connections a second, 4 at a time";
    let rate = |server: &Server| Ok(handshakes(server, shakes, 4)?.1);
    rows.push(in_turns(plan, servers, what, 0, rate));
    rows
}

fn table(plan: &Plan, rows: &[Row]) -> Result<String> {
    let mut text = String::from("| |");
    for kind in &plan.kinds {
        write!(text, " {} |", kind.name())?;
    }
    let ours: Vec<Kind> = plan
        .kinds
        .iter()
        .copied()
        .filter(|kind| kind.is_ours())
        .collect();
    for kind in &ours {
        write!(text, " {} : HAProxy |", kind.name())?;
    }
    let columns = plan.kinds.len() + ours.len();
    writeln!(text, "\n| --- |{}", " ---: |".repeat(columns))?;
    let of = |row: &Row, kind| {
        plan.kinds
            .iter()
            .position(|&other| other == kind)
            .and_then(|at| row.figures[at])
    };
    for row in rows {
        write!(text, "| {} |", row.what)?;
        for figure in &row.figures {
            match figure {
                Some(figure) => write!(text, " {figure:.*} |", row.digits)?,
                None => write!(text, " – |")?,
            }
        }
        for &kind in &ours {
            match (of(row, kind), of(row, Kind::Haproxy)) {
                (Some(ours), Some(theirs)) => write!(text, " {:.2} |", ours / theirs)?,
                _ => write!(text, " |")?,
            }
        }
        writeln!(text)?;
    }
    Ok(text)
}

fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |line| line.1);
    let cores = thread::available_parallelism().map_or(0, usize::from);
    format!(
        "{cores} cores, {model}, Linux {}",
        read("/proc/sys/kernel/osrelease").trim()
    )
}

fn memory_rows(plan: &Plan, servers: &[Server]) -> Vec<Row> {
    let tunnels = |server: &Server| {
        if server.kind == Kind::Websockify {
            50
        } else {
            400
        }
    };
    let message = |server: &Server| match server.kind {
        Kind::Tunneld => huge_message(server),
        _ => Err("not measured".into()),
    };
    let nagle = |server: &Server| match server.kind {
        Kind::Haproxy | Kind::TunneldCapsules => Err("speaks no WebSocket".into()),
        _ => write_write_read(server, 100),
    };
    vec![
        in_turns(
            plan,
            servers,
            "KiB per idle tunnel, used once",
            0,
            |server| idle_memory(server, tunnels(server)),
        ),
        in_turns(
            plan,
            servers,
            "KiB more at most for a message of 1 GiB",
            0,
            message,
        ),
        in_turns(
            plan,
            servers,
            "write, write, read through a websocat client, ms",
            2,
            nagle,
        ),
    ]
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).map(|directory| directory.join(program));
    places
        .chain([PathBuf::from(program)])
        .any(|place| place.exists())
}

fn plan() -> Plan {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let only = std::env::args()
        .skip_while(|argument| argument != "--only")
        .nth(1);
    let mut kinds = vec![Kind::Tunneld, Kind::TunneldCapsules];
    kinds.extend(is_installed("haproxy").then_some(Kind::Haproxy));
    kinds.extend(is_installed("target/tools/bin/websocat").then_some(Kind::Websocat));
    kinds
        .extend((!quick && is_installed("target/venv/bin/websockify")).then_some(Kind::Websockify));
    Plan {
        only,
        kinds,
        total: if quick { 1 << 29 } else { 1 << 30 },
        runs: 3,
        quick,
    }
}

/// tunneld, and HAProxy if it is there, with more and more tunnels.
fn scale_table(title: &str, servers: &[Server], runs: usize) -> Result<()> {
    let compared = || {
        servers
            .iter()
            .filter(|server| matches!(server.kind, Kind::Tunneld | Kind::Haproxy))
    };
    print!("| {title} |");
    for server in compared() {
        let name = server.kind.name();
        print!(" {name}: CPU s/GiB up | down |");
    }
    println!("\n| ---: |{}", " ---: | ---: |".repeat(compared().count()));
    for count in [1, 10, 100, 1000, 2000] {
        print!("| {count} |");
        for server in compared() {
            let costs = (0..runs).map(|_| scale(server, count, 1 << 30));
            let (mut up, mut down): (Vec<_>, Vec<_>) =
                costs.collect::<Result<Vec<_>>>()?.into_iter().unzip();
            print!(" {:.2} | {:.2} |", median(&mut up), median(&mut down));
        }
        println!();
    }
    Ok(())
}

fn main() -> Result<()> {
    let plan = plan();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    target(listener);
    let start = |kinds: &[Kind]| {
        let started = kinds.iter().map(|&kind| Server::start(kind, port));
        started.collect::<Result<Vec<_>>>()
    };
    let servers = start(&plan.kinds)?;
    println!("{}; medians of {} runs in turns\n", machine(), plan.runs);
    // Memory first, before load has grown anything.
    let once = Plan {
        runs: 1,
        only: plan.only.clone(),
        kinds: plan.kinds.clone(),
        ..plan
    };
    let mut rows = memory_rows(&once, &servers);
    rows.extend(bulk_rows(&plan, &servers));
    rows.extend(latency_rows(&plan, &servers));
    rows.retain(|row| row.figures.iter().any(Option::is_some));
    println!("{}", table(&plan, &rows)?);
    let clients = plan.of_clients();
    let mut rows = client_rows(&clients, &start(&clients.kinds)?);
    rows.retain(|row| row.figures.iter().any(Option::is_some));
    if !rows.is_empty() {
        println!("{}", table(&clients, &rows)?);
    }
    let scaling = "tunnels at once";
    if !plan.quick
        && plan
            .only
            .as_deref()
            .is_none_or(|only| scaling.contains(only))
    {
        scale_table(scaling, &servers, plan.runs)?;
    }
    Ok(())
}
