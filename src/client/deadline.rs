//! Reads and writes that end at a deadline, for everything that precedes the tunnel.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

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
