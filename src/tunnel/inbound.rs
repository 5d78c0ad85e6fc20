//! Thread 1: from the client's WebSocket to the target.
//!
//! tungstenite decodes and judges the frames. It never writes: what it would answer by itself goes nowhere,
//! and what is to be answered is made due at the [`ClientWriter`].

use std::io::{self, IoSliceMut, Read, Write};
use std::net::TcpStream;

use rustix::event::{PollFd, PollFlags, poll};
use tungstenite::error::ProtocolError;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tungstenite::{Error, Message, WebSocket};

use super::client::{ClientWriter, Flushed};
use super::frames::Frames;
use super::state::{InboundEnd, State, Undelivered};
use super::target::TargetSocket;

/// tungstenite's read buffer. It is zeroed before each read, so a larger one costs more than it saves.
const READ_BUFFER: usize = 32 * 1024;

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
    writer: &ClientWriter<'_>,
    state: &State,
) -> InboundEnd {
    let frames = Frames::new(
        ClientReader {
            stream: client,
            writer,
            state,
        },
        early,
    );
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .max_frame_size(Some(READ_BUFFER));
    let mut socket = WebSocket::from_raw_socket(
        Mute(frames),
        Role::Server,
        Some(config.write_buffer_size(0)),
    );
    let mut undelivered = None;
    loop {
        match socket.read() {
            Ok(Message::Binary(bytes)) if bytes.is_empty() || undelivered.is_some() => {}
            Ok(Message::Binary(bytes)) => undelivered = target.deliver(&bytes, state).err(),
            Ok(Message::Ping(payload)) => writer.answer_ping(payload),
            Ok(Message::Pong(payload)) => note_pong(&payload, state),
            Ok(Message::Close(frame)) => return closed(frame, undelivered, target),
            Ok(Message::Text(_)) => {
                return InboundEnd::Refused(CloseCode::Unsupported, NO_TEXT.into());
            }
            Ok(Message::Frame(_)) => {}
            Err(error) => return failed(error),
        }
    }
}

fn note_pong(payload: &[u8], state: &State) {
    if let Some(mark) = ClientWriter::mark_of(payload) {
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
    writer: &'a ClientWriter<'a>,
    state: &'a State,
}

impl ClientReader<'_> {
    /// A pong for which the socket had no room is sent as soon as it has, unless bytes come first.
    fn flush_pong(&self) {
        while self.writer.flush() == Flushed::Full {
            let mut fds = [PollFd::new(self.stream, PollFlags::IN | PollFlags::OUT)];
            if poll(&mut fds, None).is_err() || fds[0].revents() != PollFlags::OUT {
                return;
            }
        }
    }

    fn noted(&self, read: io::Result<usize>) -> io::Result<usize> {
        if read.as_ref().is_ok_and(|&count| count > 0) {
            self.state.note_heard();
        }
        read
    }
}

impl Read for ClientReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.flush_pong();
        let mut stream = self.stream;
        self.noted(retried(|| stream.read(buffer)))
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.flush_pong();
        let mut stream = self.stream;
        self.noted(retried(|| stream.read_vectored(buffers)))
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
