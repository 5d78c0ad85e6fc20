//! Why a target can't be reached, in types for whoever decides by it and in words for a person.

use std::fmt;
use std::io;
use std::net::SocketAddr;

/// The most addresses of a name that are tried, as each attempt holds a descriptor; and that are named.
pub const MAX_ADDRESSES: usize = 6;

/// Why a target can't be reached.
#[derive(Debug)]
pub enum DialError {
    /// The policy permits none of these addresses of a name, or not the target itself. Nothing was dialed.
    Forbidden(Vec<SocketAddr>),
    /// The name has no domain, and the policy denies names that the resolver may complete it to. Nothing was looked up.
    Incomplete,
    /// The name has no address, or there is no resolver.
    Resolve(String),
    /// So many names are being resolved that the turn of this one did not come before the dial timeout was over.
    ResolverBusy,
    /// The dial timeout is over, and what was being done then.
    TimedOut(Step),
    /// The caller has gone away meanwhile: nobody waits for an answer.
    CallerGone,
    /// The system has no thread, descriptor or memory left for it.
    Exhausted(io::Error),
    /// Every address failed; the reason of each.
    Connect(Vec<(SocketAddr, io::Error)>),
}

/// What a dial does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Looks the name up.
    Resolving,
    /// Connects to its addresses.
    Connecting,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Resolving => "resolving the name",
            Step::Connecting => "connecting",
        })
    }
}

impl DialError {
    /// Whether it was refused a thread for its look-up (EAGAIN, pthread_create(3)). Nothing was asked or dialed.
    pub fn is_want_of_a_thread(&self) -> bool {
        matches!(self, DialError::Exhausted(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DialError::Forbidden(addresses) if addresses.is_empty() => f.write_str("not permitted"),
            DialError::Forbidden(addresses) => {
                let addresses = addresses.iter().take(MAX_ADDRESSES);
                let addresses = addresses.map(SocketAddr::to_string);
                write!(
                    f,
                    "not permitted: {}",
                    addresses.collect::<Vec<_>>().join(", ")
                )
            }
            DialError::Incomplete => f.write_str(
                "not permitted by its short name, which may stand for a denied one: \
                 write the full name, with its domain or a dot at its end",
            ),
            DialError::Resolve(reason) => write!(f, "its name does not resolve: {reason}"),
            DialError::ResolverBusy => {
                f.write_str("timed out while waiting for other names to be resolved")
            }
            DialError::TimedOut(doing) => write!(f, "timed out while {doing}"),
            DialError::CallerGone => f.write_str("the client has gone away"),
            DialError::Exhausted(error) => write!(f, "no room for another connection: {error}"),
            DialError::Connect(failed) => {
                for (index, (address, error)) in failed.iter().enumerate() {
                    let separator = if index == 0 { "" } else { ", " };
                    let error = error.to_string();
                    let reason = error.split(" (os error").next().unwrap_or(&error);
                    write!(f, "{separator}{address}: {reason}")?;
                }
                Ok(())
            }
        }
    }
}
