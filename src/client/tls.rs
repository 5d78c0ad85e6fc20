//! wss: a server's connection under TLS, as a socket like any other.
//!
//! A TLS connection can't be read from and written to by two threads that both wait. So the rest of the
//! client has one end of a socket pair, with the plain bytes, and a thread moves them between the other end
//! and the TCP connection. Each direction holds a few records at most and takes no more until they have gone
//! on.
//!
//! An end is passed on as it is. A `close_notify` is an EOF of the plain bytes, and so is an EOF without one where the
//! Close of a WebSocket tells whether they are complete. Any other end is a failure, which the [`Carrier`]'s notes tell
//! before the plain bytes end. The client's end of its direction becomes a `close_notify`, and so does its close if it
//! leaves in order; any other close becomes a reset.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fd::OwnedFd;
use rustix::net::sockopt;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{
    WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::SingleCertAndKey;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore,
    SignatureScheme,
};

use super::carrier::{Carrier, CarrierThread, Notes};
use super::deadline::{Until, remaining};
use super::failure::Failure;
use super::identity::{self, certificates_in};
use super::redactor::Redactor;
use super::server::{OwnCertificate, Server};
use crate::os;
use crate::tunnel::Protocol;

/// rustls verifies and decrypts on it.
const STACK: usize = 256 * 1024;

/// The most plain bytes in a record (RFC 8446 §5.1).
const RECORD: usize = 16 * 1024;

/// How long the server may take for each part of the last bytes, once the rest of the client has left in order.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// How long all of them may take if it has not: the server is to learn within a second that there is no orderly end.
const BREAK_LIMIT: Duration = Duration::from_millis(100);

/// How long what a failed connection had brought may take to be given on. It has some time more in the pair.
const SETTLE_LIMIT: Duration = Duration::from_millis(250);

/// How long the rest of the client may take, once it has closed its end of the pair, to say whether that was in order.
const WORD_LIMIT: Duration = Duration::from_secs(3);

/// The certificates that a server may show, and the client's own.
#[derive(Debug, Clone)]
pub struct Trust(Arc<ClientConfig>);

impl Trust {
    /// The system's certificates, and those in the PEM file `ca_file`: a CA's for what it signs, another one for
    /// the server that shows it. And what the client shows itself.
    ///
    /// # Errors
    /// What can't be used, in a sentence.
    pub fn load(ca_file: Option<&Path>, own: Option<&OwnCertificate>) -> Result<Trust, String> {
        let named = match ca_file {
            None => Vec::new(),
            Some(path) => certificates_in(&identity::read(path, "--ca-file")?).map_err(|why| {
                format!("cannot use the certificates in {}: {why}", path.display())
            })?,
        };
        let ring = Arc::new(ring::default_provider());
        let mut verifier = Verifier {
            roots: RootCertStore::empty(),
            pinned: Vec::new(),
            algorithms: ring.signature_verification_algorithms,
        };
        // What can't be read or understood is left out, as everybody does; if a server needs it, it says so.
        verifier.roots.add_parsable_certificates(of_system());
        verifier.name(named, UnixTime::now());
        if verifier.roots.is_empty() && verifier.pinned.is_empty() {
            return Err(
                "the system has no certificates to trust: install ca-certificates or name some with --ca-file"
                    .into(),
            );
        }
        let own = own.map(|files| identity::load(files, &ring)).transpose()?;
        let config = ClientConfig::builder_with_provider(ring)
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("cannot use TLS: {error}"))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match own {
            None => config.with_no_client_auth(),
            Some(identity) => {
                config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity)))
            }
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Trust(Arc::new(config)))
    }

    /// Shakes hands over `tcp` until `deadline`, and returns the socket with the plain bytes of `protocol`, and what
    /// carries it.
    ///
    /// # Errors
    /// Why not, in a sentence.
    pub fn encrypt(
        &self,
        tcp: TcpStream,
        server: &Server,
        protocol: Protocol,
        redactor: &Redactor,
        deadline: Instant,
    ) -> Result<(TcpStream, Carrier), Failure> {
        let cannot = |why: String| format!("no TLS with {}: {why}", server.address);
        let name = server_name(server)
            .ok_or_else(|| cannot("its host name is not valid for TLS".into()))?;
        let mut tls = ClientConnection::new(Arc::clone(&self.0), name)
            .map_err(|error| cannot(error.to_string()))?;
        let mut stream = Until::new(&tcp, deadline);
        while tls.is_handshaking() {
            tls.complete_io(&mut stream).map_err(|error| {
                let sentence = cannot(explain(&error, redactor));
                match is_end(&error) || error.kind() == ErrorKind::WouldBlock {
                    true => Failure::not_there(sentence),
                    false => sentence.into(),
                }
            })?;
        }
        let started = Pump::start(tls, tcp, protocol);
        started.map_err(|error| cannot(error.to_string()).into())
    }
}

