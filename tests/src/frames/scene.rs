//! The tables that frames meet: services of every kind, slots in every state, servers of every kind, exceptions; beside the
//! VIPs' farm two that intercept.

pub mod crossing;

use std::ops::Range;

use necp_ebpf::{
    abi::{
        ACCEPTS, ALIVE, ALWAYS_TRACKED, DIRECT, ExceptionMasks, FIRST_SERVER, FORWARDING_SHIFT, GRE, LAYER_2, LAYER_3,
        NO_ECHO, NONE, REACHABLE, REPLY, REPLY6, SERVICE6, Server, Service, UDP_CLASS, UNTRACKED, VIP as VIP_STATE,
        VIP6 as VIP6_STATE,
    },
    hash::{fold6, service_bucket},
    host::View,
    packet::protocol,
    slot::{COLLECTING, SlotWord, TRACKED},
    tables::{Tables as _, halves},
};
use rand::{RngExt as _, rngs::SmallRng};

use self::crossing::{INTERCEPTED, Rules, farm_of, servers_of};
use super::{once_in, pick};

/// The address of all services, but for those that are intercepted.
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
pub const SLOTS: u32 = SLOTS_PER_SERVICE * (SERVICES.len() + INTERCEPTED.len()) as u32;
/// A power of two.
pub const FLOW_BUCKETS: u32 = 16;
/// The first server id of farms that intercept; see [`servers_of`].
pub const FIRST_PROXY: u32 = 10;
/// One more than the last server id.
pub const SERVERS: u32 = 16;

const SLOTS_PER_SERVICE: u32 = 7;
const SEED: u64 = 7;
const EXCEPTIONS: usize = 10;
/// Where the slots of a service are that has none.
const BAD_SLOTS: u32 = 1 << 21;

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
    let proxies = (SERVERS - FIRST_PROXY) / (crossing::FARMS - 1);
    let farm = if id < FIRST_PROXY { 0 } else { 1 + (id - FIRST_PROXY) / proxies };
    [10, 0, farm as u8, id as u8]
}

/// Whether an address is that of one of the VIP's servers.
pub fn is_server(address: &[u8]) -> bool {
    servers_of(0).any(|id| server_address(id) == address)
}

/// A server's own IPv6 address: the other one, mapped.
pub const fn server_address6(id: u32) -> [u8; 16] {
    mapped(server_address(id))
}

/// Whether an IPv6 address is that of one of the VIP's servers.
pub fn is_server6(address: &[u8]) -> bool {
    servers_of(0).any(|id| server_address6(id) == address)
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
    rules: Rules,
}

/// What user space does between two frames.
#[derive(Clone, Copy)]
pub enum Change {
    /// A slot's new owner.
    Owner(usize, u32),
    /// The new owner of all slots of a service that is intercepted, by its place in [`INTERCEPTED`].
    Owners(usize, u32),
    /// A server's record.
    Server(u32, Server),
    /// [`Rules::come_or_go`].
    Own,
}

impl Scene {
    /// Other tables.
    pub fn random(random: &mut SmallRng) -> Self {
        let servers = (FIRST_SERVER..SERVERS).map(|id| server(id, random)).collect();
        let calm = once_in(random, 3);
        let of_vip = SLOTS_PER_SERVICE as usize * SERVICES.len();
        let slot = |_| if calm { SlotWord::plain(FIRST_SERVER) } else { any_slot(&servers_of(0), random) }.0;
        let mut slots: Vec<u64> = (0..of_vip).map(slot).collect();
        slots.extend((0..INTERCEPTED.len()).flat_map(|index| crossing::slots(index, random)));
        let mut rules = Rules::random(random);
        if once_in(random, 3) {
            (0..random.random_range(1..=EXCEPTIONS)).for_each(|_| rules.except(random));
        }
        Self { slots, servers, rules }
    }

