//! From a request to its answer, or to what is to be done: every check before the dial, in the order
//! of the table in the reference.

use std::borrow::Cow;
use std::sync::Arc;

use data_encoding::BASE64URL_NOPAD;
use tiny_http::Method;
use url::form_urlencoded;

use super::Request;
use super::answer::{Answer, quoted};
use super::auth::Access;
use super::handshake::{self, Handshake};
use super::origin::{HostName, Origin, check_host, check_origin};
use crate::target::{Host, MASQUE, Target, is_host, parse_port};

/// The API's own description, served at `/openapi.yaml`.
pub const OPENAPI: &str = include_str!("openapi.yaml");

/// Who may do what.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The tokens, or `None` for an open daemon.
    pub access: Option<Arc<Access>>,
    /// The origins named with `--allow-origin`.
    pub allow_origin: Vec<Origin>,
    /// The names given with `--allow-host`.
    pub allow_host: Vec<HostName>,
}

/// What is to be done about a request.
#[derive(Debug)]
pub enum Routed {
    /// To dial, and to open a tunnel. Every check before the dial has passed.
    Tunnel(Upgrade),
    /// To answer with the metrics.
    Metrics,
    /// To answer with this, a refusal or not.
    Answer(Answer),
}

/// An upgrade request that has passed every check before the dial.
#[derive(Debug)]
pub struct Upgrade {
    /// What to dial.
    pub target: Target,
    /// What to upgrade to.
    pub handshake: Handshake,
}

/// Runs the checks.
pub fn route(request: &Request, rules: &Rules) -> Routed {
    check(request, rules).unwrap_or_else(Routed::Answer)
}

fn check(request: &Request, rules: &Rules) -> Result<Routed, Answer> {
    let location = Location::of(&request.target)?;
    if location.path == "/health" {
        only(request, &[Method::Get, Method::Head])?;
        return Ok(Routed::Answer(Answer::success(204, None, String::new())));
    }
    authenticate(request, rules)?;
    match location.path {
        "/tunnel" | "/tunnel/" => {
            let target = || target_of_query(location.query);
            tunnel(request, &location, rules, target).map(Routed::Tunnel)
        }
        path if path.starts_with(MASQUE) => {
            let target = || target_of_path(&path[MASQUE.len()..]);
            tunnel(request, &location, rules, target).map(Routed::Tunnel)
        }
        "/metrics" => read_only(request, &location, rules).map(|()| Routed::Metrics),
        "/openapi.yaml" => {
            read_only(request, &location, rules)?;
            let document = Answer::success(200, Some("application/yaml"), OPENAPI.to_owned());
            Ok(Routed::Answer(document))
        }
        path => Err(Answer::refusal(
            404,
            format!(
                "no such path {}: use /tunnel?host=&port=, /health, /metrics or /openapi.yaml",
                quoted(path)
            ),
        )),
    }
}

fn tunnel(
    request: &Request,
    location: &Location<'_>,
    rules: &Rules,
    target: impl FnOnce() -> Result<Target, Answer>,
) -> Result<Upgrade, Answer> {
    only(request, &[Method::Get])?;
    let target = target()?;
    let handshake = handshake::check(request)?;
    if request.has_body {
        return Err(Answer::refusal(
            400,
            "an upgrade request must not have a body: send the bytes for the target after the 101",
        ));
    }
    check_page(request, location, rules)?;
    Ok(Upgrade { target, handshake })
}

fn read_only(request: &Request, location: &Location<'_>, rules: &Rules) -> Result<(), Answer> {
    only(request, &[Method::Get, Method::Head])?;
    check_page(request, location, rules)
}

fn only(request: &Request, allowed: &[Method]) -> Result<(), Answer> {
    if allowed.contains(&request.method) {
        return Ok(());
    }
    let allow = allowed
        .iter()
        .map(Method::as_str)
        .collect::<Vec<_>>()
        .join(", ");
    let method = quoted(request.method.as_str());
    let message = format!("method {method} is not allowed here: use {allow}");
    Err(Answer::refusal(405, message).with("Allow", allow))
}

fn authenticate(request: &Request, rules: &Rules) -> Result<(), Answer> {
    let Some(access) = &rules.access else {
        return Ok(());
    };
    let message = match presented_token(request) {
        Ok((_, token)) if access.accept(&token) => return Ok(()),
        Ok((header, _)) => {
            format!("the token in {header} is wrong: send one that this daemon accepts")
        }
        Err(why) => why.to_owned(),
    };
    // RFC 9110 §11.6.1 asks for a challenge with every 401.
    Err(Answer::refusal(401, message).with("WWW-Authenticate", "Bearer"))
}

