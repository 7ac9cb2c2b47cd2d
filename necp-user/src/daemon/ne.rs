//! The network element's daemon: `necp ne`.
//!
//! ```text
//!  listener ──► peer (one task per connection) ──┐ inputs, bounded
//!  admin socket ─────────────────────────────────┤
//!                                                ▼
//!  rtnetlink ──────── changes ───────────────► owner ──► cluster ──► plan ──► the maps
//! ```

pub mod commands;
pub mod crossings;
pub mod hosts;
pub mod input;
pub mod keys;
pub mod limits;
pub mod listener;
pub mod load;
pub mod lock;
pub mod owner;
pub mod vips;

use std::collections::{BTreeSet, HashMap};
use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::Stream;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use self::crossings::Crossings;
use self::hosts::Hosts;
use self::input::Input;
use self::keys::{Keys, Reloaded};
use self::limits::Limits;
use self::listener::{Door, Protections};
use self::lock::InstanceLock;
use self::owner::Owner;
use self::vips::Vips;
use super::admin::AdminSocket;
use crate::config::ne::{Mode, NeConfig};
use crate::control::cluster::Cluster;
use crate::control::config::{ClusterConfig, Family, FarmConfig, Forwarding, ServiceKey};
use crate::necp::Forwarding::{Gre, L3};
use crate::necp::Key;
use crate::plane::host_routing::HostRouting;
use crate::plane::neighbours::{Change, Neighbours};
use crate::plane::path_mtu::PathMtus;
use crate::plane::{AttachMode, AttachedMode, Plane, PlaneConfig, PortInfo};

/// How long the network may take to be asked at the end.
const GOODBYE: Duration = Duration::from_secs(3);

/// CPUs for each of which there is a thread that serves sessions.
const CPUS_PER_WORKER: usize = 8;

/// Nice value of all threads, unless they were given another one.
const PRIORITY: libc::c_int = -10;

