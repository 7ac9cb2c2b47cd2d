//! Where we are: the workspace, cargo, the search path, and the rights that we have.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// This machine as the tasks see it.
pub struct Host {
    /// The workspace's directory.
    pub root: PathBuf,
    /// Cargo's output directory.
    pub target: PathBuf,
    cargo: OsString,
    path: OsString,
}

impl Host {
    /// Looks at the environment that `cargo xtask` was started in.
    pub fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in no workspace")?.to_owned();
        // target/debug/xtask: cargo's own idea of the target directory, however it was configured.
        let target = env::current_exe()?.ancestors().nth(2).map_or_else(|| root.join("target"), Path::to_owned);
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        Ok(Self { root, target, cargo, path: search_path()? })
    }

    /// `cargo` in the workspace.
    pub fn cargo<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.command(&self.cargo);
        command.args(args);
        command
    }

    /// Any program, started in the workspace with our search path and without standard input.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root).env("PATH", &self.path).stdin(Stdio::null());
        command
    }

    /// The file that `program` would be started from.
    pub fn which(&self, program: &str) -> Option<PathBuf> {
        env::split_paths(&self.path).map(|dir| dir.join(program)).find(|file| {
            fs::metadata(file).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
        })
    }

    /// A binary of the workspace, built in the named profile's directory (`debug` or `release`).
    pub fn binary(&self, profile: &str, name: &str) -> PathBuf {
        self.target.join(profile).join(name)
    }

    /// Fails, with what to do, unless we are root.
    pub fn require_root(&self, what: &str) -> Result<()> {
        ensure!(
            is_root(),
            "{what} needs root (network namespaces, BPF): run it in a root shell that has cargo on its PATH, \
             e.g. `sudo -E env \"PATH=$PATH\" cargo xtask …`"
        );
        Ok(())
    }
}

/// Are we root?
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Says what is about to happen.
pub fn say(what: impl std::fmt::Display) {
    eprintln!("xtask: {what}");
}

/// Runs a command to its end; `advice` says what to do when it fails.
pub fn execute(command: &mut Command, advice: &str) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("`{program}` did not start; {advice}"))?;
    if !status.success() {
        let args: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
        bail!("`{program} {}` failed ({status}); {advice}", args.join(" "));
    }
    Ok(())
}

/// Runs a command to its end, and hands each line of its standard output on as it comes.
pub fn lines(command: &mut Command, mut take: impl FnMut(&str)) -> Result<ExitStatus> {
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command.stdout(Stdio::piped()).spawn();
    let mut child = child.with_context(|| format!("`{program}` did not start"))?;
    let output = child.stdout.take().with_context(|| format!("`{program}` has no output"))?;
    for line in BufReader::new(output).split(b'\n') {
        take(String::from_utf8_lossy(&line?).trim_end_matches('\r'));
    }
    Ok(child.wait()?)
}

/// The search path with the directories that a fresh shell may lack: cargo's own, where `cargo install` puts things,
/// and those of the administrator's tools.
fn search_path() -> Result<OsString> {
    let home = env::var_os("HOME").map(PathBuf::from);
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| home.map(|home| home.join(".cargo")));
    let given: Vec<_> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    let first = cargo_home.map(|home| home.join("bin")).into_iter();
    let last = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let last = last.into_iter().filter(|dir| !given.contains(dir));
    Ok(env::join_paths(first.chain(given.iter().cloned()).chain(last))?)
}
