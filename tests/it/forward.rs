//! `tunneld connect` with ssh's letters: -L and -W, what is known at the start, and what a person sees.

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use rustix::process::Signal;

use crate::connect::{Connect, take};
use crate::support::*;

/// Whether a line comes back through an address.
pub fn echoes(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(address) else {
        return false;
    };
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(b"hello").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    read_to_end(&mut stream) == (b"hello".to_vec(), true)
}

pub fn has_ipv6() -> bool {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

/// A client that is expected not to start: one line with `part`, and exit code 2.
pub fn is_wrong(options: &[&str], part: &str) {
    let command = Connect::command("ws://127.0.0.1:1", options);
    let (code, stderr) = fails_to_start(command);
    assert_eq!(
        (code, stderr.lines().count()),
        (2, 1),
        "{options:?}: {stderr}"
    );
    assert!(
        stderr.contains(part),
        "{options:?}: {stderr} without {part}"
    );
    assert!(!stderr.contains("s3cret"), "{stderr}");
}

#[test]
fn several_ports_each_lead_to_a_target_of_their_own() {
    let daemon = Daemon::start(&[]);
    let (first, second) = (Target::echo(), Target::listen());
    let options = [
        "-L",
        &format!("127.0.0.1:0:localhost:{}", first.port),
        &format!("-L0:{}", second.port),
    ];
    let client = Connect::with(&daemon, &options);
    let addresses = client.addresses(2);
    assert!(echoes(addresses[0]));
    let mut stream = TcpStream::connect(addresses[1]).unwrap();
    stream.write_all(b"x").unwrap();
    assert_eq!(take(&mut second.accept(), 1), b"x");
    let line = client.logged(&addresses[0].to_string());
    let shown = format!("listening on {} → localhost:{}", addresses[0], first.port);
    assert!(line.ends_with(&shown), "{line}");
}

#[test]
fn ports_of_either_kind_speak_connect_tcp_too() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let forward = format!("127.0.0.1:0:{}", target.port);
    let options = [
        "-L",
        &forward,
        "-D",
        "127.0.0.1:0",
        "--protocol",
        "connect-tcp",
    ];
    let client = Connect::with(&daemon, &options);
    let addresses = client.addresses(2);
    assert!(echoes(addresses[0]));
    let mut asked = TcpStream::connect(addresses[1]).unwrap();
    asked.set_read_timeout(Some(LIMIT)).unwrap();
    asked
        .write_all(&[5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1])
        .unwrap();
    asked.write_all(&target.port.to_be_bytes()).unwrap();
    assert_eq!(take(&mut asked, 12)[2..4], [5, 0]);
    assert!(!client.log().contains("WARN"), "{}", client.log());
}

#[test]
fn without_an_address_both_loopbacks_are_served_on_the_same_port() {
    let daemon = Daemon::start(&["--listen", "localhost:0"]);
    let target = Target::echo();
    let v6 = |address: SocketAddr| SocketAddr::from((Ipv6Addr::LOCALHOST, address.port()));
    for bind in ["0", "localhost:0"] {
        let forward = format!("{bind}:{}", target.port);
        let listen = ["--listen", bind, "--port", &target.port.to_string()];
        for options in [&["-L", &forward][..], &listen] {
            let client = Connect::with(&daemon, options);
            let address = client.addresses(1)[0];
            assert_eq!(address.ip(), Ipv4Addr::LOCALHOST);
            assert!(echoes(address));
            if has_ipv6() {
                assert!(echoes(v6(address)));
                client.logged(&format!("listening on {address}, {}", v6(address)));
            }
        }
    }
    if has_ipv6() {
        assert!(TcpStream::connect(v6(daemon.address)).is_ok());
        let port = daemon.address.port();
        for address in ["127.0.0.1", "[::1]"] {
            daemon.logged(1, &[&format!("listening on {address}:{port}")]);
        }
    }
}

