//! Forwarding types and service keys, and the names that people write for them.

use std::fmt;
use std::str::FromStr;

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// How the NE hands datagrams to an SE: data0 of a START unit (§5.6.1). Written `l2`, `gre`, `l3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Forwarding {
    /// Unchanged, to the SE's MAC address; the SE is on a link that the NE is on.
    L2 = 1,
    /// Unchanged, inside GRE from the NE to the SE.
    Gre = 2,
    /// With the destination address rewritten to the SE's.
    L3 = 3,
}

impl Forwarding {
    /// All of them, by their number on the wire.
    pub const ALL: [Self; 3] = [Self::L2, Self::Gre, Self::L3];

    /// The number on the wire (§5.6.1), 1 to 3.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The type with this number on the wire, if there is one.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|forwarding| u32::from(forwarding.code()) == code)
    }

    /// The name in configuration and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::L2 => "l2",
            Self::Gre => "gre",
            Self::L3 => "l3",
        }
    }
}

impl fmt::Display for Forwarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A text that is no forwarding type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no forwarding type; write l2, gre or l3")]
pub struct ParseForwardingError(String);

impl FromStr for Forwarding {
    type Err = ParseForwardingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|forwarding| forwarding.name() == text);
        found.ok_or_else(|| ParseForwardingError(text.into()))
    }
}

/// What a service is within a farm: IP protocol and destination port. Written `tcp/80`, `udp/443`, or `47` for a
/// protocol without ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    protocol: u8,
    port: u16,
}

impl ServiceKey {
    /// The key of a protocol and a destination port (host byte order); the port has no meaning unless the protocol is
    /// TCP or UDP, and becomes 0 (§5.6.1).
    #[must_use]
    pub const fn new(protocol: u8, port: u16) -> Self {
        let has_ports = protocol == TCP || protocol == UDP;
        Self { protocol, port: if has_ports { port } else { 0 } }
    }

    /// IP protocol number.
    #[must_use]
    pub const fn protocol(self) -> u8 {
        self.protocol
    }

    /// Destination port in host byte order; 0 unless TCP or UDP.
    #[must_use]
    pub const fn port(self) -> u16 {
        self.port
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            TCP => f.pad(&format!("tcp/{}", self.port)),
            UDP => f.pad(&format!("udp/{}", self.port)),
            other => f.pad(&other.to_string()),
        }
    }
}

/// A text that is no service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no service; write tcp/PORT or udp/PORT with a port from 1 to 65535, or a protocol number from 1 to 255 (not 6 or 17)"
)]
pub struct ParseServiceError(String);

impl FromStr for ServiceKey {
    type Err = ParseServiceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_service(text).ok_or_else(|| ParseServiceError(text.into()))
    }
}

fn parse_service(text: &str) -> Option<ServiceKey> {
    // `u16::from_str` would take a sign.
    let number =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u16>().ok()).flatten();
    let Some((name, port)) = text.split_once('/') else {
        let protocol = u8::try_from(number(text)?).ok()?;
        return (![0, TCP, UDP].contains(&protocol)).then(|| ServiceKey::new(protocol, 0));
    };
    let protocol = match name {
        "tcp" => TCP,
        "udp" => UDP,
        _ => return None,
    };
    number(port).filter(|port| *port != 0).map(|port| ServiceKey::new(protocol, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarding_names_and_codes_go_both_ways() {
        for (code, name) in [(1, "l2"), (2, "gre"), (3, "l3")] {
            let forwarding: Forwarding = name.parse().unwrap();
            assert_eq!((u32::from(forwarding.code()), forwarding.to_string().as_str()), (code, name));
            assert_eq!(Forwarding::from_code(code), Some(forwarding));
        }
        for code in [0, 4, 257, 1 << 31 | 1, u32::MAX] {
            assert_eq!(Forwarding::from_code(code), None);
        }
        assert_eq!(
            "L2".parse::<Forwarding>().unwrap_err().to_string(),
            "`L2` is no forwarding type; write l2, gre or l3"
        );
    }

    #[test]
    fn services_are_written_as_people_write_them() {
        for (text, protocol, port) in [("tcp/80", 6, 80), ("udp/443", 17, 443), ("tcp/65535", 6, 65535), ("47", 47, 0)]
        {
            let key: ServiceKey = text.parse().unwrap();
            assert_eq!((key.protocol(), key.port(), key.to_string().as_str()), (protocol, port, text));
        }
        for text in [
            "",
            "tcp",
            "tcp/",
            "tcp/0",
            "tcp/65536",
            "tcp/+80",
            "TCP/80",
            "80/tcp",
            "0",
            "6",
            "17",
            "256",
            "-1",
            "47/0",
            "tcp/80 ",
        ] {
            assert!(text.parse::<ServiceKey>().is_err(), "{text:?}");
        }
    }

    /// §5.6.1: the port has no meaning unless TCP or UDP.
    #[test]
    fn a_port_without_meaning_is_dropped() {
        assert_eq!(ServiceKey::new(47, 80), ServiceKey::new(47, 0));
        assert_ne!(ServiceKey::new(TCP, 80), ServiceKey::new(TCP, 81));
        assert_ne!(ServiceKey::new(TCP, 80), ServiceKey::new(UDP, 80));
    }
}
