//! Writes: few, in order, and none of them lost.

use necp_ebpf::{
    abi::{ACCEPTS, FIRST_SERVER},
    host::Owned,
    slot::{SlotWord, TRACKED},
};

use super::{
    super::{
        config::{ClusterConfig, Forwarding},
        testbed::{Bed, config, se},
    },
    *,
};

fn with_size(size: u32) -> ClusterConfig {
    let mut config = config();
    config.farms[0].table_size = size;
    config.slots = 4 * size;
    config
}

#[test]
fn a_plan_writes_what_differs_and_no_more() {
    let mut bed = Bed::with(with_size(251));
    assert_eq!(bed.sync().records_written, 6, "two VIPs with two services each, and a note of each VIP");
    assert!(bed.cluster.plan(bed.now).is_empty());
    bed.join(1);
    bed.start(1);
    let applied = bed.sync();
    assert_eq!((applied.records_written, applied.slots_moved), (1, 251));
    bed.join(2);
    bed.start(2);
    let before = bed.slots(0);
    let applied = bed.sync();
    let moved = bed.slots(0).iter().zip(&before).filter(|(a, b)| a.owner() != b.owner()).count();
    assert_eq!((applied.records_written, applied.slots_moved), (1, moved));
    assert!((125..=126).contains(&moved), "{moved} slots moved to the second of two equals");
    bed.health(2, 97);
    assert!(bed.cluster.plan(bed.now).is_empty());
}

#[test]
fn several_inputs_make_one_plan_and_what_comes_to_nothing_writes_nothing() {
    let mut bed = Bed::new();
    bed.serve(1);
    bed.join(2);
    let started = bed.start(2);
    let stopped = bed.cluster.stop(se(2), 6, 80, bed.now);
    let applied = bed.sync();
    assert_eq!(applied.slots_moved, 0);
    assert_eq!((applied.outcome(started), applied.outcome(stopped)), (Some(true), Some(true)));
    assert_eq!(applied.outcome(bed.cluster.stop(se(2), 6, 80, bed.now)), None, "not tried yet");
}

#[test]
fn services_of_one_farm_share_slots_among_vips_and_have_ids_of_their_own() {
    let mut bed = Bed::new();
    bed.serve(1);
    let entries: Vec<abi::Service> = (0..abi::SERVICE_BUCKETS)
        .flat_map(|bucket| bed.view.services(bucket).expect("a bucket").entries)
        .filter(|service| service.state == 1)
        .collect();
    assert_eq!(entries.len(), 4);
    let ids: BTreeSet<u16> = entries.iter().map(|service| service.id & !abi::UDP_CLASS).collect();
    assert_eq!(ids.len(), 4);
    for service in &entries {
        let udp = service.protocol == 17;
        assert_eq!((service.id & abi::UDP_CLASS != 0, service.flags), (udp, u16::from(udp) * abi::ALWAYS_TRACKED));
        assert_eq!(service.slots_base, if udp { 11 } else { 0 });
        assert_eq!(service.seed, bed.cluster.config().farms[0].seed());
    }
}

#[test]
fn the_record_is_there_before_the_slots_and_a_stop_before_they_move() {
    let mut bed = Bed::new();
    bed.join(1);
    bed.start(1);
    let plan = bed.cluster.plan(bed.now);
    let first = plan.servers[0].id;
    assert_eq!((first, plan.servers[0].server.flags & ACCEPTS), (FIRST_SERVER, ACCEPTS));
    // The slots are refused, and yet the record has been written.
    let short = Box::leak(Box::new(Owned::new(5, 32, 64))).view();
    let applied = plan.apply(&short, bed.cluster.ledger_mut(), bed.now);
    assert_eq!(applied.errors, [WriteError::Slot(5), WriteError::Slot(11)]);
    assert_eq!(short.server(first), Some(plan.servers[0].server));
    let services = (0..abi::SERVICE_BUCKETS).filter_map(|bucket| short.services(bucket)).flat_map(|one| one.entries);
    assert_eq!(services.filter(|service| service.state == 1).count(), 0, "entries last");
    bed.cluster.applied(&applied);
    bed.cluster.stop(se(1), 6, 80, bed.now);
    let applied = bed.cluster.sync(&short, bed.now);
    assert!(!applied.errors.is_empty());
    assert_eq!(short.server(first).map(|server| server.flags & ACCEPTS), Some(0));
}

#[test]
fn what_failed_is_told_stays_pending_and_is_tried_again() {
    let mut bed = Bed::new();
    let small = Box::leak(Box::new(Owned::new(64, 3, 64))).view();
    bed.join(1);
    bed.join(2);
    let (first, second) = (bed.start(1), bed.start(2));
    let applied = bed.cluster.sync(&small, bed.now);
    assert_eq!(applied.errors[0], WriteError::Server(3));
    assert_eq!(applied.outcome(second), Some(false));
    assert_eq!(applied.outcome(first), Some(false), "the table that both are in names a server without a record");
    assert!(small.slots().iter().all(|slot| slot.load() == 0));
    assert!(bed.cluster.snapshot().pending > 0);
    let later = bed.cluster.stop(se(2), 6, 80, bed.now);
    let applied = bed.cluster.sync(&small, bed.now);
    assert_eq!(applied.outcome(later), Some(false), "its record is still missing");
    assert!(small.slots()[..11].iter().all(|slot| SlotWord(slot.load()) == SlotWord::plain(FIRST_SERVER)));
    assert_eq!(bed.cluster.plan(bed.now).servers.len(), 1, "nothing else is pending");
    let unrelated = bed.cluster.host_unreachable(se(9), bed.now);
    let applied = bed.sync();
    assert_eq!(applied.outcome(unrelated), Some(true));
    assert_eq!(bed.cluster.snapshot().pending, 0, "with room for it all is well");
    assert_eq!(bed.server(FIRST_SERVER + 1).address, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 2]);
}

