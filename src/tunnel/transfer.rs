//! What became of a read from a stream, and of a write to it.

use std::io;

/// What a read gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// So many bytes, at least one.
    Bytes(usize),
    /// The orderly end.
    Eof,
    /// The stream failed, in words.
    Failed(String),
    /// The tunnel was aborted.
    Aborted,
    /// Nothing could be spliced: a plain read tells why.
    NotSpliced(Splices),
}

/// Whether it is worth trying to splice again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Splices {
    /// Behind the next plain read.
    Later,
    /// The system doesn't do it.
    Never,
}

/// Why the stream took no more bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum WriteFailure {
    /// It was closed after an orderly end of its own, so what was read from it until then is whole.
    Closed,
    /// It failed, in words.
    Failed(String),
    /// The tunnel was aborted.
    Aborted,
}

impl From<&io::Error> for WriteFailure {
    /// After a FIN a reset is EPIPE, without one it is ECONNRESET (tcp_reset in Linux).
    fn from(error: &io::Error) -> WriteFailure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => WriteFailure::Closed,
            _ => WriteFailure::Failed(error.to_string()),
        }
    }
}
