//! The one task that holds the cluster's state and the maps.
//!
//! Inputs that arrive within about a millisecond make one plan; the plan is written to the maps; only then are they
//! answered (draft §3: an acknowledgement means that the state is installed). In between, what is due is done: slow start,
//! grace and orphan times, retries, the collector's next batch, once a second the sampling of counters.

mod acks;
mod exceptions;
mod report;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt as _};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;

use self::acks::{Ack, Acks};
use self::exceptions::{Lists, Tally};
use self::report::Sampler;
use super::crossings::Crossings;
use super::hosts::{Hosts, Sight};
use super::input::{From, Input, SessionId};
use super::limits::Limits;
use super::listener::Door;
use super::vips::Vips;
use crate::config::ne::NeConfig;
use crate::control::cluster::{Cluster, Notice};
use crate::control::collect::{Collector, Progress};
use crate::control::config::Forwarding;
use crate::daemon::status::Status;
use crate::necp::{CloseReason, Operation, ServiceKey};
use crate::plane::Plane;
use crate::plane::host_routing::HostRouting;
use crate::plane::neighbours::Change;

/// How long inputs are gathered into one plan.
const GATHER: Duration = Duration::from_millis(1);
/// Inputs in one plan, at most.
const GATHER_MAX: usize = 4096;
/// Between two samples of the counters, two probes of a lost host, two looks at what is due.
const SECOND: Duration = Duration::from_secs(1);
/// Between two looks at which hosts nobody asks for any more.
const TIDY: Duration = Duration::from_secs(10);
/// A plan takes longer the more servers there are: what can wait (slow start, health above 0) waits this many times as
/// long as the last one took, so that such plans take a tenth of the time at most; and never longer than [`WAIT_MAX`].
const WAIT_FACTOR: u32 = 9;
/// See [`WAIT_FACTOR`].
const WAIT_MAX: Duration = Duration::from_millis(500);
/// After a write failed.
const RETRY: Duration = Duration::from_millis(100);
/// Slots or flow buckets that the collector looks at in one go: well under a millisecond.
const BATCH: usize = 8192;
/// Between two goes, for everything else.
const BATCH_PAUSE: Duration = Duration::from_millis(5);
/// Lost hosts that are asked for in a second.
const PROBES: usize = 256;
/// How long a START may wait for the next hop of its server to be known.
const NEXT_HOP_WAIT: Duration = Duration::from_secs(1);
/// Before all addresses.
const NOBODY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
/// After routes changed, for more changes to come.
const SETTLE: Duration = Duration::from_millis(200);
/// A gratuitous ARP is repeated after this: a link that has just come up may drop it.
const ANNOUNCE_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];

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

/// The session that speaks for a server.
struct Current {
    session: SessionId,
    kick: mpsc::Sender<CloseReason>,
    started: BTreeSet<ServiceKey>,
    /// What became of its exceptions since it was logged.
    tally: Tally,
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

