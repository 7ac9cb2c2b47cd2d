//! `cargo xtask bench`: cost per packet of the kernel program, net of a floor that is measured in the same run.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod, TestRun as _,
    maps::{Array, ProgramArray},
    programs::{ProgramFd, TestRunOptions, Xdp},
};
use clap::Parser;
use etherparse::PacketBuilder;
use necp_ebpf::{
    abi::{
        ACCEPTS, ALIVE, ALWAYS_TRACKED, EXCEPTION_GLOBAL, Exception, ExceptionMask, ExceptionMasks, FORWARDING_SHIFT,
        GRE, LAYER_2, LAYER_3, OF_IPV4, REACHABLE, SERVICE6, Server, Service, UDP_CLASS, exception_records,
    },
    bench_flow,
    hash::{fold6, service_bucket},
    host::View,
    packet::Packet,
    six,
    slot::{SlotWord, TRACKED},
    steer::steer,
    tables::{Addresses6, Tables as _, halves},
    verdict::Reason,
};
use necp_tests::kernel::{Kernel, OWN_MAC};
use necp_user::plane::BENCH_WRAPPER;

/// Measures what the kernel program costs per packet (BPF_PROG_TEST_RUN on one CPU, in nanoseconds).
///
/// Every figure is net: a small wrapper writes the frame of the next flow and calls the program; the same wrapper with a
/// program that does nothing is the floor, measured right before and after. Needs root.
#[derive(Parser)]
#[command(
    after_help = "Examples:\n  cargo xtask bench\n  cargo xtask bench -- --rounds 301 --json\n  cargo xtask bench -- --only gre"
)]
struct Args {
    /// Rounds of each measurement, short ones, so that a slow spell of the machine spoils few; the median is shown
    #[arg(long, default_value_t = 101)]
    rounds: usize,
    /// Packets in a round
    #[arg(long, default_value_t = 200_000)]
    packets: u32,
    /// Only the cases whose name contains this, in either case of letters
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Print JSON: a list of {case, flows, ns, min_ns, aim_ns}
    #[arg(long)]
    json: bool,
}

const VIP: [u8; 4] = [192, 0, 2, 10];
const VIP6: [u8; 16] = *b"\x20\x01\x0d\xb8\0\0\0\x0a\0\0\0\0\0\0\0\x10";
/// The first twelve bytes of an IPv6 client's address; the rest is as an IPv4 client's.
const CLIENTS6: [u8; 12] = *b"\x20\x01\x0d\xb8\0\0\0\x07\0\0\0\0";
const SLOTS: u32 = 65_537;
const FLOW_BUCKETS: u32 = 524_288;
const FLOWS: [u32; 3] = [1, 65_536, 1_048_576];
/// Two servers: the owner of every slot, and the one that flows on record are on.
const OWNER: u32 = 2;
const RECORDED: u32 = 3;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Case {
    Plain,
    /// The same, to a server that wants GRE.
    Gre,
    Record,
    /// The same in a farm that allows layer 3, to a server that wants it.
    Layer3,
    /// IPv6: the same four.
    Six,
    SixGre,
    SixRecord,
    SixLayer3,
    NotOurs,
    /// The same where layer 3 and interception are in use.
    NotOursAtAll,
    NotOurs6,
    NotOurs6AtAll,
    /// With this many exceptions, none of which is for the flow.
    Syn(u32),
    Udp,
}

/// Different masks of the exceptions.
const MASKS: u32 = 16;
const EXCEPTIONS: u32 = 1_000_000;

