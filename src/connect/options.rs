//! The options of `tunneld connect`, their defaults and their checks.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use url::Url;

use super::tls::Trust;
use crate::config::{
    NoConfig, TOKEN_VARIABLE, TokenSource, at_least_one, duration, one_line, positive, token_source,
};
use crate::dial::{Host, Target};
use crate::http::auth;

/// The path of a URL that has none.
const DEFAULT_PATH: &str = "/tunnel";

/// The longest token file, in bytes.
const MAX_TOKEN_FILE: u64 = 64 * 1024;

/// What the client runs with. Made by [`Config::load`], which has checked it.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the daemon is.
    pub server: Server,
    /// The certificates it may show; `None`: the connection is not encrypted.
    pub trust: Option<Trust>,
    /// What it is asked with.
    pub token: Token,
    /// The local port; `None`: stdin and stdout are the connection.
    pub listen: Option<SocketAddr>,
    /// How many connections the local port may have at once.
    pub max_connections: usize,
    /// From the first look at the URL's host to the upgraded connection.
    pub dial_timeout: Duration,
    /// What a connection needs to know of time.
    pub times: Times,
}

/// The clocks of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Between two pings.
    pub ping_interval: Duration,
    /// How much longer than that an idle server may be silent.
    pub ping_timeout: Duration,
    /// From the last byte moved to the end, once one direction has ended.
    pub linger: Duration,
}

/// A server, and what it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// The URL as it is asked for; its scheme is `ws` or `wss`.
    pub url: Url,
    /// The host and the port of the URL.
    pub address: Target,
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
/// An SSH ProxyCommand, and a local port for everything else:
///
///   ssh -o ProxyCommand='tunneld connect ws://sandbox:49983 --port 22' sandbox
///   tunneld connect ws://sandbox:49983 --port 5432 --listen 127.0.0.1:5432
#[derive(Debug, Parser)]
#[command(name = "tunneld connect", bin_name = "tunneld connect", version, verbatim_doc_comment, max_term_width = 100, after_help = AFTER_HELP)]
struct Arguments {
    /// The daemon, ws://host[:port][/path] or wss://...; without a path, /tunnel
    #[arg(value_name = "URL")]
    url: String,

    /// The target's host as seen by the daemon [default: localhost]
    #[arg(long, value_name = "HOST")]
    host: Option<String>,

    /// The target's port
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,

    /// Take connections on this local port, one tunnel each, instead of stdin and stdout; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,

    /// How many connections the local port may have at once; one more is reset
    #[arg(long, value_name = "N", default_value = "512", value_parser = at_least_one)]
    max_connections: usize,

    /// File whose first line is the access token; read again for each connection
    #[arg(long, value_name = "PATH")]
    access_token_file: Option<PathBuf>,

    /// PEM file of certificates to trust besides the system's, for wss://
    #[arg(long, value_name = "PATH")]
    ca_file: Option<PathBuf>,

    /// Longest time to reach the daemon and the target behind it
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = positive)]
    dial_timeout: Duration,

    /// Time between two keepalive pings
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = positive)]
    ping_interval: Duration,

    /// How much longer than that an otherwise idle daemon may be silent
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = positive)]
    ping_timeout: Duration,

    /// Time without a byte moved after which a connection ends whose one direction has ended
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    linger: Duration,
}

const AFTER_HELP: &str = "\
Environment:
  TUNNELD_ACCESS_TOKEN  the access token itself (there is no option for it: arguments show in ps)
  RUST_LOG              what --listen logs to stderr: error, warn, info (the default), debug

Exit codes:
  0  the target ended the connection in order; with --listen, SIGTERM or SIGINT
  1  refused, not reached, or broken; stderr has the reason
  2  a wrong option, an unreadable file, an address in use";

/// The arguments behind the program's name, if they are the client's.
pub fn of_client(arguments: &[OsString]) -> Option<&[OsString]> {
    let own = arguments.get(1..)?;
    own.first()
        .is_some_and(|first| first == "connect")
        .then_some(own)
}

