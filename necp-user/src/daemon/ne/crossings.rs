//! What counts when a packet crosses this host, if some farm intercepts: the farms' prefixes, and this host's own addresses as
//! they come and go.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use necp_ebpf::abi::AddressSet;

use crate::config::ne::NeConfig;
use crate::necp::message::Family;
use crate::plane::Plane;
use crate::plane::host_address::{HostAddressError, HostAddresses};

/// The sets of addresses, and where own ones are read.
pub struct Crossings {
    fixed: BTreeSet<(AddressSet, IpNet)>,
    addresses: HostAddresses,
}

impl Crossings {
    /// None if no farm intercepts. To be called inside a tokio runtime.
    ///
    /// # Errors
    /// Without a netlink socket.
    pub fn new(config: &NeConfig) -> Result<Option<Self>, HostAddressError> {
        if !Family::ALL.into_iter().any(|family| config.intercepts(family)) {
            return Ok(None);
        }
        let (addresses, driver) = HostAddresses::open("necp-ne")?;
        tokio::spawn(driver);
        Ok(Some(Self { fixed: fixed(config), addresses }))
    }

    /// Brings the packet path up to date; what goes wrong is logged, and holds as before.
    pub async fn refresh(&self, plane: &mut Plane) {
        let own = match self.addresses.list().await {
            Ok(own) => own,
            Err(error) => {
                return tracing::error!(%error, "this host's addresses are not known: `intercept` goes by the old ones");
            }
        };
        let own = own.iter().flat_map(|own| own_addresses(own.net)).map(|own| (AddressSet::OWN, own));
        let all: BTreeSet<_> = self.fixed.iter().copied().chain(own).collect();
        if let Err(error) = plane.set_crossings(&all) {
            tracing::error!(%error, "`intercept` goes by old addresses");
        }
    }
}

/// The loopback's addresses, and those that no router takes any further: link-local ones and groups.
const NEAR: [IpNet; 4] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
    IpNet::V6(LINK_LOCAL),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8)),
];
const LINK_LOCAL: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10);

/// An address of this host, and its subnet's anycast address, which every router there has (RFC 4291 §2.6.1; not on links between
/// two routers, RFC 6164).
fn own_addresses(net: IpNet) -> impl Iterator<Item = IpNet> {
    let anycast = matches!(net, IpNet::V6(_)) && net.prefix_len() < 127;
    [Some(net.addr()), anycast.then(|| net.network())].into_iter().flatten().map(IpNet::from)
}

/// What the configuration says. VIPs are this host's own, also where somebody else puts them on it or not yet.
fn fixed(config: &NeConfig) -> BTreeSet<(AddressSet, IpNet)> {
    let mut all: BTreeSet<_> = NEAR.map(|net| (AddressSet::OWN, net)).into();
    for (farm, number) in config.farms.iter().zip(0..) {
        all.extend(farm.vips.iter().map(|vip| (AddressSet::OWN, IpNet::from(*vip))));
        if farm.intercept.is_empty() {
            continue;
        }
        all.extend(farm.intercept.iter().map(|net| (AddressSet::intercepted(number), *net)));
        let servers = farm.servers.iter().copied().chain([IpNet::V6(LINK_LOCAL)]);
        all.extend(servers.map(|net| (AddressSet::servers(number), net)));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_farm_has_sets_of_its_own() {
        let farm = |name: &str, place: &str, net: &str| {
            format!(
                "[[farm]]\nname = \"{name}\"\n{place}\nservices = [\"tcp/80\"]\nforwarding = [\"l2\"]\n\
                 servers = [\"{net}\"]\nauth = \"none\"\n"
            )
        };
        let web = farm("web", "vips = [\"192.0.2.10\", \"2001:db8::10\"]", "10.0.0.0/24\", \"2001:db8:1::/64");
        let proxies = farm("proxies", "intercept = [\"0.0.0.0/0\", \"::/0\"]", "10.0.1.0/24\", \"2001:db8:2::/64");
        let config = NeConfig::parse(&format!("interfaces = [\"eth0\"]\n{web}{proxies}")).expect("a good file");
        let own = ["127.0.0.0/8", "192.0.2.10/32", "::1/128", "fe80::/10", "ff00::/8", "2001:db8::10/128"];
        let wanted = [
            (AddressSet::OWN, &own[..]),
            (AddressSet::intercepted(1), &["0.0.0.0/0", "::/0"]),
            // What has a link-local source is no router's business either.
            (AddressSet::servers(1), &["10.0.1.0/24", "2001:db8:2::/64", "fe80::/10"]),
        ];
        let net = |text: &&str| text.parse::<IpNet>().expect("a prefix");
        let wanted = wanted.into_iter().flat_map(|(set, nets)| nets.iter().map(move |text| (set, net(text))));
        assert_eq!(fixed(&config), wanted.collect());
    }

    #[test]
    fn a_router_has_the_anycast_addresses_of_its_subnets() {
        let own =
            |text: &str| own_addresses(text.parse().expect("a prefix")).map(|net| net.to_string()).collect::<Vec<_>>();
        assert_eq!(own("2001:db8:a::1/64"), ["2001:db8:a::1/128", "2001:db8:a::/128"]);
        assert_eq!(own("2001:db8:a::1/127"), ["2001:db8:a::1/128"]);
        assert_eq!(own("10.0.0.1/24"), ["10.0.0.1/32"]);
    }
}
