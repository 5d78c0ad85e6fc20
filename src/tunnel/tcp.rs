//! A TCP connection as a tunnel's stream: given bytes to, read from, half-closed in order, or aborted.

use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{SendFlags, send, sockopt};

use super::Activity;
use super::pipe::{NoSplice, Pipe};
use super::transfer::{Received, Splices, WriteFailure};
use crate::lock::lock;
use crate::os::{self, Waker};

/// How much may wait unsent in the buffer, in bytes (`TCP_NOTSENT_LOWAT`, tcp(7)). It is larger than for the peer,
/// as each wait costs two system calls, and nothing waits behind the bytes.
const UNSENT: u32 = 1024 * 1024;

/// The connection. It is closed when this is dropped, or when it was aborted and no call uses it any more.
///
/// Until its write side was shut down in order, closing it sends a RST (`SO_LINGER` 0, socket(7)), whoever closes
/// it: a process that is killed must not make a cut-off upload look like a finished one. From then on a close is a
/// plain one, and the kernel goes on delivering: what was finished stays finished.
#[derive(Debug)]
pub(crate) struct Tcp {
    /// Taken out by [`Tcp::abort`]. A thread holds its own reference only during a call, so that the RST goes out
    /// at once, however long the peer takes for its side of the end.
    stream: Mutex<Option<Arc<TcpStream>>>,
    aborted: AtomicBool,
    /// The last read found less than it had room for.
    ack_due: AtomicBool,
    /// Wakes a thread that waits for room to write. `shutdown` can't: on the write side it would send a FIN,
    /// and after an EOF the read side is shut down already.
    on_abort: Waker,
    /// How many calls are under way that may take the socket's error, or haven't noted it yet.
    taking_error: AtomicUsize,
    failure: Mutex<Option<WriteFailure>>,
}

impl Tcp {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub(crate) fn new(stream: TcpStream) -> io::Result<Tcp> {
        super::limit_unsent(&stream, UNSENT);
        sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
        Ok(Tcp {
            stream: Mutex::new(Some(Arc::new(stream))),
            aborted: AtomicBool::new(false),
            ack_due: AtomicBool::new(false),
            on_abort: Waker::new()?,
            taking_error: AtomicUsize::new(0),
            failure: Mutex::new(None),
        })
    }

    /// See [`super::Stream::deliver`].
    pub(super) fn deliver(&self, bytes: &[u8], activity: &Activity) -> Result<(), WriteFailure> {
        self.deliver_by(|stream| self.send_all(stream, bytes, activity))
    }

    /// See [`super::Stream::deliver_from`].
    pub(super) fn deliver_from(
        &self,
        pipe: &mut Pipe,
        limit: usize,
        activity: &Activity,
    ) -> Result<Splices, WriteFailure> {
        self.deliver_by(|stream| self.splice_all(stream, pipe, limit, activity))
    }

    fn deliver_by<T>(
        &self,
        write: impl FnOnce(&TcpStream) -> Result<T, WriteFailure>,
    ) -> Result<T, WriteFailure> {
        let Some(stream) = self.stream() else {
            return Err(WriteFailure::Aborted);
        };
        self.taking_error.fetch_add(1, Ordering::SeqCst);
        let result = write(&stream);
        if let Err(why) = &result {
            *lock(&self.failure) = Some(why.clone());
        }
        self.taking_error.fetch_sub(1, Ordering::SeqCst);
        result
    }

