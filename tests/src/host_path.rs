//! The packet path's host build on one frame: the same code as the kernel program, tables and interfaces of its own.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    ops::Range,
};

use necp_ebpf::{
    abi::{GRE, ICMP_BURST, LAYER_3, MAX_SERVERS, ServerStats},
    device::{Device, Ending, Out, Routed, Routed6, Way},
    frame::Frame,
    host::{Crossing, Crossing6, Owned, View},
    intercept,
    packet::Packet,
    parse::{L2_LEN, datagram, parse, ports},
    path::decide,
    rare::{self, FragmentKey, FragmentPlace},
    rewrite::l2::{self, Mac},
    routed, six,
    steer::Decision,
    verdict::{Action, Reason},
};

use crate::kernel::{OTHER_MAC, OWN_MAC, Outcome, Verdict};

/// What the packet path makes of these bytes.
///
/// # Errors
/// The reason why it makes nothing of them.
pub fn parse_bytes(frame: &[u8]) -> Result<Packet, Reason> {
    let mut bytes = frame.to_vec();
    let start = bytes.as_mut_ptr().expose_provenance();
    // SAFETY: the buffer outlives the frame, and nobody else touches it meanwhile.
    let frame = unsafe { Frame::new(start, start + bytes.len()) };
    parse(&frame).or_else(|reason| {
        let l3 = rare::skip_tags(&frame, rare::IPV4);
        if l3 == 0 {
            return Err(reason);
        }
        let packet = frame.skip(l3);
        let mut datagram = datagram(&packet, bytes.len() - l3)?;
        ports(&packet, &mut datagram).map(|()| datagram.packet)
    })
}

/// The host build with tables of its own, on the same two interfaces as [`Kernel`](crate::kernel::Kernel).
pub struct HostPath {
    tables: Owned,
    world: World,
}

/// What frames leave behind beside the tables.
#[derive(Default)]
struct World {
    stats: RefCell<BTreeMap<u32, ServerStats>>,
    allowance: Cell<u64>,
    fragments: RefCell<HashMap<FragmentKey, FragmentPlace>>,
}

impl HostPath {
    /// With room for this many slots and flow buckets (a power of two).
    pub fn new(slots: usize, flow_buckets: usize) -> Self {
        let tables = Owned::new(slots, MAX_SERVERS as usize, flow_buckets);
        Self { tables, world: World { allowance: Cell::new(ICMP_BURST), ..World::default() } }
    }

    /// The tables.
    pub fn view(&mut self) -> View<'_> {
        self.tables.view()
    }

    /// Fills the sets of addresses that count when a packet crosses this host.
    pub fn set_crossings(&mut self, crossings: Vec<Crossing>, crossings6: Vec<Crossing6>) {
        self.tables.set_crossings(crossings, crossings6);
    }

    /// What this server id got so far.
    pub fn stats(&self, server: u32) -> ServerStats {
        self.world.stats.borrow().get(&server).copied().unwrap_or_default()
    }

    /// From now on as many ICMP errors may be sent as at the beginning.
    pub fn rest(&mut self) {
        self.world.allowance.set(ICMP_BURST);
    }

    /// Forgets where the first parts of datagrams went.
    pub fn forget_fragments(&mut self) {
        self.world.fragments.borrow_mut().clear();
    }

    /// Runs one frame.
    pub fn run(&mut self, frame: &[u8]) -> Outcome {
        let mut memory = [&[0; HEADROOM][..], frame].concat();
        let (verdict, reason, place) = self.run_in(&mut memory, HEADROOM..HEADROOM + frame.len());
        Outcome { verdict, frame: memory[place].to_vec(), reason }
    }

    /// Runs the frame that lies at `place` in this memory, behind at least [`HEADROOM`] bytes; where it lies then.
    ///
    /// # Panics
    /// If `place` is not in the memory.
    pub fn run_in(&mut self, memory: &mut [u8], place: Range<usize>) -> (Verdict, Reason, Range<usize>) {
        let length = counted_length(&memory[place.clone()]);
        let device = Buffer::new(memory, place, &self.world);
        let view = self.tables.view();
        let family =
            if six::is_ipv6(&device.frame()) { Family::six(&device, &view) } else { Family::four(&device, &view) };
        let Family { decision, ending } = family;
        if decision.action() == Action::Transmit && matches!(ending.out(), Out::Port(_) | Out::Pass) {
            device.count(decision.server, length, decision.begins);
        }
        let reason = Reason::ALL[ending.reason() as usize];
        let (verdict, reason) = match ending.out() {
            Out::Pass => (Verdict::Pass, reason),
            Out::Drop => (Verdict::Drop, reason),
            Out::Back | Out::Port(0) => (Verdict::Tx, reason),
            Out::Port(1) | Out::Link(_) => (Verdict::Redirect, reason),
            Out::Port(_) => (Verdict::Drop, Reason::NoNextHop),
        };
        (verdict, reason, device.start.get()..device.end.get())
    }
}

