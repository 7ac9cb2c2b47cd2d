//! Who gets what: real TCP and UDP peers through the packet path.

use std::{
    collections::BTreeSet,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Context as _, Result};
use necp_tests::{
    conversation::{Conversation, Datagrams, all_answer, connect, fresh_source},
    echo::Hold,
    frame::{self, Flow, flags},
    line::{ECHO, ECHO_AT_VIP, Line, OFFERS, TALK, TALK_AT_VIP, farm, none_moved, one_farm, top},
    link,
    load::Client,
    netns::wait_until,
    nginx::{Content, Nginx},
    raw::RawSocket,
    topology::{NE, NE_CLIENT_SIDE, Topology, VIP, client_address, server_address},
};

const SOON: Duration = Duration::from_secs(10);
const OTHER_VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 20);

#[test]
fn every_server_gets_flows_and_keeps_them() -> Result<()> {
    let mut line = Line::with_servers(3, 5.0)?;
    line.expect_new_flows_at("all serve", &["s1", "s2", "s3"])?;
    let (mut talk, mut echo) = (line.talk(60)?, line.echo(60)?);
    for round in ["once", "twice", "three times"] {
        all_answer(round, &mut talk)?;
        none_moved(round, &mut echo)?;
    }
    // Nothing was dropped on the way, and the daemon's counters know of it.
    wait_until("the counters have seen all flows", SOON, || {
        let flows = |service| -> u64 { (0..3).filter_map(|n| line.row(service, n).ok()??["flows"].as_u64()).sum() };
        flows("tcp/7") == 160 && flows("udp/53") == 160
    })?;
    assert_eq!(line.ne().status()?["interfaces"][0]["mode"], "native");
    Ok(())
}

#[test]
fn layer_2_changes_hardware_addresses_and_nothing_else() -> Result<()> {
    let line = Line::with_servers(1, 5.0)?;
    let (bed, server) = (line.bed(), line.bed().server(0));
    let at_server = RawSocket::open(server.ns(), "eth0")?;
    let at_client = RawSocket::open(bed.client(), "eth0")?;
    let ne_mac = link::mac(bed.ne(), "eth0")?;
    let flow = Flow {
        source_mac: link::mac(bed.client(), "eth0")?,
        destination_mac: ne_mac,
        source: fresh_source(),
        destination: TALK_AT_VIP,
        ttl: 17,
    };
    let sent = flow.tcp(flags::SYN, 4711, 0, b"");
    at_client.send(&sent)?;
    let is_it = |from: SocketAddrV4| move |frame: &[u8]| frame::parse(frame).is_some_and(|f| f.flow.source == from);
    let came = at_server.receive(SOON, is_it(flow.source))?.context("nothing came")?;
    assert_eq!(came[..6], server.mac()?, "to the server");
    assert_eq!(came[6..12], ne_mac, "from the network element");
    assert_eq!(came[12..], sent[12..], "the packet itself is untouched");

    // The server answers the client itself.
    let answer = at_client.receive(SOON, |frame: &[u8]| {
        frame::parse(frame).is_some_and(|f| f.flow.destination == flow.source && f.flow.source == TALK_AT_VIP)
    })?;
    let answer = frame::parse(&answer.context("no answer")?).context("TCP")?;
    assert_eq!(answer.flow.source_mac, server.mac()?);
    assert!(answer.tcp.is_some_and(|tcp| tcp.syn && tcp.ack && tcp.acknowledgment_number == 4712));
    Ok(())
}

#[test]
fn several_interfaces_are_one_balancer() -> Result<()> {
    let bed = Topology::builder().two_interfaces().servers(2).build()?;
    let content = Content::new(&bed, 4 << 20)?;
    let _nginx: Vec<Nginx> = bed
        .servers()
        .iter()
        .map(|server| Nginx::start(&bed, server.ns(), server.name(), &[80], &content))
        .collect::<Result<_>>()?;
    let config = one_farm(5.0).replace("\"tcp/7\"", "\"tcp/7\", \"tcp/80\"");
    let mut line = Line::start(bed, &config)?;
    for index in 0..2 {
        line.start_agent(index, &["tcp/7=l2", "udp/53=l2", "tcp/80=l2"], &[])?;
    }
    (0..2).try_for_each(|index| line.wait_until_serving(index))?;
    line.expect_new_flows_at("two interfaces", &["s1", "s2"])?;
    let client = Client::new(SocketAddrV4::new(VIP, 80));
    let (ns, content) = (line.bed().client().clone(), &content);
    let outcome = ns.block_on(client.download(client_address(5), "/big", content, |_| ()));
    assert_eq!((outcome.failure, outcome.bytes), (None, content.length));
    // A client on the servers' link comes in by the other interface, and goes out by it again.
    let guest = line.bed().switch();
    guest.ip_batch(&format!("route add {VIP} via {NE} dev br1\n"))?;
    let mut conversation = Conversation::open_as_host(guest, TALK_AT_VIP)?;
    assert_eq!(conversation.local().ip(), Ipv4Addr::new(10, 0, 0, 254));
    conversation.ask()?;
    let status = line.ne().status()?;
    let names: Vec<_> = status["interfaces"].as_array().context("a list")?.iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["eth0", "eth1"]);
    Ok(())
}

