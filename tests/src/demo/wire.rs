//! What the frames at the balancer's port say: which new connection was placed where, and what was agreed by NECP.
//!
//! The port is where a client's SYN arrives (sent by the switch) and where it leaves for a server (received by the
//! switch, with that server's hardware address), and where every NECP message passes: one clock for all of them.

use std::{collections::HashMap, net::SocketAddrV4};

use crate::{
    capture::{Captured, WallTime},
    daemon::NECP_PORT,
    frame::{self, Seen},
};

/// Something that was seen on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// When.
    pub at: WallTime,
    /// What.
    pub what: What,
}

/// What was seen. Servers are numbered from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A SYN came to the balancer.
    SynArrived {
        /// The client's end.
        client: SocketAddrV4,
        /// Initial sequence number: retransmissions have the same, another connection has not.
        isn: u32,
    },
    /// A SYN left the balancer for a server.
    SynPlaced {
        /// The client's end.
        client: SocketAddrV4,
        /// Initial sequence number.
        isn: u32,
        /// The server whose hardware address it bears.
        server: usize,
    },
    /// A server's START on its way to the balancer.
    Start {
        /// Who sent it.
        server: usize,
    },
    /// A START_ACK on its way to a server.
    StartAck {
        /// Who gets it.
        server: usize,
    },
    /// A STOP_ACK on its way to a server, microseconds before it is there.
    StopAck {
        /// Who gets it.
        server: usize,
    },
    /// The first FIN or RST of a server's present NECP connection, by either side.
    SessionClosed {
        /// Whose session it is.
        server: usize,
    },
}

/// Reads frames one after the other.
#[derive(Debug)]
pub struct Wire {
    service: SocketAddrV4,
    /// Hardware and IP address of each server.
    servers: Vec<([u8; 6], std::net::Ipv4Addr)>,
    sessions: HashMap<usize, Session>,
}

/// The last NECP connection that a server has opened.
#[derive(Debug)]
struct Session {
    port: u16,
    to_ne: Stream,
    to_se: Stream,
    closed: bool,
}

impl Wire {
    /// For the clients of `service`, and servers with these addresses.
    pub fn new(service: SocketAddrV4, servers: Vec<([u8; 6], std::net::Ipv4Addr)>) -> Self {
        Self { service, servers, sessions: HashMap::new() }
    }

    /// What a frame at the switch's port to the balancer says; `to_ne` for those that the switch sends there.
    pub fn read(&mut self, captured: &Captured) -> Vec<Observation> {
        let Some(seen) = frame::parse(&captured.frame) else { return Vec::new() };
        let what = if seen.flow.destination == self.service {
            self.connection(&seen, captured.outgoing).into_iter().collect()
        } else {
            self.control(&seen)
        };
        what.into_iter().map(|what| Observation { at: captured.at, what }).collect()
    }

    fn connection(&self, seen: &Seen, to_ne: bool) -> Option<What> {
        let tcp = seen.tcp.as_ref().filter(|tcp| tcp.syn && !tcp.ack)?;
        let (client, isn) = (seen.flow.source, tcp.sequence_number);
        if to_ne {
            return Some(What::SynArrived { client, isn });
        }
        let server = self.servers.iter().position(|(mac, _)| *mac == seen.flow.destination_mac)?;
        Some(What::SynPlaced { client, isn, server })
    }

    fn control(&mut self, seen: &Seen) -> Vec<What> {
        let Some(tcp) = &seen.tcp else { return Vec::new() };
        let (to_ne, peer) = match (seen.flow.source, seen.flow.destination) {
            (peer, ne) if ne.port() == NECP_PORT => (true, peer),
            (ne, peer) if ne.port() == NECP_PORT => (false, peer),
            _ => return Vec::new(),
        };
        let Some(server) = self.servers.iter().position(|(_, address)| address == peer.ip()) else { return Vec::new() };
        if to_ne && tcp.syn {
            let repeated = self.sessions.get(&server).is_some_and(|session| session.port == peer.port());
            if !repeated {
                let session =
                    Session { port: peer.port(), to_ne: Stream::default(), to_se: Stream::default(), closed: false };
                self.sessions.insert(server, session);
            }
        }
        let Some(session) = self.sessions.get_mut(&server).filter(|session| session.port == peer.port()) else {
            return Vec::new();
        };
        let stream = if to_ne { &mut session.to_ne } else { &mut session.to_se };
        let opcodes = stream.take(tcp.sequence_number.wrapping_add(u32::from(tcp.syn)), &seen.payload);
        let mut what: Vec<What> = opcodes.into_iter().filter_map(|opcode| message(to_ne, opcode, server)).collect();
        if (tcp.fin || tcp.rst) && !std::mem::replace(&mut session.closed, true) {
            what.push(What::SessionClosed { server });
        }
        what
    }
}

/// draft §5.3
fn message(to_ne: bool, opcode: u8, server: usize) -> Option<What> {
    match (to_ne, opcode) {
        (true, 0x05) => Some(What::Start { server }),
        (false, 0x06) => Some(What::StartAck { server }),
        (false, 0x08) => Some(What::StopAck { server }),
        _ => None,
    }
}

/// One direction of a TCP connection that carries NECP.
#[derive(Debug, Default)]
struct Stream {
    next: Option<u32>,
    bytes: Vec<u8>,
}

