//! The whole line: a bed, servers that know their names, `necp ne`, and an agent on every server that has joined.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    conversation::{Conversation, Datagrams},
    daemon::{NetworkElement, ServerElement},
    echo::{Hold, UdpEcho},
    netns::wait_until,
    topology::{NE, Topology, VIP, server_address},
};

/// How long any state may take to come about. Only a failing test waits that long.
pub const PATIENCE: Duration = Duration::from_secs(40);
/// TCP port of [`Hold`] on every server.
pub const TALK: u16 = 7;
/// UDP port of [`UdpEcho`] on every server.
pub const ECHO: u16 = 53;
/// [`TALK`] at the bed's first VIP.
pub const TALK_AT_VIP: SocketAddrV4 = SocketAddrV4::new(VIP, TALK);
/// [`ECHO`] at the bed's first VIP.
pub const ECHO_AT_VIP: SocketAddrV4 = SocketAddrV4::new(VIP, ECHO);
/// What [`Line::join`] offers.
pub const OFFERS: [&str; 2] = ["tcp/7=l2", "udp/53=l2"];

/// Top-level keys of a configuration with this keepalive (seconds), to be followed by [`farm`]s.
pub fn top(keepalive: f64) -> String {
    format!("keepalive = {keepalive:?}\n")
}

/// A farm with services tcp/7 and udp/53; `more` is lines of TOML.
pub fn farm(name: &str, vip: Ipv4Addr, servers: &[&str], more: &str) -> String {
    format!(
        "[[farm]]\nname = \"{name}\"\nvips = [\"{vip}\"]\nservices = [\"tcp/7\", \"udp/53\"]\nforwarding = [\"l2\"]\n\
         servers = {servers:?}\nauth = \"none\"\n{more}\n"
    )
}

/// One farm `web` of all the bed's servers at its first VIP.
pub fn one_farm(keepalive: f64) -> String {
    top(keepalive) + &farm("web", VIP, &["10.0.0.0/24"], "")
}

/// See the module.
#[derive(Debug)]
pub struct Line {
    agents: BTreeMap<usize, ServerElement>,
    _talk: Vec<Hold>,
    _echo: Vec<UdpEcho>,
    ne: Option<NetworkElement>,
    config: String,
    bed: Topology,
}

impl Line {
    /// Servers on every host of the bed, and the network element; no agent yet.
    ///
    /// # Errors
    /// With the daemon's output, if it does not come up.
    pub fn start(bed: Topology, config: &str) -> Result<Self> {
        let (mut talk, mut echo) = (Vec::new(), Vec::new());
        for server in bed.servers() {
            let addresses: Vec<Ipv4Addr> = bed.vips().iter().copied().chain([server.ip()]).collect();
            talk.push(Hold::start(server.ns(), server.name(), TALK)?);
            echo.push(UdpEcho::start(server.ns(), server.name(), &addresses, ECHO)?);
        }
        // The kernel gives a silent neighbour up after three questions, by default a second apart.
        for interface in bed.ne_interfaces() {
            bed.ne().sysctl(&[(&format!("net/ipv4/neigh/{interface}/retrans_time_ms"), "300")])?;
        }
        let ne = Some(NetworkElement::start(&bed, config)?);
        Ok(Self { agents: BTreeMap::new(), _talk: talk, _echo: echo, ne, config: config.to_owned(), bed })
    }

    /// A bed of so many servers with [`one_farm`], all of which have joined.
    ///
    /// # Errors
    /// As [`Line::start`] and [`Line::join_all`].
    pub fn with_servers(count: usize, keepalive: f64) -> Result<Self> {
        let mut line = Self::start(Topology::builder().servers(count).build()?, &one_farm(keepalive))?;
        line.join_all(0..count)?;
        Ok(line)
    }

    /// The bed.
    pub fn bed(&self) -> &Topology {
        &self.bed
    }

    /// The network element.
    ///
    /// # Panics
    /// Between [`Line::kill_ne`] and [`Line::restart_ne`].
    pub fn ne(&mut self) -> &mut NetworkElement {
        self.ne.as_mut().expect("the network element runs")
    }

    /// SIGKILL for the network element's daemon.
    pub fn kill_ne(&mut self) {
        self.ne = None;
    }

    /// Starts it again, after [`Line::kill_ne`] or a signal.
    ///
    /// # Errors
    /// With its output, if it does not come up.
    pub fn restart_ne(&mut self) -> Result<()> {
        self.ne = None;
        self.ne = Some(NetworkElement::start(&self.bed, &self.config)?);
        Ok(())
    }

    /// Starts a server's agent with [`OFFERS`], and waits until it gets new flows.
    ///
    /// # Errors
    /// If it does not.
    pub fn join(&mut self, index: usize) -> Result<()> {
        self.join_all([index])
    }

    /// As [`Line::join`], for several at once.
    ///
    /// # Errors
    /// If one does not get new flows.
    pub fn join_all(&mut self, indices: impl IntoIterator<Item = usize>) -> Result<()> {
        let indices: Vec<usize> = indices.into_iter().collect();
        for index in &indices {
            self.start_agent(*index, &OFFERS, &[])?;
        }
        indices.into_iter().try_for_each(|index| self.wait_until_serving(index))
    }

    /// Starts a server's agent with these offers and arguments.
    ///
    /// # Errors
    /// If it does not start at all.
    pub fn start_agent(&mut self, index: usize, offers: &[&str], more: &[&str]) -> Result<()> {
        let ne = NE.to_string();
        let mut args = vec!["--ne", &ne, "--retry-max", "1"];
        if !more.contains(&"--keepalive") {
            args.extend(["--keepalive", "1"]);
        }
        args.extend(offers.iter().flat_map(|offer| ["--serve", offer]));
        args.extend(more);
        let server = self.bed.server(index);
        let agent = ServerElement::start_unconnected(&self.bed, server.ns(), server.name(), &args)?;
        self.agents.insert(index, agent);
        Ok(())
    }

