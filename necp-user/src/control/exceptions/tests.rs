//! Exceptions of several SEs, on a clock of their own; what the maps say, and what packets do.

mod six;

use std::{collections::BTreeMap, time::Duration};

use necp_ebpf::{
    abi::{DIRECT, EXCEPTION_GLOBAL, ExceptionMasks},
    host::Owned,
};
use proptest::prelude::*;

use super::{
    super::{
        config::ClusterConfig,
        testbed::{Bed, config, config_of_both, se, se6},
    },
    *,
};
use crate::necp::message::{Listed, Scope};

fn flows(source: &str, destination: &str, protocol: u8, port: u16) -> Flows {
    let net = |text: &str| text.parse::<ipnet::IpNet>().unwrap().trunc();
    Flows { source: net(source), destination: net(destination), protocol, port }
}

/// Everything that [`Bed::connect`] sends.
fn clients() -> Flows {
    flows("11.0.0.0/24", "0.0.0.0/0", 0, 0)
}

fn local(flows: Flows) -> Exception {
    Exception { scope: Scope::Local, ttl: 0, flows }
}

fn global(flows: Flows) -> Exception {
    Exception { scope: Scope::Global, ..local(flows) }
}

fn trusting() -> ClusterConfig {
    let mut config = config();
    config.farms[0].global_exceptions = true;
    config
}

fn list(bed: &Bed, filter: Filter, budget: usize) -> Vec<Listed> {
    let mut listing = bed.cluster.except_list(filter);
    let count = loop {
        if let Some(count) = listing.count(&bed.cluster, budget) {
            break count;
        }
    };
    let mut entries = Vec::new();
    while !listing.read(&bed.cluster, 3, budget, &mut entries) {}
    assert_eq!(entries.len(), count as usize, "as many as announced");
    entries
}

/// Records and masks of the maps are what the store wants, and the index finds no others.
fn assert_no_exception_in_maps(bed: &Bed) {
    for number in 0..bed.view.exception_count() as u32 {
        assert_eq!(bed.view.exception_record(number), Some(abi::Exception::default()), "record {number}");
    }
    assert_eq!(bed.view.exception_masks_record(0), Some(ExceptionMasks::default()));
}

#[test]
fn a_local_exception_keeps_new_flows_from_its_installer_and_no_others() {
    let mut bed = Bed::new();
    let (first, second) = (bed.serve(1), bed.serve(2));
    let old: Vec<u32> = (1..60).map(|client| bed.connect(client)).collect();
    assert!(old.contains(&first) && old.contains(&second));
    let change = bed.cluster.except_add(se(1), &local(clients()), bed.now).unwrap();
    assert_eq!(bed.sync().outcome(change), Some(true));
    for (client, server) in (1..60).zip(&old) {
        assert_eq!(bed.data(client), *server, "no flow moves");
    }
    (100..160).for_each(|client| assert_eq!(bed.connect(client), second));
    let change = bed.cluster.except_add(se(2), &local(clients()), bed.now).unwrap();
    assert_eq!(bed.sync().outcome(change), Some(true));
    (200..230).for_each(|client| assert_eq!(bed.connect(client), 0, "nobody wants it: cut through"));
    (100..160).for_each(|client| assert_eq!(bed.data(client), second, "no flow moves"));
    bed.cluster.except_del(se(1), &clients(), bed.now).unwrap();
    bed.cluster.except_del(se(2), &clients(), bed.now).unwrap();
    bed.sync();
    (200..230).for_each(|client| assert_eq!(bed.data(client), 0, "what was cut through stays so"));
    assert!((300..360).any(|client| bed.connect(client) == first));
    assert_no_exception_in_maps(&bed);
}

#[test]
fn global_is_local_where_the_farm_does_not_trust() {
    for (config, scope, goes) in [(trusting(), Scope::Global, None), (config(), Scope::Local, Some(2))] {
        let mut bed = Bed::with(config);
        bed.serve(1);
        let other = bed.serve(2);
        bed.cluster.except_add(se(1), &global(clients()), bed.now).unwrap();
        bed.sync();
        assert_eq!(list(&bed, Filter::default(), 7), [Listed { scope, installer: se(1), flows: clients() }]);
        let wanted = goes.map_or(0, |_| other);
        (1..60).for_each(|client| assert_eq!(bed.connect(client), wanted));
        let counts = FarmExceptions {
            local: u32::from(scope == Scope::Local),
            global: u32::from(scope == Scope::Global),
            masks: 1,
        };
        assert_eq!(bed.cluster.farm_exceptions(0), counts);
        // Another scope for the same flows: an entry there is, and no more.
        bed.cluster.except_add(se(1), &local(clients()), bed.now).unwrap();
        bed.sync();
        assert_eq!(bed.cluster.farm_exceptions(0), FarmExceptions { local: 1, global: 0, masks: 1 });
        (100..160).for_each(|client| assert_eq!(bed.connect(client), other));
        assert_eq!((bed.cluster.exception_counts().entries, bed.cluster.exceptions_of(se(1))), (1, 1));
    }
}

