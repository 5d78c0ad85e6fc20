//! The thread that carries a server's connection under TLS, as the rest of the client knows it: what it notes, and how
//! it is left. Without TLS there is none.

use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use crate::tunnel::PeerFailure;

/// The carrier of a connection. One that is dropped takes the end of the client's bytes for a broken one, unless the
/// server has ended in order.
#[derive(Debug, Default)]
pub struct Carrier {
    notes: Arc<Notes>,
    thread: Option<CarrierThread>,
}

/// What a carrier notes before it ends the plain bytes.
#[derive(Debug, Default)]
pub struct Notes {
    /// Why TLS broke after its handshake, for a person. With TLS 1.3 a server says only then what it thinks of the
    /// client's certificate.
    pub alert: OnceLock<String>,
    /// Why the server's bytes have ended, if that was not in order.
    pub failure: PeerFailure,
}

/// A thread that returns whether everything that the client had sent was given to the system.
#[derive(Debug)]
pub struct CarrierThread {
    /// Is told whether the client leaves in order.
    pub leaves_in_order: Sender<bool>,
    /// The thread itself, which ends soon after the client has left.
    pub handle: JoinHandle<bool>,
}

impl Carrier {
    /// That of `thread`, which notes what there is in `notes`.
    pub fn new(notes: Arc<Notes>, thread: CarrierThread) -> Carrier {
        Carrier {
            notes,
            thread: Some(thread),
        }
    }

    /// Why TLS broke after its handshake, for a person.
    pub fn alert(&self) -> Option<&str> {
        self.notes.alert.get().map(String::as_str)
    }

    /// Where it notes why the server's bytes have ended, if that was not in order.
    pub fn failure(&self) -> Option<PeerFailure> {
        self.thread
            .is_some()
            .then(|| Arc::clone(&self.notes.failure))
    }

    /// Leaves the carrier of `peer`, in order or not, and waits until it has given on what it holds, or found that it
    /// can't.
    ///
    /// # Errors
    /// Why not everything was given, in a clause.
    pub fn leave(self, peer: &TcpStream, in_order: bool) -> Result<(), String> {
        let Some(thread) = self.thread else {
            return Ok(());
        };
        let _ = thread.leaves_in_order.send(in_order);
        // A thread of the tunnel that can't be woken would keep it open.
        let _ = peer.shutdown(Shutdown::Both);
        match thread.handle.join() {
            Ok(true) => Ok(()),
            _ => Err(match self.notes.failure.get() {
                Some(why) => why.clone(),
                None => "the server takes nothing more".into(),
            }),
        }
    }
}
