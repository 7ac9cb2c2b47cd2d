//! Floods of forged packets against a small flow table: what they leave behind, and whom they cost something.
//!
//! The host build, a million packets each; the ICMP limit in the kernel program.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use necp_ebpf::{
    abi::{FLOWS_PER_BUCKET, ICMP_BURST, ICMP_RATE},
    flows::{FlowWord, State},
    packet::{protocol, tcp},
    room::{SHARED_PER_BUCKET, UDP_PER_BUCKET},
    verdict::Reason,
};
use necp_tests::{
    host_path::{HEADROOM, HostPath},
    kernel::{Kernel, Verdict},
};

use crate::{
    frames::{Flow, Spec, WEB_FLOW},
    headers,
    setup::{ALWAYS, DNS, LEGACY, OWNER, SLOTS, Setup, TUNNEL, mac},
};

const BUCKETS: usize = 4096;
const PACKETS: usize = 1_000_000;
/// Flows of each kind that are there before the flood.
const ESTABLISHED: u32 = 300;
/// Flows of each kind that come after it.
const LATER: u32 = 100;

const DNS_FLOW: Flow = WEB_FLOW.on(protocol::UDP, DNS);
const ALWAYS_FLOW: Flow = WEB_FLOW.on(protocol::TCP, ALWAYS);

/// Offsets in an Ethernet frame without tags and IPv4 options.
const SOURCE: usize = 26;
const SOURCE_PORT: usize = 34;
const SEQUENCE: usize = 38;

/// A packet path, flows on it, and an attacker.
struct Siege {
    path: HostPath,
    memory: Vec<u8>,
    random: u64,
    reasons: BTreeMap<Reason, u64>,
    established: Vec<(Flow, u32)>,
}

impl Siege {
    fn new(setup: &Setup) -> Self {
        let mut path = HostPath::new(SLOTS as usize, BUCKETS);
        setup.install(path.view());
        Self { path, memory: vec![0; 4096], random: 1, reasons: BTreeMap::new(), established: Vec::new() }
    }

    /// Slots in transition, with flows older than the change and younger ones, of all kinds of services.
    fn in_transition() -> Self {
        let mut siege = Self::new(&Setup::changed_from(LEGACY));
        for number in 0..ESTABLISHED {
            let client = |kind: u8, flow: Flow| numbered(flow, kind, number);
            siege.begin(client(1, WEB_FLOW), false, LEGACY, Reason::Adopted);
            siege.begin(client(2, WEB_FLOW), true, OWNER, Reason::Confirmed);
            siege.begin(client(3, ALWAYS_FLOW), true, OWNER, Reason::Confirmed);
            siege.begin(client(4, DNS_FLOW), false, OWNER, Reason::New);
        }
        siege
    }

    /// One flow, with or without a SYN, which must come to be on record.
    fn begin(&mut self, flow: Flow, syn: bool, server: u32, reason: Reason) {
        let (place, why) = self.first_packets(flow, syn);
        assert_eq!((place, why), (mac(server), reason), "{flow:?}");
        self.established.push((flow, server));
    }

    fn first_packets(&mut self, flow: Flow, syn: bool) -> ([u8; 6], Reason) {
        if syn {
            self.send(&flow.syn(1000).build());
        }
        let next = if flow.protocol == protocol::UDP { flow.udp(b"query") } else { flow.data(1001) };
        self.send(&next.build())
    }

    /// Where a frame went, and why.
    fn send(&mut self, frame: &[u8]) -> ([u8; 6], Reason) {
        let place = HEADROOM..HEADROOM + frame.len();
        self.memory[place.clone()].copy_from_slice(frame);
        let (_, reason, at) = self.path.run_in(&mut self.memory, place);
        let to = &self.memory[at.start..at.start + 6];
        (to.try_into().expect("six bytes"), reason)
    }

    fn forge(&mut self, frame: &[u8]) {
        let (_, reason) = self.send(frame);
        *self.reasons.entry(reason).or_default() += 1;
    }

    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let n = (self.random ^ self.random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        n ^ n >> 31
    }

