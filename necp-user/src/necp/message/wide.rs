//! Wide units about exceptions, which have room for IPv6: the layout of the extension's version 1.
//!
//! ```text
//!   0  scope                     as data0 of the basic unit (§5.7.1)
//!   1  family of the flows       6; in EXCEPTION_RESP 4 too, in EXCEPTION_QUERY 4, 6 or 0, any
//!   2  source prefix length      0 to 128, to 32 for IPv4; without meaning if the address is 0
//!   3  destination prefix length likewise
//!   4  IP protocol               0 any
//!   5  0
//!   6  destination port          2 bytes; 0 any
//!   8  time to live              4 bytes, seconds; of EXCEPTION_ADD only
//!  12  0                         4 bytes
//!  16  source address            16 bytes; 0 any, IPv4 as ::ffff:a.b.c.d
//!  32  destination address       likewise
//!  48  installer's address       likewise; of EXCEPTION_QUERY and EXCEPTION_RESP only
//! ```
//! Numbers are big endian. What is said of the basic unit (§5.7) holds here too.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use super::exception::{Exception, Filter, Flows, Listed, Scope, ports};
use super::{Family, UnitError};
use crate::necp::wire::WideUnit;

/// The fields as they are.
#[derive(Debug, Clone, Copy, Default)]
struct Fields {
    scope: u8,
    family: u8,
    source_len: u8,
    destination_len: u8,
    protocol: u8,
    port: u16,
    ttl: u32,
    source: u128,
    destination: u128,
    installer: u128,
}

impl Fields {
    fn read(unit: &WideUnit) -> Result<Self, UnitError> {
        let [scope, family, source_len, destination_len, protocol, zero, port_high, port_low, rest @ ..] = &unit.0;
        let word = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().expect("four bytes"));
        let address = |at: usize| u128::from_be_bytes(rest[at..at + 16].try_into().expect("sixteen bytes"));
        if *zero != 0 || word(4) != 0 {
            return Err(UnitError::Reserved);
        }
        Ok(Self {
            scope: *scope,
            family: *family,
            source_len: *source_len,
            destination_len: *destination_len,
            protocol: *protocol,
            port: u16::from_be_bytes([*port_high, *port_low]),
            ttl: word(0),
            source: address(8),
            destination: address(24),
            installer: address(40),
        })
    }

    fn of(flows: &Flows) -> Self {
        let (source, destination) = (flows.source, flows.destination);
        Self {
            family: flows.family().number(),
            source_len: source.prefix_len(),
            destination_len: destination.prefix_len(),
            protocol: flows.protocol,
            port: flows.port,
            source: net_bits(source),
            destination: net_bits(destination),
            ..Self::default()
        }
    }

    fn unit(&self) -> WideUnit {
        let mut bytes = WideUnit::default();
        let [high, low] = self.port.to_be_bytes();
        let first = [self.scope, self.family, self.source_len, self.destination_len, self.protocol, 0, high, low];
        bytes.0[..8].copy_from_slice(&first);
        bytes.0[8..12].copy_from_slice(&self.ttl.to_be_bytes());
        for (at, address) in [(16, self.source), (32, self.destination), (48, self.installer)] {
            bytes.0[at..at + 16].copy_from_slice(&address.to_be_bytes());
        }
        bytes
    }

    fn flows(&self) -> Result<Flows, UnitError> {
        let family = self.family()?.ok_or(UnitError::Family(0))?;
        let (protocol, port) = ports(self.protocol.into(), self.port.into())?;
        let (source, destination) =
            (prefix(family, self.source, self.source_len)?, prefix(family, self.destination, self.destination_len)?);
        Ok(Flows { source, destination, protocol, port })
    }

    /// Of EXCEPTION_ADD and EXCEPTION_DEL: IPv4 has its own units.
    fn flows6(&self) -> Result<Flows, UnitError> {
        if self.family == Family::V6.number() { self.flows() } else { Err(UnitError::Family(self.family)) }
    }

    /// `None` is any.
    fn family(&self) -> Result<Option<Family>, UnitError> {
        match self.family {
            0 => Ok(None),
            number => {
                let found = Family::ALL.into_iter().find(|family| family.number() == number);
                found.map(Some).ok_or(UnitError::Family(number))
            }
        }
    }
}

impl Exception {
    /// Reads a wide unit of EXCEPTION_ADD.
    pub fn parse_wide(unit: &WideUnit) -> Result<Self, UnitError> {
        let fields = Fields::read(unit)?;
        let flows = fields.flows6()?;
        Ok(Self::new(Scope::parse(fields.scope.into())?, fields.ttl, flows))
    }

