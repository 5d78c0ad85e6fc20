//! tiny_http on a private connection.
//!
//! On a public port tiny_http has no bound on a head, goes deaf when descriptors run out, and strands
//! connections under a burst. Here it sees only whole, bounded heads from the gate, one at a time over the one
//! connection it ever accepts, and gives each [`Request`] back at once. If it fails all the same, it is replaced by
//! a fresh one; tunnels don't notice.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{Shutdown, shutdown};
use tiny_http::{HTTPVersion, Header, Server};

use super::Request;
use crate::daemon::request_head::{self, RequestHead};
use crate::lock::lock;
use crate::log_limit::LogLimit;
use crate::os;

/// The header that tells whose head a request was. The gate puts it in front of all others, and only the first
/// one counts, so a client can't forge it.
pub const REQUEST_ID: &str = "X-Tunneld-Request-Id";

/// How long tiny_http may take to parse one head. It needs microseconds.
const PARSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a wait for tiny_http lasts before a look whether it has hung up instead. Each further one is twice
/// as long.
const FIRST_CHECK: Duration = Duration::from_millis(2);

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
    /// Held while a head is parsed.
    current: Mutex<Current>,
}

struct Current {
    server: Option<PrivateServer>,
    started: Instant,
}

/// One tiny_http and its connection.
struct PrivateServer {
    connection: UnixStream,
    server: Server,
    /// Ends tiny_http's wait for another connection.
    listener: OwnedFd,
}

impl Backend {
    /// Starts tiny_http.
    ///
    /// # Errors
    /// When there is no directory for its socket, or the system refuses a socket or a thread.
    pub fn start() -> io::Result<Backend> {
        Ok(Backend {
            current: Mutex::new(Current {
                server: Some(PrivateServer::start()?),
                started: Instant::now(),
            }),
        })
    }

    /// Has `head` parsed. `id` must be unique among the connections at any one time.
    ///
    /// # Errors
    /// [`Rejected`]. When tiny_http has failed, a fresh one takes the next request.
    pub fn parse(&self, id: u64, head: &RequestHead) -> Result<Request, Rejected> {
        let mut current = lock(&self.current);
        let first = match current.parse(id, head) {
            Ok(request) => return Ok(request),
            Err(failure) => failure,
        };
        match (current.parse(id, head), first) {
            (Ok(request), _) => Ok(request),
            // One that has just proved itself hung up as well, so it is the head.
            (Err(Failure::HungUp), Failure::HungUp) => Err(Rejected::Malformed),
            (Err(failure), _) => Err(Rejected::Unavailable(failure.to_string())),
        }
    }
}

impl Current {
    /// Parses with the tiny_http that is there, or with a fresh one; one that fails is done with.
    fn parse(&mut self, id: u64, head: &RequestHead) -> Result<Request, Failure> {
        let mut server = match self.server.take() {
            Some(server) => server,
            None => self.restart()?,
        };
        let parsed = server.parse(id, head);
        match &parsed {
            Ok(_) => self.server = Some(server),
            Err(why) => {
                FAILURES.log("failures of tiny_http", || {
                    log::warn!("tiny_http failed and is replaced: {why}")
                });
                server.stop();
            }
        }
        parsed
    }

    fn restart(&mut self) -> Result<PrivateServer, Failure> {
        if self.started.elapsed() <= REPLACE_PAUSE {
            return Err(Failure::NotStarted("it has failed just now".into()));
        }
        self.started = Instant::now();
        PrivateServer::start().map_err(|error| {
            FAILURES.log("failures of tiny_http", || {
                log::warn!(
                    "tiny_http can't be started, trying again with a later request: {error}"
                );
            });
            Failure::NotStarted(format!("it could not be started: {error}"))
        })
    }
}

/// The most failures logged in a second.
static FAILURES: LogLimit = LogLimit::new(2);

enum Failure {
    /// It closed the connection without a request.
    HungUp,
    /// It serves no more.
    Dead(String),
    /// There is none.
    NotStarted(String),
}

