//! What an access token is, where it comes from, and one bounded way to read it. It is never printed.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// The variable that holds the token itself. It has no option, as arguments show in `ps`.
pub(crate) const TOKEN_VARIABLE: &str = "TUNNELD_ACCESS_TOKEN";

/// The longest file of tokens, headers, or a certificate and its key, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// The end of a sentence on a text without a token.
pub(crate) const IS_EMPTY: &str = "is empty: put a token into it or don't set it";

/// The tokens in a text: its lines, but for blank ones and the space around them.
pub(crate) fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty())
}

/// What can't stand in a header field (RFC 9110 §5.5) can't be presented.
///
/// # Errors
/// The end of a sentence.
pub(crate) fn check(token: &str) -> Result<(), &'static str> {
    if token.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(())
    } else {
        Err("holds a token with characters other than visible ASCII")
    }
}

/// Where the access token is.
pub(crate) enum TokenSource {
    File(PathBuf),
    Variable(OsString),
    Nowhere,
}

/// Looks for the access token, which must not be in two places.
pub(crate) fn token_source(file: Option<PathBuf>) -> Result<TokenSource, String> {
    match (file, std::env::var_os(TOKEN_VARIABLE)) {
        (Some(_), Some(_)) => Err(format!(
            "{TOKEN_VARIABLE} and --access-token-file are both set: remove one of them"
        )),
        (Some(path), None) => Ok(TokenSource::File(path)),
        (None, Some(value)) => Ok(TokenSource::Variable(value)),
        (None, None) => Ok(TokenSource::Nowhere),
    }
}

/// What is to be taken for such a file.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// A file, or a pipe that is waited for.
    Any,
    /// A regular file, whose name is never waited for: by now it may be a pipe's.
    Regular,
}

/// The text of a token file.
///
/// # Errors
/// Why it can't be read, in a sentence.
pub(crate) fn read_file(path: &Path, kind: Kind) -> Result<String, String> {
    read_text(path, kind).map_err(|error| {
        let name = path.display();
        format!("cannot read the access token file {name}: {error}")
    })
}

/// The text of a file of secrets, which is bounded.
///
/// # Errors
/// When it can't be read, is too long, or is not UTF-8.
pub(crate) fn read_text(path: &Path, kind: Kind) -> io::Result<String> {
    let bytes = read_bytes(path, kind)?;
    String::from_utf8(bytes).map_err(|_| io::Error::other("it is not UTF-8"))
}

/// The same, whatever is in it.
///
/// # Errors
/// When it can't be read, or is too long.
pub(crate) fn read_bytes(path: &Path, kind: Kind) -> io::Result<Vec<u8>> {
    let flags = match kind {
        Kind::Any => OFlags::CLOEXEC,
        Kind::Regular => OFlags::CLOEXEC | OFlags::NONBLOCK,
    };
    let file = fs::File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if matches!(kind, Kind::Regular) && !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no longer a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::other(format!(
            "it is longer than {MAX_FILE} bytes"
        )));
    }
    Ok(bytes)
}