    /// A million packets, `each` of which are made from a random source; established flows are asked all the while.
    fn flood(&mut self, each: &[Vec<u8>]) {
        let mut frames = each.to_vec();
        for number in 0..PACKETS / each.len() {
            let random = self.random();
            let [a, b, c, d, e, f, g, h] = random.to_be_bytes();
            for (frame, template) in frames.iter_mut().zip(each) {
                // Not 0, not a multicast address, and none of the clients'.
                frame[SOURCE..SOURCE + 4].copy_from_slice(&[11 + a % 150, b, c, d]);
                frame[SOURCE_PORT..SOURCE_PORT + 2].copy_from_slice(&[e | 1, f]);
                // The attacker knows its own sequence numbers: the second packet's distance to the first stays.
                if template[23] == protocol::TCP {
                    let isn = u32::from_be_bytes([e, f, g, h]);
                    let own = u32::from_be_bytes(template[SEQUENCE..SEQUENCE + 4].try_into().expect("four bytes"));
                    frame[SEQUENCE..SEQUENCE + 4].copy_from_slice(&isn.wrapping_add(own).to_be_bytes());
                }
            }
            frames.iter().for_each(|frame| self.forge(frame));
            if number % (PACKETS / each.len() / 8) == 0 {
                self.none_has_moved();
            }
        }
        self.none_has_moved();
    }

    /// So many SYNs from random sources, nobody being asked.
    fn syns(&mut self, count: usize) {
        let mut frame = WEB_FLOW.syn(0).build();
        for _ in 0..count {
            let [a, b, c, d, e, f, ..] = self.random().to_be_bytes();
            frame[SOURCE..SOURCE + 4].copy_from_slice(&[11 + a % 150, b, c, d]);
            frame[SOURCE_PORT..SOURCE_PORT + 2].copy_from_slice(&[e | 1, f]);
            self.forge(&frame);
        }
    }

    fn none_has_moved(&mut self) {
        for (flow, server) in self.established.clone() {
            let next = if flow.protocol == protocol::UDP { flow.udp(b"more") } else { flow.data(5000) };
            assert_eq!(self.send(&next.build()), (mac(server), Reason::Record), "{flow:?}");
        }
    }

    /// How many flows that begin now are on record with their second packet, of those that need it.
    fn later_on_record(&mut self, kind: u8, flow: Flow) -> u32 {
        let syn = flow.protocol == protocol::TCP;
        let on_record = |number: &u32| {
            let flow = numbered(flow, kind, *number);
            let (first, _) = self.first_packets(flow, syn);
            let next = if syn { flow.data(2000) } else { flow.udp(b"more") };
            let (second, reason) = self.send(&next.build());
            assert_eq!(first, second, "a new flow went on to another server: {flow:?}");
            reason == Reason::Record
        };
        (0..LATER).filter(on_record).count() as u32
    }

    /// New flows in the slots in transition: one that is not on record goes to one server all the same.
    fn later_in_transition(&mut self) -> u32 {
        (0..LATER)
            .filter(|&number| {
                let flow = numbered(WEB_FLOW, 7, number);
                let first = self.send(&flow.syn(1000).build());
                let (second, reason) = self.send(&flow.ack(1001).build());
                assert_eq!(first.0, second, "its handshake was torn apart: {flow:?}, {first:?}, {reason:?}");
                reason == Reason::Confirmed
            })
            .count() as u32
    }

    /// Records by class: UDP's, those for a change, lasting ones; and candidates.
    fn entries(&mut self) -> [usize; 4] {
        let mut all = [0; 4];
        for entry in self.path.view().flows().iter().flat_map(|bucket| &bucket.entries) {
            let word = FlowWord(entry.word.load());
            match word.state() {
                State::Empty => {}
                State::Busy => panic!("an entry stays busy"),
                State::Candidate => all[3] += 1,
                State::Record if entry.key.load() >> 63 != 0 => all[0] += 1,
                State::Record if word.like(FlowWord::EMPTY) != word => all[1] += 1,
                State::Record => all[2] += 1,
            }
        }
        all
    }

    fn got(&self, reason: Reason) -> u64 {
        self.reasons.get(&reason).copied().unwrap_or(0)
    }
}

fn numbered(flow: Flow, kind: u8, number: u32) -> Flow {
    Flow { source: [198, 51, kind, number as u8], source_port: 40_000 + (number >> 8) as u16, ..flow }
}

fn frames<const N: usize>(specs: [Spec; N]) -> Vec<Vec<u8>> {
    specs.iter().map(Spec::build).collect()
}

fn report(name: &str, siege: &mut Siege) {
    let [udp, change, lasting, candidates] = siege.entries();
    println!(
        "{name}: records {udp} UDP, {change} for a change, {lasting} lasting, {candidates} candidates of {} entries; {:?}",
        BUCKETS * FLOWS_PER_BUCKET,
        siege.reasons
    );
}

/// All but those that find another of their own class in their reserved entry: of 2048 such entries, 150 are taken before the
/// flood, and 100 are asked for.
const NEARLY_ALL: u32 = LATER * 3 / 4;
const ENTRIES: usize = BUCKETS * FLOWS_PER_BUCKET;