#[test]
fn generic_mode_forwards_too() -> Result<()> {
    let config = format!("mode = \"generic\"\n{}", one_farm(5.0));
    let mut line = Line::start(Topology::builder().servers(2).build()?, &config)?;
    line.join_all(0..2)?;
    assert_eq!(line.ne().status()?["interfaces"][0]["mode"], "generic");
    assert!(!line.ne().process().log().contains("is a veth"), "there is nothing to be ready for");
    line.expect_new_flows_at("generic mode", &["s1", "s2"])?;
    all_answer("in generic mode", &mut line.talk(10)?)
}

#[test]
fn two_farms_do_not_mix() -> Result<()> {
    let bed = Topology::builder().servers(4).vips(&[VIP, OTHER_VIP]).build()?;
    let config = top(5.0)
        + &farm("a", VIP, &["10.0.0.11", "10.0.0.12"], "")
        + &farm("b", OTHER_VIP, &["10.0.0.13", "10.0.0.14"], "");
    let mut line = Line::start(bed, &config)?;
    line.join_all(0..4)?;
    let who = |address| -> Result<BTreeSet<String>> {
        let talk = Conversation::open_many(line.bed().client(), 60, SocketAddrV4::new(address, TALK))?;
        let mut echo = Datagrams::open_many(line.bed().client(), 60, SocketAddrV4::new(address, ECHO))?;
        let mut names: BTreeSet<String> = talk.iter().map(|one| one.server().to_owned()).collect();
        for flow in &mut echo {
            names.insert(flow.ask()?);
        }
        Ok(names)
    };
    assert_eq!(who(VIP)?, BTreeSet::from(["s1", "s2"].map(String::from)));
    assert_eq!(who(OTHER_VIP)?, BTreeSet::from(["s3", "s4"].map(String::from)));

    // What happens in one farm is no matter of the other's.
    let mut held = Conversation::open_many(line.bed().client(), 40, SocketAddrV4::new(OTHER_VIP, TALK))?;
    line.agent(0).process().terminate(SOON)?;
    line.wait_for_row(0, "has no slots", |row| row["slots"] == 0)?;
    all_answer("a server of the other farm has left", &mut held)?;
    line.expect_new_flows_at("s1 has left", &["s2"])
}

#[test]
fn a_changed_hardware_address_is_followed() -> Result<()> {
    let line = Line::with_servers(2, 1.0)?;
    let (mut talk, mut echo) = (line.talk(40)?, line.echo(40)?);
    let new = [2, 0, 0, 0, 0xab, 0xcd];
    line.bed().server(0).set_mac(new)?;
    let arrives = RawSocket::open(line.bed().server(0).ns(), "eth0")?;
    // Established flows go on, on the same server.
    all_answer("the address has changed", &mut talk)?;
    none_moved("the address has changed", &mut echo)?;
    line.expect_new_flows_at("the address has changed", &["s1", "s2"])?;
    let ours = |frame: &[u8]| {
        frame::parse(frame).is_some_and(|seen| *seen.flow.destination.ip() == VIP && seen.flow.destination_mac == new)
    };
    arrives.receive(SOON, ours)?.context("nothing for the VIP came to the new address").map(drop)
}

