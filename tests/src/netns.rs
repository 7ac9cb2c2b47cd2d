//! A network namespace: run closures, async tasks and programs in it.

use std::{
    ffi::OsStr,
    fs::{self, File},
    future::Future,
    io,
    os::{
        fd::{AsRawFd as _, RawFd},
        unix::process::CommandExt as _,
    },
    path::PathBuf,
    process::Command,
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    runtime::{self, Runtime},
    sync::watch,
};

use crate::cleanup;

/// A handle on a namespace, which is deleted when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Namespace(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    file: File,
}

impl Drop for Inner {
    fn drop(&mut self) {
        cleanup::remove_namespace(&path_of(&self.name));
    }
}

impl Namespace {
    /// Makes a namespace called `BED-ROLE`, where `bed` is a name of [`cleanup::fresh_name`], with `lo` up.
    ///
    /// # Errors
    /// Without root, without `ip`, or if the kernel refuses.
    pub fn create(bed: &str, role: &str) -> Result<Self> {
        let name = format!("{bed}-{role}");
        crate::link::ip(&["netns", "add", &name]).context("network namespaces need root")?;
        let path = path_of(&name);
        let file = File::open(&path).inspect_err(|_| cleanup::remove_namespace(&path));
        let namespace = Self(Arc::new(Inner { name, file: file.context("the new namespace has no file")? }));
        namespace.ip_batch("link set lo up\n")?;
        Ok(namespace)
    }

    /// The name that `ip netns` and `nsenter --net=/run/netns/NAME` know it by.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Runs a closure in the namespace, on a thread of its own. Sockets opened there stay in the namespace wherever
    /// they are used later. A panic of the closure goes on in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                enter(self.0.file.as_raw_fd()).expect("a namespace of ours can be entered");
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs a future in the namespace to its end, on a runtime of its own: everything that it spawns is inside too.
    pub fn block_on<F: Future + Send>(&self, future: F) -> F::Output
    where
        F::Output: Send,
    {
        self.run(|| self.runtime(2).expect("threads for a runtime").block_on(future))
    }

    /// A runtime whose threads are in the namespace. Use `spawn`: what is passed to `block_on` itself runs on the
    /// caller's thread, outside.
    ///
    /// # Errors
    /// If no thread can be had.
    pub fn runtime(&self, threads: usize) -> io::Result<Runtime> {
        let inside = self.clone();
        runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .enable_all()
            .on_thread_start(move || enter(inside.0.file.as_raw_fd()).expect("a namespace of ours can be entered"))
            .build()
    }

    /// Runs a task in the namespace, on a thread of its own, until it ends or the returned guard is dropped.
    ///
    /// # Errors
    /// If no thread can be had.
    pub fn background<F>(&self, task: F) -> io::Result<Background>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let inside = self.clone();
        let (stop, mut stopped) = watch::channel(());
        let thread = thread::Builder::new().name(format!("in {}", self.name())).spawn(move || {
            enter(inside.0.file.as_raw_fd()).expect("a namespace of ours can be entered");
            let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                tokio::select! {
                    () = task => {}
                    // An error: the guard is gone.
                    _ = stopped.changed() => {}
                }
            });
        })?;
        Ok(Background { stop: Some(stop), thread: Some(thread) })
    }

    /// A program to be started in the namespace; /sys stays that of the host, so that BPF pins are seen everywhere.
    /// Start it with [`crate::process::Process::spawn`], or run a short one to its end with `output`.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let inside = self.clone();
        // SAFETY: between fork and exec, `enter` makes one system call and allocates nothing.
        unsafe { command.pre_exec(move || enter(inside.0.file.as_raw_fd())) };
        command
    }

    /// Runs lines of `ip -batch` in the namespace, all in one process.
    ///
    /// # Errors
    /// With `ip`'s own message, which names the line.
    pub fn ip_batch(&self, lines: &str) -> Result<()> {
        crate::link::ip_batch(self.name(), lines)
    }

    /// Sets values below `/proc/sys`, e.g. `("net/ipv4/ip_forward", "1")`.
    ///
    /// # Errors
    /// Names the value that the kernel refused.
    pub fn sysctl(&self, values: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            values.iter().try_for_each(|(key, value)| {
                fs::write(format!("/proc/sys/{key}"), value).with_context(|| format!("cannot set {key} to {value}"))
            })
        })
    }

    /// Does a TCP socket in the namespace listen on this port? Asks the kernel, without connecting.
    pub fn listens(&self, port: u16) -> bool {
        !self.tcp_sockets("0A", |local, _| local == port).is_empty()
    }

    /// How many established TCP connections there are from the namespace to this remote port.
    pub fn connections_to(&self, port: u16) -> usize {
        self.tcp_sockets("01", |_, remote| remote == port).len()
    }

    /// Lines of /proc/net/tcp in a state (hexadecimal) whose (local, remote) ports fit.
    fn tcp_sockets(&self, state: &str, fits: impl Fn(u16, u16) -> bool + Sync) -> Vec<String> {
        let port = |field: &str| field.rsplit(':').next().and_then(|port| u16::from_str_radix(port, 16).ok());
        let lines = self.run(|| {
            ["tcp", "tcp6"]
                .map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default())
        });
        let fits_line = |line: &&str| {
            let mut fields = line.split_whitespace().skip(1);
            let ports = (fields.next().and_then(port), fields.next().and_then(port));
            fields.next() == Some(state) && matches!(ports, (Some(local), Some(remote)) if fits(local, remote))
        };
        lines.iter().flat_map(|table| table.lines().filter(fits_line).map(str::to_owned)).collect()
    }
}

/// A task in a namespace, which ends when this is dropped: its sockets are closed by then.
#[derive(Debug)]
pub struct Background {
    stop: Option<watch::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(_)) = self.thread.take().map(thread::JoinHandle::join)
            && !thread::panicking()
        {
            panic!("a background task of the test bed has panicked; its message stands above");
        }
    }
}

/// Waits until `condition` holds, looking every few milliseconds.
///
/// # Errors
/// Says what did not come true, after `timeout`.
pub fn wait_until(what: &str, timeout: std::time::Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    let end = std::time::Instant::now() + timeout;
    while !condition() {
        if std::time::Instant::now() > end {
            bail!("after {timeout:?} still not so: {what}");
        }
        thread::sleep(std::time::Duration::from_millis(2));
    }
    Ok(())
}

fn enter(namespace: RawFd) -> io::Result<()> {
    // SAFETY: takes two numbers; that it changes the calling thread alone is what every caller here wants.
    match unsafe { libc::setns(namespace, libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn path_of(name: &str) -> PathBuf {
    PathBuf::from(cleanup::NETNS_DIR).join(name)
}
