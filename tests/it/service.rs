//! What a service manager is told, by sd_notify.

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use rustix::process::Signal;

use crate::support::*;

/// Starts a daemon that is to tell how far it is at `address`.
fn start(address: impl AsRef<OsStr>, options: &[&str]) -> Daemon {
    let mut command = Daemon::command(options);
    command.env("NOTIFY_SOCKET", address);
    Daemon::spawn(command)
}

/// The next message.
fn told(manager: &UnixDatagram) -> String {
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let mut message = [0; 1024];
    let length = manager.recv(&mut message).unwrap();
    String::from_utf8(message[..length].to_vec()).unwrap()
}

/// Whether the daemon answers.
fn serves(daemon: &Daemon) -> bool {
    daemon.get("/health", &[]).status == 204
}

#[test]
fn it_says_ready_before_it_serves_and_stopping_once_it_is_to_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    let mut daemon = start(&path, &["--shutdown-grace", "300s"]);
    assert!(serves(&daemon));
    manager.set_nonblocking(true).unwrap();
    let ready = told(&manager);
    let address = daemon.address;
    assert_eq!(ready, format!("READY=1\nSTATUS=listening on {address}"));
    manager.set_nonblocking(false).unwrap();

    let target = Target::echo();
    let mut client = Client::open(&daemon, target.port);
    daemon.signal(Signal::TERM);
    assert!(told(&manager).starts_with("STOPPING=1\nSTATUS="));
    assert!(daemon.is_running());
    client.send_close(1000);
    assert_eq!(client.see(), CLOSE_1000);
    drop(client);
    assert_eq!(daemon.exit().code(), Some(0));
}

#[test]
fn an_abstract_address_is_one_too() {
    let name = format!("tunneld-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let manager = UnixDatagram::bind_addr(&address).unwrap();
    let _daemon = start(format!("@{name}"), &[]);
    assert!(told(&manager).starts_with("READY=1\n"));
}

#[test]
fn a_manager_that_is_not_there_keeps_nobody_from_being_served() {
    let directory = tempfile::tempdir().unwrap();
    let nobody = directory.path().join("nobody");
    let too_long = "/x".repeat(100);
    for address in [nobody.as_os_str(), OsStr::new(&too_long), OsStr::new("@")] {
        let mut daemon = start(address, &[]);
        assert!(serves(&daemon), "{address:?}");
        daemon.logged(1, &["WARN", "NOTIFY_SOCKET=", address.to_str().unwrap()]);
        daemon.signal(Signal::TERM);
        assert_eq!(daemon.exit().code(), Some(0), "{address:?}");
    }
    let daemon = start("", &[]);
    assert!(serves(&daemon) && !daemon.log().contains("NOTIFY_SOCKET"));
}

/// A socket whose buffer is full takes nothing more.
#[test]
fn a_manager_that_does_not_listen_is_not_waited_for_for_long() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let _manager = UnixDatagram::bind(&path).unwrap();
    let sender = UnixDatagram::unbound().unwrap();
    sender.set_nonblocking(true).unwrap();
    while sender.send_to(b"full", &path).is_ok() {}
    let daemon = start(&path, &[]);
    assert!(serves(&daemon));
    daemon.logged(1, &["WARN", "NOTIFY_SOCKET="]);
}
