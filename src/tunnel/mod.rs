//! A tunnel: three threads between the peer's connection and a stream, and how it ends. Both ends of a tunnel are
//! made of this; an [`Endpoint`] says which one it is, and whether it speaks WebSocket or CONNECT-TCP.
//!
//! ```text
//! to_stream.rs    thread 1  peer ─▶ stream    through framing.rs, behind which frame_reader.rs finds the bytes in
//!                                             frames, or capsules.rs in capsules
//! from_stream.rs  thread 2  stream ─▶ peer    through frame_writer.rs; the only one that waits in a write there
//! keepalive.rs    thread 3  pings, every deadline, and the end
//! ends.rs         how each side ends and what the other is told     activity.rs    what moved when
//! stream.rs       a TCP connection (tcp.rs), or stdin and stdout (stdio.rs)
//! pipe.rs         bytes that nobody must touch    write_lock.rs   whole frames, and what is pending
//! ```
//!
//! A direction ends alone; a tunnel, when both have.
//!
//! ```text
//!            ┌───────────────────────────── both open ─────────────────────────────┐
//!            │ orderly Close  │ EOF of        │ reset of       │ another Close, text, │ the peer vanished,
//!            │ from the peer  │ the stream    │ the stream     │ protocol error       │ or is given up
//!            ▼                ▼               ▼                ▼                      ▼
//!     FIN to the stream   Close 1000 to    Close 1011 to    abort the stream,     abort both
//!     it goes on as long  the peer, which  the peer         Close as answer           │
//!     as it likes         owes its own        │                │                      │
//!            │ EOF           │ orderly Close  │ Close, or 3 s  │ sent, or 3 s         │
//!            ▼               ▼                ▼                ▼                      ▼
//!       Close 1000     FIN to the stream   ended: RST       ended: RST            ended: RST
//!            └─ ended in order ─┘
//! ```
//!
//! CONNECT-TCP has FINAL_DATA for Close 1000, a reset for every other Close, and no pongs.
//!
//! From every state a shutdown leads to the end (Close 1001), and so does the idle timeout. What a stream was given in
//! order, FIN included, is never taken back: a RST comes before the FIN, or once both have arrived.

mod activity;
mod capsules;
mod ends;
mod frame_reader;
mod frame_writer;
mod framing;
mod from_stream;
mod incoming;
mod keepalive;
mod pipe;
mod read_buffer;
mod stdio;
mod stream;
mod tcp;
mod to_stream;
mod transfer;
mod write_lock;

use std::io;
use std::net::{Shutdown, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::net::sockopt;
use socket2::{Domain, SockRef};

pub(crate) use activity::Activity;
pub use capsules::{CapsuleReader, UPGRADE_TOKEN};
pub(crate) use ends::{End, Endpoint, Outcome};
pub use ends::{Protocol, Role};
pub use frame_reader::FrameReader;
pub use incoming::{Fault, Incoming};
pub(crate) use keepalive::CLOSE_LIMIT;
pub(crate) use stdio::Stdio;
pub(crate) use stream::Stream;
pub(crate) use tcp::Tcp;

use crate::lock::lock;
use crate::os::{self, Waker};
use crate::threads::{MakeRoom, Threads};
use ends::{Ends, FromStreamEnd, ToStreamEnd};
use frame_writer::FrameWriter;
use transfer::WriteFailure;

/// A tunnel's threads need few frames; a page of a stack is touched, besides the one with what is local to the
/// thread.
const STACK: usize = 64 * 1024;

/// How much may wait unsent in the peer's buffer, in bytes (`TCP_NOTSENT_LOWAT`, tcp(7)). A write that waits
/// goes on when half of it has left, so that a slow reader is seen to take bytes. By default that is a third
/// of a buffer that grows to megabytes, longer than the linger at 20 KiB/s; and a ping would wait behind it.
const PEER_UNSENT: u32 = 128 * 1024;

/// How often a write to a peer that is to be reset is looked at, a millisecond apart, before it is interrupted.
const WRITE_LOOKS: u32 = 50;

/// The clocks of a tunnel.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Between two pings.
    pub ping_interval: Duration,
    /// From a written ping to its pong, when nothing else was sent to the peer.
    pub ping_timeout: Duration,
    /// From the last sign of life of a peer that has bytes before it.
    pub stall_timeout: Duration,
    /// From the last sign of life of a peer that owes a Close.
    pub linger: Duration,
    /// From the last payload byte in either direction to the end of the tunnel; `None` for no such end.
    pub idle_timeout: Option<Duration>,
}

