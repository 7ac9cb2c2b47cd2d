//! The tables that a case begins with.

use std::collections::BTreeSet;

use ipnet::IpNet;
use necp_ebpf::{
    abi::{
        ACCEPTS, ALIVE, ALWAYS_TRACKED, AddressSet, DIRECT, EXCEPTION_GLOBAL, EXCEPTION_INSTALLERS, EXCEPTION_LOCAL,
        Exception, ExceptionMask, ExceptionMasks, FLOWS_PER_BUCKET, FORWARDING_SHIFT, GRE, INTERCEPT, LAYER_2, LAYER_3,
        NO_ECHO, OF_IPV4, REACHABLE, REPLY, SERVICES_PER_BUCKET, Server, Service, UDP_CLASS, UNTRACKED,
        VIP as VIP_STATE,
    },
    flows::{FlowWord, flow_key},
    hash::{flow_buckets, flow_hash, service_bucket, slot_index},
    host::View,
    intercept::named,
    packet::{Packet, protocol},
    slot::{COLLECTING, SlotWord, TRACKED},
};

use crate::frames::{Flow, VIP};

/// Slots that are compared after every frame: the kernel's table has more.
pub const SLOTS: u32 = 512;
/// Flow buckets, few enough to be compared after every frame.
pub const FLOW_BUCKETS: u32 = 16;

/// Takes new flows.
pub const OWNER: u32 = 2;
/// Takes new flows too; the legacy of slots that have one.
pub const LEGACY: u32 = 3;
/// Takes new flows too; owns the other slots where the flow's own slot has another owner.
pub const OTHER: u32 = 4;
/// Its flows go on, but it takes no new ones.
pub const STOPPED: u32 = 5;
/// Its host is gone.
pub const DEAD: u32 = 6;
/// Its MAC address is not known.
pub const UNREACHABLE: u32 = 7;
/// Behind the other interface.
pub const REMOTE: u32 = 8;
/// Behind an interface that is not there.
pub const LOST_PORT: u32 = 9;
/// Wants GRE.
pub const TUNNEL: u32 = 10;
/// Wants GRE, behind the other interface.
pub const REMOTE_TUNNEL: u32 = 11;
/// Wants layer 3.
pub const TRANSLATED: u32 = 12;
/// One more than the last id.
pub const SERVERS: u32 = 13;
/// This host's address, as the source of GRE.
pub const OWN_ADDRESS: [u8; 4] = [10, 0, 0, 1];
/// Longest packet that gets to any server.
pub const MTU: u16 = 1500;

/// Port of the service whose TCP flows are tracked as little as may be.
pub const WEB: u16 = 80;
/// UDP port, every flow on record.
pub const DNS: u16 = 53;
/// UDP port, opted out of tracking.
pub const QUIC: u16 = 443;
/// TCP port, every flow on record (as layer 3 will need it).
pub const ALWAYS: u16 = 8080;

/// See [`Setup::with_second_vip`].
pub const SECOND_VIP: [u8; 4] = [192, 0, 2, 40];

const SLOTS_PER_SERVICE: u32 = 7;
const SEED: u64 = 7;

/// A server's MAC address.
pub const fn mac(server: u32) -> [u8; 6] {
    [2, 0, 0, 0, 9, server as u8]
}

/// A server's own address.
pub const fn address(server: u32) -> [u8; 4] {
    [10, 0, 0, server as u8]
}

/// Tables to begin with.
#[derive(Clone)]
pub struct Setup {
    services: Vec<Service>,
    slots: Vec<u64>,
    entries: Vec<(u32, usize, u64, FlowWord)>,
    exceptions: Vec<Exception>,
    masks: ExceptionMasks,
}

/// Source and destination prefix of an exception; an address of zeroes with length 0 is any.
pub type Nets = [([u8; 4], u8); 2];

/// Any address.
pub const ANY: ([u8; 4], u8) = ([0; 4], 0);

impl Setup {
    /// Four services, all of whose slots have this word.
    pub fn slots(word: SlotWord) -> Self {
        let (tcp, udp) = (protocol::TCP, protocol::UDP);
        let services = vec![
            service(1, tcp, WEB, 0),
            service(2, udp, DNS, ALWAYS_TRACKED),
            service(3, udp, QUIC, UNTRACKED),
            service(4, tcp, ALWAYS, ALWAYS_TRACKED),
            Service { address: VIP, state: VIP_STATE, ..Service::default() },
            reply(0, tcp, ALWAYS),
            reply(0, udp, DNS),
        ];
        let slots = vec![word.0; 4 * SLOTS_PER_SERVICE as usize];
        Self { services, slots, entries: Vec::new(), exceptions: Vec::new(), masks: ExceptionMasks::default() }
    }

