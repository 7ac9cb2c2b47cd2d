//! The bed of the play, and what is done on it.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    acts::{SERVERS, Step},
    judge::{Cause, Mark},
    status,
    traffic::{DOWNLOAD, Traffic},
};
use crate::{
    capture::{self, Capture},
    daemon::{NECP_PORT, NetworkElement, ServerElement},
    load::{Client, Event},
    netns::wait_until,
    nginx::{Content, Nginx},
    topology::{NE, Topology, VIP},
};

/// The service that the clients ask.
pub const SERVICE: SocketAddrV4 = SocketAddrV4::new(VIP, 80);

/// How long anything may take that should be there at once.
const PATIENCE: Duration = Duration::from_secs(10);
/// A loss is seen after three of them.
const KEEPALIVE: &str = "1.0";
/// How long a draining agent waits for its connections: longer than any of them lives.
const DRAIN: &str = "16";

const CONFIG: &str = r#"
listen = ["10.0.0.1:3262"]
keepalive = 1.0

[[farm]]
name = "web"
vips = ["192.0.2.10"]
services = ["tcp/80"]
forwarding = ["l2"]
servers = ["10.0.0.0/24"]
auth = "none"
"#;

/// What the stage reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// Something was done or has come about, to be shown.
    Said(String),
    /// A server is being taken away.
    Marked(Mark),
    /// The play is over; whether nothing is under way any more.
    Quiet(bool),
    /// The play cannot go on.
    Failed(String),
}

/// Everything that plays.
#[derive(Debug)]
pub struct Stage {
    // In this order they go: what runs in the bed before the bed itself.
    traffic: Option<Traffic>,
    agents: Vec<Option<ServerElement>>,
    webs: Vec<Option<Nginx>>,
    balancer: NetworkElement,
    topology: Topology,
    content: Content,
    draining: Vec<(usize, Instant)>,
    events: mpsc::Sender<Event>,
    reports: mpsc::Sender<Report>,
}

impl Stage {
    /// Builds namespaces, web servers and the balancer; no agent runs yet.
    ///
    /// # Errors
    /// What is missing.
    pub fn set(events: mpsc::Sender<Event>, reports: mpsc::Sender<Report>) -> Result<Self> {
        // The agents put the VIP on their servers.
        let topology = Topology::builder().servers(SERVERS).vip_on_servers(false).build()?;
        let content = Content::new(&topology, DOWNLOAD)?;
        let web = |server: &crate::topology::Server| {
            Nginx::start(&topology, server.ns(), server.name(), &[80], &content).map(Some)
        };
        let webs = topology.servers().iter().map(web).collect::<Result<_>>().context("the web servers")?;
        let balancer = NetworkElement::start(&topology, CONFIG).context("the balancer")?;
        wait_for_status(balancer.socket())?;
        let agents = topology.servers().iter().map(|_| None).collect();
        let draining = Vec::new();
        Ok(Self { traffic: None, agents, webs, balancer, topology, content, draining, events, reports })
    }

    /// The balancer's socket.
    pub fn socket(&self) -> PathBuf {
        self.balancer.socket().to_owned()
    }

    /// The balancer's log.
    pub fn log(&self) -> PathBuf {
        self.topology.dir().join("ne.log")
    }

    /// The servers' addresses.
    pub fn addresses(&self) -> Vec<Ipv4Addr> {
        self.topology.servers().iter().map(crate::topology::Server::ip).collect()
    }

    /// The servers' hardware and IP addresses.
    ///
    /// # Errors
    /// If an interface is gone.
    pub fn hardware(&self) -> Result<Vec<([u8; 6], Ipv4Addr)>> {
        self.topology.servers().iter().map(|server| Ok((server.mac()?, server.ip()))).collect()
    }

    /// A capture of what passes between switch and balancer.
    ///
    /// # Errors
    /// As [`Capture::open`].
    pub fn capture(&self) -> Result<Capture> {
        Capture::open(self.topology.switch(), "ne0", SERVICE.port(), NECP_PORT)
    }

