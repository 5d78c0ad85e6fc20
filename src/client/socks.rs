//! SOCKS5 (RFC 1928) as far as a tunnel needs it: CONNECT to a name or an address. Local clients speak it to `-D`, and
//! the client speaks it to a proxy on the way out.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use super::deadline::Until;
use super::failure::{Failure, Kind, Reason};
use super::forward::Destination;
use crate::target::{Host, Target};

const VERSION: u8 = 5;
/// RFC 1929 §2.
const VERSION_OF_PASSWORDS: u8 = 1;
const NO_AUTHENTICATION: u8 = 0;
const USER_AND_PASSWORD: u8 = 2;
const NO_METHOD: u8 = 0xff;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

/// How long a local client may take for its greeting and its request.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a refused one may take to read why.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// How much of what a refused one sends is read, so that a reset does not overtake the reply.
const MAX_DRAINED: u64 = 64 * 1024;

/// The reply codes (RFC 1928 §6) that are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Reply {
    Succeeded = 0,
    Failed = 1,
    NotAllowed = 2,
    NetworkUnreachable = 3,
    HostUnreachable = 4,
    ConnectionRefused = 5,
    TimedOut = 6,
    CommandNotSupported = 7,
    AddressNotSupported = 8,
}

/// A local client that waits for the answer to its request.
#[derive(Debug)]
pub struct Asked {
    client: TcpStream,
    to: Destination,
}

/// Why there is no request. The client has had what reply there is for it.
#[derive(Debug)]
pub enum NoRequest {
    /// It left without a byte, as one does that only looks whether somebody listens.
    Gone,
    /// It does not speak SOCKS5, or asks for what there isn't: the end of a sentence.
    Wrong(String),
}

/// Reads the greeting and the request of a local client, and no byte more.
///
/// # Errors
/// [`NoRequest`].
pub fn read_request(client: TcpStream) -> Result<Asked, NoRequest> {
    let mut stream = Until::new(&client, Instant::now() + GREETING_TIMEOUT);
    let wrong = match request(&mut stream) {
        Ok(to) => return Ok(Asked { client, to }),
        Err(wrong) => wrong,
    };
    match wrong {
        Wrong::Gone => return Err(NoRequest::Gone),
        Wrong::Silent => {}
        Wrong::Answered(answer, _) => refuse(&client, answer),
        Wrong::Refused(code, _) => refuse(&client, &reply(code)),
    }
    Err(NoRequest::Wrong(wrong.words()))
}

impl Asked {
    /// What it asks for.
    pub fn to(&self) -> &Destination {
        &self.to
    }

    /// Its connection.
    pub fn client(&self) -> &TcpStream {
        &self.client
    }

    /// Tells the client that it is connected. What it sends from now on is for the target.
    ///
    /// # Errors
    /// When it is gone.
    pub fn grant(self) -> io::Result<TcpStream> {
        let deadline = Instant::now() + GREETING_TIMEOUT;
        Until::new(&self.client, deadline).write_all(&reply(Reply::Succeeded))?;
        self.client.set_read_timeout(None)?;
        self.client.set_write_timeout(None)?;
        Ok(self.client)
    }

    /// Tells the client why it is not, and closes its connection.
    pub fn refuse(self, why: &Failure) {
        refuse(&self.client, &reply(Reply::of(why)));
    }
}

/// What is wrong with a request.
enum Wrong {
    Gone,
    /// There is nobody to answer in a language that both know.
    Silent,
    /// Answered with these bytes, and why.
    Answered(&'static [u8], &'static str),
    /// Refused, and why.
    Refused(Reply, String),
}

impl Wrong {
    fn words(self) -> String {
        match self {
            Wrong::Gone | Wrong::Silent => {
                format!("no complete SOCKS5 request within {GREETING_TIMEOUT:?}, or none at all")
            }
            Wrong::Answered(_, why) => why.into(),
            Wrong::Refused(_, why) => why,
        }
    }
}

