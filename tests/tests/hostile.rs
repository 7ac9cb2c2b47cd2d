//! Hostile and broken peers at admitted addresses, the worst place for them: memory stays bounded, the log readable, and a
//! healthy server does not notice.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use necp_tests::{
    attack::{Attack, Attackers, endless, init, message, route_attackers},
    conversation::all_answer,
    hand::{Unit, opcode, start_unit},
    line::{Line, farm, top},
    netns::wait_until,
    scale::memory,
    topology::{Topology, VIP},
    watchman::Watchman,
};
use necp_user::daemon::ne::limits::raise_open_files;

const SOON: Duration = Duration::from_secs(10);
/// What STOP and START may take while the daemon is attacked, on two cores that the attackers share.
const IN_TIME: Duration = Duration::from_millis(500);
/// How long each attack goes on.
const SIEGE: Duration = Duration::from_secs(12);
/// EXCEPTION_ADD (draft §5.3).
const EXCEPTION_ADD: u8 = 0x20;

/// A line whose NE admits the attackers too; s1 is for the watchman, s2 and s3 have agents.
fn besieged() -> Result<Line> {
    raise_open_files(16_384)?;
    let bed = Topology::builder().build()?;
    route_attackers(&bed)?;
    let config = top(1.0) + &farm("web", VIP, &["10.0.0.0/24", "198.18.0.0/17"], "");
    let mut line = Line::start(bed, &config)?;
    line.join_all(1..3)?;
    Ok(line)
}

/// While `attackers` are at work: the daemon grows by `bound` bytes at most, the watchman is served, flows go on.
fn withstand(line: &mut Line, bound: u64, attackers: impl FnOnce(&Line) -> Result<Vec<Attackers>>) -> Result<()> {
    let pid = line.ne().process().pid();
    let mut talk = line.talk(20)?;
    let watchman = Watchman::start(line.bed().server(0).ns(), 7)?;
    thread::sleep(Duration::from_secs(1));
    let (before, log_before) = (memory(pid)?, line.ne().process().log().lines().count());
    let attackers = attackers(line)?;
    let began = Instant::now();
    let mut worst = before;
    while began.elapsed() < SIEGE {
        worst = worst.max(memory(pid)?);
        all_answer("under attack", &mut talk)?;
        talk.push(line.talk(1)?.pop().context("no new flow")?);
        thread::sleep(Duration::from_millis(100));
    }
    let watched = watchman.finish()?;
    drop(attackers);
    let log = line.ne().process().log();
    let lines = log.lines().count() - log_before;
    println!("memory +{} KiB, {lines} lines in the log, {watched:?}", (worst - before) / 1024);
    ensure!(worst - before <= bound, "{} bytes more, at most {bound} were expected", worst - before);
    ensure!(watched.ended.is_none(), "the watchman's session ended: {watched:?}");
    ensure!(watched.missed == 0, "a keepalive was missed: {watched:?}");
    ensure!(watched.answered >= 20, "too few requests were answered: {watched:?}");
    ensure!(watched.slowest_stop <= IN_TIME && watched.slowest_start <= IN_TIME, "too slow: {watched:?}");
    for address in ["10.0.0.12", "10.0.0.13"] {
        ensure!(!log.contains(&format!("session of {address} lost")), "{address} was lost:\n{log}");
    }
    Ok(())
}

fn strangers(line: &mut Line, kind: &str) -> u64 {
    line.ne().status().ok().and_then(|status| status["strangers"][kind].as_u64()).unwrap_or(0)
}

const MIB: u64 = 1 << 20;
const UNIT: Unit = [1, 6, 7, 0, 0, 0, 0, 0];

fn lines_about_strangers(line: &mut Line) -> usize {
    line.ne().process().log().lines().filter(|line| line.contains("only counted")).count()
}

#[test]
fn lengths_without_end() -> Result<()> {
    let mut line = besieged()?;
    let opcodes = [opcode::START, opcode::STOP, opcode::KEEPALIVE, opcode::KEEPALIVE_ACK, 0x00, EXCEPTION_ADD, 0x55];
    let flood = |length: u32| {
        opcodes.map(|opcode| Attack::Flood {
            first: [init(), endless(opcode, length)].concat(),
            then: UNIT.repeat(128).into_iter().flat_map(u32::to_be_bytes).collect(),
            reads: true,
        })
    };
    let attacks: Vec<Attack> = [u32::MAX, u32::MAX - 31].into_iter().flat_map(flood).collect();
    // What may be held in all, as documented, and what the connections themselves cost.
    withstand(&mut line, 192 * MIB, |line| Ok(vec![Attackers::start(line.bed().client(), 0, 42, attacks)?]))
}

