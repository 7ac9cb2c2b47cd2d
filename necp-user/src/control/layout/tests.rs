//! Places: of their own, and kept.

use super::{
    super::config::{FarmConfig, slots_needed},
    *,
};

fn farm(name: &str, network: u8) -> FarmConfig {
    let mut farm = FarmConfig::new(name);
    farm.vips = vec![Ipv4Addr::new(192, 0, 2, network)];
    farm.services = vec![ServiceKey::new(6, 80), ServiceKey::new(17, 53)];
    farm.servers = vec![format!("10.0.{network}.0/24").parse().expect("a prefix")];
    farm.table_size = 11;
    farm
}

fn config(farms: Vec<FarmConfig>) -> ClusterConfig {
    ClusterConfig { slots: slots_needed(&farms) as u32, farms, ..ClusterConfig::default() }
}

fn entries(config: &ClusterConfig, layout: &Layout) -> Vec<Existing> {
    let entry = |frontend: &Frontend| Existing {
        bucket: frontend.bucket,
        entry: frontend.entry,
        service: layout.entry(config, frontend),
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
    let vip = Ipv4Addr::new(192, 0, 2, 1);
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
    layer_3.vips.push(Ipv4Addr::new(192, 0, 2, 3));
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
        .map(|note| Existing { bucket: note.bucket, entry: note.entry, service: note.service })
        .collect();
    config.farms.pop();
    let after = Layout::new(&config, &existing).unwrap();
    assert_eq!((after.notes.len(), after.stale.len()), (1, existing.len() - 1));
}

#[test]
fn more_vips_of_a_port_than_a_reply_looks_at_are_refused() {
    let mut many = farm("a", 1);
    many.forwarding = vec![crate::control::config::Forwarding::Layer3];
    many.vips = (1..=17).map(|last| Ipv4Addr::new(192, 0, 2, last)).collect();
    let refused = Layout::new(&config(vec![many]), &[]);
    assert_eq!(refused, Err(ConfigError::TooManyReplies { service: ServiceKey::new(6, 80) }));
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
fn two_farms_do_not_intercept_the_same() {
    let both = config(vec![interceptor("a", 1), interceptor("b", 2)]);
    let (first, second) = ("a".to_owned(), "b".to_owned());
    let refused = ConfigError::Intercepted { service: ServiceKey::new(6, 80), first, second };
    assert_eq!(Layout::new(&both, &[]), Err(refused));
}