#[test]
fn an_entry_ends_with_its_time_and_a_second_add_prolongs_it() {
    let mut bed = Bed::with(trusting());
    bed.serve(1);
    let other = Exception { ttl: 10, ..local(flows("11.0.0.1/32", "0.0.0.0/0", 0, 0)) };
    bed.cluster.except_add(se(1), &other, bed.now).unwrap();
    bed.cluster.except_add(se(1), &Exception { ttl: 3, ..global(clients()) }, bed.now).unwrap();
    bed.sync();
    let begun = bed.now;
    let due = bed.cluster.next_expiry().expect("something expires");
    assert!(due >= begun + Duration::from_secs(3) && due <= begun + Duration::from_millis(3250), "{:?}", due - begun);
    bed.now = begun + Duration::from_millis(2990);
    bed.sync();
    assert_eq!(list(&bed, Filter::default(), 9).len(), 2);
    bed.cluster.except_add(se(1), &Exception { ttl: 3, ..global(clients()) }, bed.now).unwrap();
    bed.now = begun + Duration::from_millis(3500);
    bed.sync();
    assert_eq!(bed.connect(1), 0, "it was prolonged");
    bed.now = begun + Duration::from_millis(6250);
    bed.sync();
    assert_eq!(
        list(&bed, Filter::default(), 9),
        [Listed { scope: Scope::Local, installer: se(1), flows: other.flows }]
    );
    bed.now = begun + Duration::from_millis(10_250);
    bed.sync();
    assert_eq!((list(&bed, Filter::default(), 9).len(), bed.cluster.next_expiry()), (0, None));
    assert_no_exception_in_maps(&bed);
}

#[test]
fn nobody_touches_anothers_entries_and_stop_touches_none() {
    let mut bed = Bed::with(trusting());
    bed.serve(1);
    bed.serve(2);
    bed.cluster.except_add(se(1), &global(clients()), bed.now).unwrap();
    bed.cluster.except_del(se(2), &clients(), bed.now).unwrap();
    bed.cluster.except_reset(se(2), bed.now);
    bed.stop(1);
    bed.lose(2);
    assert_eq!(list(&bed, Filter::default(), 9).len(), 1);
    assert_eq!(bed.connect(1), 0);
    assert_eq!(bed.cluster.except_add(se(2), &local(clients()), bed.now), Err(ExceptError::NoSession));
    assert_eq!(bed.cluster.except_add(se(9), &local(clients()), bed.now), Err(ExceptError::NoSession));
}

#[test]
fn init_reset_and_loss_take_an_ses_entries_away() {
    type Ending = fn(&mut Bed);
    let endings: [Ending; 3] = [
        |bed| bed.lose(1),
        |bed| _ = bed.cluster.except_reset(se(1), bed.now),
        |bed| _ = bed.cluster.init(se(1), true, bed.now),
    ];
    for ending in endings {
        let mut bed = Bed::with(trusting());
        bed.serve(1);
        for length in 8..=24 {
            let flows = flows(&format!("11.0.0.0/{length}"), "0.0.0.0/0", 0, 0);
            bed.cluster.except_add(se(1), &Exception { ttl: length, ..global(flows) }, bed.now).unwrap();
        }
        bed.sync();
        assert_eq!(bed.cluster.farm_exceptions(0).masks, 17);
        ending(&mut bed);
        assert_eq!(bed.cluster.exception_counts().entries, 0, "at once");
        assert_eq!(list(&bed, Filter::default(), 9), []);
        bed.sync();
        assert_eq!(bed.cluster.farm_exceptions(0), FarmExceptions::default());
        assert_no_exception_in_maps(&bed);
    }
}

