//! The clocks, by a clock that is set by hand.

use super::*;
use crate::tunnel::ends::{Protocol, Role};
use crate::tunnel::transfer::WriteFailure;

const ROLES: [Role; 2] = [Role::Daemon, Role::Client];

fn websocket(role: Role) -> Endpoint {
    Endpoint {
        role,
        protocol: Protocol::WebSocket,
    }
}

const TIMES: Times = Times {
    ping_interval: Duration::from_secs(30),
    ping_timeout: Duration::from_secs(5),
    stall_timeout: Duration::from_secs(300),
    linger: Duration::from_secs(40),
    idle_timeout: None,
};

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// A tunnel whose clock is set by hand.
struct Fake {
    clocks: Clocks,
    seen: Seen,
    phase: Phase,
    /// What is found unacknowledged.
    left: Unacknowledged,
}

impl Fake {
    fn new(role: Role) -> Fake {
        Fake {
            clocks: Clocks::new(websocket(role), TIMES),
            seen: Seen {
                all_ponged: true,
                ..Seen::default()
            },
            phase: Phase::Open,
            left: Unacknowledged::Bytes(0),
        }
    }

    fn at(&mut self, now: Duration) -> Step {
        self.clocks.step(now, &self.seen, &self.phase)
    }

    fn enter(&mut self, phase: Phase, now: Duration) -> Step {
        self.phase = phase;
        self.seen.changed_at = now;
        self.at(now)
    }

    /// The ping that is due at `now` goes out at once.
    fn ping(&mut self, now: Duration) {
        assert_eq!(self.at(now), Step::Ping, "at {now:?}");
        self.seen.ping_written = now;
    }

    /// Runs up to `end` as the thread does, each wake `late`; pings go out at once. How often one did, and what
    /// ended it when.
    fn run(
        &mut self,
        mut now: Duration,
        end: Duration,
        late: Duration,
    ) -> (u32, Option<(Duration, Cut)>) {
        let mut pings = 0;
        while now < end {
            match self.at(now) {
                Step::Wait(until) => {
                    assert!(until > now, "no progress at {now:?}");
                    self.seen.unacknowledged = Unacknowledged::NotAsked;
                    now = until.min(now + TIMES.linger / 2) + late;
                    if late > LATE {
                        self.clocks.note_late(late);
                    }
                }
                Step::Ping => {
                    self.seen.ping_written = now;
                    pings += 1;
                }
                Step::Look => self.seen.unacknowledged = self.left,
                Step::Cut(cut) => return (pings, Some((now, cut))),
                step => panic!("{step:?} at {now:?}"),
            }
        }
        (pings, None)
    }
}

fn both(test: impl Fn(Fake)) {
    for role in ROLES {
        test(Fake::new(role));
    }
}

// Both directions are open

#[test]
fn open_to_pinged_after_the_interval_whatever_moves() {
    both(|mut fake| {
        assert_eq!(fake.at(at(0)), Step::Wait(at(30)));
        fake.seen.last_read = at(29);
        fake.seen.last_payload = at(29);
        assert_eq!(fake.at(ms(29_999)), Step::Wait(at(30)));
        fake.ping(at(30));
        assert_eq!(fake.at(at(30)), Step::Wait(at(35)));
    });
}

#[test]
fn pinged_to_open_by_any_byte_within_the_timeout() {
    both(|mut fake| {
        fake.ping(at(30));
        fake.seen.last_read = at(34);
        assert_eq!(fake.at(at(35)), Step::Wait(at(60)));
        fake.ping(at(60));
        assert_eq!(fake.at(at(60)), Step::Wait(at(65)));
    });
}

#[test]
fn pinged_to_cut_without_a_byte_since() {
    both(|mut fake| {
        fake.seen.last_read = ms(29_999);
        fake.ping(at(30));
        assert_eq!(fake.at(ms(34_999)), Step::Wait(at(35)));
        assert_eq!(fake.at(at(35)), Step::Cut(Cut::PongTimeout));
    });
}

#[test]
fn unread_bytes_are_read_before_it_is_judged() {
    both(|mut fake| {
        fake.ping(at(30));
        fake.seen.unread = true;
        assert_eq!(fake.at(at(35)), Step::Wait(at(35) + LATE));
        fake.seen.unread = false;
        fake.seen.last_read = at(35);
        assert_eq!(fake.at(at(35) + LATE), Step::Wait(at(60)));
    });
}

