//! What `necp status` shows: counters sampled once a second, and the state of the cluster.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use necp_ebpf::abi::ServerStats;
use necp_ebpf::verdict::{Action, REASONS, Reason};

use super::{Owner, alarms};
use crate::config::ne::Auth;
use crate::control::cluster::Cluster;
use crate::control::config::Forwarding;
use crate::control::exceptions::MASKS;
use crate::control::status::{ServerStatus, ServiceStatus};
use crate::daemon::status::{Exceptions, ExceptionsOf, Farm, Interface, Packets, Server, Service, Status};
use crate::plane::{Plane, PlaneError};

/// Packets that a layer-3 server may leave unanswered before something is thought of it.
const ONE_WAY: u64 = 20;

/// The counters a second ago and now.
pub(super) struct Sampler {
    started: Instant,
    took_over: bool,
    at: Instant,
    seconds: f64,
    reasons: [[u64; REASONS as usize]; 2],
    /// By server id, since that server has it.
    servers: Vec<[ServerStats; 2]>,
    /// What ids have counted for those who had them before.
    bases: HashMap<u32, ServerStats>,
    links: HashMap<u32, bool>,
    failing: bool,
}

impl Sampler {
    pub(super) fn new(now: Instant, took_over: bool) -> Self {
        Self {
            started: now,
            took_over,
            at: now,
            seconds: 0.0,
            reasons: [[0; REASONS as usize]; 2],
            servers: Vec::new(),
            bases: HashMap::new(),
            links: HashMap::new(),
            failing: false,
        }
    }

    /// Whether an interface has come up or gone down since this was asked last.
    pub(super) fn link_changed(&mut self, ifindex: u32, up: bool) -> bool {
        self.links.insert(ifindex, up).unwrap_or(true) != up
    }

    /// An id is free: who has it next begins at nothing.
    pub(super) fn begin_anew(&mut self, id: u32) {
        if let Some([before, now]) = self.servers.get_mut(id as usize) {
            let base = self.bases.entry(id).or_default();
            *base = combine(*base, *now, u64::wrapping_add);
            [*before, *now] = [ServerStats::default(); 2];
        }
    }

    /// Reads the counters.
    pub(super) fn sample(&mut self, now: Instant, plane: &Plane, cluster: &Cluster) {
        let first = self.seconds == 0.0;
        match read(plane, cluster) {
            Ok((reasons, servers)) => {
                self.reasons = [if first { reasons } else { self.reasons[1] }, reasons];
                self.take(servers);
                self.seconds = now.duration_since(self.at).as_secs_f64().max(f64::MIN_POSITIVE);
                self.at = now;
                self.failing = false;
            }
            Err(error) if !self.failing => {
                self.failing = true;
                tracing::warn!(%error, "cannot read the counters");
            }
            Err(_) => {}
        }
    }

    fn take(&mut self, servers: Vec<ServerStats>) {
        let before = |id: u32, now| self.servers.get(id as usize).map_or(now, |old| old[1]);
        let since = |id: u32, raw| combine(raw, self.bases.get(&id).copied().unwrap_or_default(), u64::wrapping_sub);
        let now = (0..).zip(servers).map(|(id, raw)| (id, since(id, raw)));
        self.servers = now.map(|(id, now)| [before(id, now), now]).collect();
    }

    fn rate(&self, [old, new]: [u64; 2]) -> f64 {
        if self.seconds > 0.0 { new.saturating_sub(old) as f64 / self.seconds } else { 0.0 }
    }

    fn packets(&self) -> Vec<Packets> {
        let one = |reason: Reason| {
            let [old, new] = [0, 1].map(|at: usize| self.reasons[at][reason as usize]);
            let action = match reason.action() {
                Action::Pass => "pass",
                Action::Transmit => "transmit",
                Action::Answer => "answer",
                Action::Route => "route",
                Action::Drop => "drop",
            };
            let (reason, action) = (reason.name().into(), action.into());
            Packets { reason, action, packets: new, per_second: self.rate([old, new]) }
        };
        Reason::ALL.into_iter().map(one).collect()
    }

    fn server(&self, server: &ServerStatus, table: u32, records: &BTreeMap<u32, u64>) -> Server {
        let [old, new] = self.servers.get(server.id as usize).copied().unwrap_or_default();
        Server {
            id: server.id,
            address: server.address,
            forwarding: server.forwarding.name().into(),
            state: server.state.name().into(),
            reachable: server.reachable,
            health: server.health,
            weight: server.weight,
            slots: server.slots,
            slots_percent: f64::from(server.slots) * 100.0 / f64::from(table.max(1)),
            flows_on_record: records.get(&server.id).copied().unwrap_or(0),
            flows: new.flows,
            flows_per_second: self.rate([old.flows, new.flows]),
            packets: new.packets,
            packets_per_second: self.rate([old.packets, new.packets]),
            bytes: new.bytes,
            bytes_per_second: self.rate([old.bytes, new.bytes]),
            replies: new.replies,
            one_way: server.forwarding == Forwarding::Layer3 && new.packets >= ONE_WAY && new.replies == 0,
        }
    }
}

fn combine(a: ServerStats, b: ServerStats, with: impl Fn(u64, u64) -> u64) -> ServerStats {
    ServerStats {
        packets: with(a.packets, b.packets),
        bytes: with(a.bytes, b.bytes),
        flows: with(a.flows, b.flows),
        replies: with(a.replies, b.replies),
    }
}

