//! The clients' end of the flows: packets.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::LazyLock,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use necp_ebpf::{
    hash::{flow_buckets, flow_hash},
    packet::{Packet, protocol, tcp},
};
use necp_user::{
    control::config::FarmConfig,
    necp::message::{Family, Flows},
};

use super::world::Kind;

/// The VIP.
pub const VIP: [u8; 4] = [192, 0, 2, 10];
/// The TCP service's port.
pub const TCP_PORT: u16 = 80;
/// The UDP service's port.
pub const UDP_PORT: u16 = 53;
/// The farm's name.
pub const FARM: &str = "web";
/// In a flow table of at least this many buckets every tuple of every client has a first choice of its own.
pub const AMPLE_BUCKETS: usize = 32;
/// Clients, each with one TCP and one UDP tuple.
pub const CLIENTS: u8 = 8;

/// A TCP packet of a client.
pub fn segment(client: u8, flags: u8, sequence: u32, payload: u16) -> Packet {
    Packet { flags, sequence, payload, ..packet(client, protocol::TCP, TCP_PORT) }
}

/// A UDP packet of a client.
pub fn datagram(client: u8) -> Packet {
    packet(client, protocol::UDP, UDP_PORT)
}

/// A client's first word.
pub fn syn(client: u8, sequence: u32, payload: u16) -> Packet {
    segment(client, tcp::SYN, sequence, payload)
}

/// How many sets of flows an exception may be for.
pub const FLOWS: u8 = 4 * (CLIENTS + 3);

/// What comes before an IPv4 client's address in its IPv6 one.
pub const CLIENTS6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 7, 0, 0, 0, 0);

/// A set of flows by its number: of one client, of a few, or of all; of any protocol, or of one, or to one service. `six`: of IPv6.
pub fn flows(number: u8, six: bool) -> Flows {
    let (host, length) = match number / 4 {
        client @ 0..CLIENTS => (1 + client, 32),
        CLIENTS => (0, 30),
        9 => (4, 30),
        _ => (0, 0),
    };
    let address = Ipv4Addr::new(198, 51, 100, host);
    let source = match (six, length) {
        (false, 0) => IpNet::V4(Ipv4Net::default()),
        (true, 0) => IpNet::V6(Ipv6Net::default()),
        (false, _) => IpNet::new_assert(address.into(), length),
        (true, _) => {
            let address = Ipv6Addr::from_bits(CLIENTS6.to_bits() | u128::from(address.to_bits()));
            IpNet::new_assert(address.into(), 96 + length)
        }
    };
    let all = Flows::all(if six { Family::V6 } else { Family::V4 });
    let (protocol, port) =
        [(0, 0), (protocol::TCP, 0), (protocol::TCP, TCP_PORT), (protocol::UDP, UDP_PORT)][usize::from(number % 4)];
    Flows { source, protocol, port, ..all }
}

/// Whether a packet is of these flows.
pub fn is_of(packet: &Packet, flows: &Flows) -> bool {
    let four = Ipv4Addr::from(packet.source.to_ne_bytes());
    let source = match flows.source {
        IpNet::V4(_) => IpAddr::from(four),
        IpNet::V6(_) => Ipv6Addr::from_bits(CLIENTS6.to_bits() | u128::from(four.to_bits())).into(),
    };
    flows.source.contains(&source)
        && (flows.protocol == 0 || flows.protocol == packet.protocol)
        && (flows.port == 0 || flows.port.to_be() == packet.destination_port)
}

/// The clients' ports: such that no two tuples have the same first choice of [`AMPLE_BUCKETS`], in no kind of farm.
static PORTS: LazyLock<[u16; CLIENTS as usize]> = LazyLock::new(|| {
    let (seed, mut taken) = (FarmConfig::new(FARM).seed(), Vec::new());
    std::array::from_fn(|client| {
        let buckets = |port: &u16| {
            let services = [(protocol::TCP, TCP_PORT), (protocol::UDP, UDP_PORT)];
            let tuples = Kind::ALL.into_iter().flat_map(|kind| services.map(|service| (kind, service)));
            let bucket = |(kind, (protocol, service)): (Kind, (u8, u16))| {
                let flow = kind.named(&tuple(client as u8, *port, protocol, service), seed);
                (kind, flow_buckets(flow_hash(&flow, seed), AMPLE_BUCKETS as u32 - 1)[0])
            };
            tuples.map(bucket).collect::<Vec<_>>()
        };
        let free = |port: &u16| {
            let buckets = buckets(port);
            let apart = buckets.chunks(2).all(|pair| pair[0] != pair[1]);
            apart && !buckets.iter().any(|bucket| taken.contains(bucket))
        };
        let port = (40_000..).find(free).expect("there are more buckets than tuples");
        taken.extend(buckets(&port));
        port
    })
});

fn packet(client: u8, protocol: u8, port: u16) -> Packet {
    tuple(client, PORTS[usize::from(client)], protocol, port)
}

fn tuple(client: u8, source_port: u16, protocol: u8, port: u16) -> Packet {
    Packet {
        source: u32::from_ne_bytes([198, 51, 100, 1 + client]),
        destination: u32::from_ne_bytes(VIP),
        source_port: source_port.to_be(),
        destination_port: port.to_be(),
        protocol,
        ..Packet::default()
    }
}
