//! The local side of a connection: stdin and stdout, or a connection to the local port.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;

use crate::tunnel::state::{State, Undelivered};
use crate::tunnel::target::{Received, TargetSocket};

/// Where the bytes come from and go to.
#[derive(Debug)]
pub enum Local {
    /// The process's own streams.
    Stdio(Stdio),
    /// A connection to the local port. It is closed with a RST until both directions have ended in order.
    Socket(TargetSocket),
}

impl Local {
    /// Waits for bytes to send to the server.
    pub fn receive(&self, buffer: &mut [u8]) -> Received {
        match self {
            Local::Stdio(stdio) => stdio.receive(buffer),
            Local::Socket(socket) => socket.receive(buffer),
        }
    }

    /// Gives all of `bytes` from the server, waiting as long as it takes.
    ///
    /// # Errors
    /// Why not all of them could be given, in a sentence.
    pub fn deliver(&self, bytes: &[u8], state: &State) -> Result<(), String> {
        match self {
            Local::Stdio(_) => {
                state.park();
                let written = write_all(&io::stdout(), bytes, state);
                state.unpark();
                written
                    .map_err(|error| format!("cannot write to stdout: {}", io::Error::from(error)))
            }
            Local::Socket(socket) => {
                socket
                    .deliver(bytes, state)
                    .map_err(|undelivered| match undelivered {
                        Undelivered::TargetClosed => {
                            "the local client has closed its connection".into()
                        }
                        Undelivered::TargetFailed(why) => format!("the local client failed: {why}"),
                        Undelivered::BrokenOff => "broken off".into(),
                    })
            }
        }
    }

    /// What to say of a [`Received::Failed`].
    pub fn read_failure(&self, why: &str) -> String {
        match self {
            Local::Stdio(_) => format!("cannot read from stdin: {why}"),
            Local::Socket(_) => format!("the local client failed: {why}"),
        }
    }

    /// The server will send nothing more: a FIN, or an end of stdin as soon as it is idle. Nobody can speak to a
    /// process that has lost its stdout, but what is on its way to the target must not be cut off.
    pub fn finish(&self) {
        match self {
            Local::Stdio(stdio) => stdio.stop(),
            Local::Socket(socket) => socket.finish(),
        }
    }

    /// Both directions have ended in order.
    pub fn close_in_order(&self) {
        if let Local::Socket(socket) = self {
            socket.close_in_order();
        }
    }

    /// Makes the end a broken one: a RST. Wakes the threads that wait, but for one in a write to stdout.
    pub fn break_off(&self) {
        match self {
            Local::Stdio(stdio) => stdio.break_off(),
            Local::Socket(socket) => socket.break_off(),
        }
    }
}

/// How long stdin must bring nothing to be idle.
const IDLE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// Stdin and stdout. Neither is buffered.
#[derive(Debug)]
pub struct Stdio {
    stopped: OwnedFd,
    broken_off: AtomicBool,
}

impl Stdio {
    /// The process's streams.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new() -> io::Result<Stdio> {
        Ok(Stdio {
            stopped: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            broken_off: AtomicBool::new(false),
        })
    }

    fn break_off(&self) {
        self.broken_off.store(true, Ordering::SeqCst);
        self.stop();
    }

    /// Wakes the reader of stdin, for which it ends once it is idle.
    fn stop(&self) {
        let _ = rustix::io::write(&self.stopped, &1u64.to_ne_bytes());
    }

    fn receive(&self, buffer: &mut [u8]) -> Received {
        let stdin = io::stdin();
        loop {
            let mut fds = [
                PollFd::new(&stdin, PollFlags::IN),
                PollFd::new(&self.stopped, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) if self.broken_off.load(Ordering::SeqCst) => return Received::BrokenOff,
                Ok(_) if !fds[1].revents().is_empty() && is_idle(&stdin) => return Received::Eof,
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Received::Failed(io::Error::from(error).to_string()),
            }
            match rustix::io::read(&stdin, &mut *buffer) {
                Ok(0) => return Received::Eof,
                Ok(count) => return Received::Bytes(count),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Received::Failed(io::Error::from(error).to_string()),
            }
        }
    }
}

fn is_idle(stdin: &io::Stdin) -> bool {
    let mut fds = [PollFd::new(stdin, PollFlags::IN)];
    poll(&mut fds, Some(&IDLE)).is_ok_and(|ready| ready == 0)
}

/// Whoever started the process may have made its stdout non-blocking.
fn write_all(stdout: &impl AsFd, mut bytes: &[u8], state: &State) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(stdout, bytes) {
            Ok(count) => {
                state.note_delivered(count);
                bytes = &bytes[count..];
            }
            Err(Errno::AGAIN) => wait_for_room(stdout.as_fd())?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait_for_room(stdout: BorrowedFd<'_>) -> Result<(), Errno> {
    match poll(&mut [PollFd::new(&stdout, PollFlags::OUT)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}