impl Case {
    const ALL: [Self; 16] = [
        Self::Plain,
        Self::Gre,
        Self::Record,
        Self::Layer3,
        Self::Six,
        Self::SixGre,
        Self::SixRecord,
        Self::SixLayer3,
        Self::NotOurs,
        Self::NotOursAtAll,
        Self::NotOurs6,
        Self::NotOurs6AtAll,
        Self::Syn(0),
        Self::Syn(10 * MASKS),
        Self::Syn(EXCEPTIONS),
        Self::Udp,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain slot, established TCP",
            Self::Gre => "the same, GRE",
            Self::Record => "tracked slot, record hit",
            Self::Layer3 => "layer 3, record hit",
            Self::Six => "IPv6, plain slot",
            Self::SixGre => "IPv6, the same, GRE",
            Self::SixRecord => "IPv6, record hit",
            Self::SixLayer3 => "IPv6, layer 3, record hit",
            Self::NotOurs => "not ours, passed on",
            Self::NotOursAtAll => "not ours, all features in use",
            Self::NotOurs6 => "IPv6, not ours, passed on",
            Self::NotOurs6AtAll => "IPv6, not ours, all features in use",
            Self::Syn(0) => "plain slot, new flow (SYN)",
            Self::Syn(EXCEPTIONS) => "SYN, 1,000,000 exceptions",
            Self::Syn(_) => "SYN, 16 × 10 exceptions",
            Self::Udp => "UDP, record hit",
        }
    }

    /// The most that this should cost, in ns, by number of flows.
    fn aims(self) -> [Option<u32>; 3] {
        match self {
            Self::Plain => [Some(18), Some(26), Some(26)],
            Self::Record => [Some(28), Some(130), Some(240)],
            Self::Gre => [Some(36); 3],
            Self::Layer3 => [Some(45), None, None],
            Self::Six => [Some(24); 3],
            Self::NotOurs => [Some(12); 3],
            _ => [None; 3],
        }
    }

    fn expected(self) -> Reason {
        match self {
            Self::Plain | Self::Gre | Self::Six | Self::SixGre | Self::Syn(_) => Reason::Plain,
            Self::Record | Self::Layer3 | Self::SixRecord | Self::SixLayer3 | Self::Udp => Reason::Record,
            Self::NotOurs | Self::NotOursAtAll | Self::NotOurs6 | Self::NotOurs6AtAll => Reason::NotOurs,
        }
    }

    fn is_six(self) -> bool {
        matches!(
            self,
            Self::Six | Self::SixGre | Self::SixRecord | Self::SixLayer3 | Self::NotOurs6 | Self::NotOurs6AtAll
        )
    }

    fn forwarding(self) -> u8 {
        match self {
            Self::Gre | Self::SixGre => GRE,
            Self::Layer3 | Self::SixLayer3 => LAYER_3,
            _ => LAYER_2,
        }
    }

    /// Whether the program is loaded as where layer 3 and interception are in use.
    fn uses_all(self) -> bool {
        matches!(self, Self::Layer3 | Self::SixLayer3 | Self::NotOursAtAll | Self::NotOurs6AtAll)
    }

    /// Whether flows are on record because their slots have changed hands.
    fn changed(self) -> bool {
        matches!(self, Self::Record | Self::Layer3 | Self::SixRecord | Self::SixLayer3)
    }

    /// Key of the service's entry.
    fn key(self) -> u64 {
        self.entry().key()
    }

    fn service(self) -> Option<Service> {
        self.expected().ne(&Reason::NotOurs).then(|| self.entry())
    }

    fn entry(self) -> Service {
        let protocol = if self == Self::Udp { 17 } else { 6 };
        let always = matches!(self, Self::Udp | Self::Layer3 | Self::SixLayer3);
        let flags = if always { ALWAYS_TRACKED } else { 0 };
        let id = if self == Self::Udp { 1 | UDP_CLASS } else { 1 };
        let six = self.is_six();
        Service {
            address: if six { fold6(halves(VIP6)).to_ne_bytes() } else { VIP },
            port: 80u16.to_be_bytes(),
            protocol,
            state: if six { SERVICE6 } else { 1 },
            slots_base: 0,
            slots_size: SLOTS,
            seed: 7,
            id,
            flags,
            farm: 0,
            vip: u16::from(six),
        }
    }

    fn frame(self) -> Result<Vec<u8>> {
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 8, 8], OWN_MAC);
        let mut frame = Vec::new();
        if self.is_six() {
            let mut client = [0; 16];
            client[..12].copy_from_slice(&CLIENTS6);
            builder.ipv6(client, VIP6, 64).tcp(0x8000, 80, 1, 1000).ack(1).write(&mut frame, &[0; 10])?;
            ensure!(frame.len() == 84, "the frame has {} bytes", frame.len());
            return Ok(frame);
        }
        let builder = builder.ipv4([10, 1, 0, 0], VIP, 64);
        match self {
            Self::Udp => builder.udp(0x8000, 80).write(&mut frame, &[0; 22])?,
            Self::Syn(_) => builder.tcp(0x8000, 80, 1, 1000).syn().write(&mut frame, &[0; 10])?,
            _ => builder.tcp(0x8000, 80, 1, 1000).ack(1).write(&mut frame, &[0; 10])?,
        }
        ensure!(frame.len() == 64, "the frame has {} bytes", frame.len());
        Ok(frame)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let load = |all| {
        let kernel = Kernel::load_with(SLOTS, FLOW_BUCKETS, exception_records(EXCEPTIONS), all);
        kernel.context("the benchmark needs root and a BPF file system")
    };
    let (kernel, with_all) = (load(false)?, load(true)?);
    let verified = kernel.program()?.info()?.verified_instruction_count();
    if !args.json {
        println!("program: {} instructions verified", verified.map_or("?".into(), |n| n.to_string()));
        println!("net ns per packet, median of {} rounds (fastest), {} packets each", args.rounds, args.packets);
        println!("{:<36}{:>16}{:>16}{:>16}   aims", "", "1 flow", "65,536", "1,048,576");
    }
    let mut rows = Vec::new();
    let wanted = args.only.to_lowercase();
    for case in Case::ALL.into_iter().filter(|case| case.name().to_lowercase().contains(&wanted)) {
        let mut cells = Vec::new();
        for (flows, aim) in FLOWS.into_iter().zip(case.aims()) {
            // Flows without a visible beginning may take half of the table.
            if case == Case::Udp && flows > FLOW_BUCKETS {
                cells.push("-".into());
                continue;
            }
            let cost = measure(if case.uses_all() { &with_all } else { &kernel }, case, flows, &args)?;
            rows.push(serde_json::json!({
                "case": case.name(), "flows": flows, "ns": cost.median, "min_ns": cost.least, "aim_ns": aim,
            }));
            cells.push(format!("{:.0} ({:.0})", cost.median, cost.least));
        }
        if !args.json {
            let aims = case.aims().map(|aim| aim.map_or("-".into(), |ns| format!("≤{ns}"))).join(" ");
            println!("{:<36}{:>16}{:>16}{:>16}   {aims}", case.name(), cells[0], cells[1], cells[2]);
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    }
    Ok(())
}

