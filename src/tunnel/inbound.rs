//! Thread 1: from the client's WebSocket to the target.
//!
//! tungstenite decodes and judges the frames. It never writes: what it would answer by itself goes nowhere,
//! and what is to be answered is made due at the [`ClientWriter`].

use std::io::{self, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use tungstenite::error::ProtocolError;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tungstenite::{Error, Message, WebSocket};

use super::client::ClientWriter;
use super::frames::{Frames, PIECE_HEADER};
use super::state::{InboundEnd, State, Undelivered};
use super::target::TargetSocket;

/// How much is read at a time from a client that sends little.
const SMALL: usize = 2 * 1024;

/// tungstenite's share of that at a time. The pieces of a message go on together all the same.
const SMALL_PIECE: usize = 512;

/// And from one that sends as fast as it can. tungstenite zeroes its buffer before each read, so a larger one
/// costs more than it saves.
const LARGE: usize = 64 * 1024;

/// How long a client must be silent to be one that sends little.
const QUIET: Duration = Duration::from_secs(1);

/// What a text message is answered with, in a Close 1003.
const NO_TEXT: &str = "binary frames only (websocat: --binary)";

/// Relays until the client's direction has ended, and tells how.
///
/// The target has seen that end when this returns: the FIN behind the last byte after a Close, or nothing
/// (the caller then breaks it off).
pub fn relay(
    client: &TcpStream,
    early: Vec<u8>,
    target: &TargetSocket,
    writer: &ClientWriter,
    state: &State,
) -> InboundEnd {
    let reader = ClientReader {
        stream: client,
        ack_due: false,
        writer,
        state,
    };
    let mut socket = socket(Frames::new(reader, early, SMALL), SMALL);
    let mut room = SMALL;
    let mut delivery = Delivery {
        target,
        state,
        pending: Vec::new(),
        undelivered: None,
    };
    loop {
        if !socket.get_ref().0.has_more() {
            delivery.flush();
        }
        match socket.read() {
            Ok(Message::Binary(bytes)) => delivery.take(&bytes),
            Ok(Message::Ping(payload)) => writer.answer_ping(payload),
            Ok(Message::Pong(payload)) => note_pong(&payload, state),
            Ok(Message::Close(frame)) => return closed(frame, delivery.finish(), target),
            Ok(Message::Text(_)) => {
                delivery.flush();
                return InboundEnd::Refused(CloseCode::Unsupported, NO_TEXT.into());
            }
            Ok(Message::Frame(_)) => {}
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                if !socket.get_ref().0.is_between_frames() {
                    continue;
                }
                (socket, room) = resized(socket, SMALL);
                delivery.pending = Vec::new();
                let _ = client.set_read_timeout(None);
            }
            Err(error) => {
                delivery.flush();
                return failed(error);
            }
        }
        if room == SMALL && socket.get_ref().0.was_full() && socket.get_ref().0.is_between_frames()
        {
            (socket, room) = resized(socket, LARGE);
            let _ = client.set_read_timeout(Some(QUIET));
        }
    }
}

type Socket<'a> = WebSocket<Mute<Frames<ClientReader<'a>>>>;

fn socket<'a>(frames: Frames<ClientReader<'a>>, room: usize) -> Socket<'a> {
    let piece = if room == SMALL { SMALL_PIECE } else { room };
    let config = WebSocketConfig::default()
        .read_buffer_size(PIECE_HEADER + piece)
        .max_frame_size(Some(LARGE));
    WebSocket::from_raw_socket(
        Mute(frames),
        Role::Server,
        Some(config.write_buffer_size(0)),
    )
}

/// The same socket with other buffers. [`Frames`] hands on whole frames, so tungstenite's is empty between
/// two messages.
fn resized<'a>(socket: Socket<'a>, room: usize) -> (Socket<'a>, usize) {
    let mut frames = socket.into_inner().0;
    frames.set_room(room);
    (self::socket(frames, room), room)
}

/// Bytes on their way to the target. Short messages that are here already go together, as one send costs
/// more than copying them.
struct Delivery<'a> {
    target: &'a TargetSocket,
    state: &'a State,
    pending: Vec<u8>,
    undelivered: Option<Undelivered>,
}

