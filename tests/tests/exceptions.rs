//! Exceptions over real TCP. By servers whose every byte is written by hand: whose they are, how many there may be, when they
//! end, and long lists. By the real agent's commands: where real clients of real web servers go.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use necp_ebpf::abi::{ExceptionMasks, names};
use necp_tests::{
    daemon::NetworkElement,
    hand::{BASIC_PAYLOAD, Hand, Message, Unit, opcode, start_unit},
    line::{Line, OFFERS, farm, top},
    load::{Client, Event, Failure, Outcome},
    netns::wait_until,
    nginx::{Content, Nginx},
    topology::{NE, Topology, VIP, client_address},
};
use tokio::{runtime::Runtime, task::JoinHandle};

const SOON: Duration = Duration::from_secs(10);
const ALL: Unit = [0; 8];
const NONE: [Unit; 0] = [];
const LOCAL: u32 = 1;
const GLOBAL: u32 = 2;

fn start(more: &str) -> Result<(Topology, NetworkElement, Hand, Hand)> {
    let bed = Topology::builder().servers(2).build()?;
    let ne = NetworkElement::start(&bed, &(top(5.0) + &farm("web", VIP, &["10.0.0.0/24"], more)))?;
    let (one, two) = (Hand::join(bed.server(0).ns(), NE)?, Hand::join(bed.server(1).ns(), NE)?);
    Ok((bed, ne, one, two))
}

/// Clients of this /32 at tcp/7 (draft §5.7.1).
fn client(scope: u32, data1: u32, address: u32) -> Unit {
    [scope, data1, address, 32, 0, 0, 6, 7]
}

fn sorted(mut units: Vec<Unit>) -> Vec<Unit> {
    units.sort_unstable();
    units
}

#[test]
fn a_server_deletes_its_own_exceptions_only() -> Result<()> {
    let (bed, ne, mut one, mut two) = start("")?;
    let [s1, s2] = [0, 1].map(|index| u32::from(bed.server(index).ip()));
    assert_eq!(one.except_add(&[client(LOCAL, 0, 0xcb00_7101), client(GLOBAL, 0, 0xcb00_7102)])?, NONE);
    assert_eq!(two.except_add(&[client(LOCAL, 0, 0xcb00_7101)])?, NONE);
    // The farm does not trust its servers with global ones; installers are named.
    let of_one = [client(LOCAL, s1, 0xcb00_7101), client(LOCAL, s1, 0xcb00_7102)];
    let of_two = client(LOCAL, s2, 0xcb00_7101);
    assert_eq!(sorted(two.except_query(ALL)?), sorted(vec![of_one[0], of_one[1], of_two]));
    assert_eq!(one.except_query([0, s2, 0, 0, 0, 0, 0, 0])?, [of_two]);
    assert_eq!(one.except_query([GLOBAL, 0, 0, 0, 0, 0, 0, 0])?, NONE);

    // The same flows by another's hand: nothing of the first one's goes.
    assert_eq!(two.except_del(&[client(LOCAL, 0, 0xcb00_7101), client(LOCAL, 0, 0xcb00_7102)])?, NONE);
    assert_eq!(sorted(two.except_query(ALL)?), sorted(of_one.to_vec()));
    two.except_reset()?;
    assert_eq!(two.except_query(ALL)?.len(), 2);
    let status = ne.status()?;
    assert_eq!(status["exceptions"], 2);
    let farm = &status["farms"][0]["exceptions"];
    assert_eq!((&farm["local"], &farm["global"], &farm["masks"]), (&2.into(), &0.into(), &1.into()), "{farm}");
    assert_eq!(farm["by_server"], serde_json::json!([{ "address": "10.0.0.11", "exceptions": 2 }]));

    // STOP leaves them; INIT, and the end of the session, do not.
    assert_eq!(one.start(&[start_unit(1, 6, 7)])?, NONE);
    assert_eq!(one.stop(&[start_unit(1, 6, 7)])?, NONE);
    assert_eq!(two.except_query(ALL)?.len(), 2);
    one.request(opcode::INIT, &[[0; 8]])?;
    assert_eq!(two.except_query(ALL)?, NONE);
    assert_eq!(one.except_add(&[client(LOCAL, 0, 0xcb00_7103)])?, NONE);
    assert_eq!(two.except_query(ALL)?.len(), 1);
    drop(one);
    wait_until("they go with their session", SOON, || two.except_query(ALL).is_ok_and(|list| list.is_empty()))
}

