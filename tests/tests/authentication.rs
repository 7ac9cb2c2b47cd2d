//! Keys: who has the right one joins, who has another or none does not; keys change while sessions go on; what was recorded
//! is worth nothing.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use necp_tests::{
    conversation::all_answer,
    daemon::{NECP_PORT, NetworkElement},
    hand::{BASIC_PAYLOAD, Hand, Message, opcode},
    line::{Line, OFFERS, farm, top},
    netns::{Namespace, wait_until},
    topology::{NE, Topology, VIP},
};

const SOON: Duration = Duration::from_secs(10);
const KEY: &str = "a secret of sixteen bytes and more\n";

/// Writes a key file into the bed's directory.
fn key_file(bed: &Topology, name: &str, content: &str, mode: u32) -> Result<PathBuf> {
    let path = bed.dir().join(name);
    fs::write(&path, content)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    Ok(path)
}

fn config(keepalive: f64, auth: &str) -> String {
    top(keepalive) + &farm("web", VIP, &["10.0.0.0/24"], "").replace("auth = \"none\"", auth)
}

/// A line whose NE has this key for all servers.
fn line(servers: usize, keepalive: f64) -> Result<(Line, PathBuf)> {
    let bed = Topology::builder().servers(servers).build()?;
    let key = key_file(&bed, "web.key", KEY, 0o600)?;
    let line = Line::start(bed, &config(keepalive, &format!("key_file = {key:?}")))?;
    Ok((line, key))
}

fn join(line: &mut Line, index: usize, key: &std::path::Path) -> Result<()> {
    line.start_agent(index, &OFFERS, &["--key-file", &key.display().to_string()])?;
    line.wait_until_serving(index)
}

fn rejected(line: &mut Line, kind: &str) -> u64 {
    line.ne().status().ok().and_then(|status| status["rejected"][kind].as_u64()).unwrap_or(0)
}

#[test]
fn only_the_right_key_joins() -> Result<()> {
    let (mut line, key) = line(3, 1.0)?;
    join(&mut line, 0, &key)?;
    let mut talk = line.talk(20)?;
    let other = key_file(line.bed(), "other.key", "another secret of many bytes", 0o600)?;

    line.start_agent(1, &OFFERS, &["--key-file", &other.display().to_string()])?;
    line.agent(1).process().wait_for_log("refuses our key", SOON)?;
    line.start_agent(2, &OFFERS, &[])?;
    line.agent(2).process().wait_for_log("requires a key (--key-file FILE)", SOON)?;
    wait_until("both are counted", SOON, || {
        rejected(&mut line, "bad_credential") >= 1 && rejected(&mut line, "unauthenticated") >= 1
    })?;
    // By hand: a bare refusal, with nothing signed.
    let init = Message { flags: BASIC_PAYLOAD, opcode: opcode::INIT, request_id: 1, units: vec![[0; 8]] };
    let mut stranger = Hand::connect(line.bed().server(2).ns(), NE)?;
    stranger.send(&init.bytes())?;
    let answer = stranger.receive()?;
    assert_eq!(answer, Some(Message { flags: 0x14, opcode: opcode::INIT_ACK, request_id: 1, units: Vec::new() }));
    assert_eq!(stranger.read_to_end()?, 0, "closed");

    let status = line.ne().status()?;
    assert_eq!((&status["sessions"], &status["farms"][0]["authenticated"]), (&1.into(), &true.into()));
    for index in [1, 2] {
        assert!(line.row("tcp/7", index)?.is_none(), "s{} has no offer", index + 1);
    }
    let log = line.ne().process().log();
    assert!(log.contains("10.0.0.12 is turned away: INIT with a wrong credential"), "{log}");
    assert!(!log.contains(KEY.trim()));
    line.expect_new_flows_at("the others have tried", &["s1"])?;
    all_answer("the others have tried", &mut talk)
}

#[test]
fn key_files_are_checked_before_anything_starts() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let key = key_file(&bed, "web.key", KEY, 0o644)?;
    let error = NetworkElement::start(&bed, &config(1.0, &format!("key_file = {key:?}"))).expect_err("its mode");
    let text = format!("{error:#}");
    ensure!(text.contains("web.key: its mode is 644") && text.contains("chmod 600"), "{text}");
    Ok(())
}

