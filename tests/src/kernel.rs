//! The kernel program without an interface: one frame in, the verdict and the frame out (BPF_PROG_TEST_RUN).

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf, EbpfLoader, TestRun as _,
    maps::{
        MapData,
        xdp::{DevMap, DevMapHash},
    },
    programs::{TestRunOptions, Xdp},
};
use ipnet::IpNet;
use necp_ebpf::{
    abi::{AddressSet, Allowance, ICMP_BURST, Layout, Port, Stage, exception_buckets, exception_records, names},
    host::View,
    verdict::{REASONS, Reason},
};
use necp_user::plane::{AttachMode, PROGRAM, Plane, PlaneConfig, enter_stages};

/// The program's verdicts, from `linux/bpf.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// XDP_ABORTED: the program failed.
    Aborted,
    /// XDP_DROP.
    Drop,
    /// XDP_PASS: on to the host's stack.
    Pass,
    /// XDP_TX: out by the same interface.
    Tx,
    /// XDP_REDIRECT: out by another interface.
    Redirect,
}

/// What became of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The verdict.
    pub verdict: Verdict,
    /// The frame as the program left it.
    pub frame: Vec<u8>,
    /// The one reason that was counted.
    pub reason: Reason,
}

/// MAC address of the interface that the program believes to run on; its index in `ports` is 0.
pub const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// MAC address of the other interface, index 1 in `ports`: the loopback of the machine, so that redirects have a target.
pub const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// The kernel program with maps of its own.
pub struct Kernel {
    plane: Option<Plane>,
    program: Ebpf,
    pin: PathBuf,
}

static INSTANCES: AtomicU32 = AtomicU32::new(0);

impl Kernel {
    /// Loads it, with room for this many slots and flow buckets (a power of two).
    ///
    /// # Errors
    /// Without root or a BPF file system at /sys/fs/bpf.
    pub fn load(slots: u32, flow_buckets: u32) -> Result<Self> {
        Self::load_with(slots, flow_buckets, exception_records(64), true)
    }

    /// The same with room for this many records of exceptions; `all`: as if layer 3 and interception were in use.
    ///
    /// # Errors
    /// As [`Kernel::load`].
    pub fn load_with(slots: u32, flow_buckets: u32, exceptions: u32, all: bool) -> Result<Self> {
        let instance = INSTANCES.fetch_add(1, Ordering::Relaxed);
        let pin = PathBuf::from(format!("/sys/fs/bpf/necp-test-{}-{instance}", std::process::id()));
        let config = PlaneConfig {
            pin: pin.clone(),
            interfaces: Vec::new(),
            mode: AttachMode::Auto,
            slots,
            flow_buckets,
            exceptions,
            replies: all,
            intercepts: all,
            intercepts6: all,
        };
        let plane = Plane::open(&config)?;
        let loaded = load_program(&pin, &plane.layout(), all)
            .and_then(|mut program| enter_stages(&mut program, &pin, 0).map(|()| program).map_err(Into::into));
        let program = match loaded {
            Ok(program) => program,
            // A program that is refused leaves no pins either.
            Err(error) => {
                plane.close(false)?;
                return Err(error);
            }
        };
        let mut kernel = Self { plane: Some(plane), program, pin };
        kernel.enter_ports()?;
        Ok(kernel)
    }

