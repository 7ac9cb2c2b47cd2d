//! What frames look like that leave changed: by layer 2, GRE and layer 3, and as ICMP errors.

use std::{net::IpAddr, ops::Range};

use etherparse::{Ethernet2Slice, IpNumber, Ipv4HeaderSlice, ip_number};
use necp_ebpf::{
    abi::{GRE, LAYER_2, LAYER_3, REACHABLE, Server},
    host::View,
    verdict::{Action, Reason},
};

use super::{Checksums, Deed, Family, ipv4, six, tuple::Tuple};
use crate::{
    frames::{
        scene::{VIP, VIP6, server_of},
        stack::{fold, sum},
    },
    kernel::{OTHER_MAC, OWN_MAC, Verdict},
};

/// Places in an IPv4 header.
const TTL: usize = 8;
const CHECKSUM: Range<usize> = 10..12;
const SOURCE: Range<usize> = 12..16;
const DESTINATION: Range<usize> = 16..20;
/// An outer IPv4 header and GRE's.
const OUTER: usize = 24;
/// An outer IPv6 header and GRE's.
const OUTER6: u16 = 44;
/// What every link takes (RFC 8200 §5), and so must a tunnel (RFC 2473 §7.1).
const LEAST6: u16 = 1280;

/// A frame that left, as it was and as it is.
#[derive(Clone, Copy)]
pub(super) struct Sent<'a> {
    /// Where the datagram stands, in both.
    pub(super) l3: usize,
    pub(super) family: Family,
    pub(super) before: &'a [u8],
    pub(super) deed: Deed<'a>,
    pub(super) tables: View<'a>,
}

