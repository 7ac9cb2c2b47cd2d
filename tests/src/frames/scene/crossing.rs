//! What crosses the host in a scene: farms that intercept, whose traffic they take, and what of it their servers do not want.
//! The tables have it in tries and hashes; here it stands as it was meant, for the judge.

use std::{collections::BTreeSet, net::IpAddr, ops::Range};

use ipnet::IpNet;
use necp_ebpf::{
    abi::{
        ALWAYS_TRACKED, AddressSet, DIRECT, EXCEPTION_GLOBAL, EXCEPTION_INSTALLERS, EXCEPTION_LOCAL, Exception,
        ExceptionMask, FIRST_SERVER, INTERCEPT, INTERCEPT6, OF_IPV4, OF_IPV6, Service, UDP_CLASS,
    },
    exceptions::name6,
    host::{Crossing, Crossing6},
    packet::protocol,
    slot::{SlotWord, TRACKED},
    tables::halves,
};
use rand::{RngExt as _, rngs::SmallRng};

use super::{
    super::{once_in, pick},
    BAD_SLOTS, FIRST_PROXY, SEED, SERVERS, SERVICES, SLOTS_PER_SERVICE, VIP, VIP6, any_slot, mapped,
};

/// Farm, IP protocol and port of each service of a farm that intercepts. Port 80 is the VIP's too; what a client on port 40,003
/// is replied may be for farm 2; the last one's slots are outside the slot table.
pub const INTERCEPTED: [(u32, u8, u16); 8] = [
    (1, protocol::TCP, 80),
    (1, protocol::TCP, 8000),
    (1, protocol::UDP, 53),
    (1, protocol::TCP, 444),
    (2, protocol::TCP, 40_003),
    (2, protocol::UDP, 123),
    (2, SCTP, 0),
    (1, protocol::TCP, 81),
];
/// A protocol whose ports nobody reads.
const SCTP: u8 = 132;
/// One more than the last farm; farm 0 has the VIP.
pub const FARMS: u32 = 3;

/// Who answers beyond this host; the second one's address may become this host's own.
pub const ORIGINS: [[u8; 4]; 4] = [[203, 0, 113, 80], COMING, [203, 0, 113, 255], [192, 0, 2, 11]];
/// This host's own addresses, in the prefixes that are intercepted.
pub const OWN: [[u8; 4]; 2] = [[203, 0, 113, 1], [192, 0, 2, 1]];
/// One that is this host's own now and then.
const COMING: [u8; 4] = [203, 0, 113, 2];
/// Addresses that the farms' servers may have, though nobody has them.
pub const MAY_JOIN: [[u8; 4]; 2] = [[10, 0, 1, 255], [10, 0, 2, 17]];

/// The IPv6 address of who has this one, or of what is like it.
pub const fn six_of(address: [u8; 4]) -> [u8; 16] {
    let mut six = VIP6;
    match address {
        VIP => {}
        [198, 51, 100, client] => six[15] = client & 0xf,
        [192, 0, 2, beside] => six[15] = 0x10 | beside,
        [203, 0, 113, origin] => (six[4], six[5], six[15]) = (0xca, 0xfe, origin),
        [255, ..] => six = *b"\xff\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\x01",
        [10, ..] => six = mapped(address),
        [elsewhere, .., last] => (six[2], six[3], six[15]) = (elsewhere, 1, last),
    }
    six
}

/// The prefixes that every scene has.
const LEAST: [(AddressSet, &[&str]); 5] = [
    (
        AddressSet::OWN,
        &["127.0.0.0/8", "203.0.113.1/32", "192.0.2.1/32", "ff00::/8", "2001:db8:cafe::1/128", "2001:db8::11/128"],
    ),
    (AddressSet::intercepted(1), &["203.0.113.0/24", "192.0.2.0/24", "2001:db8:cafe::/64", "2001:db8::10/124"]),
    (AddressSet::intercepted(2), &["198.51.100.0/24", "2001:db8::/124"]),
    (AddressSet::servers(1), &["10.0.1.0/24", "::ffff:10.0.1.0/120"]),
    (AddressSet::servers(2), &["10.0.2.0/27", "::ffff:10.0.2.0/123"]),
];

/// Prefixes that one scene of so many has.
const MORE: [(u32, AddressSet, &[&str]); 7] = [
    // The daemon names all VIPs there; those of others come first all the same.
    (2, AddressSet::OWN, &["192.0.2.10/32", "2001:db8::10/128"]),
    (2, AddressSet::OWN, &COMING_NETS),
    (2, AddressSet::intercepted(2), &["0.0.0.0/0", "::/0"]),
    (2, AddressSet::intercepted(2), &["203.0.113.64/26", "2001:db8:cafe::40/122"]),
    (4, AddressSet::intercepted(1), &["10.0.0.0/8", "::ffff:10.0.0.0/104"]),
    // A client may be one of the servers.
    (4, AddressSet::servers(2), &["198.51.100.3/32", "2001:db8::3/128"]),
    (4, AddressSet::servers(1), &["198.51.100.2/31", "2001:db8::2/127"]),
];
/// [`COMING`], of both families.
const COMING_NETS: [&str; 2] = ["203.0.113.2/32", "2001:db8:cafe::2/128"];

