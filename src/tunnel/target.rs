//! The target's socket within a tunnel: given bytes to, read from, finished in order, or broken off.

use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{SendFlags, send, sockopt};
use rustix::pipe::{SpliceFlags, splice};

use super::TARGET_UNSENT;
use super::state::{State, Undelivered};
use crate::lock::lock;

/// The connected target. It is closed when this is dropped, or broken off and no call uses it any more.
///
/// Until both directions have ended in order, closing it sends a RST (`SO_LINGER` 0, socket(7)), whoever closes
/// it: a daemon that is killed must not make a cut-off upload look like a finished one.
#[derive(Debug)]
pub struct TargetSocket {
    /// Taken out by [`TargetSocket::break_off`]. A thread holds its own reference only during a call, so that
    /// the target gets its RST at once, however long the client takes for its side of the end.
    stream: Mutex<Option<Arc<TcpStream>>>,
    broken_off: AtomicBool,
    /// The last read found less than it had room for.
    ack_due: AtomicBool,
    /// Wakes a thread that waits for room to write. `shutdown` can't: on the write side it would send a FIN,
    /// and after the target's EOF the read side is shut down already.
    wake: OwnedFd,
    /// Inbound is in a call that may take the socket's error, or hasn't noted it yet.
    delivering: AtomicBool,
    failure: Mutex<Option<Undelivered>>,
}

/// What a read from the target gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes, at least one.
    Bytes(usize),
    /// The target's orderly end.
    Eof,
    /// The connection failed.
    Failed(String),
    /// The tunnel was broken off.
    BrokenOff,
    /// The system can't move bytes from this socket into a pipe.
    Unsupported,
}

impl TargetSocket {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(stream: TcpStream) -> io::Result<TargetSocket> {
        super::limit_unsent(&stream, TARGET_UNSENT);
        sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(TargetSocket {
            stream: Mutex::new(Some(Arc::new(stream))),
            broken_off: AtomicBool::new(false),
            ack_due: AtomicBool::new(false),
            wake,
            delivering: AtomicBool::new(false),
            failure: Mutex::new(None),
        })
    }

    /// Gives all of `bytes` to the target, waiting for it as long as it takes.
    ///
    /// # Errors
    /// Why not all of them could be given.
    pub fn deliver(&self, bytes: &[u8], state: &State) -> Result<(), Undelivered> {
        let Some(stream) = self.stream() else {
            return Err(Undelivered::BrokenOff);
        };
        state.park();
        self.delivering.store(true, Ordering::SeqCst);
        let result = self.send_all(&stream, bytes, state);
        if let Err(why) = &result {
            *lock(&self.failure) = Some(why.clone());
        }
        self.delivering.store(false, Ordering::SeqCst);
        state.unpark();
        result
    }

    fn send_all(
        &self,
        stream: &TcpStream,
        mut bytes: &[u8],
        state: &State,
    ) -> Result<(), Undelivered> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        while !bytes.is_empty() {
            match send(stream, bytes, flags) {
                _ if self.is_broken_off() => return Err(Undelivered::BrokenOff),
                Ok(count) => {
                    state.note_delivered(count);
                    bytes = &bytes[count..];
                }
                Err(Errno::AGAIN | Errno::NOBUFS) => self.wait_for_room(stream)?,
                Err(Errno::INTR) => {}
                // After the target's FIN a reset is EPIPE, without one it is ECONNRESET (tcp_reset in Linux).
                Err(Errno::PIPE) => return Err(Undelivered::TargetClosed),
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }

    fn wait_for_room(&self, stream: &TcpStream) -> Result<(), Undelivered> {
        let mut fds = [
            PollFd::new(stream, PollFlags::OUT),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => Err(Undelivered::BrokenOff),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    /// Sends the FIN of an orderly end.
    pub fn finish(&self) {
        if let Some(stream) = self.stream() {
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    /// Waits for bytes from the target.
    pub fn receive(&self, buffer: &mut [u8]) -> Received {
        let room = buffer.len();
        self.receive_by(room, |mut stream| stream.read(buffer))
    }

    /// Waits for bytes from the target and moves them into `pipe` without copying them, at most `limit`.
    pub fn receive_into(&self, pipe: &OwnedFd, limit: usize) -> Received {
        self.receive_by(limit, |stream| {
            Ok(splice(stream, None, pipe, None, limit, SpliceFlags::MOVE)?)
        })
    }

    fn receive_by(
        &self,
        room: usize,
        mut read: impl FnMut(&TcpStream) -> io::Result<usize>,
    ) -> Received {
        let Some(stream) = self.stream() else {
            return Received::BrokenOff;
        };
        // After the bytes have gone on rather than before.
        if self.ack_due.swap(false, Ordering::Relaxed) {
            super::acknowledge_at_once(&stream);
        }
        loop {
            let received = read(&stream);
            if self.is_broken_off() {
                return Received::BrokenOff;
            }
            return match received {
                Ok(0) => self.judge_eof(&stream),
                Ok(count) => {
                    self.ack_due.store(count < room, Ordering::Relaxed);
                    Received::Bytes(count)
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => Received::Unsupported,
                Err(error) => Received::Failed(error.to_string()),
            };
        }
    }

    /// A reset is reported once. When inbound's write took the report, the read behind it looks like an
    /// orderly EOF; the connection, dead in both directions, gives it away.
    fn judge_eof(&self, stream: &TcpStream) -> Received {
        if !is_dead(stream) {
            return Received::Eof;
        }
        // A call on a dead socket returns at once; the limit is for a machine that stands still.
        let limit = Instant::now() + Duration::from_secs(5);
        while self.delivering.load(Ordering::SeqCst) && Instant::now() < limit {
            thread::yield_now();
        }
        match &*lock(&self.failure) {
            Some(Undelivered::TargetFailed(why)) => Received::Failed(why.clone()),
            _ => Received::Eof,
        }
    }

    /// Both directions have ended in order: closing the socket is no RST any more.
    pub fn close_in_order(&self) {
        if let Some(stream) = lock(&self.stream).take() {
            let _ = sockopt::set_socket_linger(&stream, None);
        }
    }

    /// Makes the end a broken one: the target gets a RST, and no FIN before it. Wakes the threads that wait
    /// for the target; the last of them to leave its call closes the socket.
    pub fn break_off(&self) {
        self.broken_off.store(true, Ordering::SeqCst);
        if let Some(stream) = lock(&self.stream).take() {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
            let _ = stream.shutdown(Shutdown::Read);
        }
    }

    fn stream(&self) -> Option<Arc<TcpStream>> {
        lock(&self.stream).clone()
    }

    fn is_broken_off(&self) -> bool {
        self.broken_off.load(Ordering::SeqCst)
    }
}

/// Both directions are over. After our own FIN that is so in an orderly end too, but then inbound writes no
/// more and can't have taken an error.
fn is_dead(stream: &TcpStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let ready = poll(&mut fds, Some(&Timespec::default()));
    ready.is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

fn failed(error: Errno) -> Undelivered {
    Undelivered::TargetFailed(io::Error::from(error).to_string())
}
