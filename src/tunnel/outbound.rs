//! Thread 2: from the target to the client. The only one that waits in a write to the client.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fd::OwnedFd;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use tungstenite::protocol::frame::coding::CloseCode;

use super::client::{ClientWriter, HEADER_ROOM, MAX_MESSAGE};
use super::state::OutboundEnd;
use super::target::{Received, TargetSocket};

/// Relays until the target's direction has ended, and tells how.
///
/// The client has been sent that end when this returns: Close 1000 behind the last byte after the target's
/// EOF, Close 1011 after its failure, or the Close that is due when the tunnel was broken off.
pub fn relay(target: &TargetSocket, writer: &ClientWriter) -> OutboundEnd {
    let end = relay_bytes(target, writer);
    let sent = match &end {
        OutboundEnd::Eof => writer.send_close(CloseCode::Normal, ""),
        OutboundEnd::TargetFailed(why) => {
            writer.send_close(CloseCode::Error, &format!("target failed: {why}"))
        }
        OutboundEnd::BrokenOff => writer.send_close(CloseCode::Error, "the tunnel was broken off"),
        OutboundEnd::ClientGone(_) | OutboundEnd::Panicked => Ok(()),
    };
    match sent {
        Ok(()) => end,
        Err(error) => OutboundEnd::ClientGone(error.to_string()),
    }
}

/// How many bytes are worth copying. What fills this many goes on by splice(2), which costs two more system
/// calls a message but touches no byte.
const COPIED: usize = 4 * 1024;

/// Copies what comes in small amounts; and as long as more comes, moves it through a pipe.
fn relay_bytes(target: &TargetSocket, writer: &ClientWriter) -> OutboundEnd {
    let mut buffer = vec![0; HEADER_ROOM + COPIED];
    let mut pipe = None;
    loop {
        let received = target.receive(&mut buffer[HEADER_ROOM..]);
        let Received::Bytes(count) = received else {
            return ended(received);
        };
        if let Err(error) = writer.send_message(&mut buffer[..HEADER_ROOM + count]) {
            return OutboundEnd::ClientGone(error.to_string());
        }
        if count < COPIED {
            continue;
        }
        if pipe.is_none() {
            pipe = Pipe::new();
        }
        let Some(pipe) = &pipe else { continue };
        if let Some(end) = pipe.relay(target, writer) {
            return end;
        }
    }
}

/// How much of a pipe's default size is asked for at a time.
const PIPE: usize = 64 * 1024;

/// The size of a pipe through which much goes, where fewer and larger reads halve the cost. The system
/// allows it to everybody, up to 64 MiB of pipes a user (pipe(7)).
const LARGE_PIPE: usize = 512 * 1024;

/// The most large pipes at once: a quarter of what the system grants a user, who needs pipes elsewhere too.
const MAX_LARGE_PIPES: usize = 32;

static LARGE_PIPES: AtomicUsize = AtomicUsize::new(0);

struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
}

impl Pipe {
    /// A pipe, if the system has the descriptors.
    fn new() -> Option<Pipe> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC).ok()?;
        Some(Pipe { out, into })
    }

    /// Moves bytes as long as they come in amounts that make it worth while. `None` when they no longer do.
    fn relay(&self, target: &TargetSocket, writer: &ClientWriter) -> Option<OutboundEnd> {
        let mut large = None;
        loop {
            let room = if large.is_some() { LARGE_PIPE } else { PIPE };
            let count = match target.receive_into(&self.into, room) {
                Received::Bytes(count) => count,
                Received::Unsupported => return None,
                end => return Some(ended(end)),
            };
            if let Err(error) = self.send(count, writer) {
                return Some(OutboundEnd::ClientGone(error.to_string()));
            }
            if count < COPIED {
                return None;
            }
            if count >= PIPE / 2 && large.is_none() {
                large = Large::of(self);
            }
        }
    }

    fn send(&self, mut count: usize, writer: &ClientWriter) -> io::Result<()> {
        while count > 0 {
            let payload = count.min(MAX_MESSAGE);
            writer.send_from(&self.out, payload)?;
            count -= payload;
        }
        Ok(())
    }
}

/// A pipe that is large until this is dropped.
struct Large<'a>(&'a Pipe);

impl Large<'_> {
    /// Unless there are too many or the system doesn't allow another.
    fn of(pipe: &Pipe) -> Option<Large<'_>> {
        let one_more = |count| (count < MAX_LARGE_PIPES).then_some(count + 1);
        LARGE_PIPES
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .ok()?;
        let large = Large(pipe);
        fcntl_setpipe_size(&pipe.out, LARGE_PIPE)
            .is_ok()
            .then_some(large)
    }
}

impl Drop for Large<'_> {
    fn drop(&mut self) {
        let _ = fcntl_setpipe_size(&self.0.out, PIPE);
        LARGE_PIPES.fetch_sub(1, Ordering::Relaxed);
    }
}

fn ended(received: Received) -> OutboundEnd {
    match received {
        Received::Eof => OutboundEnd::Eof,
        Received::Failed(why) => OutboundEnd::TargetFailed(why),
        Received::BrokenOff => OutboundEnd::BrokenOff,
        Received::Unsupported => OutboundEnd::TargetFailed("the system cannot read from it".into()),
        Received::Bytes(_) => OutboundEnd::BrokenOff,
    }
}
