//! The table of answers, row by row, and the order of its rows.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use crate::support::*;

fn with_token() -> String {
    format!("X-Access-Token: {TOKEN}")
}

// Row 1

#[test]
fn a_head_over_16_kib_is_431() {
    let daemon = Daemon::start(&[]);
    let answer = daemon.ask(format!(
        "GET /health HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n",
        "x".repeat(16 * 1024)
    ));
    assert_eq!(answer.status, 431);
    assert!(answer.message().contains("16384 bytes"));
}

#[test]
fn a_head_of_just_16_kib_is_served() {
    let daemon = Daemon::start(&[]);
    let head = |filler: usize| {
        format!(
            "GET /health HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n",
            "x".repeat(filler)
        )
    };
    let filler = 16 * 1024 - head(0).len();
    assert_eq!(daemon.ask(head(filler)).status, 204);
    assert_eq!(daemon.ask(head(filler + 1)).status, 431);
}

#[test]
fn a_head_with_over_100_headers_is_431() {
    let daemon = Daemon::start(&[]);
    assert_eq!(daemon.get("/health", &["A: b"; 101]).status, 431);
}

#[test]
fn a_head_not_finished_in_time_is_408_however_it_trickles() {
    let daemon = Daemon::start(&["--head-timeout", "300ms"]);
    let start = Instant::now();
    let mut stream = daemon.connect();
    let mut trickler = stream.try_clone().unwrap();
    let trickle = thread::spawn(move || {
        for byte in request(
            "GET",
            "/health",
            &["X: 0123456789012345678901234567890123456789"],
        )
        .bytes()
        {
            if trickler.write_all(&[byte]).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    let answer = Answer::read(&mut stream);
    assert_eq!(answer.status, 408);
    assert!(answer.message().contains("300ms"));
    assert!(start.elapsed() >= Duration::from_millis(300));
    trickle.join().unwrap();
}

#[test]
fn a_malformed_head_is_400_at_once() {
    let daemon = Daemon::start(&[]);
    for head in [
        &b"\r\n\r\n"[..],
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health HTTP/1.1\nHost: localhost\n\n",
        b"GET /health?\xc3\xa4 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\xc3\xa4: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: \x7f\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: b\xc3\xbccher.example\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\r\n folded\r\n\r\n",
        b"GET /health HTTP/3.0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let answer = daemon.ask(head);
        assert_eq!(answer.status, 400, "{head:?}");
        answer.message();
    }
}

#[test]
fn a_value_that_is_not_ascii_is_let_through() {
    let daemon = Daemon::start_closed(&[]);
    let target = Target::echo();
    for value in ["Z\u{fc}rich", "\u{6771}\u{4eac}", "a\tb: \u{fc}", "\u{fc}"] {
        let header = format!("cf-ipcity: {value}");
        assert_eq!(daemon.get("/health", &[&header]).status, 204, "{value:?}");
        let url = format!("/tunnel?port={}", target.port);
        Client::open_with(&daemon, &url, &[&header, &with_token()]);
    }
    let latin1 = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: Z\xfcrich\xff\r\n\r\n";
    assert_eq!(daemon.ask(latin1).status, 204);
}

/// It is there, and wrong: not the same as a header that is missing.
#[test]
fn a_deciding_header_that_is_not_ascii_is_wrong() {
    let token = with_token();
    let bad = |header: &'static str| {
        let name = header.split(':').next().unwrap();
        let rest = UPGRADE.into_iter().filter(|line| !line.starts_with(name));
        rest.chain([header]).collect::<Vec<_>>()
    };
    let closed = Daemon::start_closed(&["--allow-origin", "https://app.example"]);
    let wrong = closed.get("/openapi.yaml", &[&format!("{token}\u{fc}")]);
    assert_eq!(wrong.status, 401);
    assert!(wrong.message().contains("wrong"), "{}", wrong.body);
    let repeated = closed.get("/openapi.yaml", &[&token, "X-Access-Token: \u{fc}"]);
    assert_eq!(repeated.status, 401);
    for (headers, status) in [
        (bad("Origin: https://app.example\u{fc}"), 403),
        (bad("Upgrade: websocket\u{fc}"), 426),
        (bad("Connection: upgrade\u{fc}"), 426),
        (bad("Sec-WebSocket-Version: 13\u{fc}"), 426),
        (bad("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ\u{fc}"), 400),
        (bad("Content-Length: 1\u{fc}"), 400),
        (bad("Transfer-Encoding: \u{fc}"), 400),
    ] {
        let headers = [&headers[..], &[&token]].concat();
        let answer = closed.get("/tunnel?port=1", &headers);
        assert_eq!(answer.status, status, "{headers:?}");
    }
    let open = Daemon::start(&[]);
    let origin = open.get_upgrade("/tunnel?port=1", &["Origin: \u{fc}"]);
    assert_eq!(origin.status, 403);
}

#[test]
fn http_1_1_without_a_host_is_400() {
    let daemon = Daemon::start(&[]);
    for target in ["/health", "http://localhost/health"] {
        let answer = daemon.ask(format!("GET {target} HTTP/1.1\r\nX: y\r\n\r\n"));
        assert_eq!(answer.status, 400, "{target}");
        assert!(answer.message().contains("Host"), "{}", answer.body);
    }
    assert_eq!(
        daemon.ask("GET /health HTTP/1.1\r\nHost:\r\n\r\n").status,
        204
    );
}

#[test]
fn a_head_that_ends_before_its_blank_line_is_400() {
    let daemon = Daemon::start(&[]);
    let mut stream = daemon.connect();
    stream.write_all(b"GET /health HTTP/1.1\r\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(Answer::read(&mut stream).status, 400);
}

// Row 2

#[test]
fn over_the_connection_limit_is_503_with_retry_after() {
    let daemon = Daemon::start(&["--max-connections", "2"]);
    let target = Target::echo();
    let _tunnels = [
        Client::open(&daemon, target.port),
        Client::open(&daemon, target.port),
    ];
    let answer = daemon.get("/health", &[]);
    assert_eq!(answer.status, 503);
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert!(answer.message().contains("connection limit"));
}

#[test]
fn a_slot_is_free_again_when_its_tunnel_has_ended() {
    let daemon = Daemon::start(&["--max-connections", "1"]);
    let target = Target::echo();
    for _ in 0..3 {
        let mut client = Client::open(&daemon, target.port);
        assert_eq!(daemon.get("/health", &[]).status, 503);
        client.send_close(1000);
        assert_eq!(client.see_all().1, CLOSE_1000);
        drop(client);
        within(LIMIT, "the slot is free", || {
            (daemon.get("/health", &[]).status == 204).then_some(())
        });
    }
}

// Row 3

#[test]
fn health_is_204_without_a_token() {
    let daemon = Daemon::start_closed(&[]);
    for method in ["GET", "HEAD"] {
        let answer = daemon.ask(request(method, "/health", &[]));
        assert_eq!((answer.status, answer.body.as_str()), (204, ""), "{method}");
        assert_eq!(answer.header("connection"), Some("close"));
    }
    let answer = daemon.ask(request("POST", "/health", &[]));
    assert_eq!(
        (answer.status, answer.header("allow")),
        (405, Some("GET, HEAD"))
    );
}

#[test]
fn an_old_client_is_answered_in_its_version() {
    let daemon = Daemon::start(&[]);
    assert_eq!(daemon.ask("GET /health HTTP/1.0\r\n\r\n").status, 204);
    assert_eq!(daemon.ask("GET /nothing HTTP/1.0\r\n\r\n").status, 404);
}

// Row 4

#[test]
fn a_missing_or_wrong_token_is_401_on_every_other_path() {
    let daemon = Daemon::start_closed(&[]);
    let longer = format!("X-Access-Token: {TOKEN}x");
    let repeated = [with_token(), with_token()];
    let repeated = [repeated[0].as_str(), &repeated[1]];
    for path in [
        "/",
        "/tunnel",
        "/tunnel?port=0",
        "/openapi.yaml",
        "/nothing",
        "*",
    ] {
        for headers in [
            &[][..],
            &["X-Access-Token: wrong"],
            &["X-Access-Token:"],
            &[longer.as_str()],
            &repeated,
        ] {
            let answer = daemon.get_upgrade(path, headers);
            assert_eq!(answer.status, 401, "{path} {headers:?}");
            assert!(answer.message().contains("X-Access-Token"));
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        }
    }
}

#[test]
fn the_right_token_opens_a_tunnel() {
    let daemon = Daemon::start_closed(&[]);
    let target = Target::echo();
    let url = format!("/tunnel?port={}", target.port);
    Client::open_with(&daemon, &url, &[&with_token()]);
    Client::open_with(&daemon, &url, &[&with_token().to_lowercase()]);
}

#[test]
fn a_bearer_token_is_one_too() {
    let daemon = Daemon::start_closed(&[]);
    let status = |headers: &[&str]| daemon.get("/openapi.yaml", headers).status;
    for header in [
        format!("Authorization: Bearer {TOKEN}"),
        format!("authorization: bEARER {TOKEN}"),
        format!("Authorization:  Bearer   {TOKEN} "),
    ] {
        assert_eq!(status(&[&header]), 200, "{header}");
    }
    for header in [
        format!("Authorization: {TOKEN}"),
        format!("Authorization: Basic {TOKEN}"),
        format!("Authorization: Bearer{TOKEN}"),
        format!("Authorization: Bearer {TOKEN}x"),
        format!("Authorization: Bearer {TOKEN}\u{fc}"),
        format!("Authorization: Bearer {TOKEN}, Bearer {TOKEN}"),
        format!("Proxy-Authorization: Bearer {TOKEN}"),
        "Authorization: Bearer".to_owned(),
        "Authorization: Bearer ".to_owned(),
        "Authorization:".to_owned(),
    ] {
        let answer = daemon.get("/openapi.yaml", &[&header]);
        assert_eq!(answer.status, 401, "{header}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        assert!(!answer.body.contains("s3cret"), "{}", answer.body);
    }
    let (right, wrong) = (with_token(), "X-Access-Token: wrong");
    let bearer = format!("Authorization: Bearer {TOKEN}");
    assert_eq!(status(&[&bearer, &bearer]), 401);
    assert_eq!(status(&[&bearer, wrong]), 401, "X-Access-Token decides");
    assert_eq!(status(&[&bearer, "X-Access-Token:"]), 401);
    assert_eq!(status(&[&right, "Authorization: Basic eDp5"]), 200);
    assert_eq!(status(&[&right, &bearer, &bearer]), 200);
    let target = Target::echo();
    let url = format!("/tunnel?port={}", target.port);
    Client::open_with(&daemon, &url, &[&bearer]);
    assert!(!daemon.log().contains("s3cret"), "{}", daemon.log());
}

// Row 5

#[test]
fn a_slash_behind_tunnel_does_not_matter() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let url = format!("/tunnel/?port={}", target.port);
    Client::open_with(&daemon, &url, &[]);
    assert_eq!(daemon.ask(request("POST", "/tunnel/", &[])).status, 405);
}

#[test]
fn an_unknown_path_is_404() {
    let daemon = Daemon::start_closed(&[]);
    for path in ["/", "/tunnel//", "/Tunnel", "/tunnels", "/%74unnel", "*"] {
        let answer = daemon.get_upgrade(path, &[&with_token()]);
        assert_eq!(answer.status, 404, "{path}");
        answer.message();
    }
}

#[test]
fn another_method_is_405_with_allow() {
    let daemon = Daemon::start_closed(&[]);
    for (path, allow) in [
        ("/tunnel?port=1", "GET"),
        ("/openapi.yaml", "GET, HEAD"),
        ("/health", "GET, HEAD"),
    ] {
        for method in [
            "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW", "get",
        ] {
            let answer =
                daemon.ask(request(method, path, &[&with_token(), "Content-Length: 3"]) + "abc");
            assert_eq!(
                (answer.status, answer.header("allow")),
                (405, Some(allow)),
                "{method} {path}"
            );
            answer.message();
        }
    }
    let answer = daemon.ask(request("HEAD", "/tunnel?port=1", &[&with_token()]));
    assert_eq!((answer.status, answer.body.as_str()), (405, ""));
}

// Row 6

#[test]
fn a_bad_port_is_400_and_named() {
    let daemon = Daemon::start(&[]);
    for (query, named) in [
        ("", "port is missing"),
        ("?", "port is missing"),
        ("?host=localhost", "port is missing"),
        ("?PORT=80", "port is missing"),
        ("?port=", "\"\""),
        ("?port=0", "\"0\""),
        ("?port=65536", "\"65536\""),
        ("?port=-1", "\"-1\""),
        ("?port=%2B80", "\"+80\""),
        ("?port=+80", "\" 80\""),
        ("?port=http", "\"http\""),
        ("?port=80.0", "\"80.0\""),
        ("?port=80%00", "\"80\\0\""),
        (
            "?port=80&port=80",
            "parameter port is given more than once: \"80\" and \"80\"",
        ),
        ("?port=99999999999999999999", "\"99999999999999999999\""),
    ] {
        let answer = daemon.get_upgrade(&format!("/tunnel{query}"), &[]);
        assert_eq!(answer.status, 400, "{query}");
        let message = answer.message();
        assert!(
            message.contains("port") && message.contains(named),
            "{query}: {message}"
        );
    }
}

#[test]
fn a_bad_host_is_400_and_named() {
    let daemon = Daemon::start(&[]);
    for (host, named) in [
        ("a%20b", "\"a b\""),
        ("a%2Fb", "\"a/b\""),
        ("a:80", "\"a:80\""),
        ("[::1", "\"[::1\""),
        ("a..b", "\"a..b\""),
        ("%2568ost", "\"%68ost\""),
        ("a%0d%0ab", "\"a\\r\\nb\""),
        ("256.256.256.256", "\"256.256.256.256\""),
        (
            "a&host=b",
            "parameter host is given more than once: \"a\" and \"b\"",
        ),
    ] {
        let answer = daemon.get_upgrade(&format!("/tunnel?port=80&host={host}"), &[]);
        assert_eq!(answer.status, 400, "{host}");
        let message = answer.message();
        assert!(
            message.contains("host") && message.contains(named),
            "{host}: {message}"
        );
    }
}

#[test]
fn other_parameters_do_not_matter() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    Client::open_with(
        &daemon,
        &format!("/tunnel?x=1&port={}&x=2&y", target.port),
        &[],
    );
}

// Row 7

#[test]
fn what_is_no_upgrade_is_426() {
    let daemon = Daemon::start(&[]);
    let with = |replaced: usize, by: &'static str| {
        let mut headers = UPGRADE;
        headers[replaced] = by;
        headers
    };
    for headers in [
        &[][..],
        &with(0, "Connection: close"),
        &with(1, "Upgrade: h2c"),
        &with(1, "X: y"),
    ] {
        let answer = daemon.get("/tunnel?port=80", headers);
        assert_eq!(answer.status, 426, "{headers:?}");
        assert_eq!(answer.header("upgrade"), Some("websocket, connect-tcp-12"));
        answer.message();
    }
}

#[test]
fn another_version_is_426_with_ours() {
    let daemon = Daemon::start(&[]);
    for version in [
        "X: y",
        "Sec-WebSocket-Version: 8",
        "Sec-WebSocket-Version: 013",
    ] {
        let answer = daemon.get(
            "/tunnel?port=80",
            &[UPGRADE[0], UPGRADE[1], version, UPGRADE[3]],
        );
        assert_eq!(
            (answer.status, answer.header("sec-websocket-version")),
            (426, Some("13")),
            "{version}"
        );
    }
}

#[test]
fn a_bad_key_is_400() {
    let daemon = Daemon::start(&[]);
    for key in [
        "X: y",
        "Sec-WebSocket-Key: short",
        "Sec-WebSocket-Key: ",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=!",
    ] {
        let answer = daemon.get(
            "/tunnel?port=80",
            &[UPGRADE[0], UPGRADE[1], UPGRADE[2], key],
        );
        assert_eq!(answer.status, 400, "{key}");
        assert!(answer.message().contains("Sec-WebSocket-Key"));
    }
    assert_eq!(
        daemon
            .get("/tunnel?port=80", &[&UPGRADE[..], &UPGRADE[3..]].concat())
            .status,
        400
    );
}

#[test]
fn an_upgrade_with_a_body_is_400() {
    let daemon = Daemon::start(&[]);
    for framing in ["Content-Length: 3", "Transfer-Encoding: chunked"] {
        let answer = daemon.get_upgrade("/tunnel?port=80", &[framing]);
        assert_eq!(answer.status, 400, "{framing}");
        assert!(answer.message().contains("body"));
    }
}

#[test]
fn header_lists_and_cases_are_understood() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let head = request(
        "GET",
        &format!("/tunnel?port={}", target.port),
        &[
            "CONNECTION: keep-alive, UPGRADE",
            "upgrade: WebSocket",
            UPGRADE[2],
            UPGRADE[3],
            "Sec-WebSocket-Protocol: chat",
        ],
    );
    Client::upgrade(daemon.connect(), head.as_bytes());
}

