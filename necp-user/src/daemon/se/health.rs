//! Where this server's Health Index (§5.5.3) comes from: 100 is perfect, 1 barely able, 0 asks for no new work.
//!
//! A source is evaluated in the background; the sessions answer with the last value, so that a slow check never makes a
//! keepalive late. A source that fails counts as 0: who cannot tell that the server works must not send it clients.

mod command;
mod http;
mod system;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{Semaphore, watch};
use tokio::time::MissedTickBehavior;

pub use http::HttpTarget;

use crate::client::HealthIndex;

/// A source of the Health Index, as `--health` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HealthSource {
    /// `constant:N`, or just `N`.
    Constant(HealthIndex),
    /// `exec:COMMAND`: run by `/bin/sh`.
    Exec(String),
    /// `http://HOST[:PORT][/PATH]`.
    Http(HttpTarget),
    /// `load`: the load average of the last minute per CPU.
    Load,
    /// `psi`: how long tasks waited for a CPU.
    Psi,
    /// `file:PATH`: a number in a file.
    File(PathBuf),
}

/// Why a text names no health source.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseSourceError {
    /// A constant outside 0–100.
    #[error("`{0}` is no health index: it is a whole number from 0 (no new work) to 100 (perfect)")]
    Constant(String),
    /// `exec:` or `file:` with nothing behind it.
    #[error("`{0}:` needs something behind the colon")]
    Empty(&'static str),
    /// A URL that cannot be asked.
    #[error("`{url}`: {why}")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// None of the known kinds.
    #[error(
        "`{0}` is no health source; there are constant:N, exec:COMMAND, http://HOST[:PORT]/PATH, load, psi and file:PATH"
    )]
    Unknown(String),
}

impl FromStr for HealthSource {
    type Err = ParseSourceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        match kind {
            "load" | "psi" if text == kind => Ok(if kind == "load" { Self::Load } else { Self::Psi }),
            "exec" | "file" if rest.trim().is_empty() => {
                Err(ParseSourceError::Empty(if kind == "exec" { "exec" } else { "file" }))
            }
            "exec" => Ok(Self::Exec(rest.trim().to_owned())),
            "file" => Ok(Self::File(rest.trim().into())),
            "http" | "https" => {
                HttpTarget::parse(text).map(Self::Http).map_err(|why| ParseSourceError::Url { url: text.into(), why })
            }
            "constant" => constant(rest),
            number if number == text && number.starts_with(|first: char| first.is_ascii_digit() || first == '-') => {
                constant(number)
            }
            _ => Err(ParseSourceError::Unknown(text.into())),
        }
    }
}

fn constant(text: &str) -> Result<HealthSource, ParseSourceError> {
    let index = text.trim().parse().ok().and_then(HealthIndex::new);
    index.map(HealthSource::Constant).ok_or_else(|| ParseSourceError::Constant(text.into()))
}

impl fmt::Display for HealthSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant(index) => write!(f, "constant:{index}"),
            Self::Exec(command) => write!(f, "exec:{command}"),
            Self::Http(target) => target.fmt(f),
            Self::Load => f.write_str("load"),
            Self::Psi => f.write_str("psi"),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

