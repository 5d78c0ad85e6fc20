//! Stdin and stdout as a tunnel's stream. Neither is buffered.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fd::AsFd;
use rustix::io::Errno;

use super::Activity;
use super::pipe::{NoSplice, Pipe};
use super::transfer::{Received, Splices, WriteFailure};
use crate::lock::lock;
use crate::os::{self, Waker};

/// How long stdin must bring nothing to be taken for ended, once nothing more can come to stdout.
const IDLE: Duration = Duration::from_secs(1);

/// The process's own streams.
#[derive(Debug)]
pub(crate) struct Stdio {
    /// Wakes the reader of stdin, for which one of the others has changed.
    changed: Waker,
    /// The server has ended its direction, and so stdin ends as soon as it is idle: nobody can speak to a process
    /// that has lost its stdout, but what is on its way to the target must not be cut off.
    ends_when_idle: AtomicBool,
    /// Whoever started the process is gone: stdin ends where it is empty.
    hung_up: AtomicBool,
    aborted: AtomicBool,
    /// The end of stdin ends nothing.
    outlasts_stdin: bool,
    /// Why stdout takes nothing more. The process is of no use then.
    failure: Mutex<Option<String>>,
}

impl Stdio {
    /// With `outlasts_stdin` the end of stdin is not passed on: the upload ends with the server's direction.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub(crate) fn new(outlasts_stdin: bool) -> io::Result<Stdio> {
        Ok(Stdio {
            changed: Waker::new()?,
            ends_when_idle: AtomicBool::new(false),
            hung_up: AtomicBool::new(false),
            aborted: AtomicBool::new(false),
            outlasts_stdin,
            failure: Mutex::new(None),
        })
    }

    /// Takes what is on stdin for all there will be.
    pub(crate) fn hang_up(&self) {
        self.hung_up.store(true, Ordering::SeqCst);
        self.changed.wake();
    }

    /// See [`super::Stream::abort`].
    pub(super) fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
        self.changed.wake();
    }

    /// See [`super::Stream::shutdown_write`].
    pub(super) fn shutdown_write(&self) {
        self.ends_when_idle.store(true, Ordering::SeqCst);
        self.changed.wake();
    }

    /// See [`super::Stream::receive`].
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Received {
        let stdin = io::stdin();
        loop {
            match self.wait_for(&stdin) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => return Received::Failed(cannot("read from stdin", error)),
            }
            if self.aborted.load(Ordering::SeqCst) {
                return Received::Aborted;
            }
            if let Some(why) = &*lock(&self.failure) {
                return Received::Failed(why.clone());
            }
            if self.has_ended(&stdin) {
                return Received::Eof;
            }
            match rustix::io::read(&stdin, &mut *buffer) {
                Ok(0) if self.outlasts_stdin => return self.outlast_stdin(),
                Ok(0) => return Received::Eof,
                Ok(count) => return Received::Bytes(count),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Received::Failed(cannot("read from stdin", error.into())),
            }
        }
    }

    /// Until anything else changes than stdin, which has ended.
    fn outlast_stdin(&self) -> Received {
        loop {
            let mut fds = [PollFd::new(&self.changed, PollFlags::IN)];
            if let Err(error) = os::wait(&mut fds, None) {
                return Received::Failed(cannot("wait", error));
            }
            if self.aborted.load(Ordering::SeqCst) {
                return Received::Aborted;
            }
            if let Some(why) = &*lock(&self.failure) {
                return Received::Failed(why.clone());
            }
            let is_hung_up = self.hung_up.load(Ordering::SeqCst);
            if is_hung_up || self.ends_when_idle.load(Ordering::SeqCst) {
                return Received::Eof;
            }
        }
    }

    /// Until stdin brings something, or anything changed.
    fn wait_for(&self, stdin: &io::Stdin) -> io::Result<bool> {
        let mut fds = [
            PollFd::new(stdin, PollFlags::IN),
            PollFd::new(&self.changed, PollFlags::IN),
        ];
        os::wait(&mut fds, None)
    }

    /// The waker stays awake once anything has changed, so this is asked before each read from then on.
    fn has_ended(&self, stdin: &io::Stdin) -> bool {
        let patience = if self.hung_up.load(Ordering::SeqCst) {
            Duration::ZERO
        } else if self.ends_when_idle.load(Ordering::SeqCst) {
            IDLE
        } else {
            return false;
        };
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(stdin, PollFlags::IN)];
            match os::wait(&mut fds, Some(left)) {
                Ok(false) if left.is_zero() => return true,
                Ok(false) => {}
                Ok(true) | Err(_) => return false,
            }
        }
    }

    /// See [`super::Stream::deliver`].
    pub(super) fn deliver(
        &self,
        mut bytes: &[u8],
        activity: &Activity,
    ) -> Result<(), WriteFailure> {
        let stdout = io::stdout();
        while !bytes.is_empty() {
            match rustix::io::write(&stdout, bytes) {
                Ok(count) => {
                    activity.note_to_stream(count);
                    bytes = &bytes[count..];
                }
                Err(error) => self.wait_or_fail(&stdout, error)?,
            }
        }
        Ok(())
    }

    /// See [`super::Stream::deliver_from`].
    pub(super) fn deliver_from(
        &self,
        pipe: &mut Pipe,
        limit: usize,
        activity: &Activity,
    ) -> Result<Splices, WriteFailure> {
        let stdout = io::stdout();
        let mut left = limit.min(pipe.held());
        while left > 0 {
            match pipe.give(&stdout, left) {
                Ok(count) => {
                    activity.note_to_stream(count);
                    left -= count;
                }
                Err(NoSplice::Failed(error)) => self.wait_or_fail(&stdout, error)?,
                Err(NoSplice::Unsupported | NoSplice::EndOrMark) => return Ok(Splices::Never),
            }
        }
        Ok(Splices::Later)
    }

    /// Whoever started the process may have made its stdout non-blocking.
    fn wait_or_fail(&self, stdout: &impl AsFd, error: Errno) -> Result<(), WriteFailure> {
        let error = match error {
            Errno::INTR => return Ok(()),
            Errno::AGAIN => {
                let mut fds = [PollFd::new(stdout, PollFlags::OUT)];
                match os::wait(&mut fds, None) {
                    Ok(_) => return Ok(()),
                    Err(error) => error,
                }
            }
            error => error.into(),
        };
        let why = cannot("write to stdout", error);
        *lock(&self.failure) = Some(why.clone());
        self.changed.wake();
        Err(WriteFailure::Failed(why))
    }
}

fn cannot(what: &str, error: io::Error) -> String {
    format!("cannot {what}: {error}")
}
