//! Closing a connection whose client may still be sending.
//!
//! The kernel answers bytes that arrive at a closed socket, or lie in it unread, with a RST, and the client
//! then loses the answer it has not read yet (RFC 9112 §9.6). So the write side is shut down, what still comes
//! is read and dropped until the client's EOF, and only then is the socket closed: the lingering close.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, recv};

use crate::os::{self, Waker};

/// How long, and for how many bytes, a client may go on sending.
#[derive(Debug, Clone, Copy)]
pub struct DrainLimits {
    /// Until its EOF, at most.
    pub time: Duration,
    /// At most.
    pub bytes: usize,
}

/// With a client that was refused: enough for a body that came along with its request.
pub const AFTER_REFUSAL: DrainLimits = DrainLimits {
    time: Duration::from_secs(2),
    bytes: 1024 * 1024,
};

/// Most clients close as soon as they see our end. Waiting for that is cheaper than waking the thread.
const AT_ONCE: Duration = Duration::from_millis(2);

/// One thread that closes all connections, so that none of them holds a thread or a slot meanwhile.
#[derive(Debug)]
pub struct LingeringClose {
    sender: SyncSender<Closing>,
    wake: Arc<Waker>,
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
        let wake = Arc::new(Waker::new()?);
        let woken = Arc::clone(&wake);
        let closer = thread::Builder::new()
            .name("lingering-close".into())
            .stack_size(64 * 1024);
        closer.spawn(move || close_all(&receiver, &woken, half))?;
        Ok(LingeringClose { sender, wake })
    }

    /// Closes a connection to which the last byte has been written. Waits a moment for the client's EOF before
    /// it hands the connection over.
    pub fn close(&self, client: Arc<TcpStream>, limits: DrainLimits) {
        let mut closing = Closing::new(client, limits);
        if !closing.is_readable_within(AT_ONCE) || closing.drain_some() {
            self.take_over(closing);
        }
    }

    /// The same without waiting.
    pub fn close_later(&self, client: Arc<TcpStream>, limits: DrainLimits) {
        self.take_over(Closing::new(client, limits));
    }

    /// When too many are waiting already, it is closed at once.
    fn take_over(&self, closing: Closing) {
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.sender.try_send(closing)
        {
            log::debug!(
                "too many connections being closed: one is closed without waiting for its client"
            );
        }
        self.wake.wake();
    }
}

impl Drop for LingeringClose {
    fn drop(&mut self) {
        let (sender, _) = sync_channel(0);
        drop(std::mem::replace(&mut self.sender, sender));
        self.wake.wake();
    }
}

/// A connection being closed.
#[derive(Debug)]
struct Closing {
    client: Arc<TcpStream>,
    until: Instant,
    /// How many more may come.
    bytes: usize,
}

fn close_all(receiver: &Receiver<Closing>, wake: &Waker, max_open: usize) {
    let mut open: Vec<Closing> = Vec::new();
    loop {
        wait(&open, wake);
        wake.clear();
        loop {
            match receiver.try_recv() {
                Ok(closing) => open.push(closing),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        open.drain(..open.len().saturating_sub(max_open));
        open.retain_mut(Closing::drain_some);
    }
}

fn wait(open: &[Closing], wake: &Waker) {
    let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
    fds.extend(
        open.iter()
            .map(|closing| PollFd::new(&*closing.client, PollFlags::IN)),
    );
    let next = open
        .iter()
        .map(|closing| closing.until.saturating_duration_since(Instant::now()))
        .min();
    // An error here is want of memory; the loop looks at the sockets and the clock again.
    let _ = os::wait(&mut fds, next);
}

impl Closing {
    fn new(client: Arc<TcpStream>, limits: DrainLimits) -> Closing {
        let _ = client.shutdown(Shutdown::Write);
        Closing {
            client,
            until: Instant::now() + limits.time,
            bytes: limits.bytes,
        }
    }

    fn is_readable_within(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(&*self.client, PollFlags::IN)];
        os::wait(&mut fds, Some(limit)).unwrap_or(false)
    }

    fn drain_some(&mut self) -> bool {
        let mut buffer = [0; 4096];
        match recv(&*self.client, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return false,
            Ok((count, _)) => self.bytes = self.bytes.saturating_sub(count),
            Err(error) if error == rustix::io::Errno::AGAIN => {}
            Err(_) => return false,
        }
        self.bytes > 0 && Instant::now() < self.until
    }
}