/// The threads of tunnels. A connection is led to its tunnel on another thread, as that takes a deep
/// stack, whose pages would stay for as long as the tunnel.
#[derive(Debug)]
pub(crate) struct TunnelThreads {
    to_stream: Threads,
    from_stream: Threads,
    keepalive: Threads,
}

impl Default for TunnelThreads {
    fn default() -> Self {
        TunnelThreads {
            to_stream: Threads::new("to-stream", STACK),
            from_stream: Threads::new("from-stream", STACK),
            keepalive: Threads::new("keepalive", STACK),
        }
    }
}

impl TunnelThreads {
    /// Those that take the place of threads that `make_room` ends, where the system refuses new ones.
    pub(crate) fn in_room_of(make_room: &MakeRoom) -> TunnelThreads {
        let all = TunnelThreads::default();
        TunnelThreads {
            to_stream: all.to_stream.in_room_of(make_room.clone()),
            from_stream: all.from_stream.in_room_of(make_room.clone()),
            keepalive: all.keepalive.in_room_of(make_room.clone()),
        }
    }
}

/// A tunnel as the rest of the process sees it.
#[derive(Debug)]
pub(crate) struct State {
    /// The connection's number, for the log.
    id: u64,
    /// What moved when.
    pub(crate) activity: Arc<Activity>,
    ends: Mutex<Ends>,
    /// Wakes the clocks.
    changed: Waker,
}

impl State {
    /// The state of the tunnel of connection `id`, which begins now.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub(crate) fn new(id: u64) -> io::Result<State> {
        Ok(State {
            id,
            activity: Arc::new(Activity::new()),
            ends: Mutex::default(),
            changed: Waker::new()?,
        })
    }

    /// Asks the tunnel to end.
    pub(crate) fn shut_down(&self) {
        lock(&self.ends).shutdown = true;
        self.changed.wake();
    }
}

/// Why a peer's connection has failed, for a person. It is set before the connection's bytes end.
pub(crate) type PeerFailure = Arc<OnceLock<String>>;

/// What a tunnel connects.
#[derive(Debug)]
pub(crate) struct Sides {
    /// The peer's connection, behind the handshake.
    pub(crate) peer: Arc<TcpStream>,
    /// Where a failure is told that its socket can't tell, as the socket only stands for the connection.
    pub(crate) peer_failure: Option<PeerFailure>,
    /// What the peer sent behind the handshake.
    pub(crate) early: Vec<u8>,
    /// What the peer said it speaks.
    pub(crate) protocol: Protocol,
    /// What the tunnel stands for.
    pub(crate) stream: Stream,
}

