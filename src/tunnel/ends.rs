//! How a tunnel ends: how each of its directions did, what the peer is told, and what is said of the whole.
//!
//! "Peer" is the other end of the WebSocket, "stream" what it stands for; see [`Role`]. Each row of the tables of
//! ends in the reference is decided here.

use std::time::Duration;

use super::transfer::WriteFailure;

/// Which end of a tunnel this is, and all that differs between the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The WebSocket server. The peer is a client, the stream a target's connection.
    Daemon,
    /// The WebSocket client. The peer is a server, the stream a local connection, or stdin and stdout.
    Client,
}

impl Role {
    /// Whether the frames of a WebSocket are masked by this end (RFC 6455 §5.1).
    pub fn masks(self) -> bool {
        self == Role::Client
    }

    /// Whether the peer's frames must be.
    pub fn peer_masks(self) -> bool {
        self == Role::Daemon
    }

    /// Whether a Close with this code is the peer's orderly end. A client may give none; from a daemon only 1000
    /// says that the target ended in order. Any other says that something was broken off.
    pub(super) fn is_orderly(self, code: Option<u16>) -> bool {
        code == Some(1000) || code.is_none() && self == Role::Daemon
    }

    /// Whether this end leaves it to the peer to close the connection behind both ends, and waits for that: only it
    /// shows a client that its own end has arrived (RFC 6455 §7.1.1).
    pub(super) fn waits_for_eof(self) -> bool {
        self == Role::Client
    }

    /// What the stream is called.
    pub(super) fn stream_name(self) -> &'static str {
        match self {
            Role::Daemon => "target",
            Role::Client => "the local client",
        }
    }
}

/// What a tunnel's ends say to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// RFC 6455. A Close ends a direction in order, or says why there is no such end; a ping is answered.
    WebSocket,
    /// draft-ietf-httpbis-connect-tcp. FINAL_DATA ends a direction in order, a reset is any other end, and nothing
    /// is ever answered.
    ConnectTcp,
}

impl Protocol {
    /// Whether an end that isn't orderly is told in words. Without them a reset says so, behind all that was sent
    /// before.
    pub(crate) fn has_words(self) -> bool {
        self == Protocol::WebSocket
    }

    /// Whether a ping is answered. Otherwise the kernel finds out that the peer is gone, as it acknowledges nothing.
    pub(super) fn has_pongs(self) -> bool {
        self == Protocol::WebSocket
    }

    /// What ends a direction in order.
    fn end_name(self) -> &'static str {
        match self {
            Protocol::WebSocket => "a Close",
            Protocol::ConnectTcp => "FINAL_DATA",
        }
    }
}

/// One end of a tunnel, and all that follows from which one it is and what it speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) role: Role,
    pub(crate) protocol: Protocol,
}

impl Endpoint {
    /// Whether what goes out must be masked.
    pub(super) fn masks(self) -> bool {
        self.role.masks() && self.protocol == Protocol::WebSocket
    }

    /// Whether the peer is told in words that the stream failed. To the server of a WebSocket only the lack of a
    /// Close says so.
    pub(super) fn tells_failures(self) -> bool {
        self.role == Role::Daemon && self.protocol.has_words()
    }

    /// Whether the peer is read from after its end: to wait for the server's EOF, or to find what may not come.
    pub(super) fn reads_after_end(self) -> bool {
        self.role.waits_for_eof() || self.protocol == Protocol::ConnectTcp
    }

    /// Whether the peer answers pings behind its end: a server goes on reading until it has the client's.
    pub(super) fn answers_behind_close(self) -> bool {
        self.role == Role::Client && self.protocol.has_pongs()
    }

    /// Whether the peer may take its time for its own end after ours. A target may, and so a server; the client of a
    /// WebSocket that has been told of the target's end owes a Close, as there is no half-closed WebSocket.
    pub(super) fn waits_for_end(self) -> bool {
        self.role == Role::Client || self.protocol == Protocol::ConnectTcp
    }
}

