//! Fragments, ICMP errors and VLAN tags end to end. This kernel has no VLAN interfaces: tagged frames are sent and seen by
//! packet sockets.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use etherparse::PacketBuilder;
use necp_tests::{
    both::{Both, WEB},
    conversation::{all_answer, fresh_source},
    frame,
    line::{ECHO_AT_VIP, Line, TALK_AT_VIP, one_farm},
    link::{self, Offload},
    netns::{Namespace, wait_until},
    raw::RawSocket,
    topology::{CLIENT6, NE, NE6, Topology, VIP, VIP6, client_address, server_address},
};

const SOON: Duration = Duration::from_secs(10);
/// A service that nobody listens on.
const DEAF: u16 = 9;

/// One server that is given its packets so; by layer 3 it answers by way of the network element.
fn one_server(forwarding: &str) -> Result<Line> {
    let bed = Topology::builder().servers(1).vip_on_servers(forwarding != "l3").build()?;
    bed.ne().sysctl(&[("net/ipv4/ip_forward", "1")])?;
    if forwarding == "l3" {
        bed.server(0).ns().ip_batch(&format!("route replace 198.18.0.0/16 via {NE}\n"))?;
    }
    let config = one_farm(1.0)
        .replace("[\"l2\"]", &format!("[\"{forwarding}\"]"))
        .replace("\"udp/53\"", "\"udp/53\", \"udp/9\"");
    let mut line = Line::start(bed, &config)?;
    let offers = ["tcp/7", "udp/53", "udp/9"].map(|service| format!("{service}={forwarding}"));
    let decap: &[&str] = if forwarding == "gre" { &["--decap"] } else { &[] };
    line.start_agent(0, &offers.each_ref().map(String::as_str), decap)?;
    line.wait_until_serving(0)?;
    Ok(line)
}

