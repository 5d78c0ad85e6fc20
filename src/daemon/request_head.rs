//! A bounded request head: the bytes up to the first blank line, checked and written anew.
//!
//! The gate accepts a head only in the strict form of RFC 9112: CRLF line ends, no folded lines, ASCII but for the
//! values of headers. What goes on to tiny_http is printed from what was parsed here, so the two can't read it
//! differently. A connection carries one request, so the headers that frame a body stay behind: nothing after
//! the head is ever taken for a second request.

use std::io::{self, Read};
use std::net::TcpStream;
use std::time::Instant;

use crate::target::is_host;

/// The longest request head, in bytes.
pub const MAX_HEAD: usize = 16 * 1024;

/// The most headers in it.
pub const MAX_HEADERS: usize = 100;

/// Stands for each byte of a header's value that isn't ASCII (RFC 9110 §5.5, obs-text), which tiny_http would hang
/// up on. No client can send it and no value that decides anything holds it, so such a header is there, and wrong.
const NOT_ASCII: char = '\x7f';

/// A finished, well-formed request head.
#[derive(Debug)]
pub struct RequestHead {
    method: String,
    target: String,
    headers: String,
    /// 0 of HTTP/1.0, 1 of HTTP/1.1.
    pub minor_version: u8,
    /// Whether a body follows: `Transfer-Encoding`, or a `Content-Length` other than 0.
    pub has_body: bool,
    /// Whether the client waits for a 100 before it goes on (RFC 9110 §10.1.1).
    pub expects_continue: bool,
    /// The values of `Connection`. It stays behind as well: it is for the connection it came over (RFC 9110
    /// §7.6.1), and heads go on to tiny_http over another.
    pub connection: Vec<String>,
}

/// Why there is no head.
#[derive(Debug)]
pub enum HeadError {
    /// More than `MAX_HEAD` bytes or `MAX_HEADERS` headers: a 431.
    TooLarge,
    /// Not finished in time: a 408.
    TimedOut,
    /// Not HTTP, and why: a 400.
    Malformed(String),
    /// The client left before it sent anything, or its connection broke: nothing to answer.
    Gone,
}

/// Reads from `client` until the head is finished, and returns it with the bytes that came after it.
///
/// # Errors
/// [`HeadError`]; `deadline` is for the whole head, not for a read.
pub fn read(client: &TcpStream, deadline: Instant) -> Result<(RequestHead, Vec<u8>), HeadError> {
    let mut bytes = Vec::with_capacity(1024);
    let mut scanner = Scanner::default();
    loop {
        if bytes.len() >= MAX_HEAD {
            return Err(HeadError::TooLarge);
        }
        let old = bytes.len();
        bytes.resize((old + 1024).min(MAX_HEAD), 0);
        let read = read_before(client, &mut bytes[old..], deadline);
        bytes.truncate(old + *read.as_ref().unwrap_or(&0));
        match read? {
            0 if old == 0 => return Err(HeadError::Gone),
            0 => return Err(HeadError::Malformed("it ends before its blank line".into())),
            _ => {}
        }
        if let Some(end) = scanner.find_end(&bytes)? {
            let rest = bytes.split_off(end);
            return Ok((parse(&bytes)?, rest));
        }
    }
}

fn read_before(
    mut client: &TcpStream,
    buffer: &mut [u8],
    deadline: Instant,
) -> Result<usize, HeadError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(HeadError::TimedOut);
        }
        client
            .set_read_timeout(Some(left))
            .map_err(|_| HeadError::Gone)?;
        match client.read(buffer) {
            Ok(read) => return Ok(read),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                return Err(HeadError::TimedOut);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(HeadError::Gone),
        }
    }
}

/// Looks for the blank line, each byte once however many reads bring them.
#[derive(Debug, Default)]
pub struct Scanner {
    scanned: usize,
    line_start: usize,
    /// Behind the colon of a header line.
    in_value: bool,
}

impl Scanner {
    /// Where the head in `bytes` ends, if it does yet. `bytes` must begin with those of the last call.
    ///
    /// # Errors
    /// [`HeadError::Malformed`], as soon as a byte shows it.
    pub fn find_end(&mut self, bytes: &[u8]) -> Result<Option<usize>, HeadError> {
        while let Some(&byte) = bytes.get(self.scanned) {
            let after_cr = self.scanned > 0 && bytes[self.scanned - 1] == b'\r';
            match byte {
                b'\n' if after_cr => {
                    let is_blank = self.scanned == self.line_start + 1;
                    self.line_start = self.scanned + 1;
                    self.in_value = false;
                    if is_blank {
                        return Ok(Some(self.line_start));
                    }
                }
                b'\n' => return Err(malformed("a line ends without CR")),
                _ if after_cr => return Err(malformed("a CR without LF")),
                b':' => self.in_value = self.line_start > 0,
                b'\r' | b'\t' | b' '..=b'~' => {}
                0x80.. if self.in_value => {}
                _ => return Err(malformed(&format!("illegal byte 0x{byte:02x}"))),
            }
            self.scanned += 1;
        }
        Ok(None)
    }
}

