//! An HTTP answer: its status, its headers, its body, and its bytes.
//!
//! A connection carries one request, so every answer says `Connection: close`. A 101 is none: `handshake.rs`
//! prints it.

use std::io::Read;

use serde_json::json;
use tiny_http::{HTTPVersion, Header, Response, StatusCode};

use crate::tunnel::UPGRADE_TOKEN;

/// The most bytes of a refusal's message, which is also in the log.
const MAX_MESSAGE: usize = 1000;

/// An answer is of the moment it was given in, and of no other type than it says.
const OF_EVERY_ANSWER: [(&str, &str); 3] = [
    ("Server", concat!("tunneld/", env!("CARGO_PKG_VERSION"))),
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
];

/// RFC 9209, without an error.
pub const PROXY_STATUS: (&str, &str) = ("Proxy-Status", "tunneld");

/// Why a request was refused, for a client that shows headers but no bodies (RFC 9209 §2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyError {
    /// The request is wrong.
    RequestError,
    /// It is not allowed.
    RequestDenied,
    /// Its target is not allowed.
    TargetProhibited,
    /// Its target's name has no address.
    DnsError,
    /// It wasn't resolved in time.
    DnsTimeout,
    /// Its target refuses connections.
    ConnectionRefused,
    /// It didn't answer in time.
    ConnectionTimeout,
    /// It broke the connection off.
    ConnectionTerminated,
    /// There is no way to it.
    TargetUnroutable,
    /// It can't be reached for another reason.
    TargetUnavailable,
    /// As many connections are open as may be.
    ConnectionLimit,
    /// Something is lacking here.
    Internal,
}

impl ProxyError {
    /// Its name in the registry of RFC 9209 §2.3.
    fn name(self) -> &'static str {
        match self {
            ProxyError::RequestError => "http_request_error",
            ProxyError::RequestDenied => "http_request_denied",
            ProxyError::TargetProhibited => "destination_ip_prohibited",
            ProxyError::DnsError => "dns_error",
            ProxyError::DnsTimeout => "dns_timeout",
            ProxyError::ConnectionRefused => "connection_refused",
            ProxyError::ConnectionTimeout => "connection_timeout",
            ProxyError::ConnectionTerminated => "connection_terminated",
            ProxyError::TargetUnroutable => "destination_ip_unroutable",
            ProxyError::TargetUnavailable => "destination_unavailable",
            ProxyError::ConnectionLimit => "connection_limit_reached",
            ProxyError::Internal => "proxy_internal_error",
        }
    }

    /// What a refusal with this status is about, unless it says so itself.
    fn of_status(status: u16) -> ProxyError {
        match status {
            401 | 403 => ProxyError::RequestDenied,
            502 => ProxyError::TargetUnavailable,
            500.. => ProxyError::Internal,
            _ => ProxyError::RequestError,
        }
    }
}

/// A value of the client's for a message: quoted, escaped, and not too long.
pub fn quoted(value: &str) -> String {
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
    error: Option<ProxyError>,
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
            error: Some(ProxyError::of_status(status)),
            body,
            message,
        }
        .with("Content-Type", "application/json; charset=utf-8")
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
            error: None,
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

    /// The same refusal with its reason.
    pub fn because(mut self, error: ProxyError) -> Answer {
        self.error = Some(error);
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
        if self.status == 204 {
            remove_content_length(&mut bytes);
        }
        bytes
    }

    fn response(&self) -> Response<impl Read + '_> {
        let own = self.headers.iter();
        let own = own.map(|(name, value)| (*name, value.as_str()));
        let (name, proxy) = PROXY_STATUS;
        let status = self
            .error
            .map(|error| format!("{proxy}; error={}", error.name()));
        let status = status.iter().map(|status| (name, status.as_str()));
        let headers = OF_EVERY_ANSWER.into_iter().chain(own).chain(status);
        let headers =
            headers.filter_map(|(name, value)| Header::from_bytes(name, value.as_bytes()).ok());
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
    let header = match status {
        426 => format!("Connection: close, upgrade\r\nUpgrade: websocket, {UPGRADE_TOKEN}\r\n"),
        _ => "Connection: close\r\n".to_owned(),
    };
    bytes.splice(line_end..line_end, header.into_bytes());
}

/// RFC 9110 §8.6: a 204 must not have one. tiny_http gives it to every answer.
fn remove_content_length(bytes: &mut Vec<u8>) {
    const HEADER: &[u8] = b"Content-Length: 0\r\n";
    let start = bytes.windows(HEADER.len()).position(|part| part == HEADER);
    if let Some(start) = start {
        bytes.drain(start..start + HEADER.len());
    }
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
    fn no_answer_is_stored_or_taken_for_another_type() {
        for answer in [
            Answer::refusal(404, "gone"),
            Answer::success(200, Some("text/plain"), "x".into()),
            Answer::success(204, None, String::new()),
        ] {
            let text = text(&answer, false);
            for header in ["X-Content-Type-Options: nosniff", "Cache-Control: no-store"] {
                assert_eq!(
                    text.matches(&format!("\r\n{header}\r\n")).count(),
                    1,
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn a_refusal_says_why_in_a_header() {
        for (answer, expected) in [
            (Answer::refusal(400, "x"), "http_request_error"),
            (Answer::refusal(401, "x"), "http_request_denied"),
            (Answer::refusal(502, "x"), "destination_unavailable"),
            (Answer::unavailable("x"), "proxy_internal_error"),
            (
                Answer::refusal(502, "x").because(ProxyError::ConnectionRefused),
                "connection_refused",
            ),
        ] {
            let text = text(&answer, false);
            let header = format!("\r\nProxy-Status: tunneld; error={expected}\r\n");
            assert!(text.contains(&header), "{text}");
        }
        assert!(!text(&Answer::success(204, None, String::new()), false).contains("Proxy-Status"));
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
    fn a_204_has_no_length() {
        let text = text(&Answer::success(204, None, String::new()), false);
        assert!(text.starts_with("HTTP/1.1 204 No Content\r\n"), "{text}");
        assert!(
            !text.contains("Content-Length") && text.ends_with("\r\n\r\n"),
            "{text}"
        );
    }

    #[test]
    fn a_426_names_the_protocol_to_upgrade_to() {
        let text = text(&Answer::refusal(426, "upgrade"), false);
        assert!(
            text.contains(
                "\r\nConnection: close, upgrade\r\nUpgrade: websocket, connect-tcp-12\r\n"
            ),
            "{text}"
        );
    }
}
