//! Frames as a client would send them, and as nobody should: every field can be given a value of its own.

use necp_ebpf::packet::{Packet, protocol, tcp};
use necp_tests::kernel::OWN_MAC;

/// A client's MAC address.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 8, 8];
/// The address of all services.
pub const VIP: [u8; 4] = [192, 0, 2, 10];

/// TCP flags as they stand in the header (RFC 9293 §3.1).
pub const PSH: u8 = 0x08;

/// A flow: who to which port of the VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    pub source: [u8; 4],
    pub source_port: u16,
    pub destination: [u8; 4],
    pub port: u16,
    pub protocol: u8,
}

/// The client that most cases are about, on the plain TCP service.
pub const WEB_FLOW: Flow =
    Flow { source: [198, 51, 100, 1], source_port: 40000, destination: VIP, port: 80, protocol: protocol::TCP };

impl Flow {
    /// The same client on another port of the VIP.
    pub const fn on(self, protocol: u8, port: u16) -> Self {
        Self { protocol, port, ..self }
    }

    /// What this server replies to it.
    pub const fn from_server(self, server: [u8; 4]) -> Self {
        Self {
            source: server,
            source_port: self.port,
            destination: self.source,
            port: self.source_port,
            protocol: self.protocol,
        }
    }

    /// What the packet path makes of it.
    pub fn packet(self) -> Packet {
        Packet {
            source: u32::from_ne_bytes(self.source),
            destination: u32::from_ne_bytes(self.destination),
            source_port: self.source_port.to_be(),
            destination_port: self.port.to_be(),
            protocol: self.protocol,
            ..Packet::default()
        }
    }

    pub fn syn(self, isn: u32) -> Spec {
        self.tcp(tcp::SYN, isn, b"")
    }

    pub fn ack(self, sequence: u32) -> Spec {
        self.tcp(tcp::ACK, sequence, b"")
    }

    pub fn data(self, sequence: u32) -> Spec {
        self.tcp(tcp::ACK | PSH, sequence, b"hello")
    }

    pub fn fin(self, sequence: u32) -> Spec {
        self.tcp(tcp::ACK | tcp::FIN, sequence, b"")
    }

    pub fn rst(self, sequence: u32) -> Spec {
        self.tcp(tcp::RST, sequence, b"")
    }

    pub fn tcp(self, flags: u8, sequence: u32, payload: &[u8]) -> Spec {
        Spec { flags, sequence, payload: payload.to_vec(), ..Spec::new(self) }
    }

    pub fn udp(self, payload: &[u8]) -> Spec {
        Spec { payload: payload.to_vec(), ..Spec::new(self) }
    }
}

/// A frame to be; `None` means the right value.
#[derive(Clone, Debug)]
pub struct Spec {
    pub to_mac: [u8; 6],
    pub ether_type: u16,
    pub version: u8,
    pub ihl: Option<u8>,
    pub ip_options: Vec<u8>,
    pub total: Option<u16>,
    /// Flags and fragment offset (RFC 791 §3.1).
    pub fragment: u16,
    pub tos: u8,
    pub ttl: u8,
    pub flow: Flow,
    pub sequence: u32,
    pub flags: u8,
    pub data_offset: Option<u8>,
    pub tcp_options: Vec<u8>,
    pub udp_length: Option<u16>,
    /// No checksum (RFC 768).
    pub unchecked: bool,
    pub payload: Vec<u8>,
    /// What stands behind the datagram: Ethernet's padding.
    pub padding: usize,
    /// Bytes of the finished frame that are left.
    pub cut: Option<usize>,
}

impl Spec {
    fn new(flow: Flow) -> Self {
        Self {
            to_mac: OWN_MAC,
            ether_type: 0x0800,
            version: 4,
            ihl: None,
            ip_options: Vec::new(),
            total: None,
            fragment: 0x4000,
            tos: 0,
            ttl: 64,
            flow,
            sequence: 0,
            flags: 0,
            data_offset: None,
            tcp_options: Vec::new(),
            udp_length: None,
            unchecked: false,
            payload: Vec::new(),
            padding: 0,
            cut: None,
        }
    }

    /// The same frame with other fields.
    pub fn with(mut self, edit: impl FnOnce(&mut Self)) -> Self {
        edit(&mut self);
        self
    }

    /// Its bytes.
    pub fn build(&self) -> Vec<u8> {
        let transport = self.transport();
        let mut frame = [&self.to_mac[..], &CLIENT_MAC, &self.ether_type.to_be_bytes()].concat();
        frame.extend(self.ip_header(transport.len()));
        frame.extend(transport);
        frame.resize(frame.len() + self.padding, 0);
        frame.truncate(self.cut.unwrap_or(usize::MAX));
        frame
    }

    fn ip_header(&self, transport: usize) -> Vec<u8> {
        let length = 20 + self.ip_options.len();
        let ihl = self.ihl.unwrap_or((length / 4) as u8);
        let total = self.total.unwrap_or((length + transport) as u16);
        let mut header = vec![self.version << 4 | ihl, self.tos];
        header.extend(total.to_be_bytes());
        header.extend([0x12, 0x34]);
        header.extend(self.fragment.to_be_bytes());
        header.extend([self.ttl, self.flow.protocol, 0, 0]);
        header.extend(self.flow.source);
        header.extend(self.flow.destination);
        header.extend(&self.ip_options);
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = [self.flow.source_port.to_be_bytes(), self.flow.port.to_be_bytes()].concat();
        let place = match self.flow.protocol {
            protocol::TCP => {
                bytes.extend(self.sequence.to_be_bytes());
                bytes.extend([0, 0, 0, 9]);
                let offset = self.data_offset.unwrap_or(5 + (self.tcp_options.len() / 4) as u8);
                bytes.extend([offset << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
                bytes.extend(&self.tcp_options);
                16
            }
            protocol::UDP => {
                let length = self.udp_length.unwrap_or(8 + self.payload.len() as u16);
                bytes.extend(length.to_be_bytes());
                bytes.extend([0, 0]);
                6
            }
            // ICMP echo request and others: eight bytes that say nothing.
            _ => return [&[8, 0, 0, 0, 0, 1, 0, 1], &self.payload[..]].concat(),
        };
        bytes.extend(&self.payload);
        let pseudo = [&self.flow.source[..], &self.flow.destination, &[0, self.flow.protocol]].concat();
        let sum = checksum(&[&pseudo[..], &(bytes.len() as u16).to_be_bytes(), &bytes].concat());
        let sum = if self.unchecked { 0 } else { sum };
        bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }
}

/// The Internet checksum (RFC 1071).
pub fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
