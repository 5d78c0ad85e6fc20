//! Threads that stay for a while when their work is done, as starting one costs more than a handshake.
//!
//! A job goes to a thread that waits for one, or else to a new thread; it never waits in a queue. A thread
//! that waits in vain for two seconds ends.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::lock::lock;

/// How long a thread waits for its next job.
const IDLE: Duration = Duration::from_secs(2);

/// The most threads that wait; one more ends at once.
const MAX_IDLE: usize = 32;

type Job = Box<dyn FnOnce() + Send>;

/// A kind of thread: all of them have the same name and stack.
#[derive(Debug)]
pub struct Threads {
    name: &'static str,
    stack: usize,
    waiting: Arc<Mutex<Waiting>>,
}

/// The threads that wait, the last to come first to go.
#[derive(Debug, Default)]
struct Waiting {
    threads: Vec<(u64, SyncSender<Job>)>,
    next_id: u64,
}

impl Threads {
    /// No threads yet. `stack` is in bytes.
    pub fn new(name: &'static str, stack: usize) -> Threads {
        Threads {
            name,
            stack,
            waiting: Arc::default(),
        }
    }

    /// Runs `job` on a thread of its own, now. A panic in it ends the job and not the thread.
    ///
    /// # Errors
    /// When no thread waits and the system refuses a new one. The job is dropped.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut job: Job = Box::new(job);
        while let Some((_, thread)) = { lock(&self.waiting).threads.pop() } {
            match thread.send(job) {
                Ok(()) => return Ok(()),
                Err(error) => job = error.0,
            }
        }
        let waiting = Arc::clone(&self.waiting);
        let thread = thread::Builder::new()
            .name(self.name.into())
            .stack_size(self.stack);
        thread.spawn(move || work(job, &waiting)).map(drop)
    }
}

fn work(first: Job, waiting: &Mutex<Waiting>) {
    let mut next = Some(first);
    while let Some(job) = next.take() {
        // The panic itself is reported by the panic hook.
        let _ = catch_unwind(AssertUnwindSafe(job));
        next = next_job(waiting);
    }
}

/// Not inlined, as its frame would lie under every job and make each idle thread a page larger.
#[inline(never)]
fn next_job(waiting: &Mutex<Waiting>) -> Option<Job> {
    let (id, jobs) = announce(waiting)?;
    if let Ok(job) = jobs.recv_timeout(IDLE) {
        return Some(job);
    }
    let mut waiting = lock(waiting);
    match waiting
        .threads
        .iter()
        .position(|(waiting, _)| *waiting == id)
    {
        Some(position) => {
            waiting.threads.remove(position);
            None
        }
        // Somebody took this thread at the last moment and is about to send.
        None => {
            drop(waiting);
            jobs.recv().ok()
        }
    }
}

fn announce(waiting: &Mutex<Waiting>) -> Option<(u64, Receiver<Job>)> {
    let mut waiting = lock(waiting);
    if waiting.threads.len() >= MAX_IDLE {
        return None;
    }
    let (sender, receiver) = sync_channel(1);
    let id = waiting.next_id;
    waiting.next_id += 1;
    waiting.threads.push((id, sender));
    Some((id, receiver))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::thread::ThreadId;

    /// Runs a job and returns the thread it ran on, once that thread waits again.
    fn thread_of(threads: &Threads) -> ThreadId {
        let (sender, receiver) = channel();
        threads
            .run(move || sender.send(thread::current().id()).unwrap())
            .unwrap();
        let id = receiver.recv().unwrap();
        while lock(&threads.waiting).threads.is_empty() {
            thread::yield_now();
        }
        id
    }

    #[test]
    fn a_thread_is_used_again_also_after_a_panic() {
        let threads = Threads::new("test", 64 * 1024);
        let first = thread_of(&threads);
        threads
            .run(|| std::panic::resume_unwind(Box::new(1)))
            .unwrap();
        while lock(&threads.waiting).threads.is_empty() {
            thread::yield_now();
        }
        assert_eq!(thread_of(&threads), first);
    }

    #[test]
    fn jobs_never_wait_for_each_other() {
        let threads = Threads::new("test", 64 * 1024);
        let barrier = Arc::new(std::sync::Barrier::new(50));
        for _ in 0..20 {
            for _ in 0..49 {
                let barrier = Arc::clone(&barrier);
                threads
                    .run(move || {
                        barrier.wait();
                    })
                    .unwrap();
            }
            barrier.wait();
        }
    }
}
