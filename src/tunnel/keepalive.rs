//! Thread 3: the tunnel's clocks. It pings, finds the dead, spares the slow, and ends what lingers.
//!
//! [`Clocks::step`] decides, and knows nothing but its arguments; [`watch`] around it waits and does. A call that
//! blocks can't be given a timeout from outside, so the deadlines of all three threads are here. Times are the
//! tunnel's age.

use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::sockopt;

use super::ends::{Cut, Endpoint, Ends, Farewell, FromStreamEnd, ToStreamEnd};
use super::stream::Stream;
use super::transfer::WriteFailure;
use super::{Times, Tunnel};
use crate::os;
use idle::{Idle, IdleClock};

mod idle;

/// How long a peer may take for a Close that ends a tunnel from our side. At 20 KiB/s, what may lie before ours
/// takes it as long. With the default grace this is less than the 10 s that container engines wait.
pub(crate) const CLOSE_LIMIT: Duration = Duration::from_secs(3);

/// How long what a broken connection had brought may take to be given on.
const SETTLE_LIMIT: Duration = Duration::from_millis(500);

/// How long the peer's last bytes may take to arrive before its connection is reset, from the last of them.
pub(super) const ARRIVAL_LIMIT: Duration = Duration::from_millis(900);

/// The same where nobody can tell what has arrived.
const BLIND_ARRIVAL_LIMIT: Duration = Duration::from_millis(200);

/// How long the threads of a tunnel that was cut may take to end. They are woken, so it is long.
const CUT_LIMIT: Duration = Duration::from_millis(500);

/// The first wait between two looks at what has been acknowledged, and the longest.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// How late a wait may end on a busy machine.
const LATE: Duration = Duration::from_millis(20);

/// The clocks look at a tunnel at least this often, or twice in each linger if that is longer: an orderly end of one
/// direction wakes nobody.
const LOOK_AT_LEAST: Duration = Duration::from_millis(50);

/// How far a tunnel's end has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// Both directions are open.
    Open,
    /// The peer's orderly end has come, and the stream goes on for as long as it likes.
    PeerClosed,
    /// The stream's orderly end was sent on, and the peer owes its own.
    StreamEnded,
    /// Both sides have sent their Close, and the server is to close the connection.
    BothClosed,
    /// The peer is told by a reset that the tunnel is broken off, as soon as what had come from the stream has
    /// arrived.
    Aborting {
        /// Whether all that had come from the stream was sent.
        all_sent: bool,
    },
    /// The peer's connection is broken. What it brought before is given on.
    PeerBroken {
        /// Whether the peer had ended it in order before, so that what it brought may be all it had to say.
        after_eof: bool,
        /// Whether that has been given on.
        is_given: bool,
    },
    /// A Close that ends the tunnel is on its way.
    Closing,
    /// The tunnel is cut, and its threads are about to end.
    Cut,
}

impl Phase {
    /// The first row that fits counts.
    pub(super) fn of(endpoint: Endpoint, ends: &Ends) -> Phase {
        use FromStreamEnd as From;
        use ToStreamEnd as To;
        let broken = Phase::PeerBroken {
            after_eof: ends.peer_eof,
            is_given: ends.to_stream.is_some(),
        };
        let waits_for_eof = endpoint.role.waits_for_eof();
        let aborting = Phase::Aborting {
            all_sent: ends.from_stream.is_some(),
        };
        let told = if endpoint.protocol.has_words() {
            Phase::Closing
        } else {
            aborting.clone()
        };
        match (&ends.to_stream, &ends.from_stream) {
            _ if ends.is_cut => Phase::Cut,
            _ if matches!(ends.cut, Some(Cut::Shutdown | Cut::Idle)) => told,
            // A client is told why, and has the time to read it, whatever it has still sent.
            (_, Some(From::StreamFailed(_))) if endpoint.tells_failures() => Phase::Closing,
            // What fills the server's buffers holds back every end but a reset.
            (_, None) if ends.is_held_back() && !endpoint.tells_failures() => aborting,
            (_, None) if ends.is_held_back() => Phase::Closing,
            _ if ends.undelivered.is_some() => aborting,
            (Some(To::PeerAborted(..) | To::Refused(_)), _) | (_, Some(From::StreamFailed(_))) => {
                told
            }
            _ if ends.peer_broke => broken,
            (_, Some(From::PeerGone(_))) | (Some(To::Vanished(_)), _) => broken,
            // The server has closed its connection. Our Close may have been sent before, and isn't noted yet.
            (Some(To::Closed), None) if waits_for_eof => Phase::PeerBroken {
                after_eof: false,
                is_given: false,
            },
            (_, Some(From::Eof)) if ends.peer_closed && waits_for_eof => Phase::BothClosed,
            _ if ends.peer_closed => Phase::PeerClosed,
            (_, Some(From::Eof)) => Phase::StreamEnded,
            _ => Phase::Open,
        }
    }
}

