//! Rules of targets: other spellings of an address don't lead around one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use tunneld::exposed::{Host, Policy, Rule, Target};

/// The rules of these texts that are rules, with the texts.
pub fn rules<'a>(texts: impl IntoIterator<Item = &'a str>) -> Vec<(&'a str, Rule)> {
    let rule = |text| Some((text, Rule::parse(text).ok()?));
    texts.into_iter().filter_map(rule).collect()
}

/// All of these hold, for the first `allowed` rules to allow and the others to deny.
pub fn all_hold(rules: &[(&str, Rule)], allowed: usize, host: &Host, address: Ipv6Addr, port: u16) {
    let [.., a, b, c, d] = address.octets();
    let ipv4 = Ipv4Addr::new(a, b, c, d);
    let (allow, deny) = rules.split_at(allowed.min(rules.len()));
    let addresses = [address.into(), ipv4.into(), ipv4.to_ipv6_mapped().into()];
    one_more_rule_does_what_it_says(allow, deny, host, &addresses, port);
    other_spellings_are_the_address(rules, host, ipv4, port);
    a_network_is_its_first_bits(rules);
}

fn policy(allow: &[(&str, Rule)], deny: &[(&str, Rule)]) -> Policy {
    let rules = |rules: &[(&str, Rule)]| rules.iter().map(|(_, rule)| rule.clone()).collect();
    Policy {
        allow: rules(allow),
        deny: rules(deny),
    }
}

/// Whether `policy` permits `address`, if `host` resolves to it.
fn permits(policy: &Policy, host: &Host, address: impl Into<IpAddr>, port: u16) -> bool {
    let target = Target {
        host: host.clone(),
        port,
    };
    !policy
        .permitted(&target, &[SocketAddr::new(address.into(), port)])
        .is_empty()
}

/// Addresses are judged one by one; what is ruled out has none that is permitted; one more rule to deny permits no more,
/// and one more to allow no less.
fn one_more_rule_does_what_it_says(
    allow: &[(&str, Rule)],
    deny: &[(&str, Rule)],
    host: &Host,
    addresses: &[IpAddr],
    port: u16,
) {
    let whole = policy(allow, deny);
    let target = Target {
        host: host.clone(),
        port,
    };
    let sockets: Vec<_> = addresses
        .iter()
        .map(|&address| SocketAddr::new(address, port))
        .collect();
    let permitted = whole.permitted(&target, &sockets);
    let alone = sockets
        .iter()
        .copied()
        .filter(|socket| permits(&whole, host, socket.ip(), port));
    assert_eq!(permitted, alone.collect::<Vec<_>>());
    assert!(permitted.is_empty() || !whole.rules_out(&target));
    if let Some(completed) = whole.completed(&target) {
        assert_eq!(whole.permitted(&completed, &sockets), permitted);
    }
    for &address in addresses {
        for fewer in 0..deny.len() {
            assert!(
                permits(&policy(allow, &deny[..fewer]), host, address, port)
                    || !permits(&whole, host, address, port)
            );
        }
        for fewer in 1..allow.len() {
            assert!(
                permits(&whole, host, address, port)
                    || !permits(&policy(&allow[..fewer], deny), host, address, port)
            );
        }
    }
}

/// What is denied is denied in each spelling, and an IPv4-mapped address is allowed where the address is, and nowhere
/// else.
fn other_spellings_are_the_address(
    rules: &[(&str, Rule)],
    name: &Host,
    address: Ipv4Addr,
    port: u16,
) {
    let as_itself = |address: IpAddr| Host::Address(address);
    let deny = policy(&[], rules);
    let mapped = address.to_ipv6_mapped();
    for spelling in spellings(address).into_iter().chain([mapped]) {
        let denied = !permits(&deny, &as_itself(address.into()), address, port);
        assert!(
            !denied || !permits(&deny, &as_itself(spelling.into()), spelling, port),
            "{address} as {spelling}"
        );
        let denied = !permits(&deny, name, address, port);
        assert!(
            !denied || !permits(&deny, name, spelling, port),
            "{address} as {spelling}"
        );
    }
    let allow = policy(rules, &[]);
    let of_mapped = permits(&allow, &as_itself(mapped.into()), mapped, port);
    assert_eq!(
        permits(&allow, &as_itself(address.into()), address, port),
        of_mapped
    );
}

/// The IPv6 addresses that a gateway or a tunnel may make `address` of.
fn spellings(address: Ipv4Addr) -> Vec<Ipv6Addr> {
    let [a, b, c, d] = address.octets();
    let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    let mut spellings = vec![
        Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low),
        Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, high, low),
        Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
        Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
        Ipv6Addr::new(0x2001, 0, 7, 7, 7, 7, !high, !low),
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0x5efe, high, low),
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0x200, 0x5efe, high, low),
    ];
    // RFC 6052 §2.2; nothing in a place could be another length of the prefix.
    if !address.is_unspecified() {
        let [ab, bc, cd] = [[a, b], [b, c], [c, d]].map(u16::from_be_bytes);
        let [a, b, c, d] = [a, b, c, d].map(u16::from);
        spellings.extend([
            Ipv6Addr::new(0x64, 0xff9b, 1, ab, c, d << 8, 0, 0),
            Ipv6Addr::new(0x64, 0xff9b, 1, 0x0700 | a, b, cd, 0, 0),
            Ipv6Addr::new(0x64, 0xff9b, 1, 7, a, bc, d << 8, 0),
            Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, ab, cd),
        ]);
    }
    spellings
}

/// A network of IPv4 matches the addresses that begin with its bits, at its ports, and no others. Asked are those that
/// differ from it in one bit, and the ports at the edges.
fn a_network_is_its_first_bits(rules: &[(&str, Rule)]) {
    let name = Host::Name("a.example".into());
    for (text, rule) in rules {
        let Some((network, bits, ports)) = network(text) else {
            continue;
        };
        let alone = &[(*text, rule.clone())];
        let (allow, deny) = (policy(alone, &[]), policy(&[], alone));
        for place in 0..=32 {
            // The last place is behind all bits: the network's own address.
            let bit = (1u64 << 32 >> (place + 1)) as u32;
            let address = Ipv4Addr::from(network.to_bits() ^ bit);
            // It leads to another address.
            if address.is_unspecified() {
                continue;
            }
            for port in [
                *ports.start(),
                *ports.end(),
                ports.start() - 1,
                ports.end().saturating_add(1),
            ] {
                let matches = place >= bits && ports.contains(&port);
                let judged = [&allow, &deny].map(|policy| permits(policy, &name, address, port));
                assert_eq!(judged, [matches, !matches], "{text}, {address}:{port}");
            }
        }
    }
}

/// `None` for a text of another form. A network of IPv4-mapped addresses is the IPv4 network.
fn network(text: &str) -> Option<(Ipv4Addr, u32, RangeInclusive<u16>)> {
    let (network, bits) = text.split_once('/')?;
    let (bits, ports) = bits.split_once(':').unwrap_or((bits, "1-65535"));
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let bits: u32 = bits.parse().ok()?;
    let (network, bits) = match network.parse().ok()? {
        IpAddr::V4(network) => (network, bits),
        IpAddr::V6(network) => (network.to_ipv4_mapped()?, bits.checked_sub(96)?),
    };
    Some((network, bits, first.parse().ok()?..=last.parse().ok()?))
}
