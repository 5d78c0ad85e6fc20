//! Thread 2: from the target to the client. The only one that waits in a write to the client.

use rustix::fd::OwnedFd;
use rustix::pipe::{PipeFlags, pipe_with};
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
        loop {
            let count = match target.receive_into(&self.into, MAX_MESSAGE) {
                Received::Bytes(count) => count,
                Received::Unsupported => return None,
                end => return Some(ended(end)),
            };
            if let Err(error) = writer.send_from(&self.out, count) {
                return Some(OutboundEnd::ClientGone(error.to_string()));
            }
            if count < COPIED {
                return None;
            }
        }
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
