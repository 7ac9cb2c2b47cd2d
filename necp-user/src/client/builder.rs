//! What a client is told before it joins.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::Client;
use super::address::NeAddress;
use super::answers::ServeError;
use super::health::{Health, HealthIndex};
use crate::necp::{ServiceKey, ServiceUnit};
use crate::secret::Identity;
use crate::secret::tcp_security::Protection;

/// All that the tasks of a client need to know.
pub(super) struct Settings {
    pub(super) nes: Vec<NeAddress>,
    /// At first.
    pub(super) offers: Vec<ServiceUnit>,
    pub(super) health: Health,
    pub(super) health_timeout: Duration,
    pub(super) identity: Option<Identity>,
    pub(super) source: Option<IpAddr>,
    pub(super) protection: Protection,
    pub(super) keepalive: Duration,
    pub(super) retry_max: Duration,
    pub(super) answer_within: Duration,
    pub(super) max_exceptions: usize,
    pub(super) max_listed: usize,
}

/// Makes a [`Client`]: at least one [`ne`](Builder::ne), and mostly a service.
#[must_use = "nothing happens before `join`"]
pub struct Builder {
    settings: Settings,
}

/// Why a client cannot be made as it was described.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum JoinError {
    /// No network element.
    #[error("no network element to join")]
    NoNe,
    /// The same network element twice.
    #[error("the network element {0} is named twice")]
    NeTwice(NeAddress),
    /// Its services.
    #[error(transparent)]
    Services(#[from] ServeError),
    /// The source and a network element's address are of different families.
    #[error("{ne} cannot be dialled from {from}: one is IPv4, the other IPv6")]
    Family {
        /// The network element.
        ne: NeAddress,
        /// The source address.
        from: IpAddr,
    },
    /// A time that makes no sense for its purpose.
    #[error("the {name} must be from {least:?} to {most:?}")]
    OutOfRange {
        /// What it is.
        name: &'static str,
        /// Least value.
        least: Duration,
        /// Greatest value.
        most: Duration,
    },
    /// [`Builder::join`] was called outside a tokio runtime.
    #[error("there is no tokio runtime here to run the sessions")]
    NoRuntime,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self {
            settings: Settings {
                nes: Vec::new(),
                offers: Vec::new(),
                health: Arc::new(|_| Box::pin(std::future::ready(HealthIndex::FULL))),
                health_timeout: Duration::from_secs(1),
                identity: None,
                source: None,
                protection: Protection::default(),
                keepalive: Duration::from_secs(5),
                retry_max: crate::necp::backoff::DEFAULT_MAX,
                answer_within: Duration::from_secs(10),
                max_exceptions: 65_536,
                max_listed: 65_536,
            },
        }
    }

    /// A network element to join. Several are joined independently of one another.
    pub fn ne(mut self, ne: NeAddress) -> Self {
        self.settings.nes.push(ne);
        self
    }

    /// A service to start everywhere, and how its packets are wanted (§5.6.1). [`Client::serve`] adds others later.
    pub fn serve(mut self, offer: ServiceUnit) -> Self {
        self.settings.offers.push(offer);
        self
    }

    /// The address to dial from, which is the one that the network elements know this server by.
    pub fn source(mut self, source: IpAddr) -> Self {
        self.settings.source = Some(source.to_canonical());
        self
    }

    /// TTL security (RFC 5082) and TCP-MD5 (RFC 2385), where the network elements ask for them; neither by default.
    pub fn protection(mut self, protection: Protection) -> Self {
        self.settings.protection = protection;
        self
    }

    /// How to prove who this server is (§5.8): with it all sessions are authenticated, and none is opened without.
    pub fn identity(mut self, identity: Identity) -> Self {
        self.settings.identity = Some(identity);
        self
    }

    /// How healthy a service is; 100 is the default. Called whenever a network element asks (§5.5.1: every few seconds),
    /// by a task of its own; it must not block.
    pub fn health(self, health: impl Fn(ServiceKey) -> HealthIndex + Send + Sync + 'static) -> Self {
        let health = Arc::new(health);
        self.health_async(move |service| {
            let health = Arc::clone(&health);
            async move { health(service) }
        })
    }

    /// As [`Self::health`], for an answer that has to be waited for; see [`Self::health_timeout`].
    pub fn health_async<F>(mut self, health: impl Fn(ServiceKey) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = HealthIndex> + Send + 'static,
    {
        self.settings.health = Arc::new(move |service| Box::pin(health(service)));
        self
    }

    /// How long the health closure may take before its answer counts as 0; 1 s. A KEEPALIVE is unanswered meanwhile, and
    /// three unanswered ones end the session: keep it below the network elements' keepalive interval.
    pub fn health_timeout(mut self, timeout: Duration) -> Self {
        self.settings.health_timeout = timeout;
        self
    }

    /// Time between two KEEPALIVEs (§5.5); 5 s. From 10 ms to an hour.
    pub fn keepalive(mut self, interval: Duration) -> Self {
        self.settings.keepalive = interval;
        self
    }

    /// The longest time between two attempts to connect, which begin 1 s apart and double (§5.4); 256 s. At least 1 s.
    pub fn retry_max(mut self, limit: Duration) -> Self {
        self.settings.retry_max = limit;
        self
    }

    /// How long to wait for answers to a request before it is [`NeError::Timeout`](super::NeError::Timeout); 10 s.
    pub fn answer_within(mut self, limit: Duration) -> Self {
        self.settings.answer_within = limit;
        self
    }

    /// Exceptions that may be wanted at a time; 65,536.
    pub fn max_exceptions(mut self, limit: usize) -> Self {
        self.settings.max_exceptions = limit;
        self
    }

    /// Entries that one answer to [`Client::exceptions`] may have; 65,536. What an NE sends beyond it is thrown away.
    pub fn max_listed(mut self, limit: usize) -> Self {
        self.settings.max_listed = limit;
        self
    }

    /// Starts the sessions, one task each, on the current tokio runtime, and returns at once.
    ///
    /// # Errors
    /// See [`JoinError`]; a network element that is away is none.
    pub fn join(self) -> Result<Client, JoinError> {
        self.settings.check()?;
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(JoinError::NoRuntime);
        }
        Ok(Client::start(self.settings))
    }
}

