//! The connections a side may have: plain TCP, the test's own client of the daemon, the streams of a `tunneld connect`.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::{ioctl_fionbio, ioctl_fionread};
use rustix::net::{SendFlags, send, sockopt};

use crate::connect_tcp::{Capsules, DATA, FINAL_DATA, capsule, header_of};
use crate::support::*;

/// What came of a read or a write that doesn't wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    Bytes(usize),
    Blocked,
    /// A read came to the orderly end.
    Eof,
    /// The connection has failed, or the other side has said that it did.
    Broken,
}

/// How a connection was closed.
#[derive(Debug, Default)]
pub struct Closed {
    /// The other side was given an orderly end.
    pub in_order: bool,
    /// At that moment it was found broken.
    pub is_broken: bool,
}

#[derive(Debug, Clone)]
pub struct Exit {
    /// `None` if it had to be killed.
    pub code: Option<i32>,
    pub at: Instant,
    pub stderr: String,
}

/// How long a `tunneld connect` may take to exit once it has lost its streams.
const EXIT_LIMIT: Duration = Duration::from_secs(15);

pub trait Wire: Send {
    fn put(&mut self, bytes: &[u8], is_urgent: bool) -> Moved;
    fn get(&mut self, buffer: &mut [u8]) -> Moved;
    /// Ends writing in order: `Bytes(0)` once that is done.
    fn fin(&mut self) -> Moved;
    fn close(&mut self) -> Closed;
    fn reset(&mut self);
    /// Where it is read from and written to.
    fn descriptors(&self) -> (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>);
    /// Goes on with what `put` has begun; whether something is left.
    fn push(&mut self) -> bool {
        false
    }
    /// Looks behind the orderly end: whether it is broken there.
    fn is_broken_behind_end(&mut self) -> bool {
        false
    }
    fn exit(&self) -> Option<Exit> {
        None
    }
}

fn moved(result: io::Result<usize>, at_zero: Moved) -> Moved {
    match result {
        Ok(0) => at_zero,
        Ok(count) => Moved::Bytes(count),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Moved::Blocked
        }
        Err(_) => Moved::Broken,
    }
}

pub struct Tcp(Option<TcpStream>);

impl Tcp {
    pub fn new(stream: TcpStream) -> Tcp {
        stream.set_nonblocking(true).unwrap();
        stream.set_nodelay(true).unwrap();
        sockopt::set_socket_oobinline(&stream, true).unwrap();
        Tcp(Some(stream))
    }

    fn stream(&self) -> &TcpStream {
        self.0.as_ref().unwrap()
    }
}

impl Wire for Tcp {
    fn put(&mut self, bytes: &[u8], is_urgent: bool) -> Moved {
        let mut flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        flags.set(SendFlags::OOB, is_urgent);
        moved(
            send(self.stream(), bytes, flags).map_err(io::Error::from),
            Moved::Bytes(0),
        )
    }

    fn get(&mut self, buffer: &mut [u8]) -> Moved {
        moved(self.stream().read(buffer), Moved::Eof)
    }

    fn fin(&mut self) -> Moved {
        match self.stream().shutdown(Shutdown::Write) {
            Ok(()) => Moved::Bytes(0),
            Err(_) => Moved::Broken,
        }
    }

    fn close(&mut self) -> Closed {
        let unread = ioctl_fionread(self.stream()).unwrap();
        self.0 = None;
        Closed {
            in_order: unread == 0,
            is_broken: false,
        }
    }

    fn reset(&mut self) {
        sockopt::set_socket_linger(self.stream(), Some(Duration::ZERO)).unwrap();
        self.0 = None;
    }

    fn descriptors(&self) -> (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>) {
        (Some(self.stream().as_fd()), Some(self.stream().as_fd()))
    }
}

/// What a tunnel speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    WebSocket,
    ConnectTcp,
}

/// A client's tunnel: bytes are messages, a FIN is a Close 1000 or a FINAL_DATA, a RST is one.
pub struct Framed {
    protocol: Protocol,
    stream: Option<TcpStream>,
    /// Messages to be sent, and how much of them was.
    frames: Vec<u8>,
    sent: usize,
    /// What was read and not yet taken.
    read: Vec<u8>,
    /// Payload of the message in front of `read` that is still to come.
    payload: usize,
    /// That is the last one.
    is_last: bool,
    /// How many bytes were put.
    put: usize,
    is_shut: bool,
    end_sent: bool,
    end_seen: bool,
    is_broken: bool,
}

/// The largest message, in bytes.
const MESSAGE: usize = 50_000;

impl Framed {
    pub fn open(protocol: Protocol, daemon: &Daemon, port: u16) -> Framed {
        // It is sent nothing yet, so no byte is left in its buffer.
        let stream = match protocol {
            Protocol::WebSocket => Client::open(daemon, port).stream,
            Protocol::ConnectTcp => Capsules::open(daemon, port).stream,
        };
        stream.set_nonblocking(true).unwrap();
        stream.set_nodelay(true).unwrap();
        Framed {
            protocol,
            stream: Some(stream),
            frames: Vec::new(),
            sent: 0,
            read: Vec::new(),
            payload: 0,
            is_last: false,
            put: 0,
            is_shut: false,
            end_sent: false,
            end_seen: false,
            is_broken: false,
        }
    }

