//! A short run of the differential fuzz of the packet path (`cargo xtask fuzz frames` is the long one), and what was kept.

use necp_ebpf::verdict::Reason;
use necp_tests::frames::{
    history::{Bench, LEAST_INTERCEPTED, Tally},
    judge::{Crossing, Difference},
    kept,
};

const SEED: u64 = 0x4e45_4350;

fn run(bench: &mut Bench, histories: u64) -> Tally {
    for history in 0..histories {
        if let Err(finding) = bench.history(SEED, history) {
            panic!("{finding}");
        }
    }
    println!("{:?}", bench.tally());
    bench.tally().clone()
}

/// A fuzzer that reaches only half of the verdicts shows nothing about the others.
fn reaches_everything(tally: &Tally) {
    // No way is known from the loopback, so the kernel routes all replies.
    for reason in Reason::ALL.into_iter().filter(|&reason| reason != Reason::Reply) {
        assert!(tally.reasons[reason as usize] > 0, "no frame was {reason:?}: {tally:?}");
    }
    for (difference, count) in Difference::ALL.into_iter().zip(tally.differences) {
        assert!(count > 0, "{difference:?} never came: {tally:?}");
    }
    for (crossing, count) in Crossing::ALL.into_iter().zip(tally.crossings) {
        assert!(count > 0, "{crossing:?} never came: {tally:?}");
    }
    assert!(tally.intercepted() * LEAST_INTERCEPTED > tally.frames, "few were intercepted: {tally:?}");
}

#[test]
fn frames_are_what_etherparse_says_and_nothing_beyond_them_is_touched() {
    let tally = run(&mut Bench::host().unwrap(), 1000);
    assert!(tally.frames > 500_000, "{tally:?}");
    reaches_everything(&tally);
}

#[test]
fn kernel_and_host_build_do_the_same_with_every_frame() {
    let tally = run(&mut Bench::with_kernel().expect("root, and a BPF file system"), 200);
    assert!(tally.kernel > 100_000, "{tally:?}");
    reaches_everything(&tally);
}

#[test]
fn kept_frames_hold() {
    let mut bench = Bench::with_kernel().expect("root, and a BPF file system");
    let kept = kept::run(&mut bench).unwrap_or_else(|wrong| panic!("{wrong}"));
    assert!(kept > 0);
}
