//! etherparse as the judge of what a frame is, and what therefore must become of it.
//!
//! 1. The frame's class, as etherparse's strict parsers see it, is the class of the reason that was counted; where we mean
//!    to differ, [`Difference`] says so and why.
//! 2. A frame that is passed on is not changed. What becomes of the bytes of one that is dropped does not matter.
//! 3. A transmitted one was a packet for a service, and is changed as its server's forwarding type says, and no further; so is
//!    one that the kernel is to fragment, and a server's reply. Tags stay as they are.
//! 4. If its IPv4 and transport checksums were valid, they are; if not, they are as wrong as they were. Those of outer headers
//!    and of ICMP errors that are made here are valid.
//! 5. An ICMP error goes to the sender, from the address that he asked, and quotes what he sent.
//! 6. A later part of a datagram goes where its first one went ([`Parts`]).
//! 7. An ICMP error that goes to a server quotes a packet from the VIP; where all owners are servers, all of those do.

mod parts;
mod quote;
mod sent;
mod six;
#[cfg(test)]
mod tests;

use std::ops::Range;

use etherparse::{
    EtherType, Ethernet2Slice, Ipv4HeaderSlice, SingleVlanSlice, TcpSlice, UdpHeaderSlice, UdpSlice, ip_number,
};
use necp_ebpf::{
    host::View,
    verdict::{Action, Reason},
};

pub use self::parts::Parts;
use super::{
    scene::{SERVICES, VIP, is_server, is_server6},
    stack::{fold, sum},
};
use crate::kernel::{OWN_MAC, Verdict};

/// What a frame is to the packet path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Another protocol than IP follows its Ethernet header and tags.
    NotIp,
    /// Its lengths or versions do not add up.
    Malformed,
    /// The first part of an IPv4 datagram that is for no service: a server's reply may be among these.
    FirstPart,
    /// Another part of an IPv4 datagram.
    LaterPart,
    /// IPv4, for another machine on the link.
    OtherHost,
    /// ICMP, whole or the first part of it.
    Icmp,
    /// IPv4, but for no service: a server's reply may be among these.
    NotOurs,
    /// TCP or UDP for a service, whole or the first part of it.
    Ours,
    /// IPv6 with more extension headers than are looked at, or one that leads elsewhere.
    Extended,
    /// IPv6 that ends within an extension header: whether that is one too many is not said.
    Unread,
}

impl Class {
    /// The classes that a reason may claim. A new reason has to be entered here.
    pub const fn of(reason: Reason) -> &'static [Self] {
        match reason {
            Reason::NotIp => &[Self::NotIp],
            Reason::Malformed => &[Self::Malformed, Self::Unread],
            Reason::Fragment => &[Self::FirstPart, Self::LaterPart],
            Reason::Part | Reason::StrayPart => &[Self::LaterPart],
            Reason::NotOurs => &[Self::NotOurs],
            Reason::Reply | Reason::ReplyRouted => &[Self::NotOurs, Self::FirstPart, Self::LaterPart, Self::Icmp],
            Reason::Icmp | Reason::Quoted | Reason::Echo => &[Self::Icmp],
            Reason::Extended => &[Self::Extended, Self::Unread],
            Reason::OtherHost => &[Self::OtherHost],
            // Of packets to a server, and of its replies.
            Reason::TooBig | Reason::Expired | Reason::Untold => {
                &[Self::Ours, Self::NotOurs, Self::FirstPart, Self::LaterPart, Self::Icmp]
            }
            Reason::NoNextHop | Reason::Fragmenting => &[Self::Ours, Self::LaterPart, Self::Icmp],
            Reason::NoServer
            | Reason::Direct
            | Reason::Plain
            | Reason::Record
            | Reason::Adopted
            | Reason::Legacy
            | Reason::Owner
            | Reason::New
            | Reason::NewUnrecorded
            | Reason::Repeated
            | Reason::Confirmed
            | Reason::BadTables => &[Self::Ours],
        }
    }
}

/// Where we mean to say something else than etherparse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Difference {
    /// A UDP length of 0: etherparse takes it for "to the end of the datagram", which is a rule of IPv6 jumbograms
    /// (RFC 2675 §4). Over IPv4 the length is at least 8 (RFC 768): malformed.
    UdpLengthZero,
    /// An authentication header (RFC 4302): etherparse looks through it, for us it is a protocol without a service.
    Authentication,
    /// A third tag, or one of type 0x9100: etherparse looks behind it; we do not, and pass the frame on as not IPv4.
    Tagged,
    /// A frame that ends in a tag: malformed for etherparse, and for us no IPv4 that we know of.
    CutTag,
    /// A protocol that we do not look into: etherparse checks the headers of others, which only matters to who reads them.
    OtherProtocol,
    /// The first part of a UDP datagram, shorter than the datagram's length, which etherparse holds against it.
    FirstOfUdp,
    /// A second part of TCP that begins within the first one's header (RFC 1858 §3.2.2), which a single part does not tell
    /// etherparse: malformed.
    TinyPart,
}

