//! What is said on the agent's socket: one line of JSON asks, one answers.
//!
//! ```text
//! {"command":"status"}                                                   {"status":{…}}
//! {"command":"except-add","src":"203.0.113.0/24","port":"tcp/80","ttl":300,"scope":"global"}
//!                                                                        {"answers":[{"ne":…,"result":…},…]}
//! {"command":"except-del","src":"203.0.113.0/24","port":"tcp/80"}        the same
//! {"command":"except-reset"}, {"command":"drain"}, {"command":"resume"}  the same
//! {"command":"except-list","installer":"10.0.0.11"}                      the same, with `entries`
//! {"command":"health"}, {"command":"health","set":40}, …"set":"auto"}    {"health":{…}}
//! ```
//! The fields, by these names, are stable; more may be added.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::words::{Ports, Prefix, ScopeName};
use crate::necp::{Flows, Listed};

/// A question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Everything at one moment.
    Status,
    /// An exception for these flows.
    ExceptAdd {
        /// Source addresses; any unless given.
        #[serde(default)]
        src: Prefix,
        /// Destination addresses; any unless given.
        #[serde(default)]
        dst: Prefix,
        /// Protocol and destination port; any unless given.
        #[serde(default)]
        port: Ports,
        /// Seconds to live; 0, until it is deleted, unless given.
        #[serde(default)]
        ttl: u32,
        /// Local unless given.
        #[serde(default)]
        scope: ScopeName,
    },
    /// No exception for exactly these flows any more.
    ExceptDel {
        /// Source addresses.
        #[serde(default)]
        src: Prefix,
        /// Destination addresses.
        #[serde(default)]
        dst: Prefix,
        /// Protocol and destination port.
        #[serde(default)]
        port: Ports,
    },
    /// No exception of this server any more.
    ExceptReset,
    /// The exceptions of all servers that match.
    ExceptList {
        /// With this source; any unless given.
        #[serde(default)]
        src: Option<Prefix>,
        /// With this destination.
        #[serde(default)]
        dst: Option<Prefix>,
        /// With this protocol, and port if there is one.
        #[serde(default)]
        port: Option<Ports>,
        /// With this scope in force.
        #[serde(default)]
        scope: Option<ScopeName>,
        /// Of this server.
        #[serde(default)]
        installer: Option<IpAddr>,
    },
    /// STOP everywhere.
    Drain,
    /// START everywhere.
    Resume,
    /// The Health Index, after setting it if told so.
    Health {
        /// Nothing unless given.
        #[serde(default)]
        set: Option<HealthSetting>,
    },
}

impl Request {
    /// All commands by name.
    pub const COMMANDS: &str = "status, except-add, except-del, except-reset, except-list, drain, resume, health";
}

/// What to set the Health Index to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum HealthSetting {
    /// 0 to 100, whatever the source says.
    Index(u8),
    /// What the source says.
    Auto(Auto),
}

/// The word `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Auto {
    /// The only one.
    Auto,
}

/// What one network element answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeAnswer {
    /// `10.0.0.1:3262`.
    pub ne: String,
    /// What came of it.
    pub result: Outcome,
    /// Why it was not done.
    pub why: Option<String>,
    /// For a list, what it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entries: Option<Vec<Entry>>,
    /// For a list, whether there are more, which were left out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
}

/// What came of a request at one network element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is done.
    Accepted,
    /// It was not asked: the exception is of the other address family than the session with it.
    #[serde(rename = "other-family")]
    OtherFamily,
    /// It will not do it.
    Refused,
    /// There is no session.
    Away,
    /// The session ended before the answer.
    Lost,
    /// It has not answered in time.
    Timeout,
}

/// One exception in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The server that installed it.
    pub installer: IpAddr,
    /// The scope in force.
    pub scope: ScopeName,
    /// Source addresses.
    pub src: Prefix,
    /// Destination addresses.
    pub dst: Prefix,
    /// Protocol and destination port.
    pub port: Ports,
}

/// The agent at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The version of `necp` that runs.
    pub version: String,
    /// The agent's process id.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// False while drained.
    pub serving: bool,
    /// What is offered, `tcp/80=l2`.
    pub services: Vec<String>,
    /// TCP connections of the served ports; null if they cannot be counted.
    pub connections: Option<usize>,
    /// How healthy the server is.
    pub health: HealthStatus,
    /// Exceptions of this agent that have not expired.
    pub exceptions: ExceptionCount,
    /// In the order of the settings.
    pub nes: Vec<NeStatus>,
}

/// The Health Index and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthStatus {
    /// What the network elements are told, 0 to 100.
    pub index: u8,
    /// Where it comes from, as `--health` names it.
    pub source: String,
    /// What the source says, 0 to 100.
    pub source_index: u8,
    /// Whether `necp health` has overridden the source.
    pub overridden: bool,
}

/// Exceptions by the scope that was asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExceptionCount {
    /// "Not to me."
    pub local: usize,
    /// "To no server of the farm."
    pub global: usize,
}

/// How things stand with one network element.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeStatus {
    /// `10.0.0.1:3262`.
    pub ne: String,
    /// `serving`, `drained` (STOP was acknowledged), `joined` (neither yet) or `away`.
    pub state: String,
    /// Seconds for which there has been a session, or none.
    pub since_seconds: u64,
    /// The address that this server is known by there.
    pub address: Option<IpAddr>,
    /// Services that it has acknowledged as started.
    pub started: Vec<String>,
    /// Services that it has refused.
    pub refused: Vec<String>,
    /// Its own Health Index.
    pub health: Option<u8>,
    /// Why it is away.
    pub why: Option<String>,
}

impl From<&Listed> for Entry {
    fn from(listed: &Listed) -> Self {
        let Flows { source, destination, protocol, port } = listed.flows;
        Self {
            installer: listed.installer,
            scope: ScopeName(listed.scope),
            src: Prefix(source),
            dst: Prefix(destination),
            port: Ports { protocol, port },
        }
    }
}
