//! Both families at once: a bed with IPv6, web servers, a network element whose farm has a VIP of each family, and agents that
//! join over either.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::{
    daemon::{NetworkElement, ServerElement},
    echo::Hold,
    line::{PATIENCE, TALK, top},
    netns::wait_until,
    nginx::{Content, Nginx},
    topology::{Topology, VIP, VIP6, server_address, server_address6},
};

const SOON: Duration = Duration::from_secs(10);
/// TCP port of the web servers; [`TALK`] is answered too.
pub const WEB: u16 = 80;

/// A bed of both families whose servers serve [`WEB`], the network element, and the agents that have joined it.
#[derive(Debug)]
pub struct Both {
    /// Of the servers that have one.
    pub agents: Vec<Option<ServerElement>>,
    /// The network element.
    pub ne: NetworkElement,
    _nginx: Vec<Nginx>,
    _talk: Vec<Hold>,
    content: Content,
    /// The bed.
    pub bed: Topology,
}

impl Both {
    /// One interface and so many servers, whose packets come in one of these ways; no agent yet. `more` are lines of the farm's.
    ///
    /// # Errors
    /// With the daemon's output, if it does not come up.
    pub fn start(servers: usize, forwarding: &[&str], more: &str) -> Result<Self> {
        let bed = Topology::builder().servers(servers).ipv6().build()?;
        Self::start_in(bed, forwarding, "", |_| Ok(more.to_owned()))
    }

