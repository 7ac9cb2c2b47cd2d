//! One session on one connection: the protocol machine between the socket and what the application wants.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::{sleep_until, timeout};

use super::answers::{Listing, NeError};
use super::health::ask;
use super::peer::{Command, Done, Inbox, Next, Outcome, Peer, Standing, What};
use super::refused::Refused;
use crate::necp::{
    Backoff, CloseReason, Credentials, Exception, Family, Flows, Listed, Query, RequestId, SeEvent, SeSession,
    ServiceKey, ServiceUnit, SessionConfig, Token,
};

/// An authenticated list of exceptions is held back until it is verified: half a million wide ones, or twice as many basic ones.
const MAX_LIST: usize = 32 << 20;
/// How long the last bytes of a session may take to be written.
const FLUSH: Duration = Duration::from_secs(1);
/// Commands on the wire at a time; more wait in the queue.
const MAX_PENDING: usize = 64;

type HealthAnswers = FuturesUnordered<Pin<Box<dyn Future<Output = (Token, Vec<Option<u8>>)> + Send>>>;

pub(super) struct Session<'a> {
    peer: &'a Peer,
    backoff: &'a mut Backoff,
    machine: SeSession,
    pending: BTreeMap<RequestId, Pending>,
    health: HealthAnswers,
    refused: Refused,
    /// How often everything was started or stopped: answers to what was asked before the last time count no more.
    turns: u64,
    /// Whether the last time it was a STOP, which was acknowledged.
    stopped: bool,
    ne_health: Option<u8>,
    local: Option<IpAddr>,
}

/// A request that waits for its answer. Dropped without one, whoever asked is told that the session was lost.
enum Pending {
    Start(Services),
    /// STOP of everything.
    Stop(Services),
    /// STOP of some.
    Withdraw(Services),
    /// With what the element was not asked for.
    Except(Done, Vec<Flows>),
    /// Exceptions that the element has forgotten, and how many.
    Again(usize),
    Reset(Done),
    Query(Done, List),
}

/// What was asked to be started or stopped.
struct Services {
    keys: Vec<ServiceKey>,
    /// [`Session::turns`] at the time.
    turn: u64,
    /// Whoever asked.
    done: Option<Done>,
}

/// A list as it comes in.
#[derive(Default)]
struct List {
    entries: HashSet<Listed>,
    more: bool,
}

impl<'a> Session<'a> {
    pub(super) fn new(peer: &'a Peer, backoff: &'a mut Backoff, credentials: Option<Credentials>) -> Self {
        let config = SessionConfig {
            keepalive: peer.settings.keepalive,
            max_message: MAX_LIST,
            extension: true,
            ..SessionConfig::default()
        };
        Self {
            machine: SeSession::with_credentials(config, credentials, Instant::now(), rand::random()),
            pending: BTreeMap::new(),
            health: FuturesUnordered::new(),
            refused: Refused::new(peer.settings.retry_max),
            peer,
            backoff,
            turns: 0,
            stopped: false,
            ne_health: None,
            local: None,
        }
    }

    /// Until the session ends: why, or `None` if it was told to.
    pub(super) async fn run(mut self, mut stream: TcpStream, inbox: &mut Inbox) -> Option<String> {
        self.local = stream.local_addr().ok().map(|address| address.ip());
        inbox.begin();
        let (mut read, mut write) = stream.split();
        let (mut output, mut input) = (Vec::new(), vec![0; 16 * 1024]);
        let mut failure = None;
        let reason = loop {
            self.work();
            if output.is_empty() {
                output = self.machine.poll_transmit().unwrap_or_default();
            }
            if let Some(reason) = self.machine.closed() {
                break reason.clone();
            }
            if let Err(error) = self.step(&mut read, &mut write, &mut output, &mut input, inbox).await {
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
        inbox: &mut Inbox,
    ) -> std::io::Result<()> {
        let due = [self.machine.poll_timeout(), self.refused.due()].into_iter().flatten().min();
        let wants_input = self.machine.wants_input();
        let has_room = self.pending.len() < MAX_PENDING;
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
                self.ask_again();
            }
            Some((token, answers)) = self.health.next(), if !self.health.is_empty() => {
                self.machine.answer_health(token, &answers);
            }
            next = inbox.next_if(has_room) => match next {
                Next::Command(command) => self.carry_out(command),
                Next::Overrun => return Err(std::io::Error::other("too many requests wait for its answers")),
                Next::Leave => self.machine.close(CloseReason::Shutdown),
            },
        }
        Ok(())
    }

