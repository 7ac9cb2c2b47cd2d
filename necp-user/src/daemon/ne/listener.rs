//! Who may connect: addresses that a farm admits, up to limits. All others are closed without an answer, and counted.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU8;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::input::{Input, SessionId};
use super::keys::{Keys, ReloadError, Reloaded, Tally};
use super::limits::{Limits, network};
use crate::config::ne::NeConfig;
use crate::daemon::peer::{self, Ended, Patron};
use crate::daemon::status::{Rejected, Strangers};
use crate::necp::{CloseReason, SessionConfig};
use crate::secret::KeyFileError;
use crate::secret::tcp_security::{self, Md5Key};

/// Connections in all.
pub const MAX_SESSIONS: usize = 16_384;
/// Connections of one address: its session, the one that supersedes it, and some that are being opened or closed.
pub const MAX_SESSIONS_PER_ADDRESS: usize = 8;
/// Connections of one IPv6 /64, in which one host can have as many addresses as it likes: half of all, so that others find
/// places too. The oldest of them without an INIT makes room.
pub const MAX_SESSIONS_PER_NETWORK: usize = MAX_SESSIONS / 2;
/// Connections that the kernel may hold for us.
const BACKLOG: u32 = 4096;
/// After `accept` failed for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// What is shared by the listeners of all addresses.
pub struct Door {
    config: Arc<NeConfig>,
    owner: mpsc::Sender<Input>,
    limits: Arc<Limits>,
    keys: Arc<Keys>,
    rejected: Arc<Tally>,
    counts: Counts,
    connected: Mutex<Connected>,
    next_session: AtomicU64,
}

#[derive(Default)]
struct Connected {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
    by_network: HashMap<IpNet, usize>,
    /// From the oldest on: those that may not have said INIT yet.
    pending: BTreeMap<SessionId, Pending>,
}

/// A connection that may have to make room.
struct Pending {
    address: IpAddr,
    network: Option<IpNet>,
    joined: Arc<AtomicBool>,
    kick: mpsc::Sender<CloseReason>,
}

/// Connections that came to nothing, by kind.
#[derive(Default)]
struct Counts {
    not_admitted: AtomicU64,
    too_many: AtomicU64,
    silent: AtomicU64,
    not_necp: AtomicU64,
    http: AtomicU64,
    tls: AtomicU64,
    ssh: AtomicU64,
}

/// What protects the connections of one address, if anything.
#[derive(Debug, Default)]
pub struct Protections {
    ttl_hops: Option<NonZeroU8>,
    md5: Vec<Md5>,
}

/// The key of some addresses, and its file.
#[derive(Debug)]
struct Md5 {
    net: IpNet,
    path: PathBuf,
    key: Md5Key,
}

impl Md5 {
    /// Whether its servers can connect to this address of ours.
    fn is_for(&self, listener: SocketAddr) -> bool {
        matches!(self.net, IpNet::V6(_)) == listener.is_ipv6()
    }
}

impl Protections {
    /// As configured; reads the key files.
    ///
    /// # Errors
    /// The first key file that cannot be used.
    pub fn read(config: &NeConfig) -> Result<Self, KeyFileError> {
        let files = config.farms.iter().flat_map(|farm| &farm.tcp_md5);
        let md5 = files.map(|(net, path)| Ok(Md5 { net: *net, path: path.clone(), key: Md5Key::read(path)? }));
        Ok(Self { ttl_hops: config.ttl_security, md5: md5.collect::<Result<_, _>>()? })
    }

