//! The server's connection: written to in turns, and read from by tungstenite. Only the upload waits in a write
//! here.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use socket2::Socket;
use tungstenite::Bytes;
use tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tungstenite::protocol::frame::{CloseFrame, Frame, FrameHeader};

use crate::tunnel::state::State;
use crate::tunnel::turns::Turns;

/// The most payload bytes in a message to the server.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// The writing half of the server's connection.
#[derive(Debug)]
pub struct ServerWriter {
    socket: Arc<Socket>,
    state: Arc<State>,
    turns: Turns<Turn, Due>,
}

/// Held while a frame is written.
#[derive(Debug, Default)]
struct Turn {
    /// A Close has been sent (RFC 6455 §5.5.1) or a frame torn; nothing may follow.
    closed: bool,
    /// A frame's bytes. Kept, as the next frame is of the same size.
    frame: Vec<u8>,
}

/// What is to be sent as soon as it can be. A newer pong replaces an older one (RFC 6455 §5.5.3); of
/// several Closes the first one counts.
#[derive(Debug, Default)]
struct Due {
    pong: Option<Bytes>,
    ping: bool,
    close: Option<CloseFrame>,
}

impl ServerWriter {
    /// The writer for `socket`, on which the upgrade is done.
    pub fn new(socket: Arc<Socket>, state: Arc<State>) -> ServerWriter {
        ServerWriter {
            socket,
            state,
            turns: Turns::default(),
        }
    }

    /// Sends a binary message. Waits while the server is slow.
    ///
    /// # Errors
    /// When the server takes no more: its connection failed, or a Close has been sent.
    pub fn send_message(&self, payload: &[u8]) -> io::Result<()> {
        let mut turn = self.turns.take();
        let since = self.state.note_offered(payload.len());
        let header = FrameHeader {
            opcode: OpCode::Data(Data::Binary),
            ..FrameHeader::default()
        };
        let frame = Frame::from_payload(header, Bytes::copy_from_slice(payload));
        self.write(&mut turn, frame, since)?;
        self.end_turn(turn)
    }

    /// Sends a Close unless one has been sent. Waits while the server is slow.
    ///
    /// # Errors
    /// When the server takes no more.
    pub fn send_close(&self, code: CloseCode) -> io::Result<()> {
        self.set_close(code, "");
        self.end_turn(self.turns.take())
    }

    /// Sends a Close, unless one has been, if that needs no waiting.
    pub fn try_close(&self, code: CloseCode, reason: &str) {
        self.set_close(code, reason);
        self.flush();
    }

    fn set_close(&self, code: CloseCode, reason: &str) {
        let reason = reason.into();
        let close = CloseFrame { code, reason };
        self.turns
            .set_due(|due| due.close = due.close.take().or(Some(close)));
    }

    /// Makes a pong due, and sends it if that needs no waiting.
    pub fn answer_ping(&self, payload: Bytes) {
        self.turns.set_due(|due| due.pong = Some(payload));
        self.flush();
    }

    /// Makes a ping due, and sends it if that needs no waiting. Its pong tells how many bytes had been
    /// offered before it: [`mark_of`].
    pub fn ping(&self) {
        self.turns.set_due(|due| due.ping = true);
        self.flush();
    }

    /// Sends what is due, if that needs no waiting. When another thread is writing, it sends it.
    fn flush(&self) {
        self.turns
            .flush(&*self.socket, |turn, due| self.send_due(turn, due));
    }

    /// What is due and found no room is sent as soon as there is some, unless bytes come first.
    fn flush_before_read(&self) {
        self.turns
            .flush_before_read(&*self.socket, |turn, due| self.send_due(turn, due));
    }

    fn end_turn(&self, turn: MutexGuard<'_, Turn>) -> io::Result<()> {
        self.turns.end(turn, |turn, due| self.send_due(turn, due))
    }

    fn send_due(&self, turn: &mut Turn, Due { pong, ping, close }: Due) -> io::Result<()> {
        if turn.closed {
            return Ok(());
        }
        let since = self.state.note_offered(0);
        if let Some(payload) = pong {
            self.write(turn, Frame::pong(payload), since)?;
        }
        if ping {
            let mark = self.state.offered().to_be_bytes();
            self.write(turn, Frame::ping(mark.to_vec()), since)?;
        }
        if let Some(close) = close {
            self.write(turn, Frame::close(Some(close)), since)?;
            turn.closed = true;
        }
        Ok(())
    }