impl Sent<'_> {
    /// Whatever was done with it; which server it went to, or is on its way to by the kernel.
    pub(super) fn hold(self) -> Result<Option<u32>, String> {
        match self.deed.reason.action() {
            Action::Pass if self.deed.frame != self.before => Err("passed on, but changed".into()),
            Action::Pass | Action::Drop => Ok(None),
            Action::Answer => self.answer().map(|()| None),
            Action::Transmit if self.deed.reason == Reason::Reply => self.reply(1).map(|()| None),
            Action::Route if self.deed.reason == Reason::ReplyRouted => self.reply(0).map(|()| None),
            Action::Transmit => self.to_server().map(Some),
            Action::Route => self.to_be_fragmented().map(Some),
        }
    }

    /// A packet that is sent to a server: which.
    pub(super) fn to_server(self) -> Result<u32, String> {
        let (to, from) = macs(self.deed.frame)?;
        let (id, server) = server_with(to, self.tables)?;
        let (port, source) = if self.deed.verdict == Verdict::Tx { (0, OWN_MAC) } else { (1, OTHER_MAC) };
        if (server.port, from) != (port, source) {
            return Err(format!("{:?} from {from:02x?} to a server at port {}", self.deed.verdict, server.port));
        }
        let (before, after) = self.datagrams()?;
        match server.forwarding {
            LAYER_2 if self.before[12..] == self.deed.frame[12..] => {}
            LAYER_2 => return Err("more than the MAC addresses is changed".into()),
            GRE if self.family == Family::Six => {
                fits6(after, &server, LEAST6 + OUTER6).and_then(|()| six::encapsulated(before, after, &server))?;
            }
            LAYER_3 if self.family == Family::Six => {
                let address = (six::DESTINATION, None, &server.address[..]);
                fits6(after, &server, LEAST6).and_then(|()| six::translated(before, after, address, 1))?;
            }
            GRE => fits(after, &server).and_then(|()| encapsulated(before, after, &server))?,
            LAYER_3 => fits(after, &server).and_then(|()| self.translated(&server, 1))?,
            other => return Err(format!("sent by forwarding type {other}, of which the judge knows nothing")),
        }
        Ok(id)
    }

    /// A packet that is ready for a server but for its length: the kernel counts its own hop of one by layer 3.
    pub(super) fn to_be_fragmented(self) -> Result<u32, String> {
        let (to, from) = macs(self.deed.frame)?;
        let (id, server) = server_with(from, self.tables)?;
        if to != OWN_MAC {
            return Err(format!("for the kernel, but addressed to {to:02x?}"));
        }
        let (before, after) = self.datagrams()?;
        if fits(after, &server).is_ok() {
            return Err("needs no fragmenting".into());
        }
        if before[6] & 0x40 != 0 {
            return Err("must not be fragmented".into());
        }
        match server.forwarding {
            GRE => encapsulated(before, after, &server)?,
            LAYER_3 => self.translated(&server, 0)?,
            other => return Err(format!("fragmented by forwarding type {other}")),
        }
        Ok(id)
    }

    /// A server's reply, or an error about one, whose sender may be another.
    fn reply(&self, hops: u8) -> Result<(), String> {
        if hops == 0 && self.before[..self.l3] != self.deed.frame[..self.l3] {
            return Err("for the kernel, but its Ethernet header is changed".into());
        }
        let (before, after) = self.datagrams()?;
        if self.family == Family::Six {
            let server = quoted_server(before);
            return six::translated(before, after, (six::SOURCE, server, &VIP6), hops);
        }
        let Some(quote) = self.quote() else { return changed(before, after, Some((SOURCE, VIP)), hops) };
        let own = matches!(quote.destination, IpAddr::V4(address) if address.octets() == before[SOURCE]);
        let server = own.then_some((SOURCE, VIP));
        error_changed(before, after, server, (DESTINATION, VIP), hops)
    }

    /// To a layer-3 server.
    fn translated(&self, server: &Server, hops: u8) -> Result<(), String> {
        let ((before, after), address) = (self.datagrams()?, last(&server.address));
        let outer = Some((DESTINATION, address));
        match self.quote() {
            Some(_) => error_changed(before, after, outer, (SOURCE, address), hops),
            None => changed(before, after, outer, hops),
        }
    }

    /// What it quotes, if it is steered by that.
    fn quote(&self) -> Option<Tuple> {
        let datagram = self.before.get(self.l3..)?;
        let whole = datagram.get(6..8).is_some_and(|field| field[0] & 0x3f == 0 && field[1] == 0);
        Tuple::quoted_by(datagram).filter(|_| whole && datagram[9] == ip_number::ICMP.0)
    }

    /// An ICMP error about the frame.
    fn answer(&self) -> Result<(), String> {
        let (datagram, answer) = self.datagrams()?;
        if self.family == Family::Six {
            let (to, from) = macs(self.deed.frame)?;
            if (to, from) != (macs(self.before)?.1, OWN_MAC) {
                return Err(format!("an answer from {from:02x?} to {to:02x?}"));
            }
            return six::answer(datagram, answer, self.deed.reason == Reason::Expired);
        }
        let before = Ipv4HeaderSlice::from_slice(datagram).map_err(|error| error.to_string())?;
        let expired = self.deed.reason == Reason::Expired;
        if expired && before.ttl() > 1 {
            return Err(format!("expired with {} hops to go", before.ttl()));
        }
        let (to, from) = macs(self.deed.frame)?;
        if (to, from) != (macs(self.before)?.1, OWN_MAC) {
            return Err(format!("an answer from {from:02x?} to {to:02x?}"));
        }
        let (header, message) = ipv4(answer).ok_or("the answer is no IPv4 packet")?;
        let valid = fold(sum(header.slice())) == 0xffff && fold(sum(message)) == 0xffff;
        if !valid || header.protocol() != ip_number::ICMP || header.destination() != before.source() {
            return Err("the answer's checksums, protocol or destination are wrong".into());
        }
        if message.len() < 8 || message[..2] != if expired { [11, 0] } else { [3, 4] } {
            return Err(format!("{:?} is told by {message:02x?}", self.deed.reason));
        }
        let mtu = u16::from_be_bytes([message[6], message[7]]);
        if !expired && mtu >= before.total_len() {
            return Err(format!("{mtu} bytes are called too few for {}", before.total_len()));
        }
        let quoted = &message[8..];
        if quoted.len() < before.slice().len() + 8 || !datagram.starts_with(quoted) {
            return Err("the answer does not quote the packet".into());
        }
        Ok(())
    }

    /// What follows the tags, which are the same.
    fn datagrams(&self) -> Result<(&[u8], &[u8]), String> {
        if self.before.get(12..self.l3) != self.deed.frame.get(12..self.l3) {
            return Err("tags or EtherType are changed".into());
        }
        Ok((&self.before[self.l3..], &self.deed.frame[self.l3..]))
    }
}

/// Where an address stands in an IPv4 header, and what it is to be.
type Address = (Range<usize>, [u8; 4]);