#[test]
fn a_pending_ping_has_no_timeout_until_it_went_out() {
    both(|mut fake| {
        fake.seen.ping_pending = true;
        assert_eq!(fake.at(at(30)), Step::Ping);
        assert_eq!(fake.at(at(30)), Step::Wait(at(35)));
        // The one before it doesn't count as this one.
        fake.seen.ping_written = at(29);
        assert_eq!(fake.at(at(35)), Step::Wait(at(60)));
        assert_eq!(fake.at(at(60)), Step::Ping);
        fake.seen.ping_pending = false;
        fake.seen.ping_written = at(70);
        assert_eq!(fake.at(at(71)), Step::Wait(at(75)));
        assert_eq!(fake.at(at(75)), Step::Cut(Cut::PongTimeout));
    });
}

#[test]
fn a_busy_download_is_pinged_in_each_interval() {
    both(|mut fake| {
        fake.seen.all_ponged = false;
        let mut pings = 0;
        for now in 0..300 {
            // Each write waits, and goes on.
            fake.seen.last_blocked_write = at(now);
            fake.seen.last_payload = at(now);
            if fake.at(at(now)) == Step::Ping {
                fake.seen.ping_written = at(now);
                pings += 1;
            }
        }
        assert_eq!(pings, 9);
    });
}

#[test]
fn bytes_before_a_ping_lengthen_its_timeout_to_the_stall_timeout() {
    both(|mut fake| {
        fake.seen.all_ponged = false;
        fake.seen.last_blocked_write = at(20);
        fake.ping(at(30));
        assert_eq!(fake.at(at(35)), Step::Wait(at(60)));
        let (_, cut) = fake.run(at(35), at(1000), Duration::ZERO);
        assert_eq!(cut, Some((at(320), Cut::Stalled)));
    });
}

#[test]
fn bytes_that_a_slow_reader_takes_are_a_sign_of_life() {
    both(|mut fake| {
        fake.seen.all_ponged = false;
        fake.ping(at(30));
        fake.seen.last_blocked_write = at(299);
        assert_eq!(fake.run(at(300), at(598), Duration::ZERO).1, None);
        let (_, cut) = fake.run(at(598), at(1000), Duration::ZERO);
        assert_eq!(cut, Some((at(599), Cut::Stalled)));
    });
}

#[test]
fn the_clock_stands_still_while_the_stream_takes_nothing() {
    both(|mut fake| {
        fake.seen.blocked_on_stream = true;
        let (pings, cut) = fake.run(at(0), at(3001), Duration::ZERO);
        assert_eq!((pings, cut), (100, None));
    });
}

/// A stall ends with a sign of life, which the clocks may see or not see yet: never is it cut.
#[test]
fn blocked_to_open_is_no_cut_whichever_is_seen_first() {
    both(|mut fake| {
        fake.ping(at(30));
        fake.seen.blocked_on_stream = true;
        assert_eq!(fake.at(at(35)), Step::Wait(at(40)));
        // What came before the stall ended doesn't make it answered, so a timeout begins when it does end.
        fake.seen.last_read = at(39);
        assert_eq!(fake.at(at(39)), Step::Wait(at(44)));
        fake.seen.blocked_on_stream = false;
        assert_eq!(fake.at(at(44)), Step::Wait(at(60)));
        fake.ping(at(60));
        assert_eq!(fake.at(at(65)), Step::Cut(Cut::PongTimeout));
    });
}

// A late wake

#[test]
fn a_pong_before_a_late_wake_is_one() {
    both(|mut fake| {
        fake.ping(at(30));
        assert_eq!(fake.at(at(30)), Step::Wait(at(35)));
        fake.seen.last_read = ms(30_001);
        fake.clocks.note_late(ms(100));
        assert_eq!(fake.at(ms(35_100)), Step::Wait(ms(60_100)));
    });
}

#[test]
fn a_pong_before_the_process_was_frozen_is_one() {
    both(|mut fake| {
        fake.ping(at(30));
        assert_eq!(fake.at(at(30)), Step::Wait(at(35)));
        fake.seen.last_read = at(31);
        fake.clocks.note_late(at(1000));
        assert_eq!(fake.at(at(1035)), Step::Wait(at(1060)));
    });
}

#[test]
fn a_late_wake_moves_deadlines_by_the_lateness_once() {
    both(|mut fake| {
        fake.ping(at(30));
        assert_eq!(fake.at(at(30)), Step::Wait(at(35)));
        // Woken in the middle of the wait, not at its end.
        fake.clocks.note_late(at(2));
        assert_eq!(fake.at(at(34)), Step::Wait(at(37)));
        assert_eq!(fake.at(ms(36_999)), Step::Wait(at(37)));
        assert_eq!(fake.at(at(37)), Step::Cut(Cut::PongTimeout));
    });
}

