//! Changes that move no flow: STOP, START, health, and an agent that leaves in peace.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use necp_tests::{
    conversation::{Conversation, all_answer, fresh_source},
    frame::{self, Flow, flags},
    hand::{Hand, start_unit},
    line::{ECHO_AT_VIP, Line, OFFERS, TALK_AT_VIP, none_moved, one_farm},
    link,
    raw::RawSocket,
    topology::{NE, Topology, VIP},
};

const SOON: Duration = Duration::from_secs(10);
const TALK_UNIT: [u32; 8] = [1, 6, 7, 0, 0, 0, 0, 0];
const ECHO_UNIT: [u32; 8] = [1, 17, 53, 0, 0, 0, 0, 0];

#[test]
fn a_server_that_leaves_waits_for_its_connections() -> Result<()> {
    let mut line = Line::with_servers(3, 1.0)?;
    let (mut talk, mut echo) = (line.talk(60)?, line.echo(60)?);
    line.agent(1).process().signal(libc::SIGTERM)?;
    line.agent(1).process().wait_for_log("stopped; no new flows", SOON)?;
    // From the acknowledgement on, not a moment later.
    line.expect_new_flows_at("s2 has stopped", &["s1", "s3"])?;
    all_answer("s2 has stopped", &mut talk)?;
    none_moved("s2 has stopped", &mut echo)?;
    line.wait_for_state(1, "draining")?;
    line.agent(1).process().wait_for_log("connections left", SOON)?;
    ensure!(line.agent(1).process().ended().is_none(), "it has connections: {}", line.agent(1).process().log());

    talk.retain(|one| one.server() != "s2");
    let status = line.agent(1).process().wait(SOON)?;
    assert!(status.success(), "{status}");
    assert!(line.agent(1).process().log().contains("drained: no connections left"));
    all_answer("s2 has left", &mut talk)
}

#[test]
fn a_drain_is_bounded() -> Result<()> {
    let mut line = Line::start(Topology::builder().servers(2).build()?, &one_farm(1.0))?;
    line.start_agent(0, &OFFERS, &["--drain", "1.5"])?;
    line.start_agent(1, &OFFERS, &[])?;
    (0..2).try_for_each(|index| line.wait_until_serving(index))?;
    let mut held = line.talk_until("s1")?;
    let began = Instant::now();
    let status = line.agent(0).process().terminate(SOON)?;
    assert!(status.success() && began.elapsed() >= Duration::from_millis(1500), "{status} {:?}", began.elapsed());
    assert!(line.agent(0).process().log().contains("but the time is up"), "{}", line.agent(0).process().log());
    // The agent has left; the server has not.
    held.ask()?;
    line.expect_new_flows_at("s1 has left", &["s2"])
}

#[test]
fn a_second_signal_ends_a_drain() -> Result<()> {
    let mut line = Line::with_servers(1, 1.0)?;
    let _held = line.talk(1)?;
    line.agent(0).process().signal(libc::SIGTERM)?;
    line.agent(0).process().wait_for_log("draining: 1 connections left", SOON)?;
    line.agent(0).process().signal(libc::SIGINT)?;
    assert!(line.agent(0).process().wait(SOON)?.success());
    Ok(())
}

