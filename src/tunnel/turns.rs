//! Frames of several threads on one connection: whole frames under one lock, and a slot for what is due.
//!
//! Only one thread waits in a write. Another with a frame to send puts it into the slot; whoever holds the lock
//! sends it before unlocking, and looks once more after unlocking, so nothing stays behind.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsFd;

use crate::lock::lock;

/// The turn `T` to write, and the slot `D` for what is due.
#[derive(Debug, Default)]
pub struct Turns<T, D> {
    turn: Mutex<T>,
    due: Mutex<D>,
    has_due: AtomicBool,
}

/// What became of an attempt to send what is due without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flushed {
    /// Nothing is due any more, or its sender has it.
    Done,
    /// The socket takes nothing just now.
    Full,
}

impl<T, D: Default> Turns<T, D> {
    /// Waits for the turn.
    pub fn take(&self) -> MutexGuard<'_, T> {
        lock(&self.turn)
    }

    /// The turn, if nobody has it.
    pub fn try_take(&self) -> Option<MutexGuard<'_, T>> {
        match self.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Makes something due. It is sent by whoever ends a turn, or by [`Turns::flush`].
    pub fn set_due(&self, set: impl FnOnce(&mut D)) {
        set(&mut lock(&self.due));
        self.has_due.store(true, Ordering::SeqCst);
    }

    /// Ends a turn, by having `send` send what is due.
    ///
    /// # Errors
    /// Those of `send`.
    pub fn end<'a>(
        &'a self,
        turn: MutexGuard<'a, T>,
        send: impl Fn(&mut T, D) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut turn = Some(turn);
        while let Some(mut held) = turn {
            if self.has_due.load(Ordering::SeqCst) {
                self.send_due(&mut held, &send)?;
            }
            drop(held);
            turn = if self.has_due.load(Ordering::SeqCst) {
                self.try_take()
            } else {
                None
            };
        }
        Ok(())
    }

    /// Has `send` send what is due, if `socket` takes it without waiting. When another thread is writing, that
    /// sends it.
    pub fn flush(&self, socket: impl AsFd, send: impl Fn(&mut T, D) -> io::Result<()>) {
        self.try_flush(&socket, &send);
    }

    /// The same before a wait for bytes from `socket`: what found no room is sent as soon as there is some,
    /// unless bytes come first.
    pub fn flush_before_read(&self, socket: impl AsFd, send: impl Fn(&mut T, D) -> io::Result<()>) {
        while self.try_flush(&socket, &send) == Flushed::Full {
            let mut fds = [PollFd::new(&socket, PollFlags::IN | PollFlags::OUT)];
            if poll(&mut fds, None).is_err() || fds[0].revents() != PollFlags::OUT {
                return;
            }
        }
    }

    fn try_flush(
        &self,
        socket: &impl AsFd,
        send: &impl Fn(&mut T, D) -> io::Result<()>,
    ) -> Flushed {
        while self.has_due.load(Ordering::SeqCst) {
            let Some(mut turn) = self.try_take() else {
                return Flushed::Done;
            };
            if !is_ready(socket, PollFlags::OUT) {
                return Flushed::Full;
            }
            if self.send_due(&mut turn, send).is_err() {
                return Flushed::Done;
            }
        }
        Flushed::Done
    }

    fn send_due(
        &self,
        turn: &mut T,
        send: &impl Fn(&mut T, D) -> io::Result<()>,
    ) -> io::Result<()> {
        self.has_due.store(false, Ordering::SeqCst);
        let due = std::mem::take(&mut *lock(&self.due));
        send(turn, due)
    }
}

/// Whether `socket` can be read from (`IN`) or written to (`OUT`) now. For writing, that needs a third of its
/// buffer free, and a control frame is a few bytes.
pub fn is_ready(socket: &impl AsFd, how: PollFlags) -> bool {
    let mut fds = [PollFd::new(socket, how)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}
