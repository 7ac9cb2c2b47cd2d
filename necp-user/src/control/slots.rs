//! The slot table: which server owns which slot; weighted Maglev with a stable outcome.
//!
//! As in Maglev (NSDI 2016, §3.4), each server has a permutation of the slots, made from an offset and a skip, and claims
//! slots in that order. Two things differ, for balance and for little disruption:
//!
//! - A claimed slot is not taken for good: it goes to whoever comes to it *earliest*, and whoever loses it claims further,
//!   until each holds exactly its quota. (Deferred acceptance; both sides rank by the same time, so the outcome is unique:
//!   it depends neither on the order of the members nor of the claims, and a change moves little more than it must.)
//! - The time at which a server of weight `w` makes its k-th claim is the expected k-th arrival of `size` exponential ones,
//!   divided by `w`. Earliest arrivals then are in proportion to the weights already, before any quota corrects them.
//!
//! Maglev's permutations are straight lines modulo the size, and those of few servers may run alongside each other; all
//! servers deal out their line in one common shuffled order, which undoes that.
//!
//! Quotas are exact shares, by largest remainder: every share is within one slot of its weight, which is closer than one
//! per cent of the share wherever the two differ.

use super::stable::mix;

/// A server in a slot table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Server id, what the table's slots will name.
    pub id: u32,
    /// Stable hash of the SE's address and the service, the same on every NE ([`identity`](super::stable::identity)).
    pub identity: u64,
    /// Its share, relative to the others'; 0: not in the table.
    pub weight: u32,
}

/// The owner of each slot, by id; empty if there is no member with a weight, or no slot.
///
/// A pure function of the *set* of members. `size` should be a prime; with any other the permutations repeat less well.
/// Takes about ten claims a slot, whatever the number of members: some milliseconds for 65,537 slots.
pub fn table(members: &[Member], size: u32) -> Vec<u32> {
    let mut members: Vec<Member> = members.iter().filter(|member| member.weight > 0).copied().collect();
    members.sort_unstable_by_key(|member| (member.identity, member.id));
    if members.is_empty() || size == 0 {
        return Vec::new();
    }
    let mut claimants: Vec<Claimant> =
        members.iter().zip(quotas(&members, size)).map(|(member, quota)| Claimant::new(member, quota, size)).collect();
    let deal = Deal::new(size);
    let free = Claim { time: f64::INFINITY, by: u32::MAX };
    let mut slots = vec![free; size as usize];
    // Whoever still misses slots, each at most once.
    let mut waiting: Vec<u32> = (0..claimants.len() as u32).collect();
    while let Some(by) = waiting.pop() {
        while claimants[by as usize].missing > 0 {
            let Some((slot, time)) = claimants[by as usize].next(&deal) else { break };
            let claim = Claim { time, by };
            let old = slots[slot as usize];
            if !claim.beats(old, slot, &members) {
                continue;
            }
            slots[slot as usize] = claim;
            claimants[by as usize].missing -= 1;
            if let Some(loser) = claimants.get_mut(old.by as usize) {
                loser.missing += 1;
                if loser.missing == 1 {
                    waiting.push(old.by);
                }
            }
        }
    }
    slots.iter().map(|claim| members[claim.by as usize].id).collect()
}

/// Whole slots for each member: exact shares, the remainder to those with the largest fraction.
fn quotas(members: &[Member], size: u32) -> Vec<u32> {
    let total: u128 = members.iter().map(|member| u128::from(member.weight)).sum();
    let share = |member: &Member| u128::from(member.weight) * u128::from(size);
    let mut quotas: Vec<u32> = members.iter().map(|member| (share(member) / total) as u32).collect();
    let rest = size - quotas.iter().sum::<u32>();
    let mut by_fraction: Vec<usize> = (0..members.len()).collect();
    // The sort is stable and the members are in the order of their identities: ties are the same everywhere.
    by_fraction.sort_by_key(|&index| std::cmp::Reverse(share(&members[index]) % total));
    for &index in by_fraction.iter().take(rest as usize) {
        quotas[index] += 1;
    }
    quotas
}

/// What is common to all members of a table of one size.
struct Deal {
    /// The order in which everybody walks along his own line.
    order: Vec<u32>,
    /// Expected arrivals of as many exponentials of rate one (Rényi): sums and quotients only, so the same on every machine.
    arrivals: Vec<f64>,
}

impl Deal {
    fn new(size: u32) -> Self {
        let mut order: Vec<u32> = (0..size).collect();
        for last in (1..size as usize).rev() {
            let random = mix(last as u64 ^ 0x9e37_79b9_7f4a_7c15);
            order.swap(last, (((random >> 32) * (last as u64 + 1)) >> 32) as usize);
        }
        let mut time = 0.0;
        let arrivals = (0..size)
            .map(|rank| {
                time += 1.0 / f64::from(size - rank);
                time
            })
            .collect();
        Self { order, arrivals }
    }
}

/// A member while it claims slots.
struct Claimant {
    offset: u64,
    skip: u64,
    rank: u32,
    missing: u32,
    weight: f64,
}

impl Claimant {
    fn new(member: &Member, missing: u32, size: u32) -> Self {
        let size = u64::from(size);
        let offset = mix(member.identity ^ 1) % size;
        let mut skip = if size > 1 { mix(member.identity ^ 2) % (size - 1) + 1 } else { 1 };
        while gcd(skip, size) != 1 {
            skip = skip % size + 1;
        }
        Self { offset, skip, rank: 0, missing, weight: f64::from(member.weight) }
    }

    /// The next slot in its order, and when it gets there; none if it has been everywhere.
    fn next(&mut self, deal: &Deal) -> Option<(u32, f64)> {
        let dealt = u64::from(*deal.order.get(self.rank as usize)?);
        let slot = (self.offset + self.skip * dealt) % deal.order.len() as u64;
        let time = deal.arrivals[self.rank as usize] / self.weight;
        self.rank += 1;
        Some((slot as u32, time))
    }
}

/// A slot's holder.
#[derive(Clone, Copy)]
struct Claim {
    time: f64,
    by: u32,
}

impl Claim {
    fn beats(self, old: Self, slot: u32, members: &[Member]) -> bool {
        if self.time != old.time {
            return self.time < old.time;
        }
        let preference = |claim: Self| (mix(u64::from(slot) ^ members[claim.by as usize].identity), claim.by);
        preference(self) < preference(old)
    }
}

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests;