/// What the clocks judge by.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// When the peer's last bytes came.
    pub(super) last_read: Duration,
    /// When the peer last took bytes that had waited for it.
    pub(super) last_blocked_write: Duration,
    /// When a payload byte last moved, in either direction.
    pub(super) last_payload: Duration,
    /// The stream is being waited for, so that nothing is read from the peer.
    pub(super) blocked_on_stream: bool,
    /// Bytes of the peer's lie unread.
    pub(super) unread: bool,
    /// A ping waits behind other bytes to be sent.
    pub(super) ping_pending: bool,
    /// When the last ping was sent.
    pub(super) ping_written: Duration,
    /// Nothing was sent since the last answered ping.
    pub(super) all_ponged: bool,
    /// When something last changed that makes a phase.
    pub(super) changed_at: Duration,
    /// What the peer has not acknowledged of what was sent to it.
    pub(super) unacknowledged: Unacknowledged,
    /// What neither side has acknowledged.
    pub(super) on_their_way: Unacknowledged,
    /// The stream has failed, and what it had brought before is still being sent.
    pub(super) stream_failed: bool,
}

/// It takes long to find out, so it is only asked when a step wants to know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Unacknowledged {
    #[default]
    NotAsked,
    /// The system can't tell.
    Unknown,
    Bytes(u64),
}

impl Unacknowledged {
    fn found(count: Option<u64>) -> Unacknowledged {
        count.map_or(Unacknowledged::Unknown, Unacknowledged::Bytes)
    }
}

impl Seen {
    fn last_life(&self) -> Duration {
        self.last_read.max(self.last_blocked_write)
    }
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing before this time.
    Wait(Duration),
    /// A ping, and then to ask again.
    Ping,
    /// To find out what the peer has not acknowledged, and then to ask again.
    Look,
    /// The same of both sides.
    LookAtBoth,
    /// The stream has failed, and the peer takes nothing of what it had brought: both are to end.
    HeldBack,
    /// To end the tunnel.
    Cut(Cut),
    /// To leave it: a thread waits where it can't be woken, in a write to stdout.
    Leave,
}

/// The clocks of one tunnel.
#[derive(Debug)]
pub(super) struct Clocks {
    endpoint: Endpoint,
    times: Times,
    next_ping: Duration,
    unanswered: Option<Unanswered>,
    /// How much time since the peer's last sign of life doesn't count, as we stood still.
    forgiven: Duration,
    last_life: Duration,
    idle: Option<IdleClock>,
    phase: Phase,
    /// When the phase began.
    since: Duration,
    look_again: Duration,
    least_unacknowledged: Option<u64>,
    last_unacknowledged: Option<u64>,
    /// When the peer was last seen to take bytes, where it is asked for.
    last_taken: Option<Duration>,
}

/// The oldest ping since the peer's last sign of life.
#[derive(Debug, Clone, Copy)]
struct Unanswered {
    /// When it was due. What came since then answers it.
    since: Duration,
    /// When it was sent, which is later if bytes were on their way.
    written: Option<Duration>,
    /// How much its timeout is moved, as we stood still.
    forgiven: Duration,
}

