//! When a tunnel is idle: no payload byte has moved, neither in a call of ours nor on its way.

use std::time::Duration;

use super::Unacknowledged;

/// How often a tunnel that could become idle is looked at until it is.
const LOOKS: u32 = 4;

/// The clock of the idle timeout. A write that waits for room ends long after the bytes before it have begun to move, so
/// what the systems of both sides have not acknowledged is looked at, too: while that becomes less, bytes move.
#[derive(Debug)]
pub(super) struct IdleClock {
    limit: Duration,
    /// When a call of ours last moved a payload byte.
    last_payload: Duration,
    /// When one was last known to move.
    last_moved: Duration,
    /// How much time since then doesn't count, as we stood still.
    forgiven: Duration,
    /// When to look next, and what was on its way at the last look since the last payload byte.
    next_look: Duration,
    on_their_way: Option<u64>,
}

/// What to do about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Idle {
    /// Nothing before this time.
    Wait(Duration),
    /// To find out what is on its way to either side, and then to ask again.
    Look,
    /// The tunnel is idle.
    Over,
}

impl IdleClock {
    /// That of a tunnel that begins now.
    pub(super) fn new(limit: Duration) -> IdleClock {
        IdleClock {
            limit,
            last_payload: Duration::ZERO,
            last_moved: Duration::ZERO,
            forgiven: Duration::ZERO,
            next_look: limit / LOOKS,
            on_their_way: None,
        }
    }

    /// So much time doesn't count.
    pub(super) fn forgive(&mut self, by: Duration) {
        self.forgiven += by;
    }

    /// What is to be done at `now`.
    pub(super) fn step(
        &mut self,
        now: Duration,
        last_payload: Duration,
        on_their_way: Unacknowledged,
    ) -> Idle {
        if last_payload > self.last_payload {
            self.last_payload = last_payload;
            self.moved(last_payload);
            self.next_look = last_payload + self.limit / LOOKS;
            self.on_their_way = None;
        }
        match on_their_way {
            Unacknowledged::NotAsked if now >= self.next_look => return Idle::Look,
            Unacknowledged::NotAsked => {}
            // Without a call of ours there won't be any.
            Unacknowledged::Bytes(0) | Unacknowledged::Unknown => self.next_look = Duration::MAX,
            Unacknowledged::Bytes(left) => {
                if self.on_their_way.is_none_or(|before| left < before) {
                    self.moved(now);
                }
                self.on_their_way = Some(left);
                self.next_look = now + self.limit / LOOKS;
            }
        }
        let deadline = self.last_moved + self.forgiven + self.limit;
        if now < deadline {
            Idle::Wait(deadline.min(self.next_look))
        } else {
            Idle::Over
        }
    }

    fn moved(&mut self, at: Duration) {
        self.last_moved = at;
        self.forgiven = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::Unacknowledged::{Bytes, NotAsked, Unknown};
    use super::*;

    const LIMIT: Duration = Duration::from_secs(40);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_tunnel_with_nothing_on_its_way_is_idle_after_the_limit() {
        for on_their_way in [Bytes(0), Unknown] {
            let mut clock = IdleClock::new(LIMIT);
            assert_eq!(clock.step(at(1), at(1), NotAsked), Idle::Wait(at(11)));
            assert_eq!(clock.step(at(11), at(1), NotAsked), Idle::Look);
            assert_eq!(clock.step(at(11), at(1), on_their_way), Idle::Wait(at(41)));
            assert_eq!(clock.step(at(40), at(1), NotAsked), Idle::Wait(at(41)));
            assert_eq!(clock.step(at(41), at(1), NotAsked), Idle::Over);
        }
    }

    #[test]
    fn bytes_that_arrive_keep_it_open_and_those_that_lie_there_do_not() {
        let mut clock = IdleClock::new(LIMIT);
        let looks = [
            (10, 900),
            (20, 800),
            (30, 700),
            (40, 600),
            (50, 600),
            (60, 600),
            (70, 600),
        ];
        for (second, left) in looks {
            let now = at(second);
            assert_eq!(clock.step(now, at(0), NotAsked), Idle::Look);
            assert_eq!(
                clock.step(now, at(0), Bytes(left)),
                Idle::Wait(at(second + 10))
            );
        }
        assert_eq!(clock.step(at(80), at(0), NotAsked), Idle::Look);
        assert_eq!(clock.step(at(80), at(0), Bytes(600)), Idle::Over);
    }

    #[test]
    fn a_payload_byte_begins_it_anew() {
        let mut clock = IdleClock::new(LIMIT);
        clock.step(at(10), at(0), Bytes(0));
        assert_eq!(clock.step(at(39), at(39), NotAsked), Idle::Wait(at(49)));
        assert_eq!(clock.step(at(49), at(39), NotAsked), Idle::Look);
        // More than before, and the first look since.
        assert_eq!(clock.step(at(49), at(39), Bytes(5)), Idle::Wait(at(59)));
    }

    #[test]
    fn time_that_is_forgiven_does_not_count() {
        let mut clock = IdleClock::new(LIMIT);
        clock.step(at(10), at(0), Bytes(0));
        clock.forgive(at(100));
        assert_eq!(clock.step(at(139), at(0), NotAsked), Idle::Wait(at(140)));
        assert_eq!(clock.step(at(140), at(0), NotAsked), Idle::Over);
    }
}
