//! What a server is asked to upgrade to, and whether it has.

use tungstenite::handshake::client::generate_key;
use tungstenite::handshake::derive_accept_key;

use super::answer::Head;
use crate::tunnel::{Protocol, UPGRADE_TOKEN};

/// What a server is asked to upgrade to.
#[derive(Debug)]
pub enum Upgrade {
    /// A WebSocket, with our `Sec-WebSocket-Key`.
    WebSocket(String),
    /// CONNECT-TCP.
    ConnectTcp,
}

impl Upgrade {
    /// To speak `protocol`.
    pub fn new(protocol: Protocol) -> Upgrade {
        match protocol {
            Protocol::WebSocket => Upgrade::WebSocket(generate_key()),
            Protocol::ConnectTcp => Upgrade::ConnectTcp,
        }
    }

    /// What it is, for a person.
    pub fn name(&self) -> &'static str {
        match self {
            Upgrade::WebSocket(_) => "a WebSocket",
            Upgrade::ConnectTcp => UPGRADE_TOKEN,
        }
    }

    /// The value of `Upgrade`.
    pub fn token(&self) -> &'static str {
        match self {
            Upgrade::WebSocket(_) => "websocket",
            Upgrade::ConnectTcp => UPGRADE_TOKEN,
        }
    }

    /// The headers of the request that only this protocol has.
    pub fn headers(&self) -> Vec<(&'static str, &str)> {
        match self {
            Upgrade::WebSocket(key) => {
                vec![("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", key)]
            }
            Upgrade::ConnectTcp => vec![("Capsule-Protocol", "?1")],
        }
    }

    /// Whether a server that refuses with this head doesn't know the protocol at all.
    pub fn is_unknown_to(&self, head: &Head) -> bool {
        let is_ours = |spoken: &str| spoken.eq_ignore_ascii_case(UPGRADE_TOKEN);
        matches!(self, Upgrade::ConnectTcp)
            && head.status == 426
            && !head.members("Upgrade").any(is_ours)
    }

    /// Whether a 101 is the answer to our request (RFC 9110 §7.8, RFC 6455 §4.1).
    ///
    /// # Errors
    /// What is wrong with it, in a clause.
    pub fn check(&self, head: &Head) -> Result<(), String> {
        let is = |wanted: &'static str| move |member: &str| member.eq_ignore_ascii_case(wanted);
        let protocols: Vec<_> = head.members("Upgrade").collect();
        if !matches!(protocols[..], [protocol] if is(self.token())(protocol)) {
            return Err(match protocols[..] {
                [] => "its 101 names no protocol".into(),
                _ => format!("its 101 switches to {}", protocols.join(", ")),
            });
        }
        if !head.members("Connection").any(is("upgrade")) {
            return Err("its 101 lacks Connection: Upgrade; does a proxy remove it?".into());
        }
        match self {
            Upgrade::WebSocket(key) => check_websocket(head, key),
            Upgrade::ConnectTcp => Ok(()),
        }
    }
}

fn check_websocket(head: &Head, key: &str) -> Result<(), String> {
    if !head
        .values("Sec-WebSocket-Accept")
        .eq([derive_accept_key(key.as_bytes())])
    {
        return Err(
            "its Sec-WebSocket-Accept does not match the request; does a cache or a proxy answer in its place?"
                .into(),
        );
    }
    for (name, what) in [
        ("Sec-WebSocket-Extensions", "the extension"),
        ("Sec-WebSocket-Protocol", "the subprotocol"),
    ] {
        if let Some(member) = head.members(name).next() {
            return Err(format!("it uses {what} {member}, which was not requested"));
        }
    }
    Ok(())
}
