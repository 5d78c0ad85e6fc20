//! The options of `tunneld connect`, their defaults and their checks.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Command, CommandFactory, Parser};

use super::forward::{Destination, Forward, To, parse_host};
use super::headers::Headers;
use super::proxy::Proxy;
use super::server::{HOST, OwnCertificate, PORT, Server};
use super::tls::Trust;
use crate::cli::{Bind, Exit, OneOf, at_least_one, duration, one_line, positive};
use crate::token::{self, Kind, TOKEN_VARIABLE, TokenSource, read_file, token_source};
use crate::tunnel::{Protocol, Times};

/// How long a server with bytes before it may be silent. They lie ahead of the ping in its buffers for as
/// long as the target takes none, but a tunneld pings meanwhile, every 30 s by default.
const STALL_TIMEOUT: Duration = Duration::from_secs(300);

/// What the client runs with. Made by [`Config::load`], which has checked it.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the daemon is.
    pub server: Server,
    /// What is asked for the connection to it.
    pub proxy: Option<Proxy>,
    /// The certificates it may show; `None`: the connection is not encrypted.
    pub trust: Option<Trust>,
    /// What it is asked with.
    pub token: Token,
    /// The token goes as `Authorization: Bearer`.
    pub bearer: bool,
    /// What it is asked with besides.
    pub headers: Headers,
    /// What is led through tunnels.
    pub local: Local,
    /// The end of stdin does not end the upload.
    pub no_close: bool,
    /// How many connections the local ports may have at once, all together.
    pub max_connections: usize,
    /// From resolving the URL's host to the end of the TLS handshake.
    pub dial_timeout: Duration,
    /// How long a daemon or a target that isn't there yet is asked again.
    pub wait: Option<Duration>,
    /// What is spoken with the daemon.
    pub protocol: Protocol,
    /// What a connection needs to know of time.
    pub times: Times,
}

/// What is led through tunnels.
#[derive(Debug, Clone)]
pub enum Local {
    /// Stdin and stdout, to this target.
    Stdio(Destination),
    /// Connections to local ports.
    Ports(Vec<Forward>),
}

/// Where the access token comes from. It can't be printed.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// There is none.
    None,
    /// The token itself.
    Is(String),
    /// The first line of this file that is not blank, read for each connection.
    InFile(PathBuf),
}

/// The client's end of a tunnel: bytes of stdin, or of a local port, reach the target through a tunneld.
///
/// Local ports, in the words of ssh; a SOCKS5 proxy; and stdin and stdout, for an SSH ProxyCommand:
///
///   tunneld connect ws://sandbox:49983 -L 5432 -L 8080:3000 -L 9000:db:9000
///   tunneld connect ws://sandbox:49983 -D 1080
///   ssh -o ProxyCommand='tunneld connect ws://sandbox:49983 -W 22' sandbox
#[derive(Debug, Parser)]
#[command(name = "tunneld connect", bin_name = "tunneld connect", version, verbatim_doc_comment, max_term_width = 100, after_help = AFTER_HELP)]
struct Arguments {
    /// The daemon, ws://host[:port][/path] or wss://...; without a path, /tunnel
    #[arg(value_name = "URL")]
    url: String,

    /// Lead connections to this local port to HOST:PORT as seen by the daemon, each through a tunnel of its own;
    /// repeatable. Without HOST it is localhost over there, without PORT the same port, without BIND localhost here; port
    /// 0 picks a free one, and the log says which
    #[arg(short = 'L', value_name = "[BIND:]PORT[:HOST:PORT]", value_parser = Forward::parse_fixed)]
    local_forward: Vec<Forward>,

    /// Lead connections to this local port to whatever they ask for by SOCKS5; repeatable. Names are looked up by the
    /// daemon (curl: --socks5-hostname)
    #[arg(short = 'D', value_name = "[BIND:]PORT", value_parser = Forward::parse_dynamic)]
    dynamic_forward: Vec<Forward>,

