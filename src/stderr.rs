//! Lines for stderr, written on a thread of their own: nobody who has something to say waits for whoever reads it.
//!
//! A pipe that nobody reads, or a disk that is slow, holds up that thread alone. Lines wait for it in a bounded
//! queue; those that find no room are dropped, and their number is told as soon as there is room. At the end of the
//! process [`flush`] gives the last lines their time, which is short.

use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::lock::lock;

/// The most bytes that wait. As many may be with the thread.
const ROOM: usize = 128 * 1024;

/// The most bytes written at once: what a pipe takes as a whole or not at all (`PIPE_BUF`), so that no line is torn
/// by those of another process.
const CHUNK: usize = 4096;

/// How long the thread stays away after it has written. A wake costs more than a write, so that lines in quick
/// succession share one; a line after a quiet time is written at once.
const COLLECT: Duration = Duration::from_millis(5);

/// How long the end of the process waits for a reader.
const FLUSH_LIMIT: Duration = Duration::from_millis(500);

/// How long a descriptor is left alone that would not block, but takes nothing either.
const PAUSE: Duration = Duration::from_millis(1);

const STACK: usize = 64 * 1024;

static STDERR: Stderr = Stderr {
    queue: Mutex::new(Queue::new()),
    added: Condvar::new(),
    written: Condvar::new(),
};

/// Adds `line`, which ends with a newline, or drops it. Never blocks.
pub fn add(line: &[u8]) {
    STDERR.add(line);
}

/// Adds a sentence for the person who started the process.
pub fn say(sentence: &str) {
    add(format!("tunneld: {sentence}\n").as_bytes());
}

/// Waits until everything is written, for half a second at most.
pub fn flush() {
    STDERR.flush(Instant::now() + FLUSH_LIMIT);
}

/// Ends the process, at once but for a [`flush`].
pub fn exit(code: i32) -> ! {
    flush();
    std::process::exit(code)
}

/// Flushes when it is dropped. The main function holds one, which serves its panics too.
#[derive(Debug)]
pub struct FlushAtEnd;

impl Drop for FlushAtEnd {
    fn drop(&mut self) {
        flush();
    }
}

struct Stderr {
    queue: Mutex<Queue>,
    /// The thread waits for this one.
    added: Condvar,
    /// Whoever flushes waits for this one.
    written: Condvar,
}

impl Stderr {
    fn add(&'static self, line: &[u8]) {
        let mut queue = lock(&self.queue);
        queue.push(line);
        match queue.writer {
            Writer::Collects if queue.lines.len() > ROOM / 2 => self.wake(queue),
            Writer::Waits => self.wake(queue),
            Writer::Busy | Writer::Collects => {}
            // A process that says nothing has no such thread. One that can't be started may be with the next line.
            Writer::None => {
                let thread = thread::Builder::new().name("log".into()).stack_size(STACK);
                if thread.spawn(|| self.write_forever()).is_ok() {
                    queue.writer = Writer::Busy;
                }
            }
        }
    }

    fn wake(&self, mut queue: MutexGuard<'_, Queue>) {
        queue.writer = Writer::Busy;
        drop(queue);
        self.added.notify_one();
    }

    fn write_forever(&self) {
        let mut dropped = 0;
        loop {
            let batch = self.next();
            dropped += batch.dropped + write(std::io::stderr(), &batch.lines, None);
            if dropped > 0 && write(std::io::stderr(), notice(dropped).as_bytes(), None) == 0 {
                dropped = 0;
            }
            self.collect();
        }
    }

    fn collect(&self) {
        let mut queue = lock(&self.queue);
        if !queue.is_flushed {
            queue.writer = Writer::Collects;
            drop(self.added.wait_timeout(queue, COLLECT));
        }
    }

    fn next(&self) -> Batch {
        let mut queue = lock(&self.queue);
        while queue.is_empty() {
            queue.writer = Writer::Waits;
            self.written.notify_all();
            let woken = self.added.wait(queue);
            queue = woken.unwrap_or_else(PoisonError::into_inner);
        }
        queue.writer = Writer::Busy;
        queue.take()
    }

