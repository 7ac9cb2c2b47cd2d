//! Farms, server elements and their offers: what the network element knows, and what changes it.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    time::{Duration, Instant},
};

use necp_ebpf::abi;

mod state;

use state::{FarmState, HostNumbers};
pub(super) use state::{Host, Offer, OfferState, ServiceState, Session};

use super::{
    config::{ClusterConfig, ConfigError, Family, Forwarding, ServiceKey},
    exceptions::Store,
    ids::{Ids, NoIdLeft, OfferKey},
    layout::{Layout, PlacedService},
    offers::Offers,
    plan::Ledger,
    weight::{self, Health},
};

/// Number of an input: once [`Applied::through`](super::plan::Applied::through) has reached it, it is in the maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Change(pub u64);

/// Who may join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Indices of the farms in the configuration, at least one.
    pub farms: Vec<usize>,
}

/// Where a host's packets go on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// The next hop's MAC address.
    pub mac: [u8; 6],
    /// Index of the interface in [`abi::names::PORTS`].
    pub port: u8,
    /// This host's address on the way there.
    pub source: IpAddr,
    /// Longest packet that gets there whole, in bytes.
    pub mtu: u16,
}

/// The address may not join any farm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} may not join: no farm's `servers` contains it")]
pub struct NotAdmitted(pub IpAddr);

/// Why a START unit fails (draft §5.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// No INIT, or its session is lost.
    #[error("no session")]
    NoSession,
    /// The configuration does not offer this service to this SE.
    #[error("no farm that admits the server has the service {0}: add it to the farm's `services`")]
    NotOffered(ServiceKey),
    /// The service is offered on addresses of the other family only.
    #[error("the farm has no {family} VIP, and a server that joins over {family} serves no other: join over {other}, or add one for {0} to the farm's `vips`",
        family = .1.name(), other = .1.other().name())]
    NoVip(ServiceKey, Family),
    /// The farm does not allow this forwarding type.
    #[error("the farm does not allow forwarding type {}: add it to the farm's `forwarding`", .0.name())]
    NotAllowed(Forwarding),
    /// The packet path does not have this forwarding type.
    #[error("forwarding type {} is not supported", .0.name())]
    Unsupported(Forwarding),
    /// Layer 2 needs a server on a directly connected link.
    #[error("layer 2 needs a server on a directly connected link")]
    NotOnLink,
    /// All server ids are in use.
    #[error(transparent)]
    NoIdLeft(#[from] NoIdLeft),
}

/// Something that an operator wants to know; drained by [`Cluster::poll_notice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Most servers of a farm were lost at once: its slot tables are kept.
    PanicBegan {
        /// Index of the farm.
        farm: usize,
    },
    /// Enough servers of the farm are back, or gone for good.
    PanicEnded {
        /// Index of the farm.
        farm: usize,
    },
    /// A server's flows were given up.
    Died {
        /// The server id.
        id: u32,
        /// The SE.
        address: IpAddr,
        /// Its host is gone; else it stayed away for `orphan_time`.
        host_gone: bool,
    },
    /// An adopted server's SE did not come back, or came and did not start it again.
    AdoptedExpired {
        /// The server id.
        id: u32,
        /// The SE.
        address: IpAddr,
    },
}

/// How long an offer outlives its SE's INIT, if it may.
pub(super) const AFTER_INIT: Duration = Duration::from_secs(1);
/// Notices that wait for somebody to ask; older ones are forgotten.
const NOTICES: usize = 1024;

/// The state of all farms.
#[derive(Debug)]
pub struct Cluster {
    pub(super) config: ClusterConfig,
    pub(super) layout: Layout,
    pub(super) ids: Ids,
    pub(super) hosts: BTreeMap<IpAddr, Host>,
    pub(super) offers: Offers,
    /// Ids that the maps knew and the configuration does not: their records, not alive.
    pub(super) strangers: BTreeMap<u32, abi::Server>,
    /// As [`Layout::services`].
    pub(super) services: Vec<ServiceState>,
    /// As [`ClusterConfig::farms`].
    pub(super) farms: Vec<FarmState>,
    /// Server records that may differ from the maps', and the changes that wait for them.
    pub(super) dirty_servers: BTreeMap<u32, Vec<Change>>,
    /// The service entries may differ from the maps'.
    pub(super) dirty_entries: bool,
    pub(super) ledger: Ledger,
    pub(super) exceptions: Store,
    pub(super) change: Change,
    /// When time was last told.
    pub(super) ticked: Instant,
    pub(super) host_numbers: HostNumbers,
    /// See [`Cluster::touches`].
    pub(super) touches: u64,
    /// Sessions or offers came or went: whether there is a panic is to be reviewed before the next plan.
    pub(super) review: bool,
    notices: VecDeque<Notice>,
}

