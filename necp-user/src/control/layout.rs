//! Where everything stands in the maps: one region of slots per farm and service, one entry per VIP and service.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use necp_ebpf::{
    abi::{self, ALWAYS_TRACKED, SERVICES_PER_BUCKET, UDP_CLASS, UNTRACKED},
    hash::service_bucket,
    steer::shows_beginning,
};

use super::config::{ClusterConfig, ConfigError, ServiceKey};

/// A service: one slot table, shared by all VIPs of its farm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedService {
    /// Index of the farm in the configuration.
    pub farm: usize,
    /// The service.
    pub key: ServiceKey,
    /// Its first slot.
    pub base: u32,
    /// Number of its slots.
    pub size: u32,
    /// [`ALWAYS_TRACKED`], [`UNTRACKED`] or neither.
    pub flags: u16,
    /// The region was in use before this process, with the same size and seed.
    pub adopted: bool,
}

/// One entry of the service table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// The VIP; 0.0.0.0 for what crosses this host.
    pub vip: Ipv4Addr,
    /// Index in [`Layout::services`].
    pub service: usize,
    /// [`abi::Service::id`].
    pub id: u16,
    /// Bucket of the service table.
    pub bucket: u32,
    /// Entry in the bucket.
    pub entry: usize,
}

/// An entry of the service table that is no service: an address is a VIP ([`abi::VIP`]), a reply's VIP ([`abi::REPLY`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// What stands there.
    pub service: abi::Service,
    /// Bucket of the service table.
    pub bucket: u32,
    /// Entry in the bucket.
    pub entry: usize,
}

/// An entry that the service table has already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Existing {
    /// Bucket of the service table.
    pub bucket: u32,
    /// Entry in the bucket.
    pub entry: usize,
    /// What stands there.
    pub service: abi::Service,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// In the order of farms and their services.
    pub services: Vec<PlacedService>,
    /// In the order of farms, services and VIPs.
    pub frontends: Vec<Frontend>,
    /// What the packet path must know beside the services.
    pub notes: Vec<Note>,
    /// Entries (bucket, entry) of services that are no longer configured.
    pub stale: Vec<(u32, usize)>,
    /// Farm index in the maps as found → index in the configuration.
    pub old_farms: BTreeMap<u32, usize>,
}

impl Layout {
    /// Places everything, next to what is there already.
    pub fn new(config: &ClusterConfig, existing: &[Existing]) -> Result<Self, ConfigError> {
        let mut layout = Self::default();
        let mut claimed: BTreeMap<(Ipv4Addr, ServiceKey), usize> = BTreeMap::new();
        for (farm_index, farm) in config.farms.iter().enumerate() {
            for &key in &farm.services {
                for &vip in farm.fronts() {
                    if let Some(first) = claimed.insert((vip, key), farm_index) {
                        let (first, second) = (config.farms[first].name.clone(), farm.name.clone());
                        if vip.is_unspecified() {
                            return Err(ConfigError::Intercepted { service: key, first, second });
                        }
                        return Err(ConfigError::Claimed { vip, service: key, first, second });
                    }
                    if let Some(old) = find(existing, vip, key) {
                        layout.old_farms.entry(old.service.farm.into()).or_insert(farm_index);
                    }
                }
                layout.services.push(layout.adopt_region(config, existing, farm_index, key));
            }
        }
        layout.allocate(config)?;
        layout.place(config, existing)?;
        Ok(layout)
    }

    /// What an entry of the service table should say.
    pub fn entry(&self, config: &ClusterConfig, frontend: &Frontend) -> abi::Service {
        let service = &self.services[frontend.service];
        abi::Service {
            address: frontend.vip.octets(),
            port: service.key.port.to_be_bytes(),
            protocol: service.key.protocol,
            state: state_of(frontend.vip),
            slots_base: service.base,
            slots_size: service.size,
            seed: config.farms[service.farm].seed(),
            id: frontend.id,
            flags: service.flags,
            farm: service.farm as u16,
            vip: 0,
        }
    }

