//! GRE and layer 3 end to end: real clients, real servers, all three forwarding types behind one VIP.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use necp_tests::{
    conversation::{Conversation, all_answer, fresh_source, there_and_back},
    frame::{self, Flow, flags},
    line::{Line, TALK, TALK_AT_VIP, none_moved, one_farm},
    link,
    load::Client,
    netns::wait_until,
    nginx::{Content, Nginx},
    raw::RawSocket,
    topology::{Builder, NE, Topology, VIP, client_address, server_address},
};

const SOON: Duration = Duration::from_secs(10);
/// The bed's one farm, with these forwarding types and nginx's service besides.
fn config(forwarding: &str) -> String {
    let farm = one_farm(1.0).replace("forwarding = [\"l2\"]", &format!("forwarding = {forwarding}"));
    farm.replace("\"tcp/7\"", "\"tcp/7\", \"tcp/80\"")
}

fn offers(forwarding: &str) -> [String; 3] {
    ["tcp/7", "udp/53", "tcp/80"].map(|service| format!("{service}={forwarding}"))
}

fn start(line: &mut Line, index: usize, forwarding: &str, more: &[&str]) -> Result<()> {
    let offers = offers(forwarding);
    line.start_agent(index, &offers.each_ref().map(String::as_str), more)?;
    line.wait_for_row(index, &format!("serves by {forwarding}"), |row| {
        row["state"] == "up" && row["slots"].as_u64() > Some(0) && row["forwarding"] == forwarding
    })
}

/// A bed whose servers answer by way of the network element, and know no VIP.
fn behind_the_ne(builder: Builder) -> Result<Topology> {
    let bed = builder.vip_on_servers(false).build()?;
    bed.ne().sysctl(&[("net/ipv4/ip_forward", "1")])?;
    for server in bed.servers() {
        server.ns().ip_batch(&format!("route replace 198.18.0.0/16 via {NE}\n"))?;
    }
    Ok(bed)
}

fn nginx(bed: &Topology, content: &Content) -> Result<Vec<Nginx>> {
    let start = |server: &necp_tests::topology::Server| Nginx::start(bed, server.ns(), server.name(), &[80], content);
    bed.servers().iter().map(start).collect()
}

fn downloads(line: &Line, content: &Content, count: usize) -> Result<()> {
    let client = Client::new(SocketAddrV4::new(VIP, 80));
    for index in 0..count {
        let ns = line.bed().client().clone();
        let outcome = ns.block_on(client.download(client_address(index), "/big", content, |_| ()));
        ensure!(outcome.failure.is_none() && outcome.bytes == content.length, "download {index}: {outcome:?}");
    }
    Ok(())
}

fn packets(line: &mut Line, reason: &str) -> Result<u64> {
    let status = line.ne().status()?;
    let rows = status["packets"].as_array().context("a list")?;
    Ok(rows.iter().find(|row| row["reason"] == reason).and_then(|row| row["packets"].as_u64()).unwrap_or(0))
}

#[test]
fn three_forwarding_types_behind_one_vip() -> Result<()> {
    let bed = Topology::builder().servers(3).build()?;
    bed.ne().sysctl(&[("net/ipv4/ip_forward", "1")])?;
    // The third answers by way of the network element, and has no VIP.
    let third = bed.server(2).ns();
    third.ip_batch(&format!("addr del {VIP}/32 dev lo\nroute replace 198.18.0.0/16 via {NE}\n"))?;
    let content = Content::new(&bed, 2 << 20)?;
    let _nginx = nginx(&bed, &content)?;
    let mut line = Line::start(bed, &config("[\"l2\", \"gre\", \"l3\"]"))?;
    start(&mut line, 0, "l2", &[])?;
    start(&mut line, 1, "gre", &["--decap"])?;
    start(&mut line, 2, "l3", &[])?;
    line.expect_new_flows_at("three types", &["s1", "s2", "s3"])?;
    let (mut talk, mut echo) = (line.talk(60)?, line.echo(60)?);
    all_answer("three types", &mut talk)?;
    none_moved("three types", &mut echo)?;
    for _ in 0..12 {
        there_and_back(line.bed().client(), TALK_AT_VIP)?;
    }
    downloads(&line, &content, 12)
}

