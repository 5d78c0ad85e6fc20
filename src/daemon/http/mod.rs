//! tiny_http behind the gate: it parses the request head and prints the answer; this module routes,
//! authenticates and validates.
//!
//! ```text
//! backend.rs    the private connection to tiny_http: a request head in, a Request out
//! routes.rs     a Request in, an Answer or an upgrade request out: the checks in their order
//! auth.rs       tokens           origin.rs     the Origin and Host rules
//! handshake.rs  the upgrade      answer.rs     an answer and its bytes
//! forwarded.rs  who is behind a proxy
//! ```
//!
//! Nothing here touches the client's socket or dials a target.

pub mod answer;
pub mod auth;
pub mod backend;
pub mod forwarded;
pub mod handshake;
pub mod origin;
pub mod routes;

use tiny_http::{HTTPVersion, Header, Method};

/// A request as tiny_http parsed it, without its streams.
#[derive(Debug)]
pub struct Request {
    /// GET, HEAD and so on.
    pub method: Method,
    /// The request target as it was sent (RFC 9112 §3.2).
    pub target: String,
    /// The version to answer in.
    pub version: HTTPVersion,
    /// Whether a body follows the head. It is never read.
    pub has_body: bool,
    /// Whether the client waits for a 100 before it goes on (RFC 9110 §10.1.1).
    pub expects_continue: bool,
    headers: Vec<Header>,
}

impl Request {
    /// A request with these headers, in their order, and without a body.
    pub fn new(
        method: Method,
        target: String,
        version: HTTPVersion,
        headers: Vec<Header>,
    ) -> Request {
        Request {
            method,
            target,
            version,
            has_body: false,
            expects_continue: false,
            headers,
        }
    }

    /// The values of all headers of this name, in their order.
    pub fn headers(&self, name: &str) -> Vec<&str> {
        let named = self
            .headers
            .iter()
            .filter(|header| header.field.as_str().as_str().eq_ignore_ascii_case(name));
        named.map(|header| header.value.as_str()).collect()
    }

    /// Whether only the head of the answer may be sent.
    pub fn is_head(&self) -> bool {
        self.method == Method::Head
    }

    fn is_http_1_1(&self) -> bool {
        self.version >= HTTPVersion(1, 1)
    }
}
