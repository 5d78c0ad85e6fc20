//! wss: a server's connection under TLS, as a socket like any other.
//!
//! A TLS connection can't be read from and written to by two threads that both wait. So the rest of the
//! client has one end of a socket pair, with the plain bytes, and a thread moves them between the other end
//! and the TCP connection. Each direction holds a few records at most and takes no more until they have gone
//! on.
//!
//! An end is passed on as it is known: a `close_notify`, an EOF without one and a failure all end the plain
//! bytes, and the WebSocket tells by its Close whether they are complete.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use socket2::{Domain, Socket, Type};

use super::options::Server;
use super::printable;
use super::server::{ServerStream, left};

/// rustls verifies and decrypts on it.
const STACK: usize = 256 * 1024;

/// The most plain bytes in a record (RFC 8446 §5.1).
const RECORD: usize = 16 * 1024;

/// How long the last bytes may take once the rest of the client has left its end of the pair.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// The certificates that a server may show.
#[derive(Debug, Clone)]
pub struct Trust(Arc<ClientConfig>);

impl Trust {
    /// The system's certificates, and those in the PEM file `ca_file`.
    ///
    /// # Errors
    /// Why there are none, in a sentence.
    pub fn load(ca_file: Option<&Path>) -> Result<Trust, String> {
        let ring = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        // What can't be read or understood is left out, as everybody does; if a server needs it, it says so.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(path) = ca_file {
            let named = certificates_in(path).map_err(|error| {
                format!(
                    "cannot use the certificates in {}: {error}; write them as PEM",
                    path.display()
                )
            })?;
            roots.add_parsable_certificates(named);
        }
        if roots.is_empty() {
            return Err(
                "the system has no certificates to trust: install ca-certificates or name some with --ca-file"
                    .into(),
            );
        }
        let mut config = ClientConfig::builder_with_provider(ring)
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("cannot use TLS: {error}"))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Trust(Arc::new(config)))
    }

    /// Shakes hands over `tcp` until `deadline`, and returns the socket with the plain bytes.
    ///
    /// # Errors
    /// Why not, in a sentence.
    pub fn encrypt(
        &self,
        tcp: TcpStream,
        server: &Server,
        deadline: Instant,
    ) -> Result<Socket, String> {
        let cannot = |why: String| format!("no TLS with {}: {why}", server.address);
        let name = server_name(server).ok_or_else(|| cannot("its name is none for TLS".into()))?;
        let mut tls = ClientConnection::new(Arc::clone(&self.0), name)
            .map_err(|error| cannot(error.to_string()))?;
        let tcp = Arc::new(Socket::from(tcp));
        let mut stream = ServerStream::new(Arc::clone(&tcp), deadline);
        while tls.is_handshaking() {
            tls.complete_io(&mut stream)
                .map_err(|error| cannot(explain(&error)))?;
        }
        Pump::start(tls, tcp).map_err(|error| cannot(error.to_string()))
    }
}

fn certificates_in(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    match certificates {
        Ok(none) if none.is_empty() => Err("there are none".into()),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(error.to_string()),
    }
}

fn server_name(server: &Server) -> Option<ServerName<'static>> {
    match server.url.host()? {
        url::Host::Domain(name) => {
            let name = name.strip_suffix('.').unwrap_or(name);
            ServerName::try_from(name.to_owned()).ok()
        }
        url::Host::Ipv4(address) => Some(ServerName::from(IpAddr::from(address))),
        url::Host::Ipv6(address) => Some(ServerName::from(IpAddr::from(address))),
    }
}

fn explain(error: &io::Error) -> String {
    let text = error.to_string();
    let is_one_of = |names: &[&str]| names.iter().any(|name| text.contains(name));
    match error.kind() {
        ErrorKind::WouldBlock => {
            "no answer in time: raise --dial-timeout if it is only slow".into()
        }
        ErrorKind::UnexpectedEof => "it ended the connection; is it a TLS port?".into(),
        _ if is_one_of(&["UnknownIssuer", "BadSignature"]) => {
            "nobody trusted has signed its certificate: name its CA with --ca-file".into()
        }
        _ if is_one_of(&["CaUsedAsEndEntity"]) => {
            "its certificate is that of a CA, as openssl req -x509 makes them: add -addext basicConstraints=critical,CA:FALSE".into()
        }
        _ if is_one_of(&["ProtocolVersion"]) && !cfg!(feature = "tls12") => {
            "it has no TLS 1.3: turn that on there, or build with --features tls12".into()
        }
        _ => printable(&text),
    }
}

/// How many records go one way before the other has its turn.
const TURN: usize = 8;

/// Moves bytes between the plain end and the TCP connection. It waits nowhere but in `poll`.
struct Pump {
    tls: ClientConnection,
    tcp: Arc<Socket>,
    plain: Socket,
    /// Decrypted and not yet taken by the client.
    decrypted: Vec<u8>,
    /// The client sends nothing more.
    plain_ended: bool,
    /// The server sends nothing more.
    tls_ended: bool,
    /// The server takes nothing more.
    is_deaf: bool,
    /// The client, the server were told of the other's end.
    told: [bool; 2],
    /// When the client left its end of the pair.
    left: Option<Instant>,
}

