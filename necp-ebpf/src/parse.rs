//! A frame's bytes → a [`Packet`], or the reason why it is none.

use core::mem::offset_of;

use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
    udp::UdpHdr,
};

use crate::{
    frame::Frame,
    packet::{Packet, protocol},
    verdict::Reason,
};

/// Ethernet: where the packet begins.
pub const L2_LEN: usize = EthHdr::LEN;

/// More fragments (RFC 791 §3.1), and the fragment offset.
const FRAGMENT: u16 = 0x3fff;

/// More fragments, alone: the first one.
const MORE: u16 = 0x2000;
/// The fragment offset, in eights of bytes.
const OFFSET: u16 = 0x1fff;

/// TCP's header without options, as far as it is needed (RFC 9293 §3.1), in one read a field.
#[repr(C)]
#[derive(Clone, Copy)]
struct TcpFields {
    source_port: [u8; 2],
    destination_port: [u8; 2],
    sequence: [u8; 4],
    acknowledgement: [u8; 4],
    offset: u8,
    flags: u8,
    window: [u8; 2],
    checksum: [u8; 2],
    urgent: [u8; 2],
}

const TCP_LEN: u16 = size_of::<TcpFields>() as u16;
const UDP_LEN: u16 = UdpHdr::LEN as u16;

/// Checks an Ethernet frame's headers and reads them.
#[inline(always)]
pub fn parse(frame: &Frame) -> Result<Packet, Reason> {
    let ether_type: u16 = frame.read(offset_of!(EthHdr, ether_type)).ok_or(Reason::Malformed)?;
    if ether_type != u16::from(EtherType::Ipv4) {
        return Err(Reason::NotIp);
    }
    let ip: &Ipv4Hdr = frame.header(L2_LEN).ok_or(Reason::Malformed)?;
    let header = ip.vihl as u16 & 0xf;
    let header = header << 2;
    let total = u16::from_be_bytes(ip.tot_len);
    if ip.vihl >> 4 != 4 || (header as usize) < Ipv4Hdr::LEN || total < header || total as usize > frame.len() - L2_LEN
    {
        return Err(Reason::Malformed);
    }
    if u16::from_be_bytes(ip.frags) & FRAGMENT != 0 {
        return Err(Reason::Fragment);
    }
    let mut packet = Packet {
        source: u32::from_ne_bytes(ip.src_addr),
        destination: u32::from_ne_bytes(ip.dst_addr),
        protocol: ip.proto,
        ..Packet::default()
    };
    let length = total - header;
    transport(frame, L2_LEN + header as usize, length, length, &mut packet)?;
    Ok(packet)
}

/// What there is of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// Its first fragment, which has its ports.
    First,
    /// Another one.
    Later,
}

/// A datagram or a part of one, as far as its IPv4 header goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Without ports until [`ports`] has read them.
    pub packet: Packet,
    /// What there is of it.
    pub part: Part,
    /// Length of the header in bytes.
    pub header: usize,
    /// Length with what follows it.
    pub total: u16,
    /// Identification, as it stands in the header, read as a native integer.
    pub id: u16,
}

/// Checks and reads the IPv4 header at a frame's beginning, of which `available` bytes are there, perhaps in several buffers.
#[inline(always)]
pub fn datagram(frame: &Frame, available: usize) -> Result<Datagram, Reason> {
    let ip: &Ipv4Hdr = frame.header(0).ok_or(Reason::Malformed)?;
    let header = ((ip.vihl & 0xf) << 2) as usize;
    let total = u16::from_be_bytes(ip.tot_len);
    if ip.vihl >> 4 != 4 || header < Ipv4Hdr::LEN || (total as usize) < header || total as usize > available {
        return Err(Reason::Malformed);
    }
    let fragment = u16::from_be_bytes(ip.frags) & FRAGMENT;
    let part = match fragment {
        0 => Part::Whole,
        MORE => Part::First,
        _ => Part::Later,
    };
    let packet = Packet {
        source: u32::from_ne_bytes(ip.src_addr),
        destination: u32::from_ne_bytes(ip.dst_addr),
        protocol: ip.proto,
        ..Packet::default()
    };
    // A second part that begins within the first one's TCP header (RFC 1858 §3.2.2).
    if fragment & OFFSET == 1 && packet.protocol == protocol::TCP {
        return Err(Reason::Malformed);
    }
    Ok(Datagram { packet, part, header, total, id: u16::from_ne_bytes(ip.id) })
}

/// Reads the transport header of a datagram or of its first part.
#[inline(always)]
pub fn ports(frame: &Frame, datagram: &mut Datagram) -> Result<(), Reason> {
    let length = datagram.total - datagram.header as u16;
    // A first part is shorter than what its UDP header announces.
    let announced = if matches!(datagram.part, Part::Whole) { length } else { u16::MAX };
    transport(&frame.skip(datagram.header), 0, length, announced, &mut datagram.packet)
}

/// Reads the transport header at `offset`, which has `length` bytes with what follows it; UDP may announce so many.
#[inline(always)]
pub(crate) fn transport(
    frame: &Frame,
    offset: usize,
    length: u16,
    most: u16,
    packet: &mut Packet,
) -> Result<(), Reason> {
    match packet.protocol {
        protocol::TCP => {
            let tcp: &TcpFields = frame.header(offset).ok_or(Reason::Malformed)?;
            let header = (tcp.offset >> 4) as u16 * 4;
            if header < TCP_LEN || header > length {
                return Err(Reason::Malformed);
            }
            packet.source_port = u16::from_ne_bytes(tcp.source_port);
            packet.destination_port = u16::from_ne_bytes(tcp.destination_port);
            packet.sequence = u32::from_be_bytes(tcp.sequence);
            packet.flags = tcp.flags;
            packet.payload = length - header;
        }
        protocol::UDP => {
            let udp: &UdpHdr = frame.header(offset).ok_or(Reason::Malformed)?;
            let announced = u16::from_be_bytes(udp.len);
            if length < UDP_LEN || announced < UDP_LEN || announced > most {
                return Err(Reason::Malformed);
            }
            packet.source_port = u16::from_ne_bytes(udp.src);
            packet.destination_port = u16::from_ne_bytes(udp.dst);
        }
        protocol::ICMP => return Err(Reason::Icmp),
        // Others have no ports.
        _ => {}
    }
    Ok(())
}