    fn flush(&self, deadline: Instant) {
        let mut queue = lock(&self.queue);
        if matches!(queue.writer, Writer::None) {
            let batch = queue.take();
            drop(queue);
            write(std::io::stderr(), &batch.lines, Some(deadline));
            return;
        }
        queue.is_flushed = true;
        self.added.notify_one();
        while !matches!(queue.writer, Writer::Waits) && Instant::now() < deadline {
            let remaining = deadline.saturating_duration_since(Instant::now());
            let waited = self.written.wait_timeout(queue, remaining);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What waits for the thread.
struct Queue {
    lines: Vec<u8>,
    dropped: u64,
    writer: Writer,
    /// The process is about to end: the thread does not stay away any more.
    is_flushed: bool,
}

enum Writer {
    /// Not started.
    None,
    /// Everything is written. Whoever adds a line wakes it.
    Waits,
    /// Stays away. Whoever adds a line wakes it only when room gets scarce.
    Collects,
    /// Comes for more as soon as it has written what it has.
    Busy,
}

struct Batch {
    lines: Vec<u8>,
    /// How many were dropped after these.
    dropped: u64,
}

impl Queue {
    const fn new() -> Queue {
        Queue {
            lines: Vec::new(),
            dropped: 0,
            writer: Writer::None,
            is_flushed: false,
        }
    }

    /// Once a line is dropped, so are the next until the thread comes: the gap is told where it is.
    fn push(&mut self, line: &[u8]) {
        if self.dropped > 0 || self.lines.len() + line.len() > ROOM {
            self.dropped += 1;
        } else {
            self.lines.extend_from_slice(line);
        }
    }

    fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.dropped == 0
    }

    fn take(&mut self) -> Batch {
        Batch {
            lines: std::mem::take(&mut self.lines),
            dropped: std::mem::take(&mut self.dropped),
        }
    }
}

/// What writes a line that so many are missing.
static NOTICE: OnceLock<fn(u64) -> String> = OnceLock::new();

/// Has dropped lines told by what `notice` makes of their number, a line in the form of the others. Only the first
/// call counts.
pub fn set_notice(notice: fn(u64) -> String) {
    let _ = NOTICE.set(notice);
}

/// Nothing before somebody has said how.
fn notice(dropped: u64) -> String {
    NOTICE
        .get()
        .map_or_else(String::new, |notice| notice(dropped))
}

/// Writes `lines`, for as long as it takes or until `deadline`, and returns how many could not be written.
fn write(output: impl AsFd, mut lines: &[u8], deadline: Option<Instant>) -> u64 {
    let mut must_wait = deadline.is_some();
    while !lines.is_empty() && (!must_wait || has_room(&output, deadline)) {
        match rustix::io::write(&output, first_chunk(lines)) {
            Ok(count @ 1..) => lines = &lines[count..],
            Err(Errno::INTR) => {}
            // Whoever started the process may have made its stderr non-blocking.
            Err(Errno::AGAIN) => {
                must_wait = true;
                thread::sleep(PAUSE);
            }
            Ok(0) | Err(_) => break,
        }
    }
    lines.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// As many whole lines as can be written at once; of a longer line all.
fn first_chunk(lines: &[u8]) -> &[u8] {
    let ends_at = |newline: Option<usize>| newline.map(|newline| &lines[..=newline]);
    if lines.len() <= CHUNK {
        return lines;
    }
    ends_at(lines[..CHUNK].iter().rposition(|byte| *byte == b'\n'))
        .or_else(|| ends_at(lines.iter().position(|byte| *byte == b'\n')))
        .unwrap_or(lines)
}

/// Waits for room, until `deadline` if there is one.
fn has_room(output: &impl AsFd, deadline: Option<Instant>) -> bool {
    loop {
        let remaining = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let limit = remaining.and_then(|remaining| Timespec::try_from(remaining).ok());
        match poll(&mut [PollFd::new(output, PollFlags::OUT)], limit.as_ref()) {
            Ok(ready) => return ready > 0,
            Err(Errno::INTR) => {}
            // The write fails in its turn.
            Err(_) => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeReader, PipeWriter, Read, pipe};

    /// A pipe with room for a page.
    fn small_pipe() -> (PipeReader, PipeWriter) {
        let (reader, writer) = pipe().unwrap();
        rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
        (reader, writer)
    }

    #[test]
    fn the_queue_is_bounded_and_counts_what_it_drops() {
        let mut queue = Queue::new();
        let line = [b'x'; 1000];
        for _ in 0..200 {
            queue.push(&line);
        }
        queue.push(b"a short line after a gap\n");
        let batch = queue.take();
        assert_eq!((batch.lines.len(), batch.dropped), (131_000, 70));
        queue.push(b"next\n");
        let batch = queue.take();
        assert_eq!((&batch.lines[..], batch.dropped), (&b"next\n"[..], 0));
        assert!(queue.is_empty());
        queue.push(&vec![b'x'; ROOM + 1]);
        assert!(!queue.is_empty() && queue.take().dropped == 1);
    }

    #[test]
    fn chunks_end_with_a_line() {
        let short = [&[b'a'; 2999][..], b"\n"].concat();
        let long = [&[b'b'; 9999][..], b"\n"].concat();
        let lines = [&short[..], &short, &long, &short].concat();
        let mut rest = &lines[..];
        for line in [&short, &short, &long, &short] {
            let chunk = first_chunk(rest);
            assert!(chunk == line, "{} bytes", chunk.len());
            rest = &rest[chunk.len()..];
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn a_deadline_bounds_the_writing() {
        let (mut reader, writer) = small_pipe();
        let line = [&[b'x'; 1023][..], b"\n"].concat();
        let deadline = || Some(Instant::now() + Duration::from_millis(20));
        assert_eq!(write(&writer, &line.repeat(9), deadline()), 5);
        reader.read_exact(&mut [0; 4096]).unwrap();
        assert_eq!(write(&writer, &line, deadline()), 0);
    }

    #[test]
    fn a_pipe_that_would_not_block_is_waited_for() {
        let (mut reader, writer) = small_pipe();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let lines = b"every line in its place\n".repeat(1000);
        let writing = thread::spawn({
            let lines = lines.clone();
            move || write(writer, &lines, None)
        });
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        assert!(received == lines);
        assert_eq!(writing.join().unwrap(), 0);
    }

    #[test]
    fn without_a_reader_lines_are_counted() {
        let (reader, writer) = small_pipe();
        drop(reader);
        assert_eq!(write(writer, b"one\ntwo\n", None), 2);
        assert_eq!(notice(2), "");
    }
}
