//! What both command lines share: how options are read, what is said of a wrong one, and how a place to listen at is
//! written.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, Command, Parser};

/// The longest duration an option takes. It keeps every sum with an `Instant` in range.
const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// Why the program does not start.
#[derive(Debug)]
pub enum Exit {
    /// An option, a variable or a file it names is wrong, in one sentence. For stderr; exit code 2.
    Usage(String),
    /// What `--help` or `--version` print. For stdout; exit code 0.
    Help(String),
}

impl From<String> for Exit {
    fn from(sentence: String) -> Self {
        Exit::Usage(sentence)
    }
}

/// Reads options and their variables. An empty variable is an unset one, as a supervisor's file or a template may
/// hold it for a value that isn't there.
pub(crate) fn parse<T: Parser>(
    arguments: impl IntoIterator<Item = OsString>,
) -> Result<T, clap::Error> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    let command = T::command().mut_args(|option| match option.get_env().map(std::env::var_os) {
        Some(Some(value)) if value.is_empty() => option.env(None::<&'static str>),
        _ => option,
    });
    let matches = match command.try_get_matches_from(&arguments) {
        // The help names those variables as well.
        Err(error) if error.kind() == ErrorKind::DisplayHelp => {
            T::command().try_get_matches_from(&arguments)
        }
        matches => matches,
    };
    T::from_arg_matches(&matches?)
}

/// clap explains over several paragraphs; scripts and logs want one line.
pub(crate) fn one_line(error: clap::Error, help: &str) -> Exit {
    let text = error.to_string();
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        return Exit::Help(text);
    }
    let first = text.split("\n\n").next().unwrap_or(&text);
    let first = first.split_whitespace().collect::<Vec<_>>().join(" ");
    let first = first.strip_prefix("error: ").unwrap_or(&first);
    Exit::Usage(format!("{first} (see {help})"))
}

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text)
        .map_err(|error| format!("{error}; write it as 500ms, 30s or 5m"))?;
    if duration > MAX_DURATION {
        return Err("at most 366days".into());
    }
    Ok(duration)
}

pub(crate) fn positive(text: &str) -> Result<Duration, String> {
    let duration = duration(text)?;
    if duration < Duration::from_millis(1) {
        Err("at least 1ms".into())
    } else {
        Ok(duration)
    }
}

/// Where to listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bind {
    /// This port of both loopback addresses, 127.0.0.1 and ::1, or of those that the machine has.
    Loopback(u16),
    /// This port of all addresses, IPv4 and IPv6.
    Everywhere(u16),
    /// This address and port.
    At(SocketAddr),
}

impl Bind {
    /// Parses `PORT`, `localhost:PORT`, `ADDRESS:PORT`, or `*:PORT` for all addresses. What stands before the port may
    /// be in brackets, and an IPv6 address must be.
    ///
    /// # Errors
    /// The end of a sentence, with the right form.
    pub(crate) fn parse(text: &str) -> Result<Bind, String> {
        let parsed = match text.rsplit_once(':') {
            Some((address, port)) => port_or_zero(port).and_then(|port| Bind::on(address, port)),
            None => port_or_zero(text).map(Bind::Loopback),
        };
        parsed.ok_or_else(|| {
            "write it as 127.0.0.1:5432, [::1]:5432, localhost:5432, or 5432 for localhost".into()
        })
    }

    /// `port` of what `address` names: localhost, an address (IPv6 in brackets), or `*` or nothing for all of them,
    /// as in ssh.
    pub(crate) fn on(address: &str, port: u16) -> Option<Bind> {
        let bare = without_brackets(address)?;
        match bare {
            "" | "*" => Some(Bind::Everywhere(port)),
            _ if bare.eq_ignore_ascii_case("localhost") => Some(Bind::Loopback(port)),
            _ if bare.contains(':') => {
                let is_bracketed = bare != address;
                // With a zone, as in [fe80::1%2].
                let socket = is_bracketed.then(|| format!("{address}:{port}"))?;
                socket.parse().ok().map(Bind::At)
            }
            _ => {
                let address = bare.parse::<IpAddr>().ok()?;
                Some(Bind::At(SocketAddr::new(address, port)))
            }
        }
    }

