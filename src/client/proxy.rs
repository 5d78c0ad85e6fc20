//! The proxy on the way out: which one, from `--proxy` or the variables that curl and others read, and the connection
//! through it.

use std::fmt;
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, TcpStream};
use std::time::Instant;

use data_encoding::BASE64;
use ipnet::IpNet;
use percent_encoding::percent_decode_str;
use url::Url;

use super::answer::{Head, NoAnswer, read_head};
use super::deadline::Until;
use super::failure::Failure;
use super::redactor::Redactor;
use super::server::{Server, USER_AGENT};
use super::socks::{self, Credentials};
use crate::dial::dial;
use crate::policy::Policy;
use crate::target::{Host, Target, parse_port};

/// The port of a proxy that names none, as in curl.
const DEFAULT_PORT: u16 = 1080;

/// The most bytes of a user or a password (RFC 1929 §2).
const MAX_CREDENTIAL: usize = 255;

/// From how many bytes on a password is masked in what a proxy says. A shorter one would mask half of a text.
const MIN_SECRET: usize = 4;

/// A proxy. Its password can't be printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    kind: Kind,
    address: Target,
    credentials: Option<Credentials>,
    secrets: Vec<String>,
    /// The option or the variable that names it.
    source: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// HTTP CONNECT (RFC 9110 §9.3.6).
    Http,
    /// SOCKS5, which is given names as they are.
    Socks,
}

impl Proxy {
    /// The proxy on the way to `server`: that of `--proxy` (none if it is empty), or that of the environment, with
    /// curl's meaning of the variables. `variable` looks one up.
    ///
    /// # Errors
    /// What is wrong with its URL, in a sentence that doesn't show it.
    pub fn find(
        option: Option<&str>,
        server: &Server,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Proxy>, String> {
        // As in curl, an empty variable is an unset one.
        let named = |name: &'static str| {
            let value = variable(name).filter(|value| !value.is_empty())?;
            Some((name, value))
        };
        let first = |names: &[&'static str]| names.iter().find_map(|name| named(name));
        let Target { host, port } = &server.address;
        if let Some((_, list)) = first(&["no_proxy", "NO_PROXY"])
            && bypasses(&list, host, *port)
        {
            return Ok(None);
        }
        let (source, text) = match option {
            Some("") => return Ok(None),
            Some(url) => ("--proxy", url.to_owned()),
            None if host.is_loopback() => return Ok(None),
            None => {
                let names = of_scheme(server.is_tls(), variable("REQUEST_METHOD").is_some());
                match first(&names).or_else(|| first(&["all_proxy", "ALL_PROXY"])) {
                    Some(found) => found,
                    None => return Ok(None),
                }
            }
        };
        let proxy = Proxy::parse(&text, source).map_err(|why| {
            format!(
                "{source} {why}: write it as http://[USER:PASSWORD@]HOST:PORT or socks5h://[USER:PASSWORD@]HOST:PORT"
            )
        })?;
        Ok(Some(proxy))
    }

    fn parse(text: &str, source: &'static str) -> Result<Proxy, &'static str> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        let kind = match scheme.to_ascii_lowercase().as_str() {
            "http" => Kind::Http,
            "socks5" | "socks5h" => Kind::Socks,
            "https" => {
                return Err("is a proxy that is itself spoken to by TLS, which is not supported");
            }
            _ => return Err("is of a kind that is not supported"),
        };
        // With the scheme http, url takes port 80 for none.
        let url =
            Url::parse(&format!("proxy://{rest}")).map_err(|_| "is not the URL of a proxy")?;
        let host = url.host_str().filter(|host| !host.is_empty());
        let host = host.and_then(Host::parse).ok_or("names no valid host")?;
        let port = url.port().unwrap_or(DEFAULT_PORT);
        if port == 0 {
            return Err("names no valid port");
        }
        let credentials = credentials(&url)?;
        Ok(Proxy {
            kind,
            address: Target { host, port },
            secrets: credentials.iter().flat_map(secrets_of).collect(),
            credentials,
            source,
        })
    }

    /// Whether it is on this machine.
    pub fn is_loopback(&self) -> bool {
        self.address.host.is_loopback()
    }

    /// What must not be shown.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        self.secrets.iter().map(String::as_str)
    }

