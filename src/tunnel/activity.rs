//! What moved in a tunnel and when: counters that its threads write and its clocks read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A write that only copies into a socket's buffer is over long before this, in microseconds.
const BLOCKED: u64 = 2_000;

/// One tunnel's counters. Times are its age in microseconds.
#[derive(Debug)]
pub(crate) struct Activity {
    began: Instant,
    last_read: AtomicU64,
    last_blocked_write: AtomicU64,
    last_payload: AtomicU64,
    blocked_on_stream: AtomicBool,
    bytes_queued: AtomicU64,
    bytes_ponged: AtomicU64,
    ping_written: AtomicU64,
    to_stream: AtomicU64,
    to_peer: AtomicU64,
    /// How much the stream had taken by its own end, and when that was; `u64::MAX` before.
    to_stream_by_end: AtomicU64,
    stream_ended: AtomicU64,
    /// The name of the thread that panics the next time it notes something or looks, once.
    #[cfg(test)]
    pub(super) panic_in: std::sync::Mutex<Option<&'static str>>,
}

impl Activity {
    /// Of a tunnel that begins now.
    pub(crate) fn new() -> Activity {
        let zero = || AtomicU64::new(0);
        Activity {
            began: Instant::now(),
            last_read: zero(),
            last_blocked_write: zero(),
            last_payload: zero(),
            blocked_on_stream: AtomicBool::new(false),
            bytes_queued: zero(),
            bytes_ponged: zero(),
            ping_written: zero(),
            to_stream: zero(),
            to_peer: zero(),
            to_stream_by_end: AtomicU64::new(u64::MAX),
            stream_ended: zero(),
            #[cfg(test)]
            panic_in: std::sync::Mutex::default(),
        }
    }

    /// How long the tunnel has been open.
    pub(crate) fn age(&self) -> Duration {
        #[cfg(test)]
        self.panic_if_told();
        self.began.elapsed()
    }

    fn now(&self) -> u64 {
        self.age().as_micros() as u64
    }

    /// Bytes came from the peer: a sign of life.
    pub(super) fn note_read(&self) {
        self.last_read.store(self.now(), Ordering::Relaxed);
    }

    /// The peer's bytes are about to be given to the stream, which may take long: meanwhile nothing is read from
    /// the peer.
    pub(super) fn block_on_stream(&self) {
        self.blocked_on_stream.store(true, Ordering::SeqCst);
    }

    /// The stream took `bytes`.
    pub(super) fn note_to_stream(&self, bytes: usize) {
        self.to_stream.fetch_add(bytes as u64, Ordering::Relaxed);
        self.last_payload.store(self.now(), Ordering::Relaxed);
    }

    /// The stream has ended in order.
    pub(super) fn note_stream_end(&self) {
        self.stream_ended.store(self.now(), Ordering::SeqCst);
        let taken = self.to_stream.load(Ordering::SeqCst);
        self.to_stream_by_end.store(taken, Ordering::SeqCst);
    }

    /// For how long the stream has ended, if it was given nothing since.
    pub(super) fn quiet_since_stream_end(&self) -> Option<Duration> {
        let by_end = self.to_stream_by_end.load(Ordering::SeqCst);
        let ended = Duration::from_micros(self.stream_ended.load(Ordering::SeqCst));
        (by_end == self.to_stream.load(Ordering::SeqCst)).then(|| self.age().saturating_sub(ended))
    }

    /// The peer is read from again. It could not be heard until now, so its silence counts from here.
    pub(super) fn unblock(&self) {
        self.note_read();
        self.blocked_on_stream.store(false, Ordering::SeqCst);
    }

    /// Whether the stream is being waited for, so that nothing is read from the peer.
    pub(super) fn is_blocked_on_stream(&self) -> bool {
        self.blocked_on_stream.load(Ordering::SeqCst)
    }

    /// `bytes` of payload are about to be written to the peer. Returns the time, for [`Activity::note_to_peer`].
    pub(super) fn note_queued(&self, bytes: usize) -> u64 {
        self.bytes_queued.fetch_add(bytes as u64, Ordering::SeqCst);
        self.now()
    }

    /// The peer's socket took `bytes` of payload, in a write that began at `since`. One that had to wait and then
    /// went through shows that the peer takes bytes.
    pub(super) fn note_to_peer(&self, bytes: usize, since: u64) {
        let now = self.now();
        self.to_peer.fetch_add(bytes as u64, Ordering::Relaxed);
        self.last_payload.store(now, Ordering::Relaxed);
        if now - since > BLOCKED {
            self.last_blocked_write.store(now, Ordering::Relaxed);
        }
    }

    /// Payload bytes queued for the peer so far.
    pub(super) fn bytes_queued(&self) -> u64 {
        self.bytes_queued.load(Ordering::SeqCst)
    }

    /// A ping was written.
    pub(super) fn note_ping(&self) {
        self.ping_written.store(self.now(), Ordering::SeqCst);
    }

    /// A pong shows that the peer has taken all of the first `mark` bytes queued for it.
    pub(super) fn note_pong(&self, mark: u64) {
        let mark = mark.min(self.bytes_queued());
        self.bytes_ponged.fetch_max(mark, Ordering::SeqCst);
    }

    /// Whether all that was queued lies before a ping that has been answered.
    pub(super) fn all_ponged(&self) -> bool {
        self.bytes_ponged.load(Ordering::SeqCst) == self.bytes_queued()
    }

    /// When the last ping was written.
    pub(super) fn ping_written(&self) -> Duration {
        Duration::from_micros(self.ping_written.load(Ordering::SeqCst))
    }

    /// When the peer's last bytes came.
    pub(super) fn last_read(&self) -> Duration {
        Duration::from_micros(self.last_read.load(Ordering::Relaxed))
    }

    /// When the peer last showed that it takes bytes.
    pub(super) fn last_blocked_write(&self) -> Duration {
        Duration::from_micros(self.last_blocked_write.load(Ordering::Relaxed))
    }

    /// When a payload byte last moved, in either direction.
    pub(super) fn last_payload(&self) -> Duration {
        Duration::from_micros(self.last_payload.load(Ordering::Relaxed))
    }

    /// Payload bytes that the stream and the peer have taken.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (
            self.to_stream.load(Ordering::Relaxed),
            self.to_peer.load(Ordering::Relaxed),
        )
    }

    #[cfg(test)]
    fn panic_if_told(&self) {
        let name = std::thread::current().name().map(str::to_owned);
        let told =
            crate::lock::lock(&self.panic_in).take_if(|told| Some(&**told) == name.as_deref());
        assert_eq!(told, None, "as the test wants it");
    }
}
