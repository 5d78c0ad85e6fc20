//! What a tunnel is for on this side, before there is one: it is let in once the server has agreed, or turned away.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;

use rustix::event::PollFlags;

use super::failure::Failure;
use super::socks;
use crate::caller;
use crate::os;
use crate::tunnel::{Stdio, Stream, Tcp};

/// What waits for a tunnel.
#[derive(Debug)]
pub enum Local {
    /// Stdin and stdout.
    Stdio(Arc<Stdio>),
    /// A local connection, which is reset by whatever drops it.
    Tcp(TcpStream),
    /// One that wants to be told.
    Socks(socks::Asked),
}

impl Local {
    /// The stream of its tunnel, which there is now.
    ///
    /// # Errors
    /// When the local client is gone, or the system has no descriptor left.
    pub fn let_in(self) -> io::Result<Stream> {
        match self {
            Local::Stdio(stdio) => Ok(Stream::Stdio(stdio)),
            Local::Tcp(client) => Tcp::new(client).map(Stream::Tcp),
            Local::Socks(asked) => Tcp::new(asked.grant()?).map(Stream::Tcp),
        }
    }

    /// Whether nobody waits for the tunnel any more. Of stdin and stdout a signal would say so.
    pub fn is_gone(&self) -> bool {
        match self {
            Local::Stdio(_) => false,
            Local::Tcp(client) => has_left(client),
            Local::Socks(asked) => has_left(asked.client()),
        }
    }

    /// There is none, and why.
    pub fn turn_away(self, why: &Failure) {
        if let Local::Socks(asked) = self {
            asked.refuse(why);
        }
    }
}

/// Beside what tells a daemon that a client has gone: on this machine one that has sent something and then closed is told
/// from one that has only half-closed. Its request must not be run for nobody, and again for whoever tries again. One from
/// elsewhere is waited for.
fn has_left(client: &TcpStream) -> bool {
    let has_ended = || !os::ready(client, PollFlags::RDHUP).is_empty();
    caller::is_gone(client, false) || has_ended() && os::is_closed_over_there(client) == Some(true)
}
