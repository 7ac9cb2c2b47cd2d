//! Which server a new flow goes to: what exceptions say of it, then its slot's owner, then the probe sequence.
//!
//! A question of four words and an answer of one: in the kernel it is a function of its own, which the verifier follows
//! once, knowing nothing of its arguments, instead of once for each way that leads there.

use crate::{
    abi::{ACCEPTS, ALIVE, DIRECT, REACHABLE},
    exceptions::{GLOBAL, Rounds, TUPLE_BITS, Tuple},
    hash::{next_probe, slot_index},
    slot::SlotWord,
    tables::Tables,
};

/// Slots that a new flow asks, its own first, for a server that takes it and that it may go to. They are a fixed sequence:
/// in a large table one that nobody of them names may be left, and the flow goes direct nevertheless.
pub const PROBES: u32 = 64;
/// How many of them follow one another at random: in a table of a few slots that alone might miss one. The rest are
/// neighbours, so that a table of no more slots than these is asked to its last one.
const SCATTERED: u32 = 52;

/// A flow that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFlow {
    /// What exceptions look at.
    pub tuple: Tuple,
    /// The service's first slot.
    pub slots_base: u32,
    /// Number of its slots.
    pub slots_size: u32,
    /// The flow's hash.
    pub hash: u64,
    /// Owner of its slot, as it was read.
    pub owner: u32,
}

/// Where a new flow is to go: the server id, and in bit 32 whether an exception had a say in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen(pub u64);

impl Chosen {
    /// `excepted`: an exception had a say in it.
    #[inline(always)]
    pub const fn new(server: u32, excepted: bool) -> Self {
        Self((excepted as u64) << 32 | server as u64)
    }

    /// The server id; [`DIRECT`] if no server is to have it.
    #[inline(always)]
    pub const fn server(self) -> u32 {
        self.0 as u32
    }

    /// An exception had a say in it.
    #[inline(always)]
    pub const fn is_excepted(self) -> bool {
        self.0 >> 32 != 0
    }
}

impl NewFlow {
    /// As arguments of a function in the kernel: few, because each of them takes room on its stack.
    #[inline(always)]
    pub const fn to_words(self) -> [u64; 4] {
        let [addresses, rest] = self.tuple.to_words();
        let slots = (self.slots_base as u64) << 32 | self.slots_size as u64;
        [addresses, (self.owner as u64) << TUPLE_BITS | rest, slots, self.hash]
    }

    /// From [`to_words`](Self::to_words).
    #[inline(always)]
    pub const fn from_words([addresses, rest, slots, hash]: [u64; 4]) -> Self {
        Self {
            tuple: Tuple::from_words([addresses, rest]),
            slots_base: (slots >> 32) as u32,
            slots_size: slots as u32,
            hash,
            owner: (rest >> TUPLE_BITS) as u32,
        }
    }

    /// The slot's owner, or the first of the probe sequence that takes new flows and wants this; else direct.
    #[inline(always)]
    pub fn choose<T: Tables>(&self, tables: &T) -> Chosen {
        let matches = tables.matches(self.tuple);
        if matches & GLOBAL != 0 {
            return Chosen::new(DIRECT, true);
        }
        let (mut server, mut hash) = (self.owner, self.hash);
        let mut index = slot_index(hash, self.slots_size);
        for probe in Rounds::new(PROBES) {
            if accepts(tables, server) && !self.is_excluded(tables, matches, server) {
                return Chosen::new(server, matches != 0);
            }
            if probe < SCATTERED {
                hash = next_probe(hash);
                index = slot_index(hash, self.slots_size);
            } else {
                // A remainder, because a comparison would give the verifier another path to follow with each probe.
                let Some(next) = (index + 1).checked_rem(self.slots_size) else { break };
                index = next;
            }
            let Some(slot) = tables.slot(self.slots_base.wrapping_add(index)) else { break };
            server = SlotWord(slot.load()).owner();
        }
        Chosen::new(DIRECT, matches != 0)
    }

    #[inline(always)]
    fn is_excluded<T: Tables>(&self, tables: &T, matches: u64, server: u32) -> bool {
        matches != 0 && tables.excludes(self.tuple, matches, tables.host_number(server))
    }
}

/// Whether a server takes new flows.
#[inline(always)]
fn accepts<T: Tables>(tables: &T, server: u32) -> bool {
    let wanted = ALIVE | ACCEPTS | REACHABLE;
    server > DIRECT && tables.next_hop(server).is_some_and(|hop| hop.flags() & wanted == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_the_same_after_its_way_through_words() {
        let flow = NewFlow {
            tuple: Tuple { source: 0x8102_0304, destination: 0x8506_0708, port: 0x890a, protocol: 0x8b, farm: 0x8e0f },
            slots_base: 0x9011_1213,
            slots_size: 0x9415_1617,
            hash: 0x9819_1a1b_1c1d_1e1f,
            owner: 0xa0_2122,
        };
        assert_eq!(NewFlow::from_words(flow.to_words()), flow);
    }
}
