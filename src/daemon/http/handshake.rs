//! The upgrade, server side: the WebSocket's opening handshake (RFC 6455 §4.2), or that of CONNECT-TCP
//! (draft-ietf-httpbis-connect-tcp-12).

use tungstenite::handshake::derive_accept_key;

use super::Request;
use super::answer::{Answer, PROXY_STATUS, quoted};
use crate::tunnel::{Protocol, UPGRADE_TOKEN};

/// What a connection is upgraded to.
#[derive(Debug, PartialEq, Eq)]
pub enum Handshake {
    /// A WebSocket.
    WebSocket {
        /// Its `Sec-WebSocket-Accept`.
        accept: String,
        /// Whether the subprotocol `binary` was offered, and so is chosen.
        is_binary: bool,
    },
    /// CONNECT-TCP.
    ConnectTcp,
}

impl Handshake {
    /// What is spoken behind it.
    pub fn protocol(&self) -> Protocol {
        match self {
            Handshake::WebSocket { .. } => Protocol::WebSocket,
            Handshake::ConnectTcp => Protocol::ConnectTcp,
        }
    }

    /// The 101 of RFC 6455 §4.2.2, or that of the draft.
    pub fn switching_protocols(&self) -> Vec<u8> {
        let (name, value) = PROXY_STATUS;
        let (token, rest) = match self {
            Handshake::WebSocket { accept, is_binary } => {
                let chosen = if *is_binary {
                    format!("\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}")
                } else {
                    String::new()
                };
                (
                    "websocket",
                    format!("Sec-WebSocket-Accept: {accept}{chosen}"),
                )
            }
            Handshake::ConnectTcp => (UPGRADE_TOKEN, "Capsule-Protocol: ?1".to_owned()),
        };
        format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {token}\r\n{rest}\r\n{name}: {value}\r\n\r\n"
        )
        .into_bytes()
    }
}

/// Checks that `request` asks for a WebSocket of version 13, or for CONNECT-TCP; for the first of them if for both, as
/// the order is the client's preference (RFC 9110 §7.8).
///
/// # Errors
/// The 426 or 400 to answer with.
pub fn check(request: &Request) -> Result<Handshake, Answer> {
    let known = list(request, "Upgrade").find_map(|token| match token {
        token if token.eq_ignore_ascii_case("websocket") => Some(Protocol::WebSocket),
        token if token.eq_ignore_ascii_case(UPGRADE_TOKEN) => Some(Protocol::ConnectTcp),
        _ => None,
    });
    let mut options = list(request, "Connection");
    let upgrades = options.any(|option| option.eq_ignore_ascii_case("upgrade"));
    match known {
        Some(protocol) if upgrades && request.is_http_1_1() => match protocol {
            Protocol::WebSocket => Ok(Handshake::WebSocket {
                accept: accept(request)?,
                is_binary: offers_binary(request),
            }),
            Protocol::ConnectTcp => Ok(Handshake::ConnectTcp),
        },
        _ => Err(Answer::refusal(
            426,
            format!(
                "this is a tunnel: connect with a WebSocket client such as websocat, or one that speaks {UPGRADE_TOKEN}"
            ),
        )),
    }
}

/// The `Sec-WebSocket-Accept`.
fn accept(request: &Request) -> Result<String, Answer> {
    let versions = request.headers("Sec-WebSocket-Version");
    if versions != ["13"] {
        let message = match versions[..] {
            [] => "Sec-WebSocket-Version is missing: send 13".to_owned(),
            _ => format!(
                "Sec-WebSocket-Version {} is not supported: use 13",
                quoted(&versions.join(", "))
            ),
        };
        return Err(Answer::refusal(426, message).with("Sec-WebSocket-Version", "13"));
    }
    match request.headers("Sec-WebSocket-Key")[..] {
        [key] if is_key(key) => Ok(derive_accept_key(key.as_bytes())),
        [] => Err(Answer::refusal(
            400,
            "Sec-WebSocket-Key is missing: send 16 random bytes in base64",
        )),
        [_] => Err(Answer::refusal(
            400,
            "Sec-WebSocket-Key is not 16 bytes in base64: send 16 random bytes in base64",
        )),
        _ => Err(Answer::refusal(
            400,
            "Sec-WebSocket-Key is given more than once: send one",
        )),
    }
}

/// The subprotocol that is chosen if it is offered. It says nothing that isn't so without it, but browsers, noVNC and
/// Node's ws fail when they have offered some and none is chosen.
const SUBPROTOCOL: &str = "binary";

/// What the subprotocols begin with by which a web page, whose headers are not its own to set, shows a token; the token
/// in base64url without padding follows. The Kubernetes API server has it so. It is never chosen, so never echoed.
const TOKEN_SUBPROTOCOL: &str = "base64url.bearer.authorization.k8s.io.";

/// Whether `binary` is among the subprotocols that `request` offers. They are compared as they are (RFC 6455 §11.3.4).
fn offers_binary(request: &Request) -> bool {
    list(request, "Sec-WebSocket-Protocol").any(|offered| offered == SUBPROTOCOL)
}

/// What `request` offers as tokens among its subprotocols, still encoded.
pub fn offered_tokens(request: &Request) -> Vec<&str> {
    list(request, "Sec-WebSocket-Protocol")
        .filter_map(|offered| offered.strip_prefix(TOKEN_SUBPROTOCOL))
        .collect()
}

/// The items of the comma-separated header `name` (RFC 9110 §5.6.1).
fn list<'a>(request: &'a Request, name: &str) -> impl Iterator<Item = &'a str> {
    let values = request.headers(name).into_iter();
    let items = values.flat_map(|value| value.split(','));
    items.map(|item| item.trim_matches([' ', '\t']))
}

/// RFC 6455 §4.1: 16 bytes in base64 are 22 of its characters and two for padding. The value is never
/// decoded, so the unused bits of the last character may be anything.
fn is_key(key: &str) -> bool {
    let is_base64 = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    let bytes = key.as_bytes();
    bytes.len() == 24 && bytes[..22].iter().all(is_base64) && &bytes[22..] == b"=="
}

#[cfg(test)]
mod tests {
    use super::is_key;

    #[test]
    fn a_key_is_sixteen_bytes_in_base64() {
        assert!(is_key("dGhlIHNhbXBsZSBub25jZQ=="));
        for wrong in [
            "",
            "dGhlIHNhbXBsZSBub25jZQ",
            "dGhlIHNhbXBsZSBub25jZ===",
            "dGhlIHNhbXBsZSBub25j!Q==",
            "dGhlIHNhbXBsZSBub25jZSBsb25n",
        ] {
            assert!(!is_key(wrong), "{wrong}");
        }
    }
}
