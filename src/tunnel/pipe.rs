//! A pipe through which bytes go from one descriptor to another without being copied (splice(2)).

use std::io;

use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use crate::os::{Quota, Taken};

/// How much of a pipe's default size is asked for at a time.
const SIZE: usize = 64 * 1024;

/// The size of a pipe through which much goes, where fewer and larger reads halve the cost. The system
/// allows it to everybody, up to 64 MiB of pipes a user (pipe(7)).
const LARGE: usize = 512 * 1024;

/// The most large pipes at once: a quarter of what the system grants a user, who needs pipes elsewhere too.
static LARGE_PIPES: Quota = Quota::new(32);

/// How many bytes are worth a splice, which costs two more system calls than a copy but touches no byte.
pub(super) const WORTH_SPLICING: usize = 4 * 1024;

/// A pipe, and how much is in it.
#[derive(Debug)]
pub(super) struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
    held: usize,
    large: Option<Taken>,
}

/// Why a splice moved nothing.
#[derive(Debug)]
pub(super) enum NoSplice {
    /// The end of the stream, or an urgent byte that comes next, which looks the same: a plain read tells.
    EndOrMark,
    /// The system, or its seccomp profile, has no splice for this descriptor. Reads and writes do the same.
    Unsupported,
    /// The descriptor's own failure, as of a read or a write.
    Failed(Errno),
}

impl NoSplice {
    fn of(error: Errno) -> NoSplice {
        match error {
            Errno::INVAL | Errno::NOSYS | Errno::PERM | Errno::ACCESS => NoSplice::Unsupported,
            error => NoSplice::Failed(error),
        }
    }
}

impl Pipe {
    /// A pipe, if the system has the descriptors.
    pub(super) fn new() -> Option<Pipe> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC).ok()?;
        Some(Pipe {
            out,
            into,
            held: 0,
            large: None,
        })
    }

    /// How many bytes are in it.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// How much is asked for in one go.
    pub(super) fn room(&self) -> usize {
        if self.large.is_some() { LARGE } else { SIZE }
    }

    /// Waits for bytes from `source` and takes them in, at most [`Pipe::room`], if the pipe is empty.
    pub(super) fn fill(&mut self, source: impl AsFd) -> Result<usize, NoSplice> {
        match splice(
            source,
            None,
            &self.into,
            None,
            self.room(),
            SpliceFlags::MOVE,
        ) {
            Ok(0) => Err(NoSplice::EndOrMark),
            Ok(count) => {
                self.held += count;
                self.enlarge(count);
                Ok(count)
            }
            Err(error) => Err(NoSplice::of(error)),
        }
    }

    /// Much goes through it: it becomes large, unless there are too many or the system doesn't allow another.
    fn enlarge(&mut self, count: usize) {
        if count < SIZE / 2 || self.large.is_some() {
            return;
        }
        self.large = LARGE_PIPES.take();
        if self.large.is_some() && fcntl_setpipe_size(&self.out, LARGE).is_err() {
            self.large = None;
        }
    }

    /// Less goes through it: it gives its memory back. It must be empty.
    pub(super) fn shrink(&mut self) {
        if self.large.take().is_some() {
            let _ = fcntl_setpipe_size(&self.out, SIZE);
        }
    }

    /// Gives at most `limit` of the bytes in it to `sink`, which takes at least one.
    pub(super) fn give(&mut self, sink: impl AsFd, limit: usize) -> Result<usize, NoSplice> {
        let limit = limit.min(self.held);
        match splice(&self.out, None, sink, None, limit, SpliceFlags::MOVE) {
            Ok(0) => Err(NoSplice::EndOrMark),
            Ok(count) => {
                self.held -= count;
                Ok(count)
            }
            Err(error) => Err(NoSplice::of(error)),
        }
    }

    /// Reads bytes that are in it.
    ///
    /// # Errors
    /// Those of read(2).
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = buffer.len().min(self.held);
        let count = rustix::io::read(&self.out, &mut buffer[..room])?;
        self.held -= count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::pipe::fcntl_getpipe_size;

    use super::*;

    fn size(pipe: &Pipe) -> usize {
        fcntl_getpipe_size(&pipe.out).unwrap()
    }

    /// Moves `count` bytes through it.
    fn pass(pipe: &mut Pipe, count: usize) {
        let (mut source, from) = UnixStream::pair().unwrap();
        let (to, mut sink) = UnixStream::pair().unwrap();
        let bytes: Vec<u8> = (0..count).map(|index| index as u8).collect();
        source.write_all(&bytes).unwrap();
        let mut passed = vec![0; count];
        let mut done = 0;
        while done < count {
            pipe.fill(&from).unwrap();
            while pipe.held() > 0 {
                let given = pipe.give(&to, usize::MAX).unwrap();
                sink.read_exact(&mut passed[done..done + given]).unwrap();
                done += given;
            }
        }
        assert!(passed == bytes);
    }

    #[test]
    fn the_33rd_large_pipe_stays_as_it_is_until_another_is_given_back() {
        let mut pipes: Vec<_> = (0..33).map(|_| Pipe::new().unwrap()).collect();
        pass(&mut pipes[0], 1000);
        assert_eq!(size(&pipes[0]), SIZE, "little has gone through it");
        for pipe in &mut pipes {
            pass(pipe, 50_000);
        }
        let sizes: Vec<_> = pipes.iter().map(size).collect();
        assert_eq!(sizes, [&[LARGE; 32][..], &[SIZE]].concat());
        assert_eq!((pipes[0].room(), pipes[32].room()), (LARGE, SIZE));
        pipes[0].shrink();
        assert_eq!((size(&pipes[0]), pipes[0].room()), (SIZE, SIZE));
        pass(&mut pipes[32], 50_000);
        assert_eq!(size(&pipes[32]), LARGE);
        pass(&mut pipes[0], 50_000);
        assert_eq!(size(&pipes[0]), SIZE);
        // One that is dropped gives its place back as well.
        drop(pipes.remove(1));
        pass(&mut pipes[0], 50_000);
        assert_eq!(size(&pipes[0]), LARGE);
    }

    #[test]
    fn the_end_and_what_can_not_be_spliced_are_told_apart() {
        let mut pipe = Pipe::new().unwrap();
        let (ended, peer) = UnixStream::pair().unwrap();
        drop(peer);
        assert!(matches!(pipe.fill(&ended), Err(NoSplice::EndOrMark)));
        for error in [Errno::INVAL, Errno::NOSYS, Errno::PERM, Errno::ACCESS] {
            assert!(matches!(NoSplice::of(error), NoSplice::Unsupported));
        }
        for error in [Errno::CONNRESET, Errno::PIPE, Errno::INTR, Errno::AGAIN] {
            assert!(matches!(NoSplice::of(error), NoSplice::Failed(told) if told == error));
        }
    }
}
