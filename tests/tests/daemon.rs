//! The daemon and its commands on a host: configuration errors, VIPs, pins, `load` and `unload`, what bpftool shows.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use necp_ebpf::abi::LAYOUT_VERSION;
use necp_tests::{
    conversation::{Conversation, all_answer},
    daemon::{NetworkElement, necp_binary},
    echo::Hold,
    line::{Line, TALK, farm, one_farm, top},
    link,
    netns::{Namespace, wait_until},
    raw::RawSocket,
    topology::{Topology, VIP, server_address},
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);
const FOREIGN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 20);

#[test]
fn a_mistake_in_the_configuration_is_named_with_its_line() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("ne.toml");
    let check = |text: &str| -> Result<Output> {
        fs::write(&file, text)?;
        Ok(Command::new(necp_binary()?).args(["ne", "--check", "--config"]).arg(&file).output()?)
    };
    let good = format!("interfaces = [\"eth0\"]\n{}", one_farm(5.0));
    let output = check(&good)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("web: tcp/7 udp/53 on 192.0.2.10 by l2"));

    let two = good.clone() + &farm("api", FOREIGN, &["10.0.0.128/25"], "");
    let many: Vec<String> = (10..27).map(|host| format!("\"192.0.2.{host}\"")).collect();
    let many =
        good.replace("\"192.0.2.10\"", &many.join(", ")).replace("forwarding = [\"l2\"]", "forwarding = [\"l3\"]");
    let cases = [
        (many, "more than 16 VIPs offer tcp/7 in farms that allow l3"),
        (good.replace("keepalive", "keepalife"), "2:1: unknown key `keepalife`; did you mean `keepalive`?"),
        (good.replace("vips", "vip"), "5:1: unknown key `vip`; did you mean `vips`?"),
        (good.replace("udp/53", "upd/53"), "6:22: `upd/53` is no service"),
        (two, "would both admit 10.0.0.128/25 for tcp/7"),
    ];
    for (text, expected) in cases {
        let output = check(&text)?;
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        let prefix = format!("{}:", file.display());
        assert!(message.starts_with(&prefix) && message.contains(expected), "{expected}: {message}");
    }
    Ok(())
}

#[test]
fn the_vip_is_owned_announced_and_withdrawn() -> Result<()> {
    let bed = Topology::builder().servers(1).vips(&[VIP, FOREIGN]).vip_on_servers(false).build()?;
    // Somebody else's address: it is used, and it stays.
    bed.ne().ip_batch(&format!("addr add {FOREIGN}/32 dev lo\n"))?;
    let mac = link::mac(bed.ne(), "eth0")?;
    let at_client = RawSocket::open(bed.client(), "eth0")?;
    let config = top(5.0)
        + &farm("a", VIP, &["10.0.0.11"], "").replace(&format!("\"{VIP}\""), &format!("\"{VIP}\", \"{FOREIGN}\""));
    let mut ne = NetworkElement::start(&bed, &config)?;
    for vip in [VIP, FOREIGN] {
        let announces =
            |frame: &[u8]| arp(frame).is_some_and(|arp| arp.sender == vip && arp.target == vip && arp.mac == mac);
        // Which of the two comes first is no matter: announcements are repeated.
        assert!(at_client.receive(SOON, announces)?.is_some(), "{vip} is announced");
        assert!(addresses(bed.ne())?.contains(&vip));
        assert_eq!(who_has(&bed, vip)?, Some(mac), "{vip}");
        link::ping(bed.client(), vip, SOON)?;
    }
    let status = ne.process().terminate(SOON)?;
    assert!(status.success(), "{status}");
    let left = addresses(bed.ne())?;
    assert!(!left.contains(&VIP) && left.contains(&FOREIGN), "{left:?}");
    assert_eq!(who_has(&bed, VIP)?, None);
    Ok(())
}

#[test]
fn vips_can_be_left_to_somebody_else() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let config = format!("manage_vips = false\n{}", one_farm(5.0));
    let mut line = Line::start(bed, &config)?;
    assert!(!addresses(line.bed().ne())?.contains(&VIP));
    line.join(0)?;
    // The clients' router sends the VIP's packets here.
    let mac = link::mac(line.bed().ne(), "eth0")?.map(|byte| format!("{byte:02x}")).join(":");
    line.bed().client().ip_batch(&format!("neigh replace {VIP} lladdr {mac} dev eth0 nud permanent\n"))?;
    all_answer("a VIP that is not on the host", &mut line.talk(10)?)
}

