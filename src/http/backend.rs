//! tiny_http on a private Unix socket.
//!
//! On a public port tiny_http has no bound on a head, goes deaf when descriptors run out, and strands
//! connections under a burst. Here it sees only whole, bounded heads from the gate, one at a time over a
//! connection that stays, and gives each [`Request`] back at once. If it fails all the same, it is replaced by
//! a fresh one on a fresh socket; tunnels don't notice.

use std::fmt;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;
use tiny_http::{HTTPVersion, Header, Server};

use super::Request;
use crate::lock::lock;
use crate::log_limit::LogLimit;
use crate::request_head::{self, RequestHead};

/// The header that tells whose head a request was. The gate puts it in front of all others, and only the first
/// one counts, so a client can't forge it.
pub const TICKET: &str = "X-Tunneld-Ticket";

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

/// One tiny_http with its socket.
struct PrivateServer {
    /// The connection heads go over. It is given up once tiny_http has no more use for it.
    connection: Option<UnixStream>,
    server: Server,
    socket: PathBuf,
    _directory: TempDir,
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

    /// Has `head` parsed. `ticket` must be unique among the connections at any one time.
    ///
    /// # Errors
    /// [`Rejected`]. When tiny_http has failed, a fresh one has been started for the next request.
    pub fn parse(&self, ticket: u64, head: &RequestHead) -> Result<Request, Rejected> {
        let mut last = String::from("it could not be started");
        let mut hung_up = false;
        let mut current = lock(&self.current);
        for _ in 0..3 {
            let Some(server) = current.server() else {
                break;
            };
            match server.parse(ticket, head) {
                Ok(request) => return Ok(request),
                Err(Failure::HungUp) if hung_up => return Err(Rejected::Malformed),
                // The connection may have been one it had given up already, or it panicked on its way to
                // another; then the next one shows it.
                Err(Failure::HungUp) => hung_up = true,
                Err(Failure::Refused(why)) => return Err(Rejected::Unavailable(why)),
                Err(Failure::Dead(why)) => {
                    current.replace(&why);
                    hung_up = false;
                    last = why;
                }
            }
        }
        Err(Rejected::Unavailable(last))
    }
}

impl Current {
    fn server(&mut self) -> Option<&mut PrivateServer> {
        if self.server.is_none() {
            self.restart();
        }
        self.server.as_mut()
    }

    fn replace(&mut self, why: &str) {
        FAILURES.log("failures of tiny_http", || {
            log::warn!("tiny_http failed and is replaced: {why}")
        });
        self.server = None;
        self.restart();
    }

    fn restart(&mut self) {
        if self.started.elapsed() <= REPLACE_PAUSE {
            return;
        }
        self.started = Instant::now();
        match PrivateServer::start() {
            Ok(server) => self.server = Some(server),
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
        let mut server = PrivateServer {
            connection: None,
            server,
            socket,
            _directory: directory,
        };
        server
            .prove()
            .map_err(|why| io::Error::other(format!("it does not serve: {why}")))?;
        Ok(server)
    }

    /// Has a first head parsed. The connection for all others is there then.
    fn prove(&mut self) -> Result<(), String> {
        let head = request_head::parse(b"GET / HTTP/1.1\r\n\r\n").map_err(|e| format!("{e:?}"))?;
        match self.parse(0, &head) {
            Ok(_) => Ok(()),
            Err(Failure::HungUp) => Err("it hung up".into()),
            Err(Failure::Dead(why) | Failure::Refused(why)) => Err(why),
        }
    }

    /// The connection is only kept behind a request that leaves it as it was.
    fn parse(&mut self, ticket: u64, head: &RequestHead) -> Result<Request, Failure> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect().map_err(Failure::of)?,
        };
        connection
            .write_all(&head.with_first_header(TICKET, ticket))
            .map_err(Failure::of)?;
        let request = self.receive(&connection)?;
        let (mine, request) = taken(request, head);
        if mine != Some(ticket) {
            return Err(Failure::Dead("it took one request for another".into()));
        }
        // tiny_http closes behind a request of HTTP/1.0.
        if request.version >= HTTPVersion(1, 1) {
            self.connection = Some(connection);
        }
        Ok(request)
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_write_timeout(Some(PARSE_TIMEOUT))?;
        Ok(stream)
    }

    fn receive(&self, connection: &UnixStream) -> Result<tiny_http::Request, Failure> {
        let deadline = Instant::now() + PARSE_TIMEOUT;
        let mut check = FIRST_CHECK;
        while Instant::now() < deadline {
            // When it accepts no more, that is an error here.
            let received = self.server.recv_timeout(check);
            if let Some(request) = received.map_err(dead)? {
                return Ok(request);
            }
            // It may have come between the wait and the look.
            if has_hung_up(connection) {
                return self.server.try_recv().map_err(dead)?.ok_or(Failure::HungUp);
            }
            check *= 2;
        }
        Err(Failure::Dead(format!(
            "it did not take a request in {PARSE_TIMEOUT:?}"
        )))
    }
}

fn dead(error: io::Error) -> Failure {
    Failure::Dead(error.to_string())
}

/// What is needed of tiny_http's request, and its ticket.
fn taken(request: tiny_http::Request, head: &RequestHead) -> (Option<u64>, Request) {
    let mut headers = request.headers().iter().cloned();
    let ticket = headers.next().filter(|header| header.field.equiv(TICKET));
    let connection = head
        .connection
        .iter()
        .filter_map(|value| Header::from_bytes("Connection", value.as_bytes()).ok());
    let headers = headers.chain(connection).collect();
    let parsed = Request {
        has_body: head.has_body,
        ..Request::new(
            request.method().clone(),
            request.url().to_owned(),
            request.http_version().clone(),
            headers,
        )
    };
    // Taking the writer keeps tiny_http from answering by itself.
    drop(request.into_writer());
    let ticket = ticket.and_then(|header| header.value.as_str().parse().ok());
    (ticket, parsed)
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
