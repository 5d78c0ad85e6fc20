//! Every option, its default and its check.
//!
//! The command line and the environment become one checked [`Config`] here, once; nothing else in the
//! crate reads either. An error is one sentence for the person who started the daemon.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Command, CommandFactory, Parser};

use super::http::auth::{Access, Tokens};
use super::http::forwarded::Trusted;
use super::http::origin::{HostName, Origin};
use super::listener::ListenAddress;
use crate::cli::{Exit, OneOf, at_least_one, duration, one_line, parse, positive};
use crate::logging::Format;
use crate::policy::{Policy, Rule};
use crate::token::{TOKEN_VARIABLE, TokenSource, token_source};
use crate::tunnel::Times;

/// What the daemon runs with. Made by [`Config::load`], which has checked it.
#[derive(Debug, Clone)]
pub struct Config {
    /// The addresses to listen on, unless a service manager hands sockets over.
    pub listen: Vec<ListenAddress>,
    /// Whether an open daemon may be reached from elsewhere.
    pub no_auth: bool,
    /// The tokens that open the daemon; `None` leaves it open.
    pub access: Option<Arc<Access>>,
    /// The web origins that may open a tunnel. Empty: any with a token, none without.
    pub allow_origin: Vec<Origin>,
    /// The names that an open daemon answers to, besides localhost and addresses.
    pub allow_host: Vec<HostName>,
    /// The proxies that may say who their client is.
    pub trust_forwarded: Vec<Trusted>,
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
    /// How long there must be no connection for the daemon to end by itself; `None` if it never does.
    pub exit_when_idle: Option<Duration>,
    /// From the first signal to the Close 1001 of the tunnels that are still open.
    pub shutdown_grace: Duration,
    /// The form of log lines.
    pub log_format: Format,
    /// Where a service manager wants to hear how far the daemon is.
    pub notify_socket: Option<OsString>,
}

