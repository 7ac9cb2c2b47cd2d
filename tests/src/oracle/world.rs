//! A network element without a network: the control plane and the packet path on host-side tables, and a clock of its own.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use ipnet::{Ipv4Net, Ipv6Net};
use necp_ebpf::{
    abi::{ALIVE, AddressSet, Server},
    flows::{FlowWord, State, find, flow_key},
    hash::{flow_buckets, flow_hash, fold6},
    host::{Owned, View},
    intercept,
    packet::{Packet, protocol},
    six,
    slot::SlotWord,
    steer::{Decision, steer, whose},
    tables::{Address6, Addresses6, Tables, halves},
    verdict::{REASONS, Reason},
};
use necp_user::{
    control::{
        cluster::{Cluster, Hop},
        collect::Collector,
        config::{ClusterConfig, FarmConfig, Forwarding, ServiceKey},
        plan::Plan,
    },
    necp::message::{Exception, Flows},
};

use super::clients::{CLIENTS6, FARM, TCP_PORT, UDP_PORT, VIP};

/// How many server elements there are.
pub const SERVERS: u8 = 5;
/// Half-open time.
pub const HALF_OPEN: Duration = Duration::from_secs(60);
/// Closing time.
pub const CLOSING: Duration = Duration::from_secs(120);
/// Idle time of TCP.
pub const TCP_IDLE: Duration = Duration::from_secs(600);
/// Idle time of UDP.
pub const UDP_IDLE: Duration = Duration::from_secs(180);
/// How long a server without a session keeps its flows.
pub const ORPHAN: Duration = Duration::from_secs(300);
const KEEPALIVE: Duration = Duration::from_secs(1);
/// Passes that take an entry from its last use to its end, and some more.
const PASSES: u32 = 40;

/// Where a packet went: a server element, or none (cut through).
pub type Place = Option<u8>;

/// The size of things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Slots of each of the two services; a prime.
    pub slots: u32,
    /// Buckets of the flow table; a power of two.
    pub buckets: usize,
    /// What farm it is.
    pub kind: Kind,
}

/// What kind of farm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It has an IPv4 VIP.
    Vip,
    /// It allows layer 3 too, so every flow is on record, or a candidate.
    Layer3,
    /// It takes what crosses the network element.
    Intercept,
    /// It has an IPv6 VIP.
    Six,
    /// It takes what of IPv6 crosses the network element.
    SixIntercept,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Vip, Self::Layer3, Self::Intercept, Self::Six, Self::SixIntercept];

    /// Its clients and servers have IPv6 addresses.
    pub const fn is_six(self) -> bool {
        matches!(self, Self::Six | Self::SixIntercept)
    }

    /// What it takes crosses the network element.
    pub const fn crosses(self) -> bool {
        matches!(self, Self::Intercept | Self::SixIntercept)
    }

    /// The packet with what names its flow in such a farm: [`clients`](super::clients) have IPv4 addresses, of which IPv6 ones are made.
    pub fn named(self, packet: &Packet, seed: u64) -> Packet {
        match self {
            Self::Vip | Self::Layer3 => *packet,
            Self::Intercept => intercept::named(packet, seed),
            Self::Six => {
                let digest = six::digest(source6(packet), packet.source_port, seed);
                named_by(digest, fold6(halves(VIP6.octets())), packet)
            }
            Self::SixIntercept => {
                let digest = six::intercept::digest_crossing(addresses6(packet), packet.source_port, seed);
                named_by(digest, 0, packet)
            }
        }
    }
}

fn named_by(digest: u64, destination: u32, packet: &Packet) -> Packet {
    Packet { source: digest as u32, source_port: (digest >> 32) as u16, destination, ..*packet }
}

/// The IPv6 VIP, or where what crosses the network element goes.
const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 10);

/// A client's IPv6 address: its IPv4 one in the last four bytes.
fn source6(packet: &Packet) -> Address6 {
    let [a, b, c, d] = packet.source.to_ne_bytes();
    halves(Ipv6Addr::from_bits(CLIENTS6.to_bits() | u128::from(u32::from_be_bytes([a, b, c, d]))).octets())
}

fn addresses6(packet: &Packet) -> Addresses6 {
    Addresses6 { source: source6(packet), destination: halves(VIP6.octets()) }
}

