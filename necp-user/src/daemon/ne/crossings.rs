//! What counts when a packet crosses this host, if some farm intercepts: the farms' prefixes, and this host's own addresses as
//! they come and go.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use necp_ebpf::abi::AddressSet;

use crate::config::ne::NeConfig;
use crate::plane::Plane;
use crate::plane::host_address::{HostAddressError, HostAddresses};

/// The sets of addresses, and where own ones are read.
pub struct Crossings {
    fixed: BTreeSet<(AddressSet, Ipv4Net)>,
    addresses: HostAddresses,
}

impl Crossings {
    /// None if no farm intercepts. To be called inside a tokio runtime.
    ///
    /// # Errors
    /// Without a netlink socket.
    pub fn new(config: &NeConfig) -> Result<Option<Self>, HostAddressError> {
        if !config.intercepts() {
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
        let own = own.iter().filter_map(|one| ipv4(one.net.addr()));
        let own = own.map(|own| (AddressSet::OWN, Ipv4Net::from(own)));
        let all: BTreeSet<_> = self.fixed.iter().copied().chain(own).collect();
        if let Err(error) = plane.set_crossings(&all) {
            tracing::error!(%error, "`intercept` goes by old addresses");
        }
    }
}

/// What the configuration says. VIPs are this host's own, also where somebody else puts them on it or not yet.
fn fixed(config: &NeConfig) -> BTreeSet<(AddressSet, Ipv4Net)> {
    let loopback = Ipv4Net::new_assert([127, 0, 0, 0].into(), 8);
    let mut all: BTreeSet<_> = [(AddressSet::OWN, loopback)].into();
    for (farm, number) in config.farms.iter().zip(0..) {
        let vips = farm.vips.iter().filter_map(|vip| ipv4(*vip));
        all.extend(vips.map(|vip| (AddressSet::OWN, Ipv4Net::from(vip))));
        if !farm.intercept.is_empty() {
            all.extend(farm.intercept.iter().map(|net| (AddressSet::intercepted(number), *net)));
            // What is intercepted is IPv4, so it never comes from a server of the other family.
            let servers =
                farm.servers.iter().filter_map(|net| if let IpNet::V4(net) = net { Some(*net) } else { None });
            all.extend(servers.map(|net| (AddressSet::servers(number), net)));
        }
    }
    all
}

/// What is intercepted is IPv4.
fn ipv4(address: IpAddr) -> Option<Ipv4Addr> {
    if let IpAddr::V4(address) = address { Some(address) } else { None }
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
        let web = farm("web", "vips = [\"192.0.2.10\"]", "10.0.0.0/24");
        let proxies = farm("proxies", "intercept = [\"0.0.0.0/0\"]", "10.0.1.0/24");
        let config = NeConfig::parse(&format!("interfaces = [\"eth0\"]\n{web}{proxies}")).expect("a good file");
        let net = |text: &str| text.parse::<Ipv4Net>().expect("a prefix");
        let wanted = [
            (AddressSet::OWN, net("127.0.0.0/8")),
            (AddressSet::OWN, net("192.0.2.10/32")),
            (AddressSet::intercepted(1), net("0.0.0.0/0")),
            (AddressSet::servers(1), net("10.0.1.0/24")),
        ];
        assert_eq!(fixed(&config), wanted.into());
    }
}
