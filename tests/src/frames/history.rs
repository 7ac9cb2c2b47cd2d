//! A history: tables, frames one after the other, what user space changes in between; all of it follows from two numbers.

use std::{fmt, sync::atomic::Ordering};

use anyhow::Result;
use necp_ebpf::{
    abi::{FLOWS_PER_BUCKET, ICMP_BURST},
    host::View,
    verdict::{Action, REASONS, Reason},
};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use super::{
    guard::{NOW, Room},
    judge::{Crossing, Deed, Difference, Ground, Judged, Parts, judge},
    mutate::mutate,
    once_in,
    scene::{Change, FLOW_BUCKETS, SERVERS, SLOTS, Scene, crossing::Rules},
    stack::Stack,
};
use crate::{
    host_path::HostPath,
    kernel::{Kernel, Verdict},
};

/// Frames of a history of random ones.
const RANDOM: usize = 1000;
/// Headers that a history cuts at every point.
const CUT: usize = 6;
/// Bytes at the beginning of a frame, each of which a history gives every value.
const BYTES: usize = 80;
/// One frame of so many must be intercepted, or a run shows too little of it.
pub const LEAST_INTERCEPTED: u64 = 100;
/// The kernel takes no less than an Ethernet header, and makes several buffers of what is longer than about 3.5 KiB.
const KERNEL: std::ops::RangeFrom<usize> = 14..;

/// What was run, and what it came to.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Frames through the host build, each judged.
    pub frames: u64,
    /// Those of them that the kernel program ran too.
    pub kernel: u64,
    /// By reason.
    pub reasons: [u64; REASONS as usize],
    /// By [`Difference`].
    pub differences: [u64; Difference::ALL.len()],
    /// By [`Crossing`].
    pub crossings: [u64; Crossing::ALL.len()],
}

impl Tally {
    /// Frames that a farm intercepted: packets, later parts, and errors about them.
    pub fn intercepted(&self) -> u64 {
        [Crossing::Taken, Crossing::Part, Crossing::Error].map(|what| self.crossings[what as usize]).iter().sum()
    }
}

/// A relation that does not hold.
#[derive(Debug)]
pub struct Finding {
    seed: u64,
    history: u64,
    /// Its number in the history, and its bytes; `None`: only the sums are wrong.
    frame: Option<(u64, Vec<u8>)>,
    wrong: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, history, frame, wrong } = self;
        writeln!(f, "{wrong}")?;
        if let Some((number, bytes)) = frame {
            writeln!(f, "frame {number}, {} bytes: {}", bytes.len(), hex(bytes))?;
        }
        write!(f, "again: cargo xtask fuzz frames -- --seed {seed} --history {history}")
    }
}

/// Bytes as `kept.txt` has them.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Both builds, or the host's alone.
pub struct Bench {
    host: HostPath,
    kernel: Option<Kernel>,
    room: Room,
    out: Vec<u8>,
    rules: Rules,
    parts: Parts,
    tally: Tally,
    /// ICMP errors since both sides were last allowed a burst.
    told: u64,
}

/// How the kernel is compared with the host build.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Care {
    /// Verdict and bytes of every frame; counters and tables at the end.
    Usual,
    /// All of it after every frame.
    Great,
}

impl Bench {
    /// The host build alone.
    ///
    /// # Errors
    /// Without memory.
    pub fn host() -> Result<Self> {
        let host = HostPath::new(SLOTS as usize, FLOW_BUCKETS as usize);
        Ok(Self {
            host,
            kernel: None,
            room: Room::new()?,
            out: Vec::new(),
            rules: Rules::default(),
            parts: Parts::default(),
            tally: Tally::default(),
            told: 0,
        })
    }

    /// With the kernel program, on tables of its own.
    ///
    /// # Errors
    /// Without root or a BPF file system at /sys/fs/bpf.
    pub fn with_kernel() -> Result<Self> {
        Ok(Self { kernel: Some(Kernel::load(SLOTS, FLOW_BUCKETS)?), ..Self::host()? })
    }

    /// What was run so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Runs the history with this number.
    ///
    /// # Errors
    /// What was found.
    pub fn history(&mut self, seed: u64, history: u64) -> Result<(), Box<Finding>> {
        NOW[0].store(seed, Ordering::Relaxed);
        NOW[1].store(history, Ordering::Relaxed);
        let found = match self.play(seed, history, Care::Usual) {
            // Which frame was it?
            Err(finding) if finding.frame.is_none() => self.play(seed, history, Care::Great).err().or(Some(finding)),
            other => other.err(),
        };
        found.map_or(Ok(()), |finding| Err(Box::new(finding)))
    }

