//! Whole frames from several threads, on real sockets.

use std::io::Read;
use std::net::{Shutdown, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::*;
use crate::os;

const ROLES: [Role; 2] = [Role::Daemon, Role::Client];

/// More than both sockets' buffers hold.
const MUCH: usize = 8 * 1024 * 1024;

fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    peer.set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    (stream, peer)
}

fn writer(role: Role) -> (Arc<FrameWriter>, TcpStream) {
    let (socket, peer) = connection();
    let activity = Arc::new(Activity::new());
    let endpoint = Endpoint {
        role,
        protocol: Protocol::WebSocket,
    };
    let writer = FrameWriter::new(Arc::new(socket), endpoint, activity);
    (Arc::new(writer), peer)
}

fn message(byte: u8, payload: usize) -> Vec<u8> {
    vec![byte; HEADER_ROOM + payload]
}

/// A message of [`MUCH`] that is being written, and waits.
fn blocked(writer: &Arc<FrameWriter>) -> thread::JoinHandle<Result<(), WriteFailure>> {
    let sender = Arc::clone(writer);
    let sending = thread::spawn(move || sender.send_message(&mut message(1, MUCH)));
    let limit = Instant::now() + Duration::from_secs(30);
    while !os::ready(&*writer.socket, PollFlags::OUT).is_empty() {
        assert!(Instant::now() < limit, "the write never waits");
        thread::yield_now();
    }
    sending
}

/// The next frame: its opcode, its payload, and its mask.
fn frame(peer: &mut TcpStream) -> (u8, Vec<u8>, Option<[u8; 4]>) {
    fn bytes<const N: usize>(peer: &mut TcpStream) -> [u8; N] {
        let mut bytes = [0; N];
        peer.read_exact(&mut bytes).unwrap();
        bytes
    }
    let [first, length] = bytes(peer);
    assert_eq!(first & 0xf0, 0x80);
    let payload = match length & 0x7f {
        126 => u64::from(u16::from_be_bytes(bytes(peer))),
        127 => u64::from_be_bytes(bytes(peer)),
        short => u64::from(short),
    };
    let mask = (length & 0x80 != 0).then(|| bytes(peer));
    let mut payload = vec![0; payload as usize];
    peer.read_exact(&mut payload).unwrap();
    if let Some(mask) = mask {
        apply_mask(&mut payload, mask);
    }
    (first & 0x0f, payload, mask)
}

fn close(peer: &mut TcpStream) -> (u16, String) {
    let (opcode, payload, _) = frame(peer);
    assert_eq!(opcode, 8);
    let code = u16::from_be_bytes([payload[0], payload[1]]);
    (code, String::from_utf8(payload[2..].to_vec()).unwrap())
}

