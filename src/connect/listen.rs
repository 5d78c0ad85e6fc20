//! The local port: each connection to it gets a tunnel of its own.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::net::sockopt;

use super::local::Local;
use super::options::{Config, Token};
use super::through;
use crate::accept;
use crate::config::NoConfig;
use crate::log_limit::LogLimit;
use crate::tunnel::target::TargetSocket;

/// A connection's thread dials and shakes hands.
const STACK: usize = 256 * 1024;

static FAILURES: LogLimit = LogLimit::new(20);

/// Serves connections to `address` until SIGTERM, SIGINT or SIGHUP ends the process with exit code 0. What
/// is open then is cut off, and looks so on both sides.
///
/// # Errors
/// When it can't listen.
pub fn serve(config: Config, address: SocketAddr) -> Result<ExitCode, NoConfig> {
    let cannot =
        |error: io::Error| format!("cannot listen on {address}: {error}; choose another --listen");
    let listener = TcpListener::bind(address).map_err(cannot)?;
    let address = listener.local_addr().map_err(cannot)?;
    ctrlc::set_handler(|| {
        log::info!("shut down");
        std::process::exit(0);
    })
    .map_err(|error| format!("cannot handle signals: {error}"))?;
    // Each connection needs three, and more while it dials. Without more of them it is refused later.
    accept::raise_descriptors();
    if !address.ip().is_loopback() {
        warn_of_strangers(address, &config.token);
    }
    log::info!("listening on {address}");
    accept_all(&listener, &Arc::new(config));
    Ok(ExitCode::FAILURE)
}

fn warn_of_strangers(address: SocketAddr, token: &Token) {
    let with = match token {
        Token::None => "",
        Token::Is(_) | Token::InFile(_) => " with your token",
    };
    log::warn!("everyone who can connect to {address} may use the tunnel{with}");
}

fn accept_all(listener: &TcpListener, config: &Arc<Config>) {
    // Each connection's thread holds a clone until it has ended.
    let places = Arc::new(());
    loop {
        match listener.accept() {
            Ok((client, peer)) if Arc::strong_count(&places) > config.max_connections => {
                let _ = sockopt::set_socket_linger(&client, Some(Duration::ZERO));
                drop(client);
                FAILURES.log("failed connections", || {
                    log::warn!(
                        "reset a connection of {peer}: {} are open, see --max-connections",
                        config.max_connections
                    );
                });
            }
            Ok((client, peer)) => serve_one(client, peer, config, &places),
            Err(error) if accept::is_of_one_connection(&error) => {}
            Err(error) => {
                FAILURES.log("failed connections", || {
                    log::warn!("cannot accept a connection, trying again soon: {error}");
                });
                thread::sleep(accept::PAUSE);
            }
        }
    }
}

fn serve_one(client: TcpStream, peer: SocketAddr, config: &Arc<Config>, places: &Arc<()>) {
    let _ = client.set_nodelay(true);
    let (config, place) = (Arc::clone(config), Arc::clone(places));
    // From here on, whatever drops it sends a RST.
    let client = TargetSocket::new(client).map(Local::Socket);
    let thread = thread::Builder::new()
        .name("connection".into())
        .stack_size(STACK);
    let started = client.and_then(|client| {
        thread.spawn(move || {
            if let Err(sentence) = through(&config, client) {
                log_failure(peer, &sentence);
            }
            drop(place);
        })
    });
    if let Err(error) = started {
        log_failure(peer, &format!("cannot serve it: {error}"));
    }
}

fn log_failure(peer: SocketAddr, sentence: &str) {
    FAILURES.log("failed connections", || {
        log::warn!("connection of {peer}: {sentence}");
    });
}
