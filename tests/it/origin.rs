//! Who may use an open daemon from where: the `Origin` and `Host` that clients and web pages send.

use std::fmt::Write as _;

use crate::support::*;

/// An upgrade request for `port` with this `Host` and these header lines.
fn upgrade(host: &str, port: u16, headers: &[&str]) -> String {
    let mut head = format!("GET /tunnel?port={port} HTTP/1.1\r\nHost: {host}\r\n");
    for header in [&UPGRADE[..], headers].concat() {
        write!(head, "{header}\r\n").unwrap();
    }
    head + "\r\n"
}

#[test]
fn an_open_daemon_takes_its_own_host_for_an_origin() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    for (host, origin) in [
        (
            daemon.address.to_string(),
            format!("http://{}", daemon.address),
        ),
        ("localhost:8080".into(), "http://localhost:8080".into()),
        ("localhost".into(), "https://localhost".into()),
        ("[::1]:49983".into(), "http://[::1]:49983".into()),
        ("app.localhost:1".into(), "http://app.localhost:1".into()),
    ] {
        let head = upgrade(&host, target.port, &[&format!("Origin: {origin}")]);
        Client::upgrade(daemon.connect(), head.as_bytes());
    }
}

#[test]
fn another_port_on_the_same_host_is_another_origin() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    for origin in [
        "http://127.0.0.1:3000",
        "http://127.0.0.1",
        "http://localhost:49983",
    ] {
        let head = upgrade(
            "127.0.0.1:49983",
            target.port,
            &[&format!("Origin: {origin}")],
        );
        let answer = daemon.ask(head);
        assert_eq!(answer.status, 403, "{origin}");
        assert!(answer.message().contains("--allow-origin"));
    }
    assert!(!target.was_dialed());
}

/// A page of evil.example, whose name then leads to 127.0.0.1: to the browser the daemon is its own origin.
#[test]
fn a_page_whose_name_was_rebound_is_refused() {
    let target = Target::listen();
    let named = ["--allow-host", "tunneld", "--allow-host", "*.internal"];
    for daemon in [Daemon::start(&[]), Daemon::start(&named)] {
        for host in [
            "evil.example:49983",
            "evil.example",
            "127.0.0.1.evil.example:49983",
            "tunneld.evil.example",
        ] {
            let own = format!("Origin: http://{host}");
            for headers in [&[own.as_str()][..], &[]] {
                let answer = daemon.ask(upgrade(host, target.port, headers));
                assert_eq!(answer.status, 403, "{host} {headers:?}");
                assert!(
                    answer.message().contains("--allow-host"),
                    "{}",
                    answer.message()
                );
                let read = format!("GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n");
                assert_eq!(daemon.ask(read).status, 403, "{host}");
            }
        }
        // The request line counts before the header.
        let head = upgrade("localhost", target.port, &["Origin: http://evil.example"]);
        let head = head.replace("/tunnel", "http://evil.example/tunnel");
        assert_eq!(daemon.ask(head).status, 403);
    }
    assert!(!target.was_dialed());
}

#[test]
fn a_service_is_reached_by_its_name_once_that_is_allowed() {
    let target = Target::echo();
    let mut command = Daemon::command(&["--allow-host", "tunneld"]);
    command.env("TUNNELD_ALLOW_HOST", "other");
    let by_option = Daemon::spawn(command);
    let mut command = Daemon::command(&[]);
    command.env("TUNNELD_ALLOW_HOST", "tunneld,*.svc.cluster.local");
    let by_variable = Daemon::spawn(command);
    for daemon in [&by_option, &by_variable] {
        let host = "tunneld:49983";
        Client::upgrade(daemon.connect(), upgrade(host, target.port, &[]).as_bytes());
        let own = upgrade(host, target.port, &["Origin: http://tunneld:49983"]);
        Client::upgrade(daemon.connect(), own.as_bytes());
        let page = upgrade(host, target.port, &["Origin: http://tunneld:3000"]);
        assert_eq!(daemon.ask(page).status, 403);
    }
    let host = "tunneld.default.svc.cluster.local";
    let head = upgrade(host, target.port, &[]);
    Client::upgrade(by_variable.connect(), head.as_bytes());
    assert_eq!(by_option.ask(head).status, 403);
    assert_eq!(
        by_option.ask(upgrade("other", target.port, &[])).status,
        403
    );
}

#[test]
fn with_a_token_and_named_origins_the_own_host_is_no_origin() {
    let daemon = Daemon::start_closed(&["--allow-origin", "https://app.example"]);
    let token = format!("X-Access-Token: {TOKEN}");
    let head = upgrade("localhost:1", 1, &["Origin: http://localhost:1", &token]);
    let answer = daemon.ask(head);
    assert_eq!(answer.status, 403);
    assert!(answer.message().contains("without --allow-origin"));
    assert!(!answer.message().contains("with a token"));
}

#[test]
fn an_origin_that_no_page_can_have_is_no_option() {
    for (text, advice) in [
        ("wss://app.example", "https://app.example"),
        ("https://*.example", "name each origin"),
    ] {
        let (code, message) = fails_to_start(Daemon::command(&["--allow-origin", text]));
        assert_eq!(code, 2, "{text}");
        assert!(
            message.contains("--allow-origin") && message.contains(advice),
            "{message}"
        );
    }
    let extension = "chrome-extension://abcdefghijklmnopabcdefghijklmnop";
    let daemon = Daemon::start(&["--allow-origin", extension]);
    let target = Target::echo();
    let head = upgrade("localhost", target.port, &[&format!("Origin: {extension}")]);
    Client::upgrade(daemon.connect(), head.as_bytes());
}

#[test]
fn what_is_no_host_name_is_no_option() {
    for text in ["*", "a:80", "http://a", "127.0.0.1", "localhost"] {
        let (code, message) = fails_to_start(Daemon::command(&["--allow-host", text]));
        assert_eq!(code, 2, "{text}");
        assert!(message.contains("--allow-host"), "{message}");
    }
}
