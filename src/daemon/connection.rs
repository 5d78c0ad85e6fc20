//! One client connection, from its first byte to its last: head, answer, and after a 101 the tunnel.
//!
//! This is the one place where a refusal and a tunnel's two ends are logged.

use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::kv::Value;
use tiny_http::HTTPVersion;

use super::admission::{Eviction, Permit};
use super::http::answer::{Answer, ProxyError};
use super::http::backend::{Backend, Rejected};
use super::http::forwarded;
use super::http::handshake::Handshake;
use super::http::routes::{Routed, Rules, Upgrade, route};
use super::lingering_close::LingeringClose;
use super::metrics::{CONTENT_TYPE, Metrics};
use super::options::Config;
use super::peer::Peer;
use super::request_head::{self, HeadError, MAX_HEAD, MAX_HEADERS};
use crate::caller::Caller;
use crate::dial::dial;
use crate::dial_error::{DialError, Step};
use crate::log_limit::LogLimit;
use crate::target::Target;
use crate::threads::{MakeRoom, retry_in_room};
use crate::tunnel;
use crate::tunnel::{Outcome, Sides, State, Stream, Tcp, TunnelThreads};

/// How long a client may take to read an answer that is longer than its socket's buffer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// What a client waits for that has announced it: its request may pass, and the target is about to be dialed (RFC 9110 §15.2.1). A fresh socket's buffer has room for it.
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What all connections share.
#[derive(Debug)]
pub struct Context {
    /// The checked options.
    pub config: Config,
    /// Who may do what.
    pub rules: Rules,
    /// tiny_http.
    pub backend: Backend,
    /// Where refused connections go.
    pub closer: LingeringClose,
    /// Where tunnels run.
    pub threads: TunnelThreads,
    /// Takes a thread from a connection whose head is awaited.
    pub make_room: MakeRoom,
    /// What is counted.
    pub metrics: Metrics,
}

/// An answer that ends the connection, and how to print it.
struct Refused {
    answer: Answer,
    version: HTTPVersion,
    to_head: bool,
}

/// A request that may be answered with a 101, and what the tunnel needs.
struct Upgradable {
    target: Tcp,
    name: Target,
    address: SocketAddr,
    early: Vec<u8>,
    handshake: Handshake,
}

/// Serves `client` until it is closed, or until the threads of its tunnel go on with it.
pub fn serve(context: &Arc<Context>, client: Arc<TcpStream>, mut peer: Peer, permit: Permit) {
    let _ = client.set_nodelay(true);
    let id = permit.id;
    log::debug!(id, peer:% = peer; "connected");
    let refused = match upgrade(context, &client, &mut peer, &permit) {
        Ok(ready) => start_tunnel(context, &client, peer, permit, ready).err(),
        Err(refused) => {
            permit.leave();
            if refused.is_none() {
                log::debug!(id, peer:% = peer; "gone before its answer");
            }
            refused
        }
    };
    if let Some(refused) = refused {
        refuse(context, client, id, peer, &refused);
    }
}

/// The connection's last answer. Its slot must be free by now, for a client that has seen it may come again.
fn refuse(context: &Context, client: Arc<TcpStream>, id: u64, peer: Peer, refused: &Refused) {
    context.note_answer(Some(id), peer, &refused.answer);
    let _ = client.set_write_timeout(Some(ANSWER_TIMEOUT));
    let bytes = refused.answer.to_bytes(&refused.version, refused.to_head);
    if (&*client).write_all(&bytes).is_ok() {
        context.closer.close(client);
    }
}

/// From the first byte to the connected target. `peer` becomes the client behind the proxy, if there is one.
fn upgrade(
    context: &Context,
    client: &TcpStream,
    peer: &mut Peer,
    permit: &Permit,
) -> Result<Upgradable, Option<Refused>> {
    let plain = |answer| Some(Refused::plain(answer));
    let deadline = Instant::now() + context.config.head_timeout;
    let head = request_head::read(client, deadline);
    permit
        .answering()
        .map_err(|eviction| plain(evicted(eviction)))?;
    let (head, early) = head.map_err(|error| no_head(&error, context).and_then(plain))?;
    let request = context
        .backend
        .parse(permit.id, &head)
        .map_err(|error| plain(not_parsed(error)))?;
    *peer = forwarded::client(*peer, &request, &context.config.trust_forwarded);
    log::debug!(
        id = permit.id, method:% = request.method, "target" = request.target.as_str();
        "request"
    );
    let refused = |answer| {
        Some(Refused {
            answer,
            version: request.version.clone(),
            to_head: request.is_head(),
        })
    };
    let Upgrade {
        target: name,
        handshake,
    } = match route(&request, &context.rules) {
        Routed::Tunnel(upgrade) => upgrade,
        Routed::Answer(answer) => return Err(refused(answer)),
        Routed::Metrics => {
            let text = context.metrics.text(&permit.census());
            return Err(refused(Answer::success(200, Some(CONTENT_TYPE), text)));
        }
    };
    if request.expects_continue {
        let mut client = client;
        client.write_all(CONTINUE).map_err(|_| None)?;
    }
    let caller = Caller {
        client,
        peer: peer.ip(),
        has_sent_more: !early.is_empty(),
    };
    let dialed = timed_dial(context, permit.id, &name, &caller);
    let (stream, address) = dialed.map_err(|error| not_reached(&name, &error).and_then(refused))?;
    let target = Tcp::new(stream).map_err(|error| refused(no_room(&error)))?;
    client.set_read_timeout(None).map_err(|_| None)?;
    Ok(Upgradable {
        target,
        name,
        address,
        early,
        handshake,
    })
}

