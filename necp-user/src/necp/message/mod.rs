//! What the units of each message mean, and which of them fail.
//!
//! Sub-word fields sit in the least significant bits; a unit with higher bits set, or with any field out of range, is
//! a failed unit. A field that has no meaning in its context is ignored, whatever it holds (§5.2.3).

mod exception;
pub(in crate::necp) mod extension;
mod family;
mod wide;

use std::net::IpAddr;

pub use exception::{Exception, Filter, Flows, Listed, Scope};
pub use extension::EXTENSION_QUERY;
pub use family::Family;

use super::service::{Forwarding, ServiceKey, TCP, UDP};
use super::wire::{Opcode, Unit, WideUnit};

/// Why a unit failed; the answer repeats the unit and says no more than that (§5.6.2), so this is for logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// data0 of START is none of 1, 2, 3 (§5.6.1).
    #[error("unknown forwarding type {0}")]
    Forwarding(u32),
    /// data1 is 0 or above 255.
    #[error("IP protocol {0} is out of range")]
    Protocol(u32),
    /// data2 is 0 or above 65,535 though the protocol is TCP or UDP.
    #[error("port {0} is out of range")]
    Port(u32),
    /// data0 of an exception is none of 0, 1, 2 (§5.7.1).
    #[error("unknown scope {0}")]
    Scope(u32),
    /// A prefix length is above 32 (IPv6: 128), or 0 for an address that is not 0 (§5.7.1).
    #[error("prefix length {0} is out of range")]
    PrefixLength(u32),
    /// The family of a wide unit is none that it may be about.
    #[error("family {0} is out of range")]
    Family(u8),
    /// An address is not of the family of its unit; an IPv4 address within IPv6 is IPv4.
    #[error("{0} is of the other address family")]
    Address(IpAddr),
    /// Source and destination of an exception are of different families.
    #[error("source and destination are of different address families")]
    Families,
    /// Bytes of a wide unit that mean nothing are not 0.
    #[error("reserved bytes are not 0")]
    Reserved,
    /// data0 of a query is not 1 (§5.5.1).
    #[error("unknown query type {0}")]
    QueryType(u32),
    /// data0 of INIT has bits above the lowest set (§5.4.1).
    #[error("unknown bits in INIT: {0:#x}")]
    InitFlags(u32),
    /// data3 of an answer is above 100 (§5.5.2).
    #[error("health index {0} is above 100")]
    Health(u32),
}

/// A unit of START (§5.6.1): data0 forwarding type, data1 IP protocol, data2 destination port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ServiceUnit {
    /// How the SE wants its datagrams.
    pub forwarding: Forwarding,
    /// IP protocol number, 1 to 255.
    pub protocol: u8,
    /// Destination port in host byte order, 1 to 65,535 for TCP and UDP, else without meaning.
    pub port: u16,
}

impl ServiceUnit {
    /// The offer of `service` with this forwarding type.
    #[must_use]
    pub fn new(forwarding: Forwarding, service: ServiceKey) -> Self {
        Self { forwarding, protocol: service.protocol(), port: service.port() }
    }

    /// What is offered.
    #[must_use]
    pub fn key(&self) -> ServiceKey {
        ServiceKey::new(self.protocol, self.port)
    }

    /// Reads a unit of START.
    pub fn parse(unit: &Unit) -> Result<Self, UnitError> {
        let forwarding = Forwarding::from_code(unit.0[0]).ok_or(UnitError::Forwarding(unit.0[0]))?;
        Ok(Self::new(forwarding, parse_service(unit)?))
    }

    /// The unit of START on the wire.
    #[must_use]
    pub fn unit(&self) -> Unit {
        service_unit(self.forwarding.code(), self.key())
    }
}

/// One unit of a START, STOP, EXCEPTION_ADD or EXCEPTION_DEL that is well formed, for the caller to carry out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Send future flows of this service to the SE too (§5.6.1). Idempotent; another forwarding type than before
    /// changes it for future flows.
    Start(ServiceUnit),
    /// Send it no future flows of this service (§5.6.3). Succeeds if there was nothing to stop.
    Stop(ServiceKey),
    /// Keep these flows from the SE, or from the farm (§5.7.1). One that exists is overwritten.
    Except(Exception),
    /// Forget the SE's own exception for exactly these flows (§5.7.3). Succeeds if there is none.
    Unexcept(Flows),
}

impl Operation {
    /// The service that it is about, if it is about one.
    #[must_use]
    pub fn service(&self) -> Option<ServiceKey> {
        match self {
            Self::Start(unit) => Some(unit.key()),
            Self::Stop(key) => Some(*key),
            Self::Except(_) | Self::Unexcept(_) => None,
        }
    }

    /// Reads a unit of a request that is made of operations; other opcodes have none.
    pub(super) fn parse(opcode: Opcode, unit: &Unit) -> Option<Self> {
        match opcode {
            Opcode::START => ServiceUnit::parse(unit).map(Self::Start),
            Opcode::STOP => Self::parse_stop(unit),
            Opcode::EXCEPTION_ADD => Exception::parse(unit).map(Self::Except),
            Opcode::EXCEPTION_DEL => Exception::parse_del(unit).map(Self::Unexcept),
            _ => return None,
        }
        .ok()
    }

    /// Reads a wide unit of a request that is made of operations; other opcodes have none.
    pub(super) fn parse_wide(opcode: Opcode, unit: &WideUnit) -> Option<Self> {
        match opcode {
            Opcode::EXCEPTION_ADD => Exception::parse_wide(unit).map(Self::Except),
            Opcode::EXCEPTION_DEL => Exception::parse_wide_del(unit).map(Self::Unexcept),
            _ => return None,
        }
        .ok()
    }