/// What the peer is told when a direction ends. A WebSocket says it with a Close; CONNECT-TCP knows the orderly end
/// alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Farewell {
    /// The stream ended in order.
    Orderly,
    /// The stream failed, in words.
    StreamFailed(String),
    /// The process ends.
    Shutdown,
    /// Nothing has moved for the idle timeout.
    Idle,
    /// A text message came.
    Text,
    /// What came breaks the protocol, in words.
    Protocol(String),
    /// The answer to a Close of this code (RFC 6455 §5.5.1).
    Answer(u16),
}

impl Farewell {
    /// The code and the reason of a Close (RFC 6455 §7.4.1).
    pub(super) fn close(&self) -> (u16, &str) {
        match self {
            Farewell::Orderly => (1000, ""),
            Farewell::StreamFailed(why) => (1011, why),
            Farewell::Shutdown => (1001, "the daemon is shutting down"),
            Farewell::Idle => (1001, "idle"),
            Farewell::Text => (1003, "binary frames only (websocat: --binary)"),
            Farewell::Protocol(why) => (1002, why),
            Farewell::Answer(code) => (*code, ""),
        }
    }
}

/// How the direction from the peer to the stream ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ToStreamEnd {
    /// The peer ended in order. Everything before it reached the stream, as did the FIN behind it; unless
    /// [`Ends::undelivered`] says otherwise. A server has closed its connection behind it.
    Closed,
    /// The peer broke off: the code and the reason of its Close.
    PeerAborted(Option<u16>, String),
    /// The peer sent what it may not, and is told.
    Refused(Farewell),
    /// The peer's connection ended without a Close: it failed, in words, or had an EOF.
    Vanished(Option<String>),
    /// The thread panicked.
    Panicked,
    /// The system had no thread for it.
    NeverStarted,
}

/// How the direction from the stream to the peer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FromStreamEnd {
    /// The stream ended in order, and every byte and the Close 1000 behind it are on their way.
    Eof,
    /// The stream failed, in words.
    StreamFailed(String),
    /// The peer takes nothing more.
    PeerGone(WriteFailure),
    /// The tunnel was aborted.
    Aborted,
    /// The thread panicked.
    Panicked,
}

/// Why the clocks ended a tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cut {
    /// No pong in time, with nothing else before it.
    PongTimeout,
    /// No sign of life for the stall timeout.
    Stalled,
    /// The peer's connection is broken, and what it had sent has been given on or had its time.
    PeerBroken,
    /// The peer has been sent what had come from the stream, and is told by a reset that there is no orderly end.
    Aborted,
    /// The peer owed a Close and gave no sign of life for the linger.
    Linger,
    /// The process ends.
    Shutdown,
    /// No payload byte has moved for the idle timeout.
    Idle,
    /// A Close was not taken and answered in time.
    CloseTimeout,
    /// Both sides have sent their Close, and the server, without a sign of life, does not close the connection.
    LeftOpen,
}

/// What has ended so far.
#[derive(Debug, Default)]
pub(super) struct Ends {
    pub(super) to_stream: Option<ToStreamEnd>,
    pub(super) from_stream: Option<FromStreamEnd>,
    /// The peer's orderly end has come.
    pub(super) peer_closed: bool,
    /// Why the stream took less than the peer has sent.
    pub(super) undelivered: Option<WriteFailure>,
    /// The stream's connection takes nothing more, or is about to have failed.
    pub(super) stream_broke: bool,
    /// And there was an error to be told then.
    pub(super) stream_erred: bool,
    /// Why the stream failed, while the peer takes nothing of what it had brought.
    pub(super) held_back: Option<WriteFailure>,
    /// The stream had taken all it was given before it was sent its end: a reset that answers that takes nothing back.
    pub(super) stream_took_all: bool,
    /// The stream failed while the peer's direction was open: a Close that comes then is the answer to ours.
    pub(super) stream_failed_first: bool,
    /// The peer has ended its side of the TCP connection: what it sent before may be all it had to say.
    pub(super) peer_eof: bool,
    /// The peer's connection broke, and why if that could be told.
    pub(super) peer_broke: bool,
    /// See above, in words.
    pub(super) peer_failure: Option<String>,
    /// Set when the clocks ended the tunnel, or began to.
    pub(super) cut: Option<Cut>,
    /// The end that goes with it has come.
    pub(super) is_cut: bool,
    /// The process wants the tunnel to end.
    pub(super) shutdown: bool,
    /// When one of the above was set last.
    pub(super) changed_at: Duration,
}

