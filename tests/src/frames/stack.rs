//! Well-formed frames: Ethernet, up to three tags, IPv4 with options, IPv6 with extension headers, tunnels, TCP, UDP,
//! ICMP, fragments; lengths and checksums right.

use necp_ebpf::{abi::FIRST_SERVER, packet::protocol};
use rand::{RngExt as _, rngs::SmallRng};

use super::{
    once_in, pick,
    scene::{
        self, FIRST_PROXY, SERVERS, VIP,
        crossing::{INTERCEPTED, MAY_JOIN, ORIGINS, OWN, six_of},
    },
};
use crate::kernel::{OTHER_MAC, OWN_MAC};

/// A client's MAC address.
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 8, 8];
const GRE: u8 = 47;
const AUTHENTICATION: u8 = 51;
/// Of the flow that both ends have much to say in, the client's port, which is intercepted, and the service, whose every flow is
/// on record.
const BUSY_PORT: u16 = INTERCEPTED[4].2;
const BUSY: (u8, u16) = scene::SERVICES[2];

/// A frame, and where its outermost IP header and what follows it begin.
#[derive(Clone, Debug, Default)]
pub struct Stack {
    /// The frame.
    pub bytes: Vec<u8>,
    /// Offset of the IP header, if it has one.
    pub ip: Option<usize>,
    /// Offset of the header behind it.
    pub transport: Option<usize>,
    /// It comes from a server, this one, or from where a client's packets cross this host to.
    reply: bool,
    server: [u8; 4],
    /// It crosses this host: the client, and the other end.
    crossing: Option<[[u8; 4]; 2]>,
    /// It comes in parts, of datagrams that are few.
    in_parts: bool,
    /// Of a flow that both ends have much to say in: what servers reply is for flows on record only.
    busy: bool,
    /// What is being written is quoted by an ICMP error: the other direction.
    quoting: bool,
    /// UDP goes without a checksum.
    unsummed: bool,
}

