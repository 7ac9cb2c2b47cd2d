//! The one task that holds the cluster's state and the maps.
//!
//! Inputs that arrive within about a millisecond make one plan; the plan is written to the maps; only then are they
//! answered (draft §3: an acknowledgement means that the state is installed). In between, what is due is done: slow start,
//! grace and orphan times, retries, the collector's next batch, once a second the sampling of counters.

mod acks;
mod chores;
mod exceptions;
mod report;
mod sessions;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt as _};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;

use self::acks::Acks;
use self::chores::{ANNOUNCE_AGAIN, NOBODY};
use self::exceptions::Lists;
use self::report::Sampler;
use self::sessions::Current;
use super::crossings::Crossings;
use super::hosts::{Hosts, Sight};
use super::input::Input;
use super::limits::Limits;
use super::listener::Door;
use super::vips::Vips;
use crate::config::ne::NeConfig;
use crate::control::cluster::{Cluster, Notice};
use crate::control::collect::Collector;
use crate::daemon::status::Status;
use crate::plane::Plane;
use crate::plane::host_routing::HostRouting;
use crate::plane::neighbours::Change;

/// How long inputs are gathered into one plan.
const GATHER: Duration = Duration::from_millis(1);
/// Inputs in one plan, at most.
const GATHER_MAX: usize = 4096;
/// A plan takes longer the more servers there are: what can wait (slow start, health above 0) waits this many times as
/// long as the last one took, so that such plans take a tenth of the time at most; and never longer than [`WAIT_MAX`].
const WAIT_FACTOR: u32 = 9;
/// See [`WAIT_FACTOR`].
const WAIT_MAX: Duration = Duration::from_millis(500);
/// After a write failed.
const RETRY: Duration = Duration::from_millis(100);

/// The task's state.
pub struct Owner {
    pub(super) plane: Plane,
    pub(super) vips: Option<Vips>,
    /// If some farm intercepts.
    pub(super) crossings: Option<Crossings>,
    /// To be undone at the end.
    pub(super) routing: HostRouting,
    config: Arc<NeConfig>,
    cluster: Cluster,
    collector: Collector,
    hosts: Hosts,
    door: Arc<Door>,
    sessions: HashMap<IpAddr, Current>,
    /// Servers without a session whose flows live: asked every second whether they are still there.
    lost: BTreeSet<IpAddr>,
    /// The last one that was asked.
    probed: IpAddr,
    limits: Arc<Limits>,
    acks: Acks,
    lists: Lists,
    /// Who wants to see everything: shown is what stands in the maps, so after the next write.
    asked: Vec<oneshot::Sender<Status>>,
    sampler: Sampler,
    /// Something may have to be written, at the latest when a change that can wait may.
    dirty: bool,
    /// It cannot wait.
    urgent: bool,
    /// How long the last plan took.
    took: Duration,
    /// When what can wait may be written.
    next_write: Instant,
    /// When time alone has something to be written for servers, as of the last write.
    deadline: Option<Instant>,
    /// The same for exceptions: it does not wait for [`Owner::next_write`].
    expiry: Option<Instant>,
    /// Answers may be due.
    release: bool,
    failed_writes: u64,
    retry: Option<Instant>,
    next_second: Instant,
    next_tidy: Instant,
    next_batch: Instant,
    refresh_at: Option<Instant>,
    announcements: Vec<Instant>,
}

impl Owner {
    /// An owner of `plane`. Servers that the maps know of are adopted.
    pub fn new(
        config: Arc<NeConfig>,
        plane: Plane,
        cluster: Cluster,
        hosts: Hosts,
        vips: Option<Vips>,
        door: Arc<Door>,
        limits: Arc<Limits>,
    ) -> Self {
        let now = Instant::now();
        Self {
            sampler: Sampler::new(now, plane.reused()),
            collector: Collector::new(now),
            plane,
            vips,
            crossings: None,
            config,
            cluster,
            hosts,
            routing: HostRouting::default(),
            door,
            sessions: HashMap::new(),
            lost: BTreeSet::new(),
            probed: NOBODY,
            limits,
            acks: Acks::default(),
            lists: Lists::default(),
            asked: Vec::new(),
            dirty: true,
            urgent: true,
            took: Duration::ZERO,
            next_write: now,
            deadline: None,
            expiry: None,
            release: true,
            failed_writes: 0,
            retry: None,
            next_second: now,
            next_tidy: now,
            next_batch: now,
            refresh_at: None,
            announcements: std::iter::once(now).chain(ANNOUNCE_AGAIN.map(|after| now + after)).collect(),
        }
    }

