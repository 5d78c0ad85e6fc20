//! Which connections are open, in which phase, and how many there may be.
//!
//! A [`Permit`] is a connection's slot. It is given back when it is dropped, so no way out of a connection
//! can forget it.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::lock::lock;
use crate::tunnel::State;

/// All open connections.
#[derive(Debug)]
pub struct Connections {
    limit: usize,
    leaving: usize,
    /// How many ended tunnels may have bytes on their way without a slot. Each one more holds its slot.
    delivering: usize,
    table: Mutex<Table>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    /// Ids grow, so the oldest comes first.
    open: BTreeMap<u64, Phase>,
    next_id: u64,
    /// Threads of connections, those that were evicted included.
    threads: usize,
    /// Ended tunnels whose last bytes are on their way.
    delivering: usize,
    /// Since when there has been neither.
    idle_since: Option<Instant>,
    /// The grace is over: a tunnel that opens now is to end at once.
    over: bool,
    /// Payload bytes of ended tunnels, up and down.
    moved: (u64, u64),
    /// Those that do not know it yet.
    evicted: BTreeMap<u64, Eviction>,
}

/// Why a connection lost its slot while its head was awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eviction {
    /// As many connections are open as may be, and another one came.
    ConnectionLimit,
    /// Another one needed a thread, and the system had none.
    NoThread,
    /// The daemon shuts down.
    Shutdown,
}

/// What there is at one time.
#[derive(Debug)]
pub struct Census {
    /// Open connections, tunnels among them.
    pub connections: usize,
    /// How many there may be.
    pub limit: usize,
    /// Open tunnels.
    pub tunnels: usize,
    /// Payload bytes given to targets since the start.
    pub up: u64,
    /// Payload bytes given to clients since the start.
    pub down: u64,
}

#[derive(Debug)]
enum Phase {
    /// Its request head is awaited on this socket.
    Head(Arc<TcpStream>),
    /// Its request is being answered.
    Answer,
    /// It is a tunnel.
    Tunnel(Arc<State>),
}

/// One connection's slot.
#[derive(Debug)]
pub struct Permit {
    connections: Arc<Connections>,
    /// Unique for the life of the daemon.
    pub id: u64,
}

impl Connections {
    /// No connections, of `limit` at most. So many as `leaving` may be on their way out beside them.
    pub fn new(limit: usize, leaving: usize) -> Arc<Connections> {
        Arc::new(Connections {
            limit,
            leaving,
            delivering: leaving / 2,
            table: Mutex::new(Table {
                idle_since: Some(Instant::now()),
                ..Table::default()
            }),
            freed: Condvar::new(),
        })
    }

    /// A slot for `client`, or `None` over the limit. A connection that has not sent its head must not keep others
    /// out: at the limit the one that has waited longest for its head is evicted.
    pub fn admit(self: &Arc<Self>, client: &Arc<TcpStream>) -> Option<Permit> {
        let mut table = self.table();
        if table.threads >= self.limit + self.leaving {
            return None;
        }
        if table.open.len() + table.delivering.saturating_sub(self.delivering) >= self.limit {
            table.evict_oldest_head(u64::MAX, Eviction::ConnectionLimit)?;
        }
        let id = table.next_id;
        table.next_id += 1;
        table.threads += 1;
        table.idle_since = None;
        table.open.insert(id, Phase::Head(Arc::clone(client)));
        Some(Permit {
            connections: Arc::clone(self),
            id,
        })
    }

    /// Makes room for a thread: evicts the connection that has waited longest for its head. `false` if there is none.
    pub fn evict_oldest_head(&self) -> bool {
        self.evict_oldest_head_before(u64::MAX)
    }

    /// The same, among those that came before connection `id`.
    pub fn evict_oldest_head_before(&self, id: u64) -> bool {
        let evicted = self.table().evict_oldest_head(id, Eviction::NoThread);
        evicted.is_some()
    }

    /// Evicts the connections that have not sent their head, as the daemon shuts down.
    pub fn evict_pending_heads(&self) {
        let mut table = self.table();
        while table
            .evict_oldest_head(u64::MAX, Eviction::Shutdown)
            .is_some()
        {}
    }

