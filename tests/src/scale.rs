//! Many sessions in one network element: what they cost, and how soon they are back after a restart.

use std::{
    fmt, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use necp_user::{
    daemon::{ne::limits::raise_open_files, status::fetch},
    necp::{
        Forwarding, Key, ServiceKey, ServiceUnit,
        auth::CREDENTIAL_LEN,
        wire::{HEADER_LEN, UNIT_LEN},
    },
};
use serde_json::Value;

use crate::{
    daemon::NetworkElement,
    floor::Floor,
    line::servers,
    swarm::{Members, Swarm},
    topology::{Topology, VIP},
};

/// The key of all sessions, if they have one.
const KEY: &str = "of all ten thousand";

/// What to measure.
#[derive(Clone, Debug)]
pub struct Scale {
    /// Sessions, each of a server of its own; at most [`CLIENT_ADDRESSES`](crate::topology::CLIENT_ADDRESSES).
    pub sessions: usize,
    /// Services that each of them starts.
    pub services: u16,
    /// How long the daemon's CPU time is measured.
    pub watch: Duration,
    /// Time between two keepalives, both ways.
    pub keepalive: Duration,
    /// Whether all of them prove themselves with a key.
    pub keys: bool,
    /// The program of [`Floor::measure`], if the floor is to be measured too.
    pub floor: Option<PathBuf>,
}

/// What was measured.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// From the first connection to the last START_ACK, the daemon having been idle.
    pub joined: Duration,
    /// Share of one CPU that the daemon takes with no session.
    pub idle_cpu: f64,
    /// The same, with all of them, once all have their full weight.
    pub cpu: f64,
    /// Share of one CPU that as many plain TCP sessions with the same messages take, if that was measured.
    pub floor: Option<f64>,
    /// Growth of the daemon's resident memory, divided by the sessions; bytes.
    pub memory: u64,
    /// Resident memory of the daemon at the end of the measurement; bytes.
    pub resident: u64,
    /// From the restart of a daemon that was killed to the last START_ACK.
    pub returned: Duration,
    /// Sessions that ended while they should not have.
    pub lost: u64,
    /// The longest that `necp status` took while all of them joined, and while they came back.
    pub status: Duration,
}

impl Scale {
    /// Measures.
    ///
    /// # Errors
    /// If a session is refused, or anything takes far too long; if shares or weights are wrong.
    pub fn run(&self) -> Result<Figures> {
        raise_open_files(self.sessions)?;
        let _room = NeighbourRoom::for_hosts(self.sessions)?;
        let bed = Topology::builder().servers(1).build()?;
        let config = self.config(bed.dir())?;
        let floor = self.floor.as_deref().map(|program| self.floor(&bed, &config, program)).transpose()?;
        let mut ne = NetworkElement::start(&bed, &config)?;
        let pid = ne.process().pid();
        // The first passes of the collector touch all tables.
        thread::sleep(Duration::from_secs(5));
        let (before, idle_cpu) = (memory(pid)?, cpu_over(pid, self.watch.min(Duration::from_secs(10)))?);

        let services = (0..self.services).map(|at| ServiceKey::new(6, 8000 + at));
        let members = Members {
            first: 0,
            count: self.sessions,
            offers: services.map(|service| ServiceUnit::new(Forwarding::L2, service)).collect(),
            keepalive: self.keepalive,
            key: self.keys.then(|| Key::new(KEY.into())).transpose()?,
        };
        let patience = Duration::from_secs(120);
        let swarm = Swarm::start(bed.client(), &members)?;
        let (joined, status) = while_asked(ne.socket(), || swarm.wait_until_all_serve(patience))?;
        // Slow start is over.
        thread::sleep(Duration::from_secs(15));
        let cpu = cpu_over(pid, self.watch)?;
        let after = memory(pid)?;
        self.check_shares(&ne.status()?)?;
        let lost = swarm.lost();
        ensure!(swarm.serving() == self.sessions, "{} of {} still serve", swarm.serving(), self.sessions);

        ne.process().kill();
        drop(ne);
        thread::sleep(Duration::from_secs(1));
        let ne = NetworkElement::start(&bed, &config)?;
        let (returned, later) = while_asked(ne.socket(), || swarm.wait_until_all_serve(patience))?;
        thread::sleep(Duration::from_secs(15));
        self.check_shares(&ne.status()?)?;
        Ok(Figures {
            joined,
            idle_cpu,
            cpu,
            floor,
            memory: after.saturating_sub(before) / self.sessions as u64,
            resident: after,
            returned,
            lost,
            status: status.max(later),
        })
    }

    /// With the packet path of a daemon that has no sessions, on a port that is not its own.
    fn floor(&self, bed: &Topology, config: &str, program: &Path) -> Result<f64> {
        let _ne = NetworkElement::start(bed, config)?;
        let credential = if self.keys { CREDENTIAL_LEN } else { 0 };
        let floor = Floor {
            sessions: self.sessions,
            // It asks for the health of every service; the members of the swarm for its own, which is one.
            from_ne: HEADER_LEN + usize::from(self.services) * UNIT_LEN + credential,
            from_server: HEADER_LEN + UNIT_LEN + credential,
            interval_ms: u64::try_from(self.keepalive.as_millis())?,
        };
        let share = floor.measure(bed, program, self.watch)?;
        // The daemon is to find the link as the floor did.
        for host in [bed.ne(), bed.client()] {
            host.ip_batch("neigh flush all\n")?;
        }
        Ok(share)
    }

