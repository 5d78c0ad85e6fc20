//! `tunneld connect` from behind a proxy: CONNECT and SOCKS5, from an option or the environment.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use crate::connect::{Connect, take};
use crate::support::*;

/// A proxy that leads every request to one address, and remembers what it was asked.
struct Proxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    /// `serve` reads the request and answers it. `None`: it was refused.
    fn to(
        target: SocketAddr,
        serve: impl Fn(&mut TcpStream) -> (String, bool) + Send + Sync + 'static,
    ) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy {
            address: listener.local_addr().unwrap(),
            asked: Arc::default(),
        };
        let asked = Arc::clone(&proxy.asked);
        let serve = Arc::new(serve);
        thread::spawn(move || {
            for mut near in listener.incoming().map_while(Result::ok) {
                let (asked, serve) = (Arc::clone(&asked), Arc::clone(&serve));
                thread::spawn(move || {
                    let (request, leads_on) = serve(&mut near);
                    asked.lock().unwrap().push(request);
                    if leads_on {
                        relay(near, TcpStream::connect(target).unwrap());
                    }
                });
            }
        });
        proxy
    }

    /// CONNECT, which answers `wanted` with 200 if the head has it, and otherwise with `refusal`.
    fn http(target: SocketAddr, wanted: &'static str, refusal: &'static str) -> Proxy {
        Proxy::to(target, move |near| {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                head.push(char::from(take(near, 1)[0]));
            }
            let leads_on = head.contains(wanted);
            let answer = match leads_on {
                true => "HTTP/1.0 200 Connection established\r\n\r\n",
                false => refusal,
            };
            near.write_all(answer.as_bytes()).unwrap();
            (head, leads_on)
        })
    }

    /// SOCKS5 with `user` and `s3cret`, or without them, which ends with `code`.
    fn socks(target: SocketAddr, wants_password: bool, code: u8) -> Proxy {
        Proxy::to(target, move |near| {
            let count = take(near, 2)[1];
            let methods = take(near, count.into());
            let method = if wants_password { 2 } else { 0 };
            if !methods.contains(&method) {
                near.write_all(&[5, 255]).unwrap();
                return (format!("{methods:?}"), false);
            }
            near.write_all(&[5, method]).unwrap();
            if wants_password {
                let is_right = take(near, 13) == b"\x01\x04user\x06s3cret";
                near.write_all(&[1, u8::from(!is_right)]).unwrap();
                if !is_right {
                    return ("wrong".into(), false);
                }
            }
            assert_eq!(take(near, 3), [5, 1, 0]);
            let request = match take(near, 1)[0] {
                1 => format!("{:?}", take(near, 4)),
                3 => {
                    let length = take(near, 1)[0];
                    String::from_utf8(take(near, length.into())).unwrap()
                }
                _ => format!("{:?}", take(near, 16)),
            };
            let port = take(near, 2);
            let port = u16::from_be_bytes([port[0], port[1]]);
            near.write_all(&[5, code, 0, 3, 4]).unwrap();
            near.write_all(b"here\x00\x50").unwrap();
            (format!("{request}:{port}"), code == 0)
        })
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn relay(near: TcpStream, far: TcpStream) {
    let pass = |mut from: TcpStream, mut to: TcpStream| {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    };
    let (from, to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
    let up = thread::spawn(move || pass(from, to));
    pass(far, near);
    up.join().unwrap();
}

/// Sends a line through the client of this command, and back.
fn echoes(command: Command) {
    let mut client = Connect::spawn(command);
    client.stdin().write_all(b"hello").unwrap();
    let bytes = client.rest();
    assert_eq!(client.ended(), (0, String::new()));
    assert_eq!(bytes, b"hello");
}

fn through(proxy: &str, port: u16) -> Command {
    Connect::command(
        "ws://box.example",
        &["-W", &port.to_string(), "--proxy", proxy],
    )
}

const BASIC: &str = "\r\nProxy-Authorization: Basic dXNlcjpzM2NyZXQ=\r\n";
const REFUSAL: &str =
    "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x\r\n\r\nno";

#[test]
fn an_http_proxy_is_asked_for_the_daemon_with_the_credentials_of_its_url() {
    let daemon = Daemon::start(&[]);
    let port = Target::echo().port;
    let proxy = Proxy::http(daemon.address, BASIC, REFUSAL);
    let mut command = through(&format!("http://user:s3cret@{}", proxy.address), port);
    command.args(["-H", "X-Secret: for the daemon alone"]);
    // An open daemon takes no foreign Host.
    command.args(["-H", "Host: localhost"]);
    echoes(command);
    let head = proxy.asked().remove(0);
    assert!(
        head.starts_with("CONNECT box.example:80 HTTP/1.1\r\nHost: box.example:80\r\n"),
        "{head}"
    );
    assert!(
        head.contains("\r\nUser-Agent: tunneld/") && !head.contains("X-Secret"),
        "{head}"
    );
}

#[test]
fn a_socks_proxy_is_given_the_name_and_the_credentials() {
    let daemon = Daemon::start(&[]);
    let port = Target::echo().port;
    let open = Proxy::socks(daemon.address, false, 0);
    for scheme in ["socks5h", "socks5"] {
        let mut command = through(&format!("{scheme}://{}", open.address), port);
        command.args(["-H", "Host: localhost"]);
        echoes(command);
    }
    assert_eq!(open.asked(), ["box.example:80", "box.example:80"]);
    let closed = Proxy::socks(daemon.address, true, 0);
    let url = format!("socks5h://user:s3cret@{}", closed.address);
    let to_address = format!("ws://{}", daemon.address);
    echoes(Connect::command(
        &to_address,
        &["-W", &port.to_string(), "--proxy", &url],
    ));
    assert_eq!(
        closed.asked(),
        [format!("[127, 0, 0, 1]:{}", daemon.address.port())]
    );
}

#[test]
fn the_variables_lead_to_the_proxy_but_not_to_this_machine() {
    let daemon = Daemon::start(&[]);
    let target = Target::echo();
    let proxy = Proxy::http(daemon.address, "", "");
    let url = format!("http://{}", proxy.address);
    let port = target.port.to_string();
    for (name, count) in [("http_proxy", 1), ("HTTP_PROXY", 2), ("ALL_PROXY", 3)] {
        let mut command =
            Connect::command("ws://box.example:81", &["-W", &port, "-HHost:localhost"]);
        command.env(name, &url);
        echoes(command);
        assert_eq!(proxy.asked().len(), count, "{name}");
    }
    let mut command = Connect::command(&format!("ws://{}", daemon.address), &["-W", &port]);
    command.env("all_proxy", &url);
    echoes(command);
    assert_eq!(proxy.asked().len(), 3);
    let mut command = Connect::command("ws://box.invalid", &["-W", &port]);
    command
        .env("all_proxy", &url)
        .env("no_proxy", ".invalid:80");
    Connect::spawn(command).broke("cannot connect to box.invalid:80: its name does not resolve");
    assert_eq!(proxy.asked().len(), 3);
}

#[test]
fn a_refusal_of_the_proxys_is_told_as_the_proxys() {
    let nowhere = closed_port();
    let nowhere = SocketAddr::from(([127, 0, 0, 1], nowhere.port));
    let http = |refusal| Proxy::http(nowhere, "never", refusal);
    let of = |proxy: &Proxy, scheme: &str, part: &str| {
        let url = format!("{scheme}{}", proxy.address);
        let sentence = Connect::spawn(through(&url, 1)).broke(part);
        let named = format!("the proxy {} (from --proxy)", proxy.address);
        assert!(
            sentence.contains(&named) && !sentence.contains("s3cret"),
            "{sentence}"
        );
    };
    let with_password = "http://user:s3cret@";
    let refused = "refused to connect to box.example:80 with ";
    of(
        &http(REFUSAL),
        "http://",
        &format!("{refused}407 Proxy Authentication Required; put its user"),
    );
    of(
        &http(REFUSAL),
        with_password,
        &format!("{refused}407 Proxy Authentication Required; check the user"),
    );
    let other_ways =
        "HTTP/1.1 407 x\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\n\r\n";
    for scheme in ["http://", with_password] {
        of(
            &http(other_ways),
            scheme,
            &format!("{refused}407 x; it wants Negotiate or NTLM, and only Basic is supported: "),
        );
    }
    let echo = "HTTP/1.1 403 user:s3cret dXNlcjpzM2NyZXQ=\r\n\r\n";
    of(
        &http(echo),
        with_password,
        &format!("{refused}403 user:(the proxy's password) (the proxy's password)"),
    );
    of(
        &http("HTTP/1.1 503 Service Unavailable\r\n\r\n"),
        "",
        &format!("{refused}503 Service Unavailable"),
    );
    of(
        &http("HTTP/1.1 200 OK\r\n\r\nwelcome"),
        "",
        "sends bytes that nobody asked for",
    );
    of(
        &http("SSH-2.0-x\r\n"),
        "",
        "is no HTTP proxy: it does not speak HTTP/1.1",
    );
    let other = |answer: &'static [u8]| {
        Proxy::to(nowhere, move |near| {
            assert!(near.read(&mut [0; 1000]).unwrap() > 0);
            near.write_all(answer).unwrap();
            (String::new(), false)
        })
    };
    of(
        &other(b""),
        "socks5h://",
        "closed the connection without an answer",
    );
    of(
        &other(b"HTTP/1.0 400 x\r\n\r\n"),
        "socks5h://",
        "does not speak SOCKS5: is it an HTTP proxy?",
    );
    of(
        &other(b""),
        "http://",
        "closed the connection without an answer",
    );
    let socks = |wants_password, code| Proxy::socks(nowhere, wants_password, code);
    of(&socks(true, 0), "socks5h://", "wants a user and a password");
    of(
        &socks(true, 0),
        "socks5h://user:S3cret@",
        "refused the user and the password",
    );
    of(&socks(false, 2), "socks5h://", "not allowed by its rules");
    of(
        &socks(false, 5),
        "socks5h://",
        "refused to connect to box.example:80: connection refused",
    );
    let closed = closed_port();
    let url = format!("http://user:s3cret@127.0.0.1:{}", closed.port);
    Connect::spawn(through(&url, 1)).broke("cannot connect to the proxy 127.0.0.1:");
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = through(&silent.local_addr().unwrap().to_string(), 1);
    command.args(["--dial-timeout", "100ms"]);
    Connect::spawn(command).broke("no answer from the proxy");
}

#[test]
fn at_the_start_a_proxy_that_refuses_for_good_is_an_error_and_one_that_does_not_reach_the_daemon_a_warning()
 {
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    let start = |refusal| {
        let proxy = Proxy::http(nowhere, "never", refusal);
        let url = format!("http://{}", proxy.address);
        let options = ["-L", "127.0.0.1:0:80", "--proxy", &url];
        Connect::spawn(Connect::command("ws://box.example", &options))
    };
    start(REFUSAL).broke("407");
    // tinyproxy says 500.
    for refusal in [
        "HTTP/1.1 503 Service Unavailable\r\n\r\n",
        "HTTP/1.0 500 Unable to connect\r\n\r\n",
    ] {
        let client = start(refusal);
        client.logged("the daemon is not there yet: the proxy");
        client.logged("connecting to box.example:80 through the proxy");
        client.address();
    }
}

#[test]
fn a_proxy_that_does_not_reach_the_daemon_yet_is_asked_again() {
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    let proxy = Proxy::http(nowhere, "never", "HTTP/1.0 500 Unable to connect\r\n\r\n");
    let mut command = through(&format!("http://{}", proxy.address), 1);
    command.args(["--wait", "1h"]);
    let client = Connect::spawn(command);
    client.logged("trying again for ");
    within(LIMIT, "it is asked again", || {
        (proxy.asked().len() > 2).then_some(())
    });
}

/// The proxy may be anywhere, whatever the daemon's name is.
#[test]
fn a_token_that_goes_to_a_proxy_in_the_clear_is_warned_about() {
    for (proxy, lines) in [("192.0.2.1:1", 2), ("127.0.0.1:1", 1)] {
        let options = ["-W", "1", "--proxy", proxy, "--dial-timeout", "1ms"];
        let mut command = Connect::command("ws://localhost", &options);
        command.env("TUNNELD_ACCESS_TOKEN", TOKEN);
        let (code, stderr) = Connect::spawn(command).ended();
        assert_eq!((code, stderr.lines().count()), (1, lines), "{stderr}");
        assert_eq!(stderr.contains(" unencrypted,"), lines == 2, "{stderr}");
    }
}

#[test]
fn a_proxys_url_that_makes_no_sense_is_one_line_that_does_not_show_it() {
    for url in [
        "https://user:s3cret@p:1",
        "socks4://p",
        "http://user:s3cret@",
        "p:0",
        "http://s3cret:x@a b",
    ] {
        crate::forward::is_wrong(
            &["-W", "1", "--proxy", url],
            "http://[USER:PASSWORD@]HOST:PORT",
        );
    }
    let mut command = Connect::command("ws://box.example", &["-W", "1"]);
    command.env("http_proxy", "ftp://user:s3cret@p");
    let (code, stderr) = fails_to_start(command);
    assert!(
        code == 2 && stderr.contains("http_proxy ") && !stderr.contains("s3cret"),
        "{stderr}"
    );
}

/// What a proxy sends behind the head of its answer is nobody's.
#[test]
fn an_answer_in_pieces_is_read_whole() {
    let daemon = Daemon::start(&[]);
    let proxy = Proxy::to(daemon.address, |near| {
        let mut head = [0; 4096];
        let count = near.read(&mut head).unwrap();
        near.set_nodelay(true).unwrap();
        for byte in b"HTTP/1.1 200 OK\r\nVia: x\r\nContent-Length: 9\r\n\r\n" {
            near.write_all(&[*byte]).unwrap();
        }
        (String::from_utf8_lossy(&head[..count]).into_owned(), true)
    });
    let mut command = through(&proxy.address.to_string(), Target::echo().port);
    command.args(["-H", "Host: localhost"]);
    echoes(command);
}