    /// What the tables of prefixes and exceptions are to say.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Writes it all but the prefixes, in place of another scene.
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
        self.install_exceptions(view);
        for (id, server) in (FIRST_SERVER..).zip(&self.servers) {
            assert!(view.set_server(id, server));
        }
        let mut taken = std::collections::BTreeMap::new();
        assert!(view.set_vip6(VIP6_INDEX.into(), VIP6));
        let services =
            (0..SERVICES.len()).flat_map(|index| [service(index), service6(index), reply(index), reply6(index)]);
        let intercepted =
            (0..INTERCEPTED.len()).flat_map(|index| [crossing::service(index), crossing::service6(index)]);
        for service in services.chain(intercepted).chain([vip(), vip6()]) {
            let bucket = service_bucket(service.key());
            let place = taken.entry(bucket).or_insert(0);
            assert!(view.set_service(bucket, *place, &service));
            *place += 1;
        }
    }

    fn install_exceptions(&self, view: View<'_>) {
        view.clear_exceptions();
        let seed = view.exception_seed();
        let mut masks = [ExceptionMasks::default(); crossing::FARMS as usize];
        for (number, exclusion) in (0..).zip(&self.rules.exceptions) {
            let masks = &mut masks[exclusion.farm as usize];
            masks.masks[masks.count as usize] = exclusion.mask();
            assert_eq!(view.set_exception(number, &exclusion.record(masks.count as u8, seed)), Ok(true));
            masks.count += 1;
        }
        for (farm, masks) in (0..).zip(&masks) {
            assert!(view.set_exception_masks(farm, masks));
        }
    }

    /// Something that user space may do at any time.
    pub fn change(random: &mut SmallRng) -> Change {
        match random.random_range(0..12) {
            0..4 => {
                let id = random.random_range(FIRST_SERVER..SERVERS);
                Change::Server(id, server(id, random))
            }
            4 => Change::Own,
            5 => {
                let index = random.random_range(0..INTERCEPTED.len());
                Change::Owners(index, new_owner(&servers_of(INTERCEPTED[index].0), random))
            }
            _ => {
                let slot = random.random_range(0..SLOTS as usize);
                let farm = (slot / SLOTS_PER_SERVICE as usize)
                    .checked_sub(SERVICES.len())
                    .map_or(0, |intercepted| INTERCEPTED[intercepted].0);
                Change::Owner(slot, new_owner(&servers_of(farm), random))
            }
        }
    }
}

/// One of a farm's servers, or none now and then.
fn new_owner(servers: &Range<u32>, random: &mut SmallRng) -> u32 {
    if once_in(random, 8) { DIRECT } else { random.random_range(servers.clone()) }
}

impl Change {
    /// Does it, but to prefixes.
    pub fn apply(self, view: View<'_>) {
        let give = |slot: usize, owner| {
            let word = &view.slots()[slot];
            word.store(SlotWord(word.load()).moved_to(owner, |_| true).0);
        };
        match self {
            Self::Owner(slot, owner) => give(slot, owner),
            Self::Owners(index, owner) => crossing::slots_of(index).for_each(|slot| give(slot, owner)),
            Self::Server(id, server) => assert!(view.set_server(id, &server), "no server {id}"),
            Self::Own => {}
        }
    }
}

/// A service by its place in [`SERVICES`].
pub fn service(index: usize) -> Service {
    let (protocol, port) = SERVICES[index];
    let class = if protocol == protocol::TCP { 0 } else { UDP_CLASS };
    let last = index + 1 == SERVICES.len();
    Service {
        address: VIP,
        port: port.to_be_bytes(),
        protocol,
        state: 1,
        slots_base: if last { BAD_SLOTS } else { index as u32 * SLOTS_PER_SERVICE },
        slots_size: SLOTS_PER_SERVICE,
        seed: SEED,
        id: (index as u16 + 1) | class,
        flags: FLAGS[index],
        farm: 0,
        vip: 0,
    }
}

/// The same at the IPv6 VIP, on the same slots.
pub fn service6(index: usize) -> Service {
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

/// What years may have left of a slot of the farm with these servers.
fn any_slot(servers: &Range<u32>, random: &mut SmallRng) -> SlotWord {
    let owner = if once_in(random, 10) { NONE } else { new_owner(servers, random) };
    let mut word = SlotWord::plain(owner);
    if once_in(random, 3) {
        word = word.with_legacy(new_owner(servers, random));
    }
    word.with_bits(pick(random, &[0, 0, 0, TRACKED, COLLECTING, TRACKED | COLLECTING]), 0)
}

/// Two of three are in good health; some are behind the other interface, one is behind none; some take GRE, of the VIP's some
/// layer 3, and what is long does not get to all of them.
fn server(id: u32, random: &mut SmallRng) -> Server {
    let flags = if once_in(random, 3) { random.random_range(0..8) } else { ALIVE | ACCEPTS | REACHABLE };
    let routed = if farm_of(id) == Some(0) { LAYER_3 } else { GRE };
    let forwarding = pick(random, &[LAYER_2, LAYER_2, GRE, routed]);
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