impl Config {
    /// Reads `arguments` (`connect` first) and the environment, and checks them.
    ///
    /// # Errors
    /// [`NoConfig`]: one sentence on what is wrong, or the text of `--help`.
    pub fn load(arguments: &[OsString]) -> Result<Config, NoConfig> {
        let arguments = Arguments::try_parse_from(arguments)
            .map_err(|error| one_line(error, "tunneld connect --help"))?;
        let server = Server::parse(&arguments.url, arguments.host.as_deref(), arguments.port)?;
        let trust = match (server.is_tls(), &arguments.ca_file) {
            (true, ca_file) => Some(Trust::load(ca_file.as_deref())?),
            (false, None) => None,
            (false, Some(_)) => {
                return Err("--ca-file is of no use with ws://: write wss://"
                    .to_owned()
                    .into());
            }
        };
        Ok(Config {
            server,
            trust,
            token: Token::find(arguments.access_token_file)?,
            listen: arguments.listen,
            max_connections: arguments.max_connections,
            dial_timeout: arguments.dial_timeout,
            times: Times {
                ping_interval: arguments.ping_interval,
                ping_timeout: arguments.ping_timeout,
                linger: arguments.linger,
            },
        })
    }
}

impl Server {
    /// Takes the URL of a daemon apart and puts the target into its query.
    ///
    /// # Errors
    /// What is wrong, in a sentence. It never shows the URL, which might hold a password.
    pub fn parse(text: &str, host: Option<&str>, port: Option<u16>) -> Result<Server, String> {
        let mut url = Url::parse(text)
            .map_err(|error| format!("the URL is none: {error}; write ws://host:port"))?;
        let scheme = match url.scheme() {
            "ws" | "http" => "ws",
            "wss" | "https" => "wss",
            other => {
                return Err(format!(
                    "the URL begins with {other}: instead of ws: or wss:"
                ));
            }
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(format!(
                "the URL holds a user or a password, which shows in ps: set {TOKEN_VARIABLE} or --access-token-file"
            ));
        }
        if url.fragment().is_some() {
            return Err("the URL has a part behind a #, which is never sent: remove it".into());
        }
        url.set_scheme(scheme)
            .map_err(|()| format!("the URL can't be one of {scheme}:"))?;
        if matches!(url.path(), "" | "/") {
            url.set_path(DEFAULT_PATH);
        }
        let port = port.map(|port| port.to_string());
        add_parameter(&mut url, "host", host)?;
        add_parameter(&mut url, "port", port.as_deref())?;
        if !has_parameter(&url, "port") {
            return Err("no target port: add --port PORT".into());
        }
        let address = address(&url).ok_or("the URL names no host that can be reached")?;
        Ok(Server { url, address })
    }

    /// Whether the connection is encrypted.
    pub fn is_tls(&self) -> bool {
        self.url.scheme() == "wss"
    }
}

fn add_parameter(url: &mut Url, name: &str, value: Option<&str>) -> Result<(), String> {
    let Some(value) = value else { return Ok(()) };
    if has_parameter(url, name) {
        return Err(format!(
            "--{name} {value} and the URL's own {name}= contradict each other: remove one of them"
        ));
    }
    url.query_pairs_mut().append_pair(name, value);
    Ok(())
}

fn has_parameter(url: &Url, name: &str) -> bool {
    url.query_pairs().any(|(key, _)| key == name)
}

fn address(url: &Url) -> Option<Target> {
    let host = Host::parse(url.host_str().filter(|host| !host.is_empty())?)?;
    let port = url.port_or_known_default().filter(|&port| port != 0)?;
    Some(Target { host, port })
}

impl Token {
    fn find(file: Option<PathBuf>) -> Result<Token, String> {
        match token_source(file)? {
            TokenSource::File(path) => {
                // A pipe, such as the shell's <(...), can be read once.
                let can_change = std::fs::metadata(&path).is_ok_and(|file| file.is_file());
                let token = Token::InFile(path);
                match token.get()? {
                    Some(now) if !can_change => Ok(Token::Is(now)),
                    _ => Ok(token),
                }
            }
            TokenSource::Variable(value) => first_line(&value.to_string_lossy())
                .map(Token::Is)
                .map_err(|error| format!("{TOKEN_VARIABLE} {error}")),
            TokenSource::Nowhere => Ok(Token::None),
        }
    }