/// Judges what a server shows. A certificate that was named and is no CA's is good for the server that shows it, and
/// for nothing that it may have signed: whoever can read its key in a sandbox is no CA.
#[derive(Debug)]
struct Verifier {
    roots: RootCertStore,
    pinned: Vec<CertificateDer<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    /// Trusts these as well.
    fn name(&mut self, certificates: Vec<CertificateDer<'static>>, now: UnixTime) {
        let (of_cas, of_servers) = certificates
            .into_iter()
            .partition(|certificate| is_of_a_ca(certificate, now));
        let of_cas: Vec<_> = of_cas;
        self.roots.add_parsable_certificates(of_cas);
        self.pinned = of_servers;
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(shown)?;
        if self.pinned.contains(shown) {
            check_alone(&certificate, now)?;
        } else {
            let algorithms = self.algorithms.all;
            let roots = &self.roots;
            verify_server_cert_signed_by_trust_anchor(
                &certificate,
                roots,
                intermediates,
                now,
                algorithms,
            )?;
        }
        verify_server_name(&certificate, name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Whether a server may show `certificate` at `now`, whoever signed it: that comes last, and without a root it is
/// all that is left to complain about.
fn check_alone(certificate: &ParsedCertificate<'_>, now: UnixTime) -> Result<(), rustls::Error> {
    let roots = RootCertStore::empty();
    match verify_server_cert_signed_by_trust_anchor(certificate, &roots, &[], now, &[]) {
        Err(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => Ok(()),
        verified => verified,
    }
}

/// Whether `certificate` may sign others (RFC 5280 §4.2.1.9). So may one that can't be a server's own: a root of
/// version 1 says nothing of it.
fn is_of_a_ca(certificate: &CertificateDer<'_>, now: UnixTime) -> bool {
    let Ok(certificate) = ParsedCertificate::try_from(certificate) else {
        return true;
    };
    use rustls::Error::InvalidCertificate;
    let flaw = match check_alone(&certificate, now) {
        // That is seen first. What it would be at its time is asked here.
        Err(InvalidCertificate(CertificateError::ExpiredContext { not_after, .. })) => {
            check_alone(&certificate, not_after)
        }
        Err(InvalidCertificate(CertificateError::NotValidYetContext { not_before, .. })) => {
            check_alone(&certificate, not_before)
        }
        checked => checked,
    };
    flaw.is_err_and(|flaw| flaw.to_string().contains(CA_SHOWN))
}

/// webpki's name, which rustls passes on as text, for the flaw of a CA's certificate that is shown as a server's own.
const CA_SHOWN: &str = "CaUsedAsEndEntity";

/// The system's certificates, or those that `SSL_CERT_FILE` and `SSL_CERT_DIR` name instead.
fn of_system() -> Vec<CertificateDer<'static>> {
    let is_empty = |name| std::env::var_os(name).is_some_and(|value| value.is_empty());
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    // An empty variable is an unset one; rustls-native-certs would look for a file without a name.
    let found = if is_empty("SSL_CERT_FILE") && !is_set("SSL_CERT_DIR") {
        let places = openssl_probe::probe();
        let directory = places.cert_dir.first().map(PathBuf::as_path);
        rustls_native_certs::load_certs_from_paths(places.cert_file.as_deref(), directory)
    } else {
        rustls_native_certs::load_native_certs()
    };
    found.certs
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

/// Whether the connection is what has ended.
fn is_end(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

fn explain(error: &io::Error, redactor: &Redactor) -> String {
    let text = error.to_string();
    match error.kind() {
        ErrorKind::WouldBlock => {
            "no answer in time: raise --dial-timeout if it is only slow".into()
        }
        _ if is_end(error) => {
            "it closed the connection without an answer; if it does not speak TLS, use ws://".into()
        }
        _ => match meaning(&text) {
            Some(meaning) => meaning.into(),
            None => redactor.printable(&text),
        },
    }
}

/// What an error of rustls means to a person, and what to do.
fn meaning(text: &str) -> Option<&'static str> {
    const UNTRUSTED: &[&str] = &["UnknownIssuer", "BadSignature", "EndEntityUsedAsCa"];
    const OURS_REFUSED: &[&str] = &[
        "alert: UnknownCA",
        "alert: BadCertificate",
        "alert: CertificateUnknown",
        "alert: CertificateExpired",
        "alert: AccessDenied",
    ];
    let is_one_of = |names: &[&str]| names.iter().any(|name| text.contains(name));
    Some(match text {
        _ if is_one_of(&["InvalidContentType"]) => "it does not speak TLS: use ws://",
        _ if is_one_of(&["alert: CertificateRequired"]) => {
            "it wants a client certificate: name one with --cert and --key"
        }
        _ if is_one_of(OURS_REFUSED) => {
            "it does not accept the client's certificate: name another one with --cert and --key"
        }
        _ if is_one_of(UNTRUSTED) => {
            "its certificate is not signed by a trusted CA: name its CA with --ca-file"
        }
        _ if is_one_of(&[CA_SHOWN]) => {
            "its certificate is a CA's, as openssl req -x509 makes by default: add -addext basicConstraints=critical,CA:FALSE"
        }
        _ if is_one_of(&["ProtocolVersion"]) && !cfg!(feature = "tls12") => {
            "it has no TLS 1.3: turn that on there, or build with --features tls12"
        }
        _ => return None,
    })
}

/// How many records go one way before the other has its turn.
const TURN: usize = 8;

/// Moves bytes between the plain end and the TCP connection. It waits nowhere but in `poll`, and once for the client's
/// word on how it has left.
struct Pump {
    tls: ClientConnection,
    tcp: TcpStream,
    plain: UnixStream,
    notes: Arc<Notes>,
    /// Whether the client leaves in order.
    leaves_in_order: Receiver<bool>,
    /// Bytes that end without a `close_notify` are not all that there were.
    needs_close_notify: bool,
    /// Decrypted and not yet taken by the client.
    decrypted: Vec<u8>,
    /// The client sends nothing more.
    plain_ended: bool,
    /// The server sends nothing more.
    tls_ended: bool,
    /// The TCP connection has ended both ways. It may still have bytes for us.
    tcp_hung_up: bool,
    server_closed_read: bool,
    eof_sent_to_client: bool,
    close_notify_sent: bool,
    eof_sent_to_server: bool,
    /// The client has ended in order, and all that it had sent before was given to the system.
    all_given: bool,
    left: Option<Left>,
    /// When the server's connection was found to have failed.
    failed: Option<Instant>,
}

/// The client has left its end of the pair.
#[derive(Clone, Copy)]
struct Left {
    in_order: bool,
    /// When that was, or when the server last took bytes of a client that has left in order.
    since: Instant,
}

impl Pump {
    /// Starts the thread and returns the client's end.
    fn start(
        tls: ClientConnection,
        tcp: TcpStream,
        protocol: Protocol,
    ) -> io::Result<(TcpStream, Carrier)> {
        let (plain, of_client) = UnixStream::pair()?;
        tcp.set_nonblocking(true)?;
        plain.set_nonblocking(true)?;
        let notes = Arc::<Notes>::default();
        let (tell, leaves_in_order) = channel();
        let mut pump = Pump {
            tls,
            tcp,
            plain,
            notes: Arc::clone(&notes),
            leaves_in_order,
            needs_close_notify: !protocol.has_words(),
            decrypted: Vec::new(),
            plain_ended: false,
            tls_ended: false,
            tcp_hung_up: false,
            server_closed_read: false,
            eof_sent_to_client: false,
            close_notify_sent: false,
            eof_sent_to_server: false,
            all_given: false,
            left: None,
            failed: None,
        };
        let thread = thread::Builder::new().name("tls".into()).stack_size(STACK);
        let thread = CarrierThread {
            leaves_in_order: tell,
            handle: thread.spawn(move || pump.run())?,
        };
        let socket = TcpStream::from(OwnedFd::from(of_client));
        Ok((socket, Carrier::new(notes, thread)))
    }

    /// Returns whether all that the client has sent was given to the system.
    fn run(&mut self) -> bool {
        // The handshake may have brought bytes along.
        self.decrypt();
        while self.advance() {
            if let Err(error) = self.wait() {
                log::debug!("TLS is given up: {error}");
                break;
            }
        }
        let is_broken = self.failed.is_some() || self.left.is_some_and(|left| !left.in_order);
        if is_broken || !self.all_given {
            // Nobody is to take this for an orderly end: the TCP connection is reset.
            let _ = sockopt::set_socket_linger(&self.tcp, Some(Duration::ZERO));
        }
        self.all_given
    }

    /// Moves what can be moved without a wait. Returns whether there is anything left to wait for.
    fn advance(&mut self) -> bool {
        self.up();
        self.down();
        self.close_up();
        self.close_down();
        let is_down_over = self.tls_ended && self.decrypted.is_empty();
        let is_up_over = self.plain_ended && !self.wants_send();
        !is_up_over || !is_down_over && self.left.is_none()
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
                    let taken = self.tls.writer().write_all(&record[..count]);
                    if taken.is_err() {
                        self.stop_sending();
                    }
                }
                Some(Ok(0) | Err(_)) => self.end_up(),
            }
        }
    }

    /// All that the client has sent was given to the system. It only ends its direction, or has left, in order or not.
    fn end_up(&mut self) {
        self.plain_ended = true;
        if os::is_hung_up(&self.plain) {
            self.note_left();
        }
        self.all_given = self.left.is_none_or(|left| left.in_order);
    }

    /// Behind all that the client has sent. Where the server's `close_notify` counts, ours is not sent before: nginx
    /// leaves its own out once it has read one.
    fn close_up(&mut self) {
        let is_awaited = self.needs_close_notify && !self.tls_ended && self.left.is_none();
        if self.all_given && !self.close_notify_sent && !is_awaited {
            self.close_notify_sent = true;
            self.tls.send_close_notify();
            self.send();
        }
        if self.close_notify_sent && !self.wants_send() && !self.eof_sent_to_server {
            self.eof_sent_to_server = true;
            let _ = self.tcp.shutdown(Shutdown::Write);
        }
    }

    /// What is encrypted already. What a server that takes nothing more has sent before can still be read.
    fn send(&mut self) {
        while self.wants_send() {
            match ready(self.tls.write_tls(&mut &self.tcp)) {
                None => return,
                Some(Ok(_)) => self.note_progress(),
                Some(Err(error)) => {
                    log::debug!("TLS can't be sent: {error}");
                    self.note_error(&error);
                }
            }
        }
    }

    fn wants_send(&self) -> bool {
        self.tls.wants_write() && !self.server_closed_read
    }

    fn stop_sending(&mut self) {
        self.server_closed_read = true;
        self.plain_ended = true;
        let _ = self.plain.shutdown(Shutdown::Read);
    }

    /// From the server to the client, once the client has taken everything before.
    fn down(&mut self) {
        for _ in 0..TURN {
            self.give();
            if self.tls_ended || !self.decrypted.is_empty() {
                return;
            }
            match ready(self.tls.read_tls(&mut &self.tcp)) {
                None => return,
                Some(Ok(0)) => self.note_eof(),
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    log::debug!("TLS can't be received: {error}");
                    self.note_error(&error);
                    self.tls_ended = true;
                }
            }
            if let Err(error) = self.tls.process_new_packets() {
                log::debug!("TLS is broken: {error}");
                let why = error.to_string();
                let why = meaning(&why).map_or(why, str::to_owned);
                let _ = self.notes.alert.set(why.clone());
                // An alert for the server may be due.
                self.send();
                self.fail(why);
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

    /// To nobody, once the client has left: it is only taken so that the connection doesn't end with a reset for what
    /// lies unread.
    fn give(&mut self) {
        while !self.decrypted.is_empty() {
            if self.left.is_some() {
                self.decrypted = Vec::new();
                return;
            }
            match ready((&self.plain).write(&self.decrypted)) {
                None => return,
                Some(Ok(count)) => drop(self.decrypted.drain(..count)),
                Some(Err(_)) => self.note_left(),
            }
        }
    }

    /// After a failure the client's end is closed instead: both of its directions end at once.
    fn close_down(&mut self) {
        let is_down_over = self.tls_ended && self.decrypted.is_empty();
        if is_down_over && self.failed.is_none() && !self.eof_sent_to_client {
            self.eof_sent_to_client = true;
            let _ = self.plain.shutdown(Shutdown::Write);
        }
    }

    /// The TCP connection has ended without a `close_notify`.
    fn note_eof(&mut self) {
        if self.needs_close_notify {
            self.fail("TLS ended without a close_notify".into());
        }
        self.tls_ended = true;
    }

    /// After a FIN a reset is EPIPE (tcp_reset in Linux): what the server had sent until then is whole.
    fn note_error(&mut self, error: &io::Error) {
        if self.tls_ended || error.kind() == ErrorKind::BrokenPipe {
            self.stop_sending();
        } else {
            self.fail(error.to_string());
        }
    }

    /// The server's connection is broken. What it has brought is still given to the client, for a while.
    fn fail(&mut self, why: String) {
        let _ = self.notes.failure.set(why);
        self.failed.get_or_insert_with(Instant::now);
        self.stop_sending();
    }

    /// Nobody takes the server's bytes any more. What the client has sent still goes out, for a while.
    fn note_left(&mut self) {
        if self.left.is_some() {
            return;
        }
        let in_order = match self.leaves_in_order.recv_timeout(WORD_LIMIT) {
            Ok(in_order) => in_order,
            Err(RecvTimeoutError::Timeout) => false,
            // No tunnel came of the connection.
            Err(RecvTimeoutError::Disconnected) => self.eof_sent_to_client,
        };
        self.left = Some(Left {
            in_order,
            since: Instant::now(),
        });
    }

    fn note_progress(&mut self) {
        if let Some(left) = &mut self.left
            && left.in_order
        {
            left.since = Instant::now();
        }
    }

    /// Waits until one of the sockets can go on. Each is asked in any case whether it has hung up, which is told whether
    /// asked for or not, until it has: a poll returns at once for it from then on.
    fn wait(&mut self) -> io::Result<()> {
        let wanted = |read, write| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, read);
            flags.set(PollFlags::OUT, write);
            flags
        };
        let reads_tcp = !self.tls_ended && self.decrypted.is_empty();
        let of_tcp = wanted(reads_tcp, self.wants_send());
        let of_plain = wanted(
            !self.plain_ended && !self.wants_send(),
            !self.decrypted.is_empty(),
        );
        let asks_tcp = !of_tcp.is_empty() || !self.tls_ended && !self.tcp_hung_up;
        let asks_plain = !of_plain.is_empty() || self.left.is_none();
        let mut fds = Vec::with_capacity(2);
        fds.extend(asks_tcp.then(|| PollFd::new(&self.tcp, of_tcp)));
        fds.extend(asks_plain.then(|| PollFd::new(&self.plain, of_plain)));
        os::wait(&mut fds, self.time_left()?)?;
        let hung_up = |fd: &PollFd<'_>| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR);
        let tcp_hung_up = asks_tcp && fds.first().is_some_and(hung_up);
        let plain_hung_up = asks_plain && fds.last().is_some_and(hung_up);
        // A read tells it in its place.
        if tcp_hung_up && !reads_tcp {
            self.note_tcp_hung_up();
        }
        if plain_hung_up {
            self.note_left();
        }
        Ok(())
    }

    fn note_tcp_hung_up(&mut self) {
        self.tcp_hung_up = true;
        let error = sockopt::socket_error(&self.tcp).ok().and_then(Result::err);
        if let Some(error) = error {
            log::debug!("TLS can't go on: {error}");
            self.note_error(&error.into());
        }
    }

    /// Until this is given up.
    fn time_left(&self) -> io::Result<Option<Duration>> {
        let of_left = self.left.map(|left| {
            let limit = if left.in_order {
                FLUSH_LIMIT
            } else {
                BREAK_LIMIT
            };
            left.since + limit
        });
        let of_failed = self.failed.map(|since| since + SETTLE_LIMIT);
        let deadline = of_left.into_iter().chain(of_failed).min();
        deadline.map(remaining).transpose()
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

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, date_time_ymd};

    use super::*;

    #[test]
    fn a_ca_is_told_from_a_server_at_any_time() {
        for (is_ca, expected) in [
            (IsCa::Ca(BasicConstraints::Unconstrained), true),
            (IsCa::Ca(BasicConstraints::Constrained(0)), true),
            (IsCa::ExplicitNoCa, false),
            (IsCa::NoCa, false),
        ] {
            for (from, until) in [(1990, 2000), (1990, 2400), (2300, 2400)] {
                let mut parameters = CertificateParams::new(["box".to_owned()]).unwrap();
                parameters.is_ca = is_ca;
                parameters.not_before = date_time_ymd(from, 1, 1);
                parameters.not_after = date_time_ymd(until, 1, 1);
                let key = KeyPair::generate().unwrap();
                let certificate = parameters.self_signed(&key).unwrap();
                let found = is_of_a_ca(certificate.der(), UnixTime::now());
                assert_eq!(found, expected, "{is_ca:?} {from}");
            }
        }
    }
}
