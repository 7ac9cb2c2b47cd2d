//! Exceptions of IPv6: what the packet path finds of them, and whose they are.

use std::net::Ipv6Addr;

use necp_ebpf::{
    abi::{EXCEPTION_LOCAL, OF_IPV4, OF_IPV6},
    exceptions::{GLOBAL, Tuple},
    host::View,
    tables::{Addresses6, Tables, halves},
};

use super::super::super::testbed::{config_of_both, se6};
use super::*;

/// One farm, which trusts; one SE of each family with sessions.
fn bed() -> Bed {
    let mut config = config_of_both();
    config.farms[0].global_exceptions = true;
    let mut bed = Bed::with(config);
    bed.serve(1);
    bed.serve6(1);
    bed
}

/// What a new flow of tcp finds.
fn found(view: &View<'_>, source: &str, destination: &str, port: u16) -> u64 {
    let halves = |text: &str| halves(text.parse::<Ipv6Addr>().unwrap().octets());
    let view = view.six(Addresses6 { source: halves(source), destination: halves(destination) }).unwrap();
    Tuple { protocol: 6, port: port.to_be(), ..Tuple::default() }.matches(&view)
}

fn six(source: &str, destination: &str, port: u16) -> Flows {
    flows(source, destination, 6, port)
}

#[test]
fn the_packet_path_finds_what_was_added() {
    let mut bed = bed();
    let wanted = six("2001:db8:7::/48", "2001:db8::7/128", 80);
    let change = bed.cluster.except_add(se6(1), &local(wanted), bed.now).unwrap();
    assert_eq!(bed.sync().outcome(change), Some(true));
    let masks = bed.view.exception_masks_record(0).unwrap();
    let mask = masks.masks[0];
    assert_eq!((masks.count, mask.used, mask.source_len, mask.destination_len), (1, OF_IPV6, 48, 128));
    let table = [
        ("2001:db8:7::", "2001:db8::7", 80, 1),
        ("2001:db8:7:ffff:ffff:ffff:ffff:ffff", "2001:db8::7", 80, 1),
        ("2001:db8:8::", "2001:db8::7", 80, 0),
        ("2001:db8:6:ffff::", "2001:db8::7", 80, 0),
        ("2001:db8:7::", "2001:db8::6", 80, 0),
        ("2001:db8:7::", "2001:db8::7", 81, 0),
    ];
    for (source, destination, port, is_found) in table {
        assert_eq!(found(&bed.view, source, destination, port), is_found, "{source} -> {destination} tcp/{port}");
    }
    // Its installer is kept from such flows, and nobody else.
    let record = (0..bed.view.exception_count() as u32)
        .filter_map(|number| bed.view.exception_record(number))
        .find(|record| record.state == EXCEPTION_LOCAL)
        .expect("a record");
    let hosts: Vec<u16> = record.installers.into_iter().filter(|host| *host != 0).collect();
    assert_eq!(hosts.len(), 1);
    // Flows of IPv4 look at none of it.
    let four = Tuple { source: u32::MAX, destination: u32::MAX, protocol: 6, port: 80u16.to_be(), farm: 0 };
    assert_eq!(four.matches(&bed.view), 0);

    // Wildcards, a protocol, nothing but a port; global; and the end.
    bed.cluster.except_del(se6(1), &wanted, bed.now).unwrap();
    for (flows, port, is_found) in [
        (six("::/0", "2001:db8::7/128", 0), 443, true),
        (flows("fd00::/8", "::/0", 17, 0), 443, false),
        (flows("8000::/1", "::/0", 0, 0), 1, false),
        (flows("2001:db8::/33", "2000::/3", 0, 0), 1, true),
        (six("::/0", "::/0", 80), 80, true),
    ] {
        bed.cluster.except_add(se6(1), &global(flows), bed.now).unwrap();
        bed.sync();
        let result = found(&bed.view, "2001:db8:7::1", "2001:db8::7", port);
        assert_eq!(result, if is_found { GLOBAL } else { 0 }, "{flows}");
        bed.cluster.except_del(se6(1), &flows, bed.now).unwrap();
        bed.sync();
        assert_eq!(found(&bed.view, "2001:db8:7::1", "2001:db8::7", port), 0, "{flows}");
    }
    assert_no_exception_in_maps(&bed);
}