    fn message(&self, bytes: &[u8]) -> Vec<u8> {
        match self.protocol {
            Protocol::WebSocket => frame(0x82, bytes),
            Protocol::ConnectTcp => capsule(DATA, bytes),
        }
    }

    fn end(&self) -> Vec<u8> {
        match self.protocol {
            Protocol::WebSocket => frame(0x88, &1000u16.to_be_bytes()),
            Protocol::ConnectTcp => capsule(FINAL_DATA, b""),
        }
    }

    fn stream(&self) -> &TcpStream {
        self.stream.as_ref().unwrap()
    }

    /// `Bytes(0)` once everything was sent.
    fn flush(&mut self) -> Moved {
        while self.sent < self.frames.len() {
            match moved(
                self.stream().write(&self.frames[self.sent..]),
                Moved::Blocked,
            ) {
                Moved::Bytes(count) => self.sent += count,
                Moved::Broken => {
                    self.is_broken = true;
                    return Moved::Broken;
                }
                other => return other,
            }
        }
        self.frames.clear();
        self.sent = 0;
        Moved::Bytes(0)
    }

    /// Reads once more.
    fn fill(&mut self) -> Moved {
        let mut more = [0; 64 * 1024];
        let moved = moved(self.stream().read(&mut more), Moved::Eof);
        if let Moved::Bytes(count) = moved {
            self.read.extend(&more[..count]);
            let may_come = !self.end_seen || self.protocol == Protocol::WebSocket;
            assert!(may_come, "data behind FINAL_DATA");
        }
        moved
    }

    /// Takes the next header, and whole control frames, off what was read. `None` if more is needed.
    fn next_message(&mut self) -> Option<Moved> {
        match self.protocol {
            Protocol::WebSocket => self.next_frame(),
            Protocol::ConnectTcp => self.next_capsule(),
        }
    }

    fn next_capsule(&mut self) -> Option<Moved> {
        if self.is_last {
            assert!(self.read.is_empty(), "data behind FINAL_DATA");
            self.end_seen = true;
            return Some(Moved::Eof);
        }
        let (of_type, header, length) = header_of(&self.read)?;
        assert!([DATA, FINAL_DATA].contains(&of_type), "type {of_type:#x}");
        self.read.drain(..header);
        self.payload = length;
        self.is_last = of_type == FINAL_DATA;
        Some(Moved::Blocked)
    }

    fn next_frame(&mut self) -> Option<Moved> {
        let (&first, &short) = (self.read.first()?, self.read.get(1)?);
        assert_eq!(short & 0x80, 0, "a masked frame");
        let (header, length) = match short {
            126 => (
                4,
                usize::from(u16::from_be_bytes(self.read.get(2..4)?.try_into().unwrap())),
            ),
            127 => (
                10,
                u64::from_be_bytes(self.read.get(2..10)?.try_into().unwrap()) as usize,
            ),
            short => (2, usize::from(short)),
        };
        if first & 0x0f == 2 {
            self.read.drain(..header);
            self.payload = length;
            return Some(Moved::Blocked);
        }
        let payload = self.read.get(header..header + length)?.to_vec();
        self.read.drain(..header + length);
        Some(match first & 0x0f {
            9 | 10 => Moved::Blocked,
            8 if payload.starts_with(&1000u16.to_be_bytes()) => {
                self.end_seen = true;
                Moved::Eof
            }
            8 => Moved::Broken,
            opcode => panic!("opcode {opcode}"),
        })
    }