impl Cluster {
    /// A cluster that no server has joined, on maps that are empty.
    pub fn new(config: ClusterConfig, now: Instant) -> Result<Self, ConfigError> {
        config.validate()?;
        let layout = Layout::new(&config, &[])?;
        let services = ServiceState::all(&layout, &config);
        Ok(Self {
            ids: Ids::new(config.servers.min(abi::MAX_SERVERS)),
            hosts: BTreeMap::new(),
            offers: Offers::default(),
            strangers: BTreeMap::new(),
            services,
            farms: vec![FarmState::default(); config.farms.len()],
            dirty_servers: BTreeMap::new(),
            dirty_entries: true,
            ledger: Ledger::new(config.slots, now),
            exceptions: Store::new(&config, now),
            host_numbers: HostNumbers::default(),
            change: Change(0),
            ticked: now,
            touches: 0,
            review: false,
            notices: VecDeque::new(),
            layout,
            config,
        })
    }

    /// What it was configured with.
    pub fn config(&self) -> &ClusterConfig {
        &self.config
    }

    /// Where everything stands in the maps.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Which farms admit this address; none: it may not connect at all.
    pub fn may_join(&self, address: IpAddr) -> Option<Admission> {
        let farms = self.config.farms.iter().enumerate().filter(|(_, farm)| farm.admits(address));
        let farms: Vec<usize> = farms.map(|(index, _)| index).collect();
        (!farms.is_empty()).then_some(Admission { farms })
    }

    /// A session begins: the SE's offers and exceptions are gone (draft §5.4), its flows are not. `on_link`: it is on a directly connected
    /// link. The end of a session that this one supersedes must not be told with [`Cluster::session_lost`].
    pub fn init(&mut self, address: IpAddr, on_link: bool, now: Instant) -> Result<Change, NotAdmitted> {
        if self.may_join(address).is_none() {
            return Err(NotAdmitted(address));
        }
        let change = self.begin();
        let host = self.host_mut(address);
        host.session = Session::Up;
        host.on_link = on_link;
        self.exceptions.doom(address, change);
        let until = now + AFTER_INIT;
        for id in self.offers.ids_of(address) {
            let Some(offer) = self.offers.get_mut(id) else { continue };
            let kept = self.farms[offer.key.farm].kept.contains(&address);
            offer.state = match offer.state {
                OfferState::Started if kept => OfferState::Adopted { until },
                OfferState::Adopted { until: old } => OfferState::Adopted { until: old.min(until) },
                OfferState::Started | OfferState::Stopped => OfferState::Stopped,
            };
            if offer.state == OfferState::Stopped {
                self.ids.retire(id);
            }
        }
        self.touch_host(address, change);
        self.review = true;
        Ok(change)
    }

    /// START of one service (draft §5.6.1). Idempotent; another forwarding type than before counts for new flows only.
    pub fn start(
        &mut self,
        address: IpAddr,
        forwarding: Forwarding,
        protocol: u8,
        port: u16,
        now: Instant,
    ) -> Result<Change, StartError> {
        let host = self.hosts.get(&address).filter(|host| host.session == Session::Up).ok_or(StartError::NoSession)?;
        let service = ServiceKey::new(protocol, port);
        let (farm, index) = self.offered(address, service)?;
        if !self.config.farms[farm].forwarding.contains(&forwarding) {
            return Err(StartError::NotAllowed(forwarding));
        }
        if !self.config.implemented.contains(&forwarding) {
            return Err(StartError::Unsupported(forwarding));
        }
        if forwarding == Forwarding::Layer2 && !host.on_link {
            return Err(StartError::NotOnLink);
        }
        let key = OfferKey { farm, address, service, forwarding };
        let id = self.ids.assign(key)?;
        let change = self.begin();
        let joins = self.services[index].members.iter().any(|member| member.id != id);
        let new = || Offer {
            key,
            service: index,
            state: OfferState::Stopped,
            alive: true,
            health: Health::default(),
            joined: None,
        };
        if !self.offers.contains_key(&id) {
            self.offers.insert(id, new());
        }
        if let Some(offer) = self.offers.get_mut(id) {
            if offer.state == OfferState::Stopped {
                offer.joined = joins.then_some(now);
            }
            offer.state = OfferState::Started;
        }
        self.stop_offers(address, |other, offer| other != id && offer.key.service == service);
        self.touch_server(id, change);
        self.touch_host(address, change);
        self.review = true;
        Ok(change)
    }

