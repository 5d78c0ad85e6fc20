//! What a server says, made fit for a terminal and a log line.

use std::fmt;
use std::sync::Arc;

use crate::logging::steers_a_terminal;

/// How many characters of what a server says are shown.
const MAX_SHOWN: usize = 500;

/// So many characters of a secret in a row are masked, whatever is before and after them.
const MIN_PART: usize = 8;

/// So many are, where a text ends in the midst of a secret: somebody may have cut it.
const MIN_CUT: usize = 4;

/// Shows what a server says, without the token and other secrets: a server may send back what it was asked. It can't
/// be printed.
#[derive(Clone)]
pub struct Redactor {
    secrets: Vec<Secret>,
}

#[derive(Clone)]
struct Secret {
    value: Arc<str>,
    mask: &'static str,
}

impl Redactor {
    /// One that masks `token`.
    pub fn new(token: Option<&str>) -> Redactor {
        let redactor = Redactor {
            secrets: Vec::new(),
        };
        redactor.and(token, "(the token)")
    }

    /// The same, which shows `mask` in place of each of `secrets`, too. None of them is empty.
    pub fn and<'a>(
        mut self,
        secrets: impl IntoIterator<Item = &'a str>,
        mask: &'static str,
    ) -> Redactor {
        self.secrets.extend(secrets.into_iter().map(|value| Secret {
            value: value.into(),
            mask,
        }));
        self
    }

    /// `text` on one line, with the secrets masked and what could steer a terminal escaped; no more than its first
    /// 500 characters.
    pub fn printable(&self, text: &str) -> String {
        let mut shown = String::new();
        let mut rest = text.trim();
        for _ in 0..MAX_SHOWN {
            let Some(character) = rest.chars().next() else {
                return shown;
            };
            if character.is_whitespace() {
                shown.push(' ');
                rest = rest.trim_start();
            } else if let Some((length, mask)) = self.secret_at(rest) {
                shown.push_str(mask);
                rest = &rest[length..];
            } else {
                if steers_a_terminal(character) {
                    shown.extend(character.escape_unicode());
                } else {
                    shown.push(character);
                }
                rest = &rest[character.len_utf8()..];
            }
        }
        if !rest.is_empty() {
            shown.push('…');
        }
        shown
    }

    /// How many bytes of a secret `text` begins with, and what to show instead. The longest, if there are several.
    fn secret_at(&self, text: &str) -> Option<(usize, &'static str)> {
        let found = self.secrets.iter().filter_map(|secret| {
            let length = length_at(secret.value.as_bytes(), text.as_bytes())?;
            Some((length, secret.mask))
        });
        found.max_by_key(|(length, _)| *length)
    }
}

/// How many bytes of `secret`, or of a part of it that tells too much, `text` begins with.
fn length_at(secret: &[u8], text: &[u8]) -> Option<usize> {
    let least = secret.len().min(MIN_PART);
    let runs = (0..secret.len()).flat_map(|start| {
        let part = &secret[start..];
        let runs = [
            common_run(part, text, &[literal]),
            common_run(part, text, &[unescaped, literal]),
        ];
        runs.map(|(count, length)| {
            let is_cut = start == 0 && length == text.len() && count >= MIN_CUT;
            if count >= least || is_cut { length } else { 0 }
        })
    });
    runs.max().filter(|&length| length > 0)
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Redactor")
    }
}

/// The byte that a text begins with as some encoding has it, and how long it is written.
type Decode = fn(&[u8]) -> Option<(u8, usize)>;

/// How many bytes of `part` the text begins with, and how long they are written in it, each as the first of
/// `encodings` has it that leads on.
fn common_run(part: &[u8], text: &[u8], encodings: &[Decode]) -> (usize, usize) {
    let mut length = 0;
    for (count, &byte) in part.iter().enumerate() {
        let mut read = encodings
            .iter()
            .filter_map(|decode| decode(&text[length..]));
        match read.find(|&(found, _)| found == byte) {
            Some((_, written)) => length += written,
            None => return (count, length),
        }
    }
    (part.len(), length)
}