impl Difference {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::UdpLengthZero,
        Self::Authentication,
        Self::Tagged,
        Self::CutTag,
        Self::OtherProtocol,
        Self::FirstOfUdp,
        Self::TinyPart,
    ];
}

/// A frame's class, and which difference decided it.
pub fn class(frame: &[u8]) -> (Class, Option<Difference>) {
    let Ok(ethernet) = Ethernet2Slice::from_slice_without_fcs(frame) else { return (Class::Malformed, None) };
    let l3 = match datagram_at(frame) {
        Ok((l3, Family::Four)) => l3,
        Ok((l3, Family::Six)) => return six::class(&frame[l3..], ethernet.destination() == OWN_MAC),
        Err(difference) => return (Class::NotIp, difference),
    };
    let Some((header, payload)) = ipv4(&frame[l3..]) else { return (Class::Malformed, None) };
    let offset = header.fragments_offset().value();
    if header.protocol() == ip_number::TCP && offset == 1 {
        return (Class::Malformed, Some(Difference::TinyPart));
    }
    if ethernet.destination() != OWN_MAC {
        return (Class::OtherHost, None);
    }
    if offset > 0 {
        return (Class::LaterPart, None);
    }
    of_transport(&header, payload)
}

/// The class of a datagram, or of the first part of one, for this host.
fn of_transport(header: &Ipv4HeaderSlice<'_>, payload: &[u8]) -> (Class, Option<Difference>) {
    let first = header.more_fragments();
    let (port, difference) = match header.protocol() {
        ip_number::ICMP => return (Class::Icmp, Some(Difference::OtherProtocol)),
        ip_number::TCP => match TcpSlice::from_slice(payload) {
            Ok(tcp) => (Some(tcp.destination_port()), None),
            Err(_) => return (Class::Malformed, None),
        },
        ip_number::UDP => match UdpHeaderSlice::from_slice(payload) {
            Ok(udp) if udp.length() == 0 => return (Class::Malformed, Some(Difference::UdpLengthZero)),
            Ok(udp) if first && udp.length() >= 8 => (Some(udp.destination_port()), Some(Difference::FirstOfUdp)),
            _ => match UdpSlice::from_slice(payload) {
                Ok(udp) => (Some(udp.destination_port()), None),
                Err(_) => return (Class::Malformed, None),
            },
        },
        ip_number::AUTH => (None, Some(Difference::Authentication)),
        _ => (None, Some(Difference::OtherProtocol)),
    };
    let class = match port.is_some_and(|port| is_service(header.destination(), header.protocol().0, port)) {
        true => Class::Ours,
        false if first => Class::FirstPart,
        false => Class::NotOurs,
    };
    (class, difference)
}

fn is_service(address: [u8; 4], protocol: u8, port: u16) -> bool {
    address == VIP && SERVICES.contains(&(protocol, port))
}

/// Which IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Four,
    Six,
}

/// Where a datagram begins, behind at most two tags; or why there is none.
fn datagram_at(frame: &[u8]) -> Result<(usize, Family), Option<Difference>> {
    let ethernet = Ethernet2Slice::from_slice_without_fcs(frame).map_err(|_| None)?;
    let (mut at, mut kind) = (14, ethernet.ether_type());
    loop {
        match kind {
            EtherType::IPV4 => return Ok((at, Family::Four)),
            EtherType::IPV6 => return Ok((at, Family::Six)),
            EtherType::VLAN_DOUBLE_TAGGED_FRAME => return Err(Some(Difference::Tagged)),
            EtherType::VLAN_TAGGED_FRAME | EtherType::PROVIDER_BRIDGING if at == 22 => {
                return Err(Some(Difference::Tagged));
            }
            EtherType::VLAN_TAGGED_FRAME | EtherType::PROVIDER_BRIDGING => {
                let tag = SingleVlanSlice::from_slice(&frame[at..]).map_err(|_| Some(Difference::CutTag))?;
                (at, kind) = (at + 4, tag.ether_type());
            }
            _ => return Err(None),
        }
    }
}

