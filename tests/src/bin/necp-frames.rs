//! `cargo xtask fuzz frames`: random and mutated frames through kernel program and host build, judged by etherparse.

use std::{
    process::ExitCode,
    time::{Duration, Instant, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use clap::Parser;
use necp_ebpf::verdict::Reason;
use necp_tests::frames::{
    history::{Bench, LEAST_INTERCEPTED, Tally},
    judge::{Crossing, Difference},
    kept,
};

/// Runs random and mutated frames through the kernel program and the host build of the packet path.
///
/// The same verdict, reason, bytes and tables are demanded of both; of the host build also what etherparse says a frame is,
/// valid checksums, and that nothing beyond the frame is touched. Needs root, unless --host.
#[derive(Parser)]
#[command(
    after_help = "Examples:\n  cargo xtask fuzz frames --seconds 600\n  cargo xtask fuzz frames --seconds 600 -- --host       \
                  many times as fast, without the kernel\n  cargo xtask fuzz frames -- --seed 7 --history 12      \
                  one history again, as a finding says"
)]
struct Args {
    /// Seconds to run
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only the host build and the judge
    #[arg(long)]
    host: bool,
    /// What the frames follow from; the clock, unless given
    #[arg(long)]
    seed: Option<u64>,
    /// Only the history of this number
    #[arg(long, requires = "seed")]
    history: Option<u64>,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let mut bench =
        if args.host { Bench::host()? } else { Bench::with_kernel().context("the kernel's side needs root")? };
    let kept = kept::run(&mut bench).map_err(anyhow::Error::msg)?;
    let seed = args.seed.unwrap_or_else(|| UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs()));
    println!("{kept} kept frames hold; seed {seed}");
    let started = Instant::now();
    let end = started + Duration::from_secs(args.seconds);
    let histories = args.history.map_or(0..u64::MAX, |number| number..number + 1);
    for number in histories {
        if args.history.is_none() && Instant::now() >= end {
            break;
        }
        if let Err(finding) = bench.history(seed, number) {
            eprintln!("{finding}");
            report(bench.tally(), started);
            return Ok(ExitCode::FAILURE);
        }
    }
    report(bench.tally(), started);
    let Tally { frames, .. } = *bench.tally();
    if args.history.is_none() && bench.tally().intercepted() * LEAST_INTERCEPTED < frames {
        eprintln!("fewer than one frame in {LEAST_INTERCEPTED} was intercepted: this shows too little of it");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn report(tally: &Tally, started: Instant) {
    let seconds = started.elapsed().as_secs_f64();
    println!("{} frames judged, {} of them also in the kernel, {seconds:.0} s", tally.frames, tally.kernel);
    let reasons = Reason::ALL.into_iter().map(|reason| format!("{} {}", reason.name(), tally.reasons[reason as usize]));
    println!("reasons: {}", reasons.collect::<Vec<_>>().join(", "));
    let differences =
        Difference::ALL.into_iter().zip(tally.differences).map(|(what, count)| format!("{what:?} {count}"));
    println!("agreed differences: {}", differences.collect::<Vec<_>>().join(", "));
    let crossings = Crossing::ALL.into_iter().zip(tally.crossings).map(|(what, count)| format!("{what:?} {count}"));
    let share = 100.0 * tally.intercepted() as f64 / tally.frames.max(1) as f64;
    println!(
        "intercepted: {} frames, {share:.1} % ({})",
        tally.intercepted(),
        crossings.collect::<Vec<_>>().join(", ")
    );
}
