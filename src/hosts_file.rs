//! Complete names in `/etc/hosts`: a resolver finds those without the dot at their end alone, but without it completes
//! what it doesn't find.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;

/// The most of the file that is read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// The addresses of `name`, which has no dot at its end, in `/etc/hosts`. None if the file can't be read.
pub fn look_up(name: &str) -> Vec<IpAddr> {
    let mut bytes = Vec::new();
    let read =
        File::open("/etc/hosts").and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes));
    match read {
        Ok(_) => find(&String::from_utf8_lossy(&bytes), name),
        Err(_) => Vec::new(),
    }
}

/// hosts(5): an address and its names on each line, up to a #.
fn find(text: &str, name: &str) -> Vec<IpAddr> {
    let address = |line: &str| {
        let mut words = line.split('#').next()?.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words
            .any(|word| word.eq_ignore_ascii_case(name))
            .then_some(address)
    };
    text.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_the_addresses_of_its_lines() {
        let text = "127.0.0.1 localhost\n\n10.0.0.1\tdb.test Db # x.test\n::1 db.test\n#1.1.1.1 db\nx db\n";
        let found = |name| {
            find(text, name)
                .iter()
                .map(IpAddr::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(found("db.test"), ["10.0.0.1", "::1"]);
        assert_eq!(found("db"), ["10.0.0.1"]);
        assert!(found("x.test").is_empty() && found("10.0.0.1").is_empty() && found("").is_empty());
    }
}