    /// The service of a farm.
    pub fn service(&self, farm: usize, key: ServiceKey) -> Option<usize> {
        self.services.iter().position(|service| service.farm == farm && service.key == key)
    }

    /// A service, with its old region if that is of any use.
    fn adopt_region(
        &self,
        config: &ClusterConfig,
        existing: &[Existing],
        farm: usize,
        key: ServiceKey,
    ) -> PlacedService {
        let wanted = &config.farms[farm];
        let flags = match (shows_beginning(key.protocol), wanted.udp_tracking) {
            (true, _) if wanted.expects_replies() => ALWAYS_TRACKED,
            (true, _) => 0,
            (false, _) if wanted.intercepts() => ALWAYS_TRACKED,
            (false, true) => ALWAYS_TRACKED,
            (false, false) => UNTRACKED,
        };
        let usable = |old: &&Existing| {
            let (base, size) = (old.service.slots_base, old.service.slots_size);
            size == wanted.table_size
                && old.service.seed == wanted.seed()
                && base.checked_add(size).is_some_and(|end| end <= config.slots)
                && !self.services.iter().any(|other| other.adopted && overlap((base, size), (other.base, other.size)))
        };
        let old = wanted.fronts().iter().filter_map(|&vip| find(existing, vip, key)).find(usable);
        let base = old.map_or(0, |old| old.service.slots_base);
        PlacedService { farm, key, base, size: wanted.table_size, flags, adopted: old.is_some() }
    }

    /// First fit, for the regions that are new.
    fn allocate(&mut self, config: &ClusterConfig) -> Result<(), ConfigError> {
        let mut taken: Vec<(u32, u32)> = self
            .services
            .iter()
            .filter(|service| service.adopted)
            .map(|service| (service.base, service.size))
            .collect();
        taken.sort_unstable();
        for service in self.services.iter_mut().filter(|service| !service.adopted) {
            let mut base = 0;
            for &(start, size) in &taken {
                if start - base >= service.size {
                    break;
                }
                base = start + size;
            }
            if base.checked_add(service.size).is_none_or(|end| end > config.slots) {
                let needed = super::config::slots_needed(&config.farms);
                return Err(ConfigError::Slots { needed, capacity: config.slots });
            }
            service.base = base;
            let at = taken.partition_point(|&(start, _)| start < base);
            taken.insert(at, (base, service.size));
        }
        Ok(())
    }

    fn place(&mut self, config: &ClusterConfig, existing: &[Existing]) -> Result<(), ConfigError> {
        let mut occupied: BTreeSet<(u32, usize)> = BTreeSet::new();
        let mut ids: BTreeSet<u16> = existing.iter().map(|old| old.service.id & !UDP_CLASS).collect();
        let wanted: Vec<(usize, Ipv4Addr)> = (0..self.services.len())
            .flat_map(|index| config.farms[self.services[index].farm].fronts().iter().map(move |&vip| (index, vip)))
            .collect();
        // What is there keeps its place; only then what is new looks for one.
        for &(index, vip) in &wanted {
            if let Some(old) = find(existing, vip, self.services[index].key) {
                occupied.insert((old.bucket, old.entry));
            }
        }
        for (service, vip) in wanted {
            let placed = &self.services[service];
            let old = find(existing, vip, placed.key);
            let (bucket, entry) = match old {
                Some(old) => (old.bucket, old.entry),
                None => {
                    let bucket = service_bucket(key_word(vip, placed.key));
                    let entry = free_entry(&occupied, bucket);
                    (bucket, entry.ok_or(ConfigError::BucketFull { vip, service: placed.key })?)
                }
            };
            occupied.insert((bucket, entry));
            // Flow records of another seed are in other buckets: they must not be taken for this entry's.
            let seed = config.farms[placed.farm].seed();
            let id = match old.filter(|old| old.service.seed == seed) {
                Some(old) => old.service.id,
                None => {
                    let free = (1..UDP_CLASS).find(|id| !ids.contains(id)).ok_or(ConfigError::TooManyServices)?;
                    free | if shows_beginning(placed.key.protocol) { 0 } else { UDP_CLASS }
                }
            };
            ids.insert(id & !UDP_CLASS);
            self.frontends.push(Frontend { vip, service, id, bucket, entry });
        }
        self.place_notes(config, &mut occupied)?;
        let stale = existing.iter().map(|old| (old.bucket, old.entry)).filter(|place| !occupied.contains(place));
        self.stale = stale.collect();
        Ok(())
    }

