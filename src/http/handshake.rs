//! The WebSocket opening handshake, server side (RFC 6455 §4.2).

use tungstenite::handshake::derive_accept_key;

use super::Request;
use super::answer::{Answer, shown};

/// Checks that `request` asks for a WebSocket of version 13, and returns its `Sec-WebSocket-Accept`.
///
/// # Errors
/// The 426 or 400 to answer with.
pub fn check(request: &Request) -> Result<String, Answer> {
    let upgrades =
        lists(request, "Upgrade", "websocket") && lists(request, "Connection", "upgrade");
    if !upgrades || !request.is_http_1_1() {
        return Err(Answer::refusal(
            426,
            "this is a WebSocket endpoint: connect with a WebSocket client such as websocat",
        ));
    }
    let versions = request.headers("Sec-WebSocket-Version");
    if versions != ["13"] {
        let versions = shown(&versions.join(", "));
        let message = format!("Sec-WebSocket-Version {versions} is not spoken here: use 13");
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
            "Sec-WebSocket-Key is repeated: send one",
        )),
    }
}

/// The 101 of RFC 6455 §4.2.2, without a subprotocol.
pub fn switching_protocols(accept: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    )
    .into_bytes()
}

/// Whether the comma-separated header `name` holds `token`, in any case (RFC 9110 §7.8).
fn lists(request: &Request, name: &str, token: &str) -> bool {
    let values = request.headers(name);
    values
        .iter()
        .flat_map(|value| value.split(','))
        .any(|item| item.trim().eq_ignore_ascii_case(token))
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
