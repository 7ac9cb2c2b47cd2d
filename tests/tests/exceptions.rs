//! Exceptions over real TCP, by servers whose every byte is written by hand: whose they are, how many there may be, when
//! they end, and long lists. What they do to packets is tested elsewhere.

use std::time::{Duration, Instant};

use anyhow::Result;
use aya::maps::{Array, Map, MapData};
use necp_ebpf::abi::{ExceptionMasks, names};
use necp_tests::{
    daemon::NetworkElement,
    hand::{BASIC_PAYLOAD, Hand, Message, Unit, opcode, start_unit},
    line::{farm, top},
    netns::wait_until,
    topology::{NE, Topology, VIP},
};

const SOON: Duration = Duration::from_secs(10);
const ALL: Unit = [0; 8];
const NONE: [Unit; 0] = [];
const LOCAL: u32 = 1;
const GLOBAL: u32 = 2;

fn start(more: &str) -> Result<(Topology, NetworkElement, Hand, Hand)> {
    let bed = Topology::builder().servers(2).build()?;
    let ne = NetworkElement::start(&bed, &(top(5.0) + &farm("web", VIP, &["10.0.0.0/24"], more)))?;
    let (one, two) = (Hand::join(bed.server(0).ns(), NE)?, Hand::join(bed.server(1).ns(), NE)?);
    Ok((bed, ne, one, two))
}

/// Clients of this /32 at tcp/7 (draft §5.7.1).
fn client(scope: u32, data1: u32, address: u32) -> Unit {
    [scope, data1, address, 32, 0, 0, 6, 7]
}

fn sorted(mut units: Vec<Unit>) -> Vec<Unit> {
    units.sort_unstable();
    units
}

#[test]
fn a_server_deletes_its_own_exceptions_only() -> Result<()> {
    let (bed, ne, mut one, mut two) = start("")?;
    let [s1, s2] = [0, 1].map(|index| u32::from(bed.server(index).ip()));
    assert_eq!(one.except_add(&[client(LOCAL, 0, 0xcb00_7101), client(GLOBAL, 0, 0xcb00_7102)])?, NONE);
    assert_eq!(two.except_add(&[client(LOCAL, 0, 0xcb00_7101)])?, NONE);
    // The farm does not trust its servers with global ones; installers are named.
    let of_one = [client(LOCAL, s1, 0xcb00_7101), client(LOCAL, s1, 0xcb00_7102)];
    let of_two = client(LOCAL, s2, 0xcb00_7101);
    assert_eq!(sorted(two.except_query(ALL)?), sorted(vec![of_one[0], of_one[1], of_two]));
    assert_eq!(one.except_query([0, s2, 0, 0, 0, 0, 0, 0])?, [of_two]);
    assert_eq!(one.except_query([GLOBAL, 0, 0, 0, 0, 0, 0, 0])?, NONE);

    // The same flows by another's hand: nothing of the first one's goes.
    assert_eq!(two.except_del(&[client(LOCAL, 0, 0xcb00_7101), client(LOCAL, 0, 0xcb00_7102)])?, NONE);
    assert_eq!(sorted(two.except_query(ALL)?), sorted(of_one.to_vec()));
    two.except_reset()?;
    assert_eq!(two.except_query(ALL)?.len(), 2);
    let status = ne.status()?;
    assert_eq!(status["exceptions"], 2);
    let farm = &status["farms"][0]["exceptions"];
    assert_eq!((&farm["local"], &farm["global"], &farm["masks"]), (&2.into(), &0.into(), &1.into()), "{farm}");
    assert_eq!(farm["by_server"], serde_json::json!([{ "address": "10.0.0.11", "exceptions": 2 }]));

    // STOP leaves them; INIT, and the end of the session, do not.
    assert_eq!(one.start(&[start_unit(1, 6, 7)])?, NONE);
    assert_eq!(one.stop(&[start_unit(1, 6, 7)])?, NONE);
    assert_eq!(two.except_query(ALL)?.len(), 2);
    one.request(opcode::INIT, &[[0; 8]])?;
    assert_eq!(two.except_query(ALL)?, NONE);
    assert_eq!(one.except_add(&[client(LOCAL, 0, 0xcb00_7103)])?, NONE);
    assert_eq!(two.except_query(ALL)?.len(), 1);
    drop(one);
    wait_until("they go with their session", SOON, || two.except_query(ALL).is_ok_and(|list| list.is_empty()))
}

