//! The two directions of a connection, and how they end.
//!
//! ```text
//! upload    local ─▶ server    its end, EOF, becomes Close 1000
//! download  server ─▶ local    its end, Close 1000, becomes a FIN, or the end of the process
//! ```
//!
//! Any other end breaks the connection: the server sees no Close and the local client a RST, so that what was
//! cut off does not look finished.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use socket2::Socket;
use tungstenite::error::ProtocolError;
use tungstenite::protocol::CloseFrame;
use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Error, Message, WebSocket};

use super::handshake::MAX_MESSAGE_MIB;
use super::keepalive;
use super::local::Local;
use super::options::Times;
use super::printable;
use super::server::{self, MAX_MESSAGE, ServerStream, ServerWriter, mark_of};
use crate::lock::lock;
use crate::tunnel::state::State;
use crate::tunnel::target::Received;

/// The threads need few frames; what they move is on the heap.
const STACK: usize = 128 * 1024;

/// What the threads of a connection share.
#[derive(Debug)]
pub struct Relay {
    /// The server's connection.
    pub socket: Arc<Socket>,
    /// Where frames for the server go.
    pub writer: Arc<ServerWriter>,
    /// Where bytes come from and go to.
    pub local: Local,
    /// What moved when.
    pub state: Arc<State>,
    ends: Mutex<Ends>,
    changed: Condvar,
}

/// What has ended so far.
#[derive(Debug, Default)]
pub struct Ends {
    upload: bool,
    download: bool,
    /// Why the server took less than the local side had to send. The download learns what is behind it.
    unsent: Option<String>,
    broken: Option<String>,
}

impl Ends {
    /// Whether a direction has ended.
    pub fn has_one(&self) -> bool {
        self.upload || self.download
    }

    /// How the connection ended, once it has.
    pub fn outcome(&self) -> Option<Result<(), String>> {
        match (&self.broken, &self.unsent) {
            (Some(why), _) => Some(Err(why.clone())),
            (None, _) if !(self.upload && self.download) => None,
            (None, Some(why)) => Some(Err(format!("not every byte could be sent: {why}"))),
            (None, None) => Some(Ok(())),
        }
    }
}

/// Relays between `server` and `local` until both directions have ended in order.
///
/// # Errors
/// How it broke, in a part of a sentence. Both sides have then been broken off.
pub fn relay(
    mut server: WebSocket<ServerStream>,
    local: Local,
    times: Times,
) -> Result<(), String> {
    // The number is for the daemon's log.
    let state = Arc::new(State::new(0));
    let socket = server.get_ref().socket();
    let writer = Arc::new(ServerWriter::new(Arc::clone(&socket), Arc::clone(&state)));
    let opened = server
        .get_mut()
        .open(Arc::clone(&writer), Arc::clone(&state));
    opened.map_err(|error| format!("cannot go on: {error}"))?;
    let relay = Arc::new(Relay {
        socket,
        writer,
        local,
        state,
        ends: Mutex::default(),
        changed: Condvar::new(),
    });
    let outcome = relay
        .start("upload", |relay| relay.upload())
        .and_then(|()| relay.start("download", move |relay| relay.download(server)))
        .and_then(|()| keepalive::watch(&relay, times));
    let outcome = outcome.and_then(|()| relay.close_in_order(times.linger));
    if outcome.is_err() {
        relay.break_off();
    }
    outcome
}