/// Why a source gave no index.
#[derive(Debug, Error)]
pub enum HealthError {
    /// It took too long.
    #[error("no answer within {} s", .0.as_secs_f64())]
    Timeout(Duration),
    /// The command could not be run at all.
    #[error("the command could not be run: {0}")]
    Run(#[source] std::io::Error),
    /// The command ended with another exit code than 0, or by a signal.
    #[error("the command ended with {status}{}{stderr}", if stderr.is_empty() { "" } else { ": " })]
    Exit {
        /// How it ended.
        status: std::process::ExitStatus,
        /// The first line that it wrote to its standard error.
        stderr: String,
    },
    /// A number was expected.
    #[error("`{0}` is no number from 0 to 100")]
    NoIndex(String),
    /// The server could not be connected to, or the connection broke.
    #[error("{target}: {source}")]
    Connection {
        /// Where it was tried.
        target: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The server answered, but not 2xx or 3xx.
    #[error("the server answered `{0}`")]
    HttpStatus(String),
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl HealthSource {
    /// Evaluates the source once. A child process that is not done by `timeout` is killed, its whole process group
    /// with it.
    ///
    /// # Errors
    /// See [`HealthError`].
    pub async fn evaluate(&self, timeout: Duration) -> Result<HealthIndex, HealthError> {
        self.evaluate_in(&one_reader(), timeout).await
    }

    /// The same, with the place of its thread.
    async fn evaluate_in(&self, turn: &Arc<Semaphore>, timeout: Duration) -> Result<HealthIndex, HealthError> {
        let evaluation = async {
            match self {
                Self::Constant(index) => Ok(*index),
                Self::Exec(command) => command::evaluate(command).await,
                Self::Http(target) => http::evaluate(target).await,
                Self::Load => system::load(turn).await,
                Self::Psi => system::pressure(turn).await,
                Self::File(path) => system::file(path, turn).await,
            }
        };
        tokio::time::timeout(timeout, evaluation).await.unwrap_or(Err(HealthError::Timeout(timeout)))
    }

    /// Evaluates the source once, then every `interval`, for as long as anybody holds the receiver.
    ///
    /// Returns when the first value is there (at most `timeout`), so that no network element is told of a health that
    /// nobody has looked at.
    pub async fn watch(self, interval: Duration, timeout: Duration) -> watch::Receiver<HealthIndex> {
        let (mut note, turn) = (Note::default(), one_reader());
        let first = note.take(&self, self.evaluate_in(&turn, timeout).await);
        let (sender, receiver) = watch::channel(first);
        if !matches!(self, Self::Constant(_)) {
            tokio::spawn(async move {
                let mut ticks = tokio::time::interval(interval);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                ticks.tick().await;
                loop {
                    tokio::select! {
                        () = sender.closed() => return,
                        _ = ticks.tick() => {}
                    }
                    let outcome = tokio::select! {
                        () = sender.closed() => return,
                        outcome = self.evaluate_in(&turn, timeout) => outcome,
                    };
                    let index = note.take(&self, outcome);
                    sender.send_if_modified(|current| std::mem::replace(current, index) != index);
                }
            });
        }
        receiver
    }
}

/// Room for one thread that reads.
fn one_reader() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(1))
}

/// What the log has been told: one line per change.
#[derive(Debug, Default)]
struct Note {
    /// The reason of the current failure.
    failing: Option<String>,
    index: Option<HealthIndex>,
}

impl Note {
    /// The index that an outcome stands for, logged if it is news.
    fn take(&mut self, source: &HealthSource, outcome: Result<HealthIndex, HealthError>) -> HealthIndex {
        let (index, failing) = match outcome {
            Ok(index) => (index, None),
            Err(error) => (HealthIndex::NONE, Some(error.to_string())),
        };
        match self.news(index, failing) {
            News::Failing(why) => tracing::warn!(%source, "health 0: {why}"),
            News::Recovered => tracing::info!(%source, "health {index}: the check works again"),
            News::NoWork => tracing::warn!(%source, "health 0: no new work"),
            News::WorkAgain => tracing::info!(%source, "health {index}: work again"),
            News::Changed => tracing::debug!(%source, "health {index}"),
            News::Nothing => {}
        }
        index
    }

