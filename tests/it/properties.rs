//! What holds for every input of what parses: the request head, the parameters and handshake headers, rules, options, the
//! frames of both ends, and capsules. `PROPTEST_CASES` sets how many inputs each property gets.

use std::net::Ipv6Addr;

use proptest::collection::vec;
use proptest::prelude::*;

use tunneld::exposed::{Fault, Handshake, Host, Role, Routed, Upgrade, route};

use crate::frames::unmasked;
use crate::oracles::capsules::{DATA, FINAL_DATA};
use crate::oracles::frames::{Other, decoded_by};
use crate::oracles::options::request_with;
use crate::oracles::request_head::OPEN;
use crate::oracles::{Arrival, capsules, frames, options, policy, request_head};
use crate::support::frame;

fn cases(count: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(count);
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

// The request head

/// Heads that are nearly right: whole ones, with a few bytes replaced, put in or left out.
fn nearly_a_head() -> impl Strategy<Value = Vec<u8>> {
    let line = prop_oneof![
        Just("X: Z\u{fc}rich".to_owned()),
        Just("Content-Length: 5".to_owned()),
        Just("Transfer-Encoding: chunked".to_owned()),
        Just("X-Tunneld-Request-Id: 7".to_owned()),
        "[!-~]{1,12}: [ -~]{0,20}",
        "[ -~]{0,20}",
    ];
    let head = (
        "(GET|POST|[A-Z]{1,8}) [!-~]{1,30} HTTP/1\\.[01]",
        vec(line, 0..6),
    );
    let change = (
        any::<prop::sample::Index>(),
        prop::option::of(any::<u8>()),
        any::<bool>(),
    );
    (head, vec(change, 0..4)).prop_map(|((line, headers), changes)| {
        let mut bytes = format!(
            "{line}\r\nHost: localhost\r\n{}\r\n",
            headers
                .iter()
                .map(|line| format!("{line}\r\n"))
                .collect::<String>()
        )
        .into_bytes();
        for (index, byte, insert) in changes {
            let at = index.index(bytes.len());
            match (byte, insert) {
                (Some(byte), true) => bytes.insert(at, byte),
                (Some(byte), false) => bytes[at] = byte,
                (None, _) => drop(bytes.remove(at)),
            }
            if bytes.is_empty() {
                break;
            }
        }
        bytes
    })
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn a_heads_end_does_not_depend_on_the_reads(bytes in nearly_a_head(), sizes in vec(1usize..40, 0..40)) {
        request_head::ends_where_it_ends(&bytes, &sizes);
    }

    #[test]
    fn what_goes_on_to_tiny_http_is_canonical(bytes in prop_oneof![nearly_a_head(), vec(any::<u8>(), 0..200)]) {
        request_head::is_canonical(&bytes);
    }

    #[test]
    fn tiny_http_takes_every_head_that_the_gate_lets_through(bytes in nearly_a_head()) {
        request_head::is_taken_by_tiny_http(&bytes);
    }

    #[test]
    fn a_head_is_one_by_the_letter_or_refused(bytes in nearly_a_head()) {
        request_head::is_one_by_the_letter(&bytes);
    }

    #[test]
    fn a_connection_brings_a_head_and_all_that_follows(bytes in nearly_a_head(), rest in vec(any::<u8>(), 0..2000)) {
        request_head::is_read_from_a_connection(&[bytes, rest].concat());
    }
}

// Parameters and handshake headers

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn a_host_that_is_accepted_means_itself(text in prop_oneof![".{0,40}", "[a-zA-Z0-9.:\\[\\]%_-]{0,40}", "[0-9x.]{0,12}"]) {
        options::a_host_means_itself(&text);
    }

    #[test]
    fn every_query_gets_a_target_or_a_400(query in prop_oneof!["[ -~]{0,60}", "(port=[0-9+%]{0,7}&?|host=[a-z0-9.%:]{0,9}&?){0,4}"]) {
        let target = format!("/tunnel?{query}");
        let upgrade = crate::support::UPGRADE.map(|line| line.split_once(": ").unwrap());
        let headers = upgrade.map(|(name, value)| (name.to_owned(), value.to_owned()));
        match route(&request_with(target, &headers).unwrap(), &OPEN) {
            Routed::Tunnel(upgrade) => prop_assert!(upgrade.target.port > 0),
            Routed::Metrics => prop_assert!(false, "metrics for a tunnel"),
            Routed::Answer(answer) => prop_assert_eq!(answer.status, 400, "{}", answer.message),
        }
    }

    #[test]
    fn every_set_of_headers_gets_an_answer(headers in vec(
        (prop_oneof!["Connection|Upgrade|Origin|Host|Sec-WebSocket-(Key|Version)|X-Access-Token|Authorization", "[a-zA-Z-]{1,9}"],
         prop_oneof!["websocket|upgrade|13|dGhlIHNhbXBsZSBub25jZQ==|localhost|null", "[ -~]{0,30}"]), 0..9)) {
        let Some(request) = request_with("/tunnel?port=1".into(), &headers) else { return Ok(()) };
        match route(&request, &OPEN) {
            Routed::Tunnel(Upgrade {
                handshake: Handshake::WebSocket { accept, .. },
                ..
            }) => prop_assert_eq!(accept.len(), 28),
            Routed::Tunnel(_) => {}
            Routed::Metrics => prop_assert!(false, "metrics for a tunnel"),
            Routed::Answer(answer) => prop_assert!([400, 403, 426].contains(&answer.status)),
        }
    }
}

