//! Where the daemon is reached: its own TCP and Unix sockets, or those a service manager hands over.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use super::peer::Peer;
use crate::accept::{self, BACKLOG};
use crate::cli::Bind;
use crate::token::TOKEN_VARIABLE;

/// What may connect to a Unix socket of ours: its owner and its group (unix(7): that takes the right to write).
const MODE: u32 = 0o660;

/// How long another daemon may take to make its socket in the same directory.
const LOCK_LIMIT: Duration = Duration::from_secs(1);

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// Port 0 takes a free one.
    Tcp(Bind),
    /// A socket's file.
    Unix(PathBuf),
}

impl ListenAddress {
    /// Parses what [`Bind::parse`] does, or `unix:PATH`.
    ///
    /// # Errors
    /// What may be given.
    pub fn parse(text: &str) -> Result<ListenAddress, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("no path: write unix:/run/tunneld.sock".into()),
            Some(path) => Ok(ListenAddress::Unix(path.into())),
            None => Bind::parse(text)
                .map(ListenAddress::Tcp)
                .map_err(|error| format!("{error}; or unix:PATH")),
        }
    }

    /// Whether whoever reaches it is on this machine.
    fn is_local(&self) -> bool {
        match self {
            ListenAddress::Tcp(bind) => bind.is_loopback(),
            ListenAddress::Unix(_) => true,
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Tcp(bind) => bind.fmt(f),
            ListenAddress::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A socket that is listened on. One of ours leaves no file behind when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: ListenSocket,
    /// With the port that was taken.
    pub address: ListenAddress,
    /// Dropped with it.
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum ListenSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Listens on the sockets that a service manager hands over (`LISTEN_FDS`, sd_listen_fds(3)), or else on `addresses`;
/// only on this machine, if `stays_here`. To be called once, before anything else has opened a descriptor.
///
/// # Errors
/// In a sentence: when the daemon would be open beyond this machine without a word about it, an address is in use or
/// not ours, or what was handed over is no listening stream socket.
pub fn listen(addresses: &[ListenAddress], stays_here: bool) -> Result<Vec<Listener>, String> {
    accept::raise_descriptors();
    let inherited = handed_over()?;
    let mut listeners = Vec::with_capacity(inherited.len().max(addresses.len()));
    for (number, fd) in inherited.into_iter().enumerate() {
        let listener = Listener::inherit(fd).map_err(|error| {
            let fd = number + 3;
            format!("descriptor {fd} of LISTEN_FDS can't be listened on: {error}; hand over stream sockets that listen")
        })?;
        check_exposure(&listener.address, stays_here)?;
        listeners.push(listener);
    }
    if listeners.is_empty() {
        for address in addresses {
            check_exposure(address, stays_here)?;
        }
        for address in addresses {
            let bound = Listener::bind(address);
            listeners.extend(bound.map_err(|error| format!("{error}; choose another --listen"))?);
        }
    }
    listeners
        .iter()
        .try_for_each(Listener::set_nonblocking)
        .map_err(|error| format!("cannot listen: {error}"))?;
    Ok(listeners)
}

/// The sockets of a service manager, if it has handed any to this process.
fn handed_over() -> Result<Vec<OwnedFd>, String> {
    let is_open = |fd: u64| fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok();
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let is_for_us = number("LISTEN_PID") == Some(std::process::id().into());
    // A descriptor that is not open would end this process where it is made use of, and any number is taken at its word.
    let count = number("LISTEN_FDS").filter(|_| is_for_us && is_open(0));
    if let Some(missing) = (3..=count.unwrap_or(0).saturating_add(2)).find(|&fd| !is_open(fd)) {
        return Err(format!(
            "LISTEN_FDS={} is more than was handed over: descriptor {missing} is not open",
            count.unwrap_or(0)
        ));
    }
    let sockets = sd_listen_fds::get()
        .map_err(|_| "LISTEN_PID or LISTEN_FDS is not a number: unset both")?
        .into_iter();
    Ok(sockets.map(|(_, fd)| fd.into_std()).collect())
}

/// Running without a token must be either harmless (this machine) or said out loud.
fn check_exposure(address: &ListenAddress, stays_here: bool) -> Result<(), String> {
    if !stays_here || address.is_local() {
        return Ok(());
    }
    Err(format!(
        "refusing to listen on {address} without an access token: set {TOKEN_VARIABLE} or --access-token-file, \
         or say --no-auth if everyone who can connect may reach every port in here"
    ))
}

impl Listener {
    /// One, or two where both loopbacks or all addresses are meant.
    ///
    /// # Errors
    /// In a sentence.
    fn bind(address: &ListenAddress) -> Result<Vec<Listener>, String> {
        let cannot = |error: io::Error| format!("cannot listen on {address}: {error}");
        match address {
            ListenAddress::Tcp(bind) => {
                let sockets = accept::listen(*bind).map_err(|error| error.to_string())?;
                let listeners = sockets.into_iter().map(Listener::of_tcp);
                listeners.collect::<io::Result<_>>().map_err(cannot)
            }
            ListenAddress::Unix(path) => {
                let (socket, file) = bind_unix(path).map_err(cannot)?;
                Ok(vec![Listener {
                    address: address.clone(),
                    socket: ListenSocket::Unix(socket),
                    _file: Some(file),
                }])
            }
        }
    }

    fn of_tcp(socket: TcpListener) -> io::Result<Listener> {
        Ok(Listener {
            address: ListenAddress::Tcp(Bind::At(socket.local_addr()?)),
            socket: ListenSocket::Tcp(socket),
            _file: None,
        })
    }

    /// One of a service manager's, whose file is the manager's, too.
    fn inherit(fd: OwnedFd) -> io::Result<Listener> {
        let socket = SockRef::from(&fd);
        if socket.r#type()? != Type::STREAM || !socket.is_listener()? {
            return Err(io::Error::other("it is not a stream socket that listens"));
        }
        if socket.domain()? != Domain::UNIX {
            socket.set_out_of_band_inline(true)?;
            return Listener::of_tcp(TcpListener::from(fd));
        }
        let socket = UnixListener::from(fd);
        let address = socket.local_addr()?;
        let path = address.as_pathname().unwrap_or(Path::new("(no path)"));
        Ok(Listener {
            address: ListenAddress::Unix(path.to_owned()),
            socket: ListenSocket::Unix(socket),
            _file: None,
        })
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match &self.socket {
            ListenSocket::Tcp(socket) => socket.set_nonblocking(true),
            ListenSocket::Unix(socket) => socket.set_nonblocking(true),
        }
    }

    /// The next connection, if there is one. A Unix socket's is given out as the TCP connection it stands for: std's
    /// type is no more than a descriptor, and what TCP alone has fails on it.
    ///
    /// # Errors
    /// As accept(2).
    pub fn accept(&self) -> io::Result<(TcpStream, Peer)> {
        match &self.socket {
            ListenSocket::Tcp(socket) => {
                let (stream, address) = socket.accept()?;
                Ok((stream, Peer::Tcp(address)))
            }
            ListenSocket::Unix(socket) => {
                let stream = socket.accept()?.0;
                let peer = Peer::of(&stream);
                Ok((TcpStream::from(OwnedFd::from(stream)), peer))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            ListenSocket::Tcp(socket) => socket.as_fd(),
            ListenSocket::Unix(socket) => socket.as_fd(),
        }
    }
}

/// The file of a Unix socket that this process has made. It is removed when this is dropped, if it is still that one.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device_and_inode: (u64, u64),
}

/// Its permissions are set before it listens, so that nobody else gets in meanwhile.
fn bind_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let address = SockAddr::unix(path)?;
    let _alone = lock_directory_of(path);
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    if let Err(error) = socket.bind(&address) {
        if error.kind() != ErrorKind::AddrInUse {
            return Err(error);
        }
        remove_dead(path, &address)?;
        socket.bind(&address)?;
    }
    let file = SocketFile::at(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(MODE))?;
    socket.listen(BACKLOG)?;
    Ok((OwnedFd::from(socket).into(), file))
}