    /// Reads the key files of TCP-MD5 again. What `listeners` accept from now on has the new keys; what they have accepted
    /// goes on with the old ones.
    pub fn reload(&mut self, listeners: &[Arc<TcpListener>]) -> Reloaded {
        let mut reloaded = Reloaded::default();
        for md5 in &mut self.md5 {
            let new = match Md5Key::read(&md5.path) {
                Ok(new) if new == md5.key => continue,
                Ok(new) => new,
                Err(error) => {
                    reloaded.failed.push(error.into());
                    continue;
                }
            };
            let (net, path) = (md5.net, md5.path.clone());
            let fits = |listener: &&Arc<TcpListener>| listener.local_addr().is_ok_and(|address| md5.is_for(address));
            match listeners.iter().filter(fits).try_for_each(|one| tcp_security::set_md5(&**one, net, &new)) {
                Ok(()) => {
                    md5.key = new;
                    reloaded.changed.push(path);
                }
                Err(source) => reloaded.failed.push(ReloadError::Socket { net, path, source }),
            }
        }
        reloaded
    }
}

/// Binds an address, for its own family only. What is accepted there inherits the protections.
///
/// # Errors
/// As `bind(2)`, `listen(2)` and `setsockopt(2)`.
pub fn bind(address: SocketAddr, protections: &Protections) -> io::Result<TcpListener> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
    if address.is_ipv6() {
        SockRef::from(&socket).set_only_v6(true)?;
    }
    if let Some(hops) = protections.ttl_hops {
        tcp_security::set_ttl_security(&socket, hops)?;
    }
    for Md5 { net, key, .. } in protections.md5.iter().filter(|md5| md5.is_for(address)) {
        tcp_security::set_md5(&socket, *net, key)?;
    }
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

impl Door {
    /// A door to `owner`.
    pub fn new(config: Arc<NeConfig>, owner: mpsc::Sender<Input>, limits: Arc<Limits>, keys: Arc<Keys>) -> Arc<Self> {
        Arc::new(Self {
            config,
            owner,
            limits,
            keys,
            rejected: Arc::default(),
            counts: Counts::default(),
            connected: Mutex::default(),
            next_session: AtomicU64::new(1),
        })
    }