/// Relays as the daemon, on three threads of their own, until both directions have ended; and closes the stream.
/// `open`, called once everything is ready, sends the 101. `ended` is called with the outcome.
///
/// # Errors
/// When a thread can't start. Then nothing has been sent to the client, and `ended` is not called.
pub(crate) fn start(
    threads: &TunnelThreads,
    sides: Sides,
    times: Times,
    state: &Arc<State>,
    open: impl FnOnce() -> io::Result<()>,
    ended: impl FnOnce(&Outcome) + Send + 'static,
) -> io::Result<()> {
    find_dead_peers(&sides.peer, times);
    let (tunnel, early) = Tunnel::new(Role::Daemon, sides, times, state);
    // Nothing may go out before the 101.
    let held = tunnel.writer.hold();
    // The one that reads from the client comes last, as what it has read can't be put back.
    let clocks = Arc::clone(&tunnel);
    let started = tunnel
        .start_from_stream(threads)
        .and_then(|()| {
            threads
                .keepalive
                .run(move || clocks.watch_until_ended(ended))
        })
        .and_then(|()| tunnel.start_to_stream(threads, early));
    if let Err(error) = started {
        held.close();
        // The refusal that follows is read in peace.
        let _ = sockopt::set_socket_linger(&*tunnel.peer, None);
        tunnel.give_up();
        return Err(error);
    }
    if open().is_err() {
        tunnel.abort();
    }
    drop(held);
    // A pong may have become pending meanwhile.
    tunnel.writer.flush();
    Ok(())
}

/// Relays as the client, on two threads and this one, until both directions have ended; and closes both sides.
///
/// # Errors
/// When a thread can't start.
pub(crate) fn run(
    threads: &TunnelThreads,
    sides: Sides,
    times: Times,
    state: &Arc<State>,
) -> io::Result<Outcome> {
    let (tunnel, early) = Tunnel::new(Role::Client, sides, times, state);
    let started = tunnel
        .start_from_stream(threads)
        .and_then(|()| tunnel.start_to_stream(threads, early));
    if let Err(error) = started {
        tunnel.abort();
        tunnel.give_up();
        return Err(error);
    }
    Ok(tunnel.watch_and_close())
}

/// Without it, or where the system doesn't know it, a slow peer is only seen less often.
fn limit_unsent(stream: &TcpStream, limit: u32) {
    if let Err(error) = SockRef::from(stream).set_tcp_notsent_lowat(limit) {
        log::debug!("cannot limit unsent bytes: {error}");
    }
}

/// Has the kernel acknowledge what was read now, not up to 40 ms later (`TCP_QUICKACK`, tcp(7)). A peer that
/// leaves Nagle's algorithm on, as websocat does, holds its next small write back until then. It doesn't
/// stick, so it is set again after each read that found less than it had room for.
fn acknowledge_at_once(stream: &TcpStream) {
    let _ = sockopt::set_tcp_quickack(stream, true);
}

/// Has the kernel find out that the peer's machine is gone where no pong is owed: an unanswered probe, or unanswered
/// bytes, for as long as the stall timeout (tcp(7)). A shorter one would kill slow readers, as a closed window counts.
/// It is for the TCP connection itself, which a socket under TLS only stands for.
pub(crate) fn find_dead_peers(stream: &TcpStream, times: Times) {
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, Duration::from_secs(60));
    let _ = sockopt::set_tcp_keepintvl(stream, Duration::from_secs(15));
    let limit = u32::try_from(times.stall_timeout.as_millis()).unwrap_or(u32::MAX);
    let _ = sockopt::set_tcp_user_timeout(stream, limit);
}

/// What the threads of a tunnel share.
struct Tunnel {
    endpoint: Endpoint,
    peer: Arc<TcpStream>,
    peer_failure: Option<PeerFailure>,
    /// A client has connected to a Unix socket. When it closes that, both directions end at once, and what it sent before
    /// is there to be read.
    peer_is_unix: bool,
    stream: Stream,
    writer: FrameWriter,
    times: Times,
    state: Arc<State>,
}

