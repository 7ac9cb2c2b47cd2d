//! As many servers as the daemon is built for.

use std::collections::BTreeMap;

use super::*;
use crate::control::plan::Applied;

const SERVERS: u32 = 10_000;
const SERVICES: u16 = 4;
const SLOTS: u32 = 65_537;

/// Tables of that size, and a cluster that nobody has joined.
fn bed() -> Bed {
    let mut configuration = config();
    let farm = &mut configuration.farms[0];
    farm.services = (0..SERVICES).map(|at| ServiceKey::new(TCP, 8000 + at)).collect();
    farm.servers = vec!["10.0.0.0/16".parse().expect("a prefix")];
    farm.table_size = SLOTS;
    (configuration.slots, configuration.servers) = (u32::from(SERVICES) * SLOTS, abi::MAX_SERVERS);
    Bed::with(configuration)
}

fn address(number: u32) -> IpAddr {
    std::net::Ipv4Addr::from(0x0a00_0100 + number).into()
}

fn start_all(bed: &mut Bed, number: u32) {
    for service in 0..SERVICES {
        let started = bed.cluster.start(address(number), Forwarding::Layer2, TCP, 8000 + service, bed.now);
        assert!(started.is_ok(), "{started:?}");
    }
}

fn join_all(bed: &mut Bed) -> Applied {
    for number in 0..SERVERS {
        bed.cluster.init(address(number), true, bed.now).expect("it may join");
        let [_, _, low, lower] = number.to_be_bytes();
        let hop = Hop { mac: [2, 0, 0, 0, low, lower], ..hop(1) };
        bed.cluster.host_reachable(address(number), hop, bed.now);
        start_all(bed, number);
    }
    bed.sync()
}

fn owners(bed: &Bed) -> Vec<Vec<u32>> {
    let of = |service| bed.slots(service).iter().map(|slot| slot.owner()).collect();
    (0..usize::from(SERVICES)).map(of).collect()
}

fn moved(before: &[u32], after: &[u32]) -> usize {
    before.iter().zip(after).filter(|(before, after)| before != after).count()
}

#[test]
fn ten_thousand_servers_share_four_services_and_one_of_them_moves_its_own_slots() {
    let mut bed = bed();
    let applied = join_all(&mut bed);
    assert!(applied.records_written >= (SERVERS * u32::from(SERVICES)) as usize, "{}", applied.records_written);
    for owners in owners(&bed) {
        let mut shares = BTreeMap::<u32, u32>::new();
        owners.iter().for_each(|owner| *shares.entry(*owner).or_default() += 1);
        assert_eq!(shares.len(), SERVERS as usize);
        assert!(shares.iter().all(|(id, slots)| bed.accepts(*id) && (6..=7).contains(slots)));
    }
    assert!(bed.cluster.plan(bed.now).is_empty(), "nothing is left to do");
    assert_eq!(bed.cluster.hosts().count(), SERVERS as usize);

    let before = owners(&bed);
    bed.cluster.stop(address(17), TCP, 8000, bed.now);
    let applied = bed.sync();
    let after = owners(&bed);
    assert_eq!(applied.records_written, 1, "its own record");
    assert!(moved(&before[0], &after[0]) <= 7 + SLOTS as usize / 100, "{} slots", moved(&before[0], &after[0]));
    assert_eq!(before[1..], after[1..], "other services stay");

    let before = after;
    bed.cluster.session_lost(address(18), bed.now);
    assert_eq!(bed.sync().records_written, usize::from(SERVICES));
    let after = owners(&bed);
    let most = before.iter().zip(&after).map(|(before, after)| moved(before, after)).max();
    assert!(most.is_some_and(|most| (6..=7 + SLOTS as usize / 100).contains(&most)), "{most:?} slots");
}

#[test]
fn ten_thousand_servers_lost_at_once_are_kept_and_come_back_to_their_slots() {
    let mut bed = bed();
    join_all(&mut bed);
    let before = owners(&bed);
    let half = SERVERS / 2;
    // Their ends arrive in many plans. With the last of these it is the majority.
    for number in 0..=half {
        bed.cluster.session_lost(address(number), bed.now);
    }
    bed.sync();
    assert_eq!(bed.cluster.poll_notice(), Some(Notice::PanicBegan { farm: 0 }));
    for number in half + 1..SERVERS {
        bed.cluster.session_lost(address(number), bed.now);
        if number % 1000 == 0 {
            bed.sync();
        }
    }
    bed.sync();
    assert!(bed.cluster.snapshot().farms[0].alarm);
    assert!(owners(&bed) == before, "the last table is kept");
    for number in 0..SERVERS {
        bed.cluster.init(address(number), true, bed.now).expect("it may join");
        start_all(&mut bed, number);
    }
    bed.sync();
    assert_eq!(bed.cluster.poll_notice(), Some(Notice::PanicEnded { farm: 0 }));
    assert!(!bed.cluster.snapshot().farms[0].alarm && owners(&bed) == before, "the same ids, the same slots");
}
