//! Places: of their own, and kept.

use super::{
    super::config::{FarmConfig, slots_needed},
    *,
};

fn farm(name: &str, network: u8) -> FarmConfig {
    let mut farm = FarmConfig::new(name);
    farm.vips = vec![[192, 0, 2, network].into()];
    farm.services = vec![ServiceKey::new(6, 80), ServiceKey::new(17, 53)];
    farm.servers = vec![format!("10.0.{network}.0/24").parse().expect("a prefix")];
    farm.table_size = 11;
    farm
}

fn config(farms: Vec<FarmConfig>) -> ClusterConfig {
    ClusterConfig { slots: slots_needed(&farms) as u32, farms, ..ClusterConfig::default() }
}

fn ipv6(vip: IpAddr) -> Option<Ipv6Addr> {
    if let IpAddr::V6(vip) = vip { Some(vip) } else { None }
}

fn entries(config: &ClusterConfig, layout: &Layout) -> Vec<Existing> {
    let entry = |frontend: &Frontend| Existing {
        bucket: frontend.bucket,
        entry: frontend.entry,
        service: layout.entry(config, frontend),
        vip: ipv6(frontend.vip),
    };
    layout.frontends.iter().map(entry).collect()
}

#[test]
fn what_the_packet_path_looks_for_is_where_it_looks() {
    let config = config(vec![farm("a", 1)]);
    let layout = Layout::new(&config, &[]).unwrap();
    let frontend = layout.frontends[0];
    let packet = necp_ebpf::packet::Packet {
        destination: u32::from_ne_bytes([192, 0, 2, 1]),
        destination_port: 80_u16.to_be(),
        protocol: 6,
        ..Default::default()
    };
    assert_eq!(frontend.bucket, service_bucket(packet.service_key()));
    assert_eq!(key_word(frontend.vip, layout.services[0].key), packet.service_key());
}