// Rules and options

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn no_other_spelling_of_an_address_leads_around_a_rule(
        texts in vec("(\\*|\\*?\\.?[a-c.]{1,3}|localhost|(10|127|0)(\\.[0-2]){3}|::ffff:10(\\.[0-2]){3})(/[0-9]{1,3})?(:[1-3](-[1-3])?)?", 0..5),
        allowed in 0usize..3, host in "[a-c.]{0,5}", address in any::<[u8; 16]>(), is_near in any::<bool>(), port in 1u16..4,
    ) {
        let mut address = address;
        if is_near {
            address[12..].iter_mut().for_each(|byte| *byte %= 3);
            address[12] = [0, 10, 127][usize::from(address[12])];
        }
        let Some(host) = Host::parse(&host) else { return Ok(()) };
        let rules = policy::rules(texts.iter().map(String::as_str));
        policy::all_hold(&rules, allowed, &host, Ipv6Addr::from(address), port);
    }

    #[test]
    fn what_is_accepted_of_an_option_means_the_same_written_in_full(
        text in "([0-9]{1,5}|\\[::1\\]|\\*|localhost|127\\.0\\.0\\.1|box\\.a|\\[|\\]|unix|:|[ -~]{0,3}){0,7}"
    ) {
        options::a_forward_means_the_same_written_in_full(&text);
    }

    #[test]
    fn a_header_of_an_option_is_one_line(text in "[!-~]{1,9}[: ]{1,2}.{0,20}") {
        options::a_header_is_one_line(&text);
    }

    #[test]
    fn the_daemon_dials_what_the_client_was_told(
        url in "(ws|http|wss)://([a-z]{1,3}|\\[::1\\]|[ -~]{1,3})(:[0-9]{1,5})?(/|/tunnel)?(\\?[ -~]{0,9})?",
        to in "(\\[?[a-z.]{0,5}\\]?|\\[[0-9a-f:]{2,9}\\]|[ -~]{0,4}|.{0,4}):[0-9]{1,5}",
    ) {
        options::the_daemon_dials_what_the_client_was_told(&url, &to);
    }
}

// Frames

fn arrival() -> impl Strategy<Value = Arrival> {
    let step = prop_oneof![4 => 1usize..50, 1 => Just(usize::MAX)];
    (0usize..300, step, 14usize..2000, any::<bool>()).prop_map(
        |(early, step, read_size, times_out)| Arrival {
            early,
            step,
            read_size,
            times_out,
        },
    )
}

fn nearly_frames() -> impl Strategy<Value = Vec<u8>> {
    let usual = vec![0x82, 0x02, 0x00, 0x80, 0x88, 0x89, 0xfe, 0xff];
    vec(
        prop_oneof![2 => any::<u8>(), 1 => prop::sample::select(usual)],
        0..400,
    )
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    let size = prop_oneof![4 => 0usize..200, 1 => 60_000usize..70_000];
    (size, any::<u8>()).prop_map(|(size, seed)| {
        (0..size)
            .map(|n| (n as u8).wrapping_mul(31) ^ seed)
            .collect()
    })
}

