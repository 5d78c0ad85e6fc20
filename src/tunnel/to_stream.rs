//! Thread 1: from the peer's WebSocket to the stream. What is to be answered is left to the [`FrameWriter`].

use std::io::{self, Read};
use std::time::Duration;

use rustix::io::Errno;

use super::Tunnel;
use super::ends::{Farewell, ToStreamEnd};
use super::frame_writer::FrameWriter;
use super::framing::Reader;
use super::incoming::{Fault, Incoming};
use super::pipe::{NoSplice, Pipe};
use super::stream::Stream;
use super::transfer::{Splices, WriteFailure};
use crate::os;

/// How much is read at a time from a peer that sends little.
const SMALL: usize = 2 * 1024;

/// And from one that sends as fast as it can. Twice as much gains little more, and 500 such peers would hold it.
const LARGE: usize = 128 * 1024;

/// How many reads make a peer one that sends much in small messages. Large ones are spliced, after a read of their
/// header alone.
const MANY_READS: u32 = 8;

/// How long a peer must be silent to be one that sends little.
const QUIET: Duration = Duration::from_secs(1);

/// How many bytes behind a Close, where there are to be none, are read and dropped.
const MAX_BEHIND_CLOSE: usize = 1024 * 1024;

/// Relays until the peer's direction has ended, and tells how.
///
/// The stream has seen an orderly end when this returns: the FIN behind the last byte. From any other it is aborted
/// by the caller.
pub(super) fn relay(tunnel: &Tunnel, early: Vec<u8>) -> ToStreamEnd {
    let mut relay = Relay {
        tunnel,
        is_large: false,
        filled_reads: 0,
        is_refused: false,
        is_closed: false,
        dropped: 0,
    };
    let source = Source {
        tunnel,
        ack_due: false,
        pipe: None,
        header_next: false,
    };
    let mut reader = Reader::new(source, early, SMALL, tunnel.endpoint);
    loop {
        let received = match reader.receive() {
            Ok(Incoming::Payload(count)) => {
                relay.splice(&mut reader, count);
                relay.filled_reads = 0;
                Ok(relay.become_small())
            }
            Ok(Incoming::Nothing) => Ok(relay.become_small()),
            Ok(incoming) => relay.take(incoming),
            Err(fault) => Err(relay.faulted(fault)),
        };
        match received {
            Ok(Next::GoOn) => {}
            Ok(Next::AfterClose) => reader.go_on(),
            Ok(Next::Resize(read_size)) => reader.set_read_size(read_size),
            Err(end) => return end,
        }
        if reader.filled_buffer() {
            relay.filled_reads += 1;
            let many = if reader.splices() { MANY_READS } else { 1 };
            if !relay.is_large && relay.filled_reads >= many {
                relay.is_large = true;
                reader.set_read_size(LARGE);
                let _ = tunnel.peer.set_read_timeout(Some(QUIET));
            }
        }
    }
}

enum Next {
    GoOn,
    /// The peer's Close has come, and control frames may still.
    AfterClose,
    /// So many bytes are to be read at a time from now on.
    Resize(usize),
}

struct Relay<'a> {
    tunnel: &'a Tunnel,
    /// Much is read at a time.
    is_large: bool,
    /// How many reads in a row brought all they had room for, and nothing to splice.
    filled_reads: u32,
    /// The stream has not taken everything. The rest is dropped: the peer is about to be told.
    is_refused: bool,
    /// The peer's Close has come.
    is_closed: bool,
    /// Bytes behind the Close.
    dropped: usize,
}

