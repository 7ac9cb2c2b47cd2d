//! A case: tables, frames in, what must come out. Every case runs through the kernel program and through the host build,
//! and after every frame both must agree with the expectation and with each other, tables and counters included.

use ipnet::IpNet;
use necp_ebpf::{
    abi::ServerStats,
    flows::{FlowWord, State},
    host::View,
    slot::TRACKED,
    tables::halves,
    verdict::Reason,
};
use necp_tests::{
    host_path::{HostPath, parse_bytes},
    kernel::{Kernel, OTHER_MAC, OWN_MAC, Outcome, Verdict},
};

use crate::{
    frames::Spec,
    setup::{FLOW_BUCKETS, REMOTE, SERVERS, SLOTS, Setup, crossings, mac},
};

/// One described case.
pub struct Case {
    pub name: String,
    /// The rule, or the section of the RFC.
    pub why: &'static str,
    pub setup: Setup,
    pub steps: Vec<Step>,
}

/// A frame and what it does.
pub struct Step {
    pub frame: Vec<u8>,
    pub fate: Fate,
    pub after: After,
}

/// Verdict, reason and frame that must come out.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// Untouched, on to the kernel.
    Pass(Reason),
    /// Untouched, ended.
    Drop(Reason),
    /// New MAC addresses and nothing else; out by the interface that leads to this server.
    To(u32, Reason),
    /// These very bytes.
    Becomes(Verdict, Reason, &'static [u8]),
}

/// What must have become of the tables.
#[derive(Clone, Copy, Debug)]
pub enum After {
    /// Nothing.
    Untouched,
    /// This of the frame's own flow, and nothing of others.
    Trace(Trace),
    /// This of the frame's own flow, and nothing of others, the slot's bits included.
    Kept(Trace),
}

/// All that the tables say of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Server and initial sequence number.
    candidate: Option<(u32, u32)>,
    /// Server, initial sequence number, closing, age.
    record: Option<(u32, u32, bool, u32)>,
    /// Another flow's candidate had to go.
    evicts: bool,
}

/// A candidate for this server.
pub fn candidate(server: u32, isn: u32) -> Trace {
    Trace { candidate: Some((server, isn)), ..Trace::default() }
}

/// A young record.
pub fn record(server: u32, isn: u32) -> Trace {
    Trace { record: Some((server, isn, false, 0)), ..Trace::default() }
}

/// Neither candidate nor record, where there was one before.
pub fn nothing() -> Trace {
    Trace::default()
}

impl Trace {
    pub fn closing(mut self) -> Self {
        self.record = self.record.map(|(server, isn, _, age)| (server, isn, true, age));
        self
    }

    pub fn and(self, other: Self) -> Self {
        Self {
            candidate: self.candidate.or(other.candidate),
            record: self.record.or(other.record),
            evicts: self.evicts || other.evicts,
        }
    }

    pub fn evicting(self) -> Self {
        Self { evicts: true, ..self }
    }
}

impl Case {
    pub fn new(name: impl Into<String>, why: &'static str, setup: Setup) -> Self {
        Self { name: name.into(), why, setup, steps: Vec::new() }
    }

    /// A frame that leaves the tables alone.
    pub fn frame(self, spec: Spec, fate: Fate) -> Self {
        self.bytes(spec.build(), fate)
    }

    pub fn bytes(mut self, frame: Vec<u8>, fate: Fate) -> Self {
        self.steps.push(Step { frame, fate, after: After::Untouched });
        self
    }

    /// What the last frame left in the tables; the slot is as it was.
    pub fn keeps(mut self, trace: Trace) -> Self {
        self.steps.last_mut().expect("a frame comes first").after = After::Kept(trace);
        self
    }

    /// What the last frame left in the tables; the slot is TRACKED then.
    pub fn leaves(mut self, trace: Trace) -> Self {
        self.steps.last_mut().expect("a frame comes first").after = After::Trace(trace);
        self
    }
}

/// Both builds of the packet path.
pub struct Bench {
    pub kernel: Kernel,
    pub host: HostPath,
    /// Every server's counters after the last frame, the kernel's and the host's.
    stats: [Vec<ServerStats>; 2],
}

