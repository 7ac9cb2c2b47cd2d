//! IPv6 (RFC 8200): the same path with longer addresses.
//!
//! A service at an IPv6 VIP has its entry under the VIP's fold; the entry says which VIP it is, and the address itself decides.
//! A flow's name is a *digest* of its source address and port in the place of an IPv4 source and port (48 bits of SipHash-1-3
//! under the farm's seed), and the fold is its destination. So slots, flow table and collection know no family. As with
//! [`intercept`](crate::intercept), two flows of a service are taken for one with odds of 2⁻⁴⁸, and the seed should be a secret.
//!
//! Two programs more, as for IPv4: this is the fast path, for whole, untagged packets without extension headers; [`rare`] has
//! the rest. What crosses this host is for [`intercept`].

pub mod head;
pub mod icmp;
pub mod intercept;
pub mod rare;
pub mod routed;

use core::mem::offset_of;

use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv6Hdr,
};

use crate::{
    abi::{SERVICE6, Service, VIP6},
    digest::{keys_of, siphash},
    frame::Frame,
    hash::{fold6, service_bucket},
    packet::{Packet, entry_key, protocol},
    parse::{L2_LEN, transport},
    rewrite::l2::{self, Mac},
    steer::{Decision, find_entry, steer_to, whose_at},
    tables::{Address6, Addresses6, NextHop, Tables, halves},
    verdict::Reason,
};

/// An IPv6 packet whose headers have been checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet6 {
    /// Its addresses.
    pub addresses: Addresses6,
    /// The rest; the addresses in it are 0.
    pub packet: Packet,
}

/// What is left to [`rare`], whatever that finds it to be.
const LEFT: Reason = Reason::Fragment;

/// Whether an untagged frame is of this family.
#[inline(always)]
pub fn is_ipv6(frame: &Frame) -> bool {
    frame.read::<u16>(offset_of!(EthHdr, ether_type)) == Some(u16::from(EtherType::Ipv6))
}

/// Decides about an untagged IPv6 frame that came in by an interface with this MAC address.
#[inline(always)]
pub fn decide<T: Tables>(frame: &Frame, own_mac: Mac, tables: &T) -> Decision {
    match parse(frame) {
        Ok(_) if !l2::is_for(frame, own_mac) => Decision::unsteered(Reason::OtherHost),
        Ok(packet) => match tables.six(packet.addresses) {
            Some(six) => steer(&packet.packet, &six),
            None => Decision::unsteered(Reason::BadTables),
        },
        Err(reason) => Decision::unsteered(reason),
    }
}

/// Reads the headers of a whole, untagged TCP or UDP packet without extension headers. Others are for [`rare`].
#[inline(always)]
pub fn parse(frame: &Frame) -> Result<Packet6, Reason> {
    let ip: &Ipv6Hdr = frame.header(L2_LEN).ok_or(Reason::Malformed)?;
    let length = u16::from_be_bytes(ip.payload_len);
    if ip.vcf[0] >> 4 != 6 || length as usize + L2_LEN + Ipv6Hdr::LEN > frame.len() {
        return Err(Reason::Malformed);
    }
    if !matches!(ip.next_hdr, protocol::TCP | protocol::UDP) {
        return Err(LEFT);
    }
    let addresses = Addresses6 { source: halves(ip.src_addr), destination: halves(ip.dst_addr) };
    let mut packet = Packet { protocol: ip.next_hdr, ..Packet::default() };
    transport(frame, L2_LEN + Ipv6Hdr::LEN, length, length, &mut packet)?;
    Ok(Packet6 { addresses, packet })
}

// From here on the tables have a packet's addresses: kept in one place, they take no room on the stack of the kernel's programs.

/// [`steer`](crate::steer::steer).
#[inline(always)]
pub fn steer<T: Tables>(packet: &Packet, six: &T) -> Decision {
    match find_service(packet, six) {
        Some(service) => steer_to(service, packet, &named(packet, service, six), six),
        None => Decision::unsteered(Reason::NotOurs),
    }
}

/// [`whose`](crate::steer::whose).
#[inline(always)]
pub fn whose<T: Tables>(packet: &Packet, six: &T) -> Option<(u32, NextHop)> {
    let service = find_service(packet, six)?;
    whose_at(service, &named(packet, service, six), six)
}

/// The service that a packet is for.
#[inline(always)]
pub(crate) fn find_service<'a, T: Tables>(packet: &Packet, six: &'a T) -> Option<&'a Service> {
    find_at(six.addresses6()?.destination, packet.destination_port, packet.protocol, SERVICE6, six)
}

/// What is noted of an address, if it is a VIP.
#[inline(always)]
pub(crate) fn find_vip<T: Tables>(address: Address6, tables: &T) -> Option<&Service> {
    find_at(address, 0, 0, VIP6, tables)
}

#[inline(always)]
pub(crate) fn find_at<T: Tables>(
    address: Address6,
    port: u16,
    protocol: u8,
    state: u8,
    tables: &T,
) -> Option<&Service> {
    let key = entry_key(fold6(address), port, protocol, state);
    let service = find_entry(key, tables.service_bucket(service_bucket(key))?)?;
    (tables.vip6(service.vip as u32)? == address).then_some(service)
}

/// The packet with what names its flow: the digest in the place of its source, the fold of the VIP in that of its destination.
#[inline(always)]
pub fn named<T: Tables>(packet: &Packet, service: &Service, six: &T) -> Packet {
    named_by(six.addresses6().unwrap_or_default().source, packet, service, six)
}

/// The same of a packet from this address.
#[inline(always)]
pub(crate) fn named_by<T: Tables>(source: Address6, packet: &Packet, service: &Service, tables: &T) -> Packet {
    let digest = tables.digest6(source, packet.source_port, service.seed);
    Packet {
        source: digest as u32,
        source_port: (digest >> 32) as u16,
        destination: u32::from_ne_bytes(service.address),
        ..*packet
    }
}

/// What stands for source address and port of a flow.
#[inline(always)]
pub fn digest([high, low]: Address6, port: u16, seed: u64) -> u64 {
    siphash(keys_of(seed), [high, low], port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Owned;

    #[test]
    fn source_and_port_name_a_flow() {
        let service = Service { seed: 7, address: [1, 2, 3, 4], ..Service::default() };
        let packet = Packet6 {
            addresses: Addresses6 { source: [1, 2], destination: [3, 4] },
            packet: Packet { source_port: 5, destination_port: 6, protocol: 17, ..Packet::default() },
        };
        let mut tables = Owned::new(1, 1, 1);
        let view = tables.view();
        let name = |packet: &Packet6, service: &Service| {
            let six = view.six(packet.addresses).expect("the host's tables always are");
            let Packet { source, source_port, .. } = named(&packet.packet, service, &six);
            (source, source_port)
        };
        let with = |source, port| Packet6 {
            addresses: Addresses6 { source, ..packet.addresses },
            packet: Packet { source_port: port, ..packet.packet },
        };
        for other in [with([8, 2], 5), with([1, 8], 5), with([1, 2], 8)] {
            assert_ne!(name(&other, &service), name(&packet, &service), "{other:?}");
        }
        assert_ne!(name(&packet, &Service { seed: 8, ..service }), name(&packet, &service));
        let six = view.six(packet.addresses).expect("as above");
        let named = named(&packet.packet, &service, &six);
        assert_eq!((named.destination, named.destination_port), (u32::from_ne_bytes([1, 2, 3, 4]), 6));
    }
}
