//! Who may join, and what becomes of a session: refusals, silence, second agents, hostile peers.

use std::{
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use necp_tests::{
    conversation::{all_answer, connect},
    daemon::{NetworkElement, ServerElement},
    hand::{BASIC_PAYLOAD, ERROR, Hand, Message, opcode, start_unit},
    line::{Line, OFFERS, farm, none_moved, one_farm, servers, top},
    netns::wait_until,
    topology::{NE, Topology, VIP},
};

const SOON: Duration = Duration::from_secs(10);
const TALK_UNIT: [u32; 8] = [1, 6, 7, 0, 0, 0, 0, 0];
const ECHO_UNIT: [u32; 8] = [1, 17, 53, 0, 0, 0, 0, 0];
const NONE_FAILED: [[u32; 8]; 0] = [];

#[test]
fn an_address_that_may_not_join_is_closed_without_an_answer() -> Result<()> {
    let config = top(1.0) + &farm("web", VIP, &["10.0.0.11"], "");
    let mut line = Line::start(Topology::builder().servers(2).build()?, &config)?;
    line.join(0)?;
    let mut talk = line.talk(20)?;
    let init = Message { flags: BASIC_PAYLOAD, opcode: opcode::INIT, request_id: 1, units: vec![[0; 8]] };
    let mut stranger = Hand::connect(line.bed().server(1).ns(), NE)?;
    // It may be closed already.
    let _ = stranger.send(&init.bytes());
    assert_eq!(stranger.read_to_end()?, 0, "not a byte of an answer");
    line.start_agent(1, &OFFERS, &[])?;
    line.agent(1).process().wait_for_log("retry in", SOON)?;
    wait_until("the attempts are counted", SOON, || {
        line.ne().status().is_ok_and(|status| status["strangers"]["not_admitted"].as_u64() >= Some(2))
    })?;
    assert!(line.row("tcp/7", 1)?.is_none(), "no offer of the stranger's");
    assert_eq!(line.ne().status()?["sessions"], 1);
    let log = line.ne().process().log();
    assert!(log.contains("10.0.0.12 is admitted by no farm"), "{log}");
    line.expect_new_flows_at("a stranger has tried", &["s1"])?;
    all_answer("a stranger has tried", &mut talk)
}

#[test]
fn three_missed_keepalives_end_a_session_and_no_flow() -> Result<()> {
    const KEEPALIVE: f64 = 0.5;
    let mut line = Line::with_servers(3, KEEPALIVE)?;
    let (mut talk, mut echo) = (line.talk(60)?, line.echo(60)?);
    // Its host acknowledges every segment, but nobody answers.
    line.agent(1).process().signal(libc::SIGSTOP)?;
    let began = Instant::now();
    line.wait_for_state(1, "lost")?;
    // Two intervals, each at least 0.4 s, lie between the first unanswered keepalive and the third.
    assert!(began.elapsed() >= Duration::from_millis(800), "after {:?}", began.elapsed());
    line.expect_new_flows_at("s2's agent is silent", &["s1", "s3"])?;
    all_answer("s2's agent is silent", &mut talk)?;
    none_moved("s2's agent is silent", &mut echo)?;
    let log = line.ne().process().log();
    assert!(log.contains("session of 10.0.0.12 lost"), "{log}");

    line.agent(1).process().signal(libc::SIGCONT)?;
    line.wait_until_serving(1)?;
    talk.push(line.talk_until("s2")?);
    all_answer("s2's agent is back", &mut talk)?;
    none_moved("s2's agent is back", &mut echo)
}

#[test]
fn a_second_agent_on_a_host_is_refused() -> Result<()> {
    let mut line = Line::with_servers(1, 1.0)?;
    let pid = line.agent(0).process().pid();
    let bed = line.bed();
    let mut second = ServerElement::start_unconnected(bed, bed.server(0).ns(), "s1", &["--ne", "10.0.0.1"])?;
    let status = second.process().wait(SOON)?;
    assert_eq!(status.code(), Some(1));
    let log = second.process().log();
    assert!(log.contains(&format!("the agent with pid {pid}")) && log.contains("one agent per host"), "{log}");
    assert!(line.agent(0).process().ended().is_none());
    line.wait_until_serving(0)?;
    all_answer("a second agent has tried", &mut line.talk(5)?)
}

#[test]
fn init_takes_offers_away_and_no_flow() -> Result<()> {
    let mut line = Line::start(Topology::builder().servers(2).build()?, &one_farm(60.0))?;
    line.join(1)?;
    let mut first = Hand::join(line.bed().server(0).ns(), NE)?;
    assert_eq!(first.start(&[TALK_UNIT, ECHO_UNIT])?, NONE_FAILED);
    let (mut talk, mut echo) = (line.talk(40)?, line.echo(40)?);

    // On another connection: the older one is closed (§5.4).
    let mut second = Hand::join(line.bed().server(0).ns(), NE)?;
    assert!(first.receive()?.is_none(), "superseded");
    line.expect_new_flows_at("INIT, and no START", &["s2"])?;
    all_answer("INIT on another connection", &mut talk)?;
    none_moved("INIT on another connection", &mut echo)?;

    // On the same connection: it starts over in place.
    assert_eq!(second.start(&[TALK_UNIT, ECHO_UNIT])?, NONE_FAILED);
    talk.push(line.talk_until("s1")?);
    let again = second.request(opcode::INIT, &[[0; 8]])?;
    assert_eq!((again.opcode, again.flags & ERROR), (opcode::INIT_ACK, 0));
    line.expect_new_flows_at("INIT again, and no START", &["s2"])?;
    assert_eq!(second.start(&[TALK_UNIT])?, NONE_FAILED);
    talk.push(line.talk_until("s1")?);
    all_answer("INIT on the same connection", &mut talk)?;
    none_moved("INIT on the same connection", &mut echo)
}

#[test]
fn units_fail_one_by_one() -> Result<()> {
    let line = Line::start(Topology::builder().servers(2).build()?, &one_farm(60.0))?;
    let mut hand = Hand::join(line.bed().server(0).ns(), NE)?;
    let wrong = [
        start_unit(2, 6, 7),       // GRE is not in the farm's `forwarding`
        start_unit(3, 6, 7),       // nor is layer 3
        start_unit(9, 6, 7),       // no forwarding type
        start_unit(1, 6, 80),      // no service of the farm
        start_unit(1, 0, 7),       // no protocol
        start_unit(1, 6, 0),       // no port
        start_unit(1, 6, 0x10007), // bits above the port's sixteen
    ];
    let right = [TALK_UNIT, ECHO_UNIT];
    let all: Vec<_> = wrong[..4].iter().chain(&right).chain(&wrong[4..]).copied().collect();
    assert_eq!(hand.start(&all)?, wrong, "exactly the failed units are repeated (§5.6.2)");
    line.expect_new_flows_at("started in spite of bad neighbours", &["s1"])?;
    // A server speaks for itself alone.
    let mut other = Hand::join(line.bed().server(1).ns(), NE)?;
    assert_eq!(other.stop(&[TALK_UNIT, ECHO_UNIT])?, NONE_FAILED);
    line.expect_new_flows_at("another server's STOP", &["s1"])
}

#[test]
fn forwarding_that_the_farm_does_not_allow_is_refused_and_said() -> Result<()> {
    let mut line = Line::start(Topology::builder().servers(2).build()?, &one_farm(1.0))?;
    line.start_agent(0, &["tcp/7=gre", "udp/53=l3"], &[])?;
    line.agent(0).process().wait_for_log("refused", SOON)?;
    let log = line.agent(0).process().log();
    assert!(log.contains("tcp/7=gre") && log.contains("udp/53=l3"), "{log}");
    assert!(servers(&line.ne().status()?, "tcp/7").is_empty());
    line.join(1)?;
    line.expect_new_flows_at("only s2 could start", &["s2"])
}

#[test]
fn a_session_may_serve_nothing() -> Result<()> {
    let mut line = Line::start(Topology::builder().servers(1).build()?, &one_farm(0.5))?;
    line.start_agent(0, &[], &[])?;
    line.agent(0).process().wait_for_log("joined", SOON)?;
    // Longer than three keepalives: it is answered and kept.
    let began = Instant::now();
    wait_until("it stays", SOON, || began.elapsed() > Duration::from_millis(2500))?;
    let status = line.ne().status()?;
    assert_eq!((&status["sessions"], servers(&status, "tcp/7").len()), (&1.into(), 0));
    Ok(())
}

#[test]
fn an_agent_waits_for_a_network_element_that_comes_late() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let args = ["--ne", "10.0.0.1", "--retry-max", "1", "--serve", "tcp/7=l2", "--serve", "udp/53=l2"];
    let mut agent = ServerElement::start_unconnected(&bed, bed.server(0).ns(), "early", &args)?;
    agent.process().wait_for_log("cannot connect", SOON)?;
    let mut line = Line::start(bed, &one_farm(1.0))?;
    line.wait_until_serving(0)?;
    line.expect_new_flows_at("the agent was there first", &["s1"])
}