    /// Looks for the servers that were adopted, and writes the first plan.
    pub async fn begin(&mut self) {
        self.refresh_crossings().await;
        self.hosts.list().await;
        let adopted: Vec<IpAddr> = self.cluster.hosts().collect();
        for host in adopted {
            self.hosts.follow(host).await;
            self.report_sight(host);
            self.lost.insert(host);
        }
        self.write();
    }

    /// Runs until `stop` is done.
    pub async fn run(
        &mut self,
        inputs: &mut mpsc::Receiver<Input>,
        changes: &mut (impl Stream<Item = Change> + Unpin),
        stop: impl Future<Output = ()>,
    ) {
        let mut stop = std::pin::pin!(stop);
        loop {
            let due = self.due();
            tokio::select! {
                () = &mut stop => return,
                Some(input) = inputs.recv() => self.take(input).await,
                Some(change) = changes.next() => self.on_change(change),
                () = sleep_until(due.into()) => {}
            }
            self.mark_due(Instant::now());
            self.gather(inputs, changes).await;
            self.do_what_is_due().await;
            if self.dirty && (self.urgent || self.next_write <= Instant::now()) {
                self.write();
            }
            self.release();
            for done in std::mem::take(&mut self.asked) {
                // Who asked may have given up.
                let _ = done.send(self.status());
            }
        }
    }

    /// Takes what comes within a moment, so that one plan does for all of it; if more keeps coming, for as long as the last
    /// plan took, so that what is taken is worth a plan, and nobody waits much longer than for two.
    async fn gather(&mut self, inputs: &mut mpsc::Receiver<Input>, changes: &mut (impl Stream<Item = Change> + Unpin)) {
        let until = tokio::time::Instant::now() + GATHER;
        let end = until + self.took;
        for _ in 0..GATHER_MAX {
            if !self.urgent || end <= tokio::time::Instant::now() {
                return;
            }
            tokio::select! {
                biased;
                Some(input) = inputs.recv() => self.take(input).await,
                Some(change) = changes.next() => self.on_change(change),
                () = sleep_until(until) => return,
            }
        }
    }

