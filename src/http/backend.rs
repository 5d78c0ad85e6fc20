//! tiny_http on a private Unix socket.
//!
//! On a public port tiny_http has no bound on a head, goes deaf when descriptors run out, and strands
//! connections under a burst. Here it sees only whole, bounded heads from the gate, one per connection,
//! and gives each [`Request`] back at once, so that none of its threads ever waits for a dial. If it fails
//! all the same, it is replaced by a fresh one on a fresh socket; tunnels don't notice.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;
use tiny_http::Server;

use super::Request;
use crate::lock::lock;
use crate::log_limit::LogLimit;
use crate::request_head::RequestHead;

/// The header under which a request finds back to its connection. The gate puts it in front of all
/// others, and only the first one counts, so a client can't forge it.
pub const TICKET: &str = "X-Tunneld-Ticket";

/// How long tiny_http may take to parse one head. It needs microseconds.
const PARSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a wait for tiny_http looks whether it has hung up instead.
const HANG_UP_CHECK: Duration = Duration::from_millis(50);

/// Between two replacements, so that a system without descriptors isn't pressed further.
const REPLACE_PAUSE: Duration = Duration::from_millis(200);

/// Why a head did not become a [`Request`].
#[derive(Debug)]
pub enum Rejected {
    /// tiny_http hung up on it: to it the head is malformed.
    Malformed,
    /// tiny_http doesn't serve just now: a 503.
    Unavailable(String),
}

/// tiny_http, replaceable.
pub struct Backend {
    current: Mutex<Current>,
}

struct Current {
    server: Option<Arc<PrivateServer>>,
    started: Instant,
}

/// One tiny_http with its socket, and the requests that are awaited from it.
struct PrivateServer {
    server: Arc<Server>,
    socket: PathBuf,
    awaited: Arc<Awaited>,
    _directory: TempDir,
}

#[derive(Default)]
struct Awaited {
    by_ticket: Mutex<HashMap<u64, SyncSender<Request>>>,
}

impl Backend {
    /// Starts tiny_http.
    ///
    /// # Errors
    /// When there is no directory for its socket, or the system refuses a socket or a thread.
    pub fn start() -> io::Result<Backend> {
        let server = Some(Arc::new(PrivateServer::start()?));
        Ok(Backend {
            current: Mutex::new(Current {
                server,
                started: Instant::now(),
            }),
        })
    }

    /// Has `head` parsed. `ticket` must be unique among the connections at any one time.
    ///
    /// # Errors
    /// [`Rejected`]. When tiny_http has failed, a fresh one has been started for the next request.
    pub fn parse(&self, ticket: u64, head: &RequestHead) -> Result<Request, Rejected> {
        let mut last = String::from("it could not be started");
        let mut hung_up = false;
        for _ in 0..3 {
            let Some(server) = self.server() else { break };
            match server.parse(ticket, head) {
                Ok(request) => {
                    return Ok(Request {
                        has_body: head.has_body,
                        ..request
                    });
                }
                Err(Failure::HungUp) if hung_up => return Err(Rejected::Malformed),
                // Its accept thread may have panicked with this connection in hand; then the next one shows it.
                Err(Failure::HungUp) => hung_up = true,
                Err(Failure::Refused(why)) => return Err(Rejected::Unavailable(why)),
                Err(Failure::Dead(why)) => {
                    self.replace(&server, &why);
                    last = why;
                }
            }
        }
        Err(Rejected::Unavailable(last))
    }

    fn server(&self) -> Option<Arc<PrivateServer>> {
        let mut current = lock(&self.current);
        if current.server.is_none() && current.started.elapsed() > REPLACE_PAUSE {
            current.restart();
        }
        current.server.clone()
    }

    fn replace(&self, failed: &Arc<PrivateServer>, why: &str) {
        let mut current = lock(&self.current);
        if current
            .server
            .as_ref()
            .is_some_and(|server| Arc::ptr_eq(server, failed))
        {
            current.server = None;
            FAILURES.log("failures of tiny_http", || {
                log::warn!("tiny_http failed and is replaced: {why}")
            });
            if current.started.elapsed() > REPLACE_PAUSE {
                current.restart();
            }
        }
    }
}

impl Current {
    fn restart(&mut self) {
        self.started = Instant::now();
        match PrivateServer::start() {
            Ok(server) => self.server = Some(Arc::new(server)),
            Err(error) => FAILURES.log("failures of tiny_http", || {
                log::warn!(
                    "tiny_http can't be started, trying again with a later request: {error}"
                );
            }),
        }
    }
}

/// The most failures logged in a second.
static FAILURES: LogLimit = LogLimit::new(2);

enum Failure {
    /// It closed the connection without a request.
    HungUp,
    /// It serves no more.
    Dead(String),
    /// The system refused a connection to it, which says nothing of it.
    Refused(String),
}

