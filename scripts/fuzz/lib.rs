//! The fuzz targets, one a file; scripts/fuzz.sh builds and runs them. What must hold is where the property tests have
//! it, so that both ask the same.

#[path = "../../tests/it/oracles/mod.rs"]
pub mod oracles;

use oracles::Arrival;

/// How bytes come to a reader, in small steps or at once, from the first bytes of an input.
pub fn arrival([early, step, read_size, times_out]: [u8; 4]) -> Arrival {
    Arrival {
        early: early.into(),
        step: match step {
            u8::MAX => usize::MAX,
            step => usize::from(step) + 1,
        },
        read_size: usize::from(read_size) * usize::from(read_size),
        times_out: times_out % 2 == 1,
    }
}
