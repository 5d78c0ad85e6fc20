//! From a name to its addresses, by the system's resolver.
//!
//! getaddrinfo has no timeout: at a name server that hangs it takes from ten seconds to minutes. So it runs on a thread
//! that may outlive the dial it is for, and the threads are bounded. A look-up that gets none waits for its turn, in
//! order, until its own deadline; and no client has more than a share of them, so that one client's names, and those it
//! has given up meanwhile, keep nobody else's from being resolved. `tunneld connect`, which has no clients of that kind,
//! may use all of them.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{LazyLock, Mutex};
use std::thread;
use std::time::Instant;

use crate::caller::{Caller, LOOK};
use crate::dial_error::{DialError, Step};
use crate::hosts_file;
use crate::limits::resolver_threads;
use crate::lock::lock;

/// getaddrinfo keeps large buffers on its stack.
const STACK: usize = 256 * 1024;

/// An owner has at most one of so many threads ...
const OWNERS: usize = 4;

/// ... and one of so many with look-ups that are still waited for, so that those given up leave it some.
const AWAITED: usize = 8;

static RESOLVER: LazyLock<Resolver> = LazyLock::new(|| Resolver::new(resolver_threads()));

/// Looks `name` up before `deadline`. `None` as the caller is this process itself.
///
/// # Errors
/// [`DialError`], of its kinds those that can come before an attempt to connect.
pub fn resolve(
    name: String,
    port: u16,
    deadline: Instant,
    caller: Option<&Caller<'_>>,
) -> Result<Vec<SocketAddr>, DialError> {
    let found = RESOLVER.look_up(deadline, caller, move || look_up(&name, port))?;
    match found {
        Ok(addresses) if addresses.is_empty() => {
            Err(DialError::Resolve("the name has no address".into()))
        }
        Ok(addresses) => Ok(addresses),
        Err(error) => Err(DialError::Resolve(error.to_string())),
    }
}

/// The resolver finds no complete name, one with a dot at its end, in the hosts file.
fn look_up(name: &str, port: u16) -> Found {
    if let Some(complete) = name.strip_suffix('.') {
        let found = hosts_file::look_up(complete);
        if !found.is_empty() {
            let at_port = |address| SocketAddr::new(address, port);
            return Ok(found.into_iter().map(at_port).collect());
        }
    }
    (name, port).to_socket_addrs().map(Iterator::collect)
}

/// Whose share a look-up is part of. `None` is this process itself, whose share is the whole.
type Owner = Option<IpAddr>;

type Found = io::Result<Vec<SocketAddr>>;

struct Resolver {
    max_threads: usize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    threads: usize,
    shares: BTreeMap<Owner, Share>,
    /// First come, first served, among those whose share has room.
    queue: VecDeque<Queued>,
    next_id: u64,
}

#[derive(Default)]
struct Share {
    threads: usize,
    awaited: usize,
}

struct Queued {
    id: u64,
    owner: Owner,
    turn: SyncSender<()>,
}

/// A thread's part of a share, from its start to its end.
struct ThreadClaim {
    resolver: &'static Resolver,
    owner: Owner,
}

/// The caller's part of a share, for as long as it waits.
struct AwaitedClaim {
    resolver: &'static Resolver,
    owner: Owner,
}

impl Resolver {
    fn new(max_threads: usize) -> Resolver {
        Resolver {
            max_threads,
            table: Mutex::default(),
        }
    }

    /// Runs `look_up` on a thread, and waits for it.
    fn look_up(
        &'static self,
        deadline: Instant,
        caller: Option<&Caller<'_>>,
        look_up: impl FnOnce() -> Found + Send + 'static,
    ) -> Result<Found, DialError> {
        let owner = caller.map(Caller::owner);
        let (thread_claim, _awaited_claim) = self.wait_for_turn(owner, deadline, caller)?;
        let (sender, receiver) = sync_channel(1);
        let thread = thread::Builder::new()
            .name("resolve".into())
            .stack_size(STACK);
        let started = thread.spawn(move || {
            let _claim = thread_claim;
            let _ = sender.send(look_up());
        });
        started.map_err(DialError::Exhausted)?;
        let timed_out = || DialError::TimedOut(Step::Resolving);
        wait(&receiver, deadline, caller, timed_out)?
            .ok_or_else(|| DialError::Resolve("the resolver failed".into()))
    }