#[test]
fn global_exceptions_need_the_farms_trust_and_limits_hold() -> Result<()> {
    let (bed, mut ne, mut one, mut two) = start("global_exceptions = true\nmax_exceptions = 3")?;
    let s1 = u32::from(bed.server(0).ip());
    let wanted: Vec<Unit> = (1..=5).map(|address| client(GLOBAL, 0, address)).collect();
    let bad = [1, 0, 9, 33, 0, 0, 0, 0];
    let sent: Vec<Unit> = [&wanted[..2], &[bad], &wanted[2..]].concat();
    assert_eq!(one.except_add(&sent)?, [bad, wanted[3], wanted[4]], "exactly what is bad, and what is too many");
    let listed: Vec<Unit> = (1..=3).map(|address| client(GLOBAL, s1, address)).collect();
    assert_eq!(sorted(two.except_query(ALL)?), listed);
    // What is there may be overwritten, and another server is not concerned.
    assert_eq!(one.except_add(&[client(LOCAL, 60, 2)])?, NONE);
    assert_eq!(two.except_add(&wanted[..3])?, NONE);
    assert_eq!(one.except_del(&[wanted[0]])?, NONE);
    assert_eq!(one.except_add(&[wanted[3]])?, NONE);
    // A farm cannot be switched off: everything is a local one.
    two.except_reset()?;
    assert_eq!(two.except_add(&[[GLOBAL, 0, 0, 0, 0, 0, 0, 0]])?, NONE);
    let s2 = u32::from(bed.server(1).ip());
    assert_eq!(two.except_query([0, s2, 0, 0, 0, 0, 0, 0])?, [[LOCAL, s2, 0, 0, 0, 0, 0, 0]]);
    // A query that is none, and a message without units.
    let answer = one.request(opcode::EXCEPTION_QUERY, &[[3, 0, 0, 0, 0, 0, 0, 0]])?;
    assert_eq!((answer.flags, answer.units), (0x0005, vec![[3, 0, 0, 0, 0, 0, 0, 0]]));
    let answer = one.request(opcode::EXCEPTION_ADD, &[])?;
    assert_eq!((answer.opcode, answer.flags, answer.units.len()), (opcode::EXCEPTION_ADD_ACK, 0x0004, 0));
    ne.process().wait_for_log("max_exceptions", SOON)?;
    Ok(())
}

#[test]
fn an_exception_is_gone_within_a_second_of_its_expiry() -> Result<()> {
    let (_bed, ne, mut one, mut two) = start("")?;
    let began = Instant::now();
    assert_eq!(one.except_add(&[client(LOCAL, 2, 1), client(LOCAL, 60, 2), client(LOCAL, 1, 3)])?, NONE);
    // Added again: its time begins again.
    assert_eq!(one.except_add(&[client(LOCAL, 3, 3)])?, NONE);
    let mut last = (Duration::ZERO, 3);
    let mut seen = vec![last];
    while last.1 > 1 {
        assert!(began.elapsed() < SOON, "{seen:?}");
        std::thread::sleep(Duration::from_millis(20));
        last = (began.elapsed(), two.except_query(ALL)?.len());
        if seen.last().is_some_and(|(_, count)| *count != last.1) {
            seen.push(last);
        }
    }
    let [_, (first, 2), (second, 1)] = seen[..] else { panic!("{seen:?}") };
    for (at, ttl) in [(first, 2.0), (second, 3.0)] {
        assert!((ttl..ttl + 1.0).contains(&at.as_secs_f64()), "{ttl} s, and gone after {at:?}");
    }
    assert_eq!(ne.status()?["exceptions"], 1);
    Ok(())
}

/// Masks that the packet path looks at for the first farm.
fn masks(bed: &Topology) -> Result<u32> {
    let map = Map::from_map_data(MapData::from_pin(bed.pins().join("ne").join(names::EXCEPTION_MASKS))?)?;
    let masks: Array<MapData, Masks> = map.try_into()?;
    Ok(masks.get(&0, 0)?.0.masks.iter().map(|mask| u32::from(mask.used)).sum())
}

#[repr(transparent)]
#[derive(Clone, Copy)]
struct Masks(ExceptionMasks);

// SAFETY: plain old data without padding.
unsafe impl aya::Pod for Masks {}

