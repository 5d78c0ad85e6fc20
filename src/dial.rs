//! From a host and a port to a connected `TcpStream`: resolve once, then race the addresses, all of it
//! before one deadline.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::policy::Policy;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with, sockopt};

/// RFC 8305 §5: how long one attempt runs alone before the next one starts beside it.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// The most addresses of a name that are tried, as each attempt holds a descriptor.
const MAX_ADDRESSES: usize = 6;

/// The most names being resolved at once. A resolver can hang for longer than the dial it was for.
const MAX_RESOLVING: usize = 64;

/// getaddrinfo keeps large buffers on its stack.
const RESOLVER_STACK: usize = 256 * 1024;

/// What a tunnel leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The host as parsed.
    pub host: Host,
    /// 1 to 65535.
    pub port: u16,
}

/// A host, as the `host` parameter names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// `localhost`, which is 127.0.0.1 and ::1 without asking a resolver (RFC 6761 §6.3): an image may have
    /// neither `/etc/hosts` nor a name server, and dev servers often listen on ::1 alone.
    Localhost,
    /// An address, which needs no resolver either.
    Address(IpAddr),
    /// A name, in ASCII and lower case.
    Name(String),
}

impl Host {
    /// Parses a name or an address, IPv6 with or without brackets. Empty is localhost.
    pub fn parse(text: &str) -> Option<Host> {
        if text.is_empty() {
            return Some(Host::Localhost);
        }
        if let Some(bracketed) = text.strip_prefix('[') {
            let address = bracketed.strip_suffix(']')?.parse::<Ipv6Addr>().ok()?;
            return Some(Host::Address(address.into()));
        }
        if let Ok(address) = text.parse() {
            return Some(Host::Address(address));
        }
        // url would undo a second layer of percent-encoding.
        if text.contains('%') {
            return None;
        }
        match url::Host::parse(text).ok()? {
            url::Host::Ipv4(address) => Some(Host::Address(address.into())),
            url::Host::Ipv6(address) => Some(Host::Address(address.into())),
            url::Host::Domain(name) => Host::from_name(name),
        }
    }

    fn from_name(name: String) -> Option<Host> {
        let bare = name.strip_suffix('.').unwrap_or(&name);
        if bare == "localhost" || bare.ends_with(".localhost") {
            return Some(Host::Localhost);
        }
        // RFC 1035 §2.3.4; underscores occur in the names of container networks.
        let is_label = |label: &str| {
            let in_set = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            (1..=63).contains(&label.len()) && label.bytes().all(in_set)
        };
        (bare.len() <= 253 && bare.split('.').all(is_label)).then_some(Host::Name(name))
    }
}

/// Parses a port as a decimal number from 1 to 65535. `str::parse` would take a plus sign.
pub fn parse_port(text: &str) -> Option<u16> {
    let is_decimal = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|&port| is_decimal && port != 0)
}

/// Why a target can't be reached.
#[derive(Debug)]
pub enum DialError {
    /// The policy permits none of these addresses of a name, or not the target itself. Nothing was dialed.
    Forbidden(Vec<SocketAddr>),
    /// The name has no address, or there is no resolver.
    Resolve(String),
    /// Too many names are being resolved.
    ResolverBusy,
    /// The dial timeout is over, and what was being done then.
    TimedOut(&'static str),
    /// Every address failed; the reason of each.
    Connect(Vec<(SocketAddr, io::Error)>),
}

/// Connects to one of the addresses of `target` that `policy` permits, before `deadline`, with `TCP_NODELAY`
/// set.
///
/// # Errors
/// [`DialError`].
pub fn dial(target: &Target, policy: &Policy, deadline: Instant) -> Result<TcpStream, DialError> {
    if policy.rules_out(target) {
        return Err(DialError::Forbidden(Vec::new()));
    }
    let resolved = resolve(target, deadline)?;
    let permitted = policy.permitted(target, &resolved);
    if permitted.is_empty() {
        let is_name = matches!(target.host, Host::Name(_));
        return Err(DialError::Forbidden(if is_name {
            resolved
        } else {
            Vec::new()
        }));
    }
    let stream = race(&interleave(permitted), deadline)?;
    // Neither failure breaks the tunnel; the stream then is a little slower, or notices a dead host later.
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(&stream, true);
    let _ = sockopt::set_tcp_keepidle(&stream, Duration::from_secs(60));
    let _ = sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(15));
    Ok(stream)
}

