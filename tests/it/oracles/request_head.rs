//! A request head, against httparse, the grammar of RFC 9112, and tiny_http behind the gate.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use tunneld::exposed::{
    Backend, HeadError, RequestHead, Routed, Rules, Scanner, parse, read_head, route,
};

/// An open daemon's.
pub const OPEN: Rules = Rules {
    access: None,
    allow_origin: Vec::new(),
    allow_host: Vec::new(),
};

/// What is found in `bytes` when they come in reads of these sizes: where the head ends, or that it can't.
pub fn scanned(bytes: &[u8], sizes: &[usize]) -> Option<Option<usize>> {
    let mut scanner = Scanner::default();
    let mut seen = 0;
    for size in sizes.iter().copied().chain([bytes.len()]) {
        seen = (seen + size).min(bytes.len());
        match scanner.find_end(&bytes[..seen]) {
            Ok(None) => {}
            Ok(end) => return Some(end),
            Err(_) => return None,
        }
    }
    Some(None)
}

/// The head that `bytes` begin with, if it is accepted, and where it ends.
pub fn accepted(bytes: &[u8]) -> Option<(RequestHead, usize)> {
    let end = scanned(bytes, &[])??;
    Some((parse(&bytes[..end]).ok()?, end))
}

fn printed(head: &RequestHead) -> Vec<u8> {
    head.with_first_header("X-Tunneld-Request-Id", 1)
}

/// The end of a head does not depend on the reads.
pub fn ends_where_it_ends(bytes: &[u8], sizes: &[usize]) {
    assert_eq!(scanned(bytes, sizes), scanned(bytes, &[]));
}

/// What goes on to tiny_http would be accepted again, and frames no body.
pub fn is_canonical(bytes: &[u8]) {
    let Some((head, _)) = accepted(bytes) else {
        return;
    };
    let once = printed(&head);
    let text = String::from_utf8(once.clone()).unwrap();
    assert!(
        text.is_ascii()
            && text.ends_with("\r\n\r\n")
            && !text[..text.len() - 2].contains("\r\n\r\n")
    );
    assert_eq!(text.lines().nth(1), Some("X-Tunneld-Request-Id: 1"));
    let lower = text.to_lowercase();
    for framing in [
        "\r\ncontent-length:",
        "\r\ntransfer-encoding:",
        "\r\nexpect:",
    ] {
        assert!(!lower.contains(framing), "{text}");
    }
    let again: Vec<u8> = once
        .iter()
        .map(|&byte| if byte == 0x7f { 0xfc } else { byte })
        .collect();
    assert_eq!(scanned(&again, &[]), Some(Some(again.len())));
    // It is of HTTP/1.1, which needs a Host.
    assert!(head.minor_version == 0 || parse(&again).is_ok(), "{text}");
}

/// tiny_http takes every head that the gate lets through, with the target that the client has sent, and each request
/// gets an answer.
pub fn is_taken_by_tiny_http(bytes: &[u8]) {
    static BACKEND: LazyLock<Backend> = LazyLock::new(|| Backend::start().unwrap());
    let Some((head, _)) = accepted(bytes) else {
        return;
    };
    let request = BACKEND.parse(1, &head);
    assert!(
        request.is_ok(),
        "{request:?} of {:?}",
        String::from_utf8_lossy(bytes)
    );
    let request = request.unwrap();
    let target = request.target.as_bytes();
    assert_eq!(bytes.split(|&byte| byte == b' ').nth(1), Some(target));
    if let Routed::Answer(answer) = route(&request, &OPEN) {
        assert!([200, 204, 400, 403, 404, 405, 426].contains(&answer.status));
    }
}

/// A head is accepted if and only if it is one by the letter, its meaning is the same, and httparse finds it too.
pub fn is_one_by_the_letter(bytes: &[u8]) {
    let accepted = accepted(bytes);
    let letter = by_the_letter(bytes);
    assert_eq!(
        accepted.is_some(),
        letter.is_some(),
        "{:?}",
        String::from_utf8_lossy(bytes)
    );
    let (Some((head, end)), Some(letter)) = (accepted, letter) else {
        return;
    };
    let flags = (
        end,
        head.minor_version,
        head.has_body,
        head.expects_continue,
    );
    assert_eq!(
        flags,
        (
            letter.end,
            letter.minor,
            letter.has_body,
            letter.expects_continue
        )
    );
    assert_eq!(String::from_utf8(printed(&head)).unwrap(), letter.printed);
    assert_eq!(head.connection, letter.connection);

    let mut slots = [httparse::EMPTY_HEADER; 100];
    let found = httparse::Request::new(&mut slots).parse(bytes);
    assert_eq!(found, Ok(httparse::Status::Complete(end)));
}