impl Clocks {
    /// Those of a tunnel that begins now.
    pub(super) fn new(endpoint: Endpoint, times: Times) -> Clocks {
        Clocks {
            endpoint,
            next_ping: times.ping_interval,
            idle: times.idle_timeout.map(IdleClock::new),
            times,
            unanswered: None,
            forgiven: Duration::ZERO,
            last_life: Duration::ZERO,
            phase: Phase::Open,
            since: Duration::ZERO,
            look_again: LOOK_AGAIN.0,
            least_unacknowledged: None,
            last_unacknowledged: None,
            last_taken: None,
        }
    }

    /// The wait that a step asked for ended so much too late: the process stood still, in a frozen container for
    /// example, or was kept from running. Deadlines move by as much.
    pub(super) fn note_late(&mut self, by: Duration) {
        self.next_ping += by;
        self.since += by;
        self.forgiven += by;
        if let Some(idle) = &mut self.idle {
            idle.forgive(by);
        }
        if let Some(ping) = &mut self.unanswered {
            ping.forgiven += by;
        }
        if let Some(taken) = &mut self.last_taken {
            *taken += by;
        }
    }

    /// What is to be done at `now`, when this was `seen`.
    pub(super) fn step(&mut self, now: Duration, seen: &Seen, phase: &Phase) -> Step {
        if *phase != self.phase {
            self.phase = phase.clone();
            self.since = seen.changed_at.min(now);
            self.look_again = LOOK_AGAIN.0;
            self.least_unacknowledged = None;
            self.last_unacknowledged = None;
            self.last_taken = None;
            if *phase == Phase::StreamEnded {
                let soon = self.since + self.linger_ping_interval();
                self.next_ping = self.next_ping.min(soon);
            }
        }
        let life = seen.last_life();
        if life > self.last_life {
            self.last_life = life;
            self.forgiven = Duration::ZERO;
        }
        let idle = self.idle(now, seen, phase);
        if idle == Some(Idle::Look) {
            return Step::LookAtBoth;
        }
        match (idle, self.step_in(now, seen, phase)) {
            (Some(Idle::Wait(deadline)), Step::Wait(until)) => Step::Wait(until.min(deadline)),
            (Some(Idle::Over), Step::Wait(_) | Step::Ping | Step::Look) => Step::Cut(Cut::Idle),
            (_, step) => step,
        }
    }

    /// Whether a tunnel that could last is idle.
    fn idle(&mut self, now: Duration, seen: &Seen, phase: &Phase) -> Option<Idle> {
        let may_last = matches!(phase, Phase::Open | Phase::PeerClosed | Phase::StreamEnded);
        let clock = self.idle.as_mut().filter(|_| may_last)?;
        Some(clock.step(now, seen.last_payload, seen.on_their_way))
    }

    fn step_in(&mut self, now: Duration, seen: &Seen, phase: &Phase) -> Step {
        match self.step_of(now, seen, phase) {
            Step::Wait(until) if seen.stream_failed => self.wait_or_held_back(now, seen, until),
            step => step,
        }
    }

    fn step_of(&mut self, now: Duration, seen: &Seen, phase: &Phase) -> Step {
        match phase {
            Phase::PeerClosed if !self.endpoint.answers_behind_close() => {
                self.ping_or(now, self.times.ping_interval, Duration::MAX)
            }
            Phase::Open | Phase::PeerClosed => self.ping_and_judge(now, seen),
            Phase::StreamEnded if self.endpoint.waits_for_end() => Step::Wait(Duration::MAX),
            Phase::StreamEnded => self.stream_ended(now, seen),
            Phase::BothClosed => self.both_closed(now, seen),
            Phase::Aborting { all_sent } => self.aborting(now, seen, *all_sent),
            Phase::PeerBroken { is_given: true, .. } => Step::Cut(Cut::PeerBroken),
            Phase::PeerBroken {
                after_eof: true, ..
            } => {
                let last = self.since.max(seen.last_payload);
                self.until(now, last + self.times.stall_timeout, Cut::PeerBroken)
            }
            Phase::PeerBroken { .. } => self.until(now, self.since + SETTLE_LIMIT, Cut::PeerBroken),
            Phase::Closing => self.until(now, self.since + CLOSE_LIMIT, Cut::CloseTimeout),
            Phase::Cut if now < self.since + CUT_LIMIT => Step::Wait(self.since + CUT_LIMIT),
            Phase::Cut => Step::Leave,
        }
    }

