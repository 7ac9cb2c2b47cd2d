//! One network element: dial it, keep the session, dial again.
//!
//! ```text
//!   dial ──► INIT ──► Ready ──► START ──► serving ──(order Drain)──► STOP ──► stopped ──(order Leave)──► close
//!    ▲                                       │
//!    └───────── 1, 2, 4 … s (§5.4) ◄─────────┘ closed, reset, dead
//! ```

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until, timeout};

use super::settings::Settings;
use crate::client::dial::dial;
use crate::client::{HealthIndex, NeAddress};
use crate::necp::{
    Backoff, CloseReason, Credentials, RequestId, SeEvent, SeSession, ServiceKey, ServiceUnit, SessionConfig,
};
use crate::secret::Identity;

/// An authenticated list of exceptions is held back until it is verified: a million of them.
const MAX_LIST: usize = 32 << 20;
/// How long the last bytes of a session may take to be written.
const FLUSH: Duration = Duration::from_secs(1);

/// What the agent is to do; it only ever goes on to a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Order {
    /// Join and serve.
    Serve,
    /// STOP, but stay: established flows go on, and health is still answered.
    Drain,
    /// Close the session.
    Leave,
}

/// What the network element thinks of this server, as far as is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// There is no session.
    Away,
    /// It may send new flows.
    Serving,
    /// It has acknowledged that it sends no new flows.
    Stopped,
}

/// The task of one network element.
pub(super) struct Peer {
    ne: NeAddress,
    settings: Arc<Settings>,
    /// How to prove who this server is; none if it has no key.
    identity: Option<Identity>,
    health: watch::Receiver<HealthIndex>,
    orders: watch::Receiver<Order>,
    standing: watch::Sender<Standing>,
}

impl Peer {
    pub(super) fn new(
        ne: NeAddress,
        settings: Arc<Settings>,
        identity: Option<Identity>,
        (health, orders): (watch::Receiver<HealthIndex>, watch::Receiver<Order>),
    ) -> (Self, watch::Receiver<Standing>) {
        let (standing, receiver) = watch::channel(Standing::Away);
        (Self { ne, settings, identity, health, orders, standing }, receiver)
    }

    /// Runs until the order [`Order::Leave`].
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new(self.settings.retry_max);
        let mut told = None;
        loop {
            let Some(outcome) = self.attempt(&mut backoff).await else { return };
            self.standing.send_replace(Standing::Away);
            let delay = backoff.next_delay_jittered(rand::random());
            // An element that stays away is one line, not one per attempt at the same distance.
            let news = Some((outcome.clone(), delay.as_secs_f64().round()));
            if told != news {
                tracing::warn!(ne = %self.ne, "{outcome}; retry in {:.0} s", delay.as_secs_f64());
                told = news;
            }
            tokio::select! {
                () = sleep(delay) => {}
                () = reached(&mut self.orders, Order::Leave) => return,
            }
        }
    }

    /// One connection from dial to end: why it ended, or `None` if it was told to.
    async fn attempt(&mut self, backoff: &mut Backoff) -> Option<String> {
        let patience = self.settings.keepalive * 3;
        let dialled = tokio::select! {
            dialled = dial(&self.ne, self.settings.source, patience) => dialled,
            () = reached(&mut self.orders, Order::Leave) => return None,
        };
        match dialled {
            Ok(stream) => match self.identity.as_ref().map(Identity::credentials).transpose() {
                Ok(credentials) => Session::new(self, backoff, credentials).run(stream).await,
                Err(error) => Some(error.to_string()),
            },
            Err(error) => Some(format!("cannot connect: {error}")),
        }
    }
}

/// Waits until the order is `order` or a later one; a sender that is gone orders to leave.
async fn reached(orders: &mut watch::Receiver<Order>, order: Order) {
    // An error means that there is no agent any more.
    let _ = orders.wait_for(|now| *now >= order).await;
}

/// One session on one connection: the protocol machine between the socket and what the agent wants.
struct Session<'a> {
    peer: &'a mut Peer,
    backoff: &'a mut Backoff,
    machine: SeSession,
    offers: Vec<ServiceUnit>,
    start: Option<RequestId>,
    stop: Option<RequestId>,
    refused: Refused,
    /// The latest order that was carried out.
    order: Order,
}

impl<'a> Session<'a> {
    fn new(peer: &'a mut Peer, backoff: &'a mut Backoff, credentials: Option<Credentials>) -> Self {
        let config =
            SessionConfig { keepalive: peer.settings.keepalive, max_message: MAX_LIST, ..SessionConfig::default() };
        Self {
            machine: SeSession::with_credentials(config, credentials, Instant::now(), rand::random()),
            offers: peer.settings.offers.clone(),
            refused: Refused::new(peer.settings.retry_max),
            peer,
            backoff,
            start: None,
            stop: None,
            order: Order::Serve,
        }
    }

