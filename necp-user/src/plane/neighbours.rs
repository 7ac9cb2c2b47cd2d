//! Where hosts are, as the kernel knows it: which interface leads to them, at which MAC address, and whether they answer.
//!
//! Nothing here is configured: routes, neighbour entries and links are read by rtnetlink and followed by its events. The
//! kernel's neighbour entries are also how a dead host is told from a lost session: [`Neighbours::probe`] makes the
//! kernel ask, and an entry whose host does not answer becomes [`Reachability::Failed`] after about 3 s (three unicast or
//! broadcast requests, `retrans_time` apart).

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};
use thiserror::Error;

/// Why the kernel could not be asked.
#[derive(Debug, Error)]
pub enum NeighbourError {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Open(#[source] io::Error),
    /// The kernel refused a request.
    #[error("cannot {what}: {source}")]
    Refused {
        /// The request, such as `look up the route to 10.0.0.11`.
        what: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
}

/// How packets get to a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Kernel index of the interface that they leave by.
    pub ifindex: u32,
    /// The router that they go to first, if the host is not on that link.
    pub gateway: Option<IpAddr>,
    /// This host's address on that way.
    pub source: Option<IpAddr>,
    /// Longest packet that gets there whole, in bytes, where the kernel knows better than the interface's MTU.
    pub mtu: Option<u32>,
}

impl Route {
    /// Whether the host is on a directly connected link: what layer-2 forwarding needs (draft §5.6.1).
    pub fn on_link(&self) -> bool {
        self.gateway.is_none()
    }

    /// Whose MAC address frames to `host` carry.
    pub fn next_hop(&self, host: IpAddr) -> IpAddr {
        self.gateway.unwrap_or(host)
    }
}

/// What the kernel knows of a neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reachability {
    /// Its MAC address, confirmed or not.
    At([u8; 6]),
    /// Being asked for the first time, or no entry.
    Unknown,
    /// Asked, and it did not answer.
    Failed,
}

/// One neighbour entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour {
    /// Kernel index of the interface.
    pub ifindex: u32,
    /// Its address.
    pub address: IpAddr,
    /// What is known of it.
    pub reachability: Reachability,
}

/// Something has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A neighbour entry.
    Neighbour(Neighbour),
    /// An interface: its MAC address, its MTU, up or down, or it is gone.
    Link {
        /// Its kernel index.
        ifindex: u32,
        /// Whether it is up and has a carrier.
        up: bool,
    },
    /// Routes or addresses: look routes up again.
    Routes,
    /// Events were lost: look everything up again.
    Lost,
}

/// The neighbours of the network namespace in which it was opened.
#[derive(Debug, Clone)]
pub struct Neighbours {
    handle: Handle,
}