impl Stack {
    /// Becomes another frame, most of the time one that a service gets.
    pub fn refill(&mut self, random: &mut SmallRng) {
        self.bytes.clear();
        (self.ip, self.transport) = (None, None);
        self.busy = once_in(random, 4);
        self.reply = once_in(random, if self.busy { 2 } else { 8 });
        // In many scenes one server has everything.
        let server = if self.busy { FIRST_SERVER } else { random.random_range(FIRST_SERVER..SERVERS) };
        self.server = scene::server_address(server);
        (self.quoting, self.crossing, self.in_parts) = (false, None, false);
        self.unsummed = once_in(random, 4);
        let to = match random.random_range(0..32) {
            0 => OTHER_MAC,
            1 => [0xff; 6],
            2 => random.random(),
            _ => OWN_MAC,
        };
        self.bytes.extend([to, CLIENT_MAC].concat());
        for _ in 0..pick(random, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3]) {
            self.word(pick(random, &[0x8100, 0x8100, 0x88a8, 0x9100]));
            self.word(random.random());
        }
        match random.random_range(0..24) {
            0 => self.arp(random),
            1 => {
                self.word(pick(random, &[0, 46, 0x0600, 0x8847, 0x8863, 0x8864, 0x88cc, 0xffff]));
                self.noise(random, 64);
            }
            2..10 => {
                self.word(0x86dd);
                self.ip = Some(self.bytes.len());
                self.cross_or_not(random);
                self.ipv6(random, 0);
            }
            _ => {
                self.word(0x0800);
                self.ip = Some(self.bytes.len());
                self.cross_or_not(random);
                self.ipv4(random, 0);
            }
        }
    }

    /// Half of all cross this host.
    fn cross_or_not(&mut self, random: &mut SmallRng) {
        if once_in(random, 2) {
            (self.busy, self.reply) = (false, once_in(random, 8));
            self.in_parts = once_in(random, 6);
            self.crossing = Some(if self.in_parts { [client(1), ORIGINS[0]] } else { crossing_ends(random) });
        }
    }

    fn ipv4(&mut self, random: &mut SmallRng, depth: u32) {
        let start = self.bytes.len();
        let words = if once_in(random, 6) { random.random_range(0..=10u8) } else { 0 };
        let (mut protocol, port) = self.destination(random);
        if depth == 0 && once_in(random, 10) {
            protocol = protocol::ICMP;
        }
        let fragment = match random.random_range(0..24) {
            0..9 if self.in_parts => 0x2000,
            9..20 if self.in_parts => random.random_range(1..4u16),
            0 | 1 => 0x2000,
            2 => 0x2000 | random.random_range(0..0x2000u16),
            3 => random.random_range(0..0x2000u16),
            4 => random.random(),
            5 | 6 => 0,
            _ => 0x4000,
        };
        self.bytes.extend([0x45 + words, pick(random, &[0, 0, 3, 0xb8]), 0, 0]);
        // Parts of the same datagrams meet.
        let id = if fragment & 0x3fff == 0 { random.random() } else { random.random_range(0..4) };
        let id = if self.in_parts { id % 2 } else { id };
        self.word(id);
        self.word(fragment);
        self.bytes.extend([pick(random, &[64, 64, 255, 2, 1, 0]), protocol, 0, 0]);
        let [source, to] = self.ends(random);
        self.bytes.extend([source, to].concat());
        for _ in 0..words {
            self.bytes.extend(pick(random, &[[1; 4], [0; 4], [0x83, 4, 4, 0], [0x94, 4, 0, 0], [7, 4, 4, 1]]));
        }
        let transport = self.bytes.len();
        if depth == 0 {
            self.transport = Some(transport);
        }
        self.behind(random, protocol, port, depth);
        let total = (self.bytes.len() - start) as u16;
        self.bytes[start + 2..start + 4].copy_from_slice(&total.to_be_bytes());
        let pseudo = sum(&[source, to].concat()) + u32::from(protocol);
        self.finish_transport(transport, protocol, pseudo);
        let header = !fold(sum(&self.bytes[start..transport]));
        self.bytes[start + 10..start + 12].copy_from_slice(&header.to_be_bytes());
    }

    /// The protocol and port of a service most of the time.
    fn destination(&self, random: &mut SmallRng) -> (u8, u16) {
        let (protocol, port) = match self.crossing {
            Some(_) => pick(random, &INTERCEPTED.map(|(_, protocol, port)| (protocol, port))),
            None if self.busy => BUSY,
            None => pick(random, &scene::SERVICES),
        };
        match random.random_range(0..16) {
            0 => (protocol, random.random()),
            1 => (pick(random, &[protocol::ICMP, protocol::ICMP, GRE, 4, 41, AUTHENTICATION, 132, 2]), port),
            2 => (random.random(), port),
            _ => (protocol, port),
        }
    }

    /// From where, and whereto.
    fn ends(&self, random: &mut SmallRng) -> [[u8; 4]; 2] {
        let [client, other] = match self.crossing {
            Some(_) if once_in(random, 12) => crossing_ends(random),
            Some(ends) => ends,
            None if self.busy => [client(1), if self.reply { self.server } else { VIP }],
            None if self.reply => [client(random.random_range(0..4)), self.server],
            None => {
                let strange = pick(random, &[[192, 0, 2, 11], [255; 4], [0; 4]]);
                [client(random.random_range(0..4)), if once_in(random, 12) { strange } else { VIP }]
            }
        };
        if self.reply == self.quoting { [client, other] } else { [other, client] }
    }

    fn ipv6(&mut self, random: &mut SmallRng, depth: u32) {
        let start = self.bytes.len();
        let (protocol, port) = self.destination(random);
        let icmp = protocol == protocol::ICMP || depth == 0 && once_in(random, 10);
        let protocol = if icmp { 58 } else { protocol };
        let parts = pick(random, &[1, 1, 8, 0x10, 9]);
        let chain: Vec<u8> = if self.in_parts && depth == 0 {
            vec![44]
        } else {
            (0..pick(random, &[0, 0, 0, 0, 1, 2, 3])).map(|_| pick(random, &[0, 43, 44, 60, AUTHENTICATION])).collect()
        };
        let next = |at: usize| chain.get(at).copied().unwrap_or(protocol);
        self.bytes.extend([0x60, 0, 0, 0, 0, 0, next(0), pick(random, &[64, 255, 1])]);
        self.bytes.extend(self.ends(random).map(six_of).concat());
        let addresses = sum(&self.bytes[start + 8..]);
        for (at, kind) in chain.iter().enumerate() {
            let length = if *kind == AUTHENTICATION { 2 } else { 0 };
            let offset =
                if *kind == 44 { if self.in_parts { parts } else { pick(random, &[0, 1, 8, 0xb9]) } } else { 0 };
            // Parts of the same datagrams meet.
            let id = if *kind == 44 { random.random_range(0..if self.in_parts { 2 } else { 4 }) } else { 0 };
            self.bytes.extend([next(at + 1), length, 0, offset, 0, 0, 0, id]);
            self.bytes.resize(self.bytes.len() + usize::from(length) * 4, 0);
        }
        let transport = self.bytes.len();
        if depth == 0 {
            self.transport = Some(transport);
        }
        self.behind(random, protocol, port, depth);
        let length = (self.bytes.len() - start - 40) as u16;
        self.bytes[start + 4..start + 6].copy_from_slice(&length.to_be_bytes());
        self.finish_transport(transport, protocol, addresses + u32::from(protocol));
    }

    /// What an IP header announced.
    fn behind(&mut self, random: &mut SmallRng, protocol: u8, port: u16, depth: u32) {
        match protocol {
            protocol::TCP => self.tcp(random, port),
            protocol::UDP => self.udp(random, port),
            protocol::ICMP => self.icmp(random, depth),
            58 => self.icmp6(random, depth),
            GRE if depth < 2 => self.gre(random, depth),
            4 if depth < 2 => self.ipv4(random, depth + 1),
            41 if depth < 2 => self.ipv6(random, depth + 1),
            AUTHENTICATION => {
                self.bytes.extend([protocol::TCP, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]);
                self.bytes.resize(self.bytes.len() + 12, 0x5a);
                self.tcp(random, port);
            }
            _ => {
                self.word(random.random());
                self.word(port);
                self.noise(random, 40);
            }
        }
    }

    fn tcp(&mut self, random: &mut SmallRng, port: u16) {
        let words = pick(random, &[0, 0, 0, 3, 5, 10, 1]);
        let source = self.client_port(random);
        self.ports(source, port);
        // Most SYNs of a flow are the same one again, so that its other packets can confirm it.
        let isn = [1000, 5000, u32::MAX][usize::from(source % 3)];
        let flags = match random.random_range(0..10) {
            0..3 => 0x02,
            3..5 => 0x10,
            5 => 0x18,
            6 => 0x11,
            7 => 0x04,
            8 => 0x12,
            _ => random.random(),
        };
        let ahead = if flags == 0x02 { 0 } else { random.random_range(0..4) };
        let sequence = if once_in(random, 8) { random.random() } else { isn.wrapping_add(ahead) };
        self.bytes.extend(sequence.to_be_bytes());
        self.bytes.extend([0, 0, 0, 9, (5 + words) << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
        self.bytes.resize(self.bytes.len() + usize::from(words) * 4, 1);
        self.payload(random);
    }

    fn udp(&mut self, random: &mut SmallRng, port: u16) {
        let start = self.bytes.len();
        let source = self.client_port(random);
        self.ports(source, port);
        self.bytes.extend([0; 4]);
        self.payload(random);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start + 4..start + 6].copy_from_slice(&length.to_be_bytes());
    }

    /// Echo, or an error that quotes a packet or its first eight bytes.
    fn icmp(&mut self, random: &mut SmallRng, depth: u32) {
        let start = self.bytes.len();
        let (kind, code) = pick(
            random,
            &[(8, 0), (0, 0), (3, 1), (3, 3), (3, 4), (3, 4), (11, 0), (11, 0), (5, 1), (12, 0), (135, 0)],
        );
        self.bytes.extend([kind, code, 0, 0, 0, 1]);
        self.word(pick(random, &[0, 1280, 1500]));
        if !matches!(kind, 3 | 11 | 5 | 12) || depth > 1 {
            return self.payload(random);
        }
        self.quoting = !self.quoting;
        self.ipv4(random, depth + 1);
        self.quoting = !self.quoting;
        if once_in(random, 2) {
            self.bytes.truncate(start + 8 + 28);
        }
    }

    /// The same of IPv6.
    fn icmp6(&mut self, random: &mut SmallRng, depth: u32) {
        let start = self.bytes.len();
        let (kind, code) =
            pick(random, &[(128, 0), (129, 0), (1, 4), (2, 0), (2, 0), (3, 0), (4, 1), (135, 0), (100, 0)]);
        self.bytes.extend([kind, code, 0, 0, 0, 0]);
        self.word(pick(random, &[0, 1280, 1500]));
        if kind > 4 || depth > 1 {
            return self.payload(random);
        }
        self.quoting = !self.quoting;
        self.ipv6(random, depth + 1);
        self.quoting = !self.quoting;
        if once_in(random, 2) {
            self.bytes.truncate(start + 8 + 48);
        }
    }

    fn gre(&mut self, random: &mut SmallRng, depth: u32) {
        let flags = pick(random, &[0, 0, 0, 0x8000, 0x2000, 0x1000, 0xb000, 0x0001]);
        self.word(flags);
        let inner = pick(random, &[0x0800, 0x0800, 0x86dd, 0x6558]);
        self.word(inner);
        let fields = [0x8000, 0x2000, 0x1000].into_iter().filter(|bit| flags & bit != 0).count();
        self.bytes.resize(self.bytes.len() + 4 * fields, 0);
        match inner {
            0x0800 => self.ipv4(random, depth + 1),
            0x86dd => self.ipv6(random, depth + 1),
            _ => self.noise(random, 40),
        }
    }

    fn arp(&mut self, random: &mut SmallRng) {
        self.word(0x0806);
        self.bytes.extend([0, 1, 8, 0, 6, 4, 0, pick(random, &[1, 2])]);
        self.bytes.extend([&CLIENT_MAC[..], &[198, 51, 100, 1], &[0; 6], &VIP].concat());
    }

    fn payload(&mut self, random: &mut SmallRng) {
        let length = match random.random_range(0..32) {
            // Now and then one that comes in several buffers.
            0 if once_in(random, 8) => random.random_range(3300..8900),
            0 => random.random_range(0..1400),
            1..8 => random.random_range(0..64),
            _ => pick(random, &[0, 0, 1, 5, 10]),
        };
        self.bytes.resize(self.bytes.len() + length, 0x55);
    }

    fn noise(&mut self, random: &mut SmallRng, most: usize) {
        for _ in 0..random.random_range(0..=most) {
            self.bytes.push(random.random());
        }
    }

    fn client_port(&self, random: &mut SmallRng) -> u16 {
        if self.busy { BUSY_PORT } else { 40_000 + random.random_range(0..6u16) }
    }

    /// A client's port and a service's.
    fn ports(&mut self, client: u16, service: u16) {
        let [first, second] = if self.reply != self.quoting { [service, client] } else { [client, service] };
        self.word(first);
        self.word(second);
    }

    fn word(&mut self, word: u16) {
        self.bytes.extend(word.to_be_bytes());
    }

    /// Fills the checksum in; `pseudo` is the sum of the addresses and the protocol.
    fn finish_transport(&mut self, start: usize, protocol: u8, pseudo: u32) {
        if protocol == protocol::UDP && self.unsummed {
            return;
        }
        let length = self.bytes.len() - start;
        let (place, pseudo) = match protocol {
            protocol::TCP => (start + 16, pseudo + length as u32),
            protocol::UDP => (start + 6, pseudo + length as u32),
            58 => (start + 2, pseudo + length as u32),
            protocol::ICMP => (start + 2, 0),
            _ => return,
        };
        let checksum = !fold(pseudo + sum(&self.bytes[start..]));
        let checksum = if protocol == protocol::UDP && checksum == 0 { 0xffff } else { checksum };
        if let Some(field) = self.bytes.get_mut(place..place + 2) {
            field.copy_from_slice(&checksum.to_be_bytes());
        }
    }
}

