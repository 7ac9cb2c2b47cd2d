//! Floods at the highest rate that this machine can make: whoever is connected does not notice.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use etherparse::{PacketBuilder, TcpHeader};
use necp_tests::{
    both::Both,
    conversation::{Conversation, all_answer},
    flood::{Flood, Flooded},
    frame::{Flow, as_fragment, flags, icmp_error, ipv4_header},
    line::{ECHO_AT_VIP, Line, TALK, TALK_AT_VIP, one_farm},
    link,
    load::{Client, Event, Kind, Load, Mix},
    netns::wait_until,
    nginx::{Content, Nginx},
    topology::{NE6, Topology, VIP, VIP6, client_address, server_address6},
};
use necp_user::daemon::ne::limits::raise_open_files;

/// Held all the while, with a server that answers in this process, and asked one after the other.
const CONVERSATIONS: usize = 5000;
/// Held all the while with nginx, each asked every few seconds. Two kinds, because one process may often have no more than
/// 20,000 open files, and of the first kind it has both ends.
const KEPT_ALIVE: usize = 6000;
/// How long each flood goes on, at least.
const TIME: Duration = Duration::from_secs(4);
/// How long the speed of downloads is measured, before each flood and in it.
const MEASURED: Duration = Duration::from_secs(2);
/// Different frames of a flood; each time round they come from other addresses.
const FRAMES: u32 = 8192;
/// Service by GRE, for packets that are too long for it.
const TUNNEL: SocketAddrV4 = SocketAddrV4::new(VIP, 8080);
const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);
/// RFC 791 §3.1: more fragments.
const MORE: u16 = 0x2000;

/// Held connections on a service in transition, downloads under way, and where the attacker sits.
struct Scene {
    line: Line,
    held: Vec<Conversation>,
    load: Load,
    events: Vec<Event>,
    content: Content,
    to_mac: [u8; 6],
    _nginx: Vec<Nginx>,
}

impl Scene {
    fn build() -> Result<Self> {
        raise_open_files(2 * CONVERSATIONS + KEPT_ALIVE + 2000)?;
        let bed = Topology::builder().servers(3).build()?;
        let content = Content::new(&bed, 8 << 20)?;
        let nginx: Vec<Nginx> = bed
            .servers()
            .iter()
            .map(|server| Nginx::start(&bed, server.ns(), server.name(), &[80], &content))
            .collect::<Result<_>>()?;
        let config = one_farm(2.0)
            .replace("[\"l2\"]", "[\"l2\", \"gre\"]")
            .replace("\"tcp/7\"", "\"tcp/7\", \"tcp/80\", \"tcp/8080\"");
        let mut line = Line::start(bed, &config)?;
        let offers = ["tcp/7=l2", "tcp/80=l2", "udp/53=l2", "tcp/8080=gre"];
        (0..3).try_for_each(|index| line.start_agent(index, &offers, &[]))?;
        (0..3).try_for_each(|index| line.wait_until_serving(index))?;
        assert_eq!(line.ne().status()?["interfaces"][0]["mode"], "native");
        let held = line.talk(CONVERSATIONS)?;
        let mix = Mix {
            short: 0,
            short_pause: Duration::ZERO,
            downloads: 6,
            download_path: "/big?rate=1m".to_owned(),
            content: content.clone(),
            keep_alive: KEPT_ALIVE,
            keep_alive_pause: Duration::from_secs(8),
            sources: 20,
        };
        let client = Client { patience: Duration::from_secs(30), ..Client::new(WEB) };
        let load = Load::start(line.bed().client(), client, &mix)?;
        let to_mac = link::mac(line.bed().ne(), "eth0")?;
        let mut scene = Self { line, held, load, events: Vec::new(), content, to_mac, _nginx: nginx };
        wait_until("all are connected", Duration::from_secs(60), || {
            scene.events.extend(scene.load.events(Duration::from_millis(10)));
            scene.events.iter().filter(|event| matches!(event, Event::Placed { .. })).count() >= KEPT_ALIVE + 6
        })?;
        // Its slots change hands: a third of what is held is on the legacy, and not yet on record.
        let drained = scene.line.agent(0).command(&["drain"])?;
        ensure!(drained.status.success(), "{drained:?}");
        scene.line.wait_for_state(0, "draining")?;
        Ok(scene)
    }

    /// A client of that number, who does not exist: nobody has a route to it.
    fn stranger(&self, number: u32, to: SocketAddrV4) -> Flow {
        let [a, b, c, d] = number.wrapping_mul(0x9e37_79b1).to_be_bytes();
        Flow {
            source_mac: [2, 0, 0, 0, 0, 0x66],
            destination_mac: self.to_mac,
            source: SocketAddrV4::new(
                Ipv4Addr::new(11, 0, b, c | 1),
                1024 + (u16::from(a) << 8 | u16::from(d)) % 60_000,
            ),
            destination: to,
            ttl: 64,
        }
    }

    fn frames(&self, to: SocketAddrV4, each: impl Fn(&Flow, u32) -> Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        (0..FRAMES).flat_map(|number| each(&self.stranger(number, to), number)).collect()
    }

