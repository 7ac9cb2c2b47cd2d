//! TTL security and TCP-MD5 on real connections: what fits is served, what does not gets no answer at all.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use necp_tests::{
    daemon::ServerElement,
    hand::Hand,
    line::{Line, OFFERS, farm, top},
    topology::{NE, Topology, VIP},
};

const SOON: Duration = Duration::from_secs(10);
const NO_ANSWER: &str = "no connection within";

fn key(bed: &Topology, name: &str, content: &str) -> Result<PathBuf> {
    let path = bed.dir().join(name);
    fs::write(&path, content)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(path)
}

/// Starts s1's agent, which must not get an answer; then ends it.
fn gets_no_answer(line: &mut Line, index: usize, more: &[&str]) -> Result<()> {
    let bed = line.bed();
    let args: Vec<&str> =
        ["--ne", "10.0.0.1", "--keepalive", "0.3", "--serve", "tcp/7=l2"].iter().chain(more).copied().collect();
    let mut agent = ServerElement::start_unconnected(bed, bed.server(index).ns(), "turned-away", &args)?;
    agent.process().wait_for_log(NO_ANSWER, SOON)?;
    let status = line.ne().status()?;
    ensure!(status["connections"] == 0, "{}", status["connections"]);
    Ok(())
}

#[test]
fn low_ttls_get_no_answer() -> Result<()> {
    let config = "ttl_security = true\n".to_owned() + &top(1.0) + &farm("web", VIP, &["10.0.0.0/24"], "");
    let mut line = Line::start(Topology::builder().servers(2).build()?, &config)?;
    // An ordinary TTL of 64, and one hop away: 254 at most.
    gets_no_answer(&mut line, 0, &[])?;
    let away = line.bed().server(1).ns().clone();
    away.sysctl(&[("net/ipv4/ip_default_ttl", "254")])?;
    gets_no_answer(&mut line, 1, &[])?;
    line.start_agent(0, &OFFERS, &["--ttl-security"])?;
    line.wait_until_serving(0)?;
    line.expect_new_flows_at("TTL 255", &["s1"])?;
    // The SE holds the NE to it too: an NE that sends 64 is not heard.
    drop(line);
    let mut line = Line::start(Topology::builder().servers(1).build()?, &necp_tests::line::one_farm(1.0))?;
    gets_no_answer(&mut line, 0, &["--ttl-security"])
}

#[test]
fn two_hops_are_let_in_where_two_are_allowed() -> Result<()> {
    let config = "ttl_security = 2\n".to_owned() + &top(1.0) + &farm("web", VIP, &["10.0.0.0/24"], "");
    let line = Line::start(Topology::builder().servers(1).build()?, &config)?;
    let ns = line.bed().server(0).ns();
    ns.sysctl(&[("net/ipv4/ip_default_ttl", "254")])?;
    Hand::join(ns, NE).context("TTL 254")?;
    ns.sysctl(&[("net/ipv4/ip_default_ttl", "253")])?;
    ensure!(Hand::join(ns, NE).is_err(), "TTL 253");
    Ok(())
}

#[test]
fn only_those_who_sign_with_the_right_key_get_an_answer() -> Result<()> {
    let bed = Topology::builder().servers(2).build()?;
    let (right, wrong) = (key(&bed, "right", "a shared secret\n")?, key(&bed, "wrong", "another secret")?);
    let other = key(&bed, "other", "s2's own")?;
    let (right, wrong, other) =
        (right.to_str().context("path")?, wrong.to_str().context("path")?, other.to_str().context("path")?);
    let more = format!("tcp_md5 = {{ \"10.0.0.0/24\" = {right:?}, \"10.0.0.12\" = {other:?} }}");
    let config = top(1.0) + &farm("web", VIP, &["10.0.0.0/24"], &more);
    let mut line = Line::start(bed, &config)?;
    gets_no_answer(&mut line, 0, &[])?;
    gets_no_answer(&mut line, 0, &["--tcp-md5-file", wrong])?;
    gets_no_answer(&mut line, 1, &["--tcp-md5-file", right])?;
    line.start_agent(0, &OFFERS, &["--tcp-md5-file", right])?;
    line.start_agent(1, &OFFERS, &["--tcp-md5-file", other, "--ttl-security", "255"])?;
    (0..2).try_for_each(|index| line.wait_until_serving(index))?;
    line.expect_new_flows_at("signed", &["s1", "s2"])
}

#[test]
fn a_new_key_is_for_new_connections_after_sighup() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let (file, old) = (key(&bed, "key", "the first secret")?, key(&bed, "old", "the first secret")?);
    let (path, old) = (file.to_str().context("path")?.to_owned(), old.to_str().context("path")?.to_owned());
    let config = top(0.3) + &farm("web", VIP, &["10.0.0.0/24"], &format!("tcp_md5 = {path:?}"));
    let mut line = Line::start(bed, &config)?;
    line.start_agent(0, &OFFERS, &["--keepalive", "0.3", "--tcp-md5-file", &old])?;
    line.wait_until_serving(0)?;
    let hang_up = |line: &mut Line, says: &str| {
        line.ne().process().signal(libc::SIGHUP)?;
        line.ne().process().wait_for_log(says, SOON)
    };
    // A file that others can read is not taken.
    fs::write(&file, "the second secret")?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
    hang_up(&mut line, "the key that was read before stays")?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
    hang_up(&mut line, &format!("new keys in {path}"))?;
    // What is open goes on, over more keepalives than may be missed.
    thread::sleep(Duration::from_secs(2));
    let row = line.row("tcp/7", 0)?.context("no row")?;
    ensure!(row["state"] == "up", "{row}");
    line.kill_agent(0);
    line.wait_for_state(0, "lost")?;
    gets_no_answer(&mut line, 0, &["--tcp-md5-file", &old])?;
    line.start_agent(0, &OFFERS, &["--keepalive", "0.3", "--tcp-md5-file", &path])?;
    line.wait_until_serving(0)
}

#[test]
fn a_key_file_that_others_can_read_is_refused() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let path = key(&bed, "open", "a shared secret")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
    let config = top(1.0) + &farm("web", VIP, &["10.0.0.0/24"], &format!("tcp_md5 = {path:?}"));
    let error = Line::start(bed, &config).err().context("it started")?;
    let error = format!("{error:#}");
    ensure!(error.contains("mode is 644") && error.contains("chmod 600"), "{error}");
    Ok(())
}