#[test]
fn a_flood_of_syns_leaves_no_trace_on_plain_slots() {
    let mut siege = Siege::new(&Setup::plain());
    siege.flood(&frames([WEB_FLOW.syn(0)]));
    report("SYNs, plain slots", &mut siege);
    assert_eq!((siege.entries(), siege.got(Reason::Plain)), ([0; 4], PACKETS as u64));
    assert!(siege.path.view().slots()[..14].iter().all(|slot| slot.load() == u64::from(OWNER)));
}

#[test]
fn a_flood_of_syns_in_transition_costs_candidates_only() {
    let mut siege = Siege::in_transition();
    let before = siege.entries();
    siege.flood(&frames([WEB_FLOW.syn(0)]));
    report("SYNs, slots in transition", &mut siege);
    let after = siege.entries();
    assert_eq!(before[..3], after[..3], "records came or went");
    assert!(after[3] > ENTRIES / 2, "the flood reached the table");
    let later = siege.later_in_transition();
    assert_eq!(later, LATER, "who answers before the next thousand SYNs is on record");
    assert!(siege.later_on_record(5, DNS_FLOW) >= NEARLY_ALL);
    assert!(siege.later_on_record(6, ALWAYS_FLOW) >= NEARLY_ALL);
}

/// What `necp-user/docs/floods.md` says of handshakes under a flood of SYNs.
#[test]
fn a_candidate_lasts_as_many_syns_as_there_are_shared_entries() {
    let shared = BUCKETS * SHARED_PER_BUCKET as usize;
    let mut siege = Siege::new(&Setup::changed_from(LEGACY));
    siege.flood(&frames([WEB_FLOW.syn(0)]));
    for (name, syns) in
        [("a hundredth", shared / 100), ("a tenth", shared / 10), ("a third", shared / 3), ("all", shared)]
    {
        let (mut whole, mut begun) = (0, 0);
        for round in 0..20 {
            let victims: Vec<Flow> = (0..LATER).map(|number| numbered(WEB_FLOW, 10 + round, number)).collect();
            let proposed = victims.iter().filter(|flow| siege.send(&flow.syn(1000).build()).1 == Reason::New).count();
            siege.syns(syns);
            let confirmed = |flow: &&Flow| siege.send(&flow.ack(1001).build()).1 == Reason::Confirmed;
            whole += victims.iter().filter(confirmed).count();
            begun += proposed;
            // What they left would be in the way of the next ones.
            Setup::changed_from(LEGACY).install(siege.path.view());
            siege.syns(2 * ENTRIES);
        }
        let (share, expected) = (whole as f64 / begun as f64, (-(syns as f64) / shared as f64).exp());
        println!(
            "{name} of {shared} entries' worth of SYNs: {share:.3} of {begun} handshakes whole, expected {expected:.3}"
        );
        assert!((share - expected).abs() < 0.08, "{name}: {share} of the handshakes, expected was {expected}");
    }
}

#[test]
fn forged_handshakes_end_at_their_quota() {
    for (name, answer) in [("guessed right", 1), ("guessed wrong", 77)] {
        let mut siege = Siege::in_transition();
        siege.flood(&frames([WEB_FLOW.syn(0), WEB_FLOW.ack(answer)]));
        ends_at_the_quota(&format!("SYN and forged ACK, {name}"), &mut siege);
        // What found no room went where its next packet goes.
        assert!(siege.got(Reason::NewUnrecorded) + siege.got(Reason::Legacy) > PACKETS as u64 / 2);
    }
}

#[test]
fn stray_acks_end_at_their_quota() {
    let mut siege = Siege::in_transition();
    siege.flood(&frames([WEB_FLOW.ack(0)]));
    ends_at_the_quota("stray ACKs", &mut siege);
    assert!(siege.got(Reason::Legacy) > PACKETS as u64 / 2);
}

fn ends_at_the_quota(name: &str, siege: &mut Siege) {
    report(name, siege);
    let [_, change, ..] = siege.entries();
    let quota = BUCKETS * SHARED_PER_BUCKET as usize;
    assert!(change > quota * 9 / 10 && change <= quota, "{change} of {quota}");
    let (udp, always) = (siege.later_on_record(5, DNS_FLOW), siege.later_on_record(6, ALWAYS_FLOW));
    println!("of {LATER} new flows each are on record: {udp} of UDP, {always} of a service whose flows all are");
    assert!(udp >= NEARLY_ALL && always >= NEARLY_ALL, "others were turned away");
    siege.later_in_transition();
}

#[test]
fn datagrams_end_at_their_quota() {
    let mut siege = Siege::in_transition();
    siege.flood(&frames([DNS_FLOW.udp(b"query"), DNS_FLOW.udp(b"query")]));
    report("two datagrams each", &mut siege);
    let [udp, ..] = siege.entries();
    let quota = BUCKETS * UDP_PER_BUCKET as usize;
    assert!(udp > quota * 9 / 10 && udp <= quota, "{udp} of {quota}");
    assert_eq!(siege.later_in_transition(), LATER);
    assert_eq!(siege.later_on_record(6, ALWAYS_FLOW), LATER);
}

