//! Addresses on this host's interfaces: added, recognised as ours later, taken away, announced.
//!
//! Both roles put virtual addresses on a host: a network element on the interface where clients look for them, a layer-2
//! server on `lo`, where nobody may learn of them by ARP or neighbour discovery. An address that was there before is never
//! touched: ours of IPv4 carry an address label (`eth0:necp-ne`, shown by `ip addr`), and the kernel is asked to remove by
//! that label, so that even an address that somebody removed and added again in between stays. IPv6 has no labels: ours
//! carry a number as their protocol (`proto 0x80` in `ip addr` for a network element, from Linux 5.18 on). They are for use at once, without a search for
//! duplicates (another balancer may have them too), and deprecated, so that this host's own connections come from others.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use rtnetlink::AddressMessageBuilder;
use thiserror::Error;

/// Longest address label in bytes (`IFNAMSIZ` less the final NUL).
const LABEL_MAX: usize = libc::IFNAMSIZ - 1;

/// Why an address could not be listed, added or removed.
#[derive(Debug, Error)]
pub enum HostAddressError {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Open(#[source] io::Error),
    /// There is no interface of this name in this network namespace.
    #[error("there is no interface `{0}` here; `ip link` lists what there is")]
    NoInterface(String),
    /// The kernel refused a request.
    #[error("cannot {what}: {source}{}", hint(source))]
    Refused {
        /// The request, such as `add 192.0.2.10/32 to interface 1`.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What an operator can do about a refusal.
fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => " (this needs root or the capability CAP_NET_ADMIN)",
        _ => "",
    }
}

/// How far an address may be heard of as a source address of this host's own traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Usable as any other address.
    Global,
    /// Never chosen as the source of packets to other hosts; a socket that is bound to it can still answer from it.
    Host,
}

/// What became of [`HostAddresses::add`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    /// It was not there, and is now.
    New,
    /// It was there with our label: left by an earlier run. It is ours to remove.
    Ours,
    /// It was there, put by somebody else. It is not ours to remove.
    Foreign,
}

/// One address of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostAddress {
    /// Kernel index of the interface that has it.
    pub ifindex: u32,
    /// The address with its prefix length.
    pub net: IpNet,
    /// The address label, of IPv4; by default the interface's name.
    pub label: Option<String>,
    /// Whether it carries the tag of the [`HostAddresses`] that listed it.
    pub ours: bool,
}

/// The addresses of the network namespace in which it was opened.
#[derive(Debug, Clone)]
pub struct HostAddresses {
    handle: rtnetlink::Handle,
    tag: &'static str,
}

impl HostAddresses {
    /// Opens a netlink socket in the calling thread's network namespace.
    ///
    /// `tag` marks what is ours, such as `necp-ne`; at most 13 bytes, so that the label keeps a letter of the
    /// interface's name. The future drives the socket: spawn it, or nothing below ever completes; it ends when the
    /// last clone is dropped.
    ///
    /// # Errors
    /// [`HostAddressError::Open`].
    pub fn open(
        tag: &'static str,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static + use<>), HostAddressError> {
        assert!(!tag.is_empty() && tag.len() <= LABEL_MAX - 2, "an address label has room for 13 bytes of tag");
        let (connection, handle, _) = rtnetlink::new_connection().map_err(HostAddressError::Open)?;
        Ok((Self { handle, tag }, connection))
    }

