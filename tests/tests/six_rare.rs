//! Fragments and ICMP errors of IPv6 end to end, with all three forwarding types.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use etherparse::{Icmpv6Type, Ipv6Slice, PacketBuilder, TcpSlice};
use necp_tests::{
    daemon::{NetworkElement, ServerElement},
    echo::UdpEcho,
    line::top,
    link,
    netns::wait_until,
    raw::RawSocket,
    topology::{CLIENT6, NE6, Topology, VIP6, server_address6},
};

const PATIENCE: Duration = Duration::from_secs(40);
const SOON: Duration = Duration::from_secs(10);
const TALK: u16 = 7;
const ECHO: u16 = 53;
/// A service that nobody listens on.
const DEAF: u16 = 9;

/// One server that is given its packets so, of which the client knows the VIP only.
struct One {
    _agent: ServerElement,
    ne: NetworkElement,
    _echo: UdpEcho,
    bed: Topology,
    /// The address that it is spoken to at.
    own: IpAddr,
}

impl One {
    fn start(forwarding: &str) -> Result<Self> {
        let layer_3 = forwarding == "l3";
        let bed = Topology::builder().servers(1).vip_on_servers(!layer_3).ipv6().build()?;
        bed.ne().sysctl(&[("net/ipv6/conf/all/forwarding", "1")])?;
        let server = bed.server(0);
        if layer_3 {
            server.ns().ip_batch(&format!("route replace 2001:db8:c::/64 via {NE6} dev eth0\n"))?;
        }
        let own: IpAddr = if layer_3 { server_address6(0).into() } else { VIP6.into() };
        let echo = UdpEcho::start(server.ns(), server.name(), &[own], ECHO)?;
        let config = top(1.0)
            + &format!(
                "[[farm]]\nname = \"six\"\nvips = [\"{VIP6}\"]\nservices = [\"tcp/{TALK}\", \"udp/{ECHO}\", \"udp/{DEAF}\"]\n\
                 forwarding = [\"{forwarding}\"]\nservers = [\"2001:db8:a::/64\"]\nauth = \"none\"\ntable_size = 251\n"
            );
        let ne = NetworkElement::start(&bed, &config)?;
        let address = SocketAddr::new(NE6.into(), 3262).to_string();
        let offers =
            [("tcp", TALK), ("udp", ECHO), ("udp", DEAF)].map(|(name, port)| format!("{name}/{port}={forwarding}"));
        let mut args = vec!["--ne", &address, "--retry-max", "1", "--keepalive", "1"];
        offers.iter().for_each(|offer| args.extend(["--serve", offer]));
        if forwarding == "gre" {
            args.push("--decap");
        }
        let agent = ServerElement::start_unconnected(&bed, server.ns(), server.name(), &args)?;
        wait_until("the server gets new flows", PATIENCE, || {
            ne.status().is_ok_and(|status| {
                let services = status["farms"][0]["services"].as_array().cloned().unwrap_or_default();
                let serves = |service: &serde_json::Value| {
                    let row = &service["servers"][0];
                    row["state"] == "up" && row["reachable"] == true && row["slots"] == 251
                };
                services.len() == 3 && services.iter().all(serves)
            })
        })?;
        Ok(Self { _agent: agent, ne, _echo: echo, bed, own })
    }

    fn udp(&self, port: u16) -> Result<UdpSocket> {
        let socket = self.bed.client().run(|| UdpSocket::bind((CLIENT6, 0)))?;
        socket.connect((VIP6, port))?;
        socket.set_read_timeout(Some(SOON))?;
        Ok(socket)
    }

