//! ICMP errors, and where they belong by what they quote.

use necp_ebpf::verdict::Reason;

use super::{
    Ground, ipv4,
    placed::{Flows, named},
    service::service_of,
    tuple::Tuple,
};
use crate::frames::scene::{SERVICES, VIP, is_server};

/// Holds an ICMP message and what was counted, and the server that got it, against each other.
pub(super) fn hold(datagram: &[u8], reason: Reason, to: Option<u32>, ground: Ground<'_>) -> Result<(), String> {
    let (header, message) = ipv4(datagram).ok_or("ICMP in no IPv4 packet")?;
    // The scene's VIP does not answer echo (RFC 792: type 8).
    let echo = header.destination() == VIP && message.first() == Some(&8) && !header.more_fragments();
    let quote = Tuple::quoted_by(datagram).filter(|_| !header.more_fragments());
    // Who gets the error has sent what is quoted: as the VIP, or in the name of whom a client asked.
    let flow = quote.filter(|quote| quote.source == header.destination()).map(Tuple::turned_round);
    let service = flow.and_then(|flow| service_of(&flow, ground.rules));
    let flows = service.map(|service| Flows::of(&service, ground));
    match reason {
        Reason::Echo if echo => Ok(()),
        Reason::Icmp if echo => Err("an echo that should have been dropped".into()),
        Reason::Icmp if flows.is_some_and(|flows| flows.all_have_servers()) => {
            Err(format!("nobody gets an error about {flow:?}"))
        }
        Reason::Icmp => Ok(()),
        Reason::Quoted | Reason::Fragmenting => match (flows, to) {
            (Some(flows), Some(to)) => named(flows.owns(to) || flows.began_with(to) || flows.has_record(to), to),
            _ => Err(format!("{reason:?} for an error about {quote:?}")),
        },
        Reason::NoNextHop if service.is_some() => Ok(()),
        Reason::Reply | Reason::ReplyRouted if quote.is_some_and(is_to_server) => Ok(()),
        Reason::Untold if service.is_some() || quote.is_some_and(is_to_server) => Ok(()),
        reason => Err(format!("{reason:?} for an error about {quote:?}")),
    }
}

/// A client's packet to a server's own address.
fn is_to_server(quote: Tuple) -> bool {
    is_server(&quote.destination) && SERVICES.contains(&(quote.protocol, quote.destination_port))
}
