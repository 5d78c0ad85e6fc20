//! Rules: a denied address is denied in every spelling, one more rule never does the opposite of what it says, and a network
//! is its first bits. An input is how many rules allow, a port of 2 bytes, an address of 16, and lines: the host, the rules.
#![no_main]

use std::net::Ipv6Addr;

use tunneld::exposed::Host;
use tunneld_fuzz::oracles::policy;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((&[allowed, a, b, ref address @ ..], text)) = input.split_first_chunk::<19>() else {
        return;
    };
    let (Ok(text), port @ 1..) = (str::from_utf8(text), u16::from_be_bytes([a, b])) else {
        return;
    };
    let mut lines = text.split('\n');
    let Some(host) = lines.next().and_then(Host::parse) else {
        return;
    };
    let mut octets = [0; 16];
    octets.copy_from_slice(address);
    // Each rule is tried alone, and with and without those before it.
    let rules = policy::rules(lines.take(8));
    policy::all_hold(&rules, allowed.into(), &host, Ipv6Addr::from(octets), port);
});
