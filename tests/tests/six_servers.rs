//! Servers that join over IPv6, as the agent's user sees them: its VIPs on `lo`, GRE that it unwraps, exceptions by its
//! commands and by a peer that knows nothing but the draft.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use necp_tests::{
    daemon::{NetworkElement, ServerElement},
    hand::Hand,
    line::top,
    netns::wait_until,
    nginx::{Content, Nginx},
    topology::{CLIENT6, NE, NE6, Topology, VIP, VIP6, server_address6},
};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

const PATIENCE: Duration = Duration::from_secs(40);
const SOON: Duration = Duration::from_secs(10);
const WEB: u16 = 80;

/// Web servers whose agents have joined over IPv6.
struct Web {
    agents: Vec<ServerElement>,
    ne: NetworkElement,
    _nginx: Vec<Nginx>,
    content: Content,
    bed: Topology,
}

impl Web {
    fn start(servers: usize, vip_on_servers: bool, more: &str) -> Result<Self> {
        let bed = Topology::builder().servers(servers).vip_on_servers(vip_on_servers).ipv6().build()?;
        let content = Content::new(&bed, 4 << 20)?;
        let nginx =
            |server: &necp_tests::topology::Server| Nginx::start(&bed, server.ns(), server.name(), &[WEB], &content);
        let nginx = bed.servers().iter().map(nginx).collect::<Result<_>>()?;
        bed.ne().sysctl(&[("net/ipv6/conf/all/forwarding", "1")])?;
        let config = top(1.0)
            + &format!(
                "[[farm]]\nname = \"web\"\nvips = [\"{VIP}\", \"{VIP6}\"]\nservices = [\"tcp/80\"]\n\
                 forwarding = [\"l2\", \"gre\"]\nservers = [\"10.0.0.0/24\", \"2001:db8:a::/64\"]\n\
                 auth = \"none\"\ntable_size = 251\n{more}\n"
            );
        let ne = NetworkElement::start(&bed, &config)?;
        Ok(Self { agents: Vec::new(), ne, _nginx: nginx, content, bed })
    }

    /// The next server's agent joins, and gets new flows.
    fn join(&mut self, offer: &str, more: &[&str]) -> Result<()> {
        let index = self.agents.len();
        let ne = SocketAddr::new(NE6.into(), 3262).to_string();
        let mut args = vec!["--ne", &ne, "--retry-max", "1", "--keepalive", "1", "--drain", "0", "--serve", offer];
        args.extend(more);
        let server = self.bed.server(index);
        self.agents.push(ServerElement::start_unconnected(&self.bed, server.ns(), server.name(), &args)?);
        let address = server_address6(index).to_string();
        let waited = wait_until(&format!("{address} gets new flows"), PATIENCE, || {
            self.rows().is_ok_and(|rows| {
                rows.iter().any(|row| row["address"] == *address && row["state"] == "up" && row["slots"] != 0)
            })
        });
        let agent = self.agents[index].process().log();
        waited.with_context(|| format!("agent: {agent}\nnetwork element: {}", self.ne.process().log()))
    }

    fn rows(&self) -> Result<Vec<Value>> {
        let status = self.ne.status()?;
        let services = status["farms"][0]["services"].as_array().context("services")?;
        let service = services.iter().find(|one| one["family"] == "IPv6").context("a service of the family")?;
        Ok(service["servers"].as_array().context("servers")?.clone())
    }

    /// A command of an agent, which every network element carries out; what it prints as JSON.
    fn command(&self, index: usize, args: &[&str]) -> Result<Value> {
        let output = self.agents[index].command(&[args, &["--json"]].concat())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "`necp {}`: {text}{}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_str(&text).with_context(|| text)
    }

    /// What an agent lists: installer, scope, source, destination and port of each.
    fn listed(&self, index: usize, args: &[&str]) -> Result<BTreeSet<String>> {
        let answers = self.command(index, &[&["except", "list"], args].concat())?;
        let entries = answers[0]["entries"].as_array().with_context(|| answers.to_string())?;
        let line = |entry: &Value| {
            let words = ["installer", "scope", "src", "dst", "port"].map(|name| entry[name].as_str().unwrap_or("?"));
            words.join(" ")
        };
        Ok(entries.iter().map(line).collect())
    }

    /// Who answers so many new connections; `refused` is the balancer's own host.
    fn who(&self, count: usize) -> Result<BTreeSet<String>> {
        let ask = || -> Result<BTreeSet<String>> {
            let mut found = BTreeSet::new();
            for _ in 0..count {
                let mut name = String::new();
                match get("/name") {
                    Ok(mut body) => _ = body.read_to_string(&mut name)?,
                    Err(error) if format!("{error:#}").contains("refused") => name.push_str("refused"),
                    Err(error) => return Err(error),
                }
                found.insert(name.trim().to_owned());
            }
            Ok(found)
        };
        self.bed.client().run(ask)
    }
}