    /// Connects to `to` through it before `deadline`.
    ///
    /// # Errors
    /// [`Failure`], which says that it is the proxy's.
    pub fn connect(
        &self,
        to: &Target,
        redactor: &Redactor,
        deadline: Instant,
    ) -> Result<TcpStream, Failure> {
        let (stream, _) = dial(&self.address, &Policy::default(), deadline, None)
            .map_err(|error| Failure::not_there(format!("cannot connect to {self}: {error}")))?;
        let mut until = Until::new(&stream, deadline);
        match self.kind {
            Kind::Http => self.ask_http(&mut until, to, redactor)?,
            Kind::Socks => socks::connect(&mut until, to, self.credentials.as_ref())
                .map_err(|refused| self.of_socks(refused, to))?,
        }
        Ok(stream)
    }

    fn ask_http(
        &self,
        stream: &mut Until<'_>,
        to: &Target,
        redactor: &Redactor,
    ) -> Result<(), Failure> {
        let mut request =
            format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\nUser-Agent: {USER_AGENT}\r\n");
        if let Some(credentials) = &self.credentials {
            let basic = credentials.basic();
            request.extend(["Proxy-Authorization: Basic ", &basic, "\r\n"]);
        }
        // One that takes no more may have said why.
        let _ = stream.write_all((request + "\r\n").as_bytes());
        let mut received = Vec::new();
        let head = read_head(stream, &mut received).map_err(|no_answer| {
            match no_answer {
                NoAnswer::TimedOut => Failure::not_there(self.is_late()),
                NoAnswer::Closed(_) => {
                    Failure::not_there(format!("{self} closed the connection without an answer"))
                }
                NoAnswer::Is(what) => {
                    // What there is to do about it is another thing with a proxy.
                    let what = what.split(": use ").next().unwrap_or_default();
                    let what = what.split(": is ").next().unwrap_or_default();
                    format!("{self} is no HTTP proxy: it {}", redactor.printable(what)).into()
                }
            }
        })?;
        match head.status {
            200..=299 if received.is_empty() => Ok(()),
            200..=299 => Err(format!("{self} sends bytes that nobody asked for").into()),
            _ => Err(self.refused(&head, to, redactor)),
        }
    }

    fn refused(&self, head: &Head, to: &Target, redactor: &Redactor) -> Failure {
        let status = head.status;
        let reason = redactor.printable(&head.reason);
        // Some say 401.
        let advice = match (status, other_schemes(head), &self.credentials) {
            (401 | 407, Some(schemes), _) => {
                let schemes = redactor.printable(&schemes);
                format!(
                    "; it wants {schemes}, and only Basic is supported: go through a local proxy that does the rest, as cntlm does for NTLM"
                )
            }
            (401 | 407, None, None) => {
                "; put its user and password into the URL: http://USER:PASSWORD@HOST:PORT".into()
            }
            (401 | 407, None, Some(_)) => "; check the user and the password in its URL".into(),
            _ => String::new(),
        };
        let sentence = format!("{self} refused to connect to {to} with {status} {reason}");
        let sentence = format!("{}{advice}", sentence.trim_end());
        match status {
            // tinyproxy says 500 of a target that refuses, and of a name that does not resolve.
            500 | 502..=504 => Failure::not_there(sentence),
            _ => sentence.into(),
        }
    }

    fn of_socks(&self, refused: socks::NotConnected, to: &Target) -> Failure {
        use socks::NotConnected::{Code, Io, Is, NotThere};
        let refuses = |why: &str| format!("{self} refused to connect to {to}: {why}");
        match refused {
            Is(what) => format!("{self} {what}").into(),
            NotThere(why) => Failure::not_there(refuses(why)),
            Code(why) => refuses(&why).into(),
            Io(error) if error.kind() == ErrorKind::WouldBlock => {
                Failure::not_there(self.is_late())
            }
            Io(error) if error.kind() == ErrorKind::UnexpectedEof => {
                Failure::not_there(format!("{self} closed the connection without an answer"))
            }
            Io(error) => Failure::not_there(format!("{self} dropped the connection: {error}")),
        }
    }

