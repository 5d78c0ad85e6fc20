//! Why a server does not upgrade, from the answer it gives instead.

use std::io::Read;
use std::time::{Duration, Instant};

use super::answer::Head;
use super::deadline::Until;
use super::failure::{Failure, Kind, Reason};
use super::redactor::Redactor;
use super::server::Server;

/// How much of a refusal's body is read.
const MAX_BODY: usize = 64 * 1024;

/// How long the body may take once the head is there.
const BODY_TIMEOUT: Duration = Duration::from_secs(1);

/// Reads the body behind `head`, of which `received` has come already, and tells of the failure that the answer is.
pub fn read(
    head: &Head,
    stream: Until<'_>,
    received: Vec<u8>,
    server: &Server,
    redactor: &Redactor,
) -> Failure {
    let status = head.status;
    let failure = |sentence: String, reason| Failure {
        sentence,
        kind: Kind::Answered(status, reason),
    };
    if let (301..=303 | 307 | 308, Some(location)) = (status, head.values("Location").next()) {
        let to = redactor.printable(location);
        let advice = match secure(location, server) {
            Some(url) => format!("use {}", redactor.printable(&url)),
            None => "redirects are not followed, use the daemon's own URL".into(),
        };
        let sentence = format!("refused with {status}: a redirect to {to}; {advice}");
        return failure(sentence, None);
    }
    let stream = stream.no_later_than(Instant::now() + BODY_TIMEOUT);
    let body = read_body(head, stream, received);
    let body = String::from_utf8_lossy(&body);
    let is_html = head.members("Content-Type").any(|kind| {
        let kind = kind.split(';').next().unwrap_or_default().trim();
        kind.eq_ignore_ascii_case("text/html")
    });
    let message = message(body.trim(), is_html);
    let said = redactor.printable(&message);
    let refused = match status {
        200..=299 => "answered without an upgrade, with",
        _ => "refused with",
    };
    let sentence = match redactor.printable(&head.reason) {
        _ if !said.is_empty() => format!("{refused} {status}: {said}"),
        reason if reason.is_empty() => format!("{refused} {status}"),
        reason => format!("{refused} {status} {reason}"),
    };
    failure(sentence, Reason::find(&message))
}

/// The URL to use instead of an unencrypted one, if `location` is on the same host and encrypted.
fn secure(location: &str, server: &Server) -> Option<String> {
    let mut url = server.url.join(location).ok()?;
    let is_secure = matches!(url.scheme(), "https" | "wss") && !server.is_tls();
    if !is_secure || url.host() != server.url.host() {
        return None;
    }
    url.set_scheme("wss").ok()?;
    // The options --host and --port make the query.
    url.set_query(None);
    url.set_fragment(None);
    Some(url.into())
}

/// Where a body ends (RFC 9112 §6.3).
enum Framing {
    Empty,
    Chunked,
    Length(usize),
    UntilEof,
}

impl Framing {
    fn of(head: &Head) -> Framing {
        let is_chunked = |coding: &str| coding.eq_ignore_ascii_case("chunked");
        if matches!(head.status, 204 | 304) {
            return Framing::Empty;
        }
        if head.members("Transfer-Encoding").any(is_chunked) {
            return Framing::Chunked;
        }
        let length = head.members("Content-Length").next();
        match length.and_then(|length| length.parse().ok()) {
            Some(length) => Framing::Length(length),
            None => Framing::UntilEof,
        }
    }

    /// The body in `bytes` as far as it has come, and whether it is whole.
    fn body<'a>(&self, bytes: &'a [u8]) -> (std::borrow::Cow<'a, [u8]>, bool) {
        match self {
            Framing::Empty => (Default::default(), true),
            Framing::Chunked => {
                let (body, is_whole) = unchunked(bytes);
                (body.into(), is_whole)
            }
            Framing::Length(length) => match bytes.get(..*length) {
                Some(body) => (body.into(), true),
                None => (bytes.into(), false),
            },
            Framing::UntilEof => (bytes.into(), false),
        }
    }
}

/// Whatever of it comes is better than nothing.
fn read_body(head: &Head, mut stream: Until<'_>, mut received: Vec<u8>) -> Vec<u8> {
    let framing = Framing::of(head);
    loop {
        let (body, is_whole) = framing.body(&received);
        if is_whole || received.len() >= MAX_BODY {
            return body.into_owned();
        }
        let mut more = [0; 4096];
        match stream.read(&mut more) {
            Ok(count @ 1..) => received.extend_from_slice(&more[..count]),
            Ok(_) | Err(_) => return body.into_owned(),
        }
    }
}

