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
    is_told: bool,
}

const SECOND: Duration = Duration::from_secs(1);

#[derive(Debug, PartialEq, Eq)]
enum Allowed {
    /// And so many were left out before, of which nobody else will tell.
    Yes(u64),
    No,
    /// The first line that is left out.
    FirstNo,
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
        match self.allows(Instant::now()) {
            Allowed::Yes(left_out) => {
                say(left_out, what);
                log();
            }
            Allowed::No => {}
            Allowed::FirstNo => self.say_later(what),
        }
    }

    fn allows(&self, now: Instant) -> Allowed {
        let mut window = lock(&self.window);
        let window = window.get_or_insert(Window {
            began: now,
            lines: 0,
            left_out: 0,
            is_told: false,
        });
        let mut unsaid = 0;
        // What was left out must be said before the next second begins to count.
        if !window.is_told && now.duration_since(window.began) >= SECOND {
            unsaid = std::mem::take(&mut window.left_out);
            window.began = now;
            window.lines = 0;
        }
        if window.lines < self.per_second {
            window.lines += 1;
            return Allowed::Yes(unsaid);
        }
        window.left_out += 1;
        if window.left_out > 1 {
            return Allowed::No;
        }
        window.is_told = true;
        Allowed::FirstNo
    }

    fn take_left_out(&self) -> u64 {
        lock(&self.window)
            .take()
            .map_or(0, |window| window.left_out)
    }

    /// On a thread of its own, as after a flood no next line may come. Without a thread the next line tells.
    fn say_later(&'static self, what: &'static str) {
        let thread = thread::Builder::new()
            .name("log-limit".into())
            .stack_size(64 * 1024);
        let later = thread.spawn(move || {
            thread::sleep(SECOND);
            say(self.take_left_out(), what);
        });
        if let (Err(_), Some(window)) = (later, &mut *lock(&self.window)) {
            window.is_told = false;
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

    #[test]
    fn a_flood_is_counted() {
        let limit = LogLimit::new(3);
        let start = Instant::now();
        let logged = |now| {
            let lines = (0..100).filter(|_| matches!(limit.allows(now), Allowed::Yes(0)));
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
        assert_eq!(limit.allows(start), Allowed::Yes(0));
        assert_eq!(limit.allows(start), Allowed::FirstNo);
        assert_eq!(limit.allows(start), Allowed::No);
        lock(&limit.window).as_mut().unwrap().is_told = false;
        assert_eq!(limit.allows(start), Allowed::No);
        assert_eq!(limit.allows(start + SECOND), Allowed::Yes(3));
    }

    #[test]
    fn lines_now_and_then_are_all_logged() {
        let limit = LogLimit::new(1);
        let start = Instant::now();
        for second in 0..9 {
            assert_eq!(limit.allows(start + SECOND * second), Allowed::Yes(0));
        }
        assert_eq!(limit.allows(start + SECOND * 8), Allowed::FirstNo);
    }
}
