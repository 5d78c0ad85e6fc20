//! Which web pages may open a tunnel: the `Origin` and `Host` rules.
//!
//! Browsers let any page open a WebSocket to any address. What keeps a page from every port in the
//! sandbox is the token, or, on an open daemon, these two checks.

use std::net::IpAddr;

use url::Url;

use super::answer::quoted;
use crate::target::{Host, is_localhost};

/// An origin as browsers send it: scheme, host and port (RFC 6454 §6.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String);

impl Origin {
    /// Parses an origin given as an option, such as `https://app.example.com` or `http://localhost:3000`.
    ///
    /// # Errors
    /// A sentence that says what an origin looks like, or why no page has this one.
    pub fn of_option(text: &str) -> Result<Origin, String> {
        let origin = Origin::parse(text);
        let shown = origin.as_ref().map_or(text, |origin| &origin.0);
        if shown.contains('*') {
            return Err(
                "there are no patterns: name each origin, or, with a token, none to allow any"
                    .into(),
            );
        }
        match shown.split_once("://") {
            Some(("ws", rest)) => Err(format!("an origin is a page's: write http://{rest}")),
            Some(("wss", rest)) => Err(format!("an origin is a page's: write https://{rest}")),
            Some(("ftp", _)) => Err("no page is loaded by ftp: write http:// or https://".into()),
            _ => origin,
        }
    }

    /// Parses an origin as browsers send it. Those of extensions have schemes of their own.
    ///
    /// # Errors
    /// A sentence that says what an origin looks like.
    fn parse(text: &str) -> Result<Origin, String> {
        let wrong =
            || "an origin is scheme://host or scheme://host:port, without a path".to_owned();
        let url = Url::parse(text).map_err(|_| wrong())?;
        let bare = url.username().is_empty()
            && url.password().is_none()
            && url.path().trim_matches('/').is_empty()
            && url.query().is_none()
            && url.fragment().is_none();
        let host = url.host_str().filter(|host| !host.is_empty());
        let (true, Some(host), false) = (bare, host, url.scheme() == "file") else {
            return Err(wrong());
        };
        let scheme = url.scheme();
        Ok(Origin(match url.port() {
            Some(port) => format!("{scheme}://{host}:{port}"),
            None => format!("{scheme}://{host}"),
        }))
    }

    fn matches(&self, presented: &str) -> bool {
        Origin::parse(presented).is_ok_and(|origin| origin == *self)
    }
}

/// A name that an open daemon answers to, or all names with a suffix: `tunneld`, `*.internal`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostName {
    /// This name, in lower case and without its last dot.
    Exact(String),
    /// Every name that ends so, with the dot.
    Suffix(String),
}

impl HostName {
    /// Parses a name given as an option.
    ///
    /// # Errors
    /// A sentence that says what may be given.
    pub fn parse(text: &str) -> Result<HostName, String> {
        let suffix = text.strip_prefix("*.");
        match Host::parse(suffix.unwrap_or(text)) {
            Some(Host::Name(name)) => {
                let name = name.strip_suffix('.').unwrap_or(&name);
                Ok(match suffix {
                    Some(_) => HostName::Suffix(format!(".{name}")),
                    None => HostName::Exact(name.to_owned()),
                })
            }
            Some(_) if !text.is_empty() && suffix.is_none() => {
                Err("localhost and addresses are allowed anyway: leave it out".into())
            }
            _ => Err("a host is a name or *.suffix, without a port".into()),
        }
    }

    fn matches(&self, name: &str) -> bool {
        match self {
            HostName::Exact(wanted) => name == wanted,
            HostName::Suffix(suffix) => name.ends_with(suffix.as_str()),
        }
    }
}

/// Whether a request with these `Origin` headers may pass.
///
/// A client that is no browser sends none and passes. `allowed` empty means: any if `has_token`, as the
/// token is the proof; none without, as any web page could otherwise reach every local port. But for an open
/// daemon's `own_host`, if [`check_host`] passes that: some clients that are no browser send it (websocket-client
/// for Python), and the daemon serves no pages that could.
///
/// # Errors
/// The sentence for the 403.
pub fn check_origin(
    presented: &[&str],
    own_host: Option<&str>,
    allowed: &[Origin],
    has_token: bool,
) -> Result<(), String> {
    match presented {
        [] => Ok(()),
        _ if allowed.is_empty() && has_token => Ok(()),
        [one] if allowed.iter().any(|origin| origin.matches(one)) => Ok(()),
        [one] if !has_token && own_host.is_some_and(|host| is_of(one, host)) => Ok(()),
        [one, ..] => Err(format!(
            "origin {} may not use this daemon: start it with --allow-origin for that origin, {}",
            quoted(one),
            if has_token {
                "or without --allow-origin, which lets any with the token"
            } else {
                "or with a token"
            }
        )),
    }
}

/// Whether `origin` is that of what `host` serves by HTTP, over TLS or not.
fn is_of(origin: &str, host: &str) -> bool {
    let scheme = origin.split_once("://").map(|(scheme, _)| scheme);
    let (Some(scheme @ ("http" | "https")), Ok(origin)) = (scheme, Origin::parse(origin)) else {
        return false;
    };
    origin.matches(&format!("{scheme}://{host}"))
}

