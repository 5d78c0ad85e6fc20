//! Threads that stay for a while when their work is done, as starting one costs more than a handshake.
//!
//! A job goes to a thread that waits for one, or else to a new thread. It waits only where the system refuses a new
//! thread and another job was made to end for it: in a queue for that very thread, or, where it takes one of another
//! pool's threads, until the system gives its place to a new one. A thread that waits in vain for two seconds ends.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::checked::{Mutex, Receiver, SyncSender, lock, sync_channel, thread};
use crate::limits::idle_threads;

/// How long a thread waits for its next job.
const IDLE: Duration = Duration::from_secs(2);

/// When the system last refused a thread to any pool. For a while after that no thread waits, as another pool may
/// need it more. Loom has no mutex that can be static.
static REFUSED: std::sync::Mutex<Option<Instant>> = std::sync::Mutex::new(None);

/// How many wait for the place of a thread that ends. Until they have it, nothing else starts one that can do without:
/// see [`Threads::run_or_queue`].
static WAITING: AtomicUsize = AtomicUsize::new(0);

/// How many threads are made to end, one after the other, for one that is refused.
const ROOMS: u32 = 4;

/// How often each of them is asked for, with pauses that double from [`FIRST_PAUSE`]: within an eighth of a second.
const LOOKS: u32 = 7;

const FIRST_PAUSE: Duration = Duration::from_millis(1);

type Job = Box<dyn FnOnce() + Send>;

/// Makes one of the process's threads end soon. `false` if there is none to end.
#[derive(Clone)]
pub struct MakeRoom(Arc<dyn Fn() -> bool + Send + Sync>);

/// A kind of thread: all of them have the same name and stack.
#[derive(Debug)]
pub struct Threads {
    name: &'static str,
    stack: usize,
    make_room: Option<MakeRoom>,
    pool: Arc<Mutex<Pool>>,
}

#[derive(Default)]
struct Pool {
    /// The threads that wait, the last to come first to go.
    idle: Vec<(u64, SyncSender<Job>)>,
    next_id: u64,
    /// The jobs that wait. While there are any, a thread is at work that will take them.
    queue: VecDeque<Job>,
}

impl Threads {
    /// No threads yet. `stack` is in bytes.
    pub fn new(name: &'static str, stack: usize) -> Threads {
        Threads {
            name,
            stack,
            make_room: None,
            pool: Arc::default(),
        }
    }

    /// The same, which take the place of threads that `make_room` ends, where the system refuses new ones.
    pub fn in_room_of(self, make_room: MakeRoom) -> Threads {
        Threads {
            make_room: Some(make_room),
            ..self
        }
    }

    /// Runs `job` on a thread of its own, now or within half a second. A panic in it ends the job and not the thread.
    ///
    /// # Errors
    /// When no thread waits, the system refuses a new one, and there is no room to be made. The job is dropped.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let refused = match (self.start(Box::new(job)), &self.make_room) {
            (Err(refused), Some(make_room)) => {
                retry_in_room(make_room, refused, |(_, job)| self.start(job))
            }
            (started, _) => started,
        };
        refused.map_err(|(error, _)| error)
    }

    /// Runs `job` on a thread of its own, now; but where there is none, and `end_another` makes the job of one of these
    /// threads end soon, this one waits for it. No new one is started while others wait for one.
    ///
    /// # Errors
    /// When no thread waits, there is no new one, and `end_another` is `false`. The job is dropped.
    pub fn run_or_queue(
        &self,
        job: impl FnOnce() + Send + 'static,
        end_another: impl FnOnce() -> bool,
    ) -> io::Result<()> {
        let job = Box::new(job);
        let started = if WAITING.load(Ordering::SeqCst) == 0 {
            self.start(job)
        } else {
            let all_awaited = |job| (io::Error::other("others wait for a thread"), job);
            self.give_to_idle(job).map_err(all_awaited)
        };
        let Err((error, job)) = started else {
            return Ok(());
        };
        if self.queue(job, end_another) {
            Ok(())
        } else {
            Err(error)
        }
    }

    /// Has `job` wait for the thread whose job `end_another` makes end, if it does. Otherwise the job is dropped.
    fn queue(&self, job: Job, end_another: impl FnOnce() -> bool) -> bool {
        // With the lock held, so that the thread whose job ends finds this one.
        let mut pool = lock(&self.pool);
        let one_ends = end_another();
        if one_ends {
            pool.queue.push_back(job);
        }
        one_ends
    }

    fn give_to_idle(&self, mut job: Job) -> Result<(), Job> {
        while let Some((_, thread)) = { lock(&self.pool).idle.pop() } {
            match thread.send(job) {
                Ok(()) => return Ok(()),
                Err(error) => job = error.0,
            }
        }
        Err(job)
    }

    fn start(&self, job: Job) -> Result<(), (io::Error, Job)> {
        let Err(job) = self.give_to_idle(job) else {
            return Ok(());
        };
        // A thread that could not start gives nothing back, so the job follows it.
        let (sender, first) = sync_channel(1);
        let pool = Arc::clone(&self.pool);
        let thread = thread::Builder::new()
            .name(self.name.into())
            .stack_size(self.stack);
        let started = thread.spawn(move || work(&first, &pool));
        match started {
            Ok(_) => sender.send(job).map_err(|error| {
                let ended = io::Error::other("the new thread has ended");
                (ended, error.0)
            }),
            Err(error) => {
                note_refusal();
                Err((error, job))
            }
        }
    }
}

