//! What the cluster is configured with, as plain values; the configuration file is somebody else's.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use ipnet::IpNet;
use necp_ebpf::{abi, hash::fold6, packet::protocol};

/// Servers that join over it serve the VIPs of it.
pub use crate::necp::Family;

/// What a client asks for at a VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    /// IP protocol, not 0.
    pub protocol: u8,
    /// Destination port (host byte order); 0 exactly for protocols other than TCP and UDP.
    pub port: u16,
}

impl ServiceKey {
    /// From START's or STOP's fields (draft §5.6.1): the port has no meaning unless TCP or UDP.
    pub const fn new(protocol: u8, port: u16) -> Self {
        Self { protocol, port: if matches!(protocol, protocol::TCP | protocol::UDP) { port } else { 0 } }
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            protocol::TCP => write!(f, "tcp/{}", self.port),
            protocol::UDP => write!(f, "udp/{}", self.port),
            other => write!(f, "ip/{other}"),
        }
    }
}

/// How packets get to a server (draft §5.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Forwarding {
    /// Unchanged, to its MAC address.
    Layer2 = 1,
    /// Unchanged, inside GRE.
    Gre = 2,
    /// Addressed to it.
    Layer3 = 3,
}

impl Forwarding {
    /// From START's data0; none if the draft knows no such type.
    pub const fn from_wire(value: u32) -> Option<Self> {
        match value {
            1 => Some(Self::Layer2),
            2 => Some(Self::Gre),
            3 => Some(Self::Layer3),
            _ => None,
        }
    }

    /// Its name in configuration and status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Layer2 => "l2",
            Self::Gre => "gre",
            Self::Layer3 => "l3",
        }
    }
}

/// One farm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FarmConfig {
    /// Its name, unique.
    pub name: String,
    /// The VIPs; all offer all services, to servers of their family. None if the farm intercepts.
    pub vips: Vec<IpAddr>,
    /// Destinations whose packets it takes when they cross this host, other than to VIPs and to this host itself.
    pub intercept: Vec<IpNet>,
    /// What may be served.
    pub services: Vec<ServiceKey>,
    /// What forwarding types servers may ask for.
    pub forwarding: Vec<Forwarding>,
    /// Who may join.
    pub servers: Vec<IpNet>,
    /// Slots of each service's table; a prime.
    pub table_size: u32,
    /// How long after its session was lost a server keeps its flows while its host is not known to be gone.
    pub orphan_time: Duration,
    /// How long a TCP flow may be silent (RFC 5382: at least 2 h 4 min).
    pub tcp_idle: Duration,
    /// How long flows of other protocols may be silent.
    pub udp_idle: Duration,
    /// Flows of protocols other than TCP are recorded; false: consistent hashing alone places every packet.
    pub udp_tracking: bool,
    /// ICMP echo to its VIPs is the host's to answer; false: it is dropped.
    pub echo: bool,
    /// Seed of the flow hash; none: derived from the name.
    pub hash_seed: Option<u64>,
    /// Capacity by server, in thousandths; 1000 for those not named, at most 1,000,000.
    pub capacity: BTreeMap<IpAddr, u32>,
    /// Its servers' global exceptions are in force as such; else as local ones.
    pub global_exceptions: bool,
    /// Exceptions that one server may have. Of a server that several farms admit: the least of them.
    pub max_exceptions: u32,
}