#[test]
fn on_a_machine_without_ipv6_both_loopbacks_are_the_one_there_is() {
    let script = "ip link set lo up && echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6";
    let can = Command::new("unshare")
        .args(["--net", "sh", "-c", script])
        .output();
    if !can.is_ok_and(|output| output.status.success()) {
        return skip("root, iproute2 and network namespaces");
    }
    let inner = Connect::command("ws://127.0.0.1:1", &["-L", "0:80"]);
    let mut command = Command::new("unshare");
    let script = format!("{script} && exec \"$0\" \"$@\"");
    command.args(["--net", "sh", "-c", &script]);
    command.arg(inner.get_program()).args(inner.get_args());
    let client = Connect::spawn(command);
    let line = client.logged("listening on 127.0.0.1:");
    assert!(
        !line.contains("::1") && line.ends_with(" → localhost:80"),
        "{line}"
    );
}

#[test]
fn when_one_port_cannot_be_bound_none_is() {
    let daemon = Daemon::start(&[]);
    let (taken, free) = (Target::listen(), closed_port());
    let free_port = free.port;
    drop(free);
    let options = [
        "-L",
        &format!("127.0.0.1:{free_port}:80"),
        "-L",
        &format!("127.0.0.1:{}:80", taken.port),
    ];
    let url = format!("ws://{}", daemon.address);
    let (code, stderr) = fails_to_start(Connect::command(&url, &options));
    assert_eq!((code, stderr.lines().count()), (2, 1), "{stderr}");
    let part = format!("cannot listen on 127.0.0.1:{}: ", taken.port);
    assert!(
        stderr.contains(&part) && stderr.contains("choose another -L"),
        "{stderr}"
    );
    assert!(!daemon.log().contains("refused"), "{}", daemon.log());
    // IPv6 alone is taken: then IPv4 is not served either.
    if has_ipv6() {
        let taken = Target::listen_on("[::1]:0");
        let (code, stderr) =
            fails_to_start(Connect::command(&url, &["-L", &taken.port.to_string()]));
        assert!(
            code == 2 && stderr.contains("cannot listen on [::1]:"),
            "{stderr}"
        );
    }
}

#[test]
fn stdin_and_stdout_lead_to_what_w_names() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    for to in [
        format!("localhost:{}", target.port),
        format!("127.0.0.1:{}", target.port),
        target.port.to_string(),
    ] {
        let mut client = Connect::with(&daemon, &["-W", &to]);
        client.stdin().write_all(b"hello").unwrap();
        assert_eq!(client.rest(), b"hello");
        assert_eq!(client.ended(), (0, String::new()));
    }
}

#[test]
fn a_forward_that_makes_no_sense_is_one_line_with_the_right_form() {
    for forward in [
        "",
        "x",
        "0",
        "8080:a b:80",
        "1:2:3:4",
        "8080:::1:80",
        "/tmp/socket",
        "box:80",
        "8080:0",
    ] {
        is_wrong(&["-L", forward], "[BIND:]PORT[:HOST:PORT]");
    }
    for forward in ["", "x", "1:2", "box:1080"] {
        is_wrong(&["-D", forward], "[BIND:]PORT");
    }
    for target in ["", "box", "box:0", "::1:80"] {
        is_wrong(&["-W", target], "HOST:PORT");
    }
    for host in ["a b", "::1:", "80"] {
        is_wrong(&["--port", "1", "--host", host], "db.internal");
    }
    for listen in ["", "x", "box:80", "70000"] {
        is_wrong(&["--port", "1", "--listen", listen], "127.0.0.1:5432");
    }
    for (options, part) in [
        (&["-W", "22", "-L", "80"][..], "-W and -L contradict"),
        (&["-W", "22", "-D", "80"], "-W and -D contradict"),
        (
            &["-W", "22", "--port", "80"],
            "-W and --host and --port contradict",
        ),
        (
            &["-W", "22", "--port", "80", "--listen", "0"],
            "-W and --listen contradict",
        ),
        (&["-L", "80", "--port", "22"], "write -L PORT:HOST:PORT"),
        (&["-D", "80", "--host", "db"], "write -L PORT:HOST:PORT"),
        (&["--listen", "80"], "-L PORT"),
    ] {
        is_wrong(options, part);
    }
    for options in [&["-L", "80"][..], &["-D", "80"], &["-W", "80"]] {
        let (code, stderr) = fails_to_start(Connect::command("ws://127.0.0.1:1?port=80", options));
        let part = format!("{} and the URL's own port=", options[0]);
        assert!(code == 2 && stderr.contains(&part), "{stderr}");
        let url = "ws://127.0.0.1:1/.well-known/masque/tcp/localhost/80/";
        let (code, stderr) = fails_to_start(Connect::command(url, options));
        assert!(code == 2 && stderr.contains("write /tunnel"), "{stderr}");
    }
}

