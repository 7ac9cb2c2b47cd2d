//! Interception end to end: a client, a web server somewhere behind the network element, and Debian's squid, which the network
//! element sends the client's connections to and which fetches by way of the network element itself. Of IPv6 the same on one link, which all of them share.
//!
//! ```text
//!  client ── eth0 NE eth1 ──┬── s1, a proxy
//!                           └── s2, the way to 203.0.113.80
//! ```

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use necp_tests::{
    conversation::fresh_source,
    daemon::{NetworkElement, ServerElement},
    line::servers,
    netns::{Namespace, wait_until},
    nginx::{Content, Nginx},
    squid::Squid,
    topology::{CLIENT6, NE, NE_CLIENT_SIDE, NE6, Topology, client_address, server_address, server_address6},
};
use necp_user::necp::message::Family;
use sha2::{Digest as _, Sha256};
use socket2::{Domain, Socket, Type};

const SOON: Duration = Duration::from_secs(20);
const WEB: u16 = 80;
/// Takes about four seconds at [`SLOWLY`].
const LENGTH: usize = 2 << 20;
const SLOWLY: &str = "/big?rate=500k";

struct Scene {
    family: Family,
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
    fn new(family: Family) -> Result<Self> {
        match family {
            Family::V4 => Self::four(),
            Family::V6 => Self::six(),
        }
    }

    fn four() -> Result<Self> {
        let bed = Topology::builder().servers(2).vips(&[]).two_interfaces().build()?;
        let net = "203.0.113.0/24";
        bed.client().ip_batch(&format!("route add {net} via {NE_CLIENT_SIDE}\n"))?;
        bed.ne().ip_batch(&format!("route add {net} via {}\n", server_address(1)))?;
        // Both answer clients by way of the network element, and the proxy fetches by it.
        let back = format!("route replace 198.18.0.0/16 via {NE}\n");
        bed.server(0).ns().ip_batch(&format!("{back}route add {net} via {NE}\n"))?;
        bed.server(1).ns().ip_batch(&format!("{back}addr add {} dev lo\n", origin(Family::V4).ip()))?;
        Self::on(bed, Family::V4)
    }

    /// Where the network element has one interface for all.
    fn six() -> Result<Self> {
        let bed = Topology::builder().servers(2).vips(&[]).vip_on_servers(false).ipv6().build()?;
        bed.ne().sysctl(&[("net/ipv6/conf/all/forwarding", "1")])?;
        // The kernel tells hosts of the better way, past the network element, and of IPv6 that cannot be turned off there.
        for host in bed.servers().iter().map(|server| server.ns()).chain([bed.client()]) {
            host.sysctl(&[("net/ipv6/conf/eth0/accept_redirects", "0")])?;
        }
        let net = "2001:db8:cafe::/48";
        let by_ne = format!("route add {net} via {NE6} dev eth0\n");
        bed.client().ip_batch(&format!("{by_ne}addr add {OTHER_CLIENT6}/64 dev eth0\n"))?;
        bed.ne().ip_batch(&format!("route add {net} via {}\n", server_address6(1)))?;
        bed.server(0).ns().ip_batch(&by_ne)?;
        bed.server(1).ns().ip_batch(&format!("addr add {} dev lo\n", origin(Family::V6).ip()))?;
        Self::on(bed, Family::V6)
    }

    fn on(bed: Topology, family: Family) -> Result<Self> {
        let content = Content::new(&bed, LENGTH)?;
        let nginx = Nginx::start(&bed, bed.server(1).ns(), "origin", &[WEB], &content)?;
        let squid = Squid::start(&bed, bed.server(0).ns(), "proxy", family, WEB)?;
        let (intercept, proxy) = (prefixes(family), proxy(family));
        let config = format!(
            "keepalive = 1.0\n[[farm]]\nname = \"proxies\"\nintercept = {intercept:?}\n\
             services = [\"tcp/80\", \"tcp/3262\"]\nforwarding = [\"l2\", \"gre\"]\nservers = [\"{proxy}\"]\n\
             auth = \"none\"\n"
        );
        let ne = NetworkElement::start(&bed, &config)?;
        Ok(Self { family, agent: None, ne, _squid: squid, _nginx: nginx, content, bed })
    }

