//! Frames or capsules out, whole ones from several threads. Only the thread that reads the stream waits in a
//! write here.

use std::io::{self, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tungstenite::protocol::frame::{CloseFrame, Frame, FrameHeader};

use super::activity::Activity;
use super::capsules;
use super::ends::{Endpoint, Farewell, Protocol, Role};
use super::frame_reader::apply_mask;
use super::pipe::{NoSplice, Pipe};
use super::transfer::WriteFailure;
use super::write_lock::WriteLock;
use crate::checked::MutexGuard;

/// The most payload bytes in a WebSocket message of the daemon's: the smallest default read limit among the clients
/// people use (32 KiB in coder/websocket).
const MAX_MESSAGE: usize = 32 * 1024;

/// The most in one from memory, where the peer takes any length: each costs a system call on both sides.
const MAX_COPIED: usize = 128 * 1024;

/// Room for the longest header before a message's payload: two bytes, a 64-bit length, the mask (RFC 6455 §5.2).
pub(super) const HEADER_ROOM: usize = 14;

/// RFC 6455 §5.5: a control frame's payload is at most 125 bytes, two of which are a Close's code.
const MAX_REASON: usize = 123;

/// Marks a pong as the answer to one of our pings rather than an unsolicited one.
const PING_TAG: &[u8; 8] = b"tunneld:";

/// The writing half of the peer's connection.
#[derive(Debug)]
pub(super) struct FrameWriter {
    socket: Arc<TcpStream>,
    endpoint: Endpoint,
    activity: Arc<Activity>,
    lock: WriteLock<WriteState, Pending>,
}

/// Held while a frame is written.
#[derive(Debug, Default)]
struct WriteState {
    /// The end has been sent: no data may follow (RFC 6455 §5.5.1).
    closed: bool,
    /// A frame is torn, or there is no WebSocket: nothing may follow.
    broken: Option<WriteFailure>,
}

impl WriteState {
    /// After a failed write a frame may be torn, so nothing may follow it.
    fn fail(&mut self, error: &io::Error) -> WriteFailure {
        self.broken
            .get_or_insert_with(|| WriteFailure::from(error))
            .clone()
    }
}

/// Held while nothing may be sent.
#[derive(Debug)]
pub(super) struct WriteGuard<'a>(MutexGuard<'a, WriteState>);

impl WriteGuard<'_> {
    /// Lets nothing be sent any more, ever.
    pub(super) fn close(mut self) {
        self.0.broken = Some(WriteFailure::Aborted);
    }
}

/// What is to be sent as soon as it can be. A newer pong replaces an older one (RFC 6455 §5.5.3); of
/// several ends the first one counts.
#[derive(Debug, Default)]
struct Pending {
    pong: Option<Vec<u8>>,
    ping: bool,
    close: Option<Farewell>,
}

impl FrameWriter {
    pub(super) fn new(
        socket: Arc<TcpStream>,
        endpoint: Endpoint,
        activity: Arc<Activity>,
    ) -> FrameWriter {
        FrameWriter {
            socket,
            endpoint,
            activity,
            lock: WriteLock::default(),
        }
    }

