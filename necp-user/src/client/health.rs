//! The Health Index (§5.5.3), and how an application is asked for it.

use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::necp::{Query, ServiceKey};

/// Services that one KEEPALIVE may ask about; whoever asks about more is told that it is not supported.
const MAX_SERVICES: usize = 1024;

/// A Health Index: 0–100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HealthIndex(u8);

impl HealthIndex {
    /// No new work.
    pub const NONE: Self = Self(0);
    /// Perfect.
    pub const FULL: Self = Self(100);

    /// The index `value`, if it is one.
    pub const fn new(value: u8) -> Option<Self> {
        if value <= 100 { Some(Self(value)) } else { None }
    }

    /// Its value, 0–100.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The nearest index to a measure of how well a server is, never 0: a busy server is still a server.
    pub(crate) fn of_measure(measure: f64) -> Self {
        Self(measure.clamp(1.0, 100.0).round() as u8)
    }

    /// Reads a number that somebody wrote, rounding it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let number: f64 = text.parse().ok()?;
        (0.0..=100.0).contains(&number).then(|| Self(number.round() as u8))
    }
}

impl fmt::Display for HealthIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The application's closure: how healthy is this service?
pub(super) type Health = Arc<dyn Fn(ServiceKey) -> Pin<Box<dyn Future<Output = HealthIndex> + Send>> + Send + Sync>;

/// The answers to `queries`, in their order. The closure is asked once per service; one that is not done by `limit`, or
/// panics, stands for 0: who cannot tell that a server works must not send it clients.
pub(super) async fn ask(health: Health, queries: Vec<Query>, limit: Duration) -> Vec<Option<u8>> {
    let mut indices: BTreeMap<ServiceKey, u8> = queries.iter().map(|query| (query.service, 0)).collect();
    if indices.len() > MAX_SERVICES {
        return vec![None; queries.len()];
    }
    // Tasks, so that a panic is theirs; they end with this set.
    let mut asked = JoinSet::new();
    for service in indices.keys().copied() {
        let health = Arc::clone(&health);
        asked.spawn(async move { (service, health(service).await) });
    }
    let all = async {
        while let Some(done) = asked.join_next().await {
            match done {
                Ok((service, index)) => drop(indices.insert(service, index.get())),
                Err(error) => tracing::error!("health 0: the health closure failed: {error}"),
            }
        }
    };
    if timeout(limit, all).await.is_err() {
        tracing::warn!("health 0: the health closure took longer than {} s", limit.as_secs_f64());
    }
    queries.iter().map(|query| indices.get(&query.service).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_and_bounded() {
        for (text, value) in [("0", Some(0)), ("99.5", Some(100)), ("0.4", Some(0)), ("100.1", None), ("-1", None)] {
            assert_eq!(HealthIndex::parse(text).map(HealthIndex::get), value, "{text}");
        }
        for text in ["nan", "inf", "", "1 2"] {
            assert_eq!(HealthIndex::parse(text), None, "{text}");
        }
        assert_eq!((HealthIndex::of_measure(-5.0).get(), HealthIndex::of_measure(f64::INFINITY).get()), (1, 100));
        assert_eq!(HealthIndex::new(101), None);
    }

    fn queries(ports: impl IntoIterator<Item = u16>) -> Vec<Query> {
        ports.into_iter().map(|port| Query { service: ServiceKey::new(6, port) }).collect()
    }

    #[tokio::test]
    async fn one_service_that_hangs_or_panics_is_0_and_the_others_are_not() {
        let health: Health = Arc::new(|service: ServiceKey| {
            Box::pin(async move {
                match service.port() {
                    1 => std::future::pending().await,
                    2 => panic!("a bug of the application's"),
                    port => HealthIndex::new(port as u8).unwrap_or(HealthIndex::NONE),
                }
            })
        });
        let limit = Duration::from_millis(100);
        let answers = ask(Arc::clone(&health), queries([40, 1, 70, 2, 40]), limit).await;
        assert_eq!(answers, [40, 0, 70, 0, 40].map(Some));
        let many = ask(health, queries(100..1200), limit).await;
        assert_eq!(many, [None; 1100], "more than is ever started");
    }
}