const fn client(number: u8) -> [u8; 4] {
    [198, 51, 100, number]
}

/// A client and whom it asks beyond this host; or what looks like it: one of the servers asks, or this host is asked.
fn crossing_ends(random: &mut SmallRng) -> [[u8; 4]; 2] {
    let source = match random.random_range(0..24) {
        0 | 1 => scene::server_address(random.random_range(FIRST_PROXY..SERVERS)),
        2 => scene::server_address(random.random_range(FIRST_SERVER..FIRST_PROXY)),
        3 => pick(random, &MAY_JOIN),
        _ => client(random.random_range(0..4)),
    };
    let destination = match random.random_range(0..24) {
        0 | 1 => pick(random, &OWN),
        2 => VIP,
        3 => client(random.random_range(0..4)),
        4 => pick(random, &[[9, 9, 9, 9], [127, 0, 0, 1], [255; 4], [10, 0, 1, 10]]),
        _ => pick(random, &ORIGINS),
    };
    [source, destination]
}

/// The sum of RFC 1071, not folded.
pub(super) fn sum(bytes: &[u8]) -> u32 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low));
    bytes.chunks(2).map(word).sum()
}

/// To sixteen bits.
pub(super) fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The checksum of an IPv4 header that begins here made right again, if the header is there.
pub(super) fn mend_header(bytes: &mut [u8], start: usize) {
    let Some(first) = bytes.get(start) else { return };
    let length = usize::from(first & 0xf) * 4;
    if length >= 20
        && let Some(header) = bytes.get_mut(start..start + length)
    {
        header[10..12].fill(0);
        let checksum = !fold(sum(header));
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use etherparse::{SlicedPacket, TransportSlice};
    use rand::SeedableRng as _;

    use super::*;
    use crate::frames::judge::Checksums;

    /// What etherparse says of frames that nobody has broken.
    #[test]
    fn stacks_are_well_formed_of_many_kinds_and_have_valid_checksums() {
        let mut random = SmallRng::seed_from_u64(7);
        let mut stack = Stack::default();
        let mut kinds: BTreeMap<String, u32> = BTreeMap::new();
        for _ in 0..20_000 {
            stack.refill(&mut random);
            let packet = match SlicedPacket::from_ethernet(&stack.bytes) {
                Ok(packet) => packet,
                // Some EtherTypes, protocols and chains are meant to be strange; no length may be wrong in the others.
                Err(_) => {
                    *kinds.entry("strange".into()).or_default() += 1;
                    continue;
                }
            };
            let transport = match packet.transport {
                Some(TransportSlice::Tcp(_)) => "tcp",
                Some(TransportSlice::Udp(_)) => "udp",
                Some(_) => "icmp",
                None => "none",
            };
            let net = packet.net.as_ref().map_or("none", |net| if net.ipv4_ref().is_some() { "ipv4" } else { "other" });
            *kinds.entry(format!("{net} {transport} {} tags", packet.link_exts.len())).or_default() += 1;
            if let (Some(ip), true) = (stack.ip, net == "ipv4") {
                let checksums = Checksums::of(&stack.bytes[ip..]).expect("an IPv4 packet");
                assert!(checksums.header && checksums.transport != Some(false), "{:02x?}", stack.bytes);
            }
        }
        println!("{kinds:?}");
        for kind in [
            "ipv4 tcp 0 tags",
            "ipv4 udp 0 tags",
            "ipv4 tcp 1 tags",
            "ipv4 tcp 2 tags",
            "ipv4 udp 3 tags",
            "ipv4 icmp 0 tags",
            "other tcp 0 tags",
        ] {
            assert!(kinds.get(kind).is_some_and(|&count| count > 10), "no {kind}: {kinds:?}");
        }
        assert!(kinds["strange"] < 2000, "{kinds:?}");
    }
}