    fn is_late(&self) -> String {
        format!("no answer from {self} within --dial-timeout: raise it if the proxy is only slow")
    }
}

/// What a proxy wants to be authenticated by, if it says so and none of it is Basic: "NTLM or Negotiate".
fn other_schemes(head: &Head) -> Option<String> {
    let values = ["Proxy-Authenticate", "WWW-Authenticate"];
    let values = values.into_iter().flat_map(|name| head.values(name));
    let mut schemes: Vec<_> = values.flat_map(schemes_in).collect();
    schemes.dedup();
    let has_basic = schemes.iter().any(|it| it.eq_ignore_ascii_case("Basic"));
    (!schemes.is_empty() && !has_basic).then(|| schemes.join(" or "))
}

/// The schemes of a list of challenges, whose parameters are set off by commas as well (RFC 9110 §11.6.1): `name=value`,
/// while a scheme stands alone or before a blank.
fn schemes_in(value: &str) -> Vec<&str> {
    let mut is_quoted = false;
    let parts = value.split(|character| {
        is_quoted ^= character == '"';
        character == ',' && !is_quoted
    });
    let schemes = parts.filter_map(|part| {
        let (scheme, rest) = part.trim().split_once(' ').unwrap_or((part.trim(), ""));
        let is_parameter = scheme.contains('=') || rest.trim_start().starts_with('=');
        (!scheme.is_empty() && !is_parameter).then_some(scheme)
    });
    schemes.collect()
}

/// As in a sentence.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the proxy {} (from {})", self.address, self.source)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Credentials {
    /// RFC 7617 §2.
    fn basic(&self) -> String {
        BASE64.encode(&[&self.user[..], b":", &self.password].concat())
    }
}

fn credentials(url: &Url) -> Result<Option<Credentials>, &'static str> {
    if url.username().is_empty() && url.password().is_none() {
        return Ok(None);
    }
    let decoded = |text: &str| percent_decode_str(text).collect::<Vec<_>>();
    let user = decoded(url.username());
    let password = decoded(url.password().unwrap_or_default());
    if user.len().max(password.len()) > MAX_CREDENTIAL {
        return Err("has a user or a password of more than 255 bytes");
    }
    Ok(Some(Credentials { user, password }))
}

fn secrets_of(credentials: &Credentials) -> Vec<String> {
    let password = String::from_utf8_lossy(&credentials.password).into_owned();
    let mut secrets = vec![credentials.basic(), password];
    secrets.retain(|secret| secret.len() >= MIN_SECRET);
    secrets
}

/// The variables for a scheme. A CGI program has a client's header `Proxy` in `HTTP_PROXY`, which is why curl never
/// reads that one; others do, but not there.
fn of_scheme(is_tls: bool, is_cgi: bool) -> Vec<&'static str> {
    match (is_tls, is_cgi) {
        (true, _) => vec!["https_proxy", "HTTPS_PROXY"],
        (false, false) => vec!["http_proxy", "HTTP_PROXY"],
        (false, true) => vec!["http_proxy"],
    }
}

/// Whether `no_proxy` says to go to a server directly: `*`, or one of its entries, which commas or blanks separate.
fn bypasses(list: &str, host: &Host, port: u16) -> bool {
    if list.trim() == "*" {
        return true;
    }
    let mut entries = list
        .split([',', ' ', '\t'])
        .filter(|entry| !entry.is_empty());
    entries.any(|entry| {
        let (entry, of_port) = without_port(entry);
        of_port.is_none_or(|of_port| of_port == port)
            && match host {
                Host::Localhost => is_of_domain("localhost", entry),
                Host::Name(name) => is_of_domain(name, entry),
                Host::Address(address) => is_in_network(*address, entry),
            }
    })
}

