//! The rules of the control plane, one by one.

use std::collections::BTreeSet;

use necp_ebpf::abi::{DIRECT, FIRST_SERVER, NONE};

use super::{
    super::{
        status::ServerState,
        testbed::{Bed, config, config_of_both, hop, se, se6},
    },
    *,
};

mod capacity;

const TCP: u8 = 6;

#[test]
fn only_configured_addresses_may_join() {
    let mut bed = Bed::new();
    assert_eq!(bed.cluster.may_join(se(1)), Some(Admission { farms: vec![0] }));
    let stranger = IpAddr::from([10, 0, 1, 1]);
    assert_eq!(bed.cluster.may_join(stranger), None);
    assert_eq!(bed.cluster.init(stranger, true, bed.now), Err(NotAdmitted(stranger)));
    bed.cluster.host_reachable(stranger, Hop { mac: [2; 6], port: 0, ..hop(1) }, bed.now);
    assert_eq!(bed.cluster.hosts.len(), 0, "nothing is kept about strangers");
}

#[test]
fn who_comes_and_goes_leaves_nothing_behind() {
    let mut bed = Bed::new();
    let id = bed.serve(1);
    for number in 2..40 {
        bed.join(number);
        bed.cluster.host_reachable(se(number), hop(number), bed.now);
        bed.lose(number);
    }
    bed.lose(1);
    bed.sync();
    assert_eq!(bed.cluster.hosts.len(), 39, "they still answer");
    bed.cluster.forget_visitors();
    assert_eq!(bed.cluster.hosts.keys().copied().collect::<Vec<_>>(), [se(1)], "it has flows");
    assert_eq!(bed.cluster.id_of(&bed.cluster.offers[&id].key), Some(id));
    assert_eq!(bed.serve(1), id);
}

#[test]
fn a_start_that_cannot_be_is_refused_by_name() {
    let mut configuration = config();
    configuration.implemented = vec![Forwarding::Layer2];
    configuration.farms[0].forwarding = vec![Forwarding::Layer2, Forwarding::Gre];
    configuration.servers = FIRST_SERVER + 1;
    let mut bed = Bed::with(configuration);
    let now = bed.now;
    let mut start = |forwarding, port| bed.cluster.start(se(1), forwarding, TCP, port, now);
    assert_eq!(start(Forwarding::Layer2, 80), Err(StartError::NoSession));
    bed.join(1);
    let mut start = |forwarding, port| bed.cluster.start(se(1), forwarding, TCP, port, now);
    assert_eq!(start(Forwarding::Layer2, 81), Err(StartError::NotOffered(ServiceKey::new(TCP, 81))));
    assert_eq!(start(Forwarding::Layer3, 80), Err(StartError::NotAllowed(Forwarding::Layer3)));
    assert_eq!(start(Forwarding::Gre, 80), Err(StartError::Unsupported(Forwarding::Gre)));
    bed.cluster.init(se(1), false, now).expect("it may join");
    assert_eq!(bed.cluster.start(se(1), Forwarding::Layer2, TCP, 80, now), Err(StartError::NotOnLink));
    bed.cluster.host_on_link(se(1), true);
    assert!(bed.cluster.start(se(1), Forwarding::Layer2, TCP, 80, now).is_ok(), "a route has come");
    bed.stop(1);
    bed.serve(1);
    bed.join(2);
    let full = bed.cluster.start(se(2), Forwarding::Layer2, TCP, 80, now);
    assert_eq!(full, Err(StartError::NoIdLeft(NoIdLeft)));
    bed.lose(1);
    assert_eq!(bed.cluster.start(se(1), Forwarding::Layer2, TCP, 80, now), Err(StartError::NoSession));
}

#[test]
fn a_server_serves_the_vips_of_the_family_that_it_joins_over() {
    let mut bed = Bed::with(config_of_both());
    let (four, six) = (bed.serve(1), bed.serve6(1));
    assert_ne!(four, six);
    let owners = |bed: &Bed, service| bed.slots(service).iter().map(|slot| slot.owner()).collect::<BTreeSet<_>>();
    assert_eq!((owners(&bed, 0), owners(&bed, 2)), ([four].into(), [six].into()));
    assert_eq!(std::net::Ipv6Addr::from(bed.server(six).address), se6(1));
    bed.stop(1);
    assert_eq!((owners(&bed, 0), owners(&bed, 2)), ([DIRECT].into(), [six].into()), "STOP is for its own family");

    let mut four_only = config_of_both();
    four_only.farms[0].vips.truncate(2);
    let mut bed = Bed::with(four_only);
    bed.cluster.init(se6(1), true, bed.now).expect("it may join");
    let refused = bed.cluster.start(se6(1), Forwarding::Layer2, TCP, 80, bed.now).expect_err("nothing to serve");
    assert_eq!(refused, StartError::NoVip(ServiceKey::new(TCP, 80), Family::V6));
    assert!(refused.to_string().contains("no IPv6 VIP"), "{refused}");
}