/// From a connection comes the same head, with all that follows it, or a head that is too large is told.
pub fn is_read_from_a_connection(bytes: &[u8]) {
    let (mut client, daemon) = UnixStream::pair().unwrap();
    client.write_all(bytes).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut daemon = TcpStream::from(OwnedFd::from(daemon));
    let deadline = Instant::now() + Duration::from_secs(60);
    let bounded = &bytes[..bytes.len().min(MAX_HEAD)];
    match read_head(&daemon, deadline) {
        Ok((head, mut rest)) => {
            let (expected, end) = accepted(bounded).unwrap();
            assert_eq!(printed(&head), printed(&expected));
            std::io::Read::read_to_end(&mut daemon, &mut rest).unwrap();
            assert_eq!(rest, bytes[end..]);
        }
        Err(HeadError::Gone) => assert!(bytes.is_empty()),
        Err(HeadError::TimedOut) => panic!("nothing was late"),
        Err(HeadError::Malformed(_) | HeadError::TooLarge) => assert!(accepted(bounded).is_none()),
    }
}

const MAX_HEAD: usize = 16 * 1024;

/// What a head says.
#[derive(Default)]
struct Letter {
    end: usize,
    minor: u8,
    has_body: bool,
    expects_continue: bool,
    connection: Vec<String>,
    printed: String,
}

/// The head that `bytes` begin with, by the grammar of RFC 9112 and the rules for what may be there once.
fn by_the_letter(bytes: &[u8]) -> Option<Letter> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let text: String = bytes[..end - 4]
        .iter()
        .map(|&byte| char::from(byte))
        .collect();
    let mut lines = text.split("\r\n");
    let &[method, target, version] = &lines.next()?.split(' ').collect::<Vec<_>>()[..] else {
        return None;
    };
    let is_sound =
        is_token(method) && !target.is_empty() && target.chars().all(|c| c.is_ascii_graphic());
    let minor = match version {
        "HTTP/1.0" => 0,
        "HTTP/1.1" => 1,
        _ => return None,
    };
    let headers: Vec<_> = lines.map(header).collect::<Option<_>>()?;
    if !is_sound || headers.len() > 100 {
        return None;
    }
    let printed = format!("{method} {target} HTTP/1.1\r\nX-Tunneld-Request-Id: 1\r\n");
    let mut letter = Letter {
        end,
        minor,
        printed,
        ..Letter::default()
    };
    letter.read(&headers)?;
    letter.printed += "\r\n";
    Some(letter)
}

impl Letter {
    fn read(&mut self, headers: &[(&str, String)]) -> Option<()> {
        let (mut lengths, mut hosts, mut is_encoded) = (Vec::new(), 0, false);
        for (name, value) in headers {
            match name.to_ascii_lowercase().as_str() {
                "content-length" => lengths.push(length(value)?),
                "transfer-encoding" => is_encoded = true,
                "connection" => self.connection.push(value.clone()),
                "expect" => self.expects_continue |= self.minor == 1 && has_continue(value),
                "te" | "trailer" => {}
                other => {
                    hosts += usize::from(other == "host");
                    if other == "host" && !value.chars().all(is_of_host) {
                        return None;
                    }
                    self.printed += &format!("{name}: {value}\r\n");
                }
            }
        }
        lengths.dedup();
        self.has_body = is_encoded || lengths.iter().any(|&length| length > 0);
        let is_framed_once = lengths.len() + usize::from(is_encoded) <= 1;
        let has_host = hosts == 1 || (hosts == 0 && self.minor == 0);
        (is_framed_once && has_host).then_some(())
    }
}

/// `field-name ":" OWS field-value OWS` (RFC 9112 §5), with DEL for each byte that is not ASCII.
fn header(line: &str) -> Option<(&str, String)> {
    let (name, value) = line.split_once(':')?;
    let value = value.trim_matches([' ', '\t']);
    let is_of_value = |c: char| c == '\t' || c == ' ' || c.is_ascii_graphic() || c >= '\u{80}';
    let to_ascii = |c: char| if c.is_ascii() { c } else { '\x7f' };
    (is_token(name) && value.chars().all(is_of_value))
        .then(|| (name, value.chars().map(to_ascii).collect()))
}

/// RFC 9110 §5.6.2.
fn is_token(text: &str) -> bool {
    let is_of_it = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    !text.is_empty() && text.chars().all(is_of_it)
}

/// RFC 3986 §3.2.2, with a port.
fn is_of_host(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-._~%!$&'()*+,;=:[]".contains(c)
}

fn length(value: &str) -> Option<u64> {
    value
        .chars()
        .all(|c| c.is_ascii_digit())
        .then(|| value.parse().ok())?
}

fn has_continue(value: &str) -> bool {
    value
        .to_ascii_lowercase()
        .split(',')
        .any(|item| item.trim() == "100-continue")
}