#[test]
fn a_server_may_be_a_client_of_a_vip() -> Result<()> {
    // The agents put the VIPs on `lo`, each that of its own farm alone.
    let bed = Topology::builder().servers(3).vips(&[VIP, OTHER_VIP]).vip_on_servers(false).build()?;
    let config =
        top(5.0) + &farm("a", VIP, &["10.0.0.11"], "") + &farm("b", OTHER_VIP, &["10.0.0.12", "10.0.0.13"], "");
    let mut line = Line::start(bed, &config)?;
    for (index, vip) in [(0, VIP), (1, OTHER_VIP), (2, OTHER_VIP)] {
        line.start_agent(index, &["tcp/7=l2", "udp/53=l2"], &["--vip", &vip.to_string()])?;
        line.wait_until_serving(index)?;
    }
    for (server, vip) in [(0, OTHER_VIP), (1, VIP)] {
        line.bed().server(server).ns().ip_batch(&format!("route add {vip}/32 dev eth0\n"))?;
    }
    let mut servers = BTreeSet::new();
    for _ in 0..40 {
        let mut one = Conversation::open_as_host(line.bed().server(0).ns(), SocketAddrV4::new(OTHER_VIP, TALK))?;
        one.ask()?;
        servers.insert(one.server().to_owned());
    }
    assert_eq!(servers, BTreeSet::from(["s2", "s3"].map(String::from)));
    let mut back = Conversation::open_as_host(line.bed().server(1).ns(), TALK_AT_VIP)?;
    back.ask()?;
    assert_eq!(back.server(), "s1");
    Ok(())
}

#[test]
fn what_is_not_ours_passes() -> Result<()> {
    let line = Line::with_servers(2, 5.0)?;
    let (client, ne) = (line.bed().client(), line.bed().ne());
    let _ssh = Hold::start(ne, "the balancer's own", 22)?;
    for address in [NE, VIP] {
        // Its own address, and a port of the VIP that is no service: the host's own stack answers.
        let mut own = Conversation::open(client, SocketAddrV4::new(address, 22))?;
        assert_eq!(own.server(), "the balancer's own");
        own.ask()?;
        link::ping(client, address, SOON)?;
        let refused = client.run(|| connect(None, SocketAddrV4::new(address, 81), SOON)).map(drop);
        assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::ConnectionRefused));
    }
    // The NECP port is reached from anywhere; who may not join is turned away there, not by the packet path.
    let (_, _connected) = client.run(|| connect(None, SocketAddrV4::new(NE, 3262), SOON))?;
    Ok(())
}

#[test]
fn a_service_without_servers_is_the_hosts_own() -> Result<()> {
    let mut line = Line::start(Topology::builder().servers(1).build()?, &one_farm(5.0))?;
    let refused = |line: &Line| {
        let result = line.bed().client().run(|| connect(None, TALK_AT_VIP, SOON)).map(drop);
        result.map_err(|error| error.kind())
    };
    assert_eq!(refused(&line), Err(ErrorKind::ConnectionRefused), "nobody has joined");
    line.join(0)?;
    assert_eq!(refused(&line), Ok(()));
    line.kill_agent(0);
    line.wait_for_state(0, "lost")?;
    assert_eq!(refused(&line), Err(ErrorKind::ConnectionRefused), "nobody is left");
    Ok(())
}

#[test]
fn a_router_between_clients_and_balancer_is_no_matter() -> Result<()> {
    let bed = Topology::builder().two_interfaces().servers(1).build()?;
    let mut line = Line::start(bed, &one_farm(5.0))?;
    line.join(0)?;
    // Not by the clients' link but through the switch, which routes, and so with its hardware address.
    let switch = line.bed().switch();
    switch.ip_batch(&format!("route add {VIP} via {NE_CLIENT_SIDE} dev br0\n"))?;
    line.bed().client().ip_batch(&format!("route replace {VIP}/32 via 198.18.255.254 dev eth0\n"))?;
    all_answer("behind a router", &mut line.talk(10)?)?;
    none_moved("behind a router", &mut line.echo(10)?)
}

