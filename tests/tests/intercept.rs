//! Interception end to end: a client, a web server somewhere behind the network element, and Debian's squid, which the network
//! element sends the client's connections to and which fetches by way of the network element itself.
//!
//! ```text
//!  client ── eth0 NE eth1 ──┬── s1, a proxy
//!                           └── s2, the way to 203.0.113.80
//! ```

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use necp_tests::{
    conversation::{connect, fresh_source},
    daemon::{NetworkElement, ServerElement},
    line::servers,
    netns::{Namespace, wait_until},
    nginx::{Content, Nginx},
    squid::Squid,
    topology::{NE, NE_CLIENT_SIDE, Topology, client_address, server_address},
};
use sha2::{Digest as _, Sha256};

const SOON: Duration = Duration::from_secs(20);
const ORIGIN: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 80), 80);
/// Takes about four seconds at [`SLOWLY`].
const LENGTH: usize = 2 << 20;
const SLOWLY: &str = "/big?rate=500k";

struct Scene {
    agent: Option<ServerElement>,
    ne: NetworkElement,
    _squid: Squid,
    _nginx: Nginx,
    content: Content,
    bed: Topology,
}

/// What a web server answered.
struct Answer {
    /// The proxy's header, if it came by one.
    via: bool,
    length: u64,
    sha256: [u8; 32],
}

impl Scene {
    fn new() -> Result<Self> {
        let bed = Topology::builder().servers(2).vips(&[]).two_interfaces().build()?;
        let net = "203.0.113.0/24";
        bed.client().ip_batch(&format!("route add {net} via {NE_CLIENT_SIDE}\n"))?;
        bed.ne().ip_batch(&format!("route add {net} via {}\n", server_address(1)))?;
        // Both answer clients by way of the network element, and the proxy fetches by it.
        let back = format!("route replace 198.18.0.0/16 via {NE}\n");
        bed.server(0).ns().ip_batch(&format!("{back}route add {net} via {NE}\n"))?;
        bed.server(1).ns().ip_batch(&format!("{back}addr add {}/32 dev lo\n", ORIGIN.ip()))?;
        let content = Content::new(&bed, LENGTH)?;
        let nginx = Nginx::start(&bed, bed.server(1).ns(), "origin", &[80], &content)?;
        let squid = Squid::start(&bed, bed.server(0).ns(), "proxy", 80)?;
        let config = "keepalive = 1.0\n[[farm]]\nname = \"proxies\"\nintercept = [\"203.0.113.0/24\", \"10.0.0.0/8\"]\n\
                      services = [\"tcp/80\", \"tcp/3262\"]\nforwarding = [\"l2\", \"gre\"]\nservers = [\"10.0.0.11\"]\n\
                      auth = \"none\"\n";
        let ne = NetworkElement::start(&bed, config)?;
        Ok(Self { agent: None, ne, _squid: squid, _nginx: nginx, content, bed })
    }

    /// The proxy's agent starts, and the network element has heard it.
    fn start(&mut self, forwarding: &str, more: &[&str]) -> Result<()> {
        let (ne, offer) = (NE.to_string(), format!("tcp/80={forwarding}"));
        let args = [&["--ne", &ne, "--retry-max", "1", "--keepalive", "1", "--serve", &offer][..], more].concat();
        self.agent = Some(ServerElement::start(&self.bed, self.bed.server(0).ns(), "proxy", &args)?);
        self.wait_for_slots(true)
    }

    fn wait_for_slots(&self, some: bool) -> Result<()> {
        let slots = |row: &serde_json::Value| row["slots"].as_u64() > Some(0) && row["reachable"] == true;
        wait_until("the slots are where they should be", SOON, || {
            self.ne.status().is_ok_and(|status| servers(&status, "tcp/80").into_iter().any(slots) == some)
        })
    }