impl From<io::Error> for Wrong {
    fn from(_: io::Error) -> Wrong {
        Wrong::Silent
    }
}

fn request(stream: &mut (impl Read + Write)) -> Result<Destination, Wrong> {
    match take(stream) {
        Ok([VERSION]) => {}
        Ok([version]) => return Err(other_protocol(version)),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Err(Wrong::Gone),
        Err(error) => return Err(error.into()),
    }
    let [count] = take(stream)?;
    let methods = take_some(stream, count)?;
    if !methods.contains(&NO_AUTHENTICATION) {
        return Err(Wrong::Answered(
            &[VERSION, NO_METHOD],
            "it insists on a user and a password, which this SOCKS5 port does not ask for: set none in it",
        ));
    }
    stream.write_all(&[VERSION, NO_AUTHENTICATION])?;
    let [_, command, _, kind] = take(stream)?;
    let host = match kind {
        IPV4 => IpAddr::from(Ipv4Addr::from(take::<4>(stream)?)).to_string(),
        IPV6 => IpAddr::from(Ipv6Addr::from(take::<16>(stream)?)).to_string(),
        NAME => {
            let [length] = take(stream)?;
            String::from_utf8_lossy(&take_some(stream, length)?).into_owned()
        }
        _ => {
            let why = format!("it asks for an address of kind {kind}, which SOCKS5 does not have");
            return Err(Wrong::Refused(Reply::AddressNotSupported, why));
        }
    };
    let port = u16::from_be_bytes(take(stream)?);
    check(command, host, port)
}

fn check(command: u8, host: String, port: u16) -> Result<Destination, Wrong> {
    if command != CONNECT {
        let why =
            format!("it asks for command {command}: only CONNECT is served, no BIND and no UDP");
        return Err(Wrong::Refused(Reply::CommandNotSupported, why));
    }
    if host.is_empty() || Host::parse(&host).is_none() {
        let why = format!("it asks for {host:?}, which is not a valid host");
        return Err(Wrong::Refused(Reply::HostUnreachable, why));
    }
    if port == 0 {
        let why = "it asks for port 0, which nobody can connect to".to_owned();
        return Err(Wrong::Refused(Reply::Failed, why));
    }
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok(Destination {
        host: Some(host.to_owned()),
        port: Some(port),
    })
}

fn other_protocol(first: u8) -> Wrong {
    /// "Request rejected or failed" in SOCKS4.
    const OF_SOCKS4: [u8; 8] = [0, 91, 0, 0, 0, 0, 0, 0];
    const OF_HTTP: &[u8] = b"HTTP/1.1 501 Not Implemented\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\nThis is a SOCKS5 proxy, not an HTTP one: write socks5h:// in place of http://.\n";
    match first {
        4 => Wrong::Answered(&OF_SOCKS4, "it speaks SOCKS4: set it to SOCKS5"),
        b'A'..=b'Z' => Wrong::Answered(
            OF_HTTP,
            "it speaks HTTP: this is a SOCKS5 port, write socks5h:// in place of http://",
        ),
        _ => Wrong::Answered(&[], "it does not speak SOCKS5"),
    }
}

/// Nothing is said of the address that the daemon connects from.
fn reply(code: Reply) -> [u8; 10] {
    [VERSION, code as u8, 0, IPV4, 0, 0, 0, 0, 0, 0]
}

impl Reply {
    fn of(why: &Failure) -> Reply {
        let Kind::Answered(status, reason) = why.kind else {
            return Reply::Failed;
        };
        match (status, reason) {
            (403, _) => Reply::NotAllowed,
            (502, Some(Reason::DoesNotResolve)) => Reply::HostUnreachable,
            (502, Some(Reason::ConnectionRefused)) => Reply::ConnectionRefused,
            (502, Some(Reason::NetworkUnreachable)) => Reply::NetworkUnreachable,
            (502, Some(Reason::NoRoute)) => Reply::HostUnreachable,
            (502, Some(Reason::TimedOutConnecting)) => Reply::TimedOut,
            (502 | 503, Some(Reason::TimedOutBefore)) => Reply::HostUnreachable,
            _ => Reply::Failed,
        }
    }
}

