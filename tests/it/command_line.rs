//! Options, exit codes, and the log lines of a tunnel.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::*;

fn wrong(options: &[&str]) -> String {
    let (code, stderr) = fails_to_start(Daemon::command(options));
    assert_eq!(code, 2, "{options:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{options:?}: {stderr}");
    stderr
}

#[test]
fn a_wrong_option_is_one_line_and_exit_code_2() {
    for (options, part) in [
        (&["--nonsense"][..], "--nonsense"),
        (&["--listen", "nowhere"], "nowhere"),
        (&["--listen", "unix:"], "unix:/run"),
        (&["--ping-interval", "soon"], "soon"),
        (&["--ping-interval", "0s"], "at least 1ms"),
        (&["--linger", "500days"], "at most"),
        (&["--log-format", "xml"], ": write text or json"),
        (&["--trust-forwarded", "proxy"], "10.0.0.0/8"),
        (&["--idle-timeout", "0s"], "at least 1ms"),
        (&["--exit-when-idle", "0s"], "at least 1ms"),
        (&["--max-connections", "0"], "at least 1"),
        (&["--max-connections", "many"], "many"),
        (&["--allow-origin", "app.example"], "app.example"),
        (&["extra"], "extra"),
    ] {
        let line = wrong(options);
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn a_wrong_environment_is_one_line_and_exit_code_2() {
    let mut command = Daemon::command(&[]);
    command.env("TUNNELD_STALL_TIMEOUT", "never");
    let (code, stderr) = fails_to_start(command);
    assert_eq!((code, stderr.lines().count()), (2, 1), "{stderr}");
    assert!(stderr.contains("never"), "{stderr}");
}

#[test]
fn a_port_in_use_is_one_line_and_exit_code_2() {
    let target = Target::listen();
    let line = wrong(&["--listen", &format!("127.0.0.1:{}", target.port)]);
    assert!(
        line.contains("in use") && line.contains(&target.port.to_string()),
        "{line}"
    );
}

#[test]
fn it_does_not_listen_to_the_world_without_a_token() {
    let line = wrong(&["--listen", "0.0.0.0:0"]);
    assert!(
        line.contains("TUNNELD_ACCESS_TOKEN") && line.contains("--no-auth"),
        "{line}"
    );
    Daemon::start(&["--listen", "[::1]:0"]);
    let open = Daemon::start(&["--listen", "127.0.0.2:0", "--no-auth"]);
    open.logged(1, &["WARN", "no access token"]);
    let closed = Daemon::start_closed(&[]);
    assert!(!closed.log().contains("WARN"), "{}", closed.log());
}

#[test]
fn a_token_and_no_auth_contradict_each_other() {
    let mut command = Daemon::command(&["--no-auth"]);
    command.env("TUNNELD_ACCESS_TOKEN", TOKEN);
    let (code, stderr) = fails_to_start(command);
    assert_eq!(code, 2);
    assert!(
        stderr.contains("--no-auth") && !stderr.contains(TOKEN),
        "{stderr}"
    );
}

#[test]
fn an_empty_token_is_no_token_and_not_an_open_daemon() {
    let mut command = Daemon::command(&[]);
    command.env("TUNNELD_ACCESS_TOKEN", "");
    let (code, stderr) = fails_to_start(command);
    assert_eq!(code, 2);
    assert!(stderr.contains("TUNNELD_ACCESS_TOKEN is empty"), "{stderr}");
}

#[test]
fn the_token_can_stand_in_a_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let path = file.path().to_str().unwrap();
    let daemon = Daemon::start(&["--access-token-file", path]);
    let target = Target::echo();
    let url = format!("/tunnel?port={}", target.port);
    assert_eq!(daemon.get_upgrade(&url, &[]).status, 401);
    Client::open_with(&daemon, &url, &[&format!("X-Access-Token: {TOKEN}")]);
    let line = wrong(&["--access-token-file", "/nonexistent/token"]);
    assert!(line.contains("/nonexistent/token"), "{line}");
}

#[test]
fn every_option_has_a_variable() {
    let help = String::from_utf8(Daemon::command(&["--help"]).output().unwrap().stdout).unwrap();
    for option in [
        "listen",
        "access-token-file",
        "no-auth",
        "allow-origin",
        "allow-host",
        "log-format",
        "trust-forwarded",
        "allow-target",
        "deny-target",
        "max-connections",
        "head-timeout",
        "dial-timeout",
        "ping-interval",
        "ping-timeout",
        "stall-timeout",
        "linger",
        "idle-timeout",
        "exit-when-idle",
        "shutdown-grace",
    ] {
        let variable = format!("TUNNELD_{}", option.replace('-', "_").to_uppercase());
        assert!(
            help.contains(&format!("--{option}")) && help.contains(&variable),
            "{option} in {help}"
        );
    }
    let mut command = Daemon::command(&["--listen", "127.0.0.1:0"]);
    command.env("TUNNELD_MAX_CONNECTIONS", "1").env(
        "TUNNELD_ALLOW_ORIGIN",
        "https://a.example,https://b.example",
    );
    let daemon = Daemon::spawn(command);
    let target = Target::echo();
    Client::open_with(
        &daemon,
        &format!("/tunnel?port={}", target.port),
        &["Origin: https://b.example"],
    );
}

#[test]
fn an_empty_variable_of_an_option_is_an_unset_one() {
    let help = String::from_utf8(Daemon::command(&["--help"]).output().unwrap().stdout).unwrap();
    let variables = help.split("[env: ").skip(1);
    let variables: Vec<_> = variables
        .map(|rest| rest.split_once('=').unwrap().0)
        .collect();
    assert!(variables.len() >= 14, "{variables:?}");
    let with_empty = |options: &[&str]| {
        let mut command = Daemon::command(options);
        command.envs(variables.iter().map(|variable| (variable, "")));
        command
    };
    let daemon = Daemon::spawn(with_empty(&[]));
    assert_eq!(daemon.get("/health", &[]).status, 204);
    let output = with_empty(&["--help"]).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), help);
}