    /// Gives the answers that are due.
    fn release(&mut self) {
        let now = Instant::now();
        if std::mem::take(&mut self.release) || self.acks.next().is_some_and(|at| at <= now) {
            self.acks.release(now, |host| matches!(self.hosts.sight(host), Sight::At(_)));
        }
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Opened { from, kick, done } => {
                if self.supersede(from, kick) {
                    self.open(from, done).await;
                }
            }
            Input::Operations { from, operations, done } if self.is_current(from) => {
                self.operate(from.server, &operations, done);
            }
            Input::Health { from, answers } if self.is_current(from) => {
                let (now, before) = (Instant::now(), self.cluster.touches());
                for answer in &answers {
                    let (protocol, port) = (answer.service.protocol(), answer.service.port());
                    self.cluster.health(from.server, protocol, port, answer.health, now);
                }
                if self.cluster.touches() != before {
                    self.dirty = true;
                    self.urgent |= answers.iter().any(|answer| answer.health == 0);
                }
            }
            Input::Reset { from, done } if self.is_current(from) => self.reset_exceptions(from.server, done),
            Input::List { from, step, done } if self.is_current(from) => self.lists.take(step, done, &self.cluster),
            Input::Lost { from, reason } if self.is_current(from) => self.lose(from.server, &reason),
            Input::PathMtu { servers } => {
                for server in self.hosts.look_again(&servers).await {
                    self.report_sight(server);
                }
            }
            Input::Status { done } => self.asked.push(done),
            // Of a session that was superseded: its answer is dropped, and it ends.
            Input::Operations { .. }
            | Input::Reset { .. }
            | Input::List { .. }
            | Input::Health { .. }
            | Input::Lost { .. } => {}
        }
    }

    fn must_write(&mut self) {
        (self.dirty, self.urgent) = (true, true);
    }

    /// Tells the cluster where a host is.
    fn report_sight(&mut self, host: IpAddr) {
        let (now, before) = (Instant::now(), self.cluster.touches());
        self.cluster.host_on_link(host, self.hosts.is_on_link(host));
        match self.hosts.sight(host) {
            Sight::At(hop) => _ = self.cluster.host_reachable(host, hop, now),
            Sight::Gone => _ = self.cluster.host_gone(host, now),
            Sight::NoWay => _ = self.cluster.host_unreachable(host, now),
            // Entries come and go; where a host was last is the best guess until another is known.
            Sight::Unknown => return,
        }
        self.release = true;
        if self.cluster.touches() != before {
            self.must_write();
        }
    }

    fn due(&self) -> Instant {
        if !self.lists.is_empty() {
            return Instant::now();
        }
        let mut due = self.next_second.min(self.next_batch);
        if self.hosts.has_more_to_refresh() {
            return Instant::now();
        }
        let write = if self.dirty { Some(self.next_write) } else { self.deadline.map(|at| at.max(self.next_write)) };
        let times = [self.retry, self.refresh_at, write, self.expiry, self.acks.next()];
        for time in times.into_iter().flatten().chain(self.announcements.iter().copied()) {
            due = due.min(time);
        }
        due
    }

    /// What time alone makes to be written.
    fn mark_due(&mut self, now: Instant) {
        self.dirty |= self.deadline.is_some_and(|at| at <= now);
        if [self.retry, self.expiry].into_iter().flatten().any(|at| at <= now) {
            self.must_write();
        }
    }

    /// Brings the maps up to date, and decides what may be answered.
    fn write(&mut self) {
        let now = Instant::now();
        let applied = self.cluster.sync(&self.plane.view(), now);
        self.deadline = self.cluster.next_deadline();
        (self.dirty, self.urgent, self.release) = (false, false, true);
        let (ended, took) = (Instant::now(), now.elapsed());
        self.took = took;
        self.next_write = ended + (took * WAIT_FACTOR).min(WAIT_MAX);
        // If very many end at once, others have half of the time.
        self.expiry = self.cluster.next_expiry().map(|at| at.max(ended + took));
        if let Some(error) = applied.errors.first() {
            if self.retry.is_none() {
                tracing::error!(%error, "{} writes to the maps failed; they are retried", applied.errors.len());
            }
            self.failed_writes += applied.errors.len() as u64;
        } else if self.retry.is_some() {
            tracing::info!("all writes to the maps have been made up for");
        }
        self.retry = (!applied.errors.is_empty()).then(|| now + RETRY);
        self.acks.applied(&applied);
        while let Some(notice) = self.cluster.poll_notice() {
            self.tell(notice);
        }
    }

    fn tell(&self, notice: Notice) {
        let farm = |index: usize| self.config.farms.get(index).map_or("?", |farm| farm.name.as_str());
        match notice {
            Notice::PanicBegan { farm: index } => tracing::error!(
                "most servers of farm {} were lost at once: its slot tables are kept; look at the network between",
                farm(index)
            ),
            Notice::PanicEnded { farm: index } => {
                tracing::info!("enough servers of farm {} are back, or gone for good", farm(index));
            }
            Notice::Died { address, host_gone: true, .. } => {
                tracing::warn!("the host {address} is gone: its flows are given up");
            }
            Notice::Died { address, host_gone: false, .. } => {
                tracing::warn!("{address} stayed away for `orphan_time`: its flows are given up");
            }
            Notice::AdoptedExpired { address, .. } => {
                tracing::warn!("{address} has not come back since the restart: it gets no new flows");
            }
        }
    }
}

/// Kept apart for tests: what the farms of a configuration are to the cluster.
pub(super) fn alarms(farms: &BTreeMap<String, bool>, pending: usize) -> Vec<String> {
    let lost = farms.iter().filter(|(_, alarm)| **alarm).map(|(name, _)| {
        format!(
            "farm {name}: most of its servers were lost at once; its slot tables are kept. Look at the network between"
        )
    });
    let writes = (pending > 0).then(|| format!("{pending} writes to the maps failed and are being retried"));
    lost.chain(writes).collect()
}
