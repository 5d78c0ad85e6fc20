//! Request heads that others test HTTP servers with, and what each gets: the cases of h1spec and of Http11Probe that
//! concern a head. Bodies, pipelining and cookies have no meaning here: a connection carries one request.

use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

use crate::support::*;

/// A name for the case, the head, and the status it gets. 204: it is a sound request for /health.
type Case = (&'static str, &'static str, u16);

const LINES: &[Case] = &[
    ("plain", "GET /health HTTP/1.1\r\nHost: a\r\n\r\n", 204),
    (
        "LF behind the line",
        "GET /health HTTP/1.1\nHost: a\r\n\r\n",
        400,
    ),
    (
        "LF behind a header",
        "GET /health HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
        400,
    ),
    (
        "CR behind the line",
        "GET /health HTTP/1.1\rHost: a\r\n\r\n",
        400,
    ),
    (
        "CR before a header",
        "GET /health HTTP/1.1\r\nHost: a\r\n\rX: y\r\n\r\n",
        400,
    ),
    (
        "CRLF before the line",
        "\r\n\r\nGET /health HTTP/1.1\r\nHost: a\r\n\r\n",
        400,
    ),
    ("spaces for a line", "   \r\n\r\n", 400),
    (
        "two spaces",
        "GET  /health HTTP/1.1\r\nHost: a\r\n\r\n",
        400,
    ),
    (
        "a word before the line",
        "a lineGET /health HTTP/1.1\r\nHost: a\r\n\r\n",
        400,
    ),
    ("no target", "GET HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("no version", "GET /health \r\n\r\n", 400),
    ("HTTP/0.9", "GET /health\r\n\r\n", 400),
    ("HTTP/9.9", "GET /health HTTP/9.9\r\nHost: a\r\n\r\n", 400),
    ("HTTP/1.2", "GET /health HTTP/1.2\r\nHost: a\r\n\r\n", 400),
    (
        "lower-case version",
        "GET /health http/1.1\r\nHost: a\r\n\r\n",
        400,
    ),
    (
        "NUL in the target",
        "GET /he\0alth HTTP/1.1\r\nHost: a\r\n\r\n",
        400,
    ),
    (
        "a target that is not ASCII",
        "GET /h\u{e9}alth HTTP/1.1\r\nHost: a\r\n\r\n",
        400,
    ),
    (
        "lower-case method",
        "get /health HTTP/1.1\r\nHost: a\r\n\r\n",
        405,
    ),
    (
        "another method",
        "POST /health HTTP/1.1\r\nHost: a\r\n\r\n",
        405,
    ),
];

const HEADERS: &[Case] = &[
    ("no Host", "GET /health HTTP/1.1\r\n\r\n", 400),
    (
        "two Hosts",
        "GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        400,
    ),
    (
        "the same Host twice",
        "GET /health HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        400,
    ),
    (
        "a user in Host",
        "GET /health HTTP/1.1\r\nHost: u@a\r\n\r\n",
        400,
    ),
    (
        "a path in Host",
        "GET /health HTTP/1.1\r\nHost: a/p\r\n\r\n",
        400,
    ),
    (
        "Host in capitals, behind a tab",
        "GET /health HTTP/1.1\r\nhoSt:\ta\r\nempty:\r\n\r\n",
        204,
    ),
    (
        "an empty value",
        "GET /health HTTP/1.1\r\nHost: a\r\nX: \r\n\r\n",
        204,
    ),
    (
        "a folded line",
        "GET /health HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n",
        400,
    ),
    (
        "a blank line of a space",
        "GET /health HTTP/1.1\r\n \r\nHost: a\r\n\r\n",
        400,
    ),
    (
        "a space before the colon",
        "GET /health HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n",
        400,
    ),
    (
        "a tab in a name",
        "GET /health HTTP/1.1\r\nHost: a\r\nX\tY: y\r\n\r\n",
        400,
    ),
    (
        "a bracket in a name",
        "GET /health HTTP/1.1\r\nHost: a\r\nX[]: y\r\n\r\n",
        400,
    ),
    (
        "a name that is not ASCII",
        "GET /health HTTP/1.1\r\nHost: a\r\nX\u{eb}: y\r\n\r\n",
        400,
    ),
    (
        "no name",
        "GET /health HTTP/1.1\r\nHost: a\r\n: y\r\n\r\n",
        400,
    ),
    (
        "no colon",
        "GET /health HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
        400,
    ),
    (
        "BEL in a value",
        "GET /health HTTP/1.1\r\nHost: a\r\nX: y\x07\r\n\r\n",
        400,
    ),
    (
        "NUL in a value",
        "GET /health HTTP/1.1\r\nHost: a\r\nX: y\0\r\n\r\n",
        400,
    ),
];

const FRAMING: &[Case] = &[
    (
        "a length of 0",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        204,
    ),
    (
        "a word for a length",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        400,
    ),
    (
        "no length in it",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n",
        400,
    ),
    (
        "a length with a plus",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n",
        400,
    ),
    (
        "a length below 0",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        400,
    ),
    (
        "a hexadecimal length",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\n",
        400,
    ),
    (
        "a length beyond 2^64",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
        400,
    ),
    (
        "a list of lengths",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n",
        400,
    ),
    (
        "two lengths",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        400,
    ),
    (
        "a second length with a space",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length : 5\r\n\r\n",
        400,
    ),
    (
        "chunked and a length",
        "GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
        400,
    ),
    (
        "xchunked and a length",
        "GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\nContent-Length: 5\r\n\r\n",
        400,
    ),
    (
        "a space behind Transfer-Encoding",
        "GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n",
        400,
    ),
];

/// A case whose suite wants one of these, what it gets here, and why.
type Differing = (&'static str, &'static [u16], u16, &'static str);

const DIFFERING: &[Differing] = &[
    (
        "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        &[200, 204],
        404,
        "* is no path of the three that there are",
    ),
    ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", &[400], 404, "the same"),
    (
        "GET /health#f HTTP/1.1\r\nHost: a\r\n\r\n",
        &[200, 204, 400],
        404,
        "no fragment is cut off, so it is part of an unknown path",
    ),
    (
        "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n",
        &[400, 405, 501],
        404,
        "its target is no path",
    ),
    (
        "GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        &[400, 501],
        204,
        "no body is read, whatever its coding: the connection ends behind the answer",
    ),
    (
        "POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        &[200, 204, 404],
        405,
        "nothing here is posted to",
    ),
];

#[test]
fn what_others_want_otherwise_still_differs() {
    let daemon = Daemon::start(&[]);
    for &(head, wanted, status, why) in DIFFERING {
        assert_eq!(daemon.ask(head).status, status, "{why}: {head:?}");
        assert!(!wanted.contains(&status), "no longer differs: {head:?}");
    }
}

#[test]
fn heads_that_others_test_servers_with_get_the_status_of_the_table() {
    let daemon = Daemon::start(&["--allow-host", "a"]);
    for &(name, head, status) in [LINES, HEADERS, FRAMING].into_iter().flatten() {
        assert_eq!(daemon.ask(head).status, status, "{name}: {head:?}");
    }
}

#[test]
fn a_long_head_is_431_wherever_it_is_long() {
    let daemon = Daemon::start(&[]);
    let long = "a".repeat(100_000);
    for head in [
        format!("GET /{long} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        format!("{long} / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: localhost\r\n{long}: b\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: localhost\r\nb: {long}\r\n\r\n"),
        format!(
            "GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n",
            "a: b\r\n".repeat(10_000)
        ),
    ] {
        assert_eq!(daemon.ask(&head).status, 431, "{}", &head[..20]);
    }
}

/// Wherever it is cut, what is sound so far is waited for, and served once the rest has come.
#[test]
fn a_head_in_two_parts_is_waited_for() {
    let daemon = Daemon::start(&[]);
    let head = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let halves = (1..head.len()).map(|at| {
        let mut stream = daemon.connect();
        stream.write_all(&head.as_bytes()[..at]).unwrap();
        (stream, at)
    });
    for (mut stream, at) in halves.collect::<Vec<_>>() {
        stream
            .set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        let early = stream.read(&mut [0]).unwrap_err();
        assert!(
            matches!(early.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
            "{at}: {early}"
        );
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&head.as_bytes()[at..]).unwrap();
        assert_eq!(Answer::read(&mut stream).status, 204, "{at}");
    }
}
