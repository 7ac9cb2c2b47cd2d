//! IPv6 in the kernel and on the host: what must come out is built anew by etherparse, checksums and all.

use etherparse::{
    EtherType, Icmpv6Slice, Icmpv6Type, IpNumber, Ipv6Header, Ipv6Slice, PacketBuilder, PacketBuilderStep,
    SlicedPacket, TransportSlice, icmpv6,
};
use necp_ebpf::{
    abi::{
        ACCEPTS, ALIVE, ALWAYS_TRACKED, DIRECT, EXCEPTION_GLOBAL, EXCEPTION_INSTALLERS, EXCEPTION_LOCAL, Exception,
        ExceptionMask, ExceptionMasks, FORWARDING_SHIFT, GRE, LAYER_2, LAYER_3, NO_ECHO, OF_IPV6, REACHABLE, REPLY6,
        SERVICE6, Server, Service, UDP_CLASS, VIP6,
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
const VIP_INDEX: u16 = 3;

pub const OWNER: u32 = 2;
pub const LEGACY: u32 = 3;
pub const TUNNEL: u32 = 4;
const TRANSLATED: u32 = 5;
const MTU: u16 = 1500;

pub const WEB: u16 = 80;
pub const DNS: u16 = 53;
const ALWAYS: u16 = 8080;
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
fn services(flags: u16) -> Vec<Service> {
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

fn server(id: u32) -> Server {
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

    fn with(word: SlotWord, vip_flags: u16) -> Self {
        let mut bench = Bench::load();
        for view in [bench.kernel.view(), bench.host.view()] {
            fill(view, word, vip_flags);
        }
        Self { bench }
    }

    fn slots(&mut self, word: SlotWord) {
        for view in [self.bench.kernel.view(), self.bench.host.view()] {
            view.slots().iter().take(3 * SLOTS as usize).for_each(|slot| slot.store(word.0));
        }
    }

    /// Exceptions for what comes from the client's /64 to the VIP's TCP port.
    fn except(&mut self, state: u8, installers: &[u32]) {
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

fn fill(view: View<'_>, word: SlotWord, vip_flags: u16) {
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

fn syn(port: u16, sequence: u32) -> Vec<u8> {
    built(from_client(VIP).tcp(5000, port, sequence, 1000).syn(), b"")
}

fn datagram(destination: Address) -> Vec<u8> {
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

#[test]
fn a_plain_slot_s_owner_gets_every_packet_by_layer_2() {
    let mut six = Six::new(plain(OWNER));
    six.bridges(&data(WEB, 9), OWNER, Reason::Plain);
    six.bridges(&syn(WEB, 9), OWNER, Reason::Plain);
    six.passes(&data(81, 9), Reason::NotOurs);
    six.passes(&datagram(CLIENT), Reason::NotOurs);
    let mut other_host = data(WEB, 9);
    other_host[5] ^= 1;
    six.passes(&other_host, Reason::OtherHost);
    six.slots(plain(DIRECT));
    six.passes(&data(WEB, 9), Reason::Direct);
    six.slots(SlotWord(0));
    six.passes(&data(WEB, 9), Reason::NoServer);
}

/// Newton's iteration; of an odd number.
fn inverse(number: u64) -> u64 {
    (0..6).fold(number, |x, _| x.wrapping_mul(2u64.wrapping_sub(number.wrapping_mul(x))))
}

#[test]
fn an_address_with_the_vip_s_fold_is_not_the_vip() {
    const A: u64 = 0x9e37_79b9_7f4a_7c15;
    const B: u64 = 0xbf58_476d_1ce4_e5b9;
    let [high, low] = halves(VIP);
    let other = low ^ 0x1234;
    let hash = (high ^ low.wrapping_mul(B)).wrapping_mul(A);
    let wanted = (hash >> 32) ^ u64::from(low as u32) ^ u64::from(other as u32);
    let twin = [(wanted << 32).wrapping_mul(inverse(A)) ^ other.wrapping_mul(B), other];
    assert_eq!(fold6(twin), fold6([high, low]), "the two have one fold");
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&twin[0].to_ne_bytes());
    bytes[8..].copy_from_slice(&twin[1].to_ne_bytes());
    let mut six = Six::new(plain(OWNER));
    six.passes(&built(from_client(bytes).tcp(5000, WEB, 9, 1000).ack(1), b""), Reason::NotOurs);
}

#[test]
fn flows_stay_where_they_are() {
    let mut six = Six::new(plain(OWNER));
    six.bridges(&datagram(VIP), OWNER, Reason::New);
    six.bridges(&datagram(VIP), OWNER, Reason::Record);
    six.slots(plain(LEGACY));
    six.bridges(&datagram(VIP), OWNER, Reason::Record);
    six.slots(plain(OWNER).with_legacy(LEGACY));
    six.bridges(&data(WEB, 9), LEGACY, Reason::Adopted);
    six.bridges(&data(WEB, 18), LEGACY, Reason::Record);
    six.bridges(&syn(WEB, 100), OWNER, Reason::New);
    six.bridges(&syn(WEB, 100), OWNER, Reason::Repeated);
    six.bridges(&data(WEB, 18), LEGACY, Reason::Record);
    six.bridges(&data(WEB, 101), OWNER, Reason::Confirmed);
    six.slots(plain(LEGACY).with_legacy(LEGACY));
    six.bridges(&data(WEB, 110), OWNER, Reason::Record);
}

#[test]
fn exceptions_cost_new_flows_only_and_send_them_elsewhere() {
    let mut six = Six::new(plain(OWNER));
    six.slots(plain(OWNER));
    for view in [six.bench.kernel.view(), six.bench.host.view()] {
        view.slots().iter().take(3 * SLOTS as usize).step_by(2).for_each(|slot| slot.store(plain(LEGACY).0));
    }
    let Outcome { frame, .. } = six.run(&syn(WEB, 9));
    let owner = u32::from(frame[5]);
    let other = if owner == OWNER { LEGACY } else { OWNER };
    six.except(EXCEPTION_LOCAL, &[owner]);
    six.bridges(&syn(WEB, 9), other, Reason::New);
    six.bridges(&data(WEB, 10), other, Reason::Confirmed);
    six.except(EXCEPTION_GLOBAL, &[]);
    six.bridges(&data(WEB, 20), other, Reason::Record);
    let stranger = |number: u8| {
        let mut source = CLIENT;
        source[15] = number;
        built(from(source, VIP, 64).tcp(6000, WEB, 9, 1000).syn(), b"")
    };
    six.passes(&stranger(2), Reason::Direct);
    let mut elsewhere = CLIENT;
    elsewhere[7] ^= 1;
    let frame = built(from(elsewhere, VIP, 64).tcp(6000, WEB, 9, 1000).syn(), b"");
    assert_eq!(six.run(&frame).verdict, Verdict::Tx, "another /64");
}

#[test]
fn gre_wraps_the_datagram_in_ipv6() {
    let mut six = Six::new(plain(TUNNEL));
    let frame = data(WEB, 9);
    let outcome = six.run(&frame);
    let mut inner = frame[14..].to_vec();
    inner[7] -= 1;
    let outer = Ipv6Header {
        payload_length: inner.len() as u16 + 4,
        next_header: IpNumber(47),
        hop_limit: 64,
        source: OWN,
        destination: address(TUNNEL),
        ..Ipv6Header::default()
    };
    let wanted = [&mac(TUNNEL)[..], &OWN_MAC, &[0x86, 0xdd], &outer.to_bytes(), &[0, 0, 0x86, 0xdd], &inner].concat();
    assert_eq!(outcome, Outcome { verdict: Verdict::Tx, frame: wanted, reason: Reason::Plain });
}

/// An ICMP error's type, what it quotes; its checksum is right, and it goes from the VIP to the client.
fn told(outcome: &Outcome) -> (Icmpv6Type, Vec<u8>) {
    assert_eq!(outcome.verdict, Verdict::Tx);
    assert_eq!(outcome.frame[..12], [CLIENT_MAC, OWN_MAC].concat());
    let ip = Ipv6Slice::from_slice(&outcome.frame[14..]).expect("IPv6");
    assert_eq!((ip.header().source(), ip.header().destination()), (VIP, CLIENT));
    let icmp = Icmpv6Slice::from_slice(ip.payload().payload).expect("ICMPv6");
    assert!(icmp.is_checksum_valid(VIP, CLIENT), "the checksum");
    (icmp.header().icmp_type, icmp.payload().to_vec())
}

#[test]
fn senders_are_told_what_does_not_get_there() {
    for (owner, port, room) in [(TUNNEL, WEB, MTU - 44), (TRANSLATED, ALWAYS, MTU)] {
        let mut six = Six::new(plain(owner));
        let of_length =
            |length: u16| built(from_client(VIP).tcp(5000, port, 9, 1000).ack(1), &vec![7; usize::from(length) - 60]);
        assert_eq!(six.run(&of_length(room)).verdict, Verdict::Tx, "what fits");
        let frame = of_length(room + 1);
        let outcome = six.run(&frame);
        assert_eq!(outcome.reason, Reason::TooBig);
        let (kind, quoted) = told(&outcome);
        assert_eq!(kind, Icmpv6Type::PacketTooBig { mtu: room.into() });
        assert_eq!(quoted, frame[14..14 + 48]);

        let mut tired = data(port, 9);
        tired[21] = 1;
        let outcome = six.run(&tired);
        assert_eq!(outcome.reason, Reason::Expired);
        assert_eq!(told(&outcome).0, Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded));
        let group =
            built(from(*b"\xff\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\x01", VIP, 1).tcp(5000, port, 9, 1000).ack(1), b"");
        six.drops(&group, Reason::Untold);
    }
}

#[test]
fn layer_3_translates_both_ways() {
    let mut six = Six::new(plain(TRANSLATED));
    let wanted = |frame: Vec<u8>| [&mac(TRANSLATED)[..], &OWN_MAC, &frame[12..]].concat();
    let to_server = |sequence: u32| from(CLIENT, address(TRANSLATED), 63).tcp(5000, ALWAYS, sequence, 1000);
    let outcome = six.run(&syn(ALWAYS, 9));
    assert_eq!(outcome.frame, wanted(built(to_server(9).syn(), b"")));
    assert_eq!((outcome.verdict, outcome.reason), (Verdict::Tx, Reason::New));
    // The interface of the test knows no way, so the kernel routes what is ready.
    let answer = |source, hops| built(from(source, CLIENT, hops).tcp(ALWAYS, 5000, 77, 1000).syn().ack(10), b"");
    let outcome = six.run(&answer(address(TRANSLATED), 64));
    assert_eq!(outcome, Outcome { verdict: Verdict::Pass, frame: answer(VIP, 64), reason: Reason::ReplyRouted });
    let outcome = six.run(&data(ALWAYS, 10));
    assert_eq!(outcome.frame, wanted(built(to_server(10).ack(1), b"some data")));
    assert_eq!(outcome.reason, Reason::Confirmed);
    six.passes(&answer(address(OWNER), 64), Reason::NotOurs);
    let stray = built(from(address(TRANSLATED), CLIENT, 64).tcp(ALWAYS, 5001, 77, 1000).ack(10), b"");
    six.passes(&stray, Reason::NotOurs);

    let mut asked = Vec::new();
    from(CLIENT, address(TRANSLATED), 63).udp(5000, DNS).write(&mut asked, b"a question").unwrap();
    assert_eq!(six.run(&datagram(VIP)).frame, wanted(asked));
    let reply = |source| {
        let mut frame = Vec::new();
        from(source, CLIENT, 64).udp(DNS, 5000).write(&mut frame, b"an answer").unwrap();
        frame
    };
    assert_eq!(six.run(&reply(address(TRANSLATED))).frame, reply(VIP));
}

#[test]
fn extension_headers_are_looked_through_as_far_as_they_go() {
    let mut six = Six::new(plain(OWNER));
    let frame = data(WEB, 9);
    let routing = |left| (43, vec![0, 0, 4, left, 0, 0, 0, 0]);
    let (done, more) = (routing(0), routing(1));
    six.bridges(&extended(&frame, &[HOP_BY_HOP, OPTIONS]), OWNER, Reason::Plain);
    six.bridges(&extended(&frame, &[(done.0, &done.1), OPTIONS]), OWNER, Reason::Plain);
    six.passes(&extended(&frame, &[(more.0, &more.1)]), Reason::Extended);
    six.bridges(&extended(&frame, &[OPTIONS; 6]), OWNER, Reason::Plain);
    six.passes(&extended(&frame, &[OPTIONS; 7]), Reason::Extended);
    let mut long = vec![0; 264];
    long[1] = 32;
    six.passes(&extended(&frame, &[(60, &long)]), Reason::Extended);
    let mut endless = extended(&frame, &[OPTIONS]);
    endless[55] = 20;
    six.passes(&endless, Reason::Malformed);
    six.slots(plain(TRANSLATED));
    let wanted = built(from(CLIENT, address(TRANSLATED), 63).tcp(5000, ALWAYS, 9, 1000).ack(1), b"some data");
    let outcome = six.run(&extended(&data(ALWAYS, 9), &[HOP_BY_HOP, OPTIONS]));
    assert_eq!(outcome.frame[12..], extended(&wanted, &[HOP_BY_HOP, OPTIONS])[12..]);
}

#[test]
fn fragments_follow_the_first_one() {
    let mut six = Six::new(plain(OWNER));
    let frame = data(WEB, 9);
    let part = |offset, more, id| extended(&frame, &[(44, &fragment(offset, more, id))]);
    six.drops(&part(64, false, 7), Reason::StrayPart);
    six.bridges(&part(0, true, 7), OWNER, Reason::Plain);
    six.slots(plain(LEGACY));
    six.bridges(&part(64, false, 7), OWNER, Reason::Part);
    six.drops(&part(64, false, 8), Reason::StrayPart);
    six.bridges(&part(0, false, 9), LEGACY, Reason::Plain);
    let elsewhere = built(from_client(CLIENT).tcp(5000, WEB, 9, 1000).ack(1), b"");
    six.passes(&extended(&elsewhere, &[(44, &fragment(64, true, 7))]), Reason::Fragment);
    six.passes(&extended(&elsewhere, &[(44, &fragment(0, true, 7))]), Reason::Fragment);
}

#[test]
fn tags_stay() {
    let mut six = Six::new(plain(OWNER));
    let tagged = |tags: &[u8]| {
        let frame = data(WEB, 9);
        [&frame[..12], tags, &frame[12..]].concat()
    };
    six.bridges(&tagged(&[0x81, 0, 0, 5]), OWNER, Reason::Plain);
    six.bridges(&tagged(&[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6]), OWNER, Reason::Plain);
    six.passes(&tagged(&[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6, 0x81, 0, 0, 7]), Reason::NotIp);
    six.slots(plain(TUNNEL));
    let outcome = six.run(&tagged(&[0x81, 0, 0, 5]));
    assert_eq!(outcome.frame[12..18], [0x81, 0, 0, 5, 0x86, 0xdd]);
    assert_eq!(outcome.frame[18 + 40..18 + 44], [0, 0, 0x86, 0xdd]);
}

/// An error from a router, about what was sent the other way.
pub fn error(kind: Icmpv6Type, destination: Address, quoted: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let router = *b"\x20\x01\x0d\xb8\0\0\0\xff\0\0\0\0\0\0\0\x01";
    from(router, destination, 64).icmpv6(kind).write(&mut frame, quoted).expect("a vector takes it");
    frame
}

#[test]
fn icmp_errors_reach_the_server_that_has_the_flow() {
    let too_big = Icmpv6Type::PacketTooBig { mtu: 1280 };
    let mut six = Six::new(plain(OWNER));
    let sent = |source, port| built(from(source, CLIENT, 64).tcp(port, 5000, 1, 1000).ack(9), b"what the server said");
    let quoted = sent(VIP, WEB)[14..].to_vec();
    six.bridges(&error(too_big, VIP, &quoted), OWNER, Reason::Quoted);
    six.bridges(&error(too_big, VIP, &quoted[..44]), OWNER, Reason::Quoted);
    six.passes(&error(too_big, VIP, &quoted[..43]), Reason::Icmp);
    six.passes(&error(too_big, CLIENT, &quoted), Reason::Icmp);
    let foreign = sent(CLIENT, WEB)[14..].to_vec();
    six.passes(&error(too_big, VIP, &foreign), Reason::Icmp);

    // Layer 3: the server knows only its own address.
    six.slots(plain(TRANSLATED));
    six.run(&syn(ALWAYS, 8));
    six.run(&data(ALWAYS, 9));
    let outcome = six.run(&error(too_big, VIP, &sent(VIP, ALWAYS)[14..]));
    let mut wanted = error(too_big, address(TRANSLATED), &sent(address(TRANSLATED), ALWAYS)[14..]);
    wanted[21] -= 1;
    wanted[..12].copy_from_slice(&[mac(TRANSLATED), OWN_MAC].concat());
    assert_eq!(outcome, Outcome { verdict: Verdict::Tx, frame: wanted, reason: Reason::Quoted });
    // And the client only the VIP's.
    let unreachable = Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port);
    let came = |destination| built(from(CLIENT, destination, 60).tcp(5000, ALWAYS, 9, 1000).ack(1), b"from the client");
    let outcome = six.run(&error(unreachable, CLIENT, &came(address(TRANSLATED))[14..]));
    let wanted = error(unreachable, CLIENT, &came(VIP)[14..]);
    assert_eq!(outcome, Outcome { verdict: Verdict::Pass, frame: wanted, reason: Reason::ReplyRouted });
}

#[test]
fn echo_and_neighbour_discovery_are_the_host_s() {
    let echo = |to| error(Icmpv6Type::EchoRequest(etherparse::IcmpEchoHeader { id: 1, seq: 2 }), to, b"hello");
    let solicitation = error(Icmpv6Type::Unknown { type_u8: 135, code_u8: 0, bytes5to8: [0; 4] }, VIP, &VIP);
    let mut six = Six::new(plain(OWNER));
    six.passes(&echo(VIP), Reason::Icmp);
    six.passes(&solicitation, Reason::Icmp);
    let mut silent = Six::with(plain(OWNER), NO_ECHO);
    silent.drops(&echo(VIP), Reason::Echo);
    silent.passes(&echo(CLIENT), Reason::Icmp);
    silent.passes(&solicitation, Reason::Icmp);
}

#[test]
fn cut_and_changed_frames_come_out_the_same_in_both_and_whole_ones_are_valid() {
    let mut six = Six::new(plain(TRANSLATED).with_legacy(TUNNEL));
    let quoted = built(from(VIP, CLIENT, 64).tcp(ALWAYS, 5000, 1, 1000).ack(9), b"said")[14..].to_vec();
    let kinds = [
        data(WEB, 9),
        syn(ALWAYS, 9),
        datagram(VIP),
        extended(&data(ALWAYS, 9), &[HOP_BY_HOP, OPTIONS]),
        extended(&data(WEB, 9), &[(44, &fragment(0, true, 7))]),
        error(Icmpv6Type::PacketTooBig { mtu: 1280 }, VIP, &quoted),
        built(from(address(TRANSLATED), CLIENT, 64).tcp(ALWAYS, 5000, 77, 1000).ack(10), b"reply"),
    ];
    let mut frames = 0;
    for frame in &kinds {
        for length in 14..frame.len() {
            let outcome = six.run(&frame[..length]);
            assert_eq!((outcome.verdict, &outcome.frame[..]), (Verdict::Pass, &frame[..length]), "{length} bytes");
            frames += 1;
        }
        // A generator of its own, so that a finding is found again.
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for _ in 0..1500 {
            let mut changed = frame.clone();
            for _ in 0..=state >> 62 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let place = 12 + state as usize % (changed.len() - 12);
                changed[place] = (state >> 32) as u8;
            }
            let outcome = six.run(&changed);
            frames += 1;
            if changed == *frame && outcome.verdict == Verdict::Tx {
                assert_valid(&outcome.frame);
            }
        }
        let outcome = six.run(frame);
        if outcome.verdict == Verdict::Tx {
            assert_valid(&outcome.frame);
        }
    }
    println!("{frames} frames");
    assert!(frames > 10_000);
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