// Row 8

#[test]
fn an_open_daemon_refuses_web_pages() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let url = format!("/tunnel?port={}", target.port);
    for origin in [
        "Origin: https://evil.example",
        "Origin: null",
        "Origin: http://localhost:3000",
    ] {
        let answer = daemon.get_upgrade(&url, &[origin]);
        assert_eq!(answer.status, 403, "{origin}");
        assert!(answer.message().contains("--allow-origin"));
    }
    assert!(!target.was_dialed());
}

#[test]
fn an_open_daemon_answers_to_no_foreign_host() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let ask = |host: &str| {
        let head = request("GET", &format!("/tunnel?port={}", target.port), &UPGRADE);
        let mut stream = daemon.connect();
        stream
            .write_all(
                head.replace("Host: localhost", &format!("Host: {host}"))
                    .as_bytes(),
            )
            .unwrap();
        stream
    };
    for host in [
        "evil.example",
        "evil.example:49983",
        "localhost.evil.example",
    ] {
        let answer = Answer::read(&mut ask(host));
        assert_eq!(answer.status, 403, "{host}");
        assert!(answer.message().contains(host));
    }
    for host in [
        "localhost:49983",
        "127.0.0.1:49983",
        "[::1]:49983",
        "10.1.2.3",
    ] {
        Client::expect_101(ask(host));
    }
}

