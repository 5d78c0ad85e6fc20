//! What a tunnel makes of its peer's frames, however they arrive. For every input: properties.rs.

use tunneld::exposed::{Fault, Role};

use crate::oracles::Arrival;
use crate::oracles::frames::{Other, decoded_by};
use crate::support::frame;

/// What the daemon makes of `wire`: the bytes, the other messages, and the fault at the end.
fn decoded(
    wire: &[u8],
    early: usize,
    step: usize,
    read_size: usize,
) -> (Vec<u8>, Vec<Other>, Fault) {
    decoded_in(Role::Daemon, wire, early, step, read_size)
}

fn decoded_in(
    role: Role,
    wire: &[u8],
    early: usize,
    step: usize,
    read_size: usize,
) -> (Vec<u8>, Vec<Other>, Fault) {
    let arrival = Arrival {
        early,
        step,
        read_size,
        times_out: false,
    };
    decoded_by(role, wire, arrival, false)
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
            [
                Other::Ping(b"ping".into()),
                Other::Close(None, String::new())
            ]
        );
    }
}

#[test]
fn a_piece_goes_on_before_the_frame_is_whole() {
    let mut begun = frame(0x82, &[7; 1000]);
    begun.truncate(8 + 10);
    let (bytes, _, fault) = decoded(&begun, 0, 1 << 20, 4096);
    assert_eq!((&bytes[..], fault), (&[7; 10][..], Fault::Eof));
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
            "length",
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
        ("long control frame", frame(0x89, &[0; 126]), "length"),
        (
            "endless control frame",
            [&[0x89, 0xff][..], &(1u64 << 40).to_be_bytes(), &[0; 9]].concat(),
            "length",
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
            let (bytes, messages, found) = decoded(&wire, 0, step, 4096);
            assert!(
                matches!(&found, Fault::Protocol(why) if why.contains(fault)),
                "{name}: {found:?} {bytes:?} {messages:?}"
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
        assert_eq!(decoded(&wire, 0, 1 << 20, 4096).2, Fault::Text);
    }
}

/// A frame without a mask, as a server sends it.
pub fn unmasked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut masked = frame(first, payload);
    let header = masked.len() - payload.len() - 4;
    masked[1] &= 0x7f;
    [&masked[..header], payload].concat()
}

#[test]
fn a_servers_frames_bear_no_mask() {
    let data: Vec<u8> = (0..100_000u32).map(|n| (n / 251) as u8).collect();
    let wire = [
        unmasked(0x02, &data[..40_000]),
        unmasked(0x89, b"ping"),
        unmasked(0x80, &data[40_000..]),
        unmasked(0x88, &[3, 0xe8]),
    ]
    .concat();
    for (early, step) in [(0, 1), (0, 1 << 20), (9, 5000), (50_000, 1 << 20)] {
        let (bytes, others, _) = decoded_in(Role::Client, &wire, early, step, 2048);
        assert!(bytes == data, "early {early} step {step}");
        assert_eq!(
            others,
            [
                Other::Ping(b"ping".into()),
                Other::Close(Some(1000), String::new())
            ]
        );
    }
    let (_, _, fault) = decoded_in(Role::Client, &frame(0x82, b"x"), 0, 100, 2048);
    assert!(matches!(fault, Fault::Protocol(_)), "{fault:?}");
}