impl Tunnel {
    fn new(role: Role, sides: Sides, times: Times, state: &Arc<State>) -> (Arc<Tunnel>, Vec<u8>) {
        let Sides {
            peer,
            peer_failure,
            early,
            protocol,
            stream,
        } = sides;
        let endpoint = Endpoint { role, protocol };
        limit_unsent(&peer, PEER_UNSENT);
        if !protocol.has_words() {
            // From here on, whatever closes it sends a reset, until both ends have passed.
            let _ = sockopt::set_socket_linger(&*peer, Some(Duration::ZERO));
        }
        let activity = Arc::clone(&state.activity);
        let domain = SockRef::from(&*peer).domain().ok();
        let tunnel = Tunnel {
            endpoint,
            peer_is_unix: role == Role::Daemon && domain == Some(Domain::UNIX),
            writer: FrameWriter::new(Arc::clone(&peer), endpoint, activity),
            peer,
            peer_failure,
            stream,
            times,
            state: Arc::clone(state),
        };
        (Arc::new(tunnel), early)
    }

    fn start_from_stream(self: &Arc<Self>, threads: &TunnelThreads) -> io::Result<()> {
        let tunnel = Arc::clone(self);
        threads.from_stream.run(move || tunnel.run_from_stream())
    }

    fn start_to_stream(
        self: &Arc<Self>,
        threads: &TunnelThreads,
        early: Vec<u8>,
    ) -> io::Result<()> {
        let tunnel = Arc::clone(self);
        threads.to_stream.run(move || tunnel.run_to_stream(early))
    }

    fn run_to_stream(&self, early: Vec<u8>) {
        let end = caught(|| to_stream::relay(self, early)).unwrap_or(ToStreamEnd::Panicked);
        log::debug!(id = self.state.id, how:? = end; "to_stream ended");
        match &end {
            ToStreamEnd::Closed => {}
            ToStreamEnd::PeerAborted(code, _) => {
                self.writer
                    .queue_close(&ends::Farewell::Answer(code.unwrap_or(1000)));
                self.stream.abort();
            }
            ToStreamEnd::Refused(farewell) => {
                self.writer.queue_close(farewell);
                self.stream.abort();
            }
            // What was finished is not taken back, and the clocks see to the rest, as to what they have cut.
            ToStreamEnd::Vanished(_) if self.is_finished_or_cut() => {}
            ToStreamEnd::Vanished(_) | ToStreamEnd::Panicked | ToStreamEnd::NeverStarted => {
                self.abort();
            }
        }
        // A server that has closed its connection may have done so too early.
        let is_closed = end == ToStreamEnd::Closed && !self.endpoint.role.waits_for_eof();
        self.note_end(|ends| {
            // A panic of the clocks stands.
            ends.to_stream.get_or_insert(end);
        });
        // Of a broken connection, this is what the clocks wait for.
        if !is_closed || self.ends().peer_broke {
            self.state.changed.wake();
        }
    }

    fn run_from_stream(&self) {
        let end = caught(|| from_stream::relay(self)).unwrap_or(FromStreamEnd::Panicked);
        log::debug!(id = self.state.id, how:? = end; "from_stream ended");
        match &end {
            FromStreamEnd::Panicked => self.abort(),
            FromStreamEnd::StreamFailed(_)
                if self.endpoint.protocol.has_words() && !self.endpoint.tells_failures() =>
            {
                self.shut_peer();
            }
            _ => {}
        }
        let is_orderly = end == FromStreamEnd::Eof;
        self.note_end(|ends| {
            ends.end_from_stream(end);
            if self.peer_is_unix && ends.was_reset_in_write() {
                ends.peer_eof = false;
            }
        });
        self.end_if_both_ended();
        if !is_orderly || self.ends().is_stream_closed_early() {
            self.state.changed.wake();
        }
    }

    fn watch_until_ended(&self, ended: impl FnOnce(&Outcome)) {
        let outcome = self.watch_and_close();
        if self.ends().to_stream != Some(ToStreamEnd::NeverStarted) {
            ended(&outcome);
        }
    }

