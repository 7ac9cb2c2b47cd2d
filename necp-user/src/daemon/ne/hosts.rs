//! Where the servers' hosts are: routes and neighbour entries, kept as the kernel has them, for the hosts that matter.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::control::cluster::Hop;
use crate::plane::PortInfo;
use crate::plane::neighbours::{Neighbour, NeighbourError, Neighbours, Reachability, Route};

/// How long the kernel may take for an answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Between two readings of the whole table for hosts that it did not have.
const LIST_PAUSE: Duration = Duration::from_secs(1);
/// Between two looks at hosts whose path takes shorter packets than our interface.
const FORGET_PAUSE: Duration = Duration::from_secs(60);
/// Hosts that are looked up again in one go.
const REFRESHED: usize = 64;

/// The source address of a way that has none.
const NOWHERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

/// What is known of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sight {
    /// Its next hop.
    At(Hop),
    /// On a link of ours, and it does not answer there.
    Gone,
    /// No route by any of our interfaces leads to it.
    NoWay,
    /// Not known, which says nothing.
    Unknown,
}

/// The hosts that matter.
pub struct Hosts {
    neighbours: Neighbours,
    /// Our interfaces, by the kernel's index.
    ports: HashMap<u32, PortInfo>,
    routes: HashMap<IpAddr, Option<Route>>,
    entries: HashMap<(u32, IpAddr), Reachability>,
    by_next_hop: HashMap<(u32, IpAddr), BTreeSet<IpAddr>>,
    /// When the kernel's table was last read as a whole.
    listed: Option<Instant>,
    /// Hosts whose routes are still to be looked up again.
    to_refresh: Vec<IpAddr>,
    /// When those with a path MTU are looked up again.
    next_look: Instant,
}

impl Hosts {
    /// Hosts that are reached by these interfaces.
    pub fn new(neighbours: Neighbours, ports: impl IntoIterator<Item = PortInfo>) -> Self {
        Self {
            neighbours,
            ports: ports.into_iter().map(|port| (port.ifindex, port)).collect(),
            routes: HashMap::new(),
            entries: HashMap::new(),
            by_next_hop: HashMap::new(),
            listed: None,
            to_refresh: Vec::new(),
            next_look: Instant::now() + FORGET_PAUSE,
        }
    }

    /// An interface has another MAC address or MTU.
    pub fn on_port(&mut self, port: PortInfo) {
        self.ports.insert(port.ifindex, port);
    }

    /// Looks a host's route up, and follows its neighbour entry from now on.
    pub async fn follow(&mut self, host: IpAddr) {
        self.look_up(host).await;
        let long_ago = self.listed.is_none_or(|at| at.elapsed() >= LIST_PAUSE);
        if self.sight(host) == Sight::Unknown && long_ago {
            // The event may still be on its way: a connection has just come from there.
            self.list().await;
        }
        if self.sight(host) == Sight::Unknown {
            self.probe([host]);
        }
    }

    /// Hosts that nobody asks for any more are forgotten.
    pub fn keep(&mut self, wanted: &HashSet<IpAddr>) {
        self.to_refresh.retain(|host| wanted.contains(host));
        self.routes.retain(|host, _| wanted.contains(host));
        self.by_next_hop.retain(|_, hosts| {
            hosts.retain(|host| wanted.contains(host));
            !hosts.is_empty()
        });
    }

    /// What is known of a host now.
    pub fn sight(&self, host: IpAddr) -> Sight {
        let Some(Some(route)) = self.routes.get(&host) else { return Sight::NoWay };
        let Some(port) = self.ports.get(&route.ifindex) else { return Sight::NoWay };
        match self.entries.get(&(route.ifindex, route.next_hop(host))) {
            Some(&Reachability::At(mac)) => Sight::At(Hop {
                mac,
                port: port.index,
                source: route.source.unwrap_or(NOWHERE),
                mtu: route.mtu.map_or(port.mtu, |mtu| mtu.min(port.mtu)).min(u16::MAX.into()) as u16,
            }),
            Some(Reachability::Failed) if route.on_link() => Sight::Gone,
            Some(Reachability::Failed | Reachability::Unknown) | None => Sight::Unknown,
        }
    }

