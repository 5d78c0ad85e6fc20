//! One client connection, from its first byte to its last: head, answer, and after a 101 the tunnel.
//!
//! This is the one place where a refusal and a tunnel's two ends are logged.

use std::fmt;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tiny_http::HTTPVersion;

use crate::config::Config;
use crate::connections::Permit;
use crate::dial::{DialError, Target, dial};
use crate::http::answer::Answer;
use crate::http::backend::{Backend, Rejected};
use crate::http::handshake;
use crate::http::routes::{Passed, Rules, Upgrade, route};
use crate::lingering_close::{LingeringClose, Patience, WITH_REFUSED};
use crate::log_limit::LogLimit;
use crate::metrics::{CONTENT_TYPE, Metrics};
use crate::request_head::{self, HeadError, MAX_HEAD, MAX_HEADERS};
use crate::tunnel;
use crate::tunnel::state::State;
use crate::tunnel::target::TargetSocket;
use crate::tunnel::{Outcome, Sockets, TunnelThreads};

/// How long a client may take to read an answer that is longer than its socket's buffer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

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
    target: TargetSocket,
    name: Target,
    address: SocketAddr,
    early: Vec<u8>,
    answer: Vec<u8>,
}

/// Serves `client` until it is closed, or until the threads of its tunnel go on with it.
pub fn serve(context: &Arc<Context>, client: Arc<TcpStream>, peer: SocketAddr, permit: Permit) {
    let _ = client.set_nodelay(true);
    let id = permit.id;
    log::debug!("connected: id={id} peer={peer}");
    let refused = match upgrade(context, &client, &permit) {
        Ok(ready) => start_tunnel(context, &client, peer, permit, ready).err(),
        Err(refused) => {
            permit.leave();
            if refused.is_none() {
                log::debug!("gone before its request: id={id} peer={peer}");
            }
            refused
        }
    };
    if let Some(refused) = refused {
        refuse(context, client, id, peer, &refused);
    }
}

/// The connection's last answer. Its place must be free by now, for a client that has seen it may come again.
fn refuse(context: &Context, client: Arc<TcpStream>, id: u64, peer: SocketAddr, refused: &Refused) {
    context.note_answer(id, peer, &refused.answer);
    let _ = client.set_write_timeout(Some(ANSWER_TIMEOUT));
    let bytes = refused.answer.to_bytes(&refused.version, refused.to_head);
    if (&*client).write_all(&bytes).is_ok() {
        context.closer.close(client, WITH_REFUSED);
    }
}

/// From the first byte to the connected target.
fn upgrade(
    context: &Context,
    client: &TcpStream,
    permit: &Permit,
) -> Result<Upgradable, Option<Refused>> {
    let plain = |answer| Some(Refused::plain(answer));
    let deadline = Instant::now() + context.config.head_timeout;
    let head = request_head::read(client, deadline);
    if !permit.answering() {
        return Err(plain(Answer::refusal(
            408,
            "let go to make room, at the connection limit, as it had sent no request yet: connect again and send it at once",
        )));
    }
    let (head, early) = head.map_err(|error| no_head(&error, context).and_then(plain))?;
    let request = context
        .backend
        .parse(permit.id, &head)
        .map_err(|error| plain(not_parsed(error)))?;
    log::debug!(
        "request: id={} method={} target={:?}",
        permit.id,
        request.method,
        request.target
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
        accept,
    } = match route(&request, &context.rules).map_err(refused)? {
        Passed::Tunnel(upgrade) => upgrade,
        Passed::Metrics => {
            let text = context.metrics.text(&permit.census());
            return Err(refused(Answer::success(200, Some(CONTENT_TYPE), text)));
        }
    };
    let stream = timed_dial(context, permit.id, &name)
        .map_err(|error| refused(not_reached(&name, &error)))?;
    let (target, address) = taken_over(stream).map_err(|error| {
        refused(Answer::unavailable(format!(
            "no room for a tunnel, try again: {error}"
        )))
    })?;
    client.set_read_timeout(None).map_err(|_| None)?;
    let answer = handshake::switching_protocols(&accept);
    Ok(Upgradable {
        target,
        name,
        address,
        early,
        answer,
    })
}

