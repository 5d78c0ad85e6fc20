//! Capsules (RFC 9297 §3) as CONNECT-TCP uses them (draft-ietf-httpbis-connect-tcp-12): payload in DATA, the last of
//! it and the end in FINAL_DATA. Boundaries mean nothing, so payload goes on as it arrives.

use std::io::Read;
use std::ops::Range;

use super::incoming::{Fault, Incoming, failure, nothing_or};
use super::pipe::WORTH_SPLICING;
use super::read_buffer::ReadBuffer;

/// The upgrade token of the draft's version, which is for interoperability until the RFC has `connect-tcp`
/// (draft-ietf-httpbis-connect-tcp-12).
pub const UPGRADE_TOKEN: &str = "connect-tcp-12";

/// The capsule types of the same version, until the RFC has its own.
const DATA: u64 = 0x2028_d7f2;
const FINAL_DATA: u64 = 0x2028_d7f3;

/// The longest header that is written: a type of 4 bytes and a length of at most 8.
pub(super) const MAX_WRITTEN_HEADER: usize = 12;

/// The header of a capsule that is worth splicing, from a peer that writes its integers as short as they can be: a
/// type of 4 bytes, and a length of 4.
pub(super) const USUAL_HEADER: usize = 8;

/// The header of a DATA capsule with so many bytes of payload, and its length.
pub(super) fn data_header(payload: u64) -> ([u8; MAX_WRITTEN_HEADER], usize) {
    header(DATA, payload)
}

/// A DATA capsule without payload. It means nothing, and keeps proxies from closing a silent connection.
pub(super) fn empty_data() -> Vec<u8> {
    let (bytes, length) = header(DATA, 0);
    bytes[..length].to_vec()
}

/// The end, after which neither DATA nor FINAL_DATA may follow.
pub(super) fn final_data() -> Vec<u8> {
    let (bytes, length) = header(FINAL_DATA, 0);
    bytes[..length].to_vec()
}

fn header(of_type: u64, payload: u64) -> ([u8; MAX_WRITTEN_HEADER], usize) {
    let mut bytes = [0; MAX_WRITTEN_HEADER];
    let type_length = put_integer(&mut bytes, of_type);
    let length = type_length + put_integer(&mut bytes[type_length..], payload);
    (bytes, length)
}

/// Writes a variable-length integer below 2^62 as short as it can be (RFC 9000 §16), and returns its length.
fn put_integer(place: &mut [u8], value: u64) -> usize {
    let (length, prefix) = match value {
        0..0x40 => (1, 0),
        0x40..0x4000 => (2, 1),
        0x4000..0x4000_0000 => (4, 2),
        _ => (8, 3),
    };
    place[..length].copy_from_slice(&value.to_be_bytes()[8 - length..]);
    place[0] |= prefix << 6;
    length
}

/// The variable-length integer that `bytes` begin with, and its length; `None` if it isn't whole yet. It need not be
/// as short as it can be (RFC 9000 §16).
fn integer(bytes: &[u8]) -> Option<(u64, usize)> {
    let length = 1 << (bytes.first()? >> 6);
    let mut value = [0; 8];
    value[8 - length..].copy_from_slice(bytes.get(..length)?);
    value[8 - length] &= 0x3f;
    Some((u64::from_be_bytes(value), length))
}

/// The capsules that come from an `R`.
#[derive(Debug)]
pub struct CapsuleReader<R> {
    buffer: ReadBuffer<R>,
    next: Next,
    /// FINAL_DATA has come.
    ended: bool,
    splices: bool,
}

#[derive(Debug)]
enum Next {
    /// A capsule's type and length.
    Header,
    /// The rest of a DATA or a FINAL_DATA.
    Payload { left: u64, is_final: bool },
    /// The rest of a capsule of a type that isn't known, which is skipped (RFC 9297 §3.2).
    Skipped { left: u64 },
    /// What may not come behind FINAL_DATA.
    Fault,
}

impl<R: Read> CapsuleReader<R> {
    /// Capsules read from `inner`, at most `read_size` bytes at a time, with the bytes of `early` before them.
    pub fn new(inner: R, early: Vec<u8>, read_size: usize) -> CapsuleReader<R> {
        CapsuleReader {
            buffer: ReadBuffer::new(inner, early, read_size),
            next: Next::Header,
            ended: false,
            splices: false,
        }
    }

