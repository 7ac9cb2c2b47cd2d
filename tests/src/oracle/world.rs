//! A network element without a network: the control plane and the packet path on host-side tables, and a clock of its own.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use necp_ebpf::{
    abi::{ALIVE, Server},
    flows::{FlowWord, State, find, flow_key},
    hash::{flow_buckets, flow_hash},
    host::{Owned, View},
    packet::{Packet, protocol},
    slot::SlotWord,
    steer::{Decision, steer, whose},
    tables::Tables,
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

use super::clients::{FARM, TCP_PORT, UDP_PORT, VIP};

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
    /// The farm allows layer 3, so every flow is on record, or a candidate.
    pub layer_3: bool,
}

impl Size {
    /// Tables for [`World::new`]; they can be used again.
    pub fn tables(self) -> Owned {
        Owned::new(2 * self.slots as usize, IDS as usize, self.buckets).with_exceptions(256)
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
        if size.layer_3 {
            farm.forwarding.push(Forwarding::Layer3);
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
        let mut world = Self { view, cluster, now, reasons: [0; REASONS as usize], collector, seed, types };
        world.sync();
        world
    }

    /// A packet.
    pub fn steer(&mut self, packet: &Packet) -> Decision {
        let decision = steer(packet, &self.view);
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
        whose(packet, &self.view).map(|(server, _)| server)
    }

    /// Where a decision sends its packet; none if that is no server.
    pub fn place(&self, decision: &Decision) -> Place {
        let server = self.view.server(decision.server).filter(|_| decision.server > necp_ebpf::abi::DIRECT)?;
        let [.., net, host] = server.address;
        assert_eq!(net, 0, "server id {} has a record: {server:?}", decision.server);
        Some(host - 1)
    }

    /// Whether a server has a slot of the packet's service: one of little weight may have none.
    pub fn has_slots(&self, server: u8, packet: &Packet) -> bool {
        let owners = self.view.slots().iter().filter_map(|slot| self.view.server(SlotWord(slot.load()).owner()));
        let wanted = Ipv4Addr::new(10, 0, 0, 1 + server).to_ipv6_mapped().octets();
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
        let (address, now) = (address(server), self.now);
        self.cluster.host_reachable(address, hop(server), now);
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
            self.cluster.stop(address(server), protocol, port, self.now);
        }
        let plan = Plan { tables: Vec::new(), services: Vec::new(), ..self.cluster.plan(self.now) };
        let applied = plan.apply(&self.view, self.cluster.ledger_mut(), self.now);
        assert!(applied.errors.is_empty(), "{:?}", applied.errors);
    }

    /// A health index of both services.
    pub fn health(&mut self, server: u8, index: u8) {
        for (protocol, port) in SERVICES {
            self.cluster.health(address(server), protocol, port, index, self.now);
        }
        self.sync();
    }

    /// EXCEPTION_ADD of a server with a session.
    pub fn except(&mut self, server: u8, exception: &Exception) {
        self.cluster.except_add(address(server), exception, self.now).expect("there is room for all");
        self.sync();
    }

    /// EXCEPTION_DEL.
    pub fn unexcept(&mut self, server: u8, flows: &Flows) {
        self.cluster.except_del(address(server), flows, self.now).expect("they are IPv4");
        self.sync();
    }

    /// EXCEPTION_RESET.
    pub fn except_reset(&mut self, server: u8) {
        self.cluster.except_reset(address(server), self.now);
        self.sync();
    }

    /// Its session is lost. Never more than one within a keepalive interval: that would be a panic.
    pub fn lose_session(&mut self, server: u8) {
        self.now += 2 * KEEPALIVE;
        self.cluster.session_lost(address(server), self.now);
        self.sync();
    }

    /// Its next hop is not known.
    pub fn neighbour_lost(&mut self, server: u8) {
        self.cluster.host_unreachable(address(server), self.now);
        self.sync();
    }

    /// Its next hop is known.
    pub fn neighbour_found(&mut self, server: u8) {
        self.cluster.host_reachable(address(server), hop(server), self.now);
        self.sync();
    }

    /// Its neighbour entry is FAILED.
    pub fn host_gone(&mut self, server: u8) {
        self.cluster.host_gone(address(server), self.now);
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
        let buckets = flow_buckets(flow_hash(packet, self.seed), self.view.flow_mask());
        let found = find(&self.view, buckets, flow_key(packet, self.service_id(packet)));
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

    fn service_id(&self, packet: &Packet) -> u16 {
        let layout = self.cluster.layout();
        let frontend = layout.frontends.iter().find(|f| layout.services[f.service].key.protocol == packet.protocol);
        frontend.expect("both services are there").id
    }
}

const SERVICES: [(u8, u16); 2] = [(protocol::TCP, TCP_PORT), (protocol::UDP, UDP_PORT)];

fn address(server: u8) -> IpAddr {
    [10, 0, 0, 1 + server].into()
}

fn hop(server: u8) -> Hop {
    Hop { mac: [2, 0, 0, 0, 1, server], port: 0, source: [10, 0, 0, 254].into(), mtu: 1500 }
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