impl FarmConfig {
    /// A farm with default times and sizes, for layer 2 and GRE; without VIPs, services and servers.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            vips: Vec::new(),
            intercept: Vec::new(),
            services: Vec::new(),
            forwarding: vec![Forwarding::Layer2, Forwarding::Gre],
            servers: Vec::new(),
            table_size: 65_537,
            orphan_time: Duration::from_secs(300),
            tcp_idle: Duration::from_secs(2 * 3600 + 4 * 60),
            udp_idle: Duration::from_secs(180),
            udp_tracking: true,
            echo: true,
            hash_seed: None,
            capacity: BTreeMap::new(),
            global_exceptions: false,
            max_exceptions: 65_536,
        }
    }

    /// The seed in force.
    pub fn seed(&self) -> u64 {
        self.hash_seed.unwrap_or_else(|| super::stable::hash_bytes(self.name.as_bytes()))
    }

    /// Whether it takes what crosses this host, instead of having VIPs.
    pub fn intercepts(&self) -> bool {
        !self.intercept.is_empty()
    }

    /// Addresses of its services in the service table: its VIPs of one family, or 0.0.0.0 or :: for what it intercepts of it.
    pub fn fronts(&self, family: Family) -> impl Iterator<Item = IpAddr> {
        let is_of = move |address: IpAddr| Family::of(address) == family;
        let crossing = self.intercept.iter().any(|net| is_of(net.addr())).then(|| family.any().addr());
        crossing.into_iter().chain(self.vips.iter().copied().filter(move |vip| is_of(*vip)))
    }

    /// Families that its services are offered on: each service has a slot table for each.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        Family::ALL.into_iter().filter(|family| self.fronts(*family).next().is_some())
    }

    /// Whether replies must find their flow: then every flow is recorded.
    pub fn expects_replies(&self) -> bool {
        self.forwarding.contains(&Forwarding::Layer3)
    }

    /// Whether this address may join.
    pub fn admits(&self, address: IpAddr) -> bool {
        self.servers.iter().any(|prefix| prefix.contains(&address))
    }

    /// Capacity of a server, in thousandths.
    pub fn capacity_of(&self, address: IpAddr) -> u32 {
        self.capacity.get(&address).copied().unwrap_or(super::weight::CAPACITY_ONE)
    }
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterConfig {
    /// The farms, in the order of the file.
    pub farms: Vec<FarmConfig>,
    /// Interval of keepalives: losses within one interval count as one event (the panic rule).
    pub keepalive: Duration,
    /// After a restart, how long adopted offers serve while their SE stays away.
    pub grace: Duration,
    /// How long a server that joins others takes to its full weight; zero: no slow start.
    pub slow_start: Duration,
    /// How long a closing TCP flow may be silent.
    pub closing: Duration,
    /// How long a SYN may go unanswered.
    pub half_open: Duration,
    /// Capacity of the map `slots`.
    pub slots: u32,
    /// Capacity of the map `servers`.
    pub servers: u32,
    /// Exceptions that all servers together may have.
    pub max_exceptions: u32,
    /// Forwarding types that the packet path has.
    pub implemented: Vec<Forwarding>,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            farms: Vec::new(),
            keepalive: Duration::from_secs(5),
            grace: Duration::from_secs(60),
            slow_start: Duration::from_secs(10),
            closing: Duration::from_secs(120),
            half_open: Duration::from_secs(60),
            slots: abi::DEFAULT_SLOTS,
            servers: abi::MAX_SERVERS,
            max_exceptions: abi::DEFAULT_EXCEPTIONS,
            implemented: vec![Forwarding::Layer2, Forwarding::Gre, Forwarding::Layer3],
        }
    }
}

