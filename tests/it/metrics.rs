//! `GET /metrics`, parsed and compared with what was done.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::Shutdown;

use rustix::process::Signal;

use crate::support::*;

/// The value of each series, under its name and labels as they are written.
type Series = BTreeMap<String, f64>;

fn scrape(daemon: &Daemon) -> Series {
    let answer = daemon.get("/metrics", &[]);
    assert_eq!(answer.status, 200);
    let media_type = answer.header("content-type").unwrap();
    assert!(
        media_type.starts_with("text/plain; version=0.0.4"),
        "{media_type}"
    );
    parse(&answer.body)
}

/// Every line is a comment or a series, and every series has a type and a help text.
fn parse(text: &str) -> Series {
    let mut described = Vec::new();
    let mut series = Series::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let words: Vec<_> = comment.splitn(3, ' ').collect();
            assert!(
                ["HELP", "TYPE"].contains(&words[0]) && words.len() == 3,
                "{line}"
            );
            described.push((words[0].to_owned(), words[1].to_owned()));
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap();
        let family = name.split('{').next().unwrap();
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .fold(family, |name, suffix| {
                name.strip_suffix(suffix).unwrap_or(name)
            });
        for what in ["HELP", "TYPE"] {
            assert!(
                described.contains(&(what.to_owned(), family.to_owned())),
                "{what} of {line}"
            );
        }
        assert!(family.starts_with("tunneld_"), "{line}");
        let before = series.insert(name.to_owned(), value.parse().unwrap());
        assert!(before.is_none(), "{line} is there twice");
    }
    series
}

/// Scrapes until `name` has reached `value`.
fn scrape_until(daemon: &Daemon, name: &str, value: f64) -> Series {
    within(LIMIT, &format!("{name} is {value}"), || {
        let series = scrape(daemon);
        assert!(series.contains_key(name), "{name} in {series:?}");
        (series[name] == value).then_some(series)
    })
}

#[test]
fn everything_is_there_from_the_start() {
    let daemon = Daemon::start(&["--max-connections", "7"]);
    let series = scrape(&daemon);
    assert_eq!(series["tunneld_connections_limit"], 7.0);
    assert_eq!(series["tunneld_connections"], 1.0, "the scrape itself");
    assert!(series["tunneld_threads"] >= 3.0);
    assert!(series["tunneld_open_fds"] >= 5.0);
    assert!(series["tunneld_max_fds"] >= series["tunneld_open_fds"]);
    for name in [
        "tunneld_tunnels_open",
        "tunneld_tunnels_opened_total",
        "tunneld_tunnels_closed_total{end=\"orderly\"}",
        "tunneld_tunnels_closed_total{end=\"client_vanished\"}",
        "tunneld_refusals_total{status=\"401\"}",
        "tunneld_refusals_total{status=\"503\"}",
        "tunneld_bytes_total{direction=\"up\"}",
        "tunneld_bytes_total{direction=\"down\"}",
        "tunneld_dial_duration_seconds_count{result=\"connected\"}",
        "tunneld_dial_duration_seconds_count{result=\"failed\"}",
        "tunneld_tunnel_duration_seconds_count",
    ] {
        assert_eq!(series.get(name), Some(&0.0), "{name}");
    }
}

#[test]
fn tunnels_and_their_bytes_are_counted_while_they_are_open_and_after() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let mut clients: Vec<_> = (0..3).map(|_| Client::open(&daemon, target.port)).collect();
    for client in &mut clients {
        client.send(&[7; 1000]);
        assert_eq!(client.see_all_of(1000), [7; 1000]);
    }
    let down = "tunneld_bytes_total{direction=\"down\"}";
    let open = scrape_until(&daemon, down, 3000.0);
    assert_eq!(open["tunneld_tunnels_open"], 3.0);
    assert_eq!(open["tunneld_connections"], 4.0);
    assert_eq!(open["tunneld_bytes_total{direction=\"up\"}"], 3000.0);
    for client in &mut clients {
        client.send_close(1000);
        assert_eq!(client.see_all().1, CLOSE_1000);
    }
    let closed = scrape_until(
        &daemon,
        "tunneld_tunnels_closed_total{end=\"orderly\"}",
        3.0,
    );
    let closed_and_left = scrape_until(&daemon, "tunneld_tunnels_open", 0.0);
    assert_eq!(closed["tunneld_tunnels_opened_total"], 3.0);
    assert_eq!(closed["tunneld_tunnel_duration_seconds_count"], 3.0);
    assert_eq!(
        closed["tunneld_dial_duration_seconds_count{result=\"connected\"}"],
        3.0
    );
    assert_eq!(
        closed_and_left["tunneld_bytes_total{direction=\"up\"}"],
        3000.0
    );
    assert_eq!(closed_and_left[down], 3000.0);
}

