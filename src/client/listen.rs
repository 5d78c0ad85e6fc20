//! The local ports: each connection to one of them gets a tunnel of its own.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::net::sockopt;

use super::failure::{Failure, Kind};
use super::forward::{Destination, Forward, To};
use super::local::Local;
use super::options::{Config, LISTEN, Token};
use super::socks::{self, NoRequest};
use super::{Closed, Watch, handshake, run_tunnel, warn_if_readable};
use crate::accept;
use crate::cli::Exit;
use crate::limits;
use crate::log_limit::LogLimit;
use crate::os;
use crate::signals;
use crate::stderr;
use crate::threads::Threads;
use crate::tunnel::{End, TunnelThreads};

/// A connection's thread dials and shakes hands.
const STACK: usize = 256 * 1024;

static FAILURES: LogLimit = LogLimit::new(20);

static WAITS: LogLimit = LogLimit::new(20);

/// Serves connections to all of `forwards` until SIGTERM, SIGINT or SIGHUP ends the process with exit code 0. What
/// is open then is cut off, and looks so on both sides.
///
/// # Errors
/// When it can't listen on one of them. Then none is served.
pub fn serve(mut config: Config, forwards: Vec<Forward>) -> Result<ExitCode, Exit> {
    accept::raise_descriptors();
    let ports: Result<Vec<_>, _> = forwards.into_iter().map(Port::listen).collect();
    let ports = ports?;
    signals::on_termination(|| {
        log::info!("shut down");
        stderr::exit(0);
    })?;
    let listeners = ports.iter().map(|port| port.listeners.len()).sum();
    config.max_connections =
        limits::of_client(config.max_connections, listeners, config.trust.is_some())
            .map_err(|error| format!("cannot start: {error}"))?;
    warn_if_readable(&config);
    if let Err(failure) = handshake::check(&config) {
        if !failure.may_pass() {
            stderr::say(&failure.sentence);
            return Ok(ExitCode::FAILURE);
        }
        log::warn!("the daemon is not there yet: {}", failure.sentence);
    }
    warn_if_exposed(&ports, &config.token);
    if let Some(proxy) = &config.proxy {
        log::info!("connecting to {} through {proxy}", config.server.address);
    }
    for port in &ports {
        port.log(&config);
    }
    let shared = Shared {
        config,
        connections: Threads::new("connection", STACK),
        threads: TunnelThreads::default(),
    };
    accept_all(&ports, &Arc::new(shared));
    Ok(ExitCode::FAILURE)
}

/// A local port, on one address or two.
struct Port {
    option: &'static str,
    listeners: Vec<TcpListener>,
    addresses: String,
    is_loopback: bool,
    to: To,
}

impl Port {
    fn listen(forward: Forward) -> Result<Port, String> {
        let Forward { option, bind, to } = forward;
        let listeners =
            accept::listen(bind).map_err(|error| format!("{error}; choose another {option}"))?;
        let cannot = |error: io::Error| format!("cannot listen on {bind}: {error}");
        for listener in &listeners {
            listener.set_nonblocking(true).map_err(cannot)?;
        }
        Ok(Port {
            option,
            addresses: accept::addresses(&listeners).map_err(cannot)?,
            listeners,
            is_loopback: bind.is_loopback(),
            to,
        })
    }

    fn log(&self, config: &Config) {
        let addresses = &self.addresses;
        match &self.to {
            // Scripts read the port at the end of the line.
            To::Target(_) if self.option == LISTEN => log::info!("listening on {addresses}"),
            To::Target(to) => {
                log::info!("listening on {addresses} → {}", config.server.name(to));
            }
            To::Asked => log::info!("listening on {addresses} → any host and port, by SOCKS5"),
        }
    }
}

/// Whoever reaches a local port is let in by the user's token.
fn warn_if_exposed(ports: &[Port], token: &Token) {
    let with_token = if token.is_some() {
        ", with your access token"
    } else {
        ""
    };
    for port in ports.iter().filter(|port| !port.is_loopback) {
        let addresses = &port.addresses;
        log::warn!("everyone who can connect to {addresses} may use the tunnel{with_token}");
    }
    // The ordinary case, which is no reason for an alarm.
    if token.is_some() && ports.iter().any(|port| port.is_loopback) {
        log::info!(
            "every user of this machine and every web page open on it can connect to its ports and use the tunnel{with_token}"
        );
    }
}

