//! What the agent is told: the command line, a file with the same keys, and what the two make together.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU8;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args as ClapArgs;
use serde::{Deserialize, Deserializer};
use thiserror::Error;

use super::decap::DecapOn;
use super::health::HealthSource;
use crate::client::{HealthIndex, NeAddress};
use crate::config::strict::{self, FileError, Text};
use crate::necp::service::TCP;
use crate::necp::{ServiceKey, ServiceUnit};
use crate::secret::KeyFileError;
use crate::secret::tcp_security::{Md5Key, Protection};

/// Where the lock is unless told otherwise.
const LOCK: &str = "/run/necp/se.lock";

/// `necp se`: the agent of a server (SE). It tells the network elements (NE) what this server serves and how healthy it
/// is, and leaves only when its connections have ended.
#[derive(Debug, Clone, Default, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A network element to join: 10.0.0.1, [2001:db8::1]:3262 or a name; the port is 3262 unless given. Repeat it for several
    #[arg(long, value_name = "ADDR[:PORT]")]
    pub ne: Vec<NeAddress>,
    /// What this server serves and how it wants its packets: SERVICE=FORWARDING, as tcp/80=l2, udp/443=gre, tcp/22=l3
    #[arg(long, value_name = "SERVICE=FORWARDING")]
    pub serve: Vec<Offer>,
    /// Where the Health Index (0-100) comes from: constant:N, exec:COMMAND, http://HOST[:PORT]/PATH, load, psi or
    /// file:PATH [default: constant:100]
    #[arg(long, value_name = "SOURCE")]
    pub health: Option<HealthSource>,
    /// Time between two evaluations of the health source [default: 1]
    #[arg(long, value_name = "SECS")]
    pub health_interval: Option<Seconds>,
    /// How long one evaluation may take before it counts as failed (health 0) [default: 2]
    #[arg(long, value_name = "SECS")]
    pub health_timeout: Option<Seconds>,
    /// The address to dial from, which is the one that the network element knows this server by
    #[arg(long, value_name = "ADDR")]
    pub source: Option<IpAddr>,
    /// Time between two keepalives; three unanswered ones and the network element is dead [default: 5]
    #[arg(long, value_name = "SECS")]
    pub keepalive: Option<Seconds>,
    /// The longest time between two attempts to connect; they begin 1 s apart and double [default: 256]
    #[arg(long, value_name = "SECS")]
    pub retry_max: Option<Seconds>,
    /// At the end, how long to wait for this server's connections to end [default: 30]
    #[arg(long, value_name = "SECS")]
    pub drain: Option<Seconds>,
    /// A virtual address to set up on lo while the agent runs, so that neither ARP nor neighbour discovery knows it (layer 2
    /// and GRE). Repeat it for several
    #[arg(long, value_name = "ADDR")]
    pub vip: Vec<IpAddr>,
    /// Take the outer headers of GRE off, for a kernel without a GRE device: an XDP program on the interface that the network
    /// elements' packets come by, or on this one. It stays if the agent crashes, until the next one starts
    #[arg(long, value_name = "INTERFACE", num_args = 0..=1, default_missing_value = "auto")]
    pub decap: Option<DecapOn>,
    /// Besides those of --ne, an address whose GRE is unwrapped. Repeat it for several
    #[arg(long, value_name = "ADDR")]
    pub decap_from: Vec<IpAddr>,
    /// The file of the key that this server shares with the network elements: with it all sessions are authenticated, and
    /// none is opened without. It is for its owner only (chmod 600), and has at least 16 bytes
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// The lock that keeps a second agent from this host [default: /run/necp/se.lock]
    #[arg(long, value_name = "PATH")]
    pub lock: Option<PathBuf>,
    /// TTL security (GTSM, RFC 5082), as the network element has it: send with TTL 255, and drop what has come over more
    /// hops than these; 1, or no number, is the same link
    #[arg(long, value_name = "HOPS", num_args = 0..=1, default_missing_value = "1")]
    pub ttl_security: Option<NonZeroU8>,
    /// Sign every TCP segment with the key in this file (TCP-MD5, RFC 2385), as the network element's `tcp_md5` has it;
    /// mode 600
    #[arg(long, value_name = "FILE")]
    pub tcp_md5_file: Option<PathBuf>,
    /// The socket that `necp except`, `drain`, `resume` and `health` speak to [default: beside the lock,
    /// /run/necp/se.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// A TOML file with the same keys (ne, serve, health, source, keepalive, retry_max, drain, vips, decap, key_file, lock,
    /// ...); the command line wins
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  A web server that takes its packets unchanged, with the virtual address on lo:
    necp se --ne 10.0.0.1 --serve tcp/80=l2 --serve tcp/443=l2 --vip 192.0.2.10 --health http://127.0.0.1/healthz

  Two network elements, health by a command (exit code 0, or a number from 0 to 100 on its output):
    necp se --ne 10.0.0.1 --ne 10.0.0.2 --serve udp/53=l2 --health 'exec:dig +time=1 @127.0.0.1 example.com >/dev/null'

  With the key that the network element has for this server:
    necp se --ne 10.0.0.1 --serve tcp/80=l2 --key-file /etc/necp/se.key

  A server in another network, whose packets come in GRE; its kernel needs no GRE device:
    necp se --ne 10.0.0.1 --serve tcp/80=gre --vip 192.0.2.10 --decap

  IPv4 and IPv6: a session over each, which is for the virtual addresses of its family:
    necp se --ne 10.0.0.1 --ne '[2001:db8::1]' --serve tcp/80=l2 --vip 192.0.2.10 --vip 2001:db8:1::10

  From a file (ne = [\"10.0.0.1\"], serve = [\"tcp/80=l2\"], health = \"load\", vips = [\"192.0.2.10\"]):
    necp se --config /etc/necp/se.toml

While it runs, `necp except`, `necp drain`, `necp resume`, `necp health` and `necp status --agent` speak to it over its
socket. What they changed ends with it.

SIGTERM and SIGINT: STOP everywhere, wait for the connections of the served ports to end (at most --drain), leave.
A second signal: leave at once.";

/// The file of `--config`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    ne: Vec<Text<NeAddress>>,
    serve: Vec<Text<Offer>>,
    health: Option<Text<HealthSource>>,
    health_interval: Option<Seconds>,
    health_timeout: Option<Seconds>,
    source: Option<Text<IpAddr>>,
    keepalive: Option<Seconds>,
    retry_max: Option<Seconds>,
    drain: Option<Seconds>,
    vips: Vec<Text<IpAddr>>,
    decap: Option<Text<DecapOn>>,
    decap_from: Vec<Text<IpAddr>>,
    key_file: Option<PathBuf>,
    lock: Option<PathBuf>,
    ttl_security: Option<NonZeroU8>,
    tcp_md5_file: Option<PathBuf>,
    socket: Option<PathBuf>,
}

/// All that the agent needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The network elements to join; at least one, no two the same.
    pub nes: Vec<NeAddress>,
    /// What to START everywhere; no service twice. Empty is a session that serves nothing (§5.4).
    pub offers: Vec<ServiceUnit>,
    /// Where the Health Index comes from.
    pub health: HealthSource,
    /// Time between two evaluations of it.
    pub health_interval: Duration,
    /// How long one may take.
    pub health_timeout: Duration,
    /// The local address to dial from.
    pub source: Option<IpAddr>,
    /// Time between two KEEPALIVEs (§5.5).
    pub keepalive: Duration,
    /// Longest time between two attempts to connect, at least 1 s (§5.4).
    pub retry_max: Duration,
    /// How long to wait for connections at the end.
    pub drain: Duration,
    /// Virtual addresses to set up on `lo`.
    pub vips: Vec<IpAddr>,
    /// Where GRE is unwrapped, if it is.
    pub decap: Option<DecapOn>,
    /// Whose GRE besides the network elements'.
    pub decap_from: Vec<IpAddr>,
    /// The file of the key that is shared with the network elements (§5.8).
    pub key_file: Option<PathBuf>,
    /// The lock file; the file of sequence numbers is beside it.
    pub lock: PathBuf,
    /// What protects the TCP connections.
    pub protection: Protection,
    /// The agent's socket.
    pub socket: PathBuf,
}