    /// Lead stdin and stdout to HOST:PORT as seen by the daemon
    #[arg(short = 'W', value_name = "HOST:PORT", value_parser = Destination::parse)]
    stdio_forward: Option<Destination>,

    /// Leave the connection open in both directions when stdin ends, for a server that takes that for an abort, or for a
    /// stdin of /dev/null
    #[arg(short = 'n', long)]
    no_close: bool,

    /// The target's host as seen by the daemon, for --port [default: localhost]
    #[arg(long, value_name = "HOST", value_parser = parse_host)]
    host: Option<String>,

    /// The target's port, for stdin and stdout or --listen
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,

    /// Lead connections to this local port to --port
    #[arg(long, value_name = "[ADDRESS:]PORT", value_parser = Bind::parse)]
    listen: Option<Bind>,

    /// How many connections the local ports may have at once, all together; one more is reset
    #[arg(long, value_name = "N", default_value = "512", value_parser = at_least_one)]
    max_connections: usize,

    /// File whose first line is the access token; read again for each connection
    #[arg(long, value_name = "PATH")]
    access_token_file: Option<PathBuf>,

    /// Proxy to the daemon: http://[USER:PASSWORD@]HOST[:1080] (CONNECT) or socks5h://...; empty for none. Without the
    /// option https_proxy, http_proxy and all_proxy count, but for localhost; no_proxy counts in any case. Arguments show
    /// in ps: put a URL with a password into a variable
    #[arg(long, value_name = "URL")]
    proxy: Option<String>,

    /// Send the token as Authorization: Bearer instead of X-Access-Token
    #[arg(long)]
    bearer: bool,

    /// Header to send with the request, such as 'Host: box', or @FILE with one a line; repeatable. Arguments show in ps:
    /// put secrets into a file
    #[arg(short = 'H', value_name = "'NAME: VALUE' | @FILE")]
    header: Vec<String>,

    /// PEM file of certificates to trust besides the system's, for wss://: a CA's, or the daemon's own
    #[arg(long, value_name = "PATH")]
    ca_file: Option<PathBuf>,

    /// PEM file of the client's own certificate, for a wss:// server that asks for one; read once, at the start
    #[arg(long, value_name = "PATH")]
    cert: Option<PathBuf>,

    /// PEM file of its key, without a passphrase [default: in the file of --cert]
    #[arg(long, value_name = "PATH")]
    key: Option<PathBuf>,

    /// How long connecting to the daemon may take, TLS included. Its answer gets three times as long, as it dials the
    /// target first
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = positive)]
    dial_timeout: Duration,

    /// Try again for so long while nobody answers at the daemon's address, or a 502, 503 or 504 says that the target or
    /// the daemon is not there yet; for stdin and stdout as for each connection to a local port
    #[arg(long, value_name = "TIME", value_parser = positive)]
    wait: Option<Duration>,

    /// What to speak with the daemon: websocket passes every proxy, connect-tcp takes less CPU
    #[arg(long, value_name = "PROTOCOL", default_value = "websocket", value_parser = PROTOCOLS, hide_possible_values = true)]
    protocol: Protocol,

    /// How often the daemon is pinged
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = positive)]
    ping_interval: Duration,

    /// How long to wait for a pong before giving up on an otherwise idle daemon
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = positive)]
    ping_timeout: Duration,

    /// How long the daemon may be silent, without closing the connection, once both sides have sent their Close
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    linger: Duration,
}

const AFTER_HELP: &str = "\
Environment:
  TUNNELD_ACCESS_TOKEN  the access token itself (there is no option for it:
                        arguments show in ps)
  https_proxy, http_proxy, all_proxy, no_proxy
                        the proxy for wss://, for ws://, for both; and the
                        hosts without one (as in curl)
  RUST_LOG              what is logged of local ports, to stderr: error, warn,
                        info (the default), debug

