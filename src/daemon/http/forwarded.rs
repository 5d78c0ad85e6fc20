//! Who a client is behind proxies that say so: `X-Forwarded-For` and `Forwarded` (RFC 7239).
//!
//! Anybody can send them, so each hop counts only as far as the one that reports it is trusted.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::Request;
use crate::daemon::peer::Peer;
use crate::policy::canonical_network;

/// Proxies whose word is taken: `--trust-forwarded`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trusted {
    /// Those with an address in this network.
    Network(IpNet),
    /// Those that come over a Unix socket.
    Unix,
}

impl Trusted {
    /// Parses a network, an address, or `unix`.
    ///
    /// # Errors
    /// What may be given.
    pub fn parse(text: &str) -> Result<Trusted, String> {
        if text == "unix" {
            return Ok(Trusted::Unix);
        }
        let address = text.parse().map(|address: IpAddr| address.into());
        let network = address.or_else(|_| text.parse().map(|network: IpNet| network.trunc()));
        network
            .map(|network| Trusted::Network(canonical_network(network)))
            .map_err(|_| "write a network such as 10.0.0.0/8, an address, or unix".into())
    }

    fn includes(&self, peer: &Peer) -> bool {
        match (self, peer) {
            (Trusted::Unix, Peer::Unix(_)) => true,
            (Trusted::Network(network), Peer::Tcp(address)) => contains(network, address.ip()),
            (Trusted::Network(network), Peer::Forwarded(address)) => contains(network, *address),
            _ => false,
        }
    }
}

/// IPv4 may have come as an IPv4-mapped address (RFC 4291 §2.5.5.2).
fn contains(network: &IpNet, address: IpAddr) -> bool {
    network.contains(&address) || network.contains(&address.to_canonical())
}

/// Who sent `request`, which has come from `peer`: the last hop that is not a trusted proxy, as far as those before it
/// tell. `X-Forwarded-For` is asked if it is there, otherwise `Forwarded`.
pub fn client(peer: Peer, request: &Request, trusted: &[Trusted]) -> Peer {
    let is_trusted = |peer: &Peer| trusted.iter().any(|trusted| trusted.includes(peer));
    let mut client = peer;
    for hop in hops(request).into_iter().rev() {
        match hop {
            Some(address) if is_trusted(&client) => client = Peer::Forwarded(address),
            _ => break,
        }
    }
    client
}

/// From the client to the last proxy. `None` for what is no address, such as `unknown`.
fn hops(request: &Request) -> Vec<Option<IpAddr>> {
    let elements = |name| {
        let values = request.headers(name).into_iter();
        values
            .flat_map(|value| value.split(','))
            .collect::<Vec<_>>()
    };
    match elements("X-Forwarded-For")[..] {
        [] => elements("Forwarded")
            .into_iter()
            .map(of_forwarded)
            .collect(),
        ref addresses => addresses.iter().copied().map(node).collect(),
    }
}

/// What `for` says in an element of `Forwarded`. Quoted strings are not looked for before it is split, as no node's name
/// has a comma in it: otherwise a quote that a client leaves open would swallow what its proxy adds.
fn of_forwarded(element: &str) -> Option<IpAddr> {
    element.split(';').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        let is_for = name.trim().eq_ignore_ascii_case("for");
        is_for.then(|| node(value.trim().trim_matches('"')))?
    })
}

