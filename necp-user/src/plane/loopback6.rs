//! IPv6 addresses on `lo`: a layer-2 server's virtual addresses.
//!
//! The kernel answers neighbour solicitations only for addresses of the interface on which they arrive, and sends its own
//! only from such, whatever is set: so an address on `lo` is unknown to every link, and IPv6 has and needs no counterpart
//! of `arp_ignore` and `arp_announce`. No duplicate is looked for, since there is no link to ask; and the address is deprecated
//! from the start (RFC 4862 §5.5.4), so that this host's own connections come from another one if it has any.
//!
//! IPv6 addresses have no labels: whose they are is for the caller to remember.

use std::future::Future;
use std::net::{IpAddr, Ipv6Addr};

use futures_util::TryStreamExt as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, CacheInfo};
use rtnetlink::AddressMessageBuilder;

use super::host_address::{HostAddressError, errno, interface_index, refused};

/// The interface.
const LOOPBACK: &str = "lo";
/// The whole address.
const WHOLE: u8 = 128;

/// The IPv6 addresses of the network namespace in which it was opened.
#[derive(Debug, Clone)]
pub struct Loopback6 {
    handle: rtnetlink::Handle,
    lo: u32,
}

impl Loopback6 {
    /// Opens a netlink socket in the calling thread's network namespace. The future drives the socket: spawn it, or nothing
    /// below ever completes; it ends when the last clone is dropped.
    ///
    /// # Errors
    /// [`HostAddressError::Open`], and [`HostAddressError::NoInterface`] where there is no `lo`.
    pub fn open() -> Result<(Self, impl Future<Output = ()> + Send + 'static + use<>), HostAddressError> {
        let lo = interface_index(LOOPBACK)?;
        let (connection, handle, _) = rtnetlink::new_connection().map_err(HostAddressError::Open)?;
        Ok((Self { handle, lo }, connection))
    }

    /// Kernel indices of the interfaces that have this address; `lo` first, if it is there.
    ///
    /// # Errors
    /// [`HostAddressError::Refused`].
    pub async fn find(&self, address: Ipv6Addr) -> Result<Vec<u32>, HostAddressError> {
        let mut request = self.handle.address().get();
        request.message_mut().header.family = AddressFamily::Inet6;
        let messages: Vec<AddressMessage> =
            request.execute().try_collect().await.map_err(|error| refused("list addresses", error))?;
        let is = |message: &&AddressMessage| {
            let address = AddressAttribute::Address(IpAddr::V6(address));
            message.attributes.contains(&address)
        };
        let mut found: Vec<u32> = messages.iter().filter(is).map(|message| message.header.index).collect();
        found.sort_unstable_by_key(|index| (*index != self.lo, *index));
        Ok(found)
    }

    /// Whether `lo` has this address.
    ///
    /// # Errors
    /// [`HostAddressError::Refused`].
    pub async fn has(&self, address: Ipv6Addr) -> Result<bool, HostAddressError> {
        Ok(self.find(address).await?.first() == Some(&self.lo))
    }

