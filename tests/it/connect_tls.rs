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
            assert!(with_file("wss://localhost:1", path).contains(path));
        }
    }
}

#[cfg(feature = "tls")]
mod through_a_proxy {
    use std::io::{Read, Write};
    use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
    use std::sync::{Arc, Mutex};
    use std::thread;
    use std::time::{Duration, Instant};

    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, date_time_ymd};
    use rustix::process::Signal;
    use rustls::crypto::ring::default_provider;
    use rustls::pki_types::PrivateKeyDer;
    use rustls::{ServerConfig, ServerConnection};

    use super::*;

    /// A proxy that takes TLS off in front of an address.
    struct Proxy {
        url: String,
        /// A PEM file with its certificate.
        ca_file: tempfile::NamedTempFile,
    }

    impl Proxy {
        /// In front of `daemon`, with a certificate for `name`.
        fn to(address: SocketAddr, name: &str) -> Proxy {
            Proxy::with(address, CertificateParams::new([name.to_owned()]).unwrap())
        }

        fn with(address: SocketAddr, mut certificate: CertificateParams) -> Proxy {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            let key = KeyPair::generate().unwrap();
            let issuer = format!("proxy on {port}");
            certificate
                .distinguished_name
                .push(DnType::CommonName, issuer);
            let cert = certificate.self_signed(&key).unwrap();
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![cert.der().clone()], key)
                .unwrap();
            let config = Arc::new(config);
            thread::spawn(move || {
                for tcp in listener.incoming().map_while(Result::ok) {
                    let tls = ServerConnection::new(Arc::clone(&config)).unwrap();
                    relay(tls, tcp, address);
                }
            });
            let ca_file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(&ca_file, cert.pem()).unwrap();
            Proxy {
                url: format!("wss://localhost:{port}"),
                ca_file,
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
    fn relay(tls: ServerConnection, tcp: TcpStream, address: SocketAddr) {
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
            while let Ok(count @ 1..) = (&*tcp_up).read(&mut buffer) {
                let mut plain_bytes = Vec::new();
                let mut bytes = &buffer[..count];
                let mut tls = of_up.lock().unwrap();
                let mut is_sound = true;
                while !bytes.is_empty() && is_sound {
                    tls.read_tls(&mut bytes).unwrap();
                    is_sound = tls.process_new_packets().is_ok();
                    let _ = tls.reader().read_to_end(&mut plain_bytes);
                }
                flush(&mut tls, &tcp_up);
                drop(tls);
                if !is_sound || plain_up.write_all(&plain_bytes).is_err() {
                    break;
                }
            }
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

    #[test]
    fn bytes_and_ends_go_through_in_both_directions() {
        const SIZE: usize = 5_000_000;
        let daemon = Daemon::start(&[]);
        let proxy = Proxy::to(daemon.address, "localhost");
        let target = Target::listen();
        let mut client = proxy.client(target.port, &[]);
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
        proxy.client(closed_port(), &[]).broke("refused with 502: ");
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
        let mut of_a_ca = CertificateParams::new(["localhost".to_owned()]).unwrap();
        of_a_ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let proxy = Proxy::with(daemon.address, of_a_ca);
        proxy
            .client(1, &[])
            .broke("basicConstraints=critical,CA:FALSE");
        let mut expired = CertificateParams::new(["localhost".to_owned()]).unwrap();
        expired.not_after = date_time_ymd(2020, 1, 1);
        let expired = Proxy::with(daemon.address, expired);
        expired.client(1, &[]).broke("expired");
    }

    #[test]
    fn a_port_without_tls_is_named() {
        let daemon = Daemon::start(&[]);
        let proxy = Proxy::to(daemon.address, "localhost");
        let ca_file = proxy.ca_file.path().to_str().unwrap();
        let url = format!("wss://{}", daemon.address);
        let options = ["--port", "1", "--ca-file", ca_file];
        Connect::spawn(Connect::command(&url, &options)).broke("no TLS with 127.0.0.1:");
        let silent = Target::listen();
        let url = format!("wss://127.0.0.1:{}", silent.port);
        let options = [&options[..], &["--dial-timeout", "300ms"]].concat();
        Connect::spawn(Connect::command(&url, &options)).broke("raise --dial-timeout");
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
