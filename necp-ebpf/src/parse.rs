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
        return Err(Reason::NotIpv4);
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
    transport(frame, L2_LEN + header as usize, total - header, &mut packet)?;
    Ok(packet)
}

/// Reads the transport header at `offset`, which has `length` bytes with what follows it.
#[inline(always)]
fn transport(frame: &Frame, offset: usize, length: u16, packet: &mut Packet) -> Result<(), Reason> {
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
            if announced < UDP_LEN || announced > length {
                return Err(Reason::Malformed);
            }
            packet.source_port = u16::from_ne_bytes(udp.src);
            packet.destination_port = u16::from_ne_bytes(udp.dst);
        }
        // Others have no ports, and no service yet.
        _ => {}
    }
    Ok(())
}