    /// The proxy's agent starts, and the network element has heard it.
    fn start(&mut self, forwarding: &str, more: &[&str]) -> Result<()> {
        let (ne, offer) = (SocketAddr::new(own(self.family), 3262).to_string(), format!("tcp/80={forwarding}"));
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
            let answer = get(self.client(), fresh(self.family), origin(self.family), "/name")?;
            ensure!(answer.via == by_proxy, "{when}: connection {number} came by a proxy: {}", answer.via);
        }
        Ok(())
    }
}

const OTHER_CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 3);

/// A host of the network that is intercepted.
fn somebody(family: Family, number: u8) -> SocketAddr {
    let address = match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, number).into(),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xcafe, 0, 0, 0, 0, number.into())),
    };
    SocketAddr::new(address, WEB)
}

/// The web server.
fn origin(family: Family) -> SocketAddr {
    somebody(family, 80)
}

/// What is intercepted: the network element's own addresses are in it.
fn prefixes(family: Family) -> [&'static str; 2] {
    match family {
        Family::V4 => ["203.0.113.0/24", "10.0.0.0/8"],
        Family::V6 => ["2001:db8:cafe::/48", "2001:db8:a::/64"],
    }
}

/// The network element's.
fn own(family: Family) -> IpAddr {
    if family == Family::V4 { NE.into() } else { NE6.into() }
}

fn proxy(family: Family) -> IpAddr {
    if family == Family::V4 { server_address(0).into() } else { server_address6(0).into() }
}

/// Two clients.
fn clients(family: Family) -> [IpAddr; 2] {
    match family {
        Family::V4 => [500, 501].map(|number| client_address(number).into()),
        Family::V6 => [CLIENT6.into(), OTHER_CLIENT6.into()],
    }
}

/// A client's address and port that nobody has had, if it is not for the kernel to choose.
fn fresh(family: Family) -> Option<SocketAddr> {
    (family == Family::V4).then(|| fresh_source().into())
}

fn connect(source: Option<SocketAddr>, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    if let Some(source) = source {
        socket.set_reuse_address(true)?;
        socket.bind(&source.into())?;
    }
    socket.connect_timeout(&to.into(), SOON)?;
    Ok(socket.into())
}

