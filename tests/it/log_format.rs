//! The log as data: `--log-format json`.

use serde_json::Value;

use crate::support::*;

/// The daemon's lines, each of which must be an object.
fn objects(daemon: &Daemon) -> Vec<Value> {
    let log = daemon.log();
    let objects = log.lines().map(|line| {
        let object: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        assert!(object.is_object(), "{line}");
        object
    });
    objects.collect()
}

/// The keys of a line, as they stand in it.
fn keys(line: &str) -> Vec<String> {
    // Quotes within a string.
    let line = line.replace("\\\"", "");
    let mut parts: Vec<_> = line.split("\":").collect();
    parts.pop();
    let keys = parts.iter().filter_map(|part| part.rsplit('"').next());
    keys.map(str::to_owned).collect()
}

#[test]
fn a_tunnel_and_a_refusal_are_objects_with_the_fields_of_the_text() {
    let daemon = Daemon::start(&["--log-format", "json"]);
    let target = Target::echo();
    let mut client = Client::open(&daemon, target.port);
    client.send(b"echo");
    assert_eq!(client.see_all_of(4), b"echo");
    client.send_close(1000);
    assert_eq!(client.see(), CLOSE_1000);
    assert_eq!(daemon.get("/\"nothing\"", &[]).status, 404);
    let opened = daemon.logged(1, &["\"tunnel opened\""]);
    let closed = daemon.logged(1, &["\"tunnel closed\""]);
    let refused = daemon.logged(1, &["\"refused\""]);
    let first = ["time", "level", "module", "message", "id", "peer"];
    let with = |rest: &[&'static str]| [&first[..], rest].concat();
    assert_eq!(keys(&opened), with(&["target", "address"]));
    let rest = [
        "target", "address", "up", "down", "duration", "end", "reason",
    ];
    assert_eq!(keys(&closed), with(&rest));
    assert_eq!(keys(&refused), with(&["status", "reason"]));

    let closed: Value = serde_json::from_str(&closed).unwrap();
    assert_eq!(
        (&closed["level"], &closed["id"]),
        (&"INFO".into(), &0.into())
    );
    assert_eq!((&closed["up"], &closed["down"]), (&4.into(), &4.into()));
    assert_eq!(closed["end"], "orderly");
    assert_eq!(closed["reason"], "closed in order");
    assert_eq!(closed["target"], format!("localhost:{}", target.port));
    assert!(closed["duration"].is_f64());
    let time = closed["time"].as_str().unwrap();
    assert!(
        humantime::parse_rfc3339(time).is_ok() && time.ends_with('Z'),
        "{time}"
    );
    let refused: Value = serde_json::from_str(&refused).unwrap();
    assert_eq!(refused["status"], 404);
    assert!(refused["reason"].as_str().unwrap().contains("no such path"));
}

#[test]
fn a_connection_that_was_turned_away_has_no_number() {
    let daemon = Daemon::start(&["--log-format", "json", "--max-connections", "1"]);
    let target = Target::echo();
    let _open = Client::open(&daemon, target.port);
    assert_eq!(daemon.get("/health", &[]).status, 503);
    let refused = daemon.logged(1, &["\"refused\""]);
    assert!(!refused.contains("\"id\""), "{refused}");
    let daemon = Daemon::start(&["--max-connections", "1"]);
    let _open = Client::open(&daemon, target.port);
    assert_eq!(daemon.get("/health", &[]).status, 503);
    daemon.logged(1, &["refused: id=- peer=127.0.0.1:"]);
}

#[test]
fn every_line_is_an_object_down_to_trace() {
    let mut command = Daemon::command(&[]);
    command
        .env("TUNNELD_LOG_FORMAT", "json")
        .env("RUST_LOG", "trace");
    let daemon = Daemon::spawn(command);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    reset(target.accept());
    assert!(matches!(client.see_all().1, Seen::Close(Some(1011), _)));
    client.send_close(1011);
    daemon.logged(1, &["\"tunnel closed\"", "target_failed"]);
    assert_eq!(daemon.get("/metrics", &[]).status, 200);
    assert_eq!(daemon.get("/\u{1b}[m", &[]).status, 400);
    daemon.logged(1, &["\"refused\""]);
    let objects = objects(&daemon);
    for message in [
        "connected",
        "request",
        "dialing",
        "dialed",
        "to_stream ended",
        "answered",
    ] {
        assert!(
            objects.iter().any(|object| object["message"] == message),
            "{message}"
        );
    }
}
