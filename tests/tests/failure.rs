//! What dies, and what goes on: agents, hosts, the daemon itself.

use std::{
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use necp_tests::{
    conversation::all_answer,
    line::{Line, OFFERS, TALK_AT_VIP, farm, none_moved, one_farm, top},
    load::{Client, Event, Kind, Load, Mix},
    netns::wait_until,
    nginx::{Content, Nginx},
    topology::{Topology, VIP},
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);

#[test]
fn an_agent_killed_in_mid_download_breaks_nothing() -> Result<()> {
    let bed = Topology::builder().build()?;
    // About four seconds at this rate.
    let content = Content::new(&bed, 4 << 20)?;
    let start = |server: &necp_tests::topology::Server| Nginx::start(&bed, server.ns(), server.name(), &[80], &content);
    let _nginx: Vec<Nginx> = bed.servers().iter().map(start).collect::<Result<_>>()?;
    let mut line = Line::start(bed, &one_farm(1.0).replace("\"tcp/7\"", "\"tcp/7\", \"tcp/80\""))?;
    let offers = ["tcp/7=l2", "tcp/80=l2", "udp/53=l2"];
    (0..3).try_for_each(|index| line.start_agent(index, &offers, &[]))?;
    (0..3).try_for_each(|index| line.wait_until_serving(index))?;
    let mix = Mix {
        short: 2,
        short_pause: Duration::from_millis(10),
        downloads: 24,
        download_path: "/big?rate=1m".to_owned(),
        content: content.clone(),
        keep_alive: 24,
        keep_alive_pause: Duration::from_millis(50),
        sources: 200,
    };
    let load = Load::start(line.bed().client(), Client::new(SocketAddrV4::new(VIP, 80)), &mix)?;
    let mut events = Vec::new();
    let long_ones = |events: &[Event], wanted: Kind| {
        let of_s2 =
            |event: &&Event| matches!(event, Event::Placed { kind, server, .. } if *kind == wanted && server == "s2");
        events.iter().filter(of_s2).count()
    };
    wait_until("s2 has downloads and long-lived connections", 3 * SOON, || {
        events.extend(load.events(Duration::from_millis(10)));
        let placed = events.iter().filter(|event| matches!(event, Event::Placed { .. })).count();
        placed >= 48 && long_ones(&events, Kind::Download) > 0 && long_ones(&events, Kind::KeepAlive) > 0
    })?;

    line.kill_agent(1);
    line.wait_for_state(1, "lost")?;
    let lost = Instant::now();
    events.extend(load.events(Duration::ZERO));
    let downloads_of_s2 = long_ones(&events, Kind::Download);
    wait_until("the load goes on without it", 3 * SOON, || {
        events.extend(load.events(Duration::from_millis(10)));
        events.iter().filter(|event| matches!(event, Event::Placed { first_syn, .. } if *first_syn > lost)).count() > 50
    })?;
    let late = events.iter().filter(
        |event| matches!(event, Event::Placed { first_syn, server, .. } if *first_syn > lost && server == "s2"),
    );
    assert_eq!(late.count(), 0, "new connections after the loss");

    line.join(1)?;
    line.talk_until("s2")?.ask()?;
    let (last, cut) = load.finish(6 * SOON);
    events.extend(last);
    let ended: Vec<_> =
        events.iter().filter_map(|event| if let Event::Ended(one) = event { Some(one) } else { None }).collect();
    let failed: Vec<_> = ended.iter().filter(|one| one.failure.is_some()).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert_eq!(cut, 0, "all came to their end");
    // Each with length and checksum, as `failure` above says.
    let whole = ended.iter().filter(|one| one.kind == Kind::Download && one.server.as_deref() == Some("s2")).count();
    assert!(whole >= downloads_of_s2 && whole > 0, "{whole} of {downloads_of_s2}");
    Ok(())
}

#[test]
fn a_lost_host_takes_its_own_flows_and_no_others() -> Result<()> {
    let mut line = Line::with_servers(3, 0.5)?;
    let (talk, mut echo) = (line.talk(60)?, line.echo(60)?);
    let on_s2 = talk.iter().filter(|one| one.server() == "s2").count();
    assert!(on_s2 > 0);
    line.bed().server(1).unplug()?;
    line.kill_agent(1);
    line.wait_for_state(1, "dead")?;
    line.expect_new_flows_at("s2's host is gone", &["s1", "s3"])?;
    let (gone, mut left): (Vec<_>, Vec<_>) = talk.into_iter().partition(|one| one.server() == "s2");
    all_answer("s2's host is gone", &mut left)?;
    for mut one in gone {
        assert!(one.ask_within(Duration::from_secs(5)).is_err(), "{} was on s2", one.local());
    }
    // UDP flows of the dead are placed anew, and stay there.
    for (flow, server) in &mut echo {
        let now = flow.ask()?;
        assert!(if server == "s2" { now != "s2" } else { now == *server }, "from {server} to {now}");
        *server = now;
    }
    none_moved("placed anew", &mut echo)?;
    let log = line.ne().process().log();
    assert!(log.contains("the host 10.0.0.12 is gone"), "{log}");

    line.bed().server(1).plug()?;
    line.join(1)?;
    left.push(line.talk_until("s2")?);
    all_answer("s2 is back", &mut left)?;
    none_moved("s2 is back", &mut echo)
}

#[test]
fn most_servers_lost_at_once_are_kept() -> Result<()> {
    let config = top(2.0) + &farm("web", VIP, &["10.0.0.0/24"], "");
    let mut line = Line::start(Topology::builder().servers(4).build()?, &config)?;
    line.join_all(0..4)?;
    let (mut talk, mut echo) = (line.talk(60)?, line.echo(60)?);
    (0..3).for_each(|index| line.kill_agent(index));
    (0..3).try_for_each(|index| line.wait_for_state(index, "kept"))?;
    let status = line.ne().status()?;
    assert!(status["alarms"][0].as_str().is_some_and(|alarm| alarm.contains("farm web")), "{}", status["alarms"]);
    line.expect_new_flows_at("most agents are lost, the servers live", &["s1", "s2", "s3", "s4"])?;
    all_answer("most agents are lost", &mut talk)?;
    none_moved("most agents are lost", &mut echo)?;

    line.join_all(0..3)?;
    wait_until("the alarm ends", SOON, || {
        line.ne().status().is_ok_and(|status| status["alarms"] == Value::Array(vec![]))
    })?;
    all_answer("all are back", &mut talk)?;
    none_moved("all are back", &mut echo)
}

#[test]
fn the_packet_path_outlives_its_daemon() -> Result<()> {
    let mut line = Line::with_servers(3, 1.0)?;
    let (mut talk, mut echo) = (line.talk(40)?, line.echo(40)?);
    // A transition is under way, so that records matter too.
    line.kill_agent(2);
    line.wait_for_state(2, "lost")?;
    all_answer("s3's agent is lost", &mut talk)?;
    line.join(2)?;
    let ids = |line: &Line| -> Result<Vec<Option<u64>>> {
        (0..3).map(|n| Ok(line.row("tcp/7", n)?.and_then(|row| row["id"].as_u64()))).collect()
    };
    let before = ids(&line)?;

    line.kill_ne();
    all_answer("no daemon", &mut talk)?;
    none_moved("no daemon", &mut echo)?;
    line.expect_new_flows_at("no daemon", &["s1", "s2", "s3"])?;
    talk.extend(line.talk(30)?);
    echo.extend(line.echo(30)?);

    line.restart_ne()?;
    all_answer("a new daemon", &mut talk)?;
    none_moved("a new daemon", &mut echo)?;
    line.expect_new_flows_at("a new daemon", &["s1", "s2", "s3"])?;
    (0..3).try_for_each(|index| line.wait_until_serving(index))?;
    let status = line.ne().status()?;
    assert_eq!((&status["took_over"], &status["sessions"]), (&true.into(), &3.into()));
    assert_eq!(ids(&line)?, before, "the same offers are the same server ids");
    all_answer("all have come back", &mut talk)?;
    none_moved("all have come back", &mut echo)?;
    line.expect_new_flows_at("all have come back", &["s1", "s2", "s3"])
}

#[test]
fn after_a_restart_who_stays_away_serves_until_the_grace_ends() -> Result<()> {
    let config = "grace = 4\n".to_owned() + &one_farm(1.0);
    let mut line = Line::start(Topology::builder().build()?, &config)?;
    line.join_all(0..3)?;
    let (mut talk, mut echo) = (line.talk(60)?, line.echo(60)?);
    line.kill_ne();
    line.kill_agent(1);
    line.restart_ne()?;
    line.wait_for_state(1, "adopted")?;
    line.talk_until("s2")?.ask()?;
    (0..3).filter(|index| *index != 1).try_for_each(|index| line.wait_until_serving(index))?;
    line.wait_for_row(1, "has no slots", |row| row["slots"] == 0)?;
    assert!(line.ne().process().log().contains("10.0.0.12 has not come back since the restart"));
    line.expect_new_flows_at("the grace has ended", &["s1", "s3"])?;
    all_answer("the grace has ended", &mut talk)?;
    none_moved("the grace has ended", &mut echo)?;
    line.join(1)?;
    talk.push(line.talk_until("s2")?);
    all_answer("s2 is back", &mut talk)
}

/// SE's returning without the START that they had: its old offer ends a second after its INIT.
#[test]
fn after_a_restart_who_no_longer_offers_gets_no_more() -> Result<()> {
    let mut line = Line::with_servers(2, 1.0)?;
    let mut talk = line.talk(40)?;
    line.kill_agent(1);
    line.kill_ne();
    line.restart_ne()?;
    line.start_agent(1, &[], &[])?;
    line.wait_for_row(1, "has no slots", |row| row["slots"] == 0 && row["state"] != "adopted")?;
    line.wait_until_serving(0)?;
    line.expect_new_flows_at("s2 offers nothing", &["s1"])?;
    all_answer("s2 offers nothing", &mut talk)
}

#[test]
fn agents_return_by_themselves_after_the_daemon_was_stopped() -> Result<()> {
    let mut line = Line::with_servers(2, 1.0)?;
    line.ne().process().terminate(SOON)?;
    // Nobody answers for the VIP any more.
    let gone = line
        .bed()
        .client()
        .run(|| necp_tests::conversation::connect(None, TALK_AT_VIP, Duration::from_secs(1)).map(drop));
    assert!(gone.is_err(), "the VIP has been taken away");
    line.restart_ne()?;
    (0..2).try_for_each(|index| line.wait_until_serving(index))?;
    assert_eq!(line.ne().status()?["took_over"], false);
    line.expect_new_flows_at("all over again", &["s1", "s2"])
}

/// The switch loses every server for a moment: sessions and flows outlive it.
#[test]
fn a_pause_of_the_network_is_no_loss() -> Result<()> {
    let mut line = Line::start(Topology::builder().build()?, &one_farm(10.0))?;
    (0..3).try_for_each(|index| line.start_agent(index, &OFFERS, &["--keepalive", "10"]))?;
    (0..3).try_for_each(|index| line.wait_until_serving(index))?;
    let (mut talk, mut echo) = (line.talk(30)?, line.echo(30)?);
    let sessions = |line: &mut Line| line.ne().process().log().matches("has joined").count();
    let before = sessions(&mut line);
    line.bed().servers().iter().try_for_each(|server| server.unplug())?;
    std::thread::sleep(Duration::from_millis(500));
    line.bed().servers().iter().try_for_each(|server| server.plug())?;
    all_answer("the network is back", &mut talk)?;
    none_moved("the network is back", &mut echo)?;
    line.expect_new_flows_at("the network is back", &["s1", "s2", "s3"])?;
    assert_eq!(sessions(&mut line), before, "no session was lost");
    line.ne().status()?["sessions"].as_u64().filter(|count| *count == 3).context("three sessions").map(drop)
}