    fn send_all(
        &self,
        stream: &TcpStream,
        mut bytes: &[u8],
        activity: &Activity,
    ) -> Result<(), WriteFailure> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        while !bytes.is_empty() {
            match send(stream, bytes, flags) {
                Ok(count) => {
                    activity.note_to_stream(count);
                    bytes = &bytes[count..];
                }
                Err(error) => self.wait_or_fail(stream, error)?,
            }
        }
        Ok(())
    }

    fn splice_all(
        &self,
        stream: &TcpStream,
        pipe: &mut Pipe,
        limit: usize,
        activity: &Activity,
    ) -> Result<Splices, WriteFailure> {
        let mut left = limit.min(pipe.held());
        let mut was_partial = false;
        while left > 0 {
            match pipe.give(stream, left) {
                Ok(count) => {
                    activity.note_to_stream(count);
                    left -= count;
                    was_partial = left > 0;
                }
                // The splice before may have swallowed the reason, which must not be taken for an orderly end.
                Err(NoSplice::Failed(Errno::PIPE)) if was_partial => {
                    let reset = io::Error::from(Errno::CONNRESET);
                    return Err(WriteFailure::Failed(reset.to_string()));
                }
                Err(NoSplice::Failed(error)) => {
                    was_partial = false;
                    self.wait_or_fail(stream, error)?;
                }
                Err(NoSplice::Unsupported | NoSplice::EndOrMark) => {
                    return Ok(Splices::Never);
                }
            }
        }
        Ok(Splices::Later)
    }

    /// Goes on when there is room again.
    fn wait_or_fail(&self, stream: &TcpStream, error: Errno) -> Result<(), WriteFailure> {
        match error {
            _ if self.is_aborted() => Err(WriteFailure::Aborted),
            Errno::AGAIN | Errno::NOBUFS => self.wait_for(stream, PollFlags::OUT),
            Errno::INTR => Ok(()),
            error => Err(WriteFailure::from(&io::Error::from(error))),
        }
    }

    fn wait_for(&self, stream: &TcpStream, flags: PollFlags) -> Result<(), WriteFailure> {
        let mut fds = [
            PollFd::new(stream, flags),
            PollFd::new(&self.on_abort, PollFlags::IN),
        ];
        match os::wait(&mut fds, None) {
            Ok(_) if self.is_aborted() => Err(WriteFailure::Aborted),
            Ok(_) => Ok(()),
            Err(error) => Err(WriteFailure::from(&error)),
        }
    }

    /// Bytes are going to be spliced to it. A splice that waits in the kernel can't be woken without a FIN, and
    /// swallows the reason when the connection breaks meanwhile.
    pub(super) fn prepare_for_splices(&self) {
        if let Some(stream) = self.stream() {
            let _ = stream.set_nonblocking(true);
        }
    }

    /// See [`super::Stream::shutdown_write`].
    pub(super) fn shutdown_write(&self) -> Result<(), WriteFailure> {
        let Some(stream) = self.stream() else {
            return Ok(());
        };
        let _ = sockopt::set_socket_linger(&stream, None);
        // ENOTCONN: it was reset meanwhile.
        stream
            .shutdown(Shutdown::Write)
            .map_err(|_| WriteFailure::Closed)
    }

    /// See [`super::Stream::reset_on_close`].
    pub(super) fn reset_on_close(&self) {
        if let Some(stream) = self.stream() {
            let _ = sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
        }
    }

    /// See [`super::Stream::unacknowledged`].
    pub(super) fn unacknowledged(&self) -> Option<u64> {
        match self.stream() {
            Some(stream) => os::unacknowledged(&stream),
            None => Some(0),
        }
    }

    /// See [`super::Stream::is_over`]. Behind both FINs, once the last was acknowledged, or behind a RST, the system knows
    /// no peer any more (`ENOTCONN`, getpeername(2)).
    pub(super) fn is_over(&self) -> bool {
        self.stream()
            .is_none_or(|stream| stream.peer_addr().is_err())
    }

    /// See [`super::Stream::was_reset`].
    pub(super) fn was_reset(&self) -> bool {
        self.stream()
            .is_some_and(|stream| !matches!(stream.take_error(), Ok(None)))
    }

    /// See [`super::Stream::take_failure`]. `None` too when it was closed after an orderly end of its own.
    pub(super) fn take_failure(&self) -> Option<String> {
        let stream = self.stream()?;
        self.taking_error.fetch_add(1, Ordering::SeqCst);
        let mut failure = lock(&self.failure);
        if let (None, Ok(Some(error))) = (&*failure, stream.take_error()) {
            *failure = Some(WriteFailure::from(&error));
        }
        self.taking_error.fetch_sub(1, Ordering::SeqCst);
        match &*failure {
            Some(WriteFailure::Failed(why)) => Some(why.clone()),
            _ => None,
        }
    }

    /// See [`super::Stream::receive`].
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Received {
        let room = buffer.len();
        self.receive_by(|mut stream| {
            Some(match stream.read(buffer) {
                Ok(0) => self.judge_eof(stream),
                Ok(count) => self.received(count, room),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => return None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return self.wait_to_read(stream);
                }
                Err(error) => Received::Failed(error.to_string()),
            })
        })
    }

    /// See [`super::Stream::receive_into`].
    pub(super) fn receive_into(&self, pipe: &mut Pipe) -> Received {
        let room = pipe.room();
        self.receive_by(|stream| {
            Some(match pipe.fill(stream) {
                Ok(count) => self.received(count, room),
                Err(NoSplice::Failed(Errno::INTR)) => return None,
                Err(NoSplice::Failed(Errno::AGAIN)) => return self.wait_to_read(stream),
                Err(NoSplice::Failed(error)) => {
                    Received::Failed(io::Error::from(error).to_string())
                }
                Err(NoSplice::EndOrMark) => Received::NotSpliced(Splices::Later),
                Err(NoSplice::Unsupported) => Received::NotSpliced(Splices::Never),
            })
        })
    }

    /// Only where bytes are spliced to it does it not wait by itself; see [`Tcp::prepare_for_splices`].
    fn wait_to_read(&self, stream: &TcpStream) -> Option<Received> {
        match self.wait_for(stream, PollFlags::IN) {
            Ok(()) => None,
            Err(WriteFailure::Failed(why)) => Some(Received::Failed(why)),
            Err(_) => Some(Received::Aborted),
        }
    }

    fn received(&self, count: usize, room: usize) -> Received {
        self.ack_due.store(count < room, Ordering::Relaxed);
        Received::Bytes(count)
    }

    /// `read` gives nothing when it was interrupted.
    fn receive_by(&self, mut read: impl FnMut(&TcpStream) -> Option<Received>) -> Received {
        let Some(stream) = self.stream() else {
            return Received::Aborted;
        };
        // After the bytes have gone on rather than before.
        if self.ack_due.swap(false, Ordering::Relaxed) {
            super::acknowledge_at_once(&stream);
        }
        let received = loop {
            if let Some(received) = read(&stream) {
                break received;
            }
        };
        match received {
            // What was read is not lost, whatever happens next.
            Received::Bytes(_) => received,
            _ if self.is_aborted() => Received::Aborted,
            received => received,
        }
    }

    /// A reset is reported once. When a write took the report, the read behind it looks like an orderly EOF; the
    /// connection, dead in both directions, gives it away. After our own FIN that is so in an orderly end too, but
    /// then nothing is written any more and no write can have taken an error.
    fn judge_eof(&self, stream: &TcpStream) -> Received {
        // A target that has closed is forgotten by its system after a while (FIN_WAIT2), which then answers a probe with
        // a reset, as if it had been sent what it can't take.
        let _ = sockopt::set_socket_keepalive(stream, false);
        if !os::is_hung_up(stream) {
            return Received::Eof;
        }
        // A call on a dead socket returns at once; the limit is for a machine that stands still.
        let limit = Instant::now() + Duration::from_secs(5);
        while self.taking_error.load(Ordering::SeqCst) > 0 && Instant::now() < limit {
            thread::yield_now();
        }
        match &*lock(&self.failure) {
            Some(WriteFailure::Failed(why)) => Received::Failed(why.clone()),
            _ => Received::Eof,
        }
    }

    /// See [`super::Stream::close_gracefully`].
    pub(super) fn close_gracefully(&self) {
        if let Some(stream) = lock(&self.stream).take() {
            let _ = sockopt::set_socket_linger(&stream, None);
        }
    }

    /// See [`super::Stream::abort`]. The last thread to leave its call closes the socket.
    pub(super) fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
        if let Some(stream) = lock(&self.stream).take() {
            self.on_abort.wake();
            let _ = stream.shutdown(Shutdown::Read);
        }
    }

    /// See [`super::Stream::socket`].
    pub(super) fn stream(&self) -> Option<Arc<TcpStream>> {
        lock(&self.stream).clone()
    }

    fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use super::*;

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    fn reset(stream: TcpStream) {
        sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    }

    #[test]
    fn a_target_that_has_ended_is_not_probed() {
        let (near, far) = connection();
        sockopt::set_socket_keepalive(&near, true).unwrap();
        let tcp = Tcp::new(near).unwrap();
        (&far).write_all(b"x").unwrap();
        assert_eq!(tcp.receive(&mut [0; 9]), Received::Bytes(1));
        let is_probed = || sockopt::socket_keepalive(tcp.stream().unwrap()).unwrap();
        assert!(is_probed());
        drop(far);
        assert_eq!(tcp.receive(&mut [0; 9]), Received::Eof);
        assert!(!is_probed());
    }

    /// Or the next read would look like an orderly end.
    #[test]
    fn a_failure_that_was_taken_is_told_to_the_next_read_too() {
        let (near, far) = connection();
        let tcp = Tcp::new(near).unwrap();
        assert_eq!(tcp.take_failure(), None);
        (&far).write_all(b"x").unwrap();
        reset(far);
        os::wait(
            &mut [PollFd::new(&*tcp.stream().unwrap(), PollFlags::RDHUP)],
            None,
        )
        .unwrap();
        let why = io::Error::from(Errno::CONNRESET).to_string();
        assert_eq!(tcp.take_failure(), Some(why.clone()));
        assert_eq!(tcp.take_failure(), Some(why.clone()));
        assert_eq!(tcp.receive(&mut [0; 9]), Received::Bytes(1));
        assert_eq!(tcp.receive(&mut [0; 9]), Received::Failed(why));
    }
}
