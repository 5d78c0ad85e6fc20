//! From a request to its answer, or to what is to be done: every check before the dial, in the order
//! of the table in the README.

use std::borrow::Cow;
use std::sync::Arc;

use tiny_http::Method;
use url::{Url, form_urlencoded};

use super::answer::{Answer, shown};
use super::auth::Access;
use super::origin::{Origin, check_host, check_origin};
use super::{Request, handshake};
use crate::dial::{Host, Target, parse_port};

/// The API's own description, served at `/openapi.yaml`.
pub const OPENAPI: &str = include_str!("openapi.yaml");

/// Who may do what.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The tokens, or `None` for an open daemon.
    pub access: Option<Arc<Access>>,
    /// The origins named with `--allow-origin`.
    pub allow_origin: Vec<Origin>,
}

/// What is to be done about a request that has passed every check.
#[derive(Debug)]
pub enum Passed {
    /// To dial, and to open a tunnel.
    Tunnel(Upgrade),
    /// To answer with the metrics.
    Metrics,
}

/// A request that has passed every check before the dial.
#[derive(Debug)]
pub struct Upgrade {
    /// What to dial.
    pub target: Target,
    /// The `Sec-WebSocket-Accept` to answer with.
    pub accept: String,
}

/// Runs the checks.
///
/// # Errors
/// The [`Answer`] of any other request, refusal or not.
pub fn route(request: &Request, rules: &Rules) -> Result<Passed, Answer> {
    let location = Location::of(request)?;
    if location.path == "/health" {
        return Err(only(request, &[Method::Get, Method::Head])
            .err()
            .unwrap_or_else(no_content));
    }
    authenticate(request, rules)?;
    match &*location.path {
        "/tunnel" => tunnel(request, &location, rules).map(Passed::Tunnel),
        "/metrics" => read_only(request, &location, rules).map(|()| Passed::Metrics),
        "/openapi.yaml" => {
            read_only(request, &location, rules)?;
            Err(Answer::success(
                200,
                Some("application/yaml"),
                OPENAPI.to_owned(),
            ))
        }
        path => Err(Answer::refusal(
            404,
            format!(
                "no such path {}: use /tunnel?host=&port=, /health, /metrics or /openapi.yaml",
                shown(path)
            ),
        )),
    }
}

fn tunnel(request: &Request, location: &Location, rules: &Rules) -> Result<Upgrade, Answer> {
    only(request, &[Method::Get])?;
    let target = target(&location.query)?;
    let accept = handshake::check(request)?;
    if request.has_body {
        return Err(Answer::refusal(
            400,
            "a request to be upgraded has no body: send the bytes for the target as WebSocket frames",
        ));
    }
    check_page(request, location, rules)?;
    Ok(Upgrade { target, accept })
}

fn read_only(request: &Request, location: &Location, rules: &Rules) -> Result<(), Answer> {
    only(request, &[Method::Get, Method::Head])?;
    check_page(request, location, rules)
}

fn no_content() -> Answer {
    Answer::success(204, None, String::new())
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
    let method = shown(request.method.as_str());
    let message = format!("method {method} is not allowed here: use {allow}");
    Err(Answer::refusal(405, message).with("Allow", allow))
}

fn authenticate(request: &Request, rules: &Rules) -> Result<(), Answer> {
    let Some(access) = &rules.access else {
        return Ok(());
    };
    let message = match request.headers("X-Access-Token")[..] {
        [token] if access.accept(token.as_bytes()) => return Ok(()),
        [_] => "the token in X-Access-Token is wrong: send one that this daemon takes",
        [] => "X-Access-Token is missing: send the access token of this daemon in that header",
        _ => "X-Access-Token is repeated: send one",
    };
    // RFC 9110 §11.6.1 asks for a challenge with every 401.
    Err(Answer::refusal(401, message).with("WWW-Authenticate", "X-Access-Token"))
}

/// Web pages are held to the origin rules; the host rule is for an open daemon alone.
fn check_page(request: &Request, location: &Location, rules: &Rules) -> Result<(), Answer> {
    let has_token = rules.access.is_some();
    let refuse = |message| Answer::refusal(403, message);
    check_origin(&request.headers("Origin"), &rules.allow_origin, has_token).map_err(refuse)?;
    if has_token {
        return Ok(());
    }
    let header = request.headers("Host").first().copied();
    check_host(location.authority.as_deref().or(header)).map_err(refuse)
}

/// The parts of a request target (RFC 9112 §3.2): origin form, or absolute form.
struct Location {
    authority: Option<String>,
    path: String,
    query: String,
}

impl Location {
    fn of(request: &Request) -> Result<Location, Answer> {
        let target = &request.target;
        if !target.starts_with('/') && target.contains("://") {
            let url = Url::parse(target).map_err(|_| {
                Answer::refusal(400, format!("request target {} is no URL", shown(target)))
            })?;
            let authority = url.host_str().map(str::to_owned);
            return Ok(Location {
                authority,
                path: url.path().to_owned(),
                query: url.query().unwrap_or("").to_owned(),
            });
        }
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        Ok(Location {
            authority: None,
            path: path.to_owned(),
            query: query.to_owned(),
        })
    }
}

/// The target that `host` and `port` name; other parameters don't matter.
fn target(query: &str) -> Result<Target, Answer> {
    let port = parameter(query, "port")?;
    let port = port.ok_or_else(|| {
        Answer::refusal(400, "parameter port is missing: say port=1 to port=65535")
    })?;
    let port = parse_port(&port).ok_or_else(|| {
        Answer::refusal(
            400,
            format!(
                "parameter port is {}, which is no port: use a decimal number from 1 to 65535",
                shown(&port)
            ),
        )
    })?;
    let host = parameter(query, "host")?.unwrap_or_default();
    let host = Host::parse(&host).ok_or_else(|| {
        Answer::refusal(
            400,
            format!(
                "parameter host is {}, which is no host: use a name, an IPv4 or an IPv6 address",
                shown(&host)
            ),
        )
    })?;
    Ok(Target { host, port })
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
                    "parameter {name} is repeated, {} and {}: say it once",
                    shown(&first),
                    shown(&second)
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
    fn percent_encoding_is_undone_once() {
        let target = |query| {
            target(query)
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
    fn a_refused_value_is_named_and_bounded() {
        let long = format!("port={}", "9".repeat(5000));
        let message = target(&long).map_err(|answer| answer.message).unwrap_err();
        assert!(
            message.contains("parameter port is \"9999") && message.len() < 300,
            "{message}"
        );
    }
}
