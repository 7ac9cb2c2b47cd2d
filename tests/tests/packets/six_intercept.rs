//! IPv6 packets that cross this host: the cases of [`intercept`](crate::intercept), in the kernel and on the host.

use etherparse::{IcmpEchoHeader, Icmpv6Type, IpNumber, Ipv6Header};
use necp_ebpf::{
    abi::{
        ACCEPTS, ALIVE, ALWAYS_TRACKED, DIRECT, EXCEPTION_GLOBAL, EXCEPTION_LOCAL, INTERCEPT, INTERCEPT6, Service,
        UDP_CLASS,
    },
    slot::{SlotWord, TRACKED},
    tables::NextHop,
    verdict::Reason,
};
use necp_tests::kernel::{OWN_MAC, Outcome, Verdict};

use crate::six::bed::{
    Address, CLIENT, DNS, HOP_BY_HOP, LEGACY, OPTIONS, OWN, OWNER, SLOTS, Six, TUNNEL, VIP, WEB, address, assert_valid,
    built, changed, data, enter, error, extended, fragment, from, mac, plain,
};

/// Somebody's web server behind this host, and another one.
const ORIGIN: Address = *b"\x20\x01\x0d\xb8\xca\xfe\0\0\0\0\0\0\0\0\0\x50";
const OTHER_ORIGIN: Address = *b"\x20\x01\x0d\xb8\xca\xfe\0\0\0\0\0\0\0\0\0\x51";
/// In the prefix, but this host's own.
const OURS: Address = *b"\x20\x01\x0d\xb8\xca\xfe\0\0\0\0\0\0\0\0\0\x01";
const PORT: u16 = 8000;
const FIRST_SLOT: u32 = 3 * SLOTS;

/// The services of a VIP, which [`LEGACY`] has, and TCP and UDP that are intercepted, whose slots have this word.
struct Crossing(Six);

impl Crossing {
    fn new(word: SlotWord) -> Self {
        let mut six = Six::new(plain(LEGACY));
        for (number, protocol, port) in [(0, 6, PORT), (1, 17, DNS), (2, 6, WEB)] {
            let id = 8 + number;
            let service = Service {
                port: port.to_be_bytes(),
                protocol,
                state: INTERCEPT6,
                slots_base: FIRST_SLOT + u32::from(number) * SLOTS,
                slots_size: SLOTS,
                seed: 7,
                id: if protocol == 6 { id } else { id | UDP_CLASS },
                flags: if protocol == 6 { 0 } else { ALWAYS_TRACKED },
                ..Service::default()
            };
            [six.bench.kernel.view(), six.bench.host.view()].into_iter().for_each(|view| enter(view, &service));
        }
        let mut crossing = Self(six);
        crossing.slots(word);
        crossing
    }

    /// All slots of what is intercepted.
    fn slots(&mut self, word: SlotWord) {
        for view in [self.0.bench.kernel.view(), self.0.bench.host.view()] {
            let ours = view.slots().iter().skip(FIRST_SLOT as usize).take(3 * SLOTS as usize);
            ours.for_each(|slot| slot.store(word.0));
        }
    }

    #[track_caller]
    fn taken(&mut self, frame: &[u8], reason: Reason) {
        self.0.bridges(frame, OWNER, reason);
    }

    #[track_caller]
    fn direct(&mut self, frame: &[u8]) {
        self.0.passes(frame, Reason::Direct);
    }

    #[track_caller]
    fn let_through(&mut self, frame: &[u8]) {
        self.0.passes(frame, Reason::NotOurs);
    }
}

fn syn_of(source: Address, destination: Address, port: u16) -> Vec<u8> {
    built(from(source, destination, 64).tcp(5000, port, 1000, 1000).syn(), b"")
}

fn syn(destination: Address) -> Vec<u8> {
    syn_of(CLIENT, destination, PORT)
}

fn ack(destination: Address, sequence: u32) -> Vec<u8> {
    built(from(CLIENT, destination, 64).tcp(5000, PORT, sequence, 1000).ack(1), b"some data")
}

fn fin(destination: Address, sequence: u32) -> Vec<u8> {
    built(from(CLIENT, destination, 64).tcp(5000, PORT, sequence, 1000).ack(1).fin(), b"")
}

fn question(source: Address, destination: Address, port: u16) -> Vec<u8> {
    let mut frame = Vec::new();
    from(source, destination, 64).udp(5000, port).write(&mut frame, b"a question").expect("a vector takes it");
    frame
}