#[test]
fn lateness_before_a_ping_went_out_is_not_counted_behind_it() {
    both(|mut fake| {
        fake.seen.ping_pending = true;
        assert_eq!(fake.at(at(30)), Step::Ping);
        fake.clocks.note_late(at(10));
        assert_eq!(fake.at(at(40)), Step::Wait(at(45)));
        fake.seen.ping_pending = false;
        fake.seen.ping_written = at(41);
        assert_eq!(fake.at(at(42)), Step::Wait(at(46)));
        assert_eq!(fake.at(at(46)), Step::Cut(Cut::PongTimeout));
    });
}

#[test]
fn throttled_again_and_again_a_dead_peer_is_found() {
    both(|mut fake| {
        let (_, cut) = fake.run(at(0), at(1000), at(1));
        let (when, cut) = cut.unwrap();
        assert_eq!(cut, Cut::PongTimeout);
        assert!(when < at(50), "{when:?}");
    });
    both(|mut fake| {
        fake.seen.all_ponged = false;
        let (_, cut) = fake.run(at(0), at(1000), at(1));
        let (when, cut) = cut.unwrap();
        assert_eq!(cut, Cut::Stalled);
        assert!(when < at(400), "{when:?}");
    });
}

#[test]
fn a_frozen_process_reads_first_and_judges_then() {
    both(|mut fake| {
        fake.ping(at(30));
        assert_eq!(fake.at(at(30)), Step::Wait(at(35)));
        fake.clocks.note_late(at(1000));
        fake.seen.unread = true;
        assert_eq!(fake.at(at(1035)), Step::Wait(at(1035) + LATE));
        fake.seen.unread = false;
        fake.seen.last_read = at(1035);
        assert_eq!(fake.at(at(1035) + LATE), Step::Wait(at(1060)));
    });
}

#[test]
fn a_frozen_process_gives_a_slow_reader_the_rest_of_its_stall_timeout() {
    both(|mut fake| {
        fake.seen.all_ponged = false;
        fake.seen.last_blocked_write = at(10);
        assert_eq!(fake.run(at(0), at(100), Duration::ZERO).1, None);
        fake.clocks.note_late(at(1000));
        let (_, cut) = fake.run(at(1100), at(3000), Duration::ZERO);
        assert_eq!(cut, Some((at(1310), Cut::Stalled)));
    });
}

// One direction has ended

#[test]
fn after_the_clients_close_it_is_pinged_and_never_cut() {
    for all_ponged in [false, true] {
        let mut fake = Fake::new(Role::Daemon);
        fake.seen.all_ponged = all_ponged;
        fake.enter(Phase::PeerClosed, at(1));
        let (pings, cut) = fake.run(at(1), at(100_001), Duration::ZERO);
        assert_eq!((pings, cut), (3333, None));
    }
}

#[test]
fn after_the_servers_close_its_silence_is_judged_as_before() {
    for (all_ponged, expected) in [
        (true, (at(35), Cut::PongTimeout)),
        (false, (at(300), Cut::Stalled)),
    ] {
        let mut fake = Fake::new(Role::Client);
        fake.seen.all_ponged = all_ponged;
        fake.enter(Phase::PeerClosed, at(1));
        let (_, cut) = fake.run(at(1), at(1000), Duration::ZERO);
        assert_eq!(cut, Some(expected));
    }
}

#[test]
fn after_the_targets_end_the_client_has_the_linger_from_its_last_sign_of_life() {
    type Sign = fn(&mut Seen, Duration);
    let signs: [(&str, Sign); 2] = [
        ("read", |seen, now| seen.last_read = now),
        ("taken", |seen, now| seen.last_blocked_write = now),
    ];
    for (name, sign) in signs {
        let mut fake = Fake::new(Role::Daemon);
        fake.enter(Phase::StreamEnded, at(1));
        assert_eq!(fake.run(at(1), at(35), Duration::ZERO).1, None, "{name}");
        sign(&mut fake.seen, at(35));
        let (pings, cut) = fake.run(at(35), at(1000), Duration::ZERO);
        assert_eq!(cut, Some((at(75), Cut::Linger)), "{name}");
        assert!(pings >= 1, "{name}");
    }
}

#[test]
fn after_the_targets_end_the_first_ping_is_due_within_half_the_linger() {
    let mut fake = Fake::new(Role::Daemon);
    assert_eq!(fake.enter(Phase::StreamEnded, at(1)), Step::Wait(at(21)));
    assert_eq!(fake.at(at(21)), Step::Ping);
    assert_eq!(fake.at(at(21)), Step::Wait(at(41)));
}