    /// All addresses here, of both families.
    ///
    /// # Errors
    /// [`HostAddressError::Refused`].
    pub async fn list(&self) -> Result<Vec<HostAddress>, HostAddressError> {
        let messages: Vec<AddressMessage> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused("list addresses", error))?;
        Ok(messages.iter().filter_map(|message| self.host_address(message)).collect())
    }

    /// Adds an address to an interface. `name` is the interface's name, for the label.
    ///
    /// # Errors
    /// [`HostAddressError::Refused`]; the address being there already is no error, see [`Added`].
    pub async fn add(&self, name: &str, net: IpNet, scope: Scope) -> Result<Added, HostAddressError> {
        let ifindex = interface_index(name)?;
        let mut message = message(ifindex, net);
        match net {
            IpNet::V4(_) => {
                message.header.scope = match scope {
                    Scope::Global => AddressScope::Universe,
                    Scope::Host => AddressScope::Host,
                };
                message.attributes.push(AddressAttribute::Label(label(name, self.tag)));
            }
            IpNet::V6(_) => {
                let mut times = CacheInfo::default();
                (times.ifa_preferred, times.ifa_valid) = (0, u32::MAX);
                message.attributes.extend([
                    AddressAttribute::Flags(AddressFlags::Nodad),
                    AddressAttribute::CacheInfo(times),
                    AddressAttribute::Protocol(AddressProtocol::Other(protocol(self.tag))),
                ]);
            }
        }
        let mut request = self.handle.address().add(ifindex, net.addr(), net.prefix_len());
        *request.message_mut() = message;
        match request.execute().await {
            Ok(()) => Ok(Added::New),
            Err(error) if errno(&error) == Some(libc::EEXIST) => {
                let there = self.list().await?.into_iter().find(|one| one.ifindex == ifindex && one.net == net);
                Ok(if there.is_some_and(|one| one.ours) { Added::Ours } else { Added::Foreign })
            }
            Err(error) => Err(refused(&format!("add {net} to {name}"), error)),
        }
    }

    /// Removes an address that is ours; `false` if it was not there, or not ours.
    ///
    /// # Errors
    /// [`HostAddressError::Refused`].
    pub async fn remove(&self, ifindex: u32, net: IpNet) -> Result<bool, HostAddressError> {
        let Some(found) =
            self.list().await?.into_iter().find(|one| one.ours && one.ifindex == ifindex && one.net == net)
        else {
            return Ok(false);
        };
        let mut message = message(ifindex, net);
        message.attributes.extend(found.label.map(AddressAttribute::Label));
        match self.handle.address().del(message).execute().await {
            Ok(()) => Ok(true),
            // Gone, or no longer under our label, since the list was read.
            Err(error) if matches!(errno(&error), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) => Ok(false),
            Err(error) => Err(refused(&format!("remove {net} from interface {ifindex}"), error)),
        }
    }

    fn host_address(&self, message: &AddressMessage) -> Option<HostAddress> {
        let mut address = None;
        let (mut label, mut mark) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                // On a point-to-point interface ADDRESS is the peer's, LOCAL ours.
                AddressAttribute::Local(local) => address = Some(*local),
                AddressAttribute::Address(any) => address = address.or(Some(*any)),
                AddressAttribute::Label(text) => label = Some(text.clone()),
                AddressAttribute::Protocol(AddressProtocol::Other(number)) => mark = Some(*number),
                _ => {}
            }
        }
        let net = IpNet::new(address?, message.header.prefix_len).ok()?;
        let ours = match net {
            IpNet::V4(_) => label.as_deref().is_some_and(|label| is_ours(label, self.tag)),
            IpNet::V6(_) => mark == Some(protocol(self.tag)),
        };
        Some(HostAddress { ifindex: message.header.index, net, label, ours })
    }
}

/// Kernel index of the interface `name` in the calling thread's network namespace.
///
/// # Errors
/// [`HostAddressError::NoInterface`].
pub fn interface_index(name: &str) -> Result<u32, HostAddressError> {
    let missing = || HostAddressError::NoInterface(name.into());
    let text = std::ffi::CString::new(name).map_err(|_| missing())?;
    // SAFETY: `text` is a NUL-terminated string that outlives the call.
    match unsafe { libc::if_nametoindex(text.as_ptr()) } {
        0 => Err(missing()),
        index => Ok(index),
    }
}

