//! A tunnel: three threads between two sockets, and how it ends.
//!
//! ```text
//! inbound.rs    thread 1  WebSocket ─▶ target     through frames.rs, which finds the bytes in the frames
//! outbound.rs   thread 2  target ─▶ WebSocket     the only one that waits in a write to the client
//! keepalive.rs  thread 3  pings, and every deadline
//! client.rs     the client's socket as it is written to      target.rs   the target's socket
//! state.rs      what the threads know of each other          turns.rs    who writes, and what is due
//! ```
//!
//! A direction ends alone; a tunnel, when both have. "RST" is what the target gets when its socket is
//! closed after [`TargetSocket::break_off`]; each arrow is one value of [`InboundEnd`], [`OutboundEnd`] or
//! [`Cut`].
//!
//! ```text
//!            ┌───────────────────────────── both open ─────────────────────────────┐
//!            │ Close from        │ EOF of         │ reset of       │ text, protocol │ client vanished,
//!            │ the client        │ the target     │ the target     │ error          │ or given up
//!            ▼                   ▼                ▼                ▼                ▼
//!     FIN to the target   Close 1000 to    Close 1011 to    break off,       break off, wake
//!     outbound goes on    the client,      the client,      Close 1003       both
//!            │            inbound goes on  inbound drops    or 1002             │
//!            │ EOF of the        │         what comes          │                │
//!            │ target            │ Close from   │ Close from   │                │
//!            ▼                   ▼ the client   ▼ the client   ▼                ▼
//!       Close 1000        FIN to the target  ended: RST     ended: RST       ended: RST
//!            └── ended in order ─┘
//! ```
//!
//! From every state but the first, [`Times::linger`] without a byte moved leads to the end (Close 1011, RST);
//! from every state, a shutdown does (Close 1001, RST).

pub mod client;
pub mod frames;
pub mod inbound;
pub mod keepalive;
pub mod outbound;
pub mod state;
pub mod target;
pub mod turns;

use std::fmt;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rustix::net::sockopt;
use socket2::SockRef;

use crate::config::Times;
use crate::threads::Threads;
use client::ClientWriter;
use keepalive::Keepalive;
use state::{Cut, Ends, InboundEnd, OutboundEnd, State, Undelivered};
use target::TargetSocket;

/// A tunnel's threads need few frames; a page of a stack is touched, besides the one with what is local to the
/// thread.
const STACK: usize = 64 * 1024;

/// How much may wait unsent in the client's buffer, in bytes (`TCP_NOTSENT_LOWAT`, tcp(7)). A write that waits
/// goes on when half of it has left, so that a slow reader is seen to take bytes. By default that is a third
/// of a buffer that grows to megabytes, longer than the linger at 20 KiB/s; and a ping would wait behind it.
const CLIENT_UNSENT: u32 = 128 * 1024;

/// The same for the target. It is larger, as each wait costs inbound two system calls, and nothing waits behind
/// the bytes.
const TARGET_UNSENT: u32 = 1024 * 1024;

/// How a tunnel ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// In a word.
    pub end: End,
    /// For the log.
    pub reason: String,
    /// The client may still be reading what it was sent.
    pub client_is_there: bool,
}

/// How a tunnel ended, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both directions ended in order, and every byte was delivered.
    Orderly,
    /// The target reset, or its connection failed.
    TargetFailed,
    /// The target closed before it had been given everything.
    UploadCutShort,
    /// The client's connection failed, ended without a Close, or was given up.
    ClientVanished,
    /// The client sent what it may not.
    ProtocolError,
    /// One direction had ended and nothing moved for the linger.
    Linger,
    /// The daemon shut down.
    Shutdown,
    /// A thread panicked.
    InternalError,
}

impl End {
    /// Every one.
    pub const ALL: [End; 8] = [
        End::Orderly,
        End::TargetFailed,
        End::UploadCutShort,
        End::ClientVanished,
        End::ProtocolError,
        End::Linger,
        End::Shutdown,
        End::InternalError,
    ];

    /// For a metric.
    pub fn label(self) -> &'static str {
        match self {
            End::Orderly => "orderly",
            End::TargetFailed => "target_failed",
            End::UploadCutShort => "upload_cut_short",
            End::ClientVanished => "client_vanished",
            End::ProtocolError => "protocol_error",
            End::Linger => "linger",
            End::Shutdown => "shutdown",
            End::InternalError => "internal_error",
        }
    }
}

/// The threads of tunnels. A connection is led to its tunnel on another thread, as that takes a deep
/// stack, whose pages would stay for as long as the tunnel.
#[derive(Debug)]
pub struct TunnelThreads {
    inbound: Threads,
    outbound: Threads,
    keepalive: Threads,
}