#[test]
fn an_absolute_target_is_taken_and_its_host_counts() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    Client::open_with(
        &daemon,
        &format!("http://localhost/tunnel?port={}", target.port),
        &[],
    );
    let answer = daemon.get_upgrade(
        &format!("http://evil.example/tunnel?port={}", target.port),
        &[],
    );
    assert_eq!(answer.status, 403);
}

#[test]
fn a_path_is_compared_as_it_was_sent() {
    let daemon = Daemon::start(&[]);
    for path in [
        "/public/%2e%2e/metrics",
        "/public/../metrics",
        "/./metrics",
        "/%6detrics",
        "//metrics",
        "/public/%2e%2e/health",
    ] {
        for target in [path.to_owned(), format!("http://localhost{path}")] {
            assert_eq!(daemon.get(&target, &[]).status, 404, "{target}");
        }
    }
    assert_eq!(daemon.get("http://localhost/metrics", &[]).status, 200);
    assert_eq!(daemon.get("http://evil@localhost/metrics", &[]).status, 400);
}

#[test]
fn a_named_origin_may_and_others_may_not() {
    let target = Target::echo();
    let url = format!("/tunnel?port={}", target.port);
    let token = with_token();
    let options = [
        "--allow-origin",
        "https://app.example",
        "--allow-origin",
        "http://localhost:3000",
    ];
    for (daemon, token) in [
        (Daemon::start(&options), "X: y"),
        (Daemon::start_closed(&options), &token),
    ] {
        for origin in [
            "Origin: https://app.example",
            "Origin: http://localhost:3000",
        ] {
            Client::open_with(&daemon, &url, &[origin, token]);
        }
        Client::open_with(&daemon, &url, &[token]);
        for origin in [
            "Origin: http://app.example",
            "Origin: https://app.example:444",
            "Origin: null",
        ] {
            assert_eq!(
                daemon.get_upgrade(&url, &[origin, token]).status,
                403,
                "{origin}"
            );
        }
    }
}

