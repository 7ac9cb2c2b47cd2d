//! IPv6 between two links: the network element stands between clients and servers, and sends on by the other interface.

use std::time::Duration;

use anyhow::{Context as _, Result};
use necp_tests::{
    both::{Both, names},
    conversation::{Conversation, all_answer, there_and_back},
    line::TALK,
    netns::wait_until,
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
    both.download(VIP6.into(), 12, "8m", || all_answer("downloads are under way", &mut talk))?;
    for _ in 0..4 {
        there_and_back(client, (VIP6, TALK))?;
    }
    all_answer("afterwards", &mut talk)
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
    let output = both.bed.client().command("ip").args(["-6", "route", "get", &VIP6.to_string()]).output()?;
    let route = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(route.contains(" mtu 1456 "), "{route}");
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
