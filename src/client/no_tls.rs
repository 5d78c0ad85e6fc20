//! In place of `tls.rs` in a build without the feature `tls`: wss is refused before anything is dialed.

use std::net::TcpStream;
use std::path::Path;
use std::time::Instant;

use super::carrier::Carrier;
use super::failure::Failure;
use super::redactor::Redactor;
use super::server::{OwnCertificate, Server};
use crate::tunnel::Protocol;

/// There is none.
#[derive(Debug, Clone)]
pub enum Trust {}

impl Trust {
    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub fn load(_ca_file: Option<&Path>, _own: Option<&OwnCertificate>) -> Result<Trust, String> {
        Err("wss:// needs TLS, which this build leaves out: use ws://, or build with --features tls".into())
    }

    /// Is never called, as there is no value to call it on.
    ///
    /// # Errors
    /// None.
    pub fn encrypt(
        &self,
        _tcp: TcpStream,
        _server: &Server,
        _protocol: Protocol,
        _redactor: &Redactor,
        _deadline: Instant,
    ) -> Result<(TcpStream, Carrier), Failure> {
        match *self {}
    }
}
