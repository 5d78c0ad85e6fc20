//! Thread 2: from the stream to the peer's WebSocket. The only one that waits in a write to the peer.

use super::Tunnel;
use super::ends::{Farewell, FromStreamEnd};
use super::frame_writer::HEADER_ROOM;
use super::pipe::{Pipe, WORTH_SPLICING};
use super::transfer::{Received, Splices};

/// How much is read at a time from a stream that brings little: as much as it takes to make more worth while.
const SMALL: usize = WORTH_SPLICING;

/// Relays until the stream's direction has ended, and tells how.
///
/// The peer has been sent that end when this returns: Close 1000 behind the last byte after an orderly one, Close
/// 1011 after a failure if the peer is told of those, or the Close that is pending when the tunnel was aborted.
pub(super) fn relay(tunnel: &Tunnel) -> FromStreamEnd {
    let end = relay_bytes(tunnel);
    if matches!(end, FromStreamEnd::StreamFailed(_)) {
        tunnel.note_stream_failed();
    }
    let writer = &tunnel.writer;
    let sent = match &end {
        FromStreamEnd::Eof => writer.send_close(&Farewell::Orderly),
        FromStreamEnd::StreamFailed(why) if tunnel.endpoint.tells_failures() => {
            writer.send_close(&Farewell::StreamFailed(why.clone()))
        }
        FromStreamEnd::Aborted => writer.send_queued(),
        FromStreamEnd::StreamFailed(_) | FromStreamEnd::PeerGone(_) | FromStreamEnd::Panicked => {
            Ok(())
        }
    };
    match (sent, end) {
        (Err(failure), FromStreamEnd::Eof) => FromStreamEnd::PeerGone(failure),
        (_, end) => end,
    }
}

/// Copies what comes in small amounts. As long as more comes, it goes through a pipe, or where it must be masked,
/// or can't be spliced, through a larger buffer.
fn relay_bytes(tunnel: &Tunnel) -> FromStreamEnd {
    let mut buffer = vec![0; HEADER_ROOM + SMALL];
    let mut splices = if tunnel.endpoint.masks() {
        Splices::Never
    } else {
        Splices::Later
    };
    let mut pipe = None;
    loop {
        match relay_once(tunnel, &mut buffer) {
            Ok(count) if count < SMALL => continue,
            Ok(_) => {}
            Err(end) => return end,
        }
        if splices == Splices::Later {
            pipe = pipe.or_else(Pipe::new);
        }
        let relayed = match &mut pipe {
            Some(pipe) if splices == Splices::Later => relay_by_pipe(tunnel, pipe),
            _ => relay_much(tunnel),
        };
        match relayed {
            Ok(next) => {
                splices = if splices == Splices::Never {
                    splices
                } else {
                    next
                }
            }
            Err(end) => return end,
        }
    }
}

/// One read and one message. The payload goes behind the room for its header.
fn relay_once(tunnel: &Tunnel, buffer: &mut [u8]) -> Result<usize, FromStreamEnd> {
    match tunnel.stream.receive(&mut buffer[HEADER_ROOM..]) {
        Received::Bytes(count) => {
            let message = &mut buffer[..HEADER_ROOM + count];
            let sent = tunnel.writer.send_message(message);
            sent.map(|()| count).map_err(FromStreamEnd::PeerGone)
        }
        received => Err(ended(tunnel, received)),
    }
}

/// As long as reads bring more than is little.
fn relay_much(tunnel: &Tunnel) -> Result<Splices, FromStreamEnd> {
    let (_, room) = tunnel.writer.max_payload();
    let mut buffer = vec![0; HEADER_ROOM + room];
    while relay_once(tunnel, &mut buffer)? >= SMALL {}
    Ok(Splices::Later)
}

/// As long as bytes come in amounts that make it worth while, and can be spliced.
fn relay_by_pipe(tunnel: &Tunnel, pipe: &mut Pipe) -> Result<Splices, FromStreamEnd> {
    let (max_payload, _) = tunnel.writer.max_payload();
    loop {
        let count = match tunnel.stream.receive_into(pipe) {
            Received::Bytes(count) => count,
            Received::NotSpliced(splices) => {
                pipe.shrink();
                return Ok(splices);
            }
            received => return Err(ended(tunnel, received)),
        };
        while pipe.held() > 0 {
            let payload = pipe.held().min(max_payload);
            let sent = tunnel.writer.send_from(pipe, payload);
            sent.map_err(FromStreamEnd::PeerGone)?;
        }
        if count < WORTH_SPLICING {
            pipe.shrink();
            return Ok(Splices::Later);
        }
    }
}

fn ended(tunnel: &Tunnel, received: Received) -> FromStreamEnd {
    match received {
        Received::Eof => {
            tunnel.activity().note_stream_end();
            FromStreamEnd::Eof
        }
        Received::Failed(why) => {
            FromStreamEnd::StreamFailed(tunnel.stream.failure(tunnel.endpoint.role, &why))
        }
        Received::Aborted | Received::Bytes(_) | Received::NotSpliced(_) => FromStreamEnd::Aborted,
    }
}