    fn until(&self, now: Duration, deadline: Duration, cut: Cut) -> Step {
        if now < deadline {
            Step::Wait(deadline)
        } else {
            Step::Cut(cut)
        }
    }

    fn ping_or(&mut self, now: Duration, interval: Duration, wait: Duration) -> Step {
        if now < self.next_ping {
            return Step::Wait(wait.min(self.next_ping));
        }
        self.next_ping = now + interval;
        self.unanswered.get_or_insert(Unanswered {
            since: now,
            written: None,
            forgiven: Duration::ZERO,
        });
        Step::Ping
    }

    fn ping_and_judge(&mut self, now: Duration, seen: &Seen) -> Step {
        if !self.endpoint.protocol.has_pongs() {
            return self.ping_or(now, self.times.ping_interval, Duration::MAX);
        }
        match self.judge(now, seen) {
            Ok(wait) => self.ping_or(now, self.times.ping_interval, wait),
            Err(cut) => Step::Cut(cut),
        }
    }

    /// Whether the peer counts as dead, or else when to ask again.
    fn judge(&mut self, now: Duration, seen: &Seen) -> Result<Duration, Cut> {
        let Some(ping) = &mut self.unanswered else {
            return Ok(self.next_ping);
        };
        if !seen.ping_pending && seen.ping_written >= ping.since && ping.written.is_none() {
            ping.written = Some(seen.ping_written);
            ping.forgiven = Duration::ZERO;
        }
        let (since, written, forgiven) = (ping.since, ping.written, ping.forgiven);
        let ping_timeout = self.times.ping_timeout;
        // It can't be heard then. Asked first, as what blocks ends with a sign of life.
        if seen.blocked_on_stream {
            return Ok(now + ping_timeout);
        }
        if seen.last_read >= since {
            self.unanswered = None;
            return Ok(self.next_ping);
        }
        let due = written.unwrap_or(since) + forgiven + ping_timeout;
        if now < due {
            return Ok(due);
        }
        // It has been sent, and is going to be heard.
        if seen.unread {
            return Ok(now + LATE);
        }
        if written.is_some() && seen.all_ponged {
            return Err(Cut::PongTimeout);
        }
        let stalled = self.last_life + self.forgiven + self.times.stall_timeout;
        if now < stalled {
            Ok(stalled)
        } else {
            Err(Cut::Stalled)
        }
    }

    /// The peer has the linger from its last sign of life. It is pinged more often, as a pong is one, and as
    /// long as bytes lie before it, those it takes are; where nobody can tell, it has the stall timeout.
    fn stream_ended(&mut self, now: Duration, seen: &Seen) -> Step {
        let linger = self.times.linger;
        let last = self.since.max(self.last_life + self.forgiven);
        if now < last + linger {
            return self.ping_behind(now, seen, last + linger);
        }
        if seen.blocked_on_stream || seen.unread {
            return self.ping_behind(now, seen, now + linger.max(LATE));
        }
        let stalled = last + self.times.stall_timeout;
        if seen.unacknowledged == Unacknowledged::Unknown && now < stalled {
            return self.ping_behind(now, seen, stalled);
        }
        self.unless_taken(now, seen, Cut::Linger)
    }

