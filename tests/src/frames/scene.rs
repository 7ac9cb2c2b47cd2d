//! The tables that frames meet: services of every kind, slots in every state, servers of every kind, exceptions.

use std::ops::Range;

use necp_ebpf::{
    abi::{
        ACCEPTS, ALIVE, ALWAYS_TRACKED, DIRECT, EXCEPTION_GLOBAL, EXCEPTION_LOCAL, Exception, ExceptionMask,
        ExceptionMasks, FIRST_SERVER, FORWARDING_SHIFT, GRE, LAYER_2, LAYER_3, NO_ECHO, OF_IPV4, REACHABLE, REPLY,
        REPLY6, SERVICE6, Server, Service, UDP_CLASS, UNTRACKED, VIP as VIP_STATE, VIP6 as VIP6_STATE,
    },
    hash::{fold6, service_bucket},
    host::View,
    packet::protocol,
    slot::{COLLECTING, SlotWord, TRACKED},
    tables::halves,
};
use rand::{RngExt as _, rngs::SmallRng};

use super::{once_in, pick};

/// The address of all services.
pub const VIP: [u8; 4] = [192, 0, 2, 10];
/// The IPv6 address of all services.
pub const VIP6: [u8; 16] = *b"\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x10";
/// Its index in the table of them.
const VIP6_INDEX: u16 = 1;
/// IP protocol and port of each service; the last one's slots are outside the slot table.
pub const SERVICES: [(u8, u16); 7] = [
    (protocol::TCP, 80),
    (protocol::TCP, 443),
    (protocol::TCP, 8080),
    (protocol::UDP, 53),
    (protocol::UDP, 443),
    (protocol::UDP, 514),
    (protocol::TCP, 81),
];
/// Flags of each service.
const FLAGS: [u16; SERVICES.len()] = [0, 0, ALWAYS_TRACKED, ALWAYS_TRACKED, UNTRACKED, ALWAYS_TRACKED, 0];
/// Slots of all services, and buckets of the flow table: few, so that the table is full now and then.
pub const SLOTS: u32 = SLOTS_PER_SERVICE * SERVICES.len() as u32;
/// A power of two.
pub const FLOW_BUCKETS: u32 = 16;
/// One more than the last server id.
pub const SERVERS: u32 = 10;

const SLOTS_PER_SERVICE: u32 = 7;
const SEED: u64 = 7;
const EXCEPTIONS: usize = 6;

/// A server's MAC address, as its id says.
pub const fn server_mac(id: u32) -> [u8; 6] {
    [2, 0, 0, 0, 9, id as u8]
}

/// The server that this MAC address belongs to.
pub fn server_of(mac: [u8; 6]) -> Option<u32> {
    (FIRST_SERVER..SERVERS).find(|&id| server_mac(id) == mac)
}

/// A server's own address.
pub const fn server_address(id: u32) -> [u8; 4] {
    [10, 0, 0, id as u8]
}

/// Whether an address is a server's.
pub fn is_server(address: &[u8]) -> bool {
    (FIRST_SERVER..SERVERS).any(|id| server_address(id) == address)
}

/// A server's own IPv6 address: the other one, mapped.
pub const fn server_address6(id: u32) -> [u8; 16] {
    mapped(server_address(id))
}

/// Whether an IPv6 address is a server's.
pub fn is_server6(address: &[u8]) -> bool {
    (FIRST_SERVER..SERVERS).any(|id| server_address6(id) == address)
}

