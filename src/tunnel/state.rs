//! What the three threads of a tunnel know of each other: how each direction ended, what moved when.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tungstenite::protocol::frame::coding::CloseCode;

use crate::lock::lock;

/// How the direction from the client to the target ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InboundEnd {
    /// The client sent a Close, and everything before it reached the target, as did the FIN behind it.
    Close,
    /// The client sent a Close, but not all before it could be given to the target.
    CloseUndelivered(Undelivered),
    /// The client sent what it may not; the Close to answer with.
    Refused(CloseCode, String),
    /// The client's connection ended without a Close.
    Vanished(String),
    /// The thread panicked.
    Panicked,
}

/// Why bytes from the client could not be given to the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undelivered {
    /// The target closed its socket after an orderly end of its own.
    TargetClosed,
    /// The target's connection failed.
    TargetFailed(String),
    /// The tunnel was broken off.
    BrokenOff,
}

/// How the direction from the target to the client ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutboundEnd {
    /// The target sent EOF, and every byte and the Close 1000 behind it are on their way.
    Eof,
    /// The target's connection failed.
    TargetFailed(String),
    /// The client takes nothing more.
    ClientGone(String),
    /// The tunnel was broken off.
    BrokenOff,
    /// The thread panicked.
    Panicked,
}

/// Why the keepalive thread ended the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// No pong in time, with nothing else before it.
    PongTimeout,
    /// No sign of life for the stall timeout.
    Stalled,
    /// A ping could not be written: the client's connection failed.
    PingFailed,
    /// One direction had ended and nothing moved for the linger.
    Linger,
    /// The daemon shuts down.
    Shutdown,
}

/// What has ended so far.
#[derive(Debug, Default)]
pub struct Ends {
    /// Set when inbound has ended.
    pub inbound: Option<InboundEnd>,
    /// Set when outbound has ended.
    pub outbound: Option<OutboundEnd>,
    /// Set when the keepalive thread ended the tunnel.
    pub cut: Option<Cut>,
    /// The daemon wants the tunnel to end.
    pub shutdown: bool,
    /// When the first direction ended.
    pub first: Option<Duration>,
}

/// One tunnel's shared state. Times are microseconds since it began.
#[derive(Debug)]
pub struct State {
    /// The connection's, for the log.
    pub id: u64,
    began: Instant,
    ends: Mutex<Ends>,
    changed: Condvar,
    heard: AtomicU64,
    taken: AtomicU64,
    moved: AtomicU64,
    parked: AtomicBool,
    offered: AtomicU64,
    answered: AtomicU64,
    up: AtomicU64,
    down: AtomicU64,
}

impl State {
    /// The state of the tunnel of connection `id`, which begins now.
    pub fn new(id: u64) -> State {
        let zero = || AtomicU64::new(0);
        State {
            id,
            began: Instant::now(),
            ends: Mutex::default(),
            changed: Condvar::new(),
            heard: zero(),
            taken: zero(),
            moved: zero(),
            parked: AtomicBool::new(false),
            offered: zero(),
            answered: zero(),
            up: zero(),
            down: zero(),
        }
    }

