//! The tables of ends, without a socket.

use super::*;

use FromStreamEnd as From;
use ToStreamEnd as To;

fn failed(why: &str) -> WriteFailure {
    WriteFailure::Failed(why.into())
}

/// Both directions have ended like this.
fn ends(to_stream: To, from_stream: From) -> Ends {
    Ends {
        to_stream: Some(to_stream),
        from_stream: Some(from_stream),
        ..Ends::default()
    }
}

fn cut(ends: Ends, cut: Cut) -> Ends {
    let cut = Some(cut);
    Ends { cut, ..ends }
}

fn closed(ends: Ends) -> Ends {
    let peer_closed = true;
    Ends {
        peer_closed,
        ..ends
    }
}

fn failed_first(ends: Ends) -> Ends {
    Ends {
        stream_failed_first: true,
        ..ends
    }
}

fn undelivered(ends: Ends, why: WriteFailure) -> Ends {
    let undelivered = Some(why);
    Ends {
        undelivered,
        ..ends
    }
}

fn peer_failed(ends: Ends, why: &str) -> Ends {
    Ends {
        peer_broke: true,
        peer_failure: Some(why.into()),
        ..ends
    }
}

fn reset() -> From {
    From::StreamFailed("target failed: reset".into())
}

fn gone() -> Ends {
    ends(To::Vanished(None), From::PeerGone(WriteFailure::Closed))
}

fn aborted(code: u16, reason: &str) -> To {
    To::PeerAborted(Some(code), reason.into())
}

fn text() -> To {
    To::Refused(Farewell::Text)
}

fn protocol() -> To {
    To::Refused(Farewell::Protocol("a reserved bit".into()))
}