/// Tells the link that `address` is at `mac`: one gratuitous ARP request (RFC 5227 §2.3), or one unsolicited neighbour
/// advertisement (RFC 4861 §7.2.6), to all on the link of interface `ifindex` of the calling thread's network namespace. A
/// link that has just come up may drop it: repeat it.
///
/// # Errors
/// Opening a packet socket needs CAP_NET_RAW; sending fails when the interface is down (`ENETDOWN`) or gone (`ENXIO`).
pub fn announce(ifindex: u32, mac: [u8; 6], address: IpAddr) -> io::Result<()> {
    use socket2::{Domain, Protocol, Socket, Type};
    // Protocol 0: a socket that sends only; nothing piles up in its receive queue.
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
    // SAFETY: `sockaddr_ll` is one of the `sockaddr_*` types that fit into the storage, and the length is its own.
    let (_, to) = unsafe {
        socket2::SockAddr::try_init(|storage, length| {
            let to = &mut *storage.cast::<libc::sockaddr_ll>();
            to.sll_family = libc::AF_PACKET as u16;
            to.sll_protocol = (libc::ETH_P_ARP as u16).to_be();
            to.sll_ifindex = ifindex as i32;
            to.sll_halen = 6;
            to.sll_addr[..6].fill(0xff);
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })?
    };
    // The address in the frame counts, on Ethernet; the socket's is a formality.
    match address {
        IpAddr::V4(address) => socket.send_to(&gratuitous_arp(mac, address), &to),
        IpAddr::V6(address) => socket.send_to(&unsolicited_advertisement(mac, address), &to),
    }
    .map(|_| ())
}

/// The frame that [`announce`] sends: an ARP request whose sender and target are the same address.
fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr) -> [u8; 42] {
    let mut frame = [0; 42];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    // EtherType ARP; Ethernet, IPv4, lengths 6 and 4, request.
    frame[12..22].copy_from_slice(&[0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&address.octets());
    frame[38..42].copy_from_slice(&address.octets());
    frame
}

/// All nodes on the link (RFC 4291 §2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The frame of IPv6: a neighbour advertisement to all nodes that overrides what they had.
fn unsolicited_advertisement(mac: [u8; 6], address: Ipv6Addr) -> [u8; 86] {
    let mut frame = [0; 86];
    frame[..6].copy_from_slice(&[0x33, 0x33, 0, 0, 0, 1]);
    frame[6..12].copy_from_slice(&mac);
    // EtherType IPv6; version 6, 32 bytes of ICMPv6, hop limit 255.
    frame[12..22].copy_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255]);
    frame[22..38].copy_from_slice(&address.octets());
    frame[38..54].copy_from_slice(&ALL_NODES.octets());
    // Type 136, the override flag, the target; then the option of its link-layer address (RFC 4861 §4.4, §4.6.1).
    frame[54] = 136;
    frame[58] = 0x20;
    frame[62..78].copy_from_slice(&address.octets());
    frame[78..80].copy_from_slice(&[2, 1]);
    frame[80..86].copy_from_slice(&mac);
    let checksum = icmpv6_checksum(&frame[22..54], &frame[54..86]);
    frame[56..58].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// With its pseudo-header (RFC 8200 §8.1); the checksum's own place holds 0.
fn icmpv6_checksum(addresses: &[u8], message: &[u8]) -> u16 {
    let words = addresses.chunks_exact(2).chain(message.chunks_exact(2));
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let mut sum = sum + message.len() as u32 + 58;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn message(ifindex: u32, net: IpNet) -> AddressMessage {
    match net.addr() {
        IpAddr::V4(address) => {
            AddressMessageBuilder::<Ipv4Addr>::new().index(ifindex).address(address, net.prefix_len()).build()
        }
        IpAddr::V6(address) => {
            AddressMessageBuilder::<Ipv6Addr>::new().index(ifindex).address(address, net.prefix_len()).build()
        }
    }
}

/// The address protocol of a tag: one that neither the kernel nor, of those that are known, another program uses.
fn protocol(tag: &str) -> u8 {
    tag.bytes().fold(0_u8, |sum, byte| sum.rotate_left(3) ^ byte) | 0x80
}

/// `NAME:TAG`, the name cut short where the two do not fit.
fn label(name: &str, tag: &str) -> String {
    let room = LABEL_MAX - 1 - tag.len();
    let cut = (0..=room.min(name.len())).rev().find(|&at| name.is_char_boundary(at)).unwrap_or(0);
    format!("{}:{tag}", &name[..cut])
}

fn is_ours(label: &str, tag: &str) -> bool {
    label.rsplit_once(':').is_some_and(|(_, end)| end == tag)
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(answer) => answer.to_io().raw_os_error(),
        _ => None,
    }
}