#[test]
fn what_is_too_much_fails_and_changes_nothing() {
    let mut config = config();
    (config.farms[0].max_exceptions, config.max_exceptions) = (40, 60);
    let mut bed = Bed::with(config);
    (1..=10).for_each(|number| _ = bed.serve(number));
    let with_length = |length: u32, port| flows(&format!("11.0.0.0/{length}"), "0.0.0.0/0", 6, port);
    for length in 1..=32 {
        bed.cluster.except_add(se(1), &local(with_length(length, 0)), bed.now).unwrap();
    }
    let one_more = local(with_length(7, 80));
    let refused = ExceptError::TooManyMasks("web".into());
    assert_eq!(bed.cluster.except_add(se(1), &one_more, bed.now), Err(refused.clone()));
    assert!(refused.to_string().contains("32 different masks"));
    // A mask that nobody uses any more is free once it is out of the map.
    bed.cluster.except_del(se(1), &with_length(9, 0), bed.now).unwrap();
    bed.sync();
    bed.cluster.except_add(se(1), &one_more, bed.now).unwrap();
    bed.cluster.except_del(se(1), &one_more.flows, bed.now).unwrap();
    bed.sync();
    for number in 2..=8 {
        bed.cluster.except_add(se(number), &local(with_length(24, 0)), bed.now).unwrap();
    }
    let refused = ExceptError::TooManyInstallers("web".into());
    assert_eq!(bed.cluster.except_add(se(9), &local(with_length(24, 0)), bed.now), Err(refused));
    for host in 0..9 {
        let flows = flows(&format!("11.0.1.{host}/32"), "0.0.0.0/0", 6, 0);
        bed.cluster.except_add(se(1), &local(flows), bed.now).unwrap();
    }
    let another = |host: u8| local(flows(&format!("11.0.2.{host}/32"), "0.0.0.0/0", 6, 0));
    assert_eq!(bed.cluster.except_add(se(1), &another(0), bed.now), Err(ExceptError::TooMany(40)));
    bed.cluster.except_add(se(1), &local(with_length(32, 0)), bed.now).expect("what is there may be overwritten");
    for host in 0..13 {
        bed.cluster.except_add(se(2), &another(host), bed.now).unwrap();
    }
    assert_eq!(bed.cluster.except_add(se(3), &another(99), bed.now), Err(ExceptError::Full(60)));
    assert_eq!(bed.cluster.exception_counts(), ExceptionCounts { entries: 60, limit: 60 });
    assert_eq!(bed.sync().errors, []);
}

#[test]
fn a_write_that_fails_is_told_and_tried_again() {
    let mut bed = Bed::new();
    bed.serve(1);
    let short = Box::leak(Box::new(Owned::new(64, 32, 64).with_exceptions(1))).view();
    let other = flows("11.0.1.0/24", "0.0.0.0/0", 0, 0);
    let first = bed.cluster.except_add(se(1), &local(clients()), bed.now).unwrap();
    let second = bed.cluster.except_add(se(1), &local(other), bed.now).unwrap();
    let applied = bed.cluster.sync(&short, bed.now);
    assert_eq!((applied.outcome(first), applied.outcome(second)), (Some(true), Some(false)));
    assert_eq!(applied.errors, [crate::control::plan::WriteError::Exception(1)]);
    assert_eq!(bed.cluster.snapshot().pending, 1);
    assert_eq!(bed.sync().errors, [], "with room for it all is well");
    assert_eq!(bed.cluster.snapshot().pending, 0);
}

#[test]
fn a_reset_of_many_is_answered_when_the_last_is_gone_and_a_new_session_is_not_disturbed() {
    let mut config = trusting();
    config.max_exceptions = 20_000;
    let records = abi::exception_records(config.max_exceptions);
    let view = Box::leak(Box::new(Owned::new(64, 32, 64).with_exceptions(records))).view();
    let mut bed = Bed::on(view, config, Instant::now());
    bed.serve(1);
    let numbered = |number: u32| flows(&format!("11.{}.{}.0/24", number >> 8, number & 255), "0.0.0.0/0", 0, 0);
    (0..20_000).for_each(|number| _ = bed.cluster.except_add(se(1), &global(numbered(number)), bed.now).unwrap());
    bed.sync();
    assert_eq!(bed.connect(1), 0);
    let reset = bed.cluster.except_reset(se(1), bed.now);
    let applied = bed.sync();
    assert_eq!((applied.outcome(reset), bed.cluster.next_expiry()), (None, Some(bed.now)));
    // The same flows again, while the old entry may still be there.
    let again = bed.cluster.except_add(se(1), &local(numbered(0)), bed.now).unwrap();
    let applied = bed.sync();
    assert_eq!((applied.outcome(reset), applied.outcome(again)), (None, Some(true)));
    assert_eq!(bed.sync().outcome(reset), Some(true));
    assert_eq!((bed.cluster.exception_counts().entries, bed.cluster.next_expiry()), (1, None));
    let left: Vec<abi::Exception> =
        (0..records).filter_map(|number| bed.view.exception_record(number)).filter(|one| one.state != 0).collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(left[0].state != EXCEPTION_GLOBAL && left[0].installers.iter().filter(|host| **host != 0).count() == 1);
}