/// What was seen; the end, the reason and whether the peer may still be reading.
type Row = (Ends, End, &'static str, bool);

fn websocket(role: Role) -> Endpoint {
    Endpoint {
        role,
        protocol: Protocol::WebSocket,
    }
}

fn check(role: Role, rows: Vec<Row>) -> Vec<End> {
    let check = |(ends, end, reason, peer_is_there): Row| {
        let expected = Outcome {
            end,
            reason: reason.into(),
            peer_is_there,
        };
        assert_eq!(
            outcome(websocket(role), &ends),
            expected,
            "{role:?}: {ends:?}"
        );
        end
    };
    rows.into_iter().map(check).collect()
}

#[test]
fn how_a_tunnel_ended_for_the_daemon() {
    use End::*;
    let named = check(
        Role::Daemon,
        vec![
            (
                closed(ends(To::Closed, From::Eof)),
                Orderly,
                "closed in order",
                true,
            ),
            // A client that has both ends may close its connection as it likes.
            (
                peer_failed(closed(ends(To::Closed, From::Eof)), "reset by peer"),
                Orderly,
                "closed in order",
                true,
            ),
            (
                ends(To::Closed, reset()),
                StreamFailed,
                "target failed: reset",
                true,
            ),
            (
                ends(To::Vanished(None), reset()),
                StreamFailed,
                "target failed: reset",
                true,
            ),
            // Whatever the client answers to the Close that tells it.
            (
                failed_first(closed(ends(To::Closed, reset()))),
                StreamFailed,
                "target failed: reset",
                true,
            ),
            (
                failed_first(ends(aborted(1011, ""), reset())),
                StreamFailed,
                "target failed: reset",
                true,
            ),
            (
                closed(ends(To::Closed, reset())),
                FailedAfterClose,
                "target failed: reset, after the client's end",
                true,
            ),
            (
                undelivered(
                    cut(ends(To::Vanished(None), From::Eof), Cut::Aborted),
                    WriteFailure::Closed,
                ),
                CutShort,
                "upload cut short: target closed",
                false,
            ),
            (
                undelivered(
                    cut(
                        ends(To::Vanished(None), From::PeerGone(WriteFailure::Closed)),
                        Cut::Aborted,
                    ),
                    failed("target failed: reset"),
                ),
                StreamFailed,
                "target failed: reset",
                false,
            ),
            // All that it sent has come, but it did not all go on.
            (
                undelivered(
                    closed(ends(To::Closed, From::Eof)),
                    failed("target failed: timed out"),
                ),
                CutShort,
                "upload cut short: target failed: timed out",
                false,
            ),
            (
                ends(aborted(1011, "oops"), From::Aborted),
                PeerAborted,
                "client closed with code 1011 \"oops\"",
                true,
            ),
            // Its reason is shown quoted, as it is anybody's.
            (
                ends(aborted(4000, "a\nb"), From::Eof),
                PeerAborted,
                "client closed with code 4000 \"a\\nb\"",
                true,
            ),
            (
                gone(),
                PeerVanished,
                "client vanished: its connection ended without a Close",
                false,
            ),
            (
                ends(To::Vanished(Some("reset".into())), From::Eof),
                PeerVanished,
                "client vanished: reset",
                false,
            ),
            (
                closed(ends(To::Closed, From::PeerGone(WriteFailure::Closed))),
                PeerVanished,
                "client vanished: it closed its connection before the target's end",
                false,
            ),
            (
                closed(ends(To::Closed, From::PeerGone(failed("broken")))),
                PeerVanished,
                "client vanished: broken",
                false,
            ),
            (
                peer_failed(cut(gone(), Cut::PeerBroken), "reset by peer"),
                PeerVanished,
                "client vanished: reset by peer",
                false,
            ),
            (
                cut(gone(), Cut::PongTimeout),
                PeerVanished,
                "client vanished: no pong within the ping timeout",
                false,
            ),
            (
                cut(gone(), Cut::Stalled),
                PeerVanished,
                "client vanished: no sign of life within the stall timeout",
                false,
            ),
            (
                cut(ends(To::Vanished(None), From::Aborted), Cut::CloseTimeout),
                PeerVanished,
                "client did not take its Close in time",
                false,
            ),
            (
                ends(text(), From::Aborted),
                ProtocolError,
                "client broke the protocol: binary frames only (websocat: --binary)",
                true,
            ),
            (
                ends(protocol(), From::Eof),
                ProtocolError,
                "client broke the protocol: a reserved bit",
                true,
            ),
            (
                cut(ends(To::Vanished(None), From::Eof), Cut::Linger),
                Linger,
                "client sent no Close and gave no sign of life within the linger",
                true,
            ),
            (
                cut(
                    ends(To::PeerAborted(Some(1001), String::new()), From::Aborted),
                    Cut::Idle,
                ),
                Idle,
                "no byte has moved within the idle timeout",
                true,
            ),
            (
                cut(ends(To::Vanished(None), From::Aborted), Cut::Shutdown),
                Shutdown,
                "the daemon is shutting down",
                true,
            ),
            (
                cut(closed(ends(To::Closed, From::Aborted)), Cut::Shutdown),
                Shutdown,
                "the daemon is shutting down",
                true,
            ),
            (
                ends(To::Panicked, From::Eof),
                InternalError,
                "internal error",
                false,
            ),
            (
                ends(To::Closed, From::Panicked),
                InternalError,
                "internal error",
                false,
            ),
            (
                ends(To::NeverStarted, From::Aborted),
                InternalError,
                "internal error",
                false,
            ),
            // A panic is told before all that follows from it.
            (
                undelivered(
                    cut(ends(To::Panicked, reset()), Cut::Shutdown),
                    WriteFailure::Closed,
                ),
                InternalError,
                "internal error",
                false,
            ),
        ],
    );
    for end in End::ALL {
        assert!(named.contains(&end), "{end:?} has no row");
    }
}

#[test]
fn how_a_tunnel_ended_for_the_client() {
    use End::*;
    let local_failed = || From::StreamFailed("the local client failed: reset".into());
    let named = check(
        Role::Client,
        vec![
            (
                closed(ends(To::Closed, From::Eof)),
                Orderly,
                "closed in order",
                true,
            ),
            // Nobody has said that our bytes have arrived.
            (
                cut(closed(ends(To::Closed, From::Eof)), Cut::LeftOpen),
                PeerVanished,
                "the server did not close its connection behind both ends: it may not have taken every byte",
                false,
            ),
            // The server has not seen our end.
            (
                peer_failed(closed(ends(To::Closed, From::Eof)), "reset by peer"),
                PeerVanished,
                "not every byte could be sent: reset by peer",
                false,
            ),
            (
                ends(To::Vanished(None), local_failed()),
                StreamFailed,
                "the local client failed: reset",
                true,
            ),
            (
                closed(ends(To::Vanished(None), local_failed())),
                FailedAfterClose,
                "the local client failed: reset, after the server's end",
                true,
            ),
            // The target's reset behind our end, as told by the daemon.
            (
                ends(aborted(1011, "target failed: reset"), From::Eof),
                FailedAfterClose,
                "target failed: reset (close code 1011)",
                true,
            ),
            (
                ends(aborted(1011, "target failed: reset"), From::Aborted),
                PeerAborted,
                "target failed: reset (close code 1011)",
                true,
            ),
            (
                ends(aborted(1001, ""), From::Eof),
                PeerAborted,
                "the server closed it (close code 1001)",
                true,
            ),
            (
                ends(To::PeerAborted(None, String::new()), From::Eof),
                PeerAborted,
                "the server closed it without saying why",
                true,
            ),
            (
                undelivered(cut(gone(), Cut::Aborted), WriteFailure::Closed),
                CutShort,
                "the local client has closed its connection",
                false,
            ),
            (
                undelivered(gone(), failed("cannot write to stdout: no space")),
                CutShort,
                "cannot write to stdout: no space",
                false,
            ),
            (
                gone(),
                PeerVanished,
                "the server's connection ended without a Close",
                false,
            ),
            (
                ends(To::Vanished(Some("reset".into())), From::Eof),
                PeerVanished,
                "the server's connection failed: reset",
                false,
            ),
            // Its Close has come, but not all of ours went out.
            (
                closed(ends(To::Closed, From::PeerGone(WriteFailure::Closed))),
                PeerVanished,
                "not every byte could be sent: the server has closed its connection",
                false,
            ),
            (
                closed(ends(To::Closed, From::PeerGone(failed("reset")))),
                PeerVanished,
                "not every byte could be sent: reset",
                false,
            ),
            (
                cut(gone(), Cut::PongTimeout),
                PeerVanished,
                "the server gave no sign of life, nor answered a ping",
                false,
            ),
            (
                cut(gone(), Cut::Stalled),
                PeerVanished,
                "the server gave no sign of life for 5 minutes",
                false,
            ),
            (
                ends(text(), From::Aborted),
                ProtocolError,
                "the server sent a text message: is it a tunneld?",
                true,
            ),
            (
                ends(protocol(), From::Aborted),
                ProtocolError,
                "the server broke the protocol: a reserved bit",
                true,
            ),
            (
                cut(ends(To::Vanished(None), From::Eof), Cut::Linger),
                Linger,
                "the server sent no Close and gave no sign of life within the linger",
                true,
            ),
            (
                cut(gone(), Cut::Idle),
                Idle,
                "no byte has moved within the idle timeout",
                true,
            ),
            (
                cut(gone(), Cut::Shutdown),
                Shutdown,
                "the daemon is shutting down",
                true,
            ),
            (
                ends(To::Panicked, From::Aborted),
                InternalError,
                "internal error",
                false,
            ),
            (
                ends(To::Closed, From::Panicked),
                InternalError,
                "internal error",
                false,
            ),
        ],
    );
    for end in End::ALL {
        assert!(named.contains(&end), "{end:?} has no row");
    }
}

#[test]
fn a_close_that_was_not_taken_in_time_is_the_peers_end() {
    for (role, reason) in [
        (Role::Daemon, "client did not take its Close in time"),
        (Role::Client, "the server did not take its Close in time"),
    ] {
        let ends = cut(ends(To::Closed, From::Eof), Cut::CloseTimeout);
        check(role, vec![(ends, End::PeerVanished, reason, false)]);
    }
}

#[test]
fn each_label_names_one_end() {
    let labels = End::ALL.map(End::label);
    assert_eq!(
        labels,
        [
            "orderly",
            "target_failed",
            "target_failed_after_close",
            "upload_cut_short",
            "client_aborted",
            "client_vanished",
            "protocol_error",
            "linger",
            "shutdown",
            "idle",
            "internal_error"
        ]
    );
}

#[test]
fn what_the_peer_is_told() {
    for (farewell, code, reason) in [
        (Farewell::Orderly, 1000, ""),
        (
            Farewell::StreamFailed("target failed: reset".into()),
            1011,
            "target failed: reset",
        ),
        (Farewell::Shutdown, 1001, "the daemon is shutting down"),
        (Farewell::Idle, 1001, "idle"),
        (
            Farewell::Text,
            1003,
            "binary frames only (websocat: --binary)",
        ),
        (
            Farewell::Protocol("a reserved bit".into()),
            1002,
            "a reserved bit",
        ),
        (Farewell::Answer(4000), 4000, ""),
    ] {
        assert_eq!(farewell.close(), (code, reason));
    }
}

#[test]
fn how_a_tunnel_without_words_ended() {
    use End::*;
    let of = |role, ends: Ends| {
        let endpoint = Endpoint {
            role,
            protocol: Protocol::ConnectTcp,
        };
        let Outcome {
            end,
            reason,
            peer_is_there,
        } = outcome(endpoint, &ends);
        assert_eq!(peer_is_there, end == Orderly, "{ends:?}");
        (end, reason)
    };
    let bare = |from| ends(To::Vanished(None), from);
    for (role, ends, end, reason) in [
        (
            Role::Daemon,
            closed(ends(To::Closed, From::Eof)),
            Orderly,
            "closed in order",
        ),
        (
            Role::Daemon,
            bare(From::Aborted),
            PeerVanished,
            "client vanished: its connection ended without FINAL_DATA",
        ),
        (
            Role::Daemon,
            bare(reset()),
            StreamFailed,
            "target failed: reset",
        ),
        (
            Role::Daemon,
            ends(protocol(), From::Aborted),
            ProtocolError,
            "client broke the protocol: a reserved bit",
        ),
        (
            Role::Client,
            closed(ends(To::Closed, From::Eof)),
            Orderly,
            "closed in order",
        ),
        (
            Role::Client,
            ends(To::Vanished(Some("reset".into())), From::Aborted),
            PeerVanished,
            "the target or the server broke it off: reset",
        ),
        // As a failure of the target behind our own end.
        (
            Role::Client,
            ends(To::Vanished(Some("reset".into())), From::Eof),
            FailedAfterClose,
            "the target or the server broke it off: reset",
        ),
    ] {
        assert_eq!(of(role, ends), (end, reason.into()));
    }
}

#[test]
fn which_close_is_an_orderly_end() {
    for (code, of_client, of_daemon) in [
        (Some(1000), true, true),
        (None, true, false),
        (Some(1001), false, false),
        (Some(1011), false, false),
        (Some(3000), false, false),
        (Some(4999), false, false),
    ] {
        assert_eq!(Role::Daemon.is_orderly(code), of_client, "{code:?}");
        assert_eq!(Role::Client.is_orderly(code), of_daemon, "{code:?}");
    }
}

#[test]
fn what_differs_between_the_two_ends() {
    let of = |role, protocol| {
        let endpoint = Endpoint { role, protocol };
        [
            endpoint.masks(),
            endpoint.role.peer_masks(),
            endpoint.tells_failures(),
            endpoint.reads_after_end(),
            endpoint.waits_for_end(),
            endpoint.role.waits_for_eof(),
            endpoint.answers_behind_close(),
        ]
    };
    for (role, protocol, expected) in [
        (
            Role::Daemon,
            Protocol::WebSocket,
            [false, true, true, false, false, false, false],
        ),
        (
            Role::Client,
            Protocol::WebSocket,
            [true, false, false, true, true, true, true],
        ),
        (
            Role::Daemon,
            Protocol::ConnectTcp,
            [false, true, false, true, true, false, false],
        ),
        (
            Role::Client,
            Protocol::ConnectTcp,
            [false, false, false, true, true, true, false],
        ),
    ] {
        assert_eq!(of(role, protocol), expected, "{role:?} {protocol:?}");
    }
}

#[test]
fn a_tunnel_is_over_when_both_directions_are() {
    let both = ends(To::Closed, From::Eof);
    assert!(both.are_over());
    let (to_stream, from_stream) = (both.to_stream, both.from_stream);
    for (to_stream, from_stream) in [(to_stream, None), (None, from_stream), (None, None)] {
        let ends = Ends {
            to_stream,
            from_stream,
            ..Ends::default()
        };
        assert!(!ends.are_over(), "{ends:?}");
    }
}

#[test]
fn a_stream_that_breaks_between_its_own_end_and_the_peers_was_closed_early() {
    let broke = |ends| Ends {
        stream_broke: true,
        ..ends
    };
    let ended = || Ends {
        from_stream: Some(From::Eof),
        ..Ends::default()
    };
    assert!(broke(ended()).is_stream_closed_early());
    for ends in [
        Ends::default(),
        ended(),
        broke(Ends::default()),
        broke(closed(ended())),
        broke(gone()),
        broke(ends(To::Closed, reset())),
    ] {
        assert!(!ends.is_stream_closed_early(), "{ends:?}");
    }
}

#[test]
fn what_broke_the_stream_comes_before_what_followed_from_that() {
    let reset = || From::StreamFailed("reset".into());
    let ended = |held_back: Option<WriteFailure>, end: From| {
        let mut ends = Ends {
            held_back,
            stream_erred: true,
            ..Ends::default()
        };
        assert_eq!(ends.is_failure_unseen(), ends.held_back.is_none());
        ends.end_from_stream(end);
        assert!(!ends.is_failure_unseen());
        ends.from_stream
    };
    for end in [From::PeerGone(WriteFailure::Closed), From::Aborted] {
        assert_eq!(ended(Some(failed("reset")), end.clone()), Some(reset()));
        for held_back in [None, Some(WriteFailure::Closed)] {
            assert_eq!(ended(held_back, end.clone()), Some(end.clone()));
        }
    }
    for end in [reset(), From::Eof, From::Panicked] {
        assert_eq!(ended(Some(failed("other")), end.clone()), Some(end));
    }
}

#[test]
fn a_failed_write_alone_was_told_of_the_peers_reset() {
    let told = |from_stream| ends(To::Vanished(None), from_stream).was_reset_in_write();
    assert!(told(From::PeerGone(failed("reset"))));
    for from_stream in [
        From::PeerGone(WriteFailure::Closed),
        From::PeerGone(WriteFailure::Aborted),
        From::Eof,
        reset(),
    ] {
        assert!(!told(from_stream.clone()), "{from_stream:?}");
    }
    assert!(!Ends::default().was_reset_in_write());
}