const fn mapped([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// The slots of a service by its place in [`SERVICES`]; the last one has none.
pub fn slots_of(index: usize) -> Option<Range<usize>> {
    let first = index * SLOTS_PER_SERVICE as usize;
    (index + 1 < SERVICES.len()).then_some(first..first + SLOTS_PER_SERVICE as usize)
}

/// Tables to begin with.
pub struct Scene {
    slots: Vec<u64>,
    servers: Vec<Server>,
    exceptions: Vec<Exception>,
    masks: ExceptionMasks,
}

/// What user space does between two frames.
#[derive(Clone, Copy)]
pub enum Change {
    /// A slot's new owner.
    Owner(usize, u32),
    /// A server's record.
    Server(u32, Server),
}

impl Scene {
    /// Other tables.
    pub fn random(random: &mut SmallRng) -> Self {
        let servers = (FIRST_SERVER..SERVERS).map(|id| server(id, random)).collect();
        let calm = once_in(random, 3);
        let slots = (0..SLOTS).map(|_| if calm { SlotWord::plain(FIRST_SERVER) } else { slot(random) }.0).collect();
        let mut scene = Self { slots, servers, exceptions: Vec::new(), masks: ExceptionMasks::default() };
        if once_in(random, 3) {
            (0..random.random_range(1..=EXCEPTIONS)).for_each(|number| scene.except(number, random));
        }
        scene
    }

    /// Writes it all, in place of another scene.
    ///
    /// # Panics
    /// If the tables are too small.
    pub fn install(&self, view: View<'_>) {
        for (slot, word) in view.slots().iter().zip(&self.slots) {
            slot.store(*word);
        }
        for entry in view.flows().iter().flat_map(|bucket| &bucket.entries) {
            entry.key.store(0);
            entry.word.store(0);
        }
        view.clear_exceptions();
        for (number, exception) in (0..).zip(&self.exceptions) {
            assert_eq!(view.set_exception(number, exception), Ok(true));
        }
        assert!(view.set_exception_masks(0, &self.masks));
        for (id, server) in (FIRST_SERVER..).zip(&self.servers) {
            assert!(view.set_server(id, server));
        }
        let mut taken = std::collections::BTreeMap::new();
        assert!(view.set_vip6(VIP6_INDEX.into(), VIP6));
        let services =
            (0..SERVICES.len()).flat_map(|index| [service(index), service6(index), reply(index), reply6(index)]);
        for service in services.chain([vip(), vip6()]) {
            let bucket = service_bucket(service.key());
            let place = taken.entry(bucket).or_insert(0);
            assert!(view.set_service(bucket, *place, &service));
            *place += 1;
        }
    }

    /// Something that user space may do at any time.
    pub fn change(random: &mut SmallRng) -> Change {
        if once_in(random, 3) {
            let id = random.random_range(FIRST_SERVER..SERVERS);
            return Change::Server(id, server(id, random));
        }
        Change::Owner(random.random_range(0..SLOTS as usize), random.random_range(DIRECT..SERVERS))
    }

    /// An exception for some clients, under a mask of its own.
    fn except(&mut self, number: usize, random: &mut SmallRng) {
        let (protocol, port) = pick(random, &SERVICES);
        let mask = ExceptionMask {
            source_len: pick(random, &[24, 30, 31, 32]),
            destination_len: pick(random, &[0, 32]),
            protocol: random.random_range(0..2),
            port: random.random_range(0..2),
            used: OF_IPV4,
            ..ExceptionMask::default()
        };
        if self.masks.masks.contains(&mask) {
            return;
        }
        self.masks.masks[number] = mask;
        self.masks.count = number as u32 + 1;
        let host =
            if mask.source_len == 24 { 0 } else { random.random_range(0..4u8) & 0xffu8 << (32 - mask.source_len) };
        let global = once_in(random, 2);
        let mut installers = [0; necp_ebpf::abi::EXCEPTION_INSTALLERS];
        installers[0] = if global { 0 } else { random.random_range(FIRST_SERVER..SERVERS) as u16 };
        self.exceptions.push(Exception {
            source: [198, 51, 100, host],
            destination: if mask.destination_len == 0 { [0; 4] } else { VIP },
            farm: 0,
            port: if mask.port == 1 { port.to_be_bytes() } else { [0; 2] },
            protocol: if mask.protocol == 1 { protocol } else { 0 },
            mask: number as u8,
            state: if global { EXCEPTION_GLOBAL } else { EXCEPTION_LOCAL },
            reserved: 0,
            installers,
        });
    }
}

impl Change {
    /// Does it.
    pub fn apply(self, view: View<'_>) {
        match self {
            Self::Owner(slot, owner) => {
                let word = &view.slots()[slot];
                word.store(SlotWord(word.load()).moved_to(owner, |_| true).0);
            }
            Self::Server(id, server) => assert!(view.set_server(id, &server), "no server {id}"),
        }
    }
}

/// A service by its place in [`SERVICES`].
fn service(index: usize) -> Service {
    let (protocol, port) = SERVICES[index];
    let class = if protocol == protocol::TCP { 0 } else { UDP_CLASS };
    let last = index + 1 == SERVICES.len();
    Service {
        address: VIP,
        port: port.to_be_bytes(),
        protocol,
        state: 1,
        slots_base: if last { 1 << 21 } else { index as u32 * SLOTS_PER_SERVICE },
        slots_size: SLOTS_PER_SERVICE,
        seed: SEED,
        id: (index as u16 + 1) | class,
        flags: FLAGS[index],
        farm: 0,
        vip: 0,
    }
}

/// The same at the IPv6 VIP, on the same slots.
fn service6(index: usize) -> Service {
    let four = service(index);
    let id = four.id + SERVICES.len() as u16;
    Service { address: fold(), state: SERVICE6, id, vip: VIP6_INDEX, ..four }
}

/// What says that layer-3 servers of a service may reply through us.
fn reply(index: usize) -> Service {
    let (protocol, port) = SERVICES[index];
    let (vip, port) = (u32::from_ne_bytes(VIP), port.to_be_bytes());
    Service { port, protocol, state: REPLY, slots_base: vip, ..Service::default() }
}

fn reply6(index: usize) -> Service {
    Service { state: REPLY6, slots_base: 0, vip: VIP6_INDEX, ..reply(index) }
}

/// What says that an address is a VIP.
fn vip() -> Service {
    Service { address: VIP, state: VIP_STATE, flags: NO_ECHO, ..Service::default() }
}

fn vip6() -> Service {
    Service { address: fold(), state: VIP6_STATE, vip: VIP6_INDEX, ..vip() }
}

fn fold() -> [u8; 4] {
    fold6(halves(VIP6)).to_ne_bytes()
}

fn slot(random: &mut SmallRng) -> SlotWord {
    let owner = random.random_range(0..SERVERS);
    let mut word = SlotWord::plain(owner);
    if once_in(random, 3) {
        word = word.with_legacy(random.random_range(DIRECT..SERVERS));
    }
    word.with_bits(pick(random, &[0, 0, 0, TRACKED, COLLECTING, TRACKED | COLLECTING]), 0)
}

/// Two of three are in good health; some are behind the other interface, one is behind none; some take GRE, some layer 3,
/// and what is long does not get to all of them.
fn server(id: u32, random: &mut SmallRng) -> Server {
    let flags = if once_in(random, 3) { random.random_range(0..8) } else { ALIVE | ACCEPTS | REACHABLE };
    let forwarding = pick(random, &[LAYER_2, LAYER_2, GRE, LAYER_3]);
    Server {
        mac: server_mac(id),
        flags: flags | forwarding << FORWARDING_SHIFT,
        // By layer 2 only: of other types the kernel program counts for the server what it then has no interface for.
        port: if forwarding == LAYER_2 { pick(random, &[0, 0, 0, 0, 1, 1, 9]) } else { pick(random, &[0, 0, 1]) },
        address: mapped(server_address(id)),
        source: mapped([10, 0, 0, 1]),
        mtu: pick(random, &[0, 1500, 68, 100]),
        forwarding,
        host: id as u16,
        ..Server::default()
    }
}