    /// A server's agent.
    ///
    /// # Panics
    /// If it was not started.
    pub fn agent(&mut self, index: usize) -> &mut ServerElement {
        self.agents.get_mut(&index).expect("an agent that was started")
    }

    /// SIGKILL for a server's agent.
    pub fn kill_agent(&mut self, index: usize) {
        self.agents.remove(&index);
    }

    /// A server's line in `necp status` for a service, such as `tcp/7`; the one with slots if there are several.
    ///
    /// # Errors
    /// If the daemon does not answer.
    pub fn row(&self, service: &str, index: usize) -> Result<Option<Value>> {
        let status = self.ne.as_ref().context("no network element runs")?.status()?;
        let address = server_address(index).to_string();
        let of_server = servers(&status, service).into_iter().filter(|row| row["address"] == address.as_str());
        Ok(of_server.max_by_key(|row| row["slots"].as_u64()).cloned())
    }

    /// Waits until a server's line for `tcp/7` fits.
    ///
    /// # Errors
    /// With the last status, if it does not.
    pub fn wait_for_row(&mut self, index: usize, what: &str, fits: impl Fn(&Value) -> bool) -> Result<()> {
        let waited = wait_until(&format!("s{} {what}", index + 1), PATIENCE, || {
            self.row("tcp/7", index).is_ok_and(|row| row.is_some_and(|row| fits(&row)))
        });
        if let Err(error) = waited {
            bail!("{error}; `necp status --json` says {:#}", self.ne().status()?["farms"]);
        }
        Ok(())
    }

    /// Waits until a server is in a state, by its name in `necp status`.
    ///
    /// # Errors
    /// As [`Line::wait_for_row`].
    pub fn wait_for_state(&mut self, index: usize, state: &str) -> Result<()> {
        self.wait_for_row(index, &format!("is {state}"), |row| row["state"] == state)
    }

    /// Waits until a server is up and has slots.
    ///
    /// # Errors
    /// As [`Line::wait_for_row`].
    pub fn wait_until_serving(&mut self, index: usize) -> Result<()> {
        self.wait_for_row(index, "is up and has slots", |row| {
            row["state"] == "up" && row["reachable"] == true && row["slots"].as_u64() > Some(0)
        })
    }

    /// New connections of the client to [`TALK_AT_VIP`].
    ///
    /// # Errors
    /// If one is not answered.
    pub fn talk(&self, count: usize) -> Result<Vec<Conversation>> {
        Conversation::open_many(self.bed.client(), count, TALK_AT_VIP)
    }

    /// New UDP flows of the client to [`ECHO_AT_VIP`], each with the server that answered it.
    ///
    /// # Errors
    /// If one is not answered.
    pub fn echo(&self, count: usize) -> Result<Vec<(Datagrams, String)>> {
        let ask = |mut flow: Datagrams| flow.ask().map(|server| (flow, server));
        Datagrams::open_many(self.bed.client(), count, ECHO_AT_VIP)?.into_iter().map(ask).collect()
    }

    /// Opens new connections until one is with this server.
    ///
    /// # Errors
    /// If none of 2000 is.
    pub fn talk_until(&self, server: &str) -> Result<Conversation> {
        for _ in 0..2000 {
            let one = Conversation::open(self.bed.client(), TALK_AT_VIP)?;
            if one.server() == server {
                return Ok(one);
            }
        }
        bail!("none of 2000 new connections went to {server}")
    }

    /// New connections and UDP flows go to exactly these servers.
    ///
    /// # Errors
    /// Says where they went.
    pub fn expect_new_flows_at(&self, when: &str, expected: &[&str]) -> Result<()> {
        let expected: BTreeSet<&str> = expected.iter().copied().collect();
        // With shares of a fifth at least, that one server is missed by chance has odds below 1 to 10^9.
        let (talk, echo) = (self.talk(100)?, self.echo(100)?);
        let found = [
            ("connections", talk.iter().map(Conversation::server).collect::<BTreeSet<_>>()),
            ("UDP flows", echo.iter().map(|(_, server)| server.as_str()).collect()),
        ];
        for (kind, found) in found {
            ensure!(found == expected, "{when}: new {kind} went to {found:?}, expected was {expected:?}");
        }
        Ok(())
    }
}

/// All lines of a service in what `necp status --json` printed.
pub fn servers<'a>(status: &'a Value, service: &str) -> Vec<&'a Value> {
    let list = |value: &'a Value, key: &str| value[key].as_array().map(Vec::as_slice).unwrap_or_default().iter();
    let services = list(status, "farms").flat_map(|farm| list(farm, "services"));
    services.filter(|one| one["service"] == service).flat_map(|one| list(one, "servers")).collect()
}

/// Every UDP flow is asked once more, and must be answered by the server that answered before.
///
/// # Errors
/// Names those that moved, with `when`.
pub fn none_moved(when: &str, flows: &mut [(Datagrams, String)]) -> Result<()> {
    let mut moved = Vec::new();
    for (flow, server) in flows {
        let now = flow.ask()?;
        if now != *server {
            moved.push(format!("{} from {server} to {now}", flow.local()));
        }
    }
    ensure!(moved.is_empty(), "{when}, {} UDP flows moved:\n{}", moved.len(), moved.join("\n"));
    Ok(())
}
