//! No flow moves: the packet path and the control plane against an oracle that remembers every flow.
//!
//! `NECP_TRACKING_CASES` is the number of histories (100,000 unless set), `NECP_TRACKING_SEED` another sequence of them.

use std::{
    env, process,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use necp_ebpf::verdict::Reason;
use necp_tests::oracle::{
    clients::AMPLE_BUCKETS,
    play::{Played, Promise, play},
    step::histories,
    world::{Kind, Size},
};
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestError, TestRunner};

/// Tables of these sizes have room for both entries of every flow of the oracle's clients.
const AMPLE: [Size; 3] = [ample(3), ample(5), ample(11)];
/// These have not.
const TINY: [Size; 3] = [tiny(3, 1), tiny(5, 2), tiny(11, 8)];
const LENGTH: usize = 100;

const fn ample(slots: u32) -> Size {
    tiny(slots, AMPLE_BUCKETS)
}

const fn tiny(slots: u32, buckets: usize) -> Size {
    Size { slots, buckets, kind: Kind::Vip }
}

/// The same sizes, in a farm of another kind.
const fn of(kind: Kind, [a, b, c]: [Size; 3]) -> [Size; 3] {
    [Size { kind, ..a }, Size { kind, ..b }, Size { kind, ..c }]
}

fn number(variable: &str, default: u64) -> u64 {
    env::var(variable).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| {
            eprintln!("{variable}={text}: must be a number");
            process::exit(2);
        })
    })
}

/// Plays `cases` histories on all processors.
fn run(promise: Promise, sizes: &[Size], cases: u64) -> Played {
    let begun = Instant::now();
    let (total, failed) = (Mutex::new(Played::default()), Mutex::new(None));
    let seed = number("NECP_TRACKING_SEED", 2);
    let workers = thread::available_parallelism().map_or(1, |n| n.get() as u64);
    thread::scope(|scope| {
        for worker in 0..workers {
            for (index, &size) in sizes.iter().enumerate() {
                let share = cases / workers / sizes.len() as u64 + 1;
                let (total, failed) = (&total, &failed);
                scope.spawn(move || {
                    let seed = seed << 16 | worker << 8 | index as u64;
                    if let Err(message) = run_one(promise, size, share, seed, total) {
                        *failed.lock().unwrap() = Some(message);
                    }
                });
            }
        }
    });
    if let Some(message) = failed.into_inner().unwrap() {
        panic!("{message}");
    }
    let played = total.into_inner().unwrap();
    let elapsed = begun.elapsed();
    report(promise, sizes, cases, &played, elapsed);
    played
}

fn run_one(promise: Promise, size: Size, cases: u64, seed: u64, total: &Mutex<Played>) -> Result<(), String> {
    let config = Config {
        cases: cases as u32,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..Config::default()
    };
    let mut tables = size.tables();
    let view = tables.view();
    let sum = Mutex::new(Played::default());
    let result = TestRunner::new(config).run(&histories(LENGTH), |history| {
        let played = play(size, promise, view, &history).map_err(TestCaseError::fail)?;
        add(&mut sum.lock().unwrap(), &played);
        Ok(())
    });
    add(&mut total.lock().unwrap(), &sum.into_inner().unwrap());
    result.map_err(|error| match error {
        TestError::Fail(reason, history) => format!("{size:?}, seed {seed}: {reason}\nafter {history:#?}"),
        TestError::Abort(reason) => format!("{size:?}, seed {seed}: aborted: {reason}"),
    })
}

fn add(sum: &mut Played, played: &Played) {
    sum.reasons.iter_mut().zip(played.reasons).for_each(|(sum, one)| *sum += one);
    sum.orphaned += played.orphaned;
    sum.moved += played.moved;
}

fn report(promise: Promise, sizes: &[Size], cases: u64, played: &Played, elapsed: Duration) {
    let reasons = Reason::ALL.iter().filter(|&&reason| played.reasons[reason as usize] > 0);
    let reasons: Vec<String> =
        reasons.map(|&reason| format!("{} {}", played.reasons[reason as usize], reason.name())).collect();
    println!(
        "{cases} histories ({promise:?}, {sizes:?}) in {:.1} s: {} packets ({}), {} flows lost their server, {} moved",
        elapsed.as_secs_f64(),
        played.reasons.iter().sum::<u64>(),
        reasons.join(", "),
        played.orphaned,
        played.moved,
    );
}