Exit codes:
  0  both sides ended in order, and all data was delivered; with local ports,
     SIGTERM, SIGINT or SIGHUP
  1  refused, unreachable, or cut off; stderr has the reason
  2  an invalid option, an unreadable file, an address in use";

const PROTOCOLS: OneOf<Protocol> = OneOf(&[
    ("websocket", Protocol::WebSocket),
    ("connect-tcp", Protocol::ConnectTcp),
]);

/// The arguments behind the program's name, if they are the client's.
pub fn client_arguments(arguments: &[OsString]) -> Option<&[OsString]> {
    let own = arguments.get(1..)?;
    own.first()
        .is_some_and(|first| first == "connect")
        .then_some(own)
}

/// How the options are defined, for what is made from it: man pages and completions.
pub fn command() -> Command {
    Arguments::command()
}

impl Config {
    /// Reads `arguments` (`connect` first) and the environment, and checks them.
    ///
    /// # Errors
    /// [`Exit`]: one sentence on what is wrong, or the text of `--help`.
    pub fn load(arguments: &[OsString]) -> Result<Config, Exit> {
        let arguments = Arguments::try_parse_from(arguments)
            .map_err(|error| one_line(error, "tunneld connect --help"))?;
        let server = Server::parse(&arguments.url)?;
        let local = Local::find(&arguments, &server)?;
        if arguments.no_close && matches!(local, Local::Ports(_)) {
            let why = "-n is about the end of stdin, which no local port has: remove it";
            return Err(why.to_owned().into());
        }
        let trust = trust(&arguments, &server)?;
        let variable = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
        let proxy = Proxy::find(arguments.proxy.as_deref(), &server, variable)?;
        let headers = Headers::parse(&arguments.header)?;
        let token = Token::find(arguments.access_token_file)?;
        check_bearer(arguments.bearer, &token, &headers)?;
        Ok(Config {
            server,
            proxy,
            trust,
            token,
            bearer: arguments.bearer,
            headers,
            local,
            no_close: arguments.no_close,
            max_connections: arguments.max_connections,
            dial_timeout: arguments.dial_timeout,
            wait: arguments.wait,
            protocol: arguments.protocol,
            times: Times {
                idle_timeout: None,
                ping_interval: arguments.ping_interval,
                ping_timeout: arguments.ping_timeout,
                stall_timeout: STALL_TIMEOUT,
                linger: arguments.linger,
            },
        })
    }
}

fn trust(arguments: &Arguments, server: &Server) -> Result<Option<Trust>, String> {
    let (ca_file, cert, key) = (&arguments.ca_file, &arguments.cert, &arguments.key);
    let given = [
        ("--ca-file", ca_file.is_some()),
        ("--cert", cert.is_some()),
        ("--key", key.is_some()),
    ];
    let given = given.into_iter().find(|(_, is_given)| *is_given);
    if let (false, Some((option, _))) = (server.is_tls(), given) {
        return Err(format!("{option} is of no use with ws://: write wss://"));
    }
    let own = match (cert, key) {
        (None, Some(_)) => {
            return Err("--key is the key of a certificate: name that with --cert FILE".into());
        }
        (None, None) => None,
        (Some(cert), key) => Some(OwnCertificate {
            cert: cert.clone(),
            key: key.as_ref().unwrap_or(cert).clone(),
        }),
    };
    if !server.is_tls() {
        return Ok(None);
    }
    Trust::load(ca_file.as_deref(), own.as_ref()).map(Some)
}

fn check_bearer(bearer: bool, token: &Token, headers: &Headers) -> Result<(), String> {
    if bearer && !token.is_some() {
        return Err(format!(
            "--bearer has no access token to send: set {TOKEN_VARIABLE} or --access-token-file"
        ));
    }
    if bearer && headers.has("Authorization") {
        return Err(
            "--bearer and the Authorization of -H contradict each other: remove one of them".into(),
        );
    }
    Ok(())
}

/// The option.
pub const LISTEN: &str = "--listen";

