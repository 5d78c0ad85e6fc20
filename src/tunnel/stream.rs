//! A tunnel's stream: what its WebSocket stands for. In the daemon that is the target's connection; in the client
//! a connection to the local port, or stdin and stdout.

use std::net::TcpStream;
use std::sync::Arc;

use super::pipe::Pipe;
use super::stdio::Stdio;
use super::tcp::Tcp;
use super::transfer::{Received, Splices, WriteFailure};
use super::{Activity, Role};

/// Bytes in and bytes out, each with an end of its own.
#[derive(Debug)]
pub(crate) enum Stream {
    /// A TCP connection.
    Tcp(Tcp),
    /// The process's own streams.
    Stdio(Arc<Stdio>),
}

impl Stream {
    /// Waits for bytes.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Received {
        match self {
            Stream::Tcp(tcp) => tcp.receive(buffer),
            Stream::Stdio(stdio) => stdio.receive(buffer),
        }
    }

    /// Waits for bytes and moves them into `pipe`, which is empty.
    pub(super) fn receive_into(&self, pipe: &mut Pipe) -> Received {
        match self {
            Stream::Tcp(tcp) => tcp.receive_into(pipe),
            Stream::Stdio(_) => Received::NotSpliced(Splices::Never),
        }
    }

    /// Gives all of `bytes`, waiting as long as it takes.
    ///
    /// # Errors
    /// Why not all of them could be given. The counts in `activity` say how many were.
    pub(super) fn deliver(&self, bytes: &[u8], activity: &Activity) -> Result<(), WriteFailure> {
        activity.block_on_stream();
        let delivered = match self {
            Stream::Tcp(tcp) => tcp.deliver(bytes, activity),
            Stream::Stdio(stdio) => stdio.deliver(bytes, activity),
        };
        activity.unblock();
        delivered
    }

    /// Gives `limit` bytes of those in `pipe`, or as many as there are, waiting as long as it takes.
    ///
    /// # Errors
    /// As [`Stream::deliver`]. `Ok(Splices::Never)`: the system doesn't splice to it, and what was not given is still
    /// in the pipe.
    pub(super) fn deliver_from(
        &self,
        pipe: &mut Pipe,
        limit: usize,
        activity: &Activity,
    ) -> Result<Splices, WriteFailure> {
        activity.block_on_stream();
        let delivered = match self {
            Stream::Tcp(tcp) => tcp.deliver_from(pipe, limit, activity),
            Stream::Stdio(stdio) => stdio.deliver_from(pipe, limit, activity),
        };
        activity.unblock();
        delivered
    }

    /// Sends the FIN of an orderly end. From here on nothing takes back what was given.
    ///
    /// # Errors
    /// When it was closed before, so that it hasn't taken everything.
    pub(super) fn shutdown_write(&self) -> Result<(), WriteFailure> {
        match self {
            Stream::Tcp(tcp) => tcp.shutdown_write(),
            Stream::Stdio(stdio) => {
                stdio.shutdown_write();
                Ok(())
            }
        }
    }

    /// A close is a reset again, of which what has arrived in order is not touched.
    pub(super) fn reset_on_close(&self) {
        if let Stream::Tcp(tcp) = self {
            tcp.reset_on_close();
        }
    }

    /// Its connection, to be watched.
    pub(super) fn socket(&self) -> Option<Arc<TcpStream>> {
        match self {
            Stream::Tcp(tcp) => tcp.stream(),
            Stream::Stdio(_) => None,
        }
    }

    /// Whether both directions have ended, and all that was given has arrived or was refused by a reset.
    pub(super) fn is_over(&self) -> bool {
        match self {
            Stream::Tcp(tcp) => tcp.is_over(),
            Stream::Stdio(_) => true,
        }
    }

    /// Whether nobody has been told of its reset yet.
    pub(super) fn was_reset(&self) -> bool {
        match self {
            Stream::Tcp(tcp) => tcp.was_reset(),
            Stream::Stdio(_) => false,
        }
    }

    /// Why it failed, in words, if it did; it is told again to whoever reads from it next.
    pub(super) fn take_failure(&self) -> Option<String> {
        match self {
            Stream::Tcp(tcp) => tcp.take_failure(),
            Stream::Stdio(_) => None,
        }
    }

    /// How much of what was given, the FIN behind it counted as one, has not arrived; `None` if nobody can tell.
    pub(super) fn unacknowledged(&self) -> Option<u64> {
        match self {
            Stream::Tcp(tcp) => tcp.unacknowledged(),
            Stream::Stdio(_) => Some(0),
        }
    }

    /// Makes the end a broken one, unless it was finished in order: a RST. Wakes the threads that wait for it,
    /// but for one in a write to stdout.
    pub(super) fn abort(&self) {
        match self {
            Stream::Tcp(tcp) => tcp.abort(),
            Stream::Stdio(stdio) => stdio.abort(),
        }
    }

    /// Both directions have ended in order.
    pub(super) fn close_gracefully(&self) {
        match self {
            Stream::Tcp(tcp) => tcp.close_gracefully(),
            Stream::Stdio(_) => {}
        }
    }

    /// Its failure as the other end, the log and the user are told of it.
    pub(super) fn failure(&self, role: Role, why: &str) -> String {
        match self {
            Stream::Tcp(_) => format!("{} failed: {why}", role.stream_name()),
            // That says already which of the two streams it was.
            Stream::Stdio(_) => why.to_owned(),
        }
    }
}
