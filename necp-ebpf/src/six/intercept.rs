//! IPv6 packets that cross this host, as [`intercept`](crate::intercept) has those of IPv4.
//!
//! An intercepted flow's name is a digest of source, port and destination; it has the place of an IPv4 source and port, and there
//! is no destination. Multicast and link-local addresses are in the sets of own ones: no router takes those any further.

use super::{
    find_service,
    head::{Head, ICMPV6, head, ports},
    icmp::{STEERED, quoted},
    rare::{remember, send},
};
use crate::{
    abi::{AddressSet, LAYER_3, Service},
    device::{Device, Ending, Out},
    digest::{SipHash, keys_of},
    hash::service_bucket,
    packet::Packet,
    parse::Part,
    steer::{Decision, find_entry, steer_to, whose_at},
    tables::{Addresses6, NextHop, Tables},
    verdict::Reason,
};

/// Handles a frame that is for no VIP. Later fragments whose first one was intercepted never get here.
#[inline(always)]
pub fn handle<D: Device, T: Tables>(device: &D, tables: &T) -> Ending {
    let pass = |reason| Ending::new(reason, Out::Pass);
    let (l3, mut head, six) = match head(device, tables) {
        Ok(found) => found,
        Err(ending) => return ending,
    };
    match head.walk.part() {
        Part::Later => return pass(Reason::Fragment),
        Part::Whole if head.walk.protocol() == ICMPV6 => return message(device, &six, l3, &head),
        Part::Whole | Part::First => {}
    }
    if let Err(reason) = ports(&device.frame().skip(l3), &mut head) {
        return pass(reason);
    }
    let decision = steer(&head.packet, &six);
    if decision.reason == Reason::NotOurs {
        return pass(if matches!(head.walk.part(), Part::Whole) { Reason::NotOurs } else { Reason::Fragment });
    }
    remember(device, &six, &head, decision.server, 0);
    send(device, &six, l3, &decision)
}

/// An ICMP message: to the proxy whose flow it quotes. What it quotes was sent as the destination: it is right for the proxy as it
/// stands.
#[inline(always)]
fn message<D: Device, T: Tables>(device: &D, six: &T, l3: usize, head: &Head) -> Ending {
    let other = Ending::new(Reason::Icmp, Out::Pass);
    let at = head.walk.transport();
    let to = six.addresses6().unwrap_or_default().destination;
    // Behind the datagram there may be padding.
    let kind = if head.total > at { device.frame().skip(l3 + at).read::<u8>(0) } else { None };
    if !kind.is_some_and(|kind| STEERED.contains(&kind)) {
        return other;
    }
    let Some((quoted, _)) = quoted(device, l3, head) else { return other };
    if quoted.addresses.source != to {
        return other;
    }
    let Some(six) = six.six(quoted.addresses.turned_round()) else { return other };
    let packet = quoted.packet.turned_round();
    // What a VIP's farm has no server for is the host's.
    if find_service(&packet, &six).is_some() {
        return other;
    }
    let Some((server, next_hop)) = whose(&packet, &six).filter(|(_, hop)| hop.forwarding() != LAYER_3) else {
        return other;
    };
    let reason = if next_hop.is_reachable() { Reason::Quoted } else { Reason::NoNextHop };
    send(device, &six, l3, &Decision { reason, server, next_hop, begins: false })
}

/// [`steer`](crate::intercept::steer) of a packet whose addresses these tables have.
#[inline(always)]
pub fn steer<T: Tables>(packet: &Packet, six: &T) -> Decision {
    match interceptor(packet, six) {
        Some(service) => steer_to(service, packet, &named(packet, service.seed, six), six),
        None => Decision::unsteered(Reason::NotOurs),
    }
}

/// [`whose`](crate::steer::whose), likewise.
#[inline(always)]
pub fn whose<T: Tables>(packet: &Packet, six: &T) -> Option<(u32, NextHop)> {
    let service = interceptor(packet, six)?;
    whose_at(service, &named(packet, service.seed, six), six)
}

/// The service that intercepts this packet.
#[inline(always)]
fn interceptor<'a, T: Tables>(packet: &Packet, six: &'a T) -> Option<&'a Service> {
    let key = packet.intercept_key6();
    let service = find_entry(key, six.service_bucket(service_bucket(key))?)?;
    let farm = service.farm as u32;
    let Addresses6 { source, destination } = six.addresses6()?;
    let taken = six.is_in6(AddressSet::intercepted(farm), destination)
        && !six.is_in6(AddressSet::OWN, destination)
        && !six.is_in6(AddressSet::servers(farm), source);
    taken.then_some(service)
}

/// The packet with what names its flow: the digest in the place of its source, and no destination.
#[inline(always)]
pub fn named<T: Tables>(packet: &Packet, seed: u64, six: &T) -> Packet {
    let digest = six.digest_crossing6(packet.source_port, seed);
    Packet { source: digest as u32, source_port: (digest >> 32) as u16, destination: 0, ..*packet }
}

/// What stands for the addresses and the source port of an intercepted flow.
#[inline(always)]
pub fn digest_crossing(addresses: Addresses6, port: u16, seed: u64) -> u64 {
    let Addresses6 { source: [a, b], destination: [c, d] } = addresses;
    SipHash::new(keys_of(seed)).with(a).with(b).with(c).with(d).finish(4, port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Owned;

    #[test]
    fn source_port_and_destination_name_a_flow() {
        let mut tables = Owned::new(1, 1, 1);
        let view = tables.view();
        let packet = Packet { source_port: 5, destination_port: 6, ..Packet::default() };
        let name = |source, destination, source_port, seed| {
            let six = view.six(Addresses6 { source, destination }).expect("the host's tables always are");
            let Packet { source, source_port, .. } = named(&Packet { source_port, ..packet }, seed, &six);
            (source, source_port)
        };
        let this = name([1, 2], [3, 4], 5, 7);
        let others = [
            name([8, 2], [3, 4], 5, 7),
            name([1, 8], [3, 4], 5, 7),
            name([1, 2], [8, 4], 5, 7),
            name([1, 2], [3, 8], 5, 7),
            name([1, 2], [3, 4], 8, 7),
            name([1, 2], [3, 4], 5, 8),
        ];
        assert!(!others.contains(&this), "{others:?}");
        let six = view.six(Addresses6 { source: [1, 2], destination: [3, 4] }).expect("as above");
        let named = named(&packet, 7, &six);
        assert_eq!((named.destination, named.destination_port), (0, 6));
    }
}
