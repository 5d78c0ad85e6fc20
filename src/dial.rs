//! From a host and a port to a connected `TcpStream`: resolve once, then race the addresses, all of it
//! before one deadline.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::caller::Caller;
use crate::dial_error::{DialError, MAX_ADDRESSES, Step};
use crate::os;
use crate::policy::Policy;
use crate::resolver;
use crate::target::{Host, Target};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with, sockopt};

/// RFC 8305 §5: how long one attempt runs alone before the next one starts beside it.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Connects to one of the addresses of `target` that `policy` permits, before `deadline`, with `TCP_NODELAY`
/// set, and returns it with the address. Gives up when `caller` has gone away; without one, this process is the caller.
///
/// # Errors
/// [`DialError`].
pub fn dial(
    target: &Target,
    policy: &Policy,
    deadline: Instant,
    caller: Option<&Caller<'_>>,
) -> Result<(TcpStream, SocketAddr), DialError> {
    if policy.rules_out(target) {
        return Err(DialError::Forbidden(Vec::new()));
    }
    let complete = policy.completed(target).ok_or(DialError::Incomplete)?;
    let resolved = resolve(&complete, deadline, caller)?;
    let permitted = policy.permitted(target, &resolved);
    if permitted.is_empty() {
        let is_name = matches!(target.host, Host::Name(_));
        return Err(DialError::Forbidden(if is_name {
            resolved
        } else {
            Vec::new()
        }));
    }
    let (stream, address) = race(&interleave(permitted), deadline, caller)?;
    // Neither failure breaks the tunnel; the stream then is a little slower, or notices a dead host later.
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(&stream, true);
    let _ = sockopt::set_tcp_keepidle(&stream, Duration::from_secs(60));
    let _ = sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(15));
    Ok((stream, address))
}

fn resolve(
    target: &Target,
    deadline: Instant,
    caller: Option<&Caller<'_>>,
) -> Result<Vec<SocketAddr>, DialError> {
    let at = |address: IpAddr| SocketAddr::new(address, target.port);
    match &target.host {
        Host::Localhost => Ok(vec![
            at(Ipv4Addr::LOCALHOST.into()),
            at(Ipv6Addr::LOCALHOST.into()),
        ]),
        Host::Address(address) => Ok(vec![at(*address)]),
        Host::Name(name) => resolver::resolve(name.clone(), target.port, deadline, caller),
    }
}

