//! What frames look like that leave changed: by layer 2, GRE and layer 3, and as ICMP errors.

use std::ops::Range;

use etherparse::{Ethernet2Slice, Ipv4HeaderSlice, ip_number};
use necp_ebpf::{
    abi::{GRE, LAYER_2, LAYER_3, REACHABLE, Server},
    host::View,
    verdict::Reason,
};

use super::{Checksums, Deed, ipv4};
use crate::{
    frames::{
        scene::{VIP, server_of},
        stack::{fold, sum},
    },
    kernel::{OTHER_MAC, OWN_MAC, Verdict},
};

/// Where the datagram stands.
const L3: usize = 14;
/// Places in an IPv4 header.
const TTL: usize = 8;
const CHECKSUM: Range<usize> = 10..12;
const SOURCE: Range<usize> = 12..16;
const DESTINATION: Range<usize> = 16..20;
/// An outer IPv4 header and GRE's.
const OUTER: usize = 24;

/// A packet that is sent to a server.
pub(super) fn to_server(frame: &[u8], deed: Deed<'_>, tables: View<'_>) -> Result<(), String> {
    let (to, from) = macs(deed.frame)?;
    let server = server_with(to, tables)?;
    let (port, source) = if deed.verdict == Verdict::Tx { (0, OWN_MAC) } else { (1, OTHER_MAC) };
    if (server.port, from) != (port, source) {
        return Err(format!("{:?} from {from:02x?} to a server at port {}", deed.verdict, server.port));
    }
    let (before, after) = (&frame[L3..], &deed.frame[L3..]);
    match server.forwarding {
        LAYER_2 if frame[12..] == deed.frame[12..] => changed(before, after, None, 0),
        LAYER_2 => Err("more than the MAC addresses is changed".into()),
        GRE => fits(after, &server).and_then(|()| encapsulated(before, after, &server)),
        LAYER_3 => {
            fits(after, &server).and_then(|()| changed(before, after, Some((DESTINATION, last(&server.address))), 1))
        }
        other => Err(format!("sent by forwarding type {other}, of which the judge knows nothing")),
    }
}

/// A packet that is ready for a server but for its length: the kernel counts its own hop of one by layer 3.
pub(super) fn to_be_fragmented(frame: &[u8], sent: &[u8], tables: View<'_>) -> Result<(), String> {
    let (to, from) = macs(sent)?;
    let server = server_with(from, tables)?;
    if to != OWN_MAC {
        return Err(format!("for the kernel, but addressed to {to:02x?}"));
    }
    let (before, after) = (&frame[L3..], &sent[L3..]);
    if fits(after, &server).is_ok() {
        return Err("needs no fragmenting".into());
    }
    if before[6] & 0x40 != 0 {
        return Err("must not be fragmented".into());
    }
    match server.forwarding {
        GRE => encapsulated(before, after, &server),
        LAYER_3 => changed(before, after, Some((DESTINATION, last(&server.address))), 0),
        other => Err(format!("fragmented by forwarding type {other}")),
    }
}

/// A server's reply.
pub(super) fn reply(frame: &[u8], sent: &[u8], hops: u8) -> Result<(), String> {
    if hops == 0 && frame[..L3] != sent[..L3] {
        return Err("for the kernel, but its Ethernet header is changed".into());
    }
    changed(&frame[L3..], &sent[L3..], Some((SOURCE, VIP)), hops)
}

/// An ICMP error about the frame.
pub(super) fn answer(frame: &[u8], deed: Deed<'_>) -> Result<(), String> {
    let before = Ipv4HeaderSlice::from_slice(&frame[L3..]).map_err(|error| error.to_string())?;
    let expired = deed.reason == Reason::Expired;
    if expired && before.ttl() > 1 {
        return Err(format!("expired with {} hops to go", before.ttl()));
    }
    let (to, from) = macs(deed.frame)?;
    if (to, from) != (macs(frame)?.1, OWN_MAC) {
        return Err(format!("an answer from {from:02x?} to {to:02x?}"));
    }
    let (header, message) = ipv4(&deed.frame[L3..]).ok_or("the answer is no IPv4 packet")?;
    let valid = fold(sum(header.slice())) == 0xffff && fold(sum(message)) == 0xffff;
    if !valid || header.protocol() != ip_number::ICMP || header.destination() != before.source() {
        return Err("the answer's checksums, protocol or destination are wrong".into());
    }
    if message.len() < 8 || message[..2] != if expired { [11, 0] } else { [3, 4] } {
        return Err(format!("{:?} is told by {message:02x?}", deed.reason));
    }
    let mtu = u16::from_be_bytes([message[6], message[7]]);
    if !expired && mtu >= before.total_len() {
        return Err(format!("{mtu} bytes are called too few for {}", before.total_len()));
    }
    let quoted = &message[8..];
    if quoted.len() < before.slice().len() + 8 || !frame[L3..].starts_with(quoted) {
        return Err("the answer does not quote the packet".into());
    }
    Ok(())
}

/// Changed in one address, if any, in hops to go, in the checksums that cover them, and in nothing else.
fn changed(before: &[u8], after: &[u8], address: Option<(Range<usize>, [u8; 4])>, hops: u8) -> Result<(), String> {
    if hops > 0 && before[TTL] <= hops {
        return Err(format!("sent on with {} hops to go", before[TTL]));
    }
    let mut wanted = before.to_vec();
    let mut sums = vec![CHECKSUM];
    wanted[TTL] -= hops;
    if let Some((place, new)) = address {
        wanted[place].copy_from_slice(&new);
        let transport = usize::from(before[0] & 0xf) * 4;
        let place = transport + if before[9] == ip_number::TCP.0 { 16 } else { 6 };
        sums.push(place..place + 2);
    }
    for place in sums {
        let (old, new) = (before.get(place.clone()), after.get(place.clone()));
        let (Some(old), Some(new)) = (old, new) else { return Err("too short for its checksums".into()) };
        // No checksum of UDP is 0 (RFC 768), and there may be none.
        if before[9] == ip_number::UDP.0 && place != CHECKSUM && (old == [0, 0]) != (new == [0, 0]) {
            return Err("UDP's checksum has come or gone".into());
        }
        wanted[place].copy_from_slice(new);
    }
    if wanted != after {
        return Err("changed in what should stay".into());
    }
    match Checksums::of(before).zip(Checksums::of(after)) {
        Some((before, after)) if after.as_good_as(before) => Ok(()),
        sums => Err(format!("checksums before and after: {sums:?}")),
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

fn server_with(mac: [u8; 6], tables: View<'_>) -> Result<Server, String> {
    let server = server_of(mac).and_then(|id| tables.server(id)).filter(|server| server.flags & REACHABLE != 0);
    server.ok_or_else(|| format!("{mac:02x?} is no server that can be reached"))
}

/// The IPv4 address in an IPv6-mapped one.
fn last(address: &[u8; 16]) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}
