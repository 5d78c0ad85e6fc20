//! Which targets may be dialed: `--allow-target` and `--deny-target`.
//!
//! A name is judged as it was asked for, and where that could be denied, looked up as it was judged; each address
//! is judged as it will be dialed. So neither a short name nor another spelling of an address leads around a rule.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net};

use crate::target::{Host, Target};

/// The rules. Without any, every target is allowed.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// If there are any, a target must match one.
    pub allow: Vec<Rule>,
    /// A target must match none; this wins.
    pub deny: Vec<Rule>,
}

/// Hosts and ports: `HOST`, `HOST:PORT` or `HOST:PORT-PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    hosts: Hosts,
    ports: RangeInclusive<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Hosts {
    /// `*`
    Any,
    /// `localhost`: the whole of loopback, as a service on any address answers there too.
    Loopback,
    /// An address, or a network.
    Network(IpNet),
    /// Without its last dot.
    Name(String),
    /// `*.suffix`: every name that ends so, with the dot.
    Suffix(String),
}

impl Policy {
    /// Whether `target` is forbidden whatever it resolves to. Then its name is not even looked up, as a name can
    /// carry data out to whoever answers for it.
    pub fn rules_out(&self, target: &Target) -> bool {
        let is_denied = |rule: &Rule| rule.has_port(target) && rule.matches_name(name_of(target));
        let may_match = |rule: &Rule| {
            rule.has_port(target) && (rule.is_of_addresses() || rule.matches_name(name_of(target)))
        };
        self.deny.iter().any(is_denied)
            || !(self.allow.is_empty() || self.allow.iter().any(may_match))
    }

    /// Those of a target's resolved addresses that may be dialed, in their order.
    pub fn permitted(&self, target: &Target, addresses: &[SocketAddr]) -> Vec<SocketAddr> {
        if self.rules_out(target) {
            return Vec::new();
        }
        let is_allowed = |rule: &Rule, address: IpAddr| {
            rule.has_port(target)
                && (rule.matches_name(name_of(target)) || rule.matches_address(address))
        };
        let is_permitted = |address: &SocketAddr| {
            let address = address.ip();
            let denied = self.deny.iter().any(|rule| {
                rule.has_port(target)
                    && equivalent_addresses(address).any(|address| rule.matches_address(address))
            });
            let allowed = |rule| is_allowed(rule, canonical(address));
            !denied && (self.allow.is_empty() || self.allow.iter().any(allowed))
        };
        addresses.iter().copied().filter(is_permitted).collect()
    }

    /// `target` as it is to be looked up. Where a name with a domain is denied, it gets a dot at its end, so that the
    /// resolver completes no name to a denied one, by `search` or anything else. `None` for a name without a domain:
    /// those are mostly meant to be completed, and what to is the resolver's secret.
    pub fn completed(&self, target: &Target) -> Option<Target> {
        let may_become_denied = |rule: &Rule| rule.has_port(target) && rule.has_domain();
        let name = match &target.host {
            Host::Name(name) if !name.ends_with('.') => name,
            _ => return Some(target.clone()),
        };
        if !self.deny.iter().any(may_become_denied) {
            return Some(target.clone());
        }
        name.contains('.').then(|| Target {
            host: Host::Name(format!("{name}.")),
            port: target.port,
        })
    }
}

/// A target's name without its last dot; empty if it has none.
fn name_of(target: &Target) -> &str {
    match &target.host {
        Host::Name(name) => name.strip_suffix('.').unwrap_or(name),
        Host::Localhost | Host::Address(_) => "",
    }
}

/// Everything that `address` may lead to: itself, what it is another spelling of, and the IPv4 addresses that a
/// gateway or a tunnel of this host's may take out of it.
fn equivalent_addresses(address: IpAddr) -> impl Iterator<Item = IpAddr> {
    let embedded = match address {
        IpAddr::V4(_) => Vec::new(),
        IpAddr::V6(address) => embedded(address.octets()),
    };
    let embedded = embedded
        .into_iter()
        .map(|octets| Ipv4Addr::from(octets).into());
    let all = [address, address.to_canonical()]
        .into_iter()
        .chain(embedded);
    all.flat_map(|address| [address, canonical(address)])
}