#[test]
fn ends_are_counted_by_how() {
    let mut daemon = Daemon::start(&["--linger", "100ms", "--shutdown-grace", "1s"]);
    let target = Target::listen();
    let open = || (Client::open(&daemon, target.port), target.accept());
    let closed = |end: &str| {
        let name = format!("tunneld_tunnels_closed_total{{end=\"{end}\"}}");
        scrape_until(&daemon, &name, 1.0);
    };
    let (mut client, server) = open();
    drop(server);
    assert_eq!(client.see(), CLOSE_1000);
    client.finish();
    closed("orderly");
    let (_client, server) = open();
    reset(server);
    closed("target_failed");
    let (mut client, server) = open();
    client.send_close(1000);
    daemon.logged(1, &["tunnel opened"]);
    let mut server = server;
    assert!(read_to_end(&mut server).1);
    reset(server);
    closed("target_failed_after_close");
    let (client, server) = open();
    drop(server);
    let mut stream = client.stream;
    while stream.write_all(&frame(0x82, &[0; 1000])).is_ok() {}
    closed("upload_cut_short");
    let (mut client, _server) = open();
    client.send_close(1011);
    closed("client_aborted");
    let (client, _server) = open();
    drop(client);
    closed("client_vanished");
    let (mut client, _server) = open();
    client.send_frame(0x81, b"x");
    closed("protocol_error");
    let (_client, server) = open();
    server.shutdown(Shutdown::Write).unwrap();
    closed("linger");
    let (_client, _server) = open();
    daemon.signal(Signal::TERM);
    daemon.logged(1, &["tunnel closed", "end=shutdown"]);
    assert!(daemon.exit().success());
}

#[test]
fn refusals_are_counted_by_status() {
    let daemon = Daemon::start(&["--deny-target", "localhost:9"]);
    let refused = |status: u16, count: f64| {
        scrape_until(
            &daemon,
            &format!("tunneld_refusals_total{{status=\"{status}\"}}"),
            count,
        )
    };
    daemon.get_upgrade("/tunnel?port=0", &[]);
    daemon.ask("nonsense\r\n\r\n");
    refused(400, 2.0);
    daemon.get("/nothing", &[]);
    refused(404, 1.0);
    daemon.get_upgrade("/tunnel?port=9", &[]);
    refused(403, 1.0);
    let closed = Target::listen().port;
    daemon.get_upgrade(&format!("/tunnel?port={closed}"), &[]);
    let series = refused(502, 1.0);
    assert_eq!(
        series["tunneld_dial_duration_seconds_count{result=\"failed\"}"],
        1.0
    );
    assert_eq!(
        series["tunneld_dial_duration_seconds_bucket{result=\"failed\",le=\"+Inf\"}"],
        1.0
    );
    assert_eq!(series["tunneld_refusals_total{status=\"401\"}"], 0.0);
    let mut head = daemon.connect();
    write!(head, "GET /{} HTTP/1.1\r\n", "x".repeat(20_000)).ok();
    refused(431, 1.0);
}

#[test]
fn it_is_behind_the_token() {
    let daemon = Daemon::start_closed(&[]);
    assert_eq!(daemon.get("/metrics", &[]).status, 401);
    let token = format!("X-Access-Token: {TOKEN}");
    let answer = daemon.get("/metrics", &[&token]);
    assert_eq!(answer.status, 200);
    assert!(
        answer
            .body
            .contains("\ntunneld_refusals_total{status=\"401\"} 1\n"),
        "{}",
        answer.body
    );
    let answer = daemon.ask(request("HEAD", "/metrics", &[&token]));
    assert_eq!((answer.status, answer.body.as_str()), (200, ""));
    let answer = daemon.ask(request("POST", "/metrics", &[&token]));
    assert_eq!(
        (answer.status, answer.header("allow")),
        (405, Some("GET, HEAD"))
    );
}

#[test]
fn counters_never_go_down_however_many_scrape_at_once() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let (total, daemon, target) = (200u32, &daemon, &target);
    std::thread::scope(|scope| {
        let scrapers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(move || {
                    let mut last = 0.0;
                    while last < f64::from(total) * 10.0 {
                        let now = scrape(daemon)["tunneld_bytes_total{direction=\"up\"}"];
                        assert!(
                            now >= last && now <= f64::from(total) * 10.0,
                            "{last} {now}"
                        );
                        last = now;
                    }
                })
            })
            .collect();
        for _ in 0..total {
            let mut client = Client::open(daemon, target.port);
            client.send(&[1; 10]);
            client.send_close(1000);
            client.see_all();
        }
        scrapers
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    });
}