    /// Waits until a thread may be started.
    fn wait_for_turn(
        &'static self,
        owner: Owner,
        deadline: Instant,
        caller: Option<&Caller<'_>>,
    ) -> Result<(ThreadClaim, AwaitedClaim), DialError> {
        let claims = || {
            let resolver = self;
            let thread = ThreadClaim { resolver, owner };
            (thread, AwaitedClaim { resolver, owner })
        };
        let (id, receiver) = {
            let mut table = lock(&self.table);
            if table.claim(owner, self.max_threads) {
                return Ok(claims());
            }
            let (turn, receiver) = sync_channel(1);
            let id = table.next_id;
            table.next_id += 1;
            table.queue.push_back(Queued { id, owner, turn });
            (id, receiver)
        };
        let waited = wait(&receiver, deadline, caller, || DialError::ResolverBusy);
        if waited.is_err() && lock(&self.table).leave_queue(id) {
            return waited.map(|_| claims());
        }
        // The turn may have come at the last moment, or too late for anything but to pass it on.
        let claims = claims();
        waited?;
        if Instant::now() >= deadline {
            return Err(DialError::ResolverBusy);
        }
        if caller.is_some_and(Caller::is_gone) {
            return Err(DialError::CallerGone);
        }
        Ok(claims)
    }

    fn release(&self, owner: Owner, subtract: impl FnOnce(&mut Table, Owner)) {
        let mut table = lock(&self.table);
        subtract(&mut table, owner);
        table.grant_turns(self.max_threads);
    }
}

