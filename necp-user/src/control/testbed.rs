//! A cluster on tables in memory, on a clock of its own.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use necp_ebpf::{
    abi::{self, Server},
    host::{Owned, View},
    packet::{Packet, protocol, tcp},
    slot::SlotWord,
    steer::{Decision, steer},
};

use super::{
    cluster::{Change, Cluster, Hop},
    collect::{Collected, Collector},
    config::{ClusterConfig, FarmConfig, Forwarding, ServiceKey},
    ids::OfferKey,
    plan::Applied,
    status::{ServerState, ServerStatus},
};

pub(super) const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);

pub(super) struct Bed {
    pub(super) view: View<'static>,
    pub(super) cluster: Cluster,
    pub(super) collector: Collector,
    pub(super) now: Instant,
}

/// The address of a server by its number.
pub(super) fn se(number: u8) -> IpAddr {
    [10, 0, 0, number].into()
}

/// The IPv6 address of a server by its number.
pub(super) fn se6(number: u8) -> IpAddr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()).into()
}

/// The farm's IPv6 VIPs, if it has some.
pub(super) const VIPS6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 10), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 11)];

/// Where a server is.
pub(super) fn hop(number: u8) -> Hop {
    Hop { mac: [2, 0, 0, 0, 0, number], port: 1, source: [10, 0, 0, 254].into(), mtu: 1500 }
}

/// One farm with tcp/80 and udp/53, 11 slots each.
pub(super) fn config() -> ClusterConfig {
    let mut farm = FarmConfig::new("web");
    farm.vips = vec![VIP.into(), [192, 0, 2, 11].into()];
    farm.services = vec![ServiceKey::new(protocol::TCP, 80), ServiceKey::new(protocol::UDP, 53)];
    farm.servers = vec!["10.0.0.0/24".parse().expect("a prefix")];
    farm.table_size = 11;
    let everything = vec![Forwarding::Layer2, Forwarding::Gre, Forwarding::Layer3];
    ClusterConfig {
        farms: vec![farm],
        slots: 64,
        servers: 32,
        slow_start: Duration::ZERO,
        implemented: everything,
        ..ClusterConfig::default()
    }
}

/// The same with IPv6 VIPs and servers.
pub(super) fn config_of_both() -> ClusterConfig {
    let mut config = config();
    config.farms[0].vips.extend(VIPS6.map(IpAddr::V6));
    config.farms[0].servers.push("2001:db8::/64".parse().expect("a prefix"));
    config
}

impl Bed {
    pub(super) fn new() -> Self {
        Self::with(config())
    }

    pub(super) fn with(config: ClusterConfig) -> Self {
        let view = Box::leak(Box::new(Owned::new(config.slots as usize, config.servers as usize, 64))).view();
        Self::on(view, config, Instant::now())
    }

    /// A cluster of another process on the same tables.
    pub(super) fn on(view: View<'static>, config: ClusterConfig, now: Instant) -> Self {
        let cluster = Cluster::new(config, now).expect("a valid configuration");
        Self { view, cluster, collector: Collector::new(now), now }
    }

    pub(super) fn sync(&mut self) -> Applied {
        let applied = self.cluster.sync(&self.view, self.now);
        assert_eq!(applied.errors, [], "every write succeeds");
        applied
    }

    pub(super) fn wait(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        self.sync();
    }

    pub(super) fn collect(&mut self) -> Collected {
        let collected = self.collector.run(&self.view, &mut self.cluster, self.now, 0).clone();
        self.sync();
        collected
    }

