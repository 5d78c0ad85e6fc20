//! Thread 1: from the client's WebSocket to the target. What is to be answered is made due at the
//! [`ClientWriter`].

use std::io::{self, Read};
use std::net::TcpStream;
use std::time::Duration;

use tungstenite::error::ProtocolError;
use tungstenite::protocol::CloseFrame;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Error, Message};

use super::client::ClientWriter;
use super::frames::{Frames, Incoming};
use super::state::{InboundEnd, State, Undelivered};
use super::target::TargetSocket;

/// How much is read at a time from a client that sends little.
const SMALL: usize = 2 * 1024;

/// And from one that sends as fast as it can. Twice as much gains little more, and 500 such clients would hold it.
const LARGE: usize = 128 * 1024;

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
    let mut frames = Frames::new(reader, early, SMALL);
    let mut is_large = false;
    let mut undelivered = None;
    loop {
        match frames.receive() {
            Ok(Incoming::Bytes(bytes)) => {
                if undelivered.is_none() {
                    undelivered = target.deliver(bytes, state).err();
                }
            }
            Ok(Incoming::Message(message)) => match message {
                Message::Ping(payload) => writer.answer_ping(payload),
                Message::Pong(payload) => note_pong(&payload, state),
                Message::Close(frame) => return closed(frame, undelivered, target),
                Message::Text(_) => {
                    return InboundEnd::Refused(CloseCode::Unsupported, NO_TEXT.into());
                }
                Message::Binary(_) | Message::Frame(_) => {}
            },
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                is_large = false;
                frames.set_room(SMALL);
                let _ = client.set_read_timeout(None);
            }
            Err(error) => return failed(error),
        }
        if !is_large && frames.was_full() {
            is_large = true;
            frames.set_room(LARGE);
            let _ = client.set_read_timeout(Some(QUIET));
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
        // Of a control frame, or beyond 2^63.
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

impl Read for ClientReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // What is due to the client before waiting for it: an acknowledgement, now that the bytes have gone on,
        // and a pong.
        if std::mem::take(&mut self.ack_due) {
            super::acknowledge_at_once(self.stream);
        }
        self.writer.flush_before_read();
        loop {
            match (&mut &*self.stream).read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(count @ 1..) => {
                    self.state.note_heard();
                    self.ack_due = count < buffer.len();
                    return Ok(count);
                }
                result => return result,
            }
        }
    }
}