/// Why the agent cannot start as it was told to.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The file of `--config`.
    #[error(transparent)]
    File(#[from] FileError),
    /// The key file of TCP-MD5.
    #[error(transparent)]
    Md5(#[from] KeyFileError),
    /// No network element.
    #[error("no network element to join: give at least one with `--ne ADDR[:PORT]` (or `ne = [..]` in the file)")]
    NoNe,
    /// The same network element twice.
    #[error("the network element {0} is named twice")]
    NeTwice(NeAddress),
    /// The same service twice.
    #[error("the service {0} is offered twice; a service has one forwarding type")]
    ServiceTwice(ServiceKey),
    /// A time that makes no sense for its purpose.
    #[error("{name} must be from {least} to {most} seconds")]
    OutOfRange {
        /// The option, as on the command line.
        name: &'static str,
        /// Least value in seconds.
        least: f64,
        /// Greatest value in seconds.
        most: f64,
    },
    /// An address that cannot be a VIP.
    #[error("{0} cannot be a virtual address of a server")]
    Vip(IpAddr),
    /// Link-local addresses mean something on one link only, and an NE has no place for that link.
    #[error("{0} is link-local: a server joins from, and to, an address that is known beyond its link")]
    LinkLocal(IpAddr),
    /// `--source` and a network element's address are of different families.
    #[error("{ne} cannot be dialled from {from}: one is IPv4, the other IPv6")]
    Family {
        /// The network element.
        ne: NeAddress,
        /// The address of `--source`.
        from: IpAddr,
    },
}

impl Settings {
    /// Reads the file that `args` names, if any, and lays the command line over it: an option that is given replaces
    /// the file's, lists as a whole.
    ///
    /// # Errors
    /// See [`SettingsError`].
    pub fn load(args: Args) -> Result<Self, SettingsError> {
        let file: File = args.config.as_deref().map(strict::read_file).transpose()?.unwrap_or_default();
        Self::merge(args, file)
    }

    fn merge(args: Args, file: File) -> Result<Self, SettingsError> {
        fn list<T>(first: Vec<T>, second: Vec<Text<T>>) -> Vec<T> {
            if first.is_empty() { second.into_iter().map(|Text(value)| value).collect() } else { first }
        }
        let time = |name, first: Option<Seconds>, second: Option<Seconds>, default, range| {
            in_range(name, first.or(second).map_or(default, |Seconds(value)| value), range)
        };
        let lock = args.lock.or(file.lock).unwrap_or_else(|| LOCK.into());
        let this = Self {
            nes: list(args.ne, file.ne),
            offers: list(args.serve, file.serve).into_iter().map(|Offer(unit)| unit).collect(),
            health: args
                .health
                .or(file.health.map(|Text(source)| source))
                .unwrap_or(HealthSource::Constant(HealthIndex::FULL)),
            health_interval: time(
                "--health-interval",
                args.health_interval,
                file.health_interval,
                1.0,
                (0.01, 3600.0),
            )?,
            health_timeout: time("--health-timeout", args.health_timeout, file.health_timeout, 2.0, (0.01, 3600.0))?,
            source: args.source.or(file.source.map(|Text(address)| address)).map(|address| address.to_canonical()),
            keepalive: time("--keepalive", args.keepalive, file.keepalive, 5.0, (0.01, 3600.0))?,
            retry_max: time("--retry-max", args.retry_max, file.retry_max, 256.0, (1.0, 86_400.0))?,
            drain: time("--drain", args.drain, file.drain, 30.0, (0.0, 604_800.0))?,
            vips: list(args.vip, file.vips).iter().map(IpAddr::to_canonical).collect(),
            decap: args.decap.or(file.decap.map(|Text(on)| on)),
            decap_from: list(args.decap_from, file.decap_from).iter().map(IpAddr::to_canonical).collect(),
            socket: args.socket.or(file.socket).unwrap_or_else(|| lock.with_extension("sock")),
            lock,
            key_file: args.key_file.or(file.key_file),
            protection: Protection {
                ttl_hops: args.ttl_security.or(file.ttl_security),
                md5: args.tcp_md5_file.or(file.tcp_md5_file).as_deref().map(Md5Key::read).transpose()?,
            },
        };
        this.check()?;
        Ok(this)
    }

    /// The TCP ports that are served.
    pub fn tcp_ports(&self) -> BTreeSet<u16> {
        let keys = self.offers.iter().map(ServiceUnit::key);
        keys.filter(|key| key.protocol() == TCP).map(ServiceKey::port).collect()
    }

    fn check(&self) -> Result<(), SettingsError> {
        if self.nes.is_empty() {
            return Err(SettingsError::NoNe);
        }
        for (at, ne) in self.nes.iter().enumerate() {
            if self.nes[..at].contains(ne) {
                return Err(SettingsError::NeTwice(ne.clone()));
            }
            let to = ne.host.parse::<IpAddr>().ok().map(|to| to.to_canonical());
            if let (Some(from), Some(to)) = (self.source, to)
                && from.is_ipv4() != to.is_ipv4()
            {
                return Err(SettingsError::Family { ne: ne.clone(), from });
            }
            if let Some(local) = [self.source, to].into_iter().flatten().find(is_link_local) {
                return Err(SettingsError::LinkLocal(local));
            }
        }
        for (at, offer) in self.offers.iter().enumerate() {
            if self.offers[..at].iter().any(|other| other.key() == offer.key()) {
                return Err(SettingsError::ServiceTwice(offer.key()));
            }
        }
        let unfit = |vip: &&IpAddr| {
            let reserved = matches!(vip, IpAddr::V4(vip) if vip.octets()[0] >= 240);
            vip.is_unspecified() || vip.is_loopback() || vip.is_multicast() || reserved || is_link_local(vip)
        };
        self.vips.iter().find(unfit).map_or(Ok(()), |vip| Err(SettingsError::Vip(*vip)))
    }
}

/// fe80::/10; 169.254.0.0/16 is an address as any other here.
fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn in_range(name: &'static str, value: f64, (least, most): (f64, f64)) -> Result<Duration, SettingsError> {
    if (least..=most).contains(&value) {
        Ok(Duration::from_secs_f64(value))
    } else {
        Err(SettingsError::OutOfRange { name, least, most })
    }
}

/// A time in seconds, fractions allowed; never negative, never without end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seconds(f64);

impl Seconds {
    fn new(value: f64) -> Result<Self, &'static str> {
        if value.is_finite() && value >= 0.0 {
            Ok(Self(value))
        } else {
            Err("a time is a number of seconds, such as 5 or 0.5")
        }
    }
}