    fn carry_out(&mut self, command: Command) {
        let Command { what, done } = command;
        if !self.machine.is_ready() {
            // Ready will find what is wanted.
            let _ = done.send(Err(NeError::Away("the session is not open yet".into())).into());
            return;
        }
        match what {
            What::Start => self.start(Some(done)),
            What::Stop => self.stop(Some(done)),
            What::Serve(offers) => self.serve(&offers, done),
            What::Withdraw(services) => self.withdraw(services.to_vec(), done),
            What::Add(exceptions) => {
                let (ours, others): (Vec<Exception>, Vec<Exception>) =
                    exceptions.iter().copied().partition(|one| self.concerns(&one.flows));
                let others = others.iter().map(|one| one.flows).collect();
                self.except(&ours, others, done, SeSession::except_add);
            }
            What::Delete(flows) => {
                let (ours, others): (Vec<Flows>, Vec<Flows>) =
                    flows.iter().copied().partition(|flows| self.concerns(flows));
                self.except(&ours, others, done, SeSession::except_del);
            }
            What::Reset => {
                let id = self.machine.except_reset();
                self.pending.insert(id, Pending::Reset(done));
            }
            What::Query(filter) => {
                let id = self.machine.except_query(filter);
                self.pending.insert(id, Pending::Query(done, List::default()));
            }
        }
    }

    /// Asks for what concerns this session; the others are for sessions of the other family.
    fn except<T>(
        &mut self,
        ours: &[T],
        others: Vec<Flows>,
        done: Done,
        ask: impl FnOnce(&mut SeSession, &[T]) -> RequestId,
    ) {
        if ours.is_empty() && !others.is_empty() {
            let _ = done.send(Outcome { answer: Ok(Listing::default()), others });
            return;
        }
        let id = ask(&mut self.machine, ours);
        self.pending.insert(id, Pending::Except(done, others));
    }

    fn work(&mut self) {
        while let Some(event) = self.machine.poll_event() {
            self.on_event(event);
        }
    }

    fn on_event(&mut self, event: SeEvent) {
        let ne = &self.peer.ne;
        match event {
            SeEvent::Ready => self.on_ready(),
            SeEvent::HealthQuery { token, queries } => self.ask_health(token, queries),
            SeEvent::Acked { id, failed } => self.on_acked(id, failed),
            SeEvent::Excepted { id, failed } => self.on_excepted(id, failed),
            SeEvent::Reset { id, done } => {
                if let Some(Pending::Reset(asked)) = self.pending.remove(&id) {
                    let answer = if done { Ok(Listing::default()) } else { Err(NeError::Refused) };
                    let _ = asked.send(answer.into());
                }
            }
            SeEvent::Listed { id, entries, last } => self.on_listed(id, entries, last),
            SeEvent::ListFailed { id } => {
                if let Some(Pending::Query(asked, _)) = self.pending.remove(&id) {
                    let _ = asked.send(Err(NeError::Refused).into());
                }
            }
            SeEvent::NeHealth(index) => {
                tracing::debug!(%ne, "the network element's own health is {index}");
                self.ne_health = Some(index);
                self.publish();
            }
            SeEvent::Notice(notice) => tracing::warn!(%ne, "{notice}"),
            // `run` sees it too, and says it.
            SeEvent::Closed(_) => {}
        }
    }

