//! Random and mutated frames, by the hundred million: the kernel program against the host build, and both against
//! etherparse as the judge of what a frame is.
//!
//! ```text
//!  stack ──► mutate ──► host build, between guards ──► judge (etherparse): class, bytes, checksums
//!  (well-formed)    └─► kernel program (BPF_PROG_TEST_RUN): the same verdict, bytes, counters, tables
//! ```
//!
//! Everything follows from a seed: [`history::Bench::history`] of the same seed and number is the same tables and frames.
//! What was found once is kept in `kept.txt` and run before anything else.
//!
//! To extend it: a new header → [`stack`], a new field to break → [`mutate`], a new kind of service or server → [`scene`],
//! a new reason or forwarding type → [`judge`], which does not compile, or fails, until it knows it.

mod guard;
pub mod history;
pub mod judge;
pub mod kept;
pub mod mutate;
pub mod scene;
pub mod stack;

use rand::{RngExt as _, rngs::SmallRng};

/// One of these.
fn pick<T: Copy>(random: &mut SmallRng, of: &[T]) -> T {
    of[random.random_range(0..of.len())]
}

/// True once in `n` times.
fn once_in(random: &mut SmallRng, n: u32) -> bool {
    random.random_range(0..n) == 0
}
