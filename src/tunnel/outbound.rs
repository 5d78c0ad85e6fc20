//! Thread 2: from the target to the client. The only one that waits in a write to the client.

use tungstenite::protocol::frame::coding::CloseCode;

use super::client::{ClientWriter, HEADER_ROOM, MAX_MESSAGE};
use super::state::OutboundEnd;
use super::target::{Received, TargetSocket};

/// Relays until the target's direction has ended, and tells how.
///
/// The client has been sent that end when this returns: Close 1000 behind the last byte after the target's
/// EOF, Close 1011 after its failure, or the Close that is due when the tunnel was broken off.
pub fn relay(target: &TargetSocket, writer: &ClientWriter<'_>) -> OutboundEnd {
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

fn relay_bytes(target: &TargetSocket, writer: &ClientWriter<'_>) -> OutboundEnd {
    let mut buffer = vec![0; HEADER_ROOM + MAX_MESSAGE];
    loop {
        match target.receive(&mut buffer[HEADER_ROOM..]) {
            Received::Bytes(count) => {
                if let Err(error) = writer.send_message(&mut buffer[..HEADER_ROOM + count]) {
                    return OutboundEnd::ClientGone(error.to_string());
                }
            }
            Received::Eof => return OutboundEnd::Eof,
            Received::Failed(why) => return OutboundEnd::TargetFailed(why),
            Received::BrokenOff => return OutboundEnd::BrokenOff,
        }
    }
}