impl Neighbours {
    /// Opens a netlink socket in the calling thread's network namespace.
    ///
    /// The future drives the socket: spawn it, or nothing else here ever completes. The stream must be drained; it ends
    /// when the driver does.
    ///
    /// # Errors
    /// [`NeighbourError::Open`].
    pub fn open() -> Result<
        (Self, impl Stream<Item = Change> + Send + Unpin + 'static, impl Future<Output = ()> + Send + 'static),
        NeighbourError,
    > {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv6Ifaddr,
        ];
        let (connection, handle, messages) =
            rtnetlink::new_multicast_connection(&groups).map_err(NeighbourError::Open)?;
        let changes = messages.filter_map(|(message, _)| std::future::ready(change(message)));
        Ok((Self { handle }, changes, connection))
    }

    /// How packets get to `host` now; `None` if there is no way, or it is this host itself.
    ///
    /// # Errors
    /// [`NeighbourError::Refused`].
    pub async fn route(&self, host: IpAddr) -> Result<Option<Route>, NeighbourError> {
        let question = match host {
            IpAddr::V4(host) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(host, 32).build(),
            IpAddr::V6(host) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(host, 128).build(),
        };
        let mut answers = std::pin::pin!(self.handle.route().get(question).execute());
        match answers.next().await {
            Some(Ok(message)) => Ok(route_of(&message)),
            None => Ok(None),
            Some(Err(error)) if no_way(&error) => Ok(None),
            Some(Err(source)) => Err(NeighbourError::Refused { what: format!("look up the route to {host}"), source }),
        }
    }

    /// Whether an interface is one end of a veth pair.
    ///
    /// # Errors
    /// [`NeighbourError::Refused`].
    pub async fn is_veth(&self, ifindex: u32) -> Result<bool, NeighbourError> {
        let mut answers = std::pin::pin!(self.handle.link().get().match_index(ifindex).execute());
        let link = answers.try_next().await.map_err(|source| NeighbourError::Refused {
            what: format!("look at the interface of index {ifindex}"),
            source,
        })?;
        Ok(link.is_some_and(|link| link.attributes.iter().any(is_kind_veth)))
    }

    /// All neighbour entries, of both families.
    ///
    /// # Errors
    /// [`NeighbourError::Refused`].
    pub async fn list(&self) -> Result<HashMap<(u32, IpAddr), Reachability>, NeighbourError> {
        let messages: Vec<NeighbourMessage> = self
            .handle
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|source| NeighbourError::Refused { what: "list the neighbours".into(), source })?;
        let entries = messages.iter().filter_map(|message| neighbour(message, false));
        Ok(entries.map(|entry| ((entry.ifindex, entry.address), entry.reachability)).collect())
    }

    /// Makes the kernel ask whether `address` is still there; the answer is a [`Change::Neighbour`].
    ///
    /// # Errors
    /// [`NeighbourError::Refused`].
    pub async fn probe(&self, ifindex: u32, address: IpAddr) -> Result<(), NeighbourError> {
        let add = || self.handle.neighbours().add(ifindex, address).replace();
        // An entry with a MAC address is asked at that address …
        if add().state(NeighbourState::Probe).execute().await.is_ok() {
            return Ok(());
        }
        // … and one without is resolved anew.
        let resolve = add().state(NeighbourState::None).flags(NeighbourFlags::Use).execute().await;
        resolve.map_err(|source| NeighbourError::Refused { what: format!("ask for the neighbour {address}"), source })
    }
}

fn change(message: NetlinkMessage<RouteNetlinkMessage>) -> Option<Change> {
    let message = match message.payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => return Some(Change::Lost),
        _ => return None,
    };
    match message {
        RouteNetlinkMessage::NewNeighbour(entry) => neighbour(&entry, false).map(Change::Neighbour),
        RouteNetlinkMessage::DelNeighbour(entry) => neighbour(&entry, true).map(Change::Neighbour),
        RouteNetlinkMessage::NewLink(link) => Some(link_change(&link, true)),
        RouteNetlinkMessage::DelLink(link) => Some(link_change(&link, false)),
        RouteNetlinkMessage::NewRoute(_)
        | RouteNetlinkMessage::DelRoute(_)
        | RouteNetlinkMessage::NewAddress(_)
        | RouteNetlinkMessage::DelAddress(_) => Some(Change::Routes),
        _ => None,
    }
}

fn link_change(link: &LinkMessage, exists: bool) -> Change {
    let running = link.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp);
    let carrier = !link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::Carrier(0)));
    Change::Link { ifindex: link.header.index, up: exists && running && carrier }
}

fn is_kind_veth(attribute: &LinkAttribute) -> bool {
    matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Veth)))
}

/// `deleted`: an entry that goes is unknown, except that one which failed goes because it failed.
fn neighbour(message: &NeighbourMessage, deleted: bool) -> Option<Neighbour> {
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(inet)) => address = Some(IpAddr::from(*inet)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(inet)) => address = Some(IpAddr::from(*inet)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            _ => {}
        }
    }
    let reachability = match (message.header.state, mac) {
        (NeighbourState::Failed, _) => Reachability::Failed,
        (NeighbourState::Incomplete | NeighbourState::None, _) | (_, None) => Reachability::Unknown,
        _ if deleted => Reachability::Unknown,
        (_, Some(mac)) => Reachability::At(mac),
    };
    Some(Neighbour { ifindex: message.header.ifindex, address: address?, reachability })
}