impl Default for TunnelThreads {
    fn default() -> Self {
        TunnelThreads {
            inbound: Threads::new("inbound", STACK),
            outbound: Threads::new("outbound", STACK),
            keepalive: Threads::new("keepalive", STACK),
        }
    }
}

/// The two sockets of a tunnel.
#[derive(Debug)]
pub struct Sockets {
    /// The client's, at the end of its request head.
    pub client: Arc<TcpStream>,
    /// What the client sent behind its request head.
    pub early: Vec<u8>,
    /// The target's.
    pub target: TargetSocket,
}

/// Relays between two sockets, on three threads, until both directions have ended; and closes the target's.
/// `open`, called once everything is ready, sends the 101. `ended` is called with the outcome.
///
/// # Errors
/// When a thread can't start. Then nothing has been sent to the client, and `ended` is not called.
pub fn start(
    threads: &TunnelThreads,
    sockets: Sockets,
    times: Times,
    state: &Arc<State>,
    open: impl FnOnce() -> io::Result<()>,
    ended: impl FnOnce(&Outcome) + Send + 'static,
) -> io::Result<()> {
    let Sockets {
        client,
        early,
        target,
    } = sockets;
    limit_unsent(&client, CLIENT_UNSENT);
    let tunnel = Arc::new(Tunnel {
        writer: ClientWriter::new(Arc::clone(&client), Arc::clone(state)),
        client,
        target,
        state: Arc::clone(state),
    });
    // Nothing may go out before the 101.
    let turn = tunnel.writer.hold();
    let inbound = {
        let tunnel = Arc::clone(&tunnel);
        move || {
            tunnel.inbound(early);
            ended(&tunnel.wait_and_close());
        }
    };
    if let Err(error) = tunnel.start(threads, times, inbound) {
        turn.forbid();
        tunnel.send_home();
        return Err(error);
    }
    if open().is_err() {
        tunnel.wake_all();
    }
    drop(turn);
    // A pong may have become due meanwhile.
    tunnel.writer.flush();
    Ok(())
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

/// What the threads of a tunnel share.
struct Tunnel {
    client: Arc<TcpStream>,
    target: TargetSocket,
    writer: ClientWriter,
    state: Arc<State>,
}

impl Tunnel {
    fn start(
        self: &Arc<Self>,
        threads: &TunnelThreads,
        times: Times,
        inbound: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let tunnel = Arc::clone(self);
        threads.outbound.run(move || tunnel.outbound())?;
        let tunnel = Arc::clone(self);
        threads.keepalive.run(move || tunnel.keepalive(times))?;
        threads.inbound.run(inbound)
    }

    fn inbound(&self, early: Vec<u8>) {
        let relay = || inbound::relay(&self.client, early, &self.target, &self.writer, &self.state);
        let end = caught(relay).unwrap_or(InboundEnd::Panicked);
        log::debug!("inbound ended: id={} how={end:?}", self.state.id);
        match &end {
            InboundEnd::Close | InboundEnd::CloseUndelivered(_) => {}
            InboundEnd::Refused(code, why) => {
                self.writer.set_close(*code, why);
                self.target.break_off();
            }
            InboundEnd::Vanished(_) | InboundEnd::Panicked => self.wake_all(),
        }
        self.state.note_end(|ends| ends.inbound = Some(end));
    }

    fn outbound(&self) {
        let end =
            caught(|| outbound::relay(&self.target, &self.writer)).unwrap_or(OutboundEnd::Panicked);
        log::debug!("outbound ended: id={} how={end:?}", self.state.id);
        if end == OutboundEnd::Panicked {
            self.wake_all();
        }
        self.state.note_end(|ends| ends.outbound = Some(end));
    }

    fn keepalive(&self, times: Times) {
        let keepalive =
            Keepalive::new(&self.client, &self.target, &self.writer, &self.state, times);
        if caught(|| keepalive.run()).is_none() {
            self.wake_all();
        }
    }

    /// Ends both directions at once. The client first, so that no Close pretends that it is still there.
    fn wake_all(&self) {
        let _ = self.client.shutdown(Shutdown::Both);
        self.target.break_off();
    }

    fn wait_and_close(&self) -> Outcome {
        let outcome = outcome(&self.state.wait_for_end());
        if outcome.end == End::Orderly {
            self.target.close_in_order();
        } else {
            self.target.break_off();
        }
        outcome
    }

    /// Ends the threads that did start.
    fn send_home(&self) {
        self.target.break_off();
        self.state.note_end(|ends| {
            ends.inbound = Some(InboundEnd::Panicked);
            ends.outbound.get_or_insert(OutboundEnd::Panicked);
        });
    }
}

/// The panic itself is reported by the panic hook.
fn caught<T>(run: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(run)).ok()
}

