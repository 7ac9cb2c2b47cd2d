//! Nothing stays behind. Whatever the bed makes outside of its process bears a name of [`fresh_name`], which holds the
//! process id: namespaces, pin directories, working directories. They go
//! - when their owner is dropped, also while a panic unwinds;
//! - on SIGINT, SIGTERM and SIGHUP, in a thread of its own, before the process dies of the signal;
//! - at the start of the next process that uses the bed, if their process is no more (SIGKILL, abort).
//!
//! Child processes die with us by `PR_SET_PDEATHSIG`: see [`crate::process`].

use std::{
    ffi::CString,
    fs, io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process,
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use tokio::signal::unix::{SignalKind, signal};

const PREFIX: &str = "necpt-";
/// Where `ip netns` keeps the names of namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";
const BPF_DIR: &str = "/sys/fs/bpf";

/// Runs on a signal, before the namespaces go.
type Hook = Box<dyn FnOnce() + Send>;

static HOOKS: Mutex<Vec<Hook>> = Mutex::new(Vec::new());

/// A name that no other bed has, in this process or another: `necpt-PID-N`. The first call sweeps what dead processes
/// have left and starts to watch for signals.
pub fn fresh_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    static START: Once = Once::new();
    START.call_once(|| {
        sweep(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        watch_signals();
    });
    format!("{PREFIX}{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Has `hook` run when a signal ends the process, before the namespaces go; for instance to restore the terminal.
pub fn at_signal(hook: impl FnOnce() + Send + 'static) {
    HOOKS.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(hook));
}

/// Names of the namespaces that this process has at the moment.
pub fn own_namespaces() -> Vec<String> {
    let own = |path: &PathBuf| owner(path) == Some(process::id());
    let name = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    entries(NETNS_DIR).into_iter().filter(own).filter_map(name).collect()
}

/// A directory for one bed's files, removed when dropped.
#[derive(Debug)]
pub struct WorkDir {
    path: PathBuf,
    pins: PathBuf,
}

impl WorkDir {
    /// Makes the directory for a name of [`fresh_name`].
    ///
    /// # Errors
    /// What `mkdir` says.
    pub fn new(name: &str) -> io::Result<Self> {
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path)?;
        Ok(Self { path, pins: Path::new(BPF_DIR).join(name) })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory of the BPF file system that is this bed's alone; whoever pins there makes it.
    pub fn pins(&self) -> &Path {
        &self.pins
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        remove_tree(&self.path);
        remove_tree(&self.pins);
        // What agents that were killed have left: their pins are called after their locks, which were in our directory.
        let readable = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let ours: String = format!("{}/", self.path.display()).chars().map(readable).collect();
        for pin in fs::read_dir(BPF_DIR).into_iter().flatten().flatten() {
            if pin.file_name().to_string_lossy().strip_prefix("necp-se").is_some_and(|name| name.starts_with(&ours)) {
                remove_tree(&pin.path());
            }
        }
    }
}

/// Takes a namespace's name away; the namespace goes with its last process and socket.
pub(crate) fn remove_namespace(path: &Path) {
    if let Ok(name) = CString::new(path.as_os_str().as_bytes()) {
        // SAFETY: `name` is a string that ends in NUL, and lives.
        unsafe { libc::umount2(name.as_ptr(), libc::MNT_DETACH) };
    }
    // The error that it is gone already is none; another leaves the name to the next sweep.
    let _ = fs::remove_file(path);
}

fn remove_tree(path: &Path) {
    // As above: what is gone is gone, and the rest is the next sweep's.
    let _ = fs::remove_dir_all(path);
}

fn sweep(goes: impl Fn(u32) -> bool) {
    let ours = |path: &PathBuf| owner(path).is_some_and(&goes);
    entries(NETNS_DIR).into_iter().filter(ours).for_each(|path| remove_namespace(&path));
    for dir in [std::env::temp_dir(), BPF_DIR.into()] {
        entries(dir).into_iter().filter(ours).for_each(|path| remove_tree(&path));
    }
}

/// The process that a name of ours belongs to.
fn owner(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

fn entries(dir: impl AsRef<Path>) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

fn watch_signals() {
    thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let received = runtime.and_then(|runtime| runtime.block_on(first_signal()));
        let Ok(number) = received else { return };
        for hook in HOOKS.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            hook();
        }
        sweep(|pid| pid == process::id());
        // SAFETY: both calls take plain numbers; the process is meant to end here, as the signal wants it.
        unsafe {
            libc::signal(number, libc::SIG_DFL);
            libc::raise(number);
        }
        process::exit(128 + number);
    });
}

async fn first_signal() -> io::Result<i32> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(tokio::select! {
        _ = interrupt.recv() => libc::SIGINT,
        _ = terminate.recv() => libc::SIGTERM,
        _ = hangup.recv() => libc::SIGHUP,
    })
}