struct Cost {
    median: f64,
    least: f64,
}

fn measure(kernel: &Kernel, case: Case, flows: u32, args: &Args) -> Result<Cost> {
    prepare(kernel.view(), case, flows)?;
    let frame = case.frame()?;
    let mut wrapper = Wrapper::load(&frame, flows)?;
    let target = kernel.program()?.fd()?.try_clone()?;
    let before = kernel.plane().reasons()?;
    wrapper.run(&target, args.packets, &frame)?;
    let after = kernel.plane().reasons()?;
    let expected = case.expected() as usize;
    let taken = after[expected] - before[expected];
    ensure!(
        taken >= most(args.packets) as u64,
        "{}: only {taken} of {} packets took the path that is to be measured",
        case.name(),
        args.packets
    );
    let nothing = wrapper.program("nothing")?;
    // Growing is a part of the cost, shrinking again is not: half of what both cost is added to the floor.
    let other = wrapper.program(match case {
        Case::Gre => "grow",
        Case::SixGre => "grow6",
        _ => "nothing",
    })?;
    let mut net = Vec::new();
    for _ in 0..args.rounds {
        let floor = wrapper.run(&nothing, args.packets, &frame)?;
        let cost = wrapper.run(&target, args.packets, &frame)?;
        let again = wrapper.run(&other, args.packets, &frame)?;
        net.push(cost.as_nanos() as f64 - (floor + again).as_nanos() as f64 / 2.0);
    }
    net.sort_by(f64::total_cmp);
    Ok(Cost { median: net[net.len() / 2], least: net[0] })
}