/// Nor does it come often while the target takes nothing of them.
#[test]
fn after_the_targets_end_no_ping_comes_among_the_clients_bytes() {
    let mut fake = Fake::new(Role::Daemon);
    fake.enter(Phase::StreamEnded, at(1));
    for now in 1..300 {
        fake.seen.last_read = at(now);
        let step = fake.at(at(now));
        assert!(matches!(step, Step::Wait(_)), "{step:?} at {now}");
    }
    assert_eq!(fake.at(at(319)), Step::Ping);
    fake.seen.last_read = at(330);
    fake.seen.blocked_on_stream = true;
    assert_eq!(fake.at(at(359)), Step::Wait(at(360)));
    assert_eq!(fake.at(at(360)), Step::Ping);
}

#[test]
fn after_the_targets_end_acknowledged_bytes_are_a_sign_of_life() {
    let mut fake = Fake::new(Role::Daemon);
    fake.enter(Phase::StreamEnded, at(1));
    let mut now = at(41);
    for left in [100, 99, 1] {
        while fake.at(now) == Step::Ping {}
        assert_eq!(fake.at(now), Step::Look);
        fake.seen.unacknowledged = Unacknowledged::Bytes(left);
        assert_eq!(fake.at(now), Step::Wait(now + TIMES.linger));
        fake.seen.unacknowledged = Unacknowledged::NotAsked;
        now += TIMES.linger;
    }
    fake.seen.unacknowledged = Unacknowledged::Bytes(1);
    assert_eq!(fake.at(now), Step::Cut(Cut::Linger));
}

#[test]
fn after_the_targets_end_a_client_with_all_acknowledged_has_no_more_than_the_linger() {
    for (left, limit) in [
        (Unacknowledged::Bytes(0), TIMES.linger),
        // A client of a Unix socket, which is known to be there.
        (Unacknowledged::Unknown, TIMES.stall_timeout),
    ] {
        let mut fake = Fake::new(Role::Daemon);
        fake.left = left;
        fake.enter(Phase::StreamEnded, at(1));
        let (_, cut) = fake.run(at(1), at(1000), Duration::ZERO);
        assert_eq!(cut, Some((at(1) + limit, Cut::Linger)), "{left:?}");
    }
}

#[test]
fn no_linger_ends_while_the_target_takes_nothing_or_bytes_lie_unread() {
    for (blocked, unread) in [(true, false), (false, true)] {
        let mut fake = Fake::new(Role::Daemon);
        fake.enter(Phase::StreamEnded, at(1));
        fake.seen.blocked_on_stream = blocked;
        fake.seen.unread = unread;
        let (pings, cut) = fake.run(at(1), at(1000), Duration::ZERO);
        assert_eq!(cut, None);
        assert!(pings >= 20, "{pings}");
    }
}

#[test]
fn a_server_may_take_as_long_as_its_target_after_the_clients_close() {
    let mut fake = Fake::new(Role::Client);
    assert_eq!(
        fake.enter(Phase::StreamEnded, at(1)),
        Step::Wait(Duration::MAX)
    );
    assert_eq!(fake.at(at(1_000_000)), Step::Wait(Duration::MAX));
}

#[test]
fn behind_both_ends_the_server_has_the_linger_from_its_last_sign_of_life() {
    for (all_ponged, limit) in [(true, TIMES.linger), (false, TIMES.stall_timeout)] {
        let mut fake = Fake::new(Role::Client);
        fake.seen.all_ponged = all_ponged;
        fake.enter(Phase::BothClosed, at(1));
        assert_eq!(fake.run(at(1), at(35), Duration::ZERO), (0, None));
        fake.seen.last_read = at(35);
        let (_, cut) = fake.run(at(35), at(1000), Duration::ZERO);
        assert_eq!(cut, Some((at(35) + limit, Cut::LeftOpen)));
    }
}

#[test]
fn behind_both_ends_no_linger_ends_while_the_server_acknowledges_bytes() {
    let mut fake = Fake::new(Role::Client);
    fake.enter(Phase::BothClosed, at(1));
    let mut now = at(41);
    for left in [100, 99, 1] {
        fake.left = Unacknowledged::Bytes(left);
        assert_eq!(fake.run(now, now + ms(1), Duration::ZERO), (0, None));
        now += TIMES.linger;
    }
    let (_, cut) = fake.run(now, at(1000), Duration::ZERO);
    assert_eq!(cut, Some((now, Cut::LeftOpen)));
}

// The stream has failed, and what it had brought is still being sent

fn failed_at(fake: &mut Fake, now: Duration, left: u64) {
    fake.seen.stream_failed = true;
    fake.seen.last_payload = now;
    fake.left = Unacknowledged::Bytes(left);
}

