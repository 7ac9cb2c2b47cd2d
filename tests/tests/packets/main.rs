//! Frames in, verdicts, frames and tables out: the kernel program and the host build, against a described table and each other.

mod case;
mod decap;
mod exceptions;
mod floods;
mod frames;
mod fuzz;
mod headers;
mod intercept;
mod rare;
mod routed;
mod services;
mod setup;
mod six;
mod six_intercept;
mod tracking;

use std::collections::BTreeSet;

use case::{Bench, Case};
use frames::WEB_FLOW;
use necp_ebpf::verdict::Reason;
use necp_tests::kernel::Verdict;
use setup::Setup;

/// Most instructions that the verifier may have to follow; its own limit is a million.
const VERIFIED_INSTRUCTIONS: u32 = 500_000;

fn all_cases() -> Vec<Case> {
    [
        headers::cases(),
        tracking::cases(),
        services::cases(),
        exceptions::cases(),
        routed::cases(),
        rare::cases(),
        intercept::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[test]
fn every_case_comes_out_as_described_in_the_kernel_and_on_the_host() {
    let mut bench = Bench::load();
    let cases = all_cases();
    let mut names = BTreeSet::new();
    assert!(cases.iter().all(|case| !case.why.is_empty()), "a case must say why");
    for case in &cases {
        assert!(names.insert(&case.name), "two cases are called: {}", case.name);
    }
    assert!(cases.iter().all(|case| !case.steps.is_empty()), "a case without a frame says nothing");
    let wrong: Vec<String> = cases.iter().filter_map(|case| bench.run(case).err()).collect();
    let frames: usize = cases.iter().map(|case| case.steps.len()).sum();
    println!("{} cases, {frames} frames, each in the kernel and on the host", cases.len());
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn random_frames_come_out_the_same_in_the_kernel_and_on_the_host() {
    const SEED: u64 = 0x4e45_4350;
    const FRAMES: usize = 10_000;
    let mut bench = Bench::load();
    let reasons = fuzz::run(&mut bench, SEED, FRAMES).unwrap();
    println!("{FRAMES} random frames, seed {SEED:#x}: {reasons:?}");
    assert_eq!(reasons.values().sum::<u32>() as usize, FRAMES);
    assert!(reasons.len() >= 14, "the frames reach only {reasons:?}");
}

#[test]
fn the_programs_are_far_from_the_verifiers_limit() {
    let bench = Bench::load();
    for (name, count) in bench.kernel.verified().unwrap() {
        println!("verified: {name}: {count} instructions");
        assert!((1..VERIFIED_INSTRUCTIONS).contains(&count), "{name}: {count}, more than {VERIFIED_INSTRUCTIONS}");
    }
}

#[test]
fn less_than_an_ethernet_header_is_refused_by_the_kernel_and_malformed_on_the_host() {
    let mut bench = Bench::load();
    let frame = WEB_FLOW.data(1).build();
    for length in 0..14 {
        assert!(bench.kernel.run(&frame[..length]).is_err(), "{length} bytes");
        let outcome = bench.host.run(&frame[..length]);
        assert_eq!(outcome.reason, Reason::Malformed, "{length} bytes");
        assert_eq!(outcome.frame, &frame[..length]);
    }
}

/// A test run makes several buffers of a long frame, as drivers do: the program sees the first only.
#[test]
fn a_frame_in_several_buffers_is_steered() {
    let mut bench = Bench::load();
    let setup = Setup::plain();
    bench.install(&setup);
    let frame = headers::long(9000 - 40).build();
    let outcome = bench.kernel.run(&frame).unwrap();
    assert_eq!((outcome.verdict, outcome.reason), (Verdict::Tx, Reason::Plain));
    assert_eq!(outcome.frame[14..], frame[14..]);
    assert_eq!(bench.host.run(&frame), outcome);
}