#[test]
fn global_exceptions_need_the_farms_trust_and_limits_hold() -> Result<()> {
    let (bed, mut ne, mut one, mut two) = start("global_exceptions = true\nmax_exceptions = 3")?;
    let s1 = u32::from(bed.server(0).ip());
    let wanted: Vec<Unit> = (1..=5).map(|address| client(GLOBAL, 0, address)).collect();
    let bad = [1, 0, 9, 33, 0, 0, 0, 0];
    let sent: Vec<Unit> = [&wanted[..2], &[bad], &wanted[2..]].concat();
    assert_eq!(one.except_add(&sent)?, [bad, wanted[3], wanted[4]], "exactly what is bad, and what is too many");
    let listed: Vec<Unit> = (1..=3).map(|address| client(GLOBAL, s1, address)).collect();
    assert_eq!(sorted(two.except_query(ALL)?), listed);
    // What is there may be overwritten, and another server is not concerned.
    assert_eq!(one.except_add(&[client(LOCAL, 60, 2)])?, NONE);
    assert_eq!(two.except_add(&wanted[..3])?, NONE);
    assert_eq!(one.except_del(&[wanted[0]])?, NONE);
    assert_eq!(one.except_add(&[wanted[3]])?, NONE);
    // A farm cannot be switched off: everything is a local one.
    two.except_reset()?;
    assert_eq!(two.except_add(&[[GLOBAL, 0, 0, 0, 0, 0, 0, 0]])?, NONE);
    let s2 = u32::from(bed.server(1).ip());
    assert_eq!(two.except_query([0, s2, 0, 0, 0, 0, 0, 0])?, [[LOCAL, s2, 0, 0, 0, 0, 0, 0]]);
    // A query that is none, and a message without units.
    let answer = one.request(opcode::EXCEPTION_QUERY, &[[3, 0, 0, 0, 0, 0, 0, 0]])?;
    assert_eq!((answer.flags, answer.units), (0x0005, vec![[3, 0, 0, 0, 0, 0, 0, 0]]));
    let answer = one.request(opcode::EXCEPTION_ADD, &[])?;
    assert_eq!((answer.opcode, answer.flags, answer.units.len()), (opcode::EXCEPTION_ADD_ACK, 0x0004, 0));
    ne.process().wait_for_log("max_exceptions", SOON)?;
    Ok(())
}

#[test]
fn an_exception_is_gone_within_a_second_of_its_expiry() -> Result<()> {
    let (_bed, ne, mut one, mut two) = start("")?;
    let began = Instant::now();
    assert_eq!(one.except_add(&[client(LOCAL, 2, 1), client(LOCAL, 60, 2), client(LOCAL, 1, 3)])?, NONE);
    // Added again: its time begins again.
    assert_eq!(one.except_add(&[client(LOCAL, 3, 3)])?, NONE);
    let mut last = (Duration::ZERO, 3);
    let mut seen = vec![last];
    while last.1 > 1 {
        assert!(began.elapsed() < SOON, "{seen:?}");
        std::thread::sleep(Duration::from_millis(20));
        last = (began.elapsed(), two.except_query(ALL)?.len());
        if seen.last().is_some_and(|(_, count)| *count != last.1) {
            seen.push(last);
        }
    }
    let [_, (first, 2), (second, 1)] = seen[..] else { panic!("{seen:?}") };
    for (at, ttl) in [(first, 2.0), (second, 3.0)] {
        assert!((ttl..ttl + 1.0).contains(&at.as_secs_f64()), "{ttl} s, and gone after {at:?}");
    }
    assert_eq!(ne.status()?["exceptions"], 1);
    Ok(())
}

/// Masks that the packet path looks at for the first farm.
fn masks(bed: &Topology) -> Result<u32> {
    let map = Map::from_map_data(MapData::from_pin(bed.pins().join("ne").join(names::EXCEPTION_MASKS))?)?;
    let masks: Array<MapData, Masks> = map.try_into()?;
    Ok(masks.get(&0, 0)?.0.masks.iter().map(|mask| u32::from(mask.used)).sum())
}

#[repr(transparent)]
#[derive(Clone, Copy)]
struct Masks(ExceptionMasks);

// SAFETY: plain old data without padding.
unsafe impl aya::Pod for Masks {}

