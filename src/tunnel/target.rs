//! The target's socket within a tunnel: given bytes to, read from, finished in order, or broken off.

use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{SendFlags, send, sockopt};

use super::state::{State, Undelivered};

/// The connected target. Closing it, by dropping it, is the last thing a tunnel does to it.
#[derive(Debug)]
pub struct TargetSocket {
    stream: TcpStream,
    broken_off: AtomicBool,
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
}

impl TargetSocket {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(stream: TcpStream) -> io::Result<TargetSocket> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(TargetSocket {
            stream,
            broken_off: AtomicBool::new(false),
            wake,
            delivering: AtomicBool::new(false),
            failure: Mutex::new(None),
        })
    }

    /// Gives all of `bytes` to the target, waiting for it as long as it takes.
    ///
    /// # Errors
    /// Why not all of them could be given.
    pub fn deliver(&self, mut bytes: &[u8], state: &State) -> Result<(), Undelivered> {
        state.park();
        self.delivering.store(true, Ordering::SeqCst);
        let mut result = Ok(());
        while !bytes.is_empty() && result.is_ok() {
            result = match send(
                &self.stream,
                bytes,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                _ if self.is_broken_off() => Err(Undelivered::BrokenOff),
                Ok(count) => {
                    state.unpark(count);
                    state.park();
                    bytes = &bytes[count..];
                    Ok(())
                }
                Err(Errno::AGAIN | Errno::NOBUFS) => self.wait_for_room(),
                Err(Errno::INTR) => Ok(()),
                // After the target's FIN a reset is EPIPE, without one it is ECONNRESET.
                Err(Errno::PIPE) => Err(Undelivered::TargetClosed),
                Err(error) => Err(Undelivered::TargetFailed(
                    io::Error::from(error).to_string(),
                )),
            };
        }
        if let Err(why) = &result {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(why.clone());
        }
        self.delivering.store(false, Ordering::SeqCst);
        state.unpark(0);
        result
    }

    fn wait_for_room(&self) -> Result<(), Undelivered> {
        let mut fds = [
            PollFd::new(&self.stream, PollFlags::OUT),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => Err(Undelivered::BrokenOff),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(Undelivered::TargetFailed(
                io::Error::from(error).to_string(),
            )),
        }
    }

    /// Sends the FIN of an orderly end.
    pub fn finish(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Waits for bytes from the target.
    pub fn receive(&self, buffer: &mut [u8]) -> Received {
        loop {
            let read = (&self.stream).read(buffer);
            if self.is_broken_off() {
                return Received::BrokenOff;
            }
            return match read {
                Ok(0) => self.judge_eof(),
                Ok(count) => Received::Bytes(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Received::Failed(error.to_string()),
            };
        }
    }

    /// A reset is reported once. When inbound's write took the report, the read behind it looks like an
    /// orderly EOF; the connection, dead in both directions, gives it away.
    fn judge_eof(&self) -> Received {
        if !self.is_dead() {
            return Received::Eof;
        }
        // A call on a dead socket returns at once; the limit is for a machine that stands still.
        let limit = Instant::now() + Duration::from_secs(5);
        while self.delivering.load(Ordering::SeqCst) && Instant::now() < limit {
            thread::yield_now();
        }
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(Undelivered::TargetFailed(why)) => Received::Failed(why.clone()),
            _ => Received::Eof,
        }
    }

    /// Both directions are over. After our own FIN that is so in an orderly end too, but then inbound
    /// writes no more and can't have taken an error.
    fn is_dead(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        let ready = poll(&mut fds, Some(&Timespec::default()));
        ready.is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// Makes the end a broken one: the target gets a RST when the socket is closed, and no FIN before it.
    /// Wakes the threads that wait for the target.
    pub fn break_off(&self) {
        self.broken_off.store(true, Ordering::SeqCst);
        let _ = sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO));
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    fn is_broken_off(&self) -> bool {
        self.broken_off.load(Ordering::SeqCst)
    }
}