    fn ask_agent(&self, args: &[&str]) -> Result<()> {
        let output = self.agent.as_ref().context("an agent")?.command(args)?;
        ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn client(&self) -> &Namespace {
        self.bed.client()
    }

    /// So many new connections of the client, all of which must come by the proxy, or none.
    fn expect(&self, when: &str, by_proxy: bool) -> Result<()> {
        for number in 0..20 {
            let answer = get(self.client(), Some(fresh_source()), ORIGIN, "/name")?;
            ensure!(answer.via == by_proxy, "{when}: connection {number} came by a proxy: {}", answer.via);
        }
        Ok(())
    }
}

/// One request on a connection of its own.
fn get(ns: &Namespace, source: Option<SocketAddrV4>, to: SocketAddrV4, path: &str) -> Result<Answer> {
    let mut bytes = Vec::new();
    ns.run(|| {
        let (_, mut stream) = connect(source, to, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", to.ip())?;
        stream.read_to_end(&mut bytes)
    })
    .with_context(|| format!("{path} after {} bytes", bytes.len()))?;
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").context("no end of the head")?;
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    ensure!(head.contains("x-server: origin"), "not the origin's answer: {head}");
    let body = &bytes[end + 4..];
    let via = head.contains("\r\nvia: ") && head.contains("proxy (squid");
    Ok(Answer { via, length: body.len() as u64, sha256: Sha256::digest(body).into() })
}

/// A download that is still going on when `meanwhile` is over; whether it came by the proxy.
fn through(scene: &mut Scene, meanwhile: impl FnOnce(&mut Scene) -> Result<()>) -> Result<bool> {
    let (client, content) = (scene.client().clone(), scene.content.clone());
    let download = thread::spawn(move || get(&client, Some(fresh_source()), ORIGIN, SLOWLY));
    wait_until("it has begun", SOON, || scene.client().connections_to(80) > 0)?;
    meanwhile(scene)?;
    ensure!(!download.is_finished(), "it was over too early to say anything");
    let answer = download.join().expect("it does not panic")?;
    ensure!((answer.length, answer.sha256) == (content.length, content.sha256), "{} bytes, or others", answer.length);
    Ok(answer.via)
}

#[test]
fn a_proxy_takes_what_begins_after_its_start_until_its_stop() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.expect("nobody has started", false)?;
    let via = through(&mut scene, |scene| {
        scene.start("l2", &[])?;
        scene.expect("the proxy has started", true)
    })?;
    ensure!(!via, "a download from before START went on by the proxy");

    // The proxy fetches by way of the network element all the time; so do others on its host, and nobody redirects them.
    let proxy = scene.bed.server(0).ns();
    ensure!(!get(proxy, None, ORIGIN, "/name")?.via, "the proxy's own connection came back to it");
    // The network element's own addresses are in the prefixes: agents reach it, and so does a ping.
    ensure!(scene.client().run(|| connect(None, SocketAddrV4::new(NE, 3262), SOON)).is_ok(), "the control port");

    let via = through(&mut scene, |scene| {
        scene.ask_agent(&["drain"])?;
        scene.expect("the proxy drains", false)
    })?;
    ensure!(via, "a download by the proxy left it");
    scene.ask_agent(&["resume"])?;
    scene.wait_for_slots(true)?;
    scene.expect("it is back", true)?;

    // SIGKILL: nobody says STOP.
    scene.agent = None;
    scene.wait_for_slots(false)?;
    scene.expect("the proxy's agent is dead", false)
}

#[test]
fn an_excepted_client_reaches_the_origin_itself() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.start("l2", &[])?;
    let one = |port| Some(SocketAddrV4::new(client_address(500), port));
    ensure!(get(scene.client(), one(4000), ORIGIN, "/name")?.via, "no exception yet");
    scene.ask_agent(&["except", "add", "--src", &format!("{}/32", client_address(500))])?;
    for port in 4001..4020 {
        ensure!(!get(scene.client(), one(port), ORIGIN, "/name")?.via, "an exception for this client, port {port}");
    }
    scene.expect("other clients", true)?;
    let other = SocketAddrV4::new(client_address(501), 4000);
    scene.ask_agent(&["except", "add", "--dst", &format!("{}/32", ORIGIN.ip()), "--port", "tcp/80"])?;
    ensure!(!get(scene.client(), Some(other), ORIGIN, "/name")?.via, "an exception for the origin");
    scene.ask_agent(&["except", "reset"])?;
    scene.expect("no exceptions any more", true)
}

#[test]
fn a_proxy_is_reached_by_gre() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.start("gre", &["--decap"])?;
    let via = through(&mut scene, |scene| scene.expect("by GRE", true))?;
    ensure!(via, "a download by GRE");
    let status = scene.ne.status()?;
    ensure!(status["farms"][0]["intercept"] == serde_json::json!(["203.0.113.0/24", "10.0.0.0/8"]), "{status:#}");
    Ok(())
}
