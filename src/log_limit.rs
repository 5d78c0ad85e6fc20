//! A bound on log lines, so that a flood of clients does not become a flood of lines.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use crate::lock::lock;

/// At most so many lines a second.
#[derive(Debug)]
pub struct LogLimit {
    per_second: u32,
    window: Mutex<Option<Window>>,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    lines: u32,
    left_out: u64,
    /// A thread is going to say how many were left out.
    summary_pending: bool,
}

const SECOND: Duration = Duration::from_secs(1);

#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// And so many were left out before, of which nobody else will tell.
    Log(u64),
    Suppress {
        /// It is the first that is left out: somebody must tell how many follow.
        schedule_summary: bool,
    },
}

impl LogLimit {
    /// Allows `per_second` lines.
    pub const fn new(per_second: u32) -> LogLimit {
        LogLimit {
            per_second,
            window: Mutex::new(None),
        }
    }

    /// Logs through `log` if a line is allowed. How many of `what` were left out in a second is said when it is
    /// over.
    pub fn log(&'static self, what: &'static str, log: impl FnOnce()) {
        match self.decide(Instant::now()) {
            Decision::Log(left_out) => {
                say(left_out, what);
                log();
            }
            Decision::Suppress {
                schedule_summary: true,
            } => self.schedule_summary(what),
            Decision::Suppress { .. } => {}
        }
    }

    fn decide(&self, now: Instant) -> Decision {
        let mut window = lock(&self.window);
        let window = window.get_or_insert(Window {
            began: now,
            lines: 0,
            left_out: 0,
            summary_pending: false,
        });
        let mut unsaid = 0;
        // What was left out must be said before the next second begins to count.
        if !window.summary_pending && now.duration_since(window.began) >= SECOND {
            unsaid = std::mem::take(&mut window.left_out);
            window.began = now;
            window.lines = 0;
        }
        if window.lines < self.per_second {
            window.lines += 1;
            return Decision::Log(unsaid);
        }
        window.left_out += 1;
        if window.left_out > 1 {
            return Decision::Suppress {
                schedule_summary: false,
            };
        }
        window.summary_pending = true;
        Decision::Suppress {
            schedule_summary: true,
        }
    }

    fn take_left_out(&self) -> u64 {
        lock(&self.window)
            .take()
            .map_or(0, |window| window.left_out)
    }

    /// On a thread of its own, as after a flood no next line may come. Without a thread the next line tells.
    fn schedule_summary(&'static self, what: &'static str) {
        let thread = thread::Builder::new()
            .name("log-limit".into())
            .stack_size(64 * 1024);
        let later = thread.spawn(move || {
            thread::sleep(SECOND);
            say(self.take_left_out(), what);
        });
        if let (Err(_), Some(window)) = (later, &mut *lock(&self.window)) {
            window.summary_pending = false;
        }
    }
}

fn say(left_out: u64, what: &str) {
    if left_out > 0 {
        log::warn!("{left_out} more {what} were not logged");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suppressed(schedule_summary: bool) -> Decision {
        Decision::Suppress { schedule_summary }
    }

    #[test]
    fn a_flood_is_counted() {
        let limit = LogLimit::new(3);
        let start = Instant::now();
        let logged = |now| {
            let lines = (0..100).filter(|_| matches!(limit.decide(now), Decision::Log(0)));
            lines.count()
        };
        assert_eq!(logged(start), 3);
        let later = start + SECOND;
        assert_eq!(logged(later), 0, "not before the first flood is summed up");
        assert_eq!(limit.take_left_out(), 197);
        assert_eq!(logged(later), 3);
    }

    #[test]
    fn without_a_thread_the_next_line_tells() {
        let limit = LogLimit::new(1);
        let start = Instant::now();
        assert_eq!(limit.decide(start), Decision::Log(0));
        assert_eq!(limit.decide(start), suppressed(true));
        assert_eq!(limit.decide(start), suppressed(false));
        lock(&limit.window).as_mut().unwrap().summary_pending = false;
        assert_eq!(limit.decide(start), suppressed(false));
        assert_eq!(limit.decide(start + SECOND), Decision::Log(3));
    }

    #[test]
    fn lines_now_and_then_are_all_logged() {
        let limit = LogLimit::new(1);
        let start = Instant::now();
        for second in 0..9 {
            assert_eq!(limit.decide(start + SECOND * second), Decision::Log(0));
        }
        assert_eq!(limit.decide(start + SECOND * 8), suppressed(true));
    }
}