fn take<const COUNT: usize>(stream: &mut impl Read) -> io::Result<[u8; COUNT]> {
    let mut bytes = [0; COUNT];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn take_some(stream: &mut impl Read, count: u8) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; count.into()];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Why a proxy has made no connection.
#[derive(Debug)]
pub enum NotConnected {
    /// What it does or wants instead: the end of a sentence about it.
    Is(&'static str),
    /// It can't reach the target.
    NotThere(&'static str),
    /// It refused to, for a reason that lasts.
    Code(String),
    /// Its connection failed.
    Io(io::Error),
}

impl From<io::Error> for NotConnected {
    fn from(error: io::Error) -> NotConnected {
        NotConnected::Io(error)
    }
}

/// Who asks a proxy, up to 255 bytes each.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user.
    pub user: Vec<u8>,
    /// The password.
    pub password: Vec<u8>,
}

/// Asks the proxy at the other end of `stream` for a connection to `to`, whose name it looks up itself.
///
/// # Errors
/// [`NotConnected`].
pub fn connect(
    stream: &mut (impl Read + Write),
    to: &Target,
    credentials: Option<&Credentials>,
) -> Result<(), NotConnected> {
    match credentials {
        None => stream.write_all(&[VERSION, 1, NO_AUTHENTICATION])?,
        Some(_) => stream.write_all(&[VERSION, 2, NO_AUTHENTICATION, USER_AND_PASSWORD])?,
    }
    let [version, method] = take(stream)?;
    if version != VERSION {
        return Err(NotConnected::Is(
            "does not speak SOCKS5: is it an HTTP proxy? Write http://",
        ));
    }
    match (method, credentials) {
        (NO_AUTHENTICATION, _) => {}
        (USER_AND_PASSWORD, Some(credentials)) => authenticate(stream, credentials)?,
        (_, None) => {
            return Err(NotConnected::Is(
                "wants a user and a password: put them into its URL",
            ));
        }
        _ => {
            return Err(NotConnected::Is(
                "wants another way to authenticate than a user and a password",
            ));
        }
    }
    stream.write_all(&connect_request(to))?;
    let [version, code, _, kind] = take(stream)?;
    if version != VERSION {
        return Err(NO_SOCKS5);
    }
    if code != Reply::Succeeded as u8 {
        return Err(refused_with(code));
    }
    // The address that it connects from, which doesn't matter.
    let length = match kind {
        IPV4 => 4,
        IPV6 => 16,
        NAME => take::<1>(stream)?[0],
        _ => return Err(NotConnected::Is("answers with a reply that breaks SOCKS5")),
    };
    take_some(stream, length)?;
    take::<2>(stream)?;
    Ok(())
}

/// It began as one.
const NO_SOCKS5: NotConnected =
    NotConnected::Is("is no SOCKS5 proxy: its answer is of another protocol or version");

/// RFC 1929.
fn authenticate(
    stream: &mut (impl Read + Write),
    credentials: &Credentials,
) -> Result<(), NotConnected> {
    let mut bytes = vec![VERSION_OF_PASSWORDS];
    for part in [&credentials.user, &credentials.password] {
        bytes.push(u8::try_from(part.len()).unwrap_or(u8::MAX));
        bytes.extend(part);
    }
    stream.write_all(&bytes)?;
    match take(stream)? {
        [VERSION_OF_PASSWORDS, 0] => Ok(()),
        [VERSION_OF_PASSWORDS, _] => Err(NotConnected::Is(
            "refused the user and the password of its URL: check them",
        )),
        _ => Err(NO_SOCKS5),
    }
}

fn connect_request(to: &Target) -> Vec<u8> {
    let mut bytes = vec![VERSION, CONNECT, 0];
    let name = match &to.host {
        Host::Address(IpAddr::V4(address)) => {
            bytes.push(IPV4);
            bytes.extend(address.octets());
            None
        }
        Host::Address(IpAddr::V6(address)) => {
            bytes.push(IPV6);
            bytes.extend(address.octets());
            None
        }
        Host::Name(name) => Some(name.as_str()),
        Host::Localhost => Some("localhost"),
    };
    if let Some(name) = name {
        // A host's name has at most 254.
        bytes.extend([NAME, u8::try_from(name.len()).unwrap_or(u8::MAX)]);
        bytes.extend(name.as_bytes());
    }
    bytes.extend(to.port.to_be_bytes());
    bytes
}

/// RFC 1928 §6.
fn refused_with(code: u8) -> NotConnected {
    match code {
        1 => NotConnected::NotThere("it failed to, without saying why"),
        3 => NotConnected::NotThere("network unreachable"),
        4 => NotConnected::NotThere("host unreachable, or its name not found"),
        5 => NotConnected::NotThere("connection refused"),
        6 => NotConnected::NotThere("timed out"),
        2 => NotConnected::Code("not allowed by its rules".into()),
        code => NotConnected::Code(format!("code {code}")),
    }
}

/// Closes the connection behind `answer`, so that it arrives: what was sent meanwhile must not reset it.
fn refuse(client: &TcpStream, answer: &[u8]) {
    let _ = sockopt::set_socket_linger(client, None);
    let mut stream = Until::new(client, Instant::now() + REFUSAL_TIMEOUT);
    let _ = stream.write_all(answer);
    let _ = client.shutdown(Shutdown::Write);
    let _ = io::copy(&mut stream.take(MAX_DRAINED), &mut io::sink());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    /// A client that has sent everything at once.
    struct Sent {
        bytes: Cursor<Vec<u8>>,
        answered: Vec<u8>,
    }

    impl Read for Sent {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.bytes.read(buffer)
        }
    }