fn refused(what: &str, error: rtnetlink::Error) -> HostAddressError {
    let source = match &error {
        rtnetlink::Error::NetlinkError(answer) => answer.to_io(),
        other => io::Error::other(other.to_string()),
    };
    HostAddressError::Refused { what: what.into(), source }
}

#[cfg(test)]
mod silence;
#[cfg(test)]
mod tests {
    use super::*;
    use crate::plane::throwaway_netns::in_new_netns;

    const VIP: IpNet = IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 10)), 32);
    const VIP6: IpNet = IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10)), 128);

    fn open() -> HostAddresses {
        let (addresses, driver) = HostAddresses::open("necp-t").expect("a netlink socket");
        tokio::spawn(driver);
        addresses
    }

    #[test]
    fn an_address_comes_and_goes() {
        in_new_netns(async || {
            let (addresses, lo) = (open(), interface_index("lo").expect("lo"));
            assert_eq!(addresses.add("lo", VIP, Scope::Host).await.expect("added"), Added::New);
            let listed = addresses.list().await.expect("a list");
            let one = listed.iter().find(|one| one.net == VIP).expect("it is there");
            assert_eq!((one.ifindex, one.ours, one.label.as_deref()), (lo, true, Some("lo:necp-t")));
            assert_eq!(addresses.add("lo", VIP, Scope::Host).await.expect("there"), Added::Ours);
            assert!(addresses.remove(lo, VIP).await.expect("removed"));
            assert!(!addresses.remove(lo, VIP).await.expect("gone"), "it was there no more");
            assert!(addresses.list().await.expect("a list").iter().all(|one| one.net != VIP));
        });
    }

    #[test]
    fn an_ipv6_address_comes_and_goes_and_is_recognised() {
        in_new_netns(async || {
            let (addresses, lo) = (open(), interface_index("lo").expect("lo"));
            let (other, driver) = HostAddresses::open("other").expect("a netlink socket");
            tokio::spawn(driver);
            assert_eq!(addresses.add("lo", VIP6, Scope::Host).await.expect("added"), Added::New);
            let find = |listed: Vec<HostAddress>| listed.into_iter().find(|one| one.net == VIP6);
            let one = find(addresses.list().await.expect("a list")).expect("it is there");
            assert_eq!((one.ifindex, one.ours, one.label), (lo, true, None));
            assert!(!find(other.list().await.expect("a list")).expect("it is there").ours);
            assert_eq!(open().add("lo", VIP6, Scope::Host).await.expect("there"), Added::Ours);
            assert_eq!(other.add("lo", VIP6, Scope::Host).await.expect("there"), Added::Foreign);
            assert!(!other.remove(lo, VIP6).await.expect("not its"));
            assert!(addresses.remove(lo, VIP6).await.expect("its own"));
            assert!(find(addresses.list().await.expect("a list")).is_none());
        });
    }

    /// `na` and `nb`, one link, both up.
    async fn veth_pair() -> rtnetlink::Handle {
        let (connection, handle, _) = rtnetlink::new_connection().expect("a netlink socket");
        tokio::spawn(connection);
        handle.link().add(rtnetlink::LinkVeth::new("na", "nb").build()).execute().await.expect("a veth pair");
        for name in ["na", "nb"] {
            let up = rtnetlink::LinkUnspec::new_with_name(name).up().build();
            handle.link().set(up).execute().await.expect("the link comes up");
        }
        handle
    }

    #[test]
    fn an_advertisement_is_a_frame_that_the_kernel_takes() {
        in_new_netns(async || {
            let handle = veth_pair().await;
            // What was learnt of the address before, from somebody else.
            let (na, nb) = (interface_index("na").expect("na"), interface_index("nb").expect("nb"));
            let stale = netlink_packet_route::neighbour::NeighbourState::Stale;
            let old = handle.neighbours().add(nb, VIP6.addr()).state(stale).link_layer_address(&[2, 0, 0, 0, 0, 6]);
            old.execute().await.expect("an entry");
            for _ in 0..100 {
                announce(na, [2, 0, 0, 0, 0, 7], VIP6.addr()).expect("sent");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                let (neighbours, _changes, driver) = crate::plane::neighbours::Neighbours::open().expect("netlink");
                let driver = tokio::spawn(driver);
                let known = neighbours.list().await.expect("a list").get(&(nb, VIP6.addr())).copied();
                driver.abort();
                if known == Some(crate::plane::neighbours::Reachability::At([2, 0, 0, 0, 0, 7])) {
                    return;
                }
            }
            panic!("none of 100 frames within 5 s has changed the entry");
        });
    }

    #[test]
    fn what_others_added_stays() {
        in_new_netns(async || {
            let (addresses, lo) = (open(), interface_index("lo").expect("lo"));
            let (other, driver) = HostAddresses::open("other").expect("a netlink socket");
            tokio::spawn(driver);
            assert_eq!(other.add("lo", VIP, Scope::Global).await.expect("added"), Added::New);
            assert_eq!(addresses.add("lo", VIP, Scope::Global).await.expect("there"), Added::Foreign);
            assert!(!addresses.remove(lo, VIP).await.expect("no error"));
            assert!(addresses.list().await.expect("a list").iter().any(|one| one.net == VIP && !one.ours));
        });
    }

    #[test]
    fn an_unknown_interface_is_named() {
        in_new_netns(async || {
            let error = open().add("eth99", VIP, Scope::Host).await.expect_err("no such interface");
            assert!(error.to_string().contains("`eth99`"), "{error}");
        });
    }

    #[test]
    fn an_announcement_reaches_the_link() {
        in_new_netns(async || {
            veth_pair().await;
            let arp = socket2::Protocol::from(i32::from((libc::ETH_P_ARP as u16).to_be()));
            let heard = socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, Some(arp)).expect("a socket");
            heard.set_read_timeout(Some(std::time::Duration::from_millis(100))).expect("a timeout");
            let mut buffer = [0; 128];
            // A link that has just come up may drop what is sent in its first moments.
            let length = (0..100).find_map(|_| {
                announce(interface_index("na").expect("na"), [2, 0, 0, 0, 0, 7], VIP.addr()).expect("sent");
                io::Read::read(&mut &heard, &mut buffer).ok()
            });
            let length = length.expect("one of 100 frames within 10 s");
            assert_eq!(buffer[..42.min(length)], gratuitous_arp([2, 0, 0, 0, 0, 7], Ipv4Addr::new(192, 0, 2, 10)));
        });
    }

    #[test]
    fn labels_fit_and_are_recognised() {
        assert_eq!(label("lo", "necp-se"), "lo:necp-se");
        assert_eq!(label("enp0s31f6np0v1x", "necp-ne"), "enp0s31:necp-ne");
        assert!(is_ours("enp0s31:necp-ne", "necp-ne"));
        for other in ["lo", "lo:necp-n", "necp-ne", "lo:necp-ne2", "lo:xnecp-ne"] {
            assert!(!is_ours(other, "necp-ne"), "{other}");
        }
    }
}