impl Bench {
    pub fn load() -> Self {
        let mut kernel =
            Kernel::load(SLOTS, FLOW_BUCKETS).expect("root, and a BPF file system at /sys/fs/bpf, are needed");
        let mut host = HostPath::new(SLOTS as usize, FLOW_BUCKETS as usize);
        kernel.set_crossings(&crossings()).expect("the map has room");
        let (mut four, mut six) = (Vec::new(), Vec::new());
        for (set, net) in crossings() {
            match net {
                IpNet::V4(net) => {
                    let [network, mask] = [net.network(), net.netmask()].map(|one| u32::from_ne_bytes(one.octets()));
                    four.push((set, network, mask));
                }
                IpNet::V6(net) => six.push((set, halves(net.network().octets()), halves(net.netmask().octets()))),
            }
        }
        host.set_crossings(four, six);
        let none = vec![ServerStats::default(); SERVERS as usize];
        Self { kernel, host, stats: [none.clone(), none] }
    }

    /// Runs a case; what is wrong with it, if anything.
    pub fn run(&mut self, case: &Case) -> Result<(), String> {
        self.install(&case.setup);
        let result = case.steps.iter().enumerate().try_for_each(|(number, step)| {
            self.step(&case.setup, step)
                .map_err(|wrong| format!("{} ({}), frame {}: {wrong}", case.name, case.why, number + 1))
        });
        self.remove(&case.setup);
        result
    }

    pub fn install(&mut self, setup: &Setup) {
        self.kernel.forget_fragments().expect("the map can be emptied");
        self.host.forget_fragments();
        setup.install(self.kernel.view());
        setup.install(self.host.view());
    }

    pub fn remove(&mut self, setup: &Setup) {
        setup.remove(self.kernel.view());
        setup.remove(self.host.view());
    }

    /// The same frame through both; what they did, if it was the same.
    pub fn both(&mut self, frame: &[u8]) -> Result<Outcome, String> {
        self.kernel.rest().map_err(|error| error.to_string())?;
        self.host.rest();
        let kernel = self.kernel.run(frame).map_err(|error| format!("{error:#}"))?;
        let host = self.host.run(frame);
        let counted = self.counted()?;
        if kernel != host {
            return Err(format!("the kernel says {}, the host {}", brief(&kernel), brief(&host)));
        }
        let (tables, host_tables) = (Snapshot::of(self.kernel.view()), Snapshot::of(self.host.view()));
        if tables != host_tables {
            return Err(format!("the tables differ after {}: {}", brief(&kernel), tables.difference(&host_tables)));
        }
        counted.map(|()| kernel)
    }

    /// Whether both counted the same for every server since the last call.
    fn counted(&mut self) -> Result<Result<(), String>, String> {
        let kernel = self.kernel.plane().server_stats(SERVERS).map_err(|error| error.to_string())?;
        let host: Vec<_> = (0..SERVERS).map(|id| self.host.stats(id)).collect();
        let [kernel_before, host_before] = std::mem::replace(&mut self.stats, [kernel.clone(), host.clone()]);
        let since = |now: &[ServerStats], then: &[ServerStats]| -> Vec<[u64; 4]> {
            let pairs = now.iter().zip(then);
            pairs
                .map(|(n, t)| [n.packets - t.packets, n.bytes - t.bytes, n.flows - t.flows, n.replies - t.replies])
                .collect()
        };
        let (kernel, host) = (since(&kernel, &kernel_before), since(&host, &host_before));
        let same = kernel == host;
        Ok(same
            .then_some(())
            .ok_or_else(|| format!("packets, bytes, flows, replies: kernel {kernel:?}, host {host:?}")))
    }

    fn step(&mut self, setup: &Setup, step: &Step) -> Result<(), String> {
        let before = Snapshot::of(self.host.view());
        let outcome = self.both(&step.frame)?;
        check_fate(&step.frame, step.fate, &outcome)?;
        let after = Snapshot::of(self.host.view());
        match step.after {
            After::Untouched if before != after => Err(format!("tables changed: {}", before.difference(&after))),
            After::Untouched => Ok(()),
            After::Trace(trace) => check_trace(setup, &step.frame, trace, TRACKED, &before, &after),
            After::Kept(trace) => check_trace(setup, &step.frame, trace, 0, &before, &after),
        }
    }
}

fn brief(outcome: &Outcome) -> String {
    let head: Vec<String> = outcome.frame.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    format!("{:?} for {:?}, {} bytes from {}", outcome.verdict, outcome.reason, outcome.frame.len(), head.concat())
}

fn whole(outcome: &Outcome) -> String {
    let bytes: Vec<String> = outcome.frame.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{:?} for {:?}:\n  {}\n", outcome.verdict, outcome.reason, bytes.concat())
}