    /// Not among bytes that come, which are a sign of life themselves: the client, or a proxy before it, may have closed
    /// its connection behind its last ones, and would answer with a reset that destroys them.
    fn ping_behind(&mut self, now: Duration, seen: &Seen, wait: Duration) -> Step {
        let interval = self.linger_ping_interval();
        let quiet = if seen.blocked_on_stream || seen.unread {
            self.times.ping_interval
        } else {
            interval
        };
        let due = self.next_ping.max(seen.last_read + quiet);
        if now < due {
            return Step::Wait(wait.min(due));
        }
        self.ping_or(now, interval, wait)
    }

    /// The server has the linger from its last sign of life to close the connection. Behind bytes that no pong has
    /// answered for it may still be giving them on, and has the stall timeout.
    fn both_closed(&mut self, now: Duration, seen: &Seen) -> Step {
        let limit = if seen.all_ponged {
            self.times.linger
        } else {
            self.times.linger.max(self.times.stall_timeout)
        };
        let deadline = self.since.max(self.last_life + self.forgiven) + limit;
        if now < deadline {
            return Step::Wait(deadline);
        }
        self.unless_taken(now, seen, Cut::LeftOpen)
    }

    /// Another linger if the peer has acknowledged bytes, as that is a sign of life, too.
    fn unless_taken(&mut self, now: Duration, seen: &Seen, cut: Cut) -> Step {
        match seen.unacknowledged {
            Unacknowledged::NotAsked => Step::Look,
            Unacknowledged::Bytes(left @ 1..) if self.takes_bytes(left) => {
                self.last_life = now;
                Step::Wait(now + self.times.linger)
            }
            _ => Step::Cut(cut),
        }
    }

    fn linger_ping_interval(&self) -> Duration {
        self.times
            .ping_interval
            .min(self.times.linger / 2)
            .max(LATE)
    }

    /// Whether the peer has acknowledged bytes since this was asked last.
    fn takes_bytes(&mut self, left: u64) -> bool {
        let before = self.least_unacknowledged.replace(left);
        before.is_none_or(|before| left < before)
    }

    /// Notes when that number has changed since it was asked last. While bytes are being written, a rise says as much as
    /// a fall: there is room for more only where some were taken.
    fn note_moved(&mut self, now: Duration, left: u64) {
        let before = self.last_unacknowledged.replace(left);
        if before.is_some_and(|before| left != before) {
            self.last_taken = Some(now);
        }
    }

    /// A peer that is seen to take bytes, not only to acknowledge what was on its way, has the time of a Close for the
    /// rest.
    fn aborting(&mut self, now: Duration, seen: &Seen, all_sent: bool) -> Step {
        let last = self.since.max(seen.last_payload);
        if let Unacknowledged::Bytes(left) = seen.unacknowledged {
            self.note_moved(now, left);
        }
        let deadline = match (all_sent, seen.unacknowledged) {
            (_, Unacknowledged::NotAsked) => return Step::Look,
            (true, Unacknowledged::Bytes(0)) => now,
            (true, Unacknowledged::Unknown) => last + BLIND_ARRIVAL_LIMIT,
            _ if self.last_taken > Some(self.since + BLIND_ARRIVAL_LIMIT) => {
                (last + ARRIVAL_LIMIT).max(self.since + CLOSE_LIMIT)
            }
            _ => last + ARRIVAL_LIMIT,
        };
        if now >= deadline {
            return Step::Cut(Cut::Aborted);
        }
        self.look_again_before(now, deadline)
    }

    /// A peer that is to be told that the stream has failed first takes what that had brought. If it takes nothing for as
    /// long as a Close may take, it isn't waited for.
    fn wait_or_held_back(&mut self, now: Duration, seen: &Seen, until: Duration) -> Step {
        if let Unacknowledged::Bytes(left) = seen.unacknowledged {
            self.note_moved(now, left);
        }
        let last = (*self.last_taken.get_or_insert(now)).max(seen.last_payload);
        if now < last + SETTLE_LIMIT {
            Step::Wait(until.min(last + SETTLE_LIMIT))
        } else if seen.unacknowledged == Unacknowledged::NotAsked {
            Step::Look
        } else if now < last + CLOSE_LIMIT {
            Step::Wait(until.min(now + SETTLE_LIMIT))
        } else {
            Step::HeldBack
        }
    }