#[test]
fn a_place_once_taken_is_kept_whatever_happens_to_the_others() {
    let old = config(vec![farm("a", 1), farm("b", 2), farm("c", 3)]);
    let before = Layout::new(&old, &[]).unwrap();
    // "b" goes, the others change places, "d" is new and takes the room that is left.
    let new = config(vec![farm("c", 3), farm("d", 4), farm("a", 1)]);
    let after = Layout::new(&new, &entries(&old, &before)).unwrap();
    for frontend in &before.frontends {
        let (service, kept) =
            (&before.services[frontend.service], after.frontends.iter().find(|f| f.vip == frontend.vip));
        if service.farm == 1 {
            assert_eq!(kept, None);
            assert!(after.stale.contains(&(frontend.bucket, frontend.entry)));
            continue;
        }
        let same = |other: &&Frontend| other.vip == frontend.vip && after.services[other.service].key == service.key;
        let kept = after.frontends.iter().find(same).expect("it is still configured");
        assert_eq!((kept.id, kept.bucket, kept.entry), (frontend.id, frontend.bucket, frontend.entry));
        assert_eq!(after.services[kept.service].base, service.base);
        assert!(after.services[kept.service].adopted);
    }
    assert_eq!(after.old_farms, [(0, 2), (2, 0)].into());
    let mut regions: Vec<(u32, u32)> = after.services.iter().map(|service| (service.base, service.size)).collect();
    regions.sort_unstable();
    assert!(regions.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{regions:?}");
    let ids: std::collections::BTreeSet<u16> = after.frontends.iter().map(|f| f.id & !UDP_CLASS).collect();
    assert_eq!(ids.len(), after.frontends.len());
}

#[test]
fn another_size_or_seed_begins_anew() {
    let old = config(vec![farm("a", 1)]);
    let before = Layout::new(&old, &[]).unwrap();
    let larger = config(vec![FarmConfig { table_size: 13, ..farm("a", 1) }]);
    let after = Layout::new(&larger, &entries(&old, &before)).unwrap();
    assert!(after.services.iter().all(|service| !service.adopted));
    assert_eq!(after.frontends, before.frontends, "records stay valid");
    let reseeded = config(vec![FarmConfig { hash_seed: Some(1), ..farm("a", 1) }]);
    let after = Layout::new(&reseeded, &entries(&old, &before)).unwrap();
    assert!(after.services.iter().all(|service| !service.adopted));
    assert!(after.frontends.iter().all(|new| before.frontends.iter().all(|old| old.id != new.id)));
}

#[test]
fn what_finds_no_room_is_an_error() {
    let mut small = config(vec![farm("a", 1)]);
    small.slots = 21;
    assert_eq!(Layout::new(&small, &[]), Err(ConfigError::Slots { needed: 22, capacity: 21 }));
    let twice = config(vec![farm("a", 1), farm("b", 1)]);
    assert!(matches!(Layout::new(&twice, &[]), Err(ConfigError::Claimed { .. })));
    // Ports that all fall into one bucket.
    let vip = IpAddr::from([192, 0, 2, 1]);
    let bucket = |port: u16| service_bucket(key_word(vip, ServiceKey::new(6, port)));
    let ports: Vec<u16> = (1..=u16::MAX).filter(|&port| bucket(port) == bucket(1)).take(5).collect();
    assert_eq!(ports.len(), 5, "65,535 ports in 8,192 buckets");
    let mut crowded = config(vec![farm("a", 1)]);
    crowded.farms[0].services = ports.iter().map(|&port| ServiceKey::new(6, port)).collect();
    crowded.slots = 55;
    let service = crowded.farms[0].services[4];
    assert_eq!(Layout::new(&crowded, &[]), Err(ConfigError::BucketFull { vip, service }));
    crowded.farms[0].services.pop();
    assert!(Layout::new(&crowded, &[]).is_ok());
}

#[test]
fn every_vip_is_noted_and_replies_find_those_of_their_port() {
    let mut layer_3 = farm("b", 2);
    layer_3.forwarding.push(crate::control::config::Forwarding::Layer3);
    layer_3.vips.push([192, 0, 2, 3].into());
    let mut config = config(vec![farm("a", 1), layer_3]);
    let layout = Layout::new(&config, &[]).unwrap();
    let find = |key: u64| layout.notes.iter().find(|note| first_word(&note.service) == key);
    for last in 1..=3 {
        let key = necp_ebpf::packet::vip_key(u32::from_ne_bytes([192, 0, 2, last]));
        assert_eq!(find(key).map(|note| note.bucket), Some(service_bucket(key)), "192.0.2.{last}");
    }
    let reply = necp_ebpf::packet::Packet { source_port: 80_u16.to_be(), protocol: 6, ..Default::default() };
    let vips: Vec<_> = (0..3).map(|number| find(reply.reply_key(number)).map(|note| note.service.slots_base)).collect();
    assert_eq!(
        vips,
        [2, 3].map(|last| Some(u32::from_ne_bytes([192, 0, 2, last]))).into_iter().chain([None]).collect::<Vec<_>>()
    );
    assert_eq!(
        layout.services.iter().map(|service| service.flags).collect::<Vec<_>>(),
        [0, ALWAYS_TRACKED, ALWAYS_TRACKED, ALWAYS_TRACKED]
    );

    // Notes of an earlier daemon that are of no use any more go.
    let existing: Vec<_> = layout
        .notes
        .iter()
        .map(|note| Existing { bucket: note.bucket, entry: note.entry, service: note.service, vip: None })
        .collect();
    config.farms.pop();
    let after = Layout::new(&config, &existing).unwrap();
    assert_eq!((after.notes.len(), after.stale.len()), (1, existing.len() - 1));
}

#[test]
fn more_vips_of_a_port_than_a_reply_looks_at_are_refused() {
    let mut many = farm("a", 1);
    many.forwarding = vec![crate::control::config::Forwarding::Layer3];
    many.vips = (1..=17).map(|last| [192, 0, 2, last].into()).collect();
    let refused = Layout::new(&config(vec![many]), &[]);
    assert_eq!(refused, Err(ConfigError::TooManyReplies { service: ServiceKey::new(6, 80) }));
}

const VIPS6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 10), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 11)];