    /// Runs one frame in tables of the first history's kind; the reason, the host's.
    ///
    /// # Errors
    /// What does not hold.
    pub fn single(&mut self, frame: &[u8]) -> Result<Reason, String> {
        let scene = Scene::random(&mut SmallRng::seed_from_u64(0));
        self.install(&scene).map_err(|error| format!("{error:#}"))?;
        self.frame(frame, 0, Care::Great)
    }

    fn play(&mut self, seed: u64, history: u64, care: Care) -> Result<(), Finding> {
        let mut random = SmallRng::seed_from_u64(seed ^ history.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let scene = Scene::random(&mut random);
        self.install(&scene).map_err(|error| sums(seed, history, format!("{error:#}")))?;
        let before = (self.tally.reasons, self.kernel_reasons().map_err(|wrong| sums(seed, history, wrong))?);
        let mut number = 0;
        frames(history, &mut random, |frame, random| {
            NOW[2].store(number, Ordering::Relaxed);
            if once_in(random, 20) {
                self.change(Scene::change(random)).map_err(|error| sums(seed, history, format!("{error:#}")))?;
            }
            self.frame(frame, number, care).map_err(|wrong| {
                let frame = Some((number, frame.to_vec()));
                Finding { seed, history, frame, wrong }
            })?;
            number += 1;
            Ok(())
        })?;
        self.compare_sums(&before).map_err(|wrong| sums(seed, history, wrong))
    }

    /// Fresh tables, and no parts of datagrams.
    fn install(&mut self, scene: &Scene) -> Result<()> {
        scene.install(self.host.view());
        self.rules.clone_from(scene.rules());
        self.install_crossings()?;
        self.host.forget_fragments();
        self.parts.clear();
        if let Some(kernel) = &self.kernel {
            scene.install(kernel.view());
            kernel.forget_fragments()?;
        }
        Ok(())
    }

    fn install_crossings(&mut self) -> Result<()> {
        let (four, six) = self.rules.words();
        self.host.set_crossings(four, six);
        self.kernel.as_mut().map_or(Ok(()), |kernel| kernel.set_crossings(&self.rules.crossings))
    }

    fn change(&mut self, change: Change) -> Result<()> {
        change.apply(self.host.view());
        if let Some(kernel) = &self.kernel {
            change.apply(kernel.view());
        }
        if matches!(change, Change::Own) {
            self.rules.come_or_go();
            self.install_crossings()?;
        }
        Ok(())
    }

    /// One frame through the host build and, if there is one, the kernel.
    fn frame(&mut self, frame: &[u8], number: u64, care: Care) -> Result<Reason, String> {
        self.rest().map_err(|error| format!("{error:#}"))?;
        let beside = if number & 2 == 0 { 0xa5 } else { 0x5a };
        let put = self.room.put(frame, number & 1 == 0, beside);
        let (verdict, reason, now) = self.host.run_in(self.room.memory(), put.clone());
        if !self.room.is_intact(&put, &now, beside) {
            return Err("the host build wrote beside the frame".into());
        }
        let deed = Deed { verdict, reason, frame: &self.room.memory()[now] };
        let ground = Ground { tables: self.host.view(), rules: &self.rules };
        let Judged { difference, crossing } = judge(frame, deed, ground, &mut self.parts)?;
        let kernel = self.kernel.as_ref().filter(|_| KERNEL.contains(&frame.len()));
        if let Some(kernel) = kernel {
            compare(kernel, frame, deed, &mut self.out, care)?;
            if care == Care::Great {
                compare_tables(kernel.view(), self.host.view())?;
            }
        }
        self.told += u64::from(reason.action() == Action::Answer);
        self.tally.frames += 1;
        self.tally.kernel += u64::from(kernel.is_some());
        self.tally.reasons[reason as usize] += 1;
        if let Some(difference) = difference {
            self.tally.differences[difference as usize] += 1;
        }
        if let Some(crossing) = crossing {
            self.tally.crossings[crossing as usize] += 1;
        }
        Ok(reason)
    }

    /// Allows both sides another burst of ICMP errors before they have used one up: how soon they may have more is a matter
    /// of time, and nothing here is.
    fn rest(&mut self) -> Result<()> {
        if self.told + 1 >= ICMP_BURST {
            self.told = 0;
            self.host.rest();
            self.kernel.as_ref().map_or(Ok(()), Kernel::rest)?;
        }
        Ok(())
    }

    fn kernel_reasons(&self) -> Result<[u64; REASONS as usize], String> {
        let Some(kernel) = &self.kernel else { return Ok([0; REASONS as usize]) };
        kernel.plane().reasons().map_err(|error| error.to_string())
    }

    /// Reasons, servers' counters and tables at the end of a history.
    fn compare_sums(&mut self, before: &([u64; REASONS as usize], [u64; REASONS as usize])) -> Result<(), String> {
        let Some(kernel) = &self.kernel else { return Ok(()) };
        let reasons = self.kernel_reasons()?;
        for reason in Reason::ALL {
            let at = reason as usize;
            let (host, kernel) = (self.tally.reasons[at] - before.0[at], reasons[at] - before.1[at]);
            // Too short for the kernel: nothing but malformed.
            if host != kernel && reason != Reason::Malformed {
                return Err(format!("{reason:?}: the kernel counted {kernel}, the host {host}"));
            }
        }
        let stats = kernel.plane().server_stats(SERVERS).map_err(|error| error.to_string())?;
        for (id, stats) in (0..SERVERS).zip(stats) {
            if stats != self.host.stats(id) {
                return Err(format!("server {id}: the kernel counted {stats:?}, the host {:?}", self.host.stats(id)));
            }
        }
        compare_tables(kernel.view(), self.host.view())
    }
}

fn sums(seed: u64, history: u64, wrong: String) -> Finding {
    Finding { seed, history, frame: None, wrong }
}

fn compare(kernel: &Kernel, frame: &[u8], host: Deed<'_>, out: &mut Vec<u8>, care: Care) -> Result<(), String> {
    let verdict = if care == Care::Great {
        let outcome = kernel.run(frame).map_err(|error| format!("{error:#}"))?;
        if outcome.reason != host.reason {
            return Err(format!("the kernel counted {:?}, the host {:?}", outcome.reason, host.reason));
        }
        *out = outcome.frame;
        outcome.verdict
    } else {
        kernel.run_uncounted(frame, out).map_err(|error| format!("{error:#}"))?
    };
    if verdict != host.verdict {
        return Err(format!("the kernel says {verdict:?}, the host {:?} for {:?}", host.verdict, host.reason));
    }
    if verdict != Verdict::Drop && out != host.frame {
        return Err(format!("{verdict:?} of the kernel left {}, of the host {}", hex(out), hex(host.frame)));
    }
    Ok(())
}

fn compare_tables(kernel: View<'_>, host: View<'_>) -> Result<(), String> {
    for (index, (kernel, host)) in kernel.slots().iter().zip(host.slots()).enumerate() {
        if kernel.load() != host.load() {
            return Err(format!("slot {index}: the kernel's {:#x}, the host's {:#x}", kernel.load(), host.load()));
        }
    }
    for (number, (kernel, host)) in kernel.flows().iter().zip(host.flows()).enumerate() {
        for entry in 0..FLOWS_PER_BUCKET {
            let [kernel, host] = [&kernel.entries[entry], &host.entries[entry]].map(|e| (e.key.load(), e.word.load()));
            if kernel != host {
                return Err(format!("entry {number}.{entry}: the kernel's {kernel:#x?}, the host's {host:#x?}"));
            }
        }
    }
    Ok(())
}

/// The frames of a history: random ones; or a few, cut at every point; or one, each byte of which takes every value.
fn frames<E>(
    history: u64,
    random: &mut SmallRng,
    mut visit: impl FnMut(&[u8], &mut SmallRng) -> Result<(), E>,
) -> Result<(), E> {
    let mut stack = Stack::default();
    match history % 64 {
        0 => {
            stack.refill(random);
            for place in 0..stack.bytes.len().min(BYTES) {
                let right = stack.bytes[place];
                for value in 0..=u8::MAX {
                    stack.bytes[place] = value;
                    visit(&stack.bytes, random)?;
                }
                stack.bytes[place] = right;
            }
        }
        16 | 32 | 48 => {
            for _ in 0..CUT {
                stack.refill(random);
                let whole = stack.bytes.clone();
                for end in 0..=whole.len().min(200) {
                    visit(&whole[..end], random)?;
                    if let Some(field) = stack.ip.map(|ip| ip + 2..ip + 4).filter(|field| field.end <= end) {
                        // The same, and the total length says so.
                        let total = (end + 2 - field.start) as u16;
                        stack.bytes.splice(.., whole[..end].iter().copied());
                        stack.bytes[field].copy_from_slice(&total.to_be_bytes());
                        visit(&stack.bytes, random)?;
                    }
                }
            }
        }
        _ => {
            for _ in 0..RANDOM {
                stack.refill(random);
                let mutations = [0, 0, 0, 1, 1, 1, 2, 3, 5][random.random_range(0..9)];
                (0..mutations).for_each(|_| mutate(&mut stack, random));
                visit(&stack.bytes, random)?;
            }
        }
    }
    Ok(())
}
