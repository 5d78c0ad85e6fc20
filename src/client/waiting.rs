//! `--wait`: a daemon or a target that is still starting is asked again until it is there.

use std::thread;
use std::time::{Duration, Instant};

use super::deadline::about;
use super::failure::{Failure, Kind};
use super::forward::Destination;
use super::handshake::{self, ANSWER_TIMEOUT, Upgraded};
use super::local::Local;
use super::options::Config;
use crate::caller::LOOK;

/// The pause behind the first try. Each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause.
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// Opens a tunnel to `to` for `local`, and with `--wait` tries again for as long as that says, as long as what fails
/// may pass and `local` is there. Calls `tell` with a sentence before the first pause.
///
/// # Errors
/// The failure of the last try, or that nobody waits for the tunnel any more.
pub fn open(
    config: &Config,
    to: &Destination,
    local: &Local,
    tell: impl FnOnce(&str),
) -> Result<Upgraded, Failure> {
    let answer_limit = config.dial_timeout * ANSWER_TIMEOUT;
    let Some(wait) = config.wait else {
        return handshake::open(config, to, answer_limit);
    };
    let start = Instant::now();
    let remaining = || wait.saturating_sub(start.elapsed());
    let (mut tell, mut pause) = (Some(tell), FIRST_PAUSE);
    loop {
        // A try is none without the time that a connection takes, and as much for the answer to it.
        let limit = answer_limit.min(remaining().max(config.dial_timeout));
        let failure = match handshake::open(config, to, limit) {
            Err(failure) if failure.may_pass() => failure,
            // What it has sent must not reach the target after all.
            Ok(_) if tell.is_none() && local.is_gone() => {
                return Err(nobody_waits(start.elapsed()));
            }
            other => return other,
        };
        if local.is_gone() {
            return Err(nobody_waits(start.elapsed()));
        }
        let remaining = remaining();
        if remaining.is_zero() {
            return Err(given_up(failure, tell.is_none().then(|| start.elapsed())));
        }
        if let Some(tell) = tell.take() {
            let sentence = &failure.sentence;
            tell(&format!(
                "trying again for {}: {sentence}",
                about(remaining)
            ));
        }
        if !stays_for(local, pause.min(remaining)) {
            return Err(nobody_waits(start.elapsed()));
        }
        pause = LAST_PAUSE.min(pause * 2);
    }
}

/// The failure of the last try, and how long there were others, if there were.
fn given_up(mut failure: Failure, tried_again: Option<Duration>) -> Failure {
    failure.sentence += &match tried_again {
        Some(time) => format!("; tried again for {}, see --wait", about(time)),
        None => "; there was no time to try again, see --wait".to_owned(),
    };
    failure
}

fn nobody_waits(time: Duration) -> Failure {
    Failure {
        sentence: format!("it has left after {}", about(time)),
        kind: Kind::NobodyWaits,
    }
}

/// `false` as soon as nobody waits for the tunnel any more.
fn stays_for(local: &Local, time: Duration) -> bool {
    let until = Instant::now() + time;
    loop {
        let remaining = until.saturating_duration_since(Instant::now());
        if local.is_gone() {
            return false;
        }
        if remaining.is_zero() {
            return true;
        }
        thread::sleep(remaining.min(LOOK));
    }
}