#[test]
fn with_a_token_any_origin_and_host_may() {
    let daemon = Daemon::start_closed(&[]);
    let target = Target::echo();
    let head = request(
        "GET",
        &format!("/tunnel?port={}", target.port),
        &[
            &UPGRADE[..],
            &[&with_token(), "Origin: https://any.example"],
        ]
        .concat(),
    );
    Client::upgrade(
        daemon.connect(),
        head.replace("Host: localhost", "Host: any.example")
            .as_bytes(),
    );
}

// Row 9

#[test]
fn a_refused_dial_is_502_naming_target_and_reason() {
    let daemon = Daemon::start(&[]);
    let closed = closed_port();
    let port = closed.port;
    let answer = daemon.get_upgrade(&format!("/tunnel?port={port}"), &[]);
    assert_eq!(answer.status, 502);
    let message = answer.message();
    assert!(
        message.contains(&format!("localhost:{port}")) && message.contains("refused"),
        "{message}"
    );
    daemon.logged(1, &["refused:", "status=502", &format!("localhost:{port}")]);
}

#[test]
fn a_name_that_does_not_resolve_is_502() {
    let daemon = Daemon::start(&[]);
    let answer = daemon.get_upgrade("/tunnel?port=80&host=nothing.invalid", &[]);
    assert_eq!(answer.status, 502);
    let message = answer.message();
    assert!(
        message.contains("nothing.invalid:80") && message.contains("resolve"),
        "{message}"
    );
}

