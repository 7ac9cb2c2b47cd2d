//! Be a server element: what an application embeds to speak with its load balancer.
//!
//! A [`Client`] joins one or several network elements (NE), keeps a session with each, and tells them what this server
//! serves, how healthy it is and which flows it does not want. It needs a tokio runtime with time and I/O.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use necp_user::client::{Client, HealthIndex};
//! use necp_user::necp::{Exception, Flows, Forwarding, Scope, ServiceUnit, service::TCP};
//!
//! # fn free_workers() -> u8 { 80 }
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let client = Client::builder()
//!         .ne("10.0.0.1".parse()?)
//!         .ne("10.0.0.2".parse()?)
//!         .serve(ServiceUnit::new(Forwarding::L2, "tcp/80".parse()?))
//!         .health(|_service| HealthIndex::new(free_workers()).unwrap_or(HealthIndex::NONE))
//!         .join()?;
//!     client.joined(1).await;
//!
//!     // This origin wants to see its clients: let their flows pass by the balancer for ten minutes.
//!     let flows = Flows { destination: "198.51.100.7/32".parse()?, protocol: TCP, port: 80, ..Flows::ALL };
//!     let answers = client.except(&[Exception { scope: Scope::Global, ttl: 600, flows }]).await?;
//!     for (ne, error) in answers.failures() {
//!         eprintln!("{ne}: {error}");
//!     }
//!
//!     // No new flows; those that are there go on until they end.
//!     client.drain(Duration::from_secs(5)).await.all()?;
//!     client.leave().await;
//!     Ok(())
//! }
//! ```
//!
//! # What it does by itself
//!
//! - It dials again when a session is lost: after 1 s, 2 s, 4 s … up to [`Builder::retry_max`] (§5.4), as long as the
//!   client lives.
//! - State is hard (§5.4): an NE holds nothing for a server that has just joined. So in every new session the exceptions
//!   that are wanted are installed again, with what is left of their time, and then the services are started (or, while
//!   drained, stopped).
//! - Services that an NE refuses are asked for again, at growing distances.
//! - Services may come and go at any time: [`Client::serve`], [`Client::withdraw`].
//! - KEEPALIVEs are sent and answered (§5.5); the health closure is asked for each service that an NE asks about.
//!
//! # What comes back
//!
//! A request goes to every NE, and [`Answers`] has what each of them said: an NE that is away, refuses, or does not answer
//! in time is a [`NeError`] beside the others' success. `Ok` means that the NE has done it: an ACK follows the change of
//! its tables, never precedes it (§3). What is wanted stays wanted: an exception that could not be told is installed when
//! that NE is back, unless every NE has refused it. Nothing is kept on disk: an application that ends leaves nothing
//! behind, for the NEs drop its exceptions with its session.
//!
//! Changes concern new flows; an established flow is never moved (§5.6, §5.7).
//!
//! # IPv6
//!
//! A session's family is what it is about: over IPv6 it serves the farm's IPv6 VIPs, and its exceptions are of IPv6 flows. A
//! server of both families names the same NE twice, by an address of each. An exception is asked for in the sessions of its
//! family; where there is none, that is [`NeError::OtherFamily`]. Flows without an address are of the session's own family
//! everywhere. Exceptions of IPv6 need an extension that an NE of another make may not speak; then it refuses them.
//!
//! # Limits
//!
//! At most 1,024 requests wait for answers at a time; then a new one waits for its turn, except [`Client::drain`] and
//! [`Client::resume`], which never do. At most 64 are on their way to an NE, 4,096 wait for it; with more, as with one that it
//! does not answer within 30 s, the session with it is ended, and all that is wanted is told in the next. [`Builder::max_exceptions`] and [`Builder::max_listed`] bound the
//! memory. One client per host: a second one from the same address would take the first one's sessions away (§5.4).

mod address;
mod answers;
mod builder;
pub(crate) mod dial;
#[cfg(test)]
pub(crate) mod fake_ne;
mod health;
mod peer;
mod refused;
mod session;
mod wish;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout_at;

pub use address::{NeAddress, ParseNeError};
pub use answers::{Answers, ExceptError, Listing, NeError, NotEverywhere, ServeError};
pub use builder::{Builder, JoinError};
pub use health::HealthIndex;
pub use peer::{NeState, Standing};
pub use wish::Wanted;