impl Size {
    /// Tables for [`World::new`]; they can be used again.
    pub fn tables(self) -> Owned {
        let mut tables = Owned::new(2 * self.slots as usize, IDS as usize, self.buckets).with_exceptions(256);
        if self.kind.crosses() {
            let four = |set, net: &str| {
                let net: Ipv4Net = net.parse().expect("a prefix");
                let words = [net.network(), net.netmask()].map(|address| u32::from_ne_bytes(address.octets()));
                (set, words[0], words[1])
            };
            let six = |set, net: &str| {
                let net: Ipv6Net = net.parse().expect("a prefix");
                (set, halves(net.network().octets()), halves(net.netmask().octets()))
            };
            let (taken, servers) = (AddressSet::intercepted(0), AddressSet::servers(0));
            tables.set_crossings(
                vec![four(taken, "192.0.2.0/24"), four(servers, "10.0.0.0/24")],
                vec![six(taken, "2001:db8:0:1::/64"), six(servers, "2001:db8:0:9::/64")],
            );
        }
        tables
    }
}

const IDS: u32 = 48;

/// Everything of the network element.
pub struct World<'a> {
    /// The tables.
    pub view: View<'a>,
    /// The control plane.
    pub cluster: Cluster,
    /// Now.
    pub now: Instant,
    /// Packets by reason.
    pub reasons: [u64; REASONS as usize],
    collector: Collector,
    kind: Kind,
    seed: u64,
    /// What forwarding type each server asks for with its next START.
    types: [Forwarding; SERVERS as usize],
}

impl<'a> World<'a> {
    /// A network element that no server has joined, on tables of this size; what is in them is wiped.
    pub fn new(size: Size, view: View<'a>, now: Instant) -> Self {
        wipe(&view);
        let mut farm = FarmConfig::new(FARM);
        farm.vips = vec![Ipv4Addr::from(VIP).into()];
        farm.services = vec![ServiceKey::new(protocol::TCP, TCP_PORT), ServiceKey::new(protocol::UDP, UDP_PORT)];
        farm.servers = vec!["10.0.0.0/24".parse().expect("a prefix")];
        (farm.table_size, farm.orphan_time, farm.tcp_idle, farm.udp_idle) = (size.slots, ORPHAN, TCP_IDLE, UDP_IDLE);
        farm.global_exceptions = true;
        match size.kind {
            Kind::Vip => {}
            Kind::Layer3 => farm.forwarding.push(Forwarding::Layer3),
            Kind::Intercept => {
                farm.vips.clear();
                farm.intercept = vec!["192.0.2.0/24".parse().expect("a prefix")];
            }
            Kind::Six => farm.vips = vec![VIP6.into()],
            Kind::SixIntercept => {
                farm.vips.clear();
                farm.intercept = vec!["2001:db8:0:1::/64".parse().expect("a prefix")];
            }
        }
        if size.kind.is_six() {
            farm.servers = vec!["2001:db8:0:9::/64".parse().expect("a prefix")];
        }
        let config = ClusterConfig {
            farms: vec![farm],
            keepalive: KEEPALIVE,
            slow_start: Duration::ZERO,
            closing: CLOSING,
            half_open: HALF_OPEN,
            slots: 2 * size.slots,
            servers: IDS,
            ..ClusterConfig::default()
        };
        let seed = config.farms[0].seed();
        let cluster = Cluster::new(config, now).expect("a valid configuration");
        let collector = Collector::new(now);
        let types = [Forwarding::Layer2; SERVERS as usize];
        let kind = size.kind;
        let mut world = Self { kind, view, cluster, now, reasons: [0; REASONS as usize], collector, seed, types };
        world.sync();
        world
    }

    /// A packet.
    pub fn steer(&mut self, packet: &Packet) -> Decision {
        let decision = match self.kind {
            Kind::Vip | Kind::Layer3 => steer(packet, &self.view),
            Kind::Intercept => intercept::steer(packet, &self.view),
            Kind::Six => six::steer(&without_addresses(packet), &self.six(packet)),
            Kind::SixIntercept => six::intercept::steer(&without_addresses(packet), &self.six(packet)),
        };
        self.reasons[decision.reason as usize] += 1;
        decision
    }

    /// From its next START on, the server asks for another forwarding type than it does now.
    pub fn change_type(&mut self, server: u8) {
        let types = &self.cluster.config().farms[0].forwarding;
        let now = self.types[usize::from(server)];
        let next = types.iter().position(|one| *one == now).map_or(0, |at| (at + 1) % types.len());
        self.types[usize::from(server)] = types[next];
    }

    /// The forwarding type of a server id, as it stands in its record.
    pub fn forwarding(&self, id: u32) -> u8 {
        self.view.server(id).map_or(0, |server| server.forwarding)
    }

