//! Request heads: one is accepted if and only if it is one by the letter of RFC 9112; httparse and tiny_http take it as well;
//! its end does not depend on the reads, and no byte behind it is lost. An input is the size of the reads, and the bytes.
#![no_main]

use tunneld_fuzz::oracles::request_head;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let &[size, ref bytes @ ..] = input else {
        return;
    };
    let sizes = vec![usize::from(size) + 1; bytes.len() / (usize::from(size) + 1)];
    request_head::ends_where_it_ends(bytes, &sizes);
    request_head::is_one_by_the_letter(bytes);
    request_head::is_canonical(bytes);
    request_head::is_taken_by_tiny_http(bytes);
    let rest = vec![b'x'; usize::from(size) * 100];
    request_head::is_read_from_a_connection(&[bytes, &rest].concat());
});