impl Ends {
    /// The stream was closed, or reset, after an orderly end of its own and before the peer's: what the peer sends,
    /// or has sent, is lost.
    pub(super) fn is_stream_closed_early(&self) -> bool {
        self.stream_broke && self.from_stream == Some(FromStreamEnd::Eof) && !self.peer_closed
    }

    /// Whether the stream has failed while the thread that reads it is occupied with what came before.
    pub(super) fn is_failure_unseen(&self) -> bool {
        self.stream_erred && self.from_stream.is_none() && self.held_back.is_none()
    }

    /// Whether that is to be told though the peer doesn't take what came before.
    pub(super) fn is_held_back(&self) -> bool {
        matches!(self.held_back, Some(WriteFailure::Failed(_)))
    }

    /// How the direction from the stream ended for good: what broke the stream comes before what followed from that.
    pub(super) fn end_from_stream(&mut self, end: FromStreamEnd) {
        self.from_stream = Some(match (end, &self.held_back) {
            (
                FromStreamEnd::PeerGone(_) | FromStreamEnd::Aborted,
                Some(WriteFailure::Failed(why)),
            ) => FromStreamEnd::StreamFailed(why.clone()),
            (end, _) => end,
        });
    }

    /// Whether the peer's connection turned out to be reset when it was written to. Nobody else is told then.
    pub(super) fn was_reset_in_write(&self) -> bool {
        matches!(
            self.from_stream,
            Some(FromStreamEnd::PeerGone(WriteFailure::Failed(_)))
        )
    }

    /// Whether both directions have ended.
    pub(super) fn are_over(&self) -> bool {
        self.to_stream.is_some() && self.from_stream.is_some()
    }
}

/// How a tunnel ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// In a word.
    pub(crate) end: End,
    /// For the log or the user.
    pub(crate) reason: String,
    /// The peer may still be reading what it was sent.
    pub(crate) peer_is_there: bool,
}

impl Outcome {
    /// The client's last bytes could not be given to the server, which had ended in order.
    pub(crate) fn not_all_sent(why: &str) -> Outcome {
        Outcome {
            end: End::PeerVanished,
            reason: not_all_sent(why),
            peer_is_there: false,
        }
    }
}

/// How a tunnel ended, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Both directions ended in order, and every byte was delivered.
    Orderly,
    /// The stream reset, or its connection failed.
    StreamFailed,
    /// The same after the peer had ended in order, as some servers do each time: no cause for alarm.
    FailedAfterClose,
    /// The stream was closed before it had been given everything.
    CutShort,
    /// The peer said with its Close that it broke off.
    PeerAborted,
    /// The peer's connection failed, ended without a Close, or was given up.
    PeerVanished,
    /// The peer sent what it may not.
    ProtocolError,
    /// The peer owed a Close and gave no sign of life for the linger.
    Linger,
    /// The process ended.
    Shutdown,
    /// No payload byte has moved for the idle timeout.
    Idle,
    /// A thread panicked.
    InternalError,
}

impl End {
    pub(crate) const ALL: [End; 11] = [
        End::Orderly,
        End::StreamFailed,
        End::FailedAfterClose,
        End::CutShort,
        End::PeerAborted,
        End::PeerVanished,
        End::ProtocolError,
        End::Linger,
        End::Shutdown,
        End::Idle,
        End::InternalError,
    ];