/// A listener whose queue is full takes no connection and refuses none; the streams fill its queue.
fn deaf_target() -> (TcpListener, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let address = listener.local_addr().unwrap();
    let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(200));
    let filling = std::iter::from_fn(|| connect().ok()).collect();
    (listener, filling)
}

#[test]
fn a_target_that_never_answers_is_502_after_the_dial_timeout() {
    let daemon = Daemon::start(&["--dial-timeout", "300ms"]);
    let (listener, _filling) = deaf_target();
    let port = listener.local_addr().unwrap().port();
    let start = Instant::now();
    let answer = daemon.get_upgrade(&format!("/tunnel?host=127.0.0.1&port={port}"), &[]);
    assert_eq!(answer.status, 502);
    let message = answer.message();
    assert!(
        message.contains("timed out while connecting")
            && message.contains(&format!("127.0.0.1:{port}")),
        "{message}"
    );
    assert!(start.elapsed() >= Duration::from_millis(300));
}

/// A request for a tunnel to `target`, with `more` behind its head.
fn ask_for(daemon: &Daemon, target: &str, more: &[u8]) -> TcpStream {
    let mut stream = daemon.connect();
    let head = request("GET", &format!("/tunnel?{target}"), &UPGRADE);
    stream.write_all(&[head.as_bytes(), more].concat()).unwrap();
    stream
}