// --- what is known at the start -----------------------------------------------------------------------

#[test]
fn a_wrong_token_or_path_is_told_at_the_start_and_no_target_is_dialed() {
    let daemon = Daemon::start_closed(&[]);
    let target = Target::listen();
    let forward = format!("0:{}", target.port);
    let fails = |url: &str, token: &str, part: &str| {
        let mut command = Connect::command(url, &["-L", &forward]);
        command
            .env("TUNNELD_ACCESS_TOKEN", token)
            .env("RUST_LOG", "warn");
        Connect::spawn(command).broke(part);
    };
    let url = format!("ws://{}", daemon.address);
    fails(
        &url,
        "mistaken",
        "refused with 401: the token in X-Access-Token is wrong",
    );
    fails(
        &format!("{url}/tunel"),
        TOKEN,
        "refused with 404: no such path \"/tunel\"",
    );
    let mut command = Connect::command(&url, &["-L", &forward]);
    command.env("TUNNELD_ACCESS_TOKEN", TOKEN);
    let client = Connect::spawn(command);
    client.address();
    assert!(
        !client.log().contains("WARN") && !target.was_dialed(),
        "{}",
        client.log()
    );
}

/// What is masked when it is shown decides nothing.
#[test]
fn a_secret_that_shares_words_with_the_daemon_hides_no_answer() {
    let mut command = Daemon::command(&[]);
    command.env("TUNNELD_ACCESS_TOKEN", "dev-parameter-7");
    let daemon = Daemon::spawn(command);
    let url = format!("ws://{}", daemon.address);
    for header in ["X-Config: parameter-store", "X-Note: port is missing"] {
        let mut command = Connect::command(&url, &["-L", "127.0.0.1:0:80", "-H", header]);
        command.env("TUNNELD_ACCESS_TOKEN", "dev-parameter-7");
        let client = Connect::spawn(command);
        client.address();
        assert!(!client.log().contains("WARN"), "{}", client.log());
    }
}

#[test]
fn a_daemon_that_is_not_there_yet_is_a_warning() {
    let closed = closed_port();
    let url = format!("ws://127.0.0.1:{}", closed.port);
    let client = Connect::spawn(Connect::command(&url, &["-L", "0:80", "-D", "0"]));
    let addresses = client.addresses(2);
    let line = client.logged("WARN");
    assert!(
        line.contains("the daemon is not there yet: cannot connect to"),
        "{line}"
    );
    drop(closed);
    let port = url.rsplit_once(':').unwrap().1;
    let daemon = Daemon::start(&["--listen", &format!("127.0.0.1:{port}")]);
    let mut local = TcpStream::connect(addresses[0]).unwrap();
    let _ = local.write_all(b"x");
    daemon.logged(1, &["localhost:80"]);
}

// --- what a person sees -------------------------------------------------------------------------------

#[test]
fn a_connection_is_one_line_when_it_opens_and_one_when_it_ends() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let client = Connect::with(&daemon, &["-L", &format!("127.0.0.1:0:{}", target.port)]);
    let mut local = client.dial();
    let peer = local.local_addr().unwrap();
    let mut stream = target.accept();
    local.write_all(b"four").unwrap();
    assert_eq!(take(&mut stream, 4), b"four");
    stream.write_all(b"seven..").unwrap();
    assert_eq!(take(&mut local, 7), b"seven..");
    client.logged(&format!(
        "tunnel opened: id=0 peer={peer} target=localhost:{}",
        target.port
    ));
    drop(local);
    drop(stream);
    let line = client.logged("tunnel closed: ");
    assert!(
        line.contains(&format!(
            "id=0 peer={peer} target=localhost:{} up=4 down=7 ",
            target.port
        )),
        "{line}"
    );
    assert!(
        line.contains("end=orderly reason=\"closed in order\""),
        "{line}"
    );
    let lines = |part: &str| client.log().matches(part).count();
    assert_eq!((lines("tunnel opened"), lines("tunnel closed")), (1, 1));
    let mut client = client;
    client.signal(Signal::TERM);
    assert_eq!(client.ended().0, 0);
}