use builder::{Settings, check_offers};
use peer::{Command, Inbox, Outcome, Peer, SharedWish, What};
use wish::Wish;

use crate::necp::{Exception, Filter, Flows, ServiceKey, ServiceUnit};

/// Requests that may wait for answers at a time.
const IN_PROGRESS: usize = 1024;
/// Commands that may wait for each network element: more than there are requests, for those that nobody waits for any more.
const QUEUE: usize = 4 * IN_PROGRESS;

/// A server element's sessions with its network elements. Cloned, it is the same client; when the last clone is dropped,
/// it leaves.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    settings: Arc<Settings>,
    /// Held while it is changed and told, so that every network element is told in the same order.
    wish: SharedWish,
    /// For the requests in progress.
    places: Semaphore,
    peers: Vec<Handle>,
    leave: watch::Sender<bool>,
}

/// The client's end of a [`Peer`].
struct Handle {
    ne: NeAddress,
    commands: mpsc::Sender<Command>,
    /// Told when there was no room for a command.
    overrun: watch::Sender<()>,
    state: watch::Receiver<NeState>,
}

impl Client {
    /// To describe a client, and to join with [`Builder::join`].
    pub fn builder() -> Builder {
        Builder::new()
    }

    fn start(settings: Settings) -> Self {
        let settings = Arc::new(settings);
        let wish = SharedWish::new(Wish::new(settings.offers.clone(), settings.max_exceptions));
        let leave = watch::Sender::new(false);
        let peers = settings.nes.iter().map(|ne| {
            let (commands, received) = mpsc::channel(QUEUE);
            let (peer, state) = Peer::new(ne.clone(), Arc::clone(&settings), wish.clone());
            let overrun = watch::Sender::new(());
            tokio::spawn(peer.run(Inbox::new(received, overrun.subscribe(), leave.subscribe())));
            Handle { ne: ne.clone(), commands, overrun, state }
        });
        let peers = peers.collect();
        Self { shared: Arc::new(Shared { settings, wish, places: Semaphore::new(IN_PROGRESS), peers, leave }) }
    }

    /// Waits until so many network elements have a session and have answered what is to be started or stopped; `false` if
    /// the client leaves first. It may wait for ever.
    pub async fn joined(&self, count: usize) -> bool {
        let mut states: Vec<_> = self.shared.peers.iter().map(|peer| peer.state.clone()).collect();
        loop {
            let settled = states.iter_mut().map(|state| self.is_settled(&state.borrow_and_update().standing));
            let done = settled.filter(|settled| *settled).count();
            if done >= count {
                return true;
            }
            let changes = states.iter_mut().map(|state| Box::pin(state.changed()));
            let (changed, at, _) = future::select_all(changes).await;
            if changed.is_err() {
                states.remove(at);
                if states.is_empty() {
                    return false;
                }
            }
        }
    }

    /// How things stand with each network element.
    #[must_use]
    pub fn nes(&self) -> Vec<NeState> {
        self.shared.peers.iter().map(|peer| peer.state.borrow().clone()).collect()
    }

