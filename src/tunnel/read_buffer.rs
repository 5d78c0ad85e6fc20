//! Bytes read from a connection and not handed on yet.

use std::io::{self, Read};
use std::ops::Range;

/// The longest header of a frame or of a capsule that must be whole to be understood: two bytes, a 64-bit length, the
/// mask (RFC 6455 §5.2); or two integers of 8 bytes (RFC 9297 §3.2).
const MAX_HEADER: usize = 16;

/// The most bytes that are moved so that what lies around a header can go on in one send.
const MAX_COALESCED: usize = 16 * 1024;

/// The bytes `bytes[start..end]`, and the `R` that more come from.
#[derive(Debug)]
pub(super) struct ReadBuffer<R> {
    pub(super) inner: R,
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    read_size: usize,
    filled: bool,
}

impl<R: Read> ReadBuffer<R> {
    /// Reads from `inner`, at most `read_size` bytes at a time. The bytes of `early` come before them.
    pub(super) fn new(inner: R, early: Vec<u8>, read_size: usize) -> ReadBuffer<R> {
        ReadBuffer {
            inner,
            start: 0,
            end: early.len(),
            bytes: early,
            read_size: read_size.max(MAX_HEADER),
            filled: false,
        }
    }

    /// Reads more, behind the part of a header that may be here. `false` at the end of the stream.
    ///
    /// # Errors
    /// Those of the `R`.
    pub(super) fn fill(&mut self) -> io::Result<bool> {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.bytes.len() != self.read_size {
            self.bytes.resize(self.read_size, 0);
            self.bytes.shrink_to_fit();
        }
        let place = &mut self.bytes[self.end..];
        let count = self.inner.read(place)?;
        self.filled = count == place.len();
        self.end += count;
        Ok(count > 0)
    }

    /// What is here.
    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Where it is.
    pub(super) fn position(&self) -> usize {
        self.start
    }

    /// Takes at most `limit` of the bytes that are here, and tells where they are.
    pub(super) fn take(&mut self, limit: u64) -> Range<usize> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let taken = self.start..self.end.min(self.start.saturating_add(limit));
        self.start = taken.end;
        taken
    }

    /// Whether a piece of at most `limit` bytes, taken next, is worth moving to join it to `payload`.
    pub(super) fn joins(&self, payload: &Range<usize>, limit: u64) -> bool {
        let piece = (self.end - self.start) as u64;
        payload.len().min(piece.min(limit) as usize) <= MAX_COALESCED
    }

    /// Closes the gap between two pieces by moving the shorter one.
    pub(super) fn join(&mut self, first: Range<usize>, second: Range<usize>) -> Range<usize> {
        if first.len() < second.len() {
            let start = second.start - first.len();
            self.bytes.copy_within(first, start);
            start..second.end
        } else {
            let end = first.end + second.len();
            self.bytes.copy_within(second, first.end);
            first.start..end
        }
    }

    /// What was taken.
    pub(super) fn taken(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[range]
    }

    /// The same, to be changed where it lies.
    pub(super) fn taken_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self.bytes[range]
    }

    /// Whether the last read brought all it asked for, so that more may be there.
    pub(super) fn is_filled(&self) -> bool {
        self.filled
    }

    /// Changes how much is read at a time. The memory follows before the next read.
    pub(super) fn set_read_size(&mut self, read_size: usize) {
        self.read_size = read_size.max(MAX_HEADER);
        self.filled = false;
    }
}