impl Pump {
    /// Starts the thread and returns the client's end.
    fn start(tls: ClientConnection, tcp: Arc<Socket>) -> io::Result<Socket> {
        let (plain, of_client) = Socket::pair(Domain::UNIX, Type::STREAM, None)?;
        tcp.set_nonblocking(true)?;
        plain.set_nonblocking(true)?;
        let mut pump = Pump {
            tls,
            tcp,
            plain,
            decrypted: Vec::new(),
            plain_ended: false,
            tls_ended: false,
            is_deaf: false,
            told: [false; 2],
            left: None,
        };
        let thread = thread::Builder::new().name("tls".into()).stack_size(STACK);
        thread.spawn(move || pump.run())?;
        Ok(of_client)
    }

    fn run(&mut self) {
        // The handshake may have brought bytes along.
        self.decrypt();
        loop {
            self.up();
            self.down();
            self.pass_on_ends();
            let is_over = self.plain_ended && !self.wants_send();
            if is_over && self.tls_ended && self.decrypted.is_empty() {
                return;
            }
            if let Err(error) = self.wait() {
                return log::debug!("TLS is given up: {error}");
            }
        }
    }

    /// From the client to the server, each record once the one before is sent.
    fn up(&mut self) {
        let mut record = [0; RECORD];
        for _ in 0..TURN {
            self.send();
            if self.plain_ended || self.wants_send() {
                return;
            }
            match ready((&self.plain).read(&mut record)) {
                None => return,
                Some(Ok(count @ 1..)) => {
                    self.is_deaf |= self.tls.writer().write_all(&record[..count]).is_err();
                }
                Some(Ok(0) | Err(_)) => {
                    self.plain_ended = true;
                    self.tls.send_close_notify();
                }
            }
        }
    }

    /// What is encrypted already. What a server that takes nothing more has sent before can still be read.
    fn send(&mut self) {
        while self.wants_send() {
            match ready(self.tls.write_tls(&mut &*self.tcp)) {
                None => return,
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    log::debug!("TLS can't be sent: {error}");
                    self.is_deaf = true;
                    self.plain_ended = true;
                    let _ = self.plain.shutdown(Shutdown::Read);
                }
            }
        }
    }

    fn wants_send(&self) -> bool {
        self.tls.wants_write() && !self.is_deaf
    }

    /// From the server to the client, once the client has taken everything before.
    fn down(&mut self) {
        for _ in 0..TURN {
            self.give();
            if self.tls_ended || !self.decrypted.is_empty() {
                return;
            }
            match ready(self.tls.read_tls(&mut &*self.tcp)) {
                None => return,
                Some(Ok(0)) => self.tls_ended = true,
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    log::debug!("TLS can't be received: {error}");
                    self.tls_ended = true;
                }
            }
            // An alert for the server may be due now.
            if let Err(error) = self.tls.process_new_packets() {
                log::debug!("TLS is broken: {error}");
                self.tls_ended = true;
            }
            self.decrypt();
        }
    }

    /// Takes what rustls has decrypted: that of one `read_tls`, a record or two.
    fn decrypt(&mut self) {
        let mut record = [0; RECORD];
        loop {
            match self.tls.reader().read(&mut record) {
                Ok(count @ 1..) => self.decrypted.extend_from_slice(&record[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Ok(0) | Err(_) => {
                    self.tls_ended = true;
                    return;
                }
            }
        }
    }

    fn give(&mut self) {
        while !self.decrypted.is_empty() {
            match ready((&self.plain).write(&self.decrypted)) {
                None => return,
                Some(Ok(count)) => drop(self.decrypted.drain(..count)),
                Some(Err(_)) => self.note_left(),
            }
        }
    }

    fn pass_on_ends(&mut self) {
        let [client, server] = &mut self.told;
        if self.tls_ended && self.decrypted.is_empty() && !std::mem::replace(client, true) {
            let _ = self.plain.shutdown(Shutdown::Write);
        }
        let all_sent = self.is_deaf || !self.tls.wants_write();
        if self.plain_ended && all_sent && !std::mem::replace(server, true) {
            let _ = self.tcp.shutdown(Shutdown::Write);
        }
    }

    /// Nobody takes the server's bytes any more. What the client has sent still goes out.
    fn note_left(&mut self) {
        self.left.get_or_insert(Instant::now());
        self.decrypted = Vec::new();
        self.tls_ended = true;
    }

    /// Waits until one of the sockets can go on. One of which nothing is wanted is left out, as a poll
    /// returns at once for a socket that has ended; but the client's is asked whether the client has left.
    fn wait(&mut self) -> io::Result<()> {
        let wanted = |read, write| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, read);
            flags.set(PollFlags::OUT, write);
            flags
        };
        let of_tcp = wanted(
            !self.tls_ended && self.decrypted.is_empty(),
            self.wants_send(),
        );
        let of_plain = wanted(
            !self.plain_ended && !self.wants_send(),
            !self.decrypted.is_empty(),
        );
        let mut fds = Vec::with_capacity(2);
        if !of_tcp.is_empty() {
            fds.push(PollFd::new(&*self.tcp, of_tcp));
        }
        if self.left.is_none() || !of_plain.is_empty() {
            fds.push(PollFd::new(&self.plain, of_plain));
        }
        let limit = match self.left {
            Some(since) => Timespec::try_from(left(since + FLUSH_LIMIT)?).ok(),
            None => None,
        };
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let hung_up = |fd: &PollFd<'_>| fd.revents().contains(PollFlags::HUP);
        if self.left.is_none() && fds.last().is_some_and(hung_up) {
            self.note_left();
        }
        Ok(())
    }
}

/// What a call on a non-blocking socket gave, or `None` if it would have had to wait.
fn ready(result: io::Result<usize>) -> Option<io::Result<usize>> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            None
        }
        result => Some(result),
    }
}
