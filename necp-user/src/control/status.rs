//! What `necp status` shows of the cluster; packets are somebody else's to add.

use std::net::IpAddr;

use ipnet::IpNet;
use necp_ebpf::abi;

use super::{
    cluster::{Cluster, Host, Offer, OfferState, Session},
    config::{Family, Forwarding, ServiceKey},
    slots::Member,
};

/// Everything at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterStatus {
    /// In the order of the configuration.
    pub farms: Vec<FarmStatus>,
    /// Writes to the maps that failed and are being retried.
    pub pending: usize,
}

/// One farm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FarmStatus {
    /// Its name.
    pub name: String,
    /// Its VIPs.
    pub vips: Vec<IpAddr>,
    /// Destinations whose packets it intercepts.
    pub intercept: Vec<IpNet>,
    /// Most of its servers were lost at once: they are kept in the slot tables.
    pub alarm: bool,
    /// In the order of the configuration.
    pub services: Vec<ServiceStatus>,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceStatus {
    /// Of its VIPs and its servers.
    pub family: Family,
    /// The service.
    pub key: ServiceKey,
    /// Number of its slots.
    pub slots: u32,
    /// By address, then id.
    pub servers: Vec<ServerStatus>,
}

/// One server id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerStatus {
    /// The server id.
    pub id: u32,
    /// The SE.
    pub address: IpAddr,
    /// Its forwarding type.
    pub forwarding: Forwarding,
    /// What it is doing.
    pub state: ServerState,
    /// Its next hop is known.
    pub reachable: bool,
    /// Its last health index, 0–100; none before the first answer.
    pub health: Option<u8>,
    /// Its weight, in units of 1/[`ONE`](super::weight::ONE); 0 if it gets no new flows.
    pub weight: u32,
    /// Slots it owns.
    pub slots: u32,
}

/// What a server is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ServerState {
    /// Started.
    Up,
    /// From before a restart: it serves, its SE has not come back yet.
    Adopted,
    /// Its session is lost; its flows stay.
    Lost,
    /// Its session is lost, with those of most others at once: it goes on serving.
    Kept,
    /// Stopped, or replaced by another forwarding type; flows of it may be left.
    Draining,
    /// Stopped, and the last collection found no flow of it.
    Stopped,
    /// Its host is gone, or it stayed away for too long; its flows were given up.
    Dead,
}

impl ServerState {
    /// Its name in `necp status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Adopted => "adopted",
            Self::Lost => "lost",
            Self::Kept => "kept",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
            Self::Dead => "dead",
        }
    }
}

impl Cluster {
    /// What there is now.
    pub fn snapshot(&self) -> ClusterStatus {
        let farms = (0..self.config.farms.len()).map(|farm| self.farm_status(farm)).collect();
        ClusterStatus { farms, pending: self.pending_writes() }
    }

    fn farm_status(&self, index: usize) -> FarmStatus {
        let farm = &self.config.farms[index];
        let services = self.layout.services.iter().enumerate().filter(|(_, service)| service.farm == index);
        FarmStatus {
            name: farm.name.clone(),
            vips: farm.vips.clone(),
            intercept: farm.intercept.clone(),
            alarm: !self.farms[index].kept.is_empty(),
            services: services
                .map(|(service, placed)| ServiceStatus {
                    family: placed.family,
                    key: placed.key,
                    slots: placed.size,
                    servers: self.server_statuses(service),
                })
                .collect(),
        }
    }

    fn server_statuses(&self, service: usize) -> Vec<ServerStatus> {
        let mut slots = vec![0_u32; self.config.servers.min(abi::MAX_SERVERS) as usize];
        for &owner in self.services[service].owners.iter() {
            if let Some(count) = slots.get_mut(owner as usize) {
                *count += 1;
            }
        }
        let members = &self.services[service].members;
        let status = |(id, offer): (u32, &Offer)| {
            let host = self.hosts.get(&offer.key.address);
            ServerStatus {
                id,
                address: offer.key.address,
                forwarding: offer.key.forwarding,
                state: self.server_state(id, offer, host),
                reachable: host.is_some_and(Host::reachable),
                health: offer.health.index(),
                weight: weight_of(members, id),
                slots: slots.get(id as usize).copied().unwrap_or(0),
            }
        };
        let mut servers: Vec<ServerStatus> = self.offers.of_service(service).map(status).collect();
        servers.sort_unstable_by_key(|server| (server.address, server.id));
        servers
    }

    fn server_state(&self, id: u32, offer: &Offer, host: Option<&Host>) -> ServerState {
        let up = host.is_some_and(|host| host.session == Session::Up);
        match offer.state {
            _ if !offer.alive => ServerState::Dead,
            OfferState::Started if up => ServerState::Up,
            OfferState::Started if self.farms[offer.key.farm].kept.contains(&offer.key.address) => ServerState::Kept,
            OfferState::Started => ServerState::Lost,
            OfferState::Adopted { .. } => ServerState::Adopted,
            OfferState::Stopped if self.ids.may_be_named(id) => ServerState::Draining,
            OfferState::Stopped => ServerState::Stopped,
        }
    }
}

/// Members are in the order of their ids, as [`Cluster::plan`](super::cluster::Cluster::plan) makes them.
fn weight_of(members: &[Member], id: u32) -> u32 {
    members.binary_search_by_key(&id, |member| member.id).map_or(0, |at| members[at].weight)
}