impl Failure {
    fn of(error: io::Error) -> Failure {
        use io::ErrorKind::{BrokenPipe, ConnectionReset};
        match error.kind() {
            BrokenPipe | ConnectionReset => Failure::HungUp,
            _ => Failure::Dead(error.to_string()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::HungUp => f.write_str("it closed the connection"),
            Failure::Dead(why) | Failure::NotStarted(why) => f.write_str(why),
        }
    }
}

impl PrivateServer {
    fn start() -> io::Result<PrivateServer> {
        let (listener, connection) = private_connection()?;
        connection.set_write_timeout(Some(PARSE_TIMEOUT))?;
        let waker = OwnedFd::from(listener.try_clone()?);
        // It panics when it can't start a thread.
        let server = catch_unwind(|| Server::from_listener(listener, None))
            .map_err(|_| io::Error::other("no thread for it"))?
            .map_err(|error| io::Error::other(error.to_string()))?;
        let mut server = PrivateServer {
            connection,
            server,
            listener: waker,
        };
        match server.self_test() {
            Ok(()) => Ok(server),
            Err(why) => {
                server.stop();
                Err(io::Error::other(format!("it does not serve: {why}")))
            }
        }
    }

    /// Has a first head parsed.
    fn self_test(&mut self) -> Result<(), String> {
        let head = request_head::parse(b"GET / HTTP/1.1\r\nHost: tunneld\r\n\r\n")
            .map_err(|error| format!("{error:?}"))?;
        match self.parse(0, &head) {
            Ok(_) => Ok(()),
            Err(failure) => Err(failure.to_string()),
        }
    }

    fn parse(&mut self, id: u64, head: &RequestHead) -> Result<Request, Failure> {
        self.connection
            .write_all(&head.with_first_header(REQUEST_ID, id))
            .map_err(Failure::of)?;
        let (parsed_id, request) = into_request(self.receive()?, head);
        if parsed_id != Some(id) {
            return Err(Failure::Dead("it took one request for another".into()));
        }
        Ok(request)
    }

    fn receive(&self) -> Result<tiny_http::Request, Failure> {
        let deadline = Instant::now() + PARSE_TIMEOUT;
        let mut check = FIRST_CHECK;
        while Instant::now() < deadline {
            // When it accepts no more, that is an error here.
            let received = self.server.recv_timeout(check);
            if let Some(request) = received.map_err(dead)? {
                return Ok(request);
            }
            // It may have come between the wait and the look.
            if has_hung_up(&self.connection) {
                return self.server.try_recv().map_err(dead)?.ok_or(Failure::HungUp);
            }
            check *= 2;
        }
        Err(Failure::Dead(format!(
            "it did not take a request in {PARSE_TIMEOUT:?}"
        )))
    }

