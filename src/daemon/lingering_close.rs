//! Closing a connection whose client may still be sending.
//!
//! The kernel answers bytes that arrive at a closed socket, or lie in it unread, with a RST, and the client
//! then loses the answer it has not read yet (RFC 9112 §9.6). So the write side is shut down, what still comes
//! is read and dropped until the client's EOF, and only then is the socket closed: the lingering close.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, recv};

use super::admission::Delivery;
use crate::lock::lock;
use crate::os::{self, Waker};

/// How long a client that was refused may go on sending until its EOF, and how much: enough for a body that came along
/// with its request.
const AFTER_REFUSAL: (Duration, usize) = (Duration::from_secs(2), 1024 * 1024);

/// Most clients close as soon as they see our end. Waiting for that is cheaper than waking the thread.
const AT_ONCE: Duration = Duration::from_millis(2);

/// The first wait between two looks at what has arrived of a tunnel's last bytes, and the longest.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// One thread that closes all connections, so that none of them holds a thread or a slot meanwhile.
#[derive(Debug)]
pub struct LingeringClose {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Those that the thread has not seen yet.
    arrived: Mutex<Vec<Closing>>,
    /// How many of them may have nothing left to be delivered, and as many more in the thread's hands.
    most: usize,
    wake: Waker,
    is_over: AtomicBool,
}

impl LingeringClose {
    /// Starts the thread. It ends when this is dropped. At most `max_open` connections to which nothing is left to be
    /// delivered are waited for at once; for one more, the oldest is closed. The others are bounded where they are
    /// counted ([`Delivery`]).
    ///
    /// # Errors
    /// When the system refuses a thread or a descriptor.
    pub fn start(max_open: usize) -> io::Result<LingeringClose> {
        let shared = Arc::new(Shared {
            arrived: Mutex::default(),
            most: max_open.div_ceil(2),
            wake: Waker::new()?,
            is_over: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        let closer = thread::Builder::new()
            .name("lingering-close".into())
            .stack_size(64 * 1024);
        closer.spawn(move || close_all(&of_thread))?;
        Ok(LingeringClose { shared })
    }

    /// Closes a connection that was refused and to which the last byte has been written. Waits a moment for the client's
    /// EOF before it hands the connection over.
    pub fn close(&self, client: Arc<TcpStream>) {
        let (time, bytes) = AFTER_REFUSAL;
        self.close_soon(Closing::new(client, time, bytes));
    }

    /// The same without waiting.
    pub fn close_later(&self, client: Arc<TcpStream>) {
        let (time, bytes) = AFTER_REFUSAL;
        self.take_over(Closing::new(client, time, bytes));
    }

    /// Closes a tunnel's connection like this, whose client has `linger` to read what it has not read yet, from the last
    /// byte that arrived there.
    pub fn close_tunnel(&self, client: Arc<TcpStream>, linger: Duration, delivery: Delivery) {
        let closing = Closing::new(client, linger, usize::MAX);
        let tail = Tail {
            linger,
            least: u64::MAX,
            next_look: Instant::now() + LOOK_AGAIN.0,
            pause: LOOK_AGAIN.0,
            _delivery: delivery,
        };
        self.close_soon(Closing {
            tail: Some(tail),
            ..closing
        });
    }

    fn close_soon(&self, mut closing: Closing) {
        if !closing.is_readable_within(AT_ONCE) || closing.drain_some() {
            self.take_over(closing);
        }
    }

    fn take_over(&self, closing: Closing) {
        let mut arrived = lock(&self.shared.arrived);
        arrived.push(closing);
        evict(&mut arrived, self.shared.most);
        drop(arrived);
        self.shared.wake.wake();
    }
}

impl Drop for LingeringClose {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        self.shared.wake.wake();
    }
}

/// A connection being closed.
#[derive(Debug)]
struct Closing {
    client: Arc<TcpStream>,
    until: Instant,
    /// How many more may come.
    bytes: usize,
    /// What a tunnel has left to be delivered.
    tail: Option<Tail>,
}

/// The last bytes of a tunnel, as long as they have not all arrived. A reset would destroy them, and so would closing the
/// socket: the pong of a client that answers a ping among them is then answered by one.
#[derive(Debug)]
struct Tail {
    linger: Duration,
    /// The fewest that were unacknowledged at a look.
    least: u64,
    next_look: Instant,
    pause: Duration,
    _delivery: Delivery,
}

fn close_all(shared: &Shared) {
    let mut open: Vec<Closing> = Vec::new();
    while !shared.is_over.load(Ordering::SeqCst) {
        wait(&open, &shared.wake);
        shared.wake.clear();
        open.append(&mut lock(&shared.arrived));
        evict(&mut open, shared.most);
        open.retain_mut(|closing| {
            closing.look_at_tail();
            closing.drain_some()
        });
    }
}

/// Closes the oldest of too many that have nothing left to be delivered.
fn evict(open: &mut Vec<Closing>, most: usize) {
    let delivered = open.iter().filter(|closing| closing.tail.is_none()).count();
    let mut too_many = delivered.saturating_sub(most);
    open.retain(|closing| {
        let stays = too_many == 0 || closing.tail.is_some();
        too_many -= usize::from(!stays);
        stays
    });
}

fn wait(open: &[Closing], wake: &Waker) {
    let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
    fds.extend(
        open.iter()
            .map(|closing| PollFd::new(&*closing.client, PollFlags::IN)),
    );
    let now = Instant::now();
    let next = open
        .iter()
        .map(|closing| closing.next().saturating_duration_since(now))
        .min();
    // An error here is want of memory; the loop looks at the sockets and the clock again.
    let _ = os::wait(&mut fds, next);
}

impl Closing {
    fn new(client: Arc<TcpStream>, time: Duration, bytes: usize) -> Closing {
        let _ = client.shutdown(Shutdown::Write);
        Closing {
            client,
            until: Instant::now() + time,
            bytes,
            tail: None,
        }
    }

    /// When there is something to be done, if the client sends nothing.
    fn next(&self) -> Instant {
        let look = self.tail.as_ref().map(|tail| tail.next_look);
        look.map_or(self.until, |look| look.min(self.until))
    }

    /// As long as a tunnel's bytes arrive, its time begins anew.
    fn look_at_tail(&mut self) {
        let now = Instant::now();
        let Some(tail) = self.tail.as_mut().filter(|tail| now >= tail.next_look) else {
            return;
        };
        let left = os::unacknowledged(&self.client).unwrap_or(0);
        if left < tail.least {
            tail.least = left;
            self.until = now + tail.linger;
        }
        // The last one is when its time is over.
        tail.next_look = self.until.min(now + tail.pause);
        tail.pause = (tail.pause * 2).min(LOOK_AGAIN.1);
        if left == 0 {
            self.tail = None;
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
