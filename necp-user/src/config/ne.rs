//! The network element's configuration: `necp ne --config FILE`.
//!
//! ```toml
//! interfaces = ["eth0"]
//! listen = ["0.0.0.0:3262"]
//!
//! [[farm]]
//! name = "web"
//! vips = ["192.0.2.10"]
//! services = ["tcp/80", "tcp/443"]
//! forwarding = ["l2"]
//! servers = ["10.0.0.0/24"]
//! auth = "none"
//! ```

mod auth;
mod check;
mod file;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use thiserror::Error;

use super::strict::{self, FileError, Mistake};
use crate::control::config::Family;
use crate::necp::{Forwarding, PORT, ServiceKey};

/// Where maps, program and links are pinned unless `pin` says otherwise.
pub const PIN: &str = "/sys/fs/bpf/necp";
/// Where the daemon answers `necp status` unless `socket` says otherwise.
pub const SOCKET: &str = "/run/necp/ne.sock";

/// What a network element is told; every value was checked.
#[derive(Debug, Clone, PartialEq)]
pub struct NeConfig {
    /// Names of the interfaces that the packet path runs on; whether they exist is found out at start.
    pub interfaces: Vec<String>,
    /// Where server elements connect to; none: port 3262 of all addresses, of both families as far as this host has them.
    pub listen: Vec<SocketAddr>,
    /// The directory of pinned maps, one per instance; [`PIN`] by default.
    pub pin: PathBuf,
    /// The Unix socket of `necp status`; [`SOCKET`] by default.
    pub socket: PathBuf,
    /// How the program is attached.
    pub mode: Mode,
    /// Whether the daemon puts the VIPs on this host, announces them and takes them away; true by default.
    pub manage_vips: bool,
    /// Time between two KEEPALIVEs (draft §5.5), 0.05 s to 1 h; 5 s by default.
    pub keepalive: Duration,
    /// After a restart: how long the offers of servers that have not come back serve on; 60 s by default.
    pub grace: Duration,
    /// Exceptions that all servers together may have (§5.7), at most 1,048,576, the default.
    pub max_exceptions: u32,
    /// TTL security (RFC 5082): how many hops servers are away at most, 1 being the same link; none by default.
    pub ttl_security: Option<NonZeroU8>,
    /// The farms, in the order of the file.
    pub farms: Vec<FarmConfig>,
    /// What is legal but will surprise, to be logged.
    pub notes: Vec<Mistake>,
}

/// One farm: servers behind one or more virtual addresses.
#[derive(Debug, Clone, PartialEq)]
pub struct FarmConfig {
    /// Its name, unique.
    pub name: String,
    /// The virtual addresses; none if it intercepts.
    pub vips: Vec<IpAddr>,
    /// Destinations whose packets it takes as they cross this host; none if it has virtual addresses.
    pub intercept: Vec<IpNet>,
    /// What may be started on each of them.
    pub services: Vec<ServiceKey>,
    /// What servers may ask for and this build can do.
    pub forwarding: Vec<Forwarding>,
    /// Who may join. No other farm admits any of these for any of the same services.
    pub servers: Vec<IpNet>,
    /// TCP-MD5 (RFC 2385): key files by prefix, each within `servers`; none by default.
    pub tcp_md5: Vec<(IpNet, PathBuf)>,
    /// How they prove who they are. No other farm that admits one of them says otherwise of it.
    pub auth: Auth,
    /// Slots per service, a prime; 65,537 by default.
    pub table_size: u32,
    /// How long flows of a lost server are kept when its host is not known to be gone; 300 s by default.
    pub orphan_time: Duration,
    /// Idle time of TCP flows on record; 7440 s by default (RFC 5382 §5).
    pub tcp_idle: Duration,
    /// Idle time of UDP flows on record; 180 s by default.
    pub udp_idle: Duration,
    /// Whether UDP flows are recorded; true by default. If not, every datagram goes where the slot table says.
    pub udp_tracking: bool,
    /// Whether the host answers ICMP echo to its VIPs; true by default. If not, the packet path drops it.
    pub echo: bool,
    /// Whether this farm's servers may install exceptions for all of its servers (§5.7); false by default: then those are
    /// in force for the server that installed them.
    pub global_exceptions: bool,
    /// Exceptions that one server may have; 65,536 by default. Of a server in several farms, the least.
    pub max_exceptions: u32,
    /// Seed of the flow hash: the same on every NE that shares this farm's traffic. If none, it comes from the name.
    pub hash_seed: Option<u64>,
    /// Relative capacity of servers, 0.01 to 1000; 1 for those that are not named.
    pub capacity: BTreeMap<IpAddr, f64>,
}

/// How the servers of a farm prove who they are (draft §5.8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// Not at all: whoever can send from their addresses can speak for them.
    None,
    /// With a key.
    Keys {
        /// The file of the key of all servers that have none of their own; without it, such servers cannot join.
        default: Option<PathBuf>,
        /// The files of keys of single servers.
        servers: BTreeMap<IpAddr, PathBuf>,
    },
}

/// How an address proves who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof<'a> {
    /// It need not.
    None,
    /// With the key in this file; without one it cannot.
    Key(Option<&'a Path>),
}

impl Auth {
    /// What holds for a server of the farm.
    pub fn of(&self, server: IpAddr) -> Proof<'_> {
        match self {
            Self::None => Proof::None,
            Self::Keys { default, servers } => {
                Proof::Key(servers.get(&server).or(default.as_ref()).map(PathBuf::as_path))
            }
        }
    }

    /// All files with keys.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let (default, servers) = match self {
            Self::None => (None, None),
            Self::Keys { default, servers } => (default.as_deref(), Some(servers)),
        };
        default.into_iter().chain(servers.into_iter().flat_map(BTreeMap::values).map(PathBuf::as_path))
    }
}