    /// How long the tunnel has been open.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// Looks at, or changes, what has ended. A panic elsewhere leaves the value whole.
    pub fn ends(&self) -> MutexGuard<'_, Ends> {
        lock(&self.ends)
    }

    /// Notes that a direction has ended. Only the last one wakes the others: the keepalive thread looks at
    /// least once in each linger, which is early enough for the deadline that the first one sets.
    pub fn note_end(&self, note: impl FnOnce(&mut Ends)) {
        let mut ends = self.ends();
        note(&mut ends);
        ends.first.get_or_insert(self.age());
        let is_over = ends.inbound.is_some() && ends.outbound.is_some();
        drop(ends);
        if is_over {
            self.changed.notify_all();
        }
    }

    /// Asks the tunnel to end, as the daemon does.
    pub fn shut_down(&self) {
        self.ends().shutdown = true;
        self.changed.notify_all();
    }

    /// Waits for a change, at most until the tunnel is `until` old.
    pub fn wait<'a>(&self, ends: MutexGuard<'a, Ends>, until: Duration) -> MutexGuard<'a, Ends> {
        self.wait_on(&self.changed, ends, until)
    }

    /// The same for a change of another value. One that wakes too late tells that the process stood still, in a
    /// frozen container for example: what came meanwhile has not been read yet, so nothing can be held
    /// against the other side.
    pub fn wait_on<'a, T>(
        &self,
        changed: &Condvar,
        value: MutexGuard<'a, T>,
        until: Duration,
    ) -> MutexGuard<'a, T> {
        /// What a busy machine may add to a wait.
        const LATE: Duration = Duration::from_millis(20);
        let limit = until.saturating_sub(self.age());
        let (value, _) = changed
            .wait_timeout(value, limit)
            .unwrap_or_else(PoisonError::into_inner);
        if self.age().saturating_sub(until) > LATE {
            self.note_heard();
            self.note_moved();
        }
        value
    }

    /// Waits until both directions have ended.
    pub fn wait_for_end(&self) -> MutexGuard<'_, Ends> {
        let goes_on = |ends: &mut Ends| ends.inbound.is_none() || ends.outbound.is_none();
        self.changed
            .wait_while(self.ends(), goes_on)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes came from the client: a sign of life.
    pub fn note_heard(&self) {
        self.heard.store(self.now(), Ordering::Relaxed);
    }

    fn note_moved(&self) {
        self.moved.store(self.now(), Ordering::Relaxed);
    }

    /// Inbound is about to wait for the target: nothing can be heard from the client.
    pub fn park(&self) {
        self.parked.store(true, Ordering::SeqCst);
    }

    /// Inbound has given `bytes` to the target.
    pub fn note_delivered(&self, bytes: usize) {
        self.up.fetch_add(bytes as u64, Ordering::Relaxed);
        self.note_moved();
    }

    /// Inbound listens to the client again; until now it could hear nothing.
    pub fn unpark(&self) {
        self.note_heard();
        self.parked.store(false, Ordering::SeqCst);
    }

    /// Whether inbound waits for the target.
    pub fn is_parked(&self) -> bool {
        self.parked.load(Ordering::SeqCst)
    }

    /// Outbound is about to write `bytes` to the client. Returns the time, for [`State::note_sent`].
    pub fn note_offered(&self, bytes: usize) -> u64 {
        self.offered.fetch_add(bytes as u64, Ordering::SeqCst);
        self.now()
    }

    /// Outbound has written `bytes` that it offered at `since`. A write that had to wait and then went
    /// through shows that the client takes bytes.
    pub fn note_sent(&self, bytes: usize, since: u64) {
        /// A write that only copies into the socket's buffer is over long before this, in microseconds.
        const WAITED: u64 = 2_000;
        let now = self.now();
        self.down.fetch_add(bytes as u64, Ordering::Relaxed);
        self.moved.store(now, Ordering::Relaxed);
        if now - since > WAITED {
            self.taken.store(now, Ordering::Relaxed);
        }
    }

    /// Payload bytes offered to the client so far.
    pub fn offered(&self) -> u64 {
        self.offered.load(Ordering::SeqCst)
    }

    /// A pong shows that the client has taken everything up to this count of offered bytes.
    pub fn note_answered(&self, mark: u64) {
        self.answered
            .fetch_max(mark.min(self.offered()), Ordering::SeqCst);
    }

    /// Whether all that was offered lies before a ping that has been answered.
    pub fn all_answered(&self) -> bool {
        self.answered.load(Ordering::SeqCst) == self.offered()
    }

    /// When the client's last bytes came.
    pub fn last_heard(&self) -> Duration {
        Duration::from_micros(self.heard.load(Ordering::Relaxed))
    }

    /// The last sign of life: bytes from the client, or bytes it demonstrably took.
    pub fn last_life(&self) -> Duration {
        self.last_heard()
            .max(Duration::from_micros(self.taken.load(Ordering::Relaxed)))
    }

    /// When a payload byte last moved, in either direction.
    pub fn last_moved(&self) -> Duration {
        Duration::from_micros(self.moved.load(Ordering::Relaxed))
    }

    /// Payload bytes given to the target and to the client.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.up.load(Ordering::Relaxed),
            self.down.load(Ordering::Relaxed),
        )
    }

    fn now(&self) -> u64 {
        self.age().as_micros() as u64
    }
}