/// A socket that is bound and does not listen yet looks dead to another daemon, which waits as long as this is held.
/// Somebody else's lock is nothing to wait for, and without one only daemons that start at the same moment can collide.
fn lock_directory_of(path: &Path) -> Option<File> {
    let named = path.parent().filter(|parent| *parent != Path::new(""));
    let directory = File::open(named.unwrap_or(Path::new("."))).ok()?;
    let deadline = Instant::now() + LOCK_LIMIT;
    while directory.try_lock().is_err() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    Some(directory)
}

/// Removes the socket of a daemon that was killed, and nothing else.
fn remove_dead(path: &Path, address: &SockAddr) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::other("there is a file that is not a socket"));
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A daemon whose queue is full is alive, too.
    probe.set_nonblocking(true)?;
    match probe.connect(address) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
        _ => Err(io::Error::other("another process listens there")),
    }
}

impl SocketFile {
    fn at(path: &Path) -> io::Result<SocketFile> {
        Ok(SocketFile {
            path: path.to_owned(),
            device_and_inode: device_and_inode(path)?,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if device_and_inode(&self.path).is_ok_and(|now| now == self.device_and_inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn device_and_inode(path: &Path) -> io::Result<(u64, u64)> {
    let file = fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_daemons_that_start_at_once_one_has_the_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        for _ in 0..20 {
            // One that was killed has left it.
            drop(UnixListener::bind(&path).unwrap());
            let starting: Vec<_> = (0..4)
                .map(|_| path.clone())
                .map(|path| thread::spawn(move || bind_unix(&path)))
                .collect();
            let bound: Vec<_> = starting
                .into_iter()
                .filter_map(|starting| starting.join().unwrap().ok())
                .collect();
            assert_eq!(bound.len(), 1);
            std::os::unix::net::UnixStream::connect(&path).unwrap();
        }
    }

    #[test]
    fn an_address_is_of_tcp_or_a_path() {
        let shown = |text: &str| ListenAddress::parse(text).map(|address| address.to_string());
        for text in [
            "127.0.0.1:0",
            "[::]:80",
            "localhost:80",
            "unix:/run/a.sock",
            "unix:a",
        ] {
            assert_eq!(shown(text), Ok(text.to_owned()));
        }
        for text in ["", "unix:", "/run/a.sock", "127.0.0.1", "nowhere:80"] {
            assert!(shown(text).is_err(), "{text}");
        }
    }
}
