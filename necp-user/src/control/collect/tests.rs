//! State shrinks to nothing, and not too early.

use necp_ebpf::{
    abi::FIRST_SERVER,
    packet::{protocol, tcp},
    six::steer,
    tables::Addresses6,
};

use super::{
    super::{
        config::{Forwarding, halves},
        testbed::{Bed, VIPS6, config, config_of_both, se},
    },
    *,
};

const TCP_IDLE: u64 = 600;

fn bed() -> Bed {
    let mut config = config();
    config.farms[0].tcp_idle = Duration::from_secs(TCP_IDLE);
    Bed::with(config)
}

fn is_plain(bed: &Bed) -> bool {
    bed.slots(0).iter().all(|slot| slot.is_plain())
}

#[test]
fn after_a_change_state_shrinks_to_nothing() {
    let mut bed = bed();
    let first = bed.serve(1);
    let clients: Vec<u16> = (1..40).collect();
    for &client in &clients {
        assert_eq!(bed.connect(client), first);
    }
    let second = bed.serve(2);
    assert!(!is_plain(&bed));
    assert!(clients.iter().all(|&client| bed.data(client) == first), "no flow moves");
    let collected = bed.collect();
    assert!(collected.records > 0 && collected.by_server.keys().eq([&first]), "{collected:?}");
    assert_eq!(collected.by_service, [collected.records, 0]);
    // In use, they stay for as long as they like.
    for _ in 0..5 {
        bed.collect_for(TCP_IDLE / 2);
        assert!(clients.iter().all(|&client| bed.data(client) == first), "no flow moves");
    }
    assert!(bed.slots(0).iter().all(|slot| slot.legacy() == NONE), "the legacy's time is over");
    bed.collect_for(TCP_IDLE + TCP_IDLE / 10 + 2);
    let collected = bed.collect();
    assert_eq!((collected.records, collected.candidates, collected.legacies, collected.tracked), (0, 0, 0, 0));
    assert!(is_plain(&bed));
    assert!(bed.owned(first) > 0 && bed.owned(second) > 0);
}

/// A packet of an IPv6 client, by its source port; the server.
fn send6(bed: &Bed, client: u16, flags: u8, sequence: u32) -> u32 {
    let packet = Packet {
        source_port: client,
        destination_port: 80_u16.to_be(),
        protocol: protocol::TCP,
        flags,
        sequence,
        ..Packet::default()
    };
    let addresses = Addresses6 { source: [client.into(), 7], destination: halves(VIPS6[0]) };
    steer(&packet, &bed.view.six(addresses).expect("IPv6")).server
}

#[test]
fn after_a_change_the_state_of_ipv6_flows_shrinks_to_nothing_too() {
    let mut config = config_of_both();
    config.farms[0].tcp_idle = Duration::from_secs(TCP_IDLE);
    let mut bed = Bed::with(config);
    let first = bed.serve6(1);
    for client in 1..40 {
        assert_eq!(send6(&bed, client, tcp::SYN, 1000), first);
        assert_eq!(send6(&bed, client, tcp::ACK, 1001), first);
    }
    bed.serve6(2);
    let stays = |bed: &Bed| (1..40).all(|client| send6(bed, client, tcp::ACK, 1001) == first);
    assert!(stays(&bed), "no flow moves");
    let collected = bed.collect();
    assert!(collected.records > 0 && collected.by_server.keys().eq([&first]), "{collected:?}");
    assert_eq!(collected.by_service, [0, 0, collected.records, 0]);
    for _ in 0..3 {
        bed.collect_for(TCP_IDLE / 2);
        assert!(stays(&bed), "no flow moves");
    }
    bed.collect_for(TCP_IDLE + TCP_IDLE / 10 + 2);
    let collected = bed.collect();
    assert_eq!((collected.records, collected.legacies, collected.tracked), (0, 0, 0));
    assert!(bed.slots(2).iter().all(|slot| slot.is_plain()));
}