impl Failure {
    fn of(error: io::Error) -> Failure {
        use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound};
        match error.kind() {
            ConnectionRefused | NotFound => Failure::Dead(error.to_string()),
            BrokenPipe | ConnectionReset => Failure::HungUp,
            _ => Failure::Refused(error.to_string()),
        }
    }
}

impl PrivateServer {
    fn start() -> io::Result<PrivateServer> {
        let directory = private_directory()?;
        let socket = directory.path().join("http");
        // It panics when it can't start a thread.
        let server = catch_unwind(|| Server::http_unix(&socket))
            .map_err(|_| io::Error::other("no thread for it"))?
            .map_err(|error| io::Error::other(error.to_string()))?;
        let server = Arc::new(server);
        let awaited = Arc::new(Awaited::default());
        let (from, to) = (Arc::clone(&server), Arc::clone(&awaited));
        thread::Builder::new()
            .name("http".into())
            .stack_size(128 * 1024)
            .spawn(move || deliver(&from, &to))?;
        Ok(PrivateServer {
            server,
            socket,
            awaited,
            _directory: directory,
        })
    }

    fn parse(&self, ticket: u64, head: &RequestHead) -> Result<Request, Failure> {
        let (sender, receiver) = sync_channel(1);
        lock(&self.awaited.by_ticket).insert(ticket, sender);
        let _forget = Forget {
            awaited: &self.awaited,
            ticket,
        };
        let stream = self.send(ticket, head).map_err(Failure::of)?;
        let deadline = Instant::now() + PARSE_TIMEOUT;
        loop {
            match receiver.recv_timeout(HANG_UP_CHECK) {
                Ok(request) => return Ok(request),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::Dead("it accepts no more".into()));
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => {
                    return Err(Failure::Dead(format!(
                        "it did not take a request in {PARSE_TIMEOUT:?}"
                    )));
                }
                // The request may have come between the wait and the look, hence one more try.
                Err(RecvTimeoutError::Timeout) if has_hung_up(&stream) => {
                    return receiver.try_recv().map_err(|_| Failure::HungUp);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Half-closing behind the head makes tiny_http finish with the connection.
    fn send(&self, ticket: u64, head: &RequestHead) -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_write_timeout(Some(PARSE_TIMEOUT))?;
        stream.write_all(&head.with_first_header(TICKET, ticket))?;
        stream.shutdown(Shutdown::Write)?;
        Ok(stream)
    }
}

impl Drop for PrivateServer {
    fn drop(&mut self) {
        self.server.unblock();
    }
}

struct Forget<'a> {
    awaited: &'a Awaited,
    ticket: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(&self.awaited.by_ticket).remove(&self.ticket);
    }
}

/// Takes requests from tiny_http to the threads that await them, until tiny_http accepts no more; those
/// that still wait then learn of it, as their senders are dropped.
fn deliver(server: &Server, awaited: &Awaited) {
    while let Ok(request) = server.recv() {
        let ticket = request
            .headers()
            .first()
            .filter(|header| header.field.equiv(TICKET));
        let ticket = ticket.and_then(|header| header.value.as_str().parse::<u64>().ok());
        let sender = ticket.and_then(|ticket| lock(&awaited.by_ticket).remove(&ticket));
        let parsed = Request::new(
            request.method().clone(),
            request.url().to_owned(),
            request.http_version().clone(),
            request.headers().iter().skip(1).cloned().collect(),
        );
        // Before tiny_http's side is closed, or that would look like a refusal.
        if let Some(sender) = sender {
            let _ = sender.send(parsed);
        }
        // Taking the writer keeps tiny_http from answering by itself and frees its thread.
        drop(request.into_writer());
    }
    lock(&awaited.by_ticket).clear();
}

fn has_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// A directory only we can enter. An image may have no `/tmp`, or a read-only one.
fn private_directory() -> io::Result<TempDir> {
    let candidates = [
        std::env::temp_dir(),
        "/dev/shm".into(),
        "/run".into(),
        "/var/tmp".into(),
        ".".into(),
    ];
    let mut failure = None;
    for candidate in &candidates {
        match create_private(candidate) {
            Ok(directory) => return Ok(directory),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    let reason = failure.map_or_else(String::new, |error| error.to_string());
    Err(io::Error::other(format!(
        "no directory for a private socket, set TMPDIR to a writable one: {reason}"
    )))
}

fn create_private(parent: &Path) -> io::Result<TempDir> {
    let owner_only = std::fs::Permissions::from_mode(0o700);
    tempfile::Builder::new()
        .prefix("tunneld-")
        .permissions(owner_only)
        .tempdir_in(parent)
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Backend")
    }
}
