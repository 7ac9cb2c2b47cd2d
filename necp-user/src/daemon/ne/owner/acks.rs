//! Answers that wait for the maps: an ACK follows the write, never precedes it (draft §3).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Instant;

use tokio::sync::oneshot;

use crate::control::cluster::Change;
use crate::control::plan::Applied;

/// One answer.
pub(super) struct Ack {
    server: IpAddr,
    done: oneshot::Sender<Vec<usize>>,
    failed: BTreeSet<usize>,
    /// Not in the maps yet: (the operation's index, its change). INIT's index has no meaning.
    waits: Vec<(usize, Change)>,
    is_init: bool,
    /// A START may wait this long for its server's next hop.
    next_hop_until: Option<Instant>,
    until: Instant,
}

impl Ack {
    /// For INIT, which cannot fail: it waits until all is written.
    pub(super) fn init(server: IpAddr, change: Change, done: oneshot::Sender<Vec<usize>>) -> Self {
        let now = Instant::now();
        Self {
            server,
            done,
            failed: BTreeSet::new(),
            waits: vec![(0, change)],
            is_init: true,
            next_hop_until: None,
            until: now,
        }
    }

    /// For START and STOP units, added one by one.
    pub(super) fn operations(server: IpAddr, until: Instant, done: oneshot::Sender<Vec<usize>>) -> Self {
        Self { server, done, failed: BTreeSet::new(), waits: Vec::new(), is_init: false, next_hop_until: None, until }
    }

    pub(super) fn wait(&mut self, index: usize, change: Change) {
        self.waits.push((index, change));
    }

    pub(super) fn wait_for_start(&mut self, index: usize, change: Change) {
        self.wait(index, change);
        self.next_hop_until = Some(self.until);
    }

    pub(super) fn fail(&mut self, index: usize) {
        self.failed.insert(index);
    }

    fn applied(&mut self, applied: &Applied) {
        if self.is_init && !applied.errors.is_empty() {
            return;
        }
        let Self { waits, failed, .. } = self;
        waits.retain(|(index, change)| match applied.outcome(*change) {
            Some(written) => {
                if !written {
                    failed.insert(*index);
                }
                false
            }
            None => true,
        });
    }
}

/// Those that have not been given.
#[derive(Default)]
pub(super) struct Acks {
    waiting: Vec<Ack>,
}

impl Acks {
    pub(super) fn add(&mut self, ack: Ack) {
        self.waiting.push(ack);
    }

    /// What a plan has come to.
    pub(super) fn applied(&mut self, applied: &Applied) {
        for ack in &mut self.waiting {
            ack.applied(applied);
        }
    }

    /// Gives the answers that need not wait any more; `located` says whether a server's next hop is known.
    pub(super) fn release(&mut self, now: Instant, located: impl Fn(IpAddr) -> bool) {
        let is_ready = |ack: &mut Ack| {
            ack.waits.is_empty() && (ack.next_hop_until.is_none_or(|until| now >= until) || located(ack.server))
        };
        for ack in self.waiting.extract_if(.., is_ready) {
            // The session may have ended meanwhile.
            let _ = ack.done.send(ack.failed.into_iter().collect());
        }
    }

    /// When [`Acks::release`] has something to do without anything else happening.
    pub(super) fn next(&self) -> Option<Instant> {
        self.waiting.iter().filter(|ack| ack.waits.is_empty()).filter_map(|ack| ack.next_hop_until).min()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SERVER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 11));

    fn written(through: u64, failed: &[u64]) -> Applied {
        let mut applied = Applied::default();
        applied.through = Change(through);
        applied.failed = failed.iter().map(|number| Change(*number)).collect();
        applied
    }

    #[test]
    fn nothing_is_answered_before_it_is_written() {
        let (now, mut acks) = (Instant::now(), Acks::default());
        let (done, mut answer) = oneshot::channel();
        let mut ack = Ack::operations(SERVER, now, done);
        ack.wait(0, Change(5));
        ack.fail(1);
        ack.wait(2, Change(7));
        acks.add(ack);
        acks.release(now, |_| true);
        assert!(answer.try_recv().is_err(), "nothing is written");
        acks.applied(&written(6, &[]));
        acks.release(now, |_| true);
        assert!(answer.try_recv().is_err(), "7 is not");
        acks.applied(&written(7, &[7]));
        acks.release(now, |_| true);
        assert_eq!(answer.try_recv().expect("answered"), [1, 2], "refused, and not written");
    }

    #[test]
    fn a_start_waits_for_the_next_hop_but_not_for_ever() {
        let (now, mut acks) = (Instant::now(), Acks::default());
        let until = now + Duration::from_secs(1);
        let start = |acks: &mut Acks| {
            let (done, answer) = oneshot::channel();
            let mut ack = Ack::operations(SERVER, until, done);
            ack.wait_for_start(0, Change(1));
            acks.add(ack);
            acks.applied(&written(1, &[]));
            answer
        };
        let mut answer = start(&mut acks);
        acks.release(now, |_| false);
        assert!(answer.try_recv().is_err());
        assert_eq!(acks.next(), Some(until));
        acks.release(now, |_| true);
        assert!(answer.try_recv().expect("answered").is_empty());
        let mut answer = start(&mut acks);
        acks.release(until, |_| false);
        assert!(answer.try_recv().expect("answered").is_empty());
    }
}