    /// Plain slots of this owner.
    pub fn owned_by(owner: u32) -> Self {
        Self::slots(SlotWord::plain(owner))
    }

    /// Plain slots.
    pub fn plain() -> Self {
        Self::owned_by(OWNER)
    }

    /// Slots that changed from this legacy to [`OWNER`].
    pub fn changed_from(legacy: u32) -> Self {
        Self::slots(SlotWord::plain(OWNER).with_legacy(legacy))
    }

    /// Slots of [`OWNER`], no legacy, with TRACKED set.
    pub fn tracked() -> Self {
        Self::slots(SlotWord::plain(OWNER).with_bits(TRACKED, 0))
    }

    /// Slots of [`OWNER`], no legacy, which user space is looking at.
    pub fn collecting() -> Self {
        Self::slots(SlotWord::plain(OWNER).with_bits(COLLECTING, 0))
    }

    /// Cut through.
    pub fn direct() -> Self {
        Self::owned_by(DIRECT)
    }

    /// [`ALWAYS`] and [`DNS`] at another VIP too, on slots of their own with this owner.
    pub fn with_second_vip(mut self, owner: u32) -> Self {
        for (protocol, port) in [(protocol::TCP, ALWAYS), (protocol::UDP, DNS)] {
            let service = service(self.services.len() as u16 + 1, protocol, port, ALWAYS_TRACKED);
            let slots_base = self.slots.len() as u32;
            self.slots.extend([SlotWord::plain(owner).0; SLOTS_PER_SERVICE as usize]);
            let entry = Service { slots_base: u32::from_ne_bytes(SECOND_VIP), ..reply(1, protocol, port) };
            self.services.extend([Service { address: SECOND_VIP, slots_base, ..service }, entry]);
        }
        self
    }

    /// All slots of one more service have this word: TCP or UDP with this port, of farm 0, which intercepts (see [`crossings`]).
    pub fn intercepting(mut self, protocol: u8, port: u16, word: SlotWord) -> Self {
        let flags = if protocol == protocol::TCP { 0 } else { ALWAYS_TRACKED };
        let service = service(self.services.len() as u16 + 1, protocol, port, flags);
        let slots_base = self.slots.len() as u32;
        self.slots.extend([word.0; SLOTS_PER_SERVICE as usize]);
        self.services.push(Service { address: [0; 4], state: INTERCEPT, slots_base, ..service });
        self
    }

    /// The flow's slot has this word instead.
    pub fn slot_of(mut self, flow: Flow, word: SlotWord) -> Self {
        let index = self.slot_index(flow).expect("the flow belongs to a service") as usize;
        self.slots[index] = word.0;
        self
    }

    /// One more service, on slots of its own with this owner.
    pub fn also(mut self, protocol: u8, port: u16, owner: u32) -> Self {
        let mut extra = service(self.services.len() as u16 + 1, protocol, port, 0);
        extra.slots_base = self.slots.len() as u32;
        self.slots.extend([SlotWord::plain(owner).0; SLOTS_PER_SERVICE as usize]);
        self.services.push(extra);
        self
    }

    /// A service that points outside the slot table.
    pub fn broken(mut self, port: u16) -> Self {
        let broken = service(self.services.len() as u16 + 1, protocol::TCP, port, 0);
        self.services.push(Service { slots_base: 1 << 21, ..broken });
        self
    }

    /// No server is to have these flows.
    pub fn global(self, nets: Nets, protocol: u8, port: u16) -> Self {
        self.except(EXCEPTION_GLOBAL, nets, protocol, port, &[])
    }

    /// These servers do not want these flows.
    pub fn local(self, nets: Nets, protocol: u8, port: u16, servers: &[u32]) -> Self {
        self.except(EXCEPTION_LOCAL, nets, protocol, port, servers)
    }

    /// An exception; its mask is the one that it needs, or a new one.
    pub fn except(mut self, state: u8, nets: Nets, protocol: u8, port: u16, servers: &[u32]) -> Self {
        let [(source, source_len), (destination, destination_len)] = nets;
        let (has_protocol, has_port) = (u8::from(protocol != 0), u8::from(port != 0));
        let mask = ExceptionMask {
            source_len,
            destination_len,
            protocol: has_protocol,
            port: has_port,
            used: OF_IPV4,
            ..ExceptionMask::default()
        };
        let there = self.masks.masks.iter().position(|other| *other == mask || other.used == 0).expect("a free mask");
        self.masks.masks[there] = mask;
        self.masks.count = self.masks.count.max(there as u32 + 1);
        let mut installers = [0; EXCEPTION_INSTALLERS];
        installers.iter_mut().zip(servers).for_each(|(to, server)| *to = *server as u16);
        let port = port.to_be_bytes();
        let mask = there as u8;
        let farm = 0;
        let new = Exception { source, destination, farm, port, protocol, mask, state, reserved: 0, installers };
        self.exceptions.push(new);
        self
    }

