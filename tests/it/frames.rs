//! What inbound makes of the client's frames, however they arrive. For every input: properties.rs.

use std::io::{self, Read};

use tungstenite::Message;

use tunneld::tunnel::frames::{Frames, Incoming};

use crate::support::frame;

/// A stream that is read in pieces of at most so many bytes.
struct Pieces<R>(R, usize);

impl<R: Read> Read for Pieces<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = buffer.len().min(self.1);
        self.0.read(&mut buffer[..limit])
    }
}

/// What inbound makes of `wire`: the bytes, the other messages, and the error at the end.
pub fn decoded(
    wire: &[u8],
    early: usize,
    step: usize,
    room: usize,
) -> (Vec<u8>, Vec<Message>, String) {
    let early = early.min(wire.len());
    let mut frames = Frames::new(Pieces(&wire[early..], step), wire[..early].to_vec(), room);
    let (mut bytes, mut others) = (Vec::new(), Vec::new());
    loop {
        match frames.receive() {
            Ok(Incoming::Bytes(payload)) => bytes.extend(payload),
            Ok(Incoming::Message(message)) => others.push(message),
            Err(error) => return (bytes, others, error.to_string()),
        }
    }
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
    for (early, step, room) in [
        (0, 1, 64),
        (0, 7, 14),
        (wire.len(), 1, 1000),
        (5, 4096, 4096),
        (9, 1 << 20, 32768),
    ] {
        let (bytes, messages, _) = decoded(&wire, early, step, room);
        assert!(bytes == data, "early {early} step {step} room {room}");
        assert_eq!(
            messages,
            [Message::Ping("ping".into()), Message::Close(None)]
        );
    }
}

#[test]
fn a_piece_goes_on_before_the_frame_is_whole() {
    let mut begun = frame(0x82, &[7; 1000]);
    begun.truncate(8 + 10);
    let (bytes, _, error) = decoded(&begun, 0, 1 << 20, 4096);
    assert_eq!(bytes, [7; 10]);
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
    assert_eq!(decoded(&huge, 0, 1 << 20, 4096).0, [0; 9]);
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
        ("long control frame", frame(0x89, &[0; 126]), "too long"),
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
            let (bytes, messages, error) = decoded(&wire, 0, step, 4096);
            assert!(
                error.contains(fault),
                "{name}: {error} {bytes:?} {messages:?}"
            );
        }
    }
}

#[test]
fn a_text_message_is_reported_before_its_end() {
    for wire in [
        frame(0x81, "x".repeat(100_000).as_bytes()),
        frame(0x01, b"\xff"),
    ] {
        assert!(decoded(&wire, 0, 1 << 20, 4096).1[0].is_text());
    }
}
