//! `--wait`: a daemon or a target that is still starting is asked again until it is there.

use std::thread;
use std::time::{Duration, Instant};

use super::failure::Failure;
use super::forward::Destination;
use super::handshake::{self, Upgraded};
use super::local::Local;
use super::options::Config;

/// The pause behind the first try. Each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause.
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// How often is looked whether anybody still waits.
const LOOK: Duration = Duration::from_millis(250);

/// Opens a tunnel to `to` for `local`, and with `--wait` tries again for as long as that says, as long as what fails
/// may pass and `local` is there. Calls `tell` with a sentence before the first pause.
///
/// # Errors
/// The failure of the last try.
pub fn open(
    config: &Config,
    to: &Destination,
    local: &Local,
    tell: impl FnOnce(&str),
) -> Result<Upgraded, Failure> {
    let Some(limit) = config.wait else {
        return handshake::open(config, to);
    };
    let deadline = Instant::now() + limit;
    let (mut tell, mut pause) = (Some(tell), FIRST_PAUSE);
    loop {
        let mut failure = match handshake::open(config, to) {
            Err(failure) if failure.may_pass() => failure,
            other => return other,
        };
        if let Some(tell) = tell.take() {
            let limit = humantime::format_duration(limit);
            tell(&format!("trying again for {limit}: {}", failure.sentence));
        }
        let until = deadline.min(Instant::now() + pause);
        if Instant::now() >= deadline || !stays_until(local, until) {
            let limit = humantime::format_duration(limit);
            failure.sentence += &format!("; tried again for {limit}, see --wait");
            return Err(failure);
        }
        pause = LAST_PAUSE.min(pause * 2);
    }
}

/// `false` as soon as nobody waits for the tunnel any more.
fn stays_until(local: &Local, until: Instant) -> bool {
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