/// Servers of a farm whose replies pass elsewhere.
fn one_way_alarms(farm: &Farm) -> Vec<String> {
    let of_service = |service: &Service| {
        let one = |server: &Server| {
            format!(
                "farm {}: no reply of {} ({} by l3) passes here, so its clients hear from a stranger: route them by this host",
                farm.name, server.address, service.service
            )
        };
        service.servers.iter().filter(|server| server.one_way).map(one).collect::<Vec<_>>()
    };
    farm.services.iter().flat_map(of_service).collect()
}

/// How long the last flow that found no room in the flow table is news.
const NEWS: Duration = Duration::from_secs(60);

/// The flow table has turned flows away, so long ago.
fn full_alarm(ago: Option<Duration>) -> Option<String> {
    ago.filter(|ago| *ago <= NEWS).map(|_| {
        "the flow table has turned flows away within the last minute (packets `new-unrecorded`, `legacy`): they go on without \
         a record, but new ones to l3 servers may fail. Is it a flood? The servers with most records are its target: filter \
         its sources before they come here"
            .to_owned()
    })
}

/// By reason, and by server id.
type Counters = ([u64; REASONS as usize], Vec<ServerStats>);

fn read(plane: &Plane, cluster: &Cluster) -> Result<Counters, PlaneError> {
    Ok((plane.reasons()?, plane.server_stats(cluster.ids_below())?))
}

impl Owner {
    /// Everything at this moment.
    pub(super) fn status(&self) -> Status {
        let cluster = self.cluster.snapshot();
        let records = &self.collector.last().by_server;
        let service = |service: &ServiceStatus| Service {
            service: service.key.to_string(),
            family: service.family.name().into(),
            slots: service.slots,
            servers: service.servers.iter().map(|one| self.sampler.server(one, service.slots, records)).collect(),
        };
        let authenticated =
            |name: &str| self.config.farms.iter().any(|farm| farm.name == name && farm.auth != Auth::None);
        let farms = cluster.farms.iter().enumerate().map(|(index, farm)| Farm {
            name: farm.name.clone(),
            authenticated: authenticated(&farm.name),
            vips: farm.vips.clone(),
            intercept: farm.intercept.clone(),
            services: farm.services.iter().map(service).collect(),
            exceptions: self.exceptions(index),
        });
        let exceptions = self.cluster.exception_counts();
        let interfaces = self.plane.ports().into_iter().map(|port| Interface {
            name: port.name,
            ifindex: port.ifindex,
            mac: port.mac.map(|byte| format!("{byte:02x}")).join(":"),
            mtu: port.mtu,
            mode: port.mode.to_string(),
        });
        let farms: Vec<Farm> = farms.collect();
        let in_alarm = cluster.farms.iter().map(|farm| (farm.name.clone(), farm.alarm)).collect();
        let failing = if self.retry.is_some() { cluster.pending } else { 0 };
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: self.sampler.started.elapsed().as_secs(),
            took_over: self.sampler.took_over,
            pin: self.config.pin.display().to_string(),
            listen: self.config.listen.iter().map(ToString::to_string).collect(),
            interfaces: interfaces.collect(),
            sessions: self.open_sessions(),
            connections: self.door.connected(),
            alarms: alarms(&in_alarm, failing)
                .into_iter()
                .chain(full_alarm(self.collector.turned_away_at().map(|at| at.elapsed())))
                .chain(farms.iter().flat_map(one_way_alarms))
                .collect(),
            farms,
            exceptions: exceptions.entries,
            max_exceptions: exceptions.limit,
            packets: self.sampler.packets(),
            strangers: self.door.strangers(),
            rejected: self.door.rejected(),
            pending_writes: failing,
            failed_writes: self.failed_writes,
        }
    }
    /// Those of one farm. Only servers with a session have any.
    fn exceptions(&self, farm: usize) -> Exceptions {
        let counts = self.cluster.farm_exceptions(farm);
        let config = self.config.farms.get(farm);
        let none = counts.local + counts.global == 0;
        let members = self.sessions.keys().filter(|server| config.is_some_and(|config| config.admits(**server)));
        let members = members.filter(|_| !none);
        let mut by_server: Vec<ExceptionsOf> = members
            .map(|server| ExceptionsOf { address: *server, exceptions: self.cluster.exceptions_of(*server) })
            .filter(|one| one.exceptions > 0)
            .collect();
        by_server.sort_unstable_by_key(|one| (std::cmp::Reverse(one.exceptions), one.address));
        Exceptions {
            local: counts.local,
            global: counts.global,
            masks: counts.masks,
            max_masks: MASKS as u32,
            max_by_server: config.map_or(0, |config| config.max_exceptions),
            by_server,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_was_free_begins_at_nothing() {
        let mut sampler = Sampler::new(Instant::now(), false);
        let of = |packets| ServerStats { packets, bytes: 100 * packets, flows: 1, replies: packets };
        sampler.take(vec![of(0), of(30)]);
        sampler.begin_anew(1);
        sampler.begin_anew(7);
        sampler.take(vec![of(5), of(32)]);
        assert_eq!(sampler.servers[0][1], of(5));
        assert_eq!(sampler.servers[1], [ServerStats::default(), ServerStats { flows: 0, ..of(2) }]);
        sampler.begin_anew(1);
        sampler.take(vec![of(5), of(33), of(9)]);
        assert_eq!(sampler.servers[1][1], ServerStats { flows: 0, ..of(1) });
        assert_eq!(sampler.servers[2], [of(9); 2]);
    }

    #[test]
    fn a_full_flow_table_is_an_alarm_for_a_minute() {
        assert_eq!(full_alarm(None), None);
        assert!(full_alarm(Some(Duration::from_secs(59))).is_some_and(|alarm| alarm.contains("turned flows away")));
        assert_eq!(full_alarm(Some(Duration::from_secs(61))), None);
    }
}