fn timed_dial(
    context: &Context,
    id: u64,
    name: &Target,
    caller: &Caller<'_>,
) -> Result<(TcpStream, SocketAddr), DialError> {
    log::debug!(id, "target":% = name; "dialing");
    let start = Instant::now();
    let deadline = start + context.config.dial_timeout;
    let attempt = || match dial(name, &context.config.policy, deadline, Some(caller)) {
        Err(refused) if refused.is_want_of_a_thread() => Err(refused),
        dialed => Ok(dialed),
    };
    let dialed = attempt()
        .or_else(|refused| retry_in_room(&context.make_room, refused, |_| attempt()))
        .unwrap_or_else(Err);
    let took = start.elapsed();
    log::debug!(id, "target":% = name, duration = took.as_secs_f64(); "dialed");
    // None of these says anything of the target.
    let is_of_target = !matches!(
        dialed,
        Err(DialError::Forbidden(_)
            | DialError::Incomplete
            | DialError::ResolverBusy
            | DialError::CallerGone
            | DialError::Exhausted(_))
    );
    if is_of_target {
        context.metrics.note_dial(dialed.is_ok(), took);
    }
    dialed
}

/// The 101, and the tunnel behind it.
fn start_tunnel(
    context: &Arc<Context>,
    client: &Arc<TcpStream>,
    peer: Peer,
    permit: Permit,
    ready: Upgradable,
) -> Result<(), Refused> {
    let name = TunnelName {
        id: permit.id,
        peer,
        target: ready.name,
        address: ready.address,
    };
    let state = State::new(permit.id).map_err(|error| Refused::plain(no_room(&error)))?;
    let state = Arc::new(state);
    permit.tunneling(&state);
    let sides = Sides {
        peer: Arc::clone(client),
        peer_failure: None,
        early: ready.early,
        protocol: ready.handshake.protocol(),
        stream: Stream::Tcp(ready.target),
    };
    let open = || {
        context.metrics.note_opened();
        name.log_opened();
        (&**client).write_all(&ready.handshake.switching_protocols())
    };
    let ended = {
        let (context, client) = (Arc::clone(context), Arc::clone(client));
        let (state, name) = (Arc::clone(&state), name.clone());
        move |outcome: &Outcome| {
            context
                .metrics
                .note_closed(outcome.end, state.activity.age());
            let delivery = permit.deliver();
            name.log_closed(outcome, &state);
            if outcome.peer_is_there {
                let linger = context.config.times.linger;
                context.closer.close_tunnel(client, linger, delivery);
            }
        }
    };
    let (threads, times) = (&context.threads, context.config.times);
    tunnel::start(threads, sides, times, &state, open, ended)
        .map_err(|error| Refused::plain(no_room(&error)))
}

/// What a tunnel is called in the log.
#[derive(Debug, Clone)]
struct TunnelName {
    id: u64,
    peer: Peer,
    target: Target,
    address: SocketAddr,
}

impl TunnelName {
    fn log_opened(&self) {
        log::info!(
            id = self.id, peer:% = self.peer, "target":% = self.target, address:% = self.address;
            "tunnel opened"
        );
    }

    fn log_closed(&self, outcome: &Outcome, state: &State) {
        let (up, down) = state.activity.counts();
        log::info!(
            id = self.id, peer:% = self.peer, "target":% = self.target, address:% = self.address,
            up, down, duration = state.activity.age().as_secs_f64(),
            end:% = outcome.end.label(), reason = outcome.reason.as_str();
            "tunnel closed"
        );
    }
}

impl Refused {
    /// An answer that knows nothing of its request.
    fn plain(answer: Answer) -> Refused {
        Refused {
            answer,
            version: HTTPVersion(1, 1),
            to_head: false,
        }
    }
}

/// The refusals of one status that are logged in a second, so that a flood of one hides no other.
static REFUSALS: [(u16, &str, LogLimit); 10] = [
    refusals(400, "refusals with status=400"),
    refusals(401, "refusals with status=401"),
    refusals(403, "refusals with status=403"),
    refusals(404, "refusals with status=404"),
    refusals(405, "refusals with status=405"),
    refusals(408, "refusals with status=408"),
    refusals(426, "refusals with status=426"),
    refusals(431, "refusals with status=431"),
    refusals(502, "refusals with status=502"),
    refusals(503, "refusals with status=503"),
];

