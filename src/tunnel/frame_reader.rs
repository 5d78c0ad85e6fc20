//! WebSocket frames in: the bytes of data frames as they arrive, and tungstenite's judgement of the rest.
//!
//! tungstenite keeps a message in memory until its last byte is there, and a tunnel has no use for messages. So the
//! payload of a sound data frame goes past it, unmasked where it lies, or untouched if it bears no mask. Control
//! frames go to tungstenite as they come; and of a data frame that can't be right, the header, for it to say what is
//! wrong.

use std::io::{self, Cursor, Read, Write};
use std::ops::Range;

use tungstenite::error::ProtocolError;
use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tungstenite::protocol::{self, CloseFrame, WebSocketConfig, WebSocketContext};
use tungstenite::{Error, Message};

use super::Role;
use super::incoming::{Fault, Incoming, failure, nothing_or};
use super::pipe::WORTH_SPLICING;
use super::read_buffer::ReadBuffer;

/// The most payload in a frame that tungstenite gets to see (RFC 6455 §5.5).
const MAX_CONTROL: usize = 125;

/// How much tungstenite reads at a time; it zeroes its buffer before.
const CONTROL_BUFFER: usize = 256;

/// The frames that come from an `R`. Nothing is ever written: what tungstenite would answer by itself goes nowhere.
#[derive(Debug)]
pub struct FrameReader<R> {
    input: Input<R>,
    judge: WebSocketContext,
    splices: bool,
}

impl<R: Read> FrameReader<R> {
    /// Frames for the end `role`, read from `inner`, at most `read_size` bytes at a time, with the bytes of `early`
    /// before them.
    pub fn new(inner: R, early: Vec<u8>, read_size: usize, role: Role) -> FrameReader<R> {
        let input = Input {
            buffer: ReadBuffer::new(inner, early, read_size),
            role,
            in_message: false,
            is_closed: false,
            next: Next::Header,
        };
        FrameReader {
            input,
            judge: judge(role),
            splices: false,
        }
    }

    /// Waits for what comes next. The bytes of all data frames that are here already come together.
    ///
    /// # Errors
    /// [`Fault`]. After one nothing can come, as after a Close, unless [`FrameReader::go_on`] says so.
    pub fn receive(&mut self) -> Result<Incoming<'_>, Fault> {
        loop {
            let payload = self.input.buffered_payload();
            if !payload.is_empty() {
                return Ok(Incoming::Bytes(self.input.buffer.taken(payload)));
            }
            match self.input.next {
                Next::Payload { left, .. } if self.splices && left >= WORTH_SPLICING as u64 => {
                    return Ok(Incoming::Payload(left));
                }
                Next::Header | Next::Payload { .. } => match self.input.buffer.fill() {
                    Ok(true) => {}
                    // tungstenite tells at which ends a stream may end.
                    Ok(false) => return self.judged(),
                    Err(error) => return nothing_or(failure(&error)),
                },
                Next::Control { .. } | Next::Fault(_) => return self.judged(),
            }
        }
    }

    fn judged(&mut self) -> Result<Incoming<'static>, Fault> {
        match self.judge.read(&mut self.input) {
            Ok(Message::Ping(payload)) => Ok(Incoming::Ping(payload.to_vec())),
            Ok(Message::Pong(payload)) => Ok(Incoming::Pong(payload.to_vec())),
            Ok(Message::Close(frame)) => closed(frame),
            Ok(Message::Text(_)) => Err(Fault::Text),
            // It gets to see neither.
            Ok(Message::Binary(_) | Message::Frame(_)) => Ok(Incoming::Nothing),
            Err(Error::Io(error)) => nothing_or(failure(&error)),
            Err(error) => Err(fault(&error)),
        }
    }

    /// From now on a payload without a mask that isn't in memory yet is given as [`Incoming::Payload`], if it is
    /// worth it; or no longer.
    pub fn set_splices(&mut self, splices: bool) {
        self.splices = splices && !self.input.role.peer_masks();
    }

    /// Whether a payload may be given so.
    pub fn splices(&self) -> bool {
        self.splices
    }

    /// `count` bytes of an [`Incoming::Payload`] were taken from the `R`.
    pub fn spliced(&mut self, count: u64) {
        if let Next::Payload { left, .. } = &mut self.input.next {
            *left = left.saturating_sub(count);
        }
    }

    /// Where the frames come from.
    pub fn source(&mut self) -> &mut R {
        &mut self.input.buffer.inner
    }

    /// After a Close: control frames may still come (RFC 6455 §5.5.1), and data of any kind, which the caller discards
    /// (§1.4).
    pub fn go_on(&mut self) {
        self.input.is_closed = true;
        self.judge = judge(self.input.role);
    }

    /// Whether the last read brought all it asked for, so that more may be there.
    pub fn filled_buffer(&self) -> bool {
        self.input.buffer.is_filled()
    }

    /// Changes how much is read at a time. The memory follows before the next read.
    pub fn set_read_size(&mut self, read_size: usize) {
        self.input.buffer.set_read_size(read_size);
    }
}

