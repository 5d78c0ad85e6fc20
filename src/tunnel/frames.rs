//! The client's frames, cut into short ones before tungstenite sees them.
//!
//! tungstenite keeps a message in memory until its last byte is there, and takes a frame's length at its
//! word. A tunnel has no use for messages: its bytes go on as they arrive. So this `Read` hands a data frame
//! on as several final binary frames, each no longer than what has come of it, with the mask turned to where
//! the piece begins. tungstenite stays the judge: every control frame, and every frame that can't be right,
//! goes through as it came.

use std::io::{self, Cursor, IoSliceMut, Read};

use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{Data, OpCode};

/// A long piece's header: two bytes, a 64-bit length, the mask (RFC 6455 §5.2). The other forms of the
/// length aren't used, so that the header's place is known before the piece's length is.
pub const PIECE_HEADER: usize = 14;

/// A short piece's header, with the length in the second byte, for when tungstenite's buffer is nearly full.
const SHORT_HEADER: usize = 6;

/// The most bytes in a short piece.
const SHORT_PIECE: usize = 125;

/// An empty masked text frame: enough for tungstenite to report a text message, whatever its length.
const EMPTY_TEXT: &[u8] = &[0x81, 0x80, 0, 0, 0, 0];

/// An empty masked binary frame that isn't final: with it ahead, tungstenite sees a new message begin
/// inside another.
const UNFINISHED_BINARY: &[u8] = &[0x02, 0x80, 0, 0, 0, 0];

/// A `Read` of WebSocket bytes in which no data frame is longer than a read.
#[derive(Debug)]
pub struct Frames<R> {
    inner: R,
    /// Bytes read but not handed on: `ahead[at..end]`.
    ahead: Vec<u8>,
    at: usize,
    end: usize,
    /// How many bytes a read of the socket asks for, where a frame doesn't end before.
    room: usize,
    /// The last read of the socket brought all it asked for.
    was_full: bool,
    /// Whether a fragmented message is open (RFC 6455 §5.4).
    in_message: bool,
    next: Next,
}

#[derive(Debug)]
enum Next {
    /// A frame's header.
    Header,
    /// The rest of a data frame, to be handed on in pieces.
    Payload { left: u64, mask: [u8; 4] },
    /// The rest of a frame that goes through as it came.
    Through { left: u64 },
    /// Bytes of our own, and then everything as it came: tungstenite will find the fault.
    Fault { first: &'static [u8] },
}

impl<R: Read> Frames<R> {
    /// Frames read from `inner`, about `room` bytes at a time, with the bytes of `early` before them.
    pub fn new(inner: R, early: Vec<u8>, room: usize) -> Frames<R> {
        let end = early.len();
        Frames {
            inner,
            ahead: early,
            at: 0,
            end,
            room,
            was_full: false,
            in_message: false,
            next: Next::Header,
        }
    }

    /// Changes how much is read at a time, and gives back memory that needs no longer be held.
    pub fn set_room(&mut self, room: usize) {
        self.room = room;
        self.was_full = false;
        self.ahead = self.buffered().to_vec();
        (self.at, self.end) = (0, self.ahead.len());
    }

    /// Whether the last read of the socket brought all it asked for, so that more may be there.
    pub fn was_full(&self) -> bool {
        self.was_full
    }

    /// Whether all that was handed on are whole frames.
    pub fn is_between_frames(&self) -> bool {
        !matches!(self.next, Next::Through { left: 1.. } | Next::Fault { .. })
    }

    /// Whether the next message, or piece of one, is here already, so that it can be read without waiting.
    pub fn has_more(&self) -> bool {
        let buffered = self.buffered().len() as u64;
        match self.next {
            Next::Payload { left: 0, .. } | Next::Through { left: 0 } | Next::Header => {}
            Next::Payload { .. } => return buffered > 0,
            Next::Through { left } => return buffered >= left,
            Next::Fault { .. } => return false,
        }
        let mut cursor = Cursor::new(self.buffered());
        match FrameHeader::parse(&mut cursor) {
            // An empty data frame brings no message, and a faulty one may need more bytes to be one.
            Ok(Some((header, payload))) if matches!(header.opcode, OpCode::Data(_)) => {
                payload > 0 && buffered > cursor.position() && is_sound(&header, payload)
            }
            Ok(Some((_, payload))) => buffered - cursor.position() >= payload,
            Ok(None) | Err(_) => false,
        }
    }