#[test]
fn sigterm_takes_everything_away_and_sigquit_leaves_it() -> Result<()> {
    let mut line = Line::with_servers(2, 1.0)?;
    let pin = line.bed().pins().join("ne");
    let mut talk = line.talk(20)?;
    assert!(program_on(line.bed().ne(), "eth0")?.is_some() && pin.join("slots").exists());
    assert!(line.ne().process().log().contains("eth0 is a veth"), "{}", line.ne().process().log());

    line.ne().process().signal(libc::SIGQUIT)?;
    assert!(line.ne().process().wait(SOON)?.success());
    assert!(program_on(line.bed().ne(), "eth0")?.is_some() && pin.join("slots").exists());
    assert!(addresses(line.bed().ne())?.contains(&VIP));
    all_answer("the daemon has left the packet path", &mut talk)?;
    line.expect_new_flows_at("the daemon has left the packet path", &["s1", "s2"])?;

    line.restart_ne()?;
    (0..2).try_for_each(|index| line.wait_until_serving(index))?;
    all_answer("the next daemon", &mut talk)?;
    assert!(line.ne().process().terminate(SOON)?.success());
    wait_until_bare(line.bed().ne(), "eth0")?;
    assert!(!pin.exists(), "{} is gone", pin.display());
    assert!(!addresses(line.bed().ne())?.contains(&VIP));
    assert!(!line.ne().socket().exists(), "and the socket");
    Ok(())
}

#[test]
fn load_and_unload() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let (file, pin) = (bed.dir().join("load.toml"), bed.pins().join("ne"));
    fs::create_dir_all(bed.pins())?;
    let config =
        format!("interfaces = [\"eth0\"]\npin = {pin:?}\nsocket = {:?}\n{}", bed.dir().join("ne.sock"), one_farm(1.0));
    fs::write(&file, &config)?;
    let necp = |args: &[&str]| -> Result<Output> {
        let mut command = bed.ne().command(necp_binary()?);
        Ok(command.args(args).output()?)
    };
    let config_path = file.to_str().context("UTF-8")?;
    let pin_path = pin.to_str().context("UTF-8")?;
    let load = ["load", "--iface", "eth0", "--config", config_path];
    let unload = ["unload", "--iface", "eth0", "--pin", pin_path];

    let output = necp(&unload)?;
    ensure!(!output.status.success() && text(&output.stderr).contains("is not on eth0"), "{output:?}");
    for round in ["once", "again"] {
        let output = necp(&load)?;
        ensure!(output.status.success(), "{round}: {}", text(&output.stderr));
        assert!(text(&output.stdout).contains("attached to eth0 in native mode"), "{}", text(&output.stdout));
        assert!(program_on(bed.ne(), "eth0")?.is_some() && pin.join("ports").exists(), "{round}");
    }
    // Tables are empty: all passes.
    link::ping(bed.client(), necp_tests::topology::NE, SOON)?;
    let _own = Hold::start(bed.ne(), "host", 22)?;
    let mut own = Conversation::open(bed.client(), SocketAddrV4::new(necp_tests::topology::NE, 22))?;
    own.ask()?;

    // A daemon takes over what was loaded, and nobody unloads it under its feet.
    let mut ne = NetworkElement::start(&bed, &config)?;
    assert_eq!(ne.status()?["took_over"], true);
    for args in [&load[..], &unload] {
        let output = necp(args)?;
        ensure!(!output.status.success(), "while the daemon runs");
        assert!(text(&output.stderr).contains(&format!("is in use by pid {}", ne.process().pid())), "{output:?}");
    }
    ne.process().kill();
    let output = necp(&unload)?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    assert!(!pin.exists());
    wait_until_bare(bed.ne(), "eth0")?;
    own.ask()
}