impl MakeRoom {
    /// One that does so by `end_one`.
    pub fn by(end_one: impl Fn() -> bool + Send + Sync + 'static) -> MakeRoom {
        MakeRoom(Arc::new(end_one))
    }
}

/// Has `make_room` end threads, and tries again what was `refused` one, until it has got it or there is none to end: for
/// half a second at most. Meanwhile [`Threads::run_or_queue`] starts none.
///
/// # Errors
/// The last refusal.
pub fn retry_in_room<T, E>(
    make_room: &MakeRoom,
    mut refused: E,
    mut retry: impl FnMut(E) -> Result<T, E>,
) -> Result<T, E> {
    let _waiting = Waiting::begin();
    note_refusal();
    for _ in 0..ROOMS {
        if !(make_room.0)() {
            break;
        }
        let mut pause = FIRST_PAUSE;
        for _ in 0..LOOKS {
            // The system counts a thread for a moment after its end, so nothing can tell when there is room.
            std::thread::sleep(pause);
            pause *= 2;
            match retry(refused) {
                Ok(done) => return Ok(done),
                Err(again) => refused = again,
            }
        }
    }
    Err(refused)
}

/// One of [`WAITING`].
struct Waiting;

impl Waiting {
    fn begin() -> Waiting {
        WAITING.fetch_add(1, Ordering::SeqCst);
        Waiting
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        WAITING.fetch_sub(1, Ordering::SeqCst);
    }
}

fn note_refusal() {
    *crate::lock::lock(&REFUSED) = Some(Instant::now());
}

fn work(first: &Receiver<Job>, pool: &Mutex<Pool>) {
    let mut next = first.recv().ok();
    while let Some(job) = next.take() {
        // The panic itself is reported by the panic hook.
        let _ = catch_unwind(AssertUnwindSafe(job));
        next = next_job(pool);
    }
}

/// Not inlined, as its frame would lie under every job and make each idle thread a page larger.
#[inline(never)]
fn next_job(pool: &Mutex<Pool>) -> Option<Job> {
    let (id, jobs) = match lock(pool).next()? {
        Next::Job(job) => return Some(job),
        Next::Wait(id, jobs) => (id, jobs),
    };
    if let Ok(job) = jobs.recv_timeout(IDLE) {
        return Some(job);
    }
    let mut pool = lock(pool);
    match pool.idle.iter().position(|(idle, _)| *idle == id) {
        Some(position) => {
            pool.idle.remove(position);
            None
        }
        // Somebody took this thread at the last moment and is about to send.
        None => {
            drop(pool);
            jobs.recv().ok()
        }
    }
}

/// What a thread does when its job is done, if it does not end.
enum Next {
    Job(Job),
    Wait(u64, Receiver<Job>),
}

impl Pool {
    fn next(&mut self) -> Option<Next> {
        if let Some(job) = self.queue.pop_front() {
            return Some(Next::Job(job));
        }
        if self.idle.len() >= idle_threads() || are_scarce() {
            return None;
        }
        let (sender, receiver) = sync_channel(1);
        let id = self.next_id;
        self.next_id += 1;
        self.idle.push((id, sender));
        Some(Next::Wait(id, receiver))
    }
}