    /// Ends its threads. Its own way to do that is a connection to its address, and nothing is there any more.
    fn stop(self) {
        drop(self.server);
        let _ = shutdown(&self.listener, Shutdown::Both);
    }
}

fn dead(error: io::Error) -> Failure {
    Failure::Dead(error.to_string())
}

/// What is needed of tiny_http's request, and its id.
fn into_request(request: tiny_http::Request, head: &RequestHead) -> (Option<u64>, Request) {
    let mut headers = request.headers().iter().cloned();
    let id = headers
        .next()
        .filter(|header| header.field.equiv(REQUEST_ID));
    let connection = head
        .connection
        .iter()
        .filter_map(|value| Header::from_bytes("Connection", value.as_bytes()).ok());
    let headers = headers.chain(connection).collect();
    let parsed = Request {
        has_body: head.has_body,
        expects_continue: head.expects_continue,
        ..Request::new(
            request.method().clone(),
            request.url().to_owned(),
            HTTPVersion(1, head.minor_version),
            headers,
        )
    };
    // Taking the writer keeps tiny_http from answering by itself.
    drop(request.into_writer());
    let id = id.and_then(|header| header.value.as_str().parse().ok());
    (id, parsed)
}

fn has_hung_up(stream: &UnixStream) -> bool {
    !os::ready(stream, PollFlags::IN).is_empty()
}

/// A listener and the one connection to it. Nobody else can connect: its socket file was in a directory that only
/// we can enter, and is gone. An image may have no `/tmp`, a read-only one, or a `TMPDIR` too long for a socket.
fn private_connection() -> io::Result<(UnixListener, UnixStream)> {
    let candidates: [PathBuf; 5] = [
        std::env::temp_dir(),
        "/dev/shm".into(),
        "/run".into(),
        "/var/tmp".into(),
        ".".into(),
    ];
    let mut failure = None;
    for candidate in &candidates {
        match connection_in(candidate) {
            Ok(connection) => return Ok(connection),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    let reason = failure.map_or_else(String::new, |error| error.to_string());
    Err(io::Error::other(format!(
        "no directory for a private socket, set TMPDIR to a writable one with a short path: {reason}"
    )))
}

fn connection_in(parent: &Path) -> io::Result<(UnixListener, UnixStream)> {
    let owner_only = std::fs::Permissions::from_mode(0o700);
    let directory = tempfile::Builder::new()
        .prefix("tunneld-")
        .permissions(owner_only)
        .tempdir_in(parent)?;
    // tiny_http unlinks this path once more when it ends. Whoever could put another directory in its place can't
    // have a name in there deleted that they didn't choose at random themselves.
    let name = directory.path().file_name().unwrap_or_default();
    let path = directory.path().join(name);
    let listener = UnixListener::bind(&path)?;
    let connection = UnixStream::connect(&path)?;
    Ok((listener, connection))
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Backend")
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn head() -> RequestHead {
        request_head::parse(b"GET /x HTTP/1.0\r\nA: b\r\n\r\n").unwrap()
    }

    /// Lets a replacement happen at once.
    fn started_long_ago(backend: &Backend) {
        lock(&backend.current).started = Instant::now() - 2 * REPLACE_PAUSE;
    }

    #[test]
    fn many_heads_go_over_one_connection() {
        let backend = Backend::start().unwrap();
        thread::scope(|scope| {
            for thread in 0..8 {
                let backend = &backend;
                scope.spawn(move || {
                    for n in 0..50 {
                        let head = format!("GET /{thread}/{n} HTTP/1.0\r\n\r\n");
                        let head = request_head::parse(head.as_bytes()).unwrap();
                        let request = backend.parse(thread, &head).unwrap();
                        assert_eq!(request.target, format!("/{thread}/{n}"));
                        assert_eq!(request.version, HTTPVersion(1, 0));
                    }
                });
            }
        });
    }

    #[test]
    fn a_tiny_http_that_hung_up_is_replaced_within_the_request() {
        let backend = Backend::start().unwrap();
        for _ in 0..3 {
            started_long_ago(&backend);
            let current = lock(&backend.current);
            let connection = &current.server.as_ref().unwrap().connection;
            connection.shutdown(std::net::Shutdown::Both).unwrap();
            drop(current);
            assert_eq!(backend.parse(1, &head()).unwrap().target, "/x");
        }
    }

    #[test]
    fn a_tiny_http_that_failed_twice_is_replaced_after_a_pause() {
        let backend = Backend::start().unwrap();
        let current = lock(&backend.current);
        let server = current.server.as_ref().unwrap();
        shutdown(&server.connection, Shutdown::Both).unwrap();
        drop(current);
        assert!(matches!(
            backend.parse(1, &head()),
            Err(Rejected::Unavailable(_))
        ));
        started_long_ago(&backend);
        assert!(backend.parse(1, &head()).is_ok());
    }

    #[test]
    fn a_tiny_http_that_is_stopped_waits_for_nobody() {
        const NAME: &str = "stop-test";
        // A thread without a name has its parent's.
        let threads = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap();
            let names = tasks
                .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
            names.filter(|name| name.trim() == NAME).count()
        };
        let stop = move || {
            let server = PrivateServer::start().unwrap();
            let before = threads();
            server.stop();
            let deadline = Instant::now() + Duration::from_secs(4);
            while threads() >= before {
                assert!(
                    Instant::now() < deadline,
                    "its accept thread is still there"
                );
                thread::sleep(Duration::from_millis(5));
            }
        };
        let thread = thread::Builder::new().name(NAME.into()).spawn(stop);
        thread.unwrap().join().unwrap();
    }
}