/// RFC 7239 §6: an address, IPv6 in brackets, maybe with a port; `X-Forwarded-For` has IPv6 without brackets, too.
fn node(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    let address = bare.unwrap_or(text).parse().ok();
    let with_port = || text.parse().ok().map(|address: SocketAddr| address.ip());
    address
        .or_else(with_port)
        .map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use tiny_http::{HTTPVersion, Header, Method};

    use super::*;

    const PROXY: &str = "10.0.0.1:5";

    fn client_of(peer: &str, headers: &[(&str, &str)], trusted: &[&str]) -> String {
        let headers = headers
            .iter()
            .map(|(name, value)| Header::from_bytes(name.as_bytes(), value.as_bytes()).unwrap());
        let headers = headers.collect();
        let request = Request::new(Method::Get, "/".into(), HTTPVersion(1, 1), headers);
        let peer = match peer {
            "unix" => Peer::Unix(None),
            address => Peer::Tcp(address.parse().unwrap()),
        };
        let trusted = trusted.iter().map(|text| Trusted::parse(text).unwrap());
        client(peer, &request, &trusted.collect::<Vec<_>>()).to_string()
    }

    #[test]
    fn the_last_address_that_is_not_a_trusted_proxys_is_the_client() {
        for (value, expected) in [
            ("192.0.2.7", "192.0.2.7"),
            ("192.0.2.7:4711", "192.0.2.7"),
            ("2001:db8::7", "2001:db8::7"),
            ("[2001:db8::7]:80", "2001:db8::7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            // What the client says of itself is in front.
            ("203.0.113.9, 192.0.2.7", "192.0.2.7"),
            ("127.0.0.1,192.0.2.7", "192.0.2.7"),
            // Through two of ours.
            ("203.0.113.9, 192.0.2.7, 10.9.9.9", "192.0.2.7"),
            // From one of ours.
            ("10.3.3.3, 10.9.9.9", "10.3.3.3"),
            ("unknown, 10.9.9.9", "10.9.9.9"),
            ("192.0.2.7, unknown", PROXY),
            ("", PROXY),
            ("192.0.2.7,", PROXY),
        ] {
            let headers = [("X-Forwarded-For", value)];
            assert_eq!(
                client_of(PROXY, &headers, &["10.0.0.0/8"]),
                expected,
                "{value}"
            );
            assert_eq!(client_of(PROXY, &headers, &[]), PROXY, "{value}");
            assert_eq!(
                client_of(PROXY, &headers, &["10.0.0.2", "unix"]),
                PROXY,
                "{value}"
            );
        }
        let two = [
            ("X-Forwarded-For", "192.0.2.7"),
            ("x-forwarded-for", "10.9.9.9"),
        ];
        assert_eq!(client_of(PROXY, &two, &["10.0.0.0/8"]), "192.0.2.7");
        assert_eq!(client_of("unix", &two, &["unix", "10.9.9.9"]), "192.0.2.7");
        assert_eq!(client_of("unix", &two, &["10.0.0.0/8"]), "unix");
        for peer in [PROXY, "[::ffff:10.0.0.1]:5"] {
            for trusted in ["10.0.0.1", "::ffff:10.0.0.1", "::ffff:10.0.0.0/104"] {
                assert_eq!(client_of(peer, &two[..1], &[trusted]), "192.0.2.7");
            }
        }
    }

    #[test]
    fn forwarded_is_asked_where_there_is_no_x_forwarded_for() {
        for (value, expected) in [
            ("for=192.0.2.7", "192.0.2.7"),
            (
                "For=\"192.0.2.7:4711\";proto=https;by=10.0.0.1",
                "192.0.2.7",
            ),
            ("proto=https; for=\"[2001:db8::7]:80\"", "2001:db8::7"),
            ("for=203.0.113.9, for=192.0.2.7", "192.0.2.7"),
            ("for=\"203.0.113.9, for=192.0.2.7", "192.0.2.7"),
            ("for=192.0.2.7, for=_hidden", PROXY),
            ("by=192.0.2.7", PROXY),
            ("192.0.2.7", PROXY),
        ] {
            let headers = [("Forwarded", value)];
            assert_eq!(
                client_of(PROXY, &headers, &["10.0.0.0/8"]),
                expected,
                "{value}"
            );
            let both = [("Forwarded", value), ("X-Forwarded-For", "198.51.100.1")];
            assert_eq!(client_of(PROXY, &both, &["10.0.0.0/8"]), "198.51.100.1");
        }
    }

    #[test]
    fn what_is_trusted_is_a_network() {
        for text in [
            "10.0.0.0/8",
            "10.1.2.3/8",
            "10.0.0.1",
            "fd00::/8",
            "::1",
            "unix",
        ] {
            assert!(Trusted::parse(text).is_ok(), "{text}");
        }
        for text in [
            "",
            "*",
            "10.0.0.0/33",
            "proxy.example",
            "unix:/a",
            "10.0.0.1:80",
        ] {
            assert!(Trusted::parse(text).is_err(), "{text}");
        }
    }
}
