//! Exceptions (draft §5.7): flows that an SE does not want though a START covers them.
//!
//! An entry belongs to the SE that installed it, while that has its session: INIT, RESET and the loss of the session take
//! all of its entries away, STOP none. Whatever a list says, it is for new flows; those in progress stay where they are.

mod keys;
mod listing;
mod store;

use std::{net::IpAddr, time::Instant};

use necp_ebpf::abi;

use super::cluster::{Change, Cluster, Session};
use crate::necp::message::{Exception, Family, Filter, Flows};

pub use keys::Record;
pub use listing::Listing;
pub(super) use store::Store;

/// Why a unit of EXCEPTION_ADD fails (draft §5.7.1). Nothing has changed then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExceptError {
    /// No INIT, or its session is lost.
    #[error("no session")]
    NoSession,
    /// The SE has as many entries as it may.
    #[error("the server has {0} exceptions, and may have no more: raise the farm's `max_exceptions`")]
    TooMany(u32),
    /// All SEs together have as many entries as there may be.
    #[error(
        "there are {0} exceptions, and there may be no more: raise `max_exceptions` at the top of the configuration"
    )]
    Full(u32),
    /// The entry would need one more combination of prefix lengths, protocol or any, and port or any.
    #[error("farm {0:?} has {max} different masks in use, and may have no more: use fewer prefix lengths", max = MASKS)]
    TooManyMasks(String),
    /// As many SEs as may have a local entry for these very flows have one.
    #[error("{max} servers of farm {0:?} have a local exception for the same flows, and no more may", max = INSTALLERS)]
    TooManyInstallers(String),
    /// They are of the other address family than the SE, which gets no such flows.
    #[error("{flows}: the server has joined over {server}, and gets {server} flows only")]
    Family {
        /// The flows.
        flows: Flows,
        /// The SE's family.
        server: Family,
    },
    /// Server records have no number left for the SE.
    #[error("more than {max} servers: this one can have no local exceptions", max = u16::MAX)]
    TooManyHosts,
}

/// Different masks in use in a farm, at most.
pub const MASKS: usize = abi::EXCEPTION_MASKS;
/// SEs with a local entry for the same flows in a farm, at most.
pub const INSTALLERS: usize = abi::EXCEPTION_INSTALLERS;

/// How many exceptions there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExceptionCounts {
    /// Entries in force of all SEs.
    pub entries: u32,
    /// Entries that there may be ([`ClusterConfig::max_exceptions`](super::config::ClusterConfig::max_exceptions)).
    pub limit: u32,
}

/// The exceptions of one farm: of all SEs that it admits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FarmExceptions {
    /// Entries in force as local.
    pub local: u32,
    /// Entries in force as global.
    pub global: u32,
    /// Different masks in use, at most [`MASKS`].
    pub masks: u32,
}

impl Cluster {
    /// A unit of EXCEPTION_ADD (draft §5.7.1). Overwrites scope and time to live of an entry for the same flows.
    ///
    /// In force in all farms that admit the SE; global only in those that trust it, else local.
    pub fn except_add(&mut self, address: IpAddr, exception: &Exception, now: Instant) -> Result<Change, ExceptError> {
        let host = self.hosts.get(&address).filter(|host| host.session == Session::Up).ok_or(ExceptError::NoSession)?;
        let number = host.number;
        if number == 0 {
            return Err(ExceptError::TooManyHosts);
        }
        let exception = Exception { flows: flows_of(address, &exception.flows)?, ..*exception };
        let change = self.begin();
        self.exceptions.add(&self.config, (address, number), &exception, change, now)?;
        Ok(change)
    }

    /// A unit of EXCEPTION_DEL (draft §5.7.3): the SE's own entry goes. Of something that is not there: nothing happens.
    pub fn except_del(&mut self, address: IpAddr, flows: &Flows, _now: Instant) -> Result<Change, ExceptError> {
        let flows = flows_of(address, flows)?;
        let change = self.begin();
        self.exceptions.delete(address, &flows, change);
        Ok(change)
    }

    /// EXCEPTION_RESET (draft §5.7.5): all of the SE's own entries go.
    ///
    /// They are not listed any more from now on. If there are many, they leave the maps in several plans; until the last of
    /// them [`Applied::outcome`](super::plan::Applied::outcome) says none.
    pub fn except_reset(&mut self, address: IpAddr, _now: Instant) -> Change {
        let change = self.begin();
        self.exceptions.doom(address, change);
        change
    }

    /// EXCEPTION_QUERY (draft §5.7.7): a listing of the entries that are in force now.
    pub fn except_list(&self, filter: Filter) -> Listing {
        Listing::new(filter, self.exceptions.youngest())
    }

    /// How many exceptions there are.
    pub fn exception_counts(&self) -> ExceptionCounts {
        self.exceptions.counts()
    }

    /// The exceptions of one farm, by its index in the configuration.
    pub fn farm_exceptions(&self, farm: usize) -> FarmExceptions {
        self.exceptions.farm(farm)
    }

    /// How many exceptions of this SE are in force.
    pub fn exceptions_of(&self, address: IpAddr) -> u32 {
        self.exceptions.count_of(address)
    }
}

/// What an SE means by these flows: its own family's. Wildcards of IPv4 are how a basic unit says any address.
fn flows_of(server: IpAddr, flows: &Flows) -> Result<Flows, ExceptError> {
    let family = Family::of(server);
    if flows.family() == family {
        Ok(*flows)
    } else if flows.has_no_address() && family == Family::V6 {
        Ok(Flows { protocol: flows.protocol, port: flows.port, ..Flows::all(family) })
    } else {
        Err(ExceptError::Family { flows: *flows, server: family })
    }
}

#[cfg(test)]
mod tests;