impl Stream {
    /// Adds a segment, and returns the opcodes of the messages that are complete now.
    fn take(&mut self, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let next = *self.next.get_or_insert(sequence);
        let known = next.wrapping_sub(sequence) as usize;
        match payload.get(known..) {
            Some(new) => {
                self.bytes.extend_from_slice(new);
                self.next = Some(next.wrapping_add(new.len() as u32));
            }
            // Behind a gap, since the frame before was lost on its way: it begins with a message more often than not.
            None if known > u32::MAX as usize / 2 => {
                self.bytes = payload.to_vec();
                self.next = Some(sequence.wrapping_add(payload.len() as u32));
            }
            // Sent again.
            None => {}
        }
        let mut opcodes = Vec::new();
        while let Some((opcode, length)) = header(&self.bytes) {
            if self.bytes.len() < length {
                break;
            }
            opcodes.push(opcode);
            self.bytes.drain(..length);
        }
        opcodes
    }
}

/// Opcode and length of the message, header included (draft §5.2).
fn header(bytes: &[u8]) -> Option<(u8, usize)> {
    let header: &[u8; 20] = bytes.first_chunk()?;
    let [.., a, b, c, d] = *header;
    Some((header[5], 20 + u32::from_be_bytes([a, b, c, d]) as usize)).filter(|_| header.starts_with(b"AJ"))
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use super::*;
    use crate::frame::{Flow, flags};

    const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 11], [2, 0, 0, 0, 0, 12]];
    const NE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const SE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 12);
    const VIP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 10), 80);
    const CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 2), 4000);

    fn wire() -> Wire {
        Wire::new(VIP, vec![(MACS[0], Ipv4Addr::new(10, 0, 0, 11)), (MACS[1], SE)])
    }

    fn flow(source: SocketAddrV4, destination: SocketAddrV4, destination_mac: [u8; 6]) -> Flow {
        Flow { source_mac: [2; 6], destination_mac, source, destination, ttl: 64 }
    }

    fn read(wire: &mut Wire, outgoing: bool, frame: Vec<u8>) -> Vec<What> {
        let seen = wire.read(&Captured { at: Duration::from_secs(7), outgoing, frame });
        seen.into_iter().map(|observation| observation.what).collect()
    }

    fn necp(opcode: u8, units: usize) -> Vec<u8> {
        let mut bytes = vec![0; 20 + 32 * units];
        bytes[..6].copy_from_slice(&[b'A', b'J', 0, 1, 1, opcode]);
        bytes[16..20].copy_from_slice(&(32 * units as u32).to_be_bytes());
        bytes
    }

    #[test]
    fn a_syn_arrives_and_is_placed() {
        let mut wire = wire();
        let syn = |mac| flow(CLIENT, VIP, mac).tcp(flags::SYN, 42, 0, b"");
        let arrived = What::SynArrived { client: CLIENT, isn: 42 };
        assert_eq!(read(&mut wire, true, syn(NE_MAC)), [arrived]);
        assert_eq!(read(&mut wire, false, syn(MACS[1])), [What::SynPlaced { client: CLIENT, isn: 42, server: 1 }]);
        assert_eq!(read(&mut wire, false, syn([9; 6])), []);
        assert_eq!(read(&mut wire, true, flow(CLIENT, VIP, NE_MAC).tcp(flags::SYN | flags::ACK, 42, 0, b"")), []);
    }

    #[test]
    fn necp_is_read_however_it_is_cut() {
        let (se, ne) = (SocketAddrV4::new(SE, 5000), SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), NECP_PORT));
        let (up, down) = (flow(se, ne, NE_MAC), flow(ne, se, MACS[1]));
        let mut wire = wire();
        assert_eq!(read(&mut wire, true, up.tcp(flags::SYN, 99, 0, b"")), []);
        assert_eq!(read(&mut wire, false, down.tcp(flags::SYN | flags::ACK, 499, 100, b"")), []);
        let bytes = [necp(0x01, 1), necp(0x05, 2)].concat();
        assert_eq!(read(&mut wire, true, up.tcp(flags::ACK, 100, 0, &bytes[..60])), []);
        assert_eq!(read(&mut wire, true, up.tcp(flags::ACK, 100, 0, &bytes[..60])), [], "sent again");
        assert_eq!(read(&mut wire, true, up.tcp(flags::ACK, 150, 0, &bytes[50..])), [What::Start { server: 1 }]);
        let bytes = [necp(0x06, 0), necp(0x08, 0)].concat();
        assert_eq!(
            read(&mut wire, false, down.tcp(flags::ACK, 500, 0, &bytes)),
            [What::StartAck { server: 1 }, What::StopAck { server: 1 }]
        );
        assert_eq!(
            read(&mut wire, false, down.tcp(flags::ACK, 900, 0, &necp(0x08, 0))),
            [What::StopAck { server: 1 }],
            "a gap before it"
        );
    }

    #[test]
    fn a_session_closes_once_and_an_older_one_counts_no_more() {
        let ne = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), NECP_PORT);
        let [old, new] = [5000, 5001].map(|port| flow(SocketAddrV4::new(SE, port), ne, NE_MAC));
        let mut wire = wire();
        read(&mut wire, true, old.tcp(flags::SYN, 1, 0, b""));
        assert_eq!(
            read(&mut wire, true, old.tcp(flags::FIN | flags::ACK, 2, 0, b"")),
            [What::SessionClosed { server: 1 }]
        );
        assert_eq!(read(&mut wire, true, old.tcp(flags::RST, 3, 0, b"")), []);
        read(&mut wire, true, new.tcp(flags::SYN, 1, 0, b""));
        assert_eq!(read(&mut wire, true, old.tcp(flags::RST, 3, 0, b"")), []);
        assert_eq!(read(&mut wire, true, new.tcp(flags::RST, 2, 0, b"")), [What::SessionClosed { server: 1 }]);
    }
}