fn literal(text: &[u8]) -> Option<(u8, usize)> {
    text.first().map(|&byte| (byte, 1))
}

/// As a URL, JSON and HTML escape it.
fn unescaped(text: &[u8]) -> Option<(u8, usize)> {
    match text {
        [b'%', ..] => number(text.get(1..3)?, 16).map(|byte| (byte, 3)),
        [b'\\', b'u', ..] => number(text.get(2..6)?, 16).map(|byte| (byte, 6)),
        [b'\\', byte, ..] if byte.is_ascii_punctuation() => Some((*byte, 2)),
        [b'&', ..] => entity(text),
        _ => None,
    }
}

fn entity(text: &[u8]) -> Option<(u8, usize)> {
    const LONGEST: usize = 8;
    let end = text.iter().take(LONGEST).position(|&byte| byte == b';')?;
    let byte = match &text[1..end] {
        b"amp" => b'&',
        b"lt" => b'<',
        b"gt" => b'>',
        b"quot" => b'"',
        b"apos" => b'\'',
        [b'#', b'x' | b'X', digits @ ..] => number(digits, 16)?,
        [b'#', digits @ ..] => number(digits, 10)?,
        _ => return None,
    };
    Some((byte, end + 1))
}

fn number(digits: &[u8], radix: u32) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, radix).ok()
}

#[cfg(test)]
mod tests {
    use super::Redactor;

    #[test]
    fn what_a_server_says_cannot_steer_a_terminal_and_stays_on_one_line() {
        let shown = |text: &str| Redactor::new(None).printable(text);
        assert_eq!(
            shown(" caf\u{e9} \u{1b}[2J\r\n\r\n\tnext\u{9b}\n"),
            "caf\u{e9} \\u{1b}[2J next\\u{9b}"
        );
        assert_eq!(shown("\u{202e}abc"), "\\u{202e}abc");
        assert_eq!(shown(&"x".repeat(500)), "x".repeat(500));
        assert_eq!(shown(&"x".repeat(9999)).chars().count(), 501);
    }

    #[test]
    fn the_token_is_masked_however_it_is_written() {
        let shown = |text: &str| Redactor::new(Some("s3/cret+t0ken\"&%41")).printable(text);
        for (text, masked) in [
            ("no s3/cret+t0ken\"&%41!", "no (the token)!"),
            ("?t=s3%2Fcret%2bt0ken%22%26%2541&", "?t=(the token)&"),
            ("%733%2Fcret%2Bt0ken%22%26%2541", "(the token)"),
            (r#""s3\/cret\u002bt0ken\"&%41""#, r#""(the token)""#),
            ("s3/cret&#43;t0ken&quot;&amp;%41", "(the token)"),
            ("s3/cret&#x2B;t0ken&#34;&amp;%41 é", "(the token) é"),
            // All but a character, a part, and one that the text ends in.
            ("*3/cret+t0ken\"&%41", "*(the token)"),
            ("s3/cret+t0ken\"&%4*", "(the token)*"),
            ("x cret+t0k y", "x (the token) y"),
            ("x s3/c", "x (the token)"),
            // What says nothing of it.
            ("x s3/c y", "x s3/c y"),
            (
                "cret token \\u00 %4 &#; &amp; %",
                "cret token \\u00 %4 &#; &amp; %",
            ),
        ] {
            assert_eq!(shown(text), masked, "{text}");
        }
        let at_the_cut = format!("{}s3/cret+t0ken\"&%41", "x".repeat(490));
        assert_eq!(
            shown(&at_the_cut),
            format!("{}(the token)", "x".repeat(490))
        );
        assert_eq!(
            Redactor::new(Some("ab")).printable("a ab b"),
            "a (the token) b"
        );
        assert_eq!(format!("{:?}", Redactor::new(Some("s3cret"))), "Redactor");
        let several = Redactor::new(Some("t0ken-t0ken")).and(["s3cret-value"], "(a header)");
        assert_eq!(
            several.printable("t0ken-t0ken, s3cret-value"),
            "(the token), (a header)"
        );
    }
}
