//! The admin sockets of the network element and of the agent: one line of JSON asks, one answers.
//!
//! `{"command":"status"}` is answered by `{"status":{…}}` (see [`Status`](super::status::Status) and
//! [`AgentStatus`](super::se::protocol::AgentStatus)), what cannot be answered by `{"error":"…"}`. The socket is for its
//! owner only (mode 0600).

mod ask;

use std::fmt;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

pub use ask::{Unreachable, Who, ask, ask_as};

/// Longest request, in bytes.
const REQUEST_MAX: u64 = 4096;
/// Bytes of an overlong request that are read and thrown away.
const DISCARD: u64 = 64 * 1024;
/// Clients served at a time; others wait.
const CLIENTS: usize = 16;
/// How long a client may take for each of its steps.
const PATIENCE: Duration = Duration::from_secs(5);

/// The socket; the file goes when this does.
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl AdminSocket {
    /// Listens at `path`, making its directory if need be. A file that a crashed daemon left is replaced, a living
    /// daemon's is not.
    ///
    /// # Errors
    /// `AddrInUse` if somebody answers there; as `mkdir(2)`, `bind(2)` and `chmod(2)`.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another daemon answers there"));
        }
        match std::fs::symlink_metadata(path) {
            Ok(file) if std::os::unix::fs::FileTypeExt::is_socket(&file.file_type()) => std::fs::remove_file(path)?,
            Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is a file of another kind")),
            Err(_) => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path: path.into() })
    }

    /// Serves until it is dropped; `answer` makes an answer of each line: JSON, in one line.
    pub async fn serve<F>(self, answer: impl Fn(String) -> F + Clone + Send + 'static)
    where
        F: Future<Output: fmt::Display> + Send,
    {
        let places = Arc::new(Semaphore::new(CLIENTS));
        loop {
            let place = Arc::clone(&places).acquire_owned().await;
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let answer = answer.clone();
                    tokio::spawn(async move {
                        if let Err(error) = client(stream, answer).await {
                            tracing::debug!(%error, "admin client");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an admin client");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        // It may have been removed by hand.
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn client<F>(stream: UnixStream, answer: impl Fn(String) -> F) -> io::Result<()>
where
    F: Future<Output: fmt::Display>,
{
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader).take(REQUEST_MAX);
    let mut line = Vec::new();
    while timeout(PATIENCE, reader.read_until(b'\n', &mut line)).await?? > 0 {
        let mut answer = answer(String::from_utf8_lossy(&line).into_owned()).await.to_string();
        answer.push('\n');
        timeout(PATIENCE, writer.write_all(answer.as_bytes())).await??;
        if line.last() != Some(&b'\n') {
            // What is left unread when a socket is closed makes a reset of it, which can overtake the answer.
            writer.shutdown().await?;
            let mut rest = reader.into_inner().take(DISCARD);
            timeout(PATIENCE, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await??;
            break;
        }
        line.clear();
        reader.set_limit(REQUEST_MAX);
    }
    Ok(())
}

/// What a line is answered that asks for nothing known.
#[must_use]
pub fn error(what: impl std::fmt::Display) -> Value {
    serde_json::json!({"error": what.to_string()})
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    use crate::daemon::ne::commands;
    use crate::daemon::ne::input::Input;
    use crate::daemon::status::{self, Status};

    fn sample() -> Status {
        serde_json::from_value(serde_json::json!({
            "version": "0", "pid": 1, "uptime_seconds": 2, "took_over": false, "pin": "/p", "listen": [],
            "interfaces": [], "sessions": 0, "connections": 0, "farms": [], "packets": [],
            "strangers": {"not_admitted": 1, "too_many": 0, "silent": 0, "not_necp": 0},
            "alarms": [], "pending_writes": 0, "failed_writes": 0
        }))
        .expect("a status")
    }

    async fn say(path: &Path, request: &str) -> String {
        let mut stream = UnixStream::connect(path).await.expect("connected");
        stream.write_all(request.as_bytes()).await.expect("written");
        stream.shutdown().await.expect("shut down");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        answer
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_status_goes_round() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("necp/ne.sock");
        let (owner, mut inputs) = mpsc::channel(4);
        let socket = AdminSocket::bind(&path).expect("bound");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        let server = tokio::spawn(socket.serve(commands::answers(owner)));
        tokio::spawn(async move {
            while let Some(Input::Status { done }) = inputs.recv().await {
                done.send(sample()).expect("awaited");
            }
        });
        let at = path.clone();
        let fetched = tokio::task::spawn_blocking(move || status::fetch(&at)).await.expect("no panic");
        assert_eq!(fetched.expect("a status"), sample());

        assert!(say(&path, "{\"command\":\"stop\"}\n").await.contains("unknown command `stop`; there is: status"));
        assert!(say(&path, "\u{0}\n").await.starts_with("{\"error\""));
        assert!(say(&path, "rubbish").await.starts_with("{\"error\":\"write one line such as"));
        assert!(say(&path, &"x".repeat(10_000)).await.starts_with("{\"error\""), "bounded");
        assert!(say(&path, "").await.is_empty());
        let error = AdminSocket::bind(&path).err().expect("somebody answers there");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);

        server.abort();
        let _ = server.await;
        let at = path.clone();
        let gone = tokio::task::spawn_blocking(move || status::fetch(&at)).await.expect("no panic");
        let error = gone.expect_err("nobody is there");
        assert!(matches!(error, Unreachable::Connect { .. }));
        assert!(error.to_string().contains(&format!("no network element answers at {}", path.display())), "{error}");
        assert!(!path.exists(), "the file goes with the daemon");
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_other_files_are_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("ne.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
        assert!(path.exists(), "left behind");
        drop(AdminSocket::bind(&path).expect("replaced"));
        std::fs::write(&path, "a file").expect("written");
        assert!(AdminSocket::bind(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).expect("still there"), "a file");
    }
}
