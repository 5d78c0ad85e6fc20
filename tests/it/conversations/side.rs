//! One side of a conversation: plays its script on a connection and keeps account of what it saw.

use std::fmt::{self, Display, Formatter};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::script::{End, Read, Script, Until, Write};
use super::wire::{Exit, Moved, Wire};

/// How long nothing may move before a side is said to hang.
const STUCK: Duration = Duration::from_secs(8);

/// What a side did and saw.
#[derive(Debug, Clone)]
pub struct Account {
    pub began: Instant,
    pub written: usize,
    pub received: usize,
    pub is_corrupt: bool,
    /// How much was written before its orderly end.
    pub fin: Option<usize>,
    /// When it has read the other's orderly end.
    pub eof: Option<Instant>,
    /// When it was told, by a read or a write, that the connection is broken.
    pub broken: Option<Instant>,
    pub hangs: bool,
    /// When it last began to write.
    pub last_write: Option<Instant>,
    /// When and how it ended its connection.
    pub ended: Instant,
    pub end: End,
    /// When it had.
    pub closed: Instant,
    pub exit: Option<Exit>,
}

/// What a side knows of the other's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Knows {
    Nothing,
    /// It was orderly.
    End,
    /// It was not, or something was lost.
    Broken,
}

impl Account {
    pub fn knows(&self) -> Knows {
        match (self.eof, self.broken) {
            (None, None) => Knows::Nothing,
            (Some(_), None) => Knows::End,
            (_, Some(_)) => Knows::Broken,
        }
    }
}

impl Display for Account {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let since = |at: Option<Instant>| at.map(|at| at.duration_since(self.began));
        let Account {
            written,
            received,
            fin,
            end,
            ..
        } = self;
        write!(
            formatter,
            "knows {:?}: written {written}, fin {fin:?}, received {received}, eof {:?}, broken {:?}, {end:?} at {:?}",
            self.knows(),
            since(self.eof),
            since(self.broken),
            since(Some(self.ended)).unwrap_or_default(),
        )?;
        match &self.exit {
            Some(exit) => write!(
                formatter,
                ", exit {:?} {:?} at {:?}",
                exit.code,
                exit.stderr,
                since(Some(exit.at))
            ),
            None => Ok(()),
        }
    }
}

/// How much slower than its script a side is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tempo {
    pub at_start: Duration,
    pub each_step: Duration,
    pub at_end: Duration,
    /// How long it does nothing once the other side has ended, and then between two writes.
    pub after_others: Duration,
}

pub fn play(
    wire: Box<dyn Wire>,
    script: &Script,
    tempo: Tempo,
    bytes: [&[u8]; 2],
    have_ended: [&AtomicBool; 2],
) -> Account {
    std::thread::sleep(tempo.at_start);
    let now = Instant::now();
    let mut side = Side {
        wire,
        script,
        tempo,
        own: bytes[0],
        others: bytes[1],
        has_ended: have_ended[0],
        other_has_ended: have_ended[1],
        has_waited: tempo.after_others.is_zero(),
        write_lag: tempo.each_step,
        writing: Cursor::new(now),
        reading: Cursor::new(now),
        began: now,
        account: Account {
            began: now,
            written: 0,
            received: 0,
            is_corrupt: false,
            fin: None,
            eof: None,
            broken: None,
            hangs: false,
            last_write: None,
            ended: now,
            end: script.end,
            closed: now,
            exit: None,
        },
    };
    side.talk();
    std::thread::sleep(tempo.at_end);
    side.finish()
}

/// Where in its steps a direction is.
struct Cursor {
    step: usize,
    /// Bytes of the step that are done.
    done: usize,
    /// When the step was begun.
    since: Instant,
}

impl Cursor {
    fn new(now: Instant) -> Cursor {
        Cursor {
            step: 0,
            done: 0,
            since: now,
        }
    }

    fn next(&mut self, lag: Duration) {
        *self = Cursor {
            step: self.step + 1,
            done: 0,
            since: Instant::now() + lag,
        };
    }
}

struct Side<'a> {
    wire: Box<dyn Wire>,
    script: &'a Script,
    tempo: Tempo,
    own: &'a [u8],
    others: &'a [u8],
    has_ended: &'a AtomicBool,
    other_has_ended: &'a AtomicBool,
    has_waited: bool,
    /// Between two writes.
    write_lag: Duration,
    writing: Cursor,
    reading: Cursor,
    began: Instant,
    account: Account,
}

