//! Tables of both builds for IPv6, and frames for them.

use etherparse::{EtherType, Icmpv6Type, PacketBuilder, PacketBuilderStep, SlicedPacket, TransportSlice};
use necp_ebpf::{
    abi::{
        ACCEPTS, ALIVE, ALWAYS_TRACKED, EXCEPTION_INSTALLERS, Exception, ExceptionMask, ExceptionMasks,
        FORWARDING_SHIFT, GRE, LAYER_2, LAYER_3, OF_IPV6, REACHABLE, REPLY6, SERVICE6, Server, Service, UDP_CLASS,
        VIP6,
    },
    exceptions::{name6, prefix6},
    hash::{fold6, service_bucket},
    host::View,
    slot::SlotWord,
    tables::{Tables as _, halves},
    verdict::Reason,
};
use necp_tests::kernel::{OWN_MAC, Outcome, Verdict};

use crate::case::Bench;

pub type Address = [u8; 16];

pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 7, 7];
pub const CLIENT: Address = *b"\x20\x01\x0d\xb8\0\0\0\x07\0\0\0\0\0\0\0\x01";
pub const VIP: Address = *b"\x20\x01\x0d\xb8\0\0\0\x0a\0\0\0\0\0\0\0\x10";
pub const OWN: Address = *b"\xfd\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01";
pub const VIP_INDEX: u16 = 3;

pub const OWNER: u32 = 2;
pub const LEGACY: u32 = 3;
pub const TUNNEL: u32 = 4;
pub const TRANSLATED: u32 = 5;
pub const MTU: u16 = 1500;

pub const WEB: u16 = 80;
pub const DNS: u16 = 53;
pub const ALWAYS: u16 = 8080;
pub const SLOTS: u32 = 7;

pub fn address(server: u32) -> Address {
    let mut address = OWN;
    address[15] = server as u8 + 16;
    address
}

pub fn mac(server: u32) -> [u8; 6] {
    [2, 0, 0, 0, 9, server as u8]
}

/// One service an entry, all of whose slots have the same word.
pub fn services(flags: u16) -> Vec<Service> {
    let service = |id: u16, protocol: u8, port: u16, flags| Service {
        address: fold6(halves(VIP)).to_ne_bytes(),
        port: port.to_be_bytes(),
        protocol,
        state: SERVICE6,
        slots_base: u32::from(id - 1) * SLOTS,
        slots_size: SLOTS,
        seed: 7,
        id: if protocol == 6 { id } else { id | UDP_CLASS },
        flags,
        farm: 0,
        vip: VIP_INDEX,
    };
    let reply = |protocol, port: u16| Service {
        port: port.to_be_bytes(),
        protocol,
        state: REPLY6,
        vip: VIP_INDEX,
        ..Service::default()
    };
    let address = fold6(halves(VIP)).to_ne_bytes();
    vec![
        service(1, 6, WEB, 0),
        service(2, 17, DNS, ALWAYS_TRACKED),
        service(3, 6, ALWAYS, ALWAYS_TRACKED),
        Service { address, state: VIP6, vip: VIP_INDEX, flags, ..Service::default() },
        reply(6, ALWAYS),
        reply(17, DNS),
    ]
}

pub fn server(id: u32) -> Server {
    let forwarding = match id {
        TUNNEL => GRE,
        TRANSLATED => LAYER_3,
        _ => LAYER_2,
    };
    Server {
        mac: mac(id),
        flags: ALIVE | ACCEPTS | REACHABLE | forwarding << FORWARDING_SHIFT,
        host: id as u16,
        address: address(id),
        source: OWN,
        mtu: MTU,
        ..Server::default()
    }
}

/// The tables of both builds, with all slots as this word says.
pub struct Six {
    pub bench: Bench,
}

impl Six {
    pub fn new(word: SlotWord) -> Self {
        Self::with(word, 0)
    }

    pub fn with(word: SlotWord, vip_flags: u16) -> Self {
        let mut bench = Bench::load();
        for view in [bench.kernel.view(), bench.host.view()] {
            fill(view, word, vip_flags);
        }
        Self { bench }
    }

    pub fn slots(&mut self, word: SlotWord) {
        for view in [self.bench.kernel.view(), self.bench.host.view()] {
            view.slots().iter().take(3 * SLOTS as usize).for_each(|slot| slot.store(word.0));
        }
    }

