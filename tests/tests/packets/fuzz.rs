//! Random frames through both builds: whatever comes in, they do the same.

use std::collections::BTreeMap;

use necp_ebpf::{abi::FIRST_SERVER, host::View, packet::protocol, slot::SlotWord, verdict::Reason};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{
    case::Bench,
    frames::{Flow, Spec, WEB_FLOW},
    setup::{ALWAYS, DEAD, DNS, LEGACY, OTHER, OWNER, QUIC, REMOTE, STOPPED, Setup, UNREACHABLE, WEB},
};

/// Frames between two cleared tables.
const HISTORY: usize = 200;

/// Runs this many frames; how often each reason came.
pub fn run(bench: &mut Bench, seed: u64, frames: usize) -> Result<BTreeMap<&'static str, u32>, String> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut reasons = BTreeMap::new();
    for history in 0..frames / HISTORY {
        let setup = setup(&mut random);
        bench.install(&setup);
        for number in 0..HISTORY {
            change(bench, &mut random);
            let frame = frame(&mut random);
            let outcome = bench.both(&frame).map_err(|wrong| {
                format!("seed {seed}, history {history}, frame {number}: {wrong}\nframe: {frame:02x?}")
            })?;
            *reasons.entry(Reason::name(outcome.reason)).or_default() += 1;
        }
        bench.remove(&setup);
    }
    Ok(reasons)
}

fn setup(random: &mut StdRng) -> Setup {
    match random.random_range(0..6) {
        0 => Setup::plain(),
        1 => Setup::changed_from(LEGACY),
        2 => Setup::tracked(),
        3 => Setup::collecting(),
        4 => Setup::direct(),
        _ => Setup::owned_by(STOPPED),
    }
}

/// Now and then what user space does: the same change of the same slot on both sides.
fn change(bench: &mut Bench, random: &mut StdRng) {
    if random.random_range(0..20) != 0 {
        return;
    }
    let slot = random.random_range(0..28);
    let owner = [1, OWNER, LEGACY, OTHER, STOPPED, DEAD, UNREACHABLE, REMOTE][random.random_range(0..8)];
    let apply = |view: View<'_>| {
        let word = &view.slots()[slot];
        word.store(SlotWord(word.load()).moved_to(owner, |id| id < FIRST_SERVER || id != DEAD).0);
    };
    apply(bench.kernel.view());
    apply(bench.host.view());
}

fn frame(random: &mut StdRng) -> Vec<u8> {
    let mut bytes = spec(random).build();
    if random.random_range(0..3) == 0 {
        for _ in 0..random.random_range(1..4) {
            mutate(&mut bytes, random);
        }
    }
    bytes
}

/// A valid frame of one of a few flows.
fn spec(random: &mut StdRng) -> Spec {
    let (protocol, port) = [
        (protocol::TCP, WEB),
        (protocol::TCP, WEB),
        (protocol::TCP, ALWAYS),
        (protocol::UDP, DNS),
        (protocol::UDP, QUIC),
    ][random.random_range(0..5)];
    let source_port = 40000 + random.random_range(0..24);
    let flow = Flow { source_port, ..WEB_FLOW }.on(protocol, port);
    // Most SYNs of a flow are the same one again, so that its other packets can confirm it.
    let mut isn = [1000, 5000, u32::MAX][usize::from(source_port) % 3];
    if random.random_range(0..8) == 0 {
        isn = random.random();
    }
    let payload = vec![0x55; [0, 0, 1, 5, 700][random.random_range(0..5)]];
    let flags = [0x02, 0x02, 0x10, 0x10, 0x18, 0x11, 0x04, 0x12, random.random()][random.random_range(0..9)];
    let sequence = if flags == 0x02 { isn } else { isn.wrapping_add(random.random_range(0..4)) };
    if protocol == protocol::UDP { flow.udp(&payload) } else { flow.tcp(flags, sequence, &payload) }
}

fn mutate(bytes: &mut Vec<u8>, random: &mut StdRng) {
    let headers = bytes.len().min(62);
    match random.random_range(0..6) {
        0 => bytes[random.random_range(0..headers)] = random.random(),
        1 => bytes[random.random_range(0..headers)] ^= 1 << random.random_range(0..8),
        2 => bytes[random.random_range(0..headers)] = [0, 1, 0x7f, 0x80, 0xff][random.random_range(0..5)],
        3 => bytes.truncate(random.random_range(14..=bytes.len())),
        4 => bytes.extend((0..random.random_range(1..64)).map(|at| at as u8)),
        _ => bytes.iter_mut().skip(14).take(1).for_each(|vihl| *vihl = 0x40 | random.random_range(0..16)),
    }
}