/// RFC 8305 §4: the resolver's order, but the two families in turn, so that one that leads nowhere costs
/// one attempt's delay.
fn interleave(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let Some(first_is_v6) = addresses.first().map(SocketAddr::is_ipv6) else {
        return addresses;
    };
    let (first, second): (Vec<_>, Vec<_>) = addresses
        .into_iter()
        .partition(|address| address.is_ipv6() == first_is_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut mixed: Vec<SocketAddr> = Vec::new();
    while mixed.len() < MAX_ADDRESSES {
        let pair = [first.next(), second.next()];
        if pair == [None, None] {
            break;
        }
        for address in pair
            .into_iter()
            .flatten()
            .filter(|address| !mixed.contains(address))
            .collect::<Vec<_>>()
        {
            mixed.push(address);
        }
    }
    mixed.truncate(MAX_ADDRESSES);
    mixed
}

/// Starts an attempt when the one before has failed or has run for [`ATTEMPT_DELAY`]; the first to
/// connect wins and the others are dropped.
fn race(
    addresses: &[SocketAddr],
    deadline: Instant,
    caller: Option<&Caller<'_>>,
) -> Result<(TcpStream, SocketAddr), DialError> {
    let mut waiting = addresses.iter();
    let mut running: Vec<(SocketAddr, OwnedFd)> = Vec::new();
    let mut failed = Vec::new();
    let mut next_start = Instant::now();
    loop {
        let now = Instant::now();
        if now >= deadline {
            return Err(DialError::TimedOut(Step::Connecting));
        }
        if running.is_empty() || now >= next_start {
            match waiting.next() {
                Some(&address) => {
                    log::debug!(address:% = address; "attempt");
                    match begin(address) {
                        Ok(socket) => running.push((address, socket)),
                        Err(error) => failed.push((address, error.into())),
                    }
                    next_start = now + ATTEMPT_DELAY;
                    continue;
                }
                None if running.is_empty() => return Err(all_failed(failed)),
                None => next_start = deadline,
            }
        }
        wait_for_any(
            &running,
            next_start.min(deadline).saturating_duration_since(now),
            caller,
        );
        if let Some(winner) = take_finished(&mut running, &mut failed) {
            return Ok(winner);
        }
        if caller.is_some_and(Caller::is_gone) {
            return Err(DialError::CallerGone);
        }
    }
}

/// Want of descriptors or memory says nothing of the target.
fn all_failed(mut failed: Vec<(SocketAddr, io::Error)>) -> DialError {
    let is_want = |error: &io::Error| {
        let want = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
        Errno::from_io_error(error).is_some_and(|error| want.contains(&error))
    };
    let all_want = failed.iter().all(|(_, error)| is_want(error));
    match failed.pop() {
        Some((_, error)) if all_want => DialError::Exhausted(error),
        last => {
            failed.extend(last);
            DialError::Connect(failed)
        }
    }
}

fn begin(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    // Before anything can come: an urgent byte (`MSG_OOB`, RFC 6093) is a byte in its place.
    let _ = sockopt::set_socket_oobinline(&socket, true);
    match connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

fn wait_for_any(running: &[(SocketAddr, OwnedFd)], limit: Duration, caller: Option<&Caller<'_>>) {
    let mut fds: Vec<PollFd<'_>> = running
        .iter()
        .map(|(_, socket)| PollFd::new(socket, PollFlags::OUT))
        .chain(caller.map(Caller::poll_fd))
        .collect();
    // An error here is want of memory; the caller looks at the sockets and the clock again.
    let _ = os::wait(&mut fds, Some(limit));
}

/// Moves failed attempts to `failed` and returns the first connected one, made blocking.
fn take_finished(
    running: &mut Vec<(SocketAddr, OwnedFd)>,
    failed: &mut Vec<(SocketAddr, io::Error)>,
) -> Option<(TcpStream, SocketAddr)> {
    for (address, socket) in std::mem::take(running) {
        match connected(socket, address) {
            Ok(Ok(stream)) => return Some((stream, address)),
            Ok(Err(socket)) => running.push((address, socket)),
            Err(error) => failed.push((address, error)),
        }
    }
    None
}

/// The connected stream, or the socket again if its attempt still runs.
fn connected(socket: OwnedFd, address: SocketAddr) -> io::Result<Result<TcpStream, OwnedFd>> {
    if os::ready(&socket, PollFlags::OUT).is_empty() {
        return Ok(Err(socket));
    }
    sockopt::socket_error(&socket)??;
    let stream = TcpStream::from(socket);
    if is_connected_to_itself(&stream, address) {
        // Without a wait in TIME_WAIT, which would keep the port from the service that is to listen there.
        let _ = sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
        return Err(Errno::CONNREFUSED.into());
    }
    stream.set_nonblocking(false)?;
    Ok(Ok(stream))
}

/// Where nothing listens on a port that the system gives to outgoing connections, it may give an attempt just that
/// port, and the SYN is answered by the socket it came from (a simultaneous open, RFC 9293 §3.5).
fn is_connected_to_itself(stream: &TcpStream, address: SocketAddr) -> bool {
    stream.local_addr().is_ok_and(|local| {
        (local.ip().to_canonical(), local.port()) == (address.ip().to_canonical(), address.port())
    })
}

impl std::error::Error for DialError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_take_turns() {
        let address = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let resolved = ["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1", "1.1.1.1:1"]
            .map(address)
            .to_vec();
        let expected = ["[::1]:1", "1.1.1.1:1", "[::2]:1", "[::3]:1"].map(address);
        assert_eq!(interleave(resolved), expected);
    }

    #[test]
    fn a_dead_address_costs_only_its_delay() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let alive = listener.local_addr().unwrap();
        let full = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&full, 0).unwrap();
        let dead = full.local_addr().unwrap();
        let _fill: Vec<_> = (0..4).map(|_| begin(dead).unwrap()).collect();
        let start = Instant::now();
        let deadline = start + Duration::from_secs(20);
        let (stream, address) = race(&[dead, alive], deadline, None).unwrap();
        assert_eq!((stream.peer_addr().unwrap(), address), (alive, alive));
        assert!(start.elapsed() >= ATTEMPT_DELAY);
    }

    /// A socket that is bound to a port of its own, and its address.
    fn bound() -> (OwnedFd, SocketAddr) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = rustix::net::getsockname(&socket).unwrap();
        (socket, address.try_into().unwrap())
    }

    #[test]
    fn a_connection_to_itself_is_refused_and_leaves_the_port_free() {
        let (socket, address) = bound();
        let begun = connect(&socket, &address);
        assert!(
            matches!(begun, Ok(()) | Err(Errno::INPROGRESS)),
            "{begun:?}"
        );
        os::wait(&mut [PollFd::new(&socket, PollFlags::OUT)], None).unwrap();
        let error = connected(socket, address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let strict = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        strict.unwrap().bind(&address.into()).unwrap();
    }

    #[test]
    fn a_target_that_resets_once_it_has_accepted_is_named_with_the_reason() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let socket = begin(address).unwrap();
        let accepted = listener.accept().unwrap().0;
        sockopt::set_socket_linger(&accepted, Some(Duration::ZERO)).unwrap();
        drop(accepted);
        os::wait(&mut [PollFd::new(&socket, PollFlags::IN)], None).unwrap();
        let error = connected(socket, address).unwrap_err();
        let said = all_failed(vec![(address, error)]).to_string();
        assert_eq!(said, format!("{address}: Connection reset by peer"));
    }

    #[test]
    fn only_want_of_the_system_in_every_attempt_is_exhaustion() {
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let failed = |errors: [Errno; 2]| {
            let failed = errors.map(|error| (address(1), error.into()));
            matches!(all_failed(failed.into()), DialError::Exhausted(_))
        };
        assert!(failed([Errno::MFILE, Errno::NFILE]));
        assert!(!failed([Errno::MFILE, Errno::CONNREFUSED]));
    }
}