/// Of a status that is not among them.
static OTHER_REFUSALS: LogLimit = LogLimit::new(MAX_REFUSALS);

/// The most refusals of a status logged in a second.
const MAX_REFUSALS: u32 = 100;

const fn refusals(status: u16, what: &'static str) -> (u16, &'static str, LogLimit) {
    (status, what, LogLimit::new(MAX_REFUSALS))
}

impl Context {
    /// Logs an answer before it is sent, as websocat never shows a refusal's body, and counts a refusal.
    /// A connection that was never served has no `id`.
    pub fn note_answer(&self, id: Option<u64>, peer: Peer, answer: &Answer) {
        let (status, reason) = (answer.status, answer.message.as_str());
        let id = id.map_or_else(Value::null, Value::from);
        if status < 400 {
            return log::debug!(id, peer:% = peer, status; "answered");
        }
        self.metrics.note_refusal(status);
        let of_status = REFUSALS.iter().find(|(of, ..)| *of == status);
        let (what, limit) = of_status
            .map_or(("other refusals", &OTHER_REFUSALS), |(_, what, limit)| {
                (*what, limit)
            });
        limit.log(what, || {
            log::info!(id, peer:% = peer, status, reason; "refused");
        });
    }
}

fn evicted(eviction: Eviction) -> Answer {
    let too_late = |lack: &str| {
        Answer::refusal(
            408,
            format!(
                "{lack} and no request received yet: reconnect and send the request immediately"
            ),
        )
    };
    match eviction {
        Eviction::ConnectionLimit => {
            too_late("connection limit reached").because(ProxyError::ConnectionLimit)
        }
        Eviction::NoThread => too_late("no thread left").because(ProxyError::Internal),
        Eviction::Shutdown => Answer::unavailable("shutting down: try again"),
    }
}

fn no_head(error: &HeadError, context: &Context) -> Option<Answer> {
    Some(match error {
        HeadError::Gone => return None,
        HeadError::TooLarge => Answer::refusal(
            431,
            format!(
                "the request head is longer than {MAX_HEAD} bytes or has more than {MAX_HEADERS} headers: send a shorter one"
            ),
        ),
        HeadError::TimedOut => Answer::refusal(
            408,
            format!(
                "no complete request head within {:?}: send it at once",
                context.config.head_timeout
            ),
        ),
        HeadError::Malformed(why) => Answer::refusal(
            400,
            format!("the request head is malformed: {why}; send HTTP/1.1"),
        ),
    })
}

fn not_parsed(error: Rejected) -> Answer {
    match error {
        Rejected::Malformed => Answer::refusal(400, "the request head is malformed: send HTTP/1.1"),
        Rejected::Unavailable(why) => Answer::unavailable(format!(
            "requests can't be handled at the moment, try again: {why}"
        )),
    }
}

fn no_room(error: &io::Error) -> Answer {
    Answer::unavailable(format!("no room for a tunnel, try again: {error}"))
}

/// `None` when nobody waits for an answer.
fn not_reached(name: &Target, error: &DialError) -> Option<Answer> {
    Some(match error {
        DialError::CallerGone => return None,
        DialError::Exhausted(error) => no_room(error),
        DialError::ResolverBusy => {
            Answer::unavailable(format!("cannot reach {name} yet, try again: {error}"))
        }
        DialError::Forbidden(_) | DialError::Incomplete => Answer::refusal(
            403,
            format!(
                "target {name} is {error}; the operator of this daemon decides with --allow-target and --deny-target"
            ),
        )
        .because(ProxyError::TargetProhibited),
        DialError::Resolve(_) | DialError::TimedOut(_) | DialError::Connect(_) => Answer::refusal(
            502,
            format!("cannot reach {name}: {error}; check that it is running and listening there"),
        )
        .because(proxy_error(error)),
    })
}

fn is_refused((_, error): &(SocketAddr, io::Error)) -> bool {
    error.kind() == ErrorKind::ConnectionRefused
}

/// In the words of RFC 9209. Of several addresses one that was there speaks, or else the last.
fn proxy_error(error: &DialError) -> ProxyError {
    match error {
        DialError::Resolve(_) => ProxyError::DnsError,
        DialError::TimedOut(Step::Resolving) => ProxyError::DnsTimeout,
        DialError::TimedOut(Step::Connecting) => ProxyError::ConnectionTimeout,
        DialError::Connect(failures) => match failures.last().map(|(_, error)| error.kind()) {
            _ if failures.iter().any(is_refused) => ProxyError::ConnectionRefused,
            Some(ErrorKind::TimedOut) => ProxyError::ConnectionTimeout,
            Some(ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted) => {
                ProxyError::ConnectionTerminated
            }
            Some(ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable) => {
                ProxyError::TargetUnroutable
            }
            _ => ProxyError::TargetUnavailable,
        },
        _ => ProxyError::Internal,
    }
}