fn judge(role: Role) -> WebSocketContext {
    let config = WebSocketConfig::default()
        .read_buffer_size(CONTROL_BUFFER)
        .write_buffer_size(0)
        .max_frame_size(Some(MAX_CONTROL));
    let role = match role {
        Role::Daemon => protocol::Role::Server,
        Role::Client => protocol::Role::Client,
    };
    WebSocketContext::new(role, Some(config))
}

fn closed(frame: Option<CloseFrame>) -> Result<Incoming<'static>, Fault> {
    /// What tungstenite puts in place of a code that may not be on the wire.
    const REPLACED: &str = "Protocol violation";
    match frame {
        Some(frame) if frame.code == CloseCode::Protocol && frame.reason.as_str() == REPLACED => {
            Err(Fault::Protocol("a close code that may not be sent".into()))
        }
        Some(frame) => Ok(Incoming::Close(
            Some(frame.code.into()),
            frame.reason.to_string(),
        )),
        None => Ok(Incoming::Close(None, String::new())),
    }
}

fn fault(error: &Error) -> Fault {
    match error {
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) | Error::ConnectionClosed => {
            Fault::Eof
        }
        // Of a control frame, or beyond 2^63.
        Error::Capacity(_) => Fault::Protocol("a frame with a length that is not allowed".into()),
        Error::Utf8(_) => Fault::Protocol("a close reason that is not UTF-8".into()),
        error => Fault::Protocol(error.to_string()),
    }
}

/// The bytes, as tungstenite reads those that are for it.
#[derive(Debug)]
struct Input<R> {
    buffer: ReadBuffer<R>,
    role: Role,
    /// Whether a fragmented message is open (RFC 6455 §5.4).
    in_message: bool,
    /// A Close has come, behind which a text message is as good as a binary one.
    is_closed: bool,
    next: Next,
}

#[derive(Debug)]
enum Next {
    /// A frame's header.
    Header,
    /// The rest of a data frame's payload.
    Payload { left: u64, mask: [u8; 4] },
    /// The rest of a control frame, for tungstenite.
    Control { left: u64 },
    /// For tungstenite: a fault in short, and then everything as it came.
    Fault(Cursor<Vec<u8>>),
}

impl<R: Read> Input<R> {
    /// Takes the payload that is here. Empty if what comes next is for tungstenite, or must be waited for.
    fn buffered_payload(&mut self) -> Range<usize> {
        let start = self.buffer.position();
        let mut payload = start..start;
        loop {
            match self.next {
                Next::Payload { left: 0, .. } | Next::Control { left: 0 } => {
                    self.next = Next::Header;
                }
                Next::Header => {
                    if !self.take_header() {
                        return payload;
                    }
                }
                Next::Payload { left, mask } if !self.buffer.unread().is_empty() => {
                    if !self.buffer.joins(&payload, left) {
                        return payload;
                    }
                    let piece = self.buffer.take(left);
                    self.next = Next::Payload {
                        left: left - piece.len() as u64,
                        mask: apply_mask(self.buffer.taken_mut(piece.clone()), mask),
                    };
                    payload = self.buffer.join(payload, piece);
                }
                _ => return payload,
            }
        }
    }