/// An acknowledged STOP stands in the maps: no SYN that is sent after it gets there.
#[test]
fn after_stop_ack_no_new_flow_arrives() -> Result<()> {
    const SERVICE_OF_ONE: [u32; 8] = [1, 17, 9, 0, 0, 0, 0, 0];
    const ROUNDS: u16 = 30;
    const FLOWS: u16 = 40;
    let config = one_farm(60.0).replace("\"udp/53\"", "\"udp/53\", \"udp/9\"");
    let mut line = Line::start(Topology::builder().servers(2).build()?, &config)?;
    line.join(1)?;
    let bed = line.bed();
    let mut hand = Hand::join(bed.server(0).ns(), NE)?;
    assert_eq!(hand.start(&[SERVICE_OF_ONE])?, [[0; 8]; 0]);

    let (client, server) = (RawSocket::open(bed.client(), "eth0")?, RawSocket::open(bed.server(0).ns(), "eth0")?);
    let flow = |source, destination| Flow {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: link::mac(bed.ne(), "eth0").unwrap_or_default(),
        source,
        destination,
        ttl: 64,
    };
    // What comes through the balancer keeps its order: behind the mark no SYN of the round can follow.
    let syns = |round: u16| -> Result<usize> {
        for _ in 0..FLOWS {
            client.send(&flow(fresh_source(), TALK_AT_VIP).tcp(flags::SYN, 1, 0, b""))?;
        }
        let mark = format!("end of round {round}").into_bytes();
        client.send(&flow(fresh_source(), std::net::SocketAddrV4::new(VIP, 9)).udp(&mark))?;
        let mut arrived = 0;
        loop {
            let ours = |frame: &[u8]| frame::parse(frame).is_some_and(|seen| *seen.flow.destination.ip() == VIP);
            let frame = server.receive(SOON, ours)?.context("the mark did not come")?;
            let seen = frame::parse(&frame).context("parsed before")?;
            if seen.payload == mark {
                return Ok(arrived);
            }
            arrived += usize::from(seen.tcp.is_some_and(|tcp| tcp.syn));
        }
    };
    let mut while_started = 0;
    for round in 0..ROUNDS {
        assert_eq!(hand.start(&[TALK_UNIT])?, [[0; 8]; 0]);
        let arrived = syns(2 * round)?;
        while_started += arrived;
        assert_eq!(hand.stop(&[TALK_UNIT])?, [[0; 8]; 0]);
        let arrived = syns(2 * round + 1)?;
        assert_eq!(arrived, 0, "round {round}: new flows after STOP_ACK");
    }
    // A share of the SYNs, else the rest says nothing.
    assert!(while_started > usize::from(ROUNDS), "{while_started} SYNs came while it was started");
    Ok(())
}

#[test]
fn nothing_moves_when_servers_join_stop_and_return() -> Result<()> {
    let mut line = Line::start(Topology::builder().servers(4).build()?, &one_farm(60.0))?;
    line.join_all(0..2)?;
    let (mut talk, mut echo) = (line.talk(50)?, line.echo(50)?);
    let mut check = |line: &Line, when: &str| -> Result<()> {
        // New flows of this phase must stay where they are from now on, too.
        talk.extend(line.talk(30)?);
        echo.extend(line.echo(30)?);
        all_answer(when, &mut talk)?;
        none_moved(when, &mut echo)
    };
    let units = [TALK_UNIT, ECHO_UNIT];
    let mut hands = [2, 3].map(|index| Hand::join(line.bed().server(index).ns(), NE));
    for round in 0..4 {
        for hand in &mut hands {
            let hand = hand.as_mut().map_err(|error| anyhow::anyhow!("{error:#}"))?;
            assert_eq!(hand.start(&units)?, [[0; 8]; 0]);
            check(&line, &format!("round {round}, a server has started"))?;
        }
        line.talk_until("s3")?.ask()?;
        for hand in &mut hands {
            let hand = hand.as_mut().map_err(|error| anyhow::anyhow!("{error:#}"))?;
            assert_eq!(hand.stop(&units)?, [[0; 8]; 0]);
            check(&line, &format!("round {round}, a server has stopped"))?;
        }
        line.expect_new_flows_at("the guests have stopped", &["s1", "s2"])?;
    }
    Ok(())
}

#[test]
fn health_zero_takes_new_flows_away_and_nothing_else() -> Result<()> {
    let bed = Topology::builder().servers(3).build()?;
    let file = bed.dir().join("health");
    fs::write(&file, "100")?;
    let mut line = Line::start(bed, &one_farm(0.5))?;
    let source = format!("file:{}", file.display());
    line.start_agent(1, &OFFERS, &["--health", &source, "--health-interval", "0.05"])?;
    line.join_all([0, 2])?;
    line.wait_until_serving(1)?;
    let (mut talk, mut echo) = (line.talk(60)?, line.echo(60)?);

    fs::write(&file, "0")?;
    let began = Instant::now();
    line.wait_for_row(1, "has weight 0", |row| row["health"] == 0 && row["weight"] == 0 && row["slots"] == 0)?;
    // The next keepalive asks for it, and it acts at once; the bound leaves room for a busy machine.
    assert!(began.elapsed() < SOON, "after {:?}", began.elapsed());
    line.expect_new_flows_at("s2 is at 0", &["s1", "s3"])?;
    all_answer("s2 is at 0", &mut talk)?;
    none_moved("s2 is at 0", &mut echo)?;
    line.wait_for_state(1, "up")?;

    fs::write(&file, "100")?;
    line.wait_until_serving(1)?;
    talk.push(line.talk_until("s2")?);
    all_answer("s2 is back", &mut talk)?;
    none_moved("s2 is back", &mut echo)
}

