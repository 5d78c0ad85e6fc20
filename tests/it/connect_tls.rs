//! The client over wss, through a TLS proxy in front of the real daemon.

use crate::connect::*;
use crate::support::*;

#[cfg(not(feature = "tls"))]
#[test]
fn a_build_without_tls_says_so() {
    let (code, stderr) = fails_to_start(Connect::command("wss://localhost:1", &["--port", "1"]));
    assert_eq!((code, stderr.lines().count()), (2, 1), "{stderr}");
    assert!(stderr.contains("--features tls"), "{stderr}");
}

#[test]
fn a_file_of_certificates_is_checked_at_the_start() {
    let with_file = |url: &str, path: &str| {
        let options = ["--port", "1", "--ca-file", path];
        let (code, stderr) = fails_to_start(Connect::command(url, &options));
        assert_eq!((code, stderr.lines().count()), (2, 1), "{stderr}");
        stderr
    };
    assert!(with_file("ws://localhost:1", "/dev/null").contains("write wss://"));
    if cfg!(feature = "tls") {
        for path in ["/nonexistent", "/dev/null", "Cargo.toml"] {
            let sentence = with_file("wss://localhost:1", path);
            let is_there = path != "/nonexistent";
            assert!(
                sentence.contains(path) && sentence.contains("PEM") == is_there,
                "{sentence}"
            );
        }
    }
}

fn path_of(file: &tempfile::NamedTempFile) -> &str {
    file.path().to_str().unwrap()
}

/// A private key on a curve that ring does not have.
const ON_SECP256K1: &[u8] = b"-----BEGIN PRIVATE KEY-----
MIGEAgEAMBAGByqGSM49AgEGBSuBBAAKBG0wawIBAQQgRtptOtkf76weKaxfXVz+
cR7yOQJcyZe8MIGxly5s+SOhRANCAASixlc3wy2PiHHOlL8eCF/M3Duhw3k1Ddgo
lxFjW8GIwz/tZpBNEksUw3wv3Z6XE/p1NJRMxG6rifm8OIbiL3qr
-----END PRIVATE KEY-----
";

#[test]
fn a_client_certificate_is_checked_at_the_start() {
    let wrong = |url: &str, options: &[&str], parts: &[&str]| {
        let options = [&["-W", "1"], options].concat();
        let (code, stderr) = fails_to_start(Connect::command(url, &options));
        assert_eq!((code, stderr.lines().count()), (2, 1), "{stderr}");
        assert!(parts.iter().all(|part| stderr.contains(part)), "{stderr}");
    };
    let (ws, wss) = ("ws://localhost:1", "wss://localhost:1");
    wrong(ws, &["--cert", "/dev/null"], &["--cert is of no use"]);
    wrong(ws, &["--key", "/dev/null"], &["--key is of no use"]);
    if cfg!(not(feature = "tls")) {
        return;
    }
    wrong(wss, &["--key", "/dev/null"], &["--cert FILE"]);
    for path in ["/dev/null", "Cargo.toml"] {
        wrong(
            wss,
            &["--cert", path],
            &["certificates of --cert", path, "PEM"],
        );
    }
    wrong(
        wss,
        &["--cert", "/nonexistent"],
        &["/nonexistent, which --cert names: No such file or directory (os error 2)\n"],
    );
    let file = |bytes: &[u8]| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, bytes).unwrap();
        file
    };
    let [own, other] = [(); 2].map(|()| rcgen::generate_simple_self_signed(["me".into()]).unwrap());
    let (cert, key) = (
        file(own.cert.pem().as_bytes()),
        file(other.signing_key.serialize_pem().as_bytes()),
    );
    let (cert, key) = (path_of(&cert), path_of(&key));
    wrong(
        wss,
        &["--cert", cert],
        &["key of --cert", cert, "there is none", "--key"],
    );
    wrong(
        wss,
        &["--cert", cert, "--key", key],
        &["is not that of the certificate", key],
    );
    wrong(
        wss,
        &["--cert", cert, "--key", "/nonexistent"],
        &["/nonexistent, which --key names: No such file or directory (os error 2)\n"],
    );
    let locked =
        file(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n");
    let locked = locked.path().to_str().unwrap();
    wrong(
        wss,
        &["--cert", cert, "--key", locked],
        &["passphrase", locked],
    );
    let (cert_in_der, key_in_der) = (
        file(own.cert.der()),
        file(&other.signing_key.serialize_der()),
    );
    for (options, of) in [
        (
            ["--cert", path_of(&cert_in_der), "--key", key],
            "openssl x509",
        ),
        (
            ["--cert", cert, "--key", path_of(&key_in_der)],
            "openssl pkey",
        ),
    ] {
        wrong(wss, &options, &["it is binary and must be PEM", of]);
    }
    let unsupported = file(ON_SECP256K1);
    wrong(
        wss,
        &["--cert", cert, "--key", path_of(&unsupported)],
        &["no kind that is supported", path_of(&unsupported), "P-256"],
    );
}

