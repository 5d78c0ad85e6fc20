//! From a configuration to an upgraded connection: dial, encrypt, ask, and judge the answer.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use socket2::SockRef;
use url::Url;

use super::answer::{Head, NoAnswer, read_head};
use super::carrier::Carrier;
use super::deadline::{Until, about};
use super::failure::{Failure, Kind, Reason};
use super::forward::Destination;
use super::options::Config;
use super::proxy::Proxy;
use super::redactor::Redactor;
use super::refusal;
use super::server::{Server, USER_AGENT};
use super::upgrade::Upgrade;
use crate::dial::dial;
use crate::policy::Policy;
use crate::tunnel::find_dead_peers;

/// How many bytes may wait unsent in the socket's buffer (`TCP_NOTSENT_LOWAT`, tcp(7)).
const UNSENT: u32 = 128 * 1024;

/// How many times the dial timeout the answer may take. The daemon dials the target before it answers, for as long
/// as its own dial timeout, and says what came of it: so long the client must listen, whoever is slower.
pub const ANSWER_TIMEOUT: u32 = 3;

/// A connection that has been upgraded.
#[derive(Debug)]
pub struct Upgraded {
    /// The connection, blocking and without timeouts. Under TLS it is a Unix socket with the plain bytes, on which
    /// what is TCP's alone fails.
    pub socket: TcpStream,
    /// What carries it, if it is such a one.
    pub carrier: Carrier,
    /// What came behind the head of the 101.
    pub early: Vec<u8>,
    /// For what the server says from now on.
    pub redactor: Redactor,
}

/// Connects to the server before the dial timeout is over, and upgrades to a tunnel to `to` before its answer has taken
/// `answer_limit`.
///
/// # Errors
/// [`Failure`].
pub fn open(
    config: &Config,
    to: &Destination,
    answer_limit: Duration,
) -> Result<Upgraded, Failure> {
    let server = &config.server;
    let mut asked = ask(config, &server.url_to(to), answer_limit)?;
    let head = asked.read_answer(server)?;
    if head.status != 101 {
        return Err(asked.refusal(&head, server));
    }
    asked.upgrade.check(&head).map_err(|why| {
        let (why, what) = (asked.redactor.printable(&why), asked.upgrade.name());
        format!("{} does not upgrade to {what}: {why}", server.address)
    })?;
    let Asked {
        socket,
        carrier,
        redactor,
        ..
    } = asked;
    let reset = socket.set_read_timeout(None);
    reset
        .and_then(|()| socket.set_write_timeout(None))
        .map_err(|error| format!("cannot use the connection to {}: {error}", server.address))?;
    Ok(Upgraded {
        socket,
        carrier,
        early: asked.received,
        redactor,
    })
}

/// Asks the server for a tunnel to nowhere: a tunneld says so once path and token are right, and dials nothing.
///
/// # Errors
/// [`Failure`].
pub fn check(config: &Config) -> Result<(), Failure> {
    let server = &config.server;
    let mut asked = ask(config, &server.url_to_nowhere(), config.dial_timeout)?;
    let head = asked.read_answer(server)?;
    // Some other server, or a proxy that names the target itself.
    if head.status == 101 {
        return Ok(());
    }
    let refusal = asked.refusal(&head, server);
    match refusal.kind {
        Kind::Answered(400, Some(Reason::NoTarget)) => Ok(()),
        _ => Err(refusal),
    }
}

/// A server that has been asked.
struct Asked {
    socket: TcpStream,
    carrier: Carrier,
    upgrade: Upgrade,
    deadline: Instant,
    /// From the request to `deadline`, and what that is to the user.
    limit: String,
    received: Vec<u8>,
    redactor: Redactor,
}

