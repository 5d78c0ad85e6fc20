//! Capsules, against a decoder that has them all at once.

use super::{Arrival, Pieces};
use tunneld::exposed::{CapsuleReader, Fault, Incoming};

pub const DATA: u64 = 0x2028_d7f2;
pub const FINAL_DATA: u64 = 0x2028_d7f3;

/// What comes of `wire`: the bytes, how many of them had come at each end, and the fault.
pub fn decoded(wire: &[u8], arrival: Arrival, splices: bool) -> (Vec<u8>, Vec<usize>, Fault) {
    let (early, source) = Pieces::of(wire, arrival);
    let mut capsules = CapsuleReader::new(source, early, arrival.read_size);
    capsules.set_splices(splices);
    let (mut bytes, mut ends, mut nothings) = (Vec::new(), Vec::new(), 0);
    loop {
        match capsules.receive() {
            Ok(Incoming::Bytes(payload)) => bytes.extend(payload),
            Ok(Incoming::End) => ends.push(bytes.len()),
            Ok(Incoming::Payload(count)) => {
                if let Some(piece) = capsules.source().spliced(count) {
                    bytes.extend(&piece);
                    capsules.spliced(piece.len() as u64);
                    // The end of the stream is told by a plain read.
                    capsules.set_splices(!piece.is_empty());
                }
            }
            Ok(Incoming::Nothing) => {
                nothings += 1;
                assert!(
                    nothings <= capsules.source().timeouts,
                    "nothing without a timeout"
                );
            }
            Ok(_) => panic!("no capsule says that"),
            Err(fault) => return (bytes, ends, fault),
        }
    }
}

/// How capsules arrive makes no difference, nor whether their payload is spliced, and they mean what [`by_hand`] says.
pub fn are_the_same_however_they_arrive(wire: &[u8], arrival: Arrival) {
    let whole = decoded(wire, Arrival::AT_ONCE, false);
    for splices in [false, true] {
        assert_eq!(
            whole,
            decoded(wire, arrival, splices),
            "{arrival:?} {splices}"
        );
    }
    let (bytes, ends, fault) = whole;
    assert_eq!((bytes, ends, fault != Fault::Eof), by_hand(wire));
}

/// The bytes, how many of them had come at each end, and whether the rest is refused: data behind the end, or half a
/// capsule (RFC 9297 §3.3).
fn by_hand(wire: &[u8]) -> (Vec<u8>, Vec<usize>, bool) {
    let (mut bytes, mut ends) = (Vec::new(), Vec::new());
    let mut rest = wire;
    while let Some((of_type, length, payload)) = header(rest) {
        let here = payload.len().min(usize::try_from(length).unwrap());
        let is_data = [DATA, FINAL_DATA].contains(&of_type);
        if is_data && !ends.is_empty() {
            return (bytes, ends, true);
        }
        if is_data {
            bytes.extend(&payload[..here]);
        }
        if here as u64 != length {
            break;
        }
        if of_type == FINAL_DATA {
            ends.push(bytes.len());
        }
        rest = &payload[here..];
    }
    let is_refused = !ends.is_empty() && !rest.is_empty();
    (bytes, ends, is_refused)
}

/// A capsule's type, its length and what follows, or `None` if its header isn't whole.
fn header(bytes: &[u8]) -> Option<(u64, u64, &[u8])> {
    let (of_type, bytes) = integer(bytes)?;
    let (length, bytes) = integer(bytes)?;
    Some((of_type, length, bytes))
}

/// RFC 9000 §A.1.
fn integer(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let first = *bytes.first()?;
    let (own, rest) = bytes.split_at_checked(1 << (first >> 6))?;
    let value = own[1..]
        .iter()
        .fold(u64::from(first & 0x3f), |value, &byte| {
            value << 8 | u64::from(byte)
        });
    Some((value, rest))
}
