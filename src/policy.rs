//! Which targets may be dialed: `--allow-target` and `--deny-target`.
//!
//! A name is judged as it was asked for, and by `deny` also as the resolver may complete it; each address as it
//! will be dialed. So neither a short name nor another spelling of an address leads around a rule.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net};

use crate::dial::{Host, Target};

/// The rules. Without any, every target is allowed.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// If there are any, a target must match one.
    pub allow: Vec<Rule>,
    /// A target must match none; this wins.
    pub deny: Vec<Rule>,
    /// What the resolver may put behind a name, without the dot.
    pub search: Vec<String>,
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
        let is_denied = |rule: &Rule| rule.has_port(target) && self.matches_completed(rule, target);
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
                    && (meanings(address).any(|meaning| rule.matches_address(meaning)))
            });
            let allowed = |rule| is_allowed(rule, canonical(address));
            !denied && (self.allow.is_empty() || self.allow.iter().any(allowed))
        };
        addresses.iter().copied().filter(is_permitted).collect()
    }

    /// Whether `rule` matches the target's name, or what the resolver may make of it. A name with a dot at its end
    /// is complete.
    fn matches_completed(&self, rule: &Rule, target: &Target) -> bool {
        let name = name_of(target);
        let is_short = matches!(&target.host, Host::Name(name) if !name.ends_with('.'));
        let matches_longer = |suffix| rule.matches_name(&format!("{name}.{suffix}"));
        rule.matches_name(name) || is_short && self.search.iter().any(matches_longer)
    }
}

/// The search list in a resolv.conf(5): the last `search` or `domain` line counts.
pub fn search_list(resolv_conf: &str) -> Vec<String> {
    let mut lists = resolv_conf.lines().rev().filter_map(|line| {
        let mut words = line.split_whitespace();
        matches!(words.next(), Some("search" | "domain")).then_some(words)
    });
    let names = lists.next().into_iter().flatten();
    names
        .map(|name| name.trim_end_matches('.').to_ascii_lowercase())
        .filter(|name| !name.is_empty())
        .collect()
}

/// A target's name without its last dot; empty if it has none.
fn name_of(target: &Target) -> &str {
    match &target.host {
        Host::Name(name) => name.strip_suffix('.').unwrap_or(name),
        Host::Localhost | Host::Address(_) => "",
    }
}

/// Everything that `address` may lead to: itself, what it is another spelling of, and the IPv4 address that
/// a gateway for NAT64 (RFC 6052), 6to4 (RFC 3056) or IPv4-compatible addresses (RFC 4291) would take out of it.
fn meanings(address: IpAddr) -> impl Iterator<Item = IpAddr> {
    let embedded = match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(address) => match address.octets() {
            [0x00, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d]
            | [0x20, 0x02, a, b, c, d, ..]
            | [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d] => Some([a, b, c, d]),
            _ => None,
        },
    };
    let embedded = embedded.map(|octets| canonical(Ipv4Addr::from(octets).into()));
    [Some(address), Some(canonical(address)), embedded]
        .into_iter()
        .flatten()
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
                "{rest:?} behind the bracket is no port: write [2001:db8::1]:443"
            )),
        };
    }
    match text.split_once(':') {
        // The last group of IPv6 could be meant for a port.
        Some((_, rest)) if rest.contains(':') && !text.contains('/') => Err(format!(
            "{text:?} may have a port or not: write [{text}], or [::1]:443"
        )),
        Some((_, rest)) if rest.contains(':') => Ok((text, None)),
        Some((host, ports)) => Ok((host, Some(ports))),
        None => Ok((text, None)),
    }
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (
        crate::dial::parse_port(first),
        crate::dial::parse_port(last),
    ) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err(format!(
            "{text:?} is no port and no range of ports: write 443 or 8000-8999"
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
                format!("{text:?} is no network: write it as 10.0.0.0/8 or 2001:db8::/32")
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
            _ => Err(format!("{text:?} is no name, no address and no network")),
        }
    }
}

/// A network of IPv4-mapped addresses is the IPv4 network.
fn canonical_network(network: IpNet) -> IpNet {
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
            search: vec!["svc.cluster.local".into(), "cluster.local".into()],
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
        assert!(!may(&policy(&[], &["0.0.0.0/8"]), "0.0.0.0", "0.0.0.0", 80));
        assert!(!may(&policy(&["::/0"], &[]), "x", "::ffff:10.0.0.1", 80));
        assert!(!may(
            &policy(&["10.0.0.0/8"], &[]),
            "64:ff9b::a00:1",
            "64:ff9b::a00:1",
            80
        ));
    }

    #[test]
    fn a_short_name_is_denied_as_the_resolver_may_complete_it() {
        let denying = policy(&[], &["*.cluster.local", "db.svc.cluster.local:5432"]);
        for name in ["secret", "secret.svc", "secret.svc.cluster.local", "db"] {
            assert!(!may(&denying, name, "10.0.0.1", 80), "{name}");
        }
        assert!(may(&denying, "secret.", "10.0.0.1", 80), "it is complete");
        assert!(!may(
            &policy(&["db.svc.cluster.local"], &[]),
            "db",
            "10.0.0.1",
            80
        ));
    }

    #[test]
    fn the_last_search_list_counts() {
        let text = "nameserver 10.0.0.1\nsearch a.example\ndomain x\n search Default.svc. cluster.local \n#search b\n";
        assert_eq!(search_list(text), ["default.svc", "cluster.local"]);
        assert!(search_list("nameserver 10.0.0.1\n").is_empty());
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
}