/// How long a server's exceptions with a TTL of 2 s are in the packet path, while another server's million go.
#[test]
fn an_exception_leaves_the_packet_path_in_time_while_a_million_others_go() -> Result<()> {
    const MANY: u32 = 1_000_000;
    const AT_ONCE: u32 = 25_000;
    let (bed, _ne, mut one, two) = start("max_exceptions = 1000000")?;
    // Who does not wait for an answer answers no keepalives.
    drop(two);
    for from in (1..=MANY).step_by(AT_ONCE as usize) {
        let units: Vec<Unit> = (from..from + AT_ONCE).map(|address| client(LOCAL, 0, address)).collect();
        assert_eq!(one.except_add(&units)?, NONE);
    }
    assert_eq!(masks(&bed)?, 1);
    let mut two = Hand::join(bed.server(1).ns(), NE)?;
    let began = Instant::now();
    // A mask of their own, which is gone with the last of them.
    let units: Vec<Unit> = (1..=100).map(|net| [LOCAL, 2, net << 8, 24, 0, 0, 6, 7]).collect();
    assert_eq!(two.except_add(&units)?, NONE);
    assert_eq!(masks(&bed)?, 2);
    std::thread::sleep(Duration::from_millis(1900).saturating_sub(began.elapsed()));
    let reset_at = Instant::now();
    let reset = Message { flags: 0, opcode: opcode::EXCEPTION_RESET, request_id: 7, units: Vec::new() };
    one.send(&reset.bytes())?;
    let mut left = 2;
    while left == 2 {
        left = masks(&bed)?;
        assert!(began.elapsed() < SOON, "not gone after {:?}", began.elapsed());
        std::thread::sleep(Duration::from_millis(5));
    }
    let gone = began.elapsed();
    let others_left = left;
    while one.receive()?.expect("the acknowledgement").opcode != opcode::EXCEPTION_RESET_ACK {}
    println!("TTL 2 s, and gone after {gone:?}; a million reset in {:?}", reset_at.elapsed());
    assert_eq!(masks(&bed)?, 0);
    assert_eq!(others_left, 1, "the million were still going");
    assert!((2.0..3.0).contains(&gone.as_secs_f64()), "{gone:?}");
    Ok(())
}

#[test]
fn a_reader_of_a_long_list_that_stops_holds_up_nobody() -> Result<()> {
    const MANY: u32 = 200_000;
    const AT_ONCE: u32 = 20_000;
    let (bed, _ne, mut one, mut two) = start("max_exceptions = 1000000")?;
    for from in (1..=MANY).step_by(AT_ONCE as usize) {
        let units: Vec<Unit> = (from..from + AT_ONCE).map(|address| client(LOCAL, 0, address)).collect();
        assert_eq!(one.except_add(&units)?, NONE);
    }
    // 6.4 MB, more than sockets hold, and not one byte is read for a while.
    let query = Message { flags: BASIC_PAYLOAD, opcode: opcode::EXCEPTION_QUERY, request_id: 7, units: vec![ALL] };
    two.send(&query.bytes())?;
    two.wait_for_bytes()?;
    let mut slowest = Duration::ZERO;
    for round in 0..40 {
        let began = Instant::now();
        assert_eq!(one.start(&[start_unit(1, 6, 7)])?, NONE);
        assert_eq!(one.stop(&[start_unit(1, 6, 7)])?, NONE);
        // What is added and deleted meanwhile does not change the length that was announced.
        assert_eq!(one.except_del(&[client(LOCAL, 0, MANY - round)])?, NONE);
        assert_eq!(one.except_add(&[client(LOCAL, 0, MANY + 1 + round)])?, NONE);
        slowest = slowest.max(began.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("START, STOP, DEL and ADD beside a list that is not read: {slowest:?} at most");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    let list = loop {
        let message = two.receive()?.expect("the list");
        if message.request_id == 7 && message.opcode == opcode::EXCEPTION_RESP {
            break message.units;
        }
    };
    assert_eq!(list.len(), MANY as usize);
    let s1 = u32::from(bed.server(0).ip());
    let distinct: std::collections::BTreeSet<u32> = list.iter().map(|unit| unit[2]).collect();
    assert!(list.iter().all(|unit| *unit == client(LOCAL, s1, unit[2]) && (1..=MANY).contains(&unit[2])));
    assert!((1..=MANY - 40).all(|address| distinct.contains(&address)), "all that stayed are in it");
    // And the session that read so late goes on.
    assert_eq!(two.except_query([0, 0, 1, 32, 0, 0, 0, 0])?, [client(LOCAL, s1, 1)]);
    Ok(())
}