fn are_scarce() -> bool {
    crate::lock::lock(&REFUSED).is_some_and(|refused| refused.elapsed() < IDLE)
}

impl fmt::Debug for MakeRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MakeRoom")
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} idle, {} queued", self.idle.len(), self.queue.len())
    }
}

#[cfg(all(test, loom))]
mod models;

#[cfg(all(test, not(loom)))]
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
        while lock(&threads.pool).idle.is_empty() {
            thread::yield_now();
        }
        id
    }

    /// What is true of the whole process is for one test at a time.
    static REFUSALS: Mutex<()> = Mutex::new(());

    #[test]
    fn a_job_without_a_thread_waits_for_the_one_that_was_made_to_end() {
        let _alone = lock(&REFUSALS);
        let mut threads = Threads::new("test", 64 * 1024);
        let (sender, receiver) = channel();
        let (end, ended) = channel::<()>();
        let tell = sender.clone();
        let first = move || {
            tell.send(thread::current().id()).unwrap();
            let _ = ended.recv();
        };
        threads.run(first).unwrap();
        let first = receiver.recv().unwrap();
        // No address space has room for such a stack.
        threads.stack = 1 << 56;
        assert!(threads.run(|| ()).is_err());
        assert!(threads.run_or_queue(|| (), || false).is_err());
        let second = move || sender.send(thread::current().id()).unwrap();
        let make_room = || {
            drop(end);
            true
        };
        threads.run_or_queue(second, make_room).unwrap();
        assert_eq!(receiver.recv().unwrap(), first);
        assert!(are_scarce());
        *lock(&super::REFUSED) = None;
    }

    #[test]
    fn who_waits_for_a_thread_has_it_before_those_that_can_do_without() {
        let _alone = lock(&REFUSALS);
        let threads = Threads::new("test", 64 * 1024);
        let mut rooms = 0;
        let tries = std::cell::Cell::new(0);
        let made = retry_in_room(&MakeRoom::by(|| true), "refused", |refused| {
            assert!(threads.run_or_queue(|| (), || false).is_err());
            tries.set(tries.get() + 1);
            if tries.get() == 3 {
                Ok(())
            } else {
                Err(refused)
            }
        });
        assert_eq!(made, Ok(()));
        assert!(threads.run_or_queue(|| (), || false).is_ok());
        let start = Instant::now();
        let never = retry_in_room(&MakeRoom::by(|| true), 0, |count| Err::<(), _>(count + 1));
        assert_eq!(never, Err(ROOMS * LOOKS));
        assert!(start.elapsed() >= Duration::from_millis(100));
        let no_room = retry_in_room(&MakeRoom::by(|| false), 0, |_| {
            rooms += 1;
            Ok(())
        });
        assert_eq!((no_room, rooms), (Err(0), 0));
        *lock(&super::REFUSED) = None;
    }

    #[test]
    fn a_job_that_is_refused_a_thread_takes_the_place_of_one_that_was_made_to_end() {
        let _alone = lock(&REFUSALS);
        let (end, ended) = channel();
        let ended = Mutex::new(ended);
        let make_room = MakeRoom::by(move || lock(&ended).try_recv().is_ok());
        let mut threads = Threads::new("test", 64 * 1024).in_room_of(make_room);
        // No address space has room for such a stack.
        threads.stack = 1 << 56;
        assert!(threads.run(|| ()).is_err());
        end.send(()).unwrap();
        let (sender, receiver) = channel();
        let pool = Arc::clone(&threads.pool);
        thread::scope(|scope| {
            scope.spawn(|| threads.run(move || sender.send(()).unwrap()).unwrap());
            while WAITING.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            let (first, jobs) = sync_channel(1);
            lock(&pool).idle.push((u64::MAX, first));
            let job: Job = jobs.recv().unwrap();
            job();
        });
        receiver.recv().unwrap();
        *lock(&super::REFUSED) = None;
    }

    #[test]
    fn a_thread_is_used_again_also_after_a_panic() {
        let _alone = lock(&REFUSALS);
        let threads = Threads::new("test", 64 * 1024);
        let first = thread_of(&threads);
        threads
            .run(|| std::panic::resume_unwind(Box::new(1)))
            .unwrap();
        while lock(&threads.pool).idle.is_empty() {
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