/// Why a configuration cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Two farms of one name.
    #[error("two farms are named {0:?}: give each a name of its own")]
    FarmName(String),
    /// A time of less than a second, or more than a hundred days.
    #[error("{what} = {value:?} of {farm:?}: must be between 1 second and 100 days")]
    Time {
        /// The farm's name; empty for what all farms share.
        farm: String,
        /// The key.
        what: &'static str,
        /// Its value.
        value: Duration,
    },
    /// Not a prime, or too large.
    #[error("table_size = {size} of farm {farm:?}: must be a prime between 3 and 1048573 (the default is 65537)")]
    TableSize {
        /// The farm's name.
        farm: String,
        /// Its value.
        size: u32,
    },
    /// A capacity beyond [`CAPACITY_MAX`](super::weight::CAPACITY_MAX).
    #[error("capacity of {address} in farm {farm:?}: must be at most 1000")]
    Capacity {
        /// The farm's name.
        farm: String,
        /// The server.
        address: IpAddr,
    },
    /// Protocol 0, or TCP or UDP with port 0, or another protocol with a port.
    #[error(
        "service {service} of farm {farm:?}: TCP and UDP need a port, other protocols have none, protocol 0 is none"
    )]
    Service {
        /// The farm's name.
        farm: String,
        /// The service.
        service: ServiceKey,
    },
    /// Two farms, or one twice, claim the same service at the same address.
    #[error("{service} at {vip} is claimed twice, by farm {first:?} and farm {second:?}: give one of them another VIP")]
    Claimed {
        /// The VIP.
        vip: IpAddr,
        /// The service.
        service: ServiceKey,
        /// One farm.
        first: String,
        /// The other.
        second: String,
    },
    /// Two farms intercept the same service.
    #[error(
        "{service} is intercepted by farm {first:?} and by farm {second:?}: give it to one of them, with all prefixes"
    )]
    Intercepted {
        /// The service.
        service: ServiceKey,
        /// One farm.
        first: String,
        /// The other.
        second: String,
    },
    /// A farm that intercepts and has VIPs, or allows layer 3, whose packets are addressed to the server.
    #[error("farm {0:?} intercepts: it can have no VIPs, and its servers are reached by l2 or gre")]
    Interception(String),
    /// START names no farm (draft §5.6.1), so this would be ambiguous.
    #[error(
        "servers in {prefix} may join both farm {first:?} and farm {second:?} for {service}, and START names no farm: make `servers` of the two disjoint"
    )]
    Ambiguous {
        /// The narrower of the overlapping prefixes.
        prefix: IpNet,
        /// The service.
        service: ServiceKey,
        /// One farm.
        first: String,
        /// The other.
        second: String,
    },
    /// A bucket of the service table is full.
    #[error("{service} at {vip} finds no place in the service table: use another VIP or port, or fewer of them")]
    BucketFull {
        /// The VIP.
        vip: IpAddr,
        /// The service.
        service: ServiceKey,
    },
    /// A reply would have to look at too many VIPs.
    #[error(
        "more than {max} VIPs offer {service} in farms that allow l3: use fewer, or another port for some",
        max = abi::REPLY_VIPS
    )]
    TooManyReplies {
        /// The service.
        service: ServiceKey,
    },
    /// The packet path could not tell them apart.
    #[error(
        "the VIPs {first} and {second} look the same to the packet path (one pair in four billion does): use another one"
    )]
    Fold {
        /// One.
        first: Ipv6Addr,
        /// The other.
        second: Ipv6Addr,
    },
    /// More IPv6 VIPs than the maps have room for.
    #[error("more than {max} IPv6 VIPs, those of an earlier daemon included: use fewer", max = abi::MAX_VIPS6 - 1)]
    TooManyVips6,
    /// Too many entries for their ids.
    #[error("more than 32767 pairs of VIP and service: use fewer")]
    TooManyServices,
    /// More farms than the maps have room for.
    #[error("{0} farms are too many: at most {max}", max = abi::MAX_FARMS)]
    TooManyFarms(usize),
    /// Exceptions that a map of any size could not hold.
    #[error("max_exceptions = {0}: must be at most {max}", max = MAX_EXCEPTIONS)]
    TooManyExceptions(u32),
    /// The map `slots` is too small.
    #[error("the slot tables need {needed} slots and there are {capacity}: lower table_size, or make the map larger")]
    Slots {
        /// What all tables need together.
        needed: u64,
        /// What there is.
        capacity: u32,
    },
}

/// Exceptions that all servers together may have, at most.
pub const MAX_EXCEPTIONS: u32 = 1 << 24;

/// Slots that the tables of these farms need together.
pub fn slots_needed(farms: &[FarmConfig]) -> u64 {
    let tables = |farm: &FarmConfig| (farm.services.len() * farm.families().count()) as u64;
    farms.iter().map(|farm| tables(farm) * u64::from(farm.table_size)).sum()
}

