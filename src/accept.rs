//! What every accept loop does about the system: a long queue, enough descriptors, and what to think of a failure.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};

use crate::cli::Bind;

/// How many connections may wait to be accepted (listen(2)); `net.core.somaxconn` lowers it. With std's 128 a burst
/// of more has its SYNs dropped, and each is sent again a second later or, where the handshake looks finished to a
/// client that waits for the other side to speak, not at all.
pub const BACKLOG: i32 = 4096;

/// How long nothing is accepted after the system refused to.
pub const PAUSE: Duration = Duration::from_millis(100);

/// How many free ports of IPv4 are tried until one is free with IPv6 as well.
const TRIES: usize = 20;

/// Why an address can't be listened on.
#[derive(Debug)]
pub struct CannotListen {
    address: SocketAddr,
    error: io::Error,
}

impl fmt::Display for CannotListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot listen on {}: {}", self.address, self.error)
    }
}

/// Listens where `bind` says: on one address, or on two that have the same port.
///
/// # Errors
/// When an address is in use or not ours, or the system refuses a socket. Then none is listened on.
pub fn listen(bind: Bind) -> Result<Vec<TcpListener>, CannotListen> {
    match bind {
        Bind::At(address) => listen_on(address, false).map(|listener| vec![listener]),
        Bind::Loopback(port) => listen_on_pair(Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST, port),
        Bind::Everywhere(port) => {
            listen_on_pair(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED, port)
        }
    }
}

/// Both, or the first alone on a machine without IPv6.
fn listen_on_pair(
    first: Ipv4Addr,
    second: Ipv6Addr,
    port: u16,
) -> Result<Vec<TcpListener>, CannotListen> {
    let at = |address: IpAddr, port| SocketAddr::new(address, port);
    let mut tries = 0;
    loop {
        tries += 1;
        let v4 = listen_on(at(first.into(), port), false)?;
        let taken = v4.local_addr().map_or(port, |address| address.port());
        match listen_on(at(second.into(), taken), true) {
            Ok(v6) => return Ok(vec![v4, v6]),
            Err(why) if has_no_ipv6(&why.error) => return Ok(vec![v4]),
            Err(why) if port != 0 || tries == TRIES => return Err(why),
            // Somebody has that port with IPv6 only.
            Err(_) => {}
        }
    }
}

fn has_no_ipv6(error: &io::Error) -> bool {
    let none = [Errno::ADDRNOTAVAIL, Errno::AFNOSUPPORT];
    Errno::from_io_error(error).is_some_and(|error| none.contains(&error))
}

/// Listens as std does it but for the length of the queue. With `only_v6` an IPv6 address leaves IPv4 to another.
fn listen_on(address: SocketAddr, only_v6: bool) -> Result<TcpListener, CannotListen> {
    let listen = || {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        // So that a restart need not wait for the connections of the last run to leave TIME_WAIT.
        socket.set_reuse_address(true)?;
        // What is accepted has it from the first byte on: an urgent byte (`MSG_OOB`, RFC 6093) is a byte in its place.
        socket.set_out_of_band_inline(true)?;
        if only_v6 {
            socket.set_only_v6(true)?;
        }
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    listen().map_err(|error| CannotListen { address, error })
}

/// The addresses of `listeners`, in one text.
///
/// # Errors
/// When the system doesn't tell.
pub fn addresses(listeners: &[TcpListener]) -> io::Result<String> {
    let addresses = listeners.iter().map(TcpListener::local_addr);
    let addresses: io::Result<Vec<_>> = addresses.map(|address| Ok(address?.to_string())).collect();
    Ok(addresses?.join(", "))
}

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
