//! Which service a packet is for, by the scene's own word: what a farm must take that intercepts, and what it may not.

use std::net::IpAddr;

use necp_ebpf::{
    abi::{AddressSet, INTERCEPT, INTERCEPT6, LAYER_3, Server, Service},
    intercept::named,
    packet::Packet,
    six::{digest, intercept::digest_crossing},
    tables::{Addresses6, halves},
};

use super::{Crossing, Ground, placed::entries, tuple::Tuple};
use crate::frames::scene::{
    self, SERVICES, VIP, VIP6,
    crossing::{self, INTERCEPTED, Rules},
};

/// The service: a VIP's first.
pub(super) fn service_of(tuple: &Tuple, rules: &Rules) -> Option<Service> {
    of_vip(tuple).or_else(|| interceptor(tuple, rules))
}

pub(super) fn of_vip(tuple: &Tuple) -> Option<Service> {
    let index = SERVICES.iter().position(|&service| service == (tuple.protocol, tuple.destination_port))?;
    match tuple.destination {
        IpAddr::V4(address) => (address.octets() == VIP).then(|| scene::service(index)),
        IpAddr::V6(address) => (address.octets() == VIP6).then(|| scene::service6(index)),
    }
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
    let vip = if tuple.source.is_ipv4() { IpAddr::from(VIP) } else { IpAddr::from(VIP6) };
    let asked = Tuple { destination: vip, ..tuple.turned_round() };
    let Some(service) = of_vip(&asked) else { return false };
    entries(&service, ground.tables).any(|(name, word)| {
        let server = ground.tables.server(word.server());
        let ours = |server: Server| server.forwarding == LAYER_3 && server.address == crossing::bytes(tuple.source);
        name == name_of(&asked, &service) && server.is_some_and(ours)
    })
}

/// What names a flow of the service in the flow table. That no two flows share one, the packet path's own tests show.
pub(super) fn name_of(tuple: &Tuple, service: &Service) -> ([u8; 4], [u8; 2]) {
    let port = u16::from_ne_bytes(tuple.source_port.to_be_bytes());
    let digest = match (tuple.source, tuple.destination, service.state) {
        (IpAddr::V4(source), IpAddr::V4(destination), INTERCEPT) => {
            let [source, destination] = [source, destination].map(|address| u32::from_ne_bytes(address.octets()));
            let named = named(&Packet { source, destination, source_port: port, ..Packet::default() }, service.seed);
            return (named.source.to_ne_bytes(), named.source_port.to_ne_bytes());
        }
        (IpAddr::V4(source), ..) => return (source.octets(), port.to_ne_bytes()),
        (IpAddr::V6(source), IpAddr::V6(destination), INTERCEPT6) => {
            let [source, destination] = [source, destination].map(|address| halves(address.octets()));
            digest_crossing(Addresses6 { source, destination }, port, service.seed)
        }
        (IpAddr::V6(source), ..) => digest(halves(source.octets()), port, service.seed),
    };
    ((digest as u32).to_ne_bytes(), ((digest >> 32) as u16).to_ne_bytes())
}

/// By protocol, port and destination alone.
fn wanted(tuple: &Tuple, rules: &Rules) -> Option<Service> {
    let service = (tuple.protocol, tuple.destination_port);
    let index = INTERCEPTED.iter().position(|&(_, protocol, port)| (protocol, port) == service)?;
    let prefixes = AddressSet::intercepted(INTERCEPTED[index].0);
    let service = if tuple.destination.is_ipv4() { crossing::service } else { crossing::service6 };
    is_in(rules, prefixes, tuple.destination).then(|| service(index))
}

/// From one who may be a server of the farm.
fn is_fetch(tuple: &Tuple, service: &Service, rules: &Rules) -> bool {
    is_in(rules, AddressSet::servers(service.farm.into()), tuple.source)
}

fn is_in(rules: &Rules, set: AddressSet, address: IpAddr) -> bool {
    rules.crossings.iter().any(|(of, net)| *of == set && net.contains(&address))
}
