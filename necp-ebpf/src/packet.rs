//! What the rest of the path needs to know of a packet.

use crate::abi::{INTERCEPT, INTERCEPT6, REPLY, REPLY6, VIP};

/// TCP flag bits, as in byte 13 of the TCP header (RFC 9293 §3.1).
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronize sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement field is valid.
    pub const ACK: u8 = 0x10;
}

/// IP protocol numbers.
pub mod protocol {
    /// Internet Control Message Protocol.
    pub const ICMP: u8 = 1;
    /// Transmission Control Protocol.
    pub const TCP: u8 = 6;
    /// User Datagram Protocol.
    pub const UDP: u8 = 17;
}

/// An IPv4 packet whose headers have been checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Source address: the four bytes as they stand in the header, read as a native integer.
    pub source: u32,
    /// Destination address, likewise.
    pub destination: u32,
    /// Source port, likewise; 0 for protocols without.
    pub source_port: u16,
    /// Destination port, likewise; 0 for protocols without.
    pub destination_port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// TCP's flags ([`tcp`]), 0 for other protocols.
    pub flags: u8,
    /// Bytes of TCP payload, 0 for other protocols.
    pub payload: u16,
    /// TCP's sequence number (host byte order), 0 for other protocols.
    pub sequence: u32,
}

impl Packet {
    /// The client's first word: SYN and none of ACK, RST, FIN.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        self.flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN
    }

    /// The same flow, the other way.
    #[inline(always)]
    pub const fn turned_round(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..*self
        }
    }

    /// The first eight bytes of the service entry that this packet would match.
    #[inline(always)]
    pub const fn service_key(&self) -> u64 {
        entry_key(self.destination, self.destination_port, self.protocol, 1)
    }

    /// The first eight bytes of the entry of the service that may intercept this packet.
    #[inline(always)]
    pub const fn intercept_key(&self) -> u64 {
        entry_key(0, self.destination_port, self.protocol, INTERCEPT)
    }

    /// The same of IPv6.
    #[inline(always)]
    pub const fn intercept_key6(&self) -> u64 {
        entry_key(0, self.destination_port, self.protocol, INTERCEPT6)
    }

    /// The first eight bytes of the entry of the VIP with this number that this packet may be a reply from.
    #[inline(always)]
    pub const fn reply_key(&self, number: u32) -> u64 {
        entry_key(number, self.source_port, self.protocol, REPLY)
    }

    /// The same of IPv6, whose entry says which VIP it is.
    #[inline(always)]
    pub const fn reply_key6(&self, number: u32) -> u64 {
        entry_key(number, self.source_port, self.protocol, REPLY6)
    }
}

/// The first eight bytes of the entry that says of an address that it is a VIP.
#[inline(always)]
pub const fn vip_key(address: u32) -> u64 {
    entry_key(address, 0, 0, VIP)
}

/// The first eight bytes of a [`Service`](crate::abi::Service).
#[inline(always)]
pub(crate) const fn entry_key(address: u32, port: u16, protocol: u8, state: u8) -> u64 {
    let (address, port, protocol, state) = (address as u64, port as u64, protocol as u64, state as u64);
    if cfg!(target_endian = "little") {
        state << 56 | protocol << 48 | port << 32 | address
    } else {
        address << 32 | port << 16 | protocol << 8 | state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Service;

    #[test]
    fn a_service_key_is_the_first_eight_bytes_of_its_entry() {
        let entry = Service {
            address: [192, 0, 2, 10],
            port: 80u16.to_be_bytes(),
            protocol: 6,
            state: 1,
            ..Service::default()
        };
        let packet = Packet {
            destination: u32::from_ne_bytes(entry.address),
            destination_port: u16::from_ne_bytes(entry.port),
            protocol: entry.protocol,
            ..Packet::default()
        };
        // SAFETY: the entry is aligned to eight bytes and longer.
        let key = unsafe { core::ptr::from_ref(&entry).cast::<u64>().read() };
        assert_eq!(packet.service_key(), key);
    }

    #[test]
    fn a_flow_key_is_the_first_eight_bytes_of_its_entry() {
        let entry = crate::abi::Flow { source: [10, 1, 2, 3], source_port: [4, 5], service: 0x8006, state: 0, isn: 0 };
        let packet = Packet {
            source: u32::from_ne_bytes(entry.source),
            source_port: u16::from_ne_bytes(entry.source_port),
            ..Packet::default()
        };
        // SAFETY: the entry is aligned to eight bytes and longer.
        let key = unsafe { core::ptr::from_ref(&entry).cast::<u64>().read() };
        assert_eq!(crate::flows::flow_key(&packet, entry.service), key);
    }
}
