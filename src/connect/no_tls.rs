//! In place of `tls.rs` in a build without the feature `tls`: wss is refused before anything is dialed.

use std::net::TcpStream;
use std::path::Path;
use std::time::Instant;

use socket2::Socket;

use super::options::Server;

/// There is none.
#[derive(Debug, Clone)]
pub enum Trust {}

impl Trust {
    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub fn load(_ca_file: Option<&Path>) -> Result<Trust, String> {
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
        _deadline: Instant,
    ) -> Result<Socket, String> {
        match *self {}
    }
}
