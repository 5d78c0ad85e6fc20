//! `tunneld`: a WebSocket that is a raw TCP connection.
//!
//! The way of a connection:
//!
//! 1. the `daemon` accepts it, over TCP or a Unix socket, and gives it a slot and one of its `threads`;
//! 2. `daemon/connection.rs` leads it from its first byte to its tunnel or its refusal;
//! 3. `daemon/request_head.rs` reads one bounded request head, and no byte more is lost;
//! 4. `daemon/http/` has tiny_http parse it, on a private socket, and runs every check in order;
//! 5. `dial` has the `resolver` look the `target` up, keeps to the `policy` and races the addresses, for as
//!    long as its `caller` waits;
//! 6. a refusal is answered and goes to `daemon/lingering_close.rs`;
//! 7. after a 101, the `tunnel` relays: one thread each way, and a keepalive;
//! 8. an orderly end on one side becomes an orderly end on the other, a broken one a broken one;
//! 9. the end is logged once, the sockets are closed, the slot is free.
//!
//! The other end is here too: the `client` shakes hands, and its tunnel is the same with the other role.
//!
//! Both use `cli` and `token` for their options, `accept` for their loops, and `logging` through `stderr`,
//! which nobody waits for. `limits` says what the system allows, `os` is where it is asked. `checked` is what a
//! model checker has its own of. Dependencies point one way: daemon, client → tunnel → os; daemon → dial → policy →
//! target. Only blocking sockets and threads are used; each wait has a limit or an owner that ends it.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod accept;
mod caller;
mod checked;
mod cli;
mod client;
mod daemon;
mod dial;
mod dial_error;
mod hosts_file;
mod limits;
mod lock;
mod log_limit;
pub mod logging;
mod os;
mod policy;
mod resolver;
pub mod signals;
pub mod stderr;
mod target;
mod threads;
mod token;
mod tunnel;

pub use cli::Exit;
pub use client::options::{Config as ClientConfig, client_arguments};
pub use client::run as run_client;
pub use daemon::listener::{Listener, listen};
pub use daemon::options::Config;
pub use daemon::{Shutdown, run as run_daemon};

#[doc = include_str!("reference.md")]
pub mod reference {}

/// What tests and `scripts/` look at from outside, beside what the program does. Nothing else uses it.
#[doc(hidden)]
pub mod exposed {
    pub use crate::client::forward::{Destination, Forward, To};
    pub use crate::client::headers::Headers;
    pub use crate::client::options::command as client_command;
    pub use crate::client::server::Server;
    pub use crate::daemon::http::Request;
    pub use crate::daemon::http::backend::Backend;
    pub use crate::daemon::http::handshake::Handshake;
    pub use crate::daemon::http::routes::{Routed, Rules, Upgrade, route};
    pub use crate::daemon::listener::ListenAddress;
    pub use crate::daemon::options::command as daemon_command;
    pub use crate::daemon::request_head::{
        HeadError, RequestHead, Scanner, parse, read as read_head,
    };
    pub use crate::policy::{Policy, Rule};
    pub use crate::target::{Host, Target};
    pub use crate::tunnel::{CapsuleReader, Fault, FrameReader, Incoming, Role};
}