#[test]
fn a_service_without_servers_is_nobodys_or_direct() {
    let mut bed = Bed::new();
    bed.sync();
    assert_eq!(bed.owned(NONE), 11, "nobody was ever there");
    let id = bed.serve(1);
    assert_eq!(bed.owned(id), 11);
    bed.stop(1);
    assert_eq!(bed.owned(DIRECT), 11);
    assert!(bed.slots(0).iter().all(|slot| slot.legacy() == id), "its flows stay");
}

#[test]
fn stop_and_health_zero_and_loss_act_at_once_and_leave_flows_alone() {
    for end in [Bed::stop as fn(&mut Bed, u8), |bed, number| bed.health(number, 0), Bed::lose] {
        let mut bed = Bed::new();
        let first = bed.serve(1);
        (1..40).for_each(|client| assert_eq!(bed.connect(client), first));
        let second = bed.serve(2);
        end(&mut bed, 1);
        assert!(!bed.accepts(first) && bed.accepts(second) && bed.cluster.is_alive(first));
        assert_eq!((bed.owned(first), bed.owned(second)), (0, 11));
        (1..40).for_each(|client| assert_eq!(bed.data(client), first, "no flow moves"));
        (40..80).for_each(|client| assert_eq!(bed.connect(client), second, "no new flow"));
    }
}

#[test]
fn stop_and_start_are_idempotent() {
    let mut bed = Bed::new();
    bed.join(1);
    bed.stop(1);
    let id = bed.serve(1);
    let plan = bed.cluster.plan(bed.now);
    assert!(plan.is_empty(), "{plan:?}");
    let change = bed.start(1);
    assert_eq!(bed.sync().outcome(change), Some(true));
    bed.stop(1);
    bed.stop(1);
    assert_eq!(bed.state(id), ServerState::Draining);
    bed.start(1);
    bed.sync();
    assert_eq!((bed.id(1), bed.owned(id)), (id, 11), "the same offer made again is the same id");
}

#[test]
fn another_forwarding_type_is_another_id_for_new_flows_only() {
    let mut bed = Bed::new();
    let first = bed.serve(1);
    (1..40).for_each(|client| assert_eq!(bed.connect(client), first));
    bed.cluster.start(se(1), Forwarding::Gre, TCP, 80, bed.now).expect("it may start");
    bed.sync();
    let second = bed.slots(0)[0].owner();
    assert!(second != first && bed.owned(second) == 11);
    assert_eq!((bed.state(first), bed.state(second)), (ServerState::Draining, ServerState::Up));
    (1..40).for_each(|client| assert_eq!(bed.data(client), first, "they keep their type"));
    (40..80).for_each(|client| assert_eq!(bed.connect(client), second));
}

#[test]
fn init_removes_offers_but_never_flows() {
    let mut bed = Bed::new();
    let first = bed.serve(1);
    (1..40).for_each(|client| assert_eq!(bed.connect(client), first));
    let second = bed.serve(2);
    bed.join(1);
    bed.sync();
    assert!(!bed.accepts(first));
    assert_eq!(bed.owned(second), 11);
    (1..40).for_each(|client| assert_eq!(bed.data(client), first, "no flow moves"));
    bed.start(1);
    bed.sync();
    assert_eq!(bed.id(1), first);
    assert!(bed.owned(first) > 0);
}

#[test]
fn a_lost_session_is_not_a_dead_server() {
    let mut bed = Bed::new();
    let first = bed.serve(1);
    (1..40).for_each(|client| assert_eq!(bed.connect(client), first));
    let second = bed.serve(2);
    bed.lose(1);
    assert_eq!(bed.state(first), ServerState::Lost);
    bed.wait(299);
    assert!(bed.cluster.is_alive(first));
    (1..40).for_each(|client| assert_eq!(bed.data(client), first, "no flow moves"));
    let deadline = bed.cluster.next_deadline().expect("it cannot stay away for ever");
    assert_eq!(deadline, bed.now + Duration::from_secs(1));
    bed.wait(1);
    assert_eq!(bed.state(first), ServerState::Dead);
    assert_eq!(bed.cluster.poll_notice(), Some(Notice::Died { id: first, address: se(1), host_gone: false }));
    (1..40).for_each(|client| assert_eq!(bed.data(client), second, "nobody else is left"));
    let again = bed.serve(1);
    assert_ne!(again, first, "flows that were given up do not come back");
}

#[test]
fn a_returning_se_takes_up_the_same_ids() {
    let mut bed = Bed::new();
    let first = bed.serve(1);
    bed.serve(2);
    bed.lose(1);
    bed.wait(100);
    assert_eq!(bed.serve(1), first);
    bed.wait(1000);
    assert_eq!(bed.state(first), ServerState::Up);
}