    /// Whose flow an ICMP error that quotes this packet is about.
    pub fn whose(&self, packet: &Packet) -> Option<u32> {
        let whose = match self.kind {
            Kind::Vip | Kind::Layer3 => whose(packet, &self.view),
            Kind::Intercept => intercept::whose(packet, &self.view),
            Kind::Six => six::whose(&without_addresses(packet), &self.six(packet)),
            Kind::SixIntercept => six::intercept::whose(&without_addresses(packet), &self.six(packet)),
        };
        whose.map(|(server, _)| server)
    }

    /// The tables for an IPv6 packet of this client.
    fn six(&self, packet: &Packet) -> View<'a> {
        self.view.six(addresses6(packet)).expect("a view always has room for them")
    }

    /// Where a decision sends its packet; none if that is no server.
    pub fn place(&self, decision: &Decision) -> Place {
        let server = self.view.server(decision.server).filter(|_| decision.server > necp_ebpf::abi::DIRECT)?;
        let [.., host] = server.address;
        assert_eq!(server.address, octets(self.address(host - 1)), "server id {} has a record", decision.server);
        Some(host - 1)
    }

    /// Whether a server has a slot of the packet's service: one of little weight may have none.
    pub fn has_slots(&self, server: u8, packet: &Packet) -> bool {
        let owners = self.view.slots().iter().filter_map(|slot| self.view.server(SlotWord(slot.load()).owner()));
        let wanted = octets(self.address(server));
        owners.into_iter().any(|owner| owner.protocol == packet.protocol && owner.address == wanted)
    }

    /// What has been decided gets into the maps.
    pub fn sync(&mut self) {
        let applied = self.cluster.sync(&self.view, self.now);
        assert!(applied.errors.is_empty(), "{:?}", applied.errors);
    }

    /// Time passes, and nobody collects.
    pub fn wait(&mut self, time: Duration) {
        self.now += time;
        self.sync();
    }

    /// Time passes, and user space collects all the while.
    pub fn rest(&mut self, time: Duration) {
        for _ in 0..PASSES {
            self.now += time / PASSES;
            self.sync();
            self.collect();
        }
    }

    /// One full collection.
    pub fn collect(&mut self) {
        let unrecorded = self.reasons[Reason::Legacy as usize] + self.reasons[Reason::NewUnrecorded as usize];
        self.collector.run(&self.view, &mut self.cluster, self.now, unrecorded);
        self.sync();
    }

    /// INIT unless there is a session, START of both services, a perfect health index. `session`: there is one.
    pub fn start(&mut self, server: u8, session: bool) {
        let (address, now) = (self.address(server), self.now);
        self.cluster.host_reachable(address, self.hop(server), now);
        if !session {
            self.cluster.init(address, true, now).expect("it may join");
        }
        for (protocol, port) in SERVICES {
            let forwarding = self.types[usize::from(server)];
            self.cluster.start(address, forwarding, protocol, port, now).expect("it may start");
            self.cluster.health(address, protocol, port, 100, now);
        }
        self.sync();
    }

    /// STOP of both services.
    pub fn stop(&mut self, server: u8) {
        self.begin_stop(server);
        self.sync();
    }

    /// STOP of both services, of which only the server's records have been written yet.
    pub fn begin_stop(&mut self, server: u8) {
        for (protocol, port) in SERVICES {
            self.cluster.stop(self.address(server), protocol, port, self.now);
        }
        let plan = Plan { tables: Vec::new(), services: Vec::new(), ..self.cluster.plan(self.now) };
        let applied = plan.apply(&self.view, self.cluster.ledger_mut(), self.now);
        assert!(applied.errors.is_empty(), "{:?}", applied.errors);
    }

    /// A health index of both services.
    pub fn health(&mut self, server: u8, index: u8) {
        for (protocol, port) in SERVICES {
            self.cluster.health(self.address(server), protocol, port, index, self.now);
        }
        self.sync();
    }

    /// EXCEPTION_ADD of a server with a session.
    pub fn except(&mut self, server: u8, exception: &Exception) {
        self.cluster.except_add(self.address(server), exception, self.now).expect("there is room for all");
        self.sync();
    }

    /// EXCEPTION_DEL.
    pub fn unexcept(&mut self, server: u8, flows: &Flows) {
        self.cluster.except_del(self.address(server), flows, self.now).expect("they are of its family");
        self.sync();
    }

    /// EXCEPTION_RESET.
    pub fn except_reset(&mut self, server: u8) {
        self.cluster.except_reset(self.address(server), self.now);
        self.sync();
    }

    /// Its session is lost. Never more than one within a keepalive interval: that would be a panic.
    pub fn lose_session(&mut self, server: u8) {
        self.now += 2 * KEEPALIVE;
        self.cluster.session_lost(self.address(server), self.now);
        self.sync();
    }

    /// Its next hop is not known.
    pub fn neighbour_lost(&mut self, server: u8) {
        self.cluster.host_unreachable(self.address(server), self.now);
        self.sync();
    }

    /// Its next hop is known.
    pub fn neighbour_found(&mut self, server: u8) {
        self.cluster.host_reachable(self.address(server), self.hop(server), self.now);
        self.sync();
    }

    /// Its neighbour entry is FAILED.
    pub fn host_gone(&mut self, server: u8) {
        self.cluster.host_gone(self.address(server), self.now);
        self.sync();
        // With many servers a death waits until it cannot be the beginning of a panic.
        self.wait(2 * KEEPALIVE);
    }

    /// Whether flows of this id may still go there, as the packet path sees it.
    pub fn is_alive(&self, id: u32) -> bool {
        id <= necp_ebpf::abi::DIRECT || self.view.server(id).is_some_and(|server| server.flags & ALIVE != 0)
    }

    /// The flow's record, if there is one.
    pub fn record(&self, packet: &Packet) -> Option<FlowWord> {
        let [_, record] = self.entries(packet);
        Some(record).filter(|word| word.state() == State::Record)
    }

    /// Whether the flow table knows this very SYN.
    pub fn knows_syn(&self, packet: &Packet) -> bool {
        let known = |word: FlowWord| {
            word.state() != State::Empty && self.is_alive(word.server()) && word.isn() == packet.sequence
        };
        self.entries(packet).into_iter().any(known)
    }

    /// All that the flow table and the slot say of a flow.
    pub fn trace(&self, packet: &Packet) -> ([FlowWord; 2], Vec<u64>) {
        (self.entries(packet), self.view.slots().iter().map(|slot| slot.load()).collect())
    }

    fn entries(&self, packet: &Packet) -> [FlowWord; 2] {
        let flow = self.kind.named(packet, self.seed);
        let buckets = flow_buckets(flow_hash(&flow, self.seed), self.view.flow_mask());
        let found = find(&self.view, buckets, flow_key(&flow, self.service_id(packet)));
        [found.candidate.value, found.record.value]
    }

    /// What is left of any flow: entries, legacies, tracked slots. None: nothing.
    pub fn remains(&self) -> Option<String> {
        let entries = self.view.flows().iter().flat_map(|bucket| &bucket.entries);
        let left: Vec<String> = entries
            .filter(|entry| entry.word.load() != 0 || entry.key.load() != 0)
            .map(|entry| format!("{:#x} {:?}", entry.key.load(), FlowWord(entry.word.load())))
            .collect();
        let slots = self.view.slots().iter().map(|slot| SlotWord(slot.load())).filter(|slot| !slot.is_plain());
        let slots: Vec<SlotWord> = slots.collect();
        (!left.is_empty() || !slots.is_empty()).then(|| format!("entries {left:?}, slots that are not plain {slots:?}"))
    }

    /// A server's address.
    fn address(&self, server: u8) -> IpAddr {
        self.host(1 + server)
    }

    fn host(&self, number: u8) -> IpAddr {
        if self.kind.is_six() {
            return Ipv6Addr::new(0x2001, 0xdb8, 0, 9, 0, 0, 0, number.into()).into();
        }
        [10, 0, 0, number].into()
    }

    fn hop(&self, server: u8) -> Hop {
        Hop { mac: [2, 0, 0, 0, 1, server], port: 0, source: self.host(254), mtu: 1500 }
    }

    fn service_id(&self, packet: &Packet) -> u16 {
        let layout = self.cluster.layout();
        let frontend = layout.frontends.iter().find(|f| layout.services[f.service].key.protocol == packet.protocol);
        frontend.expect("both services are there").id
    }
}

const SERVICES: [(u8, u16); 2] = [(protocol::TCP, TCP_PORT), (protocol::UDP, UDP_PORT)];

fn without_addresses(packet: &Packet) -> Packet {
    Packet { source: 0, destination: 0, ..*packet }
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn wipe(view: &View<'_>) {
    view.clear_exceptions();
    for slot in view.slots() {
        slot.store(0);
    }
    for entry in view.flows().iter().flat_map(|bucket| &bucket.entries) {
        entry.word.store(0);
        entry.key.store(0);
    }
    for id in 0..view.server_count() as u32 {
        view.set_server(id, &Server::default());
    }
}