    fn buffered(&self) -> &[u8] {
        &self.ahead[self.at..self.end]
    }

    /// Makes room for `wanted` bytes behind the buffered ones.
    fn make_room(&mut self, wanted: usize) {
        self.ahead.copy_within(self.at..self.end, 0);
        (self.at, self.end) = (0, self.end - self.at);
        if self.ahead.len() < self.end + wanted {
            self.ahead.resize(self.end + wanted, 0);
        }
    }

    /// Reads more into the buffer, behind what is in it. `false` at the end of the stream.
    fn fill(&mut self) -> io::Result<bool> {
        self.make_room(self.room);
        let read = self
            .inner
            .read(&mut self.ahead[self.end..self.end + self.room])?;
        self.was_full = read == self.room;
        self.end += read;
        Ok(read > 0)
    }

    /// Takes the next header off the buffer and decides what becomes of its frame. `false` if it isn't
    /// whole yet.
    fn take_header(&mut self) -> bool {
        let mut cursor = Cursor::new(self.buffered());
        let parsed = FrameHeader::parse(&mut cursor);
        let length = cursor.position();
        self.next = match parsed {
            Ok(None) => return false,
            Err(_) => Next::Fault { first: &[] },
            Ok(Some((header, payload))) => self.judge(&header, length, payload),
        };
        if let Next::Payload { .. } = self.next {
            self.at += length as usize;
        }
        true
    }

    fn judge(&mut self, header: &FrameHeader, length: u64, payload: u64) -> Next {
        let Some(mask) = header.mask.filter(|_| is_sound(header, payload)) else {
            return Next::Fault { first: &[] };
        };
        match header.opcode {
            OpCode::Control(_) => Next::Through {
                left: length + payload,
            },
            OpCode::Data(Data::Continue) if !self.in_message => Next::Fault { first: &[] },
            OpCode::Data(Data::Binary | Data::Text) if self.in_message => Next::Fault {
                first: UNFINISHED_BINARY,
            },
            OpCode::Data(Data::Binary | Data::Continue) => {
                self.in_message = !header.is_final;
                Next::Payload {
                    left: payload,
                    mask,
                }
            }
            OpCode::Data(Data::Text) => Next::Fault { first: EMPTY_TEXT },
            OpCode::Data(Data::Reserved(_)) => Next::Fault { first: &[] },
        }
    }