#[test]
fn protocol_port_and_destination_are_the_farm_s() {
    let mut crossing = Crossing::new(plain(OWNER));
    crossing.taken(&syn(ORIGIN), Reason::Plain);
    crossing.taken(&ack(ORIGIN, 1001), Reason::Plain);
    crossing.taken(&fin(ORIGIN, 1010), Reason::Plain);
    crossing.taken(&question(CLIENT, ORIGIN, DNS), Reason::New);
    crossing.taken(&question(CLIENT, ORIGIN, DNS), Reason::Record);
    let frame = ack(ORIGIN, 1001);
    crossing.taken(&[&frame[..12], &[0x81, 0, 0, 5], &frame[12..]].concat(), Reason::Plain);
    crossing.taken(&[&frame[..12], &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6], &frame[12..]].concat(), Reason::Plain);
    crossing.taken(&extended(&frame, &[HOP_BY_HOP, OPTIONS]), Reason::Plain);
    crossing.0.passes(&extended(&frame, &[OPTIONS; 7]), Reason::Extended);
    // An address that is not in the VIP's farm, but in its network.
    let beside = (u128::from_be_bytes(VIP) + 1).to_be_bytes();
    crossing.taken(&syn_of(CLIENT, beside, WEB), Reason::Plain);
    for view in [crossing.0.bench.kernel.view(), crossing.0.bench.host.view()] {
        assert!(view.set_next_hop(OWNER, NextHop::new(mac(OWNER), ALIVE | ACCEPTS, 0)));
    }
    crossing.0.drops(&ack(ORIGIN, 1001), Reason::NoNextHop);
}

#[test]
fn a_proxy_is_reached_by_gre() {
    let mut crossing = Crossing::new(plain(TUNNEL));
    let frame = ack(ORIGIN, 9);
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
    assert_eq!(crossing.0.run(&frame), Outcome { verdict: Verdict::Tx, frame: wanted, reason: Reason::Plain });
    let long = built(from(CLIENT, ORIGIN, 64).tcp(5000, PORT, 9, 1000).ack(1), &[7; 1440]);
    assert_eq!(crossing.0.run(&long).reason, Reason::TooBig);
}

#[test]
fn what_is_not_the_farm_s_goes_its_way() {
    let mut crossing = Crossing::new(plain(OWNER));
    let (link, group) = (*b"\xfe\x80\0\0\0\0\0\0\0\0\0\0\0\0\0\x50", *b"\xff\x0e\0\0\0\0\0\0\0\0\0\0\0\0\0\x50");
    crossing.let_through(&syn_of(CLIENT, ORIGIN, PORT + 1));
    crossing.let_through(&question(CLIENT, ORIGIN, PORT));
    crossing.let_through(&syn_of(CLIENT, ORIGIN, DNS));
    crossing.let_through(&syn(CLIENT));
    crossing.let_through(&syn(OURS));
    crossing.let_through(&syn(link));
    crossing.let_through(&syn(group));
    crossing.let_through(&syn(OWN));
    crossing.let_through(&syn_of(link, ORIGIN, PORT));
    for proxy in [address(OWNER), address(0xe0)] {
        crossing.let_through(&syn_of(proxy, ORIGIN, PORT));
        crossing.let_through(&question(proxy, ORIGIN, DNS));
    }
    crossing.let_through(&built(from(ORIGIN, CLIENT, 64).tcp(PORT, 5000, 77, 1000).syn().ack(10), b""));
    let mut other_host = syn(ORIGIN);
    other_host[5] ^= 1;
    crossing.0.passes(&other_host, Reason::OtherHost);
}

#[test]
fn a_vip_comes_first() {
    let mut crossing = Crossing::new(plain(OWNER));
    // This very port of the VIP's network is intercepted.
    crossing.0.bridges(&data(WEB, 9), LEGACY, Reason::Plain);
    // A server may be a client of the VIP.
    crossing.0.bridges(&syn_of(address(OWNER), VIP, WEB), LEGACY, Reason::Plain);
    for view in [crossing.0.bench.kernel.view(), crossing.0.bench.host.view()] {
        view.slots().iter().take(FIRST_SLOT as usize).for_each(|slot| slot.store(0));
    }
    crossing.0.passes(&data(WEB, 9), Reason::NoServer);
    // An error about what it said is the host's too.
    let said = built(from(VIP, CLIENT, 64).tcp(WEB, 5000, 1, 1000).ack(9), b"what the host said");
    crossing.0.passes(&error(Icmpv6Type::PacketTooBig { mtu: 1280 }, VIP, &said[14..]), Reason::Icmp);
}