    fn look_again_before(&mut self, now: Duration, deadline: Duration) -> Step {
        let wait = self.look_again;
        self.look_again = (wait * 2).min(LOOK_AGAIN.1);
        Step::Wait(deadline.min(now + wait))
    }
}

/// Watches over a tunnel until both of its directions have ended.
pub(super) fn watch(tunnel: &Tunnel) {
    let mut clocks = Clocks::new(tunnel.endpoint, tunnel.times);
    // An error, or a hang-up in both directions, is told whether asked for or not.
    let mut watched = Watched {
        peer: Some(PollFlags::RDHUP),
        stream: true,
    };
    while let Some(until) = next_wait(tunnel, &mut clocks) {
        let happened = wait_until(tunnel, until, watched);
        let late = tunnel.activity().age().saturating_sub(until);
        if late > LATE {
            clocks.note_late(late);
        }
        if happened.peer.intersects(PollFlags::HUP | PollFlags::ERR) {
            watched.peer = None;
            note_peer_broke(tunnel);
        } else if happened.peer.contains(PollFlags::RDHUP) {
            watched.peer = Some(PollFlags::empty());
            tunnel.ends().peer_eof = true;
        }
        if !happened.stream.is_empty() {
            watched.stream = false;
            let mut ends = tunnel.ends();
            ends.stream_broke = true;
            // A hang-up alone is an orderly end of both directions.
            ends.stream_erred = happened.stream.contains(PollFlags::ERR);
        }
    }
}

/// Does what is due. Returns until when to wait; `None` when the tunnel is over.
fn next_wait(tunnel: &Tunnel, clocks: &mut Clocks) -> Option<Duration> {
    let (mut unacknowledged, mut on_their_way) = Default::default();
    loop {
        let (phase, changed_at, stream_failed) = {
            let mut ends = tunnel.ends();
            let phase = Phase::of(tunnel.endpoint, &ends);
            // A reset is yet to be sent, behind what is on its way.
            let is_told = !matches!(phase, Phase::Aborting { .. });
            if ends.are_over() && is_told {
                return None;
            }
            if ends.is_stream_closed_early() && ends.undelivered.is_none() {
                ends.undelivered = Some(WriteFailure::Closed);
                ends.changed_at = tunnel.activity().age();
                continue;
            }
            if ends.shutdown && ends.cut.is_none() {
                ends.cut = Some(Cut::Shutdown);
                ends.changed_at = tunnel.activity().age();
                drop(ends);
                close(tunnel, &Farewell::Shutdown);
                continue;
            }
            (phase, ends.changed_at, ends.is_failure_unseen())
        };
        let now = tunnel.activity().age();
        let seen = Seen {
            changed_at,
            unacknowledged,
            on_their_way,
            stream_failed,
            ..seen(tunnel)
        };
        match clocks.step(now, &seen, &phase) {
            Step::Wait(until) => {
                let at_least = now + (tunnel.times.linger / 2).max(LOOK_AT_LEAST);
                return Some(until.min(at_least));
            }
            Step::Ping => {
                log::debug!(id = tunnel.state.id; "ping");
                tunnel.writer.ping();
            }
            Step::Look => unacknowledged = Unacknowledged::found(os::unacknowledged(&tunnel.peer)),
            Step::LookAtBoth => {
                let counts = [
                    os::unacknowledged(&tunnel.peer),
                    tunnel.stream.unacknowledged(),
                ];
                let known = counts
                    .into_iter()
                    .flatten()
                    .reduce(|one, other| one + other);
                on_their_way = Unacknowledged::found(known);
            }
            Step::HeldBack => note_held_back(tunnel),
            Step::Leave => match tunnel.stream {
                Stream::Stdio(_) => return None,
                Stream::Tcp(_) => return Some(now + LOOK_AT_LEAST),
            },
            Step::Cut(cut) => {
                log::debug!(id = tunnel.state.id, why:? = cut; "cut");
                end(tunnel, cut);
            }
        }
    }
}