    /// Takes what comes within a moment, so that one plan does for all of it.
    async fn gather(&mut self, inputs: &mut mpsc::Receiver<Input>, changes: &mut (impl Stream<Item = Change> + Unpin)) {
        let until = tokio::time::Instant::now() + GATHER;
        for _ in 0..GATHER_MAX {
            if !self.urgent {
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

    fn is_current(&self, from: From) -> bool {
        self.sessions.get(&from.server).is_some_and(|current| current.session == from.session)
    }

    /// Makes this session its server's own; false if a newer one is.
    fn supersede(&mut self, from: From, kick: mpsc::Sender<CloseReason>) -> bool {
        match self.sessions.get(&from.server) {
            Some(current) if current.session > from.session => return false,
            Some(current) if current.session < from.session => {
                if self.limits.voices().may_speak(from.server) {
                    tracing::info!("{} has opened a new session: the old one is closed", from.server);
                }
                // If there is no room, it is being closed already.
                let _ = current.kick.try_send(CloseReason::Superseded);
            }
            _ => {}
        }
        self.sessions.insert(
            from.server,
            Current { session: from.session, kick, started: BTreeSet::new(), tally: Tally::default() },
        );
        true
    }

    async fn open(&mut self, from: From, done: oneshot::Sender<Vec<usize>>) {
        let server = from.server;
        self.hosts.follow(server).await;
        let now = Instant::now();
        match self.cluster.init(server, self.hosts.is_on_link(server), now) {
            Ok(change) => {
                self.acks.add(Ack::init(server, change, done));
                if self.limits.voices().may_speak(server) {
                    tracing::info!("{server} has joined");
                }
            }
            // The door admits by the same prefixes.
            Err(error) => tracing::error!("{error}"),
        }
        if self.hosts.sight(server) == Sight::NoWay && self.limits.voices().may_speak(server) {
            tracing::warn!("no route by any of `interfaces` leads to {server}: its packets could not reach it");
        }
        self.lost.remove(&server);
        self.report_sight(server);
        self.must_write();
    }

    fn operate(&mut self, server: IpAddr, operations: &[Operation], done: oneshot::Sender<Vec<usize>>) {
        let now = Instant::now();
        let mut ack = Ack::operations(server, now + NEXT_HOP_WAIT, done);
        let limits = Arc::clone(&self.limits);
        let voices = limits.voices();
        let mut started = self.sessions.get_mut(&server).map(|session| std::mem::take(&mut session.started));
        for (index, operation) in operations.iter().enumerate() {
            let Some(key) = operation.service() else {
                self.except(server, index, operation, now, &mut ack);
                continue;
            };
            match operation {
                Operation::Stop(_) => {
                    ack.wait(index, self.cluster.stop(server, key.protocol(), key.port(), now));
                    if started.as_mut().is_some_and(|started| started.remove(&key)) && voices.may_speak(server) {
                        tracing::info!("{server} stops {key}");
                    }
                }
                Operation::Start(unit) => {
                    let forwarding = Forwarding::from_wire(unit.forwarding.code().into()).unwrap_or(Forwarding::Layer2);
                    match self.cluster.start(server, forwarding, key.protocol(), key.port(), now) {
                        Ok(change) => {
                            ack.wait_for_start(index, change);
                            if started.as_mut().is_some_and(|started| started.insert(key)) && voices.may_speak(server) {
                                tracing::info!("{server} starts {key} by {}", unit.forwarding);
                            }
                        }
                        Err(error) => {
                            ack.fail(index);
                            if voices.may_speak(server) {
                                tracing::warn!("{server} cannot start {key} by {}: {error}", unit.forwarding);
                            }
                        }
                    }
                }
                Operation::Except(_) | Operation::Unexcept(_) => {}
            }
        }
        if let (Some(session), Some(started)) = (self.sessions.get_mut(&server), started) {
            session.started = started;
        }
        self.acks.add(ack);
        self.must_write();
    }

    fn lose(&mut self, server: IpAddr, reason: &CloseReason) {
        self.tell_exceptions(server);
        let serving = self.sessions.remove(&server).is_some_and(|session| !session.started.is_empty());
        if !self.limits.voices().may_speak(server) {
            // It comes and goes: what it does is counted as lines that were left out.
        } else if serving {
            tracing::warn!("session of {server} lost ({reason}): it gets no new flows, its flows stay");
        } else {
            tracing::info!("{server} has left ({reason})");
        }
        self.cluster.session_lost(server, Instant::now());
        self.hosts.probe([server]);
        self.lost.insert(server);
        self.report_sight(server);
        self.must_write();
    }

    async fn refresh_crossings(&mut self) {
        if let Some(crossings) = &self.crossings {
            crossings.refresh(&mut self.plane).await;
        }
    }

    fn on_change(&mut self, change: Change) {
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

    fn on_link(&mut self, ifindex: u32, up: bool) {
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

    fn must_write(&mut self) {
        (self.dirty, self.urgent) = (true, true);
    }

    /// Tells the cluster where a host is.
    fn report_sight(&mut self, host: IpAddr) {
        let (now, before) = (Instant::now(), self.cluster.touches());
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

    async fn do_what_is_due(&mut self) {
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

    fn once_a_second(&mut self, now: Instant) {
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
    fn tidy(&mut self) {
        let wanted: HashSet<IpAddr> = self.cluster.hosts().collect();
        self.lost.retain(|host| wanted.contains(host) && !self.sessions.contains_key(host));
        self.hosts.keep(&wanted);
    }

    /// Asks for the lost hosts, in turn if there are many: each question is a frame to everybody on the link.
    fn probe_lost(&mut self) {
        let after = self.lost.range((Bound::Excluded(self.probed), Bound::Unbounded));
        let wrapped = self.lost.range(..=self.probed);
        let turn: Vec<IpAddr> = after.chain(wrapped).take(PROBES).copied().collect();
        self.probed = turn.last().copied().unwrap_or(NOBODY);
        self.hosts.probe(turn);
    }

    /// One batch of the collector's work.
    fn collect(&mut self, now: Instant) {
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
                now + BATCH_PAUSE
            }
        };
    }

    /// Brings the maps up to date, and decides what may be answered.
    fn write(&mut self) {
        let now = Instant::now();
        let applied = self.cluster.sync(&self.plane.view(), now);
        self.deadline = self.cluster.next_deadline();
        (self.dirty, self.urgent, self.release) = (false, false, true);
        let (ended, took) = (Instant::now(), now.elapsed());
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

    /// Servers with a session.
    fn open_sessions(&self) -> usize {
        self.sessions.len()
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
