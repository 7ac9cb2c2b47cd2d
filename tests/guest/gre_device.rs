//! GRE ends at the device that a server's own kernel makes (draft §5.6.1): the agent has no `--decap`.
//!
//! For a kernel that makes such devices: `cargo xtask test --kernels` boots some.

use std::net::UdpSocket;

use anyhow::{Context as _, Result, ensure};
use necp_tests::{
    conversation::{PATIENCE, all_answer, fresh_source, there_and_back},
    line::{ECHO_AT_VIP, Line, TALK_AT_VIP, none_moved, one_farm},
    netns::Namespace,
    topology::{Topology, VIP},
};
use serde_json::Value;

#[test]
fn the_kernels_own_device_takes_what_comes_in_gre() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    bed.ne().sysctl(&[("net/ipv4/ip_forward", "1")])?;
    // The bed's hosts do not ask whether a datagram's source lies behind the device that it came by (rp_filter 0).
    let server = bed.server(0);
    server.ns().ip_batch(&format!("link add gre1 type gre local {} remote any\nlink set gre1 up\n", server.ip()))?;
    let config = one_farm(5.0).replace("forwarding = [\"l2\"]", "forwarding = [\"gre\"]");
    let mut line = Line::start(bed, &config)?;
    line.start_agent(0, &["tcp/7=gre", "udp/53=gre"], &["--keepalive", "5"])?;
    line.wait_for_row(0, "serves by GRE", |row| {
        row["state"] == "up" && row["slots"].as_u64() > Some(0) && row["forwarding"] == "gre"
    })?;

    let (mut talk, mut echo) = (line.talk(20)?, line.echo(20)?);
    all_answer("the kernel's GRE device", &mut talk)?;
    none_moved("the kernel's GRE device", &mut echo)?;
    ensure!(talk.iter().all(|one| one.server() == "s1"), "somebody else answers");

    // Each part is fragmented again on its way, so the server's kernel has to put them together twice.
    for length in [4000, 20_000] {
        echo_whole(line.bed().client(), length)?;
    }

    assert_eq!(path_mtu(&line)?, "none");
    there_and_back(line.bed().client(), TALK_AT_VIP)?;
    assert_eq!(path_mtu(&line)?, "1476", "1500 less 24 (RFC 2784)");

    // A megabyte in segments of at most 1436 bytes, and what came before.
    let taken = received(&line)?;
    println!("gre1 took {taken} datagrams");
    ensure!(taken > 700, "the device took only {taken} datagrams");
    Ok(())
}

/// A datagram of this length, to the echo server and back.
fn echo_whole(client: &Namespace, length: usize) -> Result<()> {
    let question: Vec<u8> = (0..length as u32).map(|n| (n.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
    let socket = client.run(|| UdpSocket::bind(fresh_source()))?;
    socket.connect(ECHO_AT_VIP)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(&question)?;
    let mut answer = vec![0; length + 100];
    let got = socket.recv(&mut answer).with_context(|| format!("no answer to {length} bytes"))?;
    ensure!(answer[..got] == [b"s1 ", &question[..]].concat(), "what came back of {length} bytes is not what was sent");
    Ok(())
}

/// The MTU that the client has learned on the way to the VIP.
fn path_mtu(line: &Line) -> Result<String> {
    let output = line.bed().client().command("ip").args(["route", "get", &VIP.to_string()]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().skip_while(|word| *word != "mtu").nth(1).unwrap_or("none").to_owned())
}

/// Datagrams that the server's GRE device took in.
fn received(line: &Line) -> Result<u64> {
    let server = line.bed().server(0).ns();
    let output = server.command("ip").args(["-json", "-statistics", "link", "show", "gre1"]).output()?;
    let links: Value = serde_json::from_slice(&output.stdout)?;
    links[0]["stats64"]["rx"]["packets"].as_u64().with_context(|| format!("no count in {links}"))
}
