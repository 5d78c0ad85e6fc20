//! The clocks of a connection: pings, so that no proxy takes it for an idle one; and the deadlines.

use std::time::Duration;

use rustix::event::PollFlags;

use super::options::Times;
use super::relay::Relay;
use crate::tunnel::turns::is_ready;

/// How long a server with bytes before it may be silent. They lie ahead of the ping in its buffers for as
/// long as the target takes none, but a tunneld pings meanwhile, every 30 s by default.
const STALL: Duration = Duration::from_secs(300);

/// How long the download gets to read what is there, when a deadline passed while the process stood still.
const CATCH_UP: Duration = Duration::from_millis(100);

/// Waits until both directions have ended in order, pinging meanwhile.
///
/// # Errors
/// Why the connection is broken, or is to be given up, in a part of a sentence.
pub fn watch(relay: &Relay, times: Times) -> Result<(), String> {
    let mut next_ping = times.ping_interval;
    let mut ends = relay.ends();
    loop {
        if let Some(outcome) = ends.outcome() {
            return outcome;
        }
        let now = relay.state.age();
        let look_again = match ends.first {
            Some(first) => linger(relay, times, first, now, !ends.download)?,
            None => {
                if now >= next_ping {
                    next_ping = now + times.ping_interval;
                    relay.writer.ping();
                }
                judge(relay, times, now)?
                    .unwrap_or(next_ping)
                    .min(next_ping)
            }
        };
        ends = relay.wait(ends, look_again);
    }
}

/// One direction has ended; the other goes on while bytes move. Returns when to look again.
fn linger(
    relay: &Relay,
    times: Times,
    first: Duration,
    now: Duration,
    is_reading: bool,
) -> Result<Duration, String> {
    let deadline = first.max(relay.state.last_moved()) + times.linger;
    if now < deadline {
        return Ok(deadline);
    }
    if is_reading && !relay.state.is_parked() && is_ready(&*relay.socket, PollFlags::IN) {
        return Ok(now + CATCH_UP);
    }
    Err(format!(
        "nothing moved for {:?} after one direction had ended (see --linger)",
        times.linger
    ))
}

/// Whether the server counts as dead, or else when it would, if that can be told.
fn judge(relay: &Relay, times: Times, now: Duration) -> Result<Option<Duration>, String> {
    let state = &relay.state;
    if state.is_parked() {
        return Ok(None);
    }
    let patience = times.ping_interval + times.ping_timeout;
    let patience = if state.all_answered() {
        patience
    } else {
        patience.max(STALL)
    };
    let due = state.last_life() + patience;
    if now < due {
        return Ok(Some(due));
    }
    if is_ready(&*relay.socket, PollFlags::IN) {
        return Ok(Some(now + CATCH_UP));
    }
    Err(format!(
        "the server gave no sign of life for {patience:?}, nor answered a ping"
    ))
}