/// What can be seen without asking the system's tables.
fn seen(tunnel: &Tunnel) -> Seen {
    let activity = tunnel.activity();
    // Both before `last_read`, as what ends them sets that first; else neither they nor what came might be seen.
    let blocked_on_stream = activity.is_blocked_on_stream();
    let unread = !os::ready(&*tunnel.peer, PollFlags::IN).is_empty();
    Seen {
        last_read: activity.last_read(),
        last_blocked_write: activity.last_blocked_write(),
        last_payload: activity.last_payload(),
        blocked_on_stream,
        unread,
        ping_pending: tunnel.writer.is_ping_pending(),
        ping_written: activity.ping_written(),
        all_ponged: activity.all_ponged(),
        ..Seen::default()
    }
}

/// What is watched beside the tunnel's own changes.
#[derive(Debug, Clone, Copy)]
struct Watched {
    /// Of the peer's connection.
    peer: Option<PollFlags>,
    /// Whether the stream's connection fails.
    stream: bool,
}

impl Watched {
    const NOTHING: Watched = Watched {
        peer: None,
        stream: false,
    };
}

/// What happened of that.
#[derive(Debug)]
struct Happened {
    peer: PollFlags,
    stream: PollFlags,
}

/// Waits for a change, until `until`, or for what is `watched`.
fn wait_until(tunnel: &Tunnel, until: Duration, watched: Watched) -> Happened {
    let limit = until.saturating_sub(tunnel.activity().age());
    let stream = watched.stream.then(|| tunnel.stream.socket()).flatten();
    let nothing = PollFlags::empty();
    let mut fds = [None, None, None];
    fds[0] = Some(PollFd::new(&tunnel.state.changed, PollFlags::IN));
    fds[1] = watched.peer.map(|flags| PollFd::new(&*tunnel.peer, flags));
    fds[2] = stream.as_deref().map(|stream| PollFd::new(stream, nothing));
    let mut fds = fds.map(|fd| fd.unwrap_or(PollFd::new(&tunnel.state.changed, nothing)));
    if os::wait(&mut fds, Some(limit)).is_err() {
        // Without memory for it there is no waiting either, and spinning would make it worse.
        std::thread::sleep(Duration::from_millis(10));
        return Happened {
            peer: nothing,
            stream: nothing,
        };
    }
    if !fds[0].revents().is_empty() {
        tunnel.state.changed.clear();
    }
    Happened {
        peer: fds[1].revents(),
        stream: fds[2].revents(),
    }
}

/// Takes note of why, if nobody else has been told yet. After a FIN a reset is EPIPE, without one it is ECONNRESET
/// (tcp_reset in Linux). A splice that had moved some bytes swallows it. A Unix socket whose client has closed it has
/// none, unless the client left something unread (unix_release_sock in Linux).
fn note_peer_broke(tunnel: &Tunnel) {
    let error = sockopt::socket_error(&*tunnel.peer)
        .ok()
        .and_then(Result::err);
    tunnel.note_end(|ends| {
        ends.peer_broke = true;
        match error {
            Some(Errno::PIPE) => ends.peer_eof = true,
            Some(error) => ends.peer_failure = Some(io::Error::from(error).to_string()),
            None if tunnel.peer_failure().is_some() => {
                ends.peer_failure = tunnel.peer_failure().map(str::to_owned);
            }
            None => ends.peer_eof |= tunnel.peer_is_unix && !ends.was_reset_in_write(),
        }
    });
}

/// The thread that reads the stream waits for the peer, and can't find out for itself.
fn note_held_back(tunnel: &Tunnel) {
    let why = match tunnel.stream.take_failure() {
        Some(why) => WriteFailure::Failed(tunnel.stream.failure(tunnel.endpoint.role, &why)),
        None => WriteFailure::Closed,
    };
    log::debug!(id = tunnel.state.id, why:? = why; "held back");
    if matches!(why, WriteFailure::Failed(_)) {
        tunnel.note_stream_failed();
    }
    tunnel.note_end(|ends| ends.held_back = Some(why));
}