fn embedded(address: [u8; 16]) -> Vec<[u8; 4]> {
    let mut found = match address {
        // NAT64's own prefix (RFC 6052 §2.1).
        [0x00, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d]
        // IPv4-compatible (RFC 4291 §2.5.5.1) and IPv4-translated (RFC 2765 §2.1).
        | [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d]
        | [0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, a, b, c, d]
        // 6to4 (RFC 3056 §2).
        | [0x20, 0x02, a, b, c, d, ..] => vec![[a, b, c, d]],
        // Teredo (RFC 4380 §4): the client's address, its bits turned over.
        [0x20, 0x01, 0, 0, _, _, _, _, _, _, _, _, a, b, c, d] => vec![[!a, !b, !c, !d]],
        // For NAT64 within a network (RFC 8215), which may use any length of prefix in here: RFC 6052 §2.2 for 48,
        // 56, 64 and 96 bits. Where there is nothing in one place, the address is in another.
        [0x00, 0x64, 0xff, 0x9b, 0x00, 0x01, a, b, _, c, d, e, f, g, h, i] => {
            let readings = [[a, b, c, d], [b, c, d, e], [c, d, e, f], [f, g, h, i]];
            readings.into_iter().filter(|&read| read != [0; 4]).collect()
        }
        _ => Vec::new(),
    };
    // ISATAP (RFC 5214 §6.1), in any network, one of the above included.
    if let [0x00 | 0x02, 0, 0x5e, 0xfe, a, b, c, d] = address[8..] {
        found.push([a, b, c, d]);
    }
    found
}

/// The address that a connection to `address` really goes to: IPv4 behind IPv4-mapped IPv6 (RFC 4291 §2.5.5.2),
/// and the own host behind an unspecified one (connect(2) in Linux takes it for loopback).
pub fn canonical(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        address => address,
    }
}

impl Rule {
    /// Parses `HOST[:PORT[-PORT]]`. HOST is `*`, a name, `*.suffix`, an address or a network such as
    /// 10.0.0.0/8; IPv6 with a port stands in brackets.
    ///
    /// # Errors
    /// What is wrong with it, for the person who wrote it.
    pub fn parse(text: &str) -> Result<Rule, String> {
        let (host, ports) = split(text)?;
        Ok(Rule {
            hosts: Hosts::parse(host)?,
            ports: ports.map_or(Ok(1..=u16::MAX), parse_ports)?,
        })
    }

    fn has_port(&self, target: &Target) -> bool {
        self.ports.contains(&target.port)
    }

    fn is_of_addresses(&self) -> bool {
        matches!(self.hosts, Hosts::Loopback | Hosts::Network(_))
    }

    /// Whether it is of names with a domain, to which a resolver may complete shorter ones.
    fn has_domain(&self) -> bool {
        match &self.hosts {
            Hosts::Suffix(_) => true,
            Hosts::Name(name) => name.contains('.'),
            Hosts::Any | Hosts::Loopback | Hosts::Network(_) => false,
        }
    }

    /// Whether it matches a name, whatever its address. Without one `name` is empty.
    fn matches_name(&self, name: &str) -> bool {
        match &self.hosts {
            Hosts::Any => true,
            Hosts::Name(wanted) => name == wanted,
            Hosts::Suffix(suffix) => name.ends_with(suffix.as_str()),
            Hosts::Loopback | Hosts::Network(_) => false,
        }
    }

    fn matches_address(&self, address: IpAddr) -> bool {
        match &self.hosts {
            Hosts::Loopback => address.is_loopback(),
            Hosts::Network(network) => network.contains(&address),
            Hosts::Any | Hosts::Name(_) | Hosts::Suffix(_) => false,
        }
    }
}

/// The host without brackets, and what stands for the ports.
fn split(text: &str) -> Result<(&str, Option<&str>), String> {
    if let Some(bracketed) = text.strip_prefix('[') {
        let (host, rest) = bracketed
            .split_once(']')
            .ok_or("a bracket is not closed: write [2001:db8::1]:443")?;
        return match rest.strip_prefix(':') {
            Some(ports) => Ok((host, Some(ports))),
            None if rest.is_empty() => Ok((host, None)),
            None => Err(format!(
                "{rest:?} after the bracket is not a port: write [2001:db8::1]:443"
            )),
        };
    }
    match text.split_once(':') {
        // The last group of IPv6 could be meant for a port.
        Some((_, rest)) if rest.contains(':') && !text.contains('/') => Err(format!(
            "{text:?} may or may not end in a port: write [{text}] without one, or [::1]:443 with one"
        )),
        Some((_, rest)) if rest.contains(':') => Ok((text, None)),
        Some((host, ports)) => Ok((host, Some(ports))),
        None => Ok((text, None)),
    }
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (
        crate::target::parse_port(first),
        crate::target::parse_port(last),
    ) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err(format!(
            "{text:?} is not a port or a range of ports: write 443 or 8000-8999"
        )),
    }
}