#[test]
fn a_target_that_resets_once_it_has_accepted_is_never_want_of_room() {
    let daemon = Daemon::start(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            reset(stream);
        }
    });
    for _ in 0..100 {
        let mut stream = ask_for(&daemon, &format!("host=127.0.0.1&port={port}"), b"");
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        if &status == b"HTTP/1.1 101" {
            continue;
        }
        assert_eq!(&status, b"HTTP/1.1 502");
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        let why = format!("127.0.0.1:{port}: Connection reset by peer");
        assert!(rest.contains(&why), "{rest}");
    }
}

#[test]
fn a_client_that_is_gone_ends_its_dial() {
    let mut command = Daemon::command(&["--max-connections", "4", "--dial-timeout", "10m"]);
    command.env("RUST_LOG", "debug");
    let daemon = Daemon::spawn(command);
    let (listener, _filling) = deaf_target();
    let port = listener.local_addr().unwrap().port();
    let deaf = format!("host=127.0.0.1&port={port}");
    let before = daemon.descriptors();
    let working = Target::echo();
    let mut dials = 0;
    for leave in [reset, drop] {
        for _ in 0..3 {
            let held: Vec<_> = (0..4).map(|_| ask_for(&daemon, &deaf, b"")).collect();
            dials += held.len();
            daemon.logged(dials, &["dialing:", &format!(":{port}")]);
            assert_eq!(daemon.get("/health", &[]).status, 503);
            let start = Instant::now();
            held.into_iter().for_each(leave);
            within(LIMIT, "the slots are free", || {
                (daemon.get("/health", &[]).status == 204).then_some(())
            });
            assert!(start.elapsed() < Duration::from_secs(1));
            let mut client = Client::open(&daemon, working.port);
            client.send_close(1000);
            assert_eq!(client.see_all(), (Vec::new(), CLOSE_1000));
            daemon.logged(dials / 4, &["tunnel closed:"]);
        }
    }
    within(LIMIT, "descriptors are back", || {
        (daemon.descriptors() <= before + 4).then_some(())
    });
    assert!(!daemon.log().contains("status=502"));
}