/// All but one in fifty: a flow table that flows of one kind fill by half turns a few away, which would go on without a record.
fn most(number: u32) -> u32 {
    number - number / 50
}

/// Fills the tables for a case.
fn prepare(view: View<'_>, case: Case, flows: u32) -> Result<()> {
    for bucket in view.flows() {
        for entry in &bucket.entries {
            entry.key.store(0);
            entry.word.store(0);
        }
    }
    except(view, if let Case::Syn(exceptions) = case { exceptions } else { 0 })?;
    ensure!(view.set_vip6(1, VIP6), "no room for an IPv6 VIP");
    // The service tables of all cases have one entry, in the bucket of its own key.
    for other in Case::ALL {
        ensure!(view.set_service(service_bucket(other.key()), 0, &Service::default()), "no such bucket");
    }
    if let Some(service) = case.service() {
        ensure!(view.set_service(service_bucket(case.key()), 0, &service), "no such bucket");
    }
    let flags = ALIVE | ACCEPTS | REACHABLE | case.forwarding() << FORWARDING_SHIFT;
    for id in [OWNER, RECORDED] {
        let mac = [2, 0, 0, 0, 9, id as u8];
        let address = if case.is_six() {
            [&VIP6[..15], &[id as u8]].concat().try_into().expect("16 bytes")
        } else {
            std::net::Ipv4Addr::new(10, 0, 0, id as u8).to_ipv6_mapped().octets()
        };
        view.set_server(id, &Server { mac, flags, address, source: address, mtu: 1500, ..Server::default() });
    }
    let set = |word: SlotWord| view.slots().iter().take(SLOTS as usize).for_each(|slot| slot.store(word.0));
    set(SlotWord::plain(OWNER));
    if case.changed() {
        // Flows of a legacy record themselves with their first packet.
        set(SlotWord::plain(OWNER).with_legacy(RECORDED));
    }
    if case.expected() == Reason::Record {
        let recorded = (0..flows).filter(|&number| reason(view, case, number) != Reason::Legacy).count();
        ensure!(recorded >= most(flows) as usize, "only {recorded} of {flows} flows found room");
    }
    if case.changed() {
        set(SlotWord(SlotWord::plain(OWNER).0 | TRACKED));
    }
    Ok(())
}

/// What the host build makes of a packet of the flow with this number.
fn reason(view: View<'_>, case: Case, number: u32) -> Reason {
    let (source, port) = bench_flow(number);
    let packet = Packet {
        source_port: u16::from_ne_bytes(port),
        destination_port: 80u16.to_be(),
        protocol: if case == Case::Udp { 17 } else { 6 },
        sequence: 1,
        payload: 10,
        ..Packet::default()
    };
    if !case.is_six() {
        let (source, destination) = (u32::from_ne_bytes(source), u32::from_ne_bytes(VIP));
        return steer(&Packet { source, destination, ..packet }, &view).reason;
    }
    let client = [&CLIENTS6[..], &source].concat().try_into().expect("16 bytes");
    let addresses = Addresses6 { source: halves(client), destination: halves(VIP6) };
    view.six(addresses).map_or(Reason::BadTables, |view| six::steer(&packet, &view).reason)
}

