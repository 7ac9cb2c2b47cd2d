//! Units about exceptions (§5.7): flows that an SE does not want though a START covers them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use super::{Family, UnitError};
use crate::necp::service::{TCP, UDP};
use crate::necp::wire::Unit;

/// Whom an exception protects: data0 (§5.7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// "Not to me." What the draft calls "none" (0) is treated the same.
    Local,
    /// "To no server of the farm": the flow is cut through. Advisory: an NE may treat it as local.
    Global,
}

/// A set of flows: data2 to data7 of a unit (§5.7.1). With its installer's address it identifies an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flows {
    /// Source addresses; `0.0.0.0/0` is any of IPv4, `::/0` any of IPv6. Host bits are 0.
    pub source: IpNet,
    /// Destination addresses, likewise, and of the same family; see [`Flows::normal`].
    pub destination: IpNet,
    /// IP protocol; 0 is any.
    pub protocol: u8,
    /// Destination port (host byte order); 0 is any, and whenever the protocol is neither TCP nor UDP.
    pub port: u16,
}

/// A unit of EXCEPTION_ADD (§5.7.1) or EXCEPTION_DEL (§5.7.3), where scope and time to live have no meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Exception {
    /// Whom it protects. With every field a wildcard it is always local.
    pub scope: Scope,
    /// Seconds until it expires; 0: never.
    pub ttl: u32,
    /// Which flows.
    pub flows: Flows,
}

/// The unit of EXCEPTION_QUERY (§5.7.7): which entries are asked for; `None` is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Filter {
    /// Entries in force with this scope.
    pub scope: Option<Scope>,
    /// Entries for flows of this family. What a basic unit asks for is IPv4, for its answer has no room for more.
    pub family: Option<Family>,
    /// Entries that this SE installed.
    pub installer: Option<IpAddr>,
    /// Entries with this source address, and with this prefix length if there is one.
    pub source: Option<(IpAddr, Option<u8>)>,
    /// Entries with this destination address, likewise.
    pub destination: Option<(IpAddr, Option<u8>)>,
    /// Entries of this IP protocol.
    pub protocol: Option<u8>,
    /// Entries with this destination port.
    pub port: Option<u16>,
}

/// A unit of EXCEPTION_RESP (§5.7.8): an active entry of any SE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Listed {
    /// The scope in force, which may be less than what was asked for.
    pub scope: Scope,
    /// Who installed it.
    pub installer: IpAddr,
    /// Which flows.
    pub flows: Flows,
}

impl Scope {
    pub(super) fn parse(code: u32) -> Result<Self, UnitError> {
        match code {
            0 | 1 => Ok(Self::Local),
            2 => Ok(Self::Global),
            other => Err(UnitError::Scope(other)),
        }
    }

    /// The number on the wire (§5.7.1).
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::Local => 1,
            Self::Global => 2,
        }
    }

    /// The name on the command line and in status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Global => "global",
        }
    }
}

impl Flows {
    /// Every flow: in a request, of the SE's family.
    pub const ALL: Self = Self::all(Family::V4);

    /// Every flow of a family.
    #[must_use]
    pub const fn all(family: Family) -> Self {
        Self { source: family.any(), destination: family.any(), protocol: 0, port: 0 }
    }

    /// The family of the addresses, which is one if they are [normal](Self::normal).
    #[must_use]
    pub fn family(&self) -> Family {
        if self.source.prefix_len() == 0 { Family::of(self.destination.addr()) } else { Family::of(self.source.addr()) }
    }

    /// Whether it is every address, whatever the family.
    #[must_use]
    pub fn has_no_address(&self) -> bool {
        self.source.prefix_len() == 0 && self.destination.prefix_len() == 0
    }

