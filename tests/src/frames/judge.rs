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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        frame::{Flow, flags},
        frames::scene::{self, Scene, server_mac},
        host_path::HostPath,
    };
    use necp_ebpf::{
        abi::{ACCEPTS, ALIVE, ExceptionMasks, FORWARDING_SHIFT, GRE, LAYER_2, LAYER_3, REACHABLE, Server},
        slot::SlotWord,
    };
    use rand::{SeedableRng as _, rngs::SmallRng};
    use std::net::SocketAddrV4;

    fn flow(port: u16) -> Flow {
        Flow {
            source_mac: [2, 0, 0, 0, 8, 8],
            destination_mac: OWN_MAC,
            source: SocketAddrV4::new([198, 51, 100, 1].into(), 40_000),
            destination: SocketAddrV4::new(VIP.into(), port),
            ttl: 64,
        }
    }

    /// The host build with server 2 behind interface `port`.
    fn tables(port: u8) -> HostPath {
        let mut host = HostPath::new(scene::SLOTS as usize, scene::FLOW_BUCKETS as usize);
        Scene::random(&mut SmallRng::seed_from_u64(1)).install(host.view());
        let flags = ALIVE | ACCEPTS | REACHABLE;
        let server = Server { mac: server_mac(2), flags, port, forwarding: 1, ..Server::default() };
        assert!(host.view().set_server(2, &server));
        host
    }

    /// As it would come out for server 2.
    fn sent(frame: &[u8]) -> Vec<u8> {
        [&server_mac(2)[..], &OWN_MAC, &frame[12..]].concat()
    }

    fn says(frame: &[u8], verdict: Verdict, reason: Reason, out: &[u8]) -> Result<Option<Difference>, String> {
        judge(frame, Deed { verdict, reason, frame: out }, tables(0).view(), &mut Parts::default())
    }

    #[test]
    fn what_is_right_is_not_complained_of() {
        let frame = flow(80).tcp(flags::ACK, 1, 1, b"hello");
        assert_eq!(says(&frame, Verdict::Tx, Reason::Plain, &sent(&frame)), Ok(None));
        assert_eq!(says(&frame, Verdict::Pass, Reason::NoServer, &frame), Ok(None));
        let other = flow(82).tcp(flags::ACK, 1, 1, b"hello");
        assert_eq!(says(&other, Verdict::Pass, Reason::NotOurs, &other), Ok(None));
        let mut udp = flow(53).udp(b"hello");
        udp[38..40].fill(0);
        assert_eq!(says(&udp, Verdict::Pass, Reason::Malformed, &udp), Ok(Some(Difference::UdpLengthZero)));
    }

    #[test]
    fn every_wrong_deed_is_noticed() {
        let frame = flow(80).tcp(flags::ACK, 1, 1, b"hello");
        let out = sent(&frame);
        let wrong = |verdict, reason, out: &[u8]| says(&frame, verdict, reason, out).unwrap_err();
        assert!(wrong(Verdict::Pass, Reason::Malformed, &frame).contains("to etherparse it is Ours"));
        assert!(wrong(Verdict::Pass, Reason::NotOurs, &frame).contains("to etherparse it is Ours"));
        assert!(wrong(Verdict::Drop, Reason::Plain, &frame).contains("Drop for Plain"));
        assert!(wrong(Verdict::Aborted, Reason::NoServer, &frame).contains("Aborted for NoServer"));
        assert!(wrong(Verdict::Pass, Reason::NoServer, &out).contains("passed on, but changed"));
        assert!(wrong(Verdict::Redirect, Reason::Plain, &out).contains("at port 0"));
        assert!(wrong(Verdict::Tx, Reason::Plain, &frame).contains("no server"));
        let mut changed = out.clone();
        changed[22] -= 1;
        assert!(wrong(Verdict::Tx, Reason::Plain, &changed).contains("more than the MAC addresses"));
        let short = &frame[..frame.len() - 1];
        let malformed = says(short, Verdict::Tx, Reason::Plain, &sent(short)).unwrap_err();
        assert!(malformed.contains("to etherparse it is Malformed"));
        let deed = Deed { verdict: Verdict::Tx, reason: Reason::Plain, frame: &out };
        assert!(judge(&frame, deed, tables(1).view(), &mut Parts::default()).unwrap_err().contains("at port 1"));
        for forwarding in [GRE, LAYER_3] {
            let mut host = tables(0);
            let server = host.view().server(2).unwrap();
            let flags = server.flags | forwarding << FORWARDING_SHIFT;
            host.view().set_server(2, &Server { flags, forwarding, ..server });
            assert!(judge(&frame, deed, host.view(), &mut Parts::default()).is_err(), "sent as to a layer-2 server");
        }
        let mut host = tables(0);
        let server = host.view().server(2).unwrap();
        host.view().set_server(2, &Server { flags: ALIVE, ..server });
        assert!(
            judge(&frame, deed, host.view(), &mut Parts::default())
                .unwrap_err()
                .contains("no server that can be reached")
        );
        assert!(wrong(Verdict::Tx, Reason::Expired, &out).contains("hops"));
        assert!(wrong(Verdict::Pass, Reason::ReplyRouted, &frame).contains("to etherparse it is Ours"));
    }

    /// The host build with all slots owned by server 2, which takes this forwarding type.
    fn owned(forwarding: u8) -> HostPath {
        let mut host = tables(0);
        let [a, b, c, d] = scene::server_address(2);
        let address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d];
        let server = host.view().server(2).unwrap();
        let flags = server.flags | forwarding << FORWARDING_SHIFT;
        host.view().set_server(2, &Server { flags, forwarding, address, ..server });
        host.view().set_exception_masks(0, &ExceptionMasks::default());
        host.view().slots().iter().for_each(|slot| slot.store(SlotWord::plain(2).0));
        host
    }

    /// A router's error about what was sent from one end to the other.
    fn error_about(flow: &Flow, router: [u8; 4]) -> Vec<u8> {
        let quoted = &flow.tcp(flags::ACK, 1, 1, b"even")[14..];
        crate::frame::needs_fragmentation(OWN_MAC, router.into(), 1280, quoted)
    }

    #[test]
    fn every_byte_that_should_have_stayed_is_noticed() {
        let to_server = Flow { destination: SocketAddrV4::new(scene::server_address(2).into(), 8080), ..flow(8080) };
        let mut first = flow(53).udp(b"hello, this is a part");
        (first[20], first[21]) = (0x20, 0);
        crate::frames::stack::mend_header(&mut first, 14);
        let frames = [
            (flow(8080).tcp(flags::SYN, 1, 0, b""), Reason::New),
            (flow(53).udp(b"hello"), Reason::New),
            (first, Reason::Record),
            (error_about(&flow(8080).reversed(), [198, 51, 100, 9]), Reason::Quoted),
            (to_server.reversed().tcp(flags::ACK, 1, 1, b"hello"), Reason::ReplyRouted),
            (error_about(&to_server, scene::server_address(2)), Reason::ReplyRouted),
            (error_about(&to_server, [198, 51, 100, 9]), Reason::ReplyRouted),
        ];
        for forwarding in [LAYER_2, LAYER_3] {
            let mut host = owned(forwarding);
            for (frame, reason) in
                frames.iter().filter(|(_, reason)| forwarding == LAYER_3 || *reason != Reason::ReplyRouted)
            {
                let mut frame = frame.clone();
                frame[..6].copy_from_slice(&OWN_MAC);
                let out = host.run(&frame);
                assert_eq!(out.reason, *reason, "forwarding type {forwarding}");
                let mut says = |bytes: &[u8]| {
                    let deed = Deed { verdict: out.verdict, reason: out.reason, frame: bytes };
                    judge(&frame, deed, host.view(), &mut Parts::default())
                };
                says(&out.frame).unwrap();
                for place in 0..out.frame.len() {
                    let mut wrong = out.frame.clone();
                    wrong[place] ^= 0x10;
                    assert!(says(&wrong).is_err(), "{reason:?}, forwarding type {forwarding}, byte {place}");
                }
            }
        }
    }

    #[test]
    fn parts_and_errors_that_go_elsewhere_are_noticed() {
        let mut host = owned(LAYER_2);
        let mut parts = Parts::default();
        let mut says = |frame: &[u8], verdict, reason, out: &[u8]| {
            judge(frame, Deed { verdict, reason, frame: out }, host.view(), &mut parts)
        };
        let mut first = flow(443).udp(&[7; 64]);
        (first[20], first[21]) = (0x20, 0);
        let mut last = first.clone();
        (last[20], last[21]) = (0, 9);
        // Nobody has seen the first.
        says(&last, Verdict::Drop, Reason::StrayPart, &last).unwrap();
        assert!(says(&last, Verdict::Pass, Reason::Fragment, &last).is_err());
        assert!(says(&last, Verdict::Tx, Reason::Part, &sent(&last)).is_err());
        says(&first, Verdict::Tx, Reason::Plain, &sent(&first)).unwrap();
        says(&last, Verdict::Tx, Reason::Part, &sent(&last)).unwrap();
        assert!(says(&last, Verdict::Drop, Reason::StrayPart, &last).is_err());
        assert!(says(&last, Verdict::Pass, Reason::Fragment, &last).is_err());
        // An error about a flow of a service whose slots all have servers.
        let error = error_about(&flow(80).reversed(), [198, 51, 100, 9]);
        says(&error, Verdict::Tx, Reason::Quoted, &sent(&error)).unwrap();
        assert!(says(&error, Verdict::Pass, Reason::Icmp, &error).unwrap_err().contains("nobody gets an error"));
        let other = error_about(&flow(82).reversed(), [198, 51, 100, 9]);
        says(&other, Verdict::Pass, Reason::Icmp, &other).unwrap();
        assert!(says(&other, Verdict::Tx, Reason::Quoted, &sent(&other)).is_err());
    }

    #[test]
    fn checksums_are_valid_or_not() {
        let mut frame = flow(80).tcp(flags::ACK, 1, 1, b"hello");
        let valid = Checksums { header: true, transport: Some(true) };
        assert_eq!(Checksums::of(&frame[14..]), Some(valid));
        frame[22] -= 1;
        let header = Checksums { header: false, ..valid };
        assert_eq!(Checksums::of(&frame[14..]), Some(header));
        assert!(valid.as_good_as(header) && !header.as_good_as(valid));
        *frame.last_mut().unwrap() ^= 1;
        let none = Checksums { header: false, transport: Some(false) };
        assert_eq!(Checksums::of(&frame[14..]), Some(none));
        assert!(!none.as_good_as(header) && header.as_good_as(none));
        assert_eq!(Checksums::of(&frame[14..40]), None);
    }
}