    fn ask(&self, length: usize) -> Result<()> {
        let question: Vec<u8> = (0..length as u32).map(|n| (n.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
        let socket = self.udp(ECHO)?;
        socket.send(&question)?;
        let mut answer = vec![0; length + 100];
        let got = socket.recv(&mut answer).with_context(|| format!("no answer to {length} bytes"))?;
        ensure!(answer[..got] == [b"s1 ", &question[..]].concat(), "{got} bytes came back for {length}, not as sent");
        Ok(())
    }

    /// The counters of a status are of the last second.
    fn wait_until_counted(&self, reason: &str, least: u64) -> Result<()> {
        let counted = || -> Option<u64> {
            let status = self.ne.status().ok()?;
            let row = status["packets"].as_array()?.iter().find(|row| row["reason"] == reason)?.clone();
            row["packets"].as_u64()
        };
        wait_until(&format!("{least} are counted as {reason}"), SOON, || counted() >= Some(least))
    }
}

#[test]
fn ipv6_datagrams_in_parts_are_answered_whole() -> Result<()> {
    for forwarding in ["l2", "gre", "l3"] {
        let one = One::start(forwarding)?;
        // Nothing is fragmented on the way (RFC 8200 §5), and a tunnel is narrower.
        one.bed.client().ip_batch(&format!("route replace {VIP6}/128 dev eth0 mtu 1400\n"))?;
        for length in [100, 1340, 2000, 4000, 9000, 30_000] {
            one.ask(length).with_context(|| forwarding.to_owned())?;
        }
        one.wait_until_counted("part", 20).with_context(|| forwarding.to_owned())?;
    }
    Ok(())
}

#[test]
fn an_ipv6_client_hears_that_nobody_listens() -> Result<()> {
    for forwarding in ["l2", "gre", "l3"] {
        let one = One::start(forwarding)?;
        let socket = one.udp(DEAF)?;
        socket.send(b"anybody?")?;
        // Only an error that quotes the VIP, from which the client expects an answer, comes out of this socket.
        let heard = socket.recv(&mut [0; 16]).map_err(|error| error.kind());
        assert_eq!(heard, Err(ErrorKind::ConnectionRefused), "{forwarding}");
    }
    Ok(())
}

#[test]
fn a_router_tells_an_ipv6_server_what_it_cannot_send() -> Result<()> {
    for forwarding in ["l2", "gre", "l3"] {
        let one = One::start(forwarding)?;
        let server = one.bed.server(0).ns();
        let listener = server.run(|| TcpListener::bind((one.own, TALK)))?;
        let held = thread::spawn(move || listener.accept());
        let at_client = RawSocket::open(one.bed.client(), "eth0")?;
        let mut client = one.bed.client().run(|| TcpStream::connect_timeout(&(VIP6, TALK).into(), SOON))?;
        let (mut at_server, _) = held.join().expect("no panic")?;
        let port = client.local_addr()?.port();
        at_server.write_all(b"hello")?;
        client.set_read_timeout(Some(SOON))?;
        client.read_exact(&mut [0; 5])?;
        // What the server has sent last says what it would send next.
        let mut next = None;
        let of_server = |bytes: &[u8]| segment(bytes).is_some_and(|(from, to, _)| (from, to) == (TALK, port));
        while let Some(bytes) = at_client.receive(Duration::from_millis(300), of_server)? {
            next = segment(&bytes).map(|(_, _, next)| next);
        }
        let next = next.context("nothing of the server's was seen")?;
        let mut quoted = Vec::new();
        PacketBuilder::ipv6(VIP6.octets(), CLIENT6.octets(), 60)
            .tcp(TALK, port, next, 1000)
            .write(&mut quoted, &[0; 100])?;
        let error = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 0x77], link::mac(one.bed.ne(), "eth0")?)
            .ipv6("2001:db8:c::ff".parse::<std::net::Ipv6Addr>()?.octets(), VIP6.octets(), 64)
            .icmpv6(Icmpv6Type::PacketTooBig { mtu: 1300 });
        let mut frame = Vec::new();
        error.write(&mut frame, &quoted)?;
        RawSocket::open(one.bed.switch(), "ne0")?.send(&frame)?;
        let learned = || -> Result<bool> {
            let mut command = server.command("ip");
            let (to, from) = (CLIENT6.to_string(), one.own.to_string());
            let output = command.args(["-6", "route", "get", &to, "from", &from]).output()?;
            Ok(String::from_utf8_lossy(&output.stdout).contains("mtu 1300"))
        };
        wait_until(&format!("the server has learned of it ({forwarding})"), SOON, || learned().unwrap_or(false))?;
        // And the connection goes on.
        at_server.write_all(&[7; 50_000])?;
        let mut bytes = vec![0; 50_000];
        client.read_exact(&mut bytes)?;
        ensure!(bytes.iter().all(|&byte| byte == 7), "{forwarding}");
        one.wait_until_counted("quoted", 1).with_context(|| forwarding.to_owned())?;
    }
    Ok(())
}

/// Ports of an IPv6 TCP segment, and the sequence number that follows it.
fn segment(frame: &[u8]) -> Option<(u16, u16, u32)> {
    let ip = Ipv6Slice::from_slice(frame.get(14..)?).ok()?;
    let tcp = TcpSlice::from_slice(ip.payload().payload).ok()?;
    let length = tcp.payload().len() as u32 + u32::from(tcp.syn()) + u32::from(tcp.fin());
    Some((tcp.source_port(), tcp.destination_port(), tcp.sequence_number().wrapping_add(length)))
}
