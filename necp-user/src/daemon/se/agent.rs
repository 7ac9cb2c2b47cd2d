//! The running agent as its socket shows it, and what the commands do to it.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::drain::connections;
use super::protocol::{
    AgentStatus, Entry, ExceptionCount, HealthSetting, HealthStatus, NeAnswer, NeStatus, Outcome, Request,
};
use super::settings::Settings;
use super::words::{Ports, Prefix, ScopeName, flows};
use crate::client::{Answers, Client, HealthIndex, JoinError, Listing, NeError, NeState, Standing};
use crate::daemon::admin::error;
use crate::necp::{Exception, Family, Filter, Flows, Scope};
use crate::secret::Identity;

/// How long to wait for the network elements' answers to one command.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What the socket speaks for.
#[derive(Clone)]
pub(super) struct Agent {
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    started: Instant,
    services: Vec<String>,
    ports: BTreeSet<u16>,
    source: String,
    health: watch::Receiver<HealthIndex>,
    /// What `necp health` has set.
    override_: watch::Sender<Option<HealthIndex>>,
}

impl Agent {
    /// Joins the network elements; `health` is what the source says.
    pub(super) fn join(
        settings: &Settings,
        identity: Option<Identity>,
        health: watch::Receiver<HealthIndex>,
    ) -> Result<(Self, Client), JoinError> {
        let override_ = watch::Sender::new(None);
        let mut builder = Client::builder().answer_within(ANSWER_WITHIN).keepalive(settings.keepalive);
        builder = builder.protection(settings.protection.clone());
        builder = builder.retry_max(settings.retry_max).health({
            // The index is the host's: the same for every service of it.
            let (health, override_) = (health.clone(), override_.subscribe());
            move |_| override_.borrow().unwrap_or(*health.borrow())
        });
        builder = settings.nes.iter().fold(builder, |builder, ne| builder.ne(ne.clone()));
        builder = settings.offers.iter().fold(builder, |builder, offer| builder.serve(*offer));
        if let Some(source) = settings.source {
            builder = builder.source(source);
        }
        if let Some(identity) = identity {
            builder = builder.identity(identity);
        }
        let client = builder.join()?;
        let services = settings.offers.iter().map(|offer| format!("{}={}", offer.key(), offer.forwarding)).collect();
        let shared = Shared {
            client: client.clone(),
            started: Instant::now(),
            services,
            ports: settings.tcp_ports(),
            source: settings.health.to_string(),
            health,
            override_,
        };
        Ok((Self { shared: Arc::new(shared) }, client))
    }

    /// For [`AdminSocket::serve`](crate::daemon::admin::AdminSocket::serve).
    pub(super) fn answers(
        &self,
    ) -> impl Fn(String) -> Pin<Box<dyn Future<Output = Value> + Send>> + Clone + Send + 'static {
        let agent = self.clone();
        move |line| {
            let agent = agent.clone();
            Box::pin(async move {
                match serde_json::from_str(&line) {
                    Ok(request) => agent.answer(request).await,
                    Err(what) => error(format_args!(
                        "write one line such as {{\"command\":\"status\"}}: {what}; the commands are {}",
                        Request::COMMANDS
                    )),
                }
            })
        }
    }

    async fn answer(&self, request: Request) -> Value {
        let client = &self.shared.client;
        match request {
            Request::Status => json!({"status": self.status().await}),
            Request::ExceptAdd { src, dst, port, ttl, scope } => {
                let exception = Exception { scope: scope.0, ttl, flows: flows(src, dst, port) };
                tracing::info!("by command: except {}, {scope}, ttl {ttl}", exception.flows);
                match client.except(&[exception]).await {
                    Ok(answers) => self.excepted(&answers, &exception.flows),
                    Err(what) => error(what),
                }
            }
            Request::ExceptDel { src, dst, port } => {
                let flows = flows(src, dst, port);
                tracing::info!("by command: no exception for {flows}");
                match client.unexcept(&[flows]).await {
                    Ok(answers) => self.excepted(&answers, &flows),
                    Err(what) => error(what),
                }
            }
            Request::ExceptReset => {
                tracing::info!("by command: no exceptions");
                done(&client.reset_exceptions().await)
            }
            Request::ExceptList { src, dst, port, scope, installer } => {
                listed(&client.exceptions(filter(src, dst, port, scope, installer)).await)
            }
            Request::Drain => {
                tracing::info!("by command: drain");
                done(&client.drain(ANSWER_WITHIN).await)
            }
            Request::Resume => {
                tracing::info!("by command: resume");
                done(&client.resume().await)
            }
            Request::Health { set } => self.health(set),
        }
    }

    /// As [`done`], of an exception, which concerns the sessions of its own family only.
    fn excepted(&self, answers: &Answers<()>, flows: &Flows) -> Value {
        let states = self.shared.client.nes();
        let concerned = |state: &NeState| match state.standing {
            Standing::Joined { local: Some(local), .. } => {
                flows.has_no_address() || Family::of(local.to_canonical()) == flows.family()
            }
            _ => true,
        };
        let told = answers.0.iter().zip(&states).map(|((ne, answer), state)| {
            let mut told = ne_answer(ne, answer.as_ref().err());
            if answer.is_ok() && !concerned(state) {
                told.result = Outcome::OtherFamily;
            }
            told
        });
        json!({"answers": told.collect::<Vec<_>>()})
    }

    fn health(&self, set: Option<HealthSetting>) -> Value {
        let index = match set {
            None => None,
            Some(HealthSetting::Auto(_)) => Some(None),
            Some(HealthSetting::Index(index)) => match HealthIndex::new(index) {
                None => return error(format_args!("{index} is no health index: it is from 0 to 100, or \"auto\"")),
                index => Some(index),
            },
        };
        if let Some(index) = index {
            match index {
                Some(index) => tracing::info!("by command: health {index}"),
                None => tracing::info!("by command: health from {} again", self.shared.source),
            }
            self.shared.override_.send_replace(index);
        }
        json!({"health": self.health_status()})
    }

    fn health_status(&self) -> HealthStatus {
        let (source, set) = (*self.shared.health.borrow(), *self.shared.override_.borrow());
        HealthStatus {
            index: set.unwrap_or(source).get(),
            source: self.shared.source.clone(),
            source_index: source.get(),
            overridden: set.is_some(),
        }
    }

    async fn status(&self) -> AgentStatus {
        let ports = self.shared.ports.clone();
        // The tables can be long.
        let counted = tokio::task::spawn_blocking(move || connections(&ports)).await;
        let mut exceptions = ExceptionCount::default();
        for wanted in self.shared.client.wanted() {
            match wanted.scope {
                Scope::Local => exceptions.local += 1,
                Scope::Global => exceptions.global += 1,
            }
        }
        AgentStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: self.shared.started.elapsed().as_secs(),
            serving: self.shared.client.is_serving(),
            services: self.shared.services.clone(),
            connections: counted.ok().and_then(Result::ok),
            health: self.health_status(),
            exceptions,
            nes: self.shared.client.nes().iter().map(ne_status).collect(),
        }
    }
}