    /// The longest packet that gets to this server, in bytes.
    pub fn narrow(&mut self, id: u32, mtu: u16) {
        for view in [self.bench.kernel.view(), self.bench.host.view()] {
            assert!(view.set_server(id, &Server { mtu, ..server(id) }));
        }
    }

    /// Exceptions for what comes from the client's /64 to the VIP's TCP port.
    pub fn except(&mut self, state: u8, installers: &[u32]) {
        self.except_to(VIP, WEB, state, installers);
    }

    /// The same to another address and port.
    pub fn except_to(&mut self, destination: Address, port: u16, state: u8, installers: &[u32]) {
        let mask = ExceptionMask {
            source_len: 64,
            destination_len: 128,
            protocol: 1,
            port: 1,
            used: OF_IPV6,
            ..ExceptionMask::default()
        };
        let mut masks = ExceptionMasks { count: 1, ..ExceptionMasks::default() };
        masks.masks[0] = mask;
        let mut hosts = [0; EXCEPTION_INSTALLERS];
        hosts.iter_mut().zip(installers).for_each(|(to, id)| *to = *id as u16);
        for view in [self.bench.kernel.view(), self.bench.host.view()] {
            let name = name6(prefix6(halves(CLIENT), 64), halves(destination), view.exception_seed()).to_ne_bytes();
            let [a, b, c, d, e, f, g, h] = name;
            let exception = Exception {
                source: [a, b, c, d],
                destination: [e, f, g, h],
                port: port.to_be_bytes(),
                protocol: 6,
                state,
                installers: hosts,
                ..Exception::default()
            };
            assert_eq!(view.set_exception(0, &exception), Ok(true));
            assert!(view.set_exception_masks(0, &masks));
        }
    }

    /// What both builds make of a frame.
    #[track_caller]
    pub fn run(&mut self, frame: &[u8]) -> Outcome {
        match self.bench.both(frame) {
            Ok(outcome) => outcome,
            Err(wrong) => panic!("{wrong}"),
        }
    }

    #[track_caller]
    pub fn passes(&mut self, frame: &[u8], reason: Reason) {
        assert_eq!(self.run(frame), Outcome { verdict: Verdict::Pass, frame: frame.to_vec(), reason });
    }

    #[track_caller]
    pub fn drops(&mut self, frame: &[u8], reason: Reason) {
        assert_eq!(self.run(frame), Outcome { verdict: Verdict::Drop, frame: frame.to_vec(), reason });
    }

    /// New MAC addresses and nothing else.
    #[track_caller]
    pub fn bridges(&mut self, frame: &[u8], server: u32, reason: Reason) {
        let wanted = [&mac(server)[..], &OWN_MAC, &frame[12..]].concat();
        assert_eq!(self.run(frame), Outcome { verdict: Verdict::Tx, frame: wanted, reason });
    }
}

pub fn fill(view: View<'_>, word: SlotWord, vip_flags: u16) {
    assert!(view.set_vip6(VIP_INDEX.into(), VIP));
    view.slots().iter().take(3 * SLOTS as usize).for_each(|slot| slot.store(word.0));
    for id in OWNER..=TRANSLATED {
        assert!(view.set_server(id, &server(id)));
    }
    services(vip_flags).iter().for_each(|service| enter(view, service));
}

/// Where there is room.
pub fn enter(view: View<'_>, service: &Service) {
    let bucket = service_bucket(service.key());
    let entries = view.services(bucket).expect("the table has it").entries;
    let free = entries.iter().position(|entry| entry.state == 0).expect("room in the bucket");
    assert!(view.set_service(bucket, free, service));
}

pub fn plain(owner: u32) -> SlotWord {
    SlotWord::plain(owner)
}

pub fn from_client(destination: Address) -> PacketBuilderStep<etherparse::IpHeaders> {
    PacketBuilder::ethernet2(CLIENT_MAC, OWN_MAC).ipv6(CLIENT, destination, 64)
}

pub fn from(source: Address, destination: Address, hops: u8) -> PacketBuilderStep<etherparse::IpHeaders> {
    PacketBuilder::ethernet2(CLIENT_MAC, OWN_MAC).ipv6(source, destination, hops)
}