#[test]
fn a_record_lives_its_idle_time_and_a_tenth_more_at_most() {
    for (closing, idle) in [(false, TCP_IDLE), (true, 120)] {
        for offset in 0..7 {
            let mut bed = bed();
            let first = bed.serve(1);
            (1..40).for_each(|client| assert_eq!(bed.connect(client), first));
            bed.serve(2);
            // Legacies are kept, so nothing is redundant.
            bed.collect_for(offset);
            let client = (1..40).find(|&client| {
                bed.data(client);
                bed.collect().records > 0
            });
            let client = client.expect("a flow on a slot that moved");
            bed.send(client, if closing { tcp::FIN | tcp::ACK } else { tcp::ACK }, 1001);
            let mut lived = 0;
            while bed.collect().records > 0 {
                bed.collect_for(1);
                lived += 1;
                assert!(lived < 2 * idle, "it never goes");
            }
            assert!((idle..=idle + idle / 10 + 2).contains(&lived), "closing {closing}: {lived} s instead of {idle}");
        }
    }
}

#[test]
fn a_candidate_lives_as_long_as_a_connection_may_be_half_open() {
    let mut bed = bed();
    bed.serve(1);
    bed.serve(2);
    (1..40).for_each(|client| assert_ne!(bed.send(client, tcp::SYN, 1000).server, NONE));
    let candidates = bed.collect().candidates;
    assert!(candidates > 0);
    bed.collect_for(59);
    assert_eq!(bed.collect().candidates, candidates);
    bed.collect_for(8);
    assert_eq!(bed.collect().candidates, 0);
}

#[test]
fn what_the_slot_says_anyway_goes_at_once_but_not_where_every_flow_is_recorded() {
    let mut bed = bed();
    let id = bed.serve(1);
    bed.cluster.start(se(1), Forwarding::Layer2, 17, 53, bed.now).expect("it may start udp/53");
    bed.sync();
    let udp = bed.udp(7);
    assert!(udp > id);
    bed.health(1, 0);
    bed.health(1, 100);
    // Away and back: the slots are tracked, and new flows on record go where the slot says.
    assert!(bed.slots(0).iter().all(|slot| slot.is_tracked() && slot.legacy() == NONE), "{:?}", bed.slots(0));
    (1..40).for_each(|client| assert_eq!(bed.connect(client), id));
    let collected = bed.collect();
    assert_eq!(collected.by_service, [0, 1], "only the UDP flow is on record");
    assert!(is_plain(&bed));
    bed.collect_for(170);
    assert_eq!(bed.udp(7), udp);
    bed.collect_for(205);
    assert_eq!(bed.collect().records, 0, "UDP's time is shorter");
}

#[test]
fn a_redundant_tcp_record_goes() {
    let mut bed = bed();
    let first = bed.serve(1);
    (1..40).for_each(|client| assert_ne!(bed.connect(client), NONE));
    bed.serve(2);
    (1..40).for_each(|client| assert_eq!(bed.data(client), first));
    assert!(bed.collect().records > 0);
    bed.stop(2);
    assert!(bed.slots(0).iter().all(|slot| slot.owner() == first && slot.legacy() == NONE));
    let collected = bed.collect();
    assert_eq!(collected.records, 0);
    assert!(collected.dropped > 0);
    assert!(is_plain(&bed));
    (1..40).for_each(|client| assert_eq!(bed.data(client), first));
}

#[test]
fn what_is_dead_goes_at_once_and_its_id_after_two_passes() {
    let mut bed = bed();
    let first = bed.serve(1);
    (1..40).for_each(|client| assert_ne!(bed.connect(client), NONE));
    bed.serve(2);
    (1..40).for_each(|client| assert_eq!(bed.data(client), first));
    bed.kill(1);
    assert!(!bed.cluster.is_alive(first));
    let collected = bed.collect();
    assert_eq!((collected.records, collected.legacies, collected.freed.len()), (0, 0, 0));
    assert_eq!(bed.collect().freed, [] as [u32; 0], "its legacies were met in the pass that removed them");
    assert_eq!(bed.collect().freed, [first]);
    assert_eq!(bed.server(first), Default::default());
    assert_eq!(bed.serve(3), first);
}

#[test]
fn an_id_is_not_free_while_a_flow_is_on_record_for_it() {
    let mut bed = bed();
    let first = bed.serve(1);
    (1..40).for_each(|client| assert_eq!(bed.connect(client), first));
    bed.serve(2);
    bed.stop(1);
    for _ in 0..4 {
        bed.collect_for(TCP_IDLE / 2);
        (1..40).for_each(|client| assert_eq!(bed.data(client), first, "it drains"));
    }
    assert!(bed.view.server(first).is_some_and(|server| server.flags != 0));
    bed.collect_for(TCP_IDLE + TCP_IDLE / 10 + 4);
    assert_eq!(bed.server(first), Default::default());
    assert_eq!(first, FIRST_SERVER);
}