#[test]
fn bpftool_prints_records_with_field_names() -> Result<()> {
    let mut line = Line::with_servers(2, 5.0)?;
    let pin = line.bed().pins().join("ne");
    let dump = |name: &str| -> Result<Vec<Value>> {
        let entries = bpftool(&["map", "dump", "pinned"], &pin.join(name), &[])?;
        let entries = entries.as_array().context("a list")?;
        let value = |entry: &Value| entry["formatted"]["value"].clone();
        Ok(entries.iter().map(value).collect())
    };
    assert_eq!(dump("layout")?[0]["version"], LAYOUT_VERSION);
    let ports = dump("ports")?;
    assert_eq!(numbers(&ports[0]["mac"]), link::mac(line.bed().ne(), "eth0")?.map(u64::from));
    assert_eq!(ports[0]["mtu"], 1500);

    let services = dump("services")?;
    let entries = services.iter().flat_map(|bucket| bucket["entries"].as_array().into_iter().flatten());
    let mut used: Vec<&Value> = entries.filter(|entry| entry["state"] == 1).collect();
    used.sort_by_key(|entry| entry["protocol"].as_u64());
    let shown: Vec<_> =
        used.iter().map(|one| (numbers(&one["address"]), numbers(&one["port"]), one["protocol"].as_u64())).collect();
    let vip = VIP.octets().map(u64::from).to_vec();
    assert_eq!(shown, [(vip.clone(), vec![0, 7], Some(6)), (vip, vec![0, 53], Some(17))]);

    // One server's record, and one slot that names it.
    let row = line.row("tcp/7", 0)?.context("s1")?;
    let id = row["id"].as_u64().context("an id")?;
    let server = lookup(&pin.join("servers"), id)?;
    assert_eq!(numbers(&server["mac"]), line.bed().server(0).mac()?.map(u64::from));
    assert_eq!(numbers(&server["address"])[12..], server_address(0).octets().map(u64::from));
    assert_eq!((&server["service_port"], &server["forwarding"]), (&TALK.into(), &1.into()));
    let base = used[0]["slots_base"].as_u64().context("a base")?;
    let owners = (0..64).map(|slot| lookup(&pin.join("slots"), base + slot)).collect::<Result<Vec<_>>>()?;
    assert!(owners.iter().any(|slot| slot["owner"] == id), "{owners:?}");

    // Counters per CPU; the daemon shows the same packets.
    line.talk(10)?;
    let stats = bpftool(&["map", "lookup", "pinned"], &pin.join("server_stats"), &key(id))?;
    let cpus = stats["formatted"]["values"].as_array().context("values per CPU")?;
    assert!(cpus.iter().all(|cpu| cpu["value"]["packets"].is_u64() && cpu["value"]["flows"].is_u64()), "{cpus:?}");
    line.ne().status().map(drop)
}

#[test]
fn status_says_when_no_daemon_answers() -> Result<()> {
    let missing = Command::new(necp_binary()?).args(["status", "--socket", "/run/no-such/ne.sock"]).output()?;
    assert_eq!(missing.status.code(), Some(1));
    let message = text(&missing.stderr);
    assert!(message.contains("/run/no-such/ne.sock") && message.contains("is `necp ne` running?"), "{message}");
    let mut line = Line::with_servers(1, 5.0)?;
    let socket = line.ne().socket().to_path_buf();
    let table = Command::new(necp_binary()?).args(["status", "--socket"]).arg(socket).output()?;
    let table = text(&table.stdout);
    for word in ["web", "192.0.2.10", "tcp/7", "udp/53", "10.0.0.11", "up", "l2"] {
        assert!(table.contains(word), "{word} is not in:\n{table}");
    }
    Ok(())
}

/// The agent puts the VIP on `lo`, unknown to ARP, and takes both away.
#[test]
fn an_agent_sets_a_server_up_and_leaves_no_trace() -> Result<()> {
    let bed = Topology::builder().servers(2).vip_on_servers(false).build()?;
    let sysctl = |ns: &Namespace| {
        let read = |name| fs::read_to_string(format!("/proc/sys/net/ipv4/conf/all/{name}")).unwrap_or_default();
        ns.run(|| ["arp_ignore", "arp_announce"].map(read))
    };
    for server in bed.servers() {
        server.ns().sysctl(&[("net/ipv4/conf/all/arp_ignore", "0"), ("net/ipv4/conf/all/arp_announce", "0")])?;
    }
    let before = sysctl(bed.server(0).ns());
    let mut line = Line::start(bed, &one_farm(1.0))?;
    for index in 0..2 {
        line.start_agent(index, &["tcp/7=l2", "udp/53=l2"], &["--vip", &VIP.to_string()])?;
    }
    (0..2).try_for_each(|index| line.wait_until_serving(index))?;
    line.expect_new_flows_at("the agents have set the VIP up", &["s1", "s2"])?;
    let server = line.bed().server(0).ns().clone();
    assert!(addresses(&server)?.contains(&VIP));
    assert_eq!(who_has(line.bed(), VIP)?, Some(link::mac(line.bed().ne(), "eth0")?), "no server answers ARP");
    assert!(line.agent(0).process().terminate(SOON)?.success());
    assert!(!addresses(&server)?.contains(&VIP));
    assert_eq!(sysctl(&server), before);
    Ok(())
}

fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// An ARP packet's sender and target (RFC 826).
struct Arp {
    is_reply: bool,
    mac: [u8; 6],
    sender: Ipv4Addr,
    target: Ipv4Addr,
}

fn arp(frame: &[u8]) -> Option<Arp> {
    let (header, body) = frame.split_at_checked(14)?;
    let body: &[u8; 28] = body.first_chunk()?;
    let address = |at: usize| Ipv4Addr::new(body[at], body[at + 1], body[at + 2], body[at + 3]);
    let is_arp = header[12..] == [0x08, 0x06];
    is_arp.then(|| Arp {
        is_reply: body[7] == 2,
        mac: std::array::from_fn(|at| body[8 + at]),
        sender: address(14),
        target: address(24),
    })
}

/// Asks the clients' link for an address, three times; who answers, if anybody does.
fn who_has(bed: &Topology, address: Ipv4Addr) -> Result<Option<[u8; 6]>> {
    let client = RawSocket::open(bed.client(), "eth0")?;
    let own = link::mac(bed.client(), "eth0")?;
    let mut request = vec![0xff; 6];
    request.extend(own);
    request.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    request.extend(own);
    request.extend(necp_tests::topology::client_address(0).octets());
    request.extend([0; 6]);
    request.extend(address.octets());
    let mut answers = Vec::new();
    for _ in 0..3 {
        client.send(&request)?;
        let answers_it = |frame: &[u8]| arp(frame).is_some_and(|arp| arp.is_reply && arp.sender == address);
        // All who answer, not the first alone.
        while let Some(frame) = client.receive(Duration::from_millis(300), answers_it)? {
            answers.extend(arp(&frame).map(|arp| arp.mac));
        }
    }
    answers.dedup();
    ensure!(answers.len() <= 1, "{address} is at {answers:02x?}");
    Ok(answers.pop())
}

/// IPv4 addresses of a host.
fn addresses(ns: &Namespace) -> Result<Vec<Ipv4Addr>> {
    let output = ns.command("ip").args(["-j", "-4", "addr"]).output()?;
    let links: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let all = links.iter().flat_map(|link| link["addr_info"].as_array().into_iter().flatten());
    Ok(all.filter_map(|address| address["local"].as_str()?.parse().ok()).collect())
}

/// The XDP program of an interface, by its id.
fn program_on(ns: &Namespace, interface: &str) -> Result<Option<u64>> {
    let output = ns.command("ip").args(["-j", "link", "show", "dev", interface]).output()?;
    let links: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    Ok(links.first().context("no such interface")?["xdp"]["prog"]["id"].as_u64())
}

/// The kernel detaches a program in the background, once the last pin and the last descriptor of its link are gone.
fn wait_until_bare(ns: &Namespace, interface: &str) -> Result<()> {
    wait_until("the program is gone", SOON, || program_on(ns, interface).is_ok_and(|program| program.is_none()))
}

fn bpftool(command: &[&str], pin: &Path, more: &[String]) -> Result<Value> {
    let output = Command::new("bpftool").arg("-j").args(command).arg(pin).args(more).output();
    let output = output.context("cannot run `bpftool`; `cargo xtask setup` installs it")?;
    ensure!(output.status.success(), "bpftool {command:?}: {} {}", text(&output.stdout), text(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// `key` as bpftool wants it.
fn key(index: u64) -> Vec<String> {
    let bytes = (index as u32).to_ne_bytes();
    std::iter::once("key".to_owned()).chain(bytes.iter().map(u8::to_string)).collect()
}

fn lookup(pin: &Path, index: u64) -> Result<Value> {
    Ok(bpftool(&["map", "lookup", "pinned"], pin, &key(index))?["formatted"]["value"].clone())
}

/// A list of numbers.
fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().into_iter().flatten().filter_map(Value::as_u64).collect()
}

#[test]
fn a_daemon_that_cannot_start_says_why() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let config = format!("interfaces = [\"eth7\"]\n{}", one_farm(5.0));
    let error = NetworkElement::start(&bed, &config).err().context("it started")?;
    assert!(format!("{error:#}").contains("eth7"), "{error:#}");
    let left = bed.pins().join("ne");
    wait_until("nothing is left", SOON, || fs::read_dir(&left).map_or(true, |mut pins| pins.next().is_none()))
}