pub fn built(step: PacketBuilderStep<etherparse::TcpHeader>, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    step.write(&mut frame, payload).expect("a vector takes it");
    frame
}

pub fn data(port: u16, sequence: u32) -> Vec<u8> {
    built(from_client(VIP).tcp(5000, port, sequence, 1000).ack(1), b"some data")
}

pub fn syn(port: u16, sequence: u32) -> Vec<u8> {
    built(from_client(VIP).tcp(5000, port, sequence, 1000).syn(), b"")
}

pub fn datagram(destination: Address) -> Vec<u8> {
    let mut frame = Vec::new();
    from_client(destination).udp(5000, DNS).write(&mut frame, b"a question").expect("a vector takes it");
    frame
}

/// The frame with these extension headers (each a multiple of eight bytes, its first byte to be filled in) before its transport.
pub fn extended(frame: &[u8], extensions: &[(u8, &[u8])]) -> Vec<u8> {
    let mut header = frame[..54].to_vec();
    let mut between = Vec::new();
    let mut next_at = None::<usize>;
    let transport = header[20];
    for (kind, bytes) in extensions {
        match next_at {
            None => header[20] = *kind,
            Some(at) => between[at] = *kind,
        }
        next_at = Some(between.len());
        between.extend_from_slice(bytes);
    }
    if let Some(at) = next_at {
        between[at] = transport;
    }
    let length = (frame.len() - 54 + between.len()) as u16;
    header[18..20].copy_from_slice(&length.to_be_bytes());
    [&header[..], &between, &frame[54..]].concat()
}

pub const OPTIONS: (u8, &[u8]) = (60, &[0, 0, 1, 4, 0, 0, 0, 0]);
pub const HOP_BY_HOP: (u8, &[u8]) = (0, &[0, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);

pub fn fragment(offset: u16, more: bool, id: u32) -> Vec<u8> {
    [&[0, 0][..], &(offset | u16::from(more)).to_be_bytes(), &id.to_be_bytes()].concat()
}

/// For the tests of the tunnel's other end: a client's frame, what goes out for it in GRE, and from which address.
pub fn through_the_tunnel() -> (Vec<u8>, Vec<u8>, Address) {
    let (sent, outcome) = (data(WEB, 9), Six::new(plain(TUNNEL)).run(&data(WEB, 9)));
    assert_eq!((outcome.verdict, outcome.reason), (Verdict::Tx, Reason::Plain));
    (sent, outcome.frame, OWN)
}

/// An error from a router, about what was sent the other way.
pub fn error(kind: Icmpv6Type, destination: Address, quoted: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let router = *b"\x20\x01\x0d\xb8\0\0\0\xff\0\0\0\0\0\0\0\x01";
    from(router, destination, 64).icmpv6(kind).write(&mut frame, quoted).expect("a vector takes it");
    frame
}

/// So many frames that differ from this one behind its MAC addresses, in one to four bytes; always the same ones, so that a finding
/// is found again.
pub fn changed(frame: &[u8], number: usize) -> impl Iterator<Item = Vec<u8>> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    std::iter::repeat_with(move || {
        let mut changed = frame.to_vec();
        for _ in 0..=state >> 62 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let place = 12 + state as usize % (changed.len() - 12);
            changed[place] = (state >> 32) as u8;
        }
        changed
    })
    .take(number)
}

/// Lengths and transport checksum are right, of what GRE wraps too.
pub fn assert_valid(frame: &[u8]) {
    let wrapped = frame[20] == 47;
    let ip = if wrapped { &frame[14 + 44..] } else { &frame[14..] };
    let packet = SlicedPacket::from_ip(ip).expect("a valid packet");
    let Some(etherparse::NetSlice::Ipv6(net)) = &packet.net else { panic!("no IPv6") };
    let (source, destination) = (net.header().source(), net.header().destination());
    match packet.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            assert_eq!(tcp.calc_checksum_ipv6(source, destination).unwrap(), tcp.checksum());
        }
        Some(TransportSlice::Udp(udp)) => {
            let header = udp.to_header();
            let payload = udp.payload();
            assert_eq!(header.calc_checksum_ipv6(&net.header().to_header(), payload).unwrap_or(0), udp.checksum());
        }
        _ => {}
    }
    assert_eq!(EtherType(u16::from_be_bytes([frame[12], frame[13]])), EtherType::IPV6);
}