#[test]
fn a_peer_that_takes_nothing_of_a_failed_stream_holds_it_back_for_as_long_as_a_close_may_take() {
    for phase in [Phase::Open, Phase::PeerClosed] {
        for left in [Unacknowledged::Bytes(9), Unacknowledged::Unknown] {
            both(|mut fake| {
                fake.enter(phase.clone(), at(1));
                failed_at(&mut fake, at(1), 0);
                fake.left = left;
                let mut now = at(1);
                while let step @ (Step::Wait(_) | Step::Look) = fake.at(now) {
                    fake.seen.unacknowledged = Unacknowledged::NotAsked;
                    match step {
                        Step::Wait(until) => now = until,
                        _ => fake.seen.unacknowledged = left,
                    }
                }
                assert_eq!(fake.at(now), Step::HeldBack);
                assert!(now >= at(1) + CLOSE_LIMIT && now <= at(6), "{now:?}");
            });
        }
    }
}

#[test]
fn a_slow_reader_gets_all_that_a_failed_stream_had_brought() {
    both(|mut fake| {
        failed_at(&mut fake, at(1), 0);
        // What is unacknowledged rises where a write goes on, and falls where it is taken.
        for now in (1..28).step_by(2) {
            fake.left = Unacknowledged::Bytes(100 + now % 4);
            assert_eq!(fake.run(at(now), at(now + 2), Duration::ZERO).1, None);
        }
        let mut fake = Fake::new(Role::Daemon);
        for now in 1..28 {
            failed_at(&mut fake, at(now), 100);
            assert_eq!(fake.run(at(now), at(now + 1), Duration::ZERO).1, None);
        }
    });
}

#[test]
fn a_late_wake_moves_the_linger_by_the_lateness() {
    let mut fake = Fake::new(Role::Daemon);
    fake.enter(Phase::StreamEnded, at(1));
    fake.clocks.note_late(at(100));
    let (_, cut) = fake.run(at(110), at(1000), Duration::ZERO);
    assert_eq!(cut, Some((at(141), Cut::Linger)));
    let mut fake = Fake::new(Role::Daemon);
    fake.enter(Phase::StreamEnded, at(1));
    let (_, cut) = fake.run(at(1), at(1000), at(1));
    assert!(cut.is_some_and(|(when, _)| when < at(50)));
}

// The end

#[test]
fn each_phase_of_an_end_has_its_limit() {
    let given = |after_eof, is_given| Phase::PeerBroken {
        after_eof,
        is_given,
    };
    let undelivered = |all_sent| Phase::Aborting { all_sent };
    for (phase, limit, cut) in [
        (Phase::BothClosed, TIMES.linger, Cut::LeftOpen),
        (Phase::Closing, CLOSE_LIMIT, Cut::CloseTimeout),
        (given(false, true), Duration::ZERO, Cut::PeerBroken),
        (given(true, true), Duration::ZERO, Cut::PeerBroken),
        (given(false, false), SETTLE_LIMIT, Cut::PeerBroken),
        (given(true, false), TIMES.stall_timeout, Cut::PeerBroken),
        (undelivered(false), ARRIVAL_LIMIT, Cut::Aborted),
        (undelivered(true), BLIND_ARRIVAL_LIMIT, Cut::Aborted),
    ] {
        for role in ROLES {
            let mut fake = Fake::new(role);
            fake.left = Unacknowledged::Unknown;
            fake.phase = phase.clone();
            fake.seen.changed_at = at(7);
            let (_, ended) = fake.run(at(7), at(1000), Duration::ZERO);
            assert_eq!(ended, Some((at(7) + limit, cut.clone())), "{phase:?}");
        }
    }
}

#[test]
fn what_is_not_delivered_is_told_once_the_peers_bytes_have_arrived() {
    both(|mut fake| {
        let phase = Phase::Aborting { all_sent: true };
        assert_eq!(fake.enter(phase, at(1)), Step::Look);
        fake.seen.unacknowledged = Unacknowledged::Bytes(5);
        assert_eq!(fake.at(at(1)), Step::Wait(at(1) + LOOK_AGAIN.0));
        fake.seen.unacknowledged = Unacknowledged::NotAsked;
        assert_eq!(fake.at(ms(1_005)), Step::Look);
        fake.seen.unacknowledged = Unacknowledged::Bytes(0);
        assert_eq!(fake.at(ms(1_005)), Step::Cut(Cut::Aborted));
    });
}

#[test]
fn a_peer_that_takes_bytes_has_the_limit_of_a_close_for_the_last_of_them() {
    for all_sent in [false, true] {
        for (falls_until, expected) in [
            (at(1), at(1) + ARRIVAL_LIMIT),
            // What was on its way arrives, whether it is read or not.
            (ms(1_100), at(1) + ARRIVAL_LIMIT),
            (ms(1_500), at(1) + CLOSE_LIMIT),
            (at(100), at(1) + CLOSE_LIMIT),
        ] {
            both(|mut fake| {
                fake.enter(Phase::Aborting { all_sent }, at(1));
                let mut now = at(1);
                let cut = loop {
                    let left = 1_000_000 - now.min(falls_until).as_millis() as u64;
                    fake.left = Unacknowledged::Bytes(left);
                    if let (_, Some((when, cut))) = fake.run(now, now + ms(1), Duration::ZERO) {
                        assert_eq!(cut, Cut::Aborted);
                        break when;
                    }
                    now += ms(1);
                };
                assert_eq!(cut, expected, "{all_sent}");
            });
        }
    }
}

