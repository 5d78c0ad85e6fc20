//! A bound on log lines, so that a flood of clients does not become a flood of lines.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::lock::lock;

/// At most so many lines a second; how many were left out is said with the next one.
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
}

impl LogLimit {
    /// Allows `per_second` lines.
    pub const fn new(per_second: u32) -> LogLimit {
        LogLimit {
            per_second,
            window: Mutex::new(None),
        }
    }

    /// Whether one more line may be logged now, and how many were left out before it.
    pub fn allows(&self) -> Option<u64> {
        self.allows_at(Instant::now())
    }

    fn allows_at(&self, now: Instant) -> Option<u64> {
        let mut window = lock(&self.window);
        let window = window.get_or_insert(Window {
            began: now,
            lines: 0,
            left_out: 0,
        });
        if now.duration_since(window.began) >= Duration::from_secs(1) {
            window.began = now;
            window.lines = 0;
        }
        if window.lines == self.per_second {
            window.left_out += 1;
            return None;
        }
        window.lines += 1;
        Some(std::mem::take(&mut window.left_out))
    }

    /// Logs through `log` if a line is allowed, and says first how many of `what` were left out.
    pub fn log(&self, what: &str, log: impl FnOnce()) {
        let Some(left_out) = self.allows() else {
            return;
        };
        if left_out > 0 {
            log::warn!("{left_out} more {what} were not logged");
        }
        log();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted_and_said_once() {
        let limit = LogLimit::new(3);
        let start = Instant::now();
        let allowed: Vec<_> = (0..100).filter_map(|_| limit.allows_at(start)).collect();
        assert_eq!(allowed, [0, 0, 0]);
        let later = start + Duration::from_secs(1);
        assert_eq!(
            [limit.allows_at(later), limit.allows_at(later)],
            [Some(97), Some(0)]
        );
    }
}