    /// Serves all who come, until it is dropped; then all its sessions are.
    pub async fn serve(self: Arc<Self>, listener: Arc<TcpListener>) {
        let mut sessions = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => {
                        if let Some((place, kicked)) = self.admit(peer.ip().to_canonical()) {
                            sessions.spawn(Arc::clone(&self).session(stream, place, kicked));
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection; is the limit of open files too low?");
                        tokio::time::sleep(PAUSE).await;
                    }
                },
                Some(_) = sessions.join_next() => {}
            }
        }
    }

    /// What was turned away so far.
    pub fn strangers(&self) -> Strangers {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Strangers {
            not_admitted: read(&self.counts.not_admitted),
            too_many: read(&self.counts.too_many),
            silent: read(&self.counts.silent),
            not_necp: read(&self.counts.not_necp),
            http: read(&self.counts.http),
            tls: read(&self.counts.tls),
            ssh: read(&self.counts.ssh),
        }
    }

    /// What authentication has kept out so far.
    pub fn rejected(&self) -> Rejected {
        self.rejected.read()
    }

    /// Connections that are open now.
    pub fn connected(&self) -> usize {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner).total
    }

    fn admit(self: &Arc<Self>, address: IpAddr) -> Option<(Place, mpsc::Receiver<CloseReason>)> {
        if matches!(address, IpAddr::V6(address) if address.is_unicast_link_local()) {
            let what = "is link-local, which no server may join from: let it use a global or a unique local address";
            self.count(&self.counts.not_admitted, address, what);
            return None;
        }
        if self.config.admits(address).is_none() {
            self.count(&self.counts.not_admitted, address, "is admitted by no farm (`servers`)");
            return None;
        }
        let mut connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        let network = network(address);
        if !connected.has_room(address) {
            self.count(&self.counts.too_many, address, "has, or all together have, too many connections open");
            return None;
        }
        let id = self.next_session.fetch_add(1, Ordering::Relaxed);
        let (kick, kicked) = mpsc::channel(1);
        let joined = Arc::new(AtomicBool::new(false));
        connected.pending.insert(id, Pending { address, network, joined: Arc::clone(&joined), kick: kick.clone() });
        *connected.by_address.entry(address).or_default() += 1;
        if let Some(network) = network {
            *connected.by_network.entry(network).or_default() += 1;
        }
        connected.total += 1;
        Some((Place { door: Arc::clone(self), address, id, joined, kick }, kicked))
    }

    async fn session(self: Arc<Self>, stream: TcpStream, place: Place, kicked: mpsc::Receiver<CloseReason>) {
        let keepalive = self.config.keepalive;
        let config = SessionConfig { keepalive, jitter: peer::jitter(keepalive), ..SessionConfig::default() };
        let access = match self.keys.access(place.address) {
            Ok(access) => access,
            Err(error) => return tracing::error!("{} is turned away: {error}", place.address),
        };
        let patron = Patron {
            server: place.address,
            id: place.id,
            kick: place.kick.clone(),
            joined: Arc::clone(&place.joined),
            limits: Arc::clone(&self.limits),
            rejected: Arc::clone(&self.rejected),
        };
        let Ended { reason, joined } = peer::serve(stream, patron, kicked, (config, access), self.owner.clone()).await;
        if joined {
            return;
        }
        match reason {
            CloseReason::Framing { identifier } => {
                if let Some(kind) = self.counts.kind(identifier) {
                    kind.fetch_add(1, Ordering::Relaxed);
                }
                self.count(&self.counts.not_necp, place.address, "does not speak NECP");
            }
            CloseReason::OutOfOrder(_) => self.count(&self.counts.not_necp, place.address, "does not begin with INIT"),
            CloseReason::TooManySessions => {
                self.count(&self.counts.too_many, place.address, "sent no INIT and had to make room for others");
            }
            CloseReason::AuthRequired
            | CloseReason::NoKey
            | CloseReason::BadInit
            | CloseReason::Unconfirmed(_)
            | CloseReason::Rejected(_)
            | CloseReason::MessageTooLarge(_)
                if self.limits.voices().may_speak(place.address) =>
            {
                tracing::warn!("{} is turned away: {reason}", place.address);
            }
            // Counted by the session.
            CloseReason::AuthRequired
            | CloseReason::NoKey
            | CloseReason::BadInit
            | CloseReason::Unconfirmed(_)
            | CloseReason::Rejected(_)
            | CloseReason::MessageTooLarge(_) => {}
            CloseReason::Shutdown => {}
            _ => self.count(&self.counts.silent, place.address, "connected and left without an INIT"),
        }
    }

    /// The first of each kind is shown, the others are counted.
    fn count(&self, counter: &AtomicU64, address: IpAddr, what: &str) {
        if counter.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!(
                "{address} {what}: closed; from now on such connections are only counted, see `necp status`"
            );
        }
    }
}

impl Counts {
    /// What speaks, by its first two bytes: the usual visitors of an open port.
    fn kind(&self, first: u16) -> Option<&AtomicU64> {
        match &first.to_be_bytes() {
            b"GE" | b"HE" | b"PO" | b"PU" | b"DE" | b"OP" | b"CO" | b"PR" | b"PA" | b"TR" => Some(&self.http),
            // A handshake record (RFC 8446 §5.1) of any version from SSL 3.0 on.
            [0x16, 3] => Some(&self.tls),
            b"SS" => Some(&self.ssh),
            _ => None,
        }
    }
}

impl Connected {
    /// Whether one more may come from there; who has said no INIT may have to make room: of an address that has all it may
    /// have, or of its network, one of its own.
    fn has_room(&mut self, address: IpAddr) -> bool {
        let own = self.by_address.get(&address).copied().unwrap_or(0);
        if own >= MAX_SESSIONS_PER_ADDRESS {
            // Those that make room are still there for a moment.
            return own < 2 * MAX_SESSIONS_PER_ADDRESS && self.make_room(|pending| pending.address == address);
        }
        let network = network(address);
        let of_network = network.and_then(|network| self.by_network.get(&network)).copied().unwrap_or(0);
        if of_network >= MAX_SESSIONS_PER_NETWORK {
            return self.make_room(|pending| pending.network == network);
        }
        self.total < MAX_SESSIONS || self.make_room(|_| true)
    }

