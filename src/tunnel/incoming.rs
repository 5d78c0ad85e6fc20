//! What comes from a peer, whatever it is framed in.

use std::io::{self, ErrorKind};

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// Payload, at least one byte.
    Bytes(&'a [u8]),
    /// So many bytes of payload come next from the `R`, unaltered, and may be taken from it; see
    /// `spliced` of its reader.
    Payload(u64),
    /// To be answered with a pong of the same payload.
    Ping(Vec<u8>),
    /// Whether it answers a ping, its payload tells.
    Pong(Vec<u8>),
    /// A Close, with its code and its reason.
    Close(Option<u16>, String),
    /// The peer's orderly end.
    End,
    /// A read timed out. What came before stays.
    Nothing,
}

/// Why nothing can come any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A text message.
    Text,
    /// What the framing forbids, in words.
    Protocol(String),
    /// The end of the `R`.
    Eof,
    /// The `R` failed, in words.
    Failed(String),
}

pub(super) fn nothing_or(fault: Option<Fault>) -> Result<Incoming<'static>, Fault> {
    fault.map_or(Ok(Incoming::Nothing), Err)
}

/// Nothing has failed when a read timed out.
pub(super) fn failure(error: &io::Error) -> Option<Fault> {
    (error.kind() != ErrorKind::WouldBlock).then(|| Fault::Failed(error.to_string()))
}