// --- waiting ------------------------------------------------------------------------------------------

#[test]
fn a_target_and_a_daemon_that_come_later_are_waited_for() {
    let (no_daemon, no_target) = (closed_port(), closed_port());
    let url = format!("ws://127.0.0.1:{}", no_daemon.port);
    let target = format!("127.0.0.1:{}", no_target.port);
    let mut stdio = Connect::spawn(Connect::command(&url, &["-W", &target, "--wait", "30s"]));
    let forward = format!("127.0.0.1:0:{target}");
    let ports = ["-L", &forward, "-D", "127.0.0.1:0", "--wait", "30s"];
    let ports = Connect::spawn(Connect::command(&url, &ports));
    let addresses = ports.addresses(2);
    let mut local = TcpStream::connect(addresses[0]).unwrap();
    local.set_read_timeout(Some(LIMIT)).unwrap();
    local.write_all(b"hello").unwrap();
    local.shutdown(Shutdown::Write).unwrap();
    let mut asked = TcpStream::connect(addresses[1]).unwrap();
    asked.set_read_timeout(Some(LIMIT)).unwrap();
    let to = SocketAddr::from(([127, 0, 0, 1], no_target.port));
    asked
        .write_all(&[5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1])
        .unwrap();
    asked.write_all(&to.port().to_be_bytes()).unwrap();
    stdio.logged("trying again for ");
    ports.logged("trying again for ");
    drop(no_daemon);
    let daemon = url.strip_prefix("ws://").unwrap();
    let daemon = Daemon::start(&["--listen", daemon]);
    daemon.logged(3, &["refused", "status=502"]);
    drop(no_target);
    let target = Target::echo_on(&target);
    assert_eq!(read_to_end(&mut local), (b"hello".to_vec(), true));
    assert_eq!(take(&mut asked, 12)[2..4], [5, 0]);
    stdio.stdin().write_all(b"hello").unwrap();
    assert_eq!(stdio.rest(), b"hello");
    let (code, stderr) = stdio.ended();
    assert_eq!((code, stderr.lines().count()), (0, 1), "{stderr}");
    let lines = ports.log().matches("trying again").count();
    assert_eq!(lines, 2, "{}", ports.log());
    drop(target);
}

#[test]
fn waiting_ends_at_its_time_and_is_not_for_what_does_not_pass() {
    let (daemon, closed) = (Daemon::start_closed(&[]), closed_port());
    let url = format!("ws://{}", daemon.address);
    let command = |token: &str, url: &str, wait: &str| {
        let mut command = Connect::command(url, &["-W", &closed.port.to_string(), "--wait", wait]);
        command.env("TUNNELD_ACCESS_TOKEN", token);
        command
    };
    Connect::spawn(command("mistaken", &url, "1h")).broke("refused with 401");
    Connect::spawn(command(TOKEN, &format!("{url}/x"), "1h")).broke("refused with 404");
    let (code, stderr) = Connect::spawn(command(TOKEN, &url, "1s")).ended();
    let lines: Vec<_> = stderr.lines().collect();
    assert_eq!((code, lines.len()), (1, 2), "{stderr}");
    assert!(
        lines[0].contains("trying again for ") && lines[0].contains(": refused with 502"),
        "{stderr}"
    );
    assert!(
        lines[1].contains("refused with 502") && lines[1].contains("; tried again for "),
        "{stderr}"
    );
    assert!(lines[1].ends_with("s, see --wait"), "{stderr}");
}