/// The body of an answer of the VIP's. To be called in the client's namespace.
fn get(path: &str) -> Result<BufReader<TcpStream>> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(VIP6.into(), WEB), SOON).context("no connection")?;
    stream.set_read_timeout(Some(SOON))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = BufReader::new(stream);
    let mut line = String::new();
    answer.read_line(&mut line)?;
    ensure!(line.starts_with("HTTP/1.1 200 "), "the answer is {line:?}");
    while line.trim_end() != "" {
        line.clear();
        answer.read_line(&mut line)?;
    }
    Ok(answer)
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn exceptions_of_ipv6_by_the_agents_commands() -> Result<()> {
    let mut web = Web::start(2, true, "global_exceptions = true")?;
    web.join("tcp/80=l2", &[])?;
    web.join("tcp/80=l2", &[])?;
    assert_eq!(web.who(40)?, names(&["s1", "s2"]));
    let [one, two] = [0, 1].map(server_address6);

    // Not to me.
    let client = format!("{CLIENT6}/128");
    web.command(0, &["except", "add", "--src", &client, "--port", "tcp/80"])?;
    assert_eq!(web.who(40)?, names(&["s2"]));
    // Somebody else's clients.
    web.command(1, &["except", "add", "--src", "2001:db8:ffff::9/48", "--ttl", "1h"])?;
    assert_eq!(web.who(20)?, names(&["s2"]));
    let of_one = format!("{one} local {CLIENT6} any tcp/80");
    let of_two = format!("{two} local 2001:db8:ffff::/48 any any");
    assert_eq!(web.listed(1, &[])?, BTreeSet::from([of_one.clone(), of_two.clone()]));
    assert_eq!(web.listed(1, &["--installer", &one.to_string()])?, BTreeSet::from([of_one.clone()]));
    assert_eq!(web.listed(0, &["--src", "2001:db8:ffff::/48"])?, BTreeSet::from([of_two.clone()]));
    let status = web.ne.status()?;
    assert_eq!((&status["exceptions"], &status["farms"][0]["exceptions"]["masks"]), (&2.into(), &2.into()));

    // A peer that speaks the draft and no more sees the farm's IPv4, of which there is nothing.
    let mut hand = Hand::join(web.bed.server(0).ns(), NE)?;
    assert_eq!(hand.except_query([0; 8])?, [[0; 8]; 0]);
    let four = [1, 0, 0xcb00_7100, 24, 0, 0, 6, 80];
    assert_eq!(hand.except_add(&[four])?, [[0; 8]; 0]);
    assert_eq!(hand.except_query([0; 8])?.len(), 1);
    // An agent of IPv6 sees that too, and asks for none of IPv4 itself.
    let installer = web.bed.server(0).ip();
    assert!(web.listed(1, &[])?.contains(&format!("{installer} local 203.0.113.0/24 any tcp/80")));
    let refused = web.agents[0].command(&["except", "add", "--src", "203.0.113.0/24"])?;
    let text = String::from_utf8_lossy(&refused.stdout);
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(text.contains("the session with it is of the other address family"), "{text}");
    drop(hand);

    // Any flow, of its family; and nobody: on to the balancer's own host, where nobody listens.
    web.command(0, &["except", "reset"])?;
    web.command(0, &["except", "add", "--port", "tcp/80"])?;
    assert_eq!(web.who(20)?, names(&["s2"]));
    assert!(web.listed(0, &[])?.contains(&format!("{one} local any any tcp/80")));
    web.command(0, &["except", "reset"])?;
    let destination = format!("{VIP6}/128");
    web.command(0, &["except", "add", "--dst", &destination, "--port", "tcp/80", "--scope", "global", "--ttl", "300"])?;
    assert_eq!(web.who(20)?, names(&["refused"]));
    web.command(0, &["except", "del", "--dst", &destination, "--port", "tcp/80"])?;
    assert_eq!(web.who(40)?, names(&["s1", "s2"]));

    // They are the agent's: installed again in another session, gone when it ends.
    web.command(0, &["except", "add", "--src", &client])?;
    web.ne.process().signal(libc::SIGTERM)?;
    web.ne.process().wait(SOON)?;
    let config = std::fs::read_to_string(web.bed.dir().join("ne.toml"))?;
    web.ne = NetworkElement::start(&web.bed, &config)?;
    let again = format!("{one} local {CLIENT6} any any");
    wait_until("it is installed again", PATIENCE, || web.listed(0, &[]).is_ok_and(|list| list.contains(&again)))?;
    assert!(web.agents[0].process().terminate(SOON)?.success());
    wait_until("it goes with its agent", SOON, || web.listed(1, &[]).is_ok_and(|list| !list.contains(&again)))
}

#[test]
fn the_agent_unwraps_gre_over_ipv6_and_has_the_vip_on_lo() -> Result<()> {
    let mut web = Web::start(1, false, "")?;
    let vip = VIP6.to_string();
    let there = |web: &Web| -> Result<bool> {
        let output = web.bed.server(0).ns().command("ip").args(["-6", "addr", "show", "dev", "lo"]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).contains(&format!("{vip}/128")))
    };
    assert!(!there(&web)?);
    web.join("tcp/80=gre", &["--vip", &vip, "--decap"])?;
    assert!(there(&web)?);
    assert_eq!(web.who(20)?, names(&["s1"]));
    // Packets as long as the link's, which are too long for the tunnel: the client is told, and the content is the same.
    let (length, sha256) = web.bed.client().run(|| -> Result<(u64, [u8; 32])> {
        let mut bytes = Vec::new();
        get("/big")?.read_to_end(&mut bytes)?;
        Ok((bytes.len() as u64, Sha256::digest(&bytes).into()))
    })?;
    assert_eq!((length, sha256), (web.content.length, web.content.sha256));
    let long = web.bed.client().run(|| -> Result<Ipv6Addr> {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(VIP6.into(), WEB), SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        write!(stream, "GET /name HTTP/1.0\r\nX-Long: {}\r\n\r\n", "x".repeat(6000))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        Ok(VIP6)
    });
    long.context("a request of several full packets")?;

    assert!(web.agents[0].process().terminate(SOON)?.success());
    assert!(!there(&web)?, "the VIP goes with the agent");
    let links = web.bed.server(0).ns().command("ip").args(["link", "show", "dev", "eth0"]).output()?;
    assert!(!String::from_utf8_lossy(&links.stdout).contains("xdp"), "so does the program");
    Ok(())
}
