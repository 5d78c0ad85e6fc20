//! Frames to either end: the same bytes, pings, pongs and Closes come out however they arrive, and they and the verdict
//! are tungstenite's. An input is the role, 4 bytes on how they arrive, and the frames.
#![no_main]

use tunneld::exposed::Role;
use tunneld_fuzz::{arrival, oracles::frames};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let &[role, a, b, c, d, ref wire @ ..] = input else {
        return;
    };
    let role = [Role::Daemon, Role::Client][usize::from(role % 2)];
    frames::are_the_same_however_they_arrive(role, wire, arrival([a, b, c, d]));
    frames::mean_what_tungstenite_says(role, wire);
});
