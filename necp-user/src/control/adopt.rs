//! Starting anew on maps that are in use: the packet path has forwarded on meanwhile, and goes on while SEs come back.

use std::{net::Ipv6Addr, time::Instant};

use necp_ebpf::{
    abi::{ACCEPTS, ALIVE, FIRST_SERVER, NONE, REACHABLE, REPLY6, SERVICE_BUCKETS, SERVICE6, Server, Service, VIP6},
    host::View,
    slot::SlotWord,
    tables::Tables,
};

use super::{
    cluster::{Cluster, Hop, Host, Offer, OfferState, ServiceState, Session},
    config::{ConfigError, Family, Forwarding, ServiceKey},
    ids::{Ids, OfferKey},
    layout::{Existing, Layout},
    weight::Health,
};

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Services whose slot table goes on.
    pub services: usize,
    /// Services that begin anew, because they are new or have another size or seed; their old flows may move.
    pub services_new: usize,
    /// Servers that go on serving until their SE says something, or the grace time has passed.
    pub serving: usize,
    /// Servers that keep their flows and get no new ones.
    pub draining: usize,
    /// Servers that the configuration does not know any more, or that were dead: their flows are given up.
    pub given_up: usize,
}

impl Cluster {
    /// Takes over what the maps hold, but for exceptions, which go. To be called once, before any other input; on empty maps it changes nothing.
    ///
    /// Everything old that the configuration still knows keeps its place. Fails if what is new finds none beside it.
    pub fn adopt(&mut self, view: &View<'_>, now: Instant) -> Result<Adopted, ConfigError> {
        let existing = existing(view);
        // Exceptions live as long as their SE's session, and there is none.
        view.clear_exceptions();
        self.layout = Layout::new(&self.config, &existing)?;
        self.services = ServiceState::all(&self.layout, &self.config);
        self.ids = Ids::new(self.config.servers);
        let services = self.layout.services.iter().filter(|service| service.adopted).count();
        let services_new = self.layout.services.len() - services;
        let mut adopted = Adopted { services, services_new, ..Adopted::default() };
        let servers: Vec<(u32, Server)> = (FIRST_SERVER..view.server_count() as u32)
            .filter_map(|id| Some((id, view.server(id)?)))
            .filter(|(_, server)| *server != Server::default())
            .collect();
        self.adopt_servers(&servers, now, &mut adopted);
        for index in 0..self.services.len() {
            self.adopt_slots(index, view, now);
        }
        Ok(adopted)
    }

    /// Rebuilds offers from server records.
    fn adopt_servers(&mut self, servers: &[(u32, Server)], now: Instant, adopted: &mut Adopted) {
        let change = self.begin();
        for (id, server) in servers {
            let offer = self.offer_of(server).filter(|(key, _)| server.flags & ALIVE != 0 && self.ids.adopt(*id, *key));
            self.touch_server(*id, change);
            let Some((key, service)) = offer else {
                self.ids.adopt_retired(*id);
                self.strangers.insert(*id, Server { flags: 0, ..*server });
                adopted.given_up += 1;
                continue;
            };
            let serves = server.flags & ACCEPTS != 0;
            let until = now + self.config.grace;
            let state = if serves { OfferState::Adopted { until } } else { OfferState::Stopped };
            if !serves {
                self.ids.retire(*id);
            }
            *(if serves { &mut adopted.serving } else { &mut adopted.draining }) += 1;
            let offer = Offer { key, service, state, alive: true, health: Health::default(), joined: None };
            self.offers.insert(*id, offer);
            let reachable = server.flags & REACHABLE != 0;
            let hop = reachable.then(|| hop_of(server));
            let Self { hosts, host_numbers, .. } = self;
            let host = hosts.entry(key.address).or_insert_with(|| Host {
                number: host_numbers.take(server.host),
                session: Session::Lost { since: now },
                on_link: false,
                hop,
                known: true,
                gone: None,
            });
            host.hop = host.hop.or(hop);
            self.services[service].touch(change);
        }
    }

    /// Whose record this is, and of which service, if the configuration still allows it.
    fn offer_of(&self, server: &Server) -> Option<(OfferKey, usize)> {
        let farm = *self.layout.old_farms.get(&u32::from(server.farm))?;
        let address = Ipv6Addr::from(server.address).to_canonical();
        let forwarding = Forwarding::from_wire(u32::from(server.forwarding))?;
        let service = ServiceKey::new(server.protocol, server.service_port);
        let wanted = &self.config.farms[farm];
        let allowed = wanted.admits(address)
            && wanted.forwarding.contains(&forwarding)
            && self.config.implemented.contains(&forwarding);
        let index = self.layout.service(farm, Family::of(address), service)?;
        allowed.then_some((OfferKey { farm, address, service, forwarding }, index))
    }

    /// What the slots of an adopted region say; since when they have a legacy is not known, so: since now.
    fn adopt_slots(&mut self, index: usize, view: &View<'_>, now: Instant) {
        let placed = &self.layout.services[index];
        let service = &mut self.services[index];
        if !placed.adopted {
            return;
        }
        service.fresh = false;
        service.dirty = true;
        let mut owners = Vec::with_capacity(placed.size as usize);
        for slot in placed.base..placed.base + placed.size {
            let word = view.slot(slot).map_or(SlotWord(0), |word| SlotWord(word.load()));
            owners.push(word.owner());
            if word.legacy() != NONE {
                self.ledger.set(slot, now);
            }
            service.served |= word.owner() != NONE;
        }
        service.owners = owners.into();
        service.unwritten = false;
    }
}

fn hop_of(server: &Server) -> Hop {
    let source = Ipv6Addr::from(server.source).to_canonical();
    Hop { mac: server.mac, port: server.port, source, mtu: server.mtu }
}

fn existing(view: &View<'_>) -> Vec<Existing> {
    let mut existing = Vec::new();
    for bucket in 0..SERVICE_BUCKETS {
        let Some(services) = view.services(bucket) else { break };
        let valid = services.entries.into_iter().enumerate().filter(|(_, service)| service.state != 0);
        existing.extend(valid.map(|(entry, service)| Existing { bucket, entry, service, vip: vip6(view, &service) }));
    }
    existing
}

/// The IPv6 VIP that an entry is about.
fn vip6(view: &View<'_>, service: &Service) -> Option<Ipv6Addr> {
    if !matches!(service.state, SERVICE6 | REPLY6 | VIP6) {
        return None;
    }
    let mut octets = [0; 16];
    let [high, low] = view.vip6(service.vip.into())?;
    octets[..8].copy_from_slice(&high.to_ne_bytes());
    octets[8..].copy_from_slice(&low.to_ne_bytes());
    Some(octets.into())
}

#[cfg(test)]
mod tests;