/// The token, and the header it is in. `X-Access-Token` decides alone if it is there, and then a subprotocol:
/// `Authorization` may be a proxy's.
fn presented_token(request: &Request) -> Result<(&'static str, Cow<'_, [u8]>), &'static str> {
    match request.headers(TOKEN_HEADER)[..] {
        [token] => return Ok((TOKEN_HEADER, Cow::Borrowed(token.as_bytes()))),
        [] => {}
        _ => return Err("X-Access-Token is given more than once: send one"),
    }
    match handshake::offered_tokens(request)[..] {
        [token] => {
            return BASE64URL_NOPAD
                .decode(token.as_bytes())
                .map(|token| ("Sec-WebSocket-Protocol", token.into()))
                .map_err(|_| {
                    "the token in Sec-WebSocket-Protocol is not base64url without padding: encode it so, or send it in X-Access-Token"
                });
        }
        [] => {}
        _ => return Err("Sec-WebSocket-Protocol has more than one token: send one"),
    }
    match request.headers("Authorization")[..] {
        [credentials] => bearer(credentials)
            .map(|token| ("Authorization", token.as_bytes().into()))
            .ok_or(
                "Authorization has no Bearer token: send the access token of this daemon in X-Access-Token, or as Authorization: Bearer",
            ),
        [] => Err(
            "X-Access-Token is missing: send the access token of this daemon in that header, or as Authorization: Bearer",
        ),
        _ => Err("Authorization is given more than once: send one"),
    }
}

const TOKEN_HEADER: &str = "X-Access-Token";

/// RFC 6750 §2.1; a scheme's name is in any case (RFC 9110 §11.1).
fn bearer(credentials: &str) -> Option<&str> {
    let (scheme, token) = credentials.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then_some(token.trim_start_matches(' '))
}

/// Web pages are held to the origin rules; the host rule is for an open daemon alone.
fn check_page(request: &Request, location: &Location<'_>, rules: &Rules) -> Result<(), Answer> {
    let has_token = rules.access.is_some();
    let refuse = |message| Answer::refusal(403, message);
    let header = request.headers("Host").first().copied();
    let host = location.authority.or(header);
    let origins = request.headers("Origin");
    check_origin(&origins, host, &rules.allow_origin, has_token).map_err(refuse)?;
    if has_token {
        return Ok(());
    }
    check_host(host, &rules.allow_host).map_err(refuse)
}

/// The parts of a request target (RFC 9112 §3.2), origin form or absolute form, as they were sent: a proxy in front
/// has judged them so, and what it let through must not become another path here.
struct Location<'a> {
    authority: Option<&'a str>,
    path: &'a str,
    query: &'a str,
}

impl<'a> Location<'a> {
    fn of(target: &'a str) -> Result<Location<'a>, Answer> {
        let (authority, rest) = match target.split_once("://") {
            Some((scheme, rest)) if is_scheme(scheme) => {
                let end = rest.find(['/', '?']).unwrap_or(rest.len());
                (Some(&rest[..end]), &rest[end..])
            }
            _ => (None, target),
        };
        if authority.is_some_and(|authority| authority.is_empty() || !is_host(authority)) {
            let message = format!("request target {} is not a valid URL", quoted(target));
            return Err(Answer::refusal(400, message));
        }
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        Ok(Location {
            authority,
            // RFC 9110 §4.2.3: an empty path is the same as this one.
            path: if path.is_empty() { "/" } else { path },
            query,
        })
    }
}

/// Those of what is served here, and of how clients name it.
fn is_scheme(text: &str) -> bool {
    ["http", "https", "ws", "wss"]
        .iter()
        .any(|scheme| text.eq_ignore_ascii_case(scheme))
}

/// The target that `host` and `port` name; other parameters don't matter.
fn target_of_query(query: &str) -> Result<Target, Answer> {
    let port = parameter(query, "port")?;
    let port =
        port.ok_or_else(|| Answer::refusal(400, "parameter port is missing: add port=1–65535"))?;
    target(&parameter(query, "host")?.unwrap_or_default(), &port)
}

/// The target that the template's two segments name, the second with or without its slash.
fn target_of_path(segments: &str) -> Result<Target, Answer> {
    let segments = segments.strip_suffix('/').unwrap_or(segments);
    match segments.split_once('/') {
        Some((host, port)) if !host.is_empty() => {
            target(&percent_decoded(host), &percent_decoded(port))
        }
        _ => Err(Answer::refusal(
            400,
            format!(
                "path {} names no target: use {MASQUE}HOST/PORT/",
                quoted(&format!("{MASQUE}{segments}"))
            ),
        )),
    }
}

fn target(host: &str, port: &str) -> Result<Target, Answer> {
    let port = parse_port(port).ok_or_else(|| {
        let message = format!("port={} is not a valid port (1–65535)", quoted(port));
        Answer::refusal(400, message)
    })?;
    let host = Host::parse(host).ok_or_else(|| {
        let message = format!(
            "host={} is not a valid host: use a name, an IPv4 or an IPv6 address",
            quoted(host)
        );
        Answer::refusal(400, message)
    })?;
    Ok(Target { host, port })
}

/// Percent-encoding undone once. In a path, unlike in a query, `+` is itself.
fn percent_decoded(segment: &str) -> Cow<'_, str> {
    percent_encoding::percent_decode_str(segment).decode_utf8_lossy()
}