#[test]
fn a_client_that_has_sent_everything_and_half_closes_during_its_dial_gets_its_tunnel() {
    let daemon = Daemon::start(&[]);
    let (listener, filling) = deaf_target();
    let port = listener.local_addr().unwrap().port();
    let all = [frame(0x82, b"all of it"), frame(0x88, b"")].concat();
    let stream = ask_for(&daemon, &format!("host=127.0.0.1&port={port}"), &all);
    stream.shutdown(Shutdown::Write).unwrap();
    // The dial goes on when its SYN is sent again, as the queue has room by then.
    for _ in &filling {
        drop(listener.accept().unwrap());
    }
    let mut client = Client::expect_101(stream);
    let target = thread::spawn(move || read_to_end(&mut listener.accept().unwrap().0));
    assert_eq!(client.see_all(), (Vec::new(), CLOSE_1000));
    assert_eq!(target.join().unwrap(), (b"all of it".to_vec(), true));
}

/// Binds the port of name servers on a loopback address, of which each test has its own. `None` without root.
fn name_server(address: &str) -> Option<UdpSocket> {
    let server = UdpSocket::bind((address, 53));
    if server.is_err() {
        skip("root, and port 53 on loopback");
    }
    server.ok()
}

/// Answers queries for names that begin with `known` (127.0.0.1, and no IPv6 address), and no others.
fn answer_known_names(server: &UdpSocket) {
    let mut query = [0; 512];
    while let Ok((length, client)) = server.recv_from(&mut query) {
        let query = &query[..length];
        // RFC 1035 §4.1: twelve bytes of header, then the name, its type and its class.
        if !query[12..].starts_with(b"\x05known") {
            continue;
        }
        let name_end = 12 + query[12..].iter().position(|&byte| byte == 0).unwrap() + 1;
        let is_a = query[name_end..].starts_with(&[0, 1]);
        let mut answer = query[..name_end + 4].to_vec();
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
        if is_a {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
        }
        let _ = server.send_to(&answer, client);
    }
}

/// A daemon whose only name server is `server`, which takes queries and never answers. `None` where that can't be
/// made.
fn daemon_with_a_hanging_resolver(server: &UdpSocket, options: &[&str]) -> Option<Daemon> {
    let text = format!("nameserver {}\n", server.local_addr().unwrap().ip());
    Daemon::start_with_file("/etc/resolv.conf", &text, options)
}

#[test]
fn a_resolver_that_hangs_is_502_after_the_dial_timeout() {
    let Some(server) = name_server("127.53.53.53") else {
        return;
    };
    let options = ["--dial-timeout", "300ms"];
    let Some(daemon) = daemon_with_a_hanging_resolver(&server, &options) else {
        return;
    };
    let start = Instant::now();
    let answer = daemon.get_upgrade("/tunnel?port=80&host=hangs.example", &[]);
    assert_eq!(answer.status, 502);
    let message = answer.message();
    assert!(
        message.contains("hangs.example:80") && message.contains("timed out while resolving"),
        "{message}"
    );
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert_eq!(daemon.get("/health", &[]).status, 204);
}

#[test]
fn names_that_hang_keep_no_others_from_being_resolved() {
    let Some(server) = name_server("127.53.53.54") else {
        return;
    };
    // All of loopback is one client; what comes through a proxy is others.
    let options = ["--dial-timeout", "3s", "--trust-forwarded", "127.0.0.1"];
    let Some(daemon) = daemon_with_a_hanging_resolver(&server, &options) else {
        return;
    };
    thread::spawn(move || answer_known_names(&server));
    let target = Target::echo();
    let known = format!("host=known.example&port={}", target.port);
    let ask_from = |address: [u8; 4], target: &str, headers: &[&str]| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((address, 0)).into()).unwrap();
        socket.connect(&daemon.address.into()).unwrap();
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let headers = [&UPGRADE[..], headers].concat();
        let head = request("GET", &format!("/tunnel?{target}"), &headers);
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    let ask_through_proxy = || ask_from([127, 0, 0, 1], &known, &["X-Forwarded-For: 192.0.2.1"]);
    Client::expect_101(ask_through_proxy());
    let tasks = format!("/proc/{}/task", daemon.pid().as_raw_nonzero());
    let threads_named = |name: &str| {
        let tasks = std::fs::read_dir(&tasks).unwrap().flatten();
        let names = tasks.map(|task| std::fs::read_to_string(task.path().join("comm")));
        names.flatten().filter(|of| of.trim() == name).count()
    };
    let hang = |number: u8| {
        let target = format!("host=h{number}.example&port=1");
        ask_from([127, 0, 1, number], &target, &[])
    };
    let mut hanging: Vec<_> = (0..65).map(hang).collect();
    within(LIMIT, "all of the client's share is taken", || {
        let all_wait = threads_named("connection") >= 65;
        (all_wait && threads_named("resolve") >= 16).then_some(())
    });
    assert_eq!(threads_named("resolve"), 16);
    // Others' names are resolved at once, and a name of the same client's when its turn comes.
    let start = Instant::now();
    Client::expect_101(ask_through_proxy());
    assert!(start.elapsed() < Duration::from_secs(2));
    hanging.drain(..60).for_each(reset);
    Client::expect_101(ask_from([127, 0, 0, 1], &known, &[]));
    for stream in &mut hanging {
        // Those whose turn has come by then have failed, the others may try again.
        let answer = Answer::read(stream);
        let expected = match answer.status {
            502 => "timed out while resolving the name",
            _ => "try again: timed out while waiting for other names to be resolved",
        };
        assert!(answer.message().contains(expected), "{answer:?}");
    }
}

