//! The client's socket, as it is written to, in turns. Only outbound waits in a write here.

use std::io::{self, Write};
use std::net::TcpStream;
use std::sync::{Arc, MutexGuard};

use rustix::event::PollFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustix::pipe::{SpliceFlags, splice};
use tungstenite::Bytes;
use tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tungstenite::protocol::frame::{CloseFrame, Frame, FrameHeader};

use super::state::State;
use super::turns::{Turns, is_ready};

/// The most payload bytes in a message to the client: the smallest default read limit among the clients
/// people use (32 KiB in coder/websocket).
pub const MAX_MESSAGE: usize = 32 * 1024;

/// Room for the header before a message's payload: two bytes and a 16-bit length, no mask (RFC 6455 §5.2).
pub const HEADER_ROOM: usize = 4;

/// RFC 6455 §5.5: a control frame's payload is at most 125 bytes, two of which are a Close's code.
const MAX_REASON: usize = 123;

/// Marks a pong as the answer to one of our pings rather than an unsolicited one.
const PING_TAG: &[u8; 8] = b"tunneld:";

/// The writing half of the client's connection.
#[derive(Debug)]
pub struct ClientWriter {
    stream: Arc<TcpStream>,
    state: Arc<State>,
    turns: Turns<Turn, Due>,
}

/// Held while a frame is written.
#[derive(Debug, Default)]
struct Turn {
    /// A Close has been sent, or there is no WebSocket; nothing may follow (RFC 6455 §5.5.1).
    closed: bool,
}

/// A turn in which nothing is sent.
#[derive(Debug)]
pub struct Held<'a>(MutexGuard<'a, Turn>);

impl Held<'_> {
    /// Lets nothing be sent any more, ever.
    pub fn forbid(mut self) {
        self.0.closed = true;
    }
}

/// What is to be sent as soon as it can be. A newer pong replaces an older one (RFC 6455 §5.5.3); of
/// several Closes the first one counts.
#[derive(Debug, Default)]
struct Due {
    pong: Option<Bytes>,
    close: Option<CloseFrame>,
}

impl ClientWriter {
    /// The writer for `stream`.
    pub fn new(stream: Arc<TcpStream>, state: Arc<State>) -> ClientWriter {
        ClientWriter {
            stream,
            state,
            turns: Turns::default(),
        }
    }