    impl Write for Sent {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.answered.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn asked(bytes: &[u8]) -> (Result<Destination, Wrong>, Vec<u8>, u64) {
        let mut sent = Sent {
            bytes: Cursor::new(bytes.to_vec()),
            answered: Vec::new(),
        };
        let asked = request(&mut sent);
        (asked, sent.answered, sent.bytes.position())
    }

    #[test]
    fn a_request_is_read_and_no_byte_more() {
        for (request, host, port) in [
            (
                &b"\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50"[..],
                "127.0.0.1",
                80,
            ),
            (
                b"\x05\x02\x02\x00\x05\x01\x00\x03\x0bdb.internal\x15\x38",
                "db.internal",
                5432,
            ),
            (
                b"\x05\x01\x00\x05\x01\x00\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\xff\xff",
                "::1",
                65535,
            ),
            (b"\x05\x01\x00\x05\x01\x00\x03\x05[::1]\x00\x01", "::1", 1),
        ] {
            let (asked, answered, read) = asked(&[request, b"GET / HTTP/1.1"].concat());
            let to = asked.ok().unwrap();
            assert_eq!((to.host.as_deref(), to.port), (Some(host), Some(port)));
            assert_eq!((answered, read), (vec![5, 0], request.len() as u64));
        }
    }

