//! What loom lacks, made of what it has.

use std::ops::{Deref, DerefMut};
use std::sync::mpsc::{RecvError, RecvTimeoutError, SendError};
use std::sync::{Arc, LockResult, TryLockError, TryLockResult};
use std::time::Duration;

use loom::sync::Condvar;
use loom::sync::atomic::{AtomicBool, Ordering};

/// Like `std`'s, whose `try_lock` never waits and orders nothing where it fails. Loom's own waits there for the
/// thread that came in between.
#[derive(Debug, Default)]
pub struct Mutex<T> {
    is_locked: AtomicBool,
    value: std::sync::Mutex<T>,
    /// Held between a look at `is_locked` and the wait for `unlocked`.
    gate: loom::sync::Mutex<()>,
    unlocked: Condvar,
}

impl<T> Mutex<T> {
    pub fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
        let locked =
            self.is_locked
                .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        match locked {
            Ok(_) => Ok(MutexGuard {
                mutex: self,
                value: self.value.try_lock().ok(),
            }),
            Err(_) => Err(TryLockError::WouldBlock),
        }
    }

    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        loop {
            if let Ok(guard) = self.try_lock() {
                return Ok(guard);
            }
            let gate = self.gate.lock().unwrap();
            if self.is_locked.load(Ordering::Relaxed) {
                drop(self.unlocked.wait(gate));
            }
        }
    }
}

#[derive(Debug)]
pub struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
    value: Option<std::sync::MutexGuard<'a, T>>,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().unwrap()
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().unwrap()
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.value = None;
        self.mutex.is_locked.store(false, Ordering::Release);
        let gate = self.mutex.gate.lock();
        self.mutex.unlocked.notify_all();
        drop(gate);
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// A channel for one value. Of its ends only the receiving one is known to the other to be gone.
pub fn sync_channel<T>(_bound: usize) -> (SyncSender<T>, Receiver<T>) {
    let channel = Arc::new(Channel {
        state: loom::sync::Mutex::new((None, true)),
        sent: Condvar::new(),
    });
    (SyncSender(Arc::clone(&channel)), Receiver(channel))
}

struct Channel<T> {
    /// What was sent, and whether anybody may receive it.
    state: loom::sync::Mutex<(Option<T>, bool)>,
    sent: Condvar,
}

pub struct SyncSender<T>(Arc<Channel<T>>);

impl<T> SyncSender<T> {
    pub fn send(&self, value: T) -> Result<(), SendError<T>> {
        let mut state = self.0.state.lock().unwrap();
        if !state.1 {
            return Err(SendError(value));
        }
        state.0 = Some(value);
        self.0.sent.notify_one();
        Ok(())
    }
}

pub struct Receiver<T>(Arc<Channel<T>>);

impl<T> Receiver<T> {
    pub fn recv(&self) -> Result<T, RecvError> {
        let mut state = self.0.state.lock().unwrap();
        loop {
            match state.0.take() {
                Some(value) => return Ok(value),
                None => state = self.0.sent.wait(state).unwrap(),
            }
        }
    }

    /// Is late or in time depending on when the sender has its turn: here there is no clock, and loom tries both.
    pub fn recv_timeout(&self, _limit: Duration) -> Result<T, RecvTimeoutError> {
        let sent = self.0.state.lock().unwrap().0.take();
        sent.ok_or(RecvTimeoutError::Timeout)
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().1 = false;
    }
}