    /// Waits until the daemon closes, or sends what nobody reads any more; whether that was no orderly end.
    fn breaks_behind_end(&mut self) -> bool {
        let limit = Instant::now() + EXIT_LIMIT;
        let mut byte = [0];
        while Instant::now() < limit {
            let got = match self.end_seen {
                true => self.fill(),
                false => self.get(&mut byte),
            };
            match got {
                Moved::Eof if self.end_seen => return false,
                Moved::Broken | Moved::Bytes(_) => return true,
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        panic!("the daemon does not close behind both ends");
    }
}

impl Wire for Framed {
    fn put(&mut self, bytes: &[u8], _: bool) -> Moved {
        match self.flush() {
            Moved::Bytes(_) => {}
            other => return other,
        }
        let count = bytes.len().min(MESSAGE);
        self.frames.extend(self.message(&bytes[..count]));
        match self.flush() {
            Moved::Broken => Moved::Broken,
            _ => {
                self.put += count;
                Moved::Bytes(count)
            }
        }
    }

    fn get(&mut self, buffer: &mut [u8]) -> Moved {
        if self.is_broken {
            return Moved::Broken;
        }
        loop {
            if self.payload > 0 && !self.read.is_empty() {
                let count = self.payload.min(self.read.len()).min(buffer.len());
                buffer[..count].copy_from_slice(&self.read[..count]);
                self.read.drain(..count);
                self.payload -= count;
                return Moved::Bytes(count);
            }
            let next = if self.payload > 0 {
                None
            } else {
                self.next_message()
            };
            match next {
                Some(Moved::Blocked) => {}
                Some(end) => return end,
                None => match self.fill() {
                    Moved::Bytes(_) => {}
                    // There was no end before it.
                    Moved::Eof | Moved::Broken => return Moved::Broken,
                    other => return other,
                },
            }
        }
    }

    fn fin(&mut self) -> Moved {
        if !self.end_sent {
            self.frames.extend(self.end());
            self.end_sent = true;
        }
        let flushed = self.flush();
        // Behind FINAL_DATA a client may end its side of the connection, too. Half of them do.
        let shuts = self.protocol == Protocol::ConnectTcp && self.put % 2 == 1;
        if flushed == Moved::Bytes(0) && shuts && !self.is_shut {
            self.is_shut = true;
            if self.stream().shutdown(Shutdown::Write).is_err() {
                self.is_broken = true;
                return Moved::Broken;
            }
        }
        flushed
    }

    fn close(&mut self) -> Closed {
        let had_end = self.end_seen;
        let mut byte = [0];
        let is_unread = !had_end && matches!(self.get(&mut byte), Moved::Bytes(_));
        let mut closed = Closed {
            in_order: !is_unread && self.fin() == Moved::Bytes(0),
            is_broken: false,
        };
        // Over TCP a FIN that nobody has read does not make a close a reset. Here a message that says it would.
        let breaks = closed.in_order && self.breaks_behind_end();
        closed.is_broken = breaks && had_end;
        if !closed.in_order || breaks {
            sockopt::set_socket_linger(self.stream(), Some(Duration::ZERO)).unwrap();
        }
        self.stream = None;
        closed
    }

    fn reset(&mut self) {
        sockopt::set_socket_linger(self.stream(), Some(Duration::ZERO)).unwrap();
        self.stream = None;
    }

    fn descriptors(&self) -> (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>) {
        (Some(self.stream().as_fd()), Some(self.stream().as_fd()))
    }

    fn push(&mut self) -> bool {
        !self.is_broken && self.flush() == Moved::Blocked
    }

    fn is_broken_behind_end(&mut self) -> bool {
        match self.fill() {
            Moved::Broken => true,
            // An EOF is right once both have said that they are done.
            Moved::Eof => !self.end_sent,
            _ => self.is_broken,
        }
    }
}

/// A `tunneld connect`. A RST is its death by SIGKILL, and exit code 0 its only orderly end.
pub struct Streams {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    exit: Option<Exit>,
}

impl Streams {
    pub fn spawn(mut command: Command) -> Streams {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        ioctl_fionbio(stdin.as_ref().unwrap(), true).unwrap();
        ioctl_fionbio(stdout.as_ref().unwrap(), true).unwrap();
        Streams {
            child,
            stdin,
            stdout,
            exit: None,
        }
    }

    /// Waits for its end; whether it was an orderly one.
    fn wait(&mut self) -> bool {
        if self.exit.is_none() {
            let child = &mut self.child;
            let limit = Instant::now() + EXIT_LIMIT;
            let mut status = child.try_wait().unwrap();
            while status.is_none() && Instant::now() < limit {
                std::thread::sleep(Duration::from_millis(1));
                status = child.try_wait().unwrap();
            }
            if status.is_none() {
                let _ = child.kill();
            }
            let at = Instant::now();
            let mut stderr = String::new();
            let _ = child.stderr.take().unwrap().read_to_string(&mut stderr);
            self.exit = Some(Exit {
                code: status.and_then(|status| status.code()),
                at,
                stderr,
            });
        }
        self.exit.as_ref().unwrap().code == Some(0)
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Wire for Streams {
    fn put(&mut self, bytes: &[u8], _: bool) -> Moved {
        match &mut self.stdin {
            Some(stdin) => moved(stdin.write(bytes), Moved::Blocked),
            None => Moved::Broken,
        }
    }

    fn get(&mut self, buffer: &mut [u8]) -> Moved {
        match moved(self.stdout.as_mut().unwrap().read(buffer), Moved::Eof) {
            Moved::Eof if !self.wait() => Moved::Broken,
            moved => moved,
        }
    }

    fn fin(&mut self) -> Moved {
        self.stdin = None;
        Moved::Bytes(0)
    }

    fn close(&mut self) -> Closed {
        self.stdin = None;
        self.stdout = None;
        self.wait();
        Closed {
            in_order: true,
            is_broken: false,
        }
    }

    fn reset(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn descriptors(&self) -> (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>) {
        (
            self.stdout.as_ref().map(AsFd::as_fd),
            self.stdin.as_ref().map(AsFd::as_fd),
        )
    }

    fn exit(&self) -> Option<Exit> {
        self.exit.clone()
    }
}