/// How a tunnel ended, from how its directions did.
fn outcome(ends: &Ends) -> Outcome {
    let ended = |end, reason| Outcome {
        end,
        reason,
        client_is_there: !matches!(end, End::ClientVanished | End::InternalError),
    };
    match (&ends.inbound, &ends.outbound, ends.cut) {
        (Some(InboundEnd::Panicked), _, _) | (_, Some(OutboundEnd::Panicked), _) => {
            ended(End::InternalError, "internal error".into())
        }
        (_, _, Some(cut @ (Cut::PongTimeout | Cut::Stalled | Cut::PingFailed))) => {
            ended(End::ClientVanished, cut.to_string())
        }
        (Some(InboundEnd::Refused(_, why)), _, _) => ended(
            End::ProtocolError,
            format!("client broke the protocol: {why}"),
        ),
        // Once cut, it would be broken off instead: it had failed before.
        (_, Some(OutboundEnd::TargetFailed(why)), _) => {
            ended(End::TargetFailed, format!("target failed: {why}"))
        }
        (_, _, Some(cut @ Cut::Linger)) => ended(End::Linger, cut.to_string()),
        (_, _, Some(cut @ Cut::Shutdown)) => ended(End::Shutdown, cut.to_string()),
        (Some(InboundEnd::Vanished(why)), _, _) | (_, Some(OutboundEnd::ClientGone(why)), _) => {
            ended(End::ClientVanished, format!("client vanished: {why}"))
        }
        (Some(InboundEnd::CloseUndelivered(why)), _, _) => {
            ended(End::UploadCutShort, format!("upload cut short: {why}"))
        }
        (Some(InboundEnd::Close), Some(OutboundEnd::Eof), None) => {
            ended(End::Orderly, "closed in order".into())
        }
        _ => ended(End::InternalError, "broken off".into()),
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cut::PongTimeout => "client vanished: no pong within the ping timeout",
            Cut::Stalled => "client vanished: no sign of life within the stall timeout",
            Cut::PingFailed => "client vanished: its connection failed",
            Cut::Linger => "nothing moved within the linger after one direction had ended",
            Cut::Shutdown => "the daemon is shutting down",
        })
    }
}

impl fmt::Display for Undelivered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Undelivered::TargetClosed => f.write_str("target closed"),
            Undelivered::TargetFailed(why) => write!(f, "target failed: {why}"),
            Undelivered::BrokenOff => f.write_str("broken off"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tungstenite::protocol::frame::coding::CloseCode;

    fn reason(inbound: InboundEnd, outbound: OutboundEnd, cut: Option<Cut>) -> (String, bool) {
        let ends = Ends {
            inbound: Some(inbound),
            outbound: Some(outbound),
            cut,
            shutdown: false,
            first: None,
        };
        let outcome = outcome(&ends);
        (outcome.reason, outcome.end == End::Orderly)
    }

    #[test]
    fn only_two_orderly_ends_make_an_orderly_tunnel() {
        let orderly = ("closed in order".to_owned(), true);
        assert_eq!(reason(InboundEnd::Close, OutboundEnd::Eof, None), orderly);
        let why = || "why".to_owned();
        for (inbound, outbound, cut, expected) in [
            (
                InboundEnd::Close,
                OutboundEnd::Eof,
                Some(Cut::Linger),
                "nothing moved",
            ),
            (
                InboundEnd::Close,
                OutboundEnd::BrokenOff,
                Some(Cut::Shutdown),
                "the daemon",
            ),
            (
                InboundEnd::Close,
                OutboundEnd::TargetFailed(why()),
                None,
                "target failed: why",
            ),
            (
                InboundEnd::Close,
                OutboundEnd::ClientGone(why()),
                None,
                "client vanished: why",
            ),
            (
                InboundEnd::CloseUndelivered(Undelivered::TargetClosed),
                OutboundEnd::Eof,
                None,
                "upload cut short: target closed",
            ),
            (
                InboundEnd::Vanished(why()),
                OutboundEnd::BrokenOff,
                None,
                "client vanished: why",
            ),
            (
                InboundEnd::Vanished(why()),
                OutboundEnd::Eof,
                Some(Cut::PongTimeout),
                "client vanished: no pong",
            ),
            (
                InboundEnd::Refused(CloseCode::Protocol, why()),
                OutboundEnd::Eof,
                Some(Cut::Linger),
                "client broke the protocol: why",
            ),
            (
                InboundEnd::Panicked,
                OutboundEnd::Eof,
                None,
                "internal error",
            ),
        ] {
            let (reason, is_orderly) = reason(inbound, outbound, cut);
            assert!(reason.starts_with(expected) && !is_orderly, "{reason}");
        }
    }
}