    /// STOP of one service, whatever its forwarding type. Of something that was not started: nothing happens.
    pub fn stop(&mut self, address: IpAddr, protocol: u8, port: u16, _now: Instant) -> Change {
        let change = self.begin();
        let service = ServiceKey::new(protocol, port);
        self.stop_offers(address, |_, offer| offer.key.service == service);
        self.touch_host(address, change);
        self.review = true;
        change
    }

    /// An answer to a query for the health index (draft §5.5.1) of one service; above 100 it is ignored.
    pub fn health(&mut self, address: IpAddr, protocol: u8, port: u16, index: u8, _now: Instant) -> Change {
        let change = self.begin();
        let service = ServiceKey::new(protocol, port);
        let mut moved = false;
        for id in self.offers.ids_of(address) {
            if let Some(offer) = self.offers.get_mut(id)
                && offer.key.service == service
                && offer.state != OfferState::Stopped
            {
                moved |= offer.health.observe(index);
            }
        }
        if moved {
            self.touch_host(address, change);
        }
        change
    }

    /// The SE's session was closed, reset or found dead: no new flows, no exceptions; the flows that there are stay.
    pub fn session_lost(&mut self, address: IpAddr, now: Instant) -> Change {
        let change = self.begin();
        if let Some(host) = self.hosts.get_mut(&address).filter(|host| host.session == Session::Up) {
            host.session = Session::Lost { since: now };
            self.exceptions.doom(address, change);
            self.touch_host(address, change);
            self.review = true;
        }
        change
    }

    /// The next hop of an address is known, perhaps again, perhaps another one.
    pub fn host_reachable(&mut self, address: IpAddr, hop: Hop, _now: Instant) -> Change {
        let change = self.begin();
        if self.may_join(address).is_some() || self.hosts.contains_key(&address) {
            let host = self.host_mut(address);
            if host.hop != Some(hop) || host.gone.is_some() {
                (host.hop, host.gone, host.known) = (Some(hop), None, true);
                self.touch_host(address, change);
            }
        }
        change
    }

    /// The next hop of an address is not known for now; that says nothing about the host's life.
    pub fn host_unreachable(&mut self, address: IpAddr, _now: Instant) -> Change {
        let change = self.begin();
        if let Some(host) = self.hosts.get_mut(&address) {
            (host.hop, host.gone) = (None, None);
            self.touch_host(address, change);
            self.forget_host(address);
        }
        change
    }

    /// The neighbour entry of an address is FAILED: no new flows; with its session lost too, the host is gone.
    pub fn host_gone(&mut self, address: IpAddr, now: Instant) -> Change {
        let change = self.begin();
        if let Some(host) = self.hosts.get_mut(&address)
            && host.gone.is_none()
        {
            host.gone = Some(now);
            self.touch_host(address, change);
            self.forget_host(address);
        }
        change
    }

    /// Whether a host is on a directly connected link now, as routes have changed: for what it starts from now on.
    pub fn host_on_link(&mut self, address: IpAddr, on_link: bool) {
        if let Some(host) = self.hosts.get_mut(&address) {
            host.on_link = on_link;
        }
    }

    /// Forgets the hosts that have neither a session nor anything in the maps: who comes from ever new addresses leaves
    /// nothing behind.
    pub fn forget_visitors(&mut self) {
        let idle = |(address, host): (&IpAddr, &Host)| {
            (host.session != Session::Up && !self.is_used(*address)).then_some(*address)
        };
        let visitors: Vec<IpAddr> = self.hosts.iter().filter_map(idle).collect();
        visitors.into_iter().for_each(|address| self.drop_host(address));
    }

    /// Hosts whose neighbour entries matter: those with a session or with an id that may have flows; in the order of their
    /// addresses.
    pub fn hosts(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let mut used = self.offers.alive().peekable();
        let matters = move |(address, host): &(&IpAddr, &Host)| {
            while used.next_if(|used| used < *address).is_some() {}
            host.session == Session::Up || used.peek() == Some(*address)
        };
        self.hosts.iter().filter(matters).map(|(address, _)| *address)
    }

    /// The id of an SE's offer, if it has one that is not dead.
    pub fn id_of(&self, key: &OfferKey) -> Option<u32> {
        self.ids.get(key)
    }