    /// Reads a unit of STOP (§5.6.3): as START's, but data0 is not read.
    pub fn parse_stop(unit: &Unit) -> Result<Self, UnitError> {
        parse_service(unit).map(Self::Stop)
    }

    /// The unit of STOP on the wire; data0 is 0.
    #[must_use]
    pub fn stop_unit(service: ServiceKey) -> Unit {
        service_unit(0, service)
    }
}

/// Query type of the Health Index, the only one that is known (§5.5.1).
pub const HEALTH_INDEX: u32 = 1;
/// The best health; 0 means "send me no work" (§5.5.2).
pub const HEALTH_MAX: u8 = 100;

/// A unit of KEEPALIVE that asks for the Health Index (§5.5.1): data0 query type 1, data1 IP protocol, data2 port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Query {
    /// The service whose health is asked for.
    pub service: ServiceKey,
}

impl Query {
    /// Reads a unit of KEEPALIVE; what fails here is an unsupported query.
    pub fn parse(unit: &Unit) -> Result<Self, UnitError> {
        let [kind, protocol, port, ..] = unit.0;
        if kind != HEALTH_INDEX {
            return Err(UnitError::QueryType(kind));
        }
        let protocol = u8::try_from(protocol).map_err(|_| UnitError::Protocol(protocol))?;
        let service = match protocol {
            TCP | UDP => ServiceKey::new(protocol, u16::try_from(port).map_err(|_| UnitError::Port(port))?),
            _ => ServiceKey::new(protocol, 0),
        };
        Ok(Self { service })
    }

    /// The unit of KEEPALIVE on the wire.
    #[must_use]
    pub fn unit(&self) -> Unit {
        service_unit(HEALTH_INDEX as u8, self.service)
    }
}

/// A unit of KEEPALIVE_ACK (§5.5.2): the query repeated, and data3 = the Health Index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HealthAnswer {
    /// The service that was asked about.
    pub service: ServiceKey,
    /// 0 to 100: 100 perfect, 1 barely able, 0 "send me no work until I rise above 0".
    pub health: u8,
}

impl HealthAnswer {
    /// Reads a unit of KEEPALIVE_ACK; an answer above 100 fails.
    pub fn parse(unit: &Unit) -> Result<Self, UnitError> {
        let Query { service } = Query::parse(unit)?;
        let health = u8::try_from(unit.0[3]).ok().filter(|health| *health <= HEALTH_MAX);
        Ok(Self { service, health: health.ok_or(UnitError::Health(unit.0[3]))? })
    }

    /// The unit that answers `query`: data0 to data2 as they came, then the answer.
    #[must_use]
    pub fn unit(query: &Unit, health: u8) -> Unit {
        let [kind, protocol, port, ..] = query.0;
        Unit([kind, protocol, port, u32::from(health.min(HEALTH_MAX)), 0, 0, 0, 0])
    }
}

/// INIT's only unit (§5.4.1): bit 0x1 of data0, and data1 (most significant) with data2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Init {
    /// If every message of the connection shall be authenticated: the sequence number that the SE wants to receive
    /// first.
    pub authenticate: Option<u64>,
}

impl Init {
    /// Reads INIT's unit.
    pub fn parse(unit: &Unit) -> Result<Self, UnitError> {
        match unit.0[0] {
            0 => Ok(Self { authenticate: None }),
            1 => Ok(Self { authenticate: Some(u64::from(unit.0[1]) << 32 | u64::from(unit.0[2])) }),
            other => Err(UnitError::InitFlags(other)),
        }
    }

    /// INIT's unit on the wire.
    #[must_use]
    pub fn unit(&self) -> Unit {
        let first = self.authenticate.unwrap_or(0);
        Unit([u32::from(self.authenticate.is_some()), (first >> 32) as u32, first as u32, 0, 0, 0, 0, 0])
    }
}

/// INIT_ACK's only unit (§5.4.2): data0 (most significant) with data1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InitAck {
    /// The sequence number that the NE wants to receive first; 0 on an unauthenticated connection.
    pub first_seq_num: u64,
}

impl InitAck {
    /// Reads INIT_ACK's unit; every value is legal.
    #[must_use]
    pub fn parse(unit: &Unit) -> Self {
        Self { first_seq_num: u64::from(unit.0[0]) << 32 | u64::from(unit.0[1]) }
    }

    /// INIT_ACK's unit on the wire.
    #[must_use]
    pub fn unit(&self) -> Unit {
        Unit([(self.first_seq_num >> 32) as u32, self.first_seq_num as u32, 0, 0, 0, 0, 0, 0])
    }
}

fn parse_service(unit: &Unit) -> Result<ServiceKey, UnitError> {
    let [_, protocol, port, ..] = unit.0;
    let protocol = match u8::try_from(protocol) {
        Ok(0) | Err(_) => return Err(UnitError::Protocol(protocol)),
        Ok(protocol) => protocol,
    };
    if protocol != TCP && protocol != UDP {
        return Ok(ServiceKey::new(protocol, 0));
    }
    match u16::try_from(port) {
        Ok(0) | Err(_) => Err(UnitError::Port(port)),
        Ok(port) => Ok(ServiceKey::new(protocol, port)),
    }
}

fn service_unit(data0: u8, service: ServiceKey) -> Unit {
    Unit([data0.into(), service.protocol().into(), service.port().into(), 0, 0, 0, 0, 0])
}

#[cfg(test)]
mod tests;