/// An entry, and the port that it is restricted to.
fn without_port(entry: &str) -> (&str, Option<u16>) {
    match entry.rsplit_once(':') {
        // Another colon without a bracket is an IPv6 address's.
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
            match parse_port(port) {
                Some(port) => (host, Some(port)),
                None => (entry, None),
            }
        }
        _ => (entry, None),
    }
}

/// Whether `name` is `domain`, with or without a dot before it, or within it.
fn is_of_domain(name: &str, domain: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let domain = domain.strip_suffix('.').unwrap_or(domain);
    let domain = domain.strip_prefix('.').unwrap_or(domain);
    let Some(start) = name.len().checked_sub(domain.len()) else {
        return false;
    };
    let ends_so = name.as_bytes()[start..].eq_ignore_ascii_case(domain.as_bytes());
    !domain.is_empty() && ends_so && (start == 0 || name.as_bytes()[start - 1] == b'.')
}

fn is_in_network(address: IpAddr, entry: &str) -> bool {
    let entry = entry.trim_start_matches('[').trim_end_matches(']');
    match entry.parse::<IpNet>() {
        Ok(network) => network.contains(&address),
        Err(_) => entry.parse() == Ok(address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(
        url: &str,
        option: Option<&str>,
        variables: &[(&str, &str)],
    ) -> Result<Option<Proxy>, String> {
        let server = Server::parse(url).unwrap();
        Proxy::find(option, &server, |name| {
            let found = variables.iter().find(|(other, _)| *other == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    fn found(url: &str, option: Option<&str>, variables: &[(&str, &str)]) -> Option<String> {
        let proxy = find(url, option, variables).unwrap()?;
        Some(format!("{:?} {}", proxy.kind, proxy.address))
    }

    #[test]
    fn the_variables_mean_what_they_mean_to_curl() {
        let (ws, wss) = ("ws://box.example", "wss://box.example");
        for (url, variables, proxy) in [
            (ws, &[("http_proxy", "http://p:1")][..], Some("Http p:1")),
            (wss, &[("http_proxy", "http://p:1")], None),
            (wss, &[("https_proxy", "http://p:1")], Some("Http p:1")),
            (ws, &[("https_proxy", "http://p:1")], None),
            (ws, &[("HTTP_PROXY", "p:1")], Some("Http p:1")),
            (
                ws,
                &[("HTTP_PROXY", "p:1"), ("REQUEST_METHOD", "GET")],
                None,
            ),
            (wss, &[("HTTPS_PROXY", "p")], Some("Http p:1080")),
            (
                wss,
                &[("HTTPS_PROXY", "q"), ("https_proxy", "p")],
                Some("Http p:1080"),
            ),
            (ws, &[("all_proxy", "socks5h://p")], Some("Socks p:1080")),
            (ws, &[("ALL_PROXY", "SOCKS5://p:1")], Some("Socks p:1")),
            (
                ws,
                &[("http_proxy", ""), ("all_proxy", "p:80")],
                Some("Http p:80"),
            ),
            (
                ws,
                &[("http_proxy", "http://p:80/path"), ("all_proxy", "q")],
                Some("Http p:80"),
            ),
            (
                ws,
                &[("http_proxy", "http://[::1]:1")],
                Some("Http [::1]:1"),
            ),
            (ws, &[("http_proxy", "p"), ("no_proxy", "*")], None),
            (ws, &[("http_proxy", "p"), ("NO_PROXY", "example")], None),
            ("ws://localhost", &[("http_proxy", "p")], None),
            ("ws://127.0.0.2", &[("http_proxy", "p")], None),
            ("wss://[::1]", &[("all_proxy", "p")], None),
        ] {
            assert_eq!(
                found(url, None, variables).as_deref(),
                proxy,
                "{url} {variables:?}"
            );
        }
        // The option comes first, also on the way to this machine.
        let variables = [("http_proxy", "q")];
        for url in [ws, "ws://localhost"] {
            assert_eq!(
                found(url, Some("p:1"), &variables).as_deref(),
                Some("Http p:1")
            );
        }
        assert_eq!(found(ws, Some(""), &variables), None);
        assert_eq!(found(ws, Some("p:1"), &[("no_proxy", "box.example")]), None);
    }

    #[test]
    fn exceptions_are_names_suffixes_addresses_networks_and_ports() {
        for (list, host, is_direct) in [
            ("box.example", "box.example", true),
            ("BOX.Example.", "box.example", true),
            ("example", "box.example.", true),
            (".example", "box.example", true),
            (".box.example", "box.example", true),
            ("ample", "box.example", false),
            ("a.box.example", "box.example", false),
            ("*.example", "box.example", false),
            ("a,*", "box.example", false),
            ("a, b\tbox.example,c", "box.example", true),
            ("box.example:80", "box.example", true),
            ("box.example:81", "box.example", false),
            ("box.example:x", "box.example", false),
            (",,.", "box.example", false),
            ("10.0.0.1", "10.0.0.1", true),
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/16", "10.1.2.3", false),
            ("10.0.0.1:80", "10.0.0.1", true),
            ("10.0.0.1:81", "10.0.0.1", false),
            ("0.1", "10.0.0.1", false),
            ("2001:db8::/32", "2001:db8::1", true),
            ("2001:DB8:0::1", "2001:db8::1", true),
            ("[2001:db8::1]", "2001:db8::1", true),
            ("[2001:db8::1]:80", "2001:db8::1", true),
            ("[2001:db8::1]:81", "2001:db8::1", false),
            ("localhost", "localhost", true),
        ] {
            let parsed = Host::parse(host).unwrap();
            assert_eq!(bypasses(list, &parsed, 80), is_direct, "{list} {host}");
        }
    }

    #[test]
    fn the_schemes_of_a_proxy_are_told_from_their_parameters() {
        for (value, schemes) in [
            ("Negotiate", &["Negotiate"][..]),
            ("Negotiate, NTLM", &["Negotiate", "NTLM"]),
            ("NTLM TlRMTVNTUAACAA==", &["NTLM"]),
            (r#"Basic realm="a, b", charset="UTF-8""#, &["Basic"]),
            (
                r#"Digest realm = "x", nonce="y=,",Basic realm=z"#,
                &["Digest", "Basic"],
            ),
            ("", &[]),
            (" , \"", &["\""]),
        ] {
            assert_eq!(schemes_in(value), schemes, "{value}");
        }
    }

    #[test]
    fn credentials_are_those_of_the_url_and_never_shown() {
        let proxy = find("ws://box", Some("http://us%40er:s3%2Fcret@p:1"), &[])
            .unwrap()
            .unwrap();
        let credentials = proxy.credentials.clone().unwrap();
        assert_eq!(
            (&credentials.user[..], &credentials.password[..]),
            (&b"us@er"[..], &b"s3/cret"[..])
        );
        assert_eq!(credentials.basic(), "dXNAZXI6czMvY3JldA==");
        assert_eq!(format!("{proxy:?}"), "the proxy p:1 (from --proxy)");
        assert!(proxy.secrets().eq(["dXNAZXI6czMvY3JldA==", "s3/cret"]));
    }

    #[test]
    fn what_is_no_proxy_is_refused_without_showing_it() {
        let long = format!("http://{}:s3cret@p:1", "x".repeat(256));
        for url in [
            "https://user:s3cret@p:1",
            "socks4://s3cret@p",
            "ftp://p",
            "http://",
            "http://user:s3cret@",
            "p:0",
            "p:70000",
            "http://s3cret:x@a b",
            "://p",
            &long,
        ] {
            let error = find("ws://box", Some(url), &[]).unwrap_err();
            assert!(
                error.starts_with("--proxy ") && error.contains("http://[USER"),
                "{url}: {error}"
            );
            assert!(!error.contains("s3cret"), "{error}");
        }
        let error = find("ws://box", None, &[("http_proxy", "ftp://p")]).unwrap_err();
        assert!(error.starts_with("http_proxy "), "{error}");
    }
}
