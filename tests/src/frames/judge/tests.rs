//! What the judge says of frames that are right, and of every way to be wrong.

use super::*;
use crate::{
    frame::{Flow, flags},
    frames::scene::{
        self, FIRST_PROXY, Scene, VIP,
        crossing::{Exclusion, INTERCEPTED, servers_of},
        server_mac,
    },
    host_path::HostPath,
};
use necp_ebpf::{
    abi::{ACCEPTS, ALIVE, ExceptionMasks, FORWARDING_SHIFT, GRE, LAYER_2, LAYER_3, NONE, REACHABLE, Server},
    slot::SlotWord,
};
use rand::{SeedableRng as _, rngs::SmallRng};
use std::{collections::BTreeSet, net::SocketAddrV4};

fn flow(port: u16) -> Flow {
    Flow {
        source_mac: [2, 0, 0, 0, 8, 8],
        destination_mac: OWN_MAC,
        source: SocketAddrV4::new([198, 51, 100, 1].into(), 40_000),
        destination: SocketAddrV4::new(VIP.into(), port),
        ttl: 64,
    }
}

/// The host build with server 2 behind interface `port`.
fn tables(port: u8) -> HostPath {
    let mut host = HostPath::new(scene::SLOTS as usize, scene::FLOW_BUCKETS as usize);
    Scene::random(&mut SmallRng::seed_from_u64(1)).install(host.view());
    let flags = ALIVE | ACCEPTS | REACHABLE;
    let server = Server { mac: server_mac(2), flags, port, forwarding: 1, ..Server::default() };
    assert!(host.view().set_server(2, &server));
    // New flows find it, or nobody.
    for (slot, owner) in host.view().slots().iter().zip([2, NONE].into_iter().cycle()) {
        slot.store(SlotWord::plain(owner).0);
    }
    host
}

/// As it would come out for server 2.
fn sent(frame: &[u8]) -> Vec<u8> {
    [&server_mac(2)[..], &OWN_MAC, &frame[12..]].concat()
}

/// Nothing is intercepted, nothing excepted.
static NO_RULES: Rules = Rules { crossings: BTreeSet::new(), exceptions: Vec::new() };

fn judged(frame: &[u8], deed: Deed<'_>, tables: View<'_>, parts: &mut Parts) -> Result<Option<Difference>, String> {
    judge(frame, deed, Ground { tables, rules: &NO_RULES }, parts).map(|judged| judged.difference)
}

fn says(frame: &[u8], verdict: Verdict, reason: Reason, out: &[u8]) -> Result<Option<Difference>, String> {
    judged(frame, Deed { verdict, reason, frame: out }, tables(0).view(), &mut Parts::default())
}

#[test]
fn what_is_right_is_not_complained_of() {
    let frame = flow(80).tcp(flags::ACK, 1, 1, b"hello");
    assert_eq!(says(&frame, Verdict::Tx, Reason::Plain, &sent(&frame)), Ok(None));
    assert_eq!(says(&frame, Verdict::Pass, Reason::NoServer, &frame), Ok(None));
    let other = flow(82).tcp(flags::ACK, 1, 1, b"hello");
    assert_eq!(says(&other, Verdict::Pass, Reason::NotOurs, &other), Ok(None));
    let mut udp = flow(53).udp(b"hello");
    udp[38..40].fill(0);
    assert_eq!(says(&udp, Verdict::Pass, Reason::Malformed, &udp), Ok(Some(Difference::UdpLengthZero)));
}

