//! Who speaks to whom, as headers say.

use std::net::IpAddr;

use etherparse::{Ipv4HeaderSlice, ip_number};

use super::ipv4;

/// What names a flow: addresses, protocol and ports, which are 0 where nobody reads any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tuple {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: u8,
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
}

impl Tuple {
    pub(super) fn of(header: &Ipv4HeaderSlice<'_>, [source_port, destination_port]: [u16; 2]) -> Self {
        Self {
            source: header.source_addr().into(),
            destination: header.destination_addr().into(),
            protocol: header.protocol().0,
            source_port,
            destination_port,
        }
    }

    /// The packet that the datagram quotes, as far as it is there: if it is an error of a type that senders heed (RFC 792) and
    /// has the header of a first part and its ports.
    pub(super) fn quoted_by(datagram: &[u8]) -> Option<Self> {
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
        Some(Self::of(&header, [port(0), port(2)]))
    }

    /// The other direction.
    pub(super) fn turned_round(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..self
        }
    }
}
