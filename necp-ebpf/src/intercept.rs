//! Packets that cross this host, to addresses that are nobody's VIP: some farms take them to proxies (draft §1: interception).
//!
//! A packet is intercepted if its protocol and port are a service of a farm that intercepts, its destination is in the farm's
//! prefixes and none of this host's own addresses, and its source may not be one of the farm's servers: a proxy's own fetches
//! would come back to it. A VIP's services are asked first, replies of layer-3 servers too. Until a server starts, the slots'
//! owner is [`DIRECT`](crate::abi::DIRECT): the change to the first one leaves flows that began before where they are.
//!
//! A client may use one port for connections to several destinations, and a flow's key has room for one address. So what names
//! an intercepted flow is a *digest* of source, port and destination in the place of source and port: 48 bits of SipHash-1-3
//! under the farm's seed, which is the same on every NE that shares the traffic. It is all that hash, slot and buckets are made
//! of, so user space finds a record's slot from its key as ever. Two flows of a service are taken for one with odds of 2⁻⁴⁸:
//! among 100,000 on record at once, any two with 1.8 · 10⁻⁵. Whoever knows the seed can look for such pairs, so it should be
//! a secret where clients are hostile.

use crate::{
    abi::{AddressSet, LAYER_3, Service},
    device::{Device, Ending, Out},
    digest::{keys_of, siphash},
    hash::service_bucket,
    packet::{Packet, protocol},
    parse::{Part, ports},
    rare::{head, quoted, remember, send},
    steer::{Decision, find_entry, find_service, steer_to, whose_at},
    tables::{NextHop, Tables},
    verdict::Reason,
};

/// Whether a frame that would end so may still be intercepted.
#[inline(always)]
pub fn is_open(ending: Ending) -> bool {
    let reason = ending.reason();
    matches!(ending.out(), Out::Pass)
        && (reason == Reason::NotOurs as u32 || reason == Reason::Icmp as u32 || reason == Reason::Fragment as u32)
}

/// Handles a frame that is for no VIP. Later fragments whose first one was intercepted never get here.
#[inline(always)]
pub fn handle<D: Device, T: Tables>(device: &D, tables: &T) -> Ending {
    let pass = |reason| Ending::new(reason, Out::Pass);
    let (l3, mut head) = match head(device) {
        Ok(found) => found,
        Err(ending) => return ending,
    };
    match head.part {
        Part::Later => return pass(Reason::Fragment),
        Part::Whole if head.packet.protocol == protocol::ICMP => {
            let quoted = quoted(&device.frame().skip(l3), &head);
            let to_flow = quoted.filter(|quoted| quoted.source == head.packet.destination);
            let Some(decision) = to_flow.and_then(|quoted| about(&quoted.turned_round(), tables)) else {
                return pass(Reason::Icmp);
            };
            return send(device, tables, l3, &decision);
        }
        Part::Whole | Part::First => {}
    }
    if let Err(reason) = ports(&device.frame().skip(l3), &mut head) {
        return pass(reason);
    }
    let decision = steer(&head.packet, tables);
    if decision.reason == Reason::NotOurs {
        return pass(if matches!(head.part, Part::Whole) { Reason::NotOurs } else { Reason::Fragment });
    }
    remember(device, &head, decision.server, 0);
    send(device, tables, l3, &decision)
}

/// [`steer`](crate::steer::steer) of a packet that crosses this host.
#[inline(always)]
pub fn steer<T: Tables>(packet: &Packet, tables: &T) -> Decision {
    match interceptor(packet, tables) {
        Some(service) => steer_to(service, packet, &named(packet, service.seed), tables),
        None => Decision::unsteered(Reason::NotOurs),
    }
}

/// [`whose`](crate::steer::whose), likewise.
#[inline(always)]
pub fn whose<T: Tables>(packet: &Packet, tables: &T) -> Option<(u32, NextHop)> {
    let service = interceptor(packet, tables)?;
    whose_at(service, &named(packet, service.seed), tables)
}

/// What becomes of an ICMP error about an intercepted flow, if it is about one that a server has.
#[inline(always)]
fn about<T: Tables>(packet: &Packet, tables: &T) -> Option<Decision> {
    // What a VIP's farm has no server for is the host's.
    if find_service(packet, tables).is_some() {
        return None;
    }
    let (server, next_hop) = whose(packet, tables)?;
    let reason = if next_hop.is_reachable() { Reason::Quoted } else { Reason::NoNextHop };
    // Intercepted packets are never translated, so what is quoted is right for the server as it stands.
    (next_hop.forwarding() != LAYER_3).then_some(Decision { reason, server, next_hop, begins: false })
}

/// The service that intercepts this packet.
#[inline(always)]
fn interceptor<'a, T: Tables>(packet: &Packet, tables: &'a T) -> Option<&'a Service> {
    let key = packet.intercept_key();
    let service = find_entry(key, tables.service_bucket(service_bucket(key))?)?;
    let taken = tables.is_in(AddressSet::intercepted(service.farm as u32), packet.destination)
        && !tables.is_in(AddressSet::OWN, packet.destination)
        && !tables.is_in(AddressSet::servers(service.farm as u32), packet.source);
    taken.then_some(service)
}

/// The packet with what names its flow: the digest in the place of its source, and no destination.
#[inline(always)]
pub fn named(packet: &Packet, seed: u64) -> Packet {
    let addresses = (packet.destination as u64) << 32 | packet.source as u64;
    let digest = siphash(keys_of(seed), [addresses], packet.source_port);
    Packet { source: digest as u32, source_port: (digest >> 32) as u16, destination: 0, ..*packet }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_port_and_destination_name_a_flow() {
        let packet = Packet { source: 1, destination: 2, source_port: 3, destination_port: 4, ..Packet::default() };
        let name = |packet: Packet, seed| {
            let Packet { source, source_port, .. } = named(&packet, seed);
            (source, source_port)
        };
        let others = [
            (Packet { source: 5, ..packet }, 7),
            (Packet { destination: 5, ..packet }, 7),
            (Packet { source_port: 5, ..packet }, 7),
            (packet, 8),
        ];
        for (other, seed) in others {
            assert_ne!(name(other, seed), name(packet, 7), "{other:?}");
        }
        assert_eq!(named(&packet, 7).destination, 0);
        assert_eq!(named(&packet, 7).destination_port, 4);
    }
}