/// Connects to the server and asks it for `url`. The answer may take as long as `limit`.
fn ask(config: &Config, url: &Url, limit: Duration) -> Result<Asked, Failure> {
    let token = config.token.get()?;
    let of_proxy = config.proxy.iter().flat_map(Proxy::secrets);
    let redactor = Redactor::new(token.as_deref())
        .and(config.headers.secrets(), "(a header's value)")
        .and(of_proxy, "(the proxy's password)");
    let (socket, carrier) = connect(config, &redactor)?;
    let deadline = Instant::now() + limit;
    let upgrade = Upgrade::new(config.protocol);
    let request = request(config, url, &upgrade, token.as_deref());
    // One that takes no more may have said why.
    let _ = Until::new(&socket, deadline).write_all(request.as_bytes());
    Ok(Asked {
        socket,
        carrier,
        upgrade,
        deadline,
        limit: named(limit, config.dial_timeout),
        received: Vec::new(),
        redactor,
    })
}

impl Asked {
    /// Reads the head of the answer, and leaves in `received` what came behind it.
    fn read_answer(&mut self, server: &Server) -> Result<Head, Failure> {
        let mut stream = Until::new(&self.socket, self.deadline);
        read_head(&mut stream, &mut self.received).map_err(|no_answer| {
            let of_server = |what: String| {
                format!("{} {}", server.address, self.redactor.printable(&what))
            };
            match no_answer {
                NoAnswer::TimedOut => Failure::not_there(format!(
                    "no answer from {} within {}: raise it if the daemon or the target is only slow",
                    server.address, self.limit
                )),
                NoAnswer::Closed(how) => match self.carrier.alert() {
                    Some(why) => format!("no TLS with {}: {why}", server.address).into(),
                    None => Failure::not_there(of_server(how)),
                },
                NoAnswer::Is(what) => of_server(what).into(),
            }
        })
    }

    /// What an answer says that is no upgrade.
    fn refusal(self, head: &Head, server: &Server) -> Failure {
        if self.upgrade.is_unknown_to(head) {
            let what = self.upgrade.name();
            let address = &server.address;
            return format!("{address} does not speak {what}: leave out --protocol connect-tcp")
                .into();
        }
        let stream = Until::new(&self.socket, self.deadline);
        refusal::read(head, stream, self.received, server, &self.redactor)
    }
}

/// A limit of the answer, for a person.
fn named(limit: Duration, dial_timeout: Duration) -> String {
    match limit {
        _ if limit == dial_timeout => format!("{limit:?}, --dial-timeout"),
        _ if limit == dial_timeout * ANSWER_TIMEOUT => {
            format!("{limit:?}, {ANSWER_TIMEOUT} times --dial-timeout")
        }
        _ => format!("{}, the rest of --wait", about(limit)),
    }
}

fn connect(config: &Config, redactor: &Redactor) -> Result<(TcpStream, Carrier), Failure> {
    let server = &config.server;
    let deadline = Instant::now() + config.dial_timeout;
    let stream = match &config.proxy {
        Some(proxy) => proxy.connect(&server.address, redactor, deadline)?,
        None => {
            let dialed = dial(&server.address, &Policy::default(), deadline, None);
            let (stream, _) = dialed.map_err(|error| {
                Failure::not_there(format!("cannot connect to {}: {error}", server.address))
            })?;
            stream
        }
    };
    // Without it a pong waits behind more bytes.
    let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
    find_dead_peers(&stream, config.times);
    match &config.trust {
        Some(trust) => trust.encrypt(stream, server, config.protocol, redactor, deadline),
        None => Ok((stream, Carrier::default())),
    }
}

fn request(config: &Config, url: &Url, upgrade: &Upgrade, token: Option<&str>) -> String {
    let mut request = format!("GET {}", url.path());
    if let Some(query) = url.query() {
        request.extend(["?", query]);
    }
    request.push_str(" HTTP/1.1\r\n");
    let mut add = |name: &str, value: &str| request.extend([name, ": ", value, "\r\n"]);
    if !config.headers.has("Host") {
        add("Host", &host(url));
    }
    add("Connection", "Upgrade");
    add("Upgrade", upgrade.token());
    for (name, value) in upgrade.headers() {
        add(name, value);
    }
    if !config.headers.has("User-Agent") {
        add("User-Agent", USER_AGENT);
    }
    match token {
        Some(token) if config.bearer => add("Authorization", &format!("Bearer {token}")),
        Some(token) => add("X-Access-Token", token),
        None => {}
    }
    for (name, value) in config.headers.iter() {
        add(name, value);
    }
    request + "\r\n"
}

fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}