    /// The tables.
    ///
    /// # Panics
    /// Never: the plane is only taken away when this is dropped.
    pub fn view(&self) -> View<'_> {
        self.plane().view()
    }

    /// The maps' owner.
    ///
    /// # Panics
    /// Never: the plane is only taken away when this is dropped.
    pub fn plane(&self) -> &Plane {
        self.plane.as_ref().expect("the plane lives as long as this")
    }

    /// Fills the sets of addresses that count when a packet crosses this host.
    ///
    /// # Errors
    /// If the map cannot be written.
    ///
    /// # Panics
    /// Never: the plane is only taken away when this is dropped.
    pub fn set_crossings(&mut self, wanted: &BTreeSet<(AddressSet, IpNet)>) -> Result<()> {
        Ok(self.plane.as_mut().expect("the plane lives as long as this").set_crossings(wanted)?)
    }

    /// Where the maps are pinned.
    pub fn pin(&self) -> &std::path::Path {
        &self.pin
    }

    /// The loaded program.
    ///
    /// # Errors
    /// If the object lacks it.
    pub fn program(&self) -> Result<&Xdp> {
        Ok(self.program.program(names::PROGRAM).context("no program `necp` in the object")?.try_into()?)
    }

    /// The programs that a frame may pass, and how many instructions of each the verifier followed.
    ///
    /// # Errors
    /// If the kernel does not tell (before 5.16).
    pub fn verified(&self) -> Result<Vec<(&'static str, u32)>> {
        let count = |name: &'static str| {
            let program: &Xdp = self.program.program(name).context("a program that was loaded")?.try_into()?;
            Ok((name, program.info()?.verified_instruction_count().context("not told by this kernel")?))
        };
        [names::PROGRAM].into_iter().chain(Stage::ALL.map(Stage::program)).map(count).collect()
    }

    /// From now on as many ICMP errors may be sent as at the beginning.
    ///
    /// # Errors
    /// If the map cannot be written.
    pub fn rest(&self) -> Result<()> {
        let mut allowance = aya::maps::PerCpuArray::<_, AllowanceValue>::try_from(open(&self.pin, names::ALLOWANCE)?)?;
        let full = AllowanceValue(Allowance { reckoned: 0, left: ICMP_BURST });
        Ok(allowance.set(
            0,
            aya::maps::PerCpuValues::try_from(vec![full; aya::util::nr_cpus().map_err(|(_, error)| error)?])?,
            0,
        )?)
    }

    /// Forgets where the first parts of datagrams went.
    ///
    /// # Errors
    /// If the map cannot be written.
    pub fn forget_fragments(&self) -> Result<()> {
        type Fragments = aya::maps::HashMap<MapData, [u32; 3], [u64; 2]>;
        let mut fragments = Fragments::try_from(open(&self.pin, names::FRAGMENTS)?)?;
        let keys = fragments.keys().collect::<Result<Vec<_>, _>>()?;
        Ok(keys.iter().try_for_each(|key| fragments.remove(key))?)
    }

    /// Runs the program once on a frame.
    ///
    /// # Errors
    /// If the kernel refuses the frame (shorter than an Ethernet header), or if not exactly one reason was counted.
    pub fn run(&self, frame: &[u8]) -> Result<Outcome> {
        let before = self.plane().reasons()?;
        let mut out = Vec::new();
        let verdict = self.run_uncounted(frame, &mut out)?;
        Ok(Outcome { verdict, frame: out, reason: counted(&before, &self.plane().reasons()?)? })
    }

    /// The same without a look at the counters, which costs more than the run; `out` becomes the frame as the program left it.
    ///
    /// # Errors
    /// If the kernel refuses the frame, or the program returns what is no XDP action.
    pub fn run_uncounted(&self, frame: &[u8], out: &mut Vec<u8>) -> Result<Verdict> {
        out.resize(frame.len() + 256, 0);
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(out);
        let result = self.program()?.test_run(options).context("BPF_PROG_TEST_RUN")?;
        out.truncate(result.data_size_out as usize);
        Ok(match result.return_value {
            0 => Verdict::Aborted,
            1 => Verdict::Drop,
            2 => Verdict::Pass,
            3 => Verdict::Tx,
            4 => Verdict::Redirect,
            other => bail!("the program returned {other}, which is no XDP action"),
        })
    }

    fn enter_ports(&mut self) -> Result<()> {
        let loopback = 1;
        let mut ports = aya::maps::Array::<_, PortValue>::try_from(open(&self.pin, names::PORTS)?)?;
        for (index, mac) in [(0, OWN_MAC), (1, OTHER_MAC)] {
            ports.set(index, PortValue(Port { mac, reserved: 0, ifindex: loopback, mtu: 1500 }), 0)?;
        }
        let mut targets = DevMap::try_from(open(&self.pin, names::TX_PORTS)?)?;
        targets.set(1, loopback, None, 0)?;
        let mut links = DevMapHash::try_from(open(&self.pin, names::TX_LINKS)?)?;
        links.insert(loopback, loopback, None, 0)?;
        Ok(())
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if let Some(plane) = self.plane.take()
            && let Err(error) = plane.close(false)
        {
            eprintln!("cannot remove {}: {error}", self.pin.display());
        }
    }
}

/// [`Port`] as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct PortValue(Port);

// SAFETY: plain old data without padding.
unsafe impl aya::Pod for PortValue {}

/// [`Allowance`] as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct AllowanceValue(Allowance);

// SAFETY: plain old data without padding.
unsafe impl aya::Pod for AllowanceValue {}

fn open(pin: &std::path::Path, name: &str) -> Result<aya::maps::Map> {
    Ok(aya::maps::Map::from_map_data(MapData::from_pin(pin.join(name))?)?)
}

fn load_program(pin: &std::path::Path, layout: &Layout, all: bool) -> Result<Ebpf> {
    let [a, b, c, d, e, f] = OWN_MAC;
    let (index, mac, mask) = (0u32, u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]), layout.flow_buckets - 1);
    let exception_mask = exception_buckets(layout.exceptions) - 1;
    let all = u32::from(all);
    let mut loader = EbpfLoader::new();
    loader
        .override_global(names::PORT_INDEX, &index, true)
        .override_global(names::PORT_MAC, &mac, true)
        .override_global(names::FLOW_MASK, &mask, true)
        .override_global(names::EXCEPTION_BUCKET_MASK, &exception_mask, true)
        .override_global(names::EXCEPTION_SEED, &layout.exception_seed, true)
        .override_global(names::REPLIES, &all, true)
        .override_global(names::INTERCEPTS, &all, true)
        .override_global(names::INTERCEPTS6, &all, true);
    for name in names::PINNED {
        loader.map_pin_path(name, pin.join(name));
    }
    let mut ebpf = loader.load(PROGRAM)?;
    let program: &mut Xdp = ebpf.program_mut(names::PROGRAM).context("no program `necp` in the object")?.try_into()?;
    program.load()?;
    Ok(ebpf)
}

fn counted(before: &[u64; REASONS as usize], after: &[u64; REASONS as usize]) -> Result<Reason> {
    let mut counted = Reason::ALL.into_iter().filter(|&r| before[r as usize] != after[r as usize]);
    match (counted.next(), counted.next()) {
        (Some(reason), None) if after[reason as usize] == before[reason as usize] + 1 => Ok(reason),
        (first, second) => bail!("one packet must be counted once, but was as {first:?} and {second:?}"),
    }
}