#[test]
fn a_listing_has_as_many_entries_as_it_said_whatever_happens() {
    let mut bed = Bed::with(trusting());
    bed.serve(1);
    bed.serve(2);
    let host = |number: u8| flows(&format!("11.0.0.{number}/32"), "0.0.0.0/0", 0, 0);
    for number in 0..20 {
        bed.cluster.except_add(se(1 + number % 2), &global(host(number)), bed.now).unwrap();
    }
    let mut listing = bed.cluster.except_list(Filter { installer: Some(se(1)), ..Filter::default() });
    assert_eq!(listing.count(&bed.cluster, 5), None);
    assert_eq!(listing.count(&bed.cluster, 50), Some(10));
    let mut entries = Vec::new();
    assert!(!listing.read(&bed.cluster, 2, 100, &mut entries));
    assert!(!listing.read(&bed.cluster, 9, 1, &mut entries), "it looks at one");
    (0..20).for_each(|number| _ = bed.cluster.except_del(se(1), &host(number), bed.now).unwrap());
    (50..70).for_each(|number| _ = bed.cluster.except_add(se(1), &local(host(number)), bed.now).unwrap());
    assert!(listing.read(&bed.cluster, 100, 100, &mut entries));
    assert_eq!(entries.len(), 10);
    for entry in &entries {
        let number = entry.flows.source.to_string().split(['.', '/']).nth(3).unwrap().parse::<u8>().unwrap();
        assert!(number < 20 && number % 2 == 0 && entry.scope == Scope::Global, "{entry:?} was never in force then");
    }
    let mut empty = bed.cluster.except_list(Filter { protocol: Some(47), ..Filter::default() });
    assert_eq!(empty.count(&bed.cluster, 100), Some(0));
    assert!(empty.read(&bed.cluster, 1, 1, &mut entries));
}

#[test]
fn stale_exceptions_are_gone_after_a_restart() {
    let mut bed = Bed::with(trusting());
    let server = bed.serve(1);
    bed.cluster.except_add(se(1), &global(clients()), bed.now).unwrap();
    bed.sync();
    assert_eq!(bed.connect(1), 0);
    let mut new = Bed::on(bed.view, trusting(), bed.now + Duration::from_secs(1));
    new.cluster.adopt(&new.view, new.now).unwrap();
    assert_no_exception_in_maps(&new);
    assert_eq!(new.data(1), 0, "what was cut through stays so");
    assert_eq!(new.connect(2), server);
}

#[test]
fn udp_looks_once_and_stays() {
    let mut bed = Bed::with(trusting());
    bed.join(1);
    bed.cluster.start(se(1), crate::control::config::Forwarding::Layer2, 17, 53, bed.now).unwrap();
    bed.sync();
    let server = bed.udp(1);
    assert!(server > DIRECT);
    bed.cluster.except_add(se(1), &global(clients()), bed.now).unwrap();
    bed.sync();
    assert_eq!((bed.udp(1), bed.udp(2)), (server, 0));
    bed.cluster.except_reset(se(1), bed.now);
    bed.sync();
    bed.collect();
    assert_eq!((bed.udp(1), bed.udp(2), bed.udp(3)), (server, 0, server), "no flow moves");
}

