//! What holds for every input of what parses: the request head, the parameters and handshake headers, and
//! the frame path of inbound. `PROPTEST_CASES` sets how many inputs each property gets.

use proptest::collection::vec;
use proptest::prelude::*;
use tiny_http::{HTTPVersion, Header, Method};
use tungstenite::Message;

use tunneld::dial::{Host, Target};
use tunneld::http::Request;
use tunneld::http::routes::{Passed, Rules, route};
use tunneld::request_head::{RequestHead, Scanner, parse};

use crate::frames::decoded;
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
        Just("Host: localhost".to_owned()),
        Just("Content-Length: 5".to_owned()),
        Just("Transfer-Encoding: chunked".to_owned()),
        Just("X-Tunneld-Ticket: 7".to_owned()),
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
            "{line}\r\n{}\r\n",
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

/// What is found in `bytes` when they come in reads of these sizes: where the head ends, or that it can't.
fn scanned(bytes: &[u8], sizes: &[usize]) -> Option<Option<usize>> {
    let mut scanner = Scanner::default();
    let mut seen = 0;
    for size in sizes.iter().copied().chain([bytes.len()]) {
        seen = (seen + size).min(bytes.len());
        match scanner.find_end(&bytes[..seen]) {
            Ok(None) => {}
            Ok(end) => return Some(end),
            Err(_) => return None,
        }
    }
    Some(None)
}

fn printed(head: &RequestHead) -> Vec<u8> {
    head.with_first_header("X-Tunneld-Ticket", 1)
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn a_heads_end_does_not_depend_on_the_reads(bytes in nearly_a_head(), sizes in vec(1usize..40, 0..40)) {
        prop_assert_eq!(scanned(&bytes, &sizes), scanned(&bytes, &[]));
    }

    #[test]
    fn what_goes_on_to_tiny_http_is_canonical(bytes in prop_oneof![nearly_a_head(), vec(any::<u8>(), 0..200)]) {
        let Some(Some(end)) = scanned(&bytes, &[]) else { return Ok(()) };
        let Ok(head) = parse(&bytes[..end]) else { return Ok(()) };
        let once = printed(&head);
        let text = String::from_utf8(once.clone()).unwrap();
        prop_assert!(text.is_ascii() && text.ends_with("\r\n\r\n") && !text[..text.len() - 2].contains("\r\n\r\n"));
        prop_assert!(text.lines().nth(1).unwrap() == "X-Tunneld-Ticket: 1");
        let lower = text.to_lowercase();
        for framing in ["\r\ncontent-length:", "\r\ntransfer-encoding:", "\r\nexpect:"] {
            prop_assert!(!lower.contains(framing), "{}", text);
        }
        prop_assert_eq!(scanned(&once, &[]), Some(Some(once.len())));
        prop_assert!(parse(&once).is_ok(), "{}", text);
    }
}

// Parameters and handshake headers

fn request_with(target: String, headers: &[(String, String)]) -> Option<Request> {
    let headers = headers
        .iter()
        .map(|(name, value)| Header::from_bytes(name.as_bytes(), value.as_bytes()));
    let headers: Result<Vec<_>, ()> = headers.collect();
    Some(Request::new(
        Method::Get,
        target,
        HTTPVersion(1, 1),
        headers.ok()?,
    ))
}

const OPEN: Rules = Rules {
    access: None,
    allow_origin: Vec::new(),
};

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn a_host_that_is_accepted_means_itself(text in prop_oneof![".{0,40}", "[a-zA-Z0-9.:\\[\\]%_-]{0,40}", "[0-9x.]{0,12}"]) {
        let Some(host) = Host::parse(&text) else { return Ok(()) };
        let shown = Target { host: host.clone(), port: 1 }.to_string();
        let shown = shown.strip_suffix(":1").unwrap();
        prop_assert!(shown.chars().all(|c| c.is_ascii_graphic() && !"%/@#?\\".contains(c)), "{}", shown);
        prop_assert_eq!(Host::parse(shown), Some(host));
    }

    #[test]
    fn every_query_gets_a_target_or_a_400(query in prop_oneof!["[ -~]{0,60}", "(port=[0-9+%]{0,7}&?|host=[a-z0-9.%:]{0,9}&?){0,4}"]) {
        let target = format!("/tunnel?{query}");
        let upgrade = crate::support::UPGRADE.map(|line| line.split_once(": ").unwrap());
        let headers = upgrade.map(|(name, value)| (name.to_owned(), value.to_owned()));
        match route(&request_with(target, &headers).unwrap(), &OPEN) {
            Ok(Passed::Tunnel(upgrade)) => prop_assert!(upgrade.target.port > 0),
            Ok(Passed::Metrics) => prop_assert!(false, "metrics for a tunnel"),
            Err(answer) => prop_assert_eq!(answer.status, 400, "{}", answer.message),
        }
    }

    #[test]
    fn every_set_of_headers_gets_an_answer(headers in vec(
        (prop_oneof!["Connection|Upgrade|Origin|Host|Sec-WebSocket-(Key|Version)|X-Access-Token", "[a-zA-Z-]{1,9}"],
         prop_oneof!["websocket|upgrade|13|dGhlIHNhbXBsZSBub25jZQ==|localhost|null", "[ -~]{0,30}"]), 0..9)) {
        let Some(request) = request_with("/tunnel?port=1".into(), &headers) else { return Ok(()) };
        match route(&request, &OPEN) {
            Ok(Passed::Tunnel(upgrade)) => prop_assert_eq!(upgrade.accept.len(), 28),
            Ok(Passed::Metrics) => prop_assert!(false, "metrics for a tunnel"),
            Err(answer) => prop_assert!([400, 403, 426].contains(&answer.status)),
        }
    }
}

// Frames

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
    ) {
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
        let (out, others, error) = decoded(&wire, early, step, room);
        prop_assert!(out == bytes, "{} of {} bytes", out.len(), bytes.len());
        prop_assert_eq!(others, vec![Message::Ping("ping".into()); pings]);
        prop_assert!(error.contains("without closing handshake"), "{}", error);
    }

    /// Any bytes: no panic, and the same outcome however they arrive.
    #[test]
    fn any_bytes_are_judged_alike_however_they_arrive(
        wire in vec(prop_oneof![2 => any::<u8>(), 1 => prop::sample::select(vec![0x82, 0x02, 0x00, 0x80, 0x88, 0x89, 0xfe, 0xff])], 0..400),
        early in 0usize..300, step in 1usize..50, room in 14usize..2000,
    ) {
        let whole = decoded(&wire, 0, usize::MAX, 4096);
        let pieces = decoded(&wire, early, step, room);
        prop_assert_eq!(whole, pieces);
    }
}
