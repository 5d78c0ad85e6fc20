//! Which web pages may open a tunnel: the `Origin` and `Host` rules.
//!
//! Browsers let any page open a WebSocket to any address. What keeps a page from every port in the
//! sandbox is the token, or, on an open daemon, these two checks.

use std::net::IpAddr;

use url::Url;

use super::answer::shown;

/// An origin as browsers send it: scheme, host and port (RFC 6454 §6.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String);

impl Origin {
    /// Parses an origin given as an option, such as `https://app.example.com` or `http://localhost:3000`.
    ///
    /// # Errors
    /// A sentence that says what an origin looks like.
    pub fn parse(text: &str) -> Result<Origin, String> {
        let wrong =
            || "an origin is scheme://host or scheme://host:port, without a path".to_owned();
        let url = Url::parse(text).map_err(|_| wrong())?;
        let origin = url.origin();
        let bare = url.path().trim_matches('/').is_empty()
            && url.query().is_none()
            && url.fragment().is_none();
        if !origin.is_tuple() || !bare {
            return Err(wrong());
        }
        Ok(Origin(origin.ascii_serialization()))
    }

    fn matches(&self, presented: &str) -> bool {
        Origin::parse(presented).is_ok_and(|origin| origin == *self)
    }
}

/// Whether a request with these `Origin` headers may pass.
///
/// A client that is no browser sends none and passes. `allowed` empty means: any if `has_token`, as the
/// token is the proof; none without, as any web page could otherwise reach every local port.
///
/// # Errors
/// The sentence for the 403.
pub fn check_origin(presented: &[&str], allowed: &[Origin], has_token: bool) -> Result<(), String> {
    match presented {
        [] => Ok(()),
        _ if allowed.is_empty() && has_token => Ok(()),
        [one] if allowed.iter().any(|origin| origin.matches(one)) => Ok(()),
        [one, ..] => Err(format!(
            "origin {} may not use this daemon: start it with --allow-origin for that origin, or with a token",
            shown(one)
        )),
    }
}

/// Whether an open daemon may answer to this `Host`: only names that can't be pointed at loopback by
/// someone else's name server (DNS rebinding).
///
/// # Errors
/// The sentence for the 403.
pub fn check_host(presented: Option<&str>) -> Result<(), String> {
    let Some(host) = presented else { return Ok(()) };
    let name = without_port(host);
    let bare = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'))
        .unwrap_or(name);
    let plain = name.strip_suffix('.').unwrap_or(name);
    if plain.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok() {
        return Ok(());
    }
    Err(format!(
        "host {} is neither localhost nor an IP address: use one of them, or start the daemon with a token",
        shown(host)
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
            "127.0.0.1:1",
            "[::1]:49983",
            "[::1]",
            "10.0.0.1",
        ] {
            assert_eq!(check_host(Some(host)), Ok(()), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example:80",
            "",
            "127.0.0.1.evil.example",
            "[evil]",
            "xlocalhost",
        ] {
            assert!(check_host(Some(host)).is_err(), "{host}");
        }
    }

    #[test]
    fn origins_are_compared_as_a_whole() {
        let allowed = [Origin::parse("https://app.example.com").unwrap()];
        let ok = |origin: &str| check_origin(&[origin], &allowed, false).is_ok();
        assert!(ok("https://app.example.com") && ok("https://app.example.com:443"));
        for origin in [
            "http://app.example.com",
            "https://app.example.com.evil.example",
            "null",
            "https://app.example.com:444",
        ] {
            assert!(!ok(origin), "{origin}");
        }
        assert!(check_origin(&["https://app.example.com"; 2], &allowed, true).is_err());
    }

    #[test]
    fn what_is_no_origin_is_no_option() {
        for text in [
            "app.example.com",
            "https://app.example.com/path",
            "https://a/?q",
            "null",
            "file:///x",
            "*",
        ] {
            assert!(Origin::parse(text).is_err(), "{text}");
        }
    }
}