    /// The element holds nothing for us (§5.4). Exceptions go first, so that no flow comes that is not wanted.
    fn on_ready(&mut self) {
        match self.local {
            Some(local) => tracing::info!(ne = %self.peer.ne, "joined, known there as {local}"),
            None => tracing::info!(ne = %self.peer.ne, "joined"),
        }
        self.backoff.reset();
        let (serving, mut exceptions) = {
            let mut wish = self.peer.wish.lock();
            (wish.serving, wish.exceptions(Instant::now()))
        };
        // This session is about flows of its own family; those of the other one are for others.
        exceptions.retain(|exception| self.concerns(&exception.flows));
        if !exceptions.is_empty() {
            let id = self.machine.except_add(&exceptions);
            self.pending.insert(id, Pending::Again(exceptions.len()));
        }
        if serving {
            self.start(None);
        } else {
            // A network element that forgot this server in a restart may still send it flows of an older START.
            self.stop(None);
        }
        self.publish();
    }

    /// Whether the network element may take an exception for these flows in this session.
    fn concerns(&self, flows: &Flows) -> bool {
        flows.has_no_address() || self.local.is_none_or(|local| Family::of(local.to_canonical()) == flows.family())
    }

    fn start(&mut self, done: Option<Done>) {
        let offers = self.offers();
        if offers.is_empty() {
            tracing::info!(ne = %self.peer.ne, "nothing to serve");
        }
        self.turn();
        self.send_start(&offers, done);
    }

    fn stop(&mut self, done: Option<Done>) {
        self.turn();
        let keys: Vec<ServiceKey> = self.offers().iter().map(ServiceUnit::key).collect();
        let id = self.machine.stop(&keys);
        self.pending.insert(id, Pending::Stop(Services { keys, turn: self.turns, done }));
    }

    fn serve(&mut self, offers: &[ServiceUnit], done: Done) {
        if self.peer.wish.lock().serving {
            self.send_start(offers, Some(done));
        } else {
            // They are started with the others.
            let _ = done.send(Ok(Listing::default()).into());
        }
    }

    fn withdraw(&mut self, keys: Vec<ServiceKey>, done: Done) {
        self.refused.forget(&keys);
        let id = self.machine.stop(&keys);
        self.pending.insert(id, Pending::Withdraw(Services { keys, turn: self.turns, done: Some(done) }));
    }

    /// Everything is started or stopped: what was asked before counts no more.
    fn turn(&mut self) {
        self.turns += 1;
        self.refused = Refused::new(self.peer.settings.retry_max);
    }

    fn send_start(&mut self, offers: &[ServiceUnit], done: Option<Done>) {
        self.stopped = false;
        let keys = offers.iter().map(ServiceUnit::key).collect();
        let id = self.machine.start(offers);
        self.pending.insert(id, Pending::Start(Services { keys, turn: self.turns, done }));
    }

    fn offers(&self) -> Vec<ServiceUnit> {
        self.peer.wish.lock().offers().to_vec()
    }

    /// Asks for what was refused again, if it is time.
    fn ask_again(&mut self) {
        if let Some(again) = self.refused.take_due(Instant::now()) {
            let units: Vec<_> = self.offers().into_iter().filter(|unit| again.contains(&unit.key())).collect();
            self.send_start(&units, None);
        }
    }

    fn ask_health(&mut self, token: Token, queries: Vec<Query>) {
        let (health, limit) = (Arc::clone(&self.peer.settings.health), self.peer.settings.health_timeout);
        self.health.push(Box::pin(async move { (token, ask(health, queries, limit).await) }));
    }

    fn on_acked(&mut self, id: RequestId, failed: Vec<ServiceKey>) {
        let done = match self.pending.remove(&id) {
            Some(Pending::Start(asked)) => {
                // Else it is a START that STOP has overtaken.
                if asked.turn == self.turns {
                    self.on_started(&asked.keys, &failed);
                }
                asked.done
            }
            Some(Pending::Stop(asked)) => {
                if asked.turn == self.turns {
                    self.stopped = failed.is_empty();
                    self.on_stopped(&[], &failed);
                }
                asked.done
            }
            Some(Pending::Withdraw(asked)) => {
                self.on_stopped(&asked.keys, &failed);
                asked.done
            }
            _ => return,
        };
        self.publish();
        if let Some(done) = done {
            let answer = if failed.is_empty() { Ok(Listing::default()) } else { Err(NeError::Services(failed)) };
            let _ = done.send(answer.into());
        }
    }