    fn config(&self, dir: &Path) -> Result<String> {
        let services: Vec<String> = (0..self.services).map(|at| format!("tcp/{}", 8000 + at)).collect();
        let auth = if self.keys {
            let file = dir.join("scale.key");
            fs::write(&file, KEY)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
            format!("key_file = {file:?}")
        } else {
            "auth = \"none\"".into()
        };
        Ok(format!(
            "keepalive = {:?}\n[[farm]]\nname = \"wide\"\nvips = [\"{VIP}\"]\nservices = {services:?}\n\
             forwarding = [\"l2\"]\nservers = [\"198.18.0.0/17\"]\n{auth}\n",
            self.keepalive.as_secs_f64()
        ))
    }

    /// All are up at full weight, and every slot is dealt out evenly.
    fn check_shares(&self, status: &Value) -> Result<()> {
        for at in 0..self.services {
            let service = format!("tcp/{}", 8000 + at);
            let rows = servers(status, &service);
            ensure!(rows.len() == self.sessions, "{service} has {} servers", rows.len());
            let slots: Vec<u64> = rows.iter().filter_map(|row| row["slots"].as_u64()).collect();
            let (least, most) = (slots.iter().min().context("none")?, slots.iter().max().context("none")?);
            let sum: u64 = slots.iter().sum();
            ensure!(most - least <= 1 && sum == 65_537, "{service}: {least} to {most} slots, {sum} in all");
            let full = rows.iter().all(|row| row["state"] == "up" && row["weight"] == 100_000);
            ensure!(full, "{service}: not all are up with their full weight");
        }
        let alarms = status["alarms"].as_array().map_or(0, Vec::len);
        ensure!(alarms == 0, "alarms: {}", status["alarms"]);
        Ok(())
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  all served after                  {:.1} s", self.joined.as_secs_f64())?;
        writeln!(f, "  CPU of the daemon, no session     {:.1} % of a core", self.idle_cpu * 100.0)?;
        writeln!(f, "  CPU of the daemon, all sessions   {:.1} % of a core", self.cpu * 100.0)?;
        if let Some(floor) = self.floor {
            writeln!(f, "  floor: plain TCP, same messages   {:.1} % of a core", floor * 100.0)?;
            writeln!(f, "  the daemon's, over the floor's    {:.2}", self.cpu / floor)?;
        }
        writeln!(f, "  memory per session                {:.1} KiB", self.memory as f64 / 1024.0)?;
        writeln!(f, "  resident in all                   {:.1} MiB", self.resident as f64 / 1_048_576.0)?;
        writeln!(f, "  sessions lost meanwhile           {}", self.lost)?;
        writeln!(f, "  all served again after a restart  {:.1} s", self.returned.as_secs_f64())?;
        write!(f, "  slowest status meanwhile          {:.0} ms", self.status.as_secs_f64() * 1000.0)
    }
}

/// Does something, while somebody asks for the status twice a second; the longest that this took.
fn while_asked<T>(socket: &Path, work: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let asker = scope.spawn(|| {
            let mut slowest = Duration::ZERO;
            while !done.load(Ordering::Relaxed) {
                let began = Instant::now();
                fetch(socket)?;
                slowest = slowest.max(began.elapsed());
                thread::sleep(Duration::from_millis(500));
            }
            anyhow::Ok(slowest)
        });
        let outcome = work();
        done.store(true, Ordering::Relaxed);
        let slowest = asker.join().map_err(|_| anyhow!("the asker panicked"))?;
        Ok((outcome?, slowest?))
    })
}

/// Resident memory of a process in bytes.
///
/// # Errors
/// If it has ended.
pub fn memory(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// Share of one CPU that a process takes, all its threads together, in the next while.
///
/// # Errors
/// If it ends meanwhile.
pub fn cpu_over(pid: u32, time: Duration) -> Result<f64> {
    let before = cpu_ticks(pid)?;
    thread::sleep(time);
    // USER_HZ is 100 on every architecture of ours.
    Ok((cpu_ticks(pid)? - before) as f64 / 100.0 / time.as_secs_f64())
}

/// utime and stime of a process.
fn cpu_ticks(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold anything.
    let fields = text.rsplit(')').next().context("no stat")?.split_whitespace();
    Ok(fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum())
}

/// The kernel's table of neighbours is one for all namespaces, and small by default. As long as this lives, it has room.
#[derive(Debug)]
pub struct NeighbourRoom {
    before: Vec<(String, String)>,
}

impl NeighbourRoom {
    /// Room for so many hosts and a thousand others.
    ///
    /// # Errors
    /// Without root.
    pub fn for_hosts(hosts: usize) -> Result<Self> {
        let mut this = Self { before: Vec::new() };
        // The last one first: it must never be below the others.
        for number in [3, 2, 1] {
            let path = format!("/proc/sys/net/ipv4/neigh/default/gc_thresh{number}");
            let old = fs::read_to_string(&path)?.trim().to_owned();
            let wanted = 2 * hosts + 1024;
            if old.parse::<usize>()? < wanted {
                fs::write(&path, wanted.to_string()).with_context(|| format!("cannot raise {path}"))?;
                this.before.push((path, old));
            }
        }
        Ok(this)
    }
}

impl Drop for NeighbourRoom {
    fn drop(&mut self) {
        for (path, old) in self.before.iter().rev() {
            // If it cannot be put back, the table stays large, which harms nobody.
            let _ = fs::write(Path::new(path), old);
        }
    }
}