/// A WebSocket that is a raw TCP connection: put it into a sandbox, reach any port in there.
///
/// GET /tunnel?host=&port= dials the target and upgrades to a WebSocket; from then on every byte is
/// relayed as it is, in both directions. For example, with a daemon started without options:
///
///   websocat --binary tcp-l:127.0.0.1:5432 'ws://127.0.0.1:49983/tunnel?port=5432'
///
/// The same binary is the client: see tunneld connect --help.
#[derive(Debug, Parser)]
#[command(version, verbatim_doc_comment, max_term_width = 100, after_help = AFTER_HELP)]
struct Arguments {
    /// Address and port to listen on, a port of localhost, or unix:PATH; repeatable
    ///
    /// Port 0 takes a free one and the log says which. A Unix socket is for its owner and its group. Sockets that a
    /// service manager hands over (LISTEN_FDS) take the place of these.
    #[arg(
        long,
        env = "TUNNELD_LISTEN",
        value_name = "ADDRESS",
        value_delimiter = ',',
        default_value = "127.0.0.1:49983",
        value_parser = ListenAddress::parse
    )]
    listen: Vec<ListenAddress>,

    /// How many connections may be open at once; one more gets 503
    #[arg(long, env = "TUNNELD_MAX_CONNECTIONS", value_name = "N", default_value = "512", value_parser = at_least_one)]
    max_connections: usize,

    /// Form of the log's lines: text, or json for an object per line
    #[arg(long, env = "TUNNELD_LOG_FORMAT", value_name = "FORMAT", default_value = "text", value_parser = FORMATS, hide_possible_values = true)]
    log_format: Format,

    /// File with the access tokens, one per line; read again when it changes
    #[arg(long, env = "TUNNELD_ACCESS_TOKEN_FILE", value_name = "PATH", help_heading = ACCESS)]
    access_token_file: Option<PathBuf>,

    /// Allow a listen address other than loopback without a token
    #[arg(long, env = "TUNNELD_NO_AUTH", action = ArgAction::SetTrue, value_parser = BoolishValueParser::new(), help_heading = ACCESS)]
    no_auth: bool,

    /// Web origin whose pages may open tunnels, such as https://app.example.com; repeatable
    ///
    /// When none is named, any origin may with a token, and without one none but that of the request's own Host.
    #[arg(long, env = "TUNNELD_ALLOW_ORIGIN", value_name = "ORIGIN", value_delimiter = ',', value_parser = Origin::of_option, help_heading = ACCESS)]
    allow_origin: Vec<Origin>,

    /// Name by which clients reach a daemon without a token, such as its service's; repeatable
    ///
    /// A name, or *.suffix. Without a token it answers to localhost, to addresses and to these alone, as any web
    /// page could have a name of its own point here.
    #[arg(long, env = "TUNNELD_ALLOW_HOST", value_name = "NAME", value_delimiter = ',', value_parser = HostName::parse, help_heading = ACCESS)]
    allow_host: Vec<HostName>,

    /// Proxy that may say who its client is, for the log: a network, an address, or unix; repeatable
    ///
    /// From it the last address in X-Forwarded-For, or else Forwarded, that is not itself trusted is the peer; from
    /// others those headers mean nothing. It must set them anew or add to them; unix is whatever connects to a Unix
    /// socket.
    #[arg(long, env = "TUNNELD_TRUST_FORWARDED", value_name = "CIDR", value_delimiter = ',', value_parser = Trusted::parse, help_heading = ACCESS)]
    trust_forwarded: Vec<Trusted>,

    /// Targets that may be dialed, and no others: HOST[:PORT[-PORT]]; repeatable
    ///
    /// HOST is a name, *.suffix, an address, a network such as 10.0.0.0/8, or * for all; [IPv6] with a port. An
    /// address is checked as it is dialed, whatever name led to it.
    #[arg(long, env = "TUNNELD_ALLOW_TARGET", value_name = "TARGET", value_delimiter = ',', value_parser = Rule::parse, help_heading = ACCESS)]
    allow_target: Vec<Rule>,

    /// Targets that may not be dialed, in the same form; wins over --allow-target; repeatable
    ///
    /// Those in the variable are denied as well. Where names with a domain are denied, such as *.corp.internal, a name
    /// without a dot is refused: it has to be written in full.
    #[arg(long, env = "TUNNELD_DENY_TARGET", value_name = "TARGET", value_delimiter = ',', value_parser = Rule::parse, help_heading = ACCESS)]
    deny_target: Vec<Rule>,

    /// How long a client may take to send its request head
    #[arg(long, env = "TUNNELD_HEAD_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = positive, help_heading = TIMES)]
    head_timeout: Duration,

    /// How long reaching a target may take, resolving its name included
    #[arg(long, env = "TUNNELD_DIAL_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = positive, help_heading = TIMES)]
    dial_timeout: Duration,

    /// How often a client is pinged
    #[arg(long, env = "TUNNELD_PING_INTERVAL", value_name = "TIME", default_value = "30s", value_parser = positive, help_heading = TIMES)]
    ping_interval: Duration,

    /// How long to wait for a pong before giving up on an otherwise idle client
    #[arg(long, env = "TUNNELD_PING_TIMEOUT", value_name = "TIME", default_value = "5s", value_parser = positive, help_heading = TIMES)]
    ping_timeout: Duration,

    /// How long a client with unacknowledged data may stay silent before the tunnel is dropped
    #[arg(long, env = "TUNNELD_STALL_TIMEOUT", value_name = "TIME", default_value = "5m", value_parser = positive, help_heading = TIMES)]
    stall_timeout: Duration,

    /// How long a client may stay silent, without sending its Close, after the target has ended
    #[arg(long, env = "TUNNELD_LINGER", value_name = "TIME", default_value = "30s", value_parser = duration, help_heading = TIMES)]
    linger: Duration,

    /// How long a tunnel may stay without a byte moved before it is ended with Close 1001; off by default
    #[arg(long, env = "TUNNELD_IDLE_TIMEOUT", value_name = "TIME", value_parser = positive, help_heading = TIMES)]
    idle_timeout: Option<Duration>,

    /// How long there may be no connection before the daemon ends, for one that its socket starts; off by default
    #[arg(long, env = "TUNNELD_EXIT_WHEN_IDLE", value_name = "TIME", value_parser = positive, help_heading = TIMES)]
    exit_when_idle: Option<Duration>,

    /// How long open tunnels have to finish after the first signal
    #[arg(long, env = "TUNNELD_SHUTDOWN_GRACE", value_name = "TIME", default_value = "5s", value_parser = duration, help_heading = TIMES)]
    shutdown_grace: Duration,
}

