//! What is written on a command line: it means the same written in full, and the daemon dials what the client was told.

use tiny_http::{HTTPVersion, Header, Method};
use tunneld::exposed::{
    Destination, Forward, Headers, Host, ListenAddress, Request, Routed, Server, Target, To, route,
};

use super::request_head::OPEN;

/// A request of tiny_http with these headers, if they can be some.
pub fn request_with(target: String, headers: &[(String, String)]) -> Option<Request> {
    let headers = headers
        .iter()
        .map(|(name, value)| Header::from_bytes(name.as_bytes(), value.as_bytes()));
    let headers: Result<Vec<_>, ()> = headers.collect();
    Some(Request::new(
        Method::Get,
        target,
        HTTPVersion(1, 1),
        headers.ok()?,
    ))
}

/// A host that is accepted has one meaning.
pub fn a_host_means_itself(text: &str) {
    let Some(host) = Host::parse(text) else {
        return;
    };
    let shown = Target {
        host: host.clone(),
        port: 1,
    }
    .to_string();
    let shown = shown.strip_suffix(":1").unwrap();
    assert!(
        shown
            .chars()
            .all(|c| c.is_ascii_graphic() && !"%/@#?\\".contains(c)),
        "{shown}"
    );
    assert_eq!(Host::parse(shown), Some(host));
}

/// As it would be written in full.
fn printed(to: &Destination) -> String {
    let host = to.host.as_deref().unwrap_or_default();
    let host = if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    };
    format!("{host}:{}", to.port.unwrap_or_default())
}

/// `-L`, `-D`, `-W` and `--listen`.
pub fn a_forward_means_the_same_written_in_full(text: &str) {
    if let Ok(forward) = Forward::parse_fixed(text) {
        let To::Target(to) = &forward.to else {
            panic!("{forward:?}")
        };
        let full = format!("{}:{}", forward.bind, printed(to));
        assert_eq!(Forward::parse_fixed(&full), Ok(forward), "{full}");
    }
    if let Ok(forward) = Forward::parse_dynamic(text) {
        let full = forward.bind.to_string();
        assert_eq!(Forward::parse_dynamic(&full), Ok(forward), "{full}");
    }
    if let Ok(to) = Destination::parse(text) {
        let full = printed(&to);
        assert_eq!(Destination::parse(&full), Ok(to), "{full}");
    }
    if let Ok(listen) = ListenAddress::parse(text) {
        let full = listen.to_string();
        assert_eq!(ListenAddress::parse(&full), Ok(listen), "{full}");
    }
}

/// A header of `-H` is one line of a request, and none of those that frame it.
pub fn a_header_is_one_line(text: &str) {
    // A file's name.
    if text.starts_with('@') {
        return;
    }
    let Ok(headers) = Headers::parse(&[text.to_owned()]) else {
        return;
    };
    for (name, value) in headers.iter() {
        let head = format!("GET / HTTP/1.1\r\nX: y\r\n{name}: {value}\r\n\r\n");
        let mut slots = [httparse::EMPTY_HEADER; 3];
        let mut request = httparse::Request::new(&mut slots);
        assert_eq!(
            request.parse(head.as_bytes()),
            Ok(httparse::Status::Complete(head.len()))
        );
        assert_eq!(
            request.headers[1],
            httparse::Header {
                name,
                value: value.as_bytes()
            }
        );
        assert!(
            !name.eq_ignore_ascii_case("content-length") && !name.eq_ignore_ascii_case("upgrade")
        );
    }
}

/// A daemon's URL that is accepted means itself; and a daemon that is asked by it for what `-W` says dials that.
pub fn the_daemon_dials_what_the_client_was_told(url: &str, to: &str) {
    let Ok(server) = Server::parse(url) else {
        return;
    };
    assert_eq!(Server::parse(server.url.as_str()).as_ref(), Ok(&server));
    let (host, port) = to.rsplit_once(':').unwrap_or(("", to));
    let Ok(to) = Destination::parse(to) else {
        return;
    };
    let tunnel = ["/tunnel", "/tunnel/"].contains(&server.url.path());
    if !tunnel || server.check_free("-W", &["host", "port"]).is_err() {
        return;
    }
    let asked = server.url_to(&to);
    let target = format!("{}?{}", asked.path(), asked.query().unwrap());
    let headers = [
        ("Host", "localhost"),
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
    match route(&request_with(target, &headers).unwrap(), &OPEN) {
        Routed::Tunnel(upgrade) => {
            let bare = host
                .strip_prefix('[')
                .and_then(|rest| rest.strip_suffix(']'));
            let host = Host::parse(bare.unwrap_or(host)).unwrap();
            let port = port.parse().unwrap();
            assert_eq!(upgrade.target, Target { host, port });
        }
        refused => panic!("{asked}: {refused:?}"),
    }
}
