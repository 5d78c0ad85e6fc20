//! The contract, held up to the real daemon: a module for each chapter of the README's reference.
#![allow(clippy::unwrap_used, clippy::panic)]

mod answers;
mod command_line;
mod connect;
mod connect_tls;
mod ends;
mod frames;
mod gate;
mod hostile;
mod keepalive;
mod metrics;
mod network;
mod openapi;
mod policy;
mod properties;
mod relay;
mod rotation;
mod service;
mod shutdown;
mod soak;
mod support;
