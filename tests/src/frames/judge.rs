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
//! 7. An ICMP error that goes to a server quotes a packet from the VIP, or from whom an intercepted flow is to; where all owners
//!    are servers, all of those do.
//! 8. What a farm that intercepts is to take, by the scene's own word ([`Rules`]), is a service's packet, and nothing else ever
//!    goes to its servers. A reply of a layer-3 server's is one exactly if its flow is on record.
//! 9. A service's packet goes to a server of its farm that slots or flow table name, as the reason says, and no new flow where
//!    an exception forbids; it is cut through only for a cause.

mod parts;
mod placed;
mod quote;
mod sent;
mod service;
mod six;
#[cfg(test)]
mod tests;
mod tuple;

use std::ops::Range;

use etherparse::{
    EtherType, Ethernet2Slice, Ipv4HeaderSlice, SingleVlanSlice, TcpSlice, UdpHeaderSlice, UdpSlice, ip_number,
};
use necp_ebpf::{
    host::View,
    verdict::{Action, Reason},
};

pub use self::parts::Parts;
use self::{placed::Flows, tuple::Tuple};
use super::{
    scene::{FIRST_PROXY, crossing::Rules},
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
    /// TCP, UDP or SCTP to others, which a farm is to intercept, whole or the first part of it: a server's reply may be among these.
    Crossing,
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
            Reason::Reply | Reason::ReplyRouted => {
                &[Self::NotOurs, Self::Crossing, Self::FirstPart, Self::LaterPart, Self::Icmp]
            }
            Reason::Icmp | Reason::Quoted | Reason::Echo => &[Self::Icmp],
            Reason::Extended => &[Self::Extended, Self::Unread],
            Reason::OtherHost => &[Self::OtherHost],
            // Of packets to a server, and of its replies.
            Reason::TooBig | Reason::Expired | Reason::Untold => {
                &[Self::Ours, Self::NotOurs, Self::Crossing, Self::FirstPart, Self::LaterPart, Self::Icmp]
            }
            Reason::NoNextHop | Reason::Fragmenting => &[Self::Ours, Self::Crossing, Self::LaterPart, Self::Icmp],
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
            | Reason::BadTables => &[Self::Ours, Self::Crossing],
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

/// What became of a frame that crosses this host, and that a farm takes, or would but for one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Crossing {
    /// It went to one of the farm's servers.
    Taken,
    /// A later part went there.
    Part,
    /// An ICMP error about such a flow went there.
    Error,
    /// It was cut through.
    Direct,
    /// It was dropped, answered, or left without a server.
    Unsent,
    /// A layer-3 server's reply, which comes first.
    Reply,
    /// A VIP's service comes first.
    Vip,
    /// It is for this host.
    Own,
    /// It may be one of the farm's servers' own.
    Fetch,
}

impl Crossing {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 9] = [
        Self::Taken,
        Self::Part,
        Self::Error,
        Self::Direct,
        Self::Unsent,
        Self::Reply,
        Self::Vip,
        Self::Own,
        Self::Fetch,
    ];
}

/// What the judge made of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Judged {
    /// Which difference decided its class.
    pub difference: Option<Difference>,
    /// How it was one for interception.
    pub crossing: Option<Crossing>,
}

/// What a frame is.
struct Seen {
    class: Class,
    difference: Option<Difference>,
    /// Of what is for this host and neither ICMP nor a later part: who speaks to whom; and whether it is a SYN.
    tuple: Option<(Tuple, bool)>,
}

impl Seen {
    const fn of(class: Class, difference: Option<Difference>) -> Self {
        Self { class, difference, tuple: None }
    }
}

fn see(frame: &[u8], rules: &Rules) -> Seen {
    let Ok(ethernet) = Ethernet2Slice::from_slice_without_fcs(frame) else { return Seen::of(Class::Malformed, None) };
    let l3 = match datagram_at(frame) {
        Ok((l3, Family::Four)) => l3,
        Ok((l3, Family::Six)) => {
            return six::see(&frame[l3..], ethernet.destination() == OWN_MAC, rules);
        }
        Err(difference) => return Seen::of(Class::NotIp, difference),
    };
    let Some((header, payload)) = ipv4(&frame[l3..]) else { return Seen::of(Class::Malformed, None) };
    let offset = header.fragments_offset().value();
    if header.protocol() == ip_number::TCP && offset == 1 {
        return Seen::of(Class::Malformed, Some(Difference::TinyPart));
    }
    if ethernet.destination() != OWN_MAC {
        return Seen::of(Class::OtherHost, None);
    }
    if offset > 0 {
        return Seen::of(Class::LaterPart, None);
    }
    see_transport(&header, payload, rules)
}

