//! Why there is no tunnel: a sentence for a person, and a kind for whoever decides by it.

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
    /// The server has answered with this status instead of a 101, and why, if it is a tunneld that says so.
    Answered(u16, Option<Reason>),
    /// What is the same each time, such as a wrong certificate.
    Lasting,
    /// Whoever the tunnel was for has left meanwhile, and knows of it.
    NobodyWaits,
}

/// Why a tunneld refuses, as far as anything depends on it. It has no other form for that than its sentence: of a name
/// with several addresses `Proxy-Status` has the last one's failure alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The request names no target, and nothing else is wrong with it.
    NoTarget,
    /// The target's name has no address.
    DoesNotResolve,
    /// It refuses connections, at one of its addresses at least.
    ConnectionRefused,
    /// There is no way to its network.
    NetworkUnreachable,
    /// There is no way to it.
    NoRoute,
    /// It does not answer.
    TimedOutConnecting,
    /// The time was over before it was dialed.
    TimedOutBefore,
}

impl Reason {
    /// Finds it in what a server says, as it came: a mask for a secret may hide a part of these words, and a secret that
    /// shares them is no reason for anything.
    pub fn find(said: &str) -> Option<Reason> {
        // The words of the daemon's routes and of `DialError`, in the order in which they decide.
        let words = [
            ("parameter port is missing", Reason::NoTarget),
            ("does not resolve", Reason::DoesNotResolve),
            ("Connection refused", Reason::ConnectionRefused),
            ("Network is unreachable", Reason::NetworkUnreachable),
            ("No route to host", Reason::NoRoute),
            ("timed out while connecting", Reason::TimedOutConnecting),
            ("timed out", Reason::TimedOutBefore),
        ];
        let found = words.into_iter().find(|(words, _)| said.contains(words));
        found.map(|(_, reason)| reason)
    }
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
        matches!(self.kind, Kind::NotThere | Kind::Answered(502..=504, _))
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