const FORMATS: OneOf<Format> = OneOf(&[("text", Format::Text), ("json", Format::Json)]);

const ACCESS: &str = "Access";
const TIMES: &str = "Times (such as 500ms, 30s, 5m)";
const AFTER_HELP: &str = "\
Environment:
  Each option has the variable named beside it; an empty one counts as unset.
  TUNNELD_ACCESS_TOKEN  the access token itself (there is no option for it:
                        arguments show in ps)
  LISTEN_FDS            sockets to listen on instead of --listen
                        (sd_listen_fds); a service manager sets it
  NOTIFY_SOCKET         where READY=1 and STOPPING=1 go (sd_notify); a service
                        manager sets it
  RUST_LOG              what is logged to stderr: error, warn, info (the
                        default), debug, trace

Exit codes:
  0  shut down by SIGTERM, SIGINT or SIGHUP (a second signal ends it at once,
     with 1), or by --exit-when-idle
  1  failed while running
  2  an invalid option, an unreadable token file, an address in use";

/// How the options are defined, for what is made from it: man pages and completions.
pub fn command() -> Command {
    Arguments::command()
}

impl Config {
    /// Whether nobody but this machine may connect: there is no token, and nobody has said that this is meant.
    pub fn stays_here(&self) -> bool {
        self.access.is_none() && !self.no_auth
    }

    /// Reads `arguments` (the program's name first) and the environment, and checks them.
    ///
    /// # Errors
    /// [`Exit`].
    pub fn load<I>(arguments: I) -> Result<Config, Exit>
    where
        I: IntoIterator<Item = OsString>,
    {
        let arguments =
            parse::<Arguments>(arguments).map_err(|error| one_line(error, "tunneld --help"))?;
        let access = access(arguments.access_token_file.clone())?;
        if access.is_some() && arguments.no_auth {
            return Err(Exit::Usage(
                "--no-auth and an access token contradict each other: remove one of them".into(),
            ));
        }
        Ok(Config {
            listen: arguments.listen,
            no_auth: arguments.no_auth,
            access: access.map(Arc::new),
            allow_origin: arguments.allow_origin,
            allow_host: arguments.allow_host,
            trust_forwarded: arguments.trust_forwarded,
            policy: Policy {
                allow: arguments.allow_target,
                deny: with_variable(arguments.deny_target, DENY_VARIABLE)?,
            },
            max_connections: arguments.max_connections,
            head_timeout: arguments.head_timeout,
            dial_timeout: arguments.dial_timeout,
            times: Times {
                ping_interval: arguments.ping_interval,
                ping_timeout: arguments.ping_timeout,
                stall_timeout: arguments.stall_timeout,
                linger: arguments.linger,
                idle_timeout: arguments.idle_timeout,
            },
            exit_when_idle: arguments.exit_when_idle,
            shutdown_grace: arguments.shutdown_grace,
            log_format: arguments.log_format,
            notify_socket: std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()),
        })
    }
}

const DENY_VARIABLE: &str = "TUNNELD_DENY_TARGET";

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
