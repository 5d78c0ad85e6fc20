//! The gate: accepts connections, gives each a slot and a thread, and lets them end at shutdown.

mod admission;
mod connection;
pub(crate) mod http;
mod lingering_close;
pub(crate) mod listener;
mod metrics;
mod notify;
pub(crate) mod options;
pub(crate) mod peer;
pub(crate) mod request_head;

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{SendFlags, send};
use tiny_http::HTTPVersion;

use crate::accept;
use crate::limits::Limits;
use crate::log_limit::LogLimit;
use crate::os::{self, Waker};
use crate::threads::{MakeRoom, Threads};
use crate::tunnel::{CLOSE_LIMIT, TunnelThreads};
use admission::Connections;
use connection::Context;
use http::answer::{Answer, ProxyError};
use http::backend::Backend;
use http::routes::Rules;
use lingering_close::LingeringClose;
use listener::Listener;
use metrics::Metrics;
use notify::notify;
use options::Config;
use peer::Peer;

/// A connection's thread reads the head, dials and prints the answer.
const STACK: usize = 128 * 1024;

/// After the grace: what tunnels get for their Close handshake, and for what comes behind it.
const END_LIMIT: Duration = CLOSE_LIMIT.saturating_add(Duration::from_secs(1));

/// Tells a running daemon to end. It may be asked from any thread, a signal handler's included.
#[derive(Debug)]
pub struct Shutdown {
    requested: Waker,
}

impl Shutdown {
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new() -> io::Result<Shutdown> {
        Ok(Shutdown {
            requested: Waker::new()?,
        })
    }

    /// Has the daemon end its tunnels and return.
    pub fn request(&self) {
        self.requested.wake();
    }
}

/// Serves connections to `listeners` until `shutdown` is requested and they have ended, or until there has been none
/// for as long as `config` says.
///
/// Tunnels get the grace to end by themselves, then a Close 1001.
///
/// # Errors
/// When it can't start.
pub fn run(listeners: Vec<Listener>, config: Config, shutdown: &Shutdown) -> io::Result<()> {
    let grace = config.shutdown_grace;
    let manager = config.notify_socket.clone();
    let limits = Limits::of_daemon(config.max_connections, listeners.len())?;
    let connections = Connections::new(limits.connections, limits.leaving);
    let of_heads = Arc::clone(&connections);
    let make_room = MakeRoom::by(move || of_heads.evict_oldest_head());
    let rules = Rules {
        access: config.access.clone(),
        allow_origin: config.allow_origin.clone(),
        allow_host: config.allow_host.clone(),
    };
    let context = Context {
        config,
        rules,
        backend: Backend::start()?,
        closer: LingeringClose::start(limits.leaving)?,
        threads: TunnelThreads::in_room_of(&make_room),
        make_room,
        metrics: Metrics::new().map_err(io::Error::other)?,
    };
    let gate = Gate {
        context: Arc::new(context),
        threads: Threads::new("connection", STACK),
        connections,
    };
    let addresses: Vec<_> = listeners
        .iter()
        .map(|listener| listener.address.to_string())
        .collect();
    for address in &addresses {
        log::info!("listening on {address}");
    }
    notify(
        manager.as_deref(),
        &format!("READY=1\nSTATUS=listening on {}", addresses.join(", ")),
    );
    gate.accept_until(&listeners, shutdown);
    notify(
        manager.as_deref(),
        &format!("STOPPING=1\nSTATUS=open tunnels have {grace:?} to finish"),
    );
    drop(listeners);
    gate.drain(grace);
    Ok(())
}

/// The most failures of the system logged in a second.
static FAILURES: LogLimit = LogLimit::new(2);

struct Gate {
    context: Arc<Context>,
    threads: Threads,
    connections: Arc<Connections>,
}

impl Gate {
    fn accept_until(&self, listeners: &[Listener], shutdown: &Shutdown) {
        let mut pause = false;
        while let Some(ready) = wait(listeners, shutdown, pause, self.idle_limit()) {
            if ready.is_empty() && !pause && self.idle_limit() == Some(Duration::ZERO) {
                return log::info!("no connection for the time of --exit-when-idle");
            }
            pause = false;
            for listener in ready {
                match listener.accept() {
                    Ok((client, peer)) => self.admit(client, peer),
                    Err(error) if accept::is_of_one_connection(&error) => {}
                    Err(error) => {
                        FAILURES.log("failures to accept", || {
                            log::warn!("cannot accept a connection, trying again soon: {error}");
                        });
                        pause = true;
                    }
                }
            }
        }
    }

    /// How long there may go on to be no connection.
    fn idle_limit(&self) -> Option<Duration> {
        let limit = self.context.config.exit_when_idle;
        limit.map(|limit| limit.saturating_sub(self.connections.idle_for()))
    }

    fn admit(&self, client: TcpStream, peer: Peer) {
        let client = Arc::new(client);
        let Some(permit) = self.connections.admit(&client) else {
            let answer = Answer::unavailable("the connection limit is reached: try again later");
            return self.turn_away(client, peer, &answer.because(ProxyError::ConnectionLimit));
        };
        let (context, of_thread) = (Arc::clone(&self.context), Arc::clone(&client));
        let id = permit.id;
        let started = self.threads.run_or_queue(
            move || connection::serve(&context, of_thread, peer, permit),
            || self.connections.evict_oldest_head_before(id),
        );
        if let Err(error) = started {
            let why = format!("no thread for this connection, try again later: {error}");
            self.turn_away(client, peer, &Answer::unavailable(why));
        }
    }

    /// Answers 503 without a thread. A fresh socket's buffer has room for it.
    fn turn_away(&self, client: Arc<TcpStream>, peer: Peer, answer: &Answer) {
        self.context.note_answer(None, peer, answer);
        let bytes = answer.to_bytes(&HTTPVersion(1, 1), false);
        if send(&*client, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok() {
            self.context.closer.close_later(client);
        }
    }

    fn drain(&self, grace: Duration) {
        log::info!("shutting down: open tunnels have {grace:?} to finish");
        self.connections.evict_pending_heads();
        if !self.connections.wait_until_none(Instant::now() + grace) {
            self.connections.end_tunnels();
            self.connections.wait_until_none(Instant::now() + END_LIMIT);
        }
        log::info!("shut down");
    }
}

/// Waits for connections, for the pause to be over, or for `limit`. `None` once the shutdown was requested.
fn wait<'a>(
    listeners: &'a [Listener],
    shutdown: &Shutdown,
    pause: bool,
    limit: Option<Duration>,
) -> Option<Vec<&'a Listener>> {
    let mut fds = vec![PollFd::new(&shutdown.requested, PollFlags::IN)];
    if !pause {
        fds.extend(
            listeners
                .iter()
                .map(|listener| PollFd::new(listener, PollFlags::IN)),
        );
    }
    if let Err(error) = os::wait(&mut fds, if pause { Some(accept::PAUSE) } else { limit }) {
        // Without memory for a poll there is no waiting either, and spinning would make it worse.
        log::debug!("cannot wait for a connection: {error}");
        thread::sleep(Duration::from_millis(1));
        return Some(Vec::new());
    }
    if !fds[0].revents().is_empty() {
        return None;
    }
    let ready = listeners.iter().zip(&fds[1..]);
    let ready = ready.filter(|(_, fd)| !fd.revents().is_empty());
    Some(ready.map(|(listener, _)| listener).collect())
}