    /// ICMP echo to the VIP is dropped.
    pub fn silent(mut self) -> Self {
        self.services.iter_mut().filter(|one| one.state == VIP_STATE).for_each(|vip| vip.flags = NO_ECHO);
        self
    }

    /// The exceptions are another farm's.
    pub fn of_another_farm(mut self) -> Self {
        self.exceptions.iter_mut().for_each(|exception| exception.farm = 1);
        self
    }

    /// The flow is on record.
    pub fn record(self, flow: Flow, server: u32, isn: u32) -> Self {
        self.entry(flow, FlowWord::record(server, isn, false))
    }

    /// The flow has a candidate.
    pub fn candidate(self, flow: Flow, server: u32, isn: u32) -> Self {
        self.entry(flow, FlowWord::candidate(server, &Packet { sequence: isn, ..Packet::default() }))
    }

    /// The flow has this entry, in the first of its buckets that has room.
    pub fn entry(mut self, flow: Flow, word: FlowWord) -> Self {
        let (service, packet) = self.flow(&flow.packet()).expect("the flow belongs to a service");
        let key = flow_key(&packet, service.id);
        let [first, second] = self.buckets(flow);
        let (bucket, index) =
            if self.used(first) < FLOWS_PER_BUCKET { (first, self.used(first)) } else { (second, self.used(second)) };
        assert!(index < FLOWS_PER_BUCKET, "no room left for the entry in this set-up");
        self.entries.push((bucket, index, key, word));
        self
    }

    /// The flow's first (0) or second (1) bucket has this many more entries of other flows of a service.
    pub fn fill(mut self, flow: Flow, which: usize, count: usize, service_id: u16, word: FlowWord) -> Self {
        let bucket = self.buckets(flow)[which];
        for _ in 0..count {
            let index = self.used(bucket);
            assert!(index < FLOWS_PER_BUCKET, "the bucket is full already");
            let stranger = Packet { source_port: self.entries.len() as u16, source: 0x0a0a_0a0a, ..Packet::default() };
            self.entries.push((bucket, index, flow_key(&stranger, service_id), word));
        }
        self
    }

    /// The last entry is this instead.
    pub fn instead_of_one(mut self, word: FlowWord) -> Self {
        self.entries.last_mut().expect("an entry").3 = word;
        self
    }

    /// The two buckets of a flow.
    pub fn buckets(&self, flow: Flow) -> [u32; 2] {
        let packet = self.flow(&flow.packet()).map_or(flow.packet(), |(_, packet)| packet);
        flow_buckets(flow_hash(&packet, SEED), FLOW_BUCKETS - 1)
    }

    /// Key and slot of a packet's flow, if it belongs to a service.
    pub fn place(&self, packet: &Packet) -> Option<(u64, u32)> {
        let (service, packet) = self.flow(packet)?;
        let slot = service.slots_base + slot_index(flow_hash(&packet, service.seed), service.slots_size);
        Some((flow_key(&packet, service.id), slot))
    }

    /// A packet's service, and the packet with what names its flow.
    fn flow(&self, packet: &Packet) -> Option<(&Service, Packet)> {
        let find = |wanted| self.services.iter().find(|service| service.key() == wanted);
        let intercepted = || find(packet.intercept_key()).map(|service| (service, named(packet, service.seed)));
        find(packet.service_key()).map(|service| (service, *packet)).or_else(intercepted)
    }

    /// Writes it all; the tables must be cleared of other set-ups' services.
    pub fn install(&self, view: View<'_>) {
        for (index, slot) in view.slots()[..SLOTS as usize].iter().enumerate() {
            slot.store(self.slots.get(index).copied().unwrap_or(0));
        }
        for entry in view.flows().iter().flat_map(|bucket| &bucket.entries) {
            entry.key.store(0);
            entry.word.store(0);
        }
        for &(bucket, index, key, word) in &self.entries {
            let entry = &view.flows()[bucket as usize].entries[index];
            entry.key.store(key);
            entry.word.store(word.0);
        }
        view.clear_exceptions();
        for (number, exception) in (0..).zip(&self.exceptions) {
            assert_eq!(view.set_exception(number, exception), Ok(true));
        }
        assert!(view.set_exception_masks(0, &self.masks));
        for id in OWNER..SERVERS {
            assert!(view.set_server(id, &server(id)));
        }
        self.each_service(|bucket, entry, service| assert!(view.set_service(bucket, entry, service)));
    }

