//! Where a network element is.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use thiserror::Error;

use crate::necp::PORT;

/// A network element: a name or an address, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NeAddress {
    /// A host name, or an address without brackets.
    pub host: String,
    /// TCP port, 1–65535.
    pub port: u16,
}

/// Why a text names no network element.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is no address of a network element; write 10.0.0.1, 10.0.0.1:3262, [2001:db8::1]:3262 or a host name")]
pub struct ParseNeError(String);

impl FromStr for NeAddress {
    type Err = ParseNeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseNeError(text.into());
        if let Ok(address) = text.parse::<Ipv6Addr>() {
            return Ok(Self { host: address.to_string(), port: PORT });
        }
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(wrong)?;
                let host = host.parse::<Ipv6Addr>().map_err(|_| wrong())?.to_string();
                let port = if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or_else(wrong)?) };
                (host, port)
            }
            None => match text.split_once(':') {
                Some((host, port)) => (host.to_owned(), Some(port)),
                None => (text.to_owned(), None),
            },
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
        let digits_and_dots = host.chars().all(|c| c.is_ascii_digit() || c == '.');
        if host.is_empty() || !host.chars().all(is_name) || (digits_and_dots && host.parse::<Ipv4Addr>().is_err()) {
            return Err(wrong());
        }
        let port = port.map_or(Ok(PORT), |port| port.parse().map_err(|_| wrong()))?;
        if port == 0 { Err(wrong()) } else { Ok(Self { host, port }) }
    }
}

impl fmt::Display for NeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_elements() {
        for (text, printed) in [
            ("10.0.0.1", "10.0.0.1:3262"),
            ("10.0.0.1:1", "10.0.0.1:1"),
            ("2001:DB8::1", "[2001:db8::1]:3262"),
            ("[2001:db8::1]", "[2001:db8::1]:3262"),
            ("[2001:db8::1]:65535", "[2001:db8::1]:65535"),
            ("ne-1.example:3262", "ne-1.example:3262"),
        ] {
            assert_eq!(text.parse::<NeAddress>().expect(text).to_string(), printed);
        }
        for text in [
            "",
            ":1",
            "a:0",
            "a:65536",
            "a:b",
            "[::1",
            "[::1]1",
            "[a]:1",
            "10.0.0",
            "10.0.0.256",
            "a b",
            "a:1:2",
            "tcp://a",
        ] {
            assert!(text.parse::<NeAddress>().is_err(), "{text:?}");
        }
    }
}