#[test]
fn a_host_is_dead_when_both_its_session_and_its_neighbour_entry_are() {
    for order in [false, true] {
        let mut bed = Bed::new();
        let first = bed.serve(1);
        let gone = |bed: &mut Bed| assert_ne!(bed.cluster.host_gone(se(1), bed.now), Change(0));
        if order {
            gone(&mut bed);
            bed.wait(1000);
            assert!(bed.cluster.is_alive(first), "it has a session");
            assert_eq!(bed.server(first).flags & abi::REACHABLE, 0, "no new flows meanwhile");
            bed.lose(1);
        } else {
            bed.lose(1);
            bed.wait(5);
            assert!(bed.cluster.is_alive(first));
            gone(&mut bed);
        }
        bed.sync();
        assert!(!bed.cluster.is_alive(first));
        assert_eq!(bed.server(first).flags & abi::ALIVE, 0);
        assert_eq!(bed.cluster.poll_notice(), Some(Notice::Died { id: first, address: se(1), host_gone: true }));
    }
}

#[test]
fn most_servers_lost_at_once_are_kept_until_enough_are_back() {
    let mut bed = Bed::new();
    let ids: Vec<u32> = (1..=5).map(|number| bed.serve(number)).collect();
    let table = bed.slots(0).iter().map(|slot| slot.owner()).collect::<Vec<_>>();
    bed.lose(1);
    assert!(!bed.accepts(ids[0]), "one alone is lost");
    bed.wait(2);
    bed.lose(2);
    bed.wait(2);
    bed.lose(3);
    assert_eq!(bed.cluster.poll_notice(), Some(Notice::PanicBegan { farm: 0 }));
    assert!(bed.cluster.snapshot().farms[0].alarm);
    assert_eq!(bed.slots(0).iter().map(|slot| slot.owner()).collect::<Vec<_>>(), table, "the last table");
    assert!(ids.iter().all(|&id| bed.accepts(id)));
    assert_eq!(bed.state(ids[0]), ServerState::Kept);
    // Nobody is dead just because nobody answers: the network between is suspected.
    (1..=3).for_each(|number| assert_ne!(bed.cluster.host_gone(se(number), bed.now), Change(0)));
    bed.wait(100);
    assert!(ids.iter().all(|&id| bed.cluster.is_alive(id)));
    (1..=3).for_each(|number| bed.reach(number));
    // The first is back: it serves on, also before it has said START.
    bed.join(1);
    bed.sync();
    assert!(bed.accepts(ids[0]));
    bed.start(1);
    bed.sync();
    assert_eq!(bed.cluster.poll_notice(), Some(Notice::PanicEnded { farm: 0 }));
    assert!(bed.accepts(ids[0]) && !bed.accepts(ids[1]) && !bed.accepts(ids[2]), "two of five are just lost");
}

#[test]
fn losses_far_apart_or_of_a_minority_are_no_panic() {
    let mut bed = Bed::new();
    (1..=4).for_each(|number| assert_ne!(bed.serve(number), NONE));
    for number in 1..=4 {
        bed.lose(number);
        bed.wait(6);
    }
    assert_eq!(bed.cluster.poll_notice(), None);
    assert_eq!(bed.owned(DIRECT), 11);
    let mut bed = Bed::new();
    (1..=7).for_each(|number| assert_ne!(bed.serve(number), NONE));
    (1..=3).for_each(|number| bed.lose(number));
    assert_eq!(bed.cluster.poll_notice(), None, "three of seven");
    (1..=7).for_each(|number| bed.stop(number));
    assert_eq!(bed.cluster.poll_notice(), None, "stopped is not lost");
}

#[test]
fn a_panic_takes_three_servers_more_than_half_and_one_keepalive() {
    // Servers, how many of them are lost, seconds from one loss to the next; keepalives come every five.
    for (servers, lost, apart, panics) in [
        (3, 3, 0, true),
        (4, 3, 0, true),
        (5, 3, 0, true),
        (6, 3, 0, false),
        (6, 4, 0, true),
        (4, 2, 0, false),
        (3, 2, 0, false),
        (1, 1, 0, false),
        (9, 5, 0, true),
        (10, 5, 0, false),
        (9, 5, 1, true),
        (9, 5, 2, false),
    ] {
        let case = format!("{lost} of {servers}, {apart} s apart");
        let mut bed = Bed::new();
        let ids: Vec<u32> = (1..=servers).map(|number| bed.serve(number)).collect();
        let owners = |bed: &Bed| bed.slots(0).iter().map(|slot| slot.owner()).collect::<Vec<_>>();
        let table = owners(&bed);
        for number in 1..=lost {
            bed.lose(number);
            if number < lost {
                bed.wait(apart);
            }
        }
        let notice = panics.then_some(Notice::PanicBegan { farm: 0 });
        assert_eq!(bed.cluster.poll_notice(), notice, "{case}");
        assert_eq!(bed.cluster.snapshot().farms[0].alarm, panics, "{case}");
        assert_eq!(owners(&bed) == table, panics, "{case}: the last table is kept");
        assert_eq!(ids.iter().all(|&id| bed.accepts(id)), panics, "{case}");
        // Time alone neither begins nor ends it.
        bed.wait(100);
        assert_eq!(bed.cluster.snapshot().farms[0].alarm, panics, "{case}, later");
    }
}