#[test]
fn keys_change_while_sessions_go_on() -> Result<()> {
    let (mut line, key) = line(2, 1.0)?;
    join(&mut line, 0, &key)?;
    let mut talk = line.talk(20)?;
    let old = key_file(line.bed(), "old.key", KEY, 0o600)?;
    let reload = |line: &mut Line| line.ne().process().signal(libc::SIGHUP);

    // A file that is wrong changes nothing.
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640))?;
    fs::write(&key, "too short")?;
    reload(&mut line)?;
    line.ne().process().wait_for_log("the key that was read before stays", SOON)?;
    join(&mut line, 1, &old)?;
    line.kill_agent(1);

    key_file(line.bed(), "web.key", "the next secret, as long as it gets", 0o600)?;
    reload(&mut line)?;
    line.ne().process().wait_for_log("new keys in", SOON)?;
    line.start_agent(1, &OFFERS, &["--key-file", &old.display().to_string()])?;
    line.agent(1).process().wait_for_log("refuses our key", SOON)?;
    line.kill_agent(1);
    join(&mut line, 1, &key)?;
    // The session that was open has gone on, past three of its keepalives.
    let begun = std::time::Instant::now();
    wait_until("three keepalives pass", SOON, || begun.elapsed() > Duration::from_millis(4500))?;
    assert_eq!(line.ne().status()?["sessions"], 2);
    let log = line.agent(0).process().log();
    assert!(!log.contains("retry in"), "{log}");
    line.expect_new_flows_at("the key has changed", &["s1", "s2"])?;
    all_answer("the key has changed", &mut talk)
}

/// Stands between an agent and the NE, on the agent's host, and keeps what the agent says.
struct Recorder {
    address: SocketAddr,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Recorder {
    fn start(ns: &Namespace) -> Result<Self> {
        let listener = ns.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let address = listener.local_addr()?;
        let said = Arc::new(Mutex::new(Vec::new()));
        let (ns, kept) = (ns.clone(), Arc::clone(&said));
        // It ends with the connections, which end with the agent.
        thread::spawn(move || {
            let Ok((agent, _)) = listener.accept() else { return };
            let Ok(ne) = ns.run(|| TcpStream::connect(SocketAddrV4::new(NE, NECP_PORT))) else { return };
            let (Ok(from_ne), Ok(to_agent)) = (ne.try_clone(), agent.try_clone()) else { return };
            thread::spawn(move || pass_on(from_ne, to_agent, None));
            pass_on(agent, ne, Some(kept));
        });
        Ok(Self { address, said })
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, kept: Option<Arc<Mutex<Vec<u8>>>>) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if let Some(kept) = &kept {
            kept.lock().expect("nobody panics").extend_from_slice(&buffer[..length]);
        }
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

#[test]
fn a_recorded_session_does_not_disturb_the_living_one() -> Result<()> {
    let (mut line, key) = line(2, 1.0)?;
    let recorder = Recorder::start(line.bed().server(0).ns())?;
    let through = recorder.address.to_string();
    line.start_agent(0, &OFFERS, &["--key-file", &key.display().to_string(), "--ne", &through])?;
    // INIT and START of two services. It joins twice: at the NE itself, and through the recorder, from the same address. The later one supersedes the other,
    // so the recorder's is ended first.
    wait_until("START was recorded", SOON, || recorder.said.lock().expect("nobody panics").len() >= 72 + 104)?;
    line.kill_agent(0);
    let said = recorder.said.lock().expect("nobody panics").clone();
    assert_eq!(said[5], opcode::INIT);

    join(&mut line, 0, &key)?;
    let mut talk = line.talk(20)?;
    // All of it, then INIT alone: answered, and no session.
    let mut replay = Hand::connect(line.bed().server(0).ns(), NE)?;
    replay.send(&said)?;
    assert!(replay.read_to_end()? >= 72, "INIT_ACK at least");
    let mut silent = Hand::connect(line.bed().server(0).ns(), NE)?;
    silent.send(&said[..72])?;
    wait_until("they are counted", 3 * SOON, || rejected(&mut line, "unconfirmed") >= 2)?;
    let status = line.ne().status()?;
    assert!(rejected(&mut line, "bad_sequence") >= 1, "{}; {} bytes were recorded", status["rejected"], said.len());
    assert_eq!(line.ne().status()?["sessions"], 1);
    let log = line.agent(0).process().log();
    assert!(!log.contains("retry in"), "the session was never lost: {log}");
    line.expect_new_flows_at("a recorded session was sent again", &["s1"])?;
    all_answer("a recorded session was sent again", &mut talk)
}

/// Two daemons in one second, and agents that come back at once: nobody is taken for a replay.
#[test]
fn restarts_within_a_second_are_no_replays() -> Result<()> {
    let (mut line, key) = line(1, 1.0)?;
    join(&mut line, 0, &key)?;
    for _ in 0..3 {
        line.kill_ne();
        line.restart_ne()?;
        line.kill_agent(0);
        join(&mut line, 0, &key)?;
        assert_eq!(rejected(&mut line, "bad_sequence") + rejected(&mut line, "bad_credential"), 0);
    }
    Ok(())
}