    /// The daemon's word for it, in its log and its metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            End::Orderly => "orderly",
            End::StreamFailed => "target_failed",
            End::FailedAfterClose => "target_failed_after_close",
            End::CutShort => "upload_cut_short",
            End::PeerAborted => "client_aborted",
            End::PeerVanished => "client_vanished",
            End::ProtocolError => "protocol_error",
            End::Linger => "linger",
            End::Shutdown => "shutdown",
            End::Idle => "idle",
            End::InternalError => "internal_error",
        }
    }
}

/// How a tunnel ended, from how its directions did. The first row that fits counts.
pub(super) fn outcome(endpoint: Endpoint, ends: &Ends) -> Outcome {
    use FromStreamEnd as From;
    use ToStreamEnd as To;
    let role = endpoint.role;
    let (end, reason) = match (&ends.to_stream, &ends.from_stream, &ends.cut) {
        (Some(To::Panicked | To::NeverStarted), _, _) | (_, Some(From::Panicked), _) => {
            (End::InternalError, "internal error".into())
        }
        (_, Some(From::StreamFailed(why)), _) if ends.stream_failed_first => {
            (End::StreamFailed, why.clone())
        }
        (_, _, Some(cut @ (Cut::PongTimeout | Cut::Stalled))) => {
            (End::PeerVanished, given_up(role, cut))
        }
        (Some(To::Refused(farewell)), _, _) => (End::ProtocolError, refused(role, farewell)),
        (_, Some(From::StreamFailed(why)), _) if ends.peer_closed => (
            End::FailedAfterClose,
            format!("{why}, after {} end", of_peer(role)),
        ),
        (_, Some(From::StreamFailed(why)), _) => (End::StreamFailed, why.clone()),
        (_, _, Some(Cut::Shutdown)) => (End::Shutdown, "the daemon is shutting down".into()),
        (_, _, Some(Cut::Idle)) => (
            End::Idle,
            "no byte has moved within the idle timeout".into(),
        ),
        // A peer may answer our own Close with the same code.
        (Some(To::PeerAborted(code, reason)), from, _) => {
            let stream_failed = *code == Some(Farewell::StreamFailed(String::new()).close().0);
            let after_close = role == Role::Client && *from == Some(From::Eof) && stream_failed;
            let end = if after_close {
                End::FailedAfterClose
            } else {
                End::PeerAborted
            };
            (end, peer_aborted(role, *code, reason))
        }
        (_, from, _) if ends.undelivered.is_some() => match &ends.undelivered {
            // A reset that the upload alone was told of, as the client takes nothing of the download.
            Some(WriteFailure::Failed(why)) if role == Role::Daemon && *from != Some(From::Eof) => {
                (End::StreamFailed, why.clone())
            }
            _ => (End::CutShort, cut_short(role, ends)),
        },
        (_, _, Some(Cut::Linger)) => (
            End::Linger,
            format!(
                "{} sent no Close and gave no sign of life within the linger",
                peer(role)
            ),
        ),
        (_, _, Some(Cut::LeftOpen)) => (
            End::PeerVanished,
            format!(
                "{} did not close its connection behind both ends: it may not have taken every byte",
                peer(role)
            ),
        ),
        (Some(To::Closed), Some(From::Eof), None)
            if !(role.waits_for_eof() && ends.peer_failure.is_some()) =>
        {
            (End::Orderly, "closed in order".into())
        }
        (_, _, Some(Cut::CloseTimeout)) => (
            End::PeerVanished,
            format!("{} did not take its Close in time", peer(role)),
        ),
        // The same as a failure of the target after its client's end, told in the only way there is.
        (Some(To::Vanished(_)), Some(From::Eof), _)
            if role == Role::Client && !endpoint.protocol.has_words() =>
        {
            (End::FailedAfterClose, vanished(endpoint, ends))
        }
        _ => (End::PeerVanished, vanished(endpoint, ends)),
    };
    let is_lost = matches!(end, End::PeerVanished | End::CutShort | End::InternalError);
    let is_told = endpoint.protocol.has_words() || end == End::Orderly;
    let peer_is_there = !is_lost && is_told && ends.cut != Some(Cut::Aborted);
    Outcome {
        end,
        reason,
        peer_is_there,
    }
}