    /// Takes its services away again.
    pub fn remove(&self, view: View<'_>) {
        self.each_service(|bucket, entry, _| assert!(view.set_service(bucket, entry, &Service::default())));
    }

    fn each_service(&self, mut visit: impl FnMut(u32, usize, &Service)) {
        for (index, service) in self.services.iter().enumerate() {
            let bucket = service_bucket(service.key());
            let before = self.services[..index].iter().filter(|other| service_bucket(other.key()) == bucket).count();
            assert!(before < SERVICES_PER_BUCKET, "too many services in one bucket");
            visit(bucket, before, service);
        }
    }

    fn slot_index(&self, flow: Flow) -> Option<u32> {
        self.place(&flow.packet()).map(|(_, slot)| slot)
    }

    fn used(&self, bucket: u32) -> usize {
        self.entries.iter().filter(|entry| entry.0 == bucket).count()
    }
}

/// Farm 0 intercepts what goes to 203.0.113.0/24 and to the VIP's network, but for this host's own 203.0.113.1; its servers are
/// in 10.0.0.0/24. And the same of IPv6, where near addresses count as own ones.
pub fn crossings() -> BTreeSet<(AddressSet, IpNet)> {
    let (taken, own, servers) = (AddressSet::intercepted(0), AddressSet::OWN, AddressSet::servers(0));
    let sets = [
        (
            taken,
            &["203.0.113.0/24", "192.0.2.0/24", "2001:db8:cafe::/48", "2001:db8:0:a::/64", "fe80::/10", "ff00::/8"][..],
        ),
        (own, &["203.0.113.1/32", "2001:db8:cafe::1/128", "fe80::/10", "ff00::/8"]),
        (servers, &["10.0.0.0/24", "fd00::/64", "fe80::/10"]),
    ];
    let net = |net: &&str| net.parse().expect("a prefix");
    sets.into_iter().flat_map(|(set, nets)| nets.iter().map(move |text| (set, net(text)))).collect()
}

/// Ports of other TCP services that share a bucket of the service table with [`WEB`].
pub fn ports_beside_web(count: usize) -> Vec<u16> {
    let bucket = |port| service_bucket(service(0, protocol::TCP, port, 0).key());
    let ports: Vec<u16> = (1024..=u16::MAX).filter(|&port| bucket(port) == bucket(WEB)).take(count).collect();
    assert_eq!(ports.len(), count, "too few ports share the bucket");
    ports
}

fn service(id: u16, protocol: u8, port: u16, flags: u16) -> Service {
    let class = if protocol == protocol::TCP { 0 } else { UDP_CLASS };
    Service {
        address: VIP,
        port: port.to_be_bytes(),
        protocol,
        state: 1,
        slots_base: u32::from(id - u16::from(id > 0)) * SLOTS_PER_SERVICE,
        slots_size: SLOTS_PER_SERVICE,
        seed: SEED,
        id: id | class,
        flags,
        farm: 0,
        vip: 0,
    }
}

/// Where a reply finds its VIP.
fn reply(number: u32, protocol: u8, port: u16) -> Service {
    Service {
        address: number.to_ne_bytes(),
        port: port.to_be_bytes(),
        protocol,
        state: REPLY,
        slots_base: u32::from_ne_bytes(VIP),
        ..Service::default()
    }
}

fn mapped([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    std::net::Ipv4Addr::new(a, b, c, d).to_ipv6_mapped().octets()
}

/// A server's record as its id says.
fn server(id: u32) -> Server {
    let flags = match id {
        STOPPED => ALIVE | REACHABLE,
        DEAD => REACHABLE,
        UNREACHABLE => ALIVE | ACCEPTS,
        _ => ALIVE | ACCEPTS | REACHABLE,
    };
    let port = match id {
        REMOTE | REMOTE_TUNNEL => 1,
        LOST_PORT => 9,
        _ => 0,
    };
    let forwarding = match id {
        TUNNEL | REMOTE_TUNNEL => GRE,
        TRANSLATED => LAYER_3,
        _ => LAYER_2,
    };
    Server {
        mac: mac(id),
        flags: flags | forwarding << FORWARDING_SHIFT,
        port,
        host: id as u16,
        address: mapped(address(id)),
        source: mapped(OWN_ADDRESS),
        mtu: MTU,
        ..Server::default()
    }
}