impl Settings {
    fn check(&self) -> Result<(), JoinError> {
        if self.nes.is_empty() {
            return Err(JoinError::NoNe);
        }
        for (at, ne) in self.nes.iter().enumerate() {
            if self.nes[..at].contains(ne) {
                return Err(JoinError::NeTwice(ne.clone()));
            }
            if let (Some(from), Ok(to)) = (self.source, ne.host.parse::<IpAddr>())
                && from.is_ipv4() != to.to_canonical().is_ipv4()
            {
                return Err(JoinError::Family { ne: ne.clone(), from });
            }
        }
        check_offers(&self.offers)?;
        let (millis, day) = (Duration::from_millis, Duration::from_secs(86_400));
        in_range("keepalive interval", self.keepalive, millis(10), millis(3_600_000))?;
        in_range("longest time between two attempts", self.retry_max, millis(1000), day)?;
        in_range("time for an answer", self.answer_within, millis(1), day)?;
        in_range("time for the health closure", self.health_timeout, millis(1), day)
    }
}

/// Whether they can be started, as far as is known here.
pub(super) fn check_offers(offers: &[ServiceUnit]) -> Result<(), ServeError> {
    for (at, offer) in offers.iter().enumerate() {
        if ServiceUnit::parse(&offer.unit()).is_err() {
            return Err(ServeError::NoService(offer.key()));
        }
        if offers[..at].iter().any(|other| other.key() == offer.key()) {
            return Err(ServeError::Twice(offer.key()));
        }
    }
    Ok(())
}

fn in_range(name: &'static str, value: Duration, least: Duration, most: Duration) -> Result<(), JoinError> {
    if (least..=most).contains(&value) { Ok(()) } else { Err(JoinError::OutOfRange { name, least, most }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::necp::Forwarding;

    #[test]
    fn what_makes_no_sense_is_refused_before_anything_starts() {
        let ne = |text: &str| text.parse::<NeAddress>().expect(text);
        let offer = |port| ServiceUnit::new(Forwarding::L2, ServiceKey::new(6, port));
        let one = || Client::builder().ne(ne("10.0.0.1"));
        let cases = [
            (Client::builder(), JoinError::NoNe),
            (one().ne(ne("10.0.0.1:3262")), JoinError::NeTwice(ne("10.0.0.1"))),
            (one().serve(offer(80)).serve(offer(80)), ServeError::Twice(offer(80).key()).into()),
            (one().serve(offer(0)), ServeError::NoService(offer(0).key()).into()),
            (one().source([0u16; 8].into()), JoinError::Family { ne: ne("10.0.0.1"), from: [0u16; 8].into() }),
            (one(), JoinError::NoRuntime),
        ];
        for (builder, error) in cases {
            assert_eq!(builder.join().err(), Some(error));
        }
        for builder in [
            one().keepalive(Duration::ZERO),
            one().retry_max(Duration::from_millis(999)),
            one().answer_within(Duration::MAX),
            one().health_timeout(Duration::ZERO),
        ] {
            assert!(matches!(builder.join(), Err(JoinError::OutOfRange { .. })));
        }
    }
}
