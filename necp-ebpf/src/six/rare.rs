//! What comes seldom, as [`rare`](crate::rare) is for IPv4: tags, extension headers, fragments, ICMP errors, several buffers.

use super::{
    find_vip,
    head::{Head, ICMPV6, head, ports},
    icmp, routed, steer,
};
use crate::{
    abi::{GRE, LAYER_3, NONE},
    device::{Device, Ending, Out},
    digest::{keys_of, siphash},
    parse::Part,
    rare::{FragmentKey, FragmentPlace, bridge},
    steer::Decision,
    tables::Tables,
    verdict::{Action, Reason},
};

impl FragmentKey {
    /// The parts of an IPv6 datagram (RFC 8200 §4.5): a digest, under a secret of this instance.
    #[inline(always)]
    fn of6<T: Tables>(head: &Head, six: &T) -> Self {
        let addresses = six.addresses6().unwrap_or_default();
        let ([a, b], [c, d]) = (addresses.source, addresses.destination);
        let digest = siphash(keys_of(six.exception_seed()), [a, b, c, d, head.walk.id() as u64], 0);
        Self { source: digest as u32, destination: (digest >> 32) as u32, id: 0, protocol: 0, reserved: 6 }
    }
}

/// Handles a frame that the fast path knows nothing of; `None`: it has ports, and [`with_ports`] is to handle it.
#[inline(always)]
pub fn handle<D: Device, T: Tables>(device: &D, tables: &T) -> Option<Ending> {
    let (l3, head, six) = match head(device, tables) {
        Ok(found) => found,
        Err(ending) => return Some(ending),
    };
    match head.walk.part() {
        Part::Later => Some(later_part(device, &six, l3, &head)),
        Part::Whole if head.walk.protocol() == ICMPV6 => Some(icmp::message(device, &six, l3, &head)),
        Part::Whole | Part::First => None,
    }
}

/// A datagram with ports, or the first part of one.
#[inline(always)]
pub fn with_ports<D: Device, T: Tables>(device: &D, tables: &T) -> Ending {
    let (l3, mut head, six) = match head(device, tables) {
        Ok(found) => found,
        Err(ending) => return ending,
    };
    if let Err(reason) = ports(&device.frame().skip(l3), &mut head) {
        return if reason == Reason::Icmp && icmp::is_unwanted_echo(&device.frame().skip(l3), &head, &six) {
            Ending::drop(Reason::Echo)
        } else if reason == Reason::Icmp {
            leave(device, &six, &head, reason)
        } else {
            Ending::new(reason, Out::Pass)
        };
    }
    let decision = steer(&head.packet, &six);
    if decision.reason != Reason::NotOurs {
        remember(device, &six, &head, decision.server, 0);
        return send(device, &six, l3, &decision);
    }
    let Some((vip, server)) = routed::flow_of_reply(&head.packet, true, &six) else {
        let whole = matches!(head.walk.part(), Part::Whole);
        return leave(device, &six, &head, if whole { Reason::NotOurs } else { Reason::Fragment });
    };
    remember(device, &six, &head, server, vip);
    device.send_reply6(&six, l3, vip, server)
}

/// To this host's own stack, which wants the other parts too: at a VIP they would be strays, and behind an older datagram of the
/// same name they would go where that went.
#[inline(always)]
fn leave<D: Device, T: Tables>(device: &D, six: &T, head: &Head, reason: Reason) -> Ending {
    if matches!(head.walk.part(), Part::First)
        && (is_for_vip(six) || device.recall(&FragmentKey::of6(head, six)).is_some())
    {
        remember(device, six, head, NONE, 0);
    }
    Ending::new(reason, Out::Pass)
}

#[inline(always)]
fn is_for_vip<T: Tables>(six: &T) -> bool {
    six.addresses6().is_some_and(|addresses| find_vip(addresses.destination, six).is_some())
}

#[inline(always)]
pub(super) fn remember<D: Device, T: Tables>(device: &D, six: &T, head: &Head, server: u32, vip: u32) {
    if matches!(head.walk.part(), Part::First) {
        device.remember(&FragmentKey::of6(head, six), FragmentPlace { at: 0, server, vip });
    }
}

/// A part that has no ports of its own.
#[inline(always)]
fn later_part<D: Device, T: Tables>(device: &D, six: &T, l3: usize, head: &Head) -> Ending {
    let Some(place) = device.recall(&FragmentKey::of6(head, six)) else {
        // To a VIP it is of no use to anybody.
        return if is_for_vip(six) {
            Ending::drop(Reason::StrayPart)
        } else {
            Ending::new(Reason::Fragment, Out::Pass)
        };
    };
    if place.vip != 0 {
        return device.send_reply6(six, l3, place.vip, place.server);
    }
    match six.next_hop(place.server) {
        Some(next_hop) if next_hop.is_reachable() => {
            send(device, six, l3, &Decision { reason: Reason::Part, server: place.server, next_hop, begins: false })
        }
        // The first part went to this host's own stack.
        _ => Ending::new(Reason::Fragment, Out::Pass),
    }
}

/// Sends it as its server wants it.
#[inline(always)]
pub(crate) fn send<D: Device, T: Tables>(device: &D, six: &T, l3: usize, decision: &Decision) -> Ending {
    match decision.action() {
        Action::Transmit => {}
        Action::Drop => return Ending::drop(decision.reason),
        _ => return Ending::new(decision.reason, Out::Pass),
    }
    let length = device.length() as u64;
    let ending = if matches!(decision.next_hop.forwarding(), GRE | LAYER_3) {
        device.send_routed6(six, decision.server, decision.reason as u32, l3)
    } else {
        bridge(device, decision)
    };
    if matches!(ending.out(), Out::Port(_) | Out::Pass) {
        device.count(decision.server, length, decision.begins);
    }
    ending
}
