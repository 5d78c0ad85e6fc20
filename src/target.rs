//! What a tunnel leads to: a host and a port, as the policy, the routes and the client speak of it.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// What stands in a path before a target, as in `…/{target_host}/{target_port}/`: the registered place of CONNECT-TCP's
/// default template (draft-ietf-httpbis-connect-tcp-12).
pub const MASQUE: &str = "/.well-known/masque/tcp/";

/// What a tunnel leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The host as parsed.
    pub host: Host,
    /// 1 to 65535.
    pub port: u16,
}

/// A host, as the `host` parameter names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// `localhost`, which is 127.0.0.1 and ::1 without asking a resolver (RFC 6761 §6.3): an image may have
    /// neither `/etc/hosts` nor a name server, and dev servers often listen on ::1 alone.
    Localhost,
    /// An address, which needs no resolver either.
    Address(IpAddr),
    /// A name, in ASCII and lower case.
    Name(String),
}

impl Host {
    /// Parses a name or an address, IPv6 with or without brackets. Empty is localhost.
    pub fn parse(text: &str) -> Option<Host> {
        if text.is_empty() {
            return Some(Host::Localhost);
        }
        if let Some(bracketed) = text.strip_prefix('[') {
            let address = bracketed.strip_suffix(']')?.parse::<Ipv6Addr>().ok()?;
            return Some(Host::Address(address.into()));
        }
        if let Ok(address) = text.parse() {
            return Some(Host::Address(address));
        }
        // url would undo a second layer of percent-encoding.
        if text.contains('%') {
            return None;
        }
        match url::Host::parse(text).ok()? {
            url::Host::Ipv4(address) => Some(Host::Address(address.into())),
            url::Host::Ipv6(address) => Some(Host::Address(address.into())),
            url::Host::Domain(name) => Host::from_name(name),
        }
    }

    /// Whether it is this machine, and no byte to it crosses a network.
    pub fn is_loopback(&self) -> bool {
        match self {
            Host::Localhost => true,
            Host::Address(address) => address.to_canonical().is_loopback(),
            Host::Name(_) => false,
        }
    }

    fn from_name(name: String) -> Option<Host> {
        let bare = name.strip_suffix('.').unwrap_or(&name);
        if is_localhost(bare) {
            return Some(Host::Localhost);
        }
        // RFC 1035 §2.3.4; underscores occur in the names of container networks.
        let is_label = |label: &str| {
            let in_set = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            (1..=63).contains(&label.len()) && label.bytes().all(in_set)
        };
        (bare.len() <= 253 && bare.split('.').all(is_label)).then_some(Host::Name(name))
    }
}

/// Whether `text` may be a `uri-host [ ":" port ]` (RFC 9110 §7.2) by its characters, or empty.
pub fn is_host(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:[]".contains(&byte))
}

/// Whether a name, in lower case and without its last dot, is this machine's by itself (RFC 6761 §6.3).
pub fn is_localhost(name: &str) -> bool {
    name == "localhost" || name.ends_with(".localhost")
}

/// Parses a port as a decimal number from 1 to 65535. `str::parse` would take a plus sign.
pub fn parse_port(text: &str) -> Option<u16> {
    let is_decimal = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|&port| is_decimal && port != 0)
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Localhost => write!(f, "localhost:{}", self.port),
            Host::Address(address) => write!(f, "{}", SocketAddr::new(*address, self.port)),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Option<String> {
        Host::parse(text).map(|host| Target { host, port: 5 }.to_string())
    }

    #[test]
    fn localhost_in_every_spelling_needs_no_resolver() {
        for text in [
            "",
            "localhost",
            "LOCALHOST",
            "localhost.",
            "LocalHost.",
            "db.localhost",
        ] {
            assert_eq!(Host::parse(text), Some(Host::Localhost), "{text:?}");
        }
    }

    #[test]
    fn hosts_are_names_and_addresses() {
        for (text, target) in [
            ("127.0.0.1", "127.0.0.1:5"),
            ("::1", "[::1]:5"),
            ("[::1]", "[::1]:5"),
            ("::ffff:10.0.0.1", "[::ffff:10.0.0.1]:5"),
            ("DB.internal", "db.internal:5"),
            ("my_service", "my_service:5"),
            ("b\u{fc}cher.example", "xn--bcher-kva.example:5"),
            ("example.com.", "example.com.:5"),
        ] {
            assert_eq!(shown(text).as_deref(), Some(target), "{text}");
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        let long_label = "a".repeat(64);
        let long_name = "a.".repeat(127) + "aa";
        for text in [
            "a b",
            "a/b",
            "a:80",
            "[::1",
            "::1]",
            "[127.0.0.1]",
            "[::1]:80",
            "a..b",
            ".",
            "a@b",
            "a%62",
            "fe80::1%eth0",
            "256.1.1.1",
            "a\0b",
            &long_label,
            &long_name,
        ] {
            let parsed = Host::parse(text);
            assert!(parsed.is_none(), "{text:?} {parsed:?}");
        }
    }

    #[test]
    fn ports_are_decimal_numbers_from_1_to_65535() {
        for (text, port) in [("1", 1), ("65535", 65535), ("080", 80)] {
            assert_eq!(parse_port(text), Some(port));
        }
        for text in [
            "",
            "0",
            "65536",
            "-1",
            "+80",
            " 80",
            "80 ",
            "8e1",
            "0x50",
            "80\0",
            "٨٠",
            "99999999999999999999",
        ] {
            assert_eq!(parse_port(text), None, "{text:?}");
        }
    }
}