#[test]
fn slow_ones_and_idle_ones() -> Result<()> {
    let mut line = besieged()?;
    let half = [init(), message(opcode::START, &[UNIT])].concat();
    withstand(&mut line, 192 * MIB, |line| {
        let ns = line.bed().client();
        let slow = Attackers::start(ns, 0, 1000, vec![Attack::Drip(init()), Attack::Drip(half)])?;
        let idle = Attackers::start(ns, 1000, 10_000, vec![Attack::Silence])?;
        Ok(vec![slow, idle])
    })?;
    wait_until("those who said nothing are counted", SOON, || strangers(&mut line, "silent") >= 5000)?;
    ensure!(lines_about_strangers(&mut line) <= 4, "each kind is told once");
    wait_until("all are gone", 3 * SOON, || line.ne().status().is_ok_and(|status| status["connections"] == 2))
}

#[test]
fn garbage_and_other_versions() -> Result<()> {
    let mut line = besieged()?;
    let mut version = message(opcode::START, &[UNIT]);
    version[4] = 255;
    let attacks = vec![
        Attack::Say([init(), vec![0xee; 4096]].concat()),
        Attack::Flood { first: init(), then: version.repeat(32), reads: true },
    ];
    withstand(&mut line, 32 * MIB, |line| Ok(vec![Attackers::start(line.bed().client(), 0, 40, attacks)?]))
}

#[test]
fn floods_of_requests() -> Result<()> {
    let mut line = besieged()?;
    let start_stop = [message(opcode::START, &[UNIT]), message(opcode::STOP, &[UNIT])].concat();
    let wrong: Vec<Unit> = (0..512).map(|port| start_unit(1, 6, 1000 + port)).collect();
    let exceptions: Vec<Unit> = (0..512).map(|host| [1, 60, 0xc633_0000 + host, 32, 0, 0, 6, 80]).collect();
    let attacks = vec![
        Attack::Flood { first: init(), then: start_stop.repeat(16), reads: true },
        Attack::Flood { first: init(), then: message(opcode::START, &wrong), reads: true },
        Attack::Flood { first: init(), then: message(EXCEPTION_ADD, &exceptions), reads: true },
        Attack::Flood { first: init(), then: message(EXCEPTION_ADD, &exceptions), reads: false },
        Attack::Flood { first: init(), then: message(opcode::KEEPALIVE, &[]).repeat(64), reads: false },
    ];
    withstand(&mut line, 192 * MIB, |line| Ok(vec![Attackers::start(line.bed().client(), 0, 40, attacks)?]))?;
    let lines = line.ne().process().log().lines().count();
    ensure!(lines < 40 * 25 + 100, "{lines} lines in the log");
    Ok(())
}

#[test]
fn reconnect_storms_and_strangers() -> Result<()> {
    let mut line = besieged()?;
    let tls = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[7; 64]].concat();
    let strangers_say =
        [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), tls, b"SSH-2.0-OpenSSH_9.9\r\n".to_vec(), b"\r\n\r\n".to_vec()];
    let storm = [init(), message(opcode::START, &[UNIT]), b"XX".to_vec()].concat();
    withstand(&mut line, 64 * MIB, |line| {
        let ns = line.bed().client();
        let say = strangers_say.map(Attack::Say).to_vec();
        Ok(vec![Attackers::start(ns, 0, 40, vec![Attack::Say(storm)])?, Attackers::start(ns, 1000, 40, say)?])
    })?;
    for kind in ["http", "tls", "ssh"] {
        ensure!(strangers(&mut line, kind) > 10, "{kind}: {}", strangers(&mut line, kind));
    }
    ensure!(lines_about_strangers(&mut line) <= 4, "each kind is told once");
    let lines = line.ne().process().log().lines().count();
    ensure!(lines < 40 * 25 + 100, "{lines} lines in the log");
    Ok(())
}

/// When every place is taken by those who say nothing, a server still gets in: the oldest of them makes room.
#[test]
fn a_server_joins_when_all_places_are_taken() -> Result<()> {
    let mut line = besieged()?;
    let _crowd = Attackers::start(line.bed().client(), 0, 17_000, vec![Attack::Silence])?;
    wait_until("all places are taken", 3 * SOON, || strangers(&mut line, "too_many") > 0)?;
    let watchman = Watchman::start(line.bed().server(0).ns(), 7)?;
    thread::sleep(Duration::from_secs(3));
    let watched = watchman.finish()?;
    println!("{watched:?}");
    ensure!(watched.ended.is_none() && watched.answered > 3, "{watched:?}");
    Ok(())
}