/// Starts a daemon with this `RUST_LOG` and returns its log once it serves and has ended.
fn log_with(rust_log: &str) -> String {
    let mut command = Daemon::command(&["--listen", "127.0.0.1:0"]);
    let mut child = command
        .env("RUST_LOG", rust_log)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Until it has a handler a signal ends it without a word.
    let pid = Pid::from_child(&child);
    within(LIMIT, "it handles signals", || {
        catches(pid, Signal::TERM).then_some(())
    });
    kill_process(pid, Signal::TERM).unwrap();
    let mut log = String::new();
    let mut stderr = child.stderr.take().unwrap();
    stderr.read_to_string(&mut log).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    log
}

#[test]
fn a_log_filter_for_other_programs_leaves_the_own_lines_alone() {
    for others in ["", "myapp=debug", "myapp=off,hyper=warn", "myapp"] {
        let log = log_with(others);
        assert!(
            log.contains("WARN") && log.contains("listening on "),
            "{log}"
        );
        assert!(!log.contains("RUST_LOG"), "{log}");
    }
}

#[test]
fn a_log_filter_for_all_or_for_tunneld_is_kept() {
    for (filter, has_warning, has_address) in [
        ("warn", true, false),
        ("off", false, false),
        ("myapp=debug,error", false, false),
        ("tunneld=warn", true, false),
        ("tunneld::daemon=debug", false, true),
        ("tunneld=debug", true, true),
    ] {
        let log = log_with(filter);
        assert_eq!(
            log.contains("no access token"),
            has_warning,
            "{filter}: {log}"
        );
        assert_eq!(
            log.contains("listening on "),
            has_address,
            "{filter}: {log}"
        );
    }
}

#[test]
fn a_log_filter_that_makes_no_sense_is_told_and_ignored() {
    for filter in ["tunneld=loud", "a=b=c"] {
        let log = log_with(filter);
        let complaint = format!("RUST_LOG={filter:?} is ignored");
        assert!(
            log.contains(&complaint) && log.contains("listening on "),
            "{log}"
        );
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    for option in ["--help", "-h", "--version"] {
        let output = Command::new(env!("CARGO_BIN_EXE_tunneld"))
            .arg(option)
            .output()
            .unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{option}"
        );
        assert!(
            String::from_utf8(output.stdout).unwrap().contains("tunnel"),
            "{option}"
        );
    }
}

#[test]
fn a_tunnel_is_logged_at_its_start_and_once_at_its_end() {
    let daemon = Daemon::start_closed(&[]);
    let target = Target::echo();
    let token = format!("X-Access-Token: {TOKEN}");
    let mut client =
        Client::open_with(&daemon, &format!("/tunnel?port={}", target.port), &[&token]);
    let peer = format!("peer={}", client.stream.local_addr().unwrap());
    let name = format!("target=localhost:{}", target.port);
    daemon.logged(1, &["tunnel opened:", "id=0", &peer, &name]);
    client.send(b"12345");
    client.send_close(1000);
    assert_eq!(client.see_all(), (b"12345".to_vec(), CLOSE_1000));
    let line = daemon.logged(
        1,
        &["tunnel closed:", "id=0", &peer, &name, "up=5", "down=5"],
    );
    assert!(
        line.contains("duration=0.") && line.contains("reason=\"closed in order\""),
        "{line}"
    );
    drop(client);
    assert_eq!(daemon.log().matches("tunnel closed:").count(), 1);
    assert!(!daemon.log().contains(TOKEN));
}

