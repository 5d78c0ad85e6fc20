//! What `write_lock` and `threads` take from here is `std`'s, but loom's in a build with `--cfg loom`: it tries every
//! order in which threads can meet, in the tests called `models`.

#[cfg(not(loom))]
pub use {
    crate::lock::lock,
    std::sync::mpsc::{Receiver, SyncSender, sync_channel},
    std::sync::{Mutex, MutexGuard},
    std::thread,
};

#[cfg(loom)]
mod stand_ins;
#[cfg(loom)]
pub use {
    loom::thread,
    stand_ins::{Mutex, MutexGuard, Receiver, SyncSender, lock, sync_channel},
};