#[test]
fn a_changed_type_is_for_new_flows_only() -> Result<()> {
    let bed = Topology::builder().servers(2).build()?;
    bed.ne().sysctl(&[("net/ipv4/ip_forward", "1")])?;
    let mut line = Line::start(bed, &config("[\"l2\", \"gre\"]"))?;
    start(&mut line, 0, "l2", &[])?;
    start(&mut line, 1, "l2", &[])?;
    let (mut talk, mut echo) = (line.talk(60)?, line.echo(60)?);
    line.kill_agent(0);
    start(&mut line, 0, "gre", &["--decap"])?;
    all_answer("the first server wants GRE now", &mut talk)?;
    none_moved("the first server wants GRE now", &mut echo)?;
    let mut new = line.talk(40)?;
    ensure!(new.iter().any(|one| one.server() == "s1"), "the first server has new connections");
    new.retain(|one| one.server() == "s1");
    // At the switch: at the server the program unwraps them before anybody looks.
    let arrives = RawSocket::open(line.bed().switch(), "ne0")?;
    all_answer("in GRE", &mut new)?;
    // A datagram in GRE, from the network element to the server (RFC 791 §3.1: protocol, addresses).
    let is_gre = |frame: &[u8]| {
        frame.get(23) == Some(&47) && frame.get(26..34) == Some(&[NE.octets(), server_address(0).octets()].concat()[..])
    };
    arrives.receive(SOON, is_gre)?.context("nothing came in GRE")?;
    all_answer("both types", &mut talk)
}

#[test]
fn a_tunnel_is_narrower_and_the_client_is_told() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    bed.ne().sysctl(&[("net/ipv4/ip_forward", "1")])?;
    let mut line = Line::start(bed, &config("[\"gre\"]"))?;
    start(&mut line, 0, "gre", &["--decap"])?;
    let path_mtu = |line: &Line| -> Result<String> {
        let output = line.bed().client().command("ip").args(["route", "get", &VIP.to_string()]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.split_whitespace().skip_while(|word| *word != "mtu").nth(1).unwrap_or("none").to_owned())
    };
    assert_eq!(path_mtu(&line)?, "none");
    there_and_back(line.bed().client(), TALK_AT_VIP)?;
    assert_eq!(path_mtu(&line)?, "1476", "1500 less 24 (RFC 2784)");
    wait_until("that is counted", SOON, || packets(&mut line, "too-big").is_ok_and(|count| count > 0))?;

    // A router on the way to the server says that 1400 bytes are the most there (RFC 1191 §4).
    let switch = line.bed().switch();
    let router = RawSocket::open(switch, "ne0")?;
    let mut quoted = frame::ipv4_header(47, 1500, NE, server_address(0));
    quoted.extend([0, 0, 0x08, 0, 0x45, 0, 0x05, 0xc4]);
    let ne_mac = link::mac(line.bed().ne(), "eth0")?;
    router.send(&frame::needs_fragmentation(ne_mac, Ipv4Addr::new(10, 0, 0, 254), 1400, &quoted))?;
    let learned = |line: &Line| -> Result<bool> {
        let output = line.bed().ne().command("ip").args(["route", "get", &server_address(0).to_string()]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).contains("mtu 1400"))
    };
    wait_until("the kernel has learned of it", SOON, || learned(&line).unwrap_or(false))?;
    wait_until("the client has learned of it", SOON, || {
        there_and_back(line.bed().client(), TALK_AT_VIP).is_ok() && path_mtu(&line).is_ok_and(|mtu| mtu == "1376")
    })
}

