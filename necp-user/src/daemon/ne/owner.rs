//! The one task that holds the cluster's state and the maps.
//!
//! Inputs that arrive within about a millisecond make one plan; the plan is written to the maps; only then are they
//! answered (draft §3: an acknowledgement means that the state is installed). In between, what is due is done: slow start,
//! grace and orphan times, retries, the collector's next batch, once a second the sampling of counters.

mod acks;
mod report;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt as _};
use necp_ebpf::verdict::Reason;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep_until, timeout_at};

use self::acks::{Ack, Acks};
use self::report::Sampler;
use super::hosts::{Hosts, Sight};
use super::input::{From, Input, SessionId};
use super::listener::Door;
use super::vips::Vips;
use crate::config::ne::NeConfig;
use crate::control::cluster::{Cluster, Notice};
use crate::control::collect::{Collector, Progress};
use crate::control::config::Forwarding;
use crate::daemon::status::Status;
use crate::necp::{CloseReason, Operation, ServiceKey};
use crate::plane::Plane;
use crate::plane::neighbours::Change;

/// How long inputs are gathered into one plan.
const GATHER: Duration = Duration::from_millis(1);
/// Inputs in one plan, at most.
const GATHER_MAX: usize = 4096;
/// Between two samples of the counters, two probes of a lost host, two looks at what is due.
const SECOND: Duration = Duration::from_secs(1);
/// After a write failed.
const RETRY: Duration = Duration::from_millis(100);
/// Slots or flow buckets that the collector looks at in one go: well under a millisecond.
const BATCH: usize = 8192;
/// Between two goes, for everything else.
const BATCH_PAUSE: Duration = Duration::from_millis(5);
/// How long a START may wait for the next hop of its server to be known.
const NEXT_HOP_WAIT: Duration = Duration::from_secs(1);
/// After routes changed, for more changes to come.
const SETTLE: Duration = Duration::from_millis(200);
/// A gratuitous ARP is repeated after this: a link that has just come up may drop it.
const ANNOUNCE_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];

/// The task's state.
pub struct Owner {
    pub(super) plane: Plane,
    pub(super) vips: Option<Vips>,
    config: Arc<NeConfig>,
    cluster: Cluster,
    collector: Collector,
    hosts: Hosts,
    door: Arc<Door>,
    sessions: HashMap<Ipv4Addr, Current>,
    /// Servers without a session whose flows live: asked every second whether they are still there.
    lost: BTreeSet<Ipv4Addr>,
    acks: Acks,
    /// Who wants to see everything: shown is what stands in the maps, so after the next write.
    asked: Vec<oneshot::Sender<Status>>,
    sampler: Sampler,
    /// Something may have to be written.
    dirty: bool,
    failed_writes: u64,
    retry: Option<Instant>,
    next_second: Instant,
    next_batch: Instant,
    refresh_at: Option<Instant>,
    announcements: Vec<Instant>,
}

