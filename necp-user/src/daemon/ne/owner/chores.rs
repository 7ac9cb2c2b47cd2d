//! What is done beside the answers: changes in the network, and what time makes due.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Bound;
use std::time::{Duration, Instant};

use super::Owner;
use crate::control::collect::Progress;
use crate::plane::neighbours::Change;

/// Between two samples of the counters, two probes of a lost host, two looks at what is due.
const SECOND: Duration = Duration::from_secs(1);
/// Between two looks at which hosts nobody asks for any more.
const TIDY: Duration = Duration::from_secs(10);
/// Slots or flow buckets that the collector looks at in one go: well under a millisecond.
const BATCH: usize = 8192;
/// Between two goes, for everything else.
const BATCH_PAUSE: Duration = Duration::from_millis(5);
/// Lost hosts that are asked for in a second.
const PROBES: usize = 256;
/// Before all addresses.
pub(super) const NOBODY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
/// After routes changed, for more changes to come.
const SETTLE: Duration = Duration::from_millis(200);
/// A gratuitous ARP is repeated after this: a link that has just come up may drop it.
pub(super) const ANNOUNCE_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];

impl Owner {
    pub(super) async fn refresh_crossings(&mut self) {
        if let Some(crossings) = &self.crossings {
            crossings.refresh(&mut self.plane).await;
        }
    }

    pub(super) fn on_change(&mut self, change: Change) {
        match change {
            Change::Neighbour(neighbour) => {
                for host in self.hosts.on_neighbour(neighbour) {
                    self.report_sight(host);
                }
            }
            Change::Link { ifindex, up } => {
                self.on_link(ifindex, up);
                self.refresh_at.get_or_insert(Instant::now() + SETTLE);
            }
            Change::Routes | Change::Lost => _ = self.refresh_at.get_or_insert(Instant::now() + SETTLE),
        }
    }

    pub(super) fn on_link(&mut self, ifindex: u32, up: bool) {
        let Some(port) = self.plane.ports().into_iter().find(|port| port.ifindex == ifindex) else { return };
        match self.plane.refresh_port(ifindex) {
            Ok(false) => {}
            Ok(true) => {
                let new = self.plane.ports().into_iter().find(|port| port.ifindex == ifindex);
                new.into_iter().for_each(|port| self.hosts.on_port(port));
                tracing::info!("MAC address or MTU of {} changed: its program is replaced", port.name);
                self.announcements.push(Instant::now());
            }
            Err(error) => tracing::warn!(%error, "{} changed", port.name),
        }
        if self.sampler.link_changed(ifindex, up) {
            tracing::info!("{} is {}", port.name, if up { "up" } else { "down" });
            if up {
                self.announcements.extend([Instant::now(), Instant::now() + ANNOUNCE_AGAIN[0]]);
            }
        }
    }

    pub(super) async fn do_what_is_due(&mut self) {
        let now = Instant::now();
        self.lists.step(&self.cluster);
        if self.next_batch <= now {
            self.collect(now);
        }
        if self.announcements.iter().any(|at| *at <= now) {
            self.announcements.retain(|at| *at > now);
            if let Some(vips) = &self.vips {
                vips.announce(&self.plane.ports());
            }
        }
        if self.refresh_at.is_some_and(|at| at <= now) {
            self.refresh_at = None;
            self.refresh_crossings().await;
            self.hosts.begin_refresh().await;
        }
        for host in self.hosts.refresh().await {
            self.report_sight(host);
        }
        if self.next_second <= now {
            self.next_second = now + SECOND;
            self.once_a_second(now);
        }
    }

    pub(super) fn once_a_second(&mut self, now: Instant) {
        self.plane.flush_logs();
        if self.next_tidy <= now {
            self.next_tidy = now + TIDY;
            self.tidy();
        }
        self.probe_lost();
        self.hosts.look_again_at_short_paths(now);
        for (server, lines) in self.limits.voices().refill() {
            let whose = if server.prefix_len() == server.max_prefix_len() {
                server.addr().to_string()
            } else {
                server.to_string()
            };
            tracing::info!("{whose}: {lines} more lines like those above were left out");
        }
        self.sampler.sample(now, &self.plane, &self.cluster);
        self.tell_all_exceptions();
    }

    /// Forgets hosts that nobody asks for any more.
    pub(super) fn tidy(&mut self) {
        self.cluster.forget_visitors();
        let wanted: HashSet<IpAddr> = self.cluster.hosts().collect();
        self.lost.retain(|host| wanted.contains(host) && !self.sessions.contains_key(host));
        self.hosts.keep(&wanted);
    }

    /// Asks for the lost hosts, in turn if there are many: each question is a frame to everybody on the link.
    pub(super) fn probe_lost(&mut self) {
        let after = self.lost.range((Bound::Excluded(self.probed), Bound::Unbounded));
        let wrapped = self.lost.range(..=self.probed);
        let turn: Vec<IpAddr> = after.chain(wrapped).take(PROBES).copied().collect();
        self.probed = turn.last().copied().unwrap_or(NOBODY);
        self.hosts.probe(turn);
    }

    /// One batch of the collector's work.
    pub(super) fn collect(&mut self, now: Instant) {
        let Ok(unrecorded) = self.plane.unrecorded() else {
            // Without these counts the collector cannot know which legacies it may drop; the sampler tells the operator.
            self.next_batch = now + SECOND;
            return;
        };
        self.next_batch = match self.collector.step(&self.plane.view(), &mut self.cluster, now, BATCH, unrecorded) {
            Progress::Idle(until) => until.max(now + BATCH_PAUSE),
            Progress::Working => now + BATCH_PAUSE,
            Progress::Finished => {
                self.dirty = true;
                self.collector.last().freed.iter().for_each(|&id| self.sampler.begin_anew(id));
                now + BATCH_PAUSE
            }
        };
    }
}