fn resolve(target: &Target, deadline: Instant) -> Result<Vec<SocketAddr>, DialError> {
    let at = |address: IpAddr| SocketAddr::new(address, target.port);
    match &target.host {
        Host::Localhost => Ok(vec![
            at(Ipv4Addr::LOCALHOST.into()),
            at(Ipv6Addr::LOCALHOST.into()),
        ]),
        Host::Address(address) => Ok(vec![at(*address)]),
        Host::Name(name) => resolve_name(name.clone(), target.port, deadline),
    }
}

/// getaddrinfo has no timeout, so it runs on a thread that may outlive the dial.
fn resolve_name(name: String, port: u16, deadline: Instant) -> Result<Vec<SocketAddr>, DialError> {
    let permit = ResolverPermit::take().ok_or(DialError::ResolverBusy)?;
    let (sender, receiver) = sync_channel(1);
    let resolver = thread::Builder::new()
        .name("resolve".into())
        .stack_size(RESOLVER_STACK);
    let started = resolver.spawn(move || {
        let _permit = permit;
        let found = (name.as_str(), port)
            .to_socket_addrs()
            .map(Iterator::collect::<Vec<_>>);
        let _ = sender.send(found);
    });
    started.map_err(|error| DialError::Resolve(format!("no thread to resolve it on: {error}")))?;
    match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(Ok(addresses)) if addresses.is_empty() => {
            Err(DialError::Resolve("the name has no address".into()))
        }
        Ok(Ok(addresses)) => Ok(addresses),
        Ok(Err(error)) => Err(DialError::Resolve(error.to_string())),
        Err(RecvTimeoutError::Timeout) => Err(DialError::TimedOut("resolving the name")),
        Err(RecvTimeoutError::Disconnected) => {
            Err(DialError::Resolve("the resolver failed".into()))
        }
    }
}

struct ResolverPermit;

static RESOLVING: AtomicUsize = AtomicUsize::new(0);

impl ResolverPermit {
    fn take() -> Option<ResolverPermit> {
        let one_more = |count| (count < MAX_RESOLVING).then_some(count + 1);
        RESOLVING
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more)
            .ok()
            .map(|_| ResolverPermit)
    }
}

