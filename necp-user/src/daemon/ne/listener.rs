//! Who may connect: addresses that a farm admits, up to limits. All others are closed without an answer, and counted.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::input::Input;
use crate::config::ne::NeConfig;
use crate::daemon::peer::{self, Ended};
use crate::daemon::status::Strangers;
use crate::necp::{CloseReason, SessionConfig};

/// Connections in all.
pub const MAX_SESSIONS: usize = 16_384;
/// Connections of one address: its session, the one that supersedes it, and some that are being opened or closed.
pub const MAX_SESSIONS_PER_ADDRESS: usize = 8;
/// Connections that the kernel may hold for us.
const BACKLOG: u32 = 4096;
/// After `accept` failed for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// What is shared by the listeners of all addresses.
pub struct Door {
    config: Arc<NeConfig>,
    owner: mpsc::Sender<Input>,
    counts: Counts,
    connected: Mutex<Connected>,
    next_session: AtomicU64,
}

#[derive(Default)]
struct Connected {
    total: usize,
    by_address: HashMap<Ipv4Addr, usize>,
}

/// Connections that came to nothing, by kind.
#[derive(Default)]
struct Counts {
    not_admitted: AtomicU64,
    too_many: AtomicU64,
    silent: AtomicU64,
    not_necp: AtomicU64,
}

/// Binds an address.
///
/// # Errors
/// As `bind(2)` and `listen(2)`.
pub fn bind(address: SocketAddrV4) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address.into())?;
    socket.listen(BACKLOG)
}

impl Door {
    /// A door to `owner`.
    pub fn new(config: Arc<NeConfig>, owner: mpsc::Sender<Input>) -> Arc<Self> {
        Arc::new(Self {
            config,
            owner,
            counts: Counts::default(),
            connected: Mutex::default(),
            next_session: AtomicU64::new(1),
        })
    }

    /// Serves all who come, until it is dropped; then all its sessions are.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut sessions = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, SocketAddr::V4(peer))) => {
                        if let Some(place) = self.admit(*peer.ip()) {
                            sessions.spawn(Arc::clone(&self).session(stream, place));
                        }
                    }
                    Ok((_, SocketAddr::V6(_))) => {}
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
        }
    }

    /// Connections that are open now.
    pub fn connected(&self) -> usize {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner).total
    }

    fn admit(self: &Arc<Self>, address: Ipv4Addr) -> Option<Place> {
        if self.config.admits(address).is_none() {
            self.count(&self.counts.not_admitted, address, "is admitted by no farm (`servers`)");
            return None;
        }
        let mut connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        let total = connected.total;
        let own = connected.by_address.entry(address).or_default();
        if total >= MAX_SESSIONS || *own >= MAX_SESSIONS_PER_ADDRESS {
            if *own == 0 {
                connected.by_address.remove(&address);
            }
            self.count(&self.counts.too_many, address, "has, or all together have, too many connections open");
            return None;
        }
        *own += 1;
        connected.total += 1;
        Some(Place { door: Arc::clone(self), address })
    }

    async fn session(self: Arc<Self>, stream: TcpStream, place: Place) {
        let id = self.next_session.fetch_add(1, Ordering::Relaxed);
        let keepalive = self.config.keepalive;
        let config = SessionConfig { keepalive, jitter: keepalive / 5, ..SessionConfig::default() };
        let Ended { reason, joined } = peer::serve(stream, place.address, id, config, self.owner.clone()).await;
        if joined {
            return;
        }
        match reason {
            CloseReason::Framing { .. } | CloseReason::OutOfOrder(_) => {
                self.count(&self.counts.not_necp, place.address, "does not speak NECP");
            }
            CloseReason::AuthRequired | CloseReason::NoKey => {
                tracing::warn!("{} asks for authentication, which is not built yet: refused", place.address);
            }
            CloseReason::Shutdown => {}
            _ => self.count(&self.counts.silent, place.address, "connected and left without an INIT"),
        }
    }

    /// The first of each kind is shown, the others are counted.
    fn count(&self, counter: &AtomicU64, address: Ipv4Addr, what: &str) {
        if counter.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!(
                "{address} {what}: closed; from now on such connections are only counted, see `necp status`"
            );
        }
    }
}

/// One of the places, given back when dropped.
struct Place {
    door: Arc<Door>,
    address: Ipv4Addr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connected = self.door.connected.lock().unwrap_or_else(PoisonError::into_inner);
        connected.total -= 1;
        if let Some(own) = connected.by_address.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                connected.by_address.remove(&self.address);
            }
        }
    }
}