/// An SE's exceptions are of flows that it could get; the wildcards of a basic unit are its own family's.
#[test]
fn an_ses_exceptions_are_of_its_own_family() {
    let mut bed = bed();
    let six_flows = six("2001:db8::/32", "::/0", 80);
    let four_flows = flows("203.0.113.0/24", "0.0.0.0/0", 6, 80);
    for (server, flows, family) in [(se(1), six_flows, Family::V4), (se6(1), four_flows, Family::V6)] {
        let error = ExceptError::Family { flows, server: family };
        assert_eq!(bed.cluster.except_add(server, &local(flows), bed.now), Err(error.clone()));
        assert_eq!(bed.cluster.except_del(server, &flows, bed.now), Err(error));
    }
    assert_eq!(bed.cluster.exception_counts().entries, 0);
    let error = ExceptError::Family { flows: four_flows, server: Family::V6 };
    assert_eq!(
        error.to_string(),
        "203.0.113.0/24 -> any tcp/80: the server has joined over IPv6, and gets IPv6 flows only"
    );
    let any = |port| flows("0.0.0.0/0", "0.0.0.0/0", if port == 0 { 0 } else { 6 }, port);
    bed.cluster.except_add(se6(1), &global(any(0)), bed.now).unwrap();
    bed.cluster.except_add(se6(1), &global(any(80)), bed.now).unwrap();
    bed.cluster.except_add(se(1), &local(any(81)), bed.now).unwrap();
    bed.sync();
    let mut listed = list(&bed, Filter::default(), 9);
    listed.sort_by_key(|entry| (entry.installer, entry.flows.port));
    let entry = |scope, installer, flows| Listed { scope, installer, flows };
    let expected = [
        entry(Scope::Local, se(1), any(81)),
        // Nobody may switch a whole farm off.
        entry(Scope::Local, se6(1), Flows::all(Family::V6)),
        entry(Scope::Global, se6(1), six("::/0", "::/0", 80)),
    ];
    assert_eq!(listed, expected);
    let of = |family| list(&bed, Filter { family: Some(family), ..Filter::default() }, 9).len();
    assert_eq!((of(Family::V4), of(Family::V6)), (1, 2));
    assert_ne!(bed.connect(1), 0, "exceptions of IPv6 do not meet flows of IPv4");
    bed.cluster.except_del(se6(1), &Flows::all(Family::V6), bed.now).unwrap();
    bed.cluster.except_del(se6(1), &any(80), bed.now).unwrap();
    bed.sync();
    assert_eq!(list(&bed, Filter::default(), 9).len(), 1);
}

/// 32 masks of a farm, whatever their family; the same lengths of the other family are another mask.
#[test]
fn both_families_share_the_masks() {
    let mut bed = bed();
    for length in 1..=16 {
        let four = flows(&format!("11.0.0.0/{length}"), "0.0.0.0/0", 6, 0);
        let six = flows(&format!("2001:db8::/{length}"), "::/0", 6, 0);
        bed.cluster.except_add(se(1), &local(four), bed.now).unwrap();
        bed.cluster.except_add(se6(1), &local(six), bed.now).unwrap();
    }
    bed.sync();
    assert_eq!(bed.cluster.farm_exceptions(0).masks, 32);
    let masks = bed.view.exception_masks_record(0).unwrap();
    let of = |family| masks.masks.iter().filter(|mask| mask.used == family).count();
    assert_eq!((masks.count, of(OF_IPV4), of(OF_IPV6)), (32, 16, 16));
    let refused = Err(ExceptError::TooManyMasks("web".into()));
    assert_eq!(bed.cluster.except_add(se(1), &local(flows("11.0.0.0/17", "0.0.0.0/0", 6, 0)), bed.now), refused);
    assert_eq!(bed.cluster.except_add(se6(1), &local(six("2001:db8::/17", "::/0", 0)), bed.now), refused);
    // One that leaves makes room for either.
    bed.cluster.except_del(se(1), &flows("11.0.0.0/9", "0.0.0.0/0", 6, 0), bed.now).unwrap();
    bed.sync();
    bed.cluster.except_add(se6(1), &local(six("2001:db8::/17", "::/0", 0)), bed.now).unwrap();
    bed.cluster.except_reset(se(1), bed.now);
    bed.cluster.session_lost(se6(1), bed.now);
    bed.sync();
    bed.sync();
    assert_no_exception_in_maps(&bed);
}
