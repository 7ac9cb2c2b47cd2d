//! The server element's agent, `necp se`.
//!
//! ```text
//!   signals ──► Control ──► Client (one task per network element) ◄──index── health (one task)
//!   socket ───► Agent ────────┘
//!                                then: drain (kernel's socket tables), VIPs away, lock released
//! ```

mod agent;
pub mod ctl;
pub mod decap;
pub mod drain;
pub mod health;
pub mod lock;
pub mod protocol;
pub mod settings;
pub mod vip;
pub mod words;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{sleep_until, timeout};

pub use settings::{Args, Settings};

use agent::Agent;
use drain::{Drain, Step};
use lock::HostLock;
use vip::Vips;

use super::admin::AdminSocket;
use crate::client::{Client, NeError};
use crate::secret::Identity;

/// How long STOP may go unacknowledged before the drain begins without it.
const STOP_WAIT: Duration = Duration::from_secs(5);
/// How long the sessions may take to close at the end.
const CLOSE_WAIT: Duration = Duration::from_secs(2);

/// Runs the agent in the foreground until SIGTERM or SIGINT; the first one drains, the second leaves at once.
///
/// # Errors
/// Settings that make no sense, a lock that another agent holds, VIPs that cannot be set up or taken away.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let settings = Settings::load(args)?;
    let control = Control::new();
    tokio::spawn(follow_signals(control.clone())?);
    serve(settings, &control).await
}

/// Asks the agent to leave.
#[derive(Debug, Clone)]
pub struct Control {
    asked: watch::Sender<Asked>,
}

/// What the agent was asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    Nothing,
    Drain,
    Abort,
}

impl Control {
    /// A control that has asked for nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self { asked: watch::Sender::new(Asked::Nothing) }
    }

    /// STOP everywhere, wait for the connections, leave: what the first signal does.
    pub fn drain(&self) {
        self.ask(Asked::Drain);
    }

    /// Leave at once, sessions closed and VIPs taken away: what the second signal does.
    pub fn abort(&self) {
        self.ask(Asked::Abort);
    }

    fn ask(&self, what: Asked) {
        self.asked.send_if_modified(|asked| what > std::mem::replace(asked, what.max(*asked)));
    }

    async fn asked(&self, what: Asked) {
        // The sender is in `self`, so the channel is open.
        let _ = self.asked.subscribe().wait_for(|asked| *asked >= what).await;
    }
}

impl Default for Control {
    fn default() -> Self {
        Self::new()
    }
}

fn follow_signals(control: Control) -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    Ok(async move {
        let mut next = async || tokio::select! { _ = terminate.recv() => "SIGTERM", _ = interrupt.recv() => "SIGINT" };
        tracing::info!("{}: leaving; a second signal leaves at once", next().await);
        control.drain();
        tracing::warn!("{}: leaving at once", next().await);
        control.abort();
    })
}

/// The whole life of an agent, from the lock to its release.
///
/// # Errors
/// As [`run`].
pub async fn serve(settings: Settings, control: &Control) -> anyhow::Result<()> {
    let _lock = HostLock::acquire(&settings.lock)?;
    let numbers = Identity::numbers_beside(&settings.lock);
    let identity = settings.key_file.as_deref().map(|file| Identity::open(file, &numbers)).transpose()?;
    let vips = Vips::establish(&settings.vips, &vip::state_path(&settings.lock)).await?;
    let (decap, lived) = match decap::begin(&settings).await {
        Ok(decap) => (decap, live(&settings, identity, control).await),
        Err(error) => (None, Err(error)),
    };
    // Whatever went wrong, both go; the first error is the one that matters.
    let unwrapped = decap.map_or(Ok(()), |decap| decap.remove().map_err(Into::into));
    let withdrawn = match vips {
        Some(vips) => vips.withdraw().await.map_err(Into::into),
        None => Ok(()),
    };
    let mut errors = [lived, unwrapped, withdrawn].into_iter().filter_map(Result::err);
    let first = errors.next();
    errors.for_each(|error| tracing::warn!("{error:#}"));
    first.map_or(Ok(()), Err)
}

/// From the socket to the end of the sessions.
async fn live(settings: &Settings, identity: Option<Identity>, control: &Control) -> anyhow::Result<()> {
    let socket = AdminSocket::bind(&settings.socket).with_context(|| {
        format!("cannot listen on the agent's socket {} (another place: `--socket PATH`)", settings.socket.display())
    })?;
    let health = settings.health.clone().watch(settings.health_interval, settings.health_timeout).await;
    let (agent, client) = Agent::join(settings, identity, health)?;
    let socket = tokio::spawn(socket.serve(agent.answers()));
    control.asked(Asked::Drain).await;
    tokio::select! {
        () = leave_in_peace(settings, &client) => {}
        () = control.asked(Asked::Abort) => {}
    }
    socket.abort();
    // The error is that it was aborted.
    let _ = socket.await;
    if timeout(CLOSE_WAIT, client.leave()).await.is_err() {
        tracing::warn!("a session did not close in time; dropped");
    }
    Ok(())
}

/// STOP everywhere, then wait for the connections of what was served.
async fn leave_in_peace(settings: &Settings, client: &Client) {
    let began = Instant::now();
    // An element that is away cannot be told; one that has refused has said so.
    let answers = client.drain(STOP_WAIT).await;
    if answers.failures().any(|(_, error)| matches!(error, NeError::Timeout(_))) {
        tracing::warn!("STOP was not acknowledged everywhere within {} s; going on", STOP_WAIT.as_secs());
    }
    let ports = settings.tcp_ports();
    if !ports.is_empty() {
        drain_connections(Drain::new(began, settings.drain), ports).await;
    }
}

async fn drain_connections(mut drain: Drain, ports: BTreeSet<u16>) {
    loop {
        let ports = ports.clone();
        // The tables can be long.
        let counted = tokio::task::spawn_blocking(move || drain::connections(&ports)).await;
        let left = match counted.map_err(std::io::Error::from).flatten() {
            Ok(left) => left,
            Err(error) => return tracing::warn!("cannot count connections, leaving without waiting: {error}"),
        };
        match drain.counted(Instant::now(), left) {
            Step::Done => return tracing::info!("drained: no connections left"),
            Step::TimeIsUp => {
                return tracing::warn!("{left} connections left, but the time is up (--drain); they may break");
            }
            Step::Wait { until, report } => {
                if report {
                    tracing::info!("draining: {left} connections left");
                }
                sleep_until(until.into()).await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