    /// Whether flows may go to this id.
    pub fn is_alive(&self, id: u32) -> bool {
        id == abi::DIRECT || self.offers.get(&id).is_some_and(|offer| offer.alive)
    }

    /// Counts what inputs have touched that the maps show. Most inputs touch nothing: health that stays on its level, a
    /// neighbour entry that was confirmed.
    pub fn touches(&self) -> u64 {
        self.touches
    }

    /// Ids of all offers are below this one.
    pub fn ids_below(&self) -> u32 {
        self.offers.keys().next_back().map_or(0, |last| last + 1)
    }

    /// The next thing to tell the operator.
    pub fn poll_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    pub(super) fn notice(&mut self, notice: Notice) {
        if self.notices.len() == NOTICES {
            self.notices.pop_front();
        }
        self.notices.push_back(notice);
    }

    pub(super) fn begin(&mut self) -> Change {
        self.change.0 += 1;
        self.change
    }

    /// The farm and the service's index, if the configuration offers it to this SE.
    fn offered(&self, address: IpAddr, service: ServiceKey) -> Result<(usize, usize), StartError> {
        let admits = |placed: &&PlacedService| placed.key == service && self.config.farms[placed.farm].admits(address);
        let family = Family::of(address);
        let mut offered = self.layout.services.iter().enumerate().filter(|(_, placed)| admits(placed)).peekable();
        offered.peek().ok_or(StartError::NotOffered(service))?;
        let (index, placed) =
            offered.find(|(_, placed)| placed.family == family).ok_or(StartError::NoVip(service, family))?;
        Ok((placed.farm, index))
    }

    fn stop_offers(&mut self, address: IpAddr, which: impl Fn(u32, &Offer) -> bool) {
        for id in self.offers.ids_of(address) {
            if let Some(offer) = self.offers.get_mut(id)
                && offer.alive
                && which(id, offer)
            {
                offer.state = OfferState::Stopped;
                self.ids.retire(id);
            }
        }
    }

    /// A server's record may have to change.
    pub(super) fn touch_server(&mut self, id: u32, change: Change) {
        self.touches += 1;
        let changes = self.dirty_servers.entry(id).or_default();
        if changes.last() != Some(&change) {
            changes.push(change);
        }
    }

    /// All that a host's state decides may have to change.
    pub(super) fn touch_host(&mut self, address: IpAddr, change: Change) {
        for id in self.offers.ids_of(address) {
            if let Some(service) = self.offers.get(&id).map(|offer| offer.service) {
                self.touch_server(id, change);
                self.services[service].touch(change);
            }
        }
    }

    /// The host of this address, new if need be.
    fn host_mut(&mut self, address: IpAddr) -> &mut Host {
        let Self { hosts, host_numbers, .. } = self;
        hosts.entry(address).or_insert_with(|| Host { number: host_numbers.take(0), ..Host::UNKNOWN })
    }

    /// Nothing in the maps names this host, nor may come to.
    pub(super) fn forget_host(&mut self, address: IpAddr) {
        if !self.is_used(address)
            && self.hosts.get(&address).is_some_and(|host| host.session != Session::Up && !host.reachable())
        {
            self.drop_host(address);
        }
    }

    fn drop_host(&mut self, address: IpAddr) {
        self.host_numbers.give_back(self.hosts.remove(&address).map_or(0, |host| host.number));
    }

    /// Something in the maps may name it.
    fn is_used(&self, address: IpAddr) -> bool {
        self.offers.has(address) || self.exceptions.knows(address)
    }

    /// New flows may go to this offer, as far as its SE is concerned; `host` is its SE's.
    pub(super) fn serves_on(&self, offer: &Offer, host: Option<&Host>) -> bool {
        let up = host.is_some_and(|host| host.session == Session::Up);
        offer.alive
            && match offer.state {
                OfferState::Started => up || self.farms[offer.key.farm].kept.contains(&offer.key.address),
                OfferState::Adopted { .. } => true,
                OfferState::Stopped => false,
            }
    }

    /// Its weight in the slot table; 0: it is not in it.
    pub(super) fn weight_of(&self, offer: &Offer, now: Instant) -> u32 {
        let address = offer.key.address;
        let host = self.hosts.get(&address);
        if !self.serves_on(offer, host) || !host.is_some_and(|host| host.known) {
            return 0;
        }
        let capacity = self.config.farms[offer.key.farm].capacity_of(address);
        weight::weight(offer.health.level(), capacity, offer.joined, self.config.slow_start, now)
    }
}

#[cfg(test)]
mod tests;
