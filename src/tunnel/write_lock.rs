//! Whole frames of several threads on one connection: one lock for writing, and a slot for what is pending.
//!
//! Only one thread waits in a write. Another with a frame to send puts it into the slot; whoever holds the lock
//! sends it before unlocking, and looks once more after unlocking, so nothing stays behind. Each looks with the slot
//! locked: who finds it empty has then unlocked before another fills it, and tries the lock.

use std::io;
use std::sync::TryLockError;

use rustix::event::{PollFd, PollFlags};
use rustix::fd::AsFd;

use crate::checked::{Mutex, MutexGuard, lock};
use crate::os;

/// The state `W` of writing, and the slot for what is pending, a `P`.
#[derive(Debug, Default)]
pub(super) struct WriteLock<W, P> {
    writing: Mutex<W>,
    pending: Mutex<Option<P>>,
}

/// What became of an attempt to send what is pending without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flushed {
    /// Nothing is pending any more, or whoever is writing sends it.
    Done,
    /// The socket takes nothing just now.
    Full,
}

impl<W, P: Default> WriteLock<W, P> {
    /// Waits for the lock.
    pub(super) fn lock(&self) -> MutexGuard<'_, W> {
        lock(&self.writing)
    }

    /// Takes the lock if nobody has it.
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, W>> {
        match self.writing.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Makes something pending. It is sent by whoever unlocks, or by [`WriteLock::flush`].
    pub(super) fn queue(&self, set: impl FnOnce(&mut P)) {
        set(lock(&self.pending).get_or_insert_default());
    }

    /// Whether what is pending, if anything, is `such`.
    pub(super) fn is_pending(&self, such: impl FnOnce(&P) -> bool) -> bool {
        lock(&self.pending).as_ref().is_some_and(such)
    }

    /// Unlocks, once `send` has sent what is pending.
    ///
    /// # Errors
    /// Those of `send`.
    pub(super) fn unlock_and_flush<'a>(
        &'a self,
        guard: MutexGuard<'a, W>,
        send: impl Fn(&mut W, P) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut guard = Some(guard);
        while let Some(mut held) = guard {
            let pending = lock(&self.pending).take();
            if let Some(pending) = pending {
                send(&mut held, pending)?;
            }
            drop(held);
            let slot = lock(&self.pending);
            guard = slot.as_ref().and_then(|_| self.try_lock());
        }
        Ok(())
    }

    /// Has `send` send what is pending, if `socket` takes it without waiting. When another thread is writing,
    /// that one sends it.
    pub(super) fn flush(&self, socket: impl AsFd, send: impl Fn(&mut W, P) -> io::Result<()>) {
        self.try_flush(&socket, &send);
    }

    /// The same before a wait for bytes from `socket`: what found no room is sent as soon as there is some,
    /// unless bytes come first.
    pub(super) fn flush_before_read(
        &self,
        socket: impl AsFd,
        send: impl Fn(&mut W, P) -> io::Result<()>,
    ) {
        while self.try_flush(&socket, &send) == Flushed::Full {
            let mut fds = [PollFd::new(&socket, PollFlags::IN | PollFlags::OUT)];
            if os::wait(&mut fds, None).is_err() || fds[0].revents() != PollFlags::OUT {
                return;
            }
        }
    }

    fn try_flush(
        &self,
        socket: &impl AsFd,
        send: &impl Fn(&mut W, P) -> io::Result<()>,
    ) -> Flushed {
        loop {
            // Locked until it is certain that this thread sends: another relies on whoever holds the other lock.
            let mut slot = lock(&self.pending);
            let Some(mut held) = slot.as_ref().and_then(|_| self.try_lock()) else {
                return Flushed::Done;
            };
            // That needs a third of the socket's buffer free, and a control frame is a few bytes.
            if os::ready(socket, PollFlags::OUT).is_empty() {
                return Flushed::Full;
            }
            let pending = slot.take().unwrap_or_default();
            drop(slot);
            if send(&mut held, pending).is_err() {
                return Flushed::Done;
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    /// What was sent, and what is pending.
    type Letters = WriteLock<Vec<u8>, Vec<u8>>;

    fn send(sent: &mut Vec<u8>, pending: Vec<u8>) -> io::Result<()> {
        sent.extend(pending);
        Ok(())
    }

    fn post(lock: &Letters, letter: u8) {
        lock.queue(|pending| pending.push(letter));
    }

    fn sockets() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    /// Nothing more goes into it without waiting.
    fn fill(mut socket: &UnixStream) {
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 4096]).is_ok() {}
        socket.set_nonblocking(false).unwrap();
    }

    fn pending(letters: &Letters) -> Vec<u8> {
        lock(&letters.pending).clone().unwrap_or_default()
    }

    #[test]
    fn whoever_unlocks_sends_what_is_pending() {
        let (lock, (socket, _peer)) = (Letters::default(), sockets());
        let mut held = lock.lock();
        thread::scope(|scope| {
            scope.spawn(|| {
                post(&lock, b'a');
                // Returns, as another is writing.
                lock.flush(&socket, send);
                post(&lock, b'b');
            });
        });
        assert_eq!(pending(&lock), b"ab");
        held.push(b'1');
        lock.unlock_and_flush(held, send).unwrap();
        assert_eq!(*lock.lock(), b"1ab");
        assert_eq!(pending(&lock), b"");
    }

    #[test]
    fn what_becomes_pending_while_that_is_sent_is_sent_too() {
        let lock = Letters::default();
        post(&lock, b'a');
        let send_and_post = |sent: &mut Vec<u8>, pending: Vec<u8>| {
            if pending.first() < Some(&b'd') {
                post(&lock, pending[0] + 1);
            }
            send(sent, pending)
        };
        lock.unlock_and_flush(lock.lock(), send_and_post).unwrap();
        assert_eq!(*lock.lock(), b"abcd");
    }

    #[test]
    fn a_full_socket_keeps_it_pending() {
        let (lock, (socket, _peer)) = (Letters::default(), sockets());
        fill(&socket);
        post(&lock, b'a');
        lock.flush(&socket, send);
        assert_eq!(*lock.lock(), b"");
        assert_eq!(pending(&lock), b"a");
    }

    #[test]
    fn before_a_read_it_is_sent_as_soon_as_there_is_room() {
        let (lock, (socket, mut peer)) = (Letters::default(), sockets());
        fill(&socket);
        post(&lock, b'a');
        thread::scope(|scope| {
            let flushing = scope.spawn(|| lock.flush_before_read(&socket, send));
            thread::sleep(Duration::from_millis(50));
            assert!(!flushing.is_finished(), "there is no room yet");
            peer.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            let limit = Instant::now() + Duration::from_secs(30);
            while !flushing.is_finished() {
                assert!(Instant::now() < limit, "nothing is sent");
                let _ = peer.read(&mut [0; 65_536]);
            }
        });
        assert_eq!(*lock.lock(), b"a");
    }

    #[test]
    fn before_a_read_bytes_that_come_are_read_first() {
        let (lock, (socket, mut peer)) = (Letters::default(), sockets());
        fill(&socket);
        post(&lock, b'a');
        peer.write_all(b"x").unwrap();
        lock.flush_before_read(&socket, send);
        assert_eq!(pending(&lock), b"a");
    }

    #[test]
    fn a_failure_to_send_is_told_and_a_panic_of_the_writer_locks_nobody_out() {
        let (lock, (socket, _peer)) = (Letters::default(), sockets());
        let fail = |_: &mut Vec<u8>, _| Err(io::Error::other("torn"));
        post(&lock, b'a');
        assert!(lock.unlock_and_flush(lock.lock(), fail).is_err());
        post(&lock, b'b');
        lock.flush(&socket, fail);
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let _held = lock.lock();
                panic!("while writing");
            });
            assert!(writer.join().is_err());
        });
        post(&lock, b'c');
        lock.flush(&socket, send);
        assert_eq!(*lock.lock(), b"c");
    }
}

#[cfg(all(test, loom))]
mod models;
