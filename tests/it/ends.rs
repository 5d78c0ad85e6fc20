//! The table of ends, row by row.

use std::io::Write;
use std::net::Shutdown;

use crate::support::*;

#[test]
fn target_eof_reaches_the_client_as_close_1000() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let data = Random::new(5).bytes(3_000_000);
    for size in [0, 1, 125, 126, 65_536, 3_000_000] {
        let mut client = Client::open(&daemon, target.port);
        let mut server = target.accept();
        server.write_all(&data[..size]).unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        let (bytes, end) = client.see_all();
        assert!(bytes == data[..size], "{size}");
        assert_eq!(end, CLOSE_1000);
        client.send(b"still heard");
        client.finish();
        assert_eq!(read_to_end(&mut server), (b"still heard".to_vec(), true));
    }
}

#[test]
fn client_close_reaches_the_target_as_fin_and_its_answer_comes_back() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let data = Random::new(6).bytes(3_000_000);
    for size in [0, 1, 65_536, 3_000_000] {
        let mut client = Client::open(&daemon, target.port);
        let mut server = target.accept();
        client.send(&data[..size]);
        client.send_close(1000);
        let (bytes, orderly) = read_to_end(&mut server);
        assert!(bytes == data[..size] && orderly, "{size}");
        server.write_all(&data).unwrap();
        drop(server);
        let (bytes, end) = client.see_all();
        assert!(bytes == data, "{size}");
        assert_eq!(end, CLOSE_1000);
        assert_eq!(client.see(), Seen::Eof);
    }
}

#[test]
fn a_text_frame_is_close_1003() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    let mut client = Client::open(&daemon, target.port);
    let mut server = target.accept();
    client.send_frame(0x81, b"text");
    let hint = "binary frames only (websocat: --binary)".to_owned();
    assert_eq!(client.see(), Seen::Close(Some(1003), hint));
    assert_eq!(client.see(), Seen::Eof);
    assert_eq!(read_to_end(&mut server), (vec![], false));
}

#[test]
fn a_protocol_error_is_close_1002_and_a_reset_target() {
    let daemon = Daemon::start(&[]);
    let target = Target::listen();
    for (name, bytes) in [
        ("unmasked", vec![0x82, 0x01, b'x']),
        ("reserved bit", frame(0xc2, b"x")),
        ("reserved opcode", frame(0x83, b"x")),
        ("reserved control opcode", frame(0x8b, b"x")),
        ("continuation of nothing", frame(0x80, b"x")),
        (
            "message in a message",
            [frame(0x02, b"x"), frame(0x82, b"y")].concat(),
        ),
        ("fragmented ping", frame(0x09, b"x")),
        ("long ping", frame(0x89, &[0; 126])),
        (
            "length with the top bit",
            [&[0x82, 0xff][..], &[0xff; 8], &[0; 20]].concat(),
        ),
        ("one byte of a close code", frame(0x88, &[3])),
        ("close code 1005", frame(0x88, &1005u16.to_be_bytes())),
        ("close code 999", frame(0x88, &999u16.to_be_bytes())),
        (
            "close reason that is not UTF-8",
            frame(0x88, &[3, 0xe8, 0xff, 0xfe]),
        ),
    ] {
        let mut client = Client::open(&daemon, target.port);
        let mut server = target.accept();
        client.send_raw(&bytes);
        let (_, end) = client.see_all();
        assert!(
            matches!(&end, Seen::Close(Some(1002), reason) if !reason.is_empty()),
            "{name}: {end:?}"
        );
        assert_eq!(client.see(), Seen::Eof, "{name}");
        assert!(
            !read_to_end(&mut server).1,
            "{name}: the target sees a reset"
        );
    }
}
