//! The virtual addresses on this host (`manage_vips = true`): added, announced, taken away.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::plane::PortInfo;
use crate::plane::host_address::{
    Added, HostAddress, HostAddressError, HostAddresses, Scope, announce, interface_index,
};

/// What marks our addresses, `eth0:necp-ne`.
const TAG: &str = "necp-ne";

/// The virtual addresses that are on this host.
pub struct Vips {
    addresses: HostAddresses,
    vips: Vec<IpAddr>,
    /// Those that are ours to take away: kernel index of the interface, address.
    ours: Vec<(u32, IpNet)>,
}

impl Vips {
    /// Puts each address on the interface whose subnet contains it, else on `lo`, or of IPv6 on all of ours, where neighbours that
    /// ask for it are answered: those of IPv4 are answered for any address of the host. Removes what an earlier daemon left.
    ///
    /// # Errors
    /// See [`HostAddressError`]; what was added before stays, for the next start to find.
    pub async fn put(vips: Vec<IpAddr>, ports: &[PortInfo]) -> Result<Self, HostAddressError> {
        let (addresses, driver) = HostAddresses::open(TAG)?;
        tokio::spawn(driver);
        let there = addresses.list().await?;
        let mut ours = Vec::new();
        let places = vips.iter().flat_map(|&vip| places(vip, ports, &there).into_iter().map(move |name| (vip, name)));
        for (vip, name) in places {
            let net = IpNet::from(vip);
            match addresses.add(name, net, Scope::Global).await? {
                Added::New | Added::Ours => {
                    tracing::info!("VIP {vip} is on {name}");
                    ours.push((interface_index(name)?, net));
                }
                Added::Foreign => {
                    tracing::info!("VIP {vip} was on {name} before: it will stay there")
                }
            }
        }
        let stale = there.iter().filter(|one| one.ours && !ours.contains(&(one.ifindex, one.net)));
        // Another instance on this host may have its own: only addresses on our interfaces are certainly not its.
        for one in stale.filter(|one| ports.iter().any(|port| port.ifindex == one.ifindex)) {
            if addresses.remove(one.ifindex, one.net).await? {
                tracing::info!("VIP {} is no longer configured and was removed", one.net.addr());
            }
        }
        Ok(Self { addresses, vips, ours })
    }

    /// Tells every link that the addresses are here.
    pub fn announce(&self, ports: &[PortInfo]) {
        for port in ports.iter().filter(|port| port.mac != [0; 6]) {
            for vip in &self.vips {
                if let Err(error) = announce(port.ifindex, port.mac, *vip) {
                    tracing::debug!(%error, "VIP {vip} was not announced on {}", port.name);
                }
            }
        }
    }

    /// Takes away those that are ours.
    pub async fn withdraw(self) {
        for (ifindex, net) in self.ours {
            match self.addresses.remove(ifindex, net).await {
                Ok(true) => tracing::info!("VIP {} is withdrawn", net.addr()),
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "VIP {} stays; remove it with `ip addr del`", net.addr()),
            }
        }
    }
}

/// The interface of ours whose subnet contains the address, else see [`Vips::put`].
fn places<'a>(vip: IpAddr, ports: &'a [PortInfo], there: &[HostAddress]) -> Vec<&'a str> {
    let contains =
        |one: &&HostAddress| !one.ours && one.net.prefix_len() < one.net.max_prefix_len() && one.net.contains(&vip);
    let subnets = there.iter().filter(contains);
    let ours = |one: &HostAddress| ports.iter().find(|port| port.ifindex == one.ifindex);
    match subnets.filter_map(ours).next() {
        Some(port) => vec![port.name.as_str()],
        None if vip.is_ipv4() => vec!["lo"],
        None => ports.iter().map(|port| port.name.as_str()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plane::AttachedMode;

    #[test]
    fn a_vip_goes_where_its_subnet_is() {
        let port = |name: &str, ifindex| PortInfo {
            index: ifindex as u8,
            name: name.into(),
            ifindex,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            mode: AttachedMode::Native,
        };
        let ports = [port("eth0", 2), port("eth1", 3)];
        let on =
            |ifindex, net: &str| HostAddress { ifindex, net: net.parse().expect("a net"), label: None, ours: false };
        let there = [
            on(1, "127.0.0.1/8"),
            on(9, "10.1.0.9/8"),
            on(2, "10.0.0.1/24"),
            on(3, "10.1.0.1/24"),
            on(3, "10.2.0.7/32"),
            on(2, "fe80::1/64"),
            on(3, "2001:db8::1/64"),
        ];
        assert_eq!(places([10, 0, 0, 100].into(), &ports, &there), ["eth0"]);
        assert_eq!(places([10, 1, 0, 100].into(), &ports, &there), ["eth1"]);
        assert_eq!(places([192, 0, 2, 1].into(), &ports, &there), ["lo"]);
        assert_eq!(places([10, 2, 0, 7].into(), &ports, &there), ["lo"], "no subnet, and eth9 is not ours");
        let six = |text: &str| places(text.parse().expect("an address"), &ports, &there);
        assert_eq!(six("2001:db8::10"), ["eth1"]);
        assert_eq!(six("2001:db8:1::10"), ["eth0", "eth1"], "where it is asked for");
    }
}
