//! Which service a packet is for, by the scene's own word: what a farm must take that intercepts, and what it may not.

use std::net::Ipv4Addr;

use necp_ebpf::abi::{AddressSet, LAYER_3, Service};

use super::{Crossing, Ground, placed::entries, tuple::Tuple};
use crate::frames::scene::{
    self, SERVICES, VIP,
    crossing::{INTERCEPTED, Rules},
};

/// The service: a VIP's first.
pub(super) fn service_of(tuple: &Tuple, rules: &Rules) -> Option<Service> {
    of_vip(tuple).or_else(|| interceptor(tuple, rules))
}

pub(super) fn of_vip(tuple: &Tuple) -> Option<Service> {
    let index = SERVICES.iter().position(|&service| service == (tuple.protocol, tuple.destination_port))?;
    (tuple.destination == VIP).then(|| scene::service(index))
}

/// The service of a farm that intercepts, if it is to take this packet.
pub(super) fn interceptor(tuple: &Tuple, rules: &Rules) -> Option<Service> {
    let service = wanted(tuple, rules)?;
    let spared = is_in(rules, AddressSet::OWN, tuple.destination) || is_fetch(tuple, &service, rules);
    (!spared).then_some(service)
}

/// What a farm would take, and why it may not, or does not.
pub(super) fn spared(tuple: &Tuple, rules: &Rules) -> Option<Crossing> {
    let service = wanted(tuple, rules)?;
    if of_vip(tuple).is_some() {
        Some(Crossing::Vip)
    } else if is_in(rules, AddressSet::OWN, tuple.destination) {
        Some(Crossing::Own)
    } else {
        is_fetch(tuple, &service, rules).then_some(Crossing::Fetch)
    }
}

/// Whether it is a server's part of a flow that is on record by layer 3.
pub(super) fn is_reply(tuple: &Tuple, ground: Ground<'_>) -> bool {
    let asked = Tuple { destination: VIP, ..tuple.turned_round() };
    let Some(service) = of_vip(&asked) else { return false };
    entries(&service, ground.tables).any(|(client, port, word)| {
        let server = ground.tables.server(word.server());
        (client, port) == (asked.source, asked.source_port)
            && server.is_some_and(|server| server.forwarding == LAYER_3 && server.address[12..] == tuple.source)
    })
}

/// By protocol, port and destination alone.
fn wanted(tuple: &Tuple, rules: &Rules) -> Option<Service> {
    let service = (tuple.protocol, tuple.destination_port);
    let index = INTERCEPTED.iter().position(|&(_, protocol, port)| (protocol, port) == service)?;
    let prefixes = AddressSet::intercepted(INTERCEPTED[index].0);
    is_in(rules, prefixes, tuple.destination).then(|| scene::crossing::service(index))
}

/// From one who may be a server of the farm.
fn is_fetch(tuple: &Tuple, service: &Service, rules: &Rules) -> bool {
    is_in(rules, AddressSet::servers(service.farm.into()), tuple.source)
}

fn is_in(rules: &Rules, set: AddressSet, address: [u8; 4]) -> bool {
    rules.crossings.iter().any(|(of, net)| *of == set && net.contains(&Ipv4Addr::from(address)))
}