/// What all connections share. Each connection holds a reference until it has ended.
struct Shared {
    config: Config,
    connections: Threads,
    threads: TunnelThreads,
}

fn accept_all(ports: &[Port], shared: &Arc<Shared>) {
    let listeners = ports
        .iter()
        .flat_map(|port| port.listeners.iter().map(|listener| (listener, &port.to)));
    let listeners: Vec<_> = listeners.collect();
    let mut next_id = 0;
    loop {
        let fds = listeners.iter();
        let mut fds: Vec<_> = fds
            .map(|(listener, _)| PollFd::new(*listener, PollFlags::IN))
            .collect();
        let waited = os::wait(&mut fds, None);
        let mut failed = waited.err();
        for (listener, to) in &listeners {
            match listener.accept() {
                Ok((client, peer)) => {
                    admit(client, peer, next_id, to, shared);
                    next_id += 1;
                }
                Err(error) if accept::is_of_one_connection(&error) => {}
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            FAILURES.log("failed connections", || {
                log::warn!("cannot accept a connection, trying again soon: {error}");
            });
            thread::sleep(accept::PAUSE);
        }
    }
}

fn admit(client: TcpStream, peer: SocketAddr, id: u64, to: &To, shared: &Arc<Shared>) {
    // From here on, whatever drops it sends a RST.
    let _ = sockopt::set_socket_linger(&client, Some(Duration::ZERO));
    let limit = shared.config.max_connections;
    // One is the accept loop's.
    if Arc::strong_count(shared) > limit {
        drop(client);
        return FAILURES.log("failed connections", || {
            log::warn!("reset a connection of {peer}: {limit} are open, see --max-connections");
        });
    }
    let _ = client.set_nodelay(true);
    let (to, served) = (to.clone(), Arc::clone(shared));
    let started = shared.connections.run(move || match to {
        To::Target(to) => serve_one(&served, id, peer, &to, Local::Tcp(client)),
        To::Asked => match socks::read_request(client) {
            Ok(asked) => {
                let to = asked.to().clone();
                serve_one(&served, id, peer, &to, Local::Socks(asked));
            }
            Err(NoRequest::Gone) => log::debug!("connection of {peer} ended without a byte"),
            Err(NoRequest::Wrong(why)) => log_failure(peer, &why),
        },
    });
    if let Err(error) = started {
        log_failure(peer, &format!("cannot serve it: {error}"));
    }
}

fn serve_one(shared: &Shared, id: u64, peer: SocketAddr, to: &Destination, local: Local) {
    let target = shared.config.server.name(to);
    let name = format!("id={id} peer={peer} target={target}");
    let watch = Watch {
        waits: |why: &str| {
            WAITS.log("connections that wait", || {
                log::info!("connection of {peer} to {target}: {why}");
            });
        },
        opened: || {
            log::info!("tunnel opened: {name}");
            Ok(())
        },
    };
    match run_tunnel(&shared.config, &shared.threads, to, local, watch) {
        Ok(closed) => log_end(&name, &closed),
        Err(Failure {
            sentence,
            kind: Kind::NobodyWaits,
        }) => {
            WAITS.log("connections that wait", || {
                log::info!("connection of {peer} to {target}: {sentence}");
            });
        }
        Err(Failure { sentence, .. }) => log_failure(peer, &format!("to {target}: {sentence}")),
    }
}

fn log_end(name: &str, closed: &Closed) {
    // The daemon's up is up here, too: to the target.
    let (down, up) = closed.state.activity.counts();
    let duration = closed.state.activity.age().as_secs_f64();
    let (end, reason) = (closed.outcome.end, &closed.reason);
    // The other words for an end are the daemon's, who sees it from the other side.
    let label = match end {
        End::Orderly | End::FailedAfterClose => end.label(),
        _ => "broken",
    };
    let line = format!(
        "tunnel closed: {name} up={up} down={down} duration={duration:.3}s end={label} reason={reason:?}"
    );
    match end {
        // PostgreSQL does the second after each session over TLS, and psql one of the others: it does not wait for its
        // last bytes. Whoever has closed or reset the local connection knows of it.
        End::Orderly | End::FailedAfterClose | End::CutShort | End::StreamFailed => {
            log::info!("{line}");
        }
        _ => FAILURES.log("failed connections", || log::warn!("{line}")),
    }
}

fn log_failure(peer: SocketAddr, sentence: &str) {
    FAILURES.log("failed connections", || {
        log::warn!("connection of {peer}: {sentence}");
    });
}
