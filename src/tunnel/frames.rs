//! The client's frames: bytes of data frames as they arrive, and tungstenite's judgement of the rest.
//!
//! tungstenite keeps a message in memory until its last byte is there, and a tunnel has no use for messages. So the
//! payload of a sound data frame goes past it, unmasked where it lies. Control frames go to tungstenite as they
//! come; and of a data frame that can't be right, the header, for it to say what is wrong.

use std::io::{self, Cursor, Read, Write};
use std::ops::Range;

use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{Data, OpCode};
use tungstenite::protocol::{Role, WebSocketConfig};
use tungstenite::{Error, Message, WebSocket};

/// The longest header: two bytes, a 64-bit length, the mask (RFC 6455 §5.2).
const MAX_HEADER: usize = 14;

/// The most payload in a frame that tungstenite gets to see (RFC 6455 §5.5).
const MAX_CONTROL: usize = 125;

/// How much tungstenite reads at a time; it zeroes its buffer before.
const CONTROL_BUFFER: usize = 256;

/// The most bytes that are moved so that what lies around a header can go on in one send.
const WORTH_MOVING: usize = 16 * 1024;

/// An empty masked binary frame that isn't final: with it ahead, tungstenite sees a new message begin
/// inside another.
const UNFINISHED_BINARY: &[u8] = &[0x02, 0x80, 0, 0, 0, 0];

/// The frames that come from an `R`. Nothing is ever written: what tungstenite would answer by itself goes nowhere.
#[derive(Debug)]
pub struct Frames<R>(WebSocket<Input<R>>);

/// What came.
#[derive(Debug)]
pub enum Incoming<'a> {
    /// Bytes of binary messages, at least one.
    Bytes(&'a [u8]),
    /// A ping, a pong or a Close; or a text message, without its text.
    Message(Message),
}

impl<R: Read> Frames<R> {
    /// Frames read from `inner`, at most `room` bytes at a time, with the bytes of `early` before them.
    pub fn new(inner: R, early: Vec<u8>, room: usize) -> Frames<R> {
        let input = Input {
            inner,
            end: early.len(),
            ahead: early,
            at: 0,
            room: room.max(MAX_HEADER),
            was_full: false,
            in_message: false,
            next: Next::Header,
        };
        let config = WebSocketConfig::default()
            .read_buffer_size(CONTROL_BUFFER)
            .write_buffer_size(0)
            .max_frame_size(Some(MAX_CONTROL));
        Frames(WebSocket::from_raw_socket(
            input,
            Role::Server,
            Some(config),
        ))
    }

    /// Waits for what comes next. The bytes of all data frames that are here already come together.
    ///
    /// # Errors
    /// tungstenite's, and those of reading from `inner`. After one, but for a read's timeout, nothing can come, as
    /// after a Close or a text message.
    pub fn receive(&mut self) -> Result<Incoming<'_>, Error> {
        let payload = self.0.get_mut().payload()?;
        if payload.is_empty() {
            return self.0.read().map(Incoming::Message);
        }
        Ok(Incoming::Bytes(&self.0.get_ref().ahead[payload]))
    }

    /// Whether the last read brought all it asked for, so that more may be there.
    pub fn was_full(&self) -> bool {
        self.0.get_ref().was_full
    }

    /// Changes how much is read at a time. The memory follows before the next read.
    pub fn set_room(&mut self, room: usize) {
        let input = self.0.get_mut();
        input.room = room.max(MAX_HEADER);
        input.was_full = false;
    }
}

/// The bytes, as tungstenite reads those that are for it.
#[derive(Debug)]
struct Input<R> {
    inner: R,
    /// Bytes read but not handed on: `ahead[at..end]`.
    ahead: Vec<u8>,
    at: usize,
    end: usize,
    room: usize,
    was_full: bool,
    /// Whether a fragmented message is open (RFC 6455 §5.4).
    in_message: bool,
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
    /// Takes the payload that is here, or waits for some. None if what comes next is for tungstenite, as is the end.
    fn payload(&mut self) -> io::Result<Range<usize>> {
        loop {
            let payload = self.buffered_payload();
            let is_waiting = matches!(self.next, Next::Header | Next::Payload { .. });
            if !payload.is_empty() || !is_waiting || !self.fill()? {
                return Ok(payload);
            }
        }
    }

