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
const LONG_ENOUGH: Duration = Duration::from_secs(1);

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

/// While checksums are left unfinished on the network element's link, connections to both VIPs are made, or not; once the other
/// end of its cable finishes them, whoever has left them, they are.
fn unfinished(mode: &str, forwarding: &str, made: bool) -> Result<()> {
    let both = one_server(mode, forwarding)?;
    let (client, server) = (both.bed.client(), both.bed.server(0).ns());
    assert_eq!(wrong_checksums(server)?, 0);
    link::set_offload(client, "eth0", Offload::TxChecksum, true)?;
    link::set_offload(both.bed.switch(), "ne0", Offload::TxChecksum, true)?;
    for vip in [IpAddr::from(VIP), VIP6.into()] {
        let before = wrong_checksums(server)?;
        let connected = connects(&both, vip, TALK, if made { SOON } else { LONG_ENOUGH });
        assert_eq!(connected.is_ok(), made, "{mode} {forwarding} {vip}: {connected:?}");
        assert_eq!(wrong_checksums(server)? > before, !made, "{mode} {forwarding} {vip}");
    }
    // What is for the host itself it takes, as ever.
    connects(&both, NE, NECP_PORT, SOON)?;
    connects(&both, NE6, NECP_PORT, SOON)?;
    link::set_offload(both.bed.switch(), "ne0", Offload::TxChecksum, false)?;
    there_and_back(client, (VIP, TALK)).with_context(|| format!("{mode} {forwarding}"))?;
    there_and_back(client, (VIP6, TALK)).with_context(|| format!("{mode} {forwarding}"))
}

#[test]
fn a_checksum_that_was_left_to_the_card_stays_unfinished() -> Result<()> {
    unfinished("native", "l2", false)?;
    unfinished("native", "l3", false)
}

#[test]
fn in_generic_mode_the_kernel_finishes_checksums_of_what_is_not_rewritten() -> Result<()> {
    unfinished("generic", "gre", true)?;
    unfinished("generic", "l3", false)
}
