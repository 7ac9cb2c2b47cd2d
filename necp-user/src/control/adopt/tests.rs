//! A daemon dies and comes back.

use std::time::Duration;

use necp_ebpf::abi::DIRECT;

use super::{
    super::{
        config::halves,
        status::ServerState,
        testbed::{Bed, VIPS6, config, config_of_both, se},
    },
    *,
};

/// The same tables under a new process, some time later.
fn restart(bed: Bed) -> (Bed, Adopted) {
    restart_with(bed, config())
}

fn restart_with(bed: Bed, mut config: crate::control::config::ClusterConfig) -> (Bed, Adopted) {
    config.grace = Duration::from_secs(60);
    let mut new = Bed::on(bed.view, config, bed.now + Duration::from_secs(10));
    let adopted = new.cluster.adopt(&new.view, new.now).expect("everything finds its place");
    (new, adopted)
}

fn served() -> (Bed, u32, u32) {
    let mut bed = Bed::new();
    let first = bed.serve(1);
    (1..40).for_each(|client| assert_eq!(bed.connect(client), first));
    let second = bed.serve(2);
    (bed, first, second)
}

#[test]
fn nothing_changes_until_somebody_speaks() {
    let (bed, first, second) = served();
    let before = bed.slots(0);
    let (mut bed, adopted) = restart(bed);
    assert_eq!(adopted, Adopted { services: 2, serving: 2, ..Adopted::default() });
    let plan = bed.cluster.plan(bed.now);
    assert!(plan.tables.is_empty(), "{plan:?}");
    let applied = bed.sync();
    assert_eq!((applied.records_written, applied.slots_moved), (0, 0));
    assert_eq!(bed.slots(0), before);
    assert_eq!(bed.state(first), ServerState::Adopted);
    bed.wait(50);
    assert!(bed.accepts(first) && bed.accepts(second));
    (1..40).for_each(|client| assert_eq!(bed.data(client), first, "no flow moves"));
}

#[test]
fn servers_and_vips_of_ipv6_are_adopted_too() {
    let mut bed = Bed::with(config_of_both());
    let (four, six) = (bed.serve(1), bed.serve6(1));
    assert_eq!(bed.view.vip6(1), Some(halves(VIPS6[0])));
    let tables: Vec<_> = (0..4).map(|service| bed.slots(service)).collect();
    assert!(tables[0].iter().all(|slot| slot.owner() == four) && tables[2].iter().all(|slot| slot.owner() == six));
    let (mut bed, adopted) = restart_with(bed, config_of_both());
    assert_eq!(adopted, Adopted { services: 4, serving: 2, ..Adopted::default() });
    let applied = bed.sync();
    assert_eq!((applied.records_written, applied.slots_moved), (0, 0));
    assert_eq!(bed.serve6(1), six);
    assert_eq!((0..4).map(|service| bed.slots(service)).collect::<Vec<_>>(), tables);

    // Without IPv6 VIPs its servers' flows are given up, and what was about them goes.
    let mut four_only = config_of_both();
    four_only.farms[0].vips.truncate(2);
    let (mut bed, adopted) = restart_with(bed, four_only);
    assert_eq!((adopted.services, adopted.serving, adopted.given_up), (2, 1, 1));
    bed.sync();
    assert_eq!(bed.server(six).flags, 0);
    assert!(existing(&bed.view).iter().all(|old| old.vip.is_none() && old.service.vip == 0));
}

#[test]
fn an_adopted_server_goes_on_if_its_se_starts_it_again() {
    let (bed, first, second) = served();
    let (mut bed, _) = restart(bed);
    let before = bed.slots(0);
    bed.join(1);
    bed.sync();
    assert!(bed.accepts(first), "it has a second to say START");
    bed.start(1);
    bed.sync();
    assert_eq!((bed.id(1), bed.state(first)), (first, ServerState::Up));
    assert_eq!(bed.slots(0), before);
    bed.wait(70);
    assert!(bed.accepts(first) && !bed.accepts(second));
    assert_eq!(bed.owned(first), 11);
}

#[test]
fn an_adopted_server_goes_when_its_se_stops_it_or_says_nothing_or_stays_away() {
    let (bed, first, second) = served();
    let (mut bed, _) = restart(bed);
    bed.join(1);
    bed.stop(1);
    assert_eq!((bed.accepts(first), bed.state(first)), (false, ServerState::Draining));
    bed.join(2);
    bed.sync();
    assert_eq!(bed.cluster.next_deadline(), Some(bed.now + Duration::from_secs(1)));
    bed.wait(1);
    assert_eq!((bed.accepts(second), bed.state(second)), (false, ServerState::Draining));
    assert_eq!(bed.owned(DIRECT), 11);
    (1..40).for_each(|client| assert_eq!(bed.data(client), first, "no flow moves"));

    let (bed, first, _) = served();
    let (mut bed, _) = restart(bed);
    bed.wait(60);
    assert_eq!((bed.accepts(first), bed.state(first)), (false, ServerState::Lost));
    (1..40).for_each(|client| assert_eq!(bed.data(client), first, "no flow moves"));
    bed.wait(240);
    assert_eq!(bed.state(first), ServerState::Dead);
}

#[test]
fn an_adopted_server_whose_host_is_gone_is_dead() {
    let (bed, first, second) = served();
    let (mut bed, _) = restart(bed);
    bed.cluster.host_gone(se(1), bed.now);
    bed.sync();
    assert_eq!(bed.state(first), ServerState::Dead);
    assert_eq!(bed.owned(second), 11);
}

#[test]
fn stopped_servers_and_legacies_live_on() {
    let (mut bed, first, second) = served();
    bed.stop(1);
    let (mut bed, adopted) = restart(bed);
    assert_eq!((adopted.serving, adopted.draining), (1, 1));
    bed.sync();
    assert_eq!(bed.owned(second), 11);
    for _ in 0..5 {
        bed.collect();
    }
    (1..40).for_each(|client| assert_eq!(bed.data(client), first, "no flow moves"));
    assert_eq!(bed.serve(1), first, "the same offer made again");
}

#[test]
fn servers_that_the_configuration_no_longer_knows_are_given_up_and_their_ids_come_back() {
    let (bed, first, second) = served();
    let mut narrower = config();
    narrower.farms[0].servers = vec!["10.0.0.2/32".parse().expect("a prefix")];
    let (mut bed, adopted) = restart_with(bed, narrower);
    assert_eq!((adopted.serving, adopted.given_up), (1, 1));
    bed.sync();
    assert!(!bed.cluster.is_alive(first) && bed.server(first).flags == 0);
    assert_eq!(bed.owned(second), 11);
    assert!(bed.collect().freed.is_empty());
    assert!((0..2).any(|_| bed.collect().freed == [first]));
    assert_eq!(bed.server(first), Server::default());
}

#[test]
fn empty_maps_are_adopted_too() {
    let mut bed = Bed::new();
    let adopted = bed.cluster.adopt(&bed.view, bed.now);
    assert_eq!(adopted, Ok(Adopted { services_new: 2, ..Adopted::default() }));
    let id = bed.serve(1);
    assert_eq!(bed.owned(id), 11);
}
