//! The clients' end of the flows: packets.

use std::sync::LazyLock;

use necp_ebpf::{
    hash::{flow_buckets, flow_hash},
    packet::{Packet, protocol, tcp},
};
use necp_user::{control::config::FarmConfig, necp::message::Flows};

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

/// A set of flows by its number: of one client, of a few, or of all; of any protocol, or of one, or to one service.
pub fn flows(number: u8) -> Flows {
    let source = match number / 4 {
        client @ 0..CLIENTS => format!("198.51.100.{}/32", 1 + client),
        CLIENTS => "198.51.100.0/30".into(),
        9 => "198.51.100.4/30".into(),
        _ => "0.0.0.0/0".into(),
    };
    let source = source.parse().expect("a prefix");
    let (protocol, port) =
        [(0, 0), (protocol::TCP, 0), (protocol::TCP, TCP_PORT), (protocol::UDP, UDP_PORT)][usize::from(number % 4)];
    Flows { source, protocol, port, ..Flows::ALL }
}

/// Whether a packet is of these flows.
pub fn is_of(packet: &Packet, flows: &Flows) -> bool {
    let source = std::net::IpAddr::from(packet.source.to_ne_bytes());
    flows.source.contains(&source)
        && (flows.protocol == 0 || flows.protocol == packet.protocol)
        && (flows.port == 0 || flows.port.to_be() == packet.destination_port)
}

/// The clients' ports: such that no two tuples have the same first choice of [`AMPLE_BUCKETS`].
static PORTS: LazyLock<[u16; CLIENTS as usize]> = LazyLock::new(|| {
    let (seed, mut taken) = (FarmConfig::new(FARM).seed(), Vec::new());
    std::array::from_fn(|client| {
        let buckets = |port: &u16| {
            let tuples = [(protocol::TCP, TCP_PORT), (protocol::UDP, UDP_PORT)];
            tuples.map(|(protocol, service)| {
                let packet = tuple(client as u8, *port, protocol, service);
                flow_buckets(flow_hash(&packet, seed), AMPLE_BUCKETS as u32 - 1)[0]
            })
        };
        let free = |port: &u16| {
            let [tcp, udp] = buckets(port);
            tcp != udp && !taken.contains(&tcp) && !taken.contains(&udp)
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
