//! A daemon, and the URL that it is asked with for a target.

use std::path::PathBuf;

use url::Url;

use super::forward::Destination;
use crate::target::{Host, MASQUE, Target};
use crate::token::TOKEN_VARIABLE;

/// The PEM files of `--cert` and `--key`.
#[derive(Debug)]
pub struct OwnCertificate {
    /// The certificate, and those behind it up to a CA's.
    pub cert: PathBuf,
    /// Its key, in the same file or another.
    pub key: PathBuf,
}

/// How the client names itself to it, and to a proxy on the way.
pub const USER_AGENT: &str = concat!("tunneld/", env!("CARGO_PKG_VERSION"));

/// The path of a URL that has none.
const DEFAULT_PATH: &str = "/tunnel";

/// The parameters that name the target.
pub const HOST: &str = "host";
/// See [`HOST`].
pub const PORT: &str = "port";

/// A daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// The URL without a target, but for what it had in its query; its scheme is `ws` or `wss`.
    pub url: Url,
    /// The host and the port of the URL.
    pub address: Target,
}

impl Server {
    /// Takes the URL of a daemon apart.
    ///
    /// # Errors
    /// What is wrong, in a sentence. It never shows the URL, which might hold a password.
    pub fn parse(text: &str) -> Result<Server, String> {
        let mut url = Url::parse(text)
            .map_err(|error| format!("invalid URL: {error}; write ws://host:port"))?;
        let scheme = match url.scheme() {
            "ws" | "http" => "ws",
            "wss" | "https" => "wss",
            other => {
                return Err(format!(
                    "the URL begins with {other}: but must begin with ws: or wss:"
                ));
            }
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(format!(
                "the URL contains a user or a password, which ps shows to everyone: set {TOKEN_VARIABLE} or --access-token-file"
            ));
        }
        if url.fragment().is_some() {
            return Err("the URL has a fragment (#...), which is never sent: remove it".into());
        }
        // A daemon would take the target from there, whatever the query says.
        if url.path().contains(MASQUE) {
            return Err(format!(
                "the path of the URL names a target: write {DEFAULT_PATH} in place of {MASQUE} and what follows it, and the target as -W, -L or --port"
            ));
        }
        url.set_scheme(scheme)
            .map_err(|()| format!("the URL can't be one of {scheme}:"))?;
        if matches!(url.path(), "" | "/") {
            url.set_path(DEFAULT_PATH);
        }
        let address = address(&url).ok_or("the URL has no valid host and port")?;
        Ok(Server { url, address })
    }

    /// Whether the connection is encrypted.
    pub fn is_tls(&self) -> bool {
        self.url.scheme() == "wss"
    }

    /// Checks that a target is named, and each part of it once.
    ///
    /// # Errors
    /// What is wrong, in a sentence.
    pub fn check(&self, to: &Destination) -> Result<(), String> {
        if let Some(host) = &to.host {
            self.check_free(&format!("--host {host}"), &[HOST])?;
        }
        match to.port {
            Some(port) => self.check_free(&format!("--port {port}"), &[PORT]),
            None if self.parameter(PORT).is_some() => Ok(()),
            None => Err("no target: add -L PORT, -W HOST:PORT or --port PORT".into()),
        }
    }

    /// Checks that the URL says nothing of these parameters, which `option` sets.
    ///
    /// # Errors
    /// That it does, in a sentence.
    pub fn check_free(&self, option: &str, names: &[&str]) -> Result<(), String> {
        match names.iter().find(|name| self.parameter(name).is_some()) {
            None => Ok(()),
            Some(name) => Err(format!(
                "{option} and the URL's own {name}= contradict each other: remove one of them"
            )),
        }
    }

    fn parameter(&self, name: &str) -> Option<String> {
        let mut pairs = self.url.query_pairs();
        let (_, value) = pairs.find(|(key, _)| key == name)?;
        Some(value.into_owned())
    }

    /// The URL of a tunnel to `to`.
    pub fn url_to(&self, to: &Destination) -> Url {
        let mut url = self.url.clone();
        let port = to.port.map(|port| port.to_string());
        for (name, value) in [(HOST, to.host.as_deref()), (PORT, port.as_deref())] {
            if let Some(value) = value {
                url.query_pairs_mut().append_pair(name, value);
            }
        }
        url
    }

    /// The URL of a tunnel to nowhere, which a daemon refuses once everything else is right.
    pub fn url_to_nowhere(&self) -> Url {
        let mut url = self.url.clone();
        let pairs = self.url.query_pairs();
        let others: Vec<_> = pairs
            .filter(|(key, _)| key != HOST && key != PORT)
            .collect();
        url.set_query(None);
        if !others.is_empty() {
            url.query_pairs_mut().extend_pairs(others);
        }
        url
    }

    /// A target's name for the log.
    pub fn name(&self, to: &Destination) -> String {
        let part = |given: Option<String>, name| given.or_else(|| self.parameter(name));
        let host = part(to.host.clone(), HOST).filter(|host| !host.is_empty());
        let host = host.unwrap_or_else(|| "localhost".into());
        let port = part(to.port.map(|port| port.to_string()), PORT).unwrap_or_default();
        match host.contains(':') && !host.starts_with('[') {
            true => format!("[{host}]:{port}"),
            false => format!("{host}:{port}"),
        }
    }
}

fn address(url: &Url) -> Option<Target> {
    let host = Host::parse(url.host_str().filter(|host| !host.is_empty())?)?;
    let port = url.port_or_known_default().filter(|&port| port != 0)?;
    Some(Target { host, port })
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
            let server = Server::parse(text).unwrap();
            let to = Destination {
                host: host.map(str::to_owned),
                port,
            };
            server.check(&to).unwrap();
            assert_eq!(
                (
                    server.address.to_string().as_str(),
                    server.url_to(&to).as_str()
                ),
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
            (
                "ws://box/.well-known/masque/tcp/db/7/",
                None,
                None,
                "write /tunnel",
            ),
            (
                "ws://box/a/.well-known/masque/tcp/db/7",
                None,
                Some(5),
                "write /tunnel",
            ),
            ("ws://box?host=a", Some("b"), Some(5), "--host b"),
            ("ws://box:0", None, Some(5), "no valid host"),
            ("ws://a..b", None, Some(5), "no valid host"),
        ] {
            let to = Destination {
                host: host.map(str::to_owned),
                port,
            };
            let error = Server::parse(text).and_then(|server| server.check(&to));
            let error = error.unwrap_err();
            assert!(
                error.contains(part) && !error.contains("s3cret"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn a_request_for_nowhere_keeps_what_a_proxy_may_want() {
        for (text, url) in [
            ("ws://box", "ws://box/tunnel"),
            ("ws://box/a?port=5&host=db", "ws://box/a"),
            ("ws://box?x=1&port=5&y=a%20b", "ws://box/tunnel?x=1&y=a+b"),
        ] {
            let server = Server::parse(text).unwrap();
            assert_eq!(server.url_to_nowhere().as_str(), url);
        }
    }

    #[test]
    fn a_target_is_named_by_the_options_or_the_url() {
        let to = |host: Option<&str>, port| Destination {
            host: host.map(str::to_owned),
            port,
        };
        for (text, to, name) in [
            ("ws://box", to(None, Some(5)), "localhost:5"),
            ("ws://box?port=7", to(None, None), "localhost:7"),
            ("ws://box?host=db", to(None, Some(5)), "db:5"),
            ("ws://box", to(Some("::1"), Some(5)), "[::1]:5"),
        ] {
            assert_eq!(Server::parse(text).unwrap().name(&to), name);
        }
    }
}
