//! Reads and writes that end at a deadline, for everything that precedes the tunnel, and how time is told of.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use humantime::FormattedDuration;

/// A connection whose reads and writes end at a deadline: behind it they fail with `WouldBlock`. It leaves its
/// last timeout on the socket.
#[derive(Debug)]
pub struct Until<'a> {
    socket: &'a TcpStream,
    deadline: Instant,
}

impl<'a> Until<'a> {
    /// `socket` until `deadline`.
    pub fn new(socket: &'a TcpStream, deadline: Instant) -> Until<'a> {
        Until { socket, deadline }
    }

    /// The same connection, until `deadline` if that is earlier.
    pub fn no_later_than(self, deadline: Instant) -> Until<'a> {
        let deadline = deadline.min(self.deadline);
        Until { deadline, ..self }
    }
}

impl Read for Until<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.socket
                .set_read_timeout(Some(remaining(self.deadline)?))?;
            match self.socket.read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }
}

impl Write for Until<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.socket
            .set_write_timeout(Some(remaining(self.deadline)?))?;
        self.socket.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How long it is to `deadline`.
///
/// # Errors
/// `WouldBlock`, as a read with a timeout has it, once it has passed.
pub fn remaining(deadline: Instant) -> io::Result<Duration> {
    match deadline.checked_duration_since(Instant::now()) {
        Some(remaining) if !remaining.is_zero() => Ok(remaining),
        _ => Err(ErrorKind::WouldBlock.into()),
    }
}

/// `time` to the second, or to a tenth of one if it is short.
pub fn about(time: Duration) -> FormattedDuration {
    let tenths = (time.as_millis() + 50) / 100;
    let tenths = u64::try_from(tenths).unwrap_or(u64::MAX).max(1);
    let tenths = if tenths < 10 {
        tenths
    } else {
        (tenths + 5) / 10 * 10
    };
    humantime::format_duration(Duration::from_millis(tenths * 100))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_told_to_the_second_or_the_tenth_of_one() {
        for (millis, told) in [
            (0, "100ms"),
            (449, "400ms"),
            (499, "500ms"),
            (960, "1s"),
            (29_600, "30s"),
            (62_010, "1m 2s"),
            (3_599_990, "1h"),
        ] {
            assert_eq!(about(Duration::from_millis(millis)).to_string(), told);
        }
    }
}