#[cfg(feature = "tls")]
mod through_a_proxy {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
    use std::process::Command;
    use std::sync::{Arc, Mutex};
    use std::thread;
    use std::time::{Duration, Instant};

    use rcgen::{
        BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair,
        date_time_ymd,
    };
    use rustix::fs::{CWD, Mode, mkfifoat};
    use rustix::io::Errno;
    use rustix::net::sockopt;
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};
    use rustls::crypto::ring::default_provider;
    use rustls::pki_types::PrivateKeyDer;
    use rustls::server::WebPkiClientVerifier;
    use rustls::server::danger::ClientCertVerifier;
    use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
    use socket2::SockRef;

    use super::*;

    fn named(name: &str, mut certificate: CertificateParams) -> CertificateParams {
        let subject = &mut certificate.distinguished_name;
        subject.push(DnType::CommonName, name);
        certificate
    }

    fn for_localhost(is_ca: IsCa) -> CertificateParams {
        let mut certificate = CertificateParams::new(["localhost".to_owned()]).unwrap();
        certificate.is_ca = is_ca;
        certificate
    }

    fn config(
        chain: &[&Certificate],
        key: &KeyPair,
        clients: Arc<dyn ClientCertVerifier>,
    ) -> Arc<ServerConfig> {
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.iter().map(|cert| cert.der().clone()).collect(), key)
            .unwrap();
        Arc::new(config)
    }

    fn pem_file(certificate: &Certificate) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, certificate.pem()).unwrap();
        file
    }

    /// A proxy that takes TLS off in front of an address.
    struct Proxy {
        url: String,
        /// A PEM file with its certificate.
        ca_file: tempfile::NamedTempFile,
        /// Of each connection that has ended, whether its client said so by a `close_notify`.
        told: Arc<Mutex<Vec<bool>>>,
    }

    impl Proxy {
        /// In front of `daemon`, with a certificate for `name`.
        fn to(address: SocketAddr, name: &str) -> Proxy {
            Proxy::with(address, CertificateParams::new([name.to_owned()]).unwrap())
        }

        /// With a certificate that signs itself and is named.
        fn with(address: SocketAddr, certificate: CertificateParams) -> Proxy {
            let key = KeyPair::generate().unwrap();
            let cert = named("a server", certificate).self_signed(&key).unwrap();
            Proxy::showing(address, &[&cert], &key, &cert)
        }

        /// One that shows `chain`, the first of which is of `key`, and whose users name `trusted`.
        fn showing(
            address: SocketAddr,
            chain: &[&Certificate],
            key: &KeyPair,
            trusted: &Certificate,
        ) -> Proxy {
            Proxy::asking(
                address,
                chain,
                key,
                trusted,
                WebPkiClientVerifier::no_client_auth(),
            )
        }

        /// One that lets in whom `clients` does.
        fn asking(
            address: SocketAddr,
            chain: &[&Certificate],
            key: &KeyPair,
            trusted: &Certificate,
            clients: Arc<dyn ClientCertVerifier>,
        ) -> Proxy {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            let config = config(chain, key, clients);
            let told = Arc::<Mutex<Vec<bool>>>::default();
            let note = Arc::clone(&told);
            thread::spawn(move || {
                for tcp in listener.incoming().map_while(Result::ok) {
                    let tls = ServerConnection::new(Arc::clone(&config)).unwrap();
                    relay(tls, tcp, address, &note);
                }
            });
            Proxy {
                url: format!("wss://localhost:{port}"),
                ca_file: pem_file(trusted),
                told,
            }
        }

        fn client(&self, port: u16, options: &[&str]) -> Connect {
            let ca_file = self.ca_file.path().to_str().unwrap();
            let port = port.to_string();
            let own = ["--port", &port, "--ca-file", ca_file];
            Connect::spawn(Connect::command(&self.url, &[&own[..], options].concat()))
        }
    }

    /// Writes under the lock, so that records stay in order; the client takes them whatever it sends.
    fn flush(tls: &mut ServerConnection, mut tcp: &TcpStream) {
        while tls.wants_write() && tls.write_tls(&mut tcp).is_ok() {}
    }

    /// Leads a connection to `address`. An EOF there becomes a `close_notify`, and one here an EOF there.
    fn relay(
        tls: ServerConnection,
        tcp: TcpStream,
        address: SocketAddr,
        told: &Arc<Mutex<Vec<bool>>>,
    ) {
        let told = Arc::clone(told);
        let tls = Arc::new(Mutex::new(tls));
        let plain = TcpStream::connect(address).unwrap();
        let tcp = Arc::new(tcp);
        let (of_up, tcp_up, mut plain_up) = (
            Arc::clone(&tls),
            Arc::clone(&tcp),
            plain.try_clone().unwrap(),
        );
        thread::spawn(move || {
            let mut buffer = [0; 16 * 1024];
            let mut is_told = false;
            while let Ok(count @ 1..) = (&*tcp_up).read(&mut buffer) {
                let mut plain_bytes = Vec::new();
                let mut bytes = &buffer[..count];
                let mut tls = of_up.lock().unwrap();
                let mut is_sound = true;
                while !bytes.is_empty() && is_sound {
                    tls.read_tls(&mut bytes).unwrap();
                    let state = tls.process_new_packets();
                    is_sound = state.is_ok();
                    is_told |= state.is_ok_and(|state| state.peer_has_closed());
                    let _ = tls.reader().read_to_end(&mut plain_bytes);
                }
                flush(&mut tls, &tcp_up);
                drop(tls);
                if !is_sound || plain_up.write_all(&plain_bytes).is_err() {
                    break;
                }
            }
            told.lock().unwrap().push(is_told);
            let _ = plain_up.shutdown(Shutdown::Write);
        });
        thread::spawn(move || {
            let mut plain = plain;
            let mut buffer = [0; 16 * 1024];
            while let Ok(count @ 1..) = plain.read(&mut buffer) {
                let mut tls = tls.lock().unwrap();
                tls.writer().write_all(&buffer[..count]).unwrap();
                flush(&mut tls, &tcp);
            }
            let mut tls = tls.lock().unwrap();
            tls.send_close_notify();
            flush(&mut tls, &tcp);
            let _ = tcp.shutdown(Shutdown::Write);
        });
    }

    const PROTOCOLS: [&[&str]; 2] = [&[], &["--protocol", "connect-tcp"]];

    #[test]
    fn bytes_and_ends_go_through_in_both_directions() {
        for protocol in PROTOCOLS {
            relay_both_ways(protocol);
        }
    }

    fn relay_both_ways(protocol: &[&str]) {
        const SIZE: usize = 5_000_000;
        let daemon = Daemon::start(&[]);
        let proxy = Proxy::to(daemon.address, "localhost");
        let target = Target::listen();
        let mut client = proxy.client(target.port, protocol);
        let (mut stdin, mut stdout) = (client.stdin(), client.stdout());
        let mut stream = target.accept();
        stdin.write_all(b"hello").unwrap();
        assert_eq!(take(&mut stream, 5), b"hello");
        let (up, down) = (Random::new(1).bytes(SIZE), Random::new(2).bytes(SIZE));
        let (up_copy, down_copy) = (up.clone(), down.clone());
        let asking = thread::spawn(move || stdin.write_all(&up_copy).unwrap());
        let mut answers = stream.try_clone().unwrap();
        let answering = thread::spawn(move || answers.write_all(&down_copy).unwrap());
        let reading = thread::spawn(move || (read_to_end(&mut stream) == (up, true), stream));
        assert!(take(&mut stdout, SIZE) == down, "downloaded other bytes");
        let (is_whole, mut stream) = reading.join().unwrap();
        assert!(is_whole, "uploaded other bytes");
        asking.join().unwrap();
        answering.join().unwrap();
        stream.write_all(b"late").unwrap();
        drop(stream);
        assert_eq!(take(&mut stdout, 4), b"late");
        assert_eq!(client.ended(), (0, String::new()));
        daemon.logged(1, &["tunnel closed", "closed in order"]);
    }

    /// Only an orderly end is one for TLS, too.
    #[test]
    fn a_broken_end_is_without_a_close_notify() {
        for protocol in PROTOCOLS {
            let daemon = Daemon::start(&[]);
            let proxy = Proxy::to(daemon.address, "localhost");
            let target = Target::listen();
            let client = proxy.client(target.port, &[&LOCAL[..], protocol].concat());
            // The first connection is the client's own, which looks whether it would be served.
            let ended = || proxy.told.lock().unwrap().len();
            within(LIMIT, "the client has looked", || {
                (ended() == 1).then_some(())
            });
            let (local, mut server) = (client.dial(), target.accept());
            let before = ended();
            local.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_to_end(&mut server), (vec![], true));
            drop(server);
            within(LIMIT, "the orderly end", || {
                (ended() > before).then_some(())
            });
            assert_eq!(
                proxy.told.lock().unwrap().last(),
                Some(&true),
                "{protocol:?}"
            );
            let (local, mut server) = (client.dial(), target.accept());
            let before = ended();
            reset(local);
            assert!(!read_to_end(&mut server).1, "{protocol:?}");
            within(LIMIT, "the broken end", || (ended() > before).then_some(()));
            assert_eq!(
                proxy.told.lock().unwrap().last(),
                Some(&false),
                "{protocol:?}"
            );
        }
    }

    type Tls = StreamOwned<ServerConnection, TcpStream>;

    /// A server that does what a test says, in place of a daemon behind a proxy. Its system takes little on its behalf.
    struct Server {
        listener: TcpListener,
        config: Arc<ServerConfig>,
        ca_file: tempfile::NamedTempFile,
    }

    impl Server {
        fn listen() -> Server {
            let key = KeyPair::generate().unwrap();
            let cert = named("a server", for_localhost(IsCa::NoCa));
            let cert = cert.self_signed(&key).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            SockRef::from(&listener)
                .set_recv_buffer_size(20_000)
                .unwrap();
            Server {
                listener,
                config: config(&[&cert], &key, WebPkiClientVerifier::no_client_auth()),
                ca_file: pem_file(&cert),
            }
        }

        fn command(&self, options: &[&str]) -> Command {
            let url = format!(
                "wss://localhost:{}",
                self.listener.local_addr().unwrap().port()
            );
            let own = [
                "--port",
                "1",
                "--ca-file",
                self.ca_file.path().to_str().unwrap(),
            ];
            Connect::command(&url, &[&own[..], options].concat())
        }

        fn client(&self, options: &[&str]) -> Connect {
            Connect::spawn(self.command(options))
        }

        /// One that logs how the directions of its tunnel end.
        fn client_that_tells(&self) -> Connect {
            let mut command = self.command(&[]);
            command.env("RUST_LOG", "tunneld::tunnel=debug");
            Connect::spawn(command)
        }

        /// The next connection, behind the head of its request.
        fn ask(&self) -> (Tls, String) {
            let (tcp, _) = self.listener.accept().unwrap();
            tcp.set_read_timeout(Some(LIMIT)).unwrap();
            let connection = ServerConnection::new(Arc::clone(&self.config)).unwrap();
            let mut tls = StreamOwned::new(connection, tcp);
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                head.push(char::from(take(&mut tls, 1)[0]));
            }
            (tls, head)
        }

        /// Takes the first connection of a client with local ports, which only looks.
        fn is_looked_at(&self) {
            let (mut tls, _) = self.ask();
            tls.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 49\r\n\r\n")
                .unwrap();
            tls.write_all(br#"{"code":400,"message":"parameter port is missing"}"#)
                .unwrap();
            tls.conn.send_close_notify();
            tls.flush().unwrap();
        }

        /// The next connection, upgraded, with `behind` right behind the 101.
        fn upgrade(&self, protocol: &[&str], behind: &[u8]) -> Tls {
            let (mut tls, head) = self.ask();
            let mut lines = head.lines();
            let answer = match lines.find_map(|line| line.strip_prefix("Sec-WebSocket-Key: ")) {
                Some(key) => {
                    let accept = tungstenite::handshake::derive_accept_key(key.as_bytes());
                    head_101(&accept, "Connection: Upgrade")
                }
                None => "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: connect-tcp-12\r\nCapsule-Protocol: ?1\r\n\r\n".into(),
            };
            assert_eq!(protocol.is_empty(), answer.contains("websocket"));
            tls.write_all(&[answer.as_bytes(), behind].concat())
                .unwrap();
            tls
        }
    }

    /// The orderly end of the server, and how long that of the client is.
    fn ends(protocol: &[&str]) -> (&'static [u8], usize) {
        if protocol.is_empty() {
            (b"\x88\x02\x03\xe8", 8)
        } else {
            (b"\xa0\x28\xd7\xf3\x00", 5)
        }
    }

    /// Sends messages until the client has taken none for a while.
    fn fill(tls: &mut Tls, protocol: &[&str]) {
        let header: &[u8] = if protocol.is_empty() {
            b"\x82\x7e\x75\x30"
        } else {
            b"\xa0\x28\xd7\xf2\x80\x00\x75\x30"
        };
        let message = [header, &[0; 30_000]].concat();
        let pause = Duration::from_millis(500);
        // A write that has to wait reads, too.
        tls.sock.set_write_timeout(Some(pause)).unwrap();
        tls.sock.set_read_timeout(Some(pause)).unwrap();
        while tls.write_all(&message).is_ok() {}
        tls.sock.set_read_timeout(Some(LIMIT)).unwrap();
    }

    #[test]
    fn a_reset_behind_both_ends_is_a_broken_end() {
        for protocol in PROTOCOLS {
            let server = Server::listen();
            let mut client = server.client(protocol);
            let (end, length) = ends(protocol);
            let mut tls = server.upgrade(protocol, end);
            drop(client.stdin());
            take(&mut tls, length);
            reset(tls.sock);
            client.broke("not every byte could be sent: Connection reset by peer");
        }
    }

    #[test]
    fn without_a_close_notify_a_close_tells_an_orderly_end_and_final_data_does_not() {
        for protocol in PROTOCOLS {
            let server = Server::listen();
            let mut client = server.client(protocol);
            let (end, length) = ends(protocol);
            let mut tls = server.upgrade(protocol, end);
            drop(client.stdin());
            take(&mut tls, length);
            tls.sock.shutdown(Shutdown::Write).unwrap();
            if protocol.is_empty() {
                assert_eq!(client.ended(), (0, String::new()));
            } else {
                client.broke("TLS ended without a close_notify");
            }
        }
    }

    /// The server ends its direction when the client's end is on its way, behind bytes that it has yet to take.
    fn ends_early(tls: &mut Tls, client: &Connect) {
        client.logged("from_stream ended");
        tls.conn.send_close_notify();
        tls.flush().unwrap();
    }

    #[test]
    fn what_is_still_to_be_sent_is_waited_for_when_the_server_has_ended() {
        const SIZE: usize = 400_000;
        let server = Server::listen();
        let mut client = server.client_that_tells();
        let mut stdin = client.stdin();
        let asking = thread::spawn(move || stdin.write_all(&[0; SIZE]).unwrap());
        let mut tls = server.upgrade(&[], ends(&[]).0);
        // The rest fits in what the client's system and its socket pair hold.
        let mut received = take(&mut tls, SIZE - 100_000);
        ends_early(&mut tls, &client);
        let mut part = [0; 8_000];
        loop {
            match tls.read(&mut part).unwrap() {
                0 => break,
                count => received.extend_from_slice(&part[..count]),
            }
            thread::sleep(Duration::from_millis(20));
        }
        asking.join().unwrap();
        assert!(received.len() > SIZE, "{} bytes", received.len());
        let close = &received[received.len() - ends(&[]).1..];
        assert_eq!(close[..2], [0x88, 0x82]);
        assert_eq!(client.ended().0, 0);
    }

    #[test]
    fn what_the_server_never_takes_was_not_sent() {
        /// More than the client's system takes of it, some 128 KiB, and no more than it and a socket pair do.
        const SIZE: usize = 180_000;
        let server = Server::listen();
        SockRef::from(&server.listener)
            .set_recv_buffer_size(1)
            .unwrap();
        let mut client = server.client_that_tells();
        let mut tls = server.upgrade(&[], ends(&[]).0);
        client.stdin().write_all(&[0; SIZE]).unwrap();
        ends_early(&mut tls, &client);
        let (code, log) = client.ended();
        let why = "tunneld: the tunnel broke: not every byte could be sent: the server takes nothing more";
        assert_eq!((code, log.lines().last()), (1, Some(why)));
        drop(tls);
    }

    #[test]
    fn a_reset_is_noticed_while_the_local_side_takes_nothing() {
        for protocol in PROTOCOLS {
            let server = Server::listen();
            let mut client = server.client(protocol);
            let mut tls = server.upgrade(protocol, &[]);
            fill(&mut tls, protocol);
            reset(tls.sock);
            client.broke("Connection reset by peer");
        }
    }

    #[test]
    fn a_tunnel_that_breaks_while_nothing_moves_ends_with_a_reset() {
        for protocol in PROTOCOLS {
            let server = Server::listen();
            let client = server.client(&[&LOCAL[..], protocol].concat());
            server.is_looked_at();
            let mut local = client.dial();
            let mut tls = server.upgrade(protocol, &[]);
            fill(&mut tls, protocol);
            let pause = Duration::from_millis(500);
            local.set_write_timeout(Some(pause)).unwrap();
            while local.write_all(&[0; 50_000]).is_ok() {}
            reset(local);
            client.logged("tunnel closed");
            let end = tls
                .read_to_end(&mut Vec::new())
                .map_err(|error| error.kind());
            assert_eq!(end, Err(ErrorKind::ConnectionReset), "{protocol:?}");
        }
    }

    /// As for a client without TLS.
    #[test]
    fn the_system_looks_for_a_dead_server() {
        let server = Server::listen();
        let client = server.client(&[]);
        let tls = server.upgrade(&[], &[]);
        let ours = tls.sock.peer_addr().unwrap();
        let process = pidfd_open(client.pid(), PidfdFlags::empty()).unwrap();
        let directory = format!("/proc/{}/fd", client.pid().as_raw_nonzero());
        let mut timeouts = Vec::new();
        for entry in std::fs::read_dir(directory).unwrap() {
            let name = entry.unwrap().file_name();
            let number = name.to_str().unwrap().parse().unwrap();
            let socket = match pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) {
                Ok(descriptor) => TcpStream::from(descriptor),
                Err(Errno::PERM | Errno::NOSYS) => return skip("pidfd_getfd"),
                Err(_) => continue,
            };
            if socket.local_addr().is_ok_and(|address| address == ours) {
                timeouts.push(sockopt::tcp_user_timeout(&socket).unwrap());
            }
        }
        assert_eq!(timeouts, [300_000]);
    }

    #[test]
    fn the_end_of_the_target_ends_the_client() {
        let daemon = Daemon::start(&[]);
        let proxy = Proxy::to(daemon.address, "localhost");
        let target = Target::listen();
        let mut client = proxy.client(target.port, &[]);
        let _stdin = client.stdin();
        target.accept().write_all(b"bye").unwrap();
        assert_eq!(take(&mut client.stdout(), 3), b"bye");
        assert_eq!(client.ended(), (0, String::new()));
        daemon.logged(1, &["tunnel closed", "closed in order"]);
    }

    #[test]
    fn a_broken_end_and_a_refusal_are_told() {
        let mut daemon = Daemon::start(&[]);
        let proxy = Proxy::to(daemon.address, "localhost");
        let closed = closed_port();
        proxy.client(closed.port, &[]).broke("refused with 502: ");
        let target = Target::listen();
        let mut client = proxy.client(target.port, &[]);
        let _stdin = client.stdin();
        let _stream = target.accept();
        daemon.logged(1, &["tunnel opened"]);
        daemon.signal(Signal::KILL);
        daemon.exit();
        client.broke("ended without a Close");
    }

    #[test]
    fn a_certificate_must_be_trusted_and_of_that_name() {
        let daemon = Daemon::start(&[]);
        let proxy = Proxy::to(daemon.address, "localhost");
        let other = Proxy::to(daemon.address, "localhost");
        let ca_file = other.ca_file.path().to_str().unwrap();
        let options = ["--port", "1", "--ca-file", ca_file];
        let mut client = Connect::spawn(Connect::command(&proxy.url, &options));
        client.broke("name its CA with --ca-file");
        let stranger = Proxy::to(daemon.address, "stranger.example");
        stranger.client(1, &[]).broke("not valid for name");
        assert!(!daemon.log().contains("tunnel opened"), "{}", daemon.log());
    }

    #[test]
    fn a_certificate_of_a_ca_is_no_servers_own_and_an_old_one_none() {
        let daemon = Daemon::start(&[]);
        let of_a_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let proxy = Proxy::with(daemon.address, for_localhost(of_a_ca));
        proxy
            .client(1, &[])
            .broke("basicConstraints=critical,CA:FALSE");
        let mut expired = for_localhost(IsCa::NoCa);
        expired.not_after = date_time_ymd(2020, 1, 1);
        let expired = Proxy::with(daemon.address, expired);
        expired.client(1, &[]).broke("expired");
    }

    /// Whoever can read a sandbox's key could show whatever name that sandbox's certificate signs.
    #[test]
    fn a_named_certificate_that_is_no_cas_signs_nothing() {
        let daemon = Daemon::start(&[]);
        for is_ca in [IsCa::NoCa, IsCa::ExplicitNoCa] {
            let key = KeyPair::generate().unwrap();
            let sandbox = CertificateParams::new(["sandbox.example".to_owned()]).unwrap();
            let mut sandbox = named("a sandbox", sandbox);
            sandbox.is_ca = is_ca;
            let of_sandbox = sandbox.self_signed(&key).unwrap();
            let issuer = Issuer::new(sandbox, key);
            let key = KeyPair::generate().unwrap();
            let signed = for_localhost(IsCa::NoCa).signed_by(&key, &issuer).unwrap();
            for chain in [&[&signed][..], &[&signed, &of_sandbox]] {
                Proxy::showing(daemon.address, chain, &key, &of_sandbox)
                    .client(1, &[])
                    .broke("its certificate is not signed by a trusted CA");
            }
        }
        assert!(!daemon.log().contains("refused"), "{}", daemon.log());
    }

    #[test]
    fn a_named_cas_certificate_is_good_for_what_it_signs_and_a_servers_own_for_that_server() {
        let daemon = Daemon::start(&[]);
        let key = KeyPair::generate().unwrap();
        let mut ca = named("a CA", CertificateParams::default());
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A root is trusted for being named, whatever its date.
        ca.not_after = date_time_ymd(2020, 1, 1);
        let of_ca = ca.self_signed(&key).unwrap();
        let issuer = Issuer::new(ca, key);
        let key = KeyPair::generate().unwrap();
        let signed = for_localhost(IsCa::NoCa).signed_by(&key, &issuer).unwrap();
        let held = closed_port();
        for trusted in [&of_ca, &signed] {
            Proxy::showing(daemon.address, &[&signed], &key, trusted)
                .client(held.port, &[])
                .broke("refused with 502: ");
        }
    }

    #[test]
    fn a_server_that_asks_for_a_certificate_is_shown_one() {
        let daemon = Daemon::start(&[]);
        let key = KeyPair::generate().unwrap();
        let mut ca = named("a CA", CertificateParams::default());
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let of_ca = ca.self_signed(&key).unwrap();
        let issuer = Issuer::new(ca, key);
        let mut roots = RootCertStore::empty();
        roots.add(of_ca.der().clone()).unwrap();
        let clients = WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::new(default_provider()),
        );
        let clients = clients.build().unwrap();
        let key = KeyPair::generate().unwrap();
        let server = for_localhost(IsCa::NoCa).self_signed(&key).unwrap();
        let proxy = Proxy::asking(daemon.address, &[&server], &key, &server, clients);
        let key = KeyPair::generate().unwrap();
        let me = named("me", CertificateParams::default());
        let mine = me.clone().signed_by(&key, &issuer).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, mine.pem() + &key.serialize_pem()).unwrap();
        let path = file.path().to_str().unwrap();
        for options in [&["--cert", path][..], &["--cert", path, "--key", path]] {
            let mut client = proxy.client(Target::echo().port, options);
            client.stdin().write_all(b"hello").unwrap();
            assert_eq!(client.rest(), b"hello");
            assert_eq!(client.ended(), (0, String::new()));
        }
        // A pipe, such as the shell's <(...), gives it once.
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        mkfifoat(CWD, &pipe, Mode::RUSR | Mode::WUSR).unwrap();
        let options = ["--cert", pipe.to_str().unwrap()];
        let mut client = proxy.client(Target::echo().port, &options);
        let both = mine.pem() + &key.serialize_pem();
        thread::spawn(move || std::fs::write(pipe, both));
        drop(client.stdin());
        assert_eq!(client.ended(), (0, String::new()));
        // It says so at the start, and no local port is served.
        let wants = "it wants a client certificate: name one with --cert and --key";
        proxy.client(1, &[]).broke(wants);
        proxy.client(1, &LOCAL).broke(wants);
        let stranger = me.self_signed(&key).unwrap();
        std::fs::write(&file, stranger.pem() + &key.serialize_pem()).unwrap();
        proxy
            .client(1, &["--cert", path])
            .broke("does not accept the client's certificate");
    }

    #[test]
    fn an_empty_variable_for_the_systems_certificates_is_an_unset_one() {
        let url = "wss://127.0.0.1:1";
        let outcome = |value: Option<&str>| {
            let mut command = Connect::command(url, &["--port", "1"]);
            for name in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
                command.env_remove(name);
                command.envs(value.map(|value| (name, value)));
            }
            fails_to_start(command)
        };
        assert_eq!(outcome(Some("")), outcome(None));
        let (code, stderr) = outcome(Some("/nonexistent"));
        assert!(
            code == 2 && stderr.contains("no certificates to trust"),
            "{stderr}"
        );
    }

    #[test]
    fn a_port_without_tls_is_named() {
        let daemon = Daemon::start(&[]);
        let proxy = Proxy::to(daemon.address, "localhost");
        let ca_file = proxy.ca_file.path().to_str().unwrap();
        let options = ["--port", "1", "--ca-file", ca_file];
        let client = |port: u16, options: &[&str]| {
            let url = format!("wss://127.0.0.1:{port}");
            Connect::spawn(Connect::command(&url, options))
        };
        client(daemon.address.port(), &options).broke("it does not speak TLS: use ws://");
        let closing = Target::listen();
        let mut early = client(closing.port, &options);
        drop(closing.accept());
        early.broke(
            "it closed the connection without an answer; if it does not speak TLS, use ws://",
        );
        let silent = Target::listen();
        let options = [&options[..], &["--dial-timeout", "300ms"]].concat();
        client(silent.port, &options).broke("raise --dial-timeout");
    }

    #[test]
    fn a_port_with_tls_is_named() {
        let daemon = Daemon::start(&[]);
        let proxy = Proxy::to(daemon.address, "localhost");
        let url = proxy.url.replace("wss:", "ws:");
        Connect::spawn(Connect::command(&url, &["--port", "1"]))
            .broke("answered with TLS: use wss://");
    }

    #[test]
    fn an_idle_connection_costs_nothing_and_its_threads_end_with_it() {
        let daemon = Daemon::start(&[]);
        let proxy = Proxy::to(daemon.address, "localhost");
        let target = Target::echo();
        let client = proxy.client(target.port, &LOCAL);
        client.address();
        let idle = client.threads();
        let mut locals: Vec<_> = (0..10).map(|_| client.dial()).collect();
        for local in &mut locals {
            local.write_all(b"x").unwrap();
            assert_eq!(take(local, 1), b"x");
        }
        let (ticks, since) = (client.ticks(), Instant::now());
        while since.elapsed() < Duration::from_secs(1) {
            thread::sleep(Duration::from_millis(50));
        }
        let used = client.ticks() - ticks;
        assert!(used < 20, "{used} ticks for doing nothing");
        for local in &mut locals {
            local.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_to_end(local), (Vec::new(), true));
        }
        within(LIMIT, "every thread has ended", || {
            (client.threads() <= idle).then_some(())
        });
        assert!(!client.log().contains("WARN"), "{}", client.log());
    }
}