    /// Until the session ends: why, or `None` if it was told to.
    async fn run(mut self, mut stream: TcpStream) -> Option<String> {
        let local = stream.local_addr().map(|address| address.ip().to_string()).unwrap_or_default();
        let (mut read, mut write) = stream.split();
        let (mut output, mut input) = (Vec::new(), vec![0; 16 * 1024]);
        let mut failure = None;
        let reason = loop {
            self.work(&local);
            if output.is_empty() {
                output = self.machine.poll_transmit().unwrap_or_default();
            }
            if let Some(reason) = self.machine.closed() {
                break reason.clone();
            }
            if let Err(error) = self.step(&mut read, &mut write, &mut output, &mut input).await {
                failure = Some(error.to_string());
                self.machine.close(CloseReason::ClosedByPeer);
            }
        };
        // What cannot be written now is lost with the connection.
        let _ = timeout(FLUSH, flush(&mut write, output, &mut self.machine)).await;
        match reason {
            CloseReason::Shutdown => None,
            CloseReason::ClosedByPeer => Some(match failure {
                Some(error) => format!("connection lost: {error}"),
                None => "the network element closed the session".into(),
            }),
            CloseReason::AuthRequired => Some("the network element requires a key (--key-file FILE)".into()),
            CloseReason::KeyRefused => Some(
                "the network element refuses the key of --key-file: it has another one, or none, for this address"
                    .into(),
            ),
            other => Some(other.to_string()),
        }
    }

    /// Waits for whatever comes next, and hands it to the machine.
    async fn step(
        &mut self,
        read: &mut ReadHalf<'_>,
        write: &mut WriteHalf<'_>,
        output: &mut Vec<u8>,
        input: &mut [u8],
    ) -> std::io::Result<()> {
        let due = [self.machine.poll_timeout(), self.refused.due()].into_iter().flatten().min();
        let wants_input = self.machine.wants_input();
        tokio::select! {
            length = read.read(input), if wants_input => match length? {
                0 => self.machine.close(CloseReason::ClosedByPeer),
                length => self.machine.handle_input(Instant::now(), &input[..length]),
            },
            written = write.write(output), if !output.is_empty() => {
                let written = written?;
                output.drain(..written);
            }
            () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {
                self.machine.handle_timeout(Instant::now());
            }
            changed = self.peer.orders.changed() => if changed.is_err() {
                self.machine.close(CloseReason::Shutdown);
            },
        }
        Ok(())
    }

    /// Takes in all events, and carries out a new order and what else is due.
    fn work(&mut self, local: &str) {
        while let Some(event) = self.machine.poll_event() {
            self.on_event(event, local);
        }
        let order = *self.peer.orders.borrow_and_update();
        if order > self.order {
            self.order = order;
            match order {
                Order::Leave => self.machine.close(CloseReason::Shutdown),
                _ if self.machine.is_ready() => self.send_stop(),
                // Ready will find the new order.
                _ => {}
            }
        }
        if self.order == Order::Serve
            && let Some(again) = self.refused.take_due(Instant::now())
        {
            let units: Vec<_> = self.offers.iter().filter(|unit| again.contains(&unit.key())).copied().collect();
            self.start = Some(self.machine.start(&units));
        }
        while let Some(event) = self.machine.poll_event() {
            self.on_event(event, local);
        }
    }

    fn on_event(&mut self, event: SeEvent, local: &str) {
        let ne = &self.peer.ne;
        match event {
            SeEvent::Ready => {
                tracing::info!(%ne, "joined, known there as {local}");
                self.backoff.reset();
                self.on_ready();
            }
            SeEvent::HealthQuery { token, queries } => {
                // The index is the host's: the same for every service of it.
                let index = self.peer.health.borrow().get();
                self.machine.answer_health(token, &vec![Some(index); queries.len()]);
            }
            SeEvent::Acked { id, failed } if self.start == Some(id) => self.on_started(&failed),
            SeEvent::Acked { id, failed } if self.stop == Some(id) => {
                if failed.is_empty() {
                    tracing::info!(%ne, "stopped; no new flows from there");
                } else {
                    tracing::warn!(%ne, "STOP failed for {}; new flows may still come", list(&failed));
                }
                self.peer.standing.send_replace(Standing::Stopped);
            }
            // A START that STOP has overtaken.
            SeEvent::Acked { .. } => {}
            SeEvent::NeHealth(index) => tracing::debug!(%ne, "the network element's own health is {index}"),
            SeEvent::Notice(notice) => tracing::warn!(%ne, "{notice}"),
            // `run` sees it too, and says it.
            // Nothing of the kind is asked here.
            SeEvent::Excepted { .. } | SeEvent::Reset { .. } | SeEvent::Listed { .. } | SeEvent::ListFailed { .. } => {}
            SeEvent::Closed(_) => {}
        }
    }

    fn on_ready(&mut self) {
        // A network element that forgot this server in a restart may still send it flows of an older START.
        if *self.peer.orders.borrow() >= Order::Drain {
            return self.send_stop();
        }
        self.peer.standing.send_replace(Standing::Serving);
        if self.offers.is_empty() {
            tracing::info!(ne = %self.peer.ne, "nothing to serve (no --serve)");
        } else {
            self.start = Some(self.machine.start(&self.offers));
        }
    }

