//! ICMP errors, and where they belong by what they quote.

use std::net::IpAddr;

use necp_ebpf::verdict::Reason;

use super::{
    Ground, ipv4,
    placed::{Flows, named},
    service::service_of,
    tuple::Tuple,
};
use crate::frames::scene::{SERVICES, VIP, VIP6, is_server, is_server6};

/// An ICMP message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message {
    pub(super) to: IpAddr,
    /// It asks for an echo.
    pub(super) asks: bool,
    /// What it quotes, if it is a whole error of a type that senders heed.
    pub(super) quote: Option<Tuple>,
}

impl Message {
    /// Of a datagram of IPv4.
    pub(super) fn of(datagram: &[u8]) -> Option<Self> {
        let (header, message) = ipv4(datagram)?;
        let whole = !header.more_fragments();
        Some(Self {
            to: header.destination_addr().into(),
            // RFC 792: type 8; the first part shows it too.
            asks: message.first() == Some(&8),
            quote: Tuple::quoted_by(datagram).filter(|_| whole),
        })
    }

    /// Holds it and what was counted, and the server that got it, against each other.
    pub(super) fn hold(&self, reason: Reason, to: Option<u32>, ground: Ground<'_>) -> Result<(), String> {
        let quote = self.quote;
        // The scene's VIPs do not answer.
        let echo = self.asks && (self.to == IpAddr::from(VIP) || self.to == IpAddr::from(VIP6));
        // Who gets the error has sent what is quoted: as the VIP, or in the name of whom a client asked.
        let flow = quote.filter(|quote| quote.source == self.to).map(Tuple::turned_round);
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
}

/// A client's packet to a server's own address.
fn is_to_server(quote: Tuple) -> bool {
    let is_server = match quote.destination {
        IpAddr::V4(address) => is_server(&address.octets()),
        IpAddr::V6(address) => is_server6(&address.octets()),
    };
    is_server && SERVICES.contains(&(quote.protocol, quote.destination_port))
}