    fn news(&mut self, index: HealthIndex, failing: Option<String>) -> News {
        let (was_failing, was) = (std::mem::replace(&mut self.failing, failing), self.index.replace(index));
        let zero = |index: Option<HealthIndex>| index == Some(HealthIndex::NONE);
        match &self.failing {
            Some(why) if was_failing.as_ref() != Some(why) => News::Failing(why.clone()),
            Some(_) => News::Nothing,
            None if was_failing.is_some() => News::Recovered,
            None if was == Some(index) => News::Nothing,
            None if zero(Some(index)) => News::NoWork,
            None if zero(was) => News::WorkAgain,
            None => News::Changed,
        }
    }
}

/// What a new outcome means to somebody who reads the log.
#[derive(Debug, PartialEq, Eq)]
enum News {
    Failing(String),
    Recovered,
    NoWork,
    WorkAgain,
    Changed,
    Nothing,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(value: u8) -> HealthIndex {
        HealthIndex::new(value).expect("0 to 100")
    }

    #[test]
    fn sources_are_read_and_printed() {
        for text in [
            "constant:0",
            "constant:100",
            "exec:test -f /up",
            "http://127.0.0.1:80/health",
            "load",
            "psi",
            "file:/run/h",
        ] {
            assert_eq!(text.parse::<HealthSource>().expect(text).to_string(), text);
        }
        assert_eq!("40".parse(), Ok(HealthSource::Constant(index(40))));
        assert_eq!("exec:echo a:b".parse(), Ok(HealthSource::Exec("echo a:b".into())));
    }

    #[test]
    fn what_is_no_source_is_refused_with_what_there_is() {
        use ParseSourceError as E;
        let error = |text: &str| text.parse::<HealthSource>().expect_err(text);
        for text in ["101", "-1", "constant:", "constant:x", "constant:256", "7x"] {
            assert!(matches!(error(text), E::Constant(_)), "{text}");
        }
        assert_eq!((error("exec:"), error("file: ")), (E::Empty("exec"), E::Empty("file")));
        for text in ["", "tcp", "load:1", "loads", "psi:"] {
            assert!(matches!(error(text), E::Unknown(_)), "{text}");
        }
        assert!(error("https://a/").to_string().contains("exec:"), "{}", error("https://a/"));
    }

    #[test]
    fn one_line_per_change() {
        let mut note = Note::default();
        let fail = |why: &str| (HealthIndex::NONE, Some(why.to_owned()));
        let fine = |value| (index(value), None);
        let story = [
            (fine(100), News::Changed),
            (fine(100), News::Nothing),
            (fine(90), News::Changed),
            (fail("a"), News::Failing("a".into())),
            (fail("a"), News::Nothing),
            (fail("b"), News::Failing("b".into())),
            (fine(0), News::Recovered),
            (fine(0), News::Nothing),
            (fine(1), News::WorkAgain),
            (fine(0), News::NoWork),
        ];
        for (at, ((value, failing), news)) in story.into_iter().enumerate() {
            assert_eq!(note.news(value, failing), news, "step {at}");
        }
    }

    #[tokio::test]
    async fn the_watch_follows_its_source_and_ends_with_its_reader() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("health");
        let source = HealthSource::File(path.clone());
        let mut health = source.clone().watch(Duration::from_millis(5), Duration::from_secs(1)).await;
        assert_eq!(*health.borrow_and_update(), HealthIndex::NONE, "there is no file");
        for value in [80, 0, 100] {
            // Replaced as a whole, so that no half-written number is ever read.
            std::fs::write(path.with_extension("new"), value.to_string()).expect("written");
            std::fs::rename(path.with_extension("new"), &path).expect("renamed");
            if *health.borrow() != index(value) {
                tokio::time::timeout(Duration::from_secs(5), health.wait_for(|now| *now == index(value)))
                    .await
                    .expect("within 5 s")
                    .expect("the watch lives");
            }
        }
    }

    #[tokio::test]
    async fn a_slow_source_does_not_delay_the_reader() {
        let started = std::time::Instant::now();
        let source = HealthSource::Exec("sleep 60".into());
        let health = source.watch(Duration::from_millis(5), Duration::from_millis(100)).await;
        assert_eq!(*health.borrow(), HealthIndex::NONE);
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