    /// Whether nobody but this machine can connect.
    pub(crate) fn is_loopback(&self) -> bool {
        match self {
            Bind::Loopback(_) => true,
            Bind::Everywhere(_) => false,
            Bind::At(address) => address.ip().is_loopback(),
        }
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bind::Loopback(port) => write!(f, "localhost:{port}"),
            Bind::Everywhere(port) => write!(f, "*:{port}"),
            Bind::At(address) => write!(f, "{address}"),
        }
    }
}

/// What colons separate may be in brackets, as in ssh: an address that has colons itself, and whatever a pattern such as
/// `[%h]:%p` puts there. `None` if there is one bracket alone.
pub(crate) fn without_brackets(field: &str) -> Option<&str> {
    match field.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']'),
        None => Some(field).filter(|field| !field.ends_with(']')),
    }
}

/// Parses a port to listen on as a decimal number; 0 is a free one.
pub(crate) fn port_or_zero(text: &str) -> Option<u16> {
    let is_decimal = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| is_decimal)
}

/// One of a few words and what each means. Shells offer them; to people the option's help says them.
#[derive(Clone, Copy)]
pub(crate) struct OneOf<T: 'static>(pub(crate) &'static [(&'static str, T)]);

impl<T: Copy + Send + Sync> TypedValueParser for OneOf<T> {
    type Value = T;

    fn parse_ref(
        &self,
        command: &Command,
        option: Option<&Arg>,
        value: &OsStr,
    ) -> Result<T, clap::Error> {
        let words = self.0;
        let parse = move |text: &str| -> Result<T, String> {
            let found = words.iter().find(|(word, _)| *word == text);
            found.map(|(_, meaning)| *meaning).ok_or_else(|| {
                let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                format!("write {}", words.join(" or "))
            })
        };
        parse.parse_ref(command, option, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let words = self.0.iter();
        Some(Box::new(words.map(|(word, _)| PossibleValue::new(*word))))
    }
}

pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("not a number: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::Bind;

    #[test]
    fn a_bare_port_is_localhosts_wherever_an_address_is_taken() {
        for (text, shown, is_loopback) in [
            ("5432", "localhost:5432", true),
            ("localhost:5432", "localhost:5432", true),
            ("LocalHost:0", "localhost:0", true),
            ("127.0.0.2:5432", "127.0.0.2:5432", true),
            ("[::1]:5432", "[::1]:5432", true),
            ("[fe80::1%2]:5432", "[fe80::1%2]:5432", false),
            ("0.0.0.0:5432", "0.0.0.0:5432", false),
            ("*:5432", "*:5432", false),
            (":5432", "*:5432", false),
            ("[localhost]:5432", "localhost:5432", true),
            ("[127.0.0.1]:5432", "127.0.0.1:5432", true),
            ("[*]:5432", "*:5432", false),
        ] {
            let bind = Bind::parse(text).unwrap();
            assert_eq!(
                (bind.to_string().as_str(), bind.is_loopback()),
                (shown, is_loopback)
            );
        }
        for text in [
            "",
            ":",
            "x",
            "+1",
            "65536",
            "-1",
            "host:5432",
            "::1:5432",
            "[::1]",
            "[::1:5432",
            "1.2.3:5432",
            "localhost:",
            "localhost:x",
            "[localhost:1",
            "localhost]:1",
            "[[::1]]:1",
            "[[127.0.0.1]]:1",
            "[127.0.0.1:1",
            "[host]:1",
            "/tmp/socket",
        ] {
            let error = Bind::parse(text).unwrap_err();
            assert!(error.contains("127.0.0.1:5432"), "{text}: {error}");
        }
    }
}
