//! Frames by hand, for packets that no honest peer would send, and a reader of frames.

use std::net::{Ipv4Addr, SocketAddrV4};

use etherparse::{NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket, TcpHeader, TransportSlice, ip_number};

/// TCP flags as they stand in the header (RFC 9293 §3.1), to be combined with `|`.
pub mod flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// Push.
    pub const PSH: u8 = 0x08;
    /// The acknowledgment number counts.
    pub const ACK: u8 = 0x10;
}

/// One direction of an IPv4 flow on one link; makes Ethernet frames with correct lengths and checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Hardware address that the frames come from.
    pub source_mac: [u8; 6],
    /// Hardware address that they go to.
    pub destination_mac: [u8; 6],
    /// Address and port that the packets come from.
    pub source: SocketAddrV4,
    /// Address and port that they go to.
    pub destination: SocketAddrV4,
    /// Time to live.
    pub ttl: u8,
}

impl Flow {
    /// A TCP segment; `flags` of [`flags`]; the window is 64,240 bytes.
    pub fn tcp(&self, flags: u8, sequence: u32, acknowledgment: u32, payload: &[u8]) -> Vec<u8> {
        let mut header = TcpHeader::new(self.source.port(), self.destination.port(), sequence, 64_240);
        header.acknowledgment_number = acknowledgment;
        header.fin = flags & flags::FIN != 0;
        header.syn = flags & flags::SYN != 0;
        header.rst = flags & flags::RST != 0;
        header.psh = flags & flags::PSH != 0;
        header.ack = flags & flags::ACK != 0;
        let builder = self.ip().tcp_header(header);
        let mut frame = Vec::with_capacity(builder.size(payload.len()));
        builder.write(&mut frame, payload).expect("a payload that fits into a datagram");
        frame
    }

    /// A UDP datagram.
    pub fn udp(&self, payload: &[u8]) -> Vec<u8> {
        let builder = self.ip().udp(self.source.port(), self.destination.port());
        let mut frame = Vec::with_capacity(builder.size(payload.len()));
        builder.write(&mut frame, payload).expect("a payload that fits into a datagram");
        frame
    }

    /// The other direction.
    pub fn reversed(&self) -> Self {
        Self {
            source_mac: self.destination_mac,
            destination_mac: self.source_mac,
            source: self.destination,
            destination: self.source,
            ttl: self.ttl,
        }
    }

    fn ip(&self) -> PacketBuilderStep<etherparse::IpHeaders> {
        let (source, destination) = (self.source.ip().octets(), self.destination.ip().octets());
        PacketBuilder::ethernet2(self.source_mac, self.destination_mac).ipv4(source, destination, self.ttl)
    }
}

/// ICMP "fragmentation needed" (RFC 1191 §4) of a router: no more than `mtu` bytes get on from there. `quoted` is the head of
/// the datagram that was too long.
pub fn needs_fragmentation(to_mac: [u8; 6], router: Ipv4Addr, mtu: u16, quoted: &[u8]) -> Vec<u8> {
    let [high, low] = mtu.to_be_bytes();
    icmp_error(to_mac, router, [3, 4, 0, 0, 0, 0, high, low], quoted)
}

/// An ICMP error (RFC 792) about `quoted`, to whoever sent that; of `header` the checksum is filled in.
pub fn icmp_error(to_mac: [u8; 6], router: Ipv4Addr, header: [u8; 8], quoted: &[u8]) -> Vec<u8> {
    let mut icmp = [&header[..], quoted].concat();
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    // It goes to whoever sent what it quotes (RFC 791 §3.1: bytes 12 to 15).
    let sender = quoted.get(12..16).map_or(Ipv4Addr::UNSPECIFIED, |a| Ipv4Addr::new(a[0], a[1], a[2], a[3]));
    let outer = ipv4_header(ip_number::ICMP.0, 20 + icmp.len() as u16, router, sender);
    [&to_mac[..], &[2, 0, 0, 0, 0, 0x77], &[0x08, 0x00], &outer, &icmp].concat()
}

/// An IPv4 header without options of a datagram that must not be fragmented; `length` is that of the whole.
pub fn ipv4_header(protocol: u8, length: u16, source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    header.extend(source.octets());
    header.extend(destination.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

/// A piece of a datagram without options: `field` is flags and fragment offset (RFC 791 §3.1).
pub fn as_fragment(mut frame: Vec<u8>, field: u16) -> Vec<u8> {
    frame[20..22].copy_from_slice(&field.to_be_bytes());
    frame[24..26].copy_from_slice(&[0; 2]);
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A TCP or UDP packet over IPv4 that was read off a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Where it came from and went to.
    pub flow: Flow,
    /// IP protocol: 6 is TCP, 17 UDP.
    pub protocol: u8,
    /// The TCP header, if it is TCP.
    pub tcp: Option<TcpHeader>,
    /// What follows the TCP or UDP header.
    pub payload: Vec<u8>,
}

/// Reads an Ethernet frame; `None` for anything but unfragmented TCP or UDP over IPv4.
pub fn parse(frame: &[u8]) -> Option<Seen> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let ethernet = packet.link.as_ref()?.to_header()?.ethernet2()?;
    let Some(NetSlice::Ipv4(ip)) = &packet.net else { return None };
    let header = ip.header();
    let (ports, protocol, tcp, payload) = match packet.transport? {
        TransportSlice::Tcp(tcp) => {
            let ports = (tcp.source_port(), tcp.destination_port());
            (ports, ip_number::TCP, Some(tcp.to_header()), tcp.payload().to_vec())
        }
        TransportSlice::Udp(udp) => {
            ((udp.source_port(), udp.destination_port()), ip_number::UDP, None, udp.payload().to_vec())
        }
        _ => return None,
    };
    let flow = Flow {
        source_mac: ethernet.source,
        destination_mac: ethernet.destination,
        source: SocketAddrV4::new(Ipv4Addr::from(header.source()), ports.0),
        destination: SocketAddrV4::new(Ipv4Addr::from(header.destination()), ports.1),
        ttl: header.ttl(),
    };
    Some(Seen { flow, protocol: protocol.0, tcp, payload })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOW: Flow = Flow {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: [2, 0, 0, 0, 0, 2],
        source: SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 2), 40_000),
        destination: SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 10), 80),
        ttl: 63,
    };

    #[test]
    fn what_is_built_is_read() {
        let seen = parse(&FLOW.tcp(flags::PSH | flags::ACK, 7, 9, b"hello")).expect("TCP");
        let tcp = seen.tcp.expect("TCP");
        assert_eq!((seen.flow, seen.payload.as_slice()), (FLOW, &b"hello"[..]));
        assert_eq!((tcp.sequence_number, tcp.acknowledgment_number), (7, 9));
        assert_eq!((tcp.syn, tcp.psh, tcp.ack, tcp.rst, tcp.fin), (false, true, true, false, false));
        let seen = parse(&FLOW.udp(b"x")).expect("UDP");
        assert_eq!((seen.flow, seen.protocol, seen.tcp), (FLOW, 17, None));
        assert_eq!(FLOW.reversed().reversed(), FLOW);
    }

    #[test]
    fn broken_frames_are_none() {
        let frame = FLOW.tcp(flags::SYN, 1, 0, b"");
        assert!((0..frame.len()).all(|length| parse(&frame[..length]).is_none()));
    }
}