#[test]
fn a_flood_of_one_service_on_record_leaves_room_for_udp() {
    let mut siege = Siege::in_transition();
    siege.flood(&frames([ALWAYS_FLOW.syn(0), ALWAYS_FLOW.ack(1)]));
    report("SYN and forged ACK to a service on record", &mut siege);
    assert!(siege.later_on_record(5, DNS_FLOW) >= NEARLY_ALL);
    siege.later_in_transition();
}

#[test]
fn all_floods_at_once_move_nothing_and_leave_what_is_reserved() {
    let mut siege = Siege::in_transition();
    let all = [WEB_FLOW.syn(0), WEB_FLOW.ack(1), WEB_FLOW.rst(9), WEB_FLOW.fin(9), DNS_FLOW.udp(b"query")];
    siege.flood(&frames(all));
    report("all at once", &mut siege);
    let always = siege.later_on_record(6, ALWAYS_FLOW);
    println!("{always} of {LATER} new flows of a service whose flows all are on record");
    assert!(always >= NEARLY_ALL, "others were turned away");
    siege.later_in_transition();
}

#[test]
fn forged_ends_only_shorten_a_time_that_data_restores() {
    let mut siege = Siege::in_transition();
    let flows: Vec<Flow> =
        siege.established.iter().map(|(flow, _)| *flow).filter(|f| f.protocol == protocol::TCP).collect();
    let closing = |siege: &mut Siege| {
        let view = siege.path.view();
        let words = view.flows().iter().flat_map(|bucket| &bucket.entries).map(|entry| FlowWord(entry.word.load()));
        words.filter(|word| word.is_closing()).count()
    };
    for flags in [tcp::RST, tcp::RST | tcp::ACK, tcp::FIN, tcp::FIN | tcp::ACK] {
        for round in 0..100 {
            for flow in &flows {
                siege.forge(&flow.tcp(flags, round * 7919, b"").build());
            }
        }
        assert_eq!(closing(&mut siege), flows.len(), "all are marked");
        siege.none_has_moved();
        assert_eq!(closing(&mut siege), 0, "data clears the mark");
    }
    assert_eq!(siege.got(Reason::Record), 400 * flows.len() as u64, "no forged end freed anything");
}

/// As many as may be at once, and then so many a second and CPU.
#[test]
fn icmp_errors_are_limited_in_the_kernel() {
    const TIME: Duration = Duration::from_secs(2);
    let kernel = Kernel::load(SLOTS, 16).expect("root, and a BPF file system at /sys/fs/bpf, are needed");
    Setup::owned_by(TUNNEL).install(kernel.view());
    let mut frame = headers::long(1480 - 20).build();
    // Not to be fragmented; the checksum is the server's business.
    frame[20] |= 0x40;
    stay_on_this_cpu();
    kernel.rest().expect("the map can be written");
    let before = kernel.plane().reasons().expect("counters");
    let (began, mut out, mut sent) = (Instant::now(), Vec::new(), 0u64);
    while began.elapsed() < TIME {
        for _ in 0..64 {
            let verdict = kernel.run_uncounted(&frame, &mut out).expect("it runs");
            assert!(matches!(verdict, Verdict::Tx | Verdict::Drop), "{verdict:?}");
            sent += 1;
        }
    }
    let took = began.elapsed();
    let after = kernel.plane().reasons().expect("counters");
    let of = |reason: Reason| after[reason as usize] - before[reason as usize];
    let (told, untold) = (of(Reason::TooBig), of(Reason::Untold));
    println!("{sent} packets in {took:?}: {told} were answered, {untold} were not");
    assert_eq!(told + untold, sent);
    let may = ICMP_BURST as f64 + ICMP_RATE as f64 * took.as_secs_f64();
    assert!(untold > told, "too slow to be a flood");
    // A tick of the coarse clock more or less; less if the machine does other things.
    assert!((told as f64) <= may + 0.01 * ICMP_RATE as f64, "{told} answers, {may} may be");
    assert!((told as f64) >= may / 2.0, "{told} answers, {may} may be");
}

/// Keeps the calling thread where it is: the allowance is each CPU's own.
fn stay_on_this_cpu() {
    // SAFETY: a set of CPUs on the stack, given with its size; only the calling thread is moved.
    let moved = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(usize::try_from(libc::sched_getcpu()).unwrap_or(0), &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    assert_eq!(moved, 0, "a thread can be kept on its CPU");
}
