//! `necp status`: what a network element shows of itself, as tables or as JSON.
//!
//! With `--json` one object is printed, [`Status`]: its fields and those of the types in it, by these names, are stable;
//! more may be added. Counters count from the creation of the maps on, over restarts of the daemon; those that end in
//! `_per_second` are what the last full second brought.

mod client;
pub mod render;

use std::borrow::Cow;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use client::{Args, fetch, run};

/// Everything at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The version of `necp` that runs.
    pub version: String,
    /// The daemon's process id.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// Whether it took over the maps of an earlier daemon.
    pub took_over: bool,
    /// The directory of the pinned maps.
    pub pin: String,
    /// Where servers connect to, `ADDRESS:PORT`.
    pub listen: Vec<String>,
    /// In the order of the configuration.
    pub interfaces: Vec<Interface>,
    /// Servers whose session is open.
    pub sessions: usize,
    /// TCP connections, those without a session included.
    pub connections: usize,
    /// In the order of the configuration.
    pub farms: Vec<Farm>,
    /// Exceptions of all servers (draft §5.7) that are in force.
    #[serde(default)]
    pub exceptions: u32,
    /// Exceptions that all servers together may have.
    #[serde(default)]
    pub max_exceptions: u32,
    /// All packets seen, by what became of them; every reason, the ones without packets too.
    pub packets: Vec<Packets>,
    /// Connections that came to nothing.
    pub strangers: Strangers,
    /// What authentication has kept out since the daemon started.
    #[serde(default)]
    pub rejected: Rejected,
    /// What an operator should look at; empty if all is well.
    pub alarms: Vec<String>,
    /// Writes to the maps that are being retried.
    pub pending_writes: usize,
    /// Writes to the maps that failed, each attempt counted.
    pub failed_writes: u64,
}

/// An interface that the packet path runs on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its kernel index.
    pub ifindex: u32,
    /// Its MAC address, `02:00:00:00:00:01`.
    pub mac: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// `native` or `generic`.
    pub mode: String,
}

/// One farm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Farm {
    /// Its name.
    pub name: String,
    /// Its virtual addresses.
    pub vips: Vec<IpAddr>,
    /// Destinations whose packets it intercepts.
    #[serde(default)]
    pub intercept: Vec<IpNet>,
    /// Whether its servers must prove who they are, by a key.
    #[serde(default)]
    pub authenticated: bool,
    /// In the order of the configuration.
    pub services: Vec<Service>,
    /// What its servers do not want.
    #[serde(default)]
    pub exceptions: Exceptions,
}

/// The exceptions of a farm's servers (draft §5.7) that are in force.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exceptions {
    /// For one server each.
    pub local: u32,
    /// For the whole farm.
    pub global: u32,
    /// Different combinations of prefix lengths, protocol or any, and port or any.
    pub masks: u32,
    /// The most masks that there may be.
    pub max_masks: u32,
    /// The most that one server may have.
    pub max_by_server: u32,
    /// Servers that have some, most first.
    pub by_server: Vec<ExceptionsOf>,
}

/// How many exceptions one server has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExceptionsOf {
    /// Its address.
    pub address: IpAddr,
    /// How many, in all of its farms.
    pub exceptions: u32,
}

/// One service of a farm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// `tcp/80`.
    pub service: String,
    /// `IPv4` or `IPv6`: of its VIPs and its servers. Each family has a slot table of its own.
    #[serde(default = "ipv4")]
    pub family: Cow<'static, str>,
    /// Size of its slot table.
    pub slots: u32,
    /// By address, then id.
    pub servers: Vec<Server>,
}

fn ipv4() -> Cow<'static, str> {
    "IPv4".into()
}

/// One server's offer of a service with one forwarding type: one server id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Server {
    /// The server id, as in the maps.
    pub id: u32,
    /// The server's address.
    pub address: IpAddr,
    /// `l2`, `gre` or `l3`.
    pub forwarding: Cow<'static, str>,
    /// `up`, `adopted`, `lost`, `kept`, `draining`, `stopped` or `dead`.
    pub state: Cow<'static, str>,
    /// Whether its next hop is known and answers.
    pub reachable: bool,
    /// Its last health index, 0 to 100; null before the first answer.
    pub health: Option<u8>,
    /// Its weight, health × capacity × slow start, in units of 1/100,000: 100,000 is a server of capacity 1.0 with health 100
    /// that is past its slow start. 0 if it gets no new flows.
    pub weight: u32,
    /// Slots that it owns.
    pub slots: u32,
    /// The same in per cent of the table.
    pub slots_percent: f64,
    /// Flows on record for it, as the collector's last full pass found them: only those that the slot table alone would
    /// misplace are on record.
    pub flows_on_record: u64,
    /// New flows so far.
    pub flows: u64,
    /// New flows per second.
    pub flows_per_second: f64,
    /// Packets so far.
    pub packets: u64,
    /// Packets per second.
    pub packets_per_second: f64,
    /// Bytes so far, from the Ethernet header on.
    pub bytes: u64,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Packets from it that got the VIP's address here (layer 3).
    pub replies: u64,
    /// It gets flows by layer 3, but its replies pass elsewhere: its clients do not know who answers.
    pub one_way: bool,
}

/// Packets that ended with one reason.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Packets {
    /// The reason's name.
    pub reason: Cow<'static, str>,
    /// `pass`, `transmit`, `answer`, `route` or `drop`.
    pub action: Cow<'static, str>,
    /// So far.
    pub packets: u64,
    /// Per second.
    pub per_second: f64,
}

/// Connections to the NECP port that came to nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Strangers {
    /// From an address that no farm admits: closed without an answer.
    pub not_admitted: u64,
    /// Beyond the limit of connections.
    pub too_many: u64,
    /// Never said INIT.
    pub silent: u64,
    /// Spoke something else, or did not begin with INIT; `http`, `tls` and `ssh` are among them.
    pub not_necp: u64,
    /// Spoke HTTP.
    #[serde(default)]
    pub http: u64,
    /// Spoke TLS.
    #[serde(default)]
    pub tls: u64,
    /// Spoke SSH.
    #[serde(default)]
    pub ssh: u64,
}

/// Messages, and sessions, that authentication has kept out (draft §5.8, §5.9).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// INITs without a credential from addresses that need one.
    pub unauthenticated: u64,
    /// INITs that ask for authentication from addresses without a key.
    pub no_key: u64,
    /// Messages with a wrong credential, INITs among them.
    pub bad_credential: u64,
    /// Messages without a credential on authenticated connections.
    pub stripped: u64,
    /// Messages with a sequence number that was used before, or does not belong there.
    pub bad_sequence: u64,
    /// Messages that are larger than what is authenticated.
    pub too_large: u64,
    /// Sessions that an authentic INIT began and nothing fresh followed: recorded INITs that were sent again.
    pub unconfirmed: u64,
}