#[test]
fn the_packet_path_may_set_tracked_at_any_time() {
    let mut bed = Bed::new();
    let first = bed.serve(1);
    bed.view.slots().iter().for_each(|slot| slot.set_bits(TRACKED));
    let second = bed.serve(2);
    for slot in bed.slots(0) {
        assert!(slot.is_tracked());
        assert_eq!(slot.legacy(), if slot.owner() == second { first } else { NONE });
    }
}

#[test]
fn slots_of_services_whose_flows_are_all_on_record_have_no_legacy() {
    let mut bed = Bed::new();
    for number in [1, 2] {
        bed.join(number);
        bed.cluster.start(se(number), Forwarding::Layer2, 17, 53, bed.now).expect("it may start udp/53");
        bed.sync();
    }
    assert!(bed.slots(1).iter().all(|slot| slot.is_plain() && slot.owner() >= FIRST_SERVER));
    let servers: Vec<u32> = (1..40).map(|client| bed.udp(client)).collect();
    bed.cluster.stop(se(1), 17, 53, bed.now);
    bed.sync();
    assert_eq!((1..40).map(|client| bed.udp(client)).collect::<Vec<_>>(), servers, "no flow moves");
}

/// One farm that intercepts tcp/80 and udp/53, 11 slots each.
fn intercepting() -> ClusterConfig {
    let mut config = config();
    config.farms[0].vips.clear();
    config.farms[0].forwarding.retain(|forwarding| *forwarding != Forwarding::Layer3);
    config.farms[0].intercept = vec!["0.0.0.0/0".parse().expect("a prefix")];
    config
}

fn places(bed: &Bed, service: usize) -> BTreeSet<(u32, u32)> {
    bed.slots(service).iter().map(|slot| (slot.owner(), slot.legacy())).collect()
}

#[test]
fn what_is_intercepted_is_direct_until_the_first_start_and_what_began_before_stays_so() {
    let mut bed = Bed::with(intercepting());
    assert_eq!(bed.sync().records_written, 2, "an entry for each service");
    assert_eq!((places(&bed, 0), places(&bed, 1)), ([(DIRECT, NONE)].into(), [(DIRECT, NONE)].into()));
    let id = bed.serve(1);
    assert_eq!(places(&bed, 0), [(id, DIRECT)].into());
    // The flows that began before come to their end, or are collected.
    bed.collect_for(4);
    assert_eq!(places(&bed, 0), [(id, DIRECT)].into(), "TCP flows may be silent for two hours");
    bed.stop(1);
    assert_eq!(places(&bed, 0), [(DIRECT, NONE)].into(), "back to where they were");
    assert!(bed.slots(0).iter().all(|slot| slot.is_tracked()), "flows of the server in between may be on record");
}

#[test]
fn a_server_takes_what_is_intercepted_of_its_own_family() {
    let mut config = intercepting();
    config.farms[0].intercept.push("::/0".parse().expect("a prefix"));
    config.farms[0].servers.push("2001:db8::/64".parse().expect("a prefix"));
    let mut bed = Bed::with(config);
    assert_eq!(bed.sync().records_written, 4, "an entry for each service and family");
    let direct: BTreeSet<_> = [(DIRECT, NONE)].into();
    let id = bed.serve(1);
    assert_eq!([0, 1, 2, 3].map(|service| places(&bed, service) == direct), [false, true, true, true]);
    let id6 = bed.serve6(1);
    assert_eq!((places(&bed, 0), places(&bed, 2)), ([(id, DIRECT)].into(), [(id6, DIRECT)].into()));
}

#[test]
fn a_start_before_the_first_write_leaves_old_flows_direct_too() {
    let mut bed = Bed::with(intercepting());
    bed.join(1);
    bed.start(1);
    bed.cluster.start(se(1), Forwarding::Layer2, 17, 53, bed.now).expect("it may start");
    bed.sync();
    let id = bed.id(1);
    assert_eq!(places(&bed, 0), [(id, DIRECT)].into());
    assert!(places(&bed, 1).iter().all(|&(owner, legacy)| owner != DIRECT && legacy == NONE), "UDP shows no beginning");
}

#[test]
fn what_is_intercepted_is_cut_through_when_all_servers_are_lost_at_once() {
    let mut bed = Bed::with(intercepting());
    let ids: Vec<u32> = (1..=4).map(|number| bed.serve(number)).collect();
    (1..=4).for_each(|number| bed.lose(number));
    assert_eq!(bed.cluster.poll_notice(), None, "no panic");
    assert!(!bed.cluster.snapshot().farms[0].alarm);
    assert_eq!(bed.owned(DIRECT), 11);
    assert!(ids.iter().all(|&id| bed.cluster.is_alive(id) && !bed.accepts(id)), "their flows stay with them");
    // A host that is gone is certainly gone: nobody waits to see whether this is a panic.
    bed.kill(1);
    assert!(!bed.cluster.is_alive(ids[0]));
}

#[test]
fn a_restart_goes_on_with_what_is_intercepted() {
    let mut bed = Bed::with(intercepting());
    let id = bed.serve(1);
    let mut new = Bed::on(bed.view, intercepting(), bed.now);
    let adopted = new.cluster.adopt(&new.view, new.now).expect("everything finds its place");
    assert_eq!((adopted.services, adopted.services_new, adopted.serving), (2, 0, 1));
    new.sync();
    assert_eq!(places(&new, 0), [(id, DIRECT)].into());
}
