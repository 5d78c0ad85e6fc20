//! `tunneld connect`: the client's end of a tunnel.
//!
//! The way of a connection:
//!
//! 1. [`options`] checks the command line: the [`server`], and what each [`forward`] leads to;
//! 2. [`listen`] accepts local connections, of which some say by [`socks`] where they want to go;
//! 3. [`handshake`], again and again if it is to be [`waiting`], dials the server, or a [`proxy`] on the way, and
//!    upgrades, through [`tls`] and its [`carrier`] for wss, each before a [`deadline`]; a [`refusal`] is told, and so
//!    is whatever else a server says, through a [`redactor`];
//! 4. the [`tunnel`] relays, as the daemon's does;
//! 5. an orderly end on one side becomes an orderly end on the other, a broken one a broken one.

pub mod answer;
pub mod carrier;
pub mod deadline;
pub mod failure;
pub mod forward;
pub mod handshake;
pub mod headers;
#[cfg(feature = "tls")]
pub mod identity;
pub mod listen;
pub mod local;
pub mod options;
pub mod proxy;
pub mod redactor;
pub mod refusal;
pub mod server;
pub mod socks;
#[cfg_attr(not(feature = "tls"), path = "no_tls.rs")]
pub mod tls;
pub mod upgrade;
pub mod waiting;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;

use crate::cli::Exit;
use crate::signals;
use crate::stderr;
use crate::tunnel::{self, End, Outcome, Sides, State, Stdio, TunnelThreads};
use failure::Failure;
use forward::Destination;
use local::Local;
use options::Config;
use proxy::Proxy;

/// Runs the client until its connection ends, or with local ports until a signal does. One sentence on a
/// failure goes to stderr.
///
/// # Errors
/// When it can't start as it was told to.
pub fn run(config: Config) -> Result<ExitCode, Exit> {
    // At trace level tungstenite logs frames with what is in them.
    log::set_max_level(log::max_level().min(log::LevelFilter::Debug));
    match config.local.clone() {
        options::Local::Ports(ports) => listen::serve(config, ports),
        options::Local::Stdio(to) => run_stdio(&config, &to),
    }
}

fn run_stdio(config: &Config, to: &Destination) -> Result<ExitCode, Exit> {
    warn_if_readable(config);
    let stdio = Stdio::new(config.no_close).map_err(|error| format!("cannot start: {error}"))?;
    let stdio = Arc::new(stdio);
    let hung_up = Arc::clone(&stdio);
    let threads = TunnelThreads::default();
    let watch = Watch {
        waits: |why: &str| stderr::say(why),
        opened: || {
            // ssh ends its ProxyCommand so. Before there is a tunnel nothing on stdin can be delivered, and SIGHUP ends
            // the process as it ends any other.
            signals::on_hangup(move || hung_up.hang_up())?;
            if io::stdin().is_terminal() {
                say_how_to_use_it(&config.server.name(to), config.no_close);
            }
            Ok(())
        },
    };
    let failure = match run_tunnel(config, &threads, to, Local::Stdio(stdio), watch) {
        Ok(closed) if closed.outcome.end == End::Orderly => return Ok(ExitCode::SUCCESS),
        Ok(closed) => format!("the tunnel broke: {}", closed.reason),
        Err(failure) => failure.sentence,
    };
    stderr::say(&failure);
    Ok(ExitCode::FAILURE)
}

/// Whoever sits before a terminal may have wanted a local port.
fn say_how_to_use_it(target: &str, no_close: bool) {
    let (_, port) = target.rsplit_once(':').unwrap_or_default();
    let key = match no_close {
        true => "Ctrl-C",
        false => "Ctrl-D at the beginning of a line",
    };
    stderr::say(&format!(
        "connected to {target}: what you type goes there, and {key} ends it; for a local port use -L {port}:{target}"
    ));
}

/// Logs a warning if the token will be sent in the clear over a network.
fn warn_if_readable(config: &Config) {
    let server = &config.server.address;
    let proxy = config.proxy.as_ref();
    let stays_here = server.host.is_loopback() && proxy.is_none_or(Proxy::is_loopback);
    if config.token.is_some() && !config.server.is_tls() && !stays_here {
        log::warn!(
            "the access token goes to {server} unencrypted, and whoever is on the way can read and use it: use wss:// unless the network is your own"
        );
    }
}

/// A tunnel that has ended.
struct Closed {
    outcome: Outcome,
    /// Why, fit to be shown.
    reason: String,
    /// What moved.
    state: Arc<State>,
}

/// Who wants to know how a tunnel comes along.
struct Watch<W, O> {
    /// Is called with a sentence when the tunnel is waited for.
    waits: W,
    /// Is called when the server has agreed. If it fails, in a sentence, there is no tunnel.
    opened: O,
}

/// Leads the bytes of `local` to `to` through a tunnel of their own, until both directions have ended.
///
/// # Errors
/// When there is no tunnel. `local` has then been turned away.
fn run_tunnel(
    config: &Config,
    threads: &TunnelThreads,
    to: &Destination,
    local: Local,
    watch: Watch<impl FnOnce(&str), impl FnOnce() -> Result<(), String>>,
) -> Result<Closed, Failure> {
    let upgraded = match waiting::open(config, to, &local, watch.waits) {
        Ok(upgraded) => upgraded,
        Err(failure) => {
            local.turn_away(&failure);
            return Err(failure);
        }
    };
    let cannot = |error: io::Error| format!("cannot start: {error}");
    let state = Arc::new(State::new(0).map_err(cannot)?);
    let stream = local.let_in().map_err(cannot)?;
    (watch.opened)()?;
    let peer = Arc::new(upgraded.socket);
    let sides = Sides {
        peer: Arc::clone(&peer),
        peer_failure: upgraded.carrier.failure(),
        early: upgraded.early,
        protocol: config.protocol,
        stream,
    };
    let mut outcome = tunnel::run(threads, sides, config.times, &state).map_err(cannot)?;
    let is_orderly = outcome.end == End::Orderly;
    match upgraded.carrier.leave(&peer, is_orderly) {
        Err(why) if is_orderly => outcome = Outcome::not_all_sent(&why),
        _ => {}
    }
    let reason = upgraded.redactor.printable(&outcome.reason);
    Ok(Closed {
        outcome,
        reason,
        state,
    })
}
