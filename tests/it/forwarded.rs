//! Who a client is behind a proxy, in the log: `--trust-forwarded`.

use std::io::Write;

use crate::support::*;

/// What the log has for `peer` once a tunnel and a refusal have come with these headers.
fn peers(daemon: &Daemon, headers: &[&str], expected: &str) {
    let target = Target::echo();
    let url = format!("/tunnel?port={}", target.port);
    let port = format!("target=localhost:{} ", target.port);
    let mut client = Client::open_with(daemon, &url, headers);
    client.send_close(1000);
    assert_eq!(client.see(), CLOSE_1000);
    daemon.logged(1, &["tunnel opened:", &port, expected]);
    daemon.logged(1, &["tunnel closed:", &port, expected]);
    let path = format!("/{}", target.port);
    assert_eq!(daemon.get(&path, headers).status, 404);
    daemon.logged(1, &["refused:", &path, expected]);
}

#[test]
fn a_trusted_proxys_client_is_the_peer() {
    let options = [
        "--trust-forwarded",
        "127.0.0.0/8",
        "--trust-forwarded",
        "10.0.0.1",
    ];
    let daemon = Daemon::start(&options);
    peers(
        &daemon,
        &["X-Forwarded-For: 203.0.113.9, 192.0.2.7, 10.0.0.1"],
        " peer=192.0.2.7 ",
    );
    peers(
        &daemon,
        &["Forwarded: for=\"[2001:db8::7]:80\";proto=https"],
        " peer=2001:db8::7 ",
    );
    // Its own requests, and those of which it says nothing.
    peers(&daemon, &[], " peer=127.0.0.1:");
    peers(&daemon, &["X-Forwarded-For: unknown"], " peer=127.0.0.1:");
}

#[test]
fn what_others_say_of_themselves_means_nothing() {
    let headers = ["X-Forwarded-For: 192.0.2.7", "Forwarded: for=192.0.2.7"];
    for options in [
        &[][..],
        &["--trust-forwarded", "10.0.0.0/8"],
        &["--trust-forwarded", "unix"],
    ] {
        let daemon = Daemon::start(options);
        peers(&daemon, &headers, " peer=127.0.0.1:");
        assert!(!daemon.log().contains("192.0.2.7"), "{}", daemon.log());
    }
}

#[test]
fn a_proxy_on_a_unix_socket_is_trusted_by_its_kind() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tunneld.sock");
    let command = Daemon::bare_command(&["--trust-forwarded", "unix"]);
    let daemon = Daemon::spawn_on_unix(command, &path);
    let mut stream = connect_unix(&path);
    let head = request(
        "GET",
        "/nothing",
        &["X-Forwarded-For: 203.0.113.9, 192.0.2.7"],
    );
    stream.write_all(head.as_bytes()).unwrap();
    assert_eq!(Answer::read(&mut stream).status, 404);
    daemon.logged(1, &["refused:", " peer=192.0.2.7 "]);
}