/// Whether an open daemon may answer to this `Host`: only names that can't be pointed at loopback by
/// someone else's name server (DNS rebinding), and those that the operator has `allowed`.
///
/// # Errors
/// The sentence for the 403.
pub fn check_host(presented: Option<&str>, allowed: &[HostName]) -> Result<(), String> {
    let Some(host) = presented else { return Ok(()) };
    let name = without_port(host);
    let bare = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'))
        .unwrap_or(name);
    let plain = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    if is_localhost(&plain)
        || bare.parse::<IpAddr>().is_ok()
        || allowed.iter().any(|allowed| allowed.matches(&plain))
    {
        return Ok(());
    }
    Err(format!(
        "host {} is neither localhost nor an IP address: use one of them, or start the daemon with --allow-host for that name, or with a token",
        quoted(host)
    ))
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port))
            if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.ends_with(':') =>
        {
            name
        }
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_daemon_answers_to_loopback_names_and_addresses_only() {
        for host in [
            "localhost",
            "LocalHost:49983",
            "localhost.",
            "app.localhost:49983",
            "a.B.LOCALHOST.",
            "127.0.0.1:1",
            "[::1]:49983",
            "[::1]",
            "10.0.0.1",
        ] {
            assert_eq!(check_host(Some(host), &[]), Ok(()), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example:80",
            "app.localhost.evil.example",
            "app.xlocalhost",
            "",
            "127.0.0.1.evil.example",
            "[evil]",
            "xlocalhost",
        ] {
            assert!(check_host(Some(host), &[]).is_err(), "{host}");
        }
    }

    #[test]
    fn it_answers_to_names_that_were_allowed() {
        let allowed =
            ["Tunneld", "*.svc.cluster.local."].map(|name| HostName::parse(name).unwrap());
        let ok = |host: &str| check_host(Some(host), &allowed).is_ok();
        for host in [
            "tunneld",
            "TUNNELD:49983",
            "tunneld.",
            "a.svc.cluster.local:1",
            "a.b.svc.cluster.local.",
        ] {
            assert!(ok(host), "{host}");
        }
        for host in [
            "xtunneld",
            "tunneld.evil.example",
            "svc.cluster.local",
            "xsvc.cluster.local",
            "tunneld:x",
            "[tunneld]",
        ] {
            assert!(!ok(host), "{host}");
        }
        for text in [
            "",
            "*",
            "*.",
            "**.a",
            "a:80",
            "http://a",
            "localhost",
            "*.localhost",
            "127.0.0.1",
            "[::1]",
            "*.1.2.3.4",
            "a b",
        ] {
            assert!(HostName::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_origin_is_the_own_one_whatever_its_spelling() {
        for (origin, host) in [
            ("http://127.0.0.1:49983", "127.0.0.1:49983"),
            ("http://localhost", "localhost:80"),
            ("https://LOCALHOST", "localhost"),
            ("https://10.0.0.1:443", "10.0.0.1"),
            ("http://[::1]:8080", "[::1]:8080"),
        ] {
            assert!(is_of(origin, host), "{origin} {host}");
        }
        for (origin, host) in [
            ("http://127.0.0.1:3000", "127.0.0.1:49983"),
            ("http://localhost", "localhost:49983"),
            ("https://localhost", "localhost:80"),
            ("http://localhost:49983", "127.0.0.1:49983"),
            ("http://localhost:1@evil.example", "localhost:1"),
            ("ws://localhost:1", "localhost:1"),
            ("null", "null"),
            ("", ""),
        ] {
            assert!(!is_of(origin, host), "{origin} {host}");
        }
    }

    #[test]
    fn origins_are_compared_as_a_whole() {
        let allowed = [Origin::parse("https://app.example.com").unwrap()];
        let ok = |origin: &str| check_origin(&[origin], None, &allowed, false).is_ok();
        assert!(ok("https://app.example.com") && ok("https://app.example.com:443"));
        for origin in [
            "http://app.example.com",
            "https://app.example.com.evil.example",
            "null",
            "https://app.example.com:444",
        ] {
            assert!(!ok(origin), "{origin}");
        }
        let extension = "chrome-extension://abcdefghijklmnopabcdefghijklmnop";
        let extensions = [Origin::of_option(extension).unwrap()];
        assert!(check_origin(&[extension], None, &extensions, false).is_ok());
        assert!(check_origin(&["chrome-extension://b"], None, &extensions, false).is_err());
        assert!(check_origin(&["https://app.example.com"; 2], None, &allowed, true).is_err());
    }

    #[test]
    fn what_is_no_origin_is_no_option() {
        for text in [
            "app.example.com",
            "https://app.example.com/path",
            "https://a/?q",
            "https://user@a",
            "https://a\x7f",
            "https://a/\x7f",
            "null",
            "file:///x",
            "file://x",
            "data:x",
        ] {
            assert!(Origin::of_option(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_option_that_no_page_can_match_says_what_to_write() {
        for (text, advice) in [
            ("wss://app.example.com", "write https://app.example.com"),
            ("WS://localhost:3000/", "write http://localhost:3000"),
            ("ftp://x", "write http:// or https://"),
            ("*", "name each"),
            ("https://*", "name each"),
            ("https://*.example.com", "name each"),
            ("https://%2a.example.com", "name each"),
        ] {
            let error = Origin::of_option(text).unwrap_err();
            assert!(error.contains(advice), "{text}: {error}");
        }
        for (text, shown) in [
            ("https://App.example.com:443", "https://app.example.com"),
            ("http://[::1]:80/", "http://[::1]"),
            ("http://b\u{fc}cher.example", "http://xn--bcher-kva.example"),
            ("moz-extension://0a-1b", "moz-extension://0a-1b"),
        ] {
            assert_eq!(Origin::of_option(text), Ok(Origin(shown.into())));
        }
    }
}
