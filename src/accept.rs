//! What every accept loop does about the system: enough descriptors, and what to think of a failure.

use std::io::{self, ErrorKind};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How long nothing is accepted after the system refused to.
pub const PAUSE: Duration = Duration::from_millis(100);

/// Errors that say something of one connection, not of the listener (accept(2)).
pub fn is_of_one_connection(error: &io::Error) -> bool {
    use ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | Interrupted | WouldBlock
    )
}

/// Raises the soft limit of descriptors to the hard one. Where that fails, there are as many as before.
pub fn raise_descriptors() {
    let hard = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: hard,
        maximum: hard,
    };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        log::debug!("cannot raise the limit of descriptors: {error}");
    }
}