/// How long a server's exceptions with a TTL of 2 s are in the packet path, while another server's million go.
#[test]
fn an_exception_leaves_the_packet_path_in_time_while_a_million_others_go() -> Result<()> {
    const MANY: u32 = 1_000_000;
    const AT_ONCE: u32 = 25_000;
    let (bed, _ne, mut one, two) = start("max_exceptions = 1000000")?;
    // Who does not wait for an answer answers no keepalives.
    drop(two);
    for from in (1..=MANY).step_by(AT_ONCE as usize) {
        let units: Vec<Unit> = (from..from + AT_ONCE).map(|address| client(LOCAL, 0, address)).collect();
        assert_eq!(one.except_add(&units)?, NONE);
    }
    assert_eq!(masks(&bed)?, 1);
    let mut two = Hand::join(bed.server(1).ns(), NE)?;
    let began = Instant::now();
    // A mask of their own, which is gone with the last of them.
    let units: Vec<Unit> = (1..=100).map(|net| [LOCAL, 2, net << 8, 24, 0, 0, 6, 7]).collect();
    assert_eq!(two.except_add(&units)?, NONE);
    assert_eq!(masks(&bed)?, 2);
    std::thread::sleep(Duration::from_millis(1900).saturating_sub(began.elapsed()));
    let reset_at = Instant::now();
    let reset = Message { flags: 0, opcode: opcode::EXCEPTION_RESET, request_id: 7, units: Vec::new() };
    one.send(&reset.bytes())?;
    let mut left = 2;
    while left == 2 {
        left = masks(&bed)?;
        assert!(began.elapsed() < SOON, "not gone after {:?}", began.elapsed());
        std::thread::sleep(Duration::from_millis(5));
    }
    let gone = began.elapsed();
    let others_left = left;
    while one.receive()?.expect("the acknowledgement").opcode != opcode::EXCEPTION_RESET_ACK {}
    println!("TTL 2 s, and gone after {gone:?}; a million reset in {:?}", reset_at.elapsed());
    assert_eq!(masks(&bed)?, 0);
    assert_eq!(others_left, 1, "the million were still going");
    assert!((2.0..3.0).contains(&gone.as_secs_f64()), "{gone:?}");
    Ok(())
}