impl Local {
    fn find(arguments: &Arguments, server: &Server) -> Result<Local, String> {
        let fixed = arguments.local_forward.iter();
        let mut ports: Vec<_> = fixed.chain(&arguments.dynamic_forward).cloned().collect();
        let given = Destination {
            host: arguments.host.clone(),
            port: arguments.port,
        };
        if let Some(to) = &arguments.stdio_forward {
            check_alone(&ports, arguments.listen, &given)?;
            server.check_free("-W", &[HOST, PORT])?;
            return Ok(Local::Stdio(to.clone()));
        }
        for port in &ports {
            server.check_free(port.option, &[HOST, PORT])?;
        }
        match (arguments.listen, ports.first()) {
            (Some(bind), _) => {
                server.check(&given)?;
                let (option, to) = (LISTEN, To::Target(given));
                ports.insert(0, Forward { option, bind, to });
                Ok(Local::Ports(ports))
            }
            (None, None) => server.check(&given).map(|()| Local::Stdio(given)),
            (None, Some(_)) if given == Destination::default() => Ok(Local::Ports(ports)),
            (None, Some(port)) => Err(format!(
                "--host and --port are of no use with {}: write -L PORT:HOST:PORT",
                port.option
            )),
        }
    }
}

/// Checks that nothing else than `-W` says what is led where.
fn check_alone(ports: &[Forward], listen: Option<Bind>, given: &Destination) -> Result<(), String> {
    let port = ports.first().map(|port| port.option);
    let target = (*given != Destination::default()).then_some("--host and --port");
    match port.or(listen.map(|_| LISTEN)).or(target) {
        None => Ok(()),
        Some(other) => Err(format!(
            "-W and {other} contradict each other: -W leads stdin and stdout to the one target that it names"
        )),
    }
}

impl Token {
    fn find(file: Option<PathBuf>) -> Result<Token, String> {
        match token_source(file)? {
            TokenSource::File(path) => {
                // A pipe, such as the shell's <(...), can be read once.
                let can_change = std::fs::metadata(&path).is_ok_and(|file| file.is_file());
                let now = token_in(&path, Kind::Any)?;
                Ok(if can_change {
                    Token::InFile(path)
                } else {
                    Token::Is(now)
                })
            }
            TokenSource::Variable(value) => first_line(&value.to_string_lossy())
                .map(Token::Is)
                .map_err(|error| format!("{TOKEN_VARIABLE} {error}")),
            TokenSource::Nowhere => Ok(Token::None),
        }
    }

    /// Whether there is one.
    pub fn is_some(&self) -> bool {
        *self != Token::None
    }

    /// The token as it is now, if there is one.
    ///
    /// # Errors
    /// Why it can't be had, in a sentence that never shows it.
    pub fn get(&self) -> Result<Option<String>, String> {
        match self {
            Token::None => Ok(None),
            Token::Is(token) => Ok(Some(token.clone())),
            Token::InFile(path) => token_in(path, Kind::Regular).map(Some),
        }
    }
}

fn token_in(path: &Path, kind: Kind) -> Result<String, String> {
    let text = read_file(path, kind)?;
    first_line(&text).map_err(|error| format!("the access token file {} {error}", path.display()))
}

/// The first line that is not blank.
fn first_line(text: &str) -> Result<String, &'static str> {
    let token = token::lines(text).next().ok_or(token::IS_EMPTY)?;
    token::check(token)?;
    Ok(token.into())
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Token::None => "None",
            Token::Is(_) | Token::InFile(_) => "(hidden)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_the_first_line_that_is_not_blank() {
        assert_eq!(
            first_line("\n  a-token \nanother\n").as_deref(),
            Ok("a-token")
        );
        for text in ["", " \n\n", "two words", "t\u{e4}g"] {
            assert!(first_line(text).is_err(), "{text:?}");
        }
        assert!(!format!("{:?}", Token::Is("s3cret".into())).contains("s3cret"));
    }
}