impl Hosts {
    fn parse(text: &str) -> Result<Hosts, String> {
        if text.is_empty() {
            return Err("no host: write * for every host".into());
        }
        if text == "*" {
            return Ok(Hosts::Any);
        }
        if text.contains('/') {
            let network = text.parse().map_err(|_| {
                format!("{text:?} is not a network: write it as 10.0.0.0/8 or 2001:db8::/32")
            })?;
            return Ok(Hosts::Network(canonical_network(network)));
        }
        let is_suffix = text.starts_with("*.");
        match Host::parse(text.strip_prefix("*.").unwrap_or(text)) {
            Some(Host::Name(name)) => {
                let name = name.strip_suffix('.').unwrap_or(&name);
                Ok(if is_suffix {
                    Hosts::Suffix(format!(".{name}"))
                } else {
                    Hosts::Name(name.to_owned())
                })
            }
            Some(Host::Localhost) if text != "*." => Ok(Hosts::Loopback),
            Some(Host::Address(address)) if !is_suffix => {
                Ok(Hosts::Network(canonical(address).into()))
            }
            _ => Err(format!("{text:?} is not a name, an address or a network")),
        }
    }
}

/// A network of IPv4-mapped addresses is the IPv4 network.
pub fn canonical_network(network: IpNet) -> IpNet {
    match network {
        IpNet::V6(mapped) if mapped.prefix_len() >= 96 => {
            let inner = mapped.addr().to_ipv4_mapped();
            inner
                .and_then(|address| Ipv4Net::new(address, mapped.prefix_len() - 96).ok())
                .map_or(network, IpNet::V4)
        }
        _ => network,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(allow: &[&str], deny: &[&str]) -> Policy {
        let rules = |texts: &[&str]| {
            texts
                .iter()
                .map(|text| Rule::parse(text).unwrap())
                .collect()
        };
        Policy {
            allow: rules(allow),
            deny: rules(deny),
        }
    }

    /// Whether `host`, if it resolves to `address`, may be dialed at `port`.
    fn may(policy: &Policy, host: &str, address: &str, port: u16) -> bool {
        let host = Host::parse(host).unwrap();
        let address = SocketAddr::new(address.parse().unwrap(), port);
        !policy
            .permitted(&Target { host, port }, &[address])
            .is_empty()
    }

    #[test]
    fn without_a_rule_everything_is_permitted() {
        assert!(may(&policy(&[], &[]), "10.0.0.1", "10.0.0.1", 1));
    }

    #[test]
    fn rules_name_hosts_and_ports() {
        for (rule, host, address, port, expected) in [
            ("*", "a.example", "10.0.0.1", 1, true),
            ("*:5432", "a.example", "10.0.0.1", 5432, true),
            ("*:5432", "a.example", "10.0.0.1", 5433, false),
            ("a.example", "A.Example.", "10.0.0.1", 1, true),
            ("A.example.", "a.example", "10.0.0.1", 1, true),
            ("a.example", "b.a.example", "10.0.0.1", 1, false),
            ("*.example", "b.a.example", "10.0.0.1", 1, true),
            ("*.example", "example", "10.0.0.1", 1, false),
            ("*.example", "an-example", "10.0.0.1", 1, false),
            ("a.example", "10.0.0.1", "10.0.0.1", 1, false),
            ("10.0.0.0/8:80-90", "x", "10.255.255.255", 80, true),
            ("10.0.0.0/8:80-90", "x", "10.0.0.0", 90, true),
            ("10.0.0.0/8:80-90", "x", "10.0.0.1", 79, false),
            ("10.0.0.0/8:80-90", "x", "10.0.0.1", 91, false),
            ("10.0.0.0/8:80-90", "x", "11.0.0.1", 85, false),
            ("10.0.0.1", "10.0.0.1", "10.0.0.1", 65535, true),
            ("localhost", "localhost", "127.0.0.1", 1, true),
            ("localhost", "127.8.0.1", "127.8.0.1", 1, true),
            ("localhost:1", "::1", "::1", 1, true),
            ("[::1]:1-2", "::1", "::1", 2, true),
            ("[2001:db8::/32]", "x", "2001:db8::7", 2, true),
            ("2001:db8::/32", "x", "2001:db9::7", 2, false),
            ("::ffff:10.0.0.0/104", "x", "10.9.9.9", 2, true),
        ] {
            let allowing = policy(&[rule], &[]);
            assert_eq!(
                may(&allowing, host, address, port),
                expected,
                "allow {rule}, {host} {address} {port}"
            );
            let denying = policy(&[], &[rule]);
            assert_eq!(
                may(&denying, host, address, port),
                !expected,
                "deny {rule}, {host} {address} {port}"
            );
        }
    }

    #[test]
    fn other_spellings_of_an_address_are_the_address() {
        let denying = policy(&[], &["localhost", "169.254.169.254"]);
        for address in [
            "127.0.0.1",
            "127.1.2.3",
            "::1",
            "::ffff:127.0.0.1",
            "0.0.0.0",
            "::",
            "::ffff:0.0.0.0",
            "::ffff:169.254.169.254",
        ] {
            assert!(!may(&denying, "a.example", address, 80), "{address}");
            assert!(!may(&denying, address, address, 80), "{address}");
        }
        for embedded in ["64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1"] {
            assert!(!may(&denying, embedded, embedded, 80), "{embedded}");
        }
        assert!(may(&denying, "a.example", "10.0.0.1", 80));
        assert!(!may(&policy(&["::/0"], &[]), "x", "::ffff:10.0.0.1", 80));
        assert!(!may(
            &policy(&["10.0.0.0/8"], &[]),
            "64:ff9b::a00:1",
            "64:ff9b::a00:1",
            80
        ));
    }

    #[test]
    fn a_network_around_the_unspecified_address_denies_it_in_every_spelling() {
        let denying = policy(&[], &["0.0.0.0/8"]);
        for address in ["0.0.0.0", "::ffff:0.0.0.0", "::", "64:ff9b::", "2002::1"] {
            assert!(!may(&denying, "a.example", address, 80), "{address}");
            assert!(!may(&denying, address, address, 80), "{address}");
        }
        assert!(may(&denying, "a.example", "127.0.0.1", 80));
    }

    /// As what `host` would be looked up.
    fn looked_up(policy: &Policy, host: &str, port: u16) -> Option<String> {
        let host = Host::parse(host).unwrap();
        let target = policy.completed(&Target { host, port });
        target.map(|target| target.to_string())
    }

    #[test]
    fn a_name_that_could_be_completed_to_a_denied_one_is_not_completed() {
        for denied in ["*.corp.internal", "db.corp.internal:80"] {
            let denying = policy(&[], &[denied]);
            for (host, expected) in [
                ("secret", None),
                ("secret.", Some("secret.:80")),
                ("secret.svc", Some("secret.svc.:80")),
                ("a.example.", Some("a.example.:80")),
                ("localhost", Some("localhost:80")),
                ("10.0.0.1", Some("10.0.0.1:80")),
            ] {
                let complete = looked_up(&denying, host, 80);
                assert_eq!(complete.as_deref(), expected, "{denied}, {host}");
            }
        }
        let of_port = policy(&[], &["*.corp.internal:80"]);
        assert_eq!(looked_up(&of_port, "secret", 81).unwrap(), "secret:81");
        for denied in ["db", "*", "localhost", "10.0.0.0/8", "*:80"] {
            let denying = policy(&["*.example"], &[denied]);
            assert_eq!(looked_up(&denying, "a", 80).unwrap(), "a:80", "{denied}");
        }
    }

    #[test]
    fn ipv4_inside_ipv6_is_found_wherever_it_is() {
        let denying = policy(&[], &["10.1.2.3"]);
        for address in [
            "::ffff:10.1.2.3",
            "::10.1.2.3",
            "::ffff:0:10.1.2.3",
            "64:ff9b::10.1.2.3",
            "64:ff9b:1::10.1.2.3",
            "64:ff9b:1:7:0:7:10.1.2.3",
            "64:ff9b:1:a01:2:300::",
            "64:ff9b:1:ff0a:1:203::",
            "64:ff9b:1:ffff:a:102:300:0",
            "64:ff9b:1:a01:2:300::1",
            "2002:a01:203::1",
            "2001::f:f:f5fe:fdfc",
            "fe80::5efe:10.1.2.3",
            "2001:db8::200:5efe:10.1.2.3",
        ] {
            assert!(!may(&denying, address, address, 80), "{address}");
        }
        let address = "64:ff9b:1:a01:0:5efe:808:808";
        assert!(!may(&policy(&[], &["10.1.0.94"]), address, address, 80));
        assert!(!may(&policy(&[], &["8.8.8.8"]), address, address, 80));
        for address in [
            "64:ff9b:1::8.8.8.8",
            "64:ff9b:1:808:8:800::",
            "2001:db8::10.1.2.3",
        ] {
            assert!(may(&denying, address, address, 80), "{address}");
            assert!(
                may(&policy(&[], &["localhost"]), address, address, 80),
                "{address}"
            );
        }
    }

    #[test]
    fn a_name_that_can_only_be_forbidden_is_not_looked_up() {
        let rules_out = |allow: &[&str], deny: &[&str]| {
            let host = Host::parse("a.example").unwrap();
            policy(allow, deny).rules_out(&Target { host, port: 80 })
        };
        assert!(rules_out(&["b.example"], &[]) && rules_out(&["a.example:81"], &[]));
        assert!(rules_out(&["10.0.0.0/8:81", "localhost:1"], &[]));
        assert!(rules_out(&[], &["*.example"]) && rules_out(&["a.example"], &["*:80"]));
        assert!(!rules_out(&[], &[]) && !rules_out(&["10.0.0.0/8"], &["10.0.0.1"]));
        assert!(!rules_out(&["b.example", "*.example"], &["a.example:81"]));
    }

    #[test]
    fn deny_wins_and_addresses_are_judged_one_by_one() {
        let policy = policy(&["*.example", "10.0.0.0/8"], &["10.0.0.1", "bad.example"]);
        let addresses = |host: &str| {
            let host = Host::parse(host).unwrap();
            let resolved = ["10.0.0.1:1", "10.0.0.2:1", "192.0.2.1:1"];
            let resolved = resolved.map(|text| text.parse().unwrap());
            policy.permitted(&Target { host, port: 1 }, &resolved)
        };
        assert_eq!(addresses("a.example").len(), 2);
        assert_eq!(addresses("elsewhere.test"), ["10.0.0.2:1".parse().unwrap()]);
        assert!(addresses("bad.example").is_empty());
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in [
            "",
            ":80",
            "a:0",
            "a:",
            "a:90-80",
            "a:80-",
            "a:80,81",
            "a:+80",
            "10.0.0.0/33",
            "10.0.0/8",
            "a/8",
            "[::1",
            "[::1]80",
            "a b",
            "*.10.0.0.1",
            "*.",
            "::1",
            "::1:8080",
            "a.*",
            "*a.example",
            "https://a.example",
        ] {
            assert!(Rule::parse(text).is_err(), "{text:?}");
        }
    }

    /// As it would be written in full.
    fn printed(rule: &Rule) -> String {
        let host = match &rule.hosts {
            Hosts::Any => "*".to_owned(),
            Hosts::Loopback => "localhost".to_owned(),
            Hosts::Network(network) => network.to_string(),
            Hosts::Name(name) => name.clone(),
            Hosts::Suffix(suffix) => format!("*{suffix}"),
        };
        format!("[{host}]:{}-{}", rule.ports.start(), rule.ports.end())
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn a_rule_that_is_accepted_means_the_same_written_in_full(
            text in proptest::prop_oneof![
                "(\\*|\\*?\\.?[a-zA-Z0-9._-]{1,9}|[0-9]{1,3}(\\.[0-9]{1,3}){3}|\\[?[0-9a-f:.]{2,12}\\]?)(/[0-9]{1,3})?(:[0-9]{1,5}(-[0-9]{1,5})?)?",
                "[ -~]{0,20}",
            ]
        ) {
            if let Ok(rule) = Rule::parse(&text) {
                let full = printed(&rule);
                proptest::prop_assert_eq!(Rule::parse(&full), Ok(rule), "{}", full);
            }
        }
    }
}
