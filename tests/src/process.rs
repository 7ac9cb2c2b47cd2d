//! Child processes that never outlive us, and whose output is shown when a test fails.

use std::{
    fs::{self, File},
    io,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::netns::wait_until;

/// A child process. Dropping it kills it and prints the end of its output: see [`hide_output`].
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    /// Where in the log this run begins, in bytes.
    start: usize,
}

impl Process {
    /// Starts a program with its output in `DIR/NAME.log`, after what an earlier run of that name has left there.
    ///
    /// # Errors
    /// If the program does not start.
    pub fn spawn(mut command: Command, name: &str, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log).context("cannot make the log")?;
        let start = usize::try_from(output.metadata()?.len())?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        die_with_us(&mut command);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = spawn_from_lasting_thread(command).with_context(|| format!("cannot start `{program}`"))?;
        Ok(Self { name: name.to_owned(), child, log, start })
    }

    /// The name given at the start.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If the process has ended.
    pub fn signal(&mut self, signal: i32) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} has ended already ({status})", self.name);
        }
        let pid = i32::try_from(self.child.id())?;
        // SAFETY: takes two numbers; the process is not yet waited for, so its id is still its own.
        match unsafe { libc::kill(pid, signal) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()).with_context(|| format!("cannot signal {}", self.name)),
        }
    }

    /// SIGKILL, and waits until the process is gone. None the worse if it is gone already.
    pub fn kill(&mut self) {
        // Both fail only for a process that has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Errors
    /// If the process has ended before, or goes on after `timeout`.
    pub fn terminate(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.signal(libc::SIGTERM)?;
        self.wait(timeout)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// If the process goes on after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!("{} goes on after {timeout:?}:\n{}", self.name, self.log_tail());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// How the process ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Everything that it has written so far, standard output and error together.
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(self.start..).unwrap_or_default()).into_owned()
    }

    /// Waits until `condition` holds.
    ///
    /// # Errors
    /// With the output, if the process ends first or `timeout` passes.
    pub fn wait_until(&mut self, what: &str, timeout: Duration, condition: impl Fn(&Self) -> bool) -> Result<()> {
        let mut ended = None;
        let waited = wait_until(what, timeout, || {
            ended = self.ended();
            ended.is_some() || condition(self)
        });
        match ended {
            Some(status) => {
                let signal = status.signal().map(|signal| format!(" by signal {signal}")).unwrap_or_default();
                bail!("{} ended ({status}{signal}) before {what}:\n{}", self.name, self.log_tail())
            }
            None => waited.with_context(|| format!("{}'s output:\n{}", self.name, self.log_tail())),
        }
    }

    /// Waits until the output holds `text`.
    ///
    /// # Errors
    /// As [`Process::wait_until`].
    pub fn wait_for_log(&mut self, text: &str, timeout: Duration) -> Result<()> {
        self.wait_until(&format!("the log says `{text}`"), timeout, |process| process.log().contains(text))
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        let tail = self.log_tail();
        if !tail.is_empty() && (thread::panicking() || SHOWN.load(Ordering::Relaxed)) {
            eprintln!("--- output of {} ---\n{tail}", self.name);
        }
    }
}

static SHOWN: AtomicBool = AtomicBool::new(true);

/// From now on the output of processes is shown only while a panic unwinds. For programs that are no tests: the test
/// harness keeps what a test prints to itself unless the test fails, be it by a panic or by an `Err`.
pub fn hide_output() {
    SHOWN.store(false, Ordering::Relaxed);
}

/// Has the kernel kill the program when we die, however we die.
fn die_with_us(command: &mut Command) {
    let parent = std::process::id();
    let arm = move || {
        // SAFETY: plain numbers. If we died before the call took effect, the program has another parent by now.
        let orphan = unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 || libc::getppid().cast_unsigned() != parent
        };
        if orphan { Err(io::Error::from_raw_os_error(libc::ESRCH)) } else { Ok(()) }
    };
    // SAFETY: between fork and exec, `arm` makes two system calls and allocates nothing.
    unsafe { command.pre_exec(arm) };
}

type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// "Parent death" means the death of the *thread* that forked. So one thread, which lives as long as the process,
/// forks for all.
fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    static SPAWNER: Mutex<Option<mpsc::Sender<Order>>> = Mutex::new(None);
    let gone = || io::Error::other("the thread that starts processes is gone");
    let orders = {
        let mut spawner = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner);
        spawner.get_or_insert_with(start_spawner).clone()
    };
    let (reply, answer) = mpsc::channel();
    orders.send((command, reply)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

fn start_spawner() -> mpsc::Sender<Order> {
    let (orders, received) = mpsc::channel::<Order>();
    thread::spawn(move || {
        for (mut command, reply) in received {
            // Nobody listens if the caller was torn down meanwhile; the child is then killed with us.
            let _ = reply.send(command.spawn());
        }
    });
    orders
}
