//! Every order in which a writer and two threads with something pending can meet.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread::{JoinHandle, spawn};
use rustix::fd::BorrowedFd;

use super::*;

/// What was sent, and what is pending.
type Letters = WriteLock<Vec<u8>, Vec<u8>>;

struct Model {
    lock: Letters,
    socket: Arc<UnixStream>,
    /// Changed wherever another thread may have its turn though nothing that loom knows of happens there.
    turns: AtomicUsize,
}

impl Model {
    fn new(socket: &Arc<UnixStream>) -> Arc<Model> {
        Arc::new(Model {
            lock: Letters::default(),
            socket: Arc::clone(socket),
            turns: AtomicUsize::new(0),
        })
    }

    fn turn(&self) {
        self.turns.fetch_add(1, Ordering::Relaxed);
    }

    fn write(&self, letter: u8) {
        let mut held = self.lock.lock();
        held.push(letter);
        self.lock.unlock_and_flush(held, send).unwrap();
    }

    fn post(self: &Arc<Model>, letter: u8) -> JoinHandle<(u8, Flushed)> {
        let model = Arc::clone(self);
        spawn(move || {
            model.lock.queue(|pending| pending.push(letter));
            model.turn();
            (letter, model.lock.try_flush(&*model, &send))
        })
    }
}

impl AsFd for Model {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.turn();
        self.socket.as_fd()
    }
}

fn send(sent: &mut Vec<u8>, pending: Vec<u8>) -> io::Result<()> {
    sent.extend(pending);
    Ok(())
}

#[test]
fn nothing_stays_behind() {
    let (socket, _peer) = UnixStream::pair().unwrap();
    let socket = Arc::new(socket);
    loom::model(move || {
        let model = Model::new(&socket);
        let posting = [b'a', b'b'].map(|letter| model.post(letter));
        model.write(b'1');
        for thread in posting {
            assert_eq!(thread.join().unwrap().1, Flushed::Done);
        }
        let mut sent = model.lock.lock().clone();
        sent.sort_unstable();
        assert_eq!(sent, b"1ab");
    });
}

#[test]
fn where_there_is_no_room_whoever_leaves_something_pending_knows_it() {
    let (mut socket, _peer) = UnixStream::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 4096]).is_ok() {}
    let socket = Arc::new(socket);
    loom::model(move || {
        let model = Model::new(&socket);
        let posting = [b'a', b'b'].map(|letter| model.post(letter));
        model.write(b'1');
        let flushed = posting.map(|thread| thread.join().unwrap());
        let sent = model.lock.lock();
        for (letter, flushed) in flushed {
            assert!(sent.contains(&letter) || flushed == Flushed::Full);
        }
    });
}
