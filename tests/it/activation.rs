//! Sockets that a service manager hands over (sd_listen_fds(3)).

use std::fs::File;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::support::*;

/// `command` with these descriptors as 3 and 4 and what tells it so, as a service manager would start it.
fn handed(command: &Command, first: OwnedFd, second: OwnedFd, count: &str) -> Command {
    let mut shell = Command::new("sh");
    let script = format!(
        "exec 3<&0 4<&1 0</dev/null 1>/dev/null; LISTEN_PID=$$ LISTEN_FDS={count} exec \"$0\" \"$@\""
    );
    shell.args(["-c", &script]);
    shell.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell.stdin(Stdio::from(first)).stdout(Stdio::from(second));
    shell
}

fn nothing() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn reaches(mut client: Client) {
    client.send(b"echo");
    assert_eq!(client.see_all_of(4), b"echo");
    client.send_close(1000);
    assert_eq!(client.see(), CLOSE_1000);
}

#[test]
fn a_socket_that_is_handed_over_takes_the_place_of_listen() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // It has come before the daemon.
    let early = TcpStream::connect(address).unwrap();
    early.set_read_timeout(Some(LIMIT)).unwrap();
    // Without a token this would not even start.
    let command = Daemon::bare_command(&["--listen", "0.0.0.0:1"]);
    let mut daemon = Daemon::spawn(handed(&command, listener.into(), nothing(), "1"));
    assert_eq!(daemon.address, address);
    let target = Target::echo();
    let head = request("GET", &format!("/tunnel?port={}", target.port), &UPGRADE);
    reaches(Client::upgrade(early, head.as_bytes()));
    reaches(Client::open(&daemon, target.port));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit().code(), Some(0));
}

#[test]
fn several_are_served_and_a_managers_file_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tunneld.sock");
    let unix = UnixListener::bind(&path).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let command = Daemon::bare_command(&[]);
    let mut daemon = Daemon::spawn(handed(&command, unix.into(), tcp.into(), "2"));
    daemon.logged(1, &[&format!("listening on unix:{}", path.display())]);
    let target = Target::echo();
    reaches(Client::open(&daemon, target.port));
    let head = request("GET", &format!("/tunnel?port={}", target.port), &UPGRADE);
    reaches(Client::upgrade(connect_unix(&path), head.as_bytes()));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.exit().code(), Some(0));
    assert!(path.exists());
}

#[test]
fn what_is_handed_over_for_all_the_world_wants_a_token() {
    let handed_over = || TcpListener::bind("0.0.0.0:0").unwrap();
    let command = Daemon::bare_command(&[]);
    let command = handed(&command, handed_over().into(), nothing(), "1");
    let (code, message) = fails_to_start(command);
    assert_eq!(code, 2);
    assert!(
        message.contains("refusing to listen on 0.0.0.0:"),
        "{message}"
    );
    let mut command = Daemon::bare_command(&[]);
    command.env("TUNNELD_ACCESS_TOKEN", TOKEN);
    Daemon::spawn(handed(&command, handed_over().into(), nothing(), "1"));
}

#[test]
fn what_is_no_listening_stream_socket_is_refused() {
    let connected = TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = TcpStream::connect(connected.local_addr().unwrap()).unwrap();
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    for fd in [nothing(), connected.into(), datagrams.into()] {
        let command = handed(&Daemon::bare_command(&[]), fd, nothing(), "1");
        let (code, message) = fails_to_start(command);
        assert_eq!(code, 2);
        assert!(message.contains("descriptor 3 of LISTEN_FDS"), "{message}");
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let command = handed(
        &Daemon::bare_command(&[]),
        listener.into(),
        nothing(),
        "many",
    );
    let (code, message) = fails_to_start(command);
    assert_eq!(
        (code, message.contains("LISTEN_FDS")),
        (2, true),
        "{message}"
    );
}

#[test]
fn a_number_of_sockets_that_was_not_handed_over_is_refused() {
    for count in ["9", "999999999", "4294967295", "18446744073709551616"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let command = handed(
            &Daemon::bare_command(&[]),
            listener.into(),
            nothing(),
            count,
        );
        let (code, message) = fails_to_start(command);
        assert_eq!(code, 2, "{message}");
        assert!(message.contains("LISTEN_FDS"), "{message}");
    }
}

#[test]
fn what_was_meant_for_another_process_is_left_alone() {
    let mut command = Daemon::command(&[]);
    command.env("LISTEN_PID", "1").env("LISTEN_FDS", "1");
    Daemon::spawn(command);
    let mut command = Daemon::command(&[]);
    command.env("LISTEN_FDS", "0");
    Daemon::spawn(command);
}