/// One request on a connection of its own.
fn get(ns: &Namespace, source: Option<SocketAddr>, to: SocketAddr, path: &str) -> Result<Answer> {
    let mut bytes = Vec::new();
    ns.run(|| {
        let mut stream = connect(source, to)?;
        stream.set_read_timeout(Some(SOON))?;
        let host = to.to_string();
        let host = host.strip_suffix(&format!(":{WEB}")).unwrap_or(&host);
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n")?;
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
    let (client, content, family) = (scene.client().clone(), scene.content.clone(), scene.family);
    let download = thread::spawn(move || get(&client, fresh(family), origin(family), SLOWLY));
    wait_until("it has begun", SOON, || scene.client().connections_to(WEB) > 0)?;
    meanwhile(scene)?;
    ensure!(!download.is_finished(), "it was over too early to say anything");
    let answer = download.join().expect("it does not panic")?;
    ensure!((answer.length, answer.sha256) == (content.length, content.sha256), "{} bytes, or others", answer.length);
    Ok(answer.via)
}

#[test]
fn a_proxy_takes_what_begins_after_its_start_until_its_stop() -> Result<()> {
    takes_what_begins_after_its_start(Family::V4)
}

#[test]
fn a_proxy_takes_what_begins_after_its_start_until_its_stop_over_ipv6() -> Result<()> {
    takes_what_begins_after_its_start(Family::V6)
}

fn takes_what_begins_after_its_start(family: Family) -> Result<()> {
    let mut scene = Scene::new(family)?;
    scene.expect("nobody has started", false)?;
    let via = through(&mut scene, |scene| {
        scene.start("l2", &[])?;
        scene.expect("the proxy has started", true)
    })?;
    ensure!(!via, "a download from before START went on by the proxy");

    // The proxy fetches by way of the network element all the time; so do others on its host, and nobody redirects them.
    let proxy = scene.bed.server(0).ns();
    ensure!(!get(proxy, None, origin(family), "/name")?.via, "the proxy's own connection came back to it");
    // The network element's own addresses are in the prefixes: agents reach it, and so does a ping.
    ensure!(scene.client().run(|| connect(None, SocketAddr::new(own(family), 3262))).is_ok(), "the control port");

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
    excepted(Family::V4)
}

#[test]
fn an_excepted_client_reaches_the_origin_itself_over_ipv6() -> Result<()> {
    excepted(Family::V6)
}

fn excepted(family: Family) -> Result<()> {
    let mut scene = Scene::new(family)?;
    scene.start("l2", &[])?;
    let ([first, second], to) = (clients(family), origin(family));
    let prefix = |address: IpAddr| IpNet::from(address).to_string();
    let via = |scene: &Scene, client, port| {
        get(scene.client(), Some(SocketAddr::new(client, port)), to, "/name").map(|answer| answer.via)
    };
    ensure!(via(&scene, first, 4000)?, "no exception yet");
    scene.ask_agent(&["except", "add", "--src", &prefix(first)])?;
    for port in 4001..4020 {
        ensure!(!via(&scene, first, port)?, "an exception for this client, port {port}");
    }
    for port in 4000..4020 {
        ensure!(via(&scene, second, port)?, "another client, port {port}");
    }
    scene.ask_agent(&["except", "add", "--dst", &prefix(to.ip()), "--port", "tcp/80"])?;
    ensure!(!via(&scene, second, 4020)?, "an exception for the origin");
    scene.ask_agent(&["except", "reset"])?;
    scene.expect("no exceptions any more", true)
}

#[test]
fn an_address_that_comes_to_the_network_element_is_its_own() -> Result<()> {
    comes_to_the_network_element(Family::V4)
}

#[test]
fn an_ipv6_address_that_comes_to_the_network_element_is_its_own() -> Result<()> {
    comes_to_the_network_element(Family::V6)
}

fn comes_to_the_network_element(family: Family) -> Result<()> {
    let mut scene = Scene::new(family)?;
    scene.start("l2", &[])?;
    let to = somebody(family, 99);
    // The proxy takes every connection; nobody on the network element listens there.
    let connects = || scene.client().run(|| connect(fresh(family), to)).is_ok();
    ensure!(connects(), "somebody's address: the proxy answers");
    scene.bed.ne().ip_batch(&format!("addr add {} dev lo\n", to.ip()))?;
    wait_until("the network element refuses", SOON, || !connects())?;
    scene.bed.ne().ip_batch(&format!("addr del {} dev lo\n", to.ip()))?;
    wait_until("the proxy answers again", SOON, connects)
}

#[test]
fn a_proxy_is_reached_by_gre() -> Result<()> {
    reached_by_gre(Family::V4)
}

#[test]
fn a_proxy_is_reached_by_gre_over_ipv6() -> Result<()> {
    reached_by_gre(Family::V6)
}

fn reached_by_gre(family: Family) -> Result<()> {
    let mut scene = Scene::new(family)?;
    scene.start("gre", &["--decap"])?;
    let via = through(&mut scene, |scene| scene.expect("by GRE", true))?;
    ensure!(via, "a download by GRE");
    let status = scene.ne.status()?;
    ensure!(status["farms"][0]["intercept"] == serde_json::json!(prefixes(family)), "{status:#}");
    Ok(())
}