/// The servers of a farm.
pub const fn servers_of(farm: u32) -> Range<u32> {
    let proxies = (SERVERS - FIRST_PROXY) / (FARMS - 1);
    match farm {
        0 => FIRST_SERVER..FIRST_PROXY,
        _ => FIRST_PROXY + (farm - 1) * proxies..FIRST_PROXY + farm * proxies,
    }
}

/// The farm of a server.
pub fn farm_of(id: u32) -> Option<u32> {
    (0..FARMS).find(|&farm| servers_of(farm).contains(&id))
}

/// What decides, beside slots and flows, where a packet goes.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Prefixes that are intercepted, and those of whom it is not.
    pub crossings: BTreeSet<(AddressSet, IpNet)>,
    /// At most one of each mask.
    pub exceptions: Vec<Exclusion>,
}

/// Flows that servers do not want.
#[derive(Clone, Copy, Debug)]
pub struct Exclusion {
    /// Of whose services.
    pub farm: u32,
    /// From where.
    pub source: IpNet,
    /// Whereto, in the same family.
    pub destination: IpNet,
    /// IP protocol, unless any.
    pub protocol: Option<u8>,
    /// Port, unless any.
    pub port: Option<u16>,
    /// The server that does not want them; `None`: none of the farm is to have them.
    pub installer: Option<u32>,
}

/// A service's flows that nobody wants yet, that everybody wants, or anything in between.
#[derive(Clone, Copy)]
enum Phase {
    /// No server has started.
    Direct,
    /// All of it goes to one.
    Calm,
    /// The first one has just started.
    Started,
    /// Some years later.
    Any,
}

impl Rules {
    /// The prefixes that every scene has.
    pub fn least() -> Self {
        let crossings = LEAST.into_iter().flat_map(|(set, nets)| nets.iter().map(move |text| (set, parsed(text))));
        Self { crossings: crossings.collect(), exceptions: Vec::new() }
    }

    /// And some of others.
    pub(super) fn random(random: &mut SmallRng) -> Self {
        let mut rules = Self::least();
        for (odds, set, nets) in MORE {
            if once_in(random, odds) {
                rules.crossings.extend(nets.iter().map(|text| (set, parsed(text))));
            }
        }
        rules
    }

    /// The prefixes as the host build's tables have them.
    pub fn words(&self) -> (Vec<Crossing>, Vec<Crossing6>) {
        let (mut four, mut six) = (Vec::new(), Vec::new());
        for &(set, net) in &self.crossings {
            match net {
                IpNet::V4(net) => {
                    let [network, mask] = [net.network(), net.netmask()].map(|one| u32::from_ne_bytes(one.octets()));
                    four.push((set, network, mask));
                }
                IpNet::V6(net) => six.push((set, halves(net.network().octets()), halves(net.netmask().octets()))),
            }
        }
        (four, six)
    }

    /// An address of each family becomes this host's own, or is no longer.
    pub fn come_or_go(&mut self) {
        for own in COMING_NETS.map(|text| (AddressSet::OWN, parsed(text))) {
            if !self.crossings.remove(&own) {
                self.crossings.insert(own);
            }
        }
    }

    /// One more exception for some clients, if its mask is not in use.
    pub(super) fn except(&mut self, random: &mut SmallRng) {
        let farm = random.random_range(0..FARMS);
        let of_farm: Vec<_> = services_of(farm).collect();
        let (protocol, port) = pick(random, &of_farm);
        let six = once_in(random, 3);
        let to = if farm == 0 { VIP } else { pick(random, &ORIGINS) };
        let exclusion = Exclusion {
            farm,
            source: net([198, 51, 100, random.random_range(0..4)], pick(random, &[28, 30, 31, 32]), six),
            destination: net(to, pick(random, &[0, 28, 32]), six),
            protocol: once_in(random, 2).then_some(protocol),
            port: once_in(random, 2).then_some(port),
            installer: (!once_in(random, 2)).then(|| random.random_range(servers_of(farm))),
        };
        let mask = exclusion.mask();
        if self.exceptions.iter().all(|other| other.farm != farm || other.mask() != mask) {
            self.exceptions.push(exclusion);
        }
    }
}

impl Exclusion {
    /// What it looks at.
    pub fn mask(&self) -> ExceptionMask {
        ExceptionMask {
            source_len: self.source.prefix_len(),
            destination_len: self.destination.prefix_len(),
            protocol: u8::from(self.protocol.is_some()),
            port: u8::from(self.port.is_some()),
            used: if self.source.addr().is_ipv4() { OF_IPV4 } else { OF_IPV6 },
            ..ExceptionMask::default()
        }
    }

