//! The bounds: balance, disruption, order, cost.

use std::{collections::BTreeMap, time::Duration};

use proptest::prelude::*;

use super::*;

const SIZE: u32 = 65_537;

fn members(count: u32, trial: u64, weight: impl Fn(u32) -> u32) -> Vec<Member> {
    let member = |n: u32| Member { id: n + 2, identity: mix(trial << 32 | u64::from(n)), weight: weight(n) };
    (0..count).map(member).collect()
}

fn unequal(n: u32) -> u32 {
    1000 + (mix(u64::from(n)) % 99_001) as u32
}

fn shares(table: &[u32]) -> BTreeMap<u32, u32> {
    let mut shares = BTreeMap::new();
    for &owner in table {
        *shares.entry(owner).or_default() += 1;
    }
    shares
}

/// Slots that moved though they need not have, given the shares before and after.
fn needless(before: &[u32], after: &[u32]) -> u32 {
    let moved = before.iter().zip(after).filter(|(a, b)| a != b).count() as u32;
    let old = shares(before);
    let gained = |(id, share): (&u32, &u32)| share.saturating_sub(old.get(id).copied().unwrap_or(0));
    moved - shares(after).iter().map(gained).sum::<u32>()
}

#[test]
fn every_share_is_within_one_slot_of_its_weight() {
    for count in [1, 3, 10, 100, 1000] {
        for weight in [|_| 100_000, unequal] {
            for size in [5, 11, 251, SIZE] {
                let members = members(count, 1, weight);
                let table = table(&members, size);
                assert_eq!(table.len(), size as usize);
                let shares = shares(&table);
                let total: f64 = members.iter().map(|member| f64::from(member.weight)).sum();
                for member in &members {
                    let exact = f64::from(member.weight) / total * f64::from(size);
                    let share = f64::from(shares.get(&member.id).copied().unwrap_or(0));
                    assert!((share - exact).abs() < 1.0, "{count} members, {size} slots: {share} instead of {exact}");
                }
            }
        }
    }
}

#[test]
fn a_change_moves_at_most_one_per_cent_more_than_it_must() {
    let most = SIZE / 100;
    for count in [2, 3, 5, 10, 30, 100] {
        for (trial, weight) in [(1, unequal as fn(u32) -> u32), (2, |_| 100_000), (3, |_| 100_000), (4, unequal)] {
            let all = members(count + 1, trial, weight);
            let before = table(&all[..count as usize], SIZE);
            let mut lighter = all[..count as usize].to_vec();
            lighter[0].weight = lighter[0].weight * 4 / 5;
            for (what, after) in [
                ("join", table(&all, SIZE)),
                ("leave", table(&all[1..count as usize], SIZE)),
                ("weight", table(&lighter, SIZE)),
            ] {
                let needless = needless(&before, &after);
                assert!(needless <= most, "{count} members, {what}: {needless} slots moved needlessly");
            }
        }
    }
}

#[test]
fn the_cost_does_not_grow_as_members_times_slots() {
    // Generous, because tests are built without optimisation: some ten milliseconds with it, minutes if it did grow so.
    let members = members(10_000, 1, unequal);
    let begin = std::time::Instant::now();
    let table = table(&members, SIZE);
    assert!(begin.elapsed() < Duration::from_secs(20), "took {:?}", begin.elapsed());
    assert_eq!(table.len(), SIZE as usize);
}

#[test]
fn the_table_never_changes_between_builds() {
    let table = table(&members(3, 7, |n| n + 1), 11);
    assert_eq!(shares(&table), [(2, 2), (3, 4), (4, 5)].into());
    let all = super::table(&members(10, 7, unequal), 251);
    let digest = all.iter().fold(0, |digest, &owner| mix(digest ^ u64::from(owner)));
    assert_eq!(digest, DIGEST, "NEs of different versions would disagree about every flow");
}

const DIGEST: u64 = 15_582_405_736_647_118_229;

#[test]
fn nobody_gets_nothing() {
    assert!(table(&[], SIZE).is_empty());
    assert!(table(&[Member { id: 2, identity: 1, weight: 0 }], SIZE).is_empty());
    assert!(table(&members(3, 1, unequal), 0).is_empty());
    assert_eq!(table(&members(1, 1, unequal), 1), [2]);
    let same = Member { id: 2, identity: 1, weight: 1 };
    assert_eq!(shares(&table(&[same, Member { id: 3, ..same }], 10)), [(2, 5), (3, 5)].into());
}

proptest! {
    #[test]
    fn the_order_of_the_members_does_not_matter(
        (sorted, shuffled) in prop::collection::btree_map(any::<u64>(), 0..1000_u32, 1..40).prop_flat_map(|members| {
            let members: Vec<Member> = members.into_iter().zip(2..)
                .map(|((identity, weight), id)| Member { id, identity, weight })
                .collect();
            (Just(members.clone()), Just(members).prop_shuffle())
        }),
        size in prop::sample::select(vec![5_u32, 11, 12, 251, 1021]),
    ) {
        prop_assert_eq!(table(&sorted, size), table(&shuffled, size));
    }

    #[test]
    fn a_weight_of_nothing_is_as_if_it_were_not_there(weights in prop::collection::vec(0..5_u32, 1..20)) {
        let all = members(weights.len() as u32, 3, |n| weights[n as usize]);
        let some: Vec<Member> = all.iter().filter(|member| member.weight > 0).copied().collect();
        prop_assert_eq!(table(&all, 251), table(&some, 251));
    }
}
