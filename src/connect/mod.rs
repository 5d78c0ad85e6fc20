//! `tunneld connect`: the client's end of a tunnel.
//!
//! The way of a connection:
//!
//! 1. [`options`] checks the command line; with `--listen`, [`listen`] accepts local connections;
//! 2. [`handshake`] dials the server and upgrades, through [`tls`] for wss, before one deadline;
//! 3. [`relay`] moves bytes between [`local`] and [`server`], one thread each way;
//! 4. [`keepalive`], on the thread that started it, pings, watches the deadlines and waits for the end;
//! 5. an orderly end on one side becomes an orderly end on the other, a broken one a broken one.

pub mod handshake;
pub mod keepalive;
pub mod listen;
pub mod local;
pub mod options;
pub mod relay;
pub mod server;
#[cfg_attr(not(feature = "tls"), path = "no_tls.rs")]
pub mod tls;

use std::io::{self, Write};
use std::process::ExitCode;

use crate::config::NoConfig;
use local::{Local, Stdio};
use options::Config;

/// Runs the client until its connection ends, or with `--listen` until a signal does. One sentence on a
/// failure goes to stderr.
///
/// # Errors
/// When it can't start as it was told to.
pub fn run(config: Config) -> Result<ExitCode, NoConfig> {
    // At trace level tungstenite logs a request as it is sent, the token included.
    log::set_max_level(log::max_level().min(log::LevelFilter::Debug));
    if let Some(address) = config.listen {
        return listen::serve(config, address);
    }
    let stdio = Stdio::new().map_err(|error| format!("cannot start: {error}"))?;
    Ok(match through(&config, Local::Stdio(stdio)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            let _ = writeln!(io::stderr(), "tunneld: {sentence}");
            ExitCode::FAILURE
        }
    })
}

/// Leads the bytes of `local` through a tunnel of their own, until both directions have ended in order.
///
/// # Errors
/// Why there is no tunnel, or how it broke, in a sentence. `local` has then been broken off.
fn through(config: &Config, local: Local) -> Result<(), String> {
    let server = handshake::open(config)?;
    relay::relay(server, local, config.times).map_err(|why| format!("the tunnel broke: {why}"))
}

/// How many characters of what a server says are shown.
const MAX_SAID: usize = 500;

/// What a server says, fit for a terminal and a log line.
fn printable(text: &str) -> String {
    let mut shown = String::new();
    for (index, character) in text.chars().enumerate() {
        if index == MAX_SAID {
            shown.push('…');
            break;
        }
        if character.is_control() || turns_text(character) {
            shown.extend(character.escape_unicode());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Characters that are not seen, or that change the direction or the lines of what is.
fn turns_text(character: char) -> bool {
    matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_a_server_says_cannot_steer_a_terminal() {
        let text = super::printable("caf\u{e9} \u{1b}[2J\r\nnext\u{9b}");
        assert_eq!(text, "caf\u{e9} \\u{1b}[2J\\u{d}\\u{a}next\\u{9b}");
        assert_eq!(super::printable("\u{202e}abc"), "\\u{202e}abc");
        assert_eq!(super::printable(&"x".repeat(9999)).chars().count(), 501);
    }
}