/// A body that was sent in chunks (RFC 9112 §7.1), and whether it is whole, or goes on with something else.
fn unchunked(mut bytes: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let (start, size) = match httparse::parse_chunk_size(bytes) {
            Ok(httparse::Status::Complete((start, size @ 1..))) => (start, size),
            Ok(httparse::Status::Partial) => return (body, false),
            Ok(httparse::Status::Complete(_)) | Err(_) => return (body, true),
        };
        let rest = &bytes[start..];
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let Some((chunk, behind)) = rest.split_at_checked(size) else {
            body.extend_from_slice(rest);
            return (body, false);
        };
        body.extend_from_slice(chunk);
        bytes = behind.strip_prefix(b"\r\n").unwrap_or(behind);
    }
}

/// What a body tells a person: the message of a tunneld, the title or the text of a page, or all of it.
fn message(body: &str, is_html: bool) -> String {
    let json = serde_json::from_str::<serde_json::Value>(body).ok();
    if let Some(message) = json.as_ref().and_then(|json| json["message"].as_str()) {
        return message.to_owned();
    }
    if !is_html {
        return body.to_owned();
    }
    let lower = body.to_ascii_lowercase();
    let title = lower.find("<title").and_then(|start| {
        let start = start + lower[start..].find('>')? + 1;
        let end = start + lower[start..].find("</title")?;
        Some(body[start..end].trim())
    });
    match title {
        Some(title) if !title.is_empty() => without_entities(title),
        _ => without_entities(&without_tags(body, &lower)),
    }
}

/// The text of `html`, of which `lower` is the copy in lower case.
fn without_tags(html: &str, lower: &str) -> String {
    let mut text = String::new();
    let mut at = 0;
    while let Some(tag) = lower[at..].find('<').map(|tag| at + tag) {
        text.push_str(&html[at..tag]);
        text.push(' ');
        let end = ["<script", "<style", "<!--"]
            .iter()
            .zip(["</script", "</style", "-->"])
            .find_map(|(start, end)| lower[tag..].starts_with(start).then_some(end))
            .map_or(Some(tag), |end| lower[tag..].find(end).map(|end| tag + end));
        let Some(end) = end.and_then(|end| Some(end + lower[end..].find('>')? + 1)) else {
            return text;
        };
        at = end;
    }
    text + &html[at..]
}

fn without_entities(text: &str) -> String {
    let entities = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#39;", "'"),
        ("&nbsp;", " "),
        ("&amp;", "&"),
    ];
    let replace = |text: String, (entity, character)| text.replace(entity, character);
    entities.into_iter().fold(text.to_owned(), replace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_becomes_a_sentence() {
        for (body, is_html, said) in [
            (
                r#"{"code":502,"message":"no \"target\""}"#,
                false,
                "no \"target\"",
            ),
            (r#"{"error":"x"}"#, false, r#"{"error":"x"}"#),
            ("<b>plain</b>", false, "<b>plain</b>"),
            (
                "<html><head><TITLE id=a>502 Bad &lt;Gateway&gt;</Title></head><body>x</body>",
                true,
                "502 Bad <Gateway>",
            ),
            (
                "<title></title><style>p{}</style><p>Log&nbsp;in</p><script>if (a<b) {}</script><!-- a>b -->please",
                true,
                "Log in please",
            ),
            ("a < b", true, "a"),
            ("<p>\u{130}\u{e9}<!-- \u{e9}", true, "\u{130}\u{e9}"),
        ] {
            let message = message(body, is_html);
            assert_eq!(Redactor::new(None).printable(&message), said, "{body}");
        }
    }

    #[test]
    fn a_body_in_chunks_is_put_together() {
        for (bytes, body, is_whole) in [
            ("3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n", "abcde", true),
            ("3\r\nabc\r\n2\r\nd", "abcd", false),
            ("3\r\nabc\r\n", "abc", false),
            ("3\r\nabc\r\nno", "abc", true),
            ("ffffffffffffffff\r\nab", "ab", false),
            ("", "", false),
        ] {
            assert_eq!(
                unchunked(bytes.as_bytes()),
                (body.into(), is_whole),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn a_redirect_to_the_same_host_under_tls_names_the_url_to_use() {
        let server = |url| Server::parse(url).unwrap();
        for (url, location, use_instead) in [
            (
                "ws://box",
                "https://box/tunnel?port=5",
                Some("wss://box/tunnel"),
            ),
            (
                "ws://box:80",
                "https://BOX:8443/a/tunnel#x",
                Some("wss://box:8443/a/tunnel"),
            ),
            ("ws://box", "https://login.box/?next=x", None),
            ("ws://box", "http://box/tunnel/", None),
            ("ws://box", "/tunnel/", None),
            ("wss://box", "https://box/tunnel/", None),
            ("ws://box", "https://", None),
        ] {
            assert_eq!(
                secure(location, &server(url)).as_deref(),
                use_instead,
                "{location}"
            );
        }
    }
}