impl Drop for ResolverPermit {
    fn drop(&mut self) {
        RESOLVING.fetch_sub(1, Ordering::SeqCst);
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
fn race(addresses: &[SocketAddr], deadline: Instant) -> Result<TcpStream, DialError> {
    let mut waiting = addresses.iter();
    let mut running: Vec<(SocketAddr, OwnedFd)> = Vec::new();
    let mut failed = Vec::new();
    let mut next_start = Instant::now();
    loop {
        let now = Instant::now();
        if now >= deadline {
            return Err(DialError::TimedOut("connecting"));
        }
        if running.is_empty() || now >= next_start {
            match waiting.next() {
                Some(&address) => {
                    log::debug!("attempt: address={address}");
                    match begin(address) {
                        Ok(socket) => running.push((address, socket)),
                        Err(error) => failed.push((address, error.into())),
                    }
                    next_start = now + ATTEMPT_DELAY;
                    continue;
                }
                None if running.is_empty() => return Err(DialError::Connect(failed)),
                None => next_start = deadline,
            }
        }
        wait_for_any(
            &running,
            next_start.min(deadline).saturating_duration_since(now),
        );
        if let Some(winner) = take_finished(&mut running, &mut failed) {
            return Ok(winner);
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
    match connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

fn wait_for_any(running: &[(SocketAddr, OwnedFd)], limit: Duration) {
    let mut fds: Vec<PollFd<'_>> = running
        .iter()
        .map(|(_, socket)| PollFd::new(socket, PollFlags::OUT))
        .collect();
    // An error here is EINTR or want of memory; the caller looks at the sockets and the clock again.
    let _ = poll(&mut fds, Timespec::try_from(limit).ok().as_ref());
}

/// Moves failed attempts to `failed` and returns the first connected one, made blocking.
fn take_finished(
    running: &mut Vec<(SocketAddr, OwnedFd)>,
    failed: &mut Vec<(SocketAddr, io::Error)>,
) -> Option<TcpStream> {
    for (address, socket) in std::mem::take(running) {
        match connected(socket) {
            Ok(Ok(stream)) => return Some(stream),
            Ok(Err(socket)) => running.push((address, socket)),
            Err(error) => failed.push((address, error)),
        }
    }
    None
}

/// The connected stream, or the socket again if its attempt still runs.
fn connected(socket: OwnedFd) -> io::Result<Result<TcpStream, OwnedFd>> {
    let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
    if poll(&mut fds, Some(&Timespec::default()))? == 0 {
        return Ok(Err(socket));
    }
    sockopt::socket_error(&socket)??;
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(Ok(stream))
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Localhost => write!(f, "localhost:{}", self.port),
            Host::Address(address) => write!(f, "{}", SocketAddr::new(*address, self.port)),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
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
            DialError::Resolve(reason) => write!(f, "its name does not resolve: {reason}"),
            DialError::ResolverBusy => write!(
                f,
                "{MAX_RESOLVING} other names are being resolved, try again"
            ),
            DialError::TimedOut(doing) => write!(f, "the dial timeout was over while {doing}"),
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

impl std::error::Error for DialError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Option<String> {
        Host::parse(text).map(|host| Target { host, port: 5 }.to_string())
    }

    #[test]
    fn localhost_in_every_spelling_needs_no_resolver() {
        for text in [
            "",
            "localhost",
            "LOCALHOST",
            "localhost.",
            "LocalHost.",
            "db.localhost",
        ] {
            assert_eq!(Host::parse(text), Some(Host::Localhost), "{text:?}");
        }
    }

    #[test]
    fn hosts_are_names_and_addresses() {
        for (text, target) in [
            ("127.0.0.1", "127.0.0.1:5"),
            ("::1", "[::1]:5"),
            ("[::1]", "[::1]:5"),
            ("::ffff:10.0.0.1", "[::ffff:10.0.0.1]:5"),
            ("DB.internal", "db.internal:5"),
            ("my_service", "my_service:5"),
            ("b\u{fc}cher.example", "xn--bcher-kva.example:5"),
            ("example.com.", "example.com.:5"),
        ] {
            assert_eq!(shown(text).as_deref(), Some(target), "{text}");
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        let long_label = "a".repeat(64);
        let long_name = "a.".repeat(127) + "aa";
        for text in [
            "a b",
            "a/b",
            "a:80",
            "[::1",
            "::1]",
            "[127.0.0.1]",
            "[::1]:80",
            "a..b",
            ".",
            "a@b",
            "a%62",
            "fe80::1%eth0",
            "256.1.1.1",
            "a\0b",
            &long_label,
            &long_name,
        ] {
            let parsed = Host::parse(text);
            assert!(parsed.is_none(), "{text:?} {parsed:?}");
        }
    }

    #[test]
    fn ports_are_decimal_numbers_from_1_to_65535() {
        for (text, port) in [("1", 1), ("65535", 65535), ("080", 80)] {
            assert_eq!(parse_port(text), Some(port));
        }
        for text in [
            "",
            "0",
            "65536",
            "-1",
            "+80",
            " 80",
            "80 ",
            "8e1",
            "0x50",
            "80\0",
            "٨٠",
            "99999999999999999999",
        ] {
            assert_eq!(parse_port(text), None, "{text:?}");
        }
    }

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
        let stream = race(&[dead, alive], start + Duration::from_secs(20)).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), alive);
        assert!(start.elapsed() >= ATTEMPT_DELAY);
    }
}
