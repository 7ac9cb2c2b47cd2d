//! IPv6 in the kernel and on the host: what must come out is built anew by etherparse, checksums and all.

pub mod bed;

use etherparse::{Icmpv6Slice, Icmpv6Type, IpNumber, Ipv6Header, Ipv6Slice, icmpv6};
use necp_ebpf::{
    abi::{DIRECT, EXCEPTION_GLOBAL, EXCEPTION_LOCAL, NO_ECHO},
    hash::fold6,
    slot::SlotWord,
    tables::halves,
    verdict::Reason,
};
use necp_tests::kernel::{OWN_MAC, Outcome, Verdict};

use self::bed::{
    ALWAYS, CLIENT, CLIENT_MAC, DNS, HOP_BY_HOP, LEGACY, MTU, OPTIONS, OWN, OWNER, SLOTS, Six, TRANSLATED, TUNNEL, VIP,
    WEB, address, assert_valid, built, changed, data, datagram, error, extended, fragment, from, from_client, mac,
    plain, syn,
};

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

/// RFC 2473 §7.1: what every link takes goes through a tunnel, whatever is said of its way.
#[test]
fn no_way_is_too_narrow_for_1280_bytes() {
    for (owner, port) in [(TUNNEL, WEB), (TRANSLATED, ALWAYS)] {
        let mut six = Six::new(plain(owner));
        six.narrow(owner, 1280);
        let of_length = |length: usize| built(from_client(VIP).tcp(5000, port, 9, 1000).ack(1), &vec![7; length - 60]);
        assert_eq!(six.run(&of_length(1280)).verdict, Verdict::Tx);
        let outcome = six.run(&of_length(1281));
        assert_eq!(outcome.reason, Reason::TooBig);
        assert_eq!(told(&outcome).0, Icmpv6Type::PacketTooBig { mtu: 1280 });
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

    // A server's reply, and then another datagram of its: identifications come back.
    six.slots(plain(TRANSLATED));
    six.run(&syn(ALWAYS, 8));
    six.run(&data(ALWAYS, 9));
    let said = |port, offset, more| {
        let frame = built(from(address(TRANSLATED), CLIENT, 64).tcp(port, 5000, 77, 1000).ack(10), b"reply");
        extended(&frame, &[(44, &fragment(offset, more, 7))])
    };
    assert_eq!(six.run(&said(ALWAYS, 0, true)).reason, Reason::ReplyRouted);
    assert_eq!(six.run(&said(ALWAYS, 64, false)).reason, Reason::ReplyRouted);
    six.passes(&said(9, 0, true), Reason::Fragment);
    six.passes(&said(9, 64, false), Reason::Fragment);
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
    let in_parts = |to| extended(&echo(to), &[(44, &fragment(0, true, 7))]);
    silent.drops(&in_parts(VIP), Reason::Echo);
    silent.passes(&in_parts(CLIENT), Reason::Icmp);
    six.passes(&in_parts(VIP), Reason::Icmp);
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
        for changed in changed(frame, 1500) {
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
