//! The answer to an EXCEPTION_QUERY, some units at a time.
//!
//! The answer's header says how many units follow (draft §5.2), so they are counted before the first one goes out, and the
//! list may change in between. A listing is of the moment at which it began: what is added later is not in it. An entry
//! that was counted and went before its turn is made up for by another one of the listing, said once more: an answer of
//! the length announced, in which every entry was in force when the query came. So a listing holds nothing but its place.

use super::super::cluster::Cluster;
use crate::necp::message::{Filter, Listed};

/// A listing under way: first [`Listing::count`] until it says a number, then [`Listing::read`] until that many are read.
#[derive(Clone, Debug)]
pub struct Listing {
    filter: Filter,
    /// Entries that are younger are not in it.
    cut: u64,
    /// Where to go on.
    next: u32,
    /// Entries that match, so far.
    counted: u32,
    /// None: still counting.
    left: Option<u32>,
    /// For entries that went after they were counted.
    again: Option<Listed>,
}

impl Listing {
    pub(super) fn new(filter: Filter, cut: u64) -> Self {
        Self { filter, cut, next: 0, counted: 0, left: None, again: None }
    }

    /// Counts on: looks at no more than `budget` entries. How many units the answer has, once that is known.
    pub fn count(&mut self, cluster: &Cluster, budget: usize) -> Option<u32> {
        for _ in 0..budget {
            if self.left.is_some() {
                break;
            }
            match cluster.exceptions.listed(self.next, self.cut, &self.filter) {
                Some(Some(entry)) => {
                    self.again.get_or_insert(entry);
                    self.counted += 1;
                    self.next += 1;
                }
                Some(None) => self.next += 1,
                None => (self.left, self.next) = (Some(self.counted), 0),
            }
        }
        self.left.map(|_| self.counted)
    }

    /// Appends at most `most` entries to `entries`, in the order of the listing, looking at no more than `budget`; true
    /// if the listing is complete with them. [`Listing::count`] must have said a number.
    pub fn read(&mut self, cluster: &Cluster, most: usize, mut budget: usize, entries: &mut Vec<Listed>) -> bool {
        let Some(mut left) = self.left else { return false };
        for _ in 0..most {
            let entry = loop {
                if left == 0 || budget == 0 {
                    break None;
                }
                match cluster.exceptions.listed(self.next, self.cut, &self.filter) {
                    Some(found) => {
                        (self.next, budget) = (self.next + 1, budget - 1);
                        if found.is_some() {
                            break found;
                        }
                    }
                    None => break self.again,
                }
            };
            let Some(entry) = entry else { break };
            self.again = Some(entry);
            entries.push(entry);
            left -= 1;
        }
        self.left = Some(left);
        left == 0
    }
}