/// Parses a head that ends in its blank line.
///
/// # Errors
/// [`HeadError::Malformed`] or [`HeadError::TooLarge`].
pub fn parse(bytes: &[u8]) -> Result<RequestHead, HeadError> {
    let mut slots = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut slots);
    match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(end)) if end == bytes.len() => {}
        Ok(_) => return Err(malformed("an empty line before its end")),
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooLarge),
        Err(error) => return Err(malformed(&error.to_string())),
    }
    let (Some(method), Some(target), Some(minor)) = (parsed.method, parsed.path, parsed.version)
    else {
        return Err(malformed("no request line"));
    };
    let mut framing = Framing::default();
    let mut headers = String::with_capacity(bytes.len());
    for header in &*parsed.headers {
        let value = to_ascii(header.value);
        if framing.keeps(header.name, &value)? {
            headers.extend([header.name, ": ", &value, "\r\n"]);
        }
    }
    if minor == 1 && !framing.host {
        return Err(malformed("the Host header is missing"));
    }
    Ok(RequestHead {
        method: method.to_owned(),
        target: target.to_owned(),
        headers,
        minor_version: minor,
        has_body: framing.has_body()?,
        expects_continue: minor == 1 && framing.expects_continue,
        connection: framing.connection,
    })
}

fn to_ascii(value: &[u8]) -> String {
    let to_ascii = |&byte: &u8| match byte {
        0x80.. => NOT_ASCII,
        ascii => char::from(ascii),
    };
    value.iter().map(to_ascii).collect()
}

impl RequestHead {
    /// The head's bytes with one header put in front of all others. They are of HTTP/1.1 whatever the client's were,
    /// as behind HTTP/1.0 tiny_http closes.
    pub fn with_first_header(&self, name: &str, value: u64) -> Vec<u8> {
        let RequestHead {
            method,
            target,
            headers,
            ..
        } = self;
        format!("{method} {target} HTTP/1.1\r\n{name}: {value}\r\n{headers}\r\n").into_bytes()
    }
}

/// The headers that say where a request ends (RFC 9112 §6), the one that must be unique (§3.2), and those of the
/// connection alone.
#[derive(Default)]
struct Framing {
    content_length: Option<u64>,
    transfer_encoding: bool,
    host: bool,
    expects_continue: bool,
    connection: Vec<String>,
}

impl Framing {
    /// Takes note of one header; whether it goes on to tiny_http.
    fn keeps(&mut self, name: &str, value: &str) -> Result<bool, HeadError> {
        match name.to_ascii_lowercase().as_str() {
            "content-length" => self.add_length(value).map(|()| false),
            "transfer-encoding" => {
                self.transfer_encoding = true;
                Ok(false)
            }
            "host" if self.host => Err(malformed("a second Host header")),
            "host" if !is_host(value) => Err(malformed("the Host header is not a host")),
            "host" => {
                self.host = true;
                Ok(true)
            }
            "connection" => {
                self.connection.push(value.to_owned());
                Ok(false)
            }
            "expect" => {
                let is_it = |item: &str| item.trim().eq_ignore_ascii_case("100-continue");
                self.expects_continue |= value.split(',').any(is_it);
                Ok(false)
            }
            "te" | "trailer" => Ok(false),
            _ => Ok(true),
        }
    }

    fn add_length(&mut self, value: &str) -> Result<(), HeadError> {
        let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
        match value.parse() {
            Ok(length) if digits && self.content_length.is_none_or(|known| known == length) => {
                self.content_length = Some(length);
                Ok(())
            }
            _ => Err(malformed("invalid or repeated Content-Length")),
        }
    }

    fn has_body(&self) -> Result<bool, HeadError> {
        match (self.transfer_encoding, self.content_length) {
            (true, Some(_)) => Err(malformed("both Transfer-Encoding and Content-Length")),
            (encoded, length) => Ok(encoded || length.is_some_and(|length| length > 0)),
        }
    }
}