/// Tells the peer, in whatever state the tunnel is. The Close goes out now, or behind the message that is being
/// written; then nothing more does.
fn close(tunnel: &Tunnel, farewell: &Farewell) {
    let is_finished = tunnel.ends().peer_closed;
    tunnel.writer.queue_close(farewell);
    // To ask takes long, and only what was finished may be on its way.
    match is_finished
        .then(|| tunnel.stream.unacknowledged())
        .flatten()
    {
        Some(1..) => {}
        left => abort_behind(tunnel, left),
    }
    tunnel.writer.flush();
}

fn end(tunnel: &Tunnel, cut: Cut) {
    // Before the threads are woken, which then know why.
    tunnel.note_end(|ends| {
        ends.is_cut = cut != Cut::Idle;
        ends.cut.get_or_insert(cut.clone());
    });
    match cut {
        Cut::Linger => tunnel.stop_reading_peer(),
        Cut::CloseTimeout | Cut::LeftOpen => tunnel.shut_peer(),
        Cut::Idle => return close(tunnel, &Farewell::Idle),
        // What is still in our buffers for it can't reach it.
        Cut::PongTimeout | Cut::Stalled | Cut::PeerBroken | Cut::Aborted | Cut::Shutdown => {
            tunnel.reset_peer();
        }
    }
    match cut {
        Cut::LeftOpen => {}
        Cut::PeerBroken => abort_stream(tunnel),
        _ => tunnel.stream.abort(),
    }
}

/// Bytes and FIN of the peer's orderly end may be on their way to the stream, and a reset could take them back: that
/// comes once they have arrived, as over TCP. Otherwise a stream that sends nothing more would never learn that what
/// it has sent is lost.
pub(super) fn abort_stream(tunnel: &Tunnel) {
    let is_finished = tunnel.ends().peer_closed;
    let left = is_finished.then(|| wait_for_acknowledgement(tunnel));
    abort_behind(tunnel, left.flatten());
}

/// With a reset if `left` says that all of an orderly end has arrived.
fn abort_behind(tunnel: &Tunnel, left: Option<u64>) {
    if left == Some(0) {
        tunnel.stream.reset_on_close();
    }
    tunnel.stream.abort();
}

/// Waits until the stream is over behind both ends. Its last bytes may have come to a target that had closed before: it
/// answers them with a reset, a round trip later, and then the end is no orderly one.
pub(super) fn settle(tunnel: &Tunnel) {
    let deadline = tunnel.activity().age() + ARRIVAL_LIMIT;
    let mut wait = LOOK_AGAIN.0 / 5;
    while !tunnel.stream.is_over() {
        let now = tunnel.activity().age();
        if now >= deadline || tunnel.ends().shutdown {
            return;
        }
        wait_until(tunnel, deadline.min(now + wait), Watched::NOTHING);
        wait *= 2;
    }
    if tunnel.stream.was_reset() && !tunnel.ends().stream_took_all {
        tunnel.note_end(|ends| ends.undelivered = Some(WriteFailure::Closed));
        tunnel.reset_peer();
    }
}

/// Waits until what was finished has arrived, for as long as it does. Returns how much has not, if that can be told.
fn wait_for_acknowledgement(tunnel: &Tunnel) -> Option<u64> {
    let (mut wait, mut least) = (LOOK_AGAIN.0, u64::MAX);
    let mut deadline = Duration::MAX;
    loop {
        let left = match tunnel.stream.unacknowledged() {
            Some(left @ 1..) => left,
            settled => return settled,
        };
        let now = tunnel.activity().age();
        if left < least {
            least = left;
            deadline = now + tunnel.times.stall_timeout;
        }
        if now >= deadline || tunnel.ends().shutdown {
            return Some(left);
        }
        wait_until(tunnel, now + wait, Watched::NOTHING);
        wait = (wait * 2).min(LOOK_AGAIN.1);
    }
}

#[cfg(test)]
mod tests;