/// The session that speaks for a server.
struct Current {
    session: SessionId,
    kick: mpsc::Sender<CloseReason>,
    started: BTreeSet<ServiceKey>,
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
    ) -> Self {
        let now = Instant::now();
        Self {
            sampler: Sampler::new(now, plane.reused()),
            collector: Collector::new(now),
            plane,
            vips,
            config,
            cluster,
            hosts,
            door,
            sessions: HashMap::new(),
            lost: BTreeSet::new(),
            acks: Acks::default(),
            asked: Vec::new(),
            dirty: true,
            failed_writes: 0,
            retry: None,
            next_second: now,
            next_batch: now,
            refresh_at: None,
            announcements: std::iter::once(now).chain(ANNOUNCE_AGAIN.map(|after| now + after)).collect(),
        }
    }

    /// Looks for the servers that were adopted, and writes the first plan.
    pub async fn begin(&mut self) {
        let adopted: Vec<Ipv4Addr> = self.cluster.hosts().collect();
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
                Some(input) = inputs.recv() => {
                    self.take(input).await;
                    self.gather(inputs).await;
                }
                Some(change) = changes.next() => self.on_change(change),
                () = sleep_until(due.into()) => {}
            }
            self.do_what_is_due().await;
            if self.dirty {
                self.write();
            }
            self.acks.release(Instant::now(), |host| matches!(self.hosts.sight(host), Sight::At(_)));
            for done in std::mem::take(&mut self.asked) {
                // Who asked may have given up.
                let _ = done.send(self.status());
            }
        }
    }

    async fn gather(&mut self, inputs: &mut mpsc::Receiver<Input>) {
        if !self.dirty {
            return;
        }
        let until = tokio::time::Instant::now() + GATHER;
        for _ in 0..GATHER_MAX {
            match timeout_at(until, inputs.recv()).await {
                Ok(Some(input)) => self.take(input).await,
                Ok(None) | Err(_) => return,
            }
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
                let now = Instant::now();
                for answer in answers {
                    let (protocol, port) = (answer.service.protocol(), answer.service.port());
                    self.cluster.health(from.server, protocol, port, answer.health, now);
                }
                self.dirty = true;
            }
            Input::Lost { from, reason } if self.is_current(from) => self.lose(from.server, &reason),
            Input::Status { done } => self.asked.push(done),
            // Of a session that was superseded: its answer is dropped, and it ends.
            Input::Operations { .. } | Input::Health { .. } | Input::Lost { .. } => {}
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
                tracing::info!("{} has opened a new session: the old one is closed", from.server);
                // If there is no room, it is being closed already.
                let _ = current.kick.try_send(CloseReason::Superseded);
            }
            _ => {}
        }
        self.sessions.insert(from.server, Current { session: from.session, kick, started: BTreeSet::new() });
        true
    }

    async fn open(&mut self, from: From, done: oneshot::Sender<Vec<usize>>) {
        let server = from.server;
        self.hosts.follow(server).await;
        let now = Instant::now();
        match self.cluster.init(server, self.hosts.is_on_link(server), now) {
            Ok(change) => {
                self.acks.add(Ack::init(server, change, done));
                tracing::info!("{server} has joined");
            }
            // The door admits by the same prefixes.
            Err(error) => tracing::error!("{error}"),
        }
        if self.hosts.sight(server) == Sight::NoWay {
            tracing::warn!("no route by any of `interfaces` leads to {server}: its packets could not reach it");
        }
        self.lost.remove(&server);
        self.report_sight(server);
        self.dirty = true;
    }

    fn operate(&mut self, server: Ipv4Addr, operations: &[Operation], done: oneshot::Sender<Vec<usize>>) {
        let now = Instant::now();
        let mut ack = Ack::operations(server, now + NEXT_HOP_WAIT, done);
        let mut started = self.sessions.get_mut(&server).map(|session| std::mem::take(&mut session.started));
        for (index, operation) in operations.iter().enumerate() {
            let Some(key) = operation.service() else {
                ack.fail(index);
                continue;
            };
            match operation {
                Operation::Stop(_) => {
                    ack.wait(index, self.cluster.stop(server, key.protocol(), key.port(), now));
                    if started.as_mut().is_some_and(|started| started.remove(&key)) {
                        tracing::info!("{server} stops {key}");
                    }
                }
                Operation::Start(unit) => {
                    let forwarding = Forwarding::from_wire(unit.forwarding.code().into()).unwrap_or(Forwarding::Layer2);
                    match self.cluster.start(server, forwarding, key.protocol(), key.port(), now) {
                        Ok(change) => {
                            ack.wait_for_start(index, change);
                            if started.as_mut().is_some_and(|started| started.insert(key)) {
                                tracing::info!("{server} starts {key} by {}", unit.forwarding);
                            }
                        }
                        Err(error) => {
                            ack.fail(index);
                            tracing::warn!("{server} cannot start {key} by {}: {error}", unit.forwarding);
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
        self.dirty = true;
    }

    fn lose(&mut self, server: Ipv4Addr, reason: &CloseReason) {
        let serving = self.sessions.remove(&server).is_some_and(|session| !session.started.is_empty());
        if serving {
            tracing::warn!("session of {server} lost ({reason}): it gets no new flows, its flows stay");
        } else {
            tracing::info!("{server} has left ({reason})");
        }
        self.cluster.session_lost(server, Instant::now());
        self.hosts.probe([server]);
        self.lost.insert(server);
        self.report_sight(server);
        self.dirty = true;
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

    /// Tells the cluster where a host is.
    fn report_sight(&mut self, host: Ipv4Addr) {
        let now = Instant::now();
        match self.hosts.sight(host) {
            Sight::At(hop) => _ = self.cluster.host_reachable(host, hop, now),
            Sight::Gone => _ = self.cluster.host_gone(host, now),
            Sight::NoWay => _ = self.cluster.host_unreachable(host, now),
            // Entries come and go; where a host was last is the best guess until another is known.
            Sight::Unknown => return,
        }
        self.dirty = true;
    }

    fn due(&self) -> Instant {
        let mut due = self.next_second.min(self.next_batch);
        let times = [self.retry, self.refresh_at, self.cluster.next_deadline(), self.acks.next()];
        for time in times.into_iter().flatten().chain(self.announcements.iter().copied()) {
            due = due.min(time);
        }
        due
    }

    async fn do_what_is_due(&mut self) {
        let now = Instant::now();
        if self.cluster.next_deadline().is_some_and(|at| at <= now) || self.retry.is_some_and(|at| at <= now) {
            self.dirty = true;
        }
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
            for host in self.hosts.refresh().await {
                self.report_sight(host);
            }
        }
        if self.next_second <= now {
            self.next_second = now + SECOND;
            self.once_a_second(now);
        }
    }

    fn once_a_second(&mut self, now: Instant) {
        self.plane.flush_logs();
        let wanted: BTreeSet<Ipv4Addr> = self.cluster.hosts().collect();
        self.lost.retain(|host| wanted.contains(host) && !self.sessions.contains_key(host));
        self.hosts.keep(&wanted);
        self.hosts.probe(self.lost.iter().copied().collect::<Vec<_>>());
        self.sampler.sample(now, &self.plane, &self.cluster);
    }

    /// One batch of the collector's work.
    fn collect(&mut self, now: Instant) {
        let Ok(reasons) = self.plane.reasons() else {
            // Without these counts the collector cannot know which legacies it may drop; the sampler tells the operator.
            self.next_batch = now + SECOND;
            return;
        };
        let unrecorded = reasons[Reason::Legacy as usize] + reasons[Reason::NewUnrecorded as usize];
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
        self.dirty = false;
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
