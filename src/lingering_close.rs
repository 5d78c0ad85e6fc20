//! Closing a connection whose client may still be sending.
//!
//! The kernel answers bytes that arrive at a closed socket, or lie in it unread, with a RST, and the client
//! then loses the answer it has not read yet (RFC 9112 §9.6). So the write side is shut down, what still comes
//! is read and dropped until the client's EOF, and only then is the socket closed: the lingering close.

use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::net::{RecvFlags, recv};

/// How long a refused client may go on sending.
const LIMIT: Duration = Duration::from_secs(2);

/// How many bytes a refused client may go on sending.
const MAX_BYTES: usize = 1024 * 1024;

/// Reads and drops what `client` still sends, until its EOF, for at most `limit`.
pub fn drain(mut client: &TcpStream, limit: Duration) {
    let _ = client.shutdown(Shutdown::Write);
    let deadline = Instant::now() + limit;
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || client.set_read_timeout(Some(left)).is_err() {
            return;
        }
        match client.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// One thread that closes all refused connections, so that none of them holds a thread or a place.
#[derive(Debug)]
pub struct LingeringClose {
    sender: SyncSender<Arc<TcpStream>>,
    wake: Arc<OwnedFd>,
}

impl LingeringClose {
    /// Starts the thread. It ends when this is dropped. At most `max_open` connections are waited for at once;
    /// for one more, the oldest is closed.
    ///
    /// # Errors
    /// When the system refuses a thread or a descriptor.
    pub fn start(max_open: usize) -> io::Result<LingeringClose> {
        // Half of them in the queue, half in the thread's hands.
        let half = max_open.div_ceil(2);
        let (sender, receiver) = sync_channel(half);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let woken = Arc::clone(&wake);
        let closer = thread::Builder::new()
            .name("lingering-close".into())
            .stack_size(64 * 1024);
        closer.spawn(move || close_all(&receiver, &woken, half))?;
        Ok(LingeringClose { sender, wake })
    }

    /// Takes over a connection to which the last byte has been written. When too many are waiting already,
    /// it is closed at once.
    pub fn close(&self, client: Arc<TcpStream>) {
        let _ = client.shutdown(Shutdown::Write);
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.sender.try_send(client)
        {
            log::debug!(
                "too many refused connections at once: one is closed without waiting for its client"
            );
        }
        self.wake();
    }

    fn wake(&self) {
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for LingeringClose {
    fn drop(&mut self) {
        let (sender, _) = sync_channel(0);
        drop(std::mem::replace(&mut self.sender, sender));
        self.wake();
    }
}

/// A connection being closed.
struct Closing {
    client: Arc<TcpStream>,
    until: Instant,
    bytes: usize,
}

fn close_all(receiver: &Receiver<Arc<TcpStream>>, wake: &OwnedFd, max_open: usize) {
    let mut open: Vec<Closing> = Vec::new();
    loop {
        wait(&open, wake);
        let mut count = [0; 8];
        let _ = rustix::io::read(wake, &mut count);
        loop {
            match receiver.try_recv() {
                Ok(client) => open.push(Closing {
                    client,
                    until: Instant::now() + LIMIT,
                    bytes: 0,
                }),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        open.drain(..open.len().saturating_sub(max_open));
        open.retain_mut(Closing::goes_on);
    }
}

fn wait(open: &[Closing], wake: &OwnedFd) {
    let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
    fds.extend(
        open.iter()
            .map(|closing| PollFd::new(&*closing.client, PollFlags::IN)),
    );
    let next = open
        .iter()
        .map(|closing| closing.until.saturating_duration_since(Instant::now()))
        .min();
    // An error here is want of memory or EINTR; the loop looks at the sockets and the clock again.
    let _ = poll(
        &mut fds,
        next.and_then(|limit| Timespec::try_from(limit).ok())
            .as_ref(),
    );
}

impl Closing {
    fn goes_on(&mut self) -> bool {
        let mut buffer = [0; 4096];
        match recv(&*self.client, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return false,
            Ok((count, _)) => self.bytes += count,
            Err(error) if error == rustix::io::Errno::AGAIN => {}
            Err(_) => return false,
        }
        self.bytes < MAX_BYTES && Instant::now() < self.until
    }
}