fn of_both(vips6: &[Ipv6Addr]) -> FarmConfig {
    let mut both = farm("a", 1);
    both.vips.extend(vips6.iter().copied().map(IpAddr::V6));
    both
}

#[test]
fn each_family_has_tables_of_its_own() {
    let mut both = of_both(&VIPS6);
    both.forwarding.push(crate::control::config::Forwarding::Layer3);
    let config = config(vec![both]);
    let layout = Layout::new(&config, &[]).unwrap();
    let tables: Vec<_> = layout.services.iter().map(|one| (one.family, one.key.port, one.base)).collect();
    assert_eq!(tables, [(Family::V4, 80, 0), (Family::V4, 53, 11), (Family::V6, 80, 22), (Family::V6, 53, 33)]);
    let entries: Vec<_> = layout.frontends.iter().map(|frontend| layout.entry(&config, frontend)).collect();
    assert_eq!(entries.iter().map(|entry| entry.vip).collect::<Vec<_>>(), [0, 0, 1, 2, 1, 2]);
    let six = entries[3];
    assert_eq!((six.state, six.address, six.slots_base), (abi::SERVICE6, fold(VIPS6[1]), 22));
    let noted =
        |state: u8| layout.notes.iter().filter(move |note| note.service.state == state).map(|note| note.service);
    let vips: Vec<_> = noted(abi::VIP6).map(|note| (note.address, note.vip, note.port, note.protocol)).collect();
    assert_eq!(vips, [(fold(VIPS6[0]), 1, [0; 2], 0), (fold(VIPS6[1]), 2, [0; 2], 0)]);
    let replies: Vec<_> = noted(abi::REPLY6).filter(|note| note.protocol == 6).collect();
    let replies: Vec<_> =
        replies.iter().map(|note| (u32::from_ne_bytes(note.address), note.vip, note.slots_base)).collect();
    assert_eq!(replies, [(0, 1, 0), (1, 2, 0)], "numbers of their own family");
    let replies: Vec<_> = noted(abi::REPLY).map(|note| u32::from_ne_bytes(note.address)).collect();
    assert_eq!(replies, [0, 0], "one for each port");
}

#[test]
fn an_ipv6_vip_keeps_its_index_and_a_new_one_takes_none_that_is_still_named() {
    let old = config(vec![of_both(&VIPS6)]);
    let before = Layout::new(&old, &[]).unwrap();
    assert_eq!(before.vips6, [(VIPS6[0], 1), (VIPS6[1], 2)].into());
    let new = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    let config = config(vec![of_both(&[new, VIPS6[1]])]);
    let after = Layout::new(&config, &entries(&old, &before)).unwrap();
    assert_eq!(after.vips6, [(new, 3), (VIPS6[1], 2)].into(), "the entry of 1 goes only now");
    assert!(after.services.iter().all(|service| service.adopted));
    let of = |layout: &Layout, vip: Ipv6Addr| {
        let all = layout.frontends.iter().filter(move |one| one.vip == IpAddr::V6(vip));
        all.map(|one| (one.id, one.vip6, one.bucket, one.entry)).collect::<Vec<_>>()
    };
    assert_eq!(of(&after, VIPS6[1]), of(&before, VIPS6[1]));
    for (_, _, bucket, entry) in of(&before, VIPS6[0]) {
        assert!(after.stale.contains(&(bucket, entry)));
    }
    let ids = |layout: &Layout, vip: Ipv6Addr| of(layout, vip).into_iter().map(|one| one.0).collect::<Vec<_>>();
    assert!(ids(&after, new).iter().all(|id| !ids(&before, VIPS6[0]).contains(id)), "no record is taken for another's");
}

