//! The seam between the relay and what is on the wire: a WebSocket's frames, or capsules.

use std::io::Read;

use super::capsules::{self, CapsuleReader};
use super::ends::{Endpoint, Protocol};
use super::frame_reader::FrameReader;
use super::incoming::{Fault, Incoming};

impl Endpoint {
    /// How long the header of most messages is that come from the peer and are worth splicing.
    pub(super) fn usual_header(self) -> usize {
        match self.protocol {
            // Two bytes and a 16-bit length (RFC 6455 §5.2).
            Protocol::WebSocket => 4,
            Protocol::ConnectTcp => capsules::USUAL_HEADER,
        }
    }
}

/// What comes from an `R`, whatever it is framed in.
#[derive(Debug)]
pub(super) enum Reader<R> {
    /// RFC 6455. tungstenite's part of it is large.
    WebSocket(Box<FrameReader<R>>),
    /// RFC 9297.
    Capsules(CapsuleReader<R>),
}

impl<R: Read> Reader<R> {
    /// Reads what comes to `endpoint` from `inner`, at most `read_size` bytes at a time, with the bytes of `early`
    /// before them. What bears no mask is given as [`Incoming::Payload`] where that is worth it.
    pub(super) fn new(inner: R, early: Vec<u8>, read_size: usize, endpoint: Endpoint) -> Reader<R> {
        let mut reader = match endpoint.protocol {
            Protocol::WebSocket => {
                let frames = FrameReader::new(inner, early, read_size, endpoint.role);
                Reader::WebSocket(Box::new(frames))
            }
            Protocol::ConnectTcp => Reader::Capsules(CapsuleReader::new(inner, early, read_size)),
        };
        reader.set_splices(true);
        reader
    }

    /// Waits for what comes next. The payload that is here already comes together.
    ///
    /// # Errors
    /// [`Fault`]. After one nothing can come.
    pub(super) fn receive(&mut self) -> Result<Incoming<'_>, Fault> {
        match self {
            Reader::WebSocket(frames) => frames.receive(),
            Reader::Capsules(capsules) => capsules.receive(),
        }
    }

    /// From now on payload that isn't in memory yet is given as [`Incoming::Payload`], if it is worth it; or no
    /// longer.
    pub(super) fn set_splices(&mut self, splices: bool) {
        match self {
            Reader::WebSocket(frames) => frames.set_splices(splices),
            Reader::Capsules(capsules) => capsules.set_splices(splices),
        }
    }

    /// Whether it may be given so.
    pub(super) fn splices(&self) -> bool {
        match self {
            Reader::WebSocket(frames) => frames.splices(),
            Reader::Capsules(capsules) => capsules.splices(),
        }
    }

    /// `count` bytes of an [`Incoming::Payload`] were taken from the `R`.
    pub(super) fn spliced(&mut self, count: u64) {
        match self {
            Reader::WebSocket(frames) => frames.spliced(count),
            Reader::Capsules(capsules) => capsules.spliced(count),
        }
    }

    /// Where the bytes come from.
    pub(super) fn source(&mut self) -> &mut R {
        match self {
            Reader::WebSocket(frames) => frames.source(),
            Reader::Capsules(capsules) => capsules.source(),
        }
    }

    /// After the peer's end: what carries no payload may still come.
    pub(super) fn go_on(&mut self) {
        match self {
            Reader::WebSocket(frames) => frames.go_on(),
            Reader::Capsules(_) => {}
        }
    }

    /// Whether the last read brought all it asked for, so that more may be there.
    pub(super) fn filled_buffer(&self) -> bool {
        match self {
            Reader::WebSocket(frames) => frames.filled_buffer(),
            Reader::Capsules(capsules) => capsules.filled_buffer(),
        }
    }

    /// Changes how much is read at a time. The memory follows before the next read.
    pub(super) fn set_read_size(&mut self, read_size: usize) {
        match self {
            Reader::WebSocket(frames) => frames.set_read_size(read_size),
            Reader::Capsules(capsules) => capsules.set_read_size(read_size),
        }
    }
}