    /// Bytes a second of downloads at full speed, one after the other for [`MEASURED`].
    fn speed(&self) -> Result<f64> {
        let client = Client { patience: Duration::from_secs(60), ..Client::new(WEB) };
        let (mut bytes, began) = (0, Instant::now());
        while began.elapsed() < MEASURED {
            let download = client.download(client_address(3), "/big", &self.content, |_| ());
            let outcome = self.line.bed().client().block_on(download);
            ensure!(outcome.failure.is_none(), "a download: {outcome:?}");
            bytes += outcome.bytes;
        }
        Ok(bytes as f64 / began.elapsed().as_secs_f64())
    }

    /// Everybody is asked once more; no load has failed.
    fn all_well(&mut self, when: &str) -> Result<()> {
        all_answer(when, &mut self.held)?;
        self.events.extend(self.load.events(Duration::ZERO));
        let failed = self.events.iter().filter_map(|event| match event {
            Event::Ended(one) if one.failure.is_some() => Some(one),
            _ => None,
        });
        let failed: Vec<_> = failed.collect();
        ensure!(failed.is_empty(), "{when}: {failed:?}");
        Ok(())
    }

    fn withstands(&mut self, name: &str, frames: Vec<Vec<u8>>, vary: bool) -> Result<Flooded> {
        let before = self.speed()?;
        let counted = self.counted()?;
        let flood = Flood::start(self.line.bed().client(), "eth0", frames, vary)?;
        let began = Instant::now();
        let during = self.speed()?;
        // All of them, while it goes on.
        all_answer(name, &mut self.held)?;
        thread::sleep(TIME.saturating_sub(began.elapsed()));
        let flooded = flood.finish()?;
        self.all_well(name)?;
        // A new connection, too, when it is over.
        all_answer(name, &mut self.line.talk(20)?)?;
        let more: Vec<String> = (self.counted()?.into_iter())
            .filter_map(|(reason, count)| {
                let before = counted.iter().find(|(other, _)| *other == reason).map_or(0, |(_, count)| *count);
                (count - before > 1000).then(|| format!("{reason} {}", count - before))
            })
            .collect();
        println!(
            "{name}: {:.0} packets/s for {:.1} s; a download had {:.1} MB/s, before {:.1}: ratio {:.2}; {}",
            flooded.rate(),
            flooded.time.as_secs_f64(),
            during / 1e6,
            before / 1e6,
            during / before,
            more.join(", ")
        );
        ensure!(flooded.rate() > 1000.0, "{name}: that was no flood: {flooded:?}");
        ensure!(during > before / 200.0, "{name}: a download at {during:.0} bytes/s, before at {before:.0}");
        Ok(flooded)
    }

    fn counted(&mut self) -> Result<Vec<(String, u64)>> {
        let status = self.line.ne().status()?;
        let rows = status["packets"].as_array().context("a list")?;
        let row = |row: &serde_json::Value| Some((row["reason"].as_str()?.to_owned(), row["packets"].as_u64()?));
        Ok(rows.iter().filter_map(row).collect())
    }
}

#[test]
fn floods_break_none_of_ten_thousand_connections() -> Result<()> {
    let mut scene = Scene::build()?;
    let tcp = |bits: u8, sequence: u32| move |flow: &Flow, _: u32| vec![flow.tcp(bits, sequence, 1, b"")];
    let syns = scene.frames(TALK_AT_VIP, tcp(flags::SYN, 7));
    scene.withstands("SYNs", syns, true)?;
    let handshakes =
        scene.frames(TALK_AT_VIP, |flow, n| vec![flow.tcp(flags::SYN, n, 0, b""), flow.tcp(flags::ACK, n + 1, 9, b"")]);
    scene.withstands("SYNs and forged ACKs", handshakes, true)?;
    let strays = scene.frames(TALK_AT_VIP, tcp(flags::ACK, 7));
    scene.withstands("stray ACKs", strays, true)?;
    let datagrams = scene.frames(ECHO_AT_VIP, |flow, _| vec![flow.udp(b"query"); 2]);
    scene.withstands("two datagrams each", datagrams, true)?;
    let parts = scene.frames(ECHO_AT_VIP, |flow, _| {
        let whole = flow.udp(&[7; 64]);
        vec![as_fragment(whole.clone(), MORE), as_fragment(whole, 20)]
    });
    scene.withstands("first and stray fragments", parts, true)?;
    let errors = quoting(&scene);
    scene.withstands("ICMP errors", errors, false)?;
    let long = scene.frames(TUNNEL, |flow, _| vec![as_fragment(flow.tcp(flags::ACK, 7, 1, &[7; 1460]), 0x4000)]);
    // As many as there are of the others would be a hundred megabytes twice.
    scene.withstands("packets too long for a tunnel", long.into_iter().take(2048).collect(), true)?;

    scene.all_well("after all floods")?;
    let Scene { load, mut events, .. } = scene;
    let (last, cut) = load.finish(Duration::from_secs(60));
    events.extend(last);
    let ended = |kind: Kind| {
        let of = |event: &&Event| matches!(event, Event::Ended(one) if one.kind == kind);
        events.iter().filter(of).count()
    };
    let failed = |event: &&Event| matches!(event, Event::Ended(one) if one.failure.is_some());
    ensure!(events.iter().find(failed).is_none(), "{:?}", events.iter().find(failed));
    println!("{} connections held, {} downloads whole", CONVERSATIONS + KEPT_ALIVE, ended(Kind::Download));
    ensure!(cut == 0 && ended(Kind::Download) >= 6, "{cut} were cut off");
    ensure!(ended(Kind::KeepAlive) == KEPT_ALIVE, "{} of {KEPT_ALIVE} ended well", ended(Kind::KeepAlive));
    Ok(())
}