fn ask(client: &Namespace, length: usize) -> Result<()> {
    let question: Vec<u8> = (0..length as u32).map(|n| (n.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
    let socket = client.run(|| UdpSocket::bind(fresh_source()))?;
    socket.connect(ECHO_AT_VIP)?;
    socket.set_read_timeout(Some(SOON))?;
    socket.send(&question)?;
    let mut answer = vec![0; length + 100];
    let got = socket.recv(&mut answer).with_context(|| format!("no answer to {length} bytes"))?;
    let expected = [b"s1 ", &question[..]].concat();
    ensure!(answer[..got] == expected, "{got} bytes came back for {length}, not as they were sent");
    Ok(())
}

#[test]
fn datagrams_in_parts_are_answered_whole() -> Result<()> {
    for forwarding in ["l2", "gre", "l3"] {
        let line = one_server(forwarding)?;
        // A tunnel is narrower; what is fragmented outside, `--decap` cannot put together.
        let route = format!("route replace {VIP}/32 dev eth0 mtu 1400\n");
        line.bed().client().ip_batch(&route)?;
        for length in [100, 1400, 2000, 4000, 9000, 30_000] {
            ask(line.bed().client(), length).with_context(|| forwarding.to_owned())?;
        }
    }
    Ok(())
}

#[test]
fn a_router_tells_the_server_what_it_cannot_send() -> Result<()> {
    for forwarding in ["l2", "gre", "l3"] {
        let line = one_server(forwarding)?;
        let at_client = RawSocket::open(line.bed().client(), "eth0")?;
        let mut talk = line.talk(1)?;
        let client = talk[0].local_v4();
        // What the server has sent last says what it would send next.
        let mut next = None;
        while let Some(bytes) = at_client.receive(Duration::from_millis(300), |bytes| {
            frame::parse(bytes).is_some_and(|seen| seen.flow.source == TALK_AT_VIP && seen.flow.destination == client)
        })? {
            let tcp = &bytes[34..];
            let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
            let total = u32::from(u16::from_be_bytes([bytes[16], bytes[17]]));
            let payload = total - 20 - u32::from(tcp[12] >> 4) * 4;
            let syn = u32::from(tcp[13] & 0x02 != 0);
            next = Some(sequence.wrapping_add(payload + syn));
        }
        let next = next.context("nothing of the server's was seen")?;
        let mut quoted = frame::ipv4_header(6, 1500, VIP, *client.ip());
        quoted.extend([TALK_AT_VIP.port().to_be_bytes(), client.port().to_be_bytes()].concat());
        quoted.extend(next.to_be_bytes());
        let ne_mac = link::mac(line.bed().ne(), "eth0")?;
        let error = frame::needs_fragmentation(ne_mac, Ipv4Addr::new(198, 18, 255, 1), 1200, &quoted);
        RawSocket::open(line.bed().switch(), "ne0")?.send(&error)?;
        let learned = || -> Result<bool> {
            let mut command = line.bed().server(0).ns().command("ip");
            let source = if forwarding == "l3" { server_address(0) } else { VIP };
            let output =
                command.args(["route", "get", &client.ip().to_string(), "from", &source.to_string()]).output()?;
            Ok(String::from_utf8_lossy(&output.stdout).contains("mtu 1200"))
        };
        wait_until(&format!("the server has learned of it ({forwarding})"), SOON, || learned().unwrap_or(false))?;
        all_answer("afterwards", &mut talk)?;
    }
    Ok(())
}

#[test]
fn a_client_hears_that_nobody_listens() -> Result<()> {
    for forwarding in ["l2", "gre", "l3"] {
        let line = one_server(forwarding)?;
        let socket = line.bed().client().run(|| UdpSocket::bind(fresh_source()))?;
        socket.connect(SocketAddrV4::new(VIP, DEAF))?;
        socket.set_read_timeout(Some(SOON))?;
        socket.send(b"anybody?")?;
        // Only an error that quotes the VIP, from which the client expects an answer, comes out of this socket.
        let heard = socket.recv(&mut [0; 16]).map_err(|error| error.kind());
        assert_eq!(heard, Err(ErrorKind::ConnectionRefused), "{forwarding}");
    }
    Ok(())
}

#[test]
fn other_protocols_are_told_apart_by_their_addresses() -> Result<()> {
    /// SCTP (RFC 9260), of which nothing is read.
    const SCTP: u8 = 132;
    let bed = Topology::builder().servers(2).build()?;
    let config = one_farm(1.0).replace("\"udp/53\"", "\"udp/53\", \"132\"");
    let mut line = Line::start(bed, &config)?;
    for index in 0..2 {
        line.start_agent(index, &["tcp/7=l2", "132=l2"], &[])?;
        line.wait_until_serving(index)?;
    }
    let bed = line.bed();
    let at_servers = [0, 1].map(|index| RawSocket::open(bed.server(index).ns(), "eth0"));
    let client = RawSocket::open(bed.client(), "eth0")?;
    let (from, to) = (link::mac(bed.client(), "eth0")?, link::mac(bed.ne(), "eth0")?);
    let mut got = [0, 0];
    for number in 0..40 {
        let source = client_address(number);
        let header = frame::ipv4_header(SCTP, 36, source, VIP);
        // The ports differ from packet to packet, and mean nothing.
        let mut at = Vec::new();
        for first in [1u8, 2, 3] {
            let bytes =
                [&to[..], &from, &[0x08, 0x00], &header, &[first, number as u8, 0, 0, 0, 0, 0, 0], &[0; 8]].concat();
            client.send(&bytes)?;
            let ours =
                |bytes: &[u8]| bytes.get(23) == Some(&SCTP) && bytes[26..30] == source.octets() && bytes[34] == first;
            for (index, socket) in at_servers.iter().enumerate() {
                let socket = socket.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
                if socket.receive(Duration::from_millis(if index == 0 { 50 } else { 500 }), ours)?.is_some() {
                    at.push(index);
                    break;
                }
            }
        }
        ensure!(at.len() == 3 && at.iter().all(|index| *index == at[0]), "packets of {source} went to {at:?}");
        got[at[0]] += 1;
    }
    // That one of two gets none of 40 has odds below 1 to 10^11.
    ensure!(got[0] > 0 && got[1] > 0, "{got:?}");
    Ok(())
}

#[test]
fn a_vip_answers_echo_or_not_as_configured() -> Result<()> {
    for answers in [true, false] {
        let config = one_farm(1.0) + &format!("echo = {answers}\n");
        let mut line = Line::start(Topology::builder().servers(1).build()?, &config)?;
        let patience = if answers { SOON } else { Duration::from_secs(1) };
        let answer = link::ping(line.bed().client(), VIP, patience);
        ensure!(answer.is_ok() == answers, "echo = {answers}: {answer:?}");
        link::ping(line.bed().client(), NE, SOON)?;
        let status = line.ne().status()?;
        let dropped = status["packets"].as_array().into_iter().flatten().find(|row| row["reason"] == "echo");
        ensure!(dropped.is_some(), "there is no counter of it");
    }
    Ok(())
}

/// SYNs to the web service from this port, over IPv4 and IPv6.
fn syns(from: [u8; 6], to: [u8; 6], port: u16) -> Result<[Vec<u8>; 2]> {
    let (mut four, mut six) = (Vec::new(), Vec::new());
    let link = PacketBuilder::ethernet2(from, to);
    link.ipv4(client_address(0).octets(), VIP.octets(), 64).tcp(port, WEB, 1, 1000).syn().write(&mut four, &[])?;
    let link = PacketBuilder::ethernet2(from, to);
    link.ipv6(CLIENT6.octets(), VIP6.octets(), 64).tcp(port, WEB, 1, 1000).syn().write(&mut six, &[])?;
    Ok([four, six])
}

fn with_tags(frame: &[u8], tags: &[[u8; 4]]) -> Vec<u8> {
    [&frame[..12], tags.concat().as_slice(), &frame[12..]].concat()
}

#[test]
fn tags_stay_where_they_are() -> Result<()> {
    // Priority and number of a VLAN (IEEE 802.1Q), and a provider's outside of it (802.1ad).
    const VLAN: [u8; 4] = [0x81, 0x00, 0x60, 0x64];
    const OTHER: [u8; 4] = [0x81, 0x00, 0x00, 0x07];
    const PROVIDER: [u8; 4] = [0x88, 0xa8, 0x20, 0x2a];
    let mut both = Both::start(1, &["l2"], "")?;
    both.join(0, &[NE.into(), NE6.into()], "l2", &[])?;
    let (bed, server) = (&both.bed, both.bed.server(0));
    let (client_mac, ne_mac) = (link::mac(bed.client(), "eth0")?, link::mac(bed.ne(), "eth0")?);
    let at_server = RawSocket::open(server.ns(), "eth0")?;
    let arrives = |sent: &[u8], packet: &[u8]| -> Result<()> {
        let came = at_server.receive(SOON, |frame| frame.ends_with(&packet[14..]))?.context("nothing came")?;
        let expected = [&server.mac()?[..], &ne_mac, &sent[12..]].concat();
        ensure!(came == expected, "sent was {sent:02x?}, what came is {came:02x?}");
        Ok(())
    };
    // As the network element's link has them.
    let at_ne = RawSocket::open(bed.switch(), "ne0")?;
    let stacks: [&[[u8; 4]]; 4] = [&[], &[VLAN], &[PROVIDER, VLAN], &[OTHER, VLAN]];
    for (port, tags) in (30_000..).zip(stacks) {
        for packet in syns(client_mac, ne_mac, port)? {
            let frame = with_tags(&packet, tags);
            at_ne.send(&frame)?;
            arrives(&frame, &packet).with_context(|| format!("tags {tags:02x?}"))?;
        }
    }
    // From the client: the bridge takes the tag out, and veth hands it on beside the frame unless it is told to put it in.
    let at_client = RawSocket::open(bed.client(), "eth0")?;
    for (port, hidden) in [(30_010, true), (30_011, false)] {
        link::set_offload(bed.switch(), "ne0", Offload::TxVlan, hidden)?;
        for packet in syns(client_mac, ne_mac, port)? {
            let frame = with_tags(&packet, &[VLAN]);
            at_client.send(&frame)?;
            arrives(if hidden { &packet } else { &frame }, &packet).with_context(|| format!("hidden: {hidden}"))?;
        }
    }
    Ok(())
}
