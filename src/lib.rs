//! `tunneld`: a WebSocket that is a raw TCP connection.
//!
//! The way of a connection:
//!
//! 1. [`daemon`] accepts it, gives it a place among the [`connections`] and one of its [`threads`];
//! 2. [`connection`] leads it from its first byte to its last, on another thread once it is a tunnel;
//! 3. [`request_head`] reads one bounded request head, and no byte more is lost;
//! 4. [`http`] has tiny_http parse it, on a private socket, and runs every check in order;
//! 5. [`dial`] resolves the target, keeps to the [`policy`] and races the addresses, before one deadline;
//! 6. a refusal is answered and goes to the [`lingering_close`];
//! 7. after a 101, [`tunnel`] relays: inbound and outbound, one thread each, and a keepalive;
//! 8. an orderly end on one side becomes an orderly end on the other, a broken one a broken one;
//! 9. the end is logged once, the sockets are closed, the place is free.
//!
//! The other end is here too: [`connect`] is the client.
//!
//! [`accept`] is what every accept loop does, [`config`] holds every option, [`metrics`] counts, [`log_limit`]
//! bounds the log, and [`notify`] tells a service manager when the daemon serves and when it stops. Only blocking
//! sockets and threads are used; each wait has a limit or an owner that ends it.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod accept;
pub mod config;
pub mod connect;
pub mod connection;
pub mod connections;
pub mod daemon;
pub mod dial;
pub mod http;
pub mod lingering_close;
pub mod lock;
pub mod log_limit;
pub mod metrics;
pub mod notify;
pub mod policy;
pub mod request_head;
pub mod threads;
pub mod tunnel;
