//! What `-L`, `-D` and `-W` say, in the words of ssh(1): where a local port is served and where it leads.

use crate::cli::{Bind, port_or_zero, without_brackets};
use crate::target::{Host, parse_port};

/// A local port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// The option that asks for it.
    pub option: &'static str,
    /// Where it is served.
    pub bind: Bind,
    /// Where its connections lead.
    pub to: To,
}

/// Where the connections of a local port lead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    /// All to the same.
    Target(Destination),
    /// Each to where it asks for by SOCKS5.
    Asked,
}

/// A target as the daemon is asked for it. What is missing is in the URL, or is the daemon's default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Destination {
    /// A name or an address, IPv6 without brackets.
    pub host: Option<String>,
    /// 1 to 65535.
    pub port: Option<u16>,
}

impl Forward {
    /// Parses what stands behind `-L`.
    ///
    /// # Errors
    /// The end of a sentence, with the right form.
    pub fn parse_fixed(text: &str) -> Result<Forward, String> {
        parse_fixed(text).ok_or_else(|| {
            "write it as [BIND:]PORT[:HOST:PORT], such as 5432, 8080:3000 or 127.0.0.1:9000:db.internal:9000".into()
        })
    }

    /// Parses what stands behind `-D`.
    ///
    /// # Errors
    /// The end of a sentence, with the right form.
    pub fn parse_dynamic(text: &str) -> Result<Forward, String> {
        let wrong = || "write it as [BIND:]PORT, such as 1080 or 127.0.0.1:1080";
        let bind = Bind::parse(text).map_err(|_| wrong())?;
        Ok(Forward {
            option: "-D",
            bind,
            to: To::Asked,
        })
    }
}

impl Destination {
    /// Parses what stands behind `-W`: `HOST:PORT`, or a port of localhost.
    ///
    /// # Errors
    /// The end of a sentence, with the right form.
    pub fn parse(text: &str) -> Result<Destination, String> {
        let destination = match fields(text).as_deref() {
            Some([port]) => Destination::at("", port),
            Some([host, port]) => Destination::at(host, port),
            _ => None,
        };
        destination.ok_or_else(|| {
            "write it as HOST:PORT, such as db.internal:5432, [::1]:5432 or localhost:22".into()
        })
    }

    /// `host` empty is the daemon's default.
    fn at(host: &str, port: &str) -> Option<Destination> {
        let host = host_of(host)?;
        Some(Destination {
            host: Some(host.to_owned()).filter(|host| !host.is_empty()),
            port: Some(parse_port(port)?),
        })
    }
}

/// Parses what stands behind `--host`.
///
/// # Errors
/// The end of a sentence, with the right form.
pub fn parse_host(text: &str) -> Result<String, String> {
    let host = host_of(text).map(str::to_owned);
    host.ok_or_else(|| "write a name or an address, such as db.internal or ::1".into())
}

/// A host that a daemon takes, without its brackets.
fn host_of(field: &str) -> Option<&str> {
    let host = without_brackets(field)?;
    // A number is the IPv4 address that nobody means.
    let is_one = Host::parse(host).is_some() && port_or_zero(host).is_none();
    (is_one && !host.starts_with('[')).then_some(host)
}

fn parse_fixed(text: &str) -> Option<Forward> {
    let fields = fields(text)?;
    let begins_with_port = port_or_zero(fields[0]).is_some();
    let (bind, port, host, target) = match (fields[..].len(), begins_with_port) {
        (1, true) => (None, fields[0], "", fields[0]),
        (2, true) => (None, fields[0], "", fields[1]),
        (2, false) => (Some(fields[0]), fields[1], "", fields[1]),
        (3, true) => (None, fields[0], fields[1], fields[2]),
        (3, false) => (Some(fields[0]), fields[1], "", fields[2]),
        (4, false) => (Some(fields[0]), fields[1], fields[2], fields[3]),
        _ => return None,
    };
    let port = port_or_zero(port)?;
    let bind = match bind {
        Some(address) => Bind::on(address, port)?,
        None => Bind::Loopback(port),
    };
    let to = Destination::at(host, target)?;
    Some(Forward {
        option: "-L",
        bind,
        to: To::Target(to),
    })
}

