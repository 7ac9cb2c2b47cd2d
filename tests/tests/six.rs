//! IPv6: servers that join over it, and clients of IPv6 VIPs, beside those of IPv4.

use std::{
    collections::BTreeSet,
    io::Read as _,
    net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use necp_tests::{
    both::{Both, names},
    conversation::{Conversation, all_answer},
    daemon::{NetworkElement, ServerElement},
    line::TALK,
    netns::{Namespace, wait_until},
    topology::{CLIENT6, NE, NE6, Topology, VIP, VIP6, server_address6},
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);

#[test]
fn each_family_has_the_servers_that_joined_over_it() -> Result<()> {
    let mut both = Both::start(3, &["l2"], "")?;
    both.join(0, &[NE6.into()], "l2", &[])?;
    both.join(1, &[NE6.into()], "l2", &[])?;
    both.join(2, &[NE.into()], "l2", &[])?;
    assert_eq!(both.who(VIP6.into(), 60)?, names(&["s1", "s2"]));
    assert_eq!(both.who(VIP.into(), 20)?, names(&["s3"]));
    let status = both.ne.status()?;
    assert_eq!(status["listen"], serde_json::json!(["0.0.0.0:3262", "[::]:3262"]));
    assert_eq!(status["farms"][0]["vips"], serde_json::json!([VIP.to_string(), VIP6.to_string()]));
    let log = both.ne.process().log();
    assert!(log.contains(&format!("{} has joined", server_address6(0))), "{log}");

    // STOP and START in the middle of downloads: not one of them moves, and new ones go elsewhere at once.
    both.download(VIP6.into(), 12, "2m", || {
        let agent = both.agents[0].as_ref().context("an agent")?;
        let output = agent.command(&["drain"])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        ensure!(both.who(VIP6.into(), 40)? == names(&["s2"]), "s1 has stopped");
        ensure!(both.who(VIP.into(), 10)? == names(&["s3"]), "the other family has its own");
        let output = agent.command(&["resume"])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        wait_until("s1 gets new flows again", SOON, || {
            both.row(server_address6(0).into()).is_ok_and(|row| row.is_some_and(|row| row["slots"] != 0))
        })?;
        ensure!(both.who(VIP6.into(), 60)? == names(&["s1", "s2"]), "s1 has started again");
        Ok(())
    })
}

#[test]
fn one_agent_serves_both_families() -> Result<()> {
    let bed = Topology::builder().servers(2).vip_on_servers(false).ipv6().build()?;
    let mut both = Both::start_in(bed, &["l2", "gre"], "", |_| Ok(String::new()))?;
    let (vip, vip6, nes) = (VIP.to_string(), VIP6.to_string(), [NE.into(), NE6.into()]);
    both.join(0, &nes, "l2", &["--vip", &vip, "--vip", &vip6, "--drain", "0"])?;
    both.join(1, &nes, "gre", &["--vip", &vip, "--vip", &vip6, "--drain", "0", "--decap"])?;
    let (one, two, all) = (names(&["s1"]), names(&["s2"]), names(&["s1", "s2"]));
    let who =
        |both: &Both| -> Result<[BTreeSet<String>; 2]> { Ok([both.who(VIP.into(), 40)?, both.who(VIP6.into(), 40)?]) };
    assert_eq!(who(&both)?, [all.clone(), all.clone()]);
    let status = command(&both, 0, &["status", "--agent"])?;
    let known_as: Vec<_> = status["nes"].as_array().context("a list")?.iter().map(|ne| &ne["address"]).collect();
    assert_eq!(known_as, ["10.0.0.11", "2001:db8:a::11"]);

    both.download(VIP.into(), 8, "4m", || Ok(()))?;
    both.download(VIP6.into(), 8, "4m", || Ok(()))?;

    // What is told is told in both sessions.
    let client = both.bed.client();
    let mut talk = Conversation::open_many(client, 20, (VIP, TALK))?;
    talk.extend(Conversation::open_many(client, 20, (VIP6, TALK))?);
    command(&both, 0, &["drain"])?;
    assert_eq!(who(&both)?, [two.clone(), two.clone()]);
    all_answer("s1 is drained", &mut talk)?;
    assert!(talk.iter().any(|one| one.server() == "s1"), "s1 had none of 40");
    command(&both, 0, &["resume"])?;
    wait_until("s1 gets new flows again", SOON, || who(&both).is_ok_and(|who| who == [all.clone(), all.clone()]))?;

    // An exception is told in the session of its family, and is not missed in the other one.
    let results = |answers: Value| -> Vec<String> {
        let answers = answers.as_array().cloned().unwrap_or_default();
        answers.iter().map(|answer| answer["result"].as_str().unwrap_or("?").to_owned()).collect()
    };
    let client6 = format!("{CLIENT6}/128");
    let told = command(&both, 0, &["except", "add", "--src", &client6])?;
    assert_eq!(results(told), ["other-family", "accepted"]);
    assert_eq!(who(&both)?, [all.clone(), two.clone()]);
    let told = command(&both, 1, &["except", "add", "--src", "198.18.0.0/15", "--port", "tcp/80"])?;
    assert_eq!(results(told), ["accepted", "other-family"]);
    assert_eq!(who(&both)?, [one.clone(), two.clone()]);
    let told = command(&both, 0, &["except", "del", "--src", &client6])?;
    assert_eq!(results(told), ["other-family", "accepted"]);
    // Without an address it is about flows of either family.
    command(&both, 1, &["except", "reset"])?;
    let told = command(&both, 1, &["except", "add", "--port", "tcp/80"])?;
    assert_eq!(results(told), ["accepted", "accepted"]);
    assert_eq!(who(&both)?, [one.clone(), one.clone()]);

    // It leaves in both, and takes both addresses with it.
    let agent = both.agents[0].as_mut().context("an agent")?;
    assert!(agent.process().terminate(SOON)?.success());
    let output = both.bed.server(0).ns().command("ip").args(["addr", "show", "dev", "lo"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains(&vip) && !text.contains(&vip6), "{text}");
    command(&both, 1, &["except", "reset"])?;
    assert_eq!(who(&both)?, [two.clone(), two]);
    Ok(())
}

/// What a command of an agent prints as JSON; it must succeed.
fn command(both: &Both, index: usize, args: &[&str]) -> Result<Value> {
    let agent = both.agents[index].as_ref().context("an agent")?;
    let output = agent.command(&[args, &["--json"]].concat())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`necp {}`: {text}{message}", args.join(" "));
    serde_json::from_str(&text).with_context(|| text)
}

#[test]
fn three_forwarding_types_behind_an_ipv6_vip() -> Result<()> {
    let mut both = Both::start(3, &["l2", "gre", "l3"], "")?;
    // The third answers by way of the network element, and has no VIP.
    let back = format!("addr del {VIP6}/128 dev lo\nroute replace 2001:db8:c::/64 via {NE6} dev eth0\n");
    both.bed.server(2).ns().ip_batch(&back)?;
    both.join(0, &[NE6.into()], "l2", &[])?;
    both.join(1, &[NE6.into()], "gre", &["--decap"])?;
    both.join(2, &[NE6.into()], "l3", &[])?;
    assert_eq!(both.who(VIP6.into(), 90)?, names(&["s1", "s2", "s3"]));
    both.download(VIP6.into(), 15, "4m", || Ok(()))?;
    let row = |index| both.row(server_address6(index).into())?.context("a row");
    assert!(row(2)?["replies"].as_u64() > Some(0), "{}", row(2)?);
    let status = both.ne.status()?;
    assert_eq!(status["alarms"], serde_json::json!([]));
    // The tunnel is narrower by 44 bytes (RFC 2473, RFC 2784), and the client was told.
    let output = both.bed.client().command("ip").args(["-6", "route", "get", &VIP6.to_string()]).output()?;
    let route = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(route.contains(" mtu 1456 "), "{route}");
    Ok(())
}

#[test]
fn ipv6_flows_outlive_the_daemon_and_dead_hosts_are_found() -> Result<()> {
    let mut both = Both::start(2, &["l2"], "orphan_time = 60")?;
    both.join(0, &[NE6.into()], "l2", &[])?;
    both.join(1, &[NE6.into()], "l2", &[])?;
    // Its cable is pulled: no neighbour advertisement comes any more.
    both.bed.server(1).unplug()?;
    both.wait_for(1, server_address6(1).into(), |row| row["state"] == "dead")?;
    assert_eq!(both.who(VIP6.into(), 20)?, names(&["s1"]));

    both.ne.process().signal(libc::SIGQUIT)?;
    both.ne.process().wait(SOON)?;
    assert_eq!(both.who(VIP6.into(), 20)?, names(&["s1"]), "the packet path forwards on");
    let config = std::fs::read_to_string(both.bed.dir().join("ne.toml"))?;
    both.ne = NetworkElement::start(&both.bed, &config)?;
    let log = both.ne.process().log();
    assert!(log.contains("4 services (0 anew)"), "{log}");
    assert_eq!(both.who(VIP6.into(), 20)?, names(&["s1"]));
    both.wait_for(0, server_address6(0).into(), |row| row["state"] == "up")
}

#[test]
fn who_may_not_join_over_ipv6_is_told_why() -> Result<()> {
    let mut both = Both::start(1, &["l2"], "")?;
    // What has no scope names no host in the tables.
    let link_local = both.bed.ne().run(|| link_local("eth0"))?;
    let server = both.bed.server(0).ns().clone();
    connect_and_wait(&server, link_local)?;
    both.ne.process().wait_for_log("is link-local, which no server may join from", SOON)?;
    assert_eq!(both.ne.status()?["strangers"]["not_admitted"], 1);

    // On the IPv4 listener there is no IPv6, and a VIP of the other family is not served.
    both.ne.process().signal(libc::SIGTERM)?;
    both.ne.process().wait(SOON)?;
    let config = std::fs::read_to_string(both.bed.dir().join("ne.toml"))?;
    let config = config.replace(&format!(", \"{VIP6}\""), "");
    both.ne = NetworkElement::start(&both.bed, &config)?;
    let log = both.ne.process().log();
    assert!(log.contains("servers in 2001:db8:a::/64 have nothing to serve: farm `web` has no IPv6 VIP"), "{log}");
    let ne = SocketAddr::new(NE6.into(), 3262).to_string();
    let args = ["--ne", &ne, "--retry-max", "1", "--serve", "tcp/80=l2"];
    let _agent = ServerElement::start_unconnected(&both.bed, &server, "s1", &args)?;
    both.ne.process().wait_for_log("the farm has no IPv6 VIP", SOON)?;
    Ok(())
}

#[test]
fn hop_limits_and_signatures_protect_sessions_over_ipv6() -> Result<()> {
    let key = |bed: &Topology, name: &str, content: &str| -> Result<String> {
        let path = bed.dir().join(name);
        std::fs::write(&path, content)?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(path.to_str().context("a path")?.to_owned())
    };
    let bed = Topology::builder().servers(3).ipv6().build()?;
    let mut both = Both::start_in(bed, &["l2"], "ttl_security = true\n", |bed| {
        Ok(format!("tcp_md5 = {{ \"2001:db8:a::11\" = {:?} }}", key(bed, "right", "a shared secret\n")?))
    })?;
    let right = key(&both.bed, "again", "a shared secret\n")?;
    let wrong = key(&both.bed, "wrong", "another secret\n")?;
    let ne = SocketAddr::new(NE6.into(), 3262).to_string();
    for (index, args) in [
        (0, vec!["--ttl-security"]),
        (0, vec!["--ttl-security", "--tcp-md5-file", &wrong]),
        (0, vec!["--tcp-md5-file", &right]),
        (1, vec![]),
        (1, vec!["--ttl-security", "--tcp-md5-file", &right]),
    ] {
        let args: Vec<&str> =
            ["--ne", &ne, "--keepalive", "0.3", "--serve", "tcp/80=l2"].into_iter().chain(args).collect();
        let ns = both.bed.server(index).ns();
        let mut agent = ServerElement::start_unconnected(&both.bed, ns, "turned-away", &args)?;
        agent.process().wait_for_log("no connection within", SOON).with_context(|| format!("{args:?}"))?;
        assert_eq!(both.ne.status()?["connections"], 0, "{args:?}");
    }
    both.join(0, &[NE6.into()], "l2", &["--ttl-security", "--tcp-md5-file", &right])?;
    both.join(1, &[NE6.into()], "l2", &["--ttl-security"])?;
    both.join(2, &[NE.into()], "l2", &["--ttl-security"])?;
    assert_eq!(both.who(VIP6.into(), 40)?, names(&["s1", "s2"]));
    Ok(())
}

fn link_local(interface: &str) -> Result<Ipv6Addr> {
    let table = std::fs::read_to_string("/proc/thread-self/net/if_inet6")?;
    let line = table.lines().find(|line| line.starts_with("fe80") && line.ends_with(interface));
    let digits = line.and_then(|line| line.split_whitespace().next()).context("no link-local address")?;
    Ok(u128::from_str_radix(digits, 16)?.into())
}

/// A connection that says nothing.
fn connect_and_wait(ns: &Namespace, address: Ipv6Addr) -> Result<()> {
    ns.run(|| {
        let scope = std::fs::read_to_string("/proc/thread-self/net/dev_mcast")?;
        let scope = scope.lines().find(|line| line.contains("eth0")).and_then(|line| line.split_whitespace().next());
        let scope = scope.context("no eth0")?.parse()?;
        let address = SocketAddrV6::new(address, 3262, 0, scope).into();
        let mut stream = TcpStream::connect_timeout(&address, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        ensure!(stream.read(&mut [0; 16]).unwrap_or(0) == 0, "not a byte of an answer");
        Ok(())
    })
}