impl Relay {
    /// Looks at what has ended.
    pub fn ends(&self) -> MutexGuard<'_, Ends> {
        lock(&self.ends)
    }

    /// Waits for a change, at most until the connection is `until` old.
    pub fn wait<'a>(&self, ends: MutexGuard<'a, Ends>, until: Duration) -> MutexGuard<'a, Ends> {
        self.state.wait_on(&self.changed, ends, until)
    }

    /// Starts a direction, whose failure breaks the connection.
    fn start(
        self: &Arc<Self>,
        name: &str,
        run: impl FnOnce(&Relay) -> Result<(), String> + Send + 'static,
    ) -> Result<(), String> {
        let relay = Arc::clone(self);
        let direction = move || {
            // The panic itself is reported by the panic hook.
            let end = catch_unwind(AssertUnwindSafe(|| run(&relay)));
            if let Err(why) = end.unwrap_or_else(|_| Err("internal error".into())) {
                relay.note_end(|ends| ends.broken = ends.broken.take().or(Some(why)));
            }
        };
        let thread = thread::Builder::new().name(name.into()).stack_size(STACK);
        match thread.spawn(direction) {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("no thread for it: {error}")),
        }
    }

    fn note_end(&self, note: impl FnOnce(&mut Ends)) {
        let mut ends = self.ends();
        note(&mut ends);
        drop(ends);
        self.changed.notify_all();
    }

    fn upload(&self) -> Result<(), String> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let unsent = loop {
            match self.local.receive(&mut buffer) {
                Received::Bytes(count) => {
                    if let Err(error) = self.writer.send_message(&buffer[..count]) {
                        break Some(error.to_string());
                    }
                }
                Received::Eof => {
                    // That the server is gone, the download finds out.
                    let _ = self.writer.send_close(CloseCode::Normal);
                    break None;
                }
                Received::Failed(why) => return Err(self.local.read_failure(&why)),
                Received::BrokenOff | Received::Unsupported => return Err("broken off".into()),
            }
        };
        self.note_end(|ends| {
            ends.upload = true;
            ends.unsent = unsent;
        });
        Ok(())
    }

    fn download(&self, mut server: WebSocket<ServerStream>) -> Result<(), String> {
        loop {
            match server.read() {
                Ok(Message::Binary(bytes)) => self.local.deliver(&bytes, &self.state)?,
                Ok(Message::Ping(payload)) => self.writer.answer_ping(payload),
                Ok(Message::Pong(payload)) => {
                    if let Some(mark) = mark_of(&payload) {
                        self.state.note_answered(mark);
                    }
                }
                Ok(Message::Close(frame)) => {
                    if let Err(why) = judge_close(&frame) {
                        // RFC 6455 §5.5.1. The server has broken off the target before it sent its own.
                        self.writer
                            .try_close(frame.map_or(CloseCode::Normal, |frame| frame.code), "");
                        return Err(why);
                    }
                    break;
                }
                Ok(Message::Text(_)) => {
                    self.writer
                        .try_close(CloseCode::Unsupported, "binary frames only");
                    return Err("the server sent a text message: is it a tunneld?".into());
                }
                Ok(Message::Frame(_)) => {}
                Err(error) => return Err(self.read_failure(error)),
            }
        }
        self.local.finish();
        self.note_end(|ends| ends.download = true);
        Ok(())
    }

    fn read_failure(&self, error: Error) -> String {
        match error {
            Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)
            | Error::ConnectionClosed => "the server's connection ended without a Close".into(),
            Error::Io(error) => format!("the server's connection failed: {error}"),
            Error::Capacity(_) => {
                self.writer.try_close(CloseCode::Size, "");
                format!(
                    "the server sent a message of more than {MAX_MESSAGE_MIB} MiB: is it a tunneld?"
                )
            }
            error => {
                let why = printable(&error.to_string());
                self.writer.try_close(CloseCode::Protocol, "");
                format!("the server broke the protocol: {why}")
            }
        }
    }

    fn close_in_order(&self, limit: Duration) -> Result<(), String> {
        server::end(&self.socket, limit).map_err(|error| {
            format!("the server did not take everything before its end: {error}")
        })?;
        self.local.close_in_order();
        Ok(())
    }

    /// The server first: what the upload sends after it has been woken, a Close for example, must not
    /// reach it.
    fn break_off(&self) {
        server::shut(&self.socket);
        self.local.break_off();
    }
}

/// Only a Close 1000 is the target's orderly end.
fn judge_close(frame: &Option<CloseFrame>) -> Result<(), String> {
    let Some(CloseFrame { code, reason }) = frame else {
        return Err("the server closed it without saying why".into());
    };
    let reason = match reason.as_str() {
        _ if *code == CloseCode::Normal => return Ok(()),
        "" => "the server closed it".into(),
        reason => printable(reason),
    };
    Err(format!("{reason} (close code {})", u16::from(*code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_close_1000_is_an_orderly_end() {
        let judge = |code, reason: &str| {
            judge_close(&Some(CloseFrame {
                code,
                reason: reason.into(),
            }))
        };
        assert_eq!(judge(CloseCode::Normal, ""), Ok(()));
        for (end, sentence) in [
            (
                judge(CloseCode::Away, ""),
                "the server closed it (close code 1001)",
            ),
            (
                judge(CloseCode::Error, "a\u{7}"),
                "a\\u{7} (close code 1011)",
            ),
            (
                judge_close(&None),
                "the server closed it without saying why",
            ),
        ] {
            assert_eq!(end.unwrap_err(), sentence);
        }
    }
}