/// What colons separate, with an IPv6 address in brackets as one. `None` if the brackets make no sense.
fn fields(text: &str) -> Option<Vec<&str>> {
    let mut fields = Vec::new();
    let mut rest = text;
    loop {
        let start = if rest.starts_with('[') {
            rest.find(']')?
        } else {
            0
        };
        match rest[start..].find(':') {
            Some(colon) => {
                let (field, behind) = rest.split_at(start + colon);
                fields.push(field);
                rest = &behind[1..];
            }
            None => {
                fields.push(rest);
                return Some(fields);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(forward: &Forward) -> (String, String) {
        let to = match &forward.to {
            To::Target(to) => format!("{:?} {}", to.host, to.port.unwrap()),
            To::Asked => "asked".into(),
        };
        (forward.bind.to_string(), to)
    }

    #[test]
    fn a_forward_is_written_as_ssh_has_it_or_shorter() {
        for (text, bind, to) in [
            ("5432", "localhost:5432", "None 5432"),
            ("8080:3000", "localhost:8080", "None 3000"),
            ("0:3000", "localhost:0", "None 3000"),
            (
                "9000:db.internal:9001",
                "localhost:9000",
                "Some(\"db.internal\") 9001",
            ),
            ("9000::9001", "localhost:9000", "None 9001"),
            ("9000:[::1]:9001", "localhost:9000", "Some(\"::1\") 9001"),
            ("127.0.0.1:5432", "127.0.0.1:5432", "None 5432"),
            ("localhost:5432", "localhost:5432", "None 5432"),
            ("localhost:8080:3000", "localhost:8080", "None 3000"),
            ("[::1]:8080:3000", "[::1]:8080", "None 3000"),
            ("*:8080:3000", "*:8080", "None 3000"),
            (":8080:box:3000", "*:8080", "Some(\"box\") 3000"),
            (
                "127.0.0.1:0:localhost:80",
                "127.0.0.1:0",
                "Some(\"localhost\") 80",
            ),
            (
                "[::1]:0:[2001:db8::1]:80",
                "[::1]:0",
                "Some(\"2001:db8::1\") 80",
            ),
            ("8080:[box]:80", "localhost:8080", "Some(\"box\") 80"),
            (
                "[127.0.0.1]:0:[192.0.2.1]:80",
                "127.0.0.1:0",
                "Some(\"192.0.2.1\") 80",
            ),
            ("[localhost]:8080:3000", "localhost:8080", "None 3000"),
            ("[*]:8080:3000", "*:8080", "None 3000"),
        ] {
            let forward = Forward::parse_fixed(text).unwrap();
            assert_eq!(shown(&forward), (bind.into(), to.into()), "{text}");
        }
        for text in [
            "",
            ":",
            "0",
            "127.0.0.1:0",
            "x",
            "70000",
            "8080:x",
            "8080:0",
            "8080:70000",
            "8080:3000:",
            "a:b:c:d:e",
            "8080:a b:80",
            "8080:90:80",
            "1:2:3:4",
            "host:80:db:80",
            "::1:80",
            "[::1:80",
            "8080:[::1:80",
            "8080:[[::1]]:80",
            "8080:[box]x:80",
            "8080:box]:80",
            "8080:[90]:80",
            "[box]:8080:80",
            "[8080]:80",
            "8080:::1:80",
            "8080:box:80:",
            "/tmp/s:box:80",
            "8080:/tmp/s",
            "-1",
            "8080/box/80",
        ] {
            let error = Forward::parse_fixed(text).unwrap_err();
            assert!(error.contains("[BIND:]PORT[:HOST:PORT]"), "{text}: {error}");
        }
    }

    #[test]
    fn a_dynamic_forward_is_a_port() {
        for (text, bind) in [
            ("1080", "localhost:1080"),
            ("[::1]:0", "[::1]:0"),
            ("*:1", "*:1"),
            ("[localhost]:1", "localhost:1"),
        ] {
            let forward = Forward::parse_dynamic(text).unwrap();
            assert_eq!(shown(&forward), (bind.into(), "asked".into()));
        }
        for text in ["", "x", "1:2", "1080:box:80", "box:1080"] {
            let error = Forward::parse_dynamic(text).unwrap_err();
            assert!(error.contains("[BIND:]PORT,"), "{text}: {error}");
        }
    }

    #[test]
    fn a_destination_is_a_host_and_a_port() {
        for (text, host, port) in [
            ("22", None, 22),
            (":22", None, 22),
            ("db.internal:5432", Some("db.internal"), 5432),
            ("10.0.0.1:80", Some("10.0.0.1"), 80),
            ("[2001:db8::1]:80", Some("2001:db8::1"), 80),
            // ssh's own form, [%h]:%p.
            ("[localhost]:22", Some("localhost"), 22),
            ("[10.0.0.1]:80", Some("10.0.0.1"), 80),
        ] {
            let parsed = Destination::parse(text).unwrap();
            assert_eq!(
                (parsed.host.as_deref(), parsed.port),
                (host, Some(port)),
                "{text}"
            );
        }
        for text in [
            "",
            "db",
            "db:",
            "db:0",
            "db:x",
            "::1:80",
            "a:b:80",
            "[::1]",
            "[db]",
            "[[::1]]:80",
            "[db:80",
            "db]:80",
            "[a b]:80",
            "a b:80",
        ] {
            let error = Destination::parse(text).unwrap_err();
            assert!(error.contains("HOST:PORT"), "{text}: {error}");
        }
    }

    #[test]
    fn a_host_alone_is_what_it_is_before_a_port() {
        for (text, host) in [
            ("", ""),
            ("db.internal", "db.internal"),
            ("::1", "::1"),
            ("[::1]", "::1"),
            ("10.0.0.1", "10.0.0.1"),
        ] {
            assert_eq!(parse_host(text).as_deref(), Ok(host));
        }
        for text in ["a b", "db:80", "5432", "[::1", "[[::1]]", "a/b"] {
            let error = parse_host(text).unwrap_err();
            assert!(error.contains("db.internal"), "{text}: {error}");
        }
    }
}