#[test]
fn every_wrong_deed_is_noticed() {
    let frame = flow(80).tcp(flags::ACK, 1, 1, b"hello");
    let out = sent(&frame);
    let wrong = |verdict, reason, out: &[u8]| says(&frame, verdict, reason, out).unwrap_err();
    assert!(wrong(Verdict::Pass, Reason::Malformed, &frame).contains("to etherparse it is Ours"));
    assert!(wrong(Verdict::Pass, Reason::NotOurs, &frame).contains("to etherparse it is Ours"));
    assert!(wrong(Verdict::Drop, Reason::Plain, &frame).contains("Drop for Plain"));
    assert!(wrong(Verdict::Aborted, Reason::NoServer, &frame).contains("Aborted for NoServer"));
    assert!(wrong(Verdict::Pass, Reason::NoServer, &out).contains("passed on, but changed"));
    assert!(wrong(Verdict::Redirect, Reason::Plain, &out).contains("at port 0"));
    assert!(wrong(Verdict::Tx, Reason::Plain, &frame).contains("no server"));
    let mut changed = out.clone();
    changed[22] -= 1;
    assert!(wrong(Verdict::Tx, Reason::Plain, &changed).contains("more than the MAC addresses"));
    let short = &frame[..frame.len() - 1];
    let malformed = says(short, Verdict::Tx, Reason::Plain, &sent(short)).unwrap_err();
    assert!(malformed.contains("to etherparse it is Malformed"));
    let deed = Deed { verdict: Verdict::Tx, reason: Reason::Plain, frame: &out };
    assert!(judged(&frame, deed, tables(1).view(), &mut Parts::default()).unwrap_err().contains("at port 1"));
    for forwarding in [GRE, LAYER_3] {
        let mut host = tables(0);
        let server = host.view().server(2).unwrap();
        let flags = server.flags | forwarding << FORWARDING_SHIFT;
        host.view().set_server(2, &Server { flags, forwarding, ..server });
        assert!(judged(&frame, deed, host.view(), &mut Parts::default()).is_err(), "sent as to a layer-2 server");
    }
    let mut host = tables(0);
    let server = host.view().server(2).unwrap();
    host.view().set_server(2, &Server { flags: ALIVE, ..server });
    assert!(
        judged(&frame, deed, host.view(), &mut Parts::default()).unwrap_err().contains("no server that can be reached")
    );
    assert!(wrong(Verdict::Tx, Reason::Expired, &out).contains("hops"));
    assert!(wrong(Verdict::Pass, Reason::ReplyRouted, &frame).contains("to etherparse it is Ours"));
}

/// The host build with all slots owned by server 2, which takes this forwarding type.
fn owned(forwarding: u8) -> HostPath {
    let mut host = tables(0);
    let [a, b, c, d] = scene::server_address(2);
    let address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d];
    let server = host.view().server(2).unwrap();
    let flags = server.flags | forwarding << FORWARDING_SHIFT;
    host.view().set_server(2, &Server { flags, forwarding, address, ..server });
    host.view().set_exception_masks(0, &ExceptionMasks::default());
    host.view().slots().iter().for_each(|slot| slot.store(SlotWord::plain(2).0));
    host
}

/// A router's error about what was sent from one end to the other.
fn error_about(flow: &Flow, router: [u8; 4]) -> Vec<u8> {
    let quoted = &flow.tcp(flags::ACK, 1, 1, b"even")[14..];
    crate::frame::needs_fragmentation(OWN_MAC, router.into(), 1280, quoted)
}

#[test]
fn every_byte_that_should_have_stayed_is_noticed() {
    let to_server = Flow { destination: SocketAddrV4::new(scene::server_address(2).into(), 8080), ..flow(8080) };
    let mut first = flow(53).udp(b"hello, this is a part");
    (first[20], first[21]) = (0x20, 0);
    crate::frames::stack::mend_header(&mut first, 14);
    let frames = [
        (flow(8080).tcp(flags::SYN, 1, 0, b""), Reason::New),
        (flow(53).udp(b"hello"), Reason::New),
        (first, Reason::Record),
        (error_about(&flow(8080).reversed(), [198, 51, 100, 9]), Reason::Quoted),
        (to_server.reversed().tcp(flags::ACK, 1, 1, b"hello"), Reason::ReplyRouted),
        (error_about(&to_server, scene::server_address(2)), Reason::ReplyRouted),
        (error_about(&to_server, [198, 51, 100, 9]), Reason::ReplyRouted),
    ];
    for forwarding in [LAYER_2, LAYER_3] {
        let mut host = owned(forwarding);
        for (frame, reason) in
            frames.iter().filter(|(_, reason)| forwarding == LAYER_3 || *reason != Reason::ReplyRouted)
        {
            let mut frame = frame.clone();
            frame[..6].copy_from_slice(&OWN_MAC);
            let out = host.run(&frame);
            assert_eq!(out.reason, *reason, "forwarding type {forwarding}");
            let mut says = |bytes: &[u8]| {
                let deed = Deed { verdict: out.verdict, reason: out.reason, frame: bytes };
                judged(&frame, deed, host.view(), &mut Parts::default())
            };
            says(&out.frame).unwrap();
            for place in 0..out.frame.len() {
                let mut wrong = out.frame.clone();
                wrong[place] ^= 0x10;
                assert!(says(&wrong).is_err(), "{reason:?}, forwarding type {forwarding}, byte {place}");
            }
        }
    }
}

