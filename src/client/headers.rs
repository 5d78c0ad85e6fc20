//! The headers of `-H`: what a proxy or an edge in front of the daemon wants to see. Their values may be secrets.

use std::fmt;
use std::path::Path;

use crate::target::is_host;
use crate::token::{Kind, TOKEN_VARIABLE, read_bytes};

/// The headers to send besides those of the handshake.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

/// The length from which a value may be a secret worth masking. A shorter one would mask half of a text.
const MIN_SECRET: usize = 8;

/// What is no secret, and stands in many a message.
const KNOWN: [&str; 3] = ["Host", "Origin", "User-Agent"];

/// What makes the request the one that it is.
const OF_HANDSHAKE: [&str; 5] = [
    "Connection",
    "Upgrade",
    "Content-Length",
    "Transfer-Encoding",
    "Capsule-Protocol",
];

impl Headers {
    /// Parses what stands behind each `-H`: a header, or `@` and the name of a file with one a line.
    ///
    /// # Errors
    /// What is wrong, in a sentence that shows no value.
    pub fn parse(options: &[String]) -> Result<Headers, String> {
        let mut headers = Headers::default();
        for option in options {
            match option.strip_prefix('@') {
                Some(path) => headers.read(Path::new(path))?,
                None => headers.add(option).map_err(|why| {
                    format!("a header of -H {why}: write -H 'Name: value', or -H @FILE to keep a value out of ps")
                })?,
            }
        }
        Ok(headers)
    }

    fn read(&mut self, path: &Path) -> Result<(), String> {
        let name = path.display();
        let bytes = read_bytes(path, Kind::Any)
            .map_err(|error| format!("cannot read the header file {name}: {error}"))?;
        for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
            self.read_line(line).map_err(|why| {
                let number = index + 1;
                format!("line {number} of the header file {name} {why}: write it as Name: value")
            })?;
        }
        Ok(())
    }

    fn read_line(&mut self, line: &[u8]) -> Result<(), String> {
        let line = str::from_utf8(line).map_err(|_| "is not UTF-8")?;
        match line.trim() {
            "" => Ok(()),
            _ => self.add(line),
        }
    }

    fn add(&mut self, line: &str) -> Result<(), String> {
        let (name, value) = line.split_once(':').ok_or("has no colon")?;
        let value = value.trim_matches([' ', '\t', '\r']);
        if name.is_empty() || !name.bytes().all(is_of_name) {
            return Err("has a name with characters that are not allowed in one".into());
        }
        // RFC 9110 §5.5.
        if value.is_empty() || value.chars().any(|c| c.is_control() && c != '\t') {
            return Err(format!("{name} has no value, or control characters in it"));
        }
        let is = |other: &&str| name.eq_ignore_ascii_case(other);
        let is_websocket = name.to_ascii_lowercase().starts_with("sec-websocket-");
        if is_websocket || OF_HANDSHAKE.iter().any(is) {
            return Err(format!("{name} is part of the handshake and can't be set"));
        }
        if is(&"X-Access-Token") {
            return Err(format!(
                "{name} is the access token's, which comes from {TOKEN_VARIABLE} or --access-token-file"
            ));
        }
        if is(&"Host") && self.has(name) {
            return Err(format!("{name} is given twice"));
        }
        if is(&"Host") && !is_host(value) {
            return Err(format!("{name} is not a host, with a port or without"));
        }
        self.0.push((name.to_owned(), value.to_owned()));
        Ok(())
    }

    /// Whether there is one of that name.
    pub fn has(&self, name: &str) -> bool {
        self.0
            .iter()
            .any(|(other, _)| other.eq_ignore_ascii_case(name))
    }

    /// Name and value of each.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The values that must not be shown.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        let is_known = |name: &str| KNOWN.iter().any(|known| known.eq_ignore_ascii_case(name));
        let secret = self
            .iter()
            .filter(move |(name, value)| value.len() >= MIN_SECRET && !is_known(name));
        secret.map(|(_, value)| value)
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.iter().map(|(name, _)| name);
        f.debug_list().entries(names).finish()
    }
}

/// RFC 9110 §5.6.2.
fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<Headers, String> {
        let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
        Headers::parse(&options)
    }

    #[test]
    fn a_header_is_a_name_and_a_value() {
        let headers = parse(&["Host: box", "X-A:b: c ", "Cookie:\ta=b; c=d\u{e4}"]).unwrap();
        let expected = [
            ("Host", "box"),
            ("X-A", "b: c"),
            ("Cookie", "a=b; c=d\u{e4}"),
        ];
        assert!(headers.iter().eq(expected));
        assert!(headers.has("cookie") && !headers.has("X-B"));
        assert!(headers.secrets().eq(["a=b; c=d\u{e4}"]));
        assert_eq!(format!("{headers:?}"), r#"["Host", "X-A", "Cookie"]"#);
    }

    #[test]
    fn a_file_has_one_a_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let option = format!("@{}", file.path().display());
        std::fs::write(&file, "X-Id: 1\r\n\nX-Secret: two words\n").unwrap();
        let headers = parse(&[&option, "X-More: 3"]).unwrap();
        assert!(
            headers
                .iter()
                .eq([("X-Id", "1"), ("X-Secret", "two words"), ("X-More", "3")])
        );
        std::fs::write(&file, "X-Id: 1\n\ns3cret\n").unwrap();
        let error = parse(&[&option]).unwrap_err();
        assert!(
            error.contains("line 3 ") && error.contains("Name: value") && !error.contains("s3cret"),
            "{error}"
        );
        std::fs::write(&file, b"X-Id: 1\nX-Secret: caf\xe9 s3cret\n").unwrap();
        let error = parse(&[&option]).unwrap_err();
        assert!(
            error.contains("line 2 ")
                && error.contains("is not UTF-8")
                && !error.contains("s3cret"),
            "{error}"
        );
        assert!(
            parse(&["@/nonexistent"])
                .unwrap_err()
                .contains("/nonexistent")
        );
    }

    #[test]
    fn what_is_no_header_or_the_handshakes_is_refused_without_its_value() {
        for header in [
            "",
            "s3cret",
            ": s3cret",
            "X A: s3cret",
            "X-A",
            "X-A:",
            "X-A: \u{1b}s3cret",
            "X-A: s3cret\r\nX-B: c",
            "X\u{e4}: s3cret",
            "connection: s3cret",
            "Upgrade: s3cret",
            "sec-websocket-key: s3cret",
            "Sec-WebSocket-Protocol: s3cret",
            "Content-Length: 3",
            "transfer-encoding: s3cret",
            "x-access-token: s3cret",
            "Host: s3cret box",
            "Host: ws://s3cret",
            "Host: s3cret\u{e4}",
        ] {
            let error = parse(&[header]).unwrap_err();
            assert!(
                error.contains("-H 'Name: value'") && !error.contains("s3cret"),
                "{error}"
            );
        }
        assert!(parse(&["Host: a", "host: b"]).is_err());
    }
}
