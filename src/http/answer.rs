//! An HTTP answer: its status, its headers, its body, and its bytes.
//!
//! A connection carries one request, so every answer says `Connection: close`. A 101 is none: `handshake.rs`
//! prints it.

use std::io::Read;

use serde_json::json;
use tiny_http::{HTTPVersion, Header, Response, StatusCode};

/// The most bytes of a refusal's message, which is also in the log.
const MAX_MESSAGE: usize = 1000;

/// A value of the client's for a message: quoted, escaped, and not too long.
pub fn shown(value: &str) -> String {
    let start: String = value.chars().take(80).collect();
    let more = if start.len() < value.len() { "…" } else { "" };
    format!("{start:?}{more}")
}

/// The answer to a request, not yet printed.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    headers: Vec<(&'static str, String)>,
    body: String,
    /// For a refusal, the sentence in its body; it also goes into the log.
    pub message: String,
}

impl Answer {
    /// A refusal. `message` is one sentence that says what to do. It is cut at `MAX_MESSAGE` bytes.
    pub fn refusal(status: u16, message: impl Into<String>) -> Answer {
        let mut message = message.into();
        if message.len() > MAX_MESSAGE {
            message.truncate(message.floor_char_boundary(MAX_MESSAGE));
            message.push('…');
        }
        let body = json!({ "code": status, "message": message }).to_string();
        Answer {
            status,
            headers: Vec::new(),
            body,
            message,
        }
        .with("Content-Type", "application/json; charset=utf-8")
        .with("X-Content-Type-Options", "nosniff")
    }

    /// The 503 for a connection over the limit, or for one that can't be served just now.
    pub fn unavailable(message: impl Into<String>) -> Answer {
        Answer::refusal(503, message).with("Retry-After", "1")
    }

    /// A success that isn't an upgrade.
    pub fn success(status: u16, content_type: Option<&str>, body: String) -> Answer {
        let answer = Answer {
            status,
            headers: Vec::new(),
            body,
            message: String::new(),
        };
        match content_type {
            Some(content_type) => answer.with("Content-Type", content_type),
            None => answer,
        }
    }

    /// The same answer with one more header.
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Answer {
        self.headers.push((name, value.into()));
        self
    }

    /// The bytes to send, printed by tiny_http. A HEAD request gets the headers `to_head` alone.
    pub fn to_bytes(&self, version: &HTTPVersion, to_head: bool) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(512 + self.body.len());
        let printed = self
            .response()
            .raw_print(&mut bytes, version.clone(), &[], to_head, None);
        debug_assert!(printed.is_ok(), "writing to memory can't fail");
        insert_connection_close(&mut bytes, self.status);
        bytes
    }

    fn response(&self) -> Response<impl Read + '_> {
        let server = (
            "Server",
            concat!("tunneld/", env!("CARGO_PKG_VERSION")).to_owned(),
        );
        let headers = std::iter::once(&server).chain(&self.headers);
        let headers =
            headers.filter_map(|(name, value)| Header::from_bytes(*name, value.as_bytes()).ok());
        let headers = headers.collect();
        Response::new(
            StatusCode(self.status),
            headers,
            self.body.as_bytes(),
            Some(self.body.len()),
            None,
        )
        .with_chunked_threshold(usize::MAX)
    }
}

/// tiny_http keeps `Connection` and `Upgrade` to itself, so they go in behind its status line.
/// RFC 9110 §15.5.22: a 426 must say which protocol to upgrade to.
fn insert_connection_close(bytes: &mut Vec<u8>, status: u16) {
    let line_end = bytes
        .windows(2)
        .position(|pair| pair == b"\r\n")
        .map_or(0, |at| at + 2);
    let header: &[u8] = match status {
        426 => b"Connection: close, upgrade\r\nUpgrade: websocket\r\n",
        _ => b"Connection: close\r\n",
    };
    bytes.splice(line_end..line_end, header.iter().copied());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(answer: &Answer, to_head: bool) -> String {
        String::from_utf8(answer.to_bytes(&HTTPVersion(1, 1), to_head)).unwrap()
    }

    #[test]
    fn a_refusal_is_json_with_its_code() {
        let text = text(&Answer::refusal(401, "send \"X-Access-Token\""), false);
        assert!(
            text.starts_with("HTTP/1.1 401 Unauthorized\r\nConnection: close\r\n"),
            "{text}"
        );
        assert!(
            text.contains("\r\nContent-Type: application/json; charset=utf-8\r\n"),
            "{text}"
        );
        assert!(
            text.contains("\r\nX-Content-Type-Options: nosniff\r\n"),
            "{text}"
        );
        assert!(
            text.ends_with("\r\n\r\n{\"code\":401,\"message\":\"send \\\"X-Access-Token\\\"\"}"),
            "{text}"
        );
    }

    #[test]
    fn a_head_request_gets_no_body() {
        let text = text(&Answer::refusal(404, "gone"), true);
        assert!(
            text.ends_with("\r\n\r\n") && text.contains("Content-Length: "),
            "{text}"
        );
    }

    #[test]
    fn a_426_names_the_protocol_to_upgrade_to() {
        let text = text(&Answer::refusal(426, "upgrade"), false);
        assert!(
            text.contains("\r\nConnection: close, upgrade\r\nUpgrade: websocket\r\n"),
            "{text}"
        );
    }
}