#[test]
fn what_may_be_fragmented_is_by_the_kernel() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    bed.ne().sysctl(&[("net/ipv4/ip_forward", "1")])?;
    let mut line = Line::start(bed, &config("[\"gre\"]"))?;
    start(&mut line, 0, "gre", &[])?;
    let (client, server) = (line.bed().client(), line.bed().server(0));
    let flow = Flow {
        source_mac: link::mac(client, "eth0")?,
        destination_mac: link::mac(line.bed().ne(), "eth0")?,
        source: fresh_source(),
        destination: SocketAddrV4::new(VIP, 53),
        ttl: 64,
    };
    let at_server = RawSocket::open(server.ns(), "eth0")?;
    let mut frame = flow.udp(&[7; 1472]);
    // It may be fragmented: the flag goes, and its part of the header's checksum.
    if frame[20] & 0x40 != 0 {
        frame[20] &= !0x40;
        let sum = u32::from(u16::from_be_bytes([frame[24], frame[25]])) + 0x4000;
        let sum = ((sum & 0xffff) + (sum >> 16)) as u16;
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }
    RawSocket::open(client, "eth0")?.send(&frame)?;
    let fragment = |more: bool| {
        move |frame: &[u8]| {
            let [high, low] = [frame[20], frame[21]];
            frame[23] == 47
                && frame[26..30] == NE.octets()
                && (high & 0x20 != 0) == more
                && (more || high & 0x1f != 0 || low != 0)
        }
    };
    at_server.receive(SOON, fragment(true))?.context("no first fragment")?;
    at_server.receive(SOON, fragment(false))?.context("no last fragment")?;
    wait_until("it is counted", SOON, || packets(&mut line, "fragmenting").is_ok_and(|count| count == 1))
}

#[test]
fn layer_3_on_a_stick() -> Result<()> {
    layer_3_both_ways(behind_the_ne(Topology::builder().servers(2))?)
}

#[test]
fn layer_3_between_two_links() -> Result<()> {
    layer_3_both_ways(behind_the_ne(Topology::builder().two_interfaces().servers(2))?)
}

fn layer_3_both_ways(bed: Topology) -> Result<()> {
    let content = Content::new(&bed, 2 << 20)?;
    let _nginx = nginx(&bed, &content)?;
    let mut line = Line::start(bed, &config("[\"l3\"]"))?;
    start(&mut line, 0, "l3", &[])?;
    start(&mut line, 1, "l3", &[])?;
    line.expect_new_flows_at("layer 3", &["s1", "s2"])?;
    let (mut talk, mut echo) = (line.talk(60)?, line.echo(60)?);
    all_answer("layer 3", &mut talk)?;
    none_moved("layer 3", &mut echo)?;
    for _ in 0..6 {
        there_and_back(line.bed().client(), TALK_AT_VIP)?;
    }
    downloads(&line, &content, 6)?;

    // Who speaks to the server itself is left alone, also while the same server has flows of the VIP.
    let own = SocketAddrV4::new(server_address(0), TALK);
    let mut direct = Conversation::open_many(line.bed().client(), 5, own)?;
    all_answer("the server's own address", &mut direct)?;
    ensure!(direct.iter().all(|one| one.server() == "s1"));

    // One leaves: its connections go on, both ways.
    line.agent(0).command(&["drain"])?;
    line.expect_new_flows_at("s1 is drained", &["s2"])?;
    all_answer("s1 is drained", &mut talk)?;
    none_moved("s1 is drained", &mut echo)?;
    wait_until("replies are counted", SOON, || packets(&mut line, "reply").is_ok_and(|count| count > 0))
}

#[test]
fn replies_that_pass_elsewhere_are_shown() -> Result<()> {
    // The servers know another way to the clients than the network element.
    let bed = Topology::builder().two_interfaces().servers(1).vip_on_servers(false).build()?;
    let mut line = Line::start(bed, &config("[\"l3\"]"))?;
    start(&mut line, 0, "l3", &[])?;
    let client = RawSocket::open(line.bed().client(), "eth0")?;
    let flow = |number: u16| -> Result<Flow> {
        Ok(Flow {
            source_mac: link::mac(line.bed().client(), "eth0")?,
            destination_mac: link::mac(line.bed().ne(), "eth0")?,
            source: SocketAddrV4::new(client_address(3), 2000 + number),
            destination: TALK_AT_VIP,
            ttl: 64,
        })
    };
    for number in 0..50 {
        client.send(&flow(number)?.tcp(flags::SYN, 1, 0, b""))?;
    }
    line.wait_for_row(0, "is shown as one-way", |row| row["one_way"] == true)?;
    let alarms = line.ne().status()?["alarms"].to_string();
    ensure!(alarms.contains("no reply of 10.0.0.11 (tcp/7 by l3) passes here"), "{alarms}");
    Ok(())
}