// Row 10

#[test]
fn all_well_is_101() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    server.write_all(b"hello").unwrap();
    assert_eq!(client.see(), Seen::Binary(b"hello".to_vec()));
}

// The order of the rows

#[test]
fn the_first_row_that_applies_answers() {
    let daemon = Daemon::start_closed(&[]);
    let token = with_token();
    let wrong_version = [
        UPGRADE[0],
        UPGRADE[1],
        "Sec-WebSocket-Version: 8",
        UPGRADE[3],
    ];
    for (method, target, headers, status) in [
        ("POST", "/nothing", vec![], 401),
        ("POST", "/nothing", vec![token.as_str()], 404),
        ("POST", "/tunnel?port=0", vec![&token], 405),
        ("GET", "/tunnel?port=0", vec![&token], 400),
        ("GET", "/tunnel?port=80&host=a..b", vec![&token], 400),
        ("GET", "/tunnel?port=80", vec![&token], 426),
        (
            "GET",
            "/tunnel?port=80",
            [&wrong_version[..], &[&token]].concat(),
            426,
        ),
    ] {
        assert_eq!(
            daemon.ask(request(method, target, &headers)).status,
            status,
            "{method} {target} {headers:?}"
        );
    }
}

#[test]
fn nothing_is_dialed_before_all_else_has_passed() {
    let daemon = Daemon::start_closed(&["--allow-origin", "https://app.example"]);
    let target = Target::listen();
    let url = format!("/tunnel?port={}", target.port);
    let token = with_token();
    let key = [
        UPGRADE[0],
        UPGRADE[1],
        UPGRADE[2],
        "Sec-WebSocket-Key: x",
        &token,
    ];
    for (target, headers, status) in [
        (url.clone(), UPGRADE.to_vec(), 401),
        (
            format!("{url}&host=a..b"),
            [&UPGRADE[..], &[&token]].concat(),
            400,
        ),
        (url.clone(), vec![token.as_str()], 426),
        (url.clone(), key.to_vec(), 400),
        (
            url.clone(),
            [&UPGRADE[..], &[&token, "Origin: https://evil.example"]].concat(),
            403,
        ),
        (
            url.clone(),
            [&UPGRADE[..], &[&token, "Content-Length: 1"]].concat(),
            400,
        ),
    ] {
        assert_eq!(
            daemon.get(&target, &headers).status,
            status,
            "{target} {headers:?}"
        );
    }
    assert!(!target.was_dialed());
}

#[test]
fn every_refusal_is_logged_with_its_reason_and_without_the_token() {
    let daemon = Daemon::start_closed(&[]);
    daemon.get("/tunnel?port=1", &["X-Access-Token: almost-s3cret"]);
    daemon.get("/tunnel?port=0", &[&with_token()]);
    daemon.logged(
        1,
        &[
            "refused:",
            "peer=127.0.0.1:",
            "status=401",
            "X-Access-Token",
        ],
    );
    daemon.logged(1, &["refused:", "status=400", "is not a valid port"]);
    assert!(!daemon.log().contains("s3cret"), "{}", daemon.log());
}