#[test]
fn bytes_that_move_lengthen_what_is_counted_from_the_last_of_them() {
    both(|mut fake| {
        fake.enter(Phase::Aborting { all_sent: false }, at(1));
        fake.seen.last_payload = at(2);
        let (_, cut) = fake.run(at(2), at(10), Duration::ZERO);
        assert_eq!(cut, Some((at(2) + ARRIVAL_LIMIT, Cut::Aborted)));
    });
}

#[test]
fn a_shutdown_has_the_limit_of_a_close_from_every_phase() {
    let flags = [false, true];
    let broken = flags.map(|after_eof| Phase::PeerBroken {
        after_eof,
        is_given: false,
    });
    let undelivered = flags.map(|all_sent| Phase::Aborting { all_sent });
    let one_sided = [Phase::Open, Phase::PeerClosed, Phase::StreamEnded];
    let phases = [&one_sided[..], &[Phase::BothClosed], &broken, &undelivered].concat();
    for (role, before) in ROLES
        .into_iter()
        .flat_map(|role| phases.iter().map(move |phase| (role, phase)))
    {
        let mut fake = Fake::new(role);
        fake.enter(before.clone(), ms(100));
        let step = fake.enter(Phase::Closing, ms(200));
        assert_eq!(step, Step::Wait(ms(200) + CLOSE_LIMIT), "{before:?}");
        // Neither a sign of life nor a ping that is due changes that.
        fake.seen.last_read = at(3);
        assert_eq!(fake.at(at(3)), Step::Wait(ms(200) + CLOSE_LIMIT));
        let step = fake.at(ms(200) + CLOSE_LIMIT);
        assert_eq!(step, Step::Cut(Cut::CloseTimeout), "{before:?}");
    }
}

#[test]
fn threads_that_do_not_end_when_cut_are_left() {
    both(|mut fake| {
        let left = at(1) + CUT_LIMIT;
        assert_eq!(fake.enter(Phase::Cut, at(1)), Step::Wait(left));
        assert_eq!(fake.at(left), Step::Leave);
    });
}

// Which phase it is