    /// Whether the services are to be started: true until [`Self::drain`], and after [`Self::resume`].
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.shared.wish.lock().serving
    }

    /// The exceptions that are wanted and have not expired, whatever the network elements made of them.
    #[must_use]
    pub fn wanted(&self) -> Vec<Wanted> {
        self.shared.wish.lock().wanted(Instant::now())
    }

    /// Adds exceptions (§5.7.1): flows that are not wanted here (local), or by no server of the farm (global). One for the
    /// same flows as an older one replaces it, and its time starts again.
    ///
    /// # Errors
    /// If one of them cannot be, or there are too many; then nothing was added.
    pub async fn except(&self, exceptions: &[Exception]) -> Result<Answers<()>, ExceptError> {
        let exceptions = normal(exceptions)?;
        let what = What::Add(Arc::clone(&exceptions));
        let limit = self.shared.settings.max_exceptions;
        let (stamp, mut outcomes) = self
            .request(what, self.shared.settings.answer_within, |wish| {
                wish.add(Instant::now(), &exceptions).ok_or(ExceptError::TooMany(limit))
            })
            .await?;
        let declined = outcomes.iter().map(|(_, outcome)| outcome.declined());
        // What nobody takes is not tried again and again.
        let by_all = declined.reduce(|one, other| &one & &other).unwrap_or_default();
        {
            let mut wish = self.shared.wish.lock();
            by_all.iter().for_each(|flows| wish.remove_if(flows, stamp));
        }
        for (_, outcome) in &mut outcomes {
            outcome.others.retain(|flows| by_all.contains(flows));
            if outcome.answer.is_ok() && !outcome.others.is_empty() {
                outcome.answer = Err(NeError::OtherFamily(std::mem::take(&mut outcome.others)));
            }
        }
        Ok(answers(outcomes).done())
    }

    /// Deletes exceptions of this server (§5.7.3); one that does not exist counts as deleted, as does one of the other family.
    ///
    /// # Errors
    /// If one of them cannot be; then nothing was deleted.
    pub async fn unexcept(&self, flows: &[Flows]) -> Result<Answers<()>, ExceptError> {
        let any: Vec<_> =
            flows.iter().map(|flows| Exception { scope: crate::necp::Scope::Local, ttl: 0, flows: *flows }).collect();
        let flows: Arc<[Flows]> = normal(&any)?.iter().map(|exception| exception.flows).collect();
        let what = What::Delete(Arc::clone(&flows));
        let change = |wish: &mut Wish| {
            flows.iter().for_each(|flows| wish.remove(flows));
            Ok(())
        };
        Ok(answers(self.request(what, self.shared.settings.answer_within, change).await?.1).done())
    }

    /// Deletes all exceptions of this server (§5.7.5).
    pub async fn reset_exceptions(&self) -> Answers<()> {
        self.tell(What::Reset, self.shared.settings.answer_within, Wish::clear).await.done()
    }

    /// The exceptions in force at each network element, of all its servers (§5.7.7).
    pub async fn exceptions(&self, filter: Filter) -> Answers<Listing> {
        self.tell(What::Query(filter), self.shared.settings.answer_within, |_| {}).await
    }

    /// The services, and how their packets are wanted, whatever the network elements made of them.
    #[must_use]
    pub fn offers(&self) -> Vec<ServiceUnit> {
        self.shared.wish.lock().offers().to_vec()
    }

    /// Starts services beside the others (§5.6.1), or changes how their packets are wanted, for future flows. After
    /// [`Self::drain`] they wait for [`Self::resume`].
    ///
    /// # Errors
    /// If one of them cannot be; then nothing was started.
    pub async fn serve(&self, offers: &[ServiceUnit]) -> Result<Answers<()>, ServeError> {
        check_offers(offers)?;
        Ok(self.tell_start(What::Serve(offers.into()), |wish| wish.offer(offers)).await)
    }

    /// Takes services back (§5.6.3): where it succeeds, no new flow of theirs comes from there any more. One that was not
    /// offered counts as taken back.
    pub async fn withdraw(&self, services: &[ServiceKey]) -> Answers<()> {
        self.tell_start(What::Withdraw(services.into()), |wish| wish.withdraw(services)).await
    }

    /// Stops all services (§5.6.3): where it succeeds, no new flow comes from there any more. Sessions, exceptions and
    /// established flows stay. Waits for the answers at most `limit`.
    pub async fn drain(&self, limit: Duration) -> Answers<()> {
        self.tell(What::Stop, limit, |wish| wish.serving = false).await.done()
    }

    /// Starts all services again after [`Self::drain`].
    pub async fn resume(&self) -> Answers<()> {
        self.tell_start(What::Start, |wish| wish.serving = true).await
    }

    /// Closes all sessions, and returns when they are closed, within about a second. The network elements send no new flow
    /// and drop the exceptions, as if the server had stopped everything; see [`Self::drain`] to know that they did.
    /// Requests that come after this find everyone away.
    pub async fn leave(&self) {
        self.shared.leave.send_replace(true);
        for peer in &self.shared.peers {
            let mut state = peer.state.clone();
            // Until the task is gone, and its end of the channel with it.
            while state.changed().await.is_ok() {}
        }
    }

    fn is_settled(&self, standing: &Standing) -> bool {
        match standing {
            Standing::Away(_) => false,
            Standing::Joined { started, refused, stopped, .. } => {
                let answered = |key: ServiceKey| started.contains(&key) || refused.contains(&key);
                *stopped || self.shared.wish.lock().offers().iter().all(|offer| answered(offer.key()))
            }
        }
    }

    async fn tell_start(&self, what: What, change: impl FnOnce(&mut Wish)) -> Answers<()> {
        self.tell(what, self.shared.settings.answer_within, change).await.done()
    }

    /// As [`Self::request`], for a change that cannot fail.
    async fn tell(&self, what: What, limit: Duration, change: impl FnOnce(&mut Wish)) -> Answers<Listing> {
        let changed = self.request(what, limit, |wish| {
            change(wish);
            Ok::<(), std::convert::Infallible>(())
        });
        let Ok(((), outcomes)) = changed.await;
        answers(outcomes)
    }

    /// Changes what is wanted, tells everyone, and waits for their answers.
    async fn request<T, E>(
        &self,
        what: What,
        limit: Duration,
        change: impl FnOnce(&mut Wish) -> Result<T, E>,
    ) -> Result<(T, Vec<(NeAddress, Outcome)>), E> {
        // Whoever wants no new flows does not wait for others.
        let _place = match what {
            What::Start | What::Stop => None,
            // An error would mean that the semaphore is closed, which it never is.
            _ => self.shared.places.acquire().await.ok(),
        };
        let deadline = tokio::time::Instant::now() + limit;
        let (changed, told) = self.change_and_tell(&what, change)?;
        let mut outcomes = Vec::new();
        for (ne, answer) in told {
            let outcome = match answer {
                Err(error) => Err(error).into(),
                Ok(answer) => match timeout_at(deadline, answer).await {
                    Ok(Ok(outcome)) => outcome,
                    Ok(Err(_)) => Err(NeError::Lost).into(),
                    Err(_) => Err(NeError::Timeout(limit)).into(),
                },
            };
            outcomes.push((ne, outcome));
        }
        Ok((changed, outcomes))
    }

    /// Nothing waits here: a caller that gives up has told everyone or no one, and an element that is slow holds up nobody.
    #[expect(clippy::type_complexity, reason = "what was changed, and for each element its answer to come")]
    fn change_and_tell<T, E>(
        &self,
        what: &What,
        change: impl FnOnce(&mut Wish) -> Result<T, E>,
    ) -> Result<(T, Vec<(NeAddress, Result<oneshot::Receiver<Outcome>, NeError>)>), E> {
        let mut wish = self.shared.wish.lock();
        let changed = change(&mut wish)?;
        let told = self.shared.peers.iter().map(|peer| (peer.ne.clone(), peer.tell(what.clone())));
        Ok((changed, told.collect()))
    }
}