    /// Lets nothing be sent until the returned guard is dropped.
    pub fn hold(&self) -> Held<'_> {
        Held(self.turns.take())
    }

    /// Sends a binary message: the payload is `buffer[HEADER_ROOM..]`, not empty and at most
    /// [`MAX_MESSAGE`] bytes long. Waits while the client is slow.
    ///
    /// # Errors
    /// When the client takes no more: its connection failed, or a Close has been sent.
    pub fn send_message(&self, buffer: &mut [u8]) -> io::Result<()> {
        let payload = buffer.len() - HEADER_ROOM;
        let (header, length) = header(payload)?;
        let start = HEADER_ROOM - length;
        buffer[start..HEADER_ROOM].copy_from_slice(&header[..length]);
        self.send_payload(payload, || (&mut &*self.stream).write_all(&buffer[start..]))
    }

    /// Sends a binary message whose payload is the `payload` bytes in `pipe`, at least one and at most
    /// [`MAX_MESSAGE`], without copying them. Waits while the client is slow.
    ///
    /// # Errors
    /// When the client takes no more: its connection failed, or a Close has been sent.
    pub fn send_from(&self, pipe: &OwnedFd, payload: usize) -> io::Result<()> {
        let (header, length) = header(payload)?;
        self.send_payload(payload, || {
            self.send_header(&header[..length])?;
            let mut left = payload;
            while left > 0 {
                match splice(pipe, None, &*self.stream, None, left, SpliceFlags::MOVE) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(moved) => left -= moved,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(())
        })
    }

    /// The kernel keeps the header back to send it along with the payload.
    fn send_header(&self, mut header: &[u8]) -> io::Result<()> {
        while !header.is_empty() {
            match send(&*self.stream, header, SendFlags::MORE | SendFlags::NOSIGNAL) {
                Ok(sent) => header = &header[sent..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn send_payload(
        &self,
        payload: usize,
        write: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let turn = self.turns.take();
        if turn.closed {
            return Err(io::Error::new(
                io::ErrorKind::BrokenPipe,
                "a Close has been sent",
            ));
        }
        let since = self.state.note_offered(payload);
        write()?;
        self.state.note_sent(payload, since);
        self.end_turn(turn)
    }

    /// Sends a Close unless one has been sent. Waits while the client is slow.
    ///
    /// # Errors
    /// When the client takes no more.
    pub fn send_close(&self, code: CloseCode, reason: &str) -> io::Result<()> {
        self.set_close(code, reason);
        self.end_turn(self.turns.take())
    }

    /// Makes a Close due, unless one is.
    pub fn set_close(&self, code: CloseCode, reason: &str) {
        let reason = &reason[..reason.floor_char_boundary(MAX_REASON)];
        let close = CloseFrame {
            code,
            reason: reason.into(),
        };
        self.turns
            .set_due(|due| due.close = due.close.take().or(Some(close)));
    }

    /// Makes a pong due, and sends it if that needs no waiting.
    pub fn answer_ping(&self, payload: Bytes) {
        self.turns.set_due(|due| due.pong = Some(payload));
        self.flush();
    }

    /// Sends what is due, if that needs no waiting. When another thread is writing, it sends it.
    pub fn flush(&self) {
        self.turns
            .flush(&*self.stream, |turn, due| self.send_due(turn, due));
    }

    /// Sends what is due before a wait for the client: as soon as there is room, unless bytes come first.
    pub fn flush_before_read(&self) {
        self.turns
            .flush_before_read(&*self.stream, |turn, due| self.send_due(turn, due));
    }

    /// Sends a ping, unless that would need waiting. `false` if it would: then bytes are on their way.
    ///
    /// # Errors
    /// When the client's connection failed.
    pub fn try_ping(&self) -> io::Result<bool> {
        let Some(turn) = self.turns.try_take() else {
            return Ok(false);
        };
        if turn.closed || !is_ready(&*self.stream, PollFlags::OUT) {
            return Ok(false);
        }
        let payload = [&PING_TAG[..], &self.state.offered().to_be_bytes()].concat();
        self.write(Frame::ping(payload))?;
        self.end_turn(turn).map(|()| true)
    }

    /// How many bytes had been offered when the ping was sent that `pong` answers; `None` if it answers
    /// none of ours.
    pub fn mark_of(pong: &[u8]) -> Option<u64> {
        let mark = pong.strip_prefix(PING_TAG)?;
        mark.try_into().ok().map(u64::from_be_bytes)
    }

    fn end_turn(&self, turn: MutexGuard<'_, Turn>) -> io::Result<()> {
        self.turns.end(turn, |turn, due| self.send_due(turn, due))
    }

    fn send_due(&self, turn: &mut Turn, Due { pong, close }: Due) -> io::Result<()> {
        if turn.closed {
            return Ok(());
        }
        if let Some(payload) = pong {
            self.write(Frame::pong(payload))?;
        }
        if let Some(close) = close {
            turn.closed = true;
            self.write(Frame::close(Some(close)))?;
        }
        Ok(())
    }

    fn write(&self, frame: Frame) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(frame.len());
        frame.format(&mut bytes).map_err(io::Error::other)?;
        (&mut &*self.stream).write_all(&bytes)
    }
}

/// The header of a binary message, and its length.
fn header(payload: usize) -> io::Result<([u8; HEADER_ROOM], usize)> {
    let header = FrameHeader {
        opcode: OpCode::Data(Data::Binary),
        ..FrameHeader::default()
    };
    let mut bytes = [0; HEADER_ROOM];
    header
        .format(payload as u64, &mut &mut bytes[..])
        .map_err(io::Error::other)?;
    Ok((bytes, header.len(payload as u64)))
}