impl Seconds {
    /// The same as a duration; what is too long for one is the longest.
    #[must_use]
    pub fn duration(self) -> Duration {
        Duration::try_from_secs_f64(self.0).unwrap_or(Duration::from_secs(u32::MAX.into()))
    }
}

impl FromStr for Seconds {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::new(text.parse().unwrap_or(f64::NAN))
    }
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(f64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// `SERVICE=FORWARDING`, as `tcp/80=l2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer(pub ServiceUnit);

/// Why a text is no offer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseOfferError {
    /// There is no `=` in it.
    #[error("`{0}` lacks its forwarding type; write {0}=l2, {0}=gre or {0}=l3")]
    NoForwarding(String),
    /// One of the two parts is wrong.
    #[error("{0}")]
    Part(String),
}

impl FromStr for Offer {
    type Err = ParseOfferError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (service, forwarding) = text.split_once('=').ok_or_else(|| ParseOfferError::NoForwarding(text.into()))?;
        let service = service.trim().parse().map_err(|error| ParseOfferError::Part(format!("{error}")))?;
        let forwarding = forwarding.trim().parse().map_err(|error| ParseOfferError::Part(format!("{error}")))?;
        Ok(Self(ServiceUnit::new(forwarding, service)))
    }
}

#[cfg(test)]
mod tests;