/// A few flows that contain one another.
fn some_flows(number: u8) -> Flows {
    let (source, length) = [("11.0.0.1", 32), ("11.0.0.0", 24), ("0.0.0.0", 0)][usize::from(number % 3)];
    let (protocol, port) = [(6, 80), (6, 0), (0, 0), (6, 81)][usize::from(number / 3 % 4)];
    let destination = ["0.0.0.0/0", "192.0.2.10/32"][usize::from(number / 12 % 2)];
    flows(&format!("{source}/{length}"), destination, protocol, port)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The store against a map that is too simple to be wrong, and new flows against what that says.
    #[test]
    fn the_store_is_what_a_naive_model_is(steps in proptest::collection::vec(any::<u32>(), 1..80)) {
        let mut bed = Bed::with(trusting());
        let servers: Vec<u32> = (1..=3).map(|number| bed.serve(number)).collect();
        let mut model: BTreeMap<(IpAddr, Flows), (Scope, Option<Instant>)> = BTreeMap::new();
        for (client, step) in (1..).zip(steps) {
            let [act, who, what, how] = step.to_le_bytes();
            let (address, flows) = (se(1 + who % 3), some_flows(what));
            match act % 16 {
                0..=7 => {
                    let scope = if how % 3 == 0 && flows != Flows::ALL { Scope::Global } else { Scope::Local };
                    let ttl = u32::from(how / 3 % 4) * 2;
                    bed.cluster.except_add(address, &Exception { scope, ttl, flows }, bed.now).unwrap();
                    let end = (ttl > 0).then(|| bed.now + Duration::from_secs(ttl.into()));
                    model.insert((address, flows), (scope, end));
                }
                8..=11 => {
                    bed.cluster.except_del(address, &flows, bed.now).unwrap();
                    model.remove(&(address, flows));
                }
                12 => {
                    bed.cluster.except_reset(address, bed.now);
                    model.retain(|(installer, _), _| *installer != address);
                }
                _ => {
                    bed.now += Duration::from_secs(1);
                    model.retain(|_, (_, end)| end.is_none_or(|end| end > bed.now));
                }
            }
            bed.sync();
            let mut listed = list(&bed, Filter::default(), 5);
            listed.sort_by_key(|entry| (entry.installer, entry.flows));
            let wanted: Vec<Listed> = model
                .iter()
                .map(|((installer, flows), (scope, _))| Listed { scope: *scope, installer: *installer, flows: *flows })
                .collect();
            prop_assert_eq!(&listed, &wanted);
            // A client of 11.0.0.1 asks for tcp/80.
            let matches = |flows: &Flows| flows.port != 81;
            let hit = |scope| wanted.iter().filter(move |one| one.scope == scope && matches(&one.flows));
            let went = bed.connect(client);
            if hit(Scope::Global).next().is_some() {
                prop_assert_eq!(went, 0);
            } else {
                let refuse: Vec<IpAddr> = hit(Scope::Local).map(|one| one.installer).collect();
                let left = |number: &u8| !refuse.contains(&se(*number));
                let possible: Vec<u32> =
                    (1..=3).filter(left).map(|number| servers[usize::from(number) - 1]).collect();
                prop_assert!(possible.contains(&went) || possible.is_empty() && went == 0, "{} of {:?}", went, possible);
            }
        }
    }
}

/// Figures for the documentation: `cargo test --release -p necp-user --lib a_million -- --nocapture`.
#[test]
fn a_million_exceptions_take_little_room_and_leave_in_small_batches() {
    [se(1), se6(1)].into_iter().for_each(a_million_of);
}

fn a_million_of(server: IpAddr) {
    let number = if cfg!(debug_assertions) { 1 << 17 } else { 1 << 20 };
    let mut config = config_of_both();
    (config.max_exceptions, config.farms[0].max_exceptions) = (number, number);
    let records = abi::exception_records(number);
    let view = Box::leak(Box::new(Owned::new(64, 32, 64).with_exceptions(records))).view();
    let mut bed = Bed::on(view, config, Instant::now());
    bed.serve(1);
    bed.serve6(1);
    let begun = Instant::now();
    for one in 0..number {
        let four = ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::from(0x0b00_0000 + (one << 4)), 28);
        let six = ipnet::Ipv6Net::new_assert((0x2001_0db8_u128 << 96 | u128::from(one) << 64).into(), 64);
        let flows = match server {
            IpAddr::V4(_) => Flows { source: four.into(), ..Flows::ALL },
            IpAddr::V6(_) => Flows { source: six.into(), ..Flows::all(Family::V6) },
        };
        bed.cluster.except_add(server, &Exception { ttl: 1000 + one, ..local(flows) }, bed.now).unwrap();
        if one % 4096 == 0 {
            bed.sync();
        }
    }
    assert_eq!(bed.sync().errors, []);
    let added = begun.elapsed();
    let bytes = bed.cluster.exceptions.bytes();
    assert!(bytes / number as usize <= 200, "{} bytes an entry", bytes / number as usize);
    bed.cluster.session_lost(server, bed.now);
    bed.sync();
    let (mut batches, mut longest) = (1, Duration::ZERO);
    while bed.cluster.next_expiry().is_some_and(|at| at <= bed.now) {
        let begun = Instant::now();
        bed.sync();
        (batches, longest) = (batches + 1, longest.max(begun.elapsed()));
    }
    println!(
        "{number} entries of {server}: {} bytes each, {:.2} us each to add and write; removed in {batches} batches, the longest {:.1} ms",
        bytes / number as usize,
        added.as_secs_f64() * 1e6 / f64::from(number),
        longest.as_secs_f64() * 1e3
    );
    assert_no_exception_in_maps(&bed);
}
