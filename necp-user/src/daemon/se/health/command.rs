//! Health by a command: exit code 0 is healthy, or says how healthy on its standard output.

use std::process::Stdio;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;

use super::{HealthError, HealthIndex};

/// Of what a command writes, only the beginning is kept.
const OUTPUT_MAX: usize = 4096;

/// Runs `command` by `/bin/sh` in a process group of its own. When this future is dropped the whole group is killed.
pub(super) async fn evaluate(command: &str) -> Result<HealthIndex, HealthError> {
    let mut child = Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(HealthError::Run)?;
    let mut group = Group(child.id());
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (out, err, status) = tokio::join!(beginning(out), beginning(err), child.wait());
    group.0 = None;
    let status = status.map_err(HealthError::Run)?;
    if !status.success() {
        return Err(HealthError::Exit { status, stderr: err.lines().next().unwrap_or_default().trim().to_owned() });
    }
    index(&out)
}

/// What a successful command said: a number is the index, any other text (or none) means "fine".
fn index(out: &str) -> Result<HealthIndex, HealthError> {
    let text = out.lines().next().unwrap_or_default().trim();
    match text.parse::<f64>() {
        Ok(_) => HealthIndex::parse(text).ok_or_else(|| HealthError::NoIndex(text.to_owned())),
        Err(_) => Ok(HealthIndex::FULL),
    }
}

/// Reads a stream to its end and keeps the beginning; the rest is read too, or the command would block on it.
async fn beginning(stream: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let (mut kept, mut buffer) = (Vec::new(), [0; 1024]);
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..length.min(OUTPUT_MAX - kept.len())]);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// A process group that is killed on drop, unless its leader has been waited for.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0.and_then(|id| i32::try_from(id).ok()) {
            // SAFETY: a system call without pointers. The leader has not been waited for, so its number is not reused.
            unsafe { libc::kill(-leader, libc::SIGKILL) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::{HealthError, HealthIndex, HealthSource};

    async fn run(command: &str, millis: u64) -> Result<u8, HealthError> {
        HealthSource::Exec(command.into()).evaluate(Duration::from_millis(millis)).await.map(HealthIndex::get)
    }

    #[tokio::test]
    async fn exit_code_and_number() {
        for (command, value) in [
            ("true", 100),
            ("exit 0", 100),
            ("echo OK", 100),
            ("echo 0", 0),
            ("echo 37", 37),
            ("echo 37.6", 38),
            ("echo; echo 5", 100),
        ] {
            assert_eq!(run(command, 10_000).await.expect(command), value, "{command}");
        }
    }

    #[tokio::test]
    async fn failures_are_told_apart() {
        let error = run("echo 90; echo disk full >&2; exit 3", 10_000).await.expect_err("exit code 3");
        assert_eq!(error.to_string(), "the command ended with exit status: 3: disk full");
        assert!(matches!(run("kill -9 $$", 10_000).await, Err(HealthError::Exit { .. })));
        assert!(matches!(run("echo 101", 10_000).await, Err(HealthError::NoIndex(_))));
        assert!(matches!(run("echo nan", 10_000).await, Err(HealthError::NoIndex(_))));
        assert!(matches!(run("/nonexistent/check", 10_000).await, Err(HealthError::Exit { .. })));
    }

    #[tokio::test]
    async fn a_flood_of_output_is_read_and_not_kept() {
        assert_eq!(run("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2", 10_000).await.expect("ends"), 100);
    }

    #[tokio::test]
    async fn the_timeout_kills_the_command_and_its_children() {
        let directory = tempfile::tempdir().expect("a directory");
        let pids = directory.path().join("pids");
        let started = Instant::now();
        let command = format!("sleep 600 & echo $$ $! > {}; wait", pids.display());
        let error = run(&command, 500).await.expect_err("takes too long");
        assert!(matches!(error, HealthError::Timeout(_)), "{error}");
        assert!(started.elapsed() < Duration::from_secs(30));
        let text = std::fs::read_to_string(&pids).expect("the command had started");
        assert_eq!(text.split_whitespace().count(), 2, "{text}");
        for pid in text.split_whitespace() {
            let deadline = Instant::now() + Duration::from_secs(10);
            while is_running(pid) {
                assert!(Instant::now() < deadline, "process {pid} lives on");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// Whether the process exists and is not just waiting to be reaped.
    fn is_running(pid: &str) -> bool {
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
    }
}