proptest! {
    #![proptest_config(cases(500))]

    /// Messages, whole and in fragments, with pings between them.
    #[test]
    fn bytes_come_out_as_they_went_in(
        messages in vec((vec(payload(), 1..4), any::<bool>()), 0..6),
        early in 0usize..300, step in prop_oneof![1usize..5000, Just(usize::MAX)], room in 14usize..200_000,
        role in prop_oneof![Just(Role::Daemon), Just(Role::Client)],
    ) {
        let frame = if role == Role::Daemon { frame } else { unmasked };
        let (mut wire, mut bytes, mut pings) = (Vec::new(), Vec::<u8>::new(), 0);
        for (fragments, ping) in &messages {
            for (n, fragment) in fragments.iter().enumerate() {
                let opcode = if n == 0 { 0x02 } else { 0x00 };
                let last = if n + 1 == fragments.len() { 0x80 } else { 0x00 };
                wire.extend(frame(opcode | last, fragment));
                bytes.extend(fragment);
                if *ping {
                    wire.extend(frame(0x89, b"ping"));
                    pings += 1;
                }
            }
        }
        let arrival = Arrival { early, step, read_size: room, times_out: false };
        let (out, others, fault) = decoded_by(role, &wire, arrival, false);
        prop_assert!(out == bytes, "{} of {} bytes", out.len(), bytes.len());
        let expected: Vec<_> = (0..pings).map(|_| Other::Ping(b"ping".into())).collect();
        prop_assert_eq!(others, expected);
        prop_assert_eq!(fault, Fault::Eof);
    }

    /// Any bytes: no panic, and the same outcome however they arrive.
    #[test]
    fn any_bytes_are_judged_alike_however_they_arrive(
        wire in nearly_frames(), arrival in arrival(),
        role in prop_oneof![Just(Role::Daemon), Just(Role::Client)],
    ) {
        frames::are_the_same_however_they_arrive(role, &wire, arrival);
    }

    #[test]
    fn any_bytes_are_judged_as_by_tungstenite(
        wire in nearly_frames(), role in prop_oneof![Just(Role::Daemon), Just(Role::Client)],
    ) {
        frames::mean_what_tungstenite_says(role, &wire);
    }
}

// Capsules

/// A variable-length integer in 1 << `size` bytes, or as many as it needs (RFC 9000 §16).
fn integer(value: u64, size: usize) -> Vec<u8> {
    let needed = [0x40, 0x4000, 0x4000_0000, 1 << 62];
    let size = (0..4).find(|&n| n >= size && value < needed[n]).unwrap();
    let mut bytes = value.to_be_bytes()[8 - (1 << size)..].to_vec();
    bytes[0] |= (size as u8) << 6;
    bytes
}

fn capsule() -> impl Strategy<Value = (u64, usize, Vec<u8>)> {
    let of_type = prop_oneof![6 => Just(DATA), 1 => Just(FINAL_DATA), 2 => 0u64..1 << 62];
    (of_type, 0usize..4, payload())
}

proptest! {
    #![proptest_config(cases(500))]

    /// Up to the first FINAL_DATA, behind which only unknown types may come.
    #[test]
    fn the_payload_of_capsules_comes_out_as_it_went_in(
        sent in vec(capsule(), 0..6), early in 0usize..300,
        step in prop_oneof![1usize..5000, Just(usize::MAX)], room in 14usize..200_000, splices in any::<bool>(),
    ) {
        let (mut wire, mut bytes, mut ends, mut is_sound) = (vec![], Vec::<u8>::new(), vec![], true);
        for (of_type, size, payload) in &sent {
            wire.extend(integer(*of_type, *size));
            wire.extend(integer(payload.len() as u64, *size));
            wire.extend(payload);
            let is_data = [DATA, FINAL_DATA].contains(of_type);
            is_sound &= !is_data || ends.is_empty();
            if is_data && is_sound {
                bytes.extend(payload);
            }
            if *of_type == FINAL_DATA && is_sound {
                ends.push(bytes.len());
            }
        }
        let arrival = Arrival { early, step, read_size: room, times_out: false };
        let (found, found_ends, fault) = capsules::decoded(&wire, arrival, splices);
        prop_assert!(found == bytes, "{} of {} bytes", found.len(), bytes.len());
        prop_assert_eq!(found_ends, ends);
        prop_assert_eq!(fault == Fault::Eof, is_sound);
    }

    /// Any bytes: no panic, and the same outcome however they arrive.
    #[test]
    fn any_capsules_are_judged_alike_however_they_arrive(
        pieces in vec(prop_oneof![
            vec(any::<u8>(), 0..40),
            Just(integer(DATA, 2)), Just(integer(FINAL_DATA, 2)), Just(integer(FINAL_DATA, 3)),
            (0u64..9000).prop_map(|length| integer(length, 0)), payload(),
        ], 0..8),
        arrival in arrival(),
    ) {
        capsules::are_the_same_however_they_arrive(&pieces.concat(), arrival);
    }
}