/// Changed in one address, if any, in hops to go, in the checksums that cover them, and in nothing else.
fn changed(before: &[u8], after: &[u8], address: Option<Address>, hops: u8) -> Result<(), String> {
    let mut wanted = older(before, hops)?;
    let mut sums = vec![CHECKSUM];
    // Only a first part has a transport header.
    let first = before[6] & 0x1f == 0 && before[7] == 0;
    let place = sum_in_transport(before[9]).filter(|_| first && address.is_some());
    let transport = header_len(before)..usize::from(u16::from_be_bytes([before[2], before[3]]));
    if let Some((place, new)) = address {
        wanted[place].copy_from_slice(&new);
    }
    if let Some(place) = place {
        let place = transport.start + place..transport.start + place + 2;
        unsummed_stays(before, after, before[9], &place)?;
        sums.push(place);
    }
    take(&mut wanted, after, &sums)?;
    if wanted != after {
        return Err("changed in what should stay".into());
    }
    let with_addresses =
        |bytes: &[u8]| fold(sum(&bytes[SOURCE.start..DESTINATION.end]) + sum(&bytes[transport.clone()]));
    let unsummed = sums.get(1).is_some_and(|place| before[9] == ip_number::UDP.0 && before[place.clone()] == [0, 0]);
    if place.is_some() && !unsummed && with_addresses(before) != with_addresses(after) {
        return Err("the transport's checksum does not follow the address".into());
    }
    follows_header(before, after)?;
    match Checksums::of(before).zip(Checksums::of(after)) {
        Some((before, after)) if after.as_good_as(before) => Ok(()),
        sums => Err(format!("checksums before and after: {sums:?}")),
    }
}

/// An ICMP error, changed in one of its own addresses, if at all, in one of what it quotes, in hops to go, in the checksums
/// that cover them, and in nothing else.
fn error_changed(
    before: &[u8],
    after: &[u8],
    outer: Option<Address>,
    (inner, quoted): Address,
    hops: u8,
) -> Result<(), String> {
    let mut wanted = older(before, hops)?;
    let total = usize::from(u16::from_be_bytes([before[2], before[3]]));
    let message = header_len(before);
    let quote = message + 8;
    if let Some((place, new)) = outer {
        wanted[place].copy_from_slice(&new);
    }
    wanted[quote + inner.start..quote + inner.end].copy_from_slice(&quoted);
    let mut sums = vec![CHECKSUM, message + 2..message + 4, quote + CHECKSUM.start..quote + CHECKSUM.end];
    let protocol = before[quote + 9];
    let transport = quote + header_len(&before[quote..]);
    let place = sum_in_transport(protocol).map(|place| transport + place..transport + place + 2);
    if let Some(place) = place.filter(|place| place.end <= total) {
        unsummed_stays(before, after, protocol, &place).or_else(|wrong| {
            // It is only quoted: nobody will take it for a datagram without a checksum.
            if before[place.clone()] == [0, 0] { Err(wrong) } else { Ok(()) }
        })?;
        sums.push(place);
    }
    take(&mut wanted, after, &sums)?;
    if wanted != after {
        return Err("an error changed in what should stay".into());
    }
    follows_header(before, after)?;
    follows_header(&before[quote..], &after[quote..]).map_err(|wrong| format!("quoted: {wrong}"))?;
    if fold(sum(&before[message..total])) != fold(sum(&after[message..total])) {
        return Err("the error's checksum does not follow what it quotes".into());
    }
    let quoted = |bytes: &[u8]| {
        let sums = sums.get(3).map_or(0, |place| sum(&bytes[place.clone()]));
        fold(sums + sum(&bytes[quote + SOURCE.start..quote + DESTINATION.end]))
    };
    let unsummed = sums.get(3).is_none_or(|place| protocol == ip_number::UDP.0 && before[place.clone()] == [0, 0]);
    if !unsummed && quoted(before) != quoted(after) {
        return Err("the quoted transport's checksum does not follow the address".into());
    }
    Ok(())
}

/// The same with fewer hops to go.
fn older(before: &[u8], hops: u8) -> Result<Vec<u8>, String> {
    if hops > 0 && before[TTL] <= hops {
        return Err(format!("sent on with {} hops to go", before[TTL]));
    }
    let mut wanted = before.to_vec();
    wanted[TTL] -= hops;
    Ok(wanted)
}