#[test]
fn the_phase_follows_from_what_has_ended() {
    use FromStreamEnd as From;
    use Phase::{Aborting, BothClosed, Closing, Open, PeerBroken, PeerClosed, StreamEnded};
    use ToStreamEnd as To;
    let broken = |after_eof, is_given| PeerBroken {
        after_eof,
        is_given,
    };
    let aborted = || Some(To::PeerAborted(Some(1011), String::new()));
    let gone = || Some(From::PeerGone(WriteFailure::Closed));
    let failed = || Some(From::StreamFailed("reset".into()));
    let ends = Ends::default;
    let rows = [
        ("nothing", ends(), Open, Open),
        (
            "the peer's Close",
            Ends {
                peer_closed: true,
                ..ends()
            },
            PeerClosed,
            PeerClosed,
        ),
        (
            "the peer's Close, read to its end",
            Ends {
                peer_closed: true,
                to_stream: Some(To::Closed),
                ..ends()
            },
            PeerClosed,
            // The server has closed its connection before we have sent all.
            broken(false, false),
        ),
        (
            "the stream's end",
            Ends {
                from_stream: Some(From::Eof),
                ..ends()
            },
            StreamEnded,
            StreamEnded,
        ),
        (
            "both",
            Ends {
                peer_closed: true,
                from_stream: Some(From::Eof),
                ..ends()
            },
            PeerClosed,
            BothClosed,
        ),
        (
            "another Close",
            Ends {
                to_stream: aborted(),
                ..ends()
            },
            Closing,
            Closing,
        ),
        (
            "what it may not send",
            Ends {
                to_stream: Some(To::Refused(Farewell::Text)),
                ..ends()
            },
            Closing,
            Closing,
        ),
        (
            "the stream failed",
            Ends {
                from_stream: failed(),
                ..ends()
            },
            Closing,
            Closing,
        ),
        (
            "the stream failed, after the peer's Close",
            Ends {
                peer_closed: true,
                from_stream: failed(),
                ..ends()
            },
            Closing,
            Closing,
        ),
        (
            "undelivered",
            Ends {
                undelivered: Some(WriteFailure::Closed),
                ..ends()
            },
            Aborting { all_sent: false },
            Aborting { all_sent: false },
        ),
        (
            "undelivered, as the stream failed",
            Ends {
                undelivered: Some(WriteFailure::Failed("reset".into())),
                from_stream: failed(),
                ..ends()
            },
            Closing,
            Aborting { all_sent: true },
        ),
        (
            "undelivered, and all is sent",
            Ends {
                undelivered: Some(WriteFailure::Closed),
                from_stream: Some(From::Eof),
                ..ends()
            },
            Aborting { all_sent: true },
            Aborting { all_sent: true },
        ),
        (
            "the stream failed, and the peer takes nothing",
            Ends {
                held_back: Some(WriteFailure::Failed("reset".into())),
                ..ends()
            },
            Closing,
            Aborting { all_sent: false },
        ),
        (
            "the stream was closed behind its end, which the peer has yet to take",
            Ends {
                held_back: Some(WriteFailure::Closed),
                ..ends()
            },
            Open,
            Open,
        ),
        (
            "broken",
            Ends {
                peer_broke: true,
                ..ends()
            },
            broken(false, false),
            broken(false, false),
        ),
        (
            "broken behind an EOF",
            Ends {
                peer_broke: true,
                peer_eof: true,
                ..ends()
            },
            broken(true, false),
            broken(true, false),
        ),
        (
            "takes nothing",
            Ends {
                from_stream: gone(),
                ..ends()
            },
            broken(false, false),
            broken(false, false),
        ),
        (
            "vanished",
            Ends {
                to_stream: Some(To::Vanished(None)),
                ..ends()
            },
            broken(false, true),
            broken(false, true),
        ),
        (
            "cut",
            Ends {
                cut: Some(Cut::Stalled),
                is_cut: true,
                ..ends()
            },
            Phase::Cut,
            Phase::Cut,
        ),
        (
            "broken, and cut",
            Ends {
                peer_broke: true,
                cut: Some(Cut::PeerBroken),
                is_cut: true,
                ..ends()
            },
            Phase::Cut,
            Phase::Cut,
        ),
    ];
    for (name, mut ends, daemons, clients) in rows {
        assert_eq!(Phase::of(websocket(Role::Daemon), &ends), daemons, "{name}");
        assert_eq!(Phase::of(websocket(Role::Client), &ends), clients, "{name}");
        // A shutdown comes before everything but a cut.
        ends.cut = Some(Cut::Shutdown);
        ends.is_cut = false;
        for role in ROLES {
            assert_eq!(
                Phase::of(websocket(role), &ends),
                Closing,
                "{name}, shut down"
            );
        }
    }
}

#[test]
fn without_words_what_is_no_orderly_end_is_told_by_a_reset() {
    use Phase::Aborting;
    let told = |all_sent| Aborting { all_sent };
    let refused = || Some(ToStreamEnd::Refused(Farewell::Protocol("x".into())));
    let failed = || Some(FromStreamEnd::StreamFailed("reset".into()));
    for role in ROLES {
        let endpoint = Endpoint {
            role,
            protocol: Protocol::ConnectTcp,
        };
        for (to_stream, from_stream, cut, expected) in [
            (refused(), None, None, told(false)),
            (refused(), Some(FromStreamEnd::Aborted), None, told(true)),
            (None, failed(), None, told(true)),
            (None, None, Some(Cut::Shutdown), told(false)),
        ] {
            let ends = Ends {
                to_stream,
                from_stream,
                cut,
                ..Ends::default()
            };
            assert_eq!(Phase::of(endpoint, &ends), expected, "{ends:?}");
        }
    }
}

#[test]
fn without_pongs_nobody_is_judged_by_silence() {
    for role in ROLES {
        let endpoint = Endpoint {
            role,
            protocol: Protocol::ConnectTcp,
        };
        let mut clocks = Clocks::new(endpoint, TIMES);
        let seen = Seen::default();
        for minutes in 1..1000 {
            let now = at(minutes * 60);
            assert_eq!(clocks.step(now, &seen, &Phase::Open), Step::Ping);
            let next = Step::Wait(now + TIMES.ping_interval);
            assert_eq!(clocks.step(now, &seen, &Phase::Open), next);
        }
        // And half-closed, either way.
        let now = at(100_000);
        assert_eq!(clocks.step(now, &seen, &Phase::PeerClosed), Step::Ping);
        let never = Step::Wait(Duration::MAX);
        assert_eq!(clocks.step(now, &seen, &Phase::StreamEnded), never);
    }
}

// The idle timeout

const IDLE: Duration = Duration::from_secs(600);

fn idle_clocks(idle_timeout: Option<Duration>) -> Clocks {
    let times = Times {
        idle_timeout,
        ..TIMES
    };
    Clocks::new(websocket(Role::Daemon), times)
}

