//! The daemon's access tokens: those of a file that is followed, and the comparison.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use subtle::{Choice, ConstantTimeEq};

use crate::lock::lock;
use crate::log_limit::LogLimit;
use crate::token::{IS_EMPTY, Kind, check, lines, read_file};

/// A file that changed less than this before it was read may change again without a trace, as its time of
/// change is only as fine as the kernel's tick; so it is read again.
const STABLE_AFTER: Duration = Duration::from_secs(1);

/// The tokens any one of which opens the daemon. They can't be printed.
#[derive(Clone)]
pub struct Tokens(Vec<Box<[u8]>>);

impl Tokens {
    /// Takes each line of `text` as a token; blank lines and the space around a token don't count.
    ///
    /// # Errors
    /// The end of a sentence that begins with where the text came from. It never shows the text.
    pub fn parse(text: &str) -> Result<Tokens, &'static str> {
        let checked = lines(text).map(|line| check(line).map(|()| line.as_bytes().into()));
        let tokens: Vec<_> = checked.collect::<Result<_, _>>()?;
        if tokens.is_empty() {
            return Err(IS_EMPTY);
        }
        Ok(Tokens(tokens))
    }

    /// Whether `presented` is one of the tokens, in a time that doesn't tell which bytes were right.
    pub fn accept(&self, presented: &[u8]) -> bool {
        let none = Choice::from(0);
        self.0
            .iter()
            .fold(none, |found, token| found | token.ct_eq(presented))
            .into()
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokens({} hidden)", self.0.len())
    }
}

/// The most changes of the token file logged in a second.
static RELOADS: LogLimit = LogLimit::new(10);

/// The tokens of a daemon that wants one, kept up to date with their file.
#[derive(Debug)]
pub struct Access {
    file: Option<TokenFile>,
    tokens: Mutex<Arc<Tokens>>,
}

/// A token file, and how it looked when it was last read.
#[derive(Debug)]
struct TokenFile {
    path: PathBuf,
    last: Mutex<FileStamp>,
}

/// How a file looked, or why it could not be looked at.
#[derive(Debug, PartialEq)]
struct FileStamp {
    state: Result<State, io::ErrorKind>,
    /// It had not changed for [`STABLE_AFTER`] when it was read.
    is_stable: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct State {
    device: u64,
    inode: u64,
    length: u64,
    /// The time of the last change of its content or its permissions, in nanoseconds.
    changed: i128,
}

impl Access {
    /// Tokens that stay as they are.
    pub fn fixed(tokens: Tokens) -> Access {
        Access {
            file: None,
            tokens: Mutex::new(Arc::new(tokens)),
        }
    }

    /// The tokens in the file at `path`, one a line. Later changes of the file are followed.
    ///
    /// # Errors
    /// Why there are none, in a sentence.
    pub fn from_file(path: PathBuf) -> Result<Access, String> {
        let stamp = FileStamp::of(&path);
        let tokens = read_tokens(&path, Kind::Any)?;
        // A pipe, such as the shell's <(...), can be read once.
        let can_change = fs::metadata(&path).is_ok_and(|file| file.is_file());
        let file = can_change.then(|| TokenFile {
            path,
            last: Mutex::new(stamp),
        });
        Ok(Access {
            file,
            tokens: Mutex::new(Arc::new(tokens)),
        })
    }

    /// Logs a warning if others than its owner and its group can read the file, or than its owner change it.
    pub fn warn_if_exposed(&self) {
        const OTHERS_READ: u32 = 0o004;
        const ANOTHER_WRITES: u32 = 0o022;
        let Some(TokenFile { path, .. }) = &self.file else {
            return;
        };
        let Ok(file) = fs::metadata(path) else {
            return;
        };
        let path = path.display();
        if file.permissions().mode() & OTHERS_READ != 0 {
            log::warn!("everyone can read the access token file {path}: chmod o-r it");
        }
        if file.permissions().mode() & ANOTHER_WRITES != 0 {
            log::warn!(
                "users other than its owner can change the access token file {path}: chmod go-w it"
            );
        }
    }

    /// Whether `presented` is one of the tokens as they are now.
    pub fn accept(&self, presented: &[u8]) -> bool {
        if let Some(file) = &self.file {
            self.follow(file);
        }
        let tokens = Arc::clone(&lock(&self.tokens));
        tokens.accept(presented)
    }

    /// Reads the file again if it has changed. If that gives no tokens, the last ones stay.
    fn follow(&self, file: &TokenFile) {
        let mut last = lock(&file.last);
        let now = FileStamp::of(&file.path);
        if now == *last && last.is_stable {
            return;
        }
        let has_changed = now.state != last.state;
        *last = now;
        match read_tokens(&file.path, Kind::Regular) {
            Ok(tokens) => {
                if has_changed {
                    RELOADS.log("changes of the access token file", || {
                        log::info!(
                            "access tokens read again from {}: {tokens:?}",
                            file.path.display()
                        );
                        self.warn_if_exposed();
                    });
                }
                *lock(&self.tokens) = Arc::new(tokens);
            }
            Err(error) => {
                // It may have been for want of a descriptor.
                last.is_stable = false;
                if has_changed {
                    RELOADS.log("changes of the access token file", || {
                        log::error!("{error}; the last good tokens stay valid");
                    });
                }
            }
        }
    }
}

impl FileStamp {
    fn of(path: &Path) -> FileStamp {
        let state = fs::metadata(path).map(|file| State {
            device: file.dev(),
            inode: file.ino(),
            length: file.len(),
            changed: i128::from(file.ctime()) * 1_000_000_000 + i128::from(file.ctime_nsec()),
        });
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default().as_nanos() as i128;
        let is_stable = |state: &State| now - state.changed > STABLE_AFTER.as_nanos() as i128;
        let is_stable = state.as_ref().map_or(true, is_stable);
        let state = state.map_err(|error| error.kind());
        FileStamp { state, is_stable }
    }
}

fn read_tokens(path: &Path, kind: Kind) -> Result<Tokens, String> {
    let name = path.display();
    let text = read_file(path, kind)?;
    Tokens::parse(&text).map_err(|error| format!("the access token file {name} {error}"))
}

#[cfg(test)]
mod tests {
    use super::Tokens;

    #[test]
    fn every_line_is_a_token() {
        let tokens = Tokens::parse("old\n\n new \r\n").unwrap();
        assert!(tokens.accept(b"old") && tokens.accept(b"new"));
        for wrong in ["", "ol", "oldx", " new ", "old\nnew"] {
            assert!(!tokens.accept(wrong.as_bytes()), "{wrong:?}");
        }
    }

    #[test]
    fn what_cannot_be_presented_is_refused() {
        for text in ["", " \n\n", "two words", "t\u{e4}g", "bell\u{7}"] {
            assert!(Tokens::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn debug_output_hides_it() {
        let tokens = Tokens::parse("s3cret").unwrap();
        assert_eq!(format!("{tokens:?}"), "Tokens(1 hidden)");
    }
}