impl Relay<'_> {
    fn take(&mut self, incoming: Incoming<'_>) -> Result<Next, ToStreamEnd> {
        match incoming {
            Incoming::Bytes(bytes) if self.is_closed => return self.drop_behind_close(bytes.len()),
            Incoming::Bytes(bytes) => self.deliver(bytes),
            Incoming::Ping(payload) => self.tunnel.writer.answer_ping(payload),
            Incoming::Pong(payload) => self.note_pong(&payload),
            Incoming::Close(code, reason) => return self.closed(code, reason),
            Incoming::End => return self.ended(),
            Incoming::Payload(_) | Incoming::Nothing => {}
        }
        Ok(Next::GoOn)
    }

    fn deliver(&mut self, bytes: &[u8]) {
        if !self.is_refused {
            let delivered = self.tunnel.stream.deliver(bytes, self.tunnel.activity());
            self.note_delivery(delivered);
        }
    }

    fn note_delivery(&mut self, delivered: Result<(), WriteFailure>) {
        if let Err(why) = delivered {
            self.is_refused = true;
            self.tunnel.note_undelivered(why);
        }
    }

    fn note_pong(&self, payload: &[u8]) {
        if let Some(mark) = FrameWriter::mark_of(payload) {
            log::debug!(id = self.tunnel.state.id; "pong");
            self.tunnel.activity().note_pong(mark);
        }
    }

    fn closed(&mut self, code: Option<u16>, reason: String) -> Result<Next, ToStreamEnd> {
        if self.is_closed {
            return Ok(Next::AfterClose);
        }
        if !self.tunnel.endpoint.role.is_orderly(code) {
            return Err(ToStreamEnd::PeerAborted(code, reason));
        }
        self.ended()
    }

    fn ended(&mut self) -> Result<Next, ToStreamEnd> {
        let took_all = self.tunnel.has_stream_taken_all();
        // First, as behind both of its ends the stream looks as if it had failed.
        self.tunnel.note_end(|ends| {
            ends.peer_closed = true;
            ends.stream_took_all = took_all;
        });
        if !self.is_refused {
            let finished = self.tunnel.stream.shutdown_write();
            // Of a stream that has failed the peer was told already.
            if !self.tunnel.ends().stream_failed_first {
                self.note_delivery(finished);
            }
        }
        self.tunnel.end_if_both_ended();
        if !self.tunnel.endpoint.reads_after_end() {
            return Err(ToStreamEnd::Closed);
        }
        self.is_closed = true;
        Ok(Next::AfterClose)
    }

    fn drop_behind_close(&mut self, count: usize) -> Result<Next, ToStreamEnd> {
        self.dropped += count;
        if self.dropped > MAX_BEHIND_CLOSE {
            return Err(self.refused("data after its Close".into()));
        }
        Ok(Next::GoOn)
    }

    fn faulted(&self, fault: Fault) -> ToStreamEnd {
        match fault {
            Fault::Text => ToStreamEnd::Refused(Farewell::Text),
            Fault::Protocol(why) => self.refused(why),
            Fault::Eof if self.is_closed => ToStreamEnd::Closed,
            // A reset that a write was told of reads like an EOF, but nothing can be written either.
            Fault::Eof if !self.tunnel.peer_is_unix && os::is_hung_up(&*self.tunnel.peer) => {
                let reset = io::Error::from(Errno::CONNRESET);
                ToStreamEnd::Vanished(Some(reset.to_string()))
            }
            Fault::Eof => ToStreamEnd::Vanished(None),
            Fault::Failed(why) => ToStreamEnd::Vanished(Some(why)),
        }
    }

    fn refused(&self, why: String) -> ToStreamEnd {
        ToStreamEnd::Refused(Farewell::Protocol(why))
    }

    fn become_small(&mut self) -> Next {
        if !self.is_large {
            return Next::GoOn;
        }
        self.is_large = false;
        let _ = self.tunnel.peer.set_read_timeout(None);
        Next::Resize(SMALL)
    }

    /// Moves the next `count` payload bytes, or as many of them as are there, past our memory.
    fn splice(&mut self, reader: &mut Reader<Source<'_>>, count: u64) {
        let limit = usize::try_from(count).unwrap_or(usize::MAX);
        match reader.source().fill_pipe() {
            Ok(true) => {}
            // The plain read that follows tells why.
            Ok(false) => return reader.set_splices(false),
            Err(splices) => return reader.set_splices(splices == Splices::Later),
        }
        let Some(pipe) = &mut reader.source().pipe else {
            return;
        };
        let before = pipe.held();
        let taken = if self.is_closed || self.is_refused {
            discard(pipe, limit)
        } else {
            let delivered = self
                .tunnel
                .stream
                .deliver_from(pipe, limit, self.tunnel.activity());
            let splices = delivered.as_ref().copied().unwrap_or(Splices::Later);
            self.note_delivery(delivered.map(|_| ()));
            if splices == Splices::Never {
                reader.set_splices(false);
            }
            before - reader.source().held()
        };
        reader.spliced(taken as u64);
        reader.source().header_next = true;
    }
}