    /// Thread 3.
    fn watch_and_close(&self) -> Outcome {
        if caught(|| keepalive::watch(self)).is_none() {
            self.abort();
            self.note_end(|ends| {
                ends.from_stream.get_or_insert(FromStreamEnd::Panicked);
                ends.to_stream = Some(ToStreamEnd::Panicked);
            });
        }
        let mut outcome = ends::outcome(self.endpoint, &self.ends());
        // The client's end has been seen by the server already.
        if outcome.end == End::Orderly && self.endpoint.role == Role::Daemon {
            keepalive::settle(self);
            outcome = ends::outcome(self.endpoint, &self.ends());
        }
        if outcome.end == End::Orderly {
            self.stream.close_gracefully();
        } else {
            keepalive::abort_stream(self);
        }
        // Where there are no words, a FIN before the reset would look like an end for a moment.
        let ends_by_fin = self.endpoint.protocol.has_words() || outcome.end == End::Orderly;
        if self.endpoint.role == Role::Client && ends_by_fin {
            self.shut_peer();
        }
        outcome
    }

    /// Ends both directions at once. The peer first, so that no Close pretends that it is still there.
    fn abort(&self) {
        if self.endpoint.protocol.has_words() {
            self.shut_peer();
        } else {
            self.reset_peer();
        }
        self.stream.abort();
    }

    fn shut_peer(&self) {
        let _ = self.peer.shutdown(Shutdown::Both);
    }

    /// Ends the direction from the peer; what is on its way to it goes on.
    fn stop_reading_peer(&self) {
        let _ = self.peer.shutdown(Shutdown::Read);
    }

    /// Has the peer's connection end with a RST as soon as no thread uses it, which wakes them. One that waits for
    /// room can't be woken without a FIN, but that stays behind what fills the buffer and is dropped with it.
    fn reset_peer(&self) {
        let _ = sockopt::set_socket_linger(&*self.peer, Some(Duration::ZERO));
        // A thread that is writing, and finds room, is about to be done.
        let mut is_idle = self.writer.close_if_idle();
        for _ in 0..WRITE_LOOKS {
            if is_idle || os::ready(&*self.peer, PollFlags::OUT).is_empty() {
                break;
            }
            thread::sleep(Duration::from_millis(1));
            is_idle = self.writer.close_if_idle();
        }
        if is_idle {
            self.stop_reading_peer();
        } else {
            self.shut_peer();
        }
    }

    /// Ends the threads that did start.
    fn give_up(&self) {
        self.stream.abort();
        self.note_end(|ends| {
            ends.to_stream = Some(ToStreamEnd::NeverStarted);
            ends.from_stream.get_or_insert(FromStreamEnd::Aborted);
        });
    }

    fn is_finished_or_cut(&self) -> bool {
        let ends = self.ends();
        ends.peer_closed || ends.cut.is_some()
    }

    fn activity(&self) -> &Activity {
        &self.state.activity
    }

    /// Why the peer's connection has failed, where its socket can't tell.
    fn peer_failure(&self) -> Option<&str> {
        let failure = self.peer_failure.as_ref()?.get()?;
        Some(failure)
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        lock(&self.state.ends)
    }

    /// Only the end of both directions wakes the clocks. They look often enough for the deadline that an orderly
    /// end of one sets, and another end wakes them by itself.
    fn note_end(&self, note: impl FnOnce(&mut Ends)) {
        let mut ends = self.ends();
        note(&mut ends);
        ends.changed_at = self.activity().age();
        let are_over = ends.are_over();
        drop(ends);
        if are_over {
            self.state.changed.wake();
        }
    }

    /// Neither side has anything to say behind both ends. The client of a WebSocket waits for the server to close the
    /// connection (RFC 6455 §7.1.1): a proxy that sees its FIN may close both of its own, with bytes on their way. That
    /// of CONNECT-TCP shows it; the daemon's thread that still reads is woken, so that the connection can be closed.
    fn end_if_both_ended(&self) {
        let ends = self.ends();
        let is_whole = ends.undelivered.is_none() && ends.cut.is_none();
        if is_whole && ends.peer_closed && ends.from_stream == Some(FromStreamEnd::Eof) {
            if self.endpoint.protocol.has_words() {
                return;
            }
            let _ = sockopt::set_socket_linger(&*self.peer, None);
            if self.endpoint.role.waits_for_eof() {
                let _ = self.peer.shutdown(Shutdown::Write);
            } else {
                self.stop_reading_peer();
            }
        }
    }