    /// Does the steps that come, until there are no more and nothing is under way, something fails, or it is over.
    pub fn play(mut self, steps: mpsc::Receiver<Step>, over: &AtomicBool) -> Self {
        let mut last = None;
        while !over.load(Ordering::Relaxed) {
            let done = match steps.recv_timeout(Duration::from_millis(50)) {
                Ok(step) => self.perform(step).with_context(|| format!("{step:?}")),
                Err(mpsc::RecvTimeoutError::Timeout) => Ok(()),
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let since = *last.get_or_insert_with(Instant::now);
                    if let Some(quiet) = self.finished(since) {
                        self.report(Report::Quiet(quiet));
                        return self;
                    }
                    std::thread::sleep(Duration::from_millis(20));
                    Ok(())
                }
            };
            if let Err(error) = done.and_then(|()| self.look_around()) {
                self.report(Report::Failed(format!("{error:#}")));
                return self;
            }
        }
        self
    }

    fn perform(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Join(server) => self.join(server),
            Step::Traffic => {
                let traffic =
                    Traffic::start(self.topology.client(), Client::new(SERVICE), &self.content, self.events.clone());
                self.traffic = Some(traffic?);
                self.say("the clients begin: short requests, downloads, long-lived connections".to_owned());
                Ok(())
            }
            Step::Lasting(count) => {
                self.traffic.as_mut().context("no load yet")?.lasting(count);
                self.say(format!("{count} more connections that will live to the end"));
                Ok(())
            }
            Step::Health(server, index) => {
                fs::write(self.health(server), index.to_string())?;
                self.say(format!("s{}'s health is {index} now", server + 1));
                Ok(())
            }
            Step::Drain(server) => {
                self.say(format!("s{}: SIGTERM to the agent, which sends STOP", server + 1));
                self.mark(server, Cause::Stopped);
                self.agent(server)?.process().signal(libc::SIGTERM)?;
                self.draining.push((server, Instant::now()));
                Ok(())
            }
            Step::KillAgent(server) => {
                self.say(format!("s{}: SIGKILL to the agent; nginx goes on", server + 1));
                self.mark(server, Cause::AgentKilled);
                self.agent(server)?.process().kill();
                self.agents[server] = None;
                Ok(())
            }
            Step::Vanish(server) => self.vanish(server),
            Step::Restore(server) => {
                self.topology.server(server).plug()?;
                self.webs[server] = Some(self.web(server)?);
                self.say(format!("s{}: link up, nginx started", server + 1));
                Ok(())
            }
        }
    }

    fn join(&mut self, server: usize) -> Result<()> {
        if let Some(mut agent) = self.agents[server].take() {
            agent.process().wait(Duration::from_secs(5)).context("the agent that drains has not left")?;
        }
        fs::write(self.health(server), "100")?;
        let host = self.topology.server(server);
        let (address, health) = (host.ip(), format!("file:{}", self.health(server).display()));
        let (ne, source, vip) = (NE.to_string(), address.to_string(), VIP.to_string());
        let args = [
            "--ne",
            &ne,
            "--source",
            &source,
            "--serve",
            "tcp/80=l2",
            "--vip",
            &vip,
            "--health",
            &health,
            "--health-interval",
            "0.2",
            "--keepalive",
            KEEPALIVE,
            "--retry-max",
            "1",
            "--drain",
            DRAIN,
        ];
        let mut agent = ServerElement::start_unconnected(&self.topology, host.ns(), host.name(), &args)?;
        let socket = self.socket();
        let began = Instant::now();
        agent.process().wait_until("the balancer sends it new connections", PATIENCE, |_| serves(&socket, address))?;
        self.agents[server] = Some(agent);
        self.say(format!("s{} has joined, {} ms after its agent was started", server + 1, began.elapsed().as_millis()));
        Ok(())
    }

    fn vanish(&mut self, server: usize) -> Result<()> {
        self.say(format!("s{}: link down, everything on it killed", server + 1));
        self.mark(server, Cause::Vanished);
        self.topology.server(server).unplug()?;
        // Their last packets go nowhere.
        if let Some(mut web) = self.webs[server].take() {
            web.process().kill();
        }
        if let Some(mut agent) = self.agents[server].take() {
            agent.process().kill();
        }
        Ok(())
    }

    /// What should run runs, and what has drained is told.
    fn look_around(&mut self) -> Result<()> {
        ensure!(
            self.balancer.process().ended().is_none(),
            "the balancer has ended:\n{}",
            self.balancer.process().log()
        );
        for (at, web) in self.webs.iter_mut().enumerate() {
            let ended = web.as_mut().is_some_and(|web| web.process().ended().is_some());
            ensure!(!ended, "the web server of s{} has ended", at + 1);
        }
        for server in 0..self.agents.len() {
            let Some(agent) = &mut self.agents[server] else { continue };
            let Some(how) = agent.process().ended() else { continue };
            let drain = self.draining.iter().position(|(draining, _)| *draining == server);
            let log = agent.process().log();
            let drain = drain.with_context(|| format!("the agent of s{} has ended ({how}):\n{log}", server + 1))?;
            let (_, since) = self.draining.remove(drain);
            ensure!(how.success(), "the agent of s{} could not leave in peace ({how}):\n{log}", server + 1);
            self.agents[server] = None;
            let took = since.elapsed().as_secs_f64();
            self.say(format!("s{}: its last connection has ended after {took:.1} s; the agent leaves", server + 1));
        }
        Ok(())
    }

    /// Ends the load: true when nothing is under way any more, false when it takes too long.
    fn finished(&self, since: Instant) -> Option<bool> {
        let Some(traffic) = &self.traffic else { return Some(true) };
        traffic.stop();
        if traffic.runs() { (since.elapsed() > PATIENCE + PATIENCE / 2).then_some(false) } else { Some(true) }
    }

    fn web(&self, server: usize) -> Result<Nginx> {
        let host = self.topology.server(server);
        Nginx::start(&self.topology, host.ns(), host.name(), &[80], &self.content)
    }

    fn agent(&mut self, server: usize) -> Result<&mut ServerElement> {
        self.agents[server].as_mut().with_context(|| format!("s{} has no agent", server + 1))
    }

    fn health(&self, server: usize) -> PathBuf {
        self.topology.dir().join(format!("health-{server}"))
    }

    fn mark(&self, server: usize, cause: Cause) {
        self.report(Report::Marked(Mark { server, cause, at: capture::now() }));
    }

    fn say(&self, text: String) {
        self.report(Report::Said(text));
    }

    fn report(&self, report: Report) {
        // Nobody listens any more when the play is being broken off.
        let _ = self.reports.send(report);
    }
}

fn wait_for_status(socket: &Path) -> Result<()> {
    wait_until("the balancer answers `necp status`", PATIENCE, || status::fetch(socket, &[]).is_ok())
}

fn serves(socket: &Path, server: Ipv4Addr) -> bool {
    let standings = status::fetch(socket, &[server]).unwrap_or_default();
    standings.first().is_some_and(|standing| standing.as_ref().is_some_and(status::Standing::serves))
}