    /// Lets a time pass with all collections that are due.
    pub(super) fn collect_for(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.wait(1);
            self.collect();
        }
    }

    /// INIT, with its next hop known.
    pub(super) fn join(&mut self, number: u8) -> Change {
        let change = self.cluster.init(se(number), true, self.now).expect("it may join");
        self.reach(number);
        change
    }

    pub(super) fn reach(&mut self, number: u8) {
        self.cluster.host_reachable(se(number), hop(number), self.now);
    }

    pub(super) fn start(&mut self, number: u8) -> Change {
        let change = self.cluster.start(se(number), Forwarding::Layer2, protocol::TCP, 80, self.now);
        change.expect("it may start")
    }

    /// INIT and START of tcp/80; its id.
    pub(super) fn serve(&mut self, number: u8) -> u32 {
        self.join(number);
        self.start(number);
        self.sync();
        self.id(number)
    }

    /// INIT and START of tcp/80 over IPv6; its id.
    pub(super) fn serve6(&mut self, number: u8) -> u32 {
        let (address, now) = (se6(number), self.now);
        self.cluster.init(address, true, now).expect("it may join");
        self.cluster.host_reachable(address, hop(number), now);
        self.cluster.start(address, Forwarding::Layer2, protocol::TCP, 80, now).expect("it may start");
        self.sync();
        self.id_at(address)
    }

    pub(super) fn stop(&mut self, number: u8) {
        self.cluster.stop(se(number), protocol::TCP, 80, self.now);
        self.sync();
    }

    pub(super) fn health(&mut self, number: u8, index: u8) {
        self.cluster.health(se(number), protocol::TCP, 80, index, self.now);
        self.sync();
    }

    pub(super) fn lose(&mut self, number: u8) {
        self.cluster.session_lost(se(number), self.now);
        self.sync();
    }

    pub(super) fn kill(&mut self, number: u8) {
        self.cluster.host_gone(se(number), self.now);
        self.lose(number);
    }

    pub(super) fn id(&self, number: u8) -> u32 {
        self.id_at(se(number))
    }

    fn id_at(&self, address: IpAddr) -> u32 {
        let service = ServiceKey::new(protocol::TCP, 80);
        let key = OfferKey { farm: 0, address, service, forwarding: Forwarding::Layer2 };
        self.cluster.id_of(&key).expect("it has an id")
    }

    pub(super) fn server(&self, id: u32) -> Server {
        self.view.server(id).expect("an id within the map")
    }

    pub(super) fn accepts(&self, id: u32) -> bool {
        self.server(id).flags & abi::ACCEPTS != 0
    }

    pub(super) fn status(&self, id: u32) -> ServerStatus {
        let servers = self.cluster.snapshot().farms.into_iter().flat_map(|farm| farm.services);
        let mut servers = servers.flat_map(|service| service.servers).filter(|server| server.id == id);
        servers.next().expect("a server with this id")
    }

    pub(super) fn state(&self, id: u32) -> ServerState {
        self.status(id).state
    }

    /// The slots of a service.
    pub(super) fn slots(&self, service: usize) -> Vec<SlotWord> {
        let placed = &self.cluster.layout().services[service];
        let range = placed.base as usize..(placed.base + placed.size) as usize;
        self.view.slots()[range].iter().map(|slot| SlotWord(slot.load())).collect()
    }

    /// How many slots of tcp/80 an id owns.
    pub(super) fn owned(&self, id: u32) -> usize {
        self.slots(0).iter().filter(|slot| slot.owner() == id).count()
    }

    /// A packet of a client, by its source port.
    pub(super) fn send(&self, client: u16, flags: u8, sequence: u32) -> Decision {
        let packet = Packet {
            source: 0x0100_000b,
            destination: u32::from_ne_bytes(VIP.octets()),
            source_port: client,
            destination_port: 80_u16.to_be(),
            protocol: protocol::TCP,
            flags,
            payload: 0,
            sequence,
        };
        steer(&packet, &self.view)
    }

    /// SYN and ACK; the server.
    pub(super) fn connect(&self, client: u16) -> u32 {
        let server = self.send(client, tcp::SYN, 1000).server;
        assert_eq!(self.data(client), server, "the ACK goes where the SYN went");
        server
    }

    pub(super) fn data(&self, client: u16) -> u32 {
        self.send(client, tcp::ACK, 1001).server
    }

    pub(super) fn udp(&self, client: u16) -> u32 {
        let packet = Packet {
            source: 0x0100_000b,
            destination: u32::from_ne_bytes(VIP.octets()),
            source_port: client,
            destination_port: 53_u16.to_be(),
            protocol: protocol::UDP,
            ..Packet::default()
        };
        steer(&packet, &self.view).server
    }
}