#[test]
fn no_flow_moves_unless_its_server_dies() {
    let played = run(Promise::Every, &AMPLE, number("NECP_TRACKING_CASES", 100_000));
    assert_eq!(played.moved, 0);
    for reason in [Reason::NewUnrecorded, Reason::Legacy, Reason::BadTables, Reason::NotOurs] {
        assert_eq!(played.reasons[reason as usize], 0, "{reason:?}: the test's own tables are at fault");
    }
    let ways = [Reason::Plain, Reason::Record, Reason::Adopted, Reason::Owner, Reason::New, Reason::Repeated];
    for reason in ways.into_iter().chain([Reason::Confirmed, Reason::Direct]) {
        assert!(played.reasons[reason as usize] > 0, "no packet was ever {reason:?}: the histories are too tame");
    }
}

#[test]
fn a_recorded_flow_stays_even_if_the_flow_table_is_full() {
    let played = run(Promise::Recorded, &TINY, number("NECP_TRACKING_CASES", 100_000) / 4);
    for reason in [Reason::NewUnrecorded, Reason::Legacy] {
        assert!(played.reasons[reason as usize] > 0, "the flow table was never full");
    }
}

#[test]
fn no_flow_moves_where_every_flow_is_on_record() {
    let played = run(Promise::Every, &of(Kind::Layer3, AMPLE), number("NECP_TRACKING_CASES", 100_000) / 4);
    assert_eq!(played.moved, 0);
    for reason in [Reason::NewUnrecorded, Reason::Legacy, Reason::BadTables, Reason::NotOurs, Reason::Plain] {
        assert_eq!(played.reasons[reason as usize], 0, "{reason:?}: the test's own tables are at fault");
    }
    for reason in [Reason::Record, Reason::New, Reason::Repeated, Reason::Confirmed, Reason::Direct] {
        assert!(played.reasons[reason as usize] > 0, "no packet was ever {reason:?}: the histories are too tame");
    }
}

#[test]
fn a_recorded_flow_stays_where_every_flow_should_be_on_record_and_cannot() {
    let played = run(Promise::Recorded, &of(Kind::Layer3, TINY), number("NECP_TRACKING_CASES", 100_000) / 8);
    assert!(played.reasons[Reason::NewUnrecorded as usize] > 0, "the flow table was never full");
}

#[test]
fn no_intercepted_flow_moves_and_those_begun_before_the_first_start_stay_direct() {
    intercepted(Kind::Intercept);
}

#[test]
fn no_intercepted_flow_of_ipv6_moves_and_those_begun_before_the_first_start_stay_direct() {
    intercepted(Kind::SixIntercept);
}

fn intercepted(kind: Kind) {
    let played = run(Promise::Every, &of(kind, AMPLE), number("NECP_TRACKING_CASES", 100_000) / 4);
    assert_eq!(played.moved, 0);
    for reason in [Reason::NewUnrecorded, Reason::Legacy, Reason::BadTables, Reason::NotOurs, Reason::NoServer] {
        assert_eq!(played.reasons[reason as usize], 0, "{reason:?}: the test's own tables are at fault");
    }
    for reason in [Reason::Plain, Reason::Record, Reason::Adopted, Reason::New, Reason::Confirmed, Reason::Direct] {
        assert!(played.reasons[reason as usize] > 0, "no packet was ever {reason:?}: the histories are too tame");
    }
}

#[test]
fn no_flow_of_ipv6_moves() {
    let played = run(Promise::Every, &of(Kind::Six, AMPLE), number("NECP_TRACKING_CASES", 100_000) / 4);
    assert_eq!(played.moved, 0);
    for reason in [Reason::NewUnrecorded, Reason::Legacy, Reason::BadTables, Reason::NotOurs] {
        assert_eq!(played.reasons[reason as usize], 0, "{reason:?}: the test's own tables are at fault");
    }
    for reason in [Reason::Plain, Reason::Record, Reason::Adopted, Reason::New, Reason::Confirmed, Reason::Direct] {
        assert!(played.reasons[reason as usize] > 0, "no packet was ever {reason:?}: the histories are too tame");
    }
}
