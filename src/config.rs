//! Every option, its default and its check.
//!
//! The command line and the environment become one checked [`Config`] here, once; nothing else in the
//! crate reads either. An error is one sentence for the person who started the daemon.

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::error::ErrorKind;
use clap::{ArgAction, Parser};

use crate::http::auth::{Access, Tokens};
use crate::http::origin::Origin;
use crate::policy::{Policy, Rule, search_list};

/// The variable that holds the token itself. It has no option, as arguments show in `ps`.
pub const TOKEN_VARIABLE: &str = "TUNNELD_ACCESS_TOKEN";

/// The longest duration an option takes. It keeps every sum with an `Instant` in range.
const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// What the daemon runs with. Made by [`Config::load`], which has checked it.
#[derive(Debug, Clone)]
pub struct Config {
    /// The address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The tokens that open the daemon; `None` leaves it open.
    pub access: Option<Arc<Access>>,
    /// The web origins that may open a tunnel. Empty: any with a token, none without.
    pub allow_origin: Vec<Origin>,
    /// Which targets may be dialed.
    pub policy: Policy,
    /// How many connections may be open at once, tunnels and unanswered requests together.
    pub max_connections: usize,
    /// From accepting a connection to the end of its request head.
    pub head_timeout: Duration,
    /// From the request to a connected target, resolving the name included.
    pub dial_timeout: Duration,
    /// What a tunnel needs to know of time.
    pub times: Times,
    /// From the first signal to the Close 1001 of the tunnels that are still open.
    pub shutdown_grace: Duration,
    /// Where a service manager wants to hear how far the daemon is.
    pub notify_socket: Option<OsString>,
}

/// The clocks of a tunnel.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Between two pings.
    pub ping_interval: Duration,
    /// From a written ping to its pong, when nothing else was sent to the client.
    pub ping_timeout: Duration,
    /// From the last sign of life of a client that has bytes before it.
    pub stall_timeout: Duration,
    /// From the last byte moved to the end, once one direction has ended.
    pub linger: Duration,
}

/// Why the daemon does not start, in one sentence; or what `--help` and `--version` print.
#[derive(Debug)]
pub enum NoConfig {
    /// An option, the environment or the token file is wrong. Goes to stderr, exit code 2.
    Wrong(String),
    /// `--help` or `--version` was asked for. Goes to stdout, exit code 0.
    Asked(String),
}

impl From<String> for NoConfig {
    fn from(sentence: String) -> Self {
        NoConfig::Wrong(sentence)
    }
}