/// A valid IPv4 header and what its total length says is behind it.
fn ipv4(packet: &[u8]) -> Option<(Ipv4HeaderSlice<'_>, &[u8])> {
    // Not `Ipv4Slice`, which looks through the authentication header.
    let header = Ipv4HeaderSlice::from_slice(packet).ok()?;
    let behind: Range<usize> = header.slice().len()..usize::from(header.total_len());
    Some((header, packet.get(behind)?))
}

/// What the packet path did with a frame.
#[derive(Clone, Copy, Debug)]
pub struct Deed<'a> {
    /// The verdict.
    pub verdict: Verdict,
    /// The reason that was counted.
    pub reason: Reason,
    /// The frame as it was left.
    pub frame: &'a [u8],
}

/// Holds what was done with `frame` against the relations above, and takes note of first parts; which difference was needed.
///
/// # Errors
/// The relation that does not hold.
pub fn judge(frame: &[u8], deed: Deed<'_>, tables: View<'_>, parts: &mut Parts) -> Result<Option<Difference>, String> {
    let (class, difference) = class(frame);
    if !Class::of(deed.reason).contains(&class) {
        return Err(format!("counted as {:?}, but to etherparse it is {class:?}", deed.reason));
    }
    let verdicts: &[Verdict] = match deed.reason.action() {
        Action::Pass | Action::Route => &[Verdict::Pass],
        Action::Drop => &[Verdict::Drop],
        Action::Transmit => &[Verdict::Tx, Verdict::Redirect],
        Action::Answer => &[Verdict::Tx],
    };
    if !verdicts.contains(&deed.verdict) {
        return Err(format!("{:?} for {:?}", deed.verdict, deed.reason));
    }
    let (l3, family) = datagram_at(frame).unwrap_or((14, Family::Four));
    let from_server = || match family {
        Family::Four => frame.get(l3 + 12..l3 + 16).is_some_and(is_server),
        Family::Six => frame.get(l3 + 8..l3 + 24).is_some_and(is_server6),
    };
    if class == Class::NotOurs && deed.reason != Reason::NotOurs && !from_server() {
        return Err(format!("{:?} for what is for no service and comes from no server", deed.reason));
    }
    let sent = sent::Sent { l3, family, before: frame, deed, tables };
    match deed.reason.action() {
        Action::Pass if deed.frame != frame => return Err("passed on, but changed".into()),
        Action::Pass | Action::Drop => {}
        Action::Answer => sent.answer()?,
        Action::Transmit if deed.reason == Reason::Reply => sent.reply(1)?,
        Action::Route if deed.reason == Reason::ReplyRouted => sent.reply(0)?,
        Action::Transmit => sent.to_server().map(|_| ())?,
        Action::Route => sent.to_be_fragmented().map(|_| ())?,
    }
    if class == Class::Icmp {
        match family {
            Family::Four => quote::hold(&frame[l3..], deed.reason, tables)?,
            Family::Six => six::hold(&frame[l3..], deed.reason)?,
        }
    }
    if matches!(class, Class::Ours | Class::FirstPart | Class::LaterPart | Class::Icmp) {
        parts.hold(class, &sent)?;
    }
    Ok(difference)
}

/// Whether the checksums of an IPv4 packet are valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksums {
    /// The header's.
    pub header: bool,
    /// TCP's or UDP's; UDP may go without. `None`: there is no such header, or not all of it.
    pub transport: Option<bool>,
}

impl Checksums {
    /// Of the packet that begins here; `None` if it is none.
    pub fn of(packet: &[u8]) -> Option<Self> {
        let (header, payload) = ipv4(packet)?;
        // The sums by hand: etherparse leaves the reserved flag out, and knows one of the two zeroes only.
        let pseudo = sum(&header.slice()[12..20]) + u32::from(header.protocol().0);
        let adds_up = |segment: &[u8]| fold(pseudo + segment.len() as u32 + sum(segment)) == 0xffff;
        let transport = match header.protocol() {
            _ if header.is_fragmenting_payload() => None,
            ip_number::TCP => TcpSlice::from_slice(payload).ok().map(|tcp| adds_up(tcp.slice())),
            ip_number::UDP => UdpSlice::from_slice(payload).ok().map(|udp| udp.checksum() == 0 || adds_up(udp.slice())),
            _ => None,
        };
        Some(Self { header: fold(sum(header.slice())) == 0xffff, transport })
    }

    /// Valid wherever the other is.
    fn as_good_as(self, other: Self) -> bool {
        (self.header || !other.header) && (self.transport == Some(true) || other.transport != Some(true))
    }
}