/// Reads bytes out of a pipe that nobody takes any more.
fn discard(pipe: &mut Pipe, limit: usize) -> usize {
    let mut buffer = [0; 4096];
    let room = limit.min(buffer.len());
    pipe.read(&mut buffer[..room]).unwrap_or(0)
}

/// The peer's connection as it is read from. Each read that brings bytes is a sign of life.
struct Source<'a> {
    tunnel: &'a Tunnel,
    /// The last read found less than it had room for.
    ack_due: bool,
    /// What was taken from the connection to be spliced; the next bytes come from here.
    pipe: Option<Pipe>,
    /// Payload was spliced, so a header comes next, and what follows it is to be spliced again.
    header_next: bool,
}

impl Source<'_> {
    fn held(&self) -> usize {
        self.pipe.as_ref().map_or(0, Pipe::held)
    }

    /// Waits until there is something in the pipe. `false` if nothing could be brought there just now.
    fn fill_pipe(&mut self) -> Result<bool, Splices> {
        if self.held() > 0 {
            return Ok(true);
        }
        self.before_wait();
        if self.pipe.is_none() {
            self.pipe = Pipe::new();
            if let Stream::Tcp(tcp) = &self.tunnel.stream {
                tcp.prepare_for_splices();
            }
        }
        let Some(pipe) = &mut self.pipe else {
            return Ok(false);
        };
        let room = pipe.room();
        match pipe.fill(&*self.tunnel.peer) {
            Ok(count) => {
                self.note_read(count, room);
                Ok(true)
            }
            Err(NoSplice::Unsupported) => Err(Splices::Never),
            Err(NoSplice::EndOrMark | NoSplice::Failed(_)) => Ok(false),
        }
    }

    /// What is due to the peer before waiting for it: an acknowledgement, now that the bytes have gone on, and
    /// what is pending.
    fn before_wait(&mut self) {
        if std::mem::take(&mut self.ack_due) {
            super::acknowledge_at_once(&self.tunnel.peer);
        }
        self.tunnel.writer.flush_before_read();
    }

    fn note_read(&mut self, count: usize, room: usize) {
        self.tunnel.activity().note_read();
        self.ack_due = count < room;
    }

    fn read_peer(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.before_wait();
        loop {
            match (&mut &*self.tunnel.peer).read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(count @ 1..) => {
                    self.note_read(count, buffer.len());
                    return Ok(count);
                }
                Ok(_) => {
                    let failure = self.tunnel.peer_failure();
                    return failure.map_or(Ok(0), |why| Err(io::Error::other(why)));
                }
                result => return result,
            }
        }
    }
}

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = if std::mem::take(&mut self.header_next) {
            self.tunnel.endpoint.usual_header().min(buffer.len())
        } else {
            buffer.len()
        };
        match &mut self.pipe {
            Some(pipe) if pipe.held() > 0 => pipe.read(&mut buffer[..room]),
            _ => self.read_peer(&mut buffer[..room]),
        }
    }
}
