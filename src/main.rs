//! Arguments, logging, signals, exit code; nothing else.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tunneld::{ClientConfig, Config, Exit, Shutdown, logging, signals, stderr};

fn main() -> ExitCode {
    let _flush = stderr::FlushAtEnd;
    match start() {
        Ok(code) => code,
        Err(Exit::Help(text)) => {
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(Exit::Usage(sentence)) => {
            stderr::say(&sentence);
            ExitCode::from(2)
        }
    }
}

fn start() -> Result<ExitCode, Exit> {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if let Some(arguments) = tunneld::client_arguments(&arguments) {
        let config = ClientConfig::load(arguments)?;
        logging::start(logging::Format::Text);
        return tunneld::run_client(config);
    }
    let config = Config::load(arguments)?;
    let listeners = tunneld::listen(&config.listen, config.stays_here())?;
    logging::start(config.log_format);
    match &config.access {
        Some(access) => access.warn_if_exposed(),
        None => log::warn!(
            "no access token is set: everyone who can connect may reach every port in here"
        ),
    }
    let shutdown = Arc::new(Shutdown::new().map_err(|error| format!("cannot start: {error}"))?);
    handle_signals(&shutdown)?;
    Ok(match tunneld::run_daemon(listeners, config, &shutdown) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("failed: {error}");
            ExitCode::FAILURE
        }
    })
}

/// Wrappers such as timeout(1) signal both a process and its group, which delivers one signal twice.
const SAME_SIGNAL: Duration = Duration::from_millis(10);

/// The first SIGTERM, SIGINT or SIGHUP ends the daemon in order, a second one at once.
fn handle_signals(shutdown: &Arc<Shutdown>) -> Result<(), String> {
    let shutdown = Arc::clone(shutdown);
    let mut first = None;
    signals::on_termination(move || {
        if first.get_or_insert_with(Instant::now).elapsed() > SAME_SIGNAL {
            stderr::exit(1);
        }
        shutdown.request();
    })
}
