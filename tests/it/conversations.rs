//! The same random conversation over plain TCP and through a tunnel: nobody who talks through one may be able to
//! tell, and above all nobody is told an orderly end that was not one.
//!
//! What a side comes to know is compared with what it knew over TCP, in several runs of different tempo if it was
//! something else in the first; what holds over TCP whatever the tempo, the `rules`, needs no comparison. A tunnel takes
//! its time: where a side only has not been told, it is asked again, in runs in which it waits for that.
//!
//! In the environment, `CONVERSATIONS` says how many there are in each mode, `CONVERSATION_SEED` what the first is made
//! from, with the next numbers for those behind it, and `CONVERSATION_TRACE` that everything is told. One that went wrong
//! is played again by its seed alone.

mod rules;
mod script;
mod side;
mod wire;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::connect::{Connect, LOCAL};
use crate::connect_tcp::CAPSULES;
use crate::support::*;
use rules::{Difference, Mode};
use script::Script;
use side::{Account, Tempo, play};
use wire::{Framed, Protocol, Streams, Tcp, Wire};

/// How many conversations there are at a time.
const WORKERS: usize = 12;

/// How often a conversation is played over TCP before an end is said to be different.
const PLAIN_RUNS: usize = 25;

/// And for how long.
const PLAIN_LIMIT: Duration = Duration::from_millis(1_500);

/// How often it is played through the tunnel by sides that wait. What differs in some of these runs is a matter of who
/// was faster: a tunnel is later than TCP by its latency, and a script goes on after milliseconds.
const PATIENT_RUNS: usize = 4;

/// How often those runs are repeated, as long as it differs in each: a side may have written all before it was to wait.
const PATIENT_ROUNDS: usize = 3;

/// Within a second a side is told of the other's end, on a busy machine.
const TOLD_WITHIN: Duration = Duration::from_millis(1_500);

/// More than a side writes; what it writes is the front of it.
const MOST: usize = 5_000_000;

static UP: LazyLock<Vec<u8>> = LazyLock::new(|| Random::new(1).bytes(MOST));
static DOWN: LazyLock<Vec<u8>> = LazyLock::new(|| Random::new(2).bytes(MOST));

/// The client's account and the target's.
type Accounts = (Account, Account);

/// How the tunnels of a mode are opened.
struct Way {
    mode: Mode,
    protocol: Protocol,
    daemon: Daemon,
    target: Target,
    /// With `--listen`.
    client: Option<(Connect, SocketAddr)>,
    /// Held while one is opened, so that the target knows whose it is.
    opening: Mutex<()>,
}

impl Way {
    fn new(mode: Mode, protocol: Protocol) -> Way {
        let (daemon, target) = (
            Daemon::start(&["--max-connections", "200"]),
            Target::listen(),
        );
        let client = (mode == Mode::Listen).then(|| {
            let options = [&LOCAL[..], options_of(protocol)].concat();
            let client = Connect::to(&daemon, target.port, &options);
            let address = client.address();
            (client, address)
        });
        Way {
            mode,
            protocol,
            daemon,
            target,
            client,
            opening: Mutex::new(()),
        }
    }

    fn open(&self) -> (Box<dyn Wire>, Box<dyn Wire>) {
        let _opening = self.opening.lock().unwrap();
        let port = self.target.port;
        let client: Box<dyn Wire> = match (&self.client, self.mode) {
            (Some((_, address)), _) => Box::new(Tcp::new(TcpStream::connect(address).unwrap())),
            (None, Mode::Stdio) => Box::new(Streams::spawn(self.command())),
            _ => Box::new(Framed::open(self.protocol, &self.daemon, port)),
        };
        (client, Box::new(Tcp::new(self.target.accept())))
    }

    fn command(&self) -> std::process::Command {
        let url = format!("ws://{}", self.daemon.address);
        let port = self.target.port.to_string();
        let options = [&["--port", &port], options_of(self.protocol)].concat();
        Connect::command(&url, &options)
    }
}

fn options_of(protocol: Protocol) -> &'static [&'static str] {
    match protocol {
        Protocol::WebSocket => &[],
        Protocol::ConnectTcp => &CAPSULES,
    }
}

fn open_plain(target: &Target) -> (Box<dyn Wire>, Box<dyn Wire>) {
    let client = TcpStream::connect(("127.0.0.1", target.port)).unwrap();
    (
        Box::new(Tcp::new(client)),
        Box::new(Tcp::new(target.accept())),
    )
}

