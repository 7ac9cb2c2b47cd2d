//! Checksums that a sender on veth leaves to its card, which is none: what becomes of them.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use necp_tests::{
    both::Both,
    conversation::{connect_from, there_and_back},
    daemon::NECP_PORT,
    line::TALK,
    link::{self, Offload},
    netns::Namespace,
    topology::{NE, NE6, Topology, VIP, VIP6},
};

/// How long a connection may take that is to be made, and one that is not.
const SOON: Duration = Duration::from_secs(10);
const LONG_ENOUGH: Duration = Duration::from_millis(1500);

/// A server of both families that is given its packets so, and a network element in this mode.
fn one_server(mode: &str, forwarding: &str) -> Result<Both> {
    let layer_3 = forwarding == "l3";
    let bed = Topology::builder().servers(1).vip_on_servers(!layer_3).ipv6().build()?;
    if layer_3 {
        bed.server(0).ns().ip_batch(&format!(
            "route replace 198.18.0.0/16 via {NE}\nroute replace 2001:db8:c::/64 via {NE6} dev eth0\n"
        ))?;
    }
    let mut both = Both::start_in(bed, &[forwarding], &format!("mode = \"{mode}\"\n"), |_| Ok(String::new()))?;
    let more: &[&str] = if forwarding == "gre" { &["--decap"] } else { &[] };
    both.join(0, &[NE.into(), NE6.into()], forwarding, more)?;
    Ok(both)
}

/// TCP segments that a host has dropped for their checksum, of either family.
fn wrong_checksums(ns: &Namespace) -> Result<u64> {
    let text = ns.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().context("names")?, lines.next().context("values")?);
    let found = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == "InCsumErrors");
    Ok(found.context("InCsumErrors")?.1.parse()?)
}

fn connects(both: &Both, to: impl Into<IpAddr>, port: u16, patience: Duration) -> io::Result<()> {
    let to = SocketAddr::new(to.into(), port);
    both.bed.client().run(|| connect_from(None, to, patience)).map(drop)
}

/// Whether a connection to each VIP is made while checksums are left unfinished on the network element's link.
fn unfinished(both: &Both) -> Result<[bool; 2]> {
    let before = wrong_checksums(both.bed.server(0).ns())?;
    link::set_offload(both.bed.client(), "eth0", Offload::TxChecksum, true)?;
    link::set_offload(both.bed.switch(), "ne0", Offload::TxChecksum, true)?;
    let made = [VIP.into(), VIP6.into()].map(|vip: IpAddr| connects(both, vip, TALK, LONG_ENOUGH).is_ok());
    println!("{made:?}, {} wrong", wrong_checksums(both.bed.server(0).ns())? - before);
    // What is for the host itself it takes, as ever.
    connects(both, NE, NECP_PORT, SOON)?;
    connects(both, NE6, NECP_PORT, SOON)?;
    Ok(made)
}

#[test]
fn a_checksum_that_was_left_to_the_card_stays_unfinished() -> Result<()> {
    let mut all = Vec::new();
    for mode in ["native", "generic"] {
        for forwarding in ["l2", "gre", "l3"] {
            let both = one_server(mode, forwarding)?;
            let made = unfinished(&both)?;
            println!("{mode} {forwarding} {made:?}");
            all.push((mode, forwarding, made));
            // The other end of its cable finishes them, whoever has left them.
            link::set_offload(both.bed.switch(), "ne0", Offload::TxChecksum, false)?;
            there_and_back(both.bed.client(), (VIP, TALK)).with_context(|| format!("{mode} {forwarding}"))?;
            there_and_back(both.bed.client(), (VIP6, TALK)).with_context(|| format!("{mode} {forwarding}"))?;
        }
    }
    assert_eq!(all, []);
    Ok(())
}
