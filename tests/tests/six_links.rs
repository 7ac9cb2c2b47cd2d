//! IPv6 over more than one link: the network element stands between clients and servers, and sends on by the other interface;
//! or a router stands between it and a server.

use std::{
    io::Read as _,
    net::{Ipv6Addr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use necp_tests::{
    both::{Both, names},
    conversation::{Conversation, all_answer, comes_back, there_and_back},
    line::TALK,
    netns::{Namespace, wait_until},
    topology::{NE6, Topology, VIP6, server_address6},
};

const SOON: Duration = Duration::from_secs(10);

/// Two servers that are given their packets so; by layer 3 they answer by way of the network element, and know no VIP.
fn between_two_links(forwarding: &str, more: &[&str]) -> Result<Both> {
    let layer_3 = forwarding == "l3";
    let bed = Topology::builder().two_interfaces().servers(2).vip_on_servers(!layer_3).ipv6().build()?;
    for server in bed.servers().iter().filter(|_| layer_3) {
        server.ns().ip_batch(&format!("route replace 2001:db8:c::/64 via {NE6} dev eth0\n"))?;
    }
    let mut both = Both::start_in(bed, &[forwarding], "", |_| Ok(String::new()))?;
    (0..2).try_for_each(|index| both.join(index, &[NE6.into()], forwarding, more))?;
    let interfaces = both.ne.status()?["interfaces"].clone();
    let interfaces = interfaces.as_array().context("a list")?;
    assert!(interfaces.len() == 2 && interfaces.iter().all(|one| one["mode"] == "native"), "{interfaces:?}");
    Ok(both)
}

/// Everything that a client does, and what the servers were sent by the packet path.
fn serves(both: &Both) -> Result<()> {
    assert_eq!(both.who(VIP6.into(), 40)?, names(&["s1", "s2"]));
    let client = both.bed.client();
    let mut talk = Conversation::open_many(client, 40, (VIP6, TALK))?;
    both.download(VIP6.into(), 12, "4m", || all_answer("downloads are under way", &mut talk))?;
    for _ in 0..4 {
        there_and_back(client, (VIP6, TALK))?;
    }
    all_answer("afterwards", &mut talk)
}

/// What a host knows of the way there; `none` if it is as wide as the link.
fn path_mtu(ns: &Namespace, to: Ipv6Addr) -> Result<String> {
    let output = ns.command("ip").args(["-6", "route", "get", &to.to_string()]).output()?;
    let route = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(route.split_whitespace().skip_while(|word| *word != "mtu").nth(1).unwrap_or("none").to_owned())
}

fn packets(both: &Both, reason: &str) -> Option<u64> {
    let status = both.ne.status().ok()?;
    status["packets"].as_array()?.iter().find(|row| row["reason"] == reason)?["packets"].as_u64()
}

#[test]
fn ipv6_layer_2_between_two_links() -> Result<()> {
    let both = between_two_links("l2", &[])?;
    serves(&both)?;
    // A client on the servers' link comes in by the other interface, and goes out by it again.
    let guest = both.bed.switch();
    guest.ip_batch(&format!("route add {VIP6} via {NE6} dev br1\n"))?;
    let mut conversation = Conversation::open_as_host(guest, (VIP6, TALK))?;
    assert_eq!(conversation.local().ip().to_string(), "2001:db8:a::fe");
    conversation.ask()
}

#[test]
fn ipv6_gre_between_two_links() -> Result<()> {
    let both = between_two_links("gre", &["--decap"])?;
    serves(&both)?;
    // What was too long for the tunnel the client was told of, on its own link (RFC 2473 §7.1).
    assert_eq!(path_mtu(both.bed.client(), VIP6)?, "1456");
    wait_until("that is counted", SOON, || packets(&both, "too-big") > Some(0))
}

#[test]
fn ipv6_layer_3_between_two_links() -> Result<()> {
    let mut both = between_two_links("l3", &[])?;
    serves(&both)?;
    // Who speaks to the server itself is left alone, also while the same server has flows of the VIP.
    let mut direct = Conversation::open_many(both.bed.client(), 5, (server_address6(0), TALK))?;
    all_answer("the server's own address", &mut direct)?;
    assert!(direct.iter().all(|one| one.server() == "s1"));
    // One leaves: its connections go on, both ways.
    let mut talk = Conversation::open_many(both.bed.client(), 40, (VIP6, TALK))?;
    let agent = both.agents[0].as_mut().context("an agent")?;
    assert!(agent.command(&["drain"])?.status.success());
    assert_eq!(both.who(VIP6.into(), 30)?, names(&["s2"]));
    all_answer("s1 is drained", &mut talk)?;
    assert!(talk.iter().any(|one| one.server() == "s1"), "s1 had none of 40");
    wait_until("replies are counted", SOON, || packets(&both, "reply") > Some(0))
}

/// Puts a router between the switch and the first server: `near` is its end towards the network element, `far` that towards the
/// server, which keeps its address.
fn router_before_the_server(bed: &Topology) -> Result<Namespace> {
    let (server, router) = (bed.server(0), Namespace::create(bed.name(), "router")?);
    let own = server_address6(0);
    router.sysctl(&[("net/ipv6/conf/all/forwarding", "1"), ("net/ipv6/conf/default/accept_dad", "0")])?;
    let (port, name) = (server.name(), router.name());
    bed.switch().ip_batch(&format!(
        "link set {port} netns {name}\nlink add r0 type veth peer name near netns {name}\nlink set r0 master br0 up\n"
    ))?;
    router.ip_batch(&format!(
        "link set {port} name far\nlink set far up\nlink set near up\naddr add 2001:db8:a::fe/64 dev near\n\
         addr add 2001:db8:b::fe/64 dev far\nroute add {own}/128 dev far\nroute add 2001:db8:c::/64 dev near\n"
    ))?;
    server.ns().ip_batch(&format!(
        "route del 2001:db8:c::/64 dev eth0\naddr flush dev eth0 scope global\naddr add {own}/128 dev eth0\naddr add 2001:db8:b::11/64 dev eth0\n\
         route add default via 2001:db8:b::fe dev eth0\n"
    ))?;
    bed.ne().ip_batch(&format!("route add {own}/128 via 2001:db8:a::fe dev eth0\n"))?;
    Ok(router)
}

#[test]
fn an_ipv6_path_that_becomes_narrower_is_found() -> Result<()> {
    let bed = Topology::builder().servers(1).ipv6().build()?;
    let router = router_before_the_server(&bed)?;
    // What is forgotten after 10 minutes is forgotten sooner here.
    bed.ne().sysctl(&[("net/ipv6/route/mtu_expires", "6")])?;
    let mut both = Both::start_in(bed, &["gre"], "", |_| Ok(String::new()))?;
    let own = server_address6(0);
    both.join(0, &[NE6.into()], "gre", &["--decap", "--source", &own.to_string()])?;
    let (client, ne, server) = (both.bed.client(), both.bed.ne(), both.bed.server(0).ns());

    let mut held = client.run(|| TcpStream::connect((VIP6, TALK)))?;
    held.set_read_timeout(Some(SOON))?;
    held.read_exact(&mut [0; 3])?;
    back_again(&held, 1)?;
    assert_eq!((path_mtu(client, VIP6)?.as_str(), path_mtu(ne, own)?.as_str()), ("1456", "none"));

    both.download(VIP6.into(), 3, "1500k", || {
        router.ip_batch("link set far mtu 1400\n")?;
        server.ip_batch("link set eth0 mtu 1400\n")?;
        // The router says so to the tunnel's beginning (RFC 4443 §3.2), and that to the client: 44 bytes less.
        back_again(&held, 2)?;
        assert_eq!((path_mtu(client, VIP6)?.as_str(), path_mtu(ne, own)?.as_str()), ("1356", "1400"));
        there_and_back(client, (VIP6, TALK))
    })?;

    // The path is wide again, and the kernel forgets; a new route has the daemon look, which it does every minute anyway.
    router.ip_batch("link set far mtu 1500\n")?;
    server.ip_batch("link set eth0 mtu 1500\n")?;
    wait_until("the kernel has forgotten", SOON, || path_mtu(ne, own).is_ok_and(|mtu| mtu == "none"))?;
    ne.ip_batch("route add 2001:db8:ffff::/64 dev eth0\n")?;
    wait_until("the tunnel is as wide as before", SOON, || {
        let flushed = client.command("ip").args(["-6", "route", "flush", "cache"]).status();
        flushed.is_ok_and(|status| status.success())
            && back_again(&held, 3).is_ok()
            && path_mtu(client, VIP6).is_ok_and(|mtu| mtu == "1456")
    })
}

/// Sends more than fits a window over a held connection, and expects it back.
fn back_again(stream: &TcpStream, seed: u32) -> Result<()> {
    let sent: Vec<u8> = (0..100_000u32).flat_map(|n| (n ^ seed).wrapping_mul(0x9e37_79b1).to_le_bytes()).collect();
    comes_back(stream, &sent)
}
