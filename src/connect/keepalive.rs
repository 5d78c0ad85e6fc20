//! The clocks of a connection: pings, so that no proxy takes it for an idle one; and the deadlines.

use std::time::Duration;

use super::options::Times;
use super::relay::Relay;

/// How long a server with bytes before it may be silent. They lie ahead of the ping in its buffers for as
/// long as the target takes none, but a tunneld pings meanwhile, every 30 s by default.
const STALL: Duration = Duration::from_secs(300);

/// Waits until both directions have ended in order, pinging meanwhile.
///
/// # Errors
/// Why the connection is broken, or is to be given up, in a part of a sentence.
pub fn watch(relay: &Relay, times: Times) -> Result<(), String> {
    let mut next_ping = times.ping_interval;
    // Begins when an end is seen, so that it can't be over before a wait for that, which would tell that the
    // process stood still.
    let mut lingers_since = None;
    let mut ends = relay.ends();
    loop {
        if let Some(outcome) = ends.outcome() {
            return outcome;
        }
        let now = relay.state.age();
        let look_again = if ends.has_one() {
            linger(relay, times, *lingers_since.get_or_insert(now), now)?
        } else {
            if now >= next_ping {
                next_ping = now + times.ping_interval;
                relay.writer.ping();
            }
            let due = judge(relay, times, now)?;
            due.unwrap_or(next_ping).min(next_ping)
        };
        ends = relay.wait(ends, look_again);
    }
}

/// One direction has ended; the other goes on while bytes move. Returns when to look again.
fn linger(relay: &Relay, times: Times, since: Duration, now: Duration) -> Result<Duration, String> {
    let deadline = since.max(relay.state.last_moved()) + times.linger;
    if now < deadline {
        return Ok(deadline);
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
    Err(format!(
        "the server gave no sign of life for {patience:?}, nor answered a ping"
    ))
}