#[test]
fn two_daemons_do_not_share_pins() -> Result<()> {
    let mut line = Line::with_servers(1, 5.0)?;
    let pid = line.ne().process().pid();
    let pin = line.bed().pins().join("ne");
    let config = format!("pin = {pin:?}\nlisten = [\"10.0.0.1:3263\"]\n{}", one_farm(5.0));
    let second = NetworkElement::start_in(line.bed(), line.bed().client(), "second", &config);
    let error = format!("{:#}", second.err().context("it started")?);
    assert!(error.contains(&format!("is in use by pid {pid}")), "{error}");
    all_answer("a second daemon has tried", &mut line.talk(5)?)
}

/// Garbage, endless messages, silence: closed or refused, and nobody else notices.
#[test]
fn hostile_peers_harm_nobody() -> Result<()> {
    let mut line = Line::with_servers(2, 1.0)?;
    let mut talk = line.talk(20)?;
    let host = line.bed().server(1).ns().clone();
    // Another host of the admitted prefix.
    host.ip_batch("addr add 10.0.0.99/24 dev eth0\n")?;
    host.ip_batch("route replace 10.0.0.1/32 dev eth0 src 10.0.0.99\n")?;

    let mut web = Hand::connect(&host, NE)?;
    web.send(b"GET / HTTP/1.1\r\nHost: necp\r\n\r\n")?;
    assert_eq!(web.read_to_end()?, 0);
    let mut early = Hand::connect(&host, NE)?;
    let refused = early.request(opcode::START, &[TALK_UNIT])?;
    assert_eq!((refused.opcode, refused.flags & ERROR), (opcode::START_ACK, ERROR), "START before INIT");
    assert_eq!(early.read_to_end()?, 0, "and closed");

    // Longer than any message of sense: it is executed as it comes, unit by unit, and memory does not grow with it.
    let mut long = Hand::join(&host, NE)?;
    let mut header = Message { flags: BASIC_PAYLOAD, opcode: opcode::STOP, request_id: 7, units: Vec::new() }.bytes();
    header[16..20].copy_from_slice(&(32u32 * 100_000_000).to_be_bytes());
    long.send(&header)?;
    let units: Vec<u8> = [TALK_UNIT; 1024].iter().flatten().flat_map(|word| word.to_be_bytes()).collect();
    for _ in 0..256 {
        long.send(&units)?;
    }
    let rss = resident(line.ne().process().pid())?;
    for _ in 0..256 {
        long.send(&units)?;
    }
    let grown = resident(line.ne().process().pid())?.saturating_sub(rss);
    assert!(grown < 4 << 20, "{grown} bytes more for 8 MiB of one message");
    drop(long);

    // Many connections of one address: bounded.
    let many: Vec<_> =
        (0..64).map(|_| host.run(|| connect(None, SocketAddrV4::new(NE, 3262), SOON))).collect::<Result<_, _>>()?;
    wait_until("the rest is turned away", SOON, || {
        line.ne().status().is_ok_and(|status| status["strangers"]["too_many"].as_u64() >= Some(1))
    })?;
    drop(many);
    drop((web, early));
    wait_until("those who do not speak NECP are counted", SOON, || {
        line.ne().status().is_ok_and(|status| status["strangers"]["not_necp"] == 2)
    })?;
    for index in 0..2 {
        line.wait_for_state(index, "up")?;
    }
    line.expect_new_flows_at("hostile peers have tried", &["s1", "s2"])?;
    all_answer("hostile peers have tried", &mut talk)
}

/// Bytes of memory that a process has, as /proc says.
fn resident(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