/// What the programs of one family make of a frame.
struct Family {
    /// The fast path's.
    decision: Decision,
    /// The last one's.
    ending: Ending,
}

impl Family {
    fn four(device: &Buffer<'_>, view: &View<'_>) -> Self {
        let decision = decide(&device.frame(), OWN_MAC.into(), view);
        let ending = match decision.action() {
            Action::Transmit if matches!(decision.next_hop.forwarding(), GRE | LAYER_3) => {
                routed::send(device, view, decision.server, decision.reason as u32, L2_LEN)
            }
            Action::Transmit => transmit(device, decision),
            Action::Drop => Ending::drop(decision.reason),
            _ if decision.reason.is_rare() => match rare::handle(device, view) {
                Some(ending) if ending.reason() == Reason::NotIp as u32 && device.datagram6_at() != 0 => {
                    return Self { decision, ending: unless_crossing(six_rare(device, view), device, view) };
                }
                Some(ending) => ending,
                None => rare::with_ports(device, view),
            },
            _ => Ending::new(decision.reason, Out::Pass),
        };
        let reply = match parse(&device.frame()) {
            Ok(packet) if decision.reason == Reason::NotOurs => routed::reply(device, view, &packet, L2_LEN),
            _ => None,
        };
        let ending = reply.map_or(ending, |sent| sent.ending);
        let ending = if intercept::is_open(ending) { intercept::handle(device, view) } else { ending };
        Self { decision, ending }
    }

    fn six(device: &Buffer<'_>, view: &View<'_>) -> Self {
        let decision = six::decide(&device.frame(), OWN_MAC.into(), view);
        let ending = match decision.action() {
            Action::Transmit if matches!(decision.next_hop.forwarding(), GRE | LAYER_3) => {
                six::routed::send(device, view, decision.server, decision.reason as u32, L2_LEN)
            }
            Action::Transmit => transmit(device, decision),
            Action::Drop => Ending::drop(decision.reason),
            _ if decision.reason.is_rare() => six_rare(device, view),
            _ => Ending::new(decision.reason, Out::Pass),
        };
        let reply = match six::parse(&device.frame()) {
            Ok(packet) if decision.reason == Reason::NotOurs => six::routed::whose_reply(&packet, view),
            _ => None,
        };
        let sent = reply.map(|(vip, server)| six::routed::send_reply(device, view, L2_LEN, vip, server));
        Self { decision, ending: unless_crossing(sent.unwrap_or(ending), device, view) }
    }
}

fn six_rare(device: &Buffer<'_>, view: &View<'_>) -> Ending {
    six::rare::handle(device, view).unwrap_or_else(|| six::rare::with_ports(device, view))
}

fn unless_crossing(ending: Ending, device: &Buffer<'_>, view: &View<'_>) -> Ending {
    if intercept::is_open(ending) { six::intercept::handle(device, view) } else { ending }
}

/// A test run's first buffer: a page without headroom and the kernel's own notes.
const FIRST_BUFFER: usize = 4096 - 256 - 320;