    /// Whether a host is on a link that one of our interfaces is on.
    pub fn is_on_link(&self, host: IpAddr) -> bool {
        let route = self.routes.get(&host).copied().flatten();
        route.is_some_and(|route| route.on_link() && self.ports.contains_key(&route.ifindex))
    }

    /// Takes note of an entry, and says whose next hop it is.
    pub fn on_neighbour(&mut self, neighbour: Neighbour) -> Vec<IpAddr> {
        let key = (neighbour.ifindex, neighbour.address);
        if neighbour.reachability == Reachability::Unknown {
            self.entries.remove(&key);
        } else if self.ports.contains_key(&neighbour.ifindex) {
            self.entries.insert(key, neighbour.reachability);
        }
        self.by_next_hop.get(&key).into_iter().flatten().copied().collect()
    }

    /// Everything is to be looked up again, by [`Hosts::refresh`].
    pub async fn begin_refresh(&mut self) {
        self.list().await;
        self.to_refresh = self.routes.keys().copied().collect();
    }

    /// Whether [`Hosts::refresh`] has something to do.
    pub fn has_more_to_refresh(&self) -> bool {
        !self.to_refresh.is_empty()
    }

    /// Looks some hosts up again, and says which: with thousands of them, others must not wait for all.
    pub async fn refresh(&mut self) -> Vec<IpAddr> {
        let some = self.to_refresh.split_off(self.to_refresh.len().saturating_sub(REFRESHED));
        for host in &some {
            self.look_up(*host).await;
        }
        some
    }

    /// Looks those up again that matter among these, and says which.
    pub async fn look_again(&mut self, hosts: &[IpAddr]) -> Vec<IpAddr> {
        let known: Vec<IpAddr> = hosts.iter().copied().filter(|host| self.routes.contains_key(host)).collect();
        for host in &known {
            self.look_up(*host).await;
        }
        known
    }

    /// The kernel says when a path takes shorter packets only, not when it has forgotten that.
    pub fn look_again_at_short_paths(&mut self, now: Instant) {
        if now >= self.next_look {
            self.next_look = now + FORGET_PAUSE;
            let short = |route: &Option<Route>| route.is_some_and(|route| route.mtu.is_some());
            self.to_refresh.extend(self.routes.iter().filter(|(_, route)| short(route)).map(|(host, _)| *host));
        }
    }

    /// Makes the kernel ask whether hosts are still there.
    pub fn probe(&self, hosts: impl IntoIterator<Item = IpAddr>) {
        let whom: Vec<(u32, IpAddr)> = hosts
            .into_iter()
            .filter_map(|host| {
                self.routes.get(&host).copied().flatten().map(|route| (route.ifindex, route.next_hop(host)))
            })
            .collect();
        let neighbours = self.neighbours.clone();
        tokio::spawn(async move {
            for (ifindex, address) in whom {
                if let Err(error) = neighbours.probe(ifindex, address).await {
                    tracing::debug!(%error, "probe");
                }
            }
        });
    }

    async fn look_up(&mut self, host: IpAddr) {
        let route = match answer(self.neighbours.route(host)).await {
            Some(route) => route,
            // The kernel does not answer: what was known before is the best there is.
            None => self.routes.get(&host).copied().flatten(),
        };
        if let Some(Some(old)) = self.routes.insert(host, route)
            && let Some(hosts) = self.by_next_hop.get_mut(&(old.ifindex, old.next_hop(host)))
        {
            hosts.remove(&host);
        }
        if let Some(route) = route {
            self.by_next_hop.entry((route.ifindex, route.next_hop(host))).or_default().insert(host);
        }
    }

    /// Reads the kernel's whole table; from then on its events tell what changes.
    pub async fn list(&mut self) {
        self.listed = Some(Instant::now());
        if let Some(entries) = answer(self.neighbours.list()).await {
            let ours = |(ifindex, _): &(u32, IpAddr)| self.ports.contains_key(ifindex);
            self.entries = entries.into_iter().filter(|(key, at)| ours(key) && *at != Reachability::Unknown).collect();
        }
    }
}

async fn answer<T>(question: impl Future<Output = Result<T, NeighbourError>>) -> Option<T> {
    match timeout(PATIENCE, question).await {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(error)) => {
            tracing::warn!(%error, "netlink");
            None
        }
        Err(_) => {
            tracing::warn!("netlink did not answer within {PATIENCE:?}");
            None
        }
    }
}
