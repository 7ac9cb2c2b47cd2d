//! How flows are written on the command line and on the agent's socket: `203.0.113.0/24`, `any`, `tcp/80`, `5m`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::necp::service::{TCP, UDP};
use crate::necp::{Family, Flows, Scope};

/// Addresses: `any`, `198.51.100.7`, `203.0.113.0/24`, `2001:db8::/32`. Host bits are cleared; `any` is any of the family of
/// the other address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix(pub IpNet);

/// A protocol and perhaps a destination port: `any`, `tcp`, `tcp/80`, `udp/53`, `icmp`, `ip/47`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ports {
    /// IP protocol; 0 is any.
    pub protocol: u8,
    /// Destination port; 0 is any.
    pub port: u16,
}

/// `local` or `global`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ScopeName(pub Scope);

/// A time to live: seconds (`300`), or `5m`, `2h`, `1d`; `0` or `never` is until it is deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ttl(pub u32);

/// Why a text is none of these.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WordError {
    /// No prefix.
    #[error("`{0}` is no address or prefix; write any, 198.51.100.7, 203.0.113.0/24 or 2001:db8::/32")]
    Prefix(String),
    /// An IPv4 prefix in an IPv6 address.
    #[error("`{0}` is IPv4 within IPv6; write it as IPv4")]
    Mapped(String),
    /// No protocol and port.
    #[error("`{0}` is no protocol and port; write any, tcp, tcp/80, udp/53, icmp or ip/47")]
    Ports(String),
    /// A number alone.
    #[error("`{0}`: a port of TCP or of UDP? write tcp/{0} or udp/{0}; ip/{0} is IP protocol {0}")]
    Number(String),
    /// No scope.
    #[error("`{0}` is no scope; write local (not to this server) or global (to no server of the farm)")]
    Scope(String),
    /// No time to live.
    #[error("`{0}` is no time to live; write seconds (300), 5m, 2h or 1d; 0 is until it is deleted")]
    Ttl(String),
}

impl Prefix {
    /// Every address.
    pub const ANY: Self = Self(Family::V4.any());
}

impl Default for Prefix {
    fn default() -> Self {
        Self::ANY
    }
}

impl Default for ScopeName {
    fn default() -> Self {
        Self(Scope::Local)
    }
}

/// The flows from `src` to `dst`.
#[must_use]
pub fn flows(src: Prefix, dst: Prefix, port: Ports) -> Flows {
    Flows { source: src.0, destination: dst.0, protocol: port.protocol, port: port.port }
}

impl FromStr for Prefix {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        if text == "any" {
            return Ok(Self::ANY);
        }
        let wrong = || WordError::Prefix(text.into());
        let (address, length) = text.split_once('/').map_or((text, None), |(address, length)| (address, Some(length)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        if address.to_canonical() != address {
            return Err(WordError::Mapped(text.into()));
        }
        let whole = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            None => whole,
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().map_err(|_| wrong())?,
            Some(_) => return Err(wrong()),
        };
        if address.is_unspecified() && length == 0 {
            return Ok(Self::ANY);
        }
        // A length of 0 behind an address is more often a slip than a wish.
        if length == 0 || address.is_unspecified() {
            return Err(wrong());
        }
        IpNet::new(address, length).map(|net| Self(net.trunc())).map_err(|_| wrong())
    }
}

impl FromStr for Ports {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        const ICMP: u8 = 1;
        let wrong = || WordError::Ports(text.into());
        let number = |digits: &str| {
            let all = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            all.then(|| digits.parse::<u16>().ok()).flatten().filter(|number| *number != 0)
        };
        // Most likely a port: nobody shall get an exception for the IP protocol of that number by mistake.
        if number(text).is_some() {
            return Err(WordError::Number(text.into()));
        }
        if let Some(digits) = text.strip_prefix("ip/") {
            let protocol = number(digits).and_then(|number| u8::try_from(number).ok()).ok_or_else(wrong)?;
            return Ok(Self { protocol, port: 0 });
        }
        let (name, port) = text.split_once('/').map_or((text, None), |(name, port)| (name, Some(port)));
        let protocol = match name {
            "any" => 0,
            "tcp" => TCP,
            "udp" => UDP,
            "icmp" => ICMP,
            _ => return Err(wrong()),
        };
        let port = match port {
            None => 0,
            Some(digits) if [TCP, UDP].contains(&protocol) => number(digits).ok_or_else(wrong)?,
            Some(_) => return Err(wrong()),
        };
        Ok(Self { protocol, port })
    }
}