#[test]
fn a_service_of_the_other_family_does_not_count() {
    let mut six = Six::new(plain(LEGACY));
    let service = Service {
        port: PORT.to_be_bytes(),
        protocol: 6,
        state: INTERCEPT,
        slots_base: 0,
        slots_size: SLOTS,
        id: 8,
        ..Service::default()
    };
    [six.bench.kernel.view(), six.bench.host.view()].into_iter().for_each(|view| enter(view, &service));
    six.passes(&syn(ORIGIN), Reason::NotOurs);
}

#[test]
fn flows_begun_before_start_stay_direct() {
    let mut crossing = Crossing::new(plain(DIRECT));
    crossing.direct(&syn(ORIGIN));
    crossing.direct(&ack(ORIGIN, 1001));
    crossing.direct(&question(CLIENT, ORIGIN, DNS));
    crossing.slots(plain(OWNER).with_legacy(DIRECT));
    crossing.direct(&ack(ORIGIN, 5000));
    // On record now, so the collected slot does not matter.
    crossing.slots(plain(OWNER).with_bits(TRACKED, 0));
    crossing.direct(&ack(ORIGIN, 5009));
    crossing.direct(&fin(ORIGIN, 5018));
    crossing.direct(&question(CLIENT, ORIGIN, DNS));
    // One client's port, another destination: another flow.
    crossing.taken(&ack(OTHER_ORIGIN, 5000), Reason::Owner);
    crossing.taken(&question(CLIENT, OTHER_ORIGIN, DNS), Reason::New);
    crossing.slots(plain(OWNER).with_legacy(DIRECT));
    crossing.taken(&syn(OTHER_ORIGIN), Reason::New);
    crossing.taken(&ack(OTHER_ORIGIN, 1001), Reason::Confirmed);
    crossing.taken(&ack(OTHER_ORIGIN, 1010), Reason::Record);
    // All servers are gone again.
    crossing.slots(plain(DIRECT).with_legacy(OWNER));
    crossing.taken(&ack(OTHER_ORIGIN, 1020), Reason::Record);
    crossing.direct(&syn_of([0x20; 16], ORIGIN, PORT));
}

#[test]
fn what_servers_do_not_want_is_cut_through() {
    let mut crossing = Crossing::new(plain(OWNER));
    crossing.0.except_to(ORIGIN, PORT, EXCEPTION_GLOBAL, &[]);
    crossing.direct(&syn(ORIGIN));
    crossing.direct(&ack(ORIGIN, 1001));
    crossing.taken(&syn(OTHER_ORIGIN), Reason::Plain);
    let mut crossing = Crossing::new(plain(OWNER));
    crossing.0.except_to(ORIGIN, PORT, EXCEPTION_LOCAL, &[OWNER]);
    crossing.direct(&syn(ORIGIN));
    crossing.direct(&ack(ORIGIN, 1001));
    crossing.taken(&syn_of([0x20; 16], ORIGIN, PORT), Reason::Plain);
}

#[test]
fn parts_follow_the_first_one() {
    let mut crossing = Crossing::new(plain(OWNER));
    let part = |offset, more, id| extended(&ack(ORIGIN, 9), &[(44, &fragment(offset, more, id))]);
    crossing.0.passes(&part(64, false, 7), Reason::Fragment);
    crossing.taken(&part(0, true, 7), Reason::Plain);
    crossing.taken(&part(64, false, 7), Reason::Part);
    crossing.slots(plain(DIRECT));
    crossing.taken(&part(64, false, 7), Reason::Part);
    crossing.direct(&part(0, true, 8));
    crossing.0.passes(&part(64, false, 8), Reason::Fragment);
    let elsewhere = extended(&ack(CLIENT, 9), &[(44, &fragment(0, true, 9))]);
    crossing.0.passes(&elsewhere, Reason::Fragment);
}