impl Delivery<'_> {
    /// Takes the bytes of one message, in their order. They have gone on when [`Delivery::flush`] returns.
    fn take(&mut self, bytes: &[u8]) {
        /// The longest message worth copying.
        const SHORT: usize = LARGE / 2;
        if bytes.len() > SHORT || self.pending.len() + bytes.len() > LARGE {
            self.flush();
        }
        if bytes.len() > SHORT {
            self.deliver(bytes);
        } else {
            self.pending.extend_from_slice(bytes);
        }
    }

    fn flush(&mut self) {
        if !self.pending.is_empty() {
            let pending = std::mem::take(&mut self.pending);
            self.deliver(&pending);
            self.pending = pending;
            self.pending.clear();
        }
    }

    /// The last bytes; and why the target could not be given all, if so.
    fn finish(mut self) -> Option<Undelivered> {
        self.flush();
        self.undelivered
    }

    fn deliver(&mut self, bytes: &[u8]) {
        if self.undelivered.is_none() {
            self.undelivered = self.target.deliver(bytes, self.state).err();
        }
    }
}

fn note_pong(payload: &[u8], state: &State) {
    if let Some(mark) = ClientWriter::mark_of(payload) {
        log::debug!("pong: id={}", state.id);
        state.note_answered(mark);
    }
}

fn closed(
    frame: Option<CloseFrame>,
    undelivered: Option<Undelivered>,
    target: &TargetSocket,
) -> InboundEnd {
    /// What tungstenite puts in place of a code that may not be on the wire.
    const REPLACED: &str = "Protocol violation";
    match (frame, undelivered) {
        (Some(frame), _)
            if frame.code == CloseCode::Protocol && frame.reason.as_str() == REPLACED =>
        {
            InboundEnd::Refused(
                CloseCode::Protocol,
                "a close code that may not be sent".into(),
            )
        }
        (_, Some(why)) => InboundEnd::CloseUndelivered(why),
        (_, None) => {
            target.finish();
            InboundEnd::Close
        }
    }
}

fn failed(error: Error) -> InboundEnd {
    match error {
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) | Error::ConnectionClosed => {
            InboundEnd::Vanished("end of its stream without a Close".into())
        }
        Error::Io(error) => InboundEnd::Vanished(error.to_string()),
        // Data frames come in short pieces, so only a control frame, or a length beyond 2^63, is too long.
        Error::Capacity(_) => InboundEnd::Refused(
            CloseCode::Protocol,
            "a frame with a length that is not allowed".into(),
        ),
        Error::Utf8(_) => InboundEnd::Refused(
            CloseCode::Protocol,
            "a close reason that is not UTF-8".into(),
        ),
        error => InboundEnd::Refused(CloseCode::Protocol, error.to_string()),
    }
}

/// The client's socket as it is read from. Each read that brings bytes is a sign of life.
struct ClientReader<'a> {
    stream: &'a TcpStream,
    /// The last read found less than it had room for.
    ack_due: bool,
    writer: &'a ClientWriter,
    state: &'a State,
}

impl ClientReader<'_> {
    /// What is due to the client before waiting for it: an acknowledgement, now that the bytes have gone on, and
    /// a pong.
    fn before_read(&mut self) {
        if std::mem::take(&mut self.ack_due) {
            super::acknowledge_at_once(self.stream);
        }
        self.writer.flush_before_read();
    }

    fn noted(&mut self, read: io::Result<usize>, room: usize) -> io::Result<usize> {
        if let Ok(count @ 1..) = read {
            self.state.note_heard();
            self.ack_due = count < room;
        }
        read
    }
}

impl Read for ClientReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.before_read();
        let mut stream = self.stream;
        let room = buffer.len();
        self.noted(retried(|| stream.read(buffer)), room)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.before_read();
        let mut stream = self.stream;
        let room = buffers.iter().map(|buffer| buffer.len()).sum();
        self.noted(retried(|| stream.read_vectored(buffers)), room)
    }
}

fn retried(mut read: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match read() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// A stream whose writes go nowhere.
struct Mute<R>(R);

impl<R: Read> Read for Mute<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R> Write for Mute<R> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