    fn buffered_payload(&mut self) -> Range<usize> {
        let mut payload = self.at..self.at;
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
                Next::Payload { left, mask } if self.at < self.end => {
                    let piece = self.buffered(left);
                    if payload.len().min(piece.len()) > WORTH_MOVING {
                        return payload;
                    }
                    self.at = piece.end;
                    self.next = Next::Payload {
                        left: left - piece.len() as u64,
                        mask: unmask(&mut self.ahead[piece.clone()], mask),
                    };
                    payload = join(&mut self.ahead, payload, piece);
                }
                _ => return payload,
            }
        }
    }

    /// At most `limit` of the bytes that are here.
    fn buffered(&self, limit: u64) -> Range<usize> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        self.at..self.end.min(self.at.saturating_add(limit))
    }

    /// Reads more, behind the part of a header that may be here. `false` at the end of the stream.
    fn fill(&mut self) -> io::Result<bool> {
        self.ahead.copy_within(self.at..self.end, 0);
        (self.at, self.end) = (0, self.end - self.at);
        if self.ahead.len() != self.room {
            self.ahead.resize(self.room, 0);
            self.ahead.shrink_to_fit();
        }
        let place = &mut self.ahead[self.end..];
        let count = self.inner.read(place)?;
        self.was_full = count == place.len();
        self.end += count;
        Ok(count > 0)
    }

    /// Looks at the next header and decides what becomes of its frame. `false` if it isn't whole yet. The header of a
    /// sound data frame is taken, others stay for tungstenite.
    fn take_header(&mut self) -> bool {
        let mut cursor = Cursor::new(&self.ahead[self.at..self.end]);
        let parsed = FrameHeader::parse(&mut cursor);
        let length = cursor.position();
        self.next = match parsed {
            Ok(None) => return false,
            Err(_) => Next::Fault(Cursor::default()),
            Ok(Some((header, payload))) => self.judge(header, length, payload),
        };
        if let Next::Payload { .. } = self.next {
            self.at += length as usize;
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
            (OpCode::Data(opcode), Some(mask)) if is_plain && opcode == self.opcode_of_data() => {
                self.in_message = !header.is_final;
                Next::Payload {
                    left: payload,
                    mask,
                }
            }
            _ => Next::Fault(Cursor::new(self.fault(header))),
        }
    }

    /// What a data frame must be now (RFC 6455 §5.4).
    fn opcode_of_data(&self) -> Data {
        if self.in_message {
            Data::Continue
        } else {
            Data::Binary
        }
    }

    /// The frame without its payload, for which tungstenite would wait. A text message is to be a whole one.
    fn fault(&self, mut header: FrameHeader) -> Vec<u8> {
        header.is_final |= header.opcode == OpCode::Data(Data::Text);
        let mut fault = Vec::new();
        if self.in_message {
            fault.extend(UNFINISHED_BINARY);
        }
        // Writing to memory doesn't fail; without the header, tungstenite would wait for it until the end.
        let _ = header.format(0, &mut fault);
        fault
    }

    fn read_buffered(&mut self, buffer: &mut [u8], limit: u64) -> io::Result<usize> {
        if self.at == self.end && !self.fill()? {
            return Ok(0);
        }
        let piece = self.buffered(limit.min(buffer.len() as u64));
        self.at = piece.end;
        buffer[..piece.len()].copy_from_slice(&self.ahead[piece.clone()]);
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
            // There is nothing for tungstenite, and `Frames` lets it read only at the end.
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

/// Takes the mask off `payload` (RFC 6455 §5.3). Returns the mask for what follows it.
fn unmask(payload: &mut [u8], mut mask: [u8; 4]) -> [u8; 4] {
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

/// Closes the gap between two pieces by moving the shorter one.
fn join(bytes: &mut [u8], first: Range<usize>, second: Range<usize>) -> Range<usize> {
    if first.len() < second.len() {
        let start = second.start - first.len();
        bytes.copy_within(first, start);
        start..second.end
    } else {
        let end = first.end + second.len();
        bytes.copy_within(second, first.end);
        first.start..end
    }
}