/// Copies checksums, whose values are looked at apart.
fn take(wanted: &mut [u8], after: &[u8], sums: &[Range<usize>]) -> Result<(), String> {
    for place in sums {
        let (old, new) = (wanted.get_mut(place.clone()), after.get(place.clone()));
        let (Some(old), Some(new)) = (old, new) else { return Err("too short for its checksums".into()) };
        old.copy_from_slice(new);
    }
    Ok(())
}

/// No checksum of UDP is 0 (RFC 768), and there may be none.
fn unsummed_stays(before: &[u8], after: &[u8], protocol: u8, place: &Range<usize>) -> Result<(), String> {
    let is_zero = |bytes: &[u8]| bytes.get(place.clone()) == Some(&[0, 0][..]);
    if protocol == ip_number::UDP.0 && is_zero(before) != is_zero(after) {
        return Err("UDP's checksum has come or gone".into());
    }
    Ok(())
}

/// The header's sum is what it was, right or wrong (RFC 1624 §2: the checksum follows the change).
fn follows_header(before: &[u8], after: &[u8]) -> Result<(), String> {
    let whole = |bytes: &[u8]| bytes.get(..header_len(bytes)).map(|header| fold(sum(header)));
    if whole(before).is_none() || whole(before) != whole(after) {
        return Err("the header's checksum does not follow the change".into());
    }
    Ok(())
}

fn header_len(datagram: &[u8]) -> usize {
    usize::from(datagram[0] & 0xf) * 4
}

fn sum_in_transport(protocol: u8) -> Option<usize> {
    match IpNumber::from(protocol) {
        ip_number::TCP => Some(16),
        ip_number::UDP => Some(6),
        _ => None,
    }
}

/// The packet, one hop older, behind an outer header and GRE's.
fn encapsulated(before: &[u8], after: &[u8], server: &Server) -> Result<(), String> {
    let outer = Ipv4HeaderSlice::from_slice(after).map_err(|error| error.to_string())?;
    let inner = Ipv4HeaderSlice::from_slice(before).map_err(|error| error.to_string())?;
    let wanted = (inner.total_len() as usize + OUTER, ip_number::GRE, last(&server.source), last(&server.address));
    let is = (outer.total_len() as usize, outer.protocol(), outer.source(), outer.destination());
    if is != wanted || outer.slice().len() != 20 || outer.is_fragmenting_payload() || outer.ttl() < 2 {
        return Err(format!("outer header {:02x?}", outer.slice()));
    }
    if outer.dont_fragment() != inner.dont_fragment() || fold(sum(outer.slice())) != 0xffff {
        return Err(format!("outer header's flags or checksum: {:02x?}", outer.slice()));
    }
    if after.get(20..OUTER) != Some(&[0, 0, 8, 0]) {
        return Err("no GRE header of IPv4 without options".into());
    }
    changed(before, &after[OUTER..], None, 1)
}

/// The server to which what an error quotes was sent, or the packet's own sender.
fn quoted_server(before: &[u8]) -> Option<&[u8]> {
    six::quoted_destination(before).or_else(|| before.get(six::SOURCE))
}

/// What has `least` bytes gets through always.
fn fits6(packet: &[u8], server: &Server, least: u16) -> Result<(), String> {
    let total = u16::from_be_bytes([packet[4], packet[5]]).saturating_add(40);
    let fits = server.mtu == 0 || total <= server.mtu.max(least);
    if fits { Ok(()) } else { Err(format!("{total} bytes to a server that gets {}", server.mtu)) }
}

fn fits(packet: &[u8], server: &Server) -> Result<(), String> {
    let total = u16::from_be_bytes([packet[2], packet[3]]);
    let fits = server.mtu == 0 || total <= server.mtu;
    if fits { Ok(()) } else { Err(format!("{total} bytes to a server that gets {}", server.mtu)) }
}

/// Where it goes, and where it comes from.
fn macs(frame: &[u8]) -> Result<([u8; 6], [u8; 6]), String> {
    let ethernet = Ethernet2Slice::from_slice_without_fcs(frame).map_err(|error| error.to_string())?;
    Ok((ethernet.destination(), ethernet.source()))
}

fn server_with(mac: [u8; 6], tables: View<'_>) -> Result<(u32, Server), String> {
    let server = server_of(mac).and_then(|id| Some((id, tables.server(id)?)));
    let server = server.filter(|(_, server)| server.flags & REACHABLE != 0);
    server.ok_or_else(|| format!("{mac:02x?} is no server that can be reached"))
}

/// The IPv4 address in an IPv6-mapped one.
fn last(address: &[u8; 16]) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}
