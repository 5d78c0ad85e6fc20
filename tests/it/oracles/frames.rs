//! The frames of both roles, against tungstenite with a whole message at a time.

use std::io::{self, Read, Write};
use std::ops::Range;

use tungstenite::protocol::{self, WebSocketConfig, WebSocketContext};
use tungstenite::{Error, Message};

use super::{Arrival, Pieces};
use tunneld::exposed::{Fault, FrameReader, Incoming, Role};

/// What is no byte of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Other {
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    Close(Option<u16>, String),
}

/// What the end `role` makes of `wire`: the bytes, the other messages, and the fault at the end. What may be spliced is
/// read past the reader, as the relay does. With `goes_on` there may be more behind a Close.
pub fn decoded_by(
    role: Role,
    wire: &[u8],
    arrival: Arrival,
    goes_on: bool,
) -> (Vec<u8>, Vec<Other>, Fault) {
    let (early, source) = Pieces::of(wire, arrival);
    let mut frames = FrameReader::new(source, early, arrival.read_size, role);
    frames.set_splices(true);
    let (mut bytes, mut others, mut nothings) = (Vec::new(), Vec::new(), 0);
    loop {
        match frames.receive() {
            Ok(Incoming::Bytes(payload)) => bytes.extend(payload),
            Ok(Incoming::Payload(count)) => {
                if let Some(piece) = frames.source().spliced(count) {
                    bytes.extend(&piece);
                    frames.spliced(piece.len() as u64);
                    // The end of the stream is told by a plain read.
                    frames.set_splices(!piece.is_empty());
                }
            }
            Ok(Incoming::Ping(payload)) => others.push(Other::Ping(payload)),
            Ok(Incoming::Pong(payload)) => others.push(Other::Pong(payload)),
            Ok(Incoming::Close(code, reason)) => {
                others.push(Other::Close(code, reason));
                if goes_on {
                    frames.go_on();
                }
            }
            Ok(Incoming::Nothing) => {
                nothings += 1;
                assert!(
                    nothings <= frames.source().timeouts,
                    "nothing without a timeout"
                );
            }
            Ok(Incoming::End) => panic!("no frame says that"),
            Err(fault) => return (bytes, others, fault),
        }
    }
}

/// How frames arrive makes no difference.
pub fn are_the_same_however_they_arrive(role: Role, wire: &[u8], arrival: Arrival) {
    for goes_on in [false, true] {
        let whole = decoded_by(role, wire, Arrival::AT_ONCE, goes_on);
        assert_eq!(
            whole,
            decoded_by(role, wire, arrival, goes_on),
            "{arrival:?} {goes_on}"
        );
    }
}

/// Up to the first Close the bytes, the other messages and the verdict are those of tungstenite. It sees no message that
/// isn't whole, of which the payload of whole frames is to come out all the same.
pub fn mean_what_tungstenite_says(role: Role, wire: &[u8]) {
    let frames = frames_of(wire);
    let close = frames.iter().position(|frame| frame.opcode == 8);
    let frames = &frames[..close.map_or(frames.len(), |index| index + 1)];
    let wire = match close {
        Some(index) => &wire[..frames[index].payload.end.min(wire.len())],
        None => wire,
    };
    let (bytes, others, fault) = decoded_by(role, wire, Arrival::AT_ONCE, false);
    let (of_messages, expected, is_refused) = by_tungstenite(role, &made_whole(wire, frames));
    assert_eq!(others, expected);
    assert_eq!(fault != Fault::Eof, is_refused, "{fault:?}");
    assert!(
        bytes.starts_with(&of_messages),
        "{bytes:?} but {of_messages:?}"
    );
    assert!(fault != Fault::Text || frames.iter().any(|frame| frame.opcode == 1));

    let (mut all, mut ends) = (Vec::new(), vec![0]);
    for frame in frames.iter().filter(|frame| frame.opcode < 3) {
        all.extend(frame.unmasked(wire));
        ends.push(all.len());
    }
    assert!(all.starts_with(&bytes), "{bytes:?} of {all:?}");
    match is_refused {
        true => assert!(ends.contains(&bytes.len()), "{bytes:?} are no whole frames"),
        false => assert_eq!(bytes.len(), all.len()),
    }
}

/// A frame whose header is whole (RFC 6455 §5.2).
struct Frame {
    opcode: u8,
    start: usize,
    /// Where its length is written: 7 bits of a byte, or 2 or 8 bytes.
    length: Range<usize>,
    mask: Option<[u8; 4]>,
    /// May end beyond what is there.
    payload: Range<usize>,
}