fn route_of(message: &RouteMessage) -> Option<Route> {
    if message.header.kind != RouteType::Unicast {
        return None;
    }
    let mut ifindex = None;
    let (mut gateway, mut source, mut mtu) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            // IPv4 by a router that has an IPv6 address (RFC 5549).
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some(IpAddr::from(*address)),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(Route { ifindex: ifindex?, gateway, source, mtu })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// The kernel's ways to say that no route leads there.
fn no_way(error: &rtnetlink::Error) -> bool {
    let rtnetlink::Error::NetlinkError(answer) = error else { return false };
    let code = answer.to_io().raw_os_error();
    matches!(code, Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL | libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::TryStreamExt as _;
    use rtnetlink::{LinkUnspec, LinkVeth};

    use super::*;
    use crate::plane::throwaway_netns::in_new_netns;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
    const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
    const AWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 78, 0, 9));
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    /// A veth pair of which nobody uses the other end: who is asked there never answers.
    async fn link(handle: &Handle) -> u32 {
        handle.link().add(LinkVeth::new("na", "nb").build()).execute().await.expect("a veth pair");
        for name in ["na", "nb"] {
            handle.link().set(LinkUnspec::new_with_name(name).up().build()).execute().await.expect("up");
        }
        let links: Vec<_> = handle.link().get().match_name("na").execute().try_collect().await.expect("the link");
        let ifindex = links[0].header.index;
        handle.address().add(ifindex, HERE, 24).execute().await.expect("an address");
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::new(10, 78, 0, 0), 24)
            .gateway(Ipv4Addr::new(10, 77, 0, 2))
            .build();
        handle.route().add(route).execute().await.expect("a route");
        ifindex
    }

    #[test]
    fn routes_tell_what_is_on_the_link() {
        in_new_netns(async || {
            let (neighbours, _changes, driver) = Neighbours::open().expect("a netlink socket");
            tokio::spawn(driver);
            let ifindex = link(&neighbours.handle).await;
            let loopback = 1;
            assert!(neighbours.is_veth(ifindex).await.expect("an answer"));
            assert!(!neighbours.is_veth(loopback).await.expect("an answer"));
            let route = neighbours.route(THERE).await.expect("an answer").expect("a route");
            assert_eq!((route.ifindex, route.on_link(), route.next_hop(THERE)), (ifindex, true, THERE));
            let route = neighbours.route(AWAY).await.expect("an answer").expect("a route");
            assert_eq!((route.ifindex, route.on_link(), route.next_hop(AWAY)), (ifindex, false, THERE));
            assert_eq!(neighbours.route(HERE).await.expect("an answer"), None, "this host itself");
            assert_eq!(neighbours.route(IpAddr::from([203, 0, 113, 1])).await.expect("an answer"), None, "no route");
        });
    }

    const HERE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1));
    const THERE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2));
    const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);
    const AWAY6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd78, 0, 0, 0, 0, 0, 0, 9));

    #[test]
    fn ipv6_routes_and_entries_are_the_same() {
        in_new_netns(async || {
            let (neighbours, mut changes, driver) = Neighbours::open().expect("a netlink socket");
            tokio::spawn(driver);
            let handle = &neighbours.handle;
            let ifindex = link(handle).await;
            let mut add = handle.address().add(ifindex, HERE6, 64);
            add.message_mut().header.flags = rtnetlink::packet_route::address::AddressHeaderFlags::Nodad;
            add.execute().await.expect("an address");
            let away = Ipv6Addr::new(0xfd78, 0, 0, 0, 0, 0, 0, 0);
            let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(away, 64).gateway(ROUTER6);
            handle.route().add(route.output_interface(ifindex).build()).execute().await.expect("a route");

            let route = neighbours.route(THERE6).await.expect("an answer").expect("a route");
            assert_eq!((route.ifindex, route.on_link(), route.source), (ifindex, true, Some(HERE6)));
            let route = neighbours.route(AWAY6).await.expect("an answer").expect("a route");
            assert_eq!((route.on_link(), route.next_hop(AWAY6), route.source), (false, ROUTER6.into(), Some(HERE6)));
            // A new IPv6 address is this host's own a moment later.
            let own = async {
                while neighbours.route(HERE6).await.expect("an answer").is_some() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(5), own).await.expect("this host itself");
            let nowhere = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
            assert_eq!(neighbours.route(nowhere.into()).await.expect("an answer"), None, "no route");

            let add = handle.neighbours().add(ifindex, THERE6).replace();
            add.state(NeighbourState::Reachable).link_layer_address(&MAC).execute().await.expect("added");
            until(&mut changes, THERE6, |reachability| reachability == Reachability::At(MAC)).await;
            assert_eq!(neighbours.list().await.expect("a list").get(&(ifindex, THERE6)), Some(&Reachability::At(MAC)));
            neighbours.probe(ifindex, THERE6).await.expect("asked");
            let took = until(&mut changes, THERE6, |reachability| reachability == Reachability::Failed).await;
            assert!(took < Duration::from_secs(5), "{took:?}");
            neighbours.probe(ifindex, THERE6).await.expect("asked again, though there is no MAC address now");
            until(&mut changes, THERE6, |reachability| reachability == Reachability::Failed).await;
        });
    }

    /// The next change of an entry that `wanted` accepts.
    async fn until(
        changes: &mut (impl Stream<Item = Change> + Unpin),
        whose: IpAddr,
        wanted: impl Fn(Reachability) -> bool,
    ) -> Duration {
        let begin = std::time::Instant::now();
        let found = async {
            while let Some(change) = changes.next().await {
                if matches!(change, Change::Neighbour(n) if n.address == whose && wanted(n.reachability)) {
                    return;
                }
            }
            panic!("the events ended");
        };
        tokio::time::timeout(Duration::from_secs(10), found).await.expect("such an event within 10 s");
        begin.elapsed()
    }

    #[test]
    fn entries_are_followed_and_a_silent_host_fails_within_seconds() {
        in_new_netns(async || {
            let (neighbours, mut changes, driver) = Neighbours::open().expect("a netlink socket");
            tokio::spawn(driver);
            let ifindex = link(&neighbours.handle).await;
            let add = |mac: [u8; 6]| {
                let add = neighbours.handle.neighbours().add(ifindex, THERE).replace();
                add.state(NeighbourState::Reachable).link_layer_address(&mac).execute()
            };
            add(MAC).await.expect("added");
            until(&mut changes, THERE, |reachability| reachability == Reachability::At(MAC)).await;
            assert_eq!(neighbours.list().await.expect("a list").get(&(ifindex, THERE)), Some(&Reachability::At(MAC)));
            let other = [2, 0, 0, 0, 0, 8];
            add(other).await.expect("changed");
            until(&mut changes, THERE, |reachability| reachability == Reachability::At(other)).await;

            neighbours.probe(ifindex, THERE).await.expect("asked");
            let took = until(&mut changes, THERE, |reachability| reachability == Reachability::Failed).await;
            assert!(took < Duration::from_secs(5), "{took:?}");
            neighbours.probe(ifindex, THERE).await.expect("asked again, though there is no MAC address now");
            until(&mut changes, THERE, |reachability| reachability == Reachability::Failed).await;
        });
    }

    #[test]
    fn links_and_routes_are_followed() {
        in_new_netns(async || {
            let (neighbours, mut changes, driver) = Neighbours::open().expect("a netlink socket");
            tokio::spawn(driver);
            let ifindex = link(&neighbours.handle).await;
            let down = LinkUnspec::new_with_name("nb").down().build();
            neighbours.handle.link().set(down).execute().await.expect("down");
            let mut seen = Vec::new();
            let both = async {
                while let Some(change) = changes.next().await {
                    seen.push(change.clone());
                    if change == (Change::Link { ifindex, up: false })
                        && seen.contains(&Change::Routes)
                        && seen.contains(&Change::Link { ifindex, up: true })
                    {
                        return;
                    }
                }
            };
            tokio::time::timeout(Duration::from_secs(5), both).await.expect("up, a route, and down again");
        });
    }
}