fn parameter<'a>(query: &'a str, name: &str) -> Result<Option<Cow<'a, str>>, Answer> {
    let mut values = form_urlencoded::parse(query.as_bytes())
        .filter(|(key, _)| key == name)
        .map(|(_, value)| value);
    let first = values.next();
    match values.next() {
        Some(second) => {
            let first = first.unwrap_or_default();
            Err(Answer::refusal(
                400,
                format!(
                    "parameter {name} is given more than once: {} and {}",
                    quoted(&first),
                    quoted(&second)
                ),
            ))
        }
        None => Ok(first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_what_was_sent() {
        let location = |target| {
            let location = Location::of(target).map_err(|answer| answer.status)?;
            Ok((location.authority, location.path, location.query))
        };
        for (target, expected) in [
            ("/a?b?c", (None, "/a", "b?c")),
            ("/%2e%2e/a", (None, "/%2e%2e/a", "")),
            ("http://x/%2e%2e/a", (Some("x"), "/%2e%2e/a", "")),
            ("http://x/a/../b?c#d", (Some("x"), "/a/../b", "c#d")),
            ("HTTPS://X:1//a", (Some("X:1"), "//a", "")),
            ("ws://[::1]?a", (Some("[::1]"), "/", "a")),
            ("http://x", (Some("x"), "/", "")),
            ("/a?b=http://x/c", (None, "/a", "b=http://x/c")),
            ("//x/a", (None, "//x/a", "")),
            ("ftp://x/a", (None, "ftp://x/a", "")),
            ("x:80", (None, "x:80", "")),
            ("*", (None, "*", "")),
        ] {
            assert_eq!(location(target), Ok(expected), "{target}");
        }
        for target in [
            "http:///a",
            "http://",
            "http://user@x/a",
            "http://x\\y/a",
            "http://x#/a",
        ] {
            assert_eq!(location(target), Err(400), "{target}");
        }
    }

    #[test]
    fn percent_encoding_is_undone_once() {
        let target = |query| {
            target_of_query(query)
                .map(|target| target.to_string())
                .map_err(|answer| answer.message)
        };
        assert_eq!(
            target("port=%38%30&host=%6cocalhost"),
            Ok("localhost:80".into())
        );
        for query in [
            "port=80%00",
            "port=%2538",
            "port=80&host=%256cocalhost",
            "port=80&host=a%2fb",
            "port=80&host=a%20b",
            "port=80&p%6frt=81",
        ] {
            assert!(target(query).is_err(), "{query}");
        }
    }

    #[test]
    fn the_default_template_names_a_target_in_its_path() {
        let target = |path| {
            target_of_path(path)
                .map(|target| target.to_string())
                .map_err(|answer| answer.status)
        };
        for (path, expected) in [
            ("localhost/80/", Ok("localhost:80")),
            ("localhost/80", Ok("localhost:80")),
            ("192.0.2.1/443/", Ok("192.0.2.1:443")),
            ("2001%3Adb8%3A%3A1/443/", Ok("[2001:db8::1]:443")),
            ("2001:db8::1/443/", Ok("[2001:db8::1]:443")),
            ("%6cocalhost/%38%30/", Ok("localhost:80")),
            ("", Err(400)),
            ("localhost", Err(400)),
            ("localhost/", Err(400)),
            ("/80/", Err(400)),
            ("localhost//80/", Err(400)),
            ("localhost/80//", Err(400)),
            ("localhost/80/x", Err(400)),
            ("a%2Fb/80/", Err(400)),
            ("%256cocalhost/80/", Err(400)),
            ("a+b/80/", Err(400)),
            ("%ff/80/", Err(400)),
        ] {
            assert_eq!(target(path), expected.map(str::to_owned), "{path}");
        }
    }

    #[test]
    fn a_refused_value_is_named_and_bounded() {
        let long = format!("port={}", "9".repeat(5000));
        let message = target_of_query(&long)
            .map_err(|answer| answer.message)
            .unwrap_err();
        assert!(
            message.contains("port=\"9999") && message.len() < 300,
            "{message}"
        );
    }
}