impl Handle {
    fn tell(&self, what: What) -> Result<oneshot::Receiver<Outcome>, NeError> {
        let (done, answer) = oneshot::channel();
        match self.commands.try_send(Command { what, done }) {
            Ok(()) => Ok(answer),
            Err(TrySendError::Full(_)) => {
                self.overrun.send_replace(());
                Err(NeError::Lost)
            }
            // The task is gone: the client has left.
            Err(TrySendError::Closed(_)) => Err(NeError::Away("left".into())),
        }
    }
}

impl Outcome {
    /// Exceptions that are not in force there, and will not be.
    fn declined(&self) -> BTreeSet<Flows> {
        let refused = match &self.answer {
            Err(NeError::Exceptions(refused)) => refused.as_slice(),
            _ => &[],
        };
        self.others.iter().chain(refused).copied().collect()
    }
}

fn answers(outcomes: Vec<(NeAddress, Outcome)>) -> Answers<Listing> {
    Answers(outcomes.into_iter().map(|(ne, outcome)| (ne, outcome.answer)).collect())
}

impl Answers<Listing> {
    fn done(self) -> Answers<()> {
        Answers(self.0.into_iter().map(|(ne, answer)| (ne, answer.map(drop))).collect())
    }
}

/// The exceptions as a network element reads them: host bits cleared, ports without meaning dropped (§5.7.1).
fn normal(exceptions: &[Exception]) -> Result<Arc<[Exception]>, ExceptError> {
    let read = |exception: &Exception| match exception.flows.normal() {
        Ok(flows) => Ok(Exception::new(exception.scope, exception.ttl, flows)),
        Err(error) => Err(ExceptError::Invalid { flows: exception.flows, error }),
    };
    exceptions.iter().map(read).collect()
}

#[cfg(test)]
mod tests;
