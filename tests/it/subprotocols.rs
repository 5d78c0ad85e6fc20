//! What is chosen of the subprotocols a client offers, and the token a web page shows among them.

use std::io::Write;

use data_encoding::BASE64URL_NOPAD;

use crate::support::*;

/// A token as a page offers it.
fn offered(token: impl AsRef<[u8]>) -> String {
    let token = BASE64URL_NOPAD.encode(token.as_ref());
    format!("base64url.bearer.authorization.k8s.io.{token}")
}

/// What is chosen of the subprotocols in these header lines.
fn chosen(daemon: &Daemon, port: u16, headers: &[&str]) -> Option<String> {
    let url = format!("/tunnel?port={port}");
    let head = request("GET", &url, &[&UPGRADE[..], headers].concat());
    let mut stream = daemon.connect();
    stream.write_all(head.as_bytes()).unwrap();
    let (mut client, subprotocol) = Client::expect_101_of(stream);
    client.send(b"ping");
    assert_eq!(client.see_all_of(4), b"ping");
    subprotocol
}

#[test]
fn binary_is_chosen_if_it_is_offered_and_nothing_else_is() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    for headers in [
        &["Sec-WebSocket-Protocol: binary"][..],
        &["Sec-WebSocket-Protocol: base64, binary"],
        &["sec-websocket-protocol: chat,binary\t,superchat"],
        &[
            "Sec-WebSocket-Protocol: chat",
            "Sec-WebSocket-Protocol: binary",
        ],
    ] {
        let subprotocol = chosen(&daemon, target.port, headers);
        assert_eq!(subprotocol.as_deref(), Some("binary"), "{headers:?}");
    }
    for headers in [
        &[][..],
        &["Sec-WebSocket-Protocol: chat"],
        &["Sec-WebSocket-Protocol: Binary, binary2"],
        &["Sec-WebSocket-Protocol:"],
    ] {
        assert_eq!(chosen(&daemon, target.port, headers), None, "{headers:?}");
    }
}

#[test]
fn a_page_shows_its_token_beside_binary_and_it_is_not_echoed() {
    let mut command = Daemon::command(&[]);
    command
        .env("TUNNELD_ACCESS_TOKEN", TOKEN)
        .env("RUST_LOG", "trace");
    let daemon = Daemon::spawn(command);
    let target = Target::echo();
    let page = "Origin: https://app.example";
    let token = offered(TOKEN);
    for line in [
        format!("Sec-WebSocket-Protocol: binary, {token}"),
        format!("Sec-WebSocket-Protocol: {token},binary"),
    ] {
        // A browser adds what it knows for the host by itself.
        for of_proxy in ["X: y", "Authorization: Basic eDp5"] {
            let subprotocol = chosen(&daemon, target.port, &[page, &line, of_proxy]);
            assert_eq!(subprotocol.as_deref(), Some("binary"));
        }
    }
    let alone = format!("Sec-WebSocket-Protocol: {token}");
    assert_eq!(chosen(&daemon, target.port, &[&alone]), None);
    daemon.logged(5, &["tunnel closed:"]);
    let log = daemon.log();
    assert!(!log.contains(TOKEN) && !log.contains(&token[40..]), "{log}");
}

#[test]
fn a_wrong_token_among_the_subprotocols_is_401_and_neither_echoed_nor_logged() {
    let mut command = Daemon::command(&[]);
    command
        .env("TUNNELD_ACCESS_TOKEN", TOKEN)
        .env("RUST_LOG", "trace");
    let daemon = Daemon::spawn(command);
    let right = offered(TOKEN);
    for tokens in [
        offered("wr0ng-t0ken"),
        offered(""),
        offered(format!("{TOKEN}\n")),
        format!("{right}="),
        format!("{right}!"),
        "base64url.bearer.authorization.k8s.io.".to_owned() + TOKEN,
        right.replace("base64url", "BASE64URL"),
        format!("{right}, {right}"),
        offered([0xff, 0xfe]),
    ] {
        let line = format!("Sec-WebSocket-Protocol: binary, {tokens}");
        let answer = daemon.get_upgrade("/tunnel?port=1", &[&line]);
        assert_eq!(answer.status, 401, "{tokens}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        assert_eq!(answer.header("sec-websocket-protocol"), None);
        let told = answer.message() + &daemon.log();
        for secret in [&tokens[38..], TOKEN, "wr0ng"] {
            assert!(secret.is_empty() || !told.contains(secret), "{told}");
        }
    }
}

#[test]
fn a_token_header_decides_before_a_subprotocol_and_that_before_authorization() {
    let daemon = Daemon::start_closed(&[]);
    let status = |headers: &[&str]| daemon.get("/openapi.yaml", headers).status;
    let page = format!("Sec-WebSocket-Protocol: binary, {}", offered(TOKEN));
    let wrong_page = format!("Sec-WebSocket-Protocol: binary, {}", offered("wrong"));
    let (header, bearer) = (
        format!("X-Access-Token: {TOKEN}"),
        format!("Authorization: Bearer {TOKEN}"),
    );
    assert_eq!(status(&[&page]), 200);
    assert_eq!(status(&[&page, "X-Access-Token: wrong"]), 401);
    assert_eq!(status(&[&wrong_page, &header]), 200);
    assert_eq!(status(&[&wrong_page, &bearer]), 401);
    assert_eq!(status(&[&page, "Authorization: Bearer wrong"]), 200);
}
