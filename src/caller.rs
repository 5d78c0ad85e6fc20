//! The client that a dial is for, and whether it is still there.
//!
//! A dial waits for others, up to its timeout. A client that is gone must not keep its slot, its thread or its turn at
//! the resolver for so long: whoever sends requests and resets them would keep everybody else out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, recv};

use crate::os;

/// How often a caller is looked at by one who waits for something that is no descriptor.
pub const LOOK: Duration = Duration::from_millis(250);

/// A client that waits for the answer to its request head.
#[derive(Debug, Clone, Copy)]
pub struct Caller<'a> {
    /// Its connection.
    pub client: &'a TcpStream,
    /// Its address.
    pub peer: IpAddr,
    /// Bytes for the target that came along with its head have been read.
    pub has_sent_more: bool,
}

impl Caller<'_> {
    /// Its connection, to be waited for in a poll with others. When that returns, ask [`Caller::is_gone`].
    pub fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(self.client, events(self.client, self.has_sent_more))
    }

    /// See [`is_gone`].
    pub fn is_gone(&self) -> bool {
        is_gone(self.client, self.has_sent_more)
    }

    /// Whose share of a bound this client has a part in: its address, or for IPv6 the network of 64 bits, all of
    /// which a client may have. All of loopback is one, as any program of this machine may connect from any of it.
    pub fn owner(&self) -> IpAddr {
        match self.peer.to_canonical() {
            local if local.is_loopback() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(address) => {
                let network = address.to_bits() >> 64 << 64;
                Ipv6Addr::from_bits(network).into()
            }
            v4 @ IpAddr::V4(_) => v4,
        }
    }
}

/// Whether the connection of a client has failed, or ended without a byte for the target. With `has_sent_more` there were
/// some, which have been read.
///
/// Most clients that go away just close, which looks like a half-closed connection. One that has sent nothing for
/// its tunnel before that never will, not even the Close that an orderly end needs. One that has, may have sent
/// all of it up to its Close and be reading: it has its tunnel.
pub fn is_gone(client: &TcpStream, has_sent_more: bool) -> bool {
    let seen = os::ready(client, events(client, has_sent_more));
    let failed = PollFlags::ERR | PollFlags::HUP;
    // The bytes may have come after the poll was told what to look for.
    seen.intersects(failed) || seen.contains(PollFlags::RDHUP) && !has_bytes(client, has_sent_more)
}

/// Failures are seen in any case. With its bytes lying there its end would be seen again and again.
fn events(client: &TcpStream, has_sent_more: bool) -> PollFlags {
    if has_bytes(client, has_sent_more) {
        PollFlags::empty()
    } else {
        PollFlags::RDHUP
    }
}

fn has_bytes(client: &TcpStream, has_sent_more: bool) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    has_sent_more || matches!(recv(client, &mut [0; 1], flags), Ok((1.., _)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{Shutdown, TcpListener};

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    fn caller(client: &TcpStream) -> Caller<'_> {
        Caller {
            client,
            peer: client.peer_addr().unwrap().ip(),
            has_sent_more: false,
        }
    }

    /// Waits until its end has arrived.
    fn ended(client: &TcpStream) -> &TcpStream {
        os::wait(&mut [PollFd::new(client, PollFlags::RDHUP)], None).unwrap();
        client
    }

    #[test]
    fn a_client_that_closes_or_resets_is_gone() {
        let (near, far) = pair();
        assert!(!caller(&far).is_gone());
        drop(near);
        assert!(caller(ended(&far)).is_gone());
        let (near, far) = pair();
        rustix::net::sockopt::set_socket_linger(&near, Some(Duration::ZERO)).unwrap();
        (&near).write_all(b"x").unwrap();
        let caller = caller(&far);
        drop(near);
        ended(&far);
        assert!(caller.is_gone(), "also with bytes unread");
    }

    #[test]
    fn a_half_closed_client_that_has_sent_something_is_there_and_wakes_nobody() {
        let (near, far) = pair();
        (&near).write_all(b"x").unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        let caller = caller(ended(&far));
        assert!(!caller.is_gone());
        assert!(!os::wait(&mut [caller.poll_fd()], Some(Duration::ZERO)).unwrap());
        let (near, far) = pair();
        near.shutdown(Shutdown::Write).unwrap();
        let with_early = Caller {
            has_sent_more: true,
            ..self::caller(ended(&far))
        };
        assert!(!with_early.is_gone());
    }

    #[test]
    fn an_ipv6_client_is_its_network_and_a_local_one_all_of_loopback() {
        let (near, _far) = pair();
        let owner = |peer: &str| {
            let caller = Caller {
                peer: peer.parse().unwrap(),
                ..caller(&near)
            };
            caller.owner().to_string()
        };
        assert_eq!(owner("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(owner("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(owner("192.0.2.1"), "192.0.2.1");
        for local in ["127.0.0.1", "127.9.8.7", "::1", "::ffff:127.0.0.5"] {
            assert_eq!(owner(local), "127.0.0.1", "{local}");
        }
    }
}
