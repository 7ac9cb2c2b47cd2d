//! Where everything stands in the maps: one region of slots per farm, family and service, one entry per VIP and service.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use necp_ebpf::{
    abi::{self, ALWAYS_TRACKED, SERVICES_PER_BUCKET, UDP_CLASS, UNTRACKED},
    hash::service_bucket,
    steer::shows_beginning,
};

use super::config::{ClusterConfig, ConfigError, Family, ServiceKey, fold};

/// A service: one slot table, shared by all VIPs of one family of its farm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedService {
    /// Index of the farm in the configuration.
    pub farm: usize,
    /// Of its VIPs and its servers.
    pub family: Family,
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
    /// The VIP; 0.0.0.0 or :: for what crosses this host.
    pub vip: IpAddr,
    /// Index in [`Layout::services`].
    pub service: usize,
    /// [`abi::Service::id`].
    pub id: u16,
    /// [`abi::Service::vip`].
    pub vip6: u16,
    /// Bucket of the service table.
    pub bucket: u32,
    /// Entry in the bucket.
    pub entry: usize,
}

/// An entry of the service table that is no service: an address is a VIP ([`abi::VIP`]), a reply's VIP ([`abi::REPLY`]), or the same
/// of IPv6.
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
    /// The IPv6 VIP that it is about.
    pub vip: Option<Ipv6Addr>,
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
    /// Indices of the IPv6 VIPs in the map `vips6`.
    pub vips6: BTreeMap<Ipv6Addr, u16>,
    /// Entries (bucket, entry) of services that are no longer configured.
    pub stale: Vec<(u32, usize)>,
    /// Farm index in the maps as found → index in the configuration.
    pub old_farms: BTreeMap<u32, usize>,
}