/// Everything that is on its way until the writing side is shut down.
fn rest(writer: &FrameWriter, peer: &mut TcpStream) -> Vec<u8> {
    writer.socket.shutdown(Shutdown::Write).unwrap();
    let mut bytes = Vec::new();
    peer.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Each thing there is to be sent, from a thread of its own. None of them waits.
fn send_everything(writer: &Arc<FrameWriter>) {
    let sends: [fn(&FrameWriter); 6] = [
        FrameWriter::ping,
        |writer| writer.answer_ping(b"pong".to_vec()),
        |writer| drop(writer.send_message(&mut message(9, 9))),
        |writer| drop(writer.send_close(&Farewell::Orderly)),
        FrameWriter::flush,
        FrameWriter::flush_before_read,
    ];
    for send in sends {
        let writer = Arc::clone(writer);
        thread::spawn(move || send(&writer)).join().unwrap();
    }
}

#[test]
fn a_ping_goes_out_between_two_messages_once() {
    for role in ROLES {
        let (writer, mut peer) = writer(role);
        let sending = blocked(&writer);
        // Neither waits.
        writer.ping();
        writer.ping();
        assert!(writer.is_ping_pending());
        let next = Arc::clone(&writer);
        let reading = thread::spawn(move || [(); 3].map(|()| frame(&mut peer)));
        sending.join().unwrap().unwrap();
        next.send_message(&mut message(2, 10)).unwrap();
        let [first, ping, second] = reading.join().unwrap();
        assert!((first.0, &first.1) == (2, &vec![1; MUCH]));
        assert_eq!(ping.0, 9);
        assert_eq!(FrameWriter::mark_of(&ping.1), Some(MUCH as u64));
        assert_eq!((second.0, second.1), (2, vec![2; 10]));
        assert!(!writer.is_ping_pending());
        for mask in [first.2, ping.2, second.2] {
            assert_eq!(mask.is_some(), role.masks());
        }
    }
}

#[test]
fn behind_a_message_the_newest_pong_the_ping_and_the_first_close_go_out() {
    for role in ROLES {
        let (writer, mut peer) = writer(role);
        let sending = blocked(&writer);
        writer.queue_close(&Farewell::Shutdown);
        writer.queue_close(&Farewell::Orderly);
        writer.ping();
        writer.answer_ping(b"old".to_vec());
        writer.answer_ping(b"new".to_vec());
        assert_eq!(frame(&mut peer).1.len(), MUCH);
        let (opcode, payload, _) = frame(&mut peer);
        assert_eq!((opcode, payload), (10, b"new".to_vec()));
        assert_eq!(frame(&mut peer).0, 9);
        assert_eq!(
            close(&mut peer),
            (1001, "the daemon is shutting down".to_owned())
        );
        sending.join().unwrap().unwrap();
        assert_eq!(rest(&writer, &mut peer), b"");
    }
}

/// A write that fails and leaves the socket as it is: one with a timeout.
/// What has arrived is all of some `frame`s, and perhaps a part of one.
fn torn(role: Role, frame: &[u8], write: impl Fn(&FrameWriter) -> Result<(), WriteFailure>) {
    let (writer, mut peer) = writer(role);
    let limit = Duration::from_millis(50);
    writer.socket.set_write_timeout(Some(limit)).unwrap();
    let failure = std::iter::repeat_with(|| write(&writer)).find_map(Result::err);
    assert!(matches!(failure, Some(WriteFailure::Failed(_))));
    let socket = Arc::clone(&writer.socket);
    let reading = thread::spawn(move || {
        let mut bytes = Vec::new();
        peer.read_to_end(&mut bytes).unwrap();
        bytes
    });
    // So that everything could go out.
    let limit = Instant::now() + Duration::from_secs(30);
    while os::ready(&*socket, PollFlags::OUT).is_empty() {
        assert!(Instant::now() < limit, "there is no room");
        thread::yield_now();
    }
    send_everything(&writer);
    assert_eq!(writer.send_message(&mut message(3, 3)).err(), failure);
    socket.shutdown(Shutdown::Write).unwrap();
    let bytes = reading.join().unwrap();
    let ping = PING_TAG.as_slice();
    assert!(!bytes.windows(ping.len()).any(|window| window == ping));
    // Each mask is another, but for the daemon's.
    if !role.masks() {
        let whole = frame.repeat(bytes.len() / frame.len() + 1);
        assert!(!bytes.is_empty() && whole.starts_with(&bytes));
    }
}

#[test]
fn nothing_follows_a_torn_frame_from_whichever_thread() {
    for role in ROLES {
        let header = [&[0x82, 127][..], &(MUCH as u64).to_be_bytes()].concat();
        let frame = [header, vec![1; MUCH]].concat();
        torn(role, &frame, |writer| {
            writer.send_message(&mut message(1, MUCH))
        });
    }
}

#[test]
fn nothing_follows_a_torn_frame_that_was_spliced() {
    // Too little to make the pipe a large one.
    const SOME: usize = 16 * 1024;
    let (mut source, sink) = connection();
    let mut pipe = Pipe::new().unwrap();
    let pipe = std::sync::Mutex::new((&mut source, &mut pipe));
    let frame = [&[0x82, 126, 0x40, 0][..], &[1; SOME]].concat();
    torn(Role::Daemon, &frame, |writer| {
        let (source, pipe) = &mut *crate::lock::lock(&pipe);
        source.write_all(&[1; SOME]).unwrap();
        while pipe.held() < SOME {
            pipe.fill(&sink).unwrap();
        }
        writer.send_from(pipe, SOME)
    });
}

#[test]
fn after_our_close_only_control_frames_are_sent() {
    for role in ROLES {
        let (writer, mut peer) = writer(role);
        writer.send_close(&Farewell::Orderly).unwrap();
        let sent = writer.send_message(&mut message(1, 1));
        assert_eq!(sent, Err(WriteFailure::Aborted));
        writer.ping();
        writer.answer_ping(b"pong".to_vec());
        writer.send_close(&Farewell::Shutdown).unwrap();
        assert_eq!(close(&mut peer), (1000, String::new()));
        assert_eq!(frame(&mut peer).0, 9);
        let (opcode, payload, _) = frame(&mut peer);
        assert_eq!((opcode, payload), (10, b"pong".to_vec()));
        assert_eq!(rest(&writer, &mut peer), b"");
    }
}

#[test]
fn nothing_is_sent_while_it_is_held_and_all_that_is_pending_behind_it() {
    let (writer, mut peer) = writer(Role::Daemon);
    let held = writer.hold();
    writer.ping();
    writer.answer_ping(b"pong".to_vec());
    peer.set_nonblocking(true).unwrap();
    assert!(peer.read(&mut [0]).is_err());
    peer.set_nonblocking(false).unwrap();
    drop(held);
    writer.flush();
    assert_eq!(frame(&mut peer).0, 10);
    assert_eq!(frame(&mut peer).0, 9);
}

#[test]
fn nothing_is_sent_any_more_when_it_was_held_and_closed() {
    let (writer, mut peer) = writer(Role::Daemon);
    writer.hold().close();
    send_everything(&writer);
    assert_eq!(rest(&writer, &mut peer), b"");
}

#[test]
fn a_reason_that_is_too_long_is_cut_between_two_characters() {
    let (writer, mut peer) = writer(Role::Daemon);
    let why = format!("x{}", "€".repeat(100));
    writer.send_close(&Farewell::Protocol(why.clone())).unwrap();
    let (code, reason) = close(&mut peer);
    assert_eq!(code, 1002);
    assert!(why.starts_with(&reason) && (121..=123).contains(&reason.len()));
}

#[test]
fn only_a_pong_to_a_ping_of_ours_has_a_mark() {
    for foreign in [&b""[..], b"tunneld:", b"tunneld:1234567", b"12345678"] {
        assert_eq!(FrameWriter::mark_of(foreign), None, "{foreign:?}");
    }
    assert_eq!(
        FrameWriter::mark_of(b"tunneld:\0\0\0\0\0\0\x01\x02"),
        Some(258)
    );
}