fn timed_dial(context: &Context, id: u64, name: &Target) -> Result<TcpStream, DialError> {
    log::debug!("dialing: id={id} target={name}");
    let start = Instant::now();
    let dialed = dial(
        name,
        &context.config.policy,
        start + context.config.dial_timeout,
    );
    let took = start.elapsed();
    log::debug!(
        "dialed: id={id} target={name} duration={:.3}s",
        took.as_secs_f64()
    );
    if !matches!(dialed, Err(DialError::Forbidden(_))) {
        context.metrics.note_dial(dialed.is_ok(), took);
    }
    dialed
}

fn taken_over(stream: TcpStream) -> io::Result<(TargetSocket, SocketAddr)> {
    let address = stream.peer_addr()?;
    Ok((TargetSocket::new(stream)?, address))
}

/// The 101, and the tunnel behind it.
fn start_tunnel(
    context: &Arc<Context>,
    client: &Arc<TcpStream>,
    peer: SocketAddr,
    permit: Permit,
    ready: Upgradable,
) -> Result<(), Refused> {
    let name = format!(
        "id={} peer={peer} target={} address={}",
        permit.id, ready.name, ready.address
    );
    let state = Arc::new(State::new(permit.id));
    permit.tunneling(&state);
    let sockets = Sockets {
        client: Arc::clone(client),
        early: ready.early,
        target: ready.target,
    };
    let open = || {
        context.metrics.note_opened();
        log::info!("tunnel opened: {name}");
        (&**client).write_all(&ready.answer)
    };
    let ended = {
        let (context, client) = (Arc::clone(context), Arc::clone(client));
        let (state, name) = (Arc::clone(&state), name.clone());
        move |outcome: &Outcome| {
            context.metrics.note_closed(outcome.end, state.age());
            permit.leave();
            log_end(&name, outcome, &state);
            if outcome.client_is_there {
                context.closer.close(client, behind_tunnel(&context));
            }
        }
    };
    let (threads, times) = (&context.threads, context.config.times);
    tunnel::start(threads, sockets, times, &state, open, ended).map_err(|error| {
        Refused::plain(Answer::unavailable(format!(
            "no thread for a tunnel, try again: {error}"
        )))
    })
}

fn log_end(name: &str, outcome: &Outcome, state: &State) {
    let (up, down) = state.counts();
    let (duration, reason) = (state.age().as_secs_f64(), &outcome.reason);
    log::info!(
        "tunnel closed: {name} up={up} down={down} duration={duration:.3}s end={} reason={reason:?}",
        outcome.end.label()
    );
}

/// With a client that may not have read all of its tunnel yet.
fn behind_tunnel(context: &Context) -> Patience {
    Patience {
        time: context.config.times.linger,
        bytes: usize::MAX,
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

/// The most refusals logged in a second.
static REFUSALS: LogLimit = LogLimit::new(100);

impl Context {
    /// Logs an answer before it is sent, as websocat never shows a refusal's body, and counts a refusal.
    pub fn note_answer(&self, id: impl fmt::Display, peer: SocketAddr, answer: &Answer) {
        let (status, reason) = (answer.status, &answer.message);
        if status < 400 {
            return log::debug!("answered: id={id} peer={peer} status={status}");
        }
        self.metrics.note_refusal(status);
        REFUSALS.log("refusals", || {
            log::info!("refused: id={id} peer={peer} status={status} reason={reason:?}")
        });
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
                "the request head was not finished in {:?}: send it at once",
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
            "requests can't be taken just now, try again: {why}"
        )),
    }
}

fn not_reached(name: &Target, error: &DialError) -> Answer {
    if let DialError::Forbidden(_) = error {
        let message = format!(
            "target {name} is {error}; the operator of this daemon decides with --allow-target and --deny-target"
        );
        return Answer::refusal(403, message);
    }
    Answer::refusal(
        502,
        format!("cannot reach {name}: {error}; check that it is running and listens there"),
    )
}