    /// Adds an address; false if it was there.
    ///
    /// # Errors
    /// [`HostAddressError::Refused`]; where IPv6 is switched off on `lo`, too.
    pub async fn add(&self, address: Ipv6Addr) -> Result<bool, HostAddressError> {
        let mut message = self.message(address);
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        let mut lifetimes = CacheInfo::default();
        (lifetimes.ifa_preferred, lifetimes.ifa_valid) = (0, u32::MAX);
        message.attributes.push(AddressAttribute::CacheInfo(lifetimes));
        let mut request = self.handle.address().add(self.lo, IpAddr::V6(address), WHOLE);
        *request.message_mut() = message;
        match request.execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(refused(&format!("add {address}/{WHOLE} to {LOOPBACK}"), error)),
        }
    }

    /// Removes an address; false if it was not there.
    ///
    /// # Errors
    /// [`HostAddressError::Refused`].
    pub async fn remove(&self, address: Ipv6Addr) -> Result<bool, HostAddressError> {
        match self.handle.address().del(self.message(address)).execute().await {
            Ok(()) => Ok(true),
            Err(error) if matches!(errno(&error), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) => Ok(false),
            Err(error) => Err(refused(&format!("remove {address}/{WHOLE} from {LOOPBACK}"), error)),
        }
    }

    fn message(&self, address: Ipv6Addr) -> AddressMessage {
        AddressMessageBuilder::<Ipv6Addr>::new().index(self.lo).address(address, WHOLE).build()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::plane::throwaway_netns::in_new_netns;

    const VIP: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10);

    #[test]
    fn an_address_comes_and_goes() {
        in_new_netns(async || {
            let (lo, driver) = Loopback6::open().expect("a netlink socket");
            tokio::spawn(driver);
            assert!(!lo.has(VIP).await.expect("a list"));
            assert!(lo.add(VIP).await.expect("added"));
            assert!(!lo.add(VIP).await.expect("no error"), "it was there");
            assert!(lo.has(VIP).await.expect("a list"));
            // It can be used at once: nobody looks for a duplicate.
            tokio::net::UdpSocket::bind((VIP, 0)).await.expect("an address of this host");
            assert!(lo.remove(VIP).await.expect("removed"));
            assert!(!lo.remove(VIP).await.expect("no error"), "it was there no more");
            tokio::net::UdpSocket::bind((VIP, 0)).await.expect_err("it is gone");
        });
    }

    /// Whoever solicits a neighbour for it on a link hears nothing, whatever the settings; for an address of the link itself
    /// there is an answer.
    #[test]
    fn the_link_does_not_learn_of_it() {
        in_new_netns(async || {
            let (connection, handle, _) = rtnetlink::new_connection().expect("a netlink socket");
            tokio::spawn(connection);
            handle.link().add(rtnetlink::LinkVeth::new("na", "nb").build()).execute().await.expect("a veth pair");
            for name in ["lo", "na", "nb"] {
                let up = rtnetlink::LinkUnspec::new_with_name(name).up().build();
                handle.link().set(up).execute().await.expect("the link comes up");
            }
            let own = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
            let index = interface_index("nb").expect("nb");
            let mut message = AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(own, 64).build();
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            let mut request = handle.address().add(index, IpAddr::V6(own), 64);
            *request.message_mut() = message;
            request.execute().await.expect("added");
            let (lo, driver) = Loopback6::open().expect("a netlink socket");
            tokio::spawn(driver);
            lo.add(VIP).await.expect("added");
            for setting in ["forwarding", "proxy_ndp"] {
                std::fs::write(format!("/proc/sys/net/ipv6/conf/all/{setting}"), "1").expect("a setting");
            }
            // A link that has just come up may drop what is sent in its first moments.
            assert!(wait_for_answer(own, 100), "the link works");
            assert!(!wait_for_answer(VIP, 10), "nobody may learn of the VIP");
        });
    }

    /// Whether one of so many solicitations for an address, sent from `na`, is answered within 100 ms.
    fn wait_for_answer(target: Ipv6Addr, tries: usize) -> bool {
        let all = socket2::Protocol::from(i32::from((libc::ETH_P_IPV6 as u16).to_be()));
        let heard = socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, Some(all)).expect("a socket");
        heard.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
        // SAFETY: `sockaddr_ll` is one of the `sockaddr_*` types that fit into the storage, and the length is its own.
        let (_, to) = unsafe {
            socket2::SockAddr::try_init(|storage, length| {
                let to = &mut *storage.cast::<libc::sockaddr_ll>();
                to.sll_family = libc::AF_PACKET as u16;
                to.sll_protocol = (libc::ETH_P_IPV6 as u16).to_be();
                to.sll_ifindex = interface_index("na").expect("na") as i32;
                *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
                Ok(())
            })
            .expect("an address")
        };
        heard.bind(&to).expect("bound to na");
        let advertisement = [&[136][..], &target.octets()].concat();
        let mut buffer = [0; 256];
        for _ in 0..tries {
            heard.send_to(&solicitation(target), &to).expect("sent");
            while let Ok(length) = std::io::Read::read(&mut &heard, &mut buffer) {
                let frame = &buffer[..length];
                if length >= 78 && frame[20] == 58 && frame[54] == advertisement[0] && frame[62..78] == advertisement[1..] {
                    return true;
                }
            }
        }
        false
    }

    /// A neighbour solicitation (RFC 4861 §4.3) from fe80::7 to all nodes.
    fn solicitation(target: Ipv6Addr) -> Vec<u8> {
        const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
        let source = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 7).octets();
        let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets();
        let mut icmp = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), &[1, 1], &MAC].concat();
        let pseudo = [&source[..], &to, &(icmp.len() as u32).to_be_bytes(), &[0, 0, 0, 58]].concat();
        let words = [&pseudo[..], &icmp].concat();
        let sum: u32 = words.as_chunks().0.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        icmp[2..4].copy_from_slice(&(!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes());
        let header = [&[0x60, 0, 0, 0, 0, icmp.len() as u8, 58, 255][..], &source, &to].concat();
        [&[0x33, 0x33, 0, 0, 0, 1][..], &MAC, &[0x86, 0xdd], &header, &icmp].concat()
    }
}