#[test]
fn a_server_that_says_nothing_is_not_waited_for_much_longer_than_wait_says() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let start = |wait, dial_timeout| {
        let options = ["-W", "1", "--wait", wait, "--dial-timeout", dial_timeout];
        Connect::spawn(Connect::command(&format!("ws://{address}"), &options))
    };
    let never_again = "raise it if the daemon or the target is only slow; there was no time to try again, see --wait";
    // A try has the time that its answer needs at least.
    let sentence = start("100ms", "600ms").broke(never_again);
    assert!(
        sentence.contains("within 600ms, --dial-timeout: "),
        "{sentence}"
    );
    let sentence = start("2s", "1s").broke(never_again);
    assert!(
        sentence.contains("within 2s, the rest of --wait: "),
        "{sentence}"
    );
    let (code, stderr) = start("4s", "1s").ended();
    let lines: Vec<_> = stderr.lines().collect();
    assert_eq!((code, lines.len()), (1, 2), "{stderr}");
    assert!(
        lines[0].contains("within 3s, 3 times --dial-timeout: "),
        "{stderr}"
    );
    // Of which 3 s are over.
    assert!(!lines[0].contains("trying again for 4s"), "{stderr}");
    assert!(
        lines[1].contains("within 1s, --dial-timeout: ") && lines[1].contains("tried again for"),
        "{stderr}"
    );
}

/// As any other signal, and as ssh ends its ProxyCommand when it gives up.
#[test]
fn a_hangup_before_there_is_a_tunnel_ends_the_client_at_once() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = closed_port();
    let waits = ["--wait", "1h"];
    let silent_port = silent.local_addr().unwrap().port().to_string();
    let silent_url = format!("ws://127.0.0.1:{silent_port}");
    let nobodys_url = format!("ws://127.0.0.1:{}", nobody.port);
    for (url, options) in [(silent_url, &[][..]), (nobodys_url, &waits[..])] {
        for signal in [Signal::HUP, Signal::TERM] {
            let options = [&["-W", "22"], options].concat();
            let mut client = Connect::spawn(Connect::command(&url, &options));
            client.stdin().write_all(b"SSH-2.0-x\r\n").unwrap();
            let held = url.contains(&silent_port).then(|| silent.accept().unwrap());
            if held.is_none() {
                client.logged("trying again for ");
            }
            client.signal(signal);
            assert_eq!(client.killed_by(), Some(signal.as_raw()));
            drop(held);
        }
    }
}

/// Those that went in order, and those that have asked for something before, as a request that timed out. It would run
/// for nobody, and again for whoever tries again.
#[test]
fn a_local_client_that_leaves_is_waited_for_no_longer() {
    let (daemon, closed) = (Daemon::start(&[]), closed_port());
    let target = format!("127.0.0.1:{}", closed.port);
    let forward = format!("127.0.0.1:0:{target}");
    let client = Connect::with(&daemon, &["-L", &forward, "--wait", "1h"]);
    let left = || client.log().matches("it has left after").count();
    let leave = |sent: &[u8], go: fn(TcpStream)| {
        let mut local = client.dial();
        local.write_all(sent).unwrap();
        let peer = local.local_addr().unwrap();
        client.logged(&format!(
            "connection of {peer} to {target}: trying again for "
        ));
        go(local);
        client.logged(&format!(
            "connection of {peer} to {target}: it has left after"
        ));
    };
    leave(b"", reset);
    leave(b"", drop);
    leave(b"GET / HTTP/1.1\r\n\r\n", reset);
    leave(b"GET / HTTP/1.1\r\n\r\n", drop);
    assert!(!client.log().contains("WARN"), "{}", client.log());
    // One that has only ended its direction waits for its answer.
    let mut local = client.dial();
    local.write_all(b"hello").unwrap();
    local.shutdown(Shutdown::Write).unwrap();
    let peer = local.local_addr().unwrap();
    client.logged(&format!("connection of {peer} to {target}: trying again"));
    let refused = daemon.log().matches("status=502").count();
    daemon.logged(refused + 3, &["status=502"]);
    drop(closed);
    let echo = Target::echo_on(&target);
    assert_eq!(read_to_end(&mut local), (b"hello".to_vec(), true));
    assert_eq!(left(), 4, "{}", client.log());
    drop(echo);
}
