//! Which targets may be dialed: `--allow-target` and `--deny-target`.
//!
//! A name is judged as it was asked for, and each address it resolved to as it will be dialed, so that neither
//! a name nor another spelling of an address leads around a rule.

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
        let denied = self.deny.iter().any(|rule| rule.matches_name(target));
        let may_match = |rule: &Rule| rule.is_of_addresses() || rule.matches_name(target);
        denied || !(self.allow.is_empty() || self.allow.iter().any(may_match))
    }

    /// Those of a target's resolved addresses that may be dialed, in their order.
    pub fn permitted(&self, target: &Target, addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
        let is_permitted = |address: &SocketAddr| {
            let matches = |rules: &[Rule]| {
                rules
                    .iter()
                    .any(|rule| rule.matches(target, canonical(address.ip())))
            };
            !matches(&self.deny) && (self.allow.is_empty() || matches(&self.allow))
        };
        addresses.into_iter().filter(is_permitted).collect()
    }
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

    fn is_of_addresses(&self) -> bool {
        matches!(self.hosts, Hosts::Loopback | Hosts::Network(_))
    }

    /// Whether it matches, whatever the address.
    fn matches_name(&self, target: &Target) -> bool {
        let name = match &target.host {
            Host::Name(name) => name.strip_suffix('.').unwrap_or(name),
            Host::Localhost | Host::Address(_) => "",
        };
        let is_host = match &self.hosts {
            Hosts::Any => true,
            Hosts::Name(wanted) => name == wanted,
            Hosts::Suffix(suffix) => name.ends_with(suffix.as_str()),
            Hosts::Loopback | Hosts::Network(_) => false,
        };
        is_host && self.ports.contains(&target.port)
    }

    fn matches(&self, target: &Target, address: IpAddr) -> bool {
        let is_address = match &self.hosts {
            Hosts::Loopback => address.is_loopback(),
            Hosts::Network(network) => network.contains(&address),
            Hosts::Any | Hosts::Name(_) | Hosts::Suffix(_) => return self.matches_name(target),
        };
        is_address && self.ports.contains(&target.port)
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
        // IPv6 without brackets has no port.
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
            Some(Host::Localhost) => Ok(Hosts::Loopback),
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
        }
    }

    /// Whether `host`, if it resolves to `address`, may be dialed at `port`.
    fn may(policy: &Policy, host: &str, address: &str, port: u16) -> bool {
        let host = Host::parse(host).unwrap();
        let address = SocketAddr::new(address.parse().unwrap(), port);
        !policy
            .permitted(&Target { host, port }, vec![address])
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
            ("::/0", "x", "::ffff:10.0.0.1", 2, false),
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
        assert!(may(&denying, "a.example", "10.0.0.1", 80));
    }

    #[test]
    fn a_name_that_can_only_be_forbidden_is_not_looked_up() {
        let rules_out = |allow: &[&str], deny: &[&str]| {
            let host = Host::parse("a.example").unwrap();
            policy(allow, deny).rules_out(&Target { host, port: 80 })
        };
        assert!(rules_out(&["b.example"], &[]) && rules_out(&["a.example:81"], &[]));
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
            let resolved = resolved.map(|text| text.parse().unwrap()).to_vec();
            policy.permitted(&Target { host, port: 1 }, resolved)
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
            "a.*",
            "*a.example",
            "https://a.example",
        ] {
            assert!(Rule::parse(text).is_err(), "{text:?}");
        }
    }
}