    /// Has the oldest connection of these without an INIT closed; false if there is none.
    fn make_room(&mut self, among: impl Fn(&Pending) -> bool) -> bool {
        for (_, oldest) in self.pending.extract_if(.., |_, pending| among(pending)) {
            if !oldest.joined.load(Ordering::Relaxed) && oldest.kick.try_send(CloseReason::TooManySessions).is_ok() {
                return true;
            }
        }
        false
    }
}

/// One of the places, given back when dropped.
struct Place {
    door: Arc<Door>,
    address: IpAddr,
    id: SessionId,
    joined: Arc<AtomicBool>,
    kick: mpsc::Sender<CloseReason>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connected = self.door.connected.lock().unwrap_or_else(PoisonError::into_inner);
        connected.total -= 1;
        connected.pending.remove(&self.id);
        one_less(&mut connected.by_address, &self.address);
        if let Some(network) = network(self.address) {
            one_less(&mut connected.by_network, &network);
        }
    }
}

fn one_less<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection that has said nothing.
    fn come(connected: &mut Connected, id: SessionId, address: &str) -> mpsc::Receiver<CloseReason> {
        let (kick, kicked) = mpsc::channel(1);
        let address = address.parse().expect("an address");
        let network = network(address);
        connected.pending.insert(id, Pending { address, network, joined: Arc::default(), kick });
        connected.total += 1;
        *connected.by_address.entry(address).or_default() += 1;
        if let Some(network) = network {
            *connected.by_network.entry(network).or_default() += 1;
        }
        kicked
    }

    #[test]
    fn one_network_makes_room_for_itself_only() {
        let mut connected = Connected::default();
        let mut other = come(&mut connected, 1, "2001:db8:0:2::1");
        let crowd: Vec<_> = (0..MAX_SESSIONS_PER_NETWORK)
            .map(|number| come(&mut connected, 2 + number as u64, &format!("2001:db8:0:1::{number:x}")))
            .collect();
        let of = |address: &str| address.parse().expect("an address");
        assert!(connected.has_room(of("2001:db8:0:2::2")) && connected.has_room(of("10.0.0.1")));
        for mut kicked in crowd.into_iter().take(3) {
            assert!(connected.has_room(of("2001:db8:0:1:ffff::1")));
            assert_eq!(kicked.try_recv().ok(), Some(CloseReason::TooManySessions), "the oldest of its own");
        }
        assert!(other.try_recv().is_err(), "nobody else");
    }

    #[test]
    fn one_address_makes_room_for_itself_only() {
        let mut connected = Connected::default();
        let mut other = come(&mut connected, 1, "10.0.0.2");
        let mut crowd: Vec<_> =
            (0..MAX_SESSIONS_PER_ADDRESS).map(|number| come(&mut connected, 2 + number as u64, "10.0.0.1")).collect();
        let of = |address: &str| address.parse().expect("an address");
        assert!(connected.has_room(of("10.0.0.2")) && connected.has_room(of("10.0.0.1")));
        assert_eq!(crowd[0].try_recv().ok(), Some(CloseReason::TooManySessions), "the oldest, whoever runs it");
        assert!(crowd[1].try_recv().is_err() && other.try_recv().is_err(), "nobody else");
        connected.pending.values().for_each(|pending| pending.joined.store(true, Ordering::Relaxed));
        assert!(!connected.has_room(of("10.0.0.1")), "those who have joined stay");
        assert!(connected.has_room(of("10.0.0.2")));
    }
}