/// A WebSocket that is a raw TCP connection: put it into a sandbox, reach any port in there.
///
/// GET /tunnel?host=&port= dials the target and upgrades to a WebSocket; from then on every byte is
/// relayed as it is, in both directions. For example, with a daemon started without options:
///
///   websocat --binary tcp-l:127.0.0.1:5432 'ws://127.0.0.1:49983/tunnel?port=5432'
///
/// It is its own client, too: see tunneld connect --help.
#[derive(Debug, Parser)]
#[command(version, verbatim_doc_comment, max_term_width = 100, after_help = AFTER_HELP)]
struct Arguments {
    /// Address and port to listen on; port 0 takes a free one and the log says which
    #[arg(
        long,
        env = "TUNNELD_LISTEN",
        value_name = "ADDRESS:PORT",
        default_value = "127.0.0.1:49983"
    )]
    listen: SocketAddr,

    /// How many connections may be open at once; one more gets 503
    #[arg(long, env = "TUNNELD_MAX_CONNECTIONS", value_name = "N", default_value = "512", value_parser = at_least_one)]
    max_connections: usize,

    /// File that holds the access token(s), one a line; read again when it changes
    #[arg(long, env = "TUNNELD_ACCESS_TOKEN_FILE", value_name = "PATH", help_heading = ACCESS)]
    access_token_file: Option<PathBuf>,

    /// Allow a listen address other than loopback without a token
    #[arg(long, env = "TUNNELD_NO_AUTH", action = ArgAction::SetTrue, value_parser = BoolishValueParser::new(), help_heading = ACCESS)]
    no_auth: bool,

    /// Web origin whose pages may open tunnels, such as https://app.example.com; repeatable
    ///
    /// When none is named, any origin may with a token and none may without.
    #[arg(long, env = "TUNNELD_ALLOW_ORIGIN", value_name = "ORIGIN", value_delimiter = ',', value_parser = Origin::parse, help_heading = ACCESS)]
    allow_origin: Vec<Origin>,

    /// Targets that may be dialed, and no others: HOST[:PORT[-PORT]]; repeatable
    ///
    /// HOST is a name, *.suffix, an address, a network such as 10.0.0.0/8, or * for all; [IPv6] with a port. An
    /// address is checked as it is dialed, whatever name led to it.
    #[arg(long, env = "TUNNELD_ALLOW_TARGET", value_name = "TARGET", value_delimiter = ',', value_parser = Rule::parse, help_heading = ACCESS)]
    allow_target: Vec<Rule>,

    /// Targets that may not be dialed, in the same form; wins over --allow-target; repeatable
    ///
    /// Those in the variable are denied as well.
    #[arg(long, env = "TUNNELD_DENY_TARGET", value_name = "TARGET", value_delimiter = ',', value_parser = Rule::parse, help_heading = ACCESS)]
    deny_target: Vec<Rule>,

    /// Longest time for a whole request head
    #[arg(long, env = "TUNNELD_HEAD_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = positive, help_heading = TIMES)]
    head_timeout: Duration,

    /// Longest time to reach a target, resolving its name included
    #[arg(long, env = "TUNNELD_DIAL_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = positive, help_heading = TIMES)]
    dial_timeout: Duration,

    /// Time between two keepalive pings
    #[arg(long, env = "TUNNELD_PING_INTERVAL", value_name = "TIME", default_value = "30s", value_parser = positive, help_heading = TIMES)]
    ping_interval: Duration,

    /// Time in which an otherwise idle client answers a ping
    #[arg(long, env = "TUNNELD_PING_TIMEOUT", value_name = "TIME", default_value = "5s", value_parser = positive, help_heading = TIMES)]
    ping_timeout: Duration,

    /// Time without any sign of life after which a client with bytes before it is given up
    #[arg(long, env = "TUNNELD_STALL_TIMEOUT", value_name = "TIME", default_value = "5m", value_parser = positive, help_heading = TIMES)]
    stall_timeout: Duration,

    /// Time without a byte moved after which a tunnel ends whose one direction has ended
    #[arg(long, env = "TUNNELD_LINGER", value_name = "TIME", default_value = "30s", value_parser = duration, help_heading = TIMES)]
    linger: Duration,

    /// Time that tunnels get to end by themselves after the first signal
    #[arg(long, env = "TUNNELD_SHUTDOWN_GRACE", value_name = "TIME", default_value = "5s", value_parser = duration, help_heading = TIMES)]
    shutdown_grace: Duration,
}

const ACCESS: &str = "Access";
const TIMES: &str = "Times (such as 500ms, 30s, 5m)";
const AFTER_HELP: &str = "\
Environment:
  Every option can be set by the variable named beside it.
  TUNNELD_ACCESS_TOKEN  the access token itself (there is no option for it: arguments show in ps)
  NOTIFY_SOCKET         where READY=1 and STOPPING=1 go (sd_notify); a service manager sets it
  RUST_LOG              what is logged to stderr: error, warn, info (the default), debug, trace

Exit codes:
  0  ended in order, by SIGTERM, SIGINT or SIGHUP (a second signal ends at once, with 1)
  1  failed while running
  2  a wrong option, an unreadable token file, an address in use";

impl Config {
    /// Reads `arguments` (the program's name first) and the environment, and checks them.
    ///
    /// # Errors
    /// [`NoConfig`]: one sentence on what is wrong, or the text of `--help`.
    pub fn load<I>(arguments: I) -> Result<Config, NoConfig>
    where
        I: IntoIterator<Item = OsString>,
    {
        let arguments = Arguments::try_parse_from(arguments)
            .map_err(|error| one_line(error, "tunneld --help"))?;
        let access = access(arguments.access_token_file.clone())?;
        check_access(&arguments, access.is_some())?;
        Ok(Config {
            listen: arguments.listen,
            access: access.map(Arc::new),
            allow_origin: arguments.allow_origin,
            policy: policy(arguments.allow_target, arguments.deny_target)?,
            max_connections: arguments.max_connections,
            head_timeout: arguments.head_timeout,
            dial_timeout: arguments.dial_timeout,
            times: Times {
                ping_interval: arguments.ping_interval,
                ping_timeout: arguments.ping_timeout,
                stall_timeout: arguments.stall_timeout,
                linger: arguments.linger,
            },
            shutdown_grace: arguments.shutdown_grace,
            notify_socket: std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()),
        })
    }
}

