//! The file as it is written: which keys there are. What the values may be is `check`'s.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::{IpNet, Ipv6Net};
use serde::Deserialize;
use toml::Spanned;

use super::Mode;
use crate::config::strict::{Text, nearest};
use crate::necp::{Forwarding, PORT, ServiceKey};

/// Any number; whole ones need no point.
pub(super) type Number = Spanned<f64>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) interfaces: Spanned<Vec<Spanned<String>>>,
    pub(super) listen: Option<Spanned<Vec<Spanned<Text<Listen>>>>>,
    pub(super) pin: Option<Spanned<PathBuf>>,
    pub(super) socket: Option<Spanned<PathBuf>>,
    pub(super) mode: Option<Text<Mode>>,
    pub(super) manage_vips: Option<bool>,
    pub(super) keepalive: Option<Number>,
    pub(super) grace: Option<Number>,
    pub(super) max_exceptions: Option<Spanned<i64>>,
    pub(super) ttl_security: Option<Spanned<Hops>>,
    #[serde(default)]
    pub(super) farm: Vec<Spanned<Farm>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Farm {
    pub(super) name: Spanned<String>,
    pub(super) vips: Option<Spanned<Vec<Spanned<Text<Vip>>>>>,
    pub(super) intercept: Option<Spanned<Vec<Spanned<Text<Destination>>>>>,
    pub(super) services: Spanned<Vec<Spanned<Text<ServiceKey>>>>,
    pub(super) forwarding: Spanned<Vec<Spanned<Text<Forwarding>>>>,
    pub(super) servers: Spanned<Vec<Spanned<Text<Prefix>>>>,
    pub(super) auth: Option<Spanned<String>>,
    pub(super) key_file: Option<Spanned<PathBuf>>,
    pub(super) keys: Option<Spanned<BTreeMap<Spanned<String>, Spanned<PathBuf>>>>,
    pub(super) tcp_md5: Option<Spanned<Md5Files>>,
    pub(super) table_size: Option<Spanned<i64>>,
    pub(super) orphan_time: Option<Number>,
    pub(super) tcp_idle: Option<Number>,
    pub(super) udp_idle: Option<Number>,
    pub(super) udp_tracking: Option<bool>,
    pub(super) echo: Option<bool>,
    pub(super) global_exceptions: Option<bool>,
    pub(super) max_exceptions: Option<Spanned<i64>>,
    pub(super) hash_seed: Option<Spanned<i64>>,
    pub(super) capacity: Option<BTreeMap<Spanned<String>, Number>>,
}

/// `true`, `false` or a number of hops.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "write true (servers on the same link), false, or the number of hops that they are away at most"
)]
pub(super) enum Hops {
    OnLink(bool),
    AtMost(i64),
}

/// One key file, or several by address or prefix.
#[derive(Deserialize)]
#[serde(untagged, expecting = "write a path, or { \"10.0.0.11\" = \"PATH\" }")]
pub(super) enum Md5Files {
    All(PathBuf),
    Each(BTreeMap<String, PathBuf>),
}

/// `ADDRESS`, `ADDRESS:PORT` or `[ADDRESS]:PORT`.
pub(super) struct Listen(pub(super) SocketAddr);

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = text.parse().or_else(|_| text.parse().map(|address: IpAddr| SocketAddr::new(address, PORT)));
        match address {
            Ok(address) if address.port() != 0 => plain(address.ip(), text).map(|()| Self(address)),
            _ => Err(format!(
                "`{text}` is no address to listen on; write ADDRESS:PORT, such as 0.0.0.0:{PORT} or [::]:{PORT}"
            )),
        }
    }
}

/// An address that clients may connect to.
pub(super) struct Vip(pub(super) IpAddr);

impl FromStr for Vip {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let no_host = |vip: &IpAddr| {
            vip.is_unspecified()
                || vip.is_loopback()
                || vip.is_multicast()
                || match vip {
                    IpAddr::V4(vip) => vip.octets()[0] == 0 || vip.octets()[0] >= 240,
                    IpAddr::V6(vip) => vip.is_unicast_link_local(),
                }
        };
        match text.parse::<IpAddr>() {
            Ok(vip) if no_host(&vip) => {
                Err(format!("`{text}` cannot be a virtual address; write an address that clients connect to"))
            }
            Ok(vip) => plain(vip, text).map(|()| Self(vip)),
            Err(_) => Err(format!(
                "`{text}` is no address; write a virtual address such as 192.0.2.10 or 2001:db8::10, without a prefix length"
            )),
        }
    }
}

/// `PREFIX/LENGTH` or one address.
pub(super) struct Prefix(pub(super) IpNet);

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)) {
            Ok(net) if net.trunc() != net => Err(format!(
                "`{text}` has host bits set; write {} (or {}/{} for that one server)",
                net.trunc(),
                net.addr(),
                net.max_prefix_len()
            )),
            Ok(IpNet::V6(net)) if net.prefix_len() >= 10 && net.addr().is_unicast_link_local() => Err(format!(
                "`{text}` is link-local, and such an address says nothing without its link; write who may join by global \
                 or unique local addresses, such as 2001:db8::/64"
            )),
            Ok(net) if net.prefix_len() >= 96 => plain(net.addr(), text).map(|()| Self(net)),
            Ok(net) => Ok(Self(net)),
            Err(_) => {
                Err(format!("`{text}` is no prefix; write who may join as 10.0.0.0/24, 10.0.0.11 or 2001:db8::/64"))
            }
        }
    }
}

/// `PREFIX/LENGTH` or one address, of destinations.
pub(super) struct Destination(pub(super) IpNet);

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)) {
            Ok(net) if net.trunc() != net => Err(format!(
                "`{text}` has host bits set; write {} (or {}/{} for that one address)",
                net.trunc(),
                net.addr(),
                net.max_prefix_len()
            )),
            Ok(IpNet::V6(net)) if is_near(&net) => Err(format!(
                "`{text}` is link-local or multicast, which no router takes any further; write destinations such as ::/0 (all) \
                 or 2001:db8::/32"
            )),
            Ok(net) if net.prefix_len() >= 96 => plain(net.addr(), text).map(|()| Self(net)),
            Ok(net) => Ok(Self(net)),
            Err(_) => Err(format!(
                "`{text}` is no prefix; write destinations to intercept as 0.0.0.0/0 or ::/0 (all), 203.0.113.0/24 or 2001:db8::/32"
            )),
        }
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let modes = [Self::Native, Self::Generic, Self::Auto];
        modes.into_iter().find(|mode| mode.to_string() == text).ok_or_else(|| {
            let near = nearest(text, ["native", "generic", "auto"]);
            let hint = near.map_or(String::new(), |near| format!(" (did you mean {near}?)"));
            format!("`{text}` is no mode; write \"native\", \"generic\" or \"auto\"{hint}")
        })
    }
}

/// Whether no address of it is any but link-local, or a group.
fn is_near(net: &Ipv6Net) -> bool {
    net.prefix_len() >= 10 && net.addr().is_unicast_link_local() || net.prefix_len() >= 8 && net.addr().is_multicast()
}

/// One address has one form: what is IPv4 is written so.
fn plain(address: IpAddr, text: &str) -> Result<(), String> {
    match address {
        IpAddr::V6(address) => match address.to_ipv4_mapped() {
            Some(ipv4) => Err(format!("`{text}` is an IPv4 address in the form of IPv6; write it as {ipv4}")),
            None => Ok(()),
        },
        IpAddr::V4(_) => Ok(()),
    }
}
