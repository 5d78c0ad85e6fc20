//! What must hold for every input of what parses, as functions that panic where it doesn't. Properties.rs feeds them what
//! proptest makes up, and scripts/fuzz/ what libFuzzer finds.

pub mod capsules;
pub mod frames;
pub mod options;
pub mod policy;
pub mod request_head;

use std::io::{self, ErrorKind, Read};

/// How bytes come to a reader.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// So many came with the handshake.
    pub early: usize,
    /// The most that come at a time.
    pub step: usize,
    /// The most that are asked for at a time.
    pub read_size: usize,
    /// Before each of them a read times out.
    pub times_out: bool,
}

impl Arrival {
    pub const AT_ONCE: Arrival = Arrival {
        early: 0,
        step: usize::MAX,
        read_size: 4096,
        times_out: false,
    };
}

/// A stream that is read as an [`Arrival`] says.
pub struct Pieces<'a> {
    bytes: &'a [u8],
    step: usize,
    times_out: bool,
    is_late: bool,
    timeouts: usize,
}

impl<'a> Pieces<'a> {
    /// The bytes that came early, and the stream of the others.
    pub fn of(wire: &'a [u8], arrival: Arrival) -> (Vec<u8>, Pieces<'a>) {
        let (early, bytes) = wire.split_at(arrival.early.min(wire.len()));
        let pieces = Pieces {
            bytes,
            step: arrival.step,
            times_out: arrival.times_out,
            is_late: arrival.times_out,
            timeouts: 0,
        };
        (early.to_vec(), pieces)
    }

    /// Takes payload past a reader, as the relay does where it is to be spliced. `None` if that timed out.
    fn spliced(&mut self, count: u64) -> Option<Vec<u8>> {
        let mut piece = vec![0; count.min(10_000) as usize];
        let read = self.read(&mut piece);
        // It is told to nobody.
        self.timeouts -= usize::from(read.is_err());
        piece.truncate(read.ok()?);
        Some(piece)
    }
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_late {
            self.is_late = false;
            self.timeouts += 1;
            return Err(ErrorKind::WouldBlock.into());
        }
        self.is_late = self.times_out;
        let limit = buffer.len().min(self.step);
        self.bytes.read(&mut buffer[..limit])
    }
}