    /// The same flows for an SE to ask for: a wildcard is of the other address's family; if both are, it is IPv4, which a
    /// basic unit says, and means the SE's own. Fails if the two are of different families.
    pub fn normal(&self) -> Result<Self, UnitError> {
        let (source, destination) = match (self.source.prefix_len(), self.destination.prefix_len()) {
            (0, 0) => (Family::V4.any(), Family::V4.any()),
            (0, _) => (Family::of(self.destination.addr()).any(), self.destination),
            (_, 0) => (self.source, Family::of(self.source.addr()).any()),
            _ => (self.source, self.destination),
        };
        if Family::of(source.addr()) != Family::of(destination.addr()) {
            return Err(UnitError::Families);
        }
        let mapped = |net: IpNet| net.addr().to_canonical() != net.addr();
        if let Some(mapped) = [source, destination].into_iter().find(|net| mapped(*net)) {
            return Err(UnitError::Address(mapped.addr()));
        }
        let (source, destination) = (source.trunc(), destination.trunc());
        // On the wire, address 0 is any.
        let nothing = |net: &IpNet| net.addr().is_unspecified() && net.prefix_len() > 0;
        if let Some(net) = [source, destination].iter().find(|net| nothing(net)) {
            return Err(UnitError::PrefixLength(net.prefix_len().into()));
        }
        let (protocol, port) = ports(self.protocol.into(), self.port.into())?;
        Ok(Self { source, destination, protocol, port })
    }

    fn parse(unit: &Unit) -> Result<Self, UnitError> {
        let [_, _, source, source_len, destination, destination_len, protocol, port] = unit.0;
        let (protocol, port) = ports(protocol, port)?;
        let (source, destination) = (prefix(source, source_len)?, prefix(destination, destination_len)?);
        Ok(Self { source, destination, protocol, port })
    }

    /// Of a unit that was made here from flows, whatever they are.
    pub(in crate::necp) fn of_own(unit: &Unit) -> Self {
        let [_, _, source, source_len, destination, destination_len, protocol, port] = unit.0;
        let net = |address: u32, length: u32| IpNet::new(Ipv4Addr::from(address).into(), length as u8).unwrap_or(ANY);
        let (source, destination) = (net(source, source_len), net(destination, destination_len));
        Self { source, destination, protocol: protocol as u8, port: port as u16 }
    }

    /// data2 to data7, of IPv4.
    fn words(&self) -> [u32; 6] {
        debug_assert!(self.has_no_address() || self.family() == Family::V4, "{self} has no basic unit");
        let [(source, source_len), (destination, destination_len)] =
            [self.source, self.destination].map(|net| (word(net.addr()), u32::from(net.prefix_len())));
        [source, source_len, destination, destination_len, self.protocol.into(), self.port.into()]
    }
}

impl Exception {
    /// Reads a unit of EXCEPTION_ADD.
    pub fn parse(unit: &Unit) -> Result<Self, UnitError> {
        let flows = Flows::parse(unit)?;
        Ok(Self::new(Scope::parse(unit.0[0])?, unit.0[1], flows))
    }

    /// An exception; that of every flow is local, for nobody may switch a whole farm off.
    #[must_use]
    pub fn new(scope: Scope, ttl: u32, flows: Flows) -> Self {
        let is_all = flows == Flows::all(flows.family());
        Self { scope: if is_all { Scope::Local } else { scope }, ttl, flows }
    }

    /// Reads a unit of EXCEPTION_DEL; scope and time to live are not read.
    pub fn parse_del(unit: &Unit) -> Result<Flows, UnitError> {
        Flows::parse(unit)
    }

    /// The unit on the wire, of an exception of IPv4.
    #[must_use]
    pub fn unit(&self) -> Unit {
        unit(self.scope.code(), self.ttl, &self.flows)
    }

    /// The unit of EXCEPTION_DEL on the wire; data0 and data1 are 0.
    #[must_use]
    pub fn del_unit(flows: &Flows) -> Unit {
        unit(0, 0, flows)
    }
}

