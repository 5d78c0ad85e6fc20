//! A daemon's URL, targets, -L, -D, -W, --listen and -H: what is accepted means the same written in full, a header is one line,
//! and the daemon dials what the client was told. An input is lines: a URL, a target, and others.
#![no_main]

use tunneld_fuzz::oracles::options;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let lines: Vec<_> = text.split('\n').take(8).collect();
    for line in &lines {
        options::a_host_means_itself(line);
        options::a_forward_means_the_same_written_in_full(line);
        options::a_header_is_one_line(line);
    }
    if let [url, to, ..] = lines[..] {
        options::the_daemon_dials_what_the_client_was_told(url, to);
    }
});