/// What the fast path counts: it sees the first buffer, which has all of the datagram, but perhaps not all of its padding.
fn counted_length(frame: &[u8]) -> u64 {
    let field =
        |at: usize| frame.get(at..at + 2).map_or(0, |field| usize::from(u16::from_be_bytes([field[0], field[1]])));
    let total = if field(12) == 0x86dd { 40 + field(18) } else { field(16) };
    let all = L2_LEN + total > FIRST_BUFFER;
    (if all { frame.len() } else { frame.len().min(FIRST_BUFFER) }) as u64
}

fn transmit(device: &Buffer<'_>, decision: Decision) -> Ending {
    let port = decision.next_hop.port();
    let Some(source) = device.port_mac(port.into()) else { return Ending::drop(Reason::NoNextHop) };
    if l2::rewrite(&device.frame(), decision.next_hop.mac(), source) {
        Ending::new(decision.reason, Out::Port(port.into()))
    } else {
        Ending::drop(Reason::BadTables)
    }
}

/// Most bytes that are put in front of a frame; the kernel keeps more.
pub const HEADROOM: usize = 256;

/// A frame in a caller's memory.
struct Buffer<'a> {
    memory: RefCell<&'a mut [u8]>,
    start: Cell<usize>,
    end: Cell<usize>,
    world: &'a World,
}

impl<'a> Buffer<'a> {
    fn new(memory: &'a mut [u8], place: Range<usize>, world: &'a World) -> Self {
        Self { memory: RefCell::new(memory), start: Cell::new(place.start), end: Cell::new(place.end), world }
    }
}

impl Device for Buffer<'_> {
    fn frame(&self) -> Frame {
        let base = self.memory.borrow_mut().as_mut_ptr().expose_provenance();
        // SAFETY: the memory outlives the frame, is never moved, and nobody else touches it meanwhile.
        unsafe { Frame::new(base + self.start.get(), base + self.end.get()) }
    }

    fn length(&self) -> usize {
        self.end.get() - self.start.get()
    }

    fn datagram_at(&self) -> usize {
        rare::skip_tags(&self.frame(), rare::IPV4)
    }

    fn datagram6_at(&self) -> usize {
        rare::skip_tags(&self.frame(), rare::IPV6)
    }

    fn remember(&self, key: &FragmentKey, place: FragmentPlace) {
        self.world.fragments.borrow_mut().insert(*key, place);
    }

    fn recall(&self, key: &FragmentKey) -> Option<FragmentPlace> {
        self.world.fragments.borrow().get(key).copied()
    }

    fn count(&self, server: u32, bytes: u64, begins: bool) {
        let mut all = self.world.stats.borrow_mut();
        let stats = all.entry(server).or_default();
        stats.packets += 1;
        stats.bytes += bytes;
        stats.flows += u64::from(begins);
    }

    fn count_reply(&self, server: u32) {
        self.world.stats.borrow_mut().entry(server).or_default().replies += 1;
    }

    fn grow(&self, bytes: u32) -> bool {
        let start = self.start.get().checked_sub(bytes as usize);
        start.is_some_and(|start| {
            self.start.set(start);
            true
        })
    }

    fn shorten(&self, bytes: u32) -> bool {
        let end = self.end.get().checked_sub(bytes as usize).filter(|&end| end >= self.start.get() + L2_LEN);
        end.is_some_and(|end| {
            self.end.set(end);
            true
        })
    }

    fn own_mac(&self) -> Mac {
        OWN_MAC.into()
    }

    fn port_mac(&self, index: u32) -> Option<Mac> {
        [OWN_MAC, OTHER_MAC].get(index as usize).map(|mac| Mac::from(*mac))
    }

    fn may_tell(&self) -> bool {
        let left = self.world.allowance.get();
        self.world.allowance.set(left.saturating_sub(1));
        left > 0
    }

    /// What the kernel says of a way that begins on the loopback.
    fn way(&self, _packet: &Routed) -> Way {
        Way::Kernel
    }

    fn way6(&self, _packet: &Routed6) -> Way {
        Way::Kernel
    }
}