    /// Looks at the next header and decides what becomes of its frame. `false` if it isn't whole yet. The header of a
    /// sound data frame is taken, others stay for tungstenite.
    fn take_header(&mut self) -> bool {
        let mut cursor = Cursor::new(self.buffer.unread());
        let parsed = FrameHeader::parse(&mut cursor);
        let length = cursor.position();
        self.next = match parsed {
            Ok(None) => return false,
            Err(_) => Next::Fault(Cursor::default()),
            Ok(Some((header, payload))) => self.judge(header, length, payload),
        };
        if let Next::Payload { .. } = self.next {
            self.buffer.take(length);
        }
        true
    }

    fn judge(&mut self, header: FrameHeader, length: u64, payload: u64) -> Next {
        let is_plain = !(header.rsv1 || header.rsv2 || header.rsv3);
        match (header.opcode, header.mask) {
            (OpCode::Control(_), _) => Next::Control {
                left: length.saturating_add(payload),
            },
            // RFC 6455 §5.2: the most significant bit must be 0.
            _ if payload > i64::MAX as u64 => Next::Fault(Cursor::default()),
            (OpCode::Data(opcode), mask)
                if is_plain
                    && self.may_be_data(opcode)
                    && mask.is_some() == self.role.peer_masks() =>
            {
                self.in_message = !header.is_final;
                Next::Payload {
                    left: payload,
                    mask: mask.unwrap_or_default(),
                }
            }
            _ => Next::Fault(Cursor::new(self.fault(header))),
        }
    }

    /// Whether a data frame may be of this kind now (RFC 6455 §5.4).
    fn may_be_data(&self, opcode: Data) -> bool {
        match opcode {
            Data::Continue => self.in_message,
            Data::Binary => !self.in_message,
            Data::Text => !self.in_message && self.is_closed,
            Data::Reserved(_) => false,
        }
    }

    /// The frame without its payload, for which tungstenite would wait. A text message is to be a whole one.
    fn fault(&self, mut header: FrameHeader) -> Vec<u8> {
        header.is_final |= header.opcode == OpCode::Data(Data::Text);
        let mut fault = Vec::new();
        if self.in_message {
            // With an empty binary frame ahead that isn't final, tungstenite sees a new message begin inside another.
            let unfinished = FrameHeader {
                is_final: false,
                opcode: OpCode::Data(Data::Binary),
                mask: self.role.peer_masks().then_some([0; 4]),
                ..FrameHeader::default()
            };
            let _ = unfinished.format(0, &mut fault);
        }
        // Writing to memory doesn't fail; without the header, tungstenite would wait for it until the end.
        let _ = header.format(0, &mut fault);
        fault
    }

    fn read_buffered(&mut self, buffer: &mut [u8], limit: u64) -> io::Result<usize> {
        if self.buffer.unread().is_empty() && !self.buffer.fill()? {
            return Ok(0);
        }
        let piece = self.buffer.take(limit.min(buffer.len() as u64));
        buffer[..piece.len()].copy_from_slice(self.buffer.taken(piece.clone()));
        Ok(piece.len())
    }
}

impl<R: Read> Read for Input<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.next {
            Next::Control { left: left @ 1.. } => {
                let limit = *left;
                let count = self.read_buffered(buffer, limit)?;
                self.next = Next::Control {
                    left: limit - count as u64,
                };
                Ok(count)
            }
            Next::Fault(fault) => match fault.read(buffer)? {
                0 => self.read_buffered(buffer, u64::MAX),
                count => Ok(count),
            },
            // There is nothing for tungstenite, which is asked then only at the end.
            _ => Ok(0),
        }
    }
}

impl<R> Write for Input<R> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes the mask off `payload`, or puts it on (RFC 6455 §5.3). Returns the mask for what follows it.
pub(super) fn apply_mask(payload: &mut [u8], mut mask: [u8; 4]) -> [u8; 4] {
    if mask == [0; 4] {
        return mask;
    }
    let count = payload.len();
    let (words, rest) = payload.as_chunks_mut::<4>();
    for word in words {
        *word = (u32::from_ne_bytes(*word) ^ u32::from_ne_bytes(mask)).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask) {
        *byte ^= mask;
    }
    mask.rotate_left(count % 4);
    mask
}
