//! What crosses the host in a scene: farms that intercept, whose traffic they take, and what of it their servers do not want.
//! The tables have it in tries and hashes; here it stands as it was meant, for the judge.

use std::{collections::BTreeSet, ops::Range};

use ipnet::Ipv4Net;
use necp_ebpf::{
    abi::{
        ALWAYS_TRACKED, AddressSet, DIRECT, EXCEPTION_GLOBAL, EXCEPTION_INSTALLERS, EXCEPTION_LOCAL, Exception,
        ExceptionMask, FIRST_SERVER, INTERCEPT, OF_IPV4, Service, UDP_CLASS,
    },
    host::Crossing,
    packet::protocol,
    slot::{SlotWord, TRACKED},
};
use rand::{RngExt as _, rngs::SmallRng};

use super::{
    super::{once_in, pick},
    BAD_SLOTS, FIRST_PROXY, SEED, SERVERS, SERVICES, SLOTS_PER_SERVICE, VIP, any_slot,
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
    pub crossings: BTreeSet<(AddressSet, Ipv4Net)>,
    /// At most one of each mask.
    pub exceptions: Vec<Exclusion>,
}

/// Flows that servers do not want.
#[derive(Clone, Copy, Debug)]
pub struct Exclusion {
    /// Of whose services.
    pub farm: u32,
    /// From where.
    pub source: Ipv4Net,
    /// Whereto.
    pub destination: Ipv4Net,
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
        let mut crossings = BTreeSet::from([
            (AddressSet::OWN, net([127, 0, 0, 0], 8)),
            (AddressSet::intercepted(1), net([203, 0, 113, 0], 24)),
            (AddressSet::intercepted(1), net([192, 0, 2, 0], 24)),
            (AddressSet::intercepted(2), net([198, 51, 100, 0], 24)),
            (AddressSet::servers(1), net([10, 0, 1, 0], 24)),
            (AddressSet::servers(2), net([10, 0, 2, 0], 27)),
        ]);
        crossings.extend(OWN.map(|own| (AddressSet::OWN, net(own, 32))));
        Self { crossings, exceptions: Vec::new() }
    }

    /// And some of others.
    pub(super) fn random(random: &mut SmallRng) -> Self {
        let mut rules = Self::least();
        for (odds, set, net) in [
            // The daemon names all VIPs there; those of others come first all the same.
            (2, AddressSet::OWN, net(VIP, 32)),
            (2, AddressSet::OWN, net(COMING, 32)),
            (2, AddressSet::intercepted(2), net([0; 4], 0)),
            (2, AddressSet::intercepted(2), net([203, 0, 113, 64], 26)),
            (4, AddressSet::intercepted(1), net([10, 0, 0, 0], 8)),
            // A client may be one of the servers.
            (4, AddressSet::servers(2), net([198, 51, 100, 3], 32)),
            (4, AddressSet::servers(1), net([198, 51, 100, 2], 31)),
        ] {
            if once_in(random, odds) {
                rules.crossings.insert((set, net));
            }
        }
        rules
    }

    /// The prefixes as the host build's tables have them.
    pub fn words(&self) -> Vec<Crossing> {
        let words = |net: Ipv4Net| [net.network(), net.netmask()].map(|bytes| u32::from_ne_bytes(bytes.octets()));
        let words = self.crossings.iter().map(|&(set, net)| (set, words(net)));
        words.map(|(set, [network, mask])| (set, network, mask)).collect()
    }

    /// An address becomes this host's own, or is no longer.
    pub fn come_or_go(&mut self) {
        let own = (AddressSet::OWN, net(COMING, 32));
        if !self.crossings.remove(&own) {
            self.crossings.insert(own);
        }
    }

    /// One more exception for some clients, if its mask is not in use.
    pub(super) fn except(&mut self, random: &mut SmallRng) {
        let farm = random.random_range(0..FARMS);
        let of_farm: Vec<_> = services_of(farm).collect();
        let (protocol, port) = pick(random, &of_farm);
        let to = if farm == 0 { VIP } else { pick(random, &ORIGINS) };
        let exclusion = Exclusion {
            farm,
            source: net([198, 51, 100, random.random_range(0..4)], pick(random, &[24, 30, 31, 32])),
            destination: net(to, pick(random, &[0, 24, 32])),
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
            used: OF_IPV4,
            ..ExceptionMask::default()
        }
    }

    /// Its record, with the mask of this number.
    pub fn record(&self, mask: u8) -> Exception {
        let mut installers = [0; EXCEPTION_INSTALLERS];
        installers[0] = self.installer.unwrap_or_default() as u16;
        Exception {
            source: self.source.network().octets(),
            destination: self.destination.network().octets(),
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

fn net(address: [u8; 4], length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(address.into(), length).trunc()
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