impl Filter {
    /// Reads the unit of EXCEPTION_QUERY.
    pub fn parse(unit: &Unit) -> Result<Self, UnitError> {
        let [scope, installer, source, source_len, destination, destination_len, protocol, port] = unit.0;
        let scope = if scope == 0 { None } else { Some(Scope::parse(scope)?) };
        let protocol = u8::try_from(protocol).map_err(|_| UnitError::Protocol(protocol))?;
        let port = u16::try_from(port).map_err(|_| UnitError::Port(port))?;
        Ok(Self {
            scope,
            family: Some(Family::V4),
            installer: (installer != 0).then(|| Ipv4Addr::from(installer).into()),
            source: address(source, source_len)?,
            destination: address(destination, destination_len)?,
            protocol: (protocol != 0).then_some(protocol),
            port: (port != 0).then_some(port),
        })
    }

    /// Whether it names nothing of IPv6: then a basic unit can say it, and finds what is of IPv4.
    #[must_use]
    pub fn is_basic(&self) -> bool {
        let addresses = [self.installer, self.source.map(|one| one.0), self.destination.map(|one| one.0)];
        self.family != Some(Family::V6) && addresses.into_iter().flatten().all(|address| address.is_ipv4())
    }

    /// Whether all that it finds is of IPv4: an SE's entries are of its own family.
    #[must_use]
    pub fn is_only_basic(&self) -> bool {
        let addresses = [self.installer, self.source.map(|one| one.0), self.destination.map(|one| one.0)];
        self.family == Some(Family::V4) || addresses.into_iter().flatten().any(|address| address.is_ipv4())
    }

    /// The unit on the wire, of a filter that [is basic](Self::is_basic).
    #[must_use]
    pub fn unit(&self) -> Unit {
        debug_assert!(self.is_basic(), "{self:?} has no basic unit");
        let address = |wanted: Option<(IpAddr, Option<u8>)>| {
            wanted.map_or((0, 0), |(address, length)| (word(address), length.unwrap_or(0).into()))
        };
        let ((source, source_len), (destination, destination_len)) = (address(self.source), address(self.destination));
        Unit([
            self.scope.map_or(0, Scope::code),
            self.installer.map_or(0, word),
            source,
            source_len,
            destination,
            destination_len,
            self.protocol.unwrap_or(0).into(),
            self.port.unwrap_or(0).into(),
        ])
    }

    /// Whether an entry is asked for.
    #[must_use]
    pub fn matches(&self, entry: &Listed) -> bool {
        fn is<T: PartialEq>(wanted: Option<T>, is: T) -> bool {
            wanted.is_none_or(|wanted| wanted == is)
        }
        let net = |wanted: Option<(IpAddr, Option<u8>)>, net: IpNet| {
            wanted.is_none_or(|(address, length)| address == net.addr() && is(length, net.prefix_len()))
        };
        is(self.scope, entry.scope)
            && is(self.family, entry.flows.family())
            && is(self.installer, entry.installer)
            && net(self.source, entry.flows.source)
            && net(self.destination, entry.flows.destination)
            && is(self.protocol, entry.flows.protocol)
            && is(self.port, entry.flows.port)
    }
}

impl Listed {
    /// Reads a unit of EXCEPTION_RESP.
    pub fn parse(unit: &Unit) -> Result<Self, UnitError> {
        let scope = Scope::parse(unit.0[0])?;
        Ok(Self { scope, installer: Ipv4Addr::from(unit.0[1]).into(), flows: Flows::parse(unit)? })
    }

    /// The unit on the wire, of an entry of IPv4.
    #[must_use]
    pub fn unit(&self) -> Unit {
        unit(self.scope.code(), word(self.installer), &self.flows)
    }
}

const ANY: IpNet = Family::V4.any();

/// An IPv4 address as a word; one of IPv6 has none.
fn word(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(_) => 0,
    }
}

