//! Access tokens: what they may be made of, and the comparison.

use std::fmt;

use subtle::{Choice, ConstantTimeEq};

/// The tokens any one of which opens the daemon. They can't be printed.
#[derive(Clone)]
pub struct Tokens(Vec<Box<[u8]>>);

impl Tokens {
    /// Takes each line of `text` as a token; blank lines and the space around a token don't count.
    ///
    /// # Errors
    /// The end of a sentence that begins with where the text came from. It never shows the text.
    pub fn parse(text: &str) -> Result<Tokens, &'static str> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let tokens: Vec<Box<[u8]>> = lines.map(|line| line.as_bytes().into()).collect();
        if tokens.is_empty() {
            return Err("is empty: put a token into it or don't set it");
        }
        // What can't stand in a header field (RFC 9110 §5.5) could never be presented.
        if !tokens
            .iter()
            .all(|token| token.iter().all(u8::is_ascii_graphic))
        {
            return Err("holds a token with characters other than visible ASCII");
        }
        Ok(Tokens(tokens))
    }

    /// Whether `presented` is one of the tokens, in a time that doesn't tell which bytes were right.
    pub fn accept(&self, presented: &[u8]) -> bool {
        let none = Choice::from(0);
        self.0
            .iter()
            .fold(none, |found, token| found | token.ct_eq(presented))
            .into()
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokens({} hidden)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::Tokens;

    #[test]
    fn every_line_is_a_token() {
        let tokens = Tokens::parse("old\n\n new \r\n").unwrap();
        assert!(tokens.accept(b"old") && tokens.accept(b"new"));
        for wrong in ["", "ol", "oldx", " new ", "old\nnew"] {
            assert!(!tokens.accept(wrong.as_bytes()), "{wrong:?}");
        }
    }

    #[test]
    fn what_cannot_be_presented_is_refused() {
        for text in ["", " \n\n", "two words", "t\u{e4}g", "bell\u{7}"] {
            assert!(Tokens::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn debug_output_hides_it() {
        let tokens = Tokens::parse("s3cret").unwrap();
        assert_eq!(format!("{tokens:?}"), "Tokens(1 hidden)");
    }
}