fn talk(
    (client, target): (Box<dyn Wire>, Box<dyn Wire>),
    (of_client, of_target): &(Script, Script),
    tempos: [Tempo; 2],
) -> Accounts {
    let ended = [AtomicBool::new(false), AtomicBool::new(false)];
    let [client_ended, target_ended] = &ended;
    thread::scope(|scope| {
        let client = scope.spawn(|| {
            let ended = [client_ended, target_ended];
            play(client, of_client, tempos[0], [&UP, &DOWN], ended)
        });
        let ended = [target_ended, client_ended];
        let target = play(target, of_target, tempos[1], [&DOWN, &UP], ended);
        (client.join().unwrap(), target)
    })
}

fn tempo(random: &mut Random) -> Tempo {
    let mut lag = || Duration::from_micros([0, 0, 300, 2_000, 8_000][random.below(5)]);
    Tempo {
        at_start: lag(),
        each_step: lag(),
        at_end: lag(),
        after_others: Duration::ZERO,
    }
}

/// What went wrong: each class, how often, and the first seeds.
#[derive(Default)]
struct Report(Mutex<BTreeMap<String, (usize, Vec<u64>)>>);

impl Report {
    fn note(&self, class: String, seed: u64) {
        let mut classes = self.0.lock().unwrap();
        let (count, seeds) = classes.entry(class).or_default();
        *count += 1;
        if seeds.len() < 8 {
            seeds.push(seed);
        }
    }
}

/// One conversation, to be played as often as it takes.
struct Conversation<'a> {
    way: &'a Way,
    /// Where it goes over plain TCP.
    plain: &'a Target,
    scripts: (Script, Script),
    random: Random,
    is_traced: bool,
}

impl Conversation<'_> {
    fn play_plainly(&mut self, is_hurried: bool) -> Accounts {
        let tempos = [(); 2].map(|()| match is_hurried {
            true => Tempo::default(),
            false => tempo(&mut self.random),
        });
        self.trace("plain", talk(open_plain(self.plain), &self.scripts, tempos))
    }

    fn play_tunnelled(&self) -> Accounts {
        let tempos = [Tempo::default(); 2];
        self.trace("tunnel", talk(self.way.open(), &self.scripts, tempos))
    }

    fn with_patience(&self, mut tempos: [Tempo; 2]) -> [Tempo; 2] {
        // Once the target has ended, stdin is taken for ended when it is idle for a second.
        tempos[0].after_others = match self.way.mode {
            Mode::Stdio => TOLD_WITHIN / 2,
            _ => TOLD_WITHIN,
        };
        tempos[1].after_others = TOLD_WITHIN;
        tempos
    }

    fn trace(&self, how: &str, accounts: Accounts) -> Accounts {
        if self.is_traced {
            println!("{how}:\n  {}\n  {}", accounts.0, accounts.1);
        }
        accounts
    }

    fn differences(&self, plainly: &[Accounts], tunnelled: &Accounts) -> Vec<Difference> {
        rules::differences(self.way.mode, &self.scripts, plainly, tunnelled)
    }

    /// Notes what went wrong.
    fn compare(&mut self, note: impl Fn(String)) {
        let (of_client, of_target) = &self.scripts;
        if self.is_traced {
            println!("client: {of_client:?}\ntarget: {of_target:?}");
        }
        let began = Instant::now();
        let mut plainly = vec![self.play_plainly(true)];
        let tunnelled = self.play_tunnelled();
        for rule in rules::broken_by(Mode::Plain, &plainly[0]) {
            note(format!("rule, over plain TCP: {rule}"));
        }
        let broken = rules::broken_by(self.way.mode, &tunnelled);
        if !broken.is_empty() {
            println!(
                "{:?}: {broken:?}\n  {}\n  {}",
                self.way.mode, tunnelled.0, tunnelled.1
            );
        }
        for rule in broken {
            note(format!("rule: {rule}"));
        }
        while !self.differences(&plainly, &tunnelled).is_empty()
            && plainly.len() < PLAIN_RUNS
            && began.elapsed() < PLAIN_LIMIT
        {
            plainly.push(self.play_plainly(false));
        }
        let differences = self.differences(&plainly, &tunnelled);
        if differences.is_empty() {
            return;
        }
        let (mut again, mut runs) = (Vec::new(), 0);
        for _ in 0..PATIENT_ROUNDS {
            again.extend(self.compare_patiently());
            runs += PATIENT_RUNS;
            let times = |difference| again.iter().filter(|again| *again == difference).count();
            if !differences.iter().any(|each| times(each) == runs) {
                break;
            }
        }
        for difference in differences {
            let how = match again.iter().filter(|again| **again == difference).count() {
                0 if difference.may_be_late() => "late",
                0 => "once",
                times if times == runs => "each time",
                _ => "sometimes",
            };
            note(format!("{how}: {difference}"));
        }
    }

    /// By sides that wait until all must have come to them that the other side's end brings. As that takes long, all runs
    /// are at a time.
    fn compare_patiently(&mut self) -> Vec<Difference> {
        let tempos: Vec<_> = (0..4)
            .map(|_| [(); 2].map(|()| tempo(&mut self.random)))
            .collect();
        let tempos = tempos.into_iter().map(|tempos| self.with_patience(tempos));
        let plainly: Vec<_> = tempos
            .map(|tempos| (open_plain(self.plain), tempos))
            .collect();
        let unhurried = self.with_patience([Tempo::default(); 2]);
        let tunnelled = [(); PATIENT_RUNS].map(|()| (self.way.open(), unhurried));
        let (plainly, tunnelled) = thread::scope(|scope| {
            let scripts = &self.scripts;
            let start = |(wires, tempos)| scope.spawn(move || talk(wires, scripts, tempos));
            let plainly: Vec<_> = plainly.into_iter().map(start).collect();
            let tunnelled = tunnelled
                .map(start)
                .map(|run| self.trace("tunnel", run.join().unwrap()));
            let plainly = plainly
                .into_iter()
                .map(|run| self.trace("plain", run.join().unwrap()));
            (plainly.collect::<Vec<_>>(), tunnelled)
        });
        let each = tunnelled
            .iter()
            .map(|tunnelled| self.differences(&plainly, tunnelled));
        each.flatten().collect()
    }
}

fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// Plays the conversations of the seeds that nobody else has taken, up to `last`.
fn work(way: &Way, next: &AtomicU64, last: u64, report: &Report) {
    let plain = Target::listen();
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed > last {
            return;
        }
        let mut random = Random::new(seed);
        let mut conversation = Conversation {
            way,
            plain: &plain,
            scripts: script::conversation(&mut random, way.mode == Mode::Stdio),
            random,
            is_traced: std::env::var_os("CONVERSATION_TRACE").is_some(),
        };
        let compare = || conversation.compare(|class| report.note(class, seed));
        if catch_unwind(AssertUnwindSafe(compare)).is_err() {
            report.note("panicked".into(), seed);
        }
    }
}

fn converse(mode: Mode, protocol: Protocol) {
    let count = environment("CONVERSATIONS", 170);
    let first = environment("CONVERSATION_SEED", 1);
    let name = format!("{mode:?} {protocol:?}");
    println!("{name}: CONVERSATIONS={count} CONVERSATION_SEED={first}");
    let (way, report, next) = (
        Way::new(mode, protocol),
        Report::default(),
        AtomicU64::new(first),
    );
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| work(&way, &next, first + count - 1, &report));
        }
    });
    let classes = report.0.into_inner().unwrap();
    for (class, (count, seeds)) in &classes {
        println!("{name}: {count} x {class}; seeds {seeds:?}");
    }
    let is_wrong = |class: &&String| !is_excused(class);
    let wrong: Vec<_> = classes.keys().filter(is_wrong).collect();
    assert!(wrong.is_empty(), "{name}: {wrong:#?}");
}

/// What came late came in time to those who waited for it, and what went wrong once did not where they waited, or not
/// whenever they did.
fn is_excused(class: &str) -> bool {
    ["late: ", "once: ", "sometimes: "]
        .iter()
        .any(|how| class.starts_with(how))
}

#[test]
fn a_conversation_through_the_daemon_is_as_over_tcp() {
    converse(Mode::Daemon, Protocol::WebSocket);
}

#[test]
fn a_conversation_through_the_daemon_in_capsules_is_as_over_tcp() {
    converse(Mode::Daemon, Protocol::ConnectTcp);
}

#[test]
fn a_conversation_through_a_local_port_is_as_over_tcp() {
    converse(Mode::Listen, Protocol::WebSocket);
}

#[test]
fn a_conversation_through_a_local_port_in_capsules_is_as_over_tcp() {
    converse(Mode::Listen, Protocol::ConnectTcp);
}

#[test]
fn a_conversation_of_stdin_and_stdout_is_as_over_tcp() {
    converse(Mode::Stdio, Protocol::WebSocket);
}

#[test]
fn a_conversation_of_stdin_and_stdout_in_capsules_is_as_over_tcp() {
    converse(Mode::Stdio, Protocol::ConnectTcp);
}
