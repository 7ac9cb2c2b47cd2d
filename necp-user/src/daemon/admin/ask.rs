//! The other end of an admin socket, for the commands.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Who is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// `necp ne`.
    Ne,
    /// `necp se`.
    Se,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ne => "network element",
            Self::Se => "agent",
        })
    }
}

impl Who {
    fn hint(self) -> &'static str {
        match self {
            Self::Ne => "is `necp ne` running? If its configuration has another `socket`, name it with --socket PATH",
            Self::Se => {
                "is `necp se` running? If it was started with another --lock or --socket, name it with --socket PATH"
            }
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Unreachable {
    /// Nobody listens.
    #[error("no {who} answers at {}: {source}; {}{}", path.display(), who.hint(), as_root(source))]
    Connect {
        /// Who should.
        who: Who,
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It does not say what it should.
    #[error("the {who} at {} did not answer as it should: {what}; is it of another version? Its log may tell more", path.display())]
    Answer {
        /// Who should.
        who: Who,
        /// The socket.
        path: PathBuf,
        /// What came, or did not.
        what: String,
    },
    /// It says that it cannot.
    #[error("the {who} says: {what}")]
    Error {
        /// Who said it.
        who: Who,
        /// What it said.
        what: String,
    },
}

fn as_root(source: &io::Error) -> &'static str {
    if source.kind() == io::ErrorKind::PermissionDenied { " (the socket is for root only)" } else { "" }
}

/// Sends one request and returns what the answer has under `key`. `patience` is for each step.
///
/// # Errors
/// See [`Unreachable`].
pub fn ask(who: Who, socket: &Path, request: &Value, key: &str, patience: Duration) -> Result<Value, Unreachable> {
    let mut answer: HashMap<String, Value> = ask_as(who, socket, request, patience)?;
    let missing = || format!("there is no `{key}` in it");
    answer.remove(key).ok_or_else(|| Unreachable::Answer { who, path: socket.into(), what: missing() })
}

/// As [`ask`], for the whole of an answer that is no error: of megabytes it makes what is wanted, and nothing else.
///
/// # Errors
/// See [`Unreachable`].
pub fn ask_as<T: DeserializeOwned>(
    who: Who,
    socket: &Path,
    request: &Value,
    patience: Duration,
) -> Result<T, Unreachable> {
    let connect = |source| Unreachable::Connect { who, path: socket.into(), source };
    let failed = |what: &dyn fmt::Display| Unreachable::Answer { who, path: socket.into(), what: what.to_string() };
    let mut stream = UnixStream::connect(socket).map_err(connect)?;
    stream.set_read_timeout(Some(patience)).and_then(|()| stream.set_write_timeout(Some(patience))).map_err(connect)?;
    stream.write_all(format!("{request}\n").as_bytes()).map_err(|error| failed(&error))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(|error| failed(&error))?;
    if let Ok(Refusal { error }) = serde_json::from_str(&line) {
        return Err(Unreachable::Error { who, what: error.as_str().map_or_else(|| error.to_string(), str::to_owned) });
    }
    serde_json::from_str(&line).map_err(|error| failed(&error))
}

/// What the answer is if there is none.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Refusal {
    error: Value,
}