impl ClusterConfig {
    /// Checks what can be checked without the maps.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.farms.len() > abi::MAX_FARMS as usize {
            return Err(ConfigError::TooManyFarms(self.farms.len()));
        }
        if self.max_exceptions > MAX_EXCEPTIONS {
            return Err(ConfigError::TooManyExceptions(self.max_exceptions));
        }
        for (what, value) in [("closing", self.closing), ("half_open", self.half_open)] {
            check_time("", what, value)?;
        }
        different_folds(&self.farms)?;
        for (index, farm) in self.farms.iter().enumerate() {
            if self.farms[..index].iter().any(|other| other.name == farm.name) {
                return Err(ConfigError::FarmName(farm.name.clone()));
            }
            farm.validate()?;
            for other in &self.farms[..index] {
                unambiguous(other, farm)?;
            }
        }
        Ok(())
    }
}

impl FarmConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let farm = || self.name.clone();
        for (what, value) in
            [("orphan_time", self.orphan_time), ("tcp_idle", self.tcp_idle), ("udp_idle", self.udp_idle)]
        {
            check_time(&self.name, what, value)?;
        }
        if self.table_size < 3 || self.table_size > abi::DEFAULT_SLOTS || !is_prime(self.table_size) {
            return Err(ConfigError::TableSize { farm: farm(), size: self.table_size });
        }
        for (&address, &capacity) in &self.capacity {
            if capacity > super::weight::CAPACITY_MAX {
                return Err(ConfigError::Capacity { farm: farm(), address });
            }
        }
        if self.intercepts() && (!self.vips.is_empty() || self.expects_replies()) {
            return Err(ConfigError::Interception(farm()));
        }
        for &service in &self.services {
            let has_port = matches!(service.protocol, protocol::TCP | protocol::UDP);
            if service.protocol == 0 || has_port != (service.port != 0) {
                return Err(ConfigError::Service { farm: farm(), service });
            }
        }
        Ok(())
    }
}

fn check_time(farm: &str, what: &'static str, value: Duration) -> Result<(), ConfigError> {
    if (Duration::from_secs(1)..=Duration::from_secs(100 * 86_400)).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::Time { farm: farm.to_owned(), what, value })
}

/// What stands for an IPv6 VIP in the service table.
pub(super) fn fold(vip: Ipv6Addr) -> [u8; 4] {
    fold6(halves(vip)).to_ne_bytes()
}

/// As they stand in a header.
pub(super) fn halves(address: Ipv6Addr) -> [u64; 2] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address.octets();
    [u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u64::from_ne_bytes([i, j, k, l, m, n, o, p])]
}

fn different_folds(farms: &[FarmConfig]) -> Result<(), ConfigError> {
    let mut folds = BTreeMap::new();
    for vip in farms.iter().flat_map(|farm| &farm.vips) {
        if let IpAddr::V6(second) = *vip
            && let Some(first) = folds.insert(fold(second), second).filter(|first| *first != second)
        {
            return Err(ConfigError::Fold { first, second });
        }
    }
    Ok(())
}

fn unambiguous(first: &FarmConfig, second: &FarmConfig) -> Result<(), ConfigError> {
    let Some(&service) = first.services.iter().find(|service| second.services.contains(service)) else {
        return Ok(());
    };
    for a in &first.servers {
        for b in &second.servers {
            if a.contains(b) || b.contains(a) {
                let prefix = if a.contains(b) { *b } else { *a };
                let (first, second) = (first.name.clone(), second.name.clone());
                return Err(ConfigError::Ambiguous { prefix, service, first, second });
            }
        }
    }
    Ok(())
}

