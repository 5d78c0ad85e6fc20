//! Thread 3: the tunnel's clocks. It pings, finds the dead, spares the slow, and ends what lingers.
//!
//! A call that blocks can't be given a timeout from outside, so the deadlines of all three threads are here;
//! the other two are woken by `shutdown` on their socket. Times are the tunnel's age.

use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use rustix::net::sockopt;
use tungstenite::protocol::frame::coding::CloseCode;

use super::client::ClientWriter;
use super::state::{Cut, Ends, State};
use super::target::TargetSocket;
use crate::config::Times;

/// How long a client may take for its Close when the daemon shuts down. At 20 KiB/s, what may lie before ours
/// takes it as long. With the default grace this is less than the 10 s that container engines wait.
pub const CLOSE_LIMIT: Duration = Duration::from_secs(3);

/// What the clocks watch over.
#[derive(Debug)]
pub struct Keepalive<'a> {
    client: &'a TcpStream,
    target: &'a TargetSocket,
    writer: &'a ClientWriter,
    state: &'a State,
    times: Times,
    next_ping: Duration,
    unanswered: Option<Unanswered>,
    /// When the linger began: with the first end of a direction, and again once it is over.
    lingers_since: Option<Duration>,
}

/// The oldest ping since the client's last sign of life.
#[derive(Debug, Clone, Copy)]
enum Unanswered {
    /// Written at this time.
    Written(Duration),
    /// Not written, as bytes were on their way at this time.
    Skipped(Duration),
}

impl<'a> Keepalive<'a> {
    /// The clocks of a tunnel that begins now.
    pub fn new(
        client: &'a TcpStream,
        target: &'a TargetSocket,
        writer: &'a ClientWriter,
        state: &'a State,
        times: Times,
    ) -> Keepalive<'a> {
        let next_ping = times.ping_interval;
        Keepalive {
            client,
            target,
            writer,
            state,
            times,
            next_ping,
            unanswered: None,
            lingers_since: None,
        }
    }

    /// Runs until both directions have ended.
    pub fn run(mut self) {
        let mut ends = self.state.ends();
        while ends.inbound.is_none() || ends.outbound.is_none() {
            if ends.shutdown && ends.cut.is_none() {
                self.cut_in_order(
                    Cut::Shutdown,
                    CloseCode::Away,
                    "the daemon is shutting down",
                    &mut ends,
                );
            }
            let is_ending = ends.inbound.is_some() || ends.outbound.is_some() || ends.cut.is_some();
            let next = if is_ending {
                self.linger(&mut ends)
            } else {
                let linger = self.times.linger.max(Duration::from_millis(100));
                self.watch(&mut ends).min(self.state.age() + linger)
            };
            ends = self.state.wait(ends, next);
        }
    }

    /// A direction has ended; the other goes on while bytes move. When the linger is over, the tunnel is
    /// ended in order; when it is over once more, by force. Returns when to look again.
    fn linger(&mut self, ends: &mut Ends) -> Duration {
        let now = self.state.age();
        let since = *self.lingers_since.get_or_insert(ends.first.unwrap_or(now));
        let deadline = match ends.cut {
            Some(Cut::Shutdown) => since + CLOSE_LIMIT,
            _ => since.max(self.state.last_moved()) + self.times.linger,
        };
        if now < deadline {
            return deadline;
        }
        if ends.cut.is_none() {
            self.cut_in_order(
                Cut::Linger,
                CloseCode::Error,
                "the target did not end in time",
                ends,
            );
            let _ = self.client.shutdown(Shutdown::Read);
        } else {
            let _ = self.client.shutdown(Shutdown::Both);
        }
        self.lingers_since = Some(now);
        now + self.times.linger.max(Duration::from_secs(1))
    }

    /// Wakes outbound, which sends the Close. Inbound gives nothing more to the target.
    fn cut_in_order(&self, cut: Cut, code: CloseCode, reason: &str, ends: &mut Ends) {
        ends.cut = Some(cut);
        self.writer.set_close(code, reason);
        self.target.break_off();
    }

    /// Both directions are open: ping, and judge what comes of it. Returns when to look again.
    fn watch(&mut self, ends: &mut Ends) -> Duration {
        let now = self.state.age();
        let look_again = self.judge(now);
        let pinged = look_again.and_then(|_| {
            if now >= self.next_ping {
                self.ping(now)
            } else {
                Ok(())
            }
        });
        match (look_again, pinged) {
            (Ok(later), Ok(())) => later.min(self.next_ping),
            (Err(cut), _) | (_, Err(cut)) => {
                self.give_up(cut, ends);
                now
            }
        }
    }

    /// Whether the client counts as dead, or else when to ask again.
    fn judge(&mut self, now: Duration) -> Result<Duration, Cut> {
        let (Some(Unanswered::Written(since)) | Some(Unanswered::Skipped(since))) = self.unanswered
        else {
            return Ok(self.next_ping);
        };
        if self.state.last_heard() >= since {
            self.unanswered = None;
            return Ok(self.next_ping);
        }
        let due = since + self.times.ping_timeout;
        if self.state.is_parked() {
            return Ok(due.max(now + self.times.ping_timeout));
        }
        if now < due {
            return Ok(due);
        }
        if matches!(self.unanswered, Some(Unanswered::Written(_))) && self.state.all_answered() {
            return Err(Cut::PongTimeout);
        }
        let stalled = self.state.last_life() + self.times.stall_timeout;
        if now < stalled {
            Ok(stalled)
        } else {
            Err(Cut::Stalled)
        }
    }

    fn ping(&mut self, now: Duration) -> Result<(), Cut> {
        self.next_ping = now + self.times.ping_interval;
        let written = self.writer.try_ping().map_err(|_| Cut::PingFailed)?;
        log::debug!("ping: id={} written={written}", self.state.id);
        self.unanswered = match (self.unanswered, written) {
            (None | Some(Unanswered::Skipped(_)), true) => Some(Unanswered::Written(now)),
            (None, false) => Some(Unanswered::Skipped(now)),
            (older, _) => older,
        };
        Ok(())
    }

    /// The client is gone. What is still in our buffers for it can't reach it, hence a RST on both sides.
    fn give_up(&self, cut: Cut, ends: &mut Ends) {
        ends.cut = Some(cut);
        let _ = sockopt::set_socket_linger(self.client, Some(Duration::ZERO));
        let _ = self.client.shutdown(Shutdown::Both);
        self.target.break_off();
    }
}