    /// The token as it is now, if there is one.
    ///
    /// # Errors
    /// Why it can't be had, in a sentence that never shows it.
    pub fn get(&self) -> Result<Option<String>, String> {
        match self {
            Token::None => Ok(None),
            Token::Is(token) => Ok(Some(token.clone())),
            Token::InFile(path) => {
                let name = path.display();
                let text = read_bounded(path).map_err(|error| {
                    format!("cannot read the access token file {name}: {error}")
                })?;
                first_line(&text)
                    .map(Some)
                    .map_err(|error| format!("the access token file {name} {error}"))
            }
        }
    }
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(MAX_TOKEN_FILE)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// The first line that is not blank.
fn first_line(text: &str) -> Result<String, &'static str> {
    let token = auth::lines(text).next().ok_or(auth::IS_EMPTY)?;
    auth::check(token)?;
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
    fn a_url_leads_to_an_address_and_a_request() {
        for (text, host, port, address, url) in [
            (
                "ws://box",
                None,
                Some(5),
                "box:80",
                "ws://box/tunnel?port=5",
            ),
            (
                "ws://box:9/",
                None,
                Some(5),
                "box:9",
                "ws://box:9/tunnel?port=5",
            ),
            (
                "wss://box",
                None,
                Some(5),
                "box:443",
                "wss://box/tunnel?port=5",
            ),
            (
                "http://box",
                None,
                Some(5),
                "box:80",
                "ws://box/tunnel?port=5",
            ),
            (
                "https://box:80",
                None,
                Some(5),
                "box:80",
                "wss://box:80/tunnel?port=5",
            ),
            (
                "ws://[::1]:9",
                None,
                Some(5),
                "[::1]:9",
                "ws://[::1]:9/tunnel?port=5",
            ),
            (
                "ws://localhost",
                None,
                Some(5),
                "localhost:80",
                "ws://localhost/tunnel?port=5",
            ),
            (
                "ws://box/a/tunnel",
                None,
                Some(5),
                "box:80",
                "ws://box/a/tunnel?port=5",
            ),
            (
                "ws://box?port=7",
                None,
                None,
                "box:80",
                "ws://box/tunnel?port=7",
            ),
            (
                "ws://box?x=1&y=a%20b",
                None,
                Some(5),
                "box:80",
                "ws://box/tunnel?x=1&y=a%20b&port=5",
            ),
            (
                "ws://box?host=db",
                None,
                Some(5),
                "box:80",
                "ws://box/tunnel?host=db&port=5",
            ),
            (
                "ws://box",
                Some("::1"),
                Some(5),
                "box:80",
                "ws://box/tunnel?host=%3A%3A1&port=5",
            ),
            (
                "ws://box",
                Some("a&b=c"),
                Some(5),
                "box:80",
                "ws://box/tunnel?host=a%26b%3Dc&port=5",
            ),
        ] {
            let server = Server::parse(text, host, port).unwrap();
            assert_eq!(
                (server.address.to_string().as_str(), server.url.as_str()),
                (address, url),
                "{text}"
            );
            assert_eq!(server.is_tls(), url.starts_with("wss"), "{text}");
        }
    }

    #[test]
    fn a_url_that_leads_nowhere_is_refused() {
        for (text, host, port, part) in [
            ("box:80", None, Some(5), "ws:"),
            ("", None, Some(5), "write ws://"),
            ("ws://", None, Some(5), "write ws://"),
            ("ftp://box", None, Some(5), "ftp:"),
            ("ws://s3cret@box", None, Some(5), "--access-token-file"),
            ("ws://user:s3cret@box", None, Some(5), "--access-token-file"),
            ("ws://box#s3cret", None, Some(5), "#"),
            ("ws://box", None, None, "--port"),
            ("ws://box?port=7", None, Some(5), "--port 5"),
            ("ws://box?host=a", Some("b"), Some(5), "--host b"),
            ("ws://box:0", None, Some(5), "no host"),
            ("ws://a..b", None, Some(5), "no host"),
        ] {
            let error = Server::parse(text, host, port).unwrap_err();
            assert!(
                error.contains(part) && !error.contains("s3cret"),
                "{text}: {error}"
            );
        }
    }

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