fn malformed(why: &str) -> HeadError {
    HeadError::Malformed(why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end_of(bytes: &[u8]) -> Result<Option<usize>, HeadError> {
        Scanner::default().find_end(bytes)
    }

    fn printed(head: &str) -> String {
        let head = parse(head.as_bytes()).unwrap();
        String::from_utf8(head.with_first_header("X-Id", 7)).unwrap()
    }

    #[test]
    fn the_end_is_found_whatever_the_reads() {
        let head = b"GET / HTTP/1.1\r\nHost: x\r\n\r\nrest\x00\xff";
        let mut scanner = Scanner::default();
        let ends = (0..=head.len() - 6).filter_map(|n| scanner.find_end(&head[..n]).unwrap());
        assert_eq!(ends.last(), Some(head.len() - 6));
        assert_eq!(end_of(head).unwrap(), Some(head.len() - 6));
    }

    #[test]
    fn what_is_no_line_is_malformed_at_once() {
        for bytes in [
            &b"GET / HTTP/1.1\nHost: x\n\n"[..],
            b"GET\r / HTTP/1.1",
            b"\x16\x03\x01",
            b"GET /\xc3\xa4",
            b"GET /:\xc3\xa4",
            b"GET / HTTP/1.1\r\nX\xc3\xa4: y",
            b"GET / HTTP/1.1\r\nX: y\r\n\xc3",
            b"GET / HTTP/1.1\r\nX: \xc3\x7f",
            b"a\0",
        ] {
            assert!(
                matches!(end_of(bytes), Err(HeadError::Malformed(_))),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn the_id_stands_before_a_forged_one() {
        let head = printed("GET /x HTTP/1.1\r\nx-id: 1\r\nHost:  y \r\n\r\n");
        assert_eq!(
            head,
            "GET /x HTTP/1.1\r\nX-Id: 7\r\nx-id: 1\r\nHost: y\r\n\r\n"
        );
    }

    #[test]
    fn body_framing_stays_behind() {
        let head = printed("POST / HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
        assert_eq!(head, "POST / HTTP/1.1\r\nX-Id: 7\r\n\r\n");
        assert!(
            parse(b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n")
                .unwrap()
                .has_body
        );
        assert!(
            !parse(b"GET / HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
                .unwrap()
                .has_body
        );
    }

    #[test]
    fn ambiguous_heads_are_malformed() {
        for head in [
            "\r\n\r\n",
            "GET / HTTP/2.0\r\n\r\n",
            "GET  / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.0\r\n folded: x\r\n\r\n",
            "GET / HTTP/1.0\r\na: b\r\n folded\r\n\r\n",
            "GET / HTTP/1.0\r\nHost : x\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: x\r\nhost: y\r\n\r\n",
            "GET / HTTP/1.0\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "GET / HTTP/1.0\r\nContent-Length: +1\r\n\r\n",
            "GET / HTTP/1.0\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        ] {
            assert!(
                matches!(parse(head.as_bytes()), Err(HeadError::Malformed(_))),
                "{head:?}"
            );
        }
    }

    #[test]
    fn a_host_is_there_once_and_is_one() {
        for headers in ["", "X: y\r\n", "Host: a\r\nHost: a\r\n"] {
            let head = format!("GET / HTTP/1.1\r\n{headers}\r\n");
            assert!(
                matches!(parse(head.as_bytes()), Err(HeadError::Malformed(_))),
                "{head:?}"
            );
        }
        for host in [
            "a b",
            "a/b",
            "http://a",
            "user@a",
            "a?b",
            "a#b",
            "\"a\"",
            "b\u{fc}cher.example",
        ] {
            let head = format!("GET / HTTP/1.0\r\nHost: {host}\r\n\r\n");
            assert!(
                matches!(parse(head.as_bytes()), Err(HeadError::Malformed(_))),
                "{head:?}"
            );
        }
        for host in ["", "localhost:80", "[::1]:80", "my_service.", "10.0.0.1"] {
            let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            assert!(parse(head.as_bytes()).is_ok(), "{head:?}");
        }
        assert!(parse(b"GET / HTTP/1.0\r\n\r\n").is_ok());
    }

    #[test]
    fn a_value_that_is_not_ascii_stays_there_and_is_no_other() {
        let head = parse(b"GET / HTTP/1.0\r\nA: Z\xfcrich\r\nConnection: \xff\r\n\r\n").unwrap();
        assert_eq!(head.connection, ["\x7f"]);
        let printed = String::from_utf8(head.with_first_header("X-Id", 7)).unwrap();
        assert!(printed.ends_with("\r\nA: Z\x7frich\r\n\r\n"), "{printed:?}");
    }

    #[test]
    fn too_many_headers_are_too_large() {
        let head = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "a: b\r\n".repeat(MAX_HEADERS + 1)
        );
        assert!(matches!(parse(head.as_bytes()), Err(HeadError::TooLarge)));
    }
}