impl Layout {
    /// Places everything, next to what is there already.
    pub fn new(config: &ClusterConfig, existing: &[Existing]) -> Result<Self, ConfigError> {
        let mut layout = Self::default();
        let mut claimed: BTreeMap<(IpAddr, ServiceKey), usize> = BTreeMap::new();
        for (farm_index, farm) in config.farms.iter().enumerate() {
            for (family, key) in farm.families().flat_map(|family| farm.services.iter().map(move |key| (family, *key)))
            {
                for vip in farm.fronts(family) {
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
                layout.services.push(layout.adopt_region(config, existing, (farm_index, family, key)));
            }
        }
        layout.allocate(config)?;
        layout.number_vips6(config, existing)?;
        layout.place(config, existing)?;
        Ok(layout)
    }

    /// What an entry of the service table should say.
    pub fn entry(&self, config: &ClusterConfig, frontend: &Frontend) -> abi::Service {
        let service = &self.services[frontend.service];
        abi::Service {
            address: frontend.address(),
            port: service.key.port.to_be_bytes(),
            protocol: service.key.protocol,
            state: state_of(frontend.vip),
            slots_base: service.base,
            slots_size: service.size,
            seed: config.farms[service.farm].seed(),
            id: frontend.id,
            flags: service.flags,
            farm: service.farm as u16,
            vip: frontend.vip6,
        }
    }

    /// The service of a farm.
    pub fn service(&self, farm: usize, family: Family, key: ServiceKey) -> Option<usize> {
        let is = |one: &PlacedService| (one.farm, one.family, one.key) == (farm, family, key);
        self.services.iter().position(is)
    }

    /// A service, with its old region if that is of any use.
    fn adopt_region(
        &self,
        config: &ClusterConfig,
        existing: &[Existing],
        (farm, family, key): (usize, Family, ServiceKey),
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
        let old = wanted.fronts(family).filter_map(|vip| find(existing, vip, key)).find(usable);
        let base = old.map_or(0, |old| old.service.slots_base);
        PlacedService { farm, family, key, base, size: wanted.table_size, flags, adopted: old.is_some() }
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

    /// A VIP keeps its index; a new one has none that an entry still names, whether that stays or goes.
    fn number_vips6(&mut self, config: &ClusterConfig, existing: &[Existing]) -> Result<(), ConfigError> {
        let mut taken: BTreeSet<u16> = existing.iter().map(|old| old.service.vip).collect();
        for vip in config.farms.iter().flat_map(|farm| &farm.vips) {
            let IpAddr::V6(vip) = *vip else { continue };
            if self.vips6.contains_key(&vip) {
                continue;
            }
            let old = existing.iter().find(|old| old.vip == Some(vip)).map(|old| old.service.vip);
            let free = || (1..abi::MAX_VIPS6 as u16).find(|index| !taken.contains(index));
            let index = old.or_else(free).ok_or(ConfigError::TooManyVips6)?;
            taken.insert(index);
            self.vips6.insert(vip, index);
        }
        Ok(())
    }

    fn place(&mut self, config: &ClusterConfig, existing: &[Existing]) -> Result<(), ConfigError> {
        let mut occupied: BTreeSet<(u32, usize)> = BTreeSet::new();
        let mut ids: BTreeSet<u16> = existing.iter().map(|old| old.service.id & !UDP_CLASS).collect();
        let fronts = |(index, placed): (usize, &PlacedService)| {
            config.farms[placed.farm].fronts(placed.family).map(move |vip| (index, vip)).collect::<Vec<_>>()
        };
        let wanted: Vec<(usize, IpAddr)> = self.services.iter().enumerate().flat_map(fronts).collect();
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
            let vip6 = self.vip6(vip);
            self.frontends.push(Frontend { vip, service, id, vip6, bucket, entry });
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
        let (mut vips, mut numbers) = (BTreeSet::new(), BTreeMap::<(Family, ServiceKey), u32>::new());
        for frontend in self.frontends.clone().into_iter().filter(|frontend| !frontend.vip.is_unspecified()) {
            let (vip, placed) = (frontend.vip, &self.services[frontend.service]);
            let (key, layer_3) = (placed.key, config.farms[placed.farm].expects_replies());
            let full = ConfigError::BucketFull { vip, service: key };
            if vips.insert(vip) {
                let silent = config.farms.iter().any(|farm| farm.vips.contains(&vip) && !farm.echo);
                let flags = if silent { abi::NO_ECHO } else { 0 };
                let note = abi::Service {
                    address: frontend.address(),
                    state: if vip.is_ipv4() { abi::VIP } else { abi::VIP6 },
                    flags,
                    vip: frontend.vip6,
                    ..abi::Service::default()
                };
                self.place_note(note, occupied).ok_or(full.clone())?;
            }
            if !layer_3 {
                continue;
            }
            let number = numbers.entry((Family::of(vip), key)).or_default();
            if *number == abi::REPLY_VIPS {
                return Err(ConfigError::TooManyReplies { service: key });
            }
            let note = abi::Service {
                address: number.to_ne_bytes(),
                port: key.port.to_be_bytes(),
                protocol: key.protocol,
                state: if vip.is_ipv4() { abi::REPLY } else { abi::REPLY6 },
                slots_base: if vip.is_ipv4() { u32::from_ne_bytes(frontend.address()) } else { 0 },
                vip: frontend.vip6,
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

impl Layout {
    fn vip6(&self, vip: IpAddr) -> u16 {
        match vip {
            IpAddr::V4(_) => 0,
            IpAddr::V6(vip) => self.vips6.get(&vip).copied().unwrap_or(0),
        }
    }
}

impl Frontend {
    /// [`abi::Service::address`], which stands for the VIP in the packet path.
    pub fn address(&self) -> [u8; 4] {
        address_of(self.vip)
    }
}

fn address_of(vip: IpAddr) -> [u8; 4] {
    match vip {
        IpAddr::V4(vip) => vip.octets(),
        IpAddr::V6(vip) => fold(vip),
    }
}

fn free_entry(occupied: &BTreeSet<(u32, usize)>, bucket: u32) -> Option<usize> {
    (0..SERVICES_PER_BUCKET).find(|&entry| !occupied.contains(&(bucket, entry)))
}

fn overlap(a: (u32, u32), b: (u32, u32)) -> bool {
    a.0 < b.0 + b.1 && b.0 < a.0 + a.1
}

fn find(existing: &[Existing], vip: IpAddr, key: ServiceKey) -> Option<&Existing> {
    existing.iter().find(|old| {
        let service = &old.service;
        service.state == state_of(vip)
            && service.address == address_of(vip)
            && old.vip.is_none_or(|old| old == vip)
            && service.protocol == key.protocol
            && service.port == key.port.to_be_bytes()
    })
}

/// What an entry of a service at this address is.
fn state_of(vip: IpAddr) -> u8 {
    match vip {
        IpAddr::V4(vip) if vip.is_unspecified() => abi::INTERCEPT,
        IpAddr::V4(_) => 1,
        IpAddr::V6(vip) if vip.is_unspecified() => abi::INTERCEPT6,
        IpAddr::V6(_) => abi::SERVICE6,
    }
}

/// The first eight bytes of an entry, as the packet path makes them.
fn key_word(vip: IpAddr, key: ServiceKey) -> u64 {
    let (address, port) = (address_of(vip), key.port.to_be_bytes());
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
