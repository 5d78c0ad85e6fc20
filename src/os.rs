//! What the system is asked for in more than one place, each once: a wait, a way to wake it, a counted quota, and
//! what a connection's peer has not acknowledged.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;

/// Waits until one of `fds` is ready, or for `limit`. `false` if none is; that may be early, after a signal.
///
/// # Errors
/// When the system has no memory for the wait.
pub(crate) fn wait(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> io::Result<bool> {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    match poll(fds, limit.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether `fd` is ready now, and for which of `flags`. Errors and hang-ups are reported whether asked for or not.
pub(crate) fn ready(fd: impl AsFd, flags: PollFlags) -> PollFlags {
    let mut fds = [PollFd::new(&fd, flags)];
    match wait(&mut fds, Some(Duration::ZERO)) {
        Ok(true) => fds[0].revents(),
        _ => PollFlags::empty(),
    }
}

/// Whether nothing can be read from a connection any more, and nothing written to it.
pub(crate) fn is_hung_up(fd: impl AsFd) -> bool {
    ready(fd, PollFlags::empty()).intersects(PollFlags::HUP | PollFlags::ERR)
}

/// Wakes threads that wait for its descriptor to become readable, which it stays until it is cleared.
#[derive(Debug)]
pub(crate) struct Waker(OwnedFd);

impl Waker {
    /// # Errors
    /// When the system has no descriptor left.
    pub(crate) fn new() -> io::Result<Waker> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Waker(eventfd(0, flags)?))
    }

    /// May be called from any thread, and from a signal handler's.
    pub(crate) fn wake(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn clear(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.0, &mut count);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// So many at a time, and no more, of something that the whole process shares.
#[derive(Debug)]
pub(crate) struct Quota {
    taken: AtomicUsize,
    limit: usize,
}

impl Quota {
    pub(crate) const fn new(limit: usize) -> Quota {
        Quota {
            taken: AtomicUsize::new(0),
            limit,
        }
    }

    /// One of them, until it is dropped.
    pub(crate) fn take(&'static self) -> Option<Taken> {
        let one_more = |count| (count < self.limit).then_some(count + 1);
        self.taken
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more)
            .ok()
            .map(|_| Taken(self))
    }
}

/// One of a [`Quota`].
#[derive(Debug)]
pub(crate) struct Taken(&'static Quota);

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How many bytes given to `stream`, its FIN counted as one, its peer's system has not acknowledged. `None` where
/// that can't be told: there is no `/proc`, or it is no TCP connection.
///
/// It is read from the system's table of connections, which takes time where there are many, so it is for rare
/// moments. (`SIOCOUTQ` would tell the same, but no safe call gives access to it.)
pub(crate) fn unacknowledged(stream: &TcpStream) -> Option<u64> {
    /// The table is not read at one moment, and a row can be missed while others come and go.
    const TRIES: usize = 4;
    let local = stream.local_addr().ok()?;
    (0..TRIES).find_map(|_| match stream.peer_addr() {
        Ok(peer) => send_queue(local, peer),
        // It is over.
        Err(_) => Some(0),
    })
}

fn send_queue(local: SocketAddr, peer: SocketAddr) -> Option<u64> {
    let line = line_in_table(local, peer)?;
    let queues = line.split_whitespace().nth(1)?;
    u64::from_str_radix(queues.split(':').next()?, 16).ok()
}

/// Whether the process at the other end of `stream` has closed its socket, and not just ended its direction, which looks
/// the same from here. `None` where that can't be told: the process is on another machine or in another network
/// namespace, or there is no `/proc`.
///
/// A socket that belongs to no process any more has the inode 0. As to cost, see [`unacknowledged`].
pub(crate) fn is_closed_over_there(stream: &TcpStream) -> Option<bool> {
    let canonical =
        |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let (here, there) = (stream.local_addr().ok()?, stream.peer_addr().ok()?);
    let line = line_in_table(canonical(there), canonical(here))?;
    let inode = line.split_whitespace().nth(6)?;
    Some(inode == "0")
}

/// What the system's table of connections has behind the two addresses of one: its state, its queues, its timer, ...
fn line_in_table(local: SocketAddr, peer: SocketAddr) -> Option<String> {
    let table = if local.is_ipv4() { "tcp" } else { "tcp6" };
    let lines = BufReader::new(File::open(format!("/proc/self/net/{table}")).ok()?).lines();
    let name = format!(" {} {} ", in_table(local), in_table(peer));
    let mut found = lines.map_while(Result::ok).filter_map(|line| {
        let (_, behind) = line.split_once(&name)?;
        Some(behind.to_owned())
    });
    found.next()
}

/// An address as the table has it (proc_net_tcp in the kernel's documentation): words of the host's byte order in
/// hexadecimal.
fn in_table(address: SocketAddr) -> String {
    let octets = match address.ip() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let mut text = String::with_capacity(40);
    for word in octets.as_chunks::<4>().0 {
        let _ = write!(text, "{:08X}", u32::from_ne_bytes(*word));
    }
    let _ = write!(text, ":{:04X}", address.port());
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::time::Instant;

    #[test]
    fn what_a_peer_has_not_acknowledged_is_counted() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let mut receiver = listener.accept().unwrap().0;
            assert_eq!(unacknowledged(&sender), Some(0));
            sender.set_nonblocking(true).unwrap();
            while sender.write(&[0; 100_000]).is_ok() {}
            assert!(unacknowledged(&sender).unwrap() > 0);
            sender.shutdown(std::net::Shutdown::Write).unwrap();
            receiver.read_to_end(&mut Vec::new()).unwrap();
            // The last acknowledgement may be on its way.
            let deadline = Instant::now() + Duration::from_secs(10);
            while unacknowledged(&sender) != Some(0) {
                assert!(Instant::now() < deadline);
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn a_socket_that_was_closed_is_told_from_one_that_was_half_closed() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let mut to = listener.local_addr().unwrap();
            if to.ip().is_unspecified() {
                to.set_ip(IpAddr::from([127, 0, 0, 1]));
            }
            let mut near = TcpStream::connect(to).unwrap();
            let far = listener.accept().unwrap().0;
            near.write_all(b"x").unwrap();
            assert_eq!(is_closed_over_there(&far), Some(false));
            near.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(is_closed_over_there(&far), Some(false));
            drop(near);
            let deadline = Instant::now() + Duration::from_secs(10);
            while is_closed_over_there(&far) != Some(true) {
                assert!(Instant::now() < deadline);
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn a_quota_is_given_back() {
        static QUOTA: Quota = Quota::new(1);
        let taken = QUOTA.take();
        assert!(taken.is_some() && QUOTA.take().is_none());
        drop(taken);
        assert!(QUOTA.take().is_some());
    }
}