    /// Before the peer is told, as its answer may be there at once.
    fn note_stream_failed(&self) {
        let mut ends = self.ends();
        ends.stream_failed_first |= !ends.peer_closed && ends.to_stream.is_none();
    }

    /// Whether a reset that answers the stream's FIN, which is about to be sent, takes nothing back: it has ended, was
    /// given nothing since, and has acknowledged all. Its system may know nothing of the connection any more, a while
    /// after the end (FIN_WAIT2). Within a round trip that can't be, and to ask takes long.
    fn has_stream_taken_all(&self) -> bool {
        let quiet = self.activity().quiet_since_stream_end();
        quiet.is_some_and(|quiet| quiet > keepalive::ARRIVAL_LIMIT)
            && !self.ends().stream_broke
            && self.stream.unacknowledged() == Some(0)
    }

    /// The stream did not take what the peer has sent. That the tunnel was aborted is known already.
    fn note_undelivered(&self, why: WriteFailure) {
        let why = match why {
            WriteFailure::Aborted => return,
            WriteFailure::Closed => WriteFailure::Closed,
            WriteFailure::Failed(why) => {
                WriteFailure::Failed(self.stream.failure(self.endpoint.role, &why))
            }
        };
        self.note_end(|ends| {
            ends.undelivered.get_or_insert(why);
        });
        self.state.changed.wake();
    }
}