/// Makes so many exceptions, under [`MASKS`] masks in turn, for sources that no flow comes from.
fn except(view: View<'_>, number: u32) -> Result<()> {
    view.clear_exceptions();
    let mut masks = ExceptionMasks { count: MASKS.min(number), ..ExceptionMasks::default() };
    for (index, mask) in (0u8..).zip(masks.masks.iter_mut().take(masks.count as usize)) {
        let source_len = 24 + 2 * (index >> 2);
        *mask = ExceptionMask { source_len, protocol: index & 1, port: index >> 1 & 1, used: OF_IPV4, ..*mask };
    }
    for (record, one) in (0..number).map(|n| (n, n / MASKS)) {
        let mask = masks.masks[(record % MASKS) as usize];
        let exception = Exception {
            source: (0x0b00_0000 + (one << (32 - mask.source_len))).to_be_bytes(),
            port: if mask.port == 1 { 80u16.to_be_bytes() } else { [0; 2] },
            protocol: if mask.protocol == 1 { 6 } else { 0 },
            mask: (record % MASKS) as u8,
            state: EXCEPTION_GLOBAL,
            ..Exception::default()
        };
        match view.set_exception(record, &exception) {
            Ok(true) => {}
            other => bail!("exception {record}: {other:?}"),
        }
    }
    ensure!(view.set_exception_masks(0, &masks), "there is no farm 0");
    Ok(())
}

/// The wrapper program.
struct Wrapper {
    ebpf: Ebpf,
    /// The program that writes this case's frames.
    name: &'static str,
    target: ProgramArray<aya::maps::MapData>,
}

#[repr(transparent)]
#[derive(Clone, Copy)]
struct Template<const WORDS: usize>([u32; WORDS]);

// SAFETY: plain old data without padding.
unsafe impl<const WORDS: usize> Pod for Template<WORDS> {}

fn set_template<const WORDS: usize>(ebpf: &mut Ebpf, name: &str, frame: &[u8]) -> Result<()> {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(frame.chunks_exact(4)) {
        *word = u32::from_ne_bytes(bytes.try_into()?);
    }
    let map = ebpf.map_mut(name).context("the wrapper has no such template")?;
    Ok(Array::<_, Template<WORDS>>::try_from(map)?.set(0, Template(words), 0)?)
}

impl Wrapper {
    fn load(frame: &[u8], flows: u32) -> Result<Self> {
        let numbers = flows - 1;
        let mut ebpf = EbpfLoader::new().override_global("FLOW_NUMBERS", &numbers, true).load(BENCH_WRAPPER)?;
        let six = frame.len() > 64;
        if six {
            set_template::<21>(&mut ebpf, "template6", frame)?;
        } else {
            set_template::<16>(&mut ebpf, "template", frame)?;
        }
        for name in ["wrapper", "wrapper6", "nothing", "grow", "grow6"] {
            let program: &mut Xdp = ebpf.program_mut(name).context("a program is missing")?.try_into()?;
            program.load()?;
        }
        let target = ProgramArray::try_from(ebpf.take_map("target").context("no map `target` in the wrapper")?)?;
        Ok(Self { ebpf, name: if six { "wrapper6" } else { "wrapper" }, target })
    }

    fn program(&self, name: &str) -> Result<ProgramFd> {
        let program: &Xdp = self.ebpf.program(name).context("a program is missing")?.try_into()?;
        Ok(program.fd()?.try_clone()?)
    }

    /// Mean time of a packet.
    fn run(&mut self, target: &ProgramFd, packets: u32, frame: &[u8]) -> Result<Duration> {
        self.target.set(0, target, 0)?;
        let program: &Xdp = self.ebpf.program(self.name).context("a program is missing")?.try_into()?;
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.repeat = packets;
        let result = program.test_run(options)?;
        ensure!(result.return_value != 0, "the wrapper could not call its target");
        Ok(result.duration)
    }
}
