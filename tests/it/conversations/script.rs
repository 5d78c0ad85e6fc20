//! What each side of a conversation does, made at random from a seed. No two scripts wait for each other for ever.

use std::time::Duration;

use crate::support::Random;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    Bytes(usize),
    /// One byte with `MSG_OOB`, where the connection knows such.
    Urgent,
    Pause(Duration),
    /// Until so many bytes of the other side have been read.
    AwaitBytes(usize),
    /// Until the other side's end has been read.
    AwaitEnd,
    Fin,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    Bytes(usize),
    Pause(Duration),
    ToEnd,
}

/// When a side ends its connection, whatever it still had to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    BothDone,
    ReadingDone,
    WritingDone,
    /// Measured from the beginning, as if somebody had killed it.
    Passed(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By close(2), which is a RST if something is unread.
    Close,
    /// By close(2) with `SO_LINGER` 0.
    Reset,
}

#[derive(Debug, Clone)]
pub struct Script {
    pub writes: Vec<Write>,
    pub reads: Vec<Read>,
    pub until: Until,
    pub end: End,
}

impl Script {
    pub fn total(&self) -> usize {
        self.writes.iter().map(Write::bytes).sum()
    }

    fn reads_to_end(&self) -> bool {
        self.reads.last() == Some(&Read::ToEnd)
    }
}

impl Write {
    fn bytes(&self) -> usize {
        match self {
            Write::Bytes(count) => *count,
            Write::Urgent => 1,
            _ => 0,
        }
    }
}

/// The client's script and the target's. With `is_stdio` the client can't speak after the target's end.
pub fn conversation(random: &mut Random, is_stdio: bool) -> (Script, Script) {
    let (up, down) = (writes(random), writes(random));
    let (up_total, down_total) = (total(&up), total(&down));
    // Only one side may stop reading while it still writes, and only the other may wait for what comes.
    let lazy = random.below(2);
    let mut client = ending(random, up, down_total, lazy == 0);
    let mut target = ending(random, down, up_total, lazy == 1);
    if random.below(4) == 0 {
        if lazy == 1 {
            make_wait(random, &mut client, &target, !is_stdio);
        } else {
            make_wait(random, &mut target, &client, true);
        }
    }
    if random.below(40) == 0 {
        make_try_again(&mut target);
    }
    if random.below(40) == 0 && !is_stdio {
        make_try_again(&mut client);
    }
    (client, target)
}

fn total(writes: &[Write]) -> usize {
    writes.iter().map(Write::bytes).sum()
}

fn size(random: &mut Random) -> usize {
    let bound = [1, 10, 200, 5_000, 40_000, 70_000, 200_000, 1_000_000];
    let common = random.below(100);
    let bound = bound[if common < 80 {
        common / 16
    } else {
        4 + random.below(4)
    }];
    random.below(bound + 1)
}

fn pause(random: &mut Random) -> Duration {
    Duration::from_micros(random.below(6_000) as u64)
}

fn writes(random: &mut Random) -> Vec<Write> {
    let mut writes = Vec::new();
    for _ in 0..random.below(5) {
        match random.below(12) {
            0 => writes.push(Write::Urgent),
            1..4 => writes.push(Write::Pause(pause(random))),
            _ => writes.push(Write::Bytes(size(random))),
        }
    }
    writes
}

/// Bytes and pauses, `most` bytes at the most; all of them in half of the scripts.
fn reads(random: &mut Random, most: usize) -> Vec<Read> {
    let mut left = match random.below(2) {
        0 => most,
        _ => random.below(most + 1),
    };
    let mut reads = Vec::new();
    for _ in 0..random.below(3) {
        let count = random.below(left + 1);
        left -= count;
        reads.push(Read::Bytes(count));
        reads.push(Read::Pause(pause(random)));
    }
    reads.push(Read::Bytes(left));
    reads
}

fn ending(random: &mut Random, mut writes: Vec<Write>, most: usize, may_stop: bool) -> Script {
    let mut reads = reads(random, most);
    let end = match random.below(3) {
        0 => End::Reset,
        _ => End::Close,
    };
    let until = match random.below(8) {
        0..4 => Until::BothDone,
        4 | 5 => Until::ReadingDone,
        6 => Until::WritingDone,
        _ => Until::Passed(Duration::from_micros(random.below(15_000) as u64)),
    };
    let has_fin = until == Until::BothDone || random.below(2) == 0;
    let reads_to_end = match until {
        Until::BothDone => true,
        Until::ReadingDone => has_fin && random.below(3) == 0,
        Until::WritingDone => !may_stop || random.below(2) == 0,
        Until::Passed(_) => random.below(2) == 0,
    };
    if reads_to_end {
        reads.push(Read::ToEnd);
    }
    if has_fin {
        writes.push(Write::Fin);
        if random.below(3) == 0 {
            writes.push(Write::Pause(pause(random)));
        }
    }
    Script {
        writes,
        reads,
        until,
        end,
    }
}

/// Has a side speak only when something, or the end, has come from the other.
fn make_wait(random: &mut Random, waiting: &mut Script, other: &Script, may_await_end: bool) {
    if !waiting.reads_to_end() {
        return;
    }
    let at = random.below(waiting.writes.len() + 1);
    let at = at.min(
        waiting
            .writes
            .iter()
            .position(|write| *write == Write::Fin)
            .unwrap_or(at),
    );
    let ends = other.writes.contains(&Write::Fin);
    let wait = if ends && may_await_end && random.below(2) == 0 {
        Write::AwaitEnd
    } else {
        Write::AwaitBytes(random.below(other.total() + 1))
    };
    waiting.writes.insert(at, wait);
}

/// Has a side that goes on writing find out that nobody is there any more.
fn make_try_again(script: &mut Script) {
    let pause = Write::Pause(Duration::from_millis(1_200));
    if script.until != Until::BothDone {
        return;
    }
    script.writes.retain(|write| *write != Write::Fin);
    script.writes.extend([
        pause,
        Write::Bytes(1_000),
        pause,
        Write::Bytes(1_000),
        Write::Fin,
    ]);
}
