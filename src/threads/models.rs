//! Every order in which jobs can come to threads that are at work, wait or stop waiting. A job that is lost leaves its
//! model waiting for it, which loom reports as a deadlock.

use super::*;

/// A job, and what receives once it has run.
fn job() -> (impl FnOnce() + Send, Receiver<()>) {
    let (done, is_done) = sync_channel(1);
    (move || done.send(()).unwrap(), is_done)
}

#[test]
fn a_job_for_a_thread_that_stops_waiting_is_run() {
    loom::model(|| {
        let threads = Threads::new("model", 64 * 1024);
        for _ in 0..3 {
            let (job, is_done) = job();
            threads.run(job).unwrap();
            is_done.recv().unwrap();
        }
    });
}

#[test]
fn two_jobs_at_once_are_run() {
    let mut model = loom::model::Builder::new();
    // With three interrupted threads it takes half a minute.
    model.preemption_bound = Some(2);
    model.check(|| {
        let threads = Arc::new(Threads::new("model", 64 * 1024));
        let (first, is_first_done) = job();
        threads.run(first).unwrap();
        is_first_done.recv().unwrap();
        let giver = Arc::clone(&threads);
        let giving = thread::spawn(move || {
            let (second, is_second_done) = job();
            giver.run(second).unwrap();
            is_second_done.recv().unwrap();
        });
        let (third, is_third_done) = job();
        threads.run(third).unwrap();
        is_third_done.recv().unwrap();
        giving.join().unwrap();
    });
}

#[test]
fn a_queued_job_is_run_by_the_thread_whose_job_was_made_to_end() {
    loom::model(|| {
        let threads = Threads::new("model", 64 * 1024);
        let is_running = Arc::new(loom::sync::Mutex::new(true));
        let (end, is_to_end) = sync_channel(1);
        let running = Arc::clone(&is_running);
        let first = move || {
            is_to_end.recv().unwrap();
            *running.lock().unwrap() = false;
        };
        threads.run(first).unwrap();
        let end = Arc::new(end);
        let peer = Arc::clone(&end);
        // It may also end by itself.
        thread::spawn(move || peer.send(()));
        let end_another = || {
            let is_running = is_running.lock().unwrap();
            *is_running && end.send(()).is_ok()
        };
        let (second, is_second_done) = job();
        if threads.queue(Box::new(second), end_another) {
            is_second_done.recv().unwrap();
        }
    });
}
