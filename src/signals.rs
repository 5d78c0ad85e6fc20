//! The signals that end a process: SIGTERM, SIGINT and SIGHUP.
//!
//! One that was ignored when the process started stays ignored: nohup(1) and the background jobs of a shell
//! without job control are meant to outlive it. ctrlc asks nobody whether it may take a signal, so it is given
//! SIGINT alone, and only if it may; signal-hook has the others.

use std::sync::{Arc, Mutex};
use std::thread;

use rustix::process::Signal;
use signal_hook::iterator::Signals;

use crate::lock::lock;

/// What runs on it is short.
const STACK: usize = 64 * 1024;

/// Calls `handler` at each SIGTERM, SIGINT and SIGHUP that was not ignored when the process started, on a thread
/// of its own and one at a time. To be called once.
///
/// # Errors
/// When the system refuses a handler or a thread, in a sentence.
pub fn on_termination(handler: impl FnMut() + Send + 'static) -> Result<(), String> {
    let ignored = Ignored::at_start();
    let handler = Arc::new(Mutex::new(handler));
    let of_ctrlc = Arc::clone(&handler);
    if !ignored.has(Signal::INT) {
        ctrlc::set_handler(move || lock(&of_ctrlc)()).map_err(cannot_handle)?;
    }
    handle(&[Signal::TERM, Signal::HUP], ignored, move || {
        lock(&handler)()
    })
}

/// Calls `handler` at each SIGHUP, on a thread of its own; never if SIGHUP was ignored when the process started.
///
/// # Errors
/// When the system refuses a handler or a thread, in a sentence.
pub fn on_hangup(handler: impl FnMut() + Send + 'static) -> Result<(), String> {
    handle(&[Signal::HUP], Ignored::at_start(), handler)
}

fn handle(
    signals: &[Signal],
    ignored: Ignored,
    mut handler: impl FnMut() + Send + 'static,
) -> Result<(), String> {
    let wanted = signals.iter().filter(|signal| !ignored.has(**signal));
    let wanted: Vec<_> = wanted.map(|signal| signal.as_raw()).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let mut signals = Signals::new(wanted).map_err(cannot_handle)?;
    let thread = thread::Builder::new()
        .name("signals".into())
        .stack_size(STACK);
    let started = thread.spawn(move || signals.forever().for_each(|_| handler()));
    started.map(drop).map_err(cannot_handle)
}

fn cannot_handle(error: impl std::fmt::Display) -> String {
    format!("cannot handle signals: {error}")
}

/// The signals that are ignored, a bit each, the lowest for signal 1 (SigIgn in proc_pid_status(5)).
#[derive(Clone, Copy)]
struct Ignored(u64);

impl Ignored {
    /// To be called before a handler is set. Where there is no `/proc`, none is ignored.
    fn at_start() -> Ignored {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        Ignored::parse(&status).unwrap_or(Ignored(0))
    }

    fn parse(status: &str) -> Option<Ignored> {
        let mask = status
            .lines()
            .find_map(|line| line.strip_prefix("SigIgn:"))?;
        u64::from_str_radix(mask.trim(), 16).ok().map(Ignored)
    }

    fn has(self, signal: Signal) -> bool {
        self.0 >> (signal.as_raw() - 1) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ignored_is_read_from_the_mask() {
        let nohup =
            Ignored::parse("SigBlk:\tffffffffffffffff\nSigIgn:\t0000000000001001\nSigCgt:\t7\n");
        let nohup = nohup.unwrap();
        assert!(nohup.has(Signal::HUP) && nohup.has(Signal::PIPE));
        assert!(!nohup.has(Signal::TERM) && !nohup.has(Signal::INT));
        let job = Ignored::parse("SigIgn:\t0000000000000006").unwrap();
        assert!(job.has(Signal::INT) && job.has(Signal::QUIT) && !job.has(Signal::HUP));
        for text in ["", "SigIgn:\n", "SigIgn:\tmany\n"] {
            assert!(Ignored::parse(text).is_none(), "{text:?}");
        }
    }
}
