//! The head of an HTTP answer, a server's or a proxy's, as bytes come or don't.

use std::io::{ErrorKind, Read};

/// The longest head of an answer, with the interim ones before it.
const MAX_HEAD: usize = 32 * 1024;

/// The most headers in an answer.
const MAX_HEADERS: usize = 128;

/// The most interim answers before the one that counts (RFC 9110 §15.2).
const MAX_INTERIM: usize = 16;

/// The head of an answer.
#[derive(Debug)]
pub struct Head {
    /// The status code.
    pub status: u16,
    /// The words beside it.
    pub reason: String,
    headers: Vec<(String, String)>,
}

impl Head {
    /// The values of the headers of that name.
    pub fn values(&self, name: &str) -> impl Iterator<Item = &str> {
        let named = move |(header, value)| (name.eq_ignore_ascii_case(header)).then_some(value);
        let headers = self.headers.iter();
        headers.filter_map(move |(header, value)| named((header, value.as_str())))
    }

    /// The members of all of them, as lists (RFC 9110 §5.6.1).
    pub fn members(&self, name: &str) -> impl Iterator<Item = &str> {
        let members = self.values(name).flat_map(|value| value.split(','));
        members.map(str::trim).filter(|member| !member.is_empty())
    }

    /// Its beginning in `bytes`, and how long it is there; `None` if it is not whole yet.
    fn parse(bytes: &[u8]) -> Result<Option<(Head, usize)>, httparse::Error> {
        let mut slots = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Response::new(&mut slots);
        let httparse::Status::Complete(length) = parsed.parse(bytes)? else {
            return Ok(None);
        };
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        let headers = parsed.headers.iter();
        let head = Head {
            status: parsed.code.unwrap_or_default(),
            reason: parsed.reason.unwrap_or_default().to_owned(),
            headers: headers
                .map(|header| (header.name.to_owned(), text(header.value)))
                .collect(),
        };
        Ok(Some((head, length)))
    }
}

/// Why a server has given no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// The time is over.
    TimedOut,
    /// The connection ended before: the same, for one that comes too early.
    Closed(String),
    /// What it did instead: a sentence that begins with its name.
    Is(String),
}

/// Reads a head that is no interim answer, and leaves in `received` what came behind it.
///
/// # Errors
/// [`NoAnswer`].
pub fn read_head(stream: &mut impl Read, received: &mut Vec<u8>) -> Result<Head, NoAnswer> {
    let is = |what: &str| Err(NoAnswer::Is(what.into()));
    let closed = |how: &str| Err(NoAnswer::Closed(how.into()));
    let (mut interim, mut behind_interim) = (0, 0);
    loop {
        match Head::parse(&received[behind_interim..]) {
            Ok(Some((head, length))) => {
                behind_interim += length;
                if head.status == 101 || head.status >= 200 {
                    received.drain(..behind_interim);
                    return Ok(head);
                }
                interim += 1;
                if interim > MAX_INTERIM {
                    return is("keeps sending interim responses: is it a tunneld?");
                }
                continue;
            }
            Ok(None) if received.len() > MAX_HEAD => {
                return is("answers with a head of more than 32 KiB: is it a tunneld?");
            }
            Ok(None) => {}
            Err(error) => return Err(NoAnswer::Is(no_head(&received[behind_interim..], error))),
        }
        let mut more = [0; 4096];
        match stream.read(&mut more) {
            Ok(count @ 1..) => received.extend_from_slice(&more[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(NoAnswer::TimedOut),
            Ok(_) if received.is_empty() => {
                return closed(
                    "closed the connection without an answer: is it a TLS port (wss://), or no HTTP server at all?",
                );
            }
            Ok(_) => return closed("closed the connection before its answer was complete"),
            Err(error) => {
                return Err(NoAnswer::Closed(format!(
                    "dropped the connection before answering: {error}; is it a TLS port (wss://)?"
                )));
            }
        }
    }
}

/// What a server does that answers with `bytes`.
fn no_head(bytes: &[u8], error: httparse::Error) -> String {
    // An alert or a handshake message (RFC 8446 §5.1).
    if matches!(bytes, [0x15 | 0x16, 0x03, ..]) {
        return "answered with TLS: use wss://".into();
    }
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(100)]);
    let line = text.trim_start().lines().next().unwrap_or_default();
    if line.starts_with("HTTP/1.") {
        return format!("answers with a malformed HTTP head: {error}");
    }
    format!("does not speak HTTP/1.1: it answered {line}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Read in pieces of at most so many bytes.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let limit = buffer.len().min(self.1);
            self.0.read(&mut buffer[..limit])
        }
    }

    /// What is read, and all the bytes behind it.
    fn read(bytes: &[u8], step: usize) -> (Result<Head, NoAnswer>, Vec<u8>) {
        let (mut stream, mut received) = (Pieces(bytes, step), Vec::new());
        let head = read_head(&mut stream, &mut received);
        received.extend(stream.0);
        (head, received)
    }

    /// Without the quotation of an answer that makes no sense, which is of what is there by then.
    fn outcome(read: &Result<Head, NoAnswer>) -> String {
        let text = format!("{read:?}");
        let end = text.find("it answered").unwrap_or(text.len());
        text[..end].to_owned()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn an_answer_is_the_same_however_it_arrives(
            heads in prop::collection::vec(
                "(HTTP/1\\.[01] (100|101|103|200|[0-9]{3}) [A-Za-z ]{0,9}|[ -~]{0,20})\r\n([A-Za-z-]{1,9}: [ -~]{0,9}\r\n|[ -~]{0,9}\r?\n){0,3}\r\n", 0..4),
            behind in prop::collection::vec(any::<u8>(), 0..40), step in 1usize..50,
        ) {
            let bytes = [heads.concat().into_bytes(), behind].concat();
            let (whole, all_behind) = read(&bytes, usize::MAX);
            let (pieces, behind) = read(&bytes, step);
            prop_assert_eq!(outcome(&whole), outcome(&pieces));
            if whole.is_ok() {
                prop_assert_eq!(all_behind, behind);
            }
        }
    }
}