    /// Reads a wide unit of EXCEPTION_DEL; scope and time to live are not read.
    pub fn parse_wide_del(unit: &WideUnit) -> Result<Flows, UnitError> {
        Fields::read(unit)?.flows6()
    }

    /// The wide unit on the wire.
    #[must_use]
    pub fn wide_unit(&self) -> WideUnit {
        Fields { scope: self.scope.code() as u8, ttl: self.ttl, ..Fields::of(&self.flows) }.unit()
    }

    /// The wide unit of EXCEPTION_DEL on the wire; scope and time to live are 0.
    #[must_use]
    pub fn wide_del_unit(flows: &Flows) -> WideUnit {
        Fields::of(flows).unit()
    }
}

impl Filter {
    /// Reads the wide unit of EXCEPTION_QUERY.
    pub fn parse_wide(unit: &WideUnit) -> Result<Self, UnitError> {
        let fields = Fields::read(unit)?;
        let family = fields.family()?;
        let scope = if fields.scope == 0 { None } else { Some(Scope::parse(fields.scope.into())?) };
        Ok(Self {
            scope,
            family,
            installer: (fields.installer != 0).then(|| address(fields.installer)),
            source: wanted(family, fields.source, fields.source_len)?,
            destination: wanted(family, fields.destination, fields.destination_len)?,
            protocol: (fields.protocol != 0).then_some(fields.protocol),
            port: (fields.port != 0).then_some(fields.port),
        })
    }

    /// The wide unit on the wire.
    #[must_use]
    pub fn wide_unit(&self) -> WideUnit {
        let wanted = |wanted: Option<(IpAddr, Option<u8>)>| {
            wanted.map_or((0, 0), |(address, length)| (bits(address), length.unwrap_or(0)))
        };
        let ((source, source_len), (destination, destination_len)) = (wanted(self.source), wanted(self.destination));
        let fields = Fields {
            scope: self.scope.map_or(0, |scope| scope.code() as u8),
            family: self.family.map_or(0, Family::number),
            source_len,
            destination_len,
            protocol: self.protocol.unwrap_or(0),
            port: self.port.unwrap_or(0),
            ttl: 0,
            source,
            destination,
            installer: self.installer.map_or(0, bits),
        };
        fields.unit()
    }
}

impl Listed {
    /// Reads a wide unit of EXCEPTION_RESP.
    pub fn parse_wide(unit: &WideUnit) -> Result<Self, UnitError> {
        let fields = Fields::read(unit)?;
        let scope = Scope::parse(fields.scope.into())?;
        Ok(Self { scope, installer: address(fields.installer), flows: fields.flows()? })
    }

    /// The wide unit on the wire.
    #[must_use]
    pub fn wide_unit(&self) -> WideUnit {
        let fields =
            Fields { scope: self.scope.code() as u8, installer: bits(self.installer), ..Fields::of(&self.flows) };
        fields.unit()
    }
}

impl Flows {
    /// Of a wide unit that was made here from flows, whatever they are.
    pub(in crate::necp) fn of_own_wide(unit: &WideUnit) -> Self {
        let fields = Fields::read(unit).unwrap_or_default();
        let net = |bits: u128, length: u8| IpNet::new(address(bits), length).unwrap_or(Family::V6.any());
        Self {
            source: net(fields.source, fields.source_len),
            destination: net(fields.destination, fields.destination_len),
            protocol: fields.protocol,
            port: fields.port,
        }
    }
}

/// As it is on the wire; that of a prefix which has no address is 0 in both families.
fn net_bits(net: IpNet) -> u128 {
    if net.prefix_len() == 0 { 0 } else { bits(net.addr()) }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn address(bits: u128) -> IpAddr {
    Ipv6Addr::from_bits(bits).to_canonical()
}

/// An address and its prefix length, of this family: with address 0 the length has no meaning.
fn prefix(family: Family, bits: u128, length: u8) -> Result<IpNet, UnitError> {
    if bits == 0 {
        return Ok(family.any());
    }
    let address = address(bits);
    if Family::of(address) != family {
        return Err(UnitError::Address(address));
    }
    match IpNet::new(address, length) {
        Ok(net) if length > 0 => Ok(net.trunc()),
        _ => Err(UnitError::PrefixLength(length.into())),
    }
}

/// An address of a filter: a prefix length of 0 is any.
fn wanted(family: Option<Family>, bits: u128, length: u8) -> Result<Option<(IpAddr, Option<u8>)>, UnitError> {
    if bits == 0 {
        return Ok(None);
    }
    let address = address(bits);
    let family = family.unwrap_or(Family::of(address));
    if length == 0 && Family::of(address) == family {
        return Ok(Some((address, None)));
    }
    let net = prefix(family, bits, length)?;
    Ok(Some((net.addr(), Some(length))))
}

#[cfg(test)]
mod tests;
