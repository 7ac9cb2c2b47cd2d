//! Health from what the system says: load average, pressure stall information, a number in a file.

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::Semaphore;

use super::{HealthError, HealthIndex};

/// Of a file, only the beginning is read.
const FILE_MAX: u64 = 4096;

/// The load average of the last minute per CPU as an index, see [`of_load`].
pub(super) async fn load(turn: &Arc<Semaphore>) -> Result<HealthIndex, HealthError> {
    let text = beginning(Path::new("/proc/loadavg"), turn).await?;
    let load = text.split(' ').next().and_then(|first| first.parse().ok());
    let load: f64 = load.ok_or_else(|| HealthError::NoIndex(text.trim().to_owned()))?;
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Ok(of_load(load / cpus as f64))
}

/// The share of tasks that waited for a CPU in the last 10 s (`some avg10`) as an index: 100 less its percentage.
pub(super) async fn pressure(turn: &Arc<Semaphore>) -> Result<HealthIndex, HealthError> {
    let text = beginning(Path::new("/proc/pressure/cpu"), turn).await?;
    waiting(&text)
        .map(|percent| HealthIndex::of_measure(100.0 - percent))
        .ok_or_else(|| HealthError::NoIndex(text.trim().to_owned()))
}

/// A number from 0 to 100, the first word of a file.
pub(super) async fn file(path: &Path, turn: &Arc<Semaphore>) -> Result<HealthIndex, HealthError> {
    let text = beginning(path, turn).await?;
    let word = text.split_whitespace().next().unwrap_or_default();
    HealthIndex::parse(word).ok_or_else(|| HealthError::NoIndex(word.chars().take(40).collect()))
}

/// 100 when idle, 50 when every CPU is just busy (load 1 each), then in inverse proportion: 25 at load 2, 5 at load 10.
/// Never 0, or a farm that is overloaded as a whole would lose all its servers at once.
fn of_load(per_cpu: f64) -> HealthIndex {
    HealthIndex::of_measure(if per_cpu <= 1.0 { 100.0 - 50.0 * per_cpu } else { 50.0 / per_cpu })
}

/// `some avg10=` of `/proc/pressure/cpu`, in percent.
fn waiting(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let percent: f64 = some.split(' ').find_map(|word| word.strip_prefix("avg10="))?.parse().ok()?;
    percent.is_finite().then_some(percent)
}

/// Reads the beginning of a file, once `turn` has room for it: a thread that hangs in the kernel, as on a mount whose server
/// is gone, keeps its place there, and no second one joins it.
async fn beginning(path: &Path, turn: &Arc<Semaphore>) -> Result<String, HealthError> {
    let failed = |source| HealthError::Read { path: path.display().to_string(), source };
    let place = Arc::clone(turn).acquire_owned().await;
    let owned = path.to_owned();
    let reading = tokio::task::spawn_blocking(move || {
        let read = read(&owned);
        drop(place);
        read
    });
    let bytes = reading.await.map_err(io::Error::from).flatten().map_err(failed)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    // A FIFO without a writer would hold us up for ever.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::HealthSource;
    use super::*;

    #[test]
    fn load_falls_and_never_reaches_zero() {
        for (load, index) in [(0.0, 100), (0.5, 75), (1.0, 50), (2.0, 25), (10.0, 5), (1e9, 1)] {
            assert_eq!(of_load(load).get(), index, "load {load}");
        }
    }

    #[test]
    fn pressure_is_read_from_the_right_line() {
        let text = "some avg10=12.50 avg60=1.00 avg300=3.35 total=58970926\nfull avg10=0.00 avg60=0.00 total=0\n";
        assert_eq!(waiting(text), Some(12.5));
        for text in ["", "full avg10=1.0", "some avg60=1.0", "some avg10=x", "some avg10=inf"] {
            assert_eq!(waiting(text), None, "{text:?}");
        }
    }

    #[tokio::test]
    async fn this_host_has_a_load_and_a_pressure() {
        let load = HealthSource::Load.evaluate(Duration::from_secs(10)).await.expect("/proc/loadavg");
        assert!((1..=100).contains(&load.get()));
        let pressure = HealthSource::Psi.evaluate(Duration::from_secs(10)).await;
        let pressure = pressure.expect("this test needs a kernel with pressure stall information (CONFIG_PSI, psi=1)");
        assert!((1..=100).contains(&pressure.get()));
    }

    #[tokio::test]
    async fn what_is_no_file_is_refused_at_once() {
        let directory = tempfile::tempdir().expect("a directory");
        let pipe = directory.path().join("pipe");
        let path = std::ffi::CString::new(pipe.as_os_str().as_encoded_bytes()).expect("no NUL");
        // SAFETY: `path` is a NUL-terminated string that outlives the call.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
        for path in [&pipe, directory.path(), Path::new("/dev/zero")] {
            let error = HealthSource::File(path.into()).evaluate(Duration::from_secs(10)).await.expect_err("no file");
            assert!(error.to_string().ends_with(": it is no regular file"), "{error}");
        }
    }

    #[tokio::test]
    async fn beside_a_reader_that_hangs_there_is_no_second_one() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("health");
        std::fs::write(&path, "40").expect("written");
        let (source, turn) = (HealthSource::File(path), Arc::new(Semaphore::new(1)));
        let hangs = turn.acquire().await.expect("it is open");
        let error = source.evaluate_in(&turn, Duration::from_millis(100)).await.expect_err("no turn");
        assert!(matches!(error, HealthError::Timeout(_)), "{error}");
        drop(hangs);
        assert_eq!(source.evaluate_in(&turn, Duration::from_secs(10)).await.expect("a number").get(), 40);
    }

    #[tokio::test]
    async fn a_number_in_a_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("health");
        let read = async || HealthSource::File(path.clone()).evaluate(Duration::from_secs(10)).await;
        assert!(matches!(read().await, Err(HealthError::Read { .. })));
        for (text, index) in [("40\n", Some(40)), (" 0", Some(0)), ("", None), ("x", None), ("101", None)] {
            std::fs::write(&path, text).expect("written");
            match (read().await, index) {
                (Ok(value), Some(index)) => assert_eq!(value.get(), index, "{text:?}"),
                (Err(HealthError::NoIndex(_)), None) => {}
                (outcome, _) => panic!("{text:?}: {outcome:?}"),
            }
        }
    }
}