#[test]
fn icmp_errors_reach_the_proxy_and_nothing_else_of_icmp_does() {
    let too_big = Icmpv6Type::PacketTooBig { mtu: 1280 };
    let mut crossing = Crossing::new(plain(OWNER));
    let said = |port| built(from(ORIGIN, CLIENT, 64).tcp(port, 5000, 1, 1000).ack(9), b"what the proxy said");
    let quoted = said(PORT)[14..].to_vec();
    crossing.taken(&error(too_big, ORIGIN, &quoted), Reason::Quoted);
    crossing.taken(&error(too_big, ORIGIN, &quoted[..44]), Reason::Quoted);
    crossing.0.passes(&error(too_big, ORIGIN, &quoted[..43]), Reason::Icmp);
    crossing.0.passes(&error(too_big, OTHER_ORIGIN, &quoted), Reason::Icmp);
    crossing.0.passes(&error(too_big, ORIGIN, &said(PORT + 1)[14..]), Reason::Icmp);
    // About a flow on record elsewhere, and about what is direct.
    crossing.slots(plain(LEGACY).with_legacy(OWNER));
    crossing.taken(&ack(ORIGIN, 9), Reason::Adopted);
    crossing.slots(plain(LEGACY).with_bits(TRACKED, 0));
    crossing.taken(&error(too_big, ORIGIN, &quoted), Reason::Quoted);
    let mut crossing = Crossing::new(plain(DIRECT));
    crossing.0.passes(&error(too_big, ORIGIN, &quoted), Reason::Icmp);
    // By GRE: the whole error, untouched inside.
    let mut crossing = Crossing::new(plain(TUNNEL));
    let outcome = crossing.0.run(&error(too_big, ORIGIN, &quoted));
    assert_eq!((outcome.verdict, outcome.reason), (Verdict::Tx, Reason::Quoted));
    assert_eq!(outcome.frame[58 + 40..], error(too_big, ORIGIN, &quoted)[14 + 40..]);

    // What a VIP sent whose farm has no server is the host's, though its prefix is intercepted.
    let mut crossing = Crossing::new(plain(OWNER));
    let of_vip = built(from(VIP, CLIENT, 64).tcp(WEB, 5000, 1, 1000).ack(9), b"what a server said")[14..].to_vec();
    crossing.0.bridges(&error(too_big, VIP, &of_vip), LEGACY, Reason::Quoted);
    for view in [crossing.0.bench.kernel.view(), crossing.0.bench.host.view()] {
        view.slots().iter().take(FIRST_SLOT as usize).for_each(|slot| slot.store(0));
    }
    crossing.0.passes(&error(too_big, VIP, &of_vip), Reason::Icmp);

    let mut crossing = Crossing::new(plain(OWNER));
    let echo = error(Icmpv6Type::EchoRequest(IcmpEchoHeader { id: 1, seq: 2 }), ORIGIN, b"hello");
    crossing.0.passes(&echo, Reason::Icmp);
    for discovery in 133..=137 {
        let kind = Icmpv6Type::Unknown { type_u8: discovery, code_u8: 0, bytes5to8: [0; 4] };
        crossing.0.passes(&error(kind, ORIGIN, &ORIGIN), Reason::Icmp);
    }
}

#[test]
fn cut_and_changed_frames_come_out_the_same_in_both() {
    let quoted = built(from(ORIGIN, CLIENT, 64).tcp(PORT, 5000, 1, 1000).ack(9), b"said")[14..].to_vec();
    let kinds = [
        ack(ORIGIN, 9),
        syn(ORIGIN),
        question(CLIENT, ORIGIN, DNS),
        extended(&ack(ORIGIN, 9), &[HOP_BY_HOP, OPTIONS]),
        extended(&ack(ORIGIN, 9), &[(44, &fragment(0, true, 7))]),
        error(Icmpv6Type::PacketTooBig { mtu: 1280 }, ORIGIN, &quoted),
    ];
    let mut frames = 0;
    for owner in [OWNER, TUNNEL] {
        let mut crossing = Crossing::new(plain(owner).with_legacy(DIRECT));
        for frame in &kinds {
            for length in 14..frame.len() {
                let outcome = crossing.0.run(&frame[..length]);
                assert_eq!((outcome.verdict, &outcome.frame[..]), (Verdict::Pass, &frame[..length]), "{length} bytes");
                frames += 1;
            }
            for changed in changed(frame, 1000) {
                crossing.0.run(&changed);
                frames += 1;
            }
        }
        crossing.slots(plain(owner));
        let outcome = crossing.0.run(&syn_of([0x20; 16], ORIGIN, PORT));
        assert_eq!((outcome.verdict, outcome.reason), (Verdict::Tx, Reason::Plain));
        assert_valid(&outcome.frame);
    }
    println!("{frames} frames");
    assert!(frames > 12_000);
}