    /// They mean nothing to flows, so they need not be where they were.
    fn place_notes(
        &mut self,
        config: &ClusterConfig,
        occupied: &mut BTreeSet<(u32, usize)>,
    ) -> Result<(), ConfigError> {
        let (mut vips, mut numbers) = (BTreeSet::new(), BTreeMap::<ServiceKey, u32>::new());
        for frontend in self.frontends.clone().into_iter().filter(|frontend| !frontend.vip.is_unspecified()) {
            let (vip, placed) = (frontend.vip, &self.services[frontend.service]);
            let (key, layer_3) = (placed.key, config.farms[placed.farm].expects_replies());
            let full = ConfigError::BucketFull { vip, service: key };
            if vips.insert(vip) {
                let silent = config.farms.iter().any(|farm| farm.vips.contains(&vip) && !farm.echo);
                let flags = if silent { abi::NO_ECHO } else { 0 };
                let note = abi::Service { address: vip.octets(), state: abi::VIP, flags, ..abi::Service::default() };
                self.place_note(note, occupied).ok_or(full.clone())?;
            }
            if !layer_3 {
                continue;
            }
            let number = numbers.entry(key).or_default();
            if *number == abi::REPLY_VIPS {
                return Err(ConfigError::TooManyReplies { service: key });
            }
            let note = abi::Service {
                address: number.to_ne_bytes(),
                port: key.port.to_be_bytes(),
                protocol: key.protocol,
                state: abi::REPLY,
                slots_base: u32::from_ne_bytes(vip.octets()),
                ..abi::Service::default()
            };
            *number += 1;
            self.place_note(note, occupied).ok_or(full)?;
        }
        Ok(())
    }

    fn place_note(&mut self, service: abi::Service, occupied: &mut BTreeSet<(u32, usize)>) -> Option<()> {
        let bucket = service_bucket(first_word(&service));
        let entry = free_entry(occupied, bucket)?;
        occupied.insert((bucket, entry));
        self.notes.push(Note { service, bucket, entry });
        Some(())
    }
}

fn free_entry(occupied: &BTreeSet<(u32, usize)>, bucket: u32) -> Option<usize> {
    (0..SERVICES_PER_BUCKET).find(|&entry| !occupied.contains(&(bucket, entry)))
}

fn overlap(a: (u32, u32), b: (u32, u32)) -> bool {
    a.0 < b.0 + b.1 && b.0 < a.0 + a.1
}

fn find(existing: &[Existing], vip: Ipv4Addr, key: ServiceKey) -> Option<&Existing> {
    existing.iter().find(|old| {
        let service = &old.service;
        service.state == state_of(vip)
            && service.address == vip.octets()
            && service.protocol == key.protocol
            && service.port == key.port.to_be_bytes()
    })
}

/// What an entry of a service at this address is.
fn state_of(vip: Ipv4Addr) -> u8 {
    if vip.is_unspecified() { abi::INTERCEPT } else { 1 }
}

/// The first eight bytes of an entry, as the packet path makes them.
fn key_word(vip: Ipv4Addr, key: ServiceKey) -> u64 {
    let (address, port) = (vip.octets(), key.port.to_be_bytes());
    let state = state_of(vip);
    first_word(&abi::Service { address, port, protocol: key.protocol, state, ..abi::Service::default() })
}

fn first_word(service: &abi::Service) -> u64 {
    let [a, b, c, d] = service.address;
    let [e, f] = service.port;
    u64::from_ne_bytes([a, b, c, d, e, f, service.protocol, service.state])
}

#[cfg(test)]
mod tests;