/// Runs the clocks of a tunnel whose client answers every ping and whose last byte moved at `last_payload`, until
/// `end`. When and why they cut it.
fn idle_cut(
    clocks: &mut Clocks,
    phase: &Phase,
    last_payload: Duration,
    end: Duration,
) -> Option<(Duration, Cut)> {
    let mut now = Duration::ZERO;
    let mut seen = Seen {
        last_payload,
        all_ponged: true,
        ..Seen::default()
    };
    while now < end {
        match clocks.step(now, &seen, phase) {
            Step::Wait(until) => {
                assert!(until > now, "{until:?}");
                now = until.min(now + at(1));
            }
            Step::Ping => {
                seen.ping_written = now;
                seen.last_read = now;
            }
            Step::LookAtBoth => seen.on_their_way = Unacknowledged::Bytes(0),
            Step::Cut(cut) => return Some((now, cut)),
            step => unreachable!("{step:?} at {now:?}"),
        }
    }
    None
}

/// What is seen of a tunnel in which nothing is on its way.
fn nothing_on_its_way() -> Seen {
    Seen {
        on_their_way: Unacknowledged::Bytes(0),
        ..Seen::default()
    }
}

#[test]
fn an_idle_tunnel_is_ended_in_every_state_that_could_last() {
    for phase in [Phase::Open, Phase::PeerClosed, Phase::StreamEnded] {
        for last_payload in [Duration::ZERO, at(100)] {
            let mut clocks = idle_clocks(Some(IDLE));
            let ended = idle_cut(&mut clocks, &phase, last_payload, at(10_000));
            assert_eq!(ended, Some((last_payload + IDLE, Cut::Idle)), "{phase:?}");
        }
    }
}

#[test]
fn no_wait_is_longer_than_the_idle_timeout() {
    for phase in [Phase::Open, Phase::PeerClosed] {
        for (idle_timeout, waits) in [(at(10), at(10)), (IDLE, TIMES.ping_interval)] {
            let step = idle_clocks(Some(idle_timeout)).step(at(1), &nothing_on_its_way(), &phase);
            assert_eq!(step, Step::Wait(waits), "{phase:?}");
        }
    }
}

#[test]
fn a_tunnel_is_looked_at_before_it_is_idle() {
    for phase in [Phase::Open, Phase::PeerClosed, Phase::StreamEnded] {
        let mut clocks = idle_clocks(Some(at(20)));
        let mut seen = Seen::default();
        assert_eq!(clocks.step(at(5), &seen, &phase), Step::LookAtBoth);
        seen.on_their_way = Unacknowledged::Bytes(7);
        let step = clocks.step(at(5), &seen, &phase);
        assert_eq!(step, Step::Wait(at(10)), "{phase:?}");
    }
    let closing = idle_clocks(Some(at(20))).step(at(30), &Seen::default(), &Phase::Closing);
    assert_ne!(closing, Step::LookAtBoth);
}

#[test]
fn without_an_idle_timeout_a_silent_tunnel_stays() {
    for phase in [Phase::Open, Phase::PeerClosed] {
        let ended = idle_cut(&mut idle_clocks(None), &phase, Duration::ZERO, at(100_000));
        assert_eq!(ended, None, "{phase:?}");
    }
}

#[test]
fn time_in_which_the_daemon_stood_still_is_not_idle_time() {
    let mut clocks = idle_clocks(Some(IDLE));
    let seen = nothing_on_its_way();
    clocks.note_late(at(3600));
    let step = clocks.step(at(3600), &seen, &Phase::PeerClosed);
    assert!(matches!(step, Step::Wait(_)), "{step:?}");
    let step = clocks.step(at(3600) + IDLE, &seen, &Phase::PeerClosed);
    assert_eq!(step, Step::Cut(Cut::Idle));
    // And only once.
    let moved = Seen {
        last_payload: at(3600) + IDLE,
        ..seen
    };
    let step = clocks.step(at(3600) + IDLE * 2, &moved, &Phase::PeerClosed);
    assert_eq!(step, Step::Cut(Cut::Idle));
}

#[test]
fn a_peer_that_is_dead_is_not_idle() {
    let mut clocks = idle_clocks(Some(at(36)));
    let mut seen = Seen {
        all_ponged: true,
        ..nothing_on_its_way()
    };
    assert_eq!(clocks.step(at(30), &seen, &Phase::Open), Step::Ping);
    seen.ping_written = at(30);
    let wait = clocks.step(at(30), &seen, &Phase::Open);
    assert_eq!(wait, Step::Wait(at(35)));
    let step = clocks.step(at(36), &seen, &Phase::Open);
    assert_eq!(step, Step::Cut(Cut::PongTimeout));
}