    /// Writes a frame with a mask of its own (RFC 6455 §5.3).
    fn write(&self, turn: &mut Turn, mut frame: Frame, since: u64) -> io::Result<()> {
        if turn.closed {
            return Err(io::Error::new(
                ErrorKind::BrokenPipe,
                "nothing can follow a Close",
            ));
        }
        frame.header_mut().mask = Some(rand::random());
        turn.frame.clear();
        frame.format(&mut turn.frame).map_err(io::Error::other)?;
        let written = self.write_all(&turn.frame, since);
        turn.closed |= written.is_err();
        written
    }

    /// Bytes that the socket took have moved, even while the rest of a frame waits.
    fn write_all(&self, mut bytes: &[u8], since: u64) -> io::Result<()> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        while !bytes.is_empty() {
            match send(&*self.socket, bytes, flags) {
                Ok(count) => {
                    self.state.note_sent(count, since);
                    bytes = &bytes[count..];
                }
                Err(Errno::AGAIN | Errno::NOBUFS) => {
                    let mut fds = [PollFd::new(&*self.socket, PollFlags::OUT)];
                    match poll(&mut fds, None) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// How many bytes had been offered when the ping was sent that `pong` answers; `None` if it answers none
/// of ours.
pub fn mark_of(pong: &[u8]) -> Option<u64> {
    pong.try_into().ok().map(u64::from_be_bytes)
}

/// Ends both directions of `socket` at once, for every thread that uses it.
pub fn shut(socket: &Socket) {
    let _ = socket.shutdown(Shutdown::Both);
}

/// How many bytes behind a Close, where there are to be none, are read and dropped.
const MAX_BEHIND_CLOSE: usize = 1024 * 1024;

/// Ends a connection in order, on which both sides have sent their Close: sees the server close it, so that
/// everything up to our Close has reached it. For those that leave that to the client there is a `limit`.
///
/// # Errors
/// When the connection failed: what was sent last may not have reached it.
pub fn end(socket: &Socket, limit: Duration) -> io::Result<()> {
    let deadline = Instant::now() + limit;
    let _ = socket.shutdown(Shutdown::Write);
    let mut rest = vec![0; 16 * 1024];
    let mut dropped = 0;
    while let Ok(left) = left(deadline) {
        let _ = socket.set_read_timeout(Some(left));
        match (&mut &*socket).read(&mut rest) {
            Ok(count @ 1..) if dropped < MAX_BEHIND_CLOSE => dropped += count,
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The connection as tungstenite reads from it. It begins with the handshake, in which tungstenite writes
/// too; then its writes go nowhere, as what is to be answered is made due at the [`ServerWriter`].
#[derive(Debug)]
pub struct ServerStream {
    socket: Arc<Socket>,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// Until the deadline.
    Handshake(Instant),
    /// Each read that brings bytes is a sign of life.
    Open(Arc<ServerWriter>, Arc<State>),
}

impl ServerStream {
    /// A connection on which the handshake has until `deadline`.
    pub fn new(socket: Arc<Socket>, deadline: Instant) -> ServerStream {
        ServerStream {
            socket,
            phase: Phase::Handshake(deadline),
        }
    }

    /// The connection's socket.
    pub fn socket(&self) -> Arc<Socket> {
        Arc::clone(&self.socket)
    }

    /// The handshake is done: reads have no deadline any more, and writes are the writer's.
    ///
    /// # Errors
    /// When the system can't take the timeouts back.
    pub fn open(&mut self, writer: Arc<ServerWriter>, state: Arc<State>) -> io::Result<()> {
        self.socket.set_read_timeout(None)?;
        self.socket.set_write_timeout(None)?;
        self.phase = Phase::Open(writer, state);
        Ok(())
    }
}

impl Read for ServerStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.phase {
            Phase::Handshake(deadline) => self.socket.set_read_timeout(Some(left(*deadline)?))?,
            Phase::Open(writer, _) => writer.flush_before_read(),
        }
        loop {
            let read = (&*self.socket).read(buffer);
            match (read, &self.phase) {
                (Err(error), _) if error.kind() == ErrorKind::Interrupted => {}
                (Ok(count @ 1..), Phase::Open(_, state)) => {
                    state.note_heard();
                    return Ok(count);
                }
                (read, _) => return read,
            }
        }
    }
}

impl Write for ServerStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &self.phase {
            Phase::Handshake(deadline) => {
                self.socket.set_write_timeout(Some(left(*deadline)?))?;
                (&*self.socket).write(buffer)
            }
            Phase::Open(..) => Ok(buffer.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How long it is to `deadline`.
///
/// # Errors
/// `WouldBlock`, as a read with a timeout has it, when it is over.
pub fn left(deadline: Instant) -> io::Result<Duration> {
    match deadline.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(left),
        _ => Err(ErrorKind::WouldBlock.into()),
    }
}