#[test]
fn health_is_a_share() -> Result<()> {
    let bed = Topology::builder().servers(2).build()?;
    let file = bed.dir().join("health");
    fs::write(&file, "100")?;
    let mut line = Line::start(bed, &one_farm(0.5))?;
    let source = format!("file:{}", file.display());
    line.start_agent(1, &OFFERS, &["--health", &source, "--health-interval", "0.05"])?;
    line.join(0)?;
    line.wait_until_serving(1)?;
    let near = |percent: f64| {
        move |row: &serde_json::Value| row["slots_percent"].as_f64().is_some_and(|found| (found - percent).abs() < 1.0)
    };
    line.wait_for_row(1, "has half of the slots", near(50.0))?;
    let (mut talk, mut echo) = (line.talk(60)?, line.echo(60)?);
    fs::write(&file, "25")?;
    line.wait_for_row(1, "has a fifth of the slots", near(20.0))?;
    let new = line.talk(400)?;
    let second = new.iter().filter(|one| one.server() == "s2").count();
    // Five standard deviations of 8.
    assert!((40..=120).contains(&second), "{second} of 400 went to s2");
    all_answer("the shares have changed", talk.iter_mut())?;
    none_moved("the shares have changed", &mut echo)?;

    // Noise moves nothing: the shares are the same after several answers.
    let before = line.row("tcp/7", 1)?.context("s2")?["slots"].clone();
    for noise in ["30", "20", "27", "22"] {
        fs::write(&file, noise)?;
        let number: u64 = noise.parse()?;
        line.wait_for_row(1, &format!("is at {noise}"), |row| row["health"] == number)?;
        assert_eq!(line.row("tcp/7", 1)?.context("s2")?["slots"], before, "at {noise}");
    }
    Ok(())
}

#[test]
fn udp_may_opt_out_of_tracking() -> Result<()> {
    let config = one_farm(5.0) + "udp_tracking = false\n";
    let mut line = Line::start(Topology::builder().servers(2).build()?, &config)?;
    line.join_all(0..2)?;
    let mut echo = line.echo(60)?;
    none_moved("nothing has changed", &mut echo)?;
    let mut talk = line.talk(20)?;
    line.agent(0).process().signal(libc::SIGTERM)?;
    line.agent(0).process().wait_for_log("stopped; no new flows", SOON)?;
    // Every datagram now goes where the table says, TCP flows do not.
    for (flow, _) in &mut echo {
        assert_eq!(flow.ask()?, "s2", "{} to {ECHO_AT_VIP}", flow.local());
    }
    all_answer("s1 has stopped", &mut talk)
}

/// The same offer again, and a START of what is started, change nothing.
#[test]
fn start_and_stop_are_idempotent() -> Result<()> {
    let mut line = Line::start(Topology::builder().servers(2).build()?, &one_farm(60.0))?;
    line.join(0)?;
    let mut hand = Hand::join(line.bed().server(1).ns(), NE)?;
    assert_eq!(hand.stop(&[TALK_UNIT, ECHO_UNIT])?, [[0; 8]; 0], "nothing was started");
    assert_eq!(hand.start(&[TALK_UNIT, ECHO_UNIT, TALK_UNIT])?, [[0; 8]; 0]);
    let id = line.row("tcp/7", 1)?.context("a row")?["id"].clone();
    let mut talk: Vec<Conversation> = line.talk(30)?;
    assert_eq!(hand.start(&[TALK_UNIT])?, [[0; 8]; 0]);
    assert_eq!(hand.stop(&[start_unit(77, 6, 7)])?, [[0; 8]; 0], "data0 of STOP is not read");
    assert_eq!(hand.start(&[TALK_UNIT])?, [[0; 8]; 0]);
    assert_eq!(line.row("tcp/7", 1)?.context("a row")?["id"], id, "the same offer is the same server id");
    all_answer("started again", &mut talk)
}