impl Side<'_> {
    fn talk(&mut self) {
        let mut last_move = Instant::now();
        while !self.is_over() {
            if !self.has_waited && self.other_has_ended.load(Ordering::SeqCst) {
                self.has_waited = true;
                std::thread::sleep(self.tempo.after_others);
                self.write_lag = self.tempo.after_others;
                last_move = Instant::now();
            }
            let mut has_moved = self.write_on();
            has_moved |= self.read_on();
            if self.account.eof.is_some()
                && self.account.broken.is_none()
                && self.wire.is_broken_behind_end()
            {
                self.break_off();
            }
            let is_pending = self.wire.push();
            if has_moved {
                last_move = Instant::now();
            } else if last_move.elapsed() > STUCK {
                self.account.hangs = true;
                return;
            } else {
                self.wait(is_pending);
            }
        }
    }

    fn is_over(&self) -> bool {
        let is_written = self.writing.step >= self.script.writes.len();
        let is_read = self.reading.step >= self.script.reads.len();
        if is_written && is_read {
            return true;
        }
        match self.script.until {
            Until::BothDone => false,
            Until::ReadingDone => is_read,
            Until::WritingDone => is_written,
            Until::Passed(time) => self.began.elapsed() > time,
        }
    }

    fn break_off(&mut self) {
        self.account.broken.get_or_insert_with(Instant::now);
        self.writing.step = self.script.writes.len();
    }

    fn write_on(&mut self) -> bool {
        let Some(&step) = self.script.writes.get(self.writing.step) else {
            return false;
        };
        if Instant::now() < self.writing.since {
            return false;
        }
        let has_ended = self.reading.step >= self.script.reads.len();
        let is_done = match step {
            Write::Bytes(count) => return self.write_bytes(count, false),
            Write::Urgent => return self.write_bytes(1, true),
            Write::Pause(time) => self.writing.since.elapsed() > time,
            Write::AwaitBytes(count) => has_ended || self.account.received >= count,
            Write::AwaitEnd => has_ended,
            Write::Fin => match self.wire.fin() {
                Moved::Broken => {
                    self.break_off();
                    return true;
                }
                Moved::Blocked => false,
                _ => {
                    self.account.fin = Some(self.account.written);
                    true
                }
            },
        };
        if is_done {
            self.writing.next(self.write_lag);
        }
        is_done
    }

    fn write_bytes(&mut self, count: usize, is_urgent: bool) -> bool {
        let from = self.account.written;
        let left = count - self.writing.done;
        let now = Instant::now();
        let moved = if left == 0 {
            Moved::Bytes(0)
        } else {
            self.wire.put(&self.own[from..from + left], is_urgent)
        };
        match moved {
            Moved::Bytes(moved) => {
                if moved > 0 {
                    self.account.last_write = Some(now);
                }
                self.account.written += moved;
                self.writing.done += moved;
                if self.writing.done == count {
                    self.writing.next(self.write_lag);
                }
            }
            Moved::Blocked => return false,
            Moved::Eof | Moved::Broken => self.break_off(),
        }
        true
    }

    fn read_on(&mut self) -> bool {
        let Some(&step) = self.script.reads.get(self.reading.step) else {
            return false;
        };
        if Instant::now() < self.reading.since {
            return false;
        }
        match step {
            Read::Pause(time) => {
                let is_done = self.reading.since.elapsed() > time;
                if is_done {
                    self.reading.next(self.tempo.each_step);
                }
                is_done
            }
            Read::Bytes(count) if self.reading.done == count => {
                self.reading.next(self.tempo.each_step);
                true
            }
            Read::Bytes(count) => self.read_bytes(count - self.reading.done),
            Read::ToEnd => self.read_bytes(usize::MAX),
        }
    }

    fn read_bytes(&mut self, most: usize) -> bool {
        let mut buffer = [0; 32 * 1024];
        let room = most.min(buffer.len());
        match self.wire.get(&mut buffer[..room]) {
            Moved::Bytes(count) => {
                let from = self.account.received;
                let expected = self.others.get(from..from + count);
                self.account.is_corrupt |= expected != Some(&buffer[..count]);
                self.account.received += count;
                self.reading.done += count;
            }
            Moved::Blocked => return false,
            Moved::Eof => {
                // Behind a failed write the end is only what is left of it.
                if self.account.broken.is_none() {
                    self.account.eof = Some(Instant::now());
                }
                self.reading.step = self.script.reads.len();
            }
            Moved::Broken => {
                self.break_off();
                self.reading.step = self.script.reads.len();
            }
        }
        true
    }

    /// Until something can be read or written that the script is at, or a millisecond.
    fn wait(&self, is_pending: bool) {
        let has_eof = self.account.eof.is_some();
        let reads = matches!(
            self.script.reads.get(self.reading.step),
            Some(Read::Bytes(_) | Read::ToEnd)
        );
        let writes = matches!(
            self.script.writes.get(self.writing.step),
            Some(Write::Bytes(_) | Write::Urgent)
        );
        let (reader, writer) = self.wire.descriptors();
        let mut fds = Vec::new();
        if let Some(reader) = reader.filter(|_| reads && !has_eof) {
            fds.push(PollFd::from_borrowed_fd(reader, PollFlags::IN));
        }
        if let Some(writer) = writer.filter(|_| writes || is_pending) {
            fds.push(PollFd::from_borrowed_fd(writer, PollFlags::OUT));
        }
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: 2_000_000,
        };
        let _ = poll(&mut fds, Some(&limit));
    }

    fn finish(mut self) -> Account {
        self.account.ended = Instant::now();
        self.has_ended.store(true, Ordering::SeqCst);
        if self.account.end == End::Reset || self.account.hangs {
            self.account.end = End::Reset;
            self.wire.reset();
        } else {
            let closed = self.wire.close();
            if closed.is_broken {
                self.account.broken.get_or_insert_with(Instant::now);
            }
            if closed.in_order {
                self.account.fin.get_or_insert(self.account.written);
            } else {
                self.account.end = End::Reset;
            }
        }
        self.account.closed = Instant::now();
        self.account.exit = self.wire.exit();
        self.account.hangs |= self
            .account
            .exit
            .as_ref()
            .is_some_and(|exit| exit.code.is_none());
        self.account
    }
}