fn check_fate(frame: &[u8], fate: Fate, outcome: &Outcome) -> Result<(), String> {
    let (verdict, reason, macs) = match fate {
        Fate::Becomes(verdict, reason, bytes) => {
            let same = outcome.verdict == verdict && outcome.reason == reason && outcome.frame == bytes;
            let wanted = Outcome { verdict, frame: bytes.to_vec(), reason };
            return same.then_some(()).ok_or_else(|| format!("{}, not {}", whole(outcome), whole(&wanted)));
        }
        Fate::Pass(reason) => (Verdict::Pass, reason, None),
        Fate::Drop(reason) => (Verdict::Drop, reason, None),
        Fate::To(REMOTE, reason) => (Verdict::Redirect, reason, Some((mac(REMOTE), OTHER_MAC))),
        Fate::To(server, reason) => (Verdict::Tx, reason, Some((mac(server), OWN_MAC))),
    };
    let mut wanted = frame.to_vec();
    if let Some((to, from)) = macs {
        wanted[..6].copy_from_slice(&to);
        wanted[6..12].copy_from_slice(&from);
    }
    let wanted = Outcome { verdict, frame: wanted, reason };
    if *outcome == wanted { Ok(()) } else { Err(format!("{}, not {}", brief(outcome), brief(&wanted))) }
}

fn check_trace(
    setup: &Setup,
    frame: &[u8],
    wanted: Trace,
    bits: u64,
    before: &Snapshot,
    after: &Snapshot,
) -> Result<(), String> {
    let place = parse_bytes(frame).ok().and_then(|packet| setup.place(&packet));
    let Some((key, slot)) = place else { return Err("this frame can have no trace".to_owned()) };

    let trace = after.trace(key)?;
    if trace != (Trace { evicts: false, ..wanted }) {
        return Err(format!("left {trace:?}, not {wanted:?}"));
    }
    let mut slots = before.slots.clone();
    slots[slot as usize] |= bits;
    if slots != after.slots {
        return Err(format!("slots: {}", before.difference(after)));
    }
    let (others_before, others_after) = (before.others(key), after.others(key));
    let gone: Vec<_> = others_before.iter().filter(|entry| !others_after.contains(entry)).collect();
    let evicted = gone.iter().all(|entry| FlowWord(entry.3).state() == State::Candidate);
    let came = others_after.iter().any(|entry| !others_before.contains(entry));
    if came || !evicted || gone.len() != usize::from(wanted.evicts) {
        return Err(format!("other flows' entries changed: {}", before.difference(after)));
    }
    Ok(())
}

/// The slots that set-ups use, and all entries of the flow table: bucket, index, key, word.
#[derive(PartialEq, Eq)]
struct Snapshot {
    slots: Vec<u64>,
    entries: Vec<(usize, usize, u64, u64)>,
}

impl Snapshot {
    fn of(view: View<'_>) -> Self {
        let mut entries = Vec::new();
        for (number, bucket) in view.flows().iter().enumerate() {
            for (index, entry) in bucket.entries.iter().enumerate() {
                entries.push((number, index, entry.key.load(), entry.word.load()));
            }
        }
        Self { slots: view.slots()[..SLOTS as usize].iter().map(|slot| slot.load()).collect(), entries }
    }

    fn trace(&self, key: u64) -> Result<Trace, String> {
        let mut trace = Trace::default();
        for word in self.entries.iter().filter(|entry| entry.2 == key).map(|entry| FlowWord(entry.3)) {
            let twice = match word.state() {
                State::Candidate => trace.candidate.replace((word.server(), word.isn())).is_some(),
                State::Record => {
                    trace.record.replace((word.server(), word.isn(), word.is_closing(), word.age())).is_some()
                }
                State::Empty | State::Busy => return Err(format!("an entry with a key is {:?}", word.state())),
            };
            if twice {
                return Err("the flow has the same kind of entry twice".to_owned());
            }
        }
        Ok(trace)
    }

    fn others(&self, key: u64) -> Vec<(usize, usize, u64, u64)> {
        self.entries.iter().filter(|entry| entry.2 != key && entry.3 != 0).copied().collect()
    }

    fn difference(&self, other: &Self) -> String {
        let slots = self.slots.iter().zip(&other.slots).enumerate().filter(|(_, (a, b))| a != b);
        let entries = self.entries.iter().zip(&other.entries).filter(|(a, b)| a != b);
        let slots = slots.map(|(index, (a, b))| format!("slot {index} {a:#x} / {b:#x}"));
        let entries =
            entries.map(|(a, b)| format!("entry {}.{} {:#x} {:#x} / {:#x} {:#x}", a.0, a.1, a.2, a.3, b.2, b.3));
        slots.chain(entries).collect::<Vec<_>>().join(", ")
    }
}