/// The panic itself is reported by the panic hook.
fn caught<T>(run: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(run)).ok()
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::TcpListener;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;
    use std::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    const TIMES: Times = Times {
        ping_interval: Duration::from_secs(30),
        ping_timeout: Duration::from_secs(5),
        stall_timeout: Duration::from_secs(300),
        linger: Duration::from_millis(100),
        idle_timeout: None,
    };

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(LIMIT)).unwrap();
        (near, far)
    }

    /// A tunnel, with the far ends of both its connections.
    struct Open {
        state: Arc<State>,
        peer: TcpStream,
        stream: TcpStream,
        outcome: Receiver<Outcome>,
    }

    fn open(role: Role, threads: &Arc<TunnelThreads>) -> Open {
        open_to(connection(), role, threads, TIMES)
    }

    fn open_to(
        stream: (TcpStream, TcpStream),
        role: Role,
        threads: &Arc<TunnelThreads>,
        times: Times,
    ) -> Open {
        open_between(connection(), stream, role, threads, times)
    }

    fn open_between(
        (near_peer, peer): (TcpStream, TcpStream),
        (near_stream, stream): (TcpStream, TcpStream),
        role: Role,
        threads: &Arc<TunnelThreads>,
        times: Times,
    ) -> Open {
        let sides = Sides {
            peer: Arc::new(near_peer),
            peer_failure: None,
            early: Vec::new(),
            protocol: Protocol::WebSocket,
            stream: Stream::Tcp(Tcp::new(near_stream).unwrap()),
        };
        let state = Arc::new(State::new(1).unwrap());
        let (tell, outcome) = channel();
        let ended = move |outcome: &Outcome| tell.send(outcome.clone()).unwrap();
        match role {
            Role::Daemon => start(threads, sides, times, &state, || Ok(()), ended).unwrap(),
            Role::Client => {
                let (threads, state) = (Arc::clone(threads), Arc::clone(&state));
                // As the thread is called on which a daemon does it.
                let name = "keepalive".to_owned();
                let run = move || ended(&run(&threads, sides, times, &state).unwrap());
                thread::Builder::new().name(name).spawn(run).unwrap();
            }
        }
        Open {
            state,
            peer,
            stream,
            outcome,
        }
    }

    impl Open {
        /// A byte from the peer, masked with zeros where it is a client.
        fn send(&self, role: Role) -> io::Result<()> {
            let frame: &[u8] = match role {
                Role::Daemon => &[0x82, 0x81, 0, 0, 0, 0, b'u'],
                Role::Client => &[0x82, 0x01, b'u'],
            };
            (&self.peer).write_all(frame)
        }

        fn wait_until(&self, is_so: impl Fn(&Ends) -> bool) {
            let limit = Instant::now() + LIMIT;
            while !is_so(&lock(&self.state.ends)) {
                assert!(Instant::now() < limit, "{:?}", self.state);
                thread::sleep(Duration::from_millis(1));
            }
        }

        fn relays(&self, role: Role) {
            self.send(role).unwrap();
            let mut byte = [0];
            (&self.stream).read_exact(&mut byte).unwrap();
            assert_eq!(&byte, b"u");
            (&self.stream).write_all(b"d").unwrap();
            let mut frame = vec![0; if role.masks() { 7 } else { 3 }];
            (&self.peer).read_exact(&mut frame).unwrap();
            assert_eq!(frame[0], 0x82);
        }
    }

    /// What comes, and whether the end is an orderly one.
    fn read_to_end(mut stream: &TcpStream) -> (Vec<u8>, bool) {
        let mut bytes = Vec::new();
        match stream.read_to_end(&mut bytes) {
            Ok(_) => (bytes, true),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                (bytes, false)
            }
        }
    }

    #[test]
    fn a_panic_in_any_thread_is_a_broken_end_for_both_sides_and_nothing_to_other_tunnels() {
        for (role, name) in [Role::Daemon, Role::Client]
            .into_iter()
            .flat_map(|role| ["to-stream", "from-stream", "keepalive"].map(|name| (role, name)))
        {
            let threads = Arc::new(TunnelThreads::default());
            let (tunnel, other) = (open(role, &threads), open(role, &threads));
            tunnel.relays(role);
            other.relays(role);
            *lock(&tunnel.state.activity.panic_in) = Some(name);
            // One of them is the first to notice, and then there is nobody to send to.
            let _ = tunnel.send(role);
            // A reset is told once, to whichever call comes next.
            let is_reset = (&tunnel.stream).write_all(b"d").is_err();
            let (_, is_orderly) = read_to_end(&tunnel.stream);
            assert!(is_reset || !is_orderly, "{role:?}, {name}: a FIN");
            let (bytes, _) = read_to_end(&tunnel.peer);
            let mut frames = bytes.chunks(if role.masks() { 7 } else { 3 });
            assert!(frames.all(|frame| frame[0] == 0x82), "{role:?}, {name}");
            let outcome = tunnel.outcome.recv_timeout(LIMIT).unwrap();
            assert_eq!(outcome.end, End::InternalError, "{role:?}, {name}");
            assert_eq!(*lock(&tunnel.state.activity.panic_in), None);
            other.relays(role);
            open(role, &threads).relays(role);
        }
    }

    #[test]
    fn a_panic_behind_the_peers_orderly_end_takes_nothing_back_that_was_finished() {
        for name in ["from-stream", "keepalive"] {
            let threads = Arc::new(TunnelThreads::default());
            let tunnel = open(Role::Daemon, &threads);
            tunnel.send(Role::Daemon).unwrap();
            let close = [0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8];
            (&tunnel.peer).write_all(&close).unwrap();
            assert_eq!(read_to_end(&tunnel.stream), (b"u".to_vec(), true));
            *lock(&tunnel.state.activity.panic_in) = Some(name);
            (&tunnel.stream).write_all(b"d").unwrap();
            let (bytes, _) = read_to_end(&tunnel.peer);
            assert!(!bytes.contains(&0x88), "{name}: a Close");
            let outcome = tunnel.outcome.recv_timeout(LIMIT).unwrap();
            assert_eq!(outcome.end, End::InternalError, "{name}");
        }
    }

    /// A target that has room for little, and whose connection takes `UPLOAD` bytes without it.
    fn target_without_room() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        SockRef::from(&listener).set_recv_buffer_size(4096).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        SockRef::from(&near)
            .set_send_buffer_size(2 * UPLOAD)
            .unwrap();
        let (far, _) = listener.accept().unwrap();
        far.set_read_timeout(Some(LIMIT)).unwrap();
        (near, far)
    }

    const UPLOAD: usize = 60_000;

    fn upload_and_close() -> Vec<u8> {
        let mut frames = vec![0x82, 0xfe];
        frames.extend(u16::try_from(UPLOAD).unwrap().to_be_bytes());
        frames.extend([0; 4 + UPLOAD]);
        frames.extend([0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8]);
        frames
    }

    /// A tunnel whose client has ended in order and vanished, before its target has taken all it was sent.
    fn vanished_behind_its_end(stall_timeout: Duration) -> Open {
        let times = Times {
            stall_timeout,
            ..TIMES
        };
        let threads = Arc::new(TunnelThreads::default());
        let mut tunnel = open_to(target_without_room(), Role::Daemon, &threads, times);
        (&tunnel.peer).write_all(&upload_and_close()).unwrap();
        tunnel.wait_until(|ends| ends.to_stream.is_some());
        // Its place is taken by a connection of no use.
        let peer = std::mem::replace(&mut tunnel.peer, connection().0);
        SockRef::from(&peer)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        tunnel
    }

    #[test]
    fn a_target_that_takes_nothing_of_what_was_finished_is_waited_for_until_the_stall_timeout() {
        let (stall_timeout, began) = (Duration::from_millis(300), Instant::now());
        let tunnel = vanished_behind_its_end(stall_timeout);
        let outcome = tunnel.outcome.recv_timeout(LIMIT).unwrap();
        assert_eq!(outcome.end, End::PeerVanished);
        assert!(began.elapsed() >= stall_timeout, "{:?}", began.elapsed());
        // And it can still have it.
        assert_eq!(read_to_end(&tunnel.stream), (vec![0; UPLOAD], true));
    }

    #[test]
    fn a_broken_tunnel_ends_as_soon_as_what_its_client_had_sent_is_given_on() {
        let (near_peer, peer) = UnixStream::pair().unwrap();
        let [near_peer, peer] =
            [near_peer, peer].map(|socket| TcpStream::from(OwnedFd::from(socket)));
        let target = target_without_room();
        SockRef::from(&target.0).set_send_buffer_size(4096).unwrap();
        let times = Times {
            linger: 4 * LIMIT,
            ..TIMES
        };
        let threads = Arc::new(TunnelThreads::default());
        let sides = (near_peer, peer);
        let mut tunnel = open_between(sides, target, Role::Daemon, &threads, times);
        (&tunnel.peer).write_all(&upload_and_close()).unwrap();
        drop(std::mem::replace(&mut tunnel.peer, connection().0));
        tunnel.wait_until(|ends| ends.peer_broke);
        assert_eq!(lock(&tunnel.state.ends).to_stream, None);
        assert_eq!(read_to_end(&tunnel.stream), (vec![0; UPLOAD], true));
        let outcome = tunnel.outcome.recv_timeout(LIMIT).unwrap();
        assert_eq!(outcome.end, End::PeerVanished);
    }

    #[test]
    fn a_shutdown_does_not_wait_for_a_target_that_takes_nothing() {
        let tunnel = vanished_behind_its_end(TIMES.stall_timeout);
        tunnel.wait_until(|ends| ends.cut == Some(ends::Cut::PeerBroken));
        tunnel.state.shut_down();
        tunnel.outcome.recv_timeout(LIMIT).unwrap();
        assert_eq!(read_to_end(&tunnel.stream), (vec![0; UPLOAD], true));
    }
}