    fn send_stop(&mut self) {
        self.order = Order::Drain;
        self.start = None;
        self.peer.standing.send_replace(Standing::Serving);
        let services: Vec<ServiceKey> = self.offers.iter().map(ServiceUnit::key).collect();
        self.stop = Some(self.machine.stop(&services));
    }

    fn on_started(&mut self, failed: &[ServiceKey]) {
        let ne = &self.peer.ne;
        self.start = None;
        let started = self.refused.asked(&self.offers, failed);
        if !started.is_empty() {
            tracing::info!(%ne, "started {}", list(&started));
        }
        if self.refused.answered(Instant::now(), failed) {
            let units: Vec<_> = self.offers.iter().filter(|unit| failed.contains(&unit.key())).map(offer).collect();
            tracing::warn!(
                %ne,
                "refused {}: that service or forwarding type is not offered to this server there, or (l2) it is not on \
                 a link with it; will ask again",
                units.join(", ")
            );
        }
    }
}

/// Writes all that is left, then ends the stream.
async fn flush(write: &mut WriteHalf<'_>, output: Vec<u8>, machine: &mut SeSession) -> std::io::Result<()> {
    write.write_all(&output).await?;
    while let Some(bytes) = machine.poll_transmit() {
        write.write_all(&bytes).await?;
    }
    write.shutdown().await
}

/// What a network element refused to START, and when to ask again: what is missing there may come, such as a new
/// configuration or a neighbour entry.
#[derive(Debug)]
struct Refused {
    services: BTreeSet<ServiceKey>,
    backoff: Backoff,
    due: Option<Instant>,
}

impl Refused {
    fn new(retry_max: Duration) -> Self {
        Self { services: BTreeSet::new(), backoff: Backoff::new(retry_max), due: None }
    }

    /// The services that have just been started, given those that failed: of all offers at first, then of those that
    /// had been refused.
    fn asked(&self, offers: &[ServiceUnit], failed: &[ServiceKey]) -> Vec<ServiceKey> {
        let asked = offers.iter().map(ServiceUnit::key);
        asked
            .filter(|key| self.services.is_empty() || self.services.contains(key))
            .filter(|key| !failed.contains(key))
            .collect()
    }

    /// Takes in an answer; says whether the refusals are news.
    fn answered(&mut self, now: Instant, failed: &[ServiceKey]) -> bool {
        let failed: BTreeSet<_> = failed.iter().copied().collect();
        let news = !failed.is_empty() && failed != self.services;
        self.due = (!failed.is_empty()).then(|| now + self.backoff.next_delay());
        self.services = failed;
        news
    }

    fn due(&self) -> Option<Instant> {
        self.due
    }

    /// What to ask for again now, if it is time.
    fn take_due(&mut self, now: Instant) -> Option<BTreeSet<ServiceKey>> {
        self.due.take_if(|due| *due <= now).map(|_| self.services.clone())
    }
}

fn list(services: &[ServiceKey]) -> String {
    services.iter().map(ServiceKey::to_string).collect::<Vec<_>>().join(", ")
}

fn offer(unit: &ServiceUnit) -> String {
    format!("{}={}", unit.key(), unit.forwarding)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::necp::Forwarding;

    fn key(port: u16) -> ServiceKey {
        ServiceKey::new(6, port)
    }

    #[test]
    fn refused_services_are_asked_for_again_at_growing_distances() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let offers = [80, 81, 82].map(|port| ServiceUnit::new(Forwarding::L2, key(port)));
        let mut refused = Refused::new(Duration::from_secs(2));
        assert_eq!(refused.asked(&offers, &[key(81), key(82)]), [key(80)]);
        assert!(refused.answered(start, &[key(81), key(82)]), "it is news");
        assert_eq!(refused.take_due(start), None);
        assert_eq!(refused.take_due(after(1)), Some(BTreeSet::from([key(81), key(82)])));
        assert_eq!((refused.take_due(after(9)), refused.due()), (None, None), "not twice without an answer");

        assert!(!refused.answered(after(1), &[key(81), key(82)]), "known already");
        assert_eq!(refused.due(), Some(after(3)));
        assert_eq!(refused.asked(&offers, &[key(82)]), [key(81)]);
        assert!(refused.answered(after(3), &[key(82)]));
        assert_eq!(refused.due(), Some(after(5)), "the limit holds");
        assert_eq!(refused.asked(&offers, &[]), [key(82)]);
        assert!(!refused.answered(after(5), &[]));
        assert_eq!((refused.take_due(after(99)), refused.due()), (None, None));
    }

    #[tokio::test]
    async fn orders_only_go_on() {
        let (sender, mut orders) = watch::channel(Order::Drain);
        reached(&mut orders, Order::Drain).await;
        sender.send_replace(Order::Leave);
        reached(&mut orders, Order::Drain).await;
        drop(sender);
        let mut abandoned = watch::channel(Order::Serve).1.clone();
        reached(&mut abandoned, Order::Leave).await;
    }
}