    /// Waits for what comes next. The payload of all capsules that are here already comes together.
    ///
    /// # Errors
    /// [`Fault`]. After one nothing can come. An end in the midst of a capsule is an EOF before FINAL_DATA, as the
    /// stream is broken off either way, and breaks the protocol behind it.
    pub fn receive(&mut self) -> Result<Incoming<'_>, Fault> {
        loop {
            let payload = self.buffered_payload();
            if !payload.is_empty() {
                return Ok(Incoming::Bytes(self.buffer.taken(payload)));
            }
            match self.next {
                Next::Payload {
                    left: 0,
                    is_final: true,
                } => {
                    self.ended = true;
                    self.next = Next::Header;
                    return Ok(Incoming::End);
                }
                Next::Payload { left, .. } if self.splices && left >= WORTH_SPLICING as u64 => {
                    return Ok(Incoming::Payload(left));
                }
                Next::Fault => return Err(Fault::Protocol("data behind FINAL_DATA".into())),
                _ => match self.buffer.fill() {
                    Ok(true) => {}
                    Ok(false) => return Err(self.eof()),
                    Err(error) => return nothing_or(failure(&error)),
                },
            }
        }
    }

    fn eof(&self) -> Fault {
        let is_whole = matches!(self.next, Next::Header) && self.buffer.unread().is_empty();
        if self.ended && !is_whole {
            return Fault::Protocol("a truncated capsule".into());
        }
        Fault::Eof
    }

    /// See [`super::framing::Reader::set_splices`].
    pub fn set_splices(&mut self, splices: bool) {
        self.splices = splices;
    }

    /// Whether payload may be given to be spliced.
    pub fn splices(&self) -> bool {
        self.splices
    }

    /// `count` bytes of an [`Incoming::Payload`] were taken from the `R`.
    pub fn spliced(&mut self, count: u64) {
        if let Next::Payload { left, .. } = &mut self.next {
            *left = left.saturating_sub(count);
        }
    }

    /// Where the capsules come from.
    pub fn source(&mut self) -> &mut R {
        &mut self.buffer.inner
    }

    /// Whether the last read brought all it asked for, so that more may be there.
    pub fn filled_buffer(&self) -> bool {
        self.buffer.is_filled()
    }

    /// Changes how much is read at a time. The memory follows before the next read.
    pub fn set_read_size(&mut self, read_size: usize) {
        self.buffer.set_read_size(read_size);
    }

    /// Takes the payload that is here. Empty if there is an end, a fault, or something to be waited for.
    fn buffered_payload(&mut self) -> Range<usize> {
        let start = self.buffer.position();
        let mut payload = start..start;
        loop {
            match self.next {
                Next::Payload {
                    left: 0,
                    is_final: false,
                }
                | Next::Skipped { left: 0 } => self.next = Next::Header,
                Next::Header => {
                    if !self.take_header() {
                        return payload;
                    }
                }
                Next::Payload { left, is_final }
                    if left > 0 && !self.buffer.unread().is_empty() =>
                {
                    if !self.buffer.joins(&payload, left) {
                        return payload;
                    }
                    let piece = self.buffer.take(left);
                    self.next = Next::Payload {
                        left: left - piece.len() as u64,
                        is_final,
                    };
                    payload = self.buffer.join(payload, piece);
                }
                Next::Skipped { left } if !self.buffer.unread().is_empty() => {
                    let skipped = self.buffer.take(left);
                    self.next = Next::Skipped {
                        left: left - skipped.len() as u64,
                    };
                }
                _ => return payload,
            }
        }
    }

    /// `false` if it isn't whole yet.
    fn take_header(&mut self) -> bool {
        let unread = self.buffer.unread();
        let Some((of_type, type_length)) = integer(unread) else {
            return false;
        };
        let Some((left, length)) = integer(&unread[type_length..]) else {
            return false;
        };
        self.buffer.take((type_length + length) as u64);
        self.next = match of_type {
            DATA | FINAL_DATA if self.ended => Next::Fault,
            DATA => Next::Payload {
                left,
                is_final: false,
            },
            FINAL_DATA => Next::Payload {
                left,
                is_final: true,
            },
            _ => Next::Skipped { left },
        };
        true
    }
}