    /// Asks every tunnel, also those that open later, to end.
    pub fn end_tunnels(&self) {
        let mut table = self.table();
        table.over = true;
        for phase in table.open.values() {
            if let Phase::Tunnel(state) = phase {
                state.shut_down();
            }
        }
    }

    /// Waits until no connection is left, and nothing on its way. `false` if `deadline` came first.
    pub fn wait_until_none(&self, deadline: Instant) -> bool {
        let mut table = self.table();
        while !table.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            table = self
                .freed
                .wait_timeout(table, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// How long there has been no connection. No time at all while there is one.
    pub fn idle_for(&self) -> Duration {
        let idle_since = self.table().idle_since;
        idle_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Counts. Bytes of a tunnel never go missing, or count twice, while it ends.
    pub fn census(&self) -> Census {
        let table = self.table();
        let mut census = Census {
            connections: table.open.len(),
            limit: self.limit,
            tunnels: 0,
            up: table.moved.0,
            down: table.moved.1,
        };
        for phase in table.open.values() {
            if let Phase::Tunnel(state) = phase {
                let (up, down) = state.activity.counts();
                census.tunnels += 1;
                census.up += up;
                census.down += down;
            }
        }
        census
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// Takes note of something that is over.
    fn freed(&self, mut table: MutexGuard<'_, Table>) {
        if table.is_empty() {
            table.idle_since = Some(Instant::now());
        }
        drop(table);
        self.freed.notify_all();
    }
}

impl Table {
    fn is_empty(&self) -> bool {
        self.threads == 0 && self.delivering == 0
    }

    fn close(&mut self, id: u64) {
        if let Some(Phase::Tunnel(state)) = self.open.remove(&id) {
            let (up, down) = state.activity.counts();
            self.moved.0 += up;
            self.moved.1 += down;
        }
    }

    /// Takes its slot from the oldest connection without a head that came before `id`, and wakes its thread.
    fn evict_oldest_head(&mut self, id: u64, why: Eviction) -> Option<()> {
        let oldest = self
            .open
            .range(..id)
            .find(|(_, phase)| matches!(phase, Phase::Head(_)));
        let oldest = oldest.map(|(&id, _)| id)?;
        if let Some(Phase::Head(client)) = self.open.remove(&oldest) {
            self.evicted.insert(oldest, why);
            let _ = client.shutdown(Shutdown::Read);
        }
        Some(())
    }
}

impl Permit {
    /// The head has come, or never will.
    ///
    /// # Errors
    /// The connection was evicted before.
    pub fn answering(&self) -> Result<(), Eviction> {
        let mut table = self.connections.table();
        if let Some(phase) = table.open.get_mut(&self.id) {
            *phase = Phase::Answer;
        }
        table.evicted.remove(&self.id).map_or(Ok(()), Err)
    }

    /// Gives the slot back before the last answer, so that a client that has seen it finds the slot free.
    pub fn leave(&self) {
        self.connections.table().close(self.id);
    }

    /// The connection's last bytes are on their way: it has no slot any more, and is waited for all the same.
    pub fn deliver(&self) -> Delivery {
        self.leave();
        self.connections.table().delivering += 1;
        Delivery(Arc::clone(&self.connections))
    }

    /// Counts all connections.
    pub fn census(&self) -> Census {
        self.connections.census()
    }

    /// The connection becomes a tunnel.
    pub fn tunneling(&self, state: &Arc<State>) {
        let mut table = self.connections.table();
        table.open.insert(self.id, Phase::Tunnel(Arc::clone(state)));
        if table.over {
            state.shut_down();
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut table = self.connections.table();
        table.close(self.id);
        table.evicted.remove(&self.id);
        table.threads -= 1;
        self.connections.freed(table);
    }
}

/// The last bytes of a tunnel, until they have arrived or are given up.
#[derive(Debug)]
pub struct Delivery(Arc<Connections>);

impl Drop for Delivery {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.delivering -= 1;
        self.0.freed(table);
    }
}
