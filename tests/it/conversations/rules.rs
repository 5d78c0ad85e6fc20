//! What holds of a conversation over TCP whatever the tempo, and when an end is another than over TCP.

use std::fmt::{self, Display, Formatter};

use super::Accounts;
use super::script::{End, Script};
use super::side::{Account, Knows};

/// Between what the conversation was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Plain,
    /// The client is one of the test's own, which speaks the protocol itself.
    Daemon,
    /// The client dials the local port of `tunneld connect --listen`.
    Listen,
    /// The client is stdin, stdout and the exit code of `tunneld connect`.
    Stdio,
}

/// The rules that did not hold.
pub fn broken_by(mode: Mode, (client, target): &Accounts) -> Vec<String> {
    let mut broken = Vec::new();
    let mut note = |who: &str, what: Option<&str>| {
        broken.extend(what.map(|what| format!("{who} {what}")));
    };
    for rule in [
        sent_only,
        told_the_truth,
        told_of_breaks_alone,
        kept_in_order,
        told_at_all,
    ] {
        note("client", rule(client, target));
        note("target", rule(target, client));
    }
    if mode == Mode::Stdio {
        note("client", exited_truly(client, target));
    }
    broken
}

/// Every byte in its place.
fn sent_only(side: &Account, other: &Account) -> Option<&'static str> {
    (side.is_corrupt || side.received > other.written).then_some("got bytes that were not sent")
}

/// An orderly end is one, and comes behind the last byte.
fn told_the_truth(side: &Account, other: &Account) -> Option<&'static str> {
    side.eof?;
    match other.fin {
        None => Some("was told an orderly end that was not one"),
        Some(written) if written != side.received => {
            Some("was told an orderly end before the last byte")
        }
        Some(_) => None,
    }
}

/// Nothing breaks while the other side is there.
fn told_of_breaks_alone(side: &Account, other: &Account) -> Option<&'static str> {
    let told = side.broken?;
    (told < other.ended).then_some("saw it break while the other was there")
}

/// Whoever ended in order, and has read the other's orderly end, has done nothing that breaks anything.
fn kept_in_order(side: &Account, other: &Account) -> Option<&'static str> {
    let is_finished = other.fin.is_some() && other.eof.is_some() && other.end == End::Close;
    (is_finished && other.broken.is_none() && side.broken.is_some())
        .then_some("saw an orderly end as broken")
}

fn told_at_all(side: &Account, _: &Account) -> Option<&'static str> {
    side.hangs.then_some("waits for ever")
}

/// Exit code 0 says that every byte was delivered, and an orderly end behind the last of the target's. Of what was
/// delivered nobody can say whether it was read: a target that is half-closed takes bytes and the end until its very close.
fn exited_truly(client: &Account, target: &Account) -> Option<&'static str> {
    let exit = client.exit.as_ref().filter(|exit| exit.code == Some(0))?;
    let is_short = target.closed < exit.at && target.received < client.written;
    let came_late = client.last_write.is_some_and(|at| at > target.closed);
    if is_short && came_late && target.end == End::Close {
        return Some("exited with 0, and the target has closed with bytes to come");
    }
    let has_end = target.fin.is_some();
    (!has_end).then_some("exited with 0, and the target has no orderly end")
}

/// That a side came to know what it never knew over TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    who: &'static str,
    knows: Knows,
}

impl Difference {
    /// It may only not have been told yet.
    pub fn may_be_late(self) -> bool {
        self.knows != Knows::Broken
    }
}

impl Display for Difference {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let what = match self.knows {
            Knows::Nothing => "is told nothing, where TCP always says broken",
            Knows::End => "is told an orderly end alone, where TCP always says broken",
            Knows::Broken => "is told broken, where TCP never does",
        };
        write!(formatter, "{} {what}", self.who)
    }
}

/// Where `tunnelled` differs from all of the others. An end that a side came to over TCP only sometimes, it may come to
/// or not.
pub fn differences(
    mode: Mode,
    (of_client, _): &(Script, Script),
    plainly: &[Accounts],
    (client, target): &Accounts,
) -> Vec<Difference> {
    let over_tcp_client: Vec<_> = plainly.iter().map(|(client, _)| client.knows()).collect();
    let over_tcp_target: Vec<_> = plainly.iter().map(|(_, target)| target.knows()).collect();
    let mut differences = Vec::new();
    // Stdout has its end when the process ends, and not when the target has.
    let is_told = mode != Mode::Stdio || client.knows() != Knows::Nothing;
    if is_told && is_different(&over_tcp_client, client, target) {
        differences.push(Difference {
            who: "client",
            knows: client.knows(),
        });
    }
    // A message can't be left in its middle in order, nobody sees what is left unread in a pipe, and what is in one
    // is lost with a process that is killed.
    let has_same_end = match mode {
        Mode::Stdio => is_told && of_client.end == End::Close,
        _ => client.end == of_client.end,
    };
    if has_same_end && is_different(&over_tcp_target, target, client) {
        differences.push(Difference {
            who: "target",
            knows: target.knows(),
        });
    }
    differences
}

fn is_different(over_tcp: &[Knows], side: &Account, other: &Account) -> bool {
    match side.knows() {
        // A reset may overtake and destroy what is on its way, and whoever closes may do so before all has come to him.
        Knows::Broken => {
            let took_all = other.end == End::Close && other.received == side.written;
            took_all && !over_tcp.contains(&Knows::Broken)
        }
        Knows::End | Knows::Nothing => over_tcp.iter().all(|knows| *knows == Knows::Broken),
    }
}
