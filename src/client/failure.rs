//! Why there is no tunnel: a sentence for a person, and a kind for whoever decides by it.

use std::sync::{Arc, OnceLock};

/// Why there is no tunnel.
#[derive(Debug)]
pub struct Failure {
    /// What failed, with which value, and what to do. It shows no secret.
    pub sentence: String,
    /// What may come of another try.
    pub kind: Kind,
}

/// What may come of another try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nobody answers where the daemon should be: not yet, or no longer.
    NotThere,
    /// The server has answered with this status instead of a 101.
    Answered(u16),
    /// What is the same each time, such as a wrong certificate.
    Lasting,
}

impl Failure {
    /// Nobody answers where the daemon should be.
    pub fn not_there(sentence: String) -> Failure {
        Failure {
            sentence,
            kind: Kind::NotThere,
        }
    }

    /// Whether it is what a daemon or a target that is still starting looks like: nobody answers, or a server answers
    /// for it that it is not there (502, 503, 504).
    pub fn may_pass(&self) -> bool {
        matches!(self.kind, Kind::NotThere | Kind::Answered(502..=504))
    }
}

impl From<String> for Failure {
    fn from(sentence: String) -> Failure {
        Failure {
            sentence,
            kind: Kind::Lasting,
        }
    }
}

/// Why TLS broke after its handshake, for a person. With TLS 1.3 a server says only then what it thinks of the client's
/// certificate.
pub type Alert = Arc<OnceLock<String>>;
