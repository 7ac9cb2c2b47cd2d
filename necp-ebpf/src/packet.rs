//! What the rest of the path needs to know of a packet.

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

    /// The first eight bytes of the service entry that this packet would match.
    #[inline(always)]
    pub const fn service_key(&self) -> u64 {
        let [a, b, c, d] = self.destination.to_ne_bytes();
        let [e, f] = self.destination_port.to_ne_bytes();
        u64::from_ne_bytes([a, b, c, d, e, f, self.protocol, 1])
    }
}