impl FromStr for ScopeName {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        let found = [Scope::Local, Scope::Global].into_iter().find(|scope| scope.name() == text);
        found.map(Self).ok_or_else(|| WordError::Scope(text.into()))
    }
}

impl FromStr for Ttl {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        if text == "never" {
            return Ok(Self(0));
        }
        let units = [("s", 1), ("m", 60), ("h", 3600), ("d", 86_400)];
        let found = units.iter().find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, *seconds)));
        let (digits, unit) = found.unwrap_or((text, 1));
        let number = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<u32>().ok()).flatten();
        number.and_then(|number| number.checked_mul(unit)).map(Self).ok_or_else(|| WordError::Ttl(text.into()))
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.prefix_len() {
            0 => f.write_str("any"),
            length if length == self.0.max_prefix_len() => self.0.addr().fmt(f),
            _ => self.0.fmt(f),
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.protocol, self.port) {
            (0, _) => f.write_str("any"),
            (1, _) => f.write_str("icmp"),
            (TCP, 0) => f.write_str("tcp"),
            (UDP, 0) => f.write_str("udp"),
            (TCP, port) => write!(f, "tcp/{port}"),
            (UDP, port) => write!(f, "udp/{port}"),
            (other, _) => write!(f, "ip/{other}"),
        }
    }
}

impl fmt::Display for ScopeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! as_text {
    ($($type:ty),+) => { $(
        impl TryFrom<String> for $type {
            type Error = WordError;

            fn try_from(text: String) -> Result<Self, WordError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    )+ };
}

as_text!(Prefix, Ports, ScopeName);

#[cfg(test)]
mod tests {
    use super::*;

    fn shown<T: FromStr<Err = WordError> + fmt::Display>(text: &str) -> String {
        text.parse::<T>().unwrap_or_else(|error| panic!("{error}")).to_string()
    }

    #[test]
    fn words_are_read_and_printed() {
        for (text, printed) in [
            ("any", "any"),
            ("0.0.0.0/0", "any"),
            ("198.51.100.7", "198.51.100.7"),
            ("198.51.100.7/32", "198.51.100.7"),
            ("203.0.113.9/24", "203.0.113.0/24"),
            ("::/0", "any"),
            ("2001:DB8::7", "2001:db8::7"),
            ("2001:db8::7/128", "2001:db8::7"),
            ("2001:db8:1::7/32", "2001:db8::/32"),
        ] {
            assert_eq!(shown::<Prefix>(text), printed);
        }
        for (text, printed) in [
            ("any", "any"),
            ("tcp", "tcp"),
            ("tcp/80", "tcp/80"),
            ("ip/6", "tcp"),
            ("icmp", "icmp"),
            ("ip/47", "ip/47"),
        ] {
            assert_eq!(shown::<Ports>(text), printed);
        }
        for (text, seconds) in [("300", 300), ("5m", 300), ("2h", 7200), ("1d", 86_400), ("0", 0), ("never", 0)] {
            assert_eq!(text.parse(), Ok(Ttl(seconds)), "{text}");
        }
        assert_eq!("global".parse(), Ok(ScopeName(Scope::Global)));
    }

    #[test]
    fn mistakes_are_told_apart() {
        for text in [
            "",
            "10.0.0",
            "10.0.0.1/33",
            "10.0.0.1/0",
            "10.0.0.1/-1",
            "10.0.0.1/",
            "0.0.0.0",
            "host",
            "0.0.0.0/8",
            "::",
            "::/8",
            "2001:db8::1/0",
            "2001:db8::1/129",
            "[2001:db8::1]",
            "fe80::1%eth0",
        ] {
            assert_eq!(text.parse::<Prefix>(), Err(WordError::Prefix(text.into())), "{text}");
        }
        let mapped = "::ffff:10.0.0.0/104";
        assert_eq!(mapped.parse::<Prefix>(), Err(WordError::Mapped(mapped.into())));
        for text in [
            "",
            "tcp/",
            "tcp/0",
            "tcp/65536",
            "tcp/+1",
            "any/80",
            "icmp/8",
            "0",
            "ip/0",
            "ip/256",
            "80/tcp",
            "47/1",
            "TCP",
        ] {
            assert_eq!(text.parse::<Ports>(), Err(WordError::Ports(text.into())), "{text}");
        }
        assert_eq!("80".parse::<Ports>(), Err(WordError::Number("80".into())));
        for text in ["", "-1", "1w", "5 m", "4294967296", "100000d", "m"] {
            assert_eq!(text.parse::<Ttl>(), Err(WordError::Ttl(text.into())), "{text}");
        }
        assert!("none".parse::<ScopeName>().is_err());
    }
}