const DENY_VARIABLE: &str = "TUNNELD_DENY_TARGET";

/// The search list is of use to denials alone.
fn policy(allow: Vec<Rule>, deny: Vec<Rule>) -> Result<Policy, String> {
    let deny = with_variable(deny, DENY_VARIABLE)?;
    let resolver = match deny[..] {
        [] => String::new(),
        _ => std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    };
    Ok(Policy {
        allow,
        deny,
        search: search_list(&resolver),
    })
}

/// What an image forbids, a command line must not allow by forbidding something else.
fn with_variable(mut rules: Vec<Rule>, variable: &str) -> Result<Vec<Rule>, String> {
    let text = std::env::var(variable).unwrap_or_default();
    for rule in text.split(',').filter(|rule| !rule.is_empty()) {
        let rule = Rule::parse(rule).map_err(|error| format!("{variable} {rule:?}: {error}"))?;
        if !rules.contains(&rule) {
            rules.push(rule);
        }
    }
    Ok(rules)
}

/// Running without a token must be either harmless (loopback) or said out loud.
fn check_access(arguments: &Arguments, has_token: bool) -> Result<(), String> {
    if has_token && arguments.no_auth {
        return Err(
            "--no-auth and an access token contradict each other: remove one of them".into(),
        );
    }
    if !has_token && !arguments.no_auth && !arguments.listen.ip().is_loopback() {
        return Err(format!(
            "refusing to listen on {} without an access token: set {TOKEN_VARIABLE} or --access-token-file, \
             or say --no-auth if everyone who can connect may reach every port in here",
            arguments.listen
        ));
    }
    Ok(())
}

/// Where the access token is.
pub(crate) enum TokenSource {
    File(PathBuf),
    Variable(OsString),
    Nowhere,
}

/// Looks for the access token, which must not be in two places.
pub(crate) fn token_source(file: Option<PathBuf>) -> Result<TokenSource, String> {
    match (file, std::env::var_os(TOKEN_VARIABLE)) {
        (Some(_), Some(_)) => Err(format!(
            "{TOKEN_VARIABLE} and --access-token-file are both set: remove one of them"
        )),
        (Some(path), None) => Ok(TokenSource::File(path)),
        (None, Some(value)) => Ok(TokenSource::Variable(value)),
        (None, None) => Ok(TokenSource::Nowhere),
    }
}

fn access(file: Option<PathBuf>) -> Result<Option<Access>, String> {
    match token_source(file)? {
        TokenSource::File(path) => Access::from_file(path).map(Some),
        TokenSource::Variable(value) => {
            let value = value.into_string().unwrap_or_default();
            Tokens::parse(&value)
                .map(|tokens| Some(Access::fixed(tokens)))
                .map_err(|error| format!("{TOKEN_VARIABLE} {error}"))
        }
        TokenSource::Nowhere => Ok(None),
    }
}

/// clap explains over several paragraphs; scripts and logs want one line.
pub(crate) fn one_line(error: clap::Error, help: &str) -> NoConfig {
    let text = error.to_string();
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        return NoConfig::Asked(text);
    }
    let first = text.split("\n\n").next().unwrap_or(&text);
    let first = first.split_whitespace().collect::<Vec<_>>().join(" ");
    let first = first.strip_prefix("error: ").unwrap_or(&first);
    NoConfig::Wrong(format!("{first} (see {help})"))
}

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text)
        .map_err(|error| format!("{error}; write it as 500ms, 30s or 5m"))?;
    if duration > MAX_DURATION {
        return Err("at most 366days".into());
    }
    Ok(duration)
}

pub(crate) fn positive(text: &str) -> Result<Duration, String> {
    let duration = duration(text)?;
    if duration < Duration::from_millis(1) {
        Err("at least 1ms".into())
    } else {
        Ok(duration)
    }
}

pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("not a number: {error}")),
    }
}

impl fmt::Display for NoConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoConfig::Wrong(text) | NoConfig::Asked(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for NoConfig {}
