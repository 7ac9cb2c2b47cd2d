//! What ICMP errors quote, and where they therefore belong.

use etherparse::{Ipv4HeaderSlice, ip_number};
use necp_ebpf::{abi::DIRECT, flows::FlowWord, host::View, slot::SlotWord, verdict::Reason};

use super::{ipv4, is_service};
use crate::frames::scene::{SERVICES, VIP, is_server, slots_of};

/// The packet that an ICMP error quotes, as far as it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Quote {
    pub(super) source: [u8; 4],
    pub(super) destination: [u8; 4],
    protocol: u8,
    source_port: u16,
    destination_port: u16,
}

impl Quote {
    /// What the datagram quotes, if it is an error of a type that senders heed (RFC 792) and has the header of a first part
    /// and its ports.
    pub(super) fn of(datagram: &[u8]) -> Option<Self> {
        let (_, message) = ipv4(datagram)?;
        if !matches!(message.first(), Some(3 | 11 | 12)) {
            return None;
        }
        let quoted = message.get(8..)?;
        // Not etherparse's strict header: what is quoted may be as wrong as it likes, but for its length.
        let header = Ipv4HeaderSlice::from_slice(quoted).ok()?;
        let transport = quoted.get(header.slice().len()..)?;
        if transport.len() < 4 || header.fragments_offset().value() != 0 {
            return None;
        }
        let port = |at: usize| match header.protocol() {
            ip_number::TCP | ip_number::UDP => u16::from_be_bytes([transport[at], transport[at + 1]]),
            _ => 0,
        };
        Some(Self {
            source: header.source(),
            destination: header.destination(),
            protocol: header.protocol().0,
            source_port: port(0),
            destination_port: port(2),
        })
    }
}

/// Holds an ICMP message and what was counted against each other.
pub(super) fn hold(datagram: &[u8], reason: Reason, tables: View<'_>) -> Result<(), String> {
    let (header, message) = ipv4(datagram).ok_or("ICMP in no IPv4 packet")?;
    // The scene's VIP does not answer echo (RFC 792: type 8).
    let echo = header.destination() == VIP && message.first() == Some(&8) && !header.more_fragments();
    let quote = Quote::of(datagram).filter(|_| !header.more_fragments());
    // The VIP sent what is quoted.
    let of_vip = quote.filter(|quote| {
        quote.source == header.destination() && is_service(quote.source, quote.protocol, quote.source_port)
    });
    match (reason, quote) {
        (Reason::Echo, _) if echo => Ok(()),
        (Reason::Icmp, _) if echo => Err("an echo that should have been dropped".into()),
        (Reason::Icmp, _) => match of_vip {
            Some(quote) if all_steered(&quote, tables) => Err(format!("nobody gets an error about {quote:?}")),
            _ => Ok(()),
        },
        (Reason::Quoted | Reason::Fragmenting | Reason::NoNextHop, _) if of_vip.is_some() => Ok(()),
        (Reason::Reply | Reason::ReplyRouted, Some(quote)) if is_to_server(&quote) => Ok(()),
        (Reason::Untold, Some(quote)) if of_vip.is_some() || is_to_server(&quote) => Ok(()),
        (reason, quote) => Err(format!("{reason:?} for an error about {quote:?}")),
    }
}

/// A client's packet to a server's own address.
fn is_to_server(quote: &Quote) -> bool {
    is_server(&quote.destination) && SERVICES.contains(&(quote.protocol, quote.destination_port))
}

/// Whether every flow of the service that is quoted has a server: no slot is without, nothing is cut through.
fn all_steered(quote: &Quote, tables: View<'_>) -> bool {
    let service = SERVICES.iter().position(|&service| service == (quote.protocol, quote.source_port));
    let Some(slots) = service.and_then(slots_of) else { return false };
    let mut words = tables.slots()[slots].iter().map(|slot| SlotWord(slot.load()));
    let mut records = tables.flows().iter().flat_map(|bucket| &bucket.entries);
    quote.source == VIP
        && words.all(|word| word.owner() > DIRECT && word.legacy() != DIRECT)
        && records.all(|entry| entry.word.load() == 0 || FlowWord(entry.word.load()).server() > DIRECT)
}