/// `auth none`, `key /etc/necp/web.key`, `key /etc/necp/web.key, 2 servers with their own`.
impl fmt::Display for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Keys { default, servers } = self else { return f.write_str("auth none") };
        match default {
            Some(path) => write!(f, "key {}", path.display())?,
            None => f.write_str("no common key")?,
        }
        match servers.len() {
            0 => Ok(()),
            1 => f.write_str(", 1 server with its own"),
            count => write!(f, ", {count} servers with their own"),
        }
    }
}

/// How the program is attached to interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// In the driver, or not at all.
    Native,
    /// In the kernel's own stack: on every driver, slower.
    Generic,
    /// Native, else generic, and the log says which.
    #[default]
    Auto,
}

/// Why a configuration is not used. Each line is `FILE:LINE:COLUMN: what to do`.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// It cannot be read, is no TOML, has an unknown key or a value of a wrong type.
    #[error(transparent)]
    File(#[from] FileError),
    /// Values that make no sense, all of them.
    #[error("{}", lines(path, mistakes))]
    Mistakes {
        /// The file that was read.
        path: PathBuf,
        /// At least one, in the order of the file's sections.
        mistakes: Vec<Mistake>,
    },
}

impl NeConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| FileError::Read { path: path.into(), source })?;
        Self::parse(&text).map_err(|mut mistakes| match mistakes.len() {
            1 => FileError::Mistake { path: path.into(), mistake: mistakes.remove(0) }.into(),
            _ => ConfigError::Mistakes { path: path.into(), mistakes },
        })
    }

    /// Reads and checks a text.
    ///
    /// # Errors
    /// The first mistake of form, else all those of content.
    pub fn parse(text: &str) -> Result<Self, Vec<Mistake>> {
        let file = strict::parse(text).map_err(|mistake| vec![mistake])?;
        check::check(text, file)
    }

    /// Where to listen: what was configured, or port 3262 of all addresses of both families.
    pub fn listens_on(&self) -> Vec<SocketAddr> {
        if !self.listen.is_empty() {
            return self.listen.clone();
        }
        [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)].map(|all| (all, PORT).into()).into()
    }

    /// Index of the first farm that admits this address, if any does: only those may join.
    pub fn admits(&self, address: IpAddr) -> Option<usize> {
        self.farms.iter().position(|farm| farm.admits(address))
    }

    /// How a server of this address proves who it is; `None` if no farm admits it.
    pub fn proof(&self, address: IpAddr) -> Option<Proof<'_>> {
        self.admits(address).map(|farm| self.farms[farm].auth.of(address))
    }

    /// Whether some farm's servers may ask for this forwarding type.
    pub fn allows(&self, forwarding: Forwarding) -> bool {
        self.farms.iter().any(|farm| farm.forwarding.contains(&forwarding))
    }

    /// Whether some farm has something to serve over this family.
    pub fn serves(&self, family: Family) -> bool {
        self.farms.iter().any(|farm| farm.serves(family))
    }

    /// Whether servers of this family may ask for one of these forwarding types.
    pub fn routes(&self, family: Family, by: &[Forwarding]) -> bool {
        let farms = self.farms.iter().filter(|farm| farm.serves(family));
        farms.flat_map(|farm| &farm.forwarding).any(|one| by.contains(one))
    }

    /// Whether some farm takes what of this family crosses this host.
    pub fn intercepts(&self, family: Family) -> bool {
        self.farms.iter().any(|farm| farm.intercepts(family))
    }

    /// All files with keys, each once.
    pub fn key_files(&self) -> BTreeSet<&Path> {
        self.farms.iter().flat_map(|farm| farm.auth.files()).collect()
    }

    /// Slots that the tables of all services take together; a service has one table for each family, however many addresses
    /// it is on.
    pub fn slots(&self) -> u32 {
        self.farms.iter().map(|farm| farm.table_size * farm.tables() as u32).sum()
    }
}

impl FarmConfig {
    /// Slot tables of the farm: each service has one for each family that it is offered on.
    pub fn tables(&self) -> usize {
        Family::ALL.into_iter().filter(|family| self.serves(*family)).count() * self.services.len()
    }

    /// Whether it has something to serve over this family.
    pub fn serves(&self, family: Family) -> bool {
        self.intercepts(family) || self.vips.iter().any(|vip| Family::of(*vip) == family)
    }

    /// Whether it takes what of this family crosses this host.
    pub fn intercepts(&self, family: Family) -> bool {
        self.intercept.iter().any(|net| Family::of(net.addr()) == family)
    }

    /// Whether a server of this address may join.
    pub fn admits(&self, address: IpAddr) -> bool {
        self.servers.iter().any(|net| net.contains(&address))
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Auto => "auto",
        })
    }
}

/// One line, as `necp ne --check` prints it: `web: 192.0.2.10 tcp/80 by l2, servers 10.0.0.0/24, …`.
impl fmt::Display for FarmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.intercept.is_empty() {
            true => list(&self.vips),
            false => format!("the way to {}", list(&self.intercept)),
        };
        write!(
            f,
            "{}: {} on {place} by {}, servers {}, {} slots per service, {}",
            self.name,
            list(&self.services),
            list(&self.forwarding),
            list(&self.servers),
            self.table_size,
            self.auth
        )
    }
}

fn list<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(" ")
}

fn lines(path: &Path, mistakes: &[Mistake]) -> String {
    let line = |mistake| format!("{}:{mistake}", path.display());
    mistakes.iter().map(line).collect::<Vec<_>>().join("\n")
}