fn peer(role: Role) -> &'static str {
    match role {
        Role::Daemon => "client",
        Role::Client => "the server",
    }
}

fn of_peer(role: Role) -> &'static str {
    match role {
        Role::Daemon => "the client's",
        Role::Client => "the server's",
    }
}

fn given_up(role: Role, cut: &Cut) -> String {
    match (role, cut) {
        (Role::Daemon, Cut::PongTimeout) => {
            "client vanished: no pong within the ping timeout".into()
        }
        (Role::Daemon, _) => "client vanished: no sign of life within the stall timeout".into(),
        (Role::Client, Cut::PongTimeout) => {
            "the server gave no sign of life, nor answered a ping".into()
        }
        (Role::Client, _) => "the server gave no sign of life for 5 minutes".into(),
    }
}

fn peer_aborted(role: Role, code: Option<u16>, reason: &str) -> String {
    match (role, code, reason) {
        (Role::Client, None, _) => "the server closed it without saying why".into(),
        (Role::Client, Some(code), "") => format!("the server closed it (close code {code})"),
        (Role::Client, Some(code), reason) => format!("{reason} (close code {code})"),
        (Role::Daemon, code, reason) => {
            let code = code.unwrap_or_default();
            format!("client closed with code {code} {reason:?}")
        }
    }
}

fn refused(role: Role, farewell: &Farewell) -> String {
    match (role, farewell) {
        (Role::Client, Farewell::Text) => "the server sent a text message: is it a tunneld?".into(),
        (role, farewell) => format!("{} broke the protocol: {}", peer(role), farewell.close().1),
    }
}

fn cut_short(role: Role, ends: &Ends) -> String {
    match (role, &ends.undelivered) {
        (Role::Daemon, Some(WriteFailure::Failed(why))) => format!("upload cut short: {why}"),
        (Role::Daemon, _) => "upload cut short: target closed".into(),
        (Role::Client, Some(WriteFailure::Failed(why))) => why.clone(),
        (Role::Client, _) => "the local client has closed its connection".into(),
    }
}

fn vanished(endpoint: Endpoint, ends: &Ends) -> String {
    let why = match (&ends.peer_failure, &ends.to_stream, &ends.from_stream) {
        (Some(why), _, _) => Some(why.as_str()),
        (_, Some(ToStreamEnd::Vanished(Some(why))), _) => Some(why.as_str()),
        (_, _, Some(FromStreamEnd::PeerGone(WriteFailure::Failed(why)))) => Some(why.as_str()),
        _ => None,
    };
    let end = endpoint.protocol.end_name();
    match (endpoint.role, why) {
        (Role::Daemon, Some(why)) => format!("client vanished: {why}"),
        (Role::Daemon, None) if ends.peer_closed => {
            "client vanished: it closed its connection before the target's end".into()
        }
        (Role::Daemon, None) => format!("client vanished: its connection ended without {end}"),
        (Role::Client, why) if ends.peer_closed => {
            not_all_sent(why.unwrap_or("the server has closed its connection"))
        }
        (Role::Client, Some(why)) if !endpoint.protocol.has_words() => {
            format!("the target or the server broke it off: {why}")
        }
        (Role::Client, Some(why)) => format!("the server's connection failed: {why}"),
        (Role::Client, None) => format!("the server's connection ended without {end}"),
    }
}

fn not_all_sent(why: &str) -> String {
    format!("not every byte could be sent: {why}")
}

#[cfg(test)]
mod tests;
