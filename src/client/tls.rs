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
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
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

use super::deadline::{Until, remaining};
use super::failure::{Alert, Failure};
use super::identity::{self, certificates_in};
use super::redactor::Redactor;
use super::server::{OwnCertificate, Server};
use crate::os;

/// rustls verifies and decrypts on it.
const STACK: usize = 256 * 1024;

/// The most plain bytes in a record (RFC 8446 §5.1).
const RECORD: usize = 16 * 1024;

/// How long the last bytes may take once the rest of the client has left its end of the pair.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

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

    /// Shakes hands over `tcp` until `deadline`, and returns the socket with the plain bytes. Before these end because
    /// TLS is broken, `alert` is set.
    ///
    /// # Errors
    /// Why not, in a sentence.
    pub fn encrypt(
        &self,
        tcp: TcpStream,
        server: &Server,
        redactor: &Redactor,
        alert: &Alert,
        deadline: Instant,
    ) -> Result<TcpStream, Failure> {
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
        let started = Pump::start(tls, tcp, Arc::clone(alert));
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

/// Moves bytes between the plain end and the TCP connection. It waits nowhere but in `poll`.
struct Pump {
    tls: ClientConnection,
    tcp: TcpStream,
    plain: UnixStream,
    /// Decrypted and not yet taken by the client.
    decrypted: Vec<u8>,
    /// The client sends nothing more.
    plain_ended: bool,
    /// The server sends nothing more.
    tls_ended: bool,
    server_closed_read: bool,
    eof_sent_to_client: bool,
    eof_sent_to_server: bool,
    /// When the client left its end of the pair.
    left: Option<Instant>,
    alert: Alert,
}

impl Pump {
    /// Starts the thread and returns the client's end.
    fn start(tls: ClientConnection, tcp: TcpStream, alert: Alert) -> io::Result<TcpStream> {
        let (plain, of_client) = UnixStream::pair()?;
        tcp.set_nonblocking(true)?;
        plain.set_nonblocking(true)?;
        let mut pump = Pump {
            tls,
            tcp,
            plain,
            decrypted: Vec::new(),
            plain_ended: false,
            tls_ended: false,
            server_closed_read: false,
            eof_sent_to_client: false,
            eof_sent_to_server: false,
            left: None,
            alert,
        };
        let thread = thread::Builder::new().name("tls".into()).stack_size(STACK);
        thread.spawn(move || pump.run())?;
        Ok(TcpStream::from(OwnedFd::from(of_client)))
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
                    self.server_closed_read |=
                        self.tls.writer().write_all(&record[..count]).is_err();
                }
                Some(Ok(0) | Err(_)) => {
                    self.plain_ended = true;
                    if self.is_left() {
                        return self.break_off();
                    }
                    self.tls.send_close_notify();
                }
            }
        }
    }

    /// Whether the client has closed its end of the pair too early. In order it only ends its direction, and waits for
    /// the server's end.
    fn is_left(&self) -> bool {
        !self.eof_sent_to_client && os::ready(&self.plain, PollFlags::IN).contains(PollFlags::HUP)
    }

    /// Without a `close_notify`, so that nobody takes this for an orderly end; the TCP connection is reset.
    fn break_off(&mut self) {
        self.send();
        let _ = sockopt::set_socket_linger(&self.tcp, Some(Duration::ZERO));
        self.eof_sent_to_server = true;
        self.server_closed_read = true;
        self.note_left();
    }

    /// What is encrypted already. What a server that takes nothing more has sent before can still be read.
    fn send(&mut self) {
        while self.wants_send() {
            match ready(self.tls.write_tls(&mut &self.tcp)) {
                None => return,
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    log::debug!("TLS can't be sent: {error}");
                    self.server_closed_read = true;
                    self.plain_ended = true;
                    let _ = self.plain.shutdown(Shutdown::Read);
                }
            }
        }
    }

    fn wants_send(&self) -> bool {
        self.tls.wants_write() && !self.server_closed_read
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
                let why = error.to_string();
                let _ = self.alert.set(meaning(&why).map_or(why, str::to_owned));
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
        if self.tls_ended && self.decrypted.is_empty() && !self.eof_sent_to_client {
            self.eof_sent_to_client = true;
            let _ = self.plain.shutdown(Shutdown::Write);
        }
        if self.plain_ended && !self.wants_send() && !self.eof_sent_to_server {
            self.eof_sent_to_server = true;
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
            fds.push(PollFd::new(&self.tcp, of_tcp));
        }
        if self.left.is_none() || !of_plain.is_empty() {
            fds.push(PollFd::new(&self.plain, of_plain));
        }
        let limit = match self.left {
            Some(since) => Some(remaining(since + FLUSH_LIMIT)?),
            None => None,
        };
        os::wait(&mut fds, limit)?;
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
