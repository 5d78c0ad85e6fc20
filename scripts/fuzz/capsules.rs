//! Capsules: the same bytes, ends and faults come out however they arrive, spliced or not, and they are those of a decoder
//! that has all at once. An input is 4 bytes on how they arrive, and the capsules.
#![no_main]

use tunneld_fuzz::{arrival, oracles::capsules};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let &[a, b, c, d, ref wire @ ..] = input else {
        return;
    };
    capsules::are_the_same_however_they_arrive(wire, arrival([a, b, c, d]));
});