fn ne_status(state: &NeState) -> NeStatus {
    let mut status = NeStatus {
        ne: state.ne.to_string(),
        state: "away".into(),
        since_seconds: state.since.elapsed().as_secs(),
        address: None,
        started: Vec::new(),
        refused: Vec::new(),
        health: None,
        why: None,
    };
    match &state.standing {
        Standing::Away(why) => status.why = Some(why.clone()),
        Standing::Joined { local, started, refused, stopped, health } => {
            status.state = match (stopped, started.is_empty()) {
                (true, _) => "drained",
                (false, true) => "joined",
                (false, false) => "serving",
            }
            .into();
            status.address = *local;
            status.started = started.iter().map(ToString::to_string).collect();
            status.refused = refused.iter().map(ToString::to_string).collect();
            status.health = *health;
        }
    }
    status
}

/// A prefix that was written without a length is a host's; `any` is no condition.
fn filter(
    src: Option<Prefix>,
    dst: Option<Prefix>,
    port: Option<Ports>,
    scope: Option<ScopeName>,
    installer: Option<std::net::IpAddr>,
) -> Filter {
    let net = |prefix: Option<Prefix>| {
        prefix.filter(|Prefix(net)| net.prefix_len() > 0).map(|Prefix(net)| (net.addr(), Some(net.prefix_len())))
    };
    Filter {
        scope: scope.map(|ScopeName(scope)| scope),
        family: None,
        installer: installer.map(|installer| installer.to_canonical()),
        source: net(src),
        destination: net(dst),
        protocol: port.map(|ports| ports.protocol).filter(|protocol| *protocol != 0),
        port: port.map(|ports| ports.port).filter(|port| *port != 0),
    }
}

fn done(answers: &Answers<()>) -> Value {
    json!({"answers": answers.0.iter().map(|(ne, answer)| ne_answer(ne, answer.as_ref().err())).collect::<Vec<_>>()})
}

fn listed(answers: &Answers<Listing>) -> Value {
    let answers = answers.0.iter().map(|(ne, answer)| {
        let mut told = ne_answer(ne, answer.as_ref().err());
        if let Ok(listing) = answer {
            told.entries = Some(listing.entries.iter().map(Entry::from).collect());
            told.more = listing.more;
        }
        told
    });
    json!({"answers": answers.collect::<Vec<_>>()})
}

fn ne_answer(ne: &crate::client::NeAddress, error: Option<&NeError>) -> NeAnswer {
    let result = match error {
        None => Outcome::Accepted,
        Some(NeError::Away(_)) => Outcome::Away,
        Some(NeError::Lost) => Outcome::Lost,
        Some(NeError::Timeout(_)) => Outcome::Timeout,
        Some(NeError::Services(_) | NeError::Exceptions(_) | NeError::OtherFamily(_) | NeError::Refused) => {
            Outcome::Refused
        }
    };
    let why = error.map(|error| match error {
        NeError::Away(why) => why.clone(),
        other => other.to_string(),
    });
    NeAnswer { ne: ne.to_string(), result, why, entries: None, more: false }
}
