//! Which connections are open, in which phase, and how many there may be.
//!
//! A [`Permit`] is a connection's place. It is given back when it is dropped, so no way out of a connection
//! can forget it.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::lock::lock;
use crate::tunnel::state::State;

/// All open connections.
#[derive(Debug)]
pub struct Connections {
    limit: usize,
    leaving: usize,
    table: Mutex<Table>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    /// Ids grow, so the oldest comes first.
    open: BTreeMap<u64, Phase>,
    next_id: u64,
    /// Threads of connections, those that were let go included.
    threads: usize,
    /// The grace is over: a tunnel that opens now is to end at once.
    over: bool,
    /// Payload bytes of ended tunnels, up and down.
    moved: (u64, u64),
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

/// One connection's place.
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
            table: Mutex::default(),
            freed: Condvar::new(),
        })
    }

    /// A place for `client`, or `None` over the limit. A connection that has not sent its head must not keep
    /// others out: at the limit the one that has waited longest for its head is let go.
    pub fn admit(self: &Arc<Self>, client: &Arc<TcpStream>) -> Option<Permit> {
        let mut table = self.table();
        if table.threads >= self.limit + self.leaving {
            return None;
        }
        if table.open.len() >= self.limit {
            table.let_one_go()?;
        }
        let id = table.next_id;
        table.next_id += 1;
        table.threads += 1;
        table.open.insert(id, Phase::Head(Arc::clone(client)));
        Some(Permit {
            connections: Arc::clone(self),
            id,
        })
    }

    /// Gives up the connections that have not sent their head.
    pub fn let_heads_go(&self) {
        let mut table = self.table();
        while table.let_one_go().is_some() {}
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

    /// Waits until no connection is left. `false` if `deadline` came first.
    pub fn wait_until_none(&self, deadline: Instant) -> bool {
        let mut table = self.table();
        while table.threads > 0 {
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
                let (up, down) = state.counts();
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
}

impl Table {
    fn close(&mut self, id: u64) {
        if let Some(Phase::Tunnel(state)) = self.open.remove(&id) {
            let (up, down) = state.counts();
            self.moved.0 += up;
            self.moved.1 += down;
        }
    }

    /// Takes its place from the oldest connection without a head, and wakes its thread.
    fn let_one_go(&mut self) -> Option<()> {
        let oldest = self
            .open
            .iter()
            .find(|(_, phase)| matches!(phase, Phase::Head(_)));
        let oldest = oldest.map(|(&id, _)| id)?;
        if let Some(Phase::Head(client)) = self.open.remove(&oldest) {
            let _ = client.shutdown(Shutdown::Read);
        }
        Some(())
    }
}

impl Permit {
    /// The head has come. `false` if the connection was let go before.
    pub fn answering(&self) -> bool {
        match self.connections.table().open.get_mut(&self.id) {
            Some(phase) => {
                *phase = Phase::Answer;
                true
            }
            None => false,
        }
    }

    /// Gives the place back before the last answer, so that a client that has seen it finds the place free.
    pub fn leave(&self) {
        self.connections.table().close(self.id);
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
        table.threads -= 1;
        drop(table);
        self.connections.freed.notify_all();
    }
}