/// Protocol and port: with a protocol that has none, the port has no meaning.
pub(super) fn ports(protocol: u32, port: u32) -> Result<(u8, u16), UnitError> {
    let protocol = u8::try_from(protocol).map_err(|_| UnitError::Protocol(protocol))?;
    match protocol {
        TCP | UDP => Ok((protocol, u16::try_from(port).map_err(|_| UnitError::Port(port))?)),
        0 if port != 0 => Err(UnitError::Port(port)),
        _ => Ok((protocol, 0)),
    }
}

fn unit(data0: u32, data1: u32, flows: &Flows) -> Unit {
    let [a, b, c, d, e, f] = flows.words();
    Unit([data0, data1, a, b, c, d, e, f])
}

/// An address and its prefix length: with address 0 the length has no meaning.
fn prefix(address: u32, length: u32) -> Result<IpNet, UnitError> {
    if address == 0 {
        return Ok(ANY);
    }
    match u8::try_from(length) {
        Ok(length @ 1..=32) => Ok(Ipv4Net::new_assert(address.into(), length).trunc().into()),
        _ => Err(UnitError::PrefixLength(length)),
    }
}

/// An address of a filter: a prefix length of 0 is any.
fn address(address: u32, length: u32) -> Result<Option<(IpAddr, Option<u8>)>, UnitError> {
    let host = IpAddr::V4(address.into());
    match (address, u8::try_from(length)) {
        (0, _) => Ok(None),
        (_, Ok(0)) => Ok(Some((host, None))),
        (_, Ok(length @ 1..=32)) => {
            let net = Ipv4Net::new_assert(address.into(), length).trunc();
            Ok(Some((net.addr().into(), Some(length))))
        }
        _ => Err(UnitError::PrefixLength(length)),
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Flows {
    /// `203.0.113.0/24 -> any tcp/80`; all of IPv6 is `::/0 -> ::/0 any`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_all6 = self.has_no_address() && self.family() == Family::V6;
        let net = |net: IpNet| if net.prefix_len() == 0 && !is_all6 { "any".into() } else { net.to_string() };
        write!(f, "{} -> {} ", net(self.source), net(self.destination))?;
        match (self.protocol, self.port) {
            (0, _) => f.write_str("any"),
            (TCP, 0) => f.write_str("tcp"),
            (UDP, 0) => f.write_str("udp"),
            (TCP, port) => write!(f, "tcp/{port}"),
            (UDP, port) => write!(f, "udp/{port}"),
            (other, _) => write!(f, "{other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: u32 = 0xcb00_7105; // 203.0.113.5
    const ORIGIN: u32 = 0xc633_6407; // 198.51.100.7

    fn flows(source: &str, destination: &str, protocol: u8, port: u16) -> Flows {
        Flows { source: source.parse().unwrap(), destination: destination.parse().unwrap(), protocol, port }
    }

    /// §5.7.1, and back: what is read is normal, and its unit reads the same.
    #[test]
    fn units_that_are_legal() {
        let table = [
            ([1, 300, HOST, 24, ORIGIN, 32, 6, 80], flows("203.0.113.0/24", "198.51.100.7/32", 6, 80), Scope::Local),
            ([2, 0, 0, 77, ORIGIN, 32, 0, 0], flows("0.0.0.0/0", "198.51.100.7/32", 0, 0), Scope::Global),
            ([0, 1, HOST, 32, 0, u32::MAX, 17, 0], flows("203.0.113.5/32", "0.0.0.0/0", 17, 0), Scope::Local),
            ([2, u32::MAX, HOST, 1, 0, 0, 47, u32::MAX], flows("128.0.0.0/1", "0.0.0.0/0", 47, 0), Scope::Global),
            ([2, 9, 0, 0, 0, 0, 0, 0], Flows::ALL, Scope::Local),
        ];
        for (words, flows, scope) in table {
            let exception = Exception { scope, ttl: words[1], flows };
            assert_eq!(Exception::parse(&Unit(words)), Ok(exception), "{words:?}");
            assert_eq!(Exception::parse(&exception.unit()), Ok(exception));
            assert_eq!(Exception::parse_del(&Unit(words)), Ok(flows));
            assert_eq!(Exception::parse_del(&Exception::del_unit(&flows)), Ok(flows));
            let listed = Listed { scope, installer: Ipv4Addr::new(10, 0, 0, 11).into(), flows };
            assert_eq!(Listed::parse(&listed.unit()), Ok(listed));
        }
    }

    #[test]
    fn units_that_fail() {
        let table = [
            ([3, 0, 0, 0, 0, 0, 0, 0], UnitError::Scope(3)),
            ([1, 0, HOST, 0, 0, 0, 0, 0], UnitError::PrefixLength(0)),
            ([1, 0, HOST, 33, 0, 0, 0, 0], UnitError::PrefixLength(33)),
            ([1, 0, 0, 0, HOST, 0, 0, 0], UnitError::PrefixLength(0)),
            ([1, 0, 0, 0, HOST, 256 + 24, 0, 0], UnitError::PrefixLength(280)),
            ([1, 0, 0, 0, 0, 0, 256, 0], UnitError::Protocol(256)),
            ([1, 0, 0, 0, 0, 0, 6, 65_536], UnitError::Port(65_536)),
            ([1, 0, 0, 0, 0, 0, 0, 80], UnitError::Port(80)),
        ];
        for (words, error) in table {
            assert_eq!(Exception::parse(&Unit(words)), Err(error), "{words:?}");
        }
    }

    #[test]
    fn a_filter_asks_for_what_it_names() {
        let entry = Listed {
            scope: Scope::Global,
            installer: Ipv4Addr::new(10, 0, 0, 11).into(),
            flows: flows("203.0.113.0/24", "198.51.100.7/32", 6, 80),
        };
        let installer = word(entry.installer);
        let prefix = 0xcb00_7100;
        let yes = [
            [0; 8],
            [2, installer, prefix, 24, ORIGIN, 32, 6, 80],
            [0, 0, prefix, 0, ORIGIN, 0, 0, 0],
            [0, 0, HOST, 24, 0, 9, 0, 80],
        ];
        for words in yes {
            let filter = Filter::parse(&Unit(words)).unwrap();
            assert!(filter.matches(&entry), "{words:?}");
            assert_eq!(Filter::parse(&filter.unit()), Ok(filter));
        }
        let no = [
            [1, 0, 0, 0, 0, 0, 0, 0],
            [0, installer + 1, 0, 0, 0, 0, 0, 0],
            [0, 0, HOST, 0, 0, 0, 0, 0],
            [0, 0, prefix, 25, 0, 0, 0, 0],
            [0, 0, 0, 0, ORIGIN, 31, 0, 0],
            [0, 0, 0, 0, 0, 0, 17, 0],
            [0, 0, 0, 0, 0, 0, 0, 81],
        ];
        for words in no {
            assert!(!Filter::parse(&Unit(words)).unwrap().matches(&entry), "{words:?}");
        }
        assert_eq!(Filter::parse(&Unit([3, 0, 0, 0, 0, 0, 0, 0])), Err(UnitError::Scope(3)));
        assert_eq!(Filter::parse(&Unit([0, 0, HOST, 40, 0, 0, 0, 0])), Err(UnitError::PrefixLength(40)));
        assert_eq!(Filter::parse(&Unit([0, 0, 0, 0, 0, 0, 0, 65_536])), Err(UnitError::Port(65_536)));
    }

    #[test]
    fn flows_are_written_as_people_read_them() {
        assert_eq!(
            flows("203.0.113.0/24", "198.51.100.7/32", 6, 80).to_string(),
            "203.0.113.0/24 -> 198.51.100.7/32 tcp/80"
        );
        assert_eq!(Flows::ALL.to_string(), "any -> any any");
        assert_eq!(flows("0.0.0.0/0", "0.0.0.0/0", 47, 0).to_string(), "any -> any 47");
    }
}