    /// Its record, with the mask of this number; the seed is that of the tables' hash.
    pub fn record(&self, mask: u8, seed: u64) -> Exception {
        let (source, destination) = match (self.source.network(), self.destination.network()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => (source.octets(), destination.octets()),
            (source, destination) => {
                let [source, destination] = [source, destination].map(|address| halves(bytes(address)));
                let [a, b, c, d, e, f, g, h] = name6(source, destination, seed).to_ne_bytes();
                ([a, b, c, d], [e, f, g, h])
            }
        };
        let mut installers = [0; EXCEPTION_INSTALLERS];
        installers[0] = self.installer.unwrap_or_default() as u16;
        Exception {
            source,
            destination,
            farm: self.farm as u16,
            port: self.port.unwrap_or_default().to_be_bytes(),
            protocol: self.protocol.unwrap_or_default(),
            mask,
            state: if self.installer.is_some() { EXCEPTION_LOCAL } else { EXCEPTION_GLOBAL },
            reserved: 0,
            installers,
        }
    }
}

/// Protocol and port of each of a farm's services.
fn services_of(farm: u32) -> impl Iterator<Item = (u8, u16)> {
    let intercepted = INTERCEPTED.iter().filter(move |service| service.0 == farm).map(|service| (service.1, service.2));
    SERVICES.into_iter().filter(move |_| farm == 0).chain(intercepted)
}

/// A service by its place in [`INTERCEPTED`].
pub fn service(index: usize) -> Service {
    let (farm, protocol, port) = INTERCEPTED[index];
    let last = index + 1 == INTERCEPTED.len();
    let tcp = protocol == protocol::TCP;
    Service {
        address: [0; 4],
        port: port.to_be_bytes(),
        protocol,
        state: INTERCEPT,
        slots_base: if last { BAD_SLOTS } else { slots_of(index).start as u32 },
        slots_size: SLOTS_PER_SERVICE,
        seed: SEED + u64::from(farm),
        // Behind those of the VIP, of both families.
        id: (2 * SERVICES.len() + index + 1) as u16 | if tcp { 0 } else { UDP_CLASS },
        flags: if tcp { 0 } else { ALWAYS_TRACKED },
        farm: farm as u16,
        vip: 0,
    }
}

/// The same of IPv6, on the same slots.
pub fn service6(index: usize) -> Service {
    let four = service(index);
    Service { state: INTERCEPT6, id: four.id + INTERCEPTED.len() as u16, ..four }
}

/// The slots of a service by its place in [`INTERCEPTED`]; the last one's are of no use.
pub const fn slots_of(index: usize) -> Range<usize> {
    let first = (SERVICES.len() + index) * SLOTS_PER_SERVICE as usize;
    first..first + SLOTS_PER_SERVICE as usize
}

/// A service's slots, each as one of these may have left it.
pub(super) fn slots(index: usize, random: &mut SmallRng) -> Vec<u64> {
    let proxies = servers_of(INTERCEPTED[index].0);
    let phase =
        pick(random, &[Phase::Direct, Phase::Calm, Phase::Calm, Phase::Calm, Phase::Started, Phase::Any, Phase::Any]);
    let one = random.random_range(proxies.clone());
    let mut slot = || match phase {
        Phase::Direct => SlotWord::plain(DIRECT),
        Phase::Calm => SlotWord::plain(one),
        Phase::Started => {
            SlotWord::plain(one).with_legacy(DIRECT).with_bits(if once_in(random, 2) { TRACKED } else { 0 }, 0)
        }
        Phase::Any => any_slot(&proxies, random),
    };
    (0..SLOTS_PER_SERVICE).map(|_| slot().0).collect()
}

/// The network of an address, or of [its other one](six_of), with its last bits; of all addresses if there are so few.
fn net(address: [u8; 4], length: u8, six: bool) -> IpNet {
    let (address, bits) =
        if six { (IpAddr::from(six_of(address)), u128::BITS) } else { (IpAddr::from(address), u32::BITS) };
    let length = if length == 0 { 0 } else { bits as u8 - (u32::BITS as u8 - length) };
    IpNet::new_assert(address, length).trunc()
}

fn parsed(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

/// As it stands in an IPv6 header; of IPv4 mapped.
pub fn bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_server_has_one_farm_and_every_farm_servers() {
        let farms: BTreeSet<_> = (FIRST_SERVER..SERVERS).map(|id| farm_of(id).expect("a farm")).collect();
        assert_eq!(farms, (0..FARMS).collect());
        assert_eq!((farm_of(DIRECT), farm_of(SERVERS)), (None, None));
    }
}
