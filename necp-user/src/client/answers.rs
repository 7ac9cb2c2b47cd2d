//! What the network elements said to a request, one by one.

use std::fmt;
use std::time::Duration;

use thiserror::Error;

use super::address::NeAddress;
use crate::necp::{Flows, Listed, ServiceKey, UnitError};

/// The answers of all network elements, in the order in which they were named.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a network element may have refused, or be away"]
pub struct Answers<T>(pub Vec<(NeAddress, Result<T, NeError>)>);

impl<T> Answers<T> {
    /// Whether every network element did what was asked.
    pub fn is_ok(&self) -> bool {
        self.0.iter().all(|(_, answer)| answer.is_ok())
    }

    /// Whether at least one did.
    pub fn any_ok(&self) -> bool {
        self.0.iter().any(|(_, answer)| answer.is_ok())
    }

    /// Those that did not, and why.
    pub fn failures(&self) -> impl Iterator<Item = (&NeAddress, &NeError)> {
        self.0.iter().filter_map(|(ne, answer)| Some((ne, answer.as_ref().err()?)))
    }

    /// All or nothing: what they answered, or who did not do it.
    ///
    /// # Errors
    /// If at least one failed.
    pub fn all(self) -> Result<Vec<T>, NotEverywhere> {
        let failures: Vec<_> = self.failures().map(|(ne, error)| (ne.clone(), error.clone())).collect();
        if failures.is_empty() {
            Ok(self.0.into_iter().filter_map(|(_, answer)| answer.ok()).collect())
        } else {
            Err(NotEverywhere { failures, of: self.0.len() })
        }
    }
}

/// Some network elements did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub struct NotEverywhere {
    /// Which, and why.
    pub failures: Vec<(NeAddress, NeError)>,
    /// How many were asked.
    pub of: usize,
}

impl fmt::Display for NotEverywhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not done by {} of {} network elements", self.failures.len(), self.of)?;
        for (at, (ne, error)) in self.failures.iter().enumerate() {
            write!(f, "{} {ne}: {error}", if at == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

/// Why one network element did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NeError {
    /// There is no session with it. What the application wants is told when there is one again.
    #[error("away: {0}")]
    Away(String),
    /// The session ended before the answer: it may have been done, and is told again in the next session.
    #[error("the session ended before the answer")]
    Lost,
    /// It has not answered yet; it may still do it.
    #[error("no answer within {} s", .0.as_secs_f64())]
    Timeout(Duration),
    /// It refused to start or to stop these services.
    #[error("refused {}", list(.0))]
    Services(Vec<ServiceKey>),
    /// It refused these exceptions; those that were asked for beside them are installed.
    #[error("refused {}", list(.0))]
    Exceptions(Vec<Flows>),
    /// These exceptions are of the other address family than the session with it, and there is no session that they
    /// concern; those that were asked for beside them are installed.
    #[error("the session with it is of the other address family: not asked for {}", list(.0))]
    OtherFamily(Vec<Flows>),
    /// It refused the request as a whole.
    #[error("refused")]
    Refused,
}

/// The exceptions that a network element holds, of all servers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing {
    /// Those that match, by installer.
    pub entries: Vec<Listed>,
    /// There are more than [`Builder::max_listed`](super::Builder::max_listed), and they were left out.
    pub more: bool,
}

/// Why an exception was asked of no network element.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ExceptError {
    /// It cannot be: no network element would take it.
    #[error("{flows}: {error}")]
    Invalid {
        /// The exception.
        flows: Flows,
        /// What is wrong with it.
        error: UnitError,
    },
    /// The limit of [`Builder::max_exceptions`](super::Builder::max_exceptions); nothing was added.
    #[error("more than {0} exceptions at a time; delete some, or let them expire")]
    TooMany(usize),
}

/// Why services were started, or taken back, at no network element.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ServeError {
    /// The same service twice.
    #[error("the service {0} is offered twice; a service has one forwarding type")]
    Twice(ServiceKey),
    /// Something that is no service: protocol 0, or port 0 of TCP or UDP.
    #[error("{0} is no service")]
    NoService(ServiceKey),
}

/// The first of many, and how many there are.
fn list(items: &[impl fmt::Display]) -> String {
    const SHOWN: usize = 4;
    let mut text = items.iter().take(SHOWN).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if items.len() > SHOWN {
        text.push_str(&format!(" and {} more", items.len() - SHOWN));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ne(host: &str) -> NeAddress {
        host.parse().expect(host)
    }

    #[test]
    fn who_did_not_do_it_is_named() {
        let answers = Answers(vec![
            (ne("10.0.0.1"), Ok(())),
            (ne("10.0.0.2"), Err(NeError::Away("connection refused".into()))),
            (ne("10.0.0.3"), Err(NeError::Services((1..7).map(|port| ServiceKey::new(6, port)).collect()))),
        ]);
        assert!(!answers.is_ok() && answers.any_ok());
        assert_eq!(
            answers.all().expect_err("two failed").to_string(),
            "not done by 2 of 3 network elements: 10.0.0.2:3262: away: connection refused; \
             10.0.0.3:3262: refused tcp/1, tcp/2, tcp/3, tcp/4 and 2 more"
        );
        assert_eq!(Answers(vec![(ne("10.0.0.1"), Ok(7))]).all(), Ok(vec![7]));
    }
}
