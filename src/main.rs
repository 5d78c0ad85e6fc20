//! Arguments, logging, signals, exit code; nothing else.

use std::ffi::OsString;
use std::io::{self, Write};
use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tunneld::config::{Config, NoConfig};
use tunneld::connect;
use tunneld::daemon::{self, Shutdown};
use tunneld::log_limit::LogLimit;

fn main() -> ExitCode {
    match start() {
        Ok(code) => code,
        Err(NoConfig::Asked(text)) => {
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(NoConfig::Wrong(sentence)) => {
            let _ = writeln!(io::stderr(), "tunneld: {sentence}");
            ExitCode::from(2)
        }
    }
}

fn start() -> Result<ExitCode, NoConfig> {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if let Some(arguments) = connect::options::of_client(&arguments) {
        let config = connect::options::Config::load(arguments)?;
        start_logging();
        return connect::run(config);
    }
    let config = Config::load(arguments)?;
    start_logging();
    let listener = TcpListener::bind(config.listen).map_err(|error| {
        format!(
            "cannot listen on {}: {error}; choose another --listen",
            config.listen
        )
    })?;
    match &config.access {
        Some(access) => access.warn_if_exposed(),
        None => log::warn!(
            "no access token is set: everyone who can connect may reach every port in here"
        ),
    }
    let shutdown = Arc::new(Shutdown::new().map_err(|error| format!("cannot start: {error}"))?);
    handle_signals(&shutdown)?;
    Ok(match daemon::run(listener, config, &shutdown) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("failed: {error}");
            ExitCode::FAILURE
        }
    })
}

fn start_logging() {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    std::panic::set_hook(Box::new(|panic| {
        static PANICS: LogLimit = LogLimit::new(2);
        PANICS.log("internal errors", || {
            log::error!("internal error in one thread: {panic}")
        });
    }));
}

/// Wrappers such as timeout(1) signal both a process and its group, which delivers one signal twice.
const SAME_SIGNAL: Duration = Duration::from_millis(10);

/// The first SIGTERM, SIGINT or SIGHUP ends the daemon in order, a second one at once.
fn handle_signals(shutdown: &Arc<Shutdown>) -> Result<(), String> {
    let shutdown = Arc::clone(shutdown);
    let mut first = None;
    let on_signal = move || {
        if first.get_or_insert_with(Instant::now).elapsed() > SAME_SIGNAL {
            std::process::exit(1);
        }
        shutdown.request();
    };
    ctrlc::set_handler(on_signal).map_err(|error| format!("cannot handle signals: {error}"))
}
