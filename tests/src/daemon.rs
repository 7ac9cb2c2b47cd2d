//! Our own daemons in namespaces: `necp ne` and `necp se`.

use std::{env, fs, path::PathBuf, process::Output, time::Duration};

use anyhow::{Context as _, Result, ensure};

use crate::{netns::Namespace, process::Process, topology::Topology};

/// The port that an NE listens on (draft §5.1).
pub const NECP_PORT: u16 = 3262;

/// An emulated machine takes a minute to verify the packet path. Only a failing test waits that long.
const STARTUP: Duration = Duration::from_secs(180);

/// The `necp` binary: `$NECP_BIN`, or that of the target directory which this program was built into.
///
/// # Errors
/// Says how to build it.
pub fn necp_binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("NECP_BIN").map(PathBuf::from) {
        ensure!(path.exists(), "NECP_BIN names {}, which does not exist", path.display());
        return Ok(path);
    }
    // target/debug/deps/bed-… for a test, target/release/necp-demo for a binary.
    let own = env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join("necp")).find(|path| path.is_file());
    found.context("there is no `necp` binary: `cargo build -p necp-user --bin necp`, or use `cargo xtask test`")
}

/// A running `necp ne`. Dropping it kills it with SIGKILL.
#[derive(Debug)]
pub struct NetworkElement {
    process: Process,
    ns: Namespace,
    socket: PathBuf,
}

impl NetworkElement {
    /// Starts it in the bed's NE namespace and waits until it listens for SEs. `config` is TOML; `pin`, `socket` and
    /// `interfaces` are added unless it has them.
    ///
    /// # Errors
    /// With its output, if it does not come up.
    pub fn start(topology: &Topology, config: &str) -> Result<Self> {
        Self::start_in(topology, topology.ne(), "ne", config)
    }

    /// As [`NetworkElement::start`], in any namespace of the bed; `name` keeps files and pins of several apart.
    ///
    /// # Errors
    /// As there.
    pub fn start_in(topology: &Topology, ns: &Namespace, name: &str, config: &str) -> Result<Self> {
        let socket = topology.dir().join(format!("{name}.sock"));
        let file = topology.dir().join(format!("{name}.toml"));
        let defaults = [
            ("interfaces", format!("{:?}", topology.ne_interfaces())),
            ("pin", format!("{:?}", topology.pins().join(name))),
            ("socket", format!("{socket:?}")),
        ];
        let given =
            |key: &str| config.lines().any(|line| line.split('=').next().is_some_and(|word| word.trim() == key));
        let added = defaults.iter().filter(|(key, _)| !given(key)).map(|(key, value)| format!("{key} = {value}\n"));
        fs::write(&file, added.collect::<String>() + config)?;
        // Parents only: the pin directory itself is the daemon's to make.
        fs::create_dir_all(topology.pins()).context("no BPF file system? `cargo xtask setup` mounts it")?;
        let mut command = ns.command(necp_binary()?);
        command.args(["ne", "--config"]).arg(&file);
        let mut process = Process::spawn(command, name, topology.dir())?;
        // It has the port before it has the packet path, and may fail at that.
        process.wait_for_log("listening on", STARTUP)?;
        process.wait_until("it listens for servers", STARTUP, |_| ns.listens(NECP_PORT))?;
        Ok(Self { process, ns: ns.clone(), socket })
    }

    /// The process, for signals and its log.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its administration socket, as far as the configuration has named none.
    pub fn socket(&self) -> &std::path::Path {
        &self.socket
    }

    /// What `necp status --json` prints.
    ///
    /// # Errors
    /// With the command's message.
    pub fn status(&self) -> Result<serde_json::Value> {
        let mut command = self.ns.command(necp_binary()?);
        let output = command.args(["status", "--json", "--socket"]).arg(&self.socket).output()?;
        let message = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`necp status --json` failed ({}): {}", output.status, message.trim());
        serde_json::from_slice(&output.stdout).context("`necp status --json` prints no JSON")
    }
}

/// A running `necp se`. Dropping it kills it with SIGKILL.
#[derive(Debug)]
pub struct ServerElement {
    process: Process,
    ns: Namespace,
    socket: PathBuf,
}

impl ServerElement {
    /// Starts an agent in a namespace, with `--lock` in the bed's directory and these arguments besides, e.g.
    /// `["--ne", "10.0.0.1", "--serve", "tcp/80=l2"]`, and waits until it has a connection to an NE.
    ///
    /// # Errors
    /// With its output, if it ends or finds no NE.
    pub fn start(topology: &Topology, ns: &Namespace, name: &str, args: &[&str]) -> Result<Self> {
        let mut agent = Self::start_unconnected(topology, ns, name, args)?;
        agent.process.wait_until("it is connected", STARTUP, |_| ns.connections_to(NECP_PORT) > 0)?;
        Ok(agent)
    }

    /// As [`ServerElement::start`], without waiting: the NE may come later, or refuse.
    ///
    /// # Errors
    /// If it does not start at all.
    pub fn start_unconnected(topology: &Topology, ns: &Namespace, name: &str, args: &[&str]) -> Result<Self> {
        let lock = topology.dir().join(format!("{name}.lock"));
        let mut command = ns.command(necp_binary()?);
        command.arg("se").args(args);
        if !args.contains(&"--lock") {
            command.arg("--lock").arg(lock);
        }
        let process = Process::spawn(command, &format!("se-{name}"), topology.dir())?;
        Ok(Self { process, ns: ns.clone(), socket: topology.dir().join(format!("{name}.sock")) })
    }

    /// Runs a command of the `necp` binary that speaks to this agent, such as `["drain", "--wait", "5"]`. The agent's
    /// socket is added: it is beside the lock that [`ServerElement::start`] chooses.
    ///
    /// # Errors
    /// If it does not start; that it fails is not an error.
    pub fn command(&self, args: &[&str]) -> Result<Output> {
        let mut command = self.ns.command(necp_binary()?);
        command.args(args).arg("--socket").arg(&self.socket).output().context("the command does not start")
    }

    /// The process, for signals and its log.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