#[test]
fn a_legacy_stays_while_insertions_fail() {
    let mut bed = bed();
    bed.serve(1);
    bed.serve(2);
    let legacies = bed.collect().legacies;
    assert!(legacies > 0);
    let mut run = |seconds, unrecorded| {
        bed.now += Duration::from_secs(seconds);
        bed.collector.run(&bed.view, &mut bed.cluster, bed.now, unrecorded).legacies
    };
    assert_eq!(run(TCP_IDLE - 10, 1), legacies, "the counter moved");
    assert_eq!(run(100, 1), legacies, "one idle time from then on");
    assert_eq!(run(TCP_IDLE - 110, 1), legacies);
    assert_eq!(run(12, 1), 0);
    assert_eq!(bed.collector.turned_away_at(), Some(bed.now - Duration::from_secs(100 + TCP_IDLE - 110 + 12)));
}

#[test]
fn batches_make_the_same_pass() {
    let mut bed = bed();
    let first = bed.serve(1);
    (1..40).for_each(|client| assert_ne!(bed.connect(client), NONE));
    bed.serve(2);
    (1..40).for_each(|client| assert_eq!(bed.data(client), first));
    let mut steps = 0;
    loop {
        match bed.collector.step(&bed.view, &mut bed.cluster, bed.now, 5, 0) {
            Progress::Finished => break,
            progress => assert_eq!(progress, Progress::Working),
        }
        steps += 1;
        (1..40).for_each(|client| assert_eq!(bed.data(client), first, "no flow moves in the middle"));
    }
    assert!(steps > 10);
    let batched = bed.collector.last().clone();
    assert!(batched.records > 0);
    let next = bed.now + Duration::from_secs(2);
    assert_eq!(bed.collector.step(&bed.view, &mut bed.cluster, bed.now, 5, 0), Progress::Idle(next));
    assert_eq!(bed.collect(), batched);
}

#[test]
fn a_flow_recorded_in_the_middle_of_a_pass_is_not_forgotten() {
    // At every point of the pass at which a batch may end, one more flow records itself.
    for batches in 0.. {
        let mut bed = bed();
        let first = bed.serve(1);
        (1..40).for_each(|client| assert_ne!(bed.connect(client), NONE));
        bed.serve(2);
        let mut progress = Progress::Working;
        for _ in 0..batches {
            progress = bed.collector.step(&bed.view, &mut bed.cluster, bed.now, 1, 0);
        }
        (1..40).for_each(|client| assert_eq!(bed.data(client), first));
        bed.collector.run(&bed.view, &mut bed.cluster, bed.now, 0);
        // The legacy goes, so that only TRACKED shows that there are records.
        for slot in bed.view.slots() {
            let word = SlotWord(slot.load());
            slot.store(word.with_legacy(NONE).0);
        }
        (1..40).for_each(|client| assert_eq!(bed.data(client), first, "after {batches} batches"));
        if progress == Progress::Finished {
            return;
        }
    }
}

#[test]
fn a_record_that_says_what_the_owner_says_stays_as_long_as_there_is_a_legacy() {
    let mut bed = bed();
    bed.serve(1);
    let second = bed.serve(2);
    let placed: Vec<(u16, u32)> = (40..80).map(|client| (client, bed.connect(client))).collect();
    assert!(placed.iter().any(|(_, server)| *server == second));
    bed.collect_for(10);
    assert!(placed.iter().all(|(client, server)| bed.data(*client) == *server), "they would go to the legacy without");
}

#[test]
fn a_legacy_has_its_whole_idle_time_however_late_the_change_comes() {
    let mut bed = bed();
    let first = bed.serve(1);
    (1..40).for_each(|client| assert_eq!(bed.connect(client), first));
    bed.wait(10 * TCP_IDLE);
    bed.serve(2);
    let legacies = bed.collect().legacies;
    assert!(legacies > 0);
    bed.wait(TCP_IDLE);
    assert_eq!(bed.collect().legacies, legacies);
    (1..40).for_each(|client| assert_eq!(bed.data(client), first, "no flow moves"));
    bed.wait(2);
    assert_eq!(bed.collect().legacies, 0);
    (1..40).for_each(|client| assert_eq!(bed.data(client), first, "they are on record"));
}