/// Waits for a value, but no longer than the caller does. `None` when there will be none.
fn wait<T>(
    receiver: &Receiver<T>,
    deadline: Instant,
    caller: Option<&Caller<'_>>,
    timed_out: impl Fn() -> DialError,
) -> Result<Option<T>, DialError> {
    loop {
        let remaining = deadline.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(remaining.min(LOOK)) {
            Ok(value) => return Ok(Some(value)),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) if remaining.is_zero() => {
                return Err(timed_out());
            }
            Err(RecvTimeoutError::Timeout) if caller.is_some_and(Caller::is_gone) => {
                return Err(DialError::CallerGone);
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

impl Table {
    /// Takes a thread for a look-up of `owner` that is waited for, if its share and the whole have room.
    fn claim(&mut self, owner: Owner, max_threads: usize) -> bool {
        if self.threads >= max_threads {
            return false;
        }
        let share = self.shares.entry(owner).or_default();
        // This process itself has nobody to leave any to.
        let has_room = owner.is_none()
            || share.threads < (max_threads / OWNERS).max(1)
                && share.awaited < (max_threads / AWAITED).max(1);
        if has_room {
            self.threads += 1;
            share.threads += 1;
            share.awaited += 1;
        }
        has_room
    }

    fn grant_turns(&mut self, max_threads: usize) {
        let mut queue = std::mem::take(&mut self.queue);
        queue.retain(|queued| {
            let is_granted = self.claim(queued.owner, max_threads);
            if is_granted {
                let _ = queued.turn.send(());
            }
            !is_granted
        });
        self.queue = queue;
    }

    /// `false` if the turn had come before.
    fn leave_queue(&mut self, id: u64) -> bool {
        let before = self.queue.len();
        self.queue.retain(|queued| queued.id != id);
        self.queue.len() < before
    }

    fn end_thread(&mut self, owner: Owner) {
        self.threads -= 1;
        self.change_share(owner, |share| share.threads -= 1);
    }

    fn end_wait(&mut self, owner: Owner) {
        self.change_share(owner, |share| share.awaited -= 1);
    }

    fn change_share(&mut self, owner: Owner, change: impl FnOnce(&mut Share)) {
        if let Some(share) = self.shares.get_mut(&owner) {
            change(share);
            if share.threads == 0 && share.awaited == 0 {
                self.shares.remove(&owner);
            }
        }
    }
}

impl Drop for ThreadClaim {
    fn drop(&mut self) {
        self.resolver.release(self.owner, Table::end_thread);
    }
}

impl Drop for AwaitedClaim {
    fn drop(&mut self) {
        self.resolver.release(self.owner, Table::end_wait);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(30);

    fn resolver(max_threads: usize) -> &'static Resolver {
        Box::leak(Box::new(Resolver::new(max_threads)))
    }

    /// A client of its own, and its address.
    fn client(address: &str) -> (TcpStream, TcpStream, IpAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        (near, far, address.parse().unwrap())
    }

    /// Begins a look-up for `peer` that ends when what is returned is dropped, and waits for its thread.
    fn hang(
        resolver: &'static Resolver,
        peer: IpAddr,
        far: TcpStream,
        deadline: Instant,
    ) -> Sender<()> {
        hang_for(resolver, Some((peer, far)), deadline)
    }

    /// The same for a client, or for this process itself.
    fn hang_for(
        resolver: &'static Resolver,
        client: Option<(IpAddr, TcpStream)>,
        deadline: Instant,
    ) -> Sender<()> {
        let (end, ended) = channel::<()>();
        let (begin, begun) = channel();
        thread::spawn(move || {
            let caller = client.as_ref().map(|(peer, far)| Caller {
                client: far,
                peer: *peer,
                has_sent_more: false,
            });
            let _ = resolver.look_up(deadline, caller.as_ref(), move || {
                begin.send(()).unwrap();
                let _ = ended.recv();
                Ok(Vec::new())
            });
        });
        begun.recv_timeout(LONG).unwrap();
        end
    }

    fn try_for(
        resolver: &'static Resolver,
        peer: IpAddr,
        far: &TcpStream,
        limit: Duration,
    ) -> Result<Found, DialError> {
        let caller = Caller {
            client: far,
            peer,
            has_sent_more: false,
        };
        resolver.look_up(Instant::now() + limit, Some(&caller), || Ok(Vec::new()))
    }

    fn settled(resolver: &Resolver, threads: usize, awaited: usize) {
        let deadline = Instant::now() + LONG;
        loop {
            let table = lock(&resolver.table);
            let waiting: usize = table.shares.values().map(|share| share.awaited).sum();
            if (table.threads, waiting) == (threads, awaited) {
                return;
            }
            drop(table);
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
    }

    #[test]
    fn one_client_has_a_share_and_others_do_not_wait_for_it() {
        let resolver = resolver(16);
        let (_near, far, peer) = client("192.0.2.1");
        let (_other_near, other_far, other) = client("192.0.2.2");
        let deadline = Instant::now() + LONG;
        let copy = || far.try_clone().unwrap();
        let first = hang(resolver, peer, copy(), deadline);
        let _second = hang(resolver, peer, copy(), deadline);
        let third = try_for(resolver, peer, &far, Duration::from_millis(50));
        assert!(matches!(third, Err(DialError::ResolverBusy)), "{third:?}");
        assert!(lock(&resolver.table).queue.is_empty());
        try_for(resolver, other, &other_far, LONG).unwrap().unwrap();
        // The next one's turn comes as soon as one of its client's has ended.
        let waiting = thread::spawn({
            let far = copy();
            move || try_for(resolver, peer, &far, LONG).is_ok()
        });
        while lock(&resolver.table).queue.is_empty() {
            thread::yield_now();
        }
        drop(first);
        assert!(waiting.join().unwrap());
        settled(resolver, 1, 1);
    }

    #[test]
    fn what_is_given_up_leaves_the_client_some_and_the_others_the_rest() {
        let resolver = resolver(16);
        let (_near, far, peer) = client("192.0.2.1");
        let (_other_near, other_far, other) = client("192.0.2.2");
        let mut given_up = Vec::new();
        for _ in 0..4 {
            let soon = Instant::now() + Duration::from_millis(20);
            given_up.push(hang(resolver, peer, far.try_clone().unwrap(), soon));
            settled(resolver, given_up.len(), 0);
        }
        let next = try_for(resolver, peer, &far, Duration::from_millis(50));
        assert!(matches!(next, Err(DialError::ResolverBusy)), "{next:?}");
        try_for(resolver, other, &other_far, LONG).unwrap().unwrap();
        given_up.clear();
        settled(resolver, 0, 0);
        assert!(lock(&resolver.table).shares.is_empty());
        try_for(resolver, peer, &far, LONG).unwrap().unwrap();
    }

    #[test]
    fn a_process_that_looks_up_for_itself_may_use_every_thread() {
        let resolver = resolver(16);
        let deadline = Instant::now() + LONG;
        let mut hanging: Vec<_> = (0..16)
            .map(|_| hang_for(resolver, None, deadline))
            .collect();
        let try_for = |limit| resolver.look_up(Instant::now() + limit, None, || Ok(Vec::new()));
        let next = try_for(Duration::from_millis(50));
        assert!(matches!(next, Err(DialError::ResolverBusy)), "{next:?}");
        hanging.pop();
        try_for(LONG).unwrap().unwrap();
    }

    #[test]
    fn a_client_that_is_gone_gives_its_turn_back() {
        let resolver = resolver(8);
        let (near, far, peer) = client("192.0.2.1");
        let (_second_near, second_far, _) = client("192.0.2.1");
        let _hanging = hang(resolver, peer, far, Instant::now() + LONG);
        drop(near);
        settled(resolver, 1, 0);
        let start = Instant::now();
        try_for(resolver, peer, &second_far, LONG).unwrap().unwrap();
        assert!(start.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn a_client_that_is_gone_waits_for_no_turn() {
        let resolver = resolver(1);
        let (_near, far, peer) = client("192.0.2.1");
        let (gone, gone_far, other) = client("192.0.2.2");
        let _hanging = hang(resolver, peer, far, Instant::now() + LONG);
        drop(gone);
        let answer = try_for(resolver, other, &gone_far, LONG);
        assert!(matches!(answer, Err(DialError::CallerGone)), "{answer:?}");
        assert!(lock(&resolver.table).queue.is_empty());
    }
}