    #[test]
    fn what_is_no_request_for_a_connection_is_refused_with_its_code() {
        for (request, code) in [
            (
                &b"\x05\x01\x00\x05\x02\x00\x01\x7f\x00\x00\x01\x00\x50"[..],
                7,
            ),
            (b"\x05\x01\x00\x05\x03\x00\x01\x7f\x00\x00\x01\x00\x50", 7),
            (b"\x05\x01\x00\x05\x01\x00\x02", 8),
            (b"\x05\x01\x00\x05\x01\x00\x03\x03a b\x00\x50", 4),
            (b"\x05\x01\x00\x05\x01\x00\x03\x00\x00\x50", 4),
            (b"\x05\x01\x00\x05\x01\x00\x03\x01a\x00\x00", 1),
        ] {
            let reply = match asked(request).0 {
                Err(Wrong::Refused(reply, _)) => Some(reply as u8),
                _ => None,
            };
            assert_eq!(reply, Some(code), "{request:?}");
        }
        let answer = |request| match asked(request).0 {
            Err(Wrong::Answered(answer, _)) => answer,
            _ => b"something else",
        };
        assert_eq!(answer(b"\x05\x01\x02"), [5, 0xff]);
        assert_eq!(answer(b"\x04\x01\x00\x50"), [0, 91, 0, 0, 0, 0, 0, 0]);
        assert!(answer(b"CONNECT a:80 HTTP/1.1\r\n").starts_with(b"HTTP/1.1 501 "));
        assert!(answer(b"\x16\x03\x01").is_empty());
        assert!(matches!(asked(b"").0, Err(Wrong::Gone)));
        for cut in [
            &b"\x05"[..],
            b"\x05\x02\x00",
            b"\x05\x01\x00\x05\x01\x00\x03\x05ab",
        ] {
            assert!(matches!(asked(cut).0, Err(Wrong::Silent)), "{cut:?}");
        }
    }

    #[test]
    fn a_proxy_whose_answers_change_their_protocol_is_no_socks5_proxy() {
        let to = Target {
            host: Host::Localhost,
            port: 80,
        };
        let credentials = Credentials {
            user: b"user".into(),
            password: b"s3cret".into(),
        };
        for (answers, is_connected) in [
            (
                &b"\x05\x00\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x50"[..],
                true,
            ),
            (
                b"\x05\x02\x01\x00\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x50",
                true,
            ),
            // SOCKS4 agrees.
            (b"\x05\x00\x00\x5a\x00\x50\x7f\x00\x00\x01", false),
            (
                b"\x05\x02\x05\x00\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x50",
                false,
            ),
        ] {
            let mut proxy = Sent {
                bytes: Cursor::new(answers.to_vec()),
                answered: Vec::new(),
            };
            match connect(&mut proxy, &to, Some(&credentials)) {
                Ok(()) => assert!(is_connected, "{answers:?}"),
                Err(NotConnected::Is(what)) => {
                    assert!(
                        !is_connected && what.starts_with("is no SOCKS5 proxy"),
                        "{what}"
                    );
                }
                Err(other) => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_daemons_answer_becomes_a_code() {
        for (status, sentence, code) in [
            (403, "not permitted", 2),
            (
                502,
                "cannot reach x:1: its name does not resolve: failed to look it up",
                4,
            ),
            (
                502,
                "cannot reach x:1: 127.0.0.1:1: Connection refused, [::1]:1: Network is unreachable",
                5,
            ),
            (
                502,
                "cannot reach x:1: 192.0.2.1:1: Network is unreachable",
                3,
            ),
            (502, "cannot reach x:1: 192.0.2.1:1: No route to host", 4),
            (502, "cannot reach x:1: timed out while connecting", 6),
            (
                502,
                "cannot reach x:1: timed out while resolving its name",
                4,
            ),
            (502, "Bad Gateway", 1),
            (401, "the token is wrong", 1),
            (503, "the connection limit is reached", 1),
        ] {
            let failure = Failure {
                sentence: sentence.into(),
                kind: Kind::Answered(status, Reason::find(sentence)),
            };
            assert_eq!(Reply::of(&failure) as u8, code, "{sentence}");
        }
        assert_eq!(
            Reply::of(&Failure::not_there("Connection refused".into())),
            Reply::Failed
        );
    }
}
