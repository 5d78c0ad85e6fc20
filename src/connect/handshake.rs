//! From a configuration to an upgraded connection: dial, encrypt, ask, and read what a refusal says.

use std::io::{self, ErrorKind, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{SockRef, Socket};
use tungstenite::WebSocket;
use tungstenite::client::{IntoClientRequest, client_with_config};
use tungstenite::error::Error;
use tungstenite::handshake::HandshakeError;
use tungstenite::handshake::client::{Request, Response};
use tungstenite::http::HeaderValue;
use tungstenite::http::header::{CONTENT_LENGTH, USER_AGENT};
use tungstenite::protocol::WebSocketConfig;

use super::options::Config;
use super::printable;
use super::server::ServerStream;
use crate::dial::dial;
use crate::policy::Policy;

/// How much tungstenite reads at a time. It zeroes its buffer before each read, so a larger one costs more
/// than it saves.
const READ: usize = 64 * 1024;

/// The longest message taken from a server, in MiB. A tunneld sends 32 KiB at most.
pub const MAX_MESSAGE_MIB: usize = 16;

/// How many bytes may wait unsent in the socket's buffer (`TCP_NOTSENT_LOWAT`, tcp(7)).
const UNSENT: u32 = 128 * 1024;

/// How much of a refusal's body is read.
const MAX_BODY: usize = 64 * 1024;

/// How long the rest of it may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(1);

const TOKEN: &str = "X-Access-Token";

/// Connects to the server and upgrades, before the dial timeout is over.
///
/// # Errors
/// Why not, in a sentence.
pub fn open(config: &Config) -> Result<WebSocket<ServerStream>, String> {
    let deadline = Instant::now() + config.dial_timeout;
    let request = request(config)?;
    let token = request.headers().get(TOKEN).cloned();
    let socket = Arc::new(connect(config, deadline)?);
    let stream = ServerStream::new(Arc::clone(&socket), deadline);
    let max_message = MAX_MESSAGE_MIB * 1024 * 1024;
    let limits = WebSocketConfig::default()
        .read_buffer_size(READ)
        .write_buffer_size(0)
        .max_message_size(Some(max_message))
        .max_frame_size(Some(max_message));
    match client_with_config(request, stream, Some(limits)) {
        Ok((socket, _)) => Ok(socket),
        Err(HandshakeError::Interrupted(_)) => Err(format!(
            "no answer from {} within {:?}: raise --dial-timeout if it is only slow",
            config.server.address, config.dial_timeout
        )),
        Err(HandshakeError::Failure(Error::Http(response))) => {
            let deadline = deadline.min(Instant::now() + BODY_TIMEOUT);
            let said = refusal(*response, ServerStream::new(socket, deadline));
            Err(without(token.as_ref(), &said))
        }
        Err(HandshakeError::Failure(error)) => Err(format!(
            "{} does not upgrade to a WebSocket: {}",
            config.server.address,
            printable(&error.to_string())
        )),
    }
}

fn connect(config: &Config, deadline: Instant) -> Result<Socket, String> {
    let server = &config.server;
    let stream = dial(&server.address, &Policy::default(), deadline)
        .map_err(|error| format!("cannot connect to {}: {error}", server.address))?;
    // Without it a pong waits behind more bytes.
    let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
    match &config.trust {
        Some(trust) => trust.encrypt(stream, server, deadline),
        None => Ok(stream.into()),
    }
}

fn request(config: &Config) -> Result<Request, String> {
    let mut request = config
        .server
        .url
        .as_str()
        .into_client_request()
        .map_err(|error| format!("the URL can't be asked for: {error}"))?;
    let headers = request.headers_mut();
    let agent = concat!("tunneld/", env!("CARGO_PKG_VERSION"));
    headers.insert(USER_AGENT, HeaderValue::from_static(agent));
    if let Some(token) = config.token.get()? {
        let token = HeaderValue::from_str(&token)
            .map_err(|_| "the access token can't stand in a header: use visible ASCII")?;
        headers.insert(TOKEN, token);
    }
    Ok(request)
}

/// What a refusal says: the message in the JSON of a tunneld, or the body as it is.
fn refusal(response: Response, stream: ServerStream) -> String {
    let status = response.status();
    let length = response.headers().get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
    let length = length.unwrap_or(MAX_BODY).min(MAX_BODY);
    let mut body = response.into_body().unwrap_or_default();
    let rest = length.saturating_sub(body.len());
    // Whatever of it comes is better than nothing.
    let _ = read_rest(stream, rest, &mut body);
    body.truncate(length);
    let body = String::from_utf8_lossy(&body);
    // A proxy may have sent it in chunks, whose lengths stand around it.
    let object = body.find('{').zip(body.rfind('}'));
    let object = object.and_then(|(start, end)| body.get(start..=end));
    let json = object.and_then(|object| serde_json::from_str::<serde_json::Value>(object).ok());
    let message = match json.as_ref().and_then(|json| json["message"].as_str()) {
        Some(message) => message.to_owned(),
        None => body.clone().into_owned(),
    };
    match printable(message.trim()) {
        message if message.is_empty() => format!("refused with {status}"),
        message => format!("refused with {}: {message}", status.as_u16()),
    }
}

/// A server may send back what it was asked, the token included.
fn without(token: Option<&HeaderValue>, said: &str) -> String {
    match token.and_then(|token| token.to_str().ok()) {
        Some(token) => said.replace(token, "(the token)"),
        None => said.to_owned(),
    }
}

fn read_rest(stream: ServerStream, rest: usize, body: &mut Vec<u8>) -> io::Result<usize> {
    match stream.take(rest as u64).read_to_end(body) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        read => read,
    }
}
