//! One network element: dial it, keep the session, dial again.
//!
//! ```text
//!   dial ──► INIT ──► Ready ──► exceptions, START ──► requests of the application ──(leave)──► close
//!    ▲                                                    │
//!    └────────── 1, 2, 4 … s (§5.4) ◄─────────────────────┘ closed, reset, dead
//! ```

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep;

use super::address::NeAddress;
use super::answers::{Listing, NeError};
use super::builder::Settings;
use super::dial::dial;
use super::session::Session;
use super::wish::Wish;
use crate::necp::{Backoff, Exception, Filter, Flows, ServiceKey, ServiceUnit};
use crate::secret::Identity;

/// What one network element thinks of this server, as far as is known here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NeState {
    /// The network element.
    pub ne: NeAddress,
    /// The session with it.
    pub standing: Standing,
    /// Since when there has been a session, or none.
    pub since: Instant,
}

/// The session with one network element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// There is none, and why.
    Away(String),
    /// There is one.
    Joined {
        /// The address that this server is known by there.
        local: Option<IpAddr>,
        /// Services that it has acknowledged as started.
        started: Vec<ServiceKey>,
        /// Services that it has refused to start; it is asked again.
        refused: Vec<ServiceKey>,
        /// Whether it has acknowledged that it sends no new flows.
        stopped: bool,
        /// Its own Health Index, 0 to 100, once it has told.
        health: Option<u8>,
    },
}

/// Something for the network element to do.
pub(super) struct Command {
    pub(super) what: What,
    /// Told what came of it; whoever asked may have gone.
    pub(super) done: Done,
}

pub(super) type Done = oneshot::Sender<Outcome>;

/// What came of a command.
pub(super) struct Outcome {
    pub(super) answer: Result<Listing, NeError>,
    /// Exceptions that the network element was not asked for: they are of the other family than the session.
    pub(super) others: Vec<Flows>,
}

impl From<Result<Listing, NeError>> for Outcome {
    fn from(answer: Result<Listing, NeError>) -> Self {
        Self { answer, others: Vec::new() }
    }
}

#[derive(Debug, Clone)]
pub(super) enum What {
    /// START of everything.
    Start,
    /// STOP of everything.
    Stop,
    /// START of these, unless everything is stopped.
    Serve(Arc<[ServiceUnit]>),
    /// STOP of these.
    Withdraw(Arc<[ServiceKey]>),
    Add(Arc<[Exception]>),
    Delete(Arc<[Flows]>),
    Reset,
    Query(Filter),
}

/// What the application wants, shared by all peers. Changed before the command about it is sent.
#[derive(Clone)]
pub(super) struct SharedWish(Arc<Mutex<Wish>>);

impl SharedWish {
    pub(super) fn new(wish: Wish) -> Self {
        Self(Arc::new(Mutex::new(wish)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Wish> {
        // No invariant spans two calls, so a panic elsewhere has broken none.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the commands come from.
pub(super) struct Inbox {
    commands: mpsc::Receiver<Command>,
    overrun: watch::Receiver<()>,
    leave: watch::Receiver<bool>,
}

/// What a network element's task is told.
pub(super) enum Next {
    /// To do this.
    Command(Command),
    /// There was no room for a command: only a new session can tell what is wanted now.
    Overrun,
    /// The order to leave, as is a client that is gone.
    Leave,
}

impl Inbox {
    pub(super) fn new(
        commands: mpsc::Receiver<Command>,
        overrun: watch::Receiver<()>,
        leave: watch::Receiver<bool>,
    ) -> Self {
        Self { commands, overrun, leave }
    }

    /// What is next: a command only if there is room for one.
    pub(super) async fn next_if(&mut self, has_room: bool) -> Next {
        tokio::select! {
            biased;
            // An error means that there is no client any more.
            _ = self.leave.wait_for(|leave| *leave) => Next::Leave,
            Ok(()) = self.overrun.changed() => Next::Overrun,
            command = self.commands.recv(), if has_room => command.map_or(Next::Leave, Next::Command),
        }
    }

    /// Forgets commands that had no room: the session that begins will tell all that is wanted.
    pub(super) fn begin(&mut self) {
        self.overrun.mark_unchanged();
    }

    /// Until the order to leave: no session, nothing can be done.
    async fn decline(&mut self, why: &str) {
        loop {
            match self.next_if(true).await {
                Next::Command(command) => _ = command.done.send(Err(NeError::Away(why.to_owned())).into()),
                Next::Overrun => {}
                Next::Leave => return,
            }
        }
    }
}

/// The task of one network element.
pub(super) struct Peer {
    pub(super) ne: NeAddress,
    pub(super) settings: Arc<Settings>,
    pub(super) wish: SharedWish,
    pub(super) state: watch::Sender<NeState>,
}

impl Peer {
    pub(super) fn new(ne: NeAddress, settings: Arc<Settings>, wish: SharedWish) -> (Self, watch::Receiver<NeState>) {
        let standing = Standing::Away("not connected yet".into());
        let (state, receiver) = watch::channel(NeState { ne: ne.clone(), standing, since: Instant::now() });
        (Self { ne, settings, wish, state }, receiver)
    }

    /// Runs until the order to leave.
    pub(super) async fn run(self, mut inbox: Inbox) {
        let mut backoff = Backoff::new(self.settings.retry_max);
        let mut told = None;
        let mut why = String::from("not connected yet");
        while let Some(outcome) = self.attempt(&mut inbox, &mut backoff, &why).await {
            self.away(&outcome);
            let delay = backoff.next_delay_jittered(rand::random());
            // An element that stays away is one line, not one per attempt at the same distance.
            let news = Some((outcome.clone(), delay.as_secs_f64().round()));
            if told != news {
                tracing::warn!(ne = %self.ne, "{outcome}; retry in {:.0} s", delay.as_secs_f64());
                told = news;
            }
            tokio::select! {
                () = sleep(delay) => {}
                () = inbox.decline(&outcome) => break,
            }
            why = outcome;
        }
        self.away("left");
    }

    /// One connection from dial to end: why it ended, or `None` if it was told to.
    async fn attempt(&self, inbox: &mut Inbox, backoff: &mut Backoff, why: &str) -> Option<String> {
        let patience = self.settings.keepalive * 3;
        let dialled = tokio::select! {
            dialled = dial(&self.ne, self.settings.source, &self.settings.protection, patience) => dialled,
            () = inbox.decline(why) => return None,
        };
        match dialled {
            Ok(stream) => match self.settings.identity.as_ref().map(Identity::credentials).transpose() {
                Ok(credentials) => Session::new(self, backoff, credentials).run(stream, inbox).await,
                Err(error) => Some(error.to_string()),
            },
            Err(error) => Some(format!("cannot connect: {error}")),
        }
    }

    fn away(&self, why: &str) {
        self.state.send_modify(|state| {
            if matches!(state.standing, Standing::Joined { .. }) {
                state.since = Instant::now();
            }
            state.standing = Standing::Away(why.to_owned());
        });
    }
}