#[test]
fn every_packet_is_counted_under_one_reason() -> Result<()> {
    // Long keepalives: little else is on the wire.
    let mut line = Line::start(Topology::builder().servers(1).build()?, &one_farm(60.0))?;
    line.start_agent(0, &OFFERS, &["--keepalive", "60"])?;
    line.wait_until_serving(0)?;
    let (bed, ne_mac) = (line.bed(), link::mac(line.bed().ne(), "eth0")?);
    let client = RawSocket::open(bed.client(), "eth0")?;
    let flow = |number: u16, to: SocketAddrV4, destination_mac| Flow {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac,
        // Nobody: no answer finds its way, and so none is answered in turn.
        source: SocketAddrV4::new(Ipv4Addr::new(198, 18, 200, number as u8 % 10), 3000 + number),
        destination: to,
        ttl: 64,
    };
    let fragment = |mut frame: Vec<u8>| {
        // "More fragments" (RFC 791 §3.1), with the header's checksum made good (RFC 1624).
        frame[20] |= 0x20;
        let sum = u32::from(u16::from_be_bytes([frame[24], frame[25]])) + 0xffff - 0x2000;
        let sum = (sum & 0xffff) + (sum >> 16);
        frame[24..26].copy_from_slice(&(sum as u16).to_be_bytes());
        frame
    };
    let malformed = |mut frame: Vec<u8>| {
        // A TCP header of 16 bytes (RFC 9293 §3.1).
        frame[46] = 0x40;
        frame
    };
    let before = settled_counts(&mut line)?;
    for number in 0..100 {
        let syn = flow(number, TALK_AT_VIP, ne_mac).tcp(flags::SYN, 1, 0, b"");
        client.send(&syn)?;
        client.send(&malformed(syn))?;
        client.send(&flow(number, ECHO_AT_VIP, ne_mac).udp(b"first"))?;
        client.send(&flow(number, ECHO_AT_VIP, ne_mac).udp(b"second"))?;
        client.send(&fragment(flow(number, ECHO_AT_VIP, ne_mac).udp(b"fragment")))?;
        client.send(&flow(number, SocketAddrV4::new(NE, 9999), ne_mac).udp(b"not ours"))?;
        client.send(&flow(number, TALK_AT_VIP, [0xff; 6]).tcp(flags::SYN, 1, 0, b""))?;
    }
    wait_until("every packet is counted, each under one reason", SOON, || {
        let Ok(now) = counts(&mut line) else { return false };
        let more = |reason: &str| now.of(reason) - before.of(reason);
        let exact = ["plain", "malformed", "new", "other-host"];
        // The fragment is a first one of the same flow: it has the ports.
        exact.iter().all(|reason| more(reason) == 100)
            && more("record") == 200
            && more("not-ours") >= 100
            && now.received - before.received >= 700
            && now.received - before.received == now.total() - before.total()
    })
    .with_context(|| format!("before {before:?}\nnow {:?}", counts(&mut line)))
}

/// What came in by the NE's interface, and what the packet path counted.
#[derive(Debug)]
struct Counts {
    received: u64,
    reasons: Vec<(String, u64)>,
}

impl Counts {
    fn of(&self, reason: &str) -> u64 {
        self.reasons.iter().find(|(name, _)| name == reason).map_or(0, |(_, packets)| *packets)
    }

    fn total(&self) -> u64 {
        self.reasons.iter().map(|(_, packets)| packets).sum()
    }
}

fn counts(line: &mut Line) -> Result<Counts> {
    let status = line.ne().status()?;
    let one = |row: &serde_json::Value| Some((row["reason"].as_str()?.to_owned(), row["packets"].as_u64()?));
    let rows = status["packets"].as_array().context("a list")?;
    let reasons = rows.iter().map(|row| one(row).context("a row")).collect::<Result<_>>()?;
    let read = || {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").ok()?;
        let row = table.lines().find_map(|line| line.trim().strip_prefix("eth0:"))?;
        row.split_whitespace().nth(1)?.parse().ok()
    };
    Ok(Counts { received: line.bed().ne().run(read).context("no counters of eth0")?, reasons })
}

/// The counts at a moment when the daemon's sample, which is up to a second old, has everything that came in.
fn settled_counts(line: &mut Line) -> Result<Counts> {
    let mut last = counts(line)?;
    let mut same_since = std::time::Instant::now();
    wait_until("nothing more comes", 3 * SOON, || {
        let Ok(now) = counts(line) else { return false };
        if (now.received, now.total()) != (last.received, last.total()) {
            (last, same_since) = (now, std::time::Instant::now());
        }
        same_since.elapsed() > Duration::from_millis(2100)
    })?;
    Ok(last)
}

#[test]
fn shares_follow_the_configured_capacity() -> Result<()> {
    let config = top(5.0) + &farm("web", VIP, &["10.0.0.0/24"], "capacity = { \"10.0.0.11\" = 3.0 }");
    let mut line = Line::start(Topology::builder().servers(2).build()?, &config)?;
    line.join_all(0..2)?;
    // Both begin slowly, not quite at the same time.
    let near = |percent: f64| {
        move |row: &serde_json::Value| row["slots_percent"].as_f64().is_some_and(|found| (found - percent).abs() < 1.0)
    };
    line.wait_for_row(0, "has three quarters of the slots", near(75.0))?;
    line.wait_for_row(1, "has one quarter of the slots", near(25.0))?;
    let talk = line.talk(400)?;
    let first = talk.iter().filter(|one| one.server() == "s1").count();
    // Five standard deviations of 8.7.
    assert!((256..=344).contains(&first), "{first} of 400 went to s1");
    assert_eq!(server_address(0), Ipv4Addr::new(10, 0, 0, 11));
    Ok(())
}