    /// Lets nothing be sent until the returned guard is dropped.
    pub(super) fn hold(&self) -> WriteGuard<'_> {
        WriteGuard(self.lock.lock())
    }

    /// Lets nothing be sent any more, unless a thread is writing just now. Whether that is so.
    pub(super) fn close_if_idle(&self) -> bool {
        let idle = self.lock.try_lock();
        idle.map(|state| WriteGuard(state).close()).is_some()
    }

    /// Sends a message, a binary one or a capsule: the payload is `buffer[HEADER_ROOM..]`, at least one byte, and is
    /// masked where it lies if this end masks. Waits while the peer is slow.
    ///
    /// # Errors
    /// When the peer takes no more.
    pub(super) fn send_message(&self, buffer: &mut [u8]) -> Result<(), WriteFailure> {
        let payload = buffer.len() - HEADER_ROOM;
        let (header, length) = self.header(payload);
        let start = HEADER_ROOM - length;
        buffer[start..HEADER_ROOM].copy_from_slice(&header[..length]);
        if self.endpoint.masks() {
            let mask = [10, 11, 12, 13].map(|index| buffer[index]);
            apply_mask(&mut buffer[HEADER_ROOM..], mask);
        }
        let frame = &buffer[start..];
        self.send_payload(payload, |since| self.write_all(frame, length, since))
    }

    /// Sends a message whose payload is the next `payload` bytes in `pipe`, at least one and at most
    /// [`FrameWriter::max_payload`], without touching them. Waits while the peer is slow.
    ///
    /// # Errors
    /// When the peer takes no more.
    pub(super) fn send_from(&self, pipe: &mut Pipe, payload: usize) -> Result<(), WriteFailure> {
        let (header, length) = self.header(payload);
        self.send_payload(payload, |since| {
            self.write_header(&header[..length])?;
            let mut left = payload;
            while left > 0 {
                match pipe.give(&*self.socket, left) {
                    Ok(count) => {
                        self.activity.note_to_peer(count, since);
                        left -= count;
                    }
                    Err(NoSplice::Failed(Errno::INTR)) => {}
                    Err(NoSplice::Failed(error)) => return Err(error.into()),
                    Err(NoSplice::EndOrMark | NoSplice::Unsupported) => {
                        left -= self.copy_from(pipe, left, since)?;
                    }
                }
            }
            Ok(())
        })
    }

    fn copy_from(&self, pipe: &mut Pipe, limit: usize, since: u64) -> io::Result<usize> {
        let mut buffer = vec![0; limit.min(4096)];
        let count = pipe.read(&mut buffer)?;
        self.write_all(&buffer[..count], 0, since)?;
        Ok(count)
    }

    /// The kernel keeps the header back to send it along with the payload.
    fn write_header(&self, mut header: &[u8]) -> io::Result<()> {
        while !header.is_empty() {
            match send(&*self.socket, header, SendFlags::MORE | SendFlags::NOSIGNAL) {
                Ok(sent) => header = &header[sent..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes all of `bytes`, and counts those behind the first `header` as payload.
    fn write_all(&self, mut bytes: &[u8], mut header: usize, since: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match send(&*self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    let payload = count.saturating_sub(header);
                    header = header.saturating_sub(count);
                    if payload > 0 {
                        self.activity.note_to_peer(payload, since);
                    }
                    bytes = &bytes[count..];
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn send_payload(
        &self,
        payload: usize,
        write: impl FnOnce(u64) -> io::Result<()>,
    ) -> Result<(), WriteFailure> {
        let mut state = self.lock.lock();
        if let Some(why) = &state.broken {
            return Err(why.clone());
        }
        if state.closed {
            return Err(WriteFailure::Aborted);
        }
        let since = self.activity.note_queued(payload);
        write(since).map_err(|error| state.fail(&error))?;
        self.unlock(state)
    }

    /// The most payload of one message, from a pipe and from memory. Capsules are as long as what there is to send.
    pub(super) fn max_payload(&self) -> (usize, usize) {
        match (self.endpoint.protocol, self.endpoint.role) {
            (Protocol::WebSocket, Role::Daemon) => (MAX_MESSAGE, MAX_MESSAGE),
            (Protocol::WebSocket, Role::Client) | (Protocol::ConnectTcp, _) => {
                (usize::MAX, MAX_COPIED)
            }
        }
    }

    /// Tells the peer of an end unless it was told of one. Waits while the peer is slow.
    ///
    /// # Errors
    /// When the peer takes no more.
    pub(super) fn send_close(&self, farewell: &Farewell) -> Result<(), WriteFailure> {
        self.queue_close(farewell);
        self.send_queued()
    }

    /// Sends what is pending. Waits while the peer is slow.
    ///
    /// # Errors
    /// When the peer takes no more.
    pub(super) fn send_queued(&self) -> Result<(), WriteFailure> {
        self.unlock(self.lock.lock())
    }

    /// Makes an end pending, unless one is.
    pub(super) fn queue_close(&self, farewell: &Farewell) {
        self.lock.queue(|pending| {
            pending.close.get_or_insert_with(|| farewell.clone());
        });
    }

    /// Makes a pong pending, and sends it if that needs no waiting.
    pub(super) fn answer_ping(&self, payload: Vec<u8>) {
        self.lock.queue(|pending| pending.pong = Some(payload));
        self.flush();
    }

    /// Makes a ping pending, and sends it if that needs no waiting; else it goes out between two messages.
    pub(super) fn ping(&self) {
        self.lock.queue(|pending| pending.ping = true);
        self.flush();
    }

    /// Whether a ping waits to be sent, as bytes are on their way.
    pub(super) fn is_ping_pending(&self) -> bool {
        self.lock.is_pending(|pending| pending.ping)
    }

    /// Sends what is pending, if that needs no waiting. When another thread is writing, it sends it.
    pub(super) fn flush(&self) {
        self.lock.flush(&*self.socket, |state, pending| {
            self.send_pending(state, pending)
        });
    }

    /// Sends what is pending before a wait for the peer: as soon as there is room, unless bytes come first.
    pub(super) fn flush_before_read(&self) {
        self.lock
            .flush_before_read(&*self.socket, |state, pending| {
                self.send_pending(state, pending)
            });
    }

    /// How many bytes had been queued when the ping was sent that `pong` answers; `None` if it answers
    /// none of ours.
    pub(super) fn mark_of(pong: &[u8]) -> Option<u64> {
        let mark = pong.strip_prefix(PING_TAG)?;
        mark.try_into().ok().map(u64::from_be_bytes)
    }

    fn unlock(&self, state: MutexGuard<'_, WriteState>) -> Result<(), WriteFailure> {
        self.lock
            .unlock_and_flush(state, |state, pending| self.send_pending(state, pending))
            .map_err(|error| WriteFailure::from(&error))
    }

    /// After our own Close, control frames may still be sent, until the peer's comes.
    fn send_pending(
        &self,
        state: &mut WriteState,
        Pending { pong, ping, close }: Pending,
    ) -> io::Result<()> {
        if let Some(payload) = pong {
            self.write_frame(state, Frame::pong(payload))?;
        }
        if ping {
            self.write_ping(state)?;
            self.activity.note_ping();
        }
        if let Some(farewell) = close.filter(|_| !state.closed) {
            state.closed = true;
            self.write_end(state, &farewell)?;
        }
        Ok(())
    }

    fn write_ping(&self, state: &mut WriteState) -> io::Result<()> {
        match self.endpoint.protocol {
            Protocol::WebSocket => {
                let mark = self.activity.bytes_queued().to_be_bytes();
                self.write_frame(state, Frame::ping([&PING_TAG[..], &mark].concat()))
            }
            Protocol::ConnectTcp if state.closed => Ok(()),
            Protocol::ConnectTcp => self.write(state, &capsules::empty_data()),
        }
    }

    fn write_end(&self, state: &mut WriteState, farewell: &Farewell) -> io::Result<()> {
        match (self.endpoint.protocol, farewell) {
            (Protocol::WebSocket, _) => {
                let (code, reason) = farewell.close();
                let close = CloseFrame {
                    code: CloseCode::from(code),
                    reason: reason[..reason.floor_char_boundary(MAX_REASON)].into(),
                };
                self.write_frame(state, Frame::close(Some(close)))
            }
            (Protocol::ConnectTcp, Farewell::Orderly) => self.write(state, &capsules::final_data()),
            // The reset that follows is all there is to say.
            (Protocol::ConnectTcp, _) => Ok(()),
        }
    }

    fn write_frame(&self, state: &mut WriteState, mut frame: Frame) -> io::Result<()> {
        frame.header_mut().mask = self.mask();
        let mut bytes = Vec::with_capacity(frame.len());
        frame.format(&mut bytes).map_err(io::Error::other)?;
        self.write(state, &bytes)
    }

    fn write(&self, state: &mut WriteState, bytes: &[u8]) -> io::Result<()> {
        if state.broken.is_some() {
            return Ok(());
        }
        let written = (&mut &*self.socket).write_all(bytes);
        written.inspect_err(|error| {
            state.fail(error);
        })
    }

    /// A mask of its own for each frame (RFC 6455 §5.3).
    fn mask(&self) -> Option<[u8; 4]> {
        self.endpoint.masks().then(rand::random)
    }

    /// The header of a message, and its length. The mask, if there is one, comes last.
    fn header(&self, payload: usize) -> ([u8; HEADER_ROOM], usize) {
        let mut bytes = [0; HEADER_ROOM];
        if self.endpoint.protocol == Protocol::ConnectTcp {
            let (header, length) = capsules::data_header(payload as u64);
            bytes[..header.len()].copy_from_slice(&header);
            return (bytes, length);
        }
        let header = FrameHeader {
            opcode: OpCode::Data(Data::Binary),
            mask: self.mask(),
            ..FrameHeader::default()
        };
        // Writing to memory doesn't fail, and there is room for the longest.
        let _ = header.format(payload as u64, &mut &mut bytes[..]);
        (bytes, header.len(payload as u64))
    }
}

#[cfg(test)]
mod tests;