/// A datagram, or the first part of one, for this host.
fn see_transport(header: &Ipv4HeaderSlice<'_>, payload: &[u8], rules: &Rules) -> Seen {
    let first = header.more_fragments();
    let malformed = |difference| Seen::of(Class::Malformed, difference);
    let mut syn = false;
    let (ports, difference) = match header.protocol() {
        ip_number::ICMP => return Seen::of(Class::Icmp, Some(Difference::OtherProtocol)),
        ip_number::TCP => match TcpSlice::from_slice(payload) {
            Ok(tcp) => {
                syn = opens(&tcp);
                ([tcp.source_port(), tcp.destination_port()], None)
            }
            Err(_) => return malformed(None),
        },
        ip_number::UDP => match UdpHeaderSlice::from_slice(payload) {
            Ok(udp) if udp.length() == 0 => return malformed(Some(Difference::UdpLengthZero)),
            Ok(udp) if first && udp.length() >= 8 => {
                ([udp.source_port(), udp.destination_port()], Some(Difference::FirstOfUdp))
            }
            _ => match UdpSlice::from_slice(payload) {
                Ok(udp) => ([udp.source_port(), udp.destination_port()], None),
                Err(_) => return malformed(None),
            },
        },
        ip_number::AUTH => ([0; 2], Some(Difference::Authentication)),
        _ => ([0; 2], Some(Difference::OtherProtocol)),
    };
    let tuple = Tuple::of(header, ports);
    Seen { class: class_of(&tuple, first, rules), difference, tuple: Some((tuple, syn)) }
}

fn opens(tcp: &TcpSlice<'_>) -> bool {
    tcp.syn() && !(tcp.ack() || tcp.rst() || tcp.fin())
}

/// The class of a datagram, or of the `first` part of one, that is for this host.
fn class_of(tuple: &Tuple, first: bool, rules: &Rules) -> Class {
    if service::of_vip(tuple).is_some() {
        Class::Ours
    } else if service::interceptor(tuple, rules).is_some() {
        Class::Crossing
    } else if first {
        Class::FirstPart
    } else {
        Class::NotOurs
    }
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

/// What the judge knows beside the frame: the tables as they are after it, and what those of them are to say that are found
/// by tries and hashes.
#[derive(Clone, Copy)]
pub struct Ground<'a> {
    /// The tables.
    pub tables: View<'a>,
    /// Prefixes and exceptions.
    pub rules: &'a Rules,
}

/// Holds what was done with `frame` against the relations above, and takes note of first parts.
///
/// # Errors
/// The relation that does not hold.
pub fn judge(frame: &[u8], deed: Deed<'_>, ground: Ground<'_>, parts: &mut Parts) -> Result<Judged, String> {
    let seen = see(frame, ground.rules);
    let class = seen.class;
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
    let sent = sent::Sent { l3, family, before: frame, deed, tables: ground.tables };
    let to = sent.hold()?;
    if let Some((tuple, opens)) = &seen.tuple {
        hold_service(class, tuple, *opens, deed.reason, to, ground)?;
    }
    if class == Class::Icmp {
        let message = match family {
            Family::Four => quote::Message::of(&frame[l3..]),
            Family::Six => six::message(&frame[l3..]),
        };
        message.ok_or("ICMP in no packet")?.hold(deed.reason, to, ground)?;
    }
    if matches!(class, Class::Ours | Class::Crossing | Class::FirstPart | Class::LaterPart | Class::Icmp) {
        parts.hold(class, &sent)?;
    }
    let crossing = crossing(&seen, deed.reason, to, ground.rules)?;
    Ok(Judged { difference: seen.difference, crossing })
}

/// Relations 8 and 9 of a packet that is no error: what is a reply, and where a service's packets go.
fn hold_service(
    class: Class,
    tuple: &Tuple,
    opens: bool,
    reason: Reason,
    to: Option<u32>,
    ground: Ground<'_>,
) -> Result<(), String> {
    if let Some(service) = service::of_vip(tuple) {
        return Flows::of(&service, ground).hold(tuple, opens, reason, to);
    }
    if service::is_reply(tuple, ground) {
        let right =
            matches!(reason, Reason::Reply | Reason::ReplyRouted | Reason::TooBig | Reason::Expired | Reason::Untold);
        return if right { Ok(()) } else { Err(format!("{reason:?} for a reply of a flow on record")) };
    }
    match service::interceptor(tuple, ground.rules) {
        _ if matches!(reason, Reason::Reply | Reason::ReplyRouted) => {
            Err(format!("{reason:?} for what belongs to no flow on record"))
        }
        Some(service) => Flows::of(&service, ground).hold(tuple, opens, reason, to),
        None if matches!(reason, Reason::NotOurs | Reason::Fragment) => Ok(()),
        None => Err(format!("{reason:?} for {class:?} to nobody's service")),
    }
}

/// How a frame was one for interception; relation 8: what is for no farm goes to none of its servers.
fn crossing(seen: &Seen, reason: Reason, to: Option<u32>, rules: &Rules) -> Result<Option<Crossing>, String> {
    let taken = to.is_some_and(|id| id >= FIRST_PROXY);
    match seen.class {
        Class::Crossing if taken => Ok(Some(Crossing::Taken)),
        Class::LaterPart if taken => Ok(Some(Crossing::Part)),
        Class::Icmp if taken => Ok(Some(Crossing::Error)),
        class if taken => Err(format!("captured, but it is {class:?}")),
        Class::Crossing => Ok(Some(match reason {
            Reason::Direct => Crossing::Direct,
            Reason::Reply | Reason::ReplyRouted => Crossing::Reply,
            _ => Crossing::Unsent,
        })),
        _ => Ok(seen.tuple.as_ref().and_then(|(tuple, _)| service::spared(tuple, rules))),
    }
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