/// Errors of a router about packets of the VIP: to strangers, and to those whose connections are held.
fn quoting(scene: &Scene) -> Vec<Vec<u8>> {
    let error = |to: SocketAddrV4, number: u32| {
        let mut quoted = ipv4_header(6, 60, VIP, *to.ip());
        quoted.extend(7u16.to_be_bytes());
        quoted.extend(to.port().to_be_bytes());
        quoted.extend(number.wrapping_mul(0x85eb_ca6b).to_be_bytes());
        // Host unreachable, time exceeded, fragmentation needed (RFC 792, RFC 1191).
        let header = [[3, 1, 0, 0, 0, 0, 0, 0], [11, 0, 0, 0, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0, 2, 0]];
        icmp_error(scene.to_mac, Ipv4Addr::new(11, 1, 1, 1), header[number as usize % 3], &quoted)
    };
    let held = scene.held.iter().map(Conversation::local_v4);
    let strangers = (0..FRAMES).map(|number| scene.stranger(number, TALK_AT_VIP).source);
    (0..).zip(held.chain(strangers)).map(|(number, to)| error(to, number)).collect()
}

/// A TCP segment to [`TALK`] at the IPv6 VIP, of a client of that number who does not exist.
fn segment6(to_mac: [u8; 6], number: u32, sequence: u32, change: impl Fn(&mut TcpHeader)) -> Vec<u8> {
    let [a, b, c, d] = number.wrapping_mul(0x9e37_79b1).to_be_bytes();
    let source = [0x20, 0x01, 0x0d, 0xb9, 0, b, c, d | 1, 0, 0, 0, 0, 0, 0, 0, a];
    let mut tcp = TcpHeader::new(1024 + (u16::from(a) << 8 | u16::from(d)) % 60_000, TALK, sequence, 64_240);
    change(&mut tcp);
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 0x66], to_mac).ipv6(source, VIP6.octets(), 64);
    let mut frame = Vec::new();
    builder.tcp_header(tcp).write(&mut frame, &[]).expect("a segment that fits into a packet");
    frame
}

#[test]
fn floods_over_ipv6_break_none_of_four_thousand_connections() -> Result<()> {
    const HELD: usize = 4000;
    raise_open_files(2 * HELD + 2000)?;
    let mut both = Both::start(3, &["l2"], "")?;
    (0..3).try_for_each(|index| both.join(index, &[NE6.into()], "l2", &[]))?;
    let (to, to_mac) = ((VIP6, TALK), link::mac(both.bed.ne(), "eth0")?);
    let mut held = Conversation::open_many(both.bed.client(), HELD, to)?;
    // Its slots change hands: a third of what is held is on the legacy, and not yet on record.
    let drained = both.agents[0].as_ref().context("an agent")?.command(&["drain"])?;
    ensure!(drained.status.success(), "{drained:?}");
    both.wait_for(0, server_address6(0).into(), |row| row["state"] == "draining")?;
    ensure!(held.iter().filter(|one| one.server() == "s1").count() > HELD / 5, "s1 has none of them");

    let syn = |number, sequence| segment6(to_mac, number, sequence, |tcp| tcp.syn = true);
    let ack = |number, sequence| segment6(to_mac, number, sequence, |tcp| tcp.ack = true);
    let floods: [(&str, Vec<Vec<u8>>); 3] = [
        ("SYNs", (0..FRAMES).map(|number| syn(number, 7)).collect()),
        (
            "SYNs and forged ACKs",
            (0..FRAMES).flat_map(|number| [syn(number, number), ack(number, number + 1)]).collect(),
        ),
        ("stray ACKs", (0..FRAMES).map(|number| ack(number, 7)).collect()),
    ];
    for (name, frames) in floods {
        let (flood, began) = (Flood::start(both.bed.client(), "eth0", frames, true)?, Instant::now());
        all_answer(name, &mut held)?;
        thread::sleep(TIME.saturating_sub(began.elapsed()));
        let flooded = flood.finish()?;
        all_answer(name, &mut held)?;
        all_answer(name, &mut Conversation::open_many(both.bed.client(), 20, to)?)?;
        println!("{name} over IPv6: {:.0} packets/s for {:.1} s", flooded.rate(), flooded.time.as_secs_f64());
        ensure!(flooded.rate() > 1000.0, "{name}: that was no flood: {flooded:?}");
    }
    Ok(())
}
