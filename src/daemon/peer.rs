//! Who a client is, as far as the daemon can tell, for the log and for its share of what is bounded.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{getsockopt, sockopt};

/// A client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// It connects from this address.
    Tcp(SocketAddr),
    /// It connects to a Unix socket: a process of this machine.
    Unix(Option<Process>),
    /// It is behind a proxy, which says so.
    Forwarded(IpAddr),
}

/// A process that connected to a Unix socket, as it was then (`SO_PEERCRED`, unix(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    uid: u32,
    /// 0 if it is in another namespace, such as the host of a container.
    pid: i32,
}

impl Peer {
    /// That of a connection to a Unix socket.
    pub fn of(stream: &UnixStream) -> Peer {
        let credentials = getsockopt(stream, sockopt::PeerCredentials).ok();
        Peer::Unix(credentials.map(|credentials| Process {
            uid: credentials.uid(),
            pid: credentials.pid(),
        }))
    }

    /// Its address. Those that come over a Unix socket have one together, which is nobody else's.
    pub fn ip(&self) -> IpAddr {
        match self {
            Peer::Tcp(address) => address.ip(),
            Peer::Forwarded(address) => *address,
            Peer::Unix(_) => Ipv4Addr::UNSPECIFIED.into(),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) => address.fmt(f),
            Peer::Forwarded(address) => address.fmt(f),
            Peer::Unix(Some(Process { uid, pid })) => write!(f, "unix:uid={uid},pid={pid}"),
            Peer::Unix(None) => f.write_str("unix"),
        }
    }
}