fn frames_of(wire: &[u8]) -> Vec<Frame> {
    let mut frames = Vec::new();
    let mut start = 0;
    while let Some(frame) = frame_at(wire, start) {
        start = frame.payload.end;
        frames.push(frame);
    }
    frames
}

fn frame_at(wire: &[u8], start: usize) -> Option<Frame> {
    let &[first, second, ..] = wire.get(start..)? else {
        return None;
    };
    let (length, mut at) = match second & 0x7f {
        126 => (start + 2..start + 4, start + 4),
        127 => (start + 2..start + 10, start + 10),
        _ => (start + 1..start + 2, start + 2),
    };
    let written = wire.get(length.clone())?.iter();
    let count = match length.len() {
        1 => u64::from(second & 0x7f),
        _ => written.fold(0, |count, &byte| count << 8 | u64::from(byte)),
    };
    let mut mask = None;
    if second & 0x80 != 0 {
        mask = Some(wire.get(at..at + 4)?.try_into().unwrap());
        at += 4;
    }
    let end = at.saturating_add(usize::try_from(count).unwrap_or(usize::MAX));
    Some(Frame {
        opcode: first & 0x0f,
        start,
        length,
        mask,
        payload: at..end,
    })
}

impl Frame {
    fn unmasked(&self, wire: &[u8]) -> Vec<u8> {
        let there = &wire[self.payload.start..self.payload.end.min(wire.len())];
        let mask = self.mask.unwrap_or_default();
        there
            .iter()
            .zip(mask.iter().cycle())
            .map(|(byte, mask)| byte ^ mask)
            .collect()
    }
}

/// `wire` as tungstenite has to see it to say the same. A text message is refused at its beginning, so it ends there; of
/// a data frame what is here has come; and a control frame of more than 125 bytes is refused at its header.
fn made_whole(wire: &[u8], frames: &[Frame]) -> Vec<u8> {
    let mut whole = wire.to_vec();
    for frame in frames.iter().filter(|frame| frame.opcode == 1) {
        whole[frame.start] |= 0x80;
    }
    let Some(last) = frames.last().filter(|last| last.payload.end > wire.len()) else {
        return whole;
    };
    let here = wire.len() - last.payload.start;
    let count = match (last.opcode, last.payload.len()) {
        // The top bit of a length must be 0 (RFC 6455 §5.2).
        (0..8, count) if count <= i64::MAX as usize => here,
        (8.., 126..) => 126,
        _ => return whole,
    };
    match last.length.len() {
        1 => whole[last.length.start] = whole[last.length.start] & 0x80 | count as u8,
        size => whole[last.length.clone()].copy_from_slice(&count.to_be_bytes()[8 - size..]),
    }
    whole.resize(last.payload.start + count, 0);
    whole
}

/// The bytes of whole messages, the other messages, and whether it refuses what comes then.
fn by_tungstenite(role: Role, wire: &[u8]) -> (Vec<u8>, Vec<Other>, bool) {
    let config = WebSocketConfig::default()
        .max_message_size(None)
        .max_frame_size(Some(wire.len().max(125)));
    let role = match role {
        Role::Daemon => protocol::Role::Server,
        Role::Client => protocol::Role::Client,
    };
    let mut context = WebSocketContext::new(role, Some(config));
    let mut source = ReadOnly(wire);
    let (mut bytes, mut others) = (Vec::new(), Vec::new());
    loop {
        match context.read(&mut source) {
            Ok(Message::Binary(payload)) => bytes.extend(payload),
            Ok(Message::Ping(payload)) => others.push(Other::Ping(payload.to_vec())),
            Ok(Message::Pong(payload)) => others.push(Other::Pong(payload.to_vec())),
            // What it puts in place of a code that may not be on the wire.
            Ok(Message::Close(Some(frame))) if frame.reason.as_str() == "Protocol violation" => {
                return (bytes, others, true);
            }
            Ok(Message::Close(frame)) => {
                let (code, reason) = frame
                    .map(|frame| (u16::from(frame.code), frame.reason.to_string()))
                    .unzip();
                others.push(Other::Close(code, reason.unwrap_or_default()));
                return (bytes, others, false);
            }
            Ok(Message::Text(_) | Message::Frame(_)) => return (bytes, others, true),
            Err(Error::Protocol(
                tungstenite::error::ProtocolError::ResetWithoutClosingHandshake,
            )) => {
                return (bytes, others, false);
            }
            Err(_) => return (bytes, others, true),
        }
    }
}

/// What tungstenite would answer goes nowhere.
struct ReadOnly<'a>(&'a [u8]);

impl Read for ReadOnly<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for ReadOnly<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