fn interceptor(name: &str, network: u8) -> FarmConfig {
    let mut farm = farm(name, network);
    farm.vips.clear();
    farm.intercept = vec!["0.0.0.0/0".parse().expect("a prefix")];
    farm
}

#[test]
fn what_is_intercepted_has_one_entry_a_service_and_no_notes() {
    let mut intercepts = interceptor("b", 2);
    intercepts.udp_tracking = false;
    let config = config(vec![farm("a", 1), intercepts]);
    let layout = Layout::new(&config, &[]).unwrap();
    let packet = necp_ebpf::packet::Packet {
        destination: u32::from_ne_bytes([203, 0, 113, 80]),
        destination_port: 80_u16.to_be(),
        protocol: 6,
        ..Default::default()
    };
    let frontend = layout.frontends[2];
    let entry = layout.entry(&config, &frontend);
    assert_eq!((first_word(&entry), entry.state, entry.farm), (packet.intercept_key(), abi::INTERCEPT, 1));
    assert_eq!(frontend.bucket, service_bucket(packet.intercept_key()));
    assert_eq!((layout.frontends.len(), layout.notes.len()), (4, 1), "a note of the one VIP");
    let flags: Vec<u16> = layout.services.iter().map(|service| service.flags).collect();
    assert_eq!(flags, [0, ALWAYS_TRACKED, 0, ALWAYS_TRACKED], "UDP that is intercepted is always on record");
    let after = Layout::new(&config, &entries(&config, &layout)).unwrap();
    assert_eq!((&after.frontends, after.stale.len()), (&layout.frontends, 0), "records stay valid");
    assert!(after.services.iter().all(|service| service.adopted));
}

#[test]
fn what_is_intercepted_of_ipv6_has_entries_and_slots_of_its_own() {
    let mut both = interceptor("b", 2);
    both.intercept.push("::/0".parse().expect("a prefix"));
    let config = config(vec![both]);
    let layout = Layout::new(&config, &[]).unwrap();
    let packet = necp_ebpf::packet::Packet {
        destination_port: 80_u16.to_be(),
        protocol: 6,
        ..necp_ebpf::packet::Packet::default()
    };
    let frontend = layout.frontends.iter().find(|one| one.vip.is_ipv6()).unwrap();
    let entry = layout.entry(&config, frontend);
    assert_eq!((first_word(&entry), entry.state, entry.vip), (packet.intercept_key6(), abi::INTERCEPT6, 0));
    assert_eq!(frontend.bucket, service_bucket(packet.intercept_key6()));
    assert_eq!((layout.frontends.len(), layout.services.len(), layout.notes.len()), (4, 4, 0));
    let bases: BTreeSet<u32> = layout.services.iter().map(|service| service.base).collect();
    assert_eq!(bases.len(), 4, "a slot table for each family");
    let existing: Vec<_> = entries(&config, &layout).into_iter().map(|old| Existing { vip: None, ..old }).collect();
    let after = Layout::new(&config, &existing).unwrap();
    assert_eq!((&after.frontends, after.stale.len()), (&layout.frontends, 0), "records stay valid");
}

#[test]
fn two_farms_do_not_intercept_the_same() {
    let mut six = interceptor("b", 2);
    six.intercept = vec!["::/0".parse().expect("a prefix")];
    assert!(Layout::new(&config(vec![interceptor("a", 1), six]), &[]).is_ok(), "each has a family");
    let both = config(vec![interceptor("a", 1), interceptor("b", 2)]);
    let (first, second) = ("a".to_owned(), "b".to_owned());
    let refused = ConfigError::Intercepted { service: ServiceKey::new(6, 80), first, second };
    assert_eq!(Layout::new(&both, &[]), Err(refused));
}
