//! Tells a service manager, such as systemd, how far the daemon is (sd_notify(3)).
//!
//! It is written out here as the sd-notify crate knows no abstract addresses and waits for a busy manager without
//! a limit.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// How long a busy manager is waited for. A lost `READY=1` would be a failed start, but clients wait too.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Sends `state`, lines such as `READY=1`, to the manager's socket: a path, or a name behind `@`. Without one
/// nothing happens, and a failure is a line in the log.
pub fn notify(socket: Option<&OsStr>, state: &str) {
    let Some(socket) = socket else {
        return;
    };
    if let Err(error) = send(socket, state) {
        log::warn!(
            "cannot tell the service manager at NOTIFY_SOCKET={}: {error}; unset it if there is none",
            socket.display()
        );
    }
}

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    let sender = UnixDatagram::unbound()?;
    sender.set_write_timeout(Some(TIMEOUT))?;
    sender.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}