#[test]
fn parts_and_errors_that_go_elsewhere_are_noticed() {
    let mut host = owned(LAYER_2);
    let mut parts = Parts::default();
    let mut says = |frame: &[u8], verdict, reason, out: &[u8]| {
        judged(frame, Deed { verdict, reason, frame: out }, host.view(), &mut parts)
    };
    let mut first = flow(443).udp(&[7; 64]);
    (first[20], first[21]) = (0x20, 0);
    let mut last = first.clone();
    (last[20], last[21]) = (0, 9);
    // Nobody has seen the first.
    says(&last, Verdict::Drop, Reason::StrayPart, &last).unwrap();
    assert!(says(&last, Verdict::Pass, Reason::Fragment, &last).is_err());
    assert!(says(&last, Verdict::Tx, Reason::Part, &sent(&last)).is_err());
    says(&first, Verdict::Tx, Reason::Plain, &sent(&first)).unwrap();
    says(&last, Verdict::Tx, Reason::Part, &sent(&last)).unwrap();
    assert!(says(&last, Verdict::Drop, Reason::StrayPart, &last).is_err());
    assert!(says(&last, Verdict::Pass, Reason::Fragment, &last).is_err());
    // An error about a flow of a service whose slots all have servers.
    let error = error_about(&flow(80).reversed(), [198, 51, 100, 9]);
    says(&error, Verdict::Tx, Reason::Quoted, &sent(&error)).unwrap();
    assert!(says(&error, Verdict::Pass, Reason::Icmp, &error).unwrap_err().contains("nobody gets an error"));
    let other = error_about(&flow(82).reversed(), [198, 51, 100, 9]);
    says(&other, Verdict::Pass, Reason::Icmp, &other).unwrap();
    assert!(says(&other, Verdict::Tx, Reason::Quoted, &sent(&other)).is_err());
}

/// All slots of the VIP owned by server 2, of what is intercepted by the first server of its farm; all by layer 2.
fn intercepting() -> HostPath {
    let mut host = owned(LAYER_2);
    let view = host.view();
    let flags = ALIVE | ACCEPTS | REACHABLE;
    for id in FIRST_PROXY..scene::SERVERS {
        assert!(view.set_server(id, &Server { mac: server_mac(id), flags, forwarding: LAYER_2, ..Server::default() }));
    }
    for (index, (farm, ..)) in INTERCEPTED.into_iter().enumerate() {
        let slots = &view.slots()[scene::crossing::slots_of(index)];
        slots.iter().for_each(|slot| slot.store(SlotWord::plain(servers_of(farm).start).0));
    }
    host
}

/// What the judge says of a frame that went to this server by layer 2, or on to the kernel.
fn says_crossing(
    host: &mut HostPath,
    rules: &Rules,
    frame: &[u8],
    reason: Reason,
    to: Option<u32>,
) -> Result<Option<Crossing>, String> {
    let out = to.map_or(frame.to_vec(), |id| [&server_mac(id)[..], &OWN_MAC, &frame[12..]].concat());
    let verdict = if to.is_some() { Verdict::Tx } else { Verdict::Pass };
    let ground = Ground { tables: host.view(), rules };
    let deed = Deed { verdict, reason, frame: &out };
    judge(frame, deed, ground, &mut Parts::default()).map(|judged| judged.crossing)
}

/// A client's packet to these who are not the VIP.
fn crossing(to: [u8; 4], port: u16) -> Flow {
    Flow { destination: SocketAddrV4::new(to.into(), port), ..flow(port) }
}

#[test]
fn what_is_captured_without_need_or_let_through_is_noticed() {
    let (mut host, rules) = (intercepting(), Rules::least());
    let mut says = |frame: &[u8], reason: Reason, to: Option<u32>| says_crossing(&mut host, &rules, frame, reason, to);
    let (proxy, colleague, other) = (FIRST_PROXY, FIRST_PROXY + 1, servers_of(2).start);
    let flow = crossing([203, 0, 113, 80], 8000);
    let frame = flow.tcp(flags::ACK, 1, 1, b"hello");
    assert_eq!(says(&frame, Reason::Plain, Some(proxy)), Ok(Some(Crossing::Taken)));
    for (reason, to, wrong) in [
        (Reason::Plain, Some(other), "farm 1's, but"),
        (Reason::Plain, Some(2), "farm 1's, but"),
        (Reason::Plain, Some(colleague), "neither slots nor"),
        (Reason::Record, Some(proxy), "neither slots nor"),
        (Reason::Adopted, Some(proxy), "neither slots nor"),
        (Reason::NotOurs, None, "to etherparse it is Crossing"),
        (Reason::Direct, None, "there are servers for"),
        (Reason::NoServer, None, "there are servers for"),
    ] {
        assert!(says(&frame, reason, to).unwrap_err().contains(wrong), "{reason:?} to {to:?}");
    }
    let fetch = Flow { source: SocketAddrV4::new(scene::server_address(proxy).into(), 40_000), ..flow };
    let vip = crossing(VIP, 80).tcp(flags::ACK, 1, 1, b"");
    assert_eq!(says(&vip, Reason::Plain, Some(2)), Ok(Some(Crossing::Vip)));
    assert!(says(&vip, Reason::Plain, Some(proxy)).unwrap_err().contains("farm 0's, but"));
    for (flow, why) in [
        (fetch, Some(Crossing::Fetch)),
        (crossing([203, 0, 113, 1], 8000), Some(Crossing::Own)),
        (crossing([8, 8, 8, 8], 8000), None),
        (crossing([203, 0, 113, 80], 8001), None),
    ] {
        let frame = flow.tcp(flags::ACK, 1, 1, b"hello");
        assert_eq!(says(&frame, Reason::NotOurs, None), Ok(why));
        assert!(says(&frame, Reason::Plain, Some(proxy)).is_err(), "captured, in spite of {why:?}");
    }
}