    fn read_through(&mut self, buffer: &mut [u8], limit: u64) -> io::Result<usize> {
        if self.buffered().is_empty() && !self.fill()? {
            return Ok(0);
        }
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let count = limit.min(buffer.len()).min(self.buffered().len());
        buffer[..count].copy_from_slice(&self.ahead[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }

    /// Hands a piece on: read straight into its place when nothing is buffered, with what lies behind the
    /// frame going into the buffer.
    fn read_piece(&mut self, buffer: &mut [u8], left: u64, mask: [u8; 4]) -> io::Result<usize> {
        let is_short = buffer.len() < SHORT_HEADER + SHORT_PIECE;
        let (header, place) =
            buffer.split_at_mut(if is_short { SHORT_HEADER } else { PIECE_HEADER });
        let room = usize::try_from(left).unwrap_or(usize::MAX).min(place.len());
        let count = if self.buffered().is_empty() {
            self.read_payload(&mut place[..room], left)?
        } else {
            self.read_through(&mut place[..room], left)?
        };
        if count == 0 {
            return Ok(0);
        }
        if is_short {
            header[..2].copy_from_slice(&[0x82, 0x80 | count as u8]);
        } else {
            header[..2].copy_from_slice(&[0x82, 0xff]);
            header[2..10].copy_from_slice(&(count as u64).to_be_bytes());
        }
        let length = header.len();
        header[length - 4..].copy_from_slice(&mask);
        let mut mask = mask;
        mask.rotate_left(count % 4);
        self.next = match left - count as u64 {
            0 => Next::Header,
            left => Next::Payload { left, mask },
        };
        Ok(length + count)
    }

    /// Where the frame ends in this read, the next frame's header at least comes along.
    fn read_payload(&mut self, place: &mut [u8], left: u64) -> io::Result<usize> {
        let room = place.len();
        if left > room as u64 {
            let count = self.inner.read(place)?;
            self.was_full = count == room;
            return Ok(count);
        }
        let behind = self.room.saturating_sub(room).max(PIECE_HEADER);
        self.make_room(behind);
        let ahead = &mut self.ahead[..behind];
        let count = self
            .inner
            .read_vectored(&mut [IoSliceMut::new(place), IoSliceMut::new(ahead)])?;
        self.was_full = count == room + behind;
        self.end = count.saturating_sub(room);
        Ok(count.min(room))
    }
}

/// Whether a frame's header may stand alone: masked, without reserved bits, its length below 2^63.
fn is_sound(header: &FrameHeader, payload: u64) -> bool {
    let reserved = header.rsv1 || header.rsv2 || header.rsv3;
    header.mask.is_some() && !reserved && payload <= i64::MAX as u64
}

impl<R: Read> Read for Frames<R> {
    /// Reads into `buffer`, which must hold at least 14 bytes; tungstenite's always does when it expects a
    /// frame (its own longest header).
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.next {
                Next::Header => {
                    if !self.take_header() && !self.fill()? {
                        return Ok(0);
                    }
                }
                Next::Payload { left: 0, .. } | Next::Through { left: 0 } => {
                    self.next = Next::Header
                }
                Next::Payload { left, mask } => return self.read_piece(buffer, left, mask),
                Next::Through { left } => {
                    let count = self.read_through(buffer, left)?;
                    self.next = Next::Through {
                        left: left - count as u64,
                    };
                    return Ok(count);
                }
                Next::Fault { first: [] } => return self.read_through(buffer, u64::MAX),
                Next::Fault { first } => {
                    let count = first.len().min(buffer.len());
                    buffer[..count].copy_from_slice(&first[..count]);
                    self.next = Next::Fault {
                        first: &first[count..],
                    };
                    return Ok(count);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tungstenite::protocol::{Role, WebSocketConfig};
    use tungstenite::{Message, WebSocket};

    /// Reads at most `step` bytes at a time, and takes what is written to it.
    struct Trickle<R>(R, usize);

    impl<R: Read> Read for Trickle<R> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let limit = buffer.len().min(self.1);
            self.0.read(&mut buffer[..limit])
        }
    }

    struct Sink<R>(R);

    impl<R: Read> Read for Sink<R> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl<R> io::Write for Sink<R> {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            Ok(buffer.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [0x11, 0x22, 0x33, 0x44];
        let mut frame = vec![first];
        match payload.len() {
            n @ 0..=125 => frame.push(0x80 | n as u8),
            n @ 126..=65535 => frame.extend([&[0xfe][..], &(n as u16).to_be_bytes()].concat()),
            n => frame.extend([&[0xff][..], &(n as u64).to_be_bytes()].concat()),
        }
        frame.extend(mask);
        frame.extend(
            payload
                .iter()
                .zip(mask.iter().cycle())
                .map(|(byte, mask)| byte ^ mask),
        );
        frame
    }

    /// Every message tungstenite makes of `bytes`, and the error that ends it.
    fn decode(bytes: &[u8], early: usize, step: usize, buffer: usize) -> (Vec<Message>, String) {
        let config = WebSocketConfig::default()
            .read_buffer_size(buffer)
            .max_frame_size(Some(64 * 1024));
        let frames = Frames::new(
            Trickle(&bytes[early..], step),
            bytes[..early].to_vec(),
            buffer,
        );
        let mut socket = WebSocket::from_raw_socket(Sink(frames), Role::Server, Some(config));
        let mut messages = Vec::new();
        loop {
            match socket.read() {
                Ok(message) => messages.push(message),
                Err(error) => return (messages, error.to_string()),
            }
        }
    }

    fn bytes_of(messages: &[Message]) -> Vec<u8> {
        let binary = messages.iter().filter(|message| message.is_binary());
        binary
            .flat_map(|message| message.clone().into_data())
            .collect()
    }

    #[test]
    fn bytes_come_out_as_they_went_in_however_they_are_cut() {
        let data: Vec<u8> = (0..200_000u32).map(|n| (n * 7 + n / 251) as u8).collect();
        let wire = [
            frame(0x82, &data[..1]),
            frame(0x82, &[]),
            frame(0x02, &data[1..70_000]),
            frame(0x89, b"ping"),
            frame(0x00, &data[70_000..70_125]),
            frame(0x80, &data[70_125..140_000]),
            frame(0x82, &data[140_000..]),
            frame(0x88, &[]),
        ]
        .concat();
        for (early, step, buffer) in [
            (0, 1, 64),
            (0, 7, 14),
            (wire.len(), 1, 1000),
            (5, 4096, 4096),
            (9, 1 << 20, 32768),
        ] {
            let (messages, _) = decode(&wire, early, step, buffer);
            assert!(
                bytes_of(&messages) == data,
                "early {early} step {step} buffer {buffer}"
            );
            assert!(messages.contains(&Message::Ping("ping".into())));
            assert_eq!(messages.last(), Some(&Message::Close(None)));
        }
    }

    #[test]
    fn a_piece_goes_on_before_the_frame_is_whole() {
        let mut begun = frame(0x82, &[7; 1000]);
        begun.truncate(8 + 10);
        let (messages, error) = decode(&begun, 0, 1 << 20, 4096);
        assert_eq!(bytes_of(&messages), [7; 10]);
        assert!(error.contains("without closing handshake"), "{error}");
    }

    #[test]
    fn a_length_is_never_taken_at_its_word() {
        let huge = [
            &[0x82, 0xff][..],
            &(1u64 << 62).to_be_bytes(),
            &[0; 4],
            &[0; 9],
        ]
        .concat();
        assert_eq!(bytes_of(&decode(&huge, 0, 1 << 20, 4096).0), [0; 9]);
    }

    #[test]
    fn tungstenite_judges_what_is_wrong() {
        let close = frame(0x88, &[]);
        for (name, wire, fault) in [
            (
                "top bit of the length",
                [&[0x82, 0xff][..], &u64::MAX.to_be_bytes(), &[0; 9]].concat(),
                "too long",
            ),
            ("unmasked", vec![0x82, 0x01, 0x00], "unmasked"),
            ("reserved bit", frame(0xc2, b"x"), "Reserved bits"),
            ("reserved opcode", frame(0x83, b"x"), "opcode"),
            (
                "continuation of nothing",
                frame(0x80, b"x"),
                "Continue frame",
            ),
            (
                "message in a message",
                [frame(0x02, b"x"), frame(0x82, b"y")].concat(),
                "fragment",
            ),
            (
                "text in a message",
                [frame(0x02, b"x"), frame(0x81, b"y")].concat(),
                "fragment",
            ),
            ("long control frame", frame(0x89, &[0; 126]), "too big"),
            (
                "endless control frame",
                [&[0x89, 0xff][..], &(1u64 << 40).to_be_bytes(), &[0; 9]].concat(),
                "too long",
            ),
            (
                "fragmented control frame",
                frame(0x09, b"x"),
                "ragmented control",
            ),
            (
                "one byte of a close code",
                frame(0x88, &[3]),
                "close sequence",
            ),
        ] {
            let wire = [wire, close.clone()].concat();
            for step in [1, 1 << 20] {
                let (messages, error) = decode(&wire, 0, step, 4096);
                assert!(error.contains(fault), "{name}: {error} {messages:?}");
            }
        }
    }

    #[test]
    fn a_text_message_is_reported_before_its_end() {
        for wire in [
            frame(0x81, "x".repeat(100_000).as_bytes()),
            frame(0x01, b"\xff"),
        ] {
            assert!(decode(&wire, 0, 1 << 20, 4096).0[0].is_text());
        }
    }
}