#[test]
fn a_reader_of_a_long_list_that_stops_holds_up_nobody() -> Result<()> {
    const MANY: u32 = 200_000;
    const AT_ONCE: u32 = 20_000;
    let (bed, _ne, mut one, mut two) = start("max_exceptions = 1000000")?;
    for from in (1..=MANY).step_by(AT_ONCE as usize) {
        let units: Vec<Unit> = (from..from + AT_ONCE).map(|address| client(LOCAL, 0, address)).collect();
        assert_eq!(one.except_add(&units)?, NONE);
    }
    // 6.4 MB, more than sockets hold, and not one byte is read for a while.
    let query = Message { flags: BASIC_PAYLOAD, opcode: opcode::EXCEPTION_QUERY, request_id: 7, units: vec![ALL] };
    two.send(&query.bytes())?;
    two.wait_for_bytes()?;
    let mut slowest = Duration::ZERO;
    for round in 0..40 {
        let began = Instant::now();
        assert_eq!(one.start(&[start_unit(1, 6, 7)])?, NONE);
        assert_eq!(one.stop(&[start_unit(1, 6, 7)])?, NONE);
        // What is added and deleted meanwhile does not change the length that was announced.
        assert_eq!(one.except_del(&[client(LOCAL, 0, MANY - round)])?, NONE);
        assert_eq!(one.except_add(&[client(LOCAL, 0, MANY + 1 + round)])?, NONE);
        slowest = slowest.max(began.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("START, STOP, DEL and ADD beside a list that is not read: {slowest:?} at most");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    let list = loop {
        let message = two.receive()?.expect("the list");
        if message.request_id == 7 && message.opcode == opcode::EXCEPTION_RESP {
            break message.units;
        }
    };
    assert_eq!(list.len(), MANY as usize);
    let s1 = u32::from(bed.server(0).ip());
    let distinct: std::collections::BTreeSet<u32> = list.iter().map(|unit| unit[2]).collect();
    assert!(list.iter().all(|unit| *unit == client(LOCAL, s1, unit[2]) && (1..=MANY).contains(&unit[2])));
    assert!((1..=MANY - 40).all(|address| distinct.contains(&address)), "all that stayed are in it");
    // And the session that read so late goes on.
    assert_eq!(two.except_query([0, 0, 1, 32, 0, 0, 0, 0])?, [client(LOCAL, s1, 1)]);
    Ok(())
}

/// The web servers' port.
const WEB: u16 = 80;
/// A client that some server does not want, and one that nobody minds.
const UNWANTED: usize = 7;
const OTHER: usize = 9;
/// Connections that say where new ones go: with two servers, that one is missed by chance has odds of 1 to 10^9.
const NEW: usize = 30;

/// Two servers with agent and nginx, and a client that downloads from them.
struct Web {
    /// Of the client's namespace.
    runtime: Runtime,
    content: Content,
    line: Line,
    _nginx: Vec<Nginx>,
}

impl Web {
    fn start() -> Result<Self> {
        let bed = Topology::builder().servers(2).build()?;
        let content = Content::new(&bed, 3 << 20)?;
        let start =
            |server: &necp_tests::topology::Server| Nginx::start(&bed, server.ns(), server.name(), &[WEB], &content);
        let nginx = bed.servers().iter().map(start).collect::<Result<_>>()?;
        let farm = farm("web", VIP, &["10.0.0.0/24"], "global_exceptions = true");
        let mut line = Line::start(bed, &(top(1.0) + &farm.replace("\"tcp/7\"", "\"tcp/7\", \"tcp/80\"")))?;
        for index in 0..2 {
            line.start_agent(index, &[&OFFERS[..], &["tcp/80=l2"]].concat(), &[])?;
        }
        // After the slow start: a new flow asks so many slots and no more for a server that wants it, and where one server has a
        // sixth of them, 3 of 1000 flows that the other one does not want find none.
        let half =
            |row: &serde_json::Value| row["slots_percent"].as_f64().is_some_and(|share| (share - 50.0).abs() < 1.0);
        (0..2).try_for_each(|index| line.wait_for_row(index, "has half of the slots", half))?;
        let runtime = line.bed().client().runtime(2)?;
        let mut web = Self { runtime, content, line, _nginx: nginx };
        // All offers come with one START, so that both serve tcp/80 now.
        let found = web.where_new_ones_go(OTHER);
        ensure!(found.keys().map(String::as_str).eq(["s1", "s2"]), "{found:?}");
        web.downloads(OTHER, 1, "")?.try_for_each(Download::ends)?;
        Ok(web)
    }

    fn client() -> Client {
        Client::new(SocketAddrV4::new(VIP, WEB))
    }

    /// One request on a new connection.
    fn ask(&self, client: usize) -> Outcome {
        let task = async move { Self::client().short(client_address(client), "/", |_| ()).await };
        self.runtime.block_on(self.runtime.spawn(task)).expect("no panic")
    }

    /// Where new connections of a client go, by server, and how many find none because the connection is refused.
    fn where_new_ones_go(&mut self, client: usize) -> BTreeMap<String, usize> {
        let mut found = BTreeMap::new();
        for _ in 0..NEW {
            let outcome = self.ask(client);
            let place = match (outcome.server, outcome.failure) {
                (Some(server), None) => server,
                (None, Some(Failure::Connect(why))) if why.contains("refused") => "refused".into(),
                other => format!("{other:?}"),
            };
            *found.entry(place).or_default() += 1;
        }
        found
    }

    /// Downloads of a client that have begun; `rate` is nginx's.
    fn downloads(&self, client: usize, count: usize, rate: &str) -> Result<impl Iterator<Item = Download> + use<>> {
        let mut begun = Vec::new();
        for _ in 0..count {
            let (content, path) = (self.content.clone(), format!("/big?rate={rate}"));
            let (told, placed) = mpsc::channel();
            let task = self.runtime.spawn(async move {
                let report = |event| {
                    if let Event::Placed { server, .. } = event {
                        // Nobody listens any more if the test has failed.
                        let _ = told.send(server);
                    }
                };
                Self::client().download(client_address(client), &path, &content, report).await
            });
            begun.push((task, placed));
        }
        let place = |(task, placed): (_, mpsc::Receiver<String>)| -> Result<Download> {
            let server = placed.recv_timeout(SOON).context("a download did not begin")?;
            Ok(Download { task, server, runtime: self.runtime.handle().clone() })
        };
        Ok(begun.into_iter().map(place).collect::<Result<Vec<_>>>()?.into_iter())
    }

    /// A command of the first server's, which its network element must accept.
    fn accepted(&mut self, args: &[&str]) -> Result<()> {
        let output = self.line.agent(0).command(args)?;
        let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && told.contains("accepted"), "`necp {}`: {told}", args.join(" "));
        Ok(())
    }
}

/// A transfer in progress, and who serves it.
struct Download {
    task: JoinHandle<Outcome>,
    server: String,
    runtime: tokio::runtime::Handle,
}

impl Download {
    /// It comes to its end with the right checksum.
    fn ends(self) -> Result<()> {
        let outcome = self.runtime.block_on(self.task)?;
        ensure!(outcome.failure.is_none(), "the transfer from {}: {:?}", self.server, outcome.failure);
        ensure!(outcome.server.as_ref() == Some(&self.server), "{outcome:?}");
        Ok(())
    }
}

/// All were still going on, and come to their ends undisturbed.
fn all_go_on(downloads: Vec<Download>) -> Result<()> {
    let over = downloads.iter().filter(|one| one.task.is_finished()).count();
    ensure!(over == 0, "{over} transfers were over too soon to say anything");
    downloads.into_iter().try_for_each(Download::ends)
}

fn source(client: usize) -> String {
    Ipv4Addr::to_string(&client_address(client))
}

#[test]
fn a_client_that_a_server_does_not_want_is_served_by_the_other() -> Result<()> {
    let mut web = Web::start()?;
    // At 300 kB/s they take ten seconds; that none of 20 is at s1 has odds of 1 to 10^6.
    let downloads: Vec<Download> = web.downloads(UNWANTED, 20, "300k")?.collect();
    let at_first = downloads.iter().filter(|one| one.server == "s1").count();
    ensure!(at_first > 0, "no download is served by s1");
    web.accepted(&["except", "add", "--src", &source(UNWANTED), "--port", "tcp/80"])?;
    assert_eq!(web.where_new_ones_go(UNWANTED), BTreeMap::from([("s2".into(), NEW)]));
    let others = web.where_new_ones_go(OTHER);
    assert!(others.keys().map(String::as_str).eq(["s1", "s2"]), "nobody else is concerned: {others:?}");
    println!("{at_first} of {} transfers go on at s1", downloads.len());
    all_go_on(downloads)?;

    web.accepted(&["except", "reset"])?;
    let again = web.where_new_ones_go(UNWANTED);
    assert!(again.keys().map(String::as_str).eq(["s1", "s2"]), "as without it: {again:?}");
    Ok(())
}

#[test]
fn a_client_that_no_server_shall_get_is_the_hosts_own() -> Result<()> {
    let mut web = Web::start()?;
    let downloads: Vec<Download> = web.downloads(UNWANTED, 6, "300k")?.collect();
    web.accepted(&["except", "add", "--src", &source(UNWANTED), "--port", "tcp/80", "--scope", "global"])?;
    // Nothing listens there.
    assert_eq!(web.where_new_ones_go(UNWANTED), BTreeMap::from([("refused".into(), NEW)]));
    let others = web.where_new_ones_go(OTHER);
    assert!(others.keys().map(String::as_str).eq(["s1", "s2"]), "nobody else is concerned: {others:?}");
    // Now something does.
    let bed = web.line.bed();
    let _own = Nginx::start(bed, bed.ne(), "ne", &[WEB], &web.content)?;
    assert_eq!(web.where_new_ones_go(UNWANTED), BTreeMap::from([("ne".into(), NEW)]));
    all_go_on(downloads)
}

#[test]
fn a_client_is_served_again_within_a_second_of_an_exceptions_end() -> Result<()> {
    const TTL: Duration = Duration::from_secs(3);
    let mut web = Web::start()?;
    let before = Instant::now();
    web.accepted(&["except", "add", "--src", &source(UNWANTED), "--port", "tcp/80", "--ttl", "3"])?;
    let after = Instant::now();
    let mut elsewhere = 0;
    let first = loop {
        let outcome = web.ask(UNWANTED);
        ensure!(outcome.failure.is_none(), "{outcome:?}");
        if outcome.server.as_deref() == Some("s1") {
            break outcome;
        }
        elsewhere += 1;
        ensure!(after.elapsed() < TTL + SOON, "never again");
    };
    println!(
        "{elsewhere} connections went to s2 before one went to s1, {:?} after the exception",
        first.first_syn - after
    );
    assert!(first.first_syn >= before + TTL, "too early: {:?}", first.first_syn - before);
    assert!(first.first_syn <= after + TTL + Duration::from_secs(1), "too late: {:?}", first.first_syn - after);
    Ok(())
}