fn is_prime(number: u32) -> bool {
    number > 1 && (2..).take_while(|d| d * d <= number).all(|d| !number.is_multiple_of(d))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn farm(name: &str, prefix: &str) -> FarmConfig {
        let mut farm = FarmConfig::new(name);
        farm.vips = vec![[192, 0, 2, 10].into()];
        farm.services = vec![ServiceKey::new(protocol::TCP, 80)];
        farm.servers = vec![prefix.parse().expect("a prefix")];
        farm
    }

    fn check(farms: Vec<FarmConfig>) -> Result<(), ConfigError> {
        ClusterConfig { farms, ..ClusterConfig::default() }.validate()
    }

    #[test]
    fn an_address_that_two_farms_admit_for_a_service_is_an_error() {
        let mut other = farm("b", "10.0.0.128/25");
        assert!(matches!(check(vec![farm("a", "10.0.0.0/24"), other.clone()]), Err(ConfigError::Ambiguous { .. })));
        other.services = vec![ServiceKey::new(protocol::TCP, 81)];
        assert_eq!(check(vec![farm("a", "10.0.0.0/24"), other]), Ok(()));
        assert_eq!(check(vec![farm("a", "10.0.0.0/24"), farm("b", "10.0.1.0/24")]), Ok(()));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let good = || farm("a", "10.0.0.0/24");
        assert_eq!(check(vec![good(), good()]), Err(ConfigError::FarmName("a".into())));
        let even = FarmConfig { table_size: 65_536, ..good() };
        assert!(matches!(check(vec![even]), Err(ConfigError::TableSize { size: 65_536, .. })));
        let hasty = FarmConfig { udp_idle: Duration::from_millis(10), ..good() };
        assert!(matches!(check(vec![hasty]), Err(ConfigError::Time { what: "udp_idle", .. })));
        let portless = FarmConfig { services: vec![ServiceKey { protocol: 6, port: 0 }], ..good() };
        assert!(matches!(check(vec![portless]), Err(ConfigError::Service { .. })));
        let interception = ConfigError::Interception("a".into());
        let intercept: Vec<IpNet> = vec!["0.0.0.0/0".parse().expect("a prefix")];
        let both = FarmConfig { intercept: intercept.clone(), ..good() };
        assert_eq!(check(vec![both.clone()]), Err(interception.clone()));
        let layer_3 = FarmConfig { vips: Vec::new(), forwarding: vec![Forwarding::Layer3], ..both.clone() };
        assert_eq!(check(vec![layer_3]), Err(interception));
        assert_eq!(check(vec![FarmConfig { vips: Vec::new(), ..both }]), Ok(()));
        let strong = FarmConfig { capacity: [(Ipv4Addr::LOCALHOST.into(), 1_000_001)].into(), ..good() };
        assert!(matches!(check(vec![strong]), Err(ConfigError::Capacity { .. })));
    }

    #[test]
    fn seeds_come_from_the_name_unless_configured() {
        let farm = FarmConfig::new("web");
        assert_eq!(farm.seed(), FarmConfig::new("web").seed());
        assert_ne!(farm.seed(), FarmConfig::new("api").seed());
        assert_eq!(FarmConfig { hash_seed: Some(7), ..farm }.seed(), 7);
    }

    #[test]
    fn ipv6_vips_that_look_the_same_are_named() {
        let mut seen = BTreeMap::new();
        // Those that differ in their last four bytes only never do.
        let host = |number: u64| u128::from(super::super::stable::mix(number));
        let vip = |number: u64| Ipv6Addr::from(0x2001_0db8_0000_0000_0000_0000_0000_0000 + host(number));
        let pair =
            (0..2_000_000).find_map(|host| seen.insert(fold(vip(host)), vip(host)).map(|first| (first, vip(host))));
        let (first, second) = pair.expect("there is one among some hundred thousand");
        let mut farms = vec![farm("a", "2001:db8:1::/64"), farm("b", "2001:db8:2::/64")];
        farms[0].vips = vec![first.into()];
        farms[1].vips = vec![first.into()];
        assert_eq!(check(farms.clone()), Ok(()), "the same one is not looked at here");
        farms[1].vips.push(second.into());
        assert_eq!(check(farms), Err(ConfigError::Fold { first, second }));
    }
}