#[test]
fn errors_about_what_is_intercepted_have_one_direction() {
    let (mut host, rules) = (intercepting(), Rules::least());
    let mut says = |frame: &[u8], reason: Reason, to: Option<u32>| says_crossing(&mut host, &rules, frame, reason, to);
    let flow = crossing([203, 0, 113, 80], 8000);
    let to_origin = error_about(&flow.reversed(), [198, 51, 100, 9]);
    assert_eq!(says(&to_origin, Reason::Quoted, Some(FIRST_PROXY)), Ok(Some(Crossing::Error)));
    assert!(says(&to_origin, Reason::Icmp, None).unwrap_err().contains("nobody gets an error"));
    assert!(says(&to_origin, Reason::Quoted, Some(FIRST_PROXY + 1)).is_err());
    let to_client = error_about(&flow, [198, 51, 100, 9]);
    assert_eq!(says(&to_client, Reason::Icmp, None), Ok(None));
    assert!(says(&to_client, Reason::Quoted, Some(FIRST_PROXY)).is_err());
}

#[test]
fn new_flows_that_exceptions_name_are_for_others() {
    let mut host = intercepting();
    let exclusion = Exclusion {
        farm: 1,
        source: "198.51.100.0/24".parse().unwrap(),
        destination: "203.0.113.80/32".parse().unwrap(),
        protocol: None,
        port: Some(8000),
        installer: None,
    };
    let syn = crossing([203, 0, 113, 80], 8000).tcp(flags::SYN, 1, 0, b"");
    let later = crossing([203, 0, 113, 80], 8000).tcp(flags::ACK, 2, 1, b"");
    let sent = |frame: &[u8]| [&server_mac(FIRST_PROXY)[..], &OWN_MAC, &frame[12..]].concat();
    for (installer, sends, cuts) in
        [(None, false, true), (Some(FIRST_PROXY), false, true), (Some(FIRST_PROXY + 1), true, false)]
    {
        let rules = Rules { exceptions: vec![Exclusion { installer, ..exclusion }], ..Rules::least() };
        let mut says = |frame: &[u8], verdict, reason, out: &[u8]| {
            let ground = Ground { tables: host.view(), rules: &rules };
            judge(frame, Deed { verdict, reason, frame: out }, ground, &mut Parts::default()).is_ok()
        };
        assert_eq!(says(&syn, Verdict::Tx, Reason::Plain, &sent(&syn)), sends, "{installer:?}");
        assert_eq!(says(&syn, Verdict::Pass, Reason::Direct, &syn), cuts, "{installer:?}");
        assert!(says(&later, Verdict::Tx, Reason::Plain, &sent(&later)), "{installer:?}: no new flow");
    }
}

#[test]
fn checksums_are_valid_or_not() {
    let mut frame = flow(80).tcp(flags::ACK, 1, 1, b"hello");
    let valid = Checksums { header: true, transport: Some(true) };
    assert_eq!(Checksums::of(&frame[14..]), Some(valid));
    frame[22] -= 1;
    let header = Checksums { header: false, ..valid };
    assert_eq!(Checksums::of(&frame[14..]), Some(header));
    assert!(valid.as_good_as(header) && !header.as_good_as(valid));
    *frame.last_mut().unwrap() ^= 1;
    let none = Checksums { header: false, transport: Some(false) };
    assert_eq!(Checksums::of(&frame[14..]), Some(none));
    assert!(!none.as_good_as(header) && header.as_good_as(none));
    assert_eq!(Checksums::of(&frame[14..40]), None);
}