    /// Of all services if none is named.
    fn on_stopped(&self, some: &[ServiceKey], failed: &[ServiceKey]) {
        let ne = &self.peer.ne;
        if failed.is_empty() && some.is_empty() {
            tracing::info!(%ne, "stopped; no new flows from there");
        } else if failed.is_empty() {
            tracing::info!(%ne, "stopped {}; no new flows of that from there", list(some));
        } else {
            tracing::warn!(%ne, "STOP failed for {}; new flows may still come", list(failed));
        }
    }

    fn on_started(&mut self, asked: &[ServiceKey], failed: &[ServiceKey]) {
        let (ne, offers) = (&self.peer.ne, self.offers());
        let started: Vec<_> = asked.iter().filter(|key| !failed.contains(key)).copied().collect();
        if !started.is_empty() {
            tracing::info!(%ne, "started {}", list(&started));
        }
        // What was taken back meanwhile is not asked for again.
        let units: Vec<_> = offers.iter().filter(|unit| failed.contains(&unit.key())).collect();
        let refused: Vec<_> = units.iter().map(|unit| unit.key()).collect();
        if self.refused.answered(Instant::now(), asked, &refused) {
            let units: Vec<_> = units.into_iter().map(offer).collect();
            tracing::warn!(
                %ne,
                "refused {}: that service or forwarding type is not offered to this server there, or (l2) it is not on \
                 a link with it; will ask again",
                units.join(", ")
            );
        }
    }

    fn on_excepted(&mut self, id: RequestId, failed: Vec<Flows>) {
        let ne = &self.peer.ne;
        match self.pending.remove(&id) {
            Some(Pending::Except(done, others)) => {
                let answer = if failed.is_empty() { Ok(Listing::default()) } else { Err(NeError::Exceptions(failed)) };
                let _ = done.send(Outcome { answer, others });
            }
            Some(Pending::Again(count)) if failed.is_empty() => {
                tracing::info!(%ne, "installed {count} exceptions again")
            }
            Some(Pending::Again(count)) => {
                tracing::warn!(%ne, "refused {} of {count} exceptions of an earlier session", failed.len());
            }
            _ => {}
        }
    }

    fn on_listed(&mut self, id: RequestId, entries: Vec<Listed>, last: bool) {
        let Some(Pending::Query(_, list)) = self.pending.get_mut(&id) else { return };
        for entry in entries {
            if list.entries.len() < self.peer.settings.max_listed {
                // An element may name one twice.
                list.entries.insert(entry);
            } else if !list.entries.contains(&entry) {
                list.more = true;
            }
        }
        if last && let Some(Pending::Query(done, list)) = self.pending.remove(&id) {
            let mut entries: Vec<_> = list.entries.into_iter().collect();
            entries.sort_unstable_by_key(|entry| (entry.installer, entry.flows));
            let _ = done.send(Ok(Listing { entries, more: list.more }).into());
        }
    }

    /// Tells the client how things stand.
    fn publish(&self) {
        let standing = Standing::Joined {
            local: self.local,
            started: self.machine.started().collect(),
            refused: self.refused.services(),
            stopped: self.stopped,
            health: self.ne_health,
        };
        self.peer.state.send_if_modified(|state| {
            if matches!(state.standing, Standing::Away(_)) {
                state.since = Instant::now();
            }
            std::mem::replace(&mut state.standing, standing.clone()) != standing
        });
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

fn list(services: &[ServiceKey]) -> String {
    services.iter().map(ServiceKey::to_string).collect::<Vec<_>>().join(", ")
}

fn offer(unit: &ServiceUnit) -> String {
    format!("{}={}", unit.key(), unit.forwarding)
}