    /// In a bed with IPv6. `first` are lines for the top of the configuration; `more` makes those of the farm.
    ///
    /// # Errors
    /// As [`Both::start`].
    pub fn start_in(
        bed: Topology,
        forwarding: &[&str],
        first: &str,
        more: impl FnOnce(&Topology) -> Result<String>,
    ) -> Result<Self> {
        let content = Content::new(&bed, 6 << 20)?;
        let nginx = |server: &crate::topology::Server| Nginx::start(&bed, server.ns(), server.name(), &[WEB], &content);
        let nginx = bed.servers().iter().map(nginx).collect::<Result<_>>()?;
        let talk = bed.servers().iter().map(|server| Hold::start(server.ns(), server.name(), TALK));
        let talk = talk.collect::<Result<_>>()?;
        for family in ["ipv4", "ipv6"] {
            for interface in bed.ne_interfaces() {
                bed.ne().sysctl(&[(&format!("net/{family}/neigh/{interface}/retrans_time_ms"), "300")])?;
            }
        }
        if forwarding != ["l2"] {
            bed.ne().sysctl(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
        }
        let more = more(&bed)?;
        let config = top(1.0)
            + first
            + &format!(
                "[[farm]]\nname = \"web\"\nvips = [\"{VIP}\", \"{VIP6}\"]\nservices = [\"tcp/{TALK}\", \"tcp/{WEB}\"]\n\
                 forwarding = {forwarding:?}\nservers = [\"10.0.0.0/24\", \"2001:db8:a::/64\"]\n\
                 auth = \"none\"\ntable_size = 251\n{more}\n"
            );
        let ne = NetworkElement::start(&bed, &config)?;
        let agents = bed.servers().iter().map(|_| None).collect();
        Ok(Self { agents, ne, _nginx: nginx, _talk: talk, content, bed })
    }

    /// Starts a server's agent, which joins these addresses of the NE's, and waits until it gets new flows in each family;
    /// `forwarding` is how it wants its packets.
    ///
    /// # Errors
    /// With the last status, if it does not.
    pub fn join(&mut self, index: usize, nes: &[IpAddr], forwarding: &str, more: &[&str]) -> Result<()> {
        let texts: Vec<String> = nes.iter().map(ToString::to_string).collect();
        let offers = [TALK, WEB].map(|port| format!("tcp/{port}={forwarding}"));
        let mut args = vec!["--retry-max", "1", "--keepalive", "1"];
        args.extend(offers.iter().flat_map(|offer| ["--serve", offer]));
        args.extend(texts.iter().flat_map(|text| ["--ne", text]));
        args.extend(more);
        let server = self.bed.server(index);
        self.agents[index] = Some(ServerElement::start_unconnected(&self.bed, server.ns(), server.name(), &args)?);
        nes.iter().try_for_each(|ne| {
            let serves = |row: &Value| row["state"] == "up" && row["reachable"] == true && row["slots"] != 0;
            self.wait_for(index, address_of(index, *ne), serves)
        })
    }

    /// The line of the server with this address for [`WEB`] in `necp status`.
    ///
    /// # Errors
    /// If the daemon does not answer.
    pub fn row(&self, address: IpAddr) -> Result<Option<Value>> {
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        let status = self.ne.status()?;
        let services = status["farms"][0]["services"].as_array().context("services")?.clone();
        let web = |one: &Value| one["family"] == family && one["service"] == "tcp/80";
        let service = services.into_iter().find(web).context("a service of the family")?;
        let servers = service["servers"].as_array().context("servers")?.clone();
        Ok(servers.into_iter().find(|row| row["address"] == address.to_string().as_str()))
    }

    /// Waits until the line of the server with this address, and the agent of this index, fits.
    ///
    /// # Errors
    /// With the last status, if it does not.
    pub fn wait_for(&mut self, index: usize, address: IpAddr, fits: impl Fn(&Value) -> bool) -> Result<()> {
        let waited = wait_until(&format!("{address} is as it should be"), PATIENCE, || {
            self.row(address).is_ok_and(|row| row.is_some_and(|row| fits(&row)))
        });
        let agent = self.agents[index].as_mut().map(|agent| agent.process().log()).unwrap_or_default();
        waited.with_context(|| {
            let status =
                self.ne.status().map_or_else(|error| error.to_string(), |status| format!("{:#}", status["farms"]));
            format!("status: {status}\nagent: {agent}\nnetwork element: {}", self.ne.process().log())
        })
    }

    /// The names of the servers that answer so many new connections.
    ///
    /// # Errors
    /// If one is not answered.
    pub fn who(&self, vip: IpAddr, count: usize) -> Result<BTreeSet<String>> {
        let ask = || {
            let mut found = BTreeSet::new();
            for _ in 0..count {
                found.insert(get(vip, "/name")?.0);
            }
            Ok(found)
        };
        self.bed.client().run(ask)
    }

    /// Downloads `/big` so many times at once, at this rate; `meanwhile` runs once all have begun.
    ///
    /// # Errors
    /// If one does not come whole, or s1 has none of them.
    ///
    /// # Panics
    /// Never: what reads does not panic.
    pub fn download(
        &self,
        vip: IpAddr,
        count: usize,
        rate: &str,
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let path = format!("/big?rate={rate}");
        let (client, content) = (self.bed.client(), &self.content);
        thread::scope(|scope| {
            let begin = |_| -> Result<_> {
                let (name, body) = client.run(|| get(vip, &path))?;
                Ok((name, scope.spawn(move || checksum(body))))
            };
            let downloads = (0..count).map(begin).collect::<Result<Vec<_>>>()?;
            let servers: BTreeSet<&String> = downloads.iter().map(|(name, _)| name).collect();
            ensure!(servers.contains(&"s1".to_owned()), "s1 has none of {count}");
            meanwhile()?;
            ensure!(downloads.iter().all(|(_, download)| !download.is_finished()), "they were over too soon");
            for (_, download) in downloads {
                let (length, sha256) = download.join().expect("no panic")?;
                ensure!((length, sha256) == (content.length, content.sha256), "{length} bytes came, or others");
            }
            Ok(())
        })
    }
}

fn address_of(index: usize, ne: IpAddr) -> IpAddr {
    if ne.is_ipv4() { server_address(index).into() } else { server_address6(index).into() }
}

/// Who answers, and the body of the answer from its first byte on. To be called in the client's namespace.
fn get(vip: IpAddr, path: &str) -> Result<(String, BufReader<TcpStream>)> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(vip, WEB), SOON).context("no connection")?;
    stream.set_read_timeout(Some(SOON))?;
    // Longer than one packet, so that paths that take shorter ones are found out.
    write!(stream, "GET {path} HTTP/1.0\r\nX-Padding: {}\r\n\r\n", "x".repeat(4000))?;
    let mut answer = BufReader::new(stream);
    let mut line = String::new();
    answer.read_line(&mut line)?;
    ensure!(line.starts_with("HTTP/1.1 200 "), "the answer is {line:?}");
    let mut name = None;
    while line.trim_end() != "" {
        line.clear();
        answer.read_line(&mut line)?;
        name = line.strip_prefix("X-Server: ").map(|name| name.trim_end().to_owned()).or(name);
    }
    Ok((name.context("no X-Server")?, answer))
}

fn checksum(mut body: BufReader<TcpStream>) -> Result<(u64, [u8; 32])> {
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64, Sha256::digest(&bytes).into()))
}

/// A set of names, to compare with [`Both::who`].
pub fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}
