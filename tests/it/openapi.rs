//! The OpenAPI document, and the daemon held to it.

use crate::support::*;

fn document(daemon: &Daemon) -> String {
    let answer = daemon.get("/openapi.yaml", &[]);
    assert_eq!(
        (answer.status, answer.header("content-type")),
        (200, Some("application/yaml"))
    );
    answer.body
}

#[test]
fn the_document_is_served_and_has_the_crates_version() {
    let daemon = Daemon::start(&[]);
    let document = document(&daemon);
    assert!(document.starts_with("openapi: 3.1."), "{document}");
    assert!(document.contains(&format!("\n  version: {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn a_head_request_gets_its_length_alone() {
    let daemon = Daemon::start(&[]);
    let length = document(&daemon).len().to_string();
    let answer = daemon.ask(request("HEAD", "/openapi.yaml", &[]));
    assert_eq!((answer.status, answer.body.as_str()), (200, ""));
    assert_eq!(answer.header("content-length"), Some(length.as_str()));
}

#[test]
fn every_status_of_the_table_is_described() {
    let document = document(&Daemon::start(&[]));
    for status in [
        101, 200, 204, 400, 401, 403, 404, 405, 408, 426, 431, 502, 503,
    ] {
        assert!(document.contains(&format!("'{status}':")), "{status}");
    }
}

#[test]
fn every_upgrade_and_method_that_is_taken_is_described() {
    let daemon = Daemon::start(&[]);
    let document = document(&daemon);
    assert!(document.contains("enum: [websocket, connect-tcp-12]"));
    let mut heads = 0;
    for path in document.split("\n  /").skip(1) {
        let (path, operations) = path.split_once(":\n").unwrap();
        let answer = daemon.ask(request("HEAD", &format!("/{path}"), &[]));
        let is_described = operations.contains("\n    head:\n");
        assert_eq!(
            answer.status < 300,
            is_described,
            "/{path}: {}",
            answer.status
        );
        heads += usize::from(is_described);
    }
    assert_eq!(heads, 3);
}

#[test]
fn web_pages_may_not_read_it_from_an_open_daemon() {
    let daemon = Daemon::start(&[]);
    assert_eq!(
        daemon
            .get("/openapi.yaml", &["Origin: https://evil.example"])
            .status,
        403
    );
}