/// `necp ne`: the network element, a layer-4 load balancer whose servers tell it what they serve.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example configuration:
  interfaces = [\"eth0\"]

  [[farm]]
  name = \"web\"
  vips = [\"192.0.2.10\"]
  services = [\"tcp/80\", \"tcp/443\"]
  forwarding = [\"l2\"]
  servers = [\"10.0.0.0/24\"]
  key_file = \"/etc/necp/web.key\"

Interception: intercept = [\"0.0.0.0/0\", \"::/0\"] (destinations) in place of vips takes the farm's services out of what
this host routes, and to its servers, which are proxies then.

IPv6: vips = [\"192.0.2.10\", \"2001:db8:f::10\"] and servers = [\"10.0.0.0/24\", \"2001:db8:a::/64\"]; who joins over IPv6
serves the IPv6 VIPs, who joins over IPv4 those of IPv4.

How the servers of a farm prove who they are is one of
  key_file = \"FILE\"                   one key for all of them
  keys = { \"10.0.0.11\" = \"FILE\" }   one for each; those that are not named have `key_file`, if there is one
  auth = \"none\"                       not at all: only where nobody else can send from their addresses
A key file belongs to root, is for its owner only (chmod 600), and has at least 16 bytes; make one with
  (umask 077; head -c 32 /dev/urandom | base64 > /etc/necp/web.key)

Examples:
  necp ne --config /etc/necp/ne.toml --check
  necp ne --config /etc/necp/ne.toml

Signals: SIGTERM and SIGINT end the daemon and take the packet path away; SIGQUIT (or --leave) leaves it forwarding for
the next daemon, as a crash does. SIGHUP reads the key files again; sessions that are open go on.
RUST_LOG=debug logs more.

Priority: it runs at nice -10, unless it is started with another value than 0.
Open files: it raises its limit to what 16384 connections need, and says so if it may not.")]
pub struct Args {
    /// The configuration
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Only check the configuration: print one line per farm and exit 0, or its mistakes and exit 1
    #[arg(long)]
    pub check: bool,
    /// At the end, leave the packet path and the VIPs for the next daemon
    #[arg(long)]
    pub leave: bool,
}

/// Runs until a signal ends it.
pub fn run(args: &Args) -> ExitCode {
    let config = match NeConfig::read(&args.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    if args.check {
        return check(args, &config);
    }
    for note in &config.notes {
        tracing::warn!("{}:{note}", args.config.display());
    }
    let keys = match keys::read(&config) {
        Ok(keys) => keys,
        Err(errors) => {
            errors.iter().for_each(|error| eprintln!("{error}"));
            return ExitCode::FAILURE;
        }
    };
    raise_priority();
    match on_threads(config, keys, args.leave) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn on_threads(config: NeConfig, keys: HashMap<PathBuf, Key>, leave: bool) -> anyhow::Result<()> {
    let sessions = runtime().context("starting tokio")?;
    // Who asks for the status has a thread of his own: he is not to wait behind ten thousand sessions, nor they behind him.
    let desk = Builder::new_multi_thread().worker_threads(1).enable_all().build().context("starting tokio")?;
    // And so has the owner, with his clock; what the kernel answers him, and tells of neighbours, comes in at the desk. Sessions
    // that keep their worker busy, as a flood does, would hold up each of these, and so whoever waits for the owner.
    let owner = Builder::new_current_thread().enable_all().build().context("starting tokio")?;
    owner.block_on(serve(config, keys, leave, sessions.handle(), desk.handle()))
}

/// What the sessions run on: one worker, or one for every [`CPUS_PER_WORKER`]. A message is small work: a worker that wakes
/// another one to share it costs more than it takes off.
///
/// # Errors
/// If no thread can be had.
pub fn runtime() -> std::io::Result<Runtime> {
    let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    let workers = (cpus / CPUS_PER_WORKER).max(1);
    Builder::new_multi_thread().worker_threads(workers).enable_all().build()
}

/// A loss must be in the maps at once, also when others want all CPUs. All threads inherit it. Whoever has started us with a
/// priority of his own (`nice`, Nice= in systemd) keeps it.
pub fn raise_priority() {
    // SAFETY: both take and return numbers; -1 is an error or a priority, and neither is 0.
    let raised = unsafe {
        libc::getpriority(libc::PRIO_PROCESS, 0) != 0 || libc::setpriority(libc::PRIO_PROCESS, 0, PRIORITY) == 0
    };
    if !raised {
        tracing::warn!("cannot raise the priority to nice {PRIORITY}: {}", std::io::Error::last_os_error());
    }
}

fn check(args: &Args, config: &NeConfig) -> ExitCode {
    if let Err(error) = Cluster::new(cluster_config(config), Instant::now()) {
        eprintln!("{}: {error}", args.config.display());
        return ExitCode::FAILURE;
    }
    if let Err(error) = Protections::read(config) {
        eprintln!("{}: {error}", args.config.display());
        return ExitCode::FAILURE;
    }
    if let Err(errors) = keys::read(config) {
        errors.iter().for_each(|error| eprintln!("{error}"));
        return ExitCode::FAILURE;
    }
    for note in &config.notes {
        eprintln!("{}:{note}", args.config.display());
    }
    for farm in &config.farms {
        println!("{farm}");
    }
    ExitCode::SUCCESS
}

async fn serve(
    config: NeConfig,
    keys: HashMap<PathBuf, Key>,
    leave: bool,
    sessions: &Handle,
    desk: &Handle,
) -> anyhow::Result<()> {
    if let Err(error) = limits::raise_open_files(listener::MAX_SESSIONS) {
        tracing::warn!("{error}");
    }
    // Before anything is changed: signals, the lock, whatever can be in somebody else's hands.
    let end = End::new(leave)?;
    let hangups = signal(SignalKind::hangup()).context("signals")?;
    let _lock = InstanceLock::acquire(&config.pin)?;
    let admin = {
        let _at_the_desk = desk.enter();
        AdminSocket::bind(&config.socket)
            .with_context(|| format!("cannot listen on the admin socket {}", config.socket.display()))?
    };
    let mut protections = Protections::read(&config)?;
    let listeners = {
        let _among_the_sessions = sessions.enter();
        listen(&config, &protections)?
    };
    let mut config = config;
    config.listen = listeners.iter().map(|listener| listener.local_addr()).collect::<Result<_, _>>()?;
    let config = Arc::new(config);
    let keys = Keys::new(Arc::clone(&config), keys)?;
    let (mut owner, mut inputs, sender, mut changes, door) = start(&config, &keys, desk).await?;

    let mut tasks = JoinSet::new();
    let asked = desk.spawn(admin.serve(commands::answers(sender)));
    for listener in &listeners {
        tasks.spawn_on(Arc::clone(&door).serve(Arc::clone(listener)), sessions);
    }
    tasks.spawn_on(follow_hangups(hangups, move || [keys.reload(), protections.reload(&listeners)]), desk);
    tracing::info!("listening on {}", list(&config.listen));
    let leave = std::sync::atomic::AtomicBool::new(leave);
    let stop = async { leave.store(end.wait().await, std::sync::atomic::Ordering::Relaxed) };
    owner.run(&mut inputs, &mut changes, stop).await;
    asked.abort();
    // That it was aborted; then its socket is gone.
    let _ = asked.await;
    tasks.shutdown().await;
    tracing::info!("all sessions are closed");
    finish(owner, leave.into_inner()).await
}

/// Where the configuration says; if it says nothing, this host need not have both families.
fn listen(config: &NeConfig, protections: &Protections) -> anyhow::Result<Vec<Arc<TcpListener>>> {
    let mut listeners = Vec::new();
    for address in config.listens_on() {
        match listener::bind(address, protections) {
            Ok(listener) => listeners.push(Arc::new(listener)),
            Err(error) if config.listen.is_empty() && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                tracing::info!("this host cannot listen on {address}: no server can join there");
            }
            Err(error) => return Err(error).with_context(|| format!("cannot listen on {address}")),
        }
    }
    Ok(listeners)
}

type Started<C> = (Owner, mpsc::Receiver<Input>, mpsc::Sender<Input>, C, Arc<Door>);

/// The packet path, and the owner of it.
async fn start(
    config: &Arc<NeConfig>,
    keys: &Arc<Keys>,
    desk: &Handle,
) -> anyhow::Result<Started<impl Stream<Item = Change> + Unpin + use<>>> {
    let now = Instant::now();
    // Before the packet path: what is wrong here leaves nothing attached.
    let mut cluster = Cluster::new(cluster_config(config), now)?;
    let plane = Plane::open(&plane_config(config))?;
    for port in plane.ports() {
        tracing::info!(interface = port.name, "the packet path is on {} in {} mode", port.name, port.mode);
    }
    if plane.reused() {
        let adopted = cluster.adopt(&plane.view(), now)?;
        tracing::info!(
            "took over the maps in {}: {} services ({} anew), {} servers serve on, {} drain, {} are given up",
            config.pin.display(),
            adopted.services,
            adopted.services_new,
            adopted.serving,
            adopted.draining,
            adopted.given_up
        );
    }
    let routing = prepare_routing(config);
    // While the owner writes a plan, somebody must take what the kernel tells, or its buffer runs over.
    let (neighbours, changes, driver) = {
        let _at_the_desk = desk.enter();
        Neighbours::open()?
    };
    desk.spawn(driver);
    let ports = plane.ports();
    tell_of_veths(&neighbours, &ports).await;
    let hosts = Hosts::new(neighbours, ports.iter().cloned());
    let vips = if config.manage_vips {
        let all = config.farms.iter().flat_map(|farm| farm.vips.iter().copied());
        let distinct: BTreeSet<_> = all.collect();
        Some(Vips::put(distinct.into_iter().collect(), &ports).await?)
    } else {
        None
    };
    let (sender, inputs) = mpsc::channel(input::CAPACITY);
    let limits = Arc::new(Limits::default());
    for family in Family::ALL.into_iter().filter(|family| config.routes(*family, &[Gre])) {
        follow_path_mtus(family, sender.clone());
    }
    let door = Door::new(Arc::clone(config), sender.clone(), Arc::clone(&limits), Arc::clone(keys));
    let mut owner = Owner::new(Arc::clone(config), plane, cluster, hosts, vips, Arc::clone(&door), limits);
    owner.routing = routing;
    owner.crossings = Crossings::new(config)?;
    owner.begin().await;
    Ok((owner, inputs, sender, changes, door))
}

/// What one would look for long: in native mode a veth takes frames of XDP only where the other end is ready for them.
async fn tell_of_veths(neighbours: &Neighbours, ports: &[PortInfo]) {
    for port in ports.iter().filter(|port| port.mode == AttachedMode::Native) {
        if neighbours.is_veth(port.ifindex).await.unwrap_or(false) {
            tracing::info!(
                interface = port.name,
                "{} is a veth: its other end needs an XDP program too, else what is sent back by it is delayed or lost (or set mode = \"generic\")",
                port.name
            );
        }
    }
}

async fn finish(owner: Owner, leave: bool) -> anyhow::Result<()> {
    let Owner { plane, vips, routing, .. } = owner;
    if leave {
        tracing::info!("the packet path and the VIPs stay, pinned in {}, for the next daemon", plane.pin().display());
        return Ok(plane.close(true)?);
    }
    if let Some(vips) = vips
        && tokio::time::timeout(GOODBYE, vips.withdraw()).await.is_err()
    {
        tracing::warn!("not all VIPs could be withdrawn: see `ip addr`");
    }
    let pin = plane.pin().to_path_buf();
    plane.close(false)?;
    routing.undo();
    tracing::info!("the packet path is detached and its pins in {} are removed", pin.display());
    Ok(())
}

/// The signals that end the daemon.
struct End {
    leave: bool,
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
}

impl End {
    fn new(leave: bool) -> anyhow::Result<Self> {
        let on = |kind| signal(kind).context("signals");
        let (terminate, interrupt) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
        Ok(Self { leave, terminate, interrupt, quit: on(SignalKind::quit())? })
    }

    /// Waits for one, and says whether the packet path stays.
    async fn wait(mut self) -> bool {
        tokio::select! {
            _ = self.terminate.recv() => self.leave,
            _ = self.interrupt.recv() => self.leave,
            _ = self.quit.recv() => true,
        }
    }
}

/// SIGHUP: the key files have changed.
async fn follow_hangups(mut hangups: Signal, mut reload: impl FnMut() -> [Reloaded; 2] + Send) {
    while hangups.recv().await.is_some() {
        let reloaded = reload();
        for error in reloaded.iter().flat_map(|one| &one.failed) {
            tracing::error!("SIGHUP: {error}; the key that was read before stays");
        }
        let changed: BTreeSet<_> = reloaded.iter().flat_map(|one| &one.changed).collect();
        let changed: Vec<_> = changed.iter().map(|path| path.display().to_string()).collect();
        tracing::info!(
            "SIGHUP: key files read again, {}",
            if changed.is_empty() {
                "no key has changed".into()
            } else {
                format!("new keys in {}", changed.join(", "))
            }
        );
    }
}

/// Makes the kernel route what the packet path leaves to it.
fn prepare_routing(config: &NeConfig) -> HostRouting {
    if config.serves(Family::V6) {
        let routes = config.routes(Family::V6, &[Gre, L3]) || config.intercepts(Family::V6);
        let missing = HostRouting::missing6(&config.interfaces, routes);
        missing.iter().for_each(|problem| tracing::warn!("{problem}"));
    }
    if !config.routes(Family::V4, &[Gre, L3]) {
        let missing = if config.intercepts(Family::V4) { HostRouting::missing(&config.interfaces) } else { Vec::new() };
        missing.iter().for_each(|problem| tracing::warn!("{problem}"));
        return HostRouting::default();
    }
    let (routing, problems) = HostRouting::prepare(&config.interfaces);
    problems.iter().for_each(|problem| tracing::warn!("{problem}"));
    routing
}

/// Listens for ICMP errors about paths that take shorter packets.
fn follow_path_mtus(family: Family, owner: mpsc::Sender<Input>) {
    // SAFETY: its descriptor is the same, and open, for as long as it lives.
    let register = |mtus| unsafe { AsyncFd::register_with_interest(mtus, Interest::ERROR) };
    let watched = PathMtus::open(family == Family::V6).and_then(|mtus| Ok(register(mtus)?));
    let mtus = match watched {
        Ok(mtus) => mtus,
        Err(error) => {
            tracing::warn!(%error, "path MTUs of {} tunnels are not followed: what is too long for one is lost on the way", family.name());
            return;
        }
    };
    tokio::spawn(async move {
        while let Ok(mut ready) = mtus.ready(Interest::ERROR).await {
            let servers = mtus.get_ref().take();
            if servers.is_empty() {
                ready.clear_ready();
            } else if owner.send(Input::PathMtu { servers }).await.is_err() {
                return;
            }
        }
    });
}

/// What the packet path needs to know.
pub(super) fn plane_config(config: &NeConfig) -> PlaneConfig {
    PlaneConfig {
        pin: config.pin.clone(),
        interfaces: config.interfaces.clone(),
        mode: match config.mode {
            Mode::Native => AttachMode::Native,
            Mode::Generic => AttachMode::Generic,
            Mode::Auto => AttachMode::Auto,
        },
        slots: config.slots(),
        flow_buckets: necp_ebpf::abi::DEFAULT_FLOW_BUCKETS,
        exceptions: necp_ebpf::abi::exception_records(necp_ebpf::abi::DEFAULT_EXCEPTIONS),
        replies: config.allows(L3),
        intercepts: config.intercepts(Family::V4),
        intercepts6: config.intercepts(Family::V6),
    }
}

/// What the cluster needs to know.
pub(super) fn cluster_config(config: &NeConfig) -> ClusterConfig {
    let farm = |farm: &crate::config::ne::FarmConfig| FarmConfig {
        name: farm.name.clone(),
        vips: farm.vips.clone(),
        intercept: farm.intercept.clone(),
        services: farm.services.iter().map(|key| ServiceKey::new(key.protocol(), key.port())).collect(),
        forwarding: farm.forwarding.iter().filter_map(|one| Forwarding::from_wire(one.code().into())).collect(),
        servers: farm.servers.clone(),
        table_size: farm.table_size,
        orphan_time: farm.orphan_time,
        tcp_idle: farm.tcp_idle,
        udp_idle: farm.udp_idle,
        udp_tracking: farm.udp_tracking,
        echo: farm.echo,
        hash_seed: farm.hash_seed,
        capacity: farm.capacity.iter().map(|(server, one)| (*server, (one * 1000.0).round() as u32)).collect(),
        global_exceptions: farm.global_exceptions,
        max_exceptions: farm.max_exceptions,
    };
    ClusterConfig {
        farms: config.farms.iter().map(farm).collect(),
        keepalive: config.keepalive,
        grace: config.grace,
        slots: config.slots().max(necp_ebpf::abi::DEFAULT_SLOTS),
        max_exceptions: config.max_exceptions,
        ..ClusterConfig::default()
    }
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}
