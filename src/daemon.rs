//! The gate: accepts connections, gives each a place and a thread, and lets them end at shutdown.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::net::{SendFlags, send};
use rustix::process::{Resource, getrlimit};
use tiny_http::HTTPVersion;

use crate::accept;
use crate::config::Config;
use crate::connection::{self, Context};
use crate::connections::Connections;
use crate::http::answer::Answer;
use crate::http::backend::Backend;
use crate::http::routes::Rules;
use crate::lingering_close::{LingeringClose, WITH_REFUSED};
use crate::log_limit::LogLimit;
use crate::metrics::Metrics;
use crate::notify::notify;
use crate::threads::Threads;
use crate::tunnel::TunnelThreads;
use crate::tunnel::keepalive::CLOSE_LIMIT;

/// A connection's thread reads the head, dials and prints the answer.
const STACK: usize = 128 * 1024;

/// The most descriptors a connection holds at once: its own and those of up to six attempts to connect. A tunnel
/// needs fewer: two sockets, a pipe, and what wakes a thread.
const DESCRIPTORS_EACH: u64 = 7;

/// Descriptors for what is no connection: the standard streams, the listeners, what wakes threads, and the
/// connection to tiny_http.
const DESCRIPTORS_ELSE: u64 = 16;

/// The most connections on their way out, without a place: those let go, and those being closed.
const MAX_LEAVING: u64 = 128;

/// After the grace: what tunnels get for their Close handshake, and for what comes behind it.
const END_LIMIT: Duration = CLOSE_LIMIT.saturating_add(Duration::from_secs(1));

/// Tells a running daemon to end. It may be asked from any thread, a signal handler's included.
#[derive(Debug)]
pub struct Shutdown {
    wake: OwnedFd,
}

impl Shutdown {
    /// Not asked yet.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new() -> io::Result<Shutdown> {
        Ok(Shutdown {
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Asks.
    pub fn request(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Serves connections to `listener` until `shutdown` is requested and they have ended.
///
/// Tunnels get the grace to end by themselves, then a Close 1001.
///
/// # Errors
/// When it can't start; once it serves, nothing ends it but the shutdown.
pub fn run(listener: TcpListener, config: Config, shutdown: &Shutdown) -> io::Result<()> {
    let grace = config.shutdown_grace;
    let manager = config.notify_socket.clone();
    let limits = limits(config.max_connections)?;
    let connections = Connections::new(limits.connections, limits.leaving);
    let rules = Rules {
        access: config.access.clone(),
        allow_origin: config.allow_origin.clone(),
    };
    let context = Context {
        config,
        rules,
        backend: Backend::start()?,
        closer: LingeringClose::start(limits.leaving)?,
        threads: TunnelThreads::default(),
        metrics: Metrics::new().map_err(io::Error::other)?,
    };
    let gate = Gate {
        context: Arc::new(context),
        threads: Threads::new("connection", STACK),
        connections,
    };
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    log::info!("listening on {address}");
    notify(
        manager.as_deref(),
        &format!("READY=1\nSTATUS=listening on {address}"),
    );
    gate.accept_until(&listener, shutdown);
    notify(
        manager.as_deref(),
        &format!("STOPPING=1\nSTATUS=tunnels may end by themselves within {grace:?}"),
    );
    drop(listener);
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
    fn accept_until(&self, listener: &TcpListener, shutdown: &Shutdown) {
        let mut pause = false;
        while !wait(listener, shutdown, pause) {
            pause = match listener.accept() {
                Ok((client, peer)) => {
                    self.admit(client, peer);
                    false
                }
                Err(error) if accept::is_of_one_connection(&error) => false,
                Err(error) => {
                    FAILURES.log("failures to accept", || {
                        log::warn!("cannot accept a connection, trying again soon: {error}");
                    });
                    true
                }
            };
        }
    }

    fn admit(&self, client: TcpStream, peer: SocketAddr) {
        let client = Arc::new(client);
        let Some(permit) = self.connections.admit(&client) else {
            return self.turn_away(
                client,
                peer,
                "the connection limit is reached: try again later",
            );
        };
        let (context, of_thread) = (Arc::clone(&self.context), Arc::clone(&client));
        let started = self
            .threads
            .run(move || connection::serve(&context, of_thread, peer, permit));
        if let Err(error) = started {
            self.turn_away(
                client,
                peer,
                &format!("no thread for this connection, try again later: {error}"),
            );
        }
    }

    /// Answers 503 without a thread. A fresh socket's buffer has room for it.
    fn turn_away(&self, client: Arc<TcpStream>, peer: SocketAddr, why: &str) {
        let answer = Answer::unavailable(why);
        self.context.note_answer("-", peer, &answer);
        let bytes = answer.to_bytes(&HTTPVersion(1, 1), false);
        if send(&*client, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok() {
            self.context.closer.close_later(client, WITH_REFUSED);
        }
    }

    fn drain(&self, grace: Duration) {
        log::info!("shutting down: tunnels may end by themselves within {grace:?}");
        self.connections.let_heads_go();
        if !self.connections.wait_until_none(Instant::now() + grace) {
            self.connections.end_tunnels();
            self.connections.wait_until_none(Instant::now() + END_LIMIT);
        }
        log::info!("shut down");
    }
}

/// Waits for a connection, or for the pause to be over. `true` once the shutdown was requested.
fn wait(listener: &TcpListener, shutdown: &Shutdown, pause: bool) -> bool {
    let mut fds = vec![PollFd::new(&shutdown.wake, PollFlags::IN)];
    if !pause {
        fds.push(PollFd::new(listener, PollFlags::IN));
    }
    let limit = if pause {
        Timespec::try_from(accept::PAUSE).ok()
    } else {
        None
    };
    if let Err(error) = poll(&mut fds, limit.as_ref()) {
        // Without memory for a poll there is no waiting either, and spinning would make it worse.
        log::debug!("cannot wait for a connection: {error}");
        thread::sleep(Duration::from_millis(1));
        return false;
    }
    !fds[0].revents().is_empty()
}

/// How many connections there may be, and how many more on their way out.
struct Limits {
    connections: usize,
    leaving: usize,
}

/// Raises the soft limit of descriptors to the hard one, and lowers `wanted` to what it allows: tiny_http
/// must never run out of them.
fn limits(wanted: usize) -> io::Result<Limits> {
    accept::raise_descriptors();
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let leaving = (descriptors / 16).clamp(2, MAX_LEAVING);
    let possible = descriptors.saturating_sub(DESCRIPTORS_ELSE + 2 * leaving) / DESCRIPTORS_EACH;
    let possible = usize::try_from(possible).unwrap_or(usize::MAX);
    if possible == 0 {
        return Err(io::Error::other(format!(
            "{descriptors} descriptors are too few: raise RLIMIT_NOFILE (ulimit -n)"
        )));
    }
    if possible < wanted {
        log::warn!(
            "{descriptors} descriptors allow {possible} connections instead of {wanted}: raise RLIMIT_NOFILE (ulimit -n) for more"
        );
    }
    Ok(Limits {
        connections: wanted.min(possible),
        leaving: leaving as usize,
    })
}