fn start_with_tmpdir(directory: &Path) -> Daemon {
    let mut command = Daemon::command(&[]);
    command.env("TMPDIR", directory);
    Daemon::spawn(command)
}

#[test]
fn a_killed_daemon_leaves_no_file_behind() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = start_with_tmpdir(directory.path());
    assert_eq!(daemon.ask("GET /health HTTP/1.0\r\n\r\n").status, 204);
    daemon.signal(rustix::process::Signal::KILL);
    daemon.exit();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_temporary_directory_with_a_long_path_does_not_matter() {
    let directory = tempfile::tempdir().unwrap();
    for length in [50, 88, 200] {
        let path = directory.path().join("x".repeat(length));
        fs::create_dir(&path).unwrap();
        let daemon = start_with_tmpdir(&path);
        assert_eq!(daemon.get("/health", &[]).status, 204, "{length}");
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0, "{length}");
    }
}

/// The fields of a log line, in their order.
fn fields(line: &str) -> Vec<String> {
    let (_, fields) = line.split_once("] ").unwrap();
    let mut in_quotes = false;
    fields
        .split(|c: char| {
            in_quotes ^= c == '"';
            c == ' ' && !in_quotes
        })
        .filter_map(|word| Some(word.split_once('=')?.0.to_owned()))
        .collect()
}

#[test]
fn log_lines_of_a_kind_have_the_same_fields_in_the_same_order() {
    let daemon = Daemon::start(&["--max-connections", "1"]);
    let target = Target::echo();
    for path in ["/nothing", "/tunnel?port=0", "/tunnel?port=1&host=a%22b"] {
        daemon.get_upgrade(path, &[]);
    }
    daemon.ask("nonsense\r\n\r\n");
    let mut client = Client::open(&daemon, target.port);
    assert_eq!(daemon.get("/health", &[]).status, 503);
    client.send_close(1000);
    client.see_all();
    daemon.logged(1, &["tunnel closed:"]);
    drop(Client::open(&daemon, target.port));
    daemon.logged(2, &["tunnel closed:"]);
    let log = daemon.log();
    for (kind, count, expected) in [
        ("refused:", 5, "id peer status reason"),
        ("tunnel opened:", 2, "id peer target address"),
        (
            "tunnel closed:",
            2,
            "id peer target address up down duration end reason",
        ),
    ] {
        let lines: Vec<_> = log.lines().filter(|line| line.contains(kind)).collect();
        assert_eq!(lines.len(), count, "{kind} in {log}");
        for line in lines {
            assert_eq!(fields(line).join(" "), expected, "{line}");
        }
    }
}

#[test]
fn debug_lines_explain_one_tunnel_from_head_to_end() {
    let mut command = Daemon::command(&["--ping-interval", "50ms"]);
    command
        .env("RUST_LOG", "debug")
        .env("TUNNELD_ACCESS_TOKEN", TOKEN);
    let daemon = Daemon::spawn(command);
    let target = Target::echo();
    let url = format!("/tunnel?port={}", target.port);
    let mut client = Client::open_with(&daemon, &url, &[&format!("X-Access-Token: {TOKEN}")]);
    daemon.logged(1, &["ping: id=0"]);
    client.send_close(1000);
    client.see_all();
    daemon.logged(1, &["tunnel closed: id=0"]);
    let log = daemon.log();
    let mut rest = log.as_str();
    for step in [
        "connected: id=0 peer=",
        &format!("request: id=0 method=GET target=\"{url}\""),
        "dialing: id=0 target=localhost:",
        "attempt: address=127.0.0.1:",
        "dialed: id=0",
        "tunnel opened: id=0",
        "ping: id=0",
        "to_stream ended: id=0 how=Closed",
        "tunnel closed: id=0",
    ] {
        let at = rest.find(step);
        rest = &rest[at.unwrap_or_else(|| panic!("{step} in its place in {log}"))..];
    }
    assert!(log.contains("from_stream ended: id=0 how=Eof") && !log.contains(TOKEN));
}

#[test]
fn both_programs_and_the_answers_have_the_crates_version() {
    let version = env!("CARGO_PKG_VERSION");
    for (arguments, name) in [
        (&["--version"][..], "tunneld"),
        (&["connect", "--version"], "tunneld connect"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunneld"));
        let output = command.args(arguments).output().unwrap();
        let shown = String::from_utf8(output.stdout).unwrap();
        assert_eq!(shown, format!("{name} {version}\n"));
    }
    let answer = Daemon::start(&[]).get("/health", &[]);
    let server = format!("tunneld/{version}");
    assert_eq!(answer.header("server"), Some(server.as_str()));
}