#[test]
fn kept_servers_that_stay_away_for_orphan_time_end_the_panic() {
    let mut bed = Bed::new();
    let ids: Vec<u32> = (1..=5).map(|number| bed.serve(number)).collect();
    (1..=4).for_each(|number| bed.lose(number));
    assert!(bed.cluster.snapshot().farms[0].alarm);
    let orphaned = bed.cluster.next_deadline().expect("they cannot stay away for ever");
    bed.now = orphaned;
    bed.sync();
    assert!(!bed.cluster.snapshot().farms[0].alarm, "there is nothing left to keep");
    assert!(ids[..4].iter().all(|&id| !bed.cluster.is_alive(id)));
    assert_eq!(bed.owned(ids[4]), 11);
}

#[test]
fn two_of_two_lost_are_no_panic() {
    let mut bed = Bed::new();
    (1..=2).for_each(|number| assert_ne!(bed.serve(number), NONE));
    (1..=2).for_each(|number| bed.lose(number));
    assert_eq!(bed.owned(DIRECT), 11);
}

#[test]
fn health_makes_weight_and_noise_does_not() {
    let mut bed = Bed::new();
    let (first, second) = (bed.serve(1), bed.serve(2));
    assert!(bed.owned(first).abs_diff(bed.owned(second)) <= 1);
    bed.health(1, 20);
    assert_eq!((bed.owned(first), bed.owned(second)), (2, 9));
    for noise in [15, 25, 18, 22, 20] {
        bed.cluster.health(se(1), TCP, 80, noise, bed.now);
        let plan = bed.cluster.plan(bed.now);
        assert!(plan.is_empty(), "{noise} moved {plan:?}");
    }
    assert_eq!(bed.status(first).health, Some(20));
}

#[test]
fn a_server_that_joins_others_starts_slowly() {
    let mut configuration = config();
    configuration.slow_start = Duration::from_secs(10);
    let mut bed = Bed::with(configuration);
    let first = bed.serve(1);
    assert_eq!(bed.status(first).weight, 100_000, "the first has nobody to wait for");
    let second = bed.serve(2);
    let mut weights = vec![bed.status(second).weight];
    while let Some(deadline) = bed.cluster.next_deadline() {
        assert!(deadline > bed.now, "time goes on");
        bed.now = deadline;
        bed.sync();
        weights.push(bed.status(second).weight);
    }
    assert_eq!(weights, [20_000, 40_000, 60_000, 80_000, 100_000]);
}

#[test]
fn capacity_counts_and_nothing_is_nothing() {
    let mut configuration = config();
    configuration.farms[0].capacity = [(se(1), 10_000), (se(3), 0)].into();
    let mut bed = Bed::with(configuration);
    let ids: Vec<u32> = (1..=3).map(|number| bed.serve(number)).collect();
    assert_eq!(ids.iter().map(|&id| bed.owned(id)).collect::<Vec<_>>(), [10, 1, 0]);
    assert!(!bed.accepts(ids[2]));
}

#[test]
fn a_server_without_a_next_hop_gets_no_slots_and_follows_its_mac_address() {
    let mut bed = Bed::new();
    bed.cluster.init(se(1), true, bed.now).expect("it may join");
    bed.start(1);
    bed.sync();
    let id = bed.id(1);
    let flags = abi::ALIVE | abi::ACCEPTS | abi::LAYER_2 << abi::FORWARDING_SHIFT;
    assert_eq!((bed.owned(id), bed.server(id).flags), (0, flags));
    bed.reach(1);
    bed.sync();
    assert_eq!((bed.owned(id), bed.server(id).mac), (11, [2, 0, 0, 0, 0, 1]));
    bed.cluster.host_reachable(se(1), Hop { mac: [6; 6], port: 3, ..hop(1) }, bed.now);
    let plan = bed.cluster.plan(bed.now);
    assert_eq!((plan.servers.len(), plan.tables.len()), (1, 0));
    bed.sync();
    assert_eq!((bed.server(id).mac, bed.server(id).port), ([6; 6], 3));
    bed.cluster.host_unreachable(se(1), bed.now);
    bed.sync();
    assert_eq!((bed.owned(id), bed.server(id).flags), (11, flags), "it may be back at once");
}
