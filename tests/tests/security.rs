//! Forged packets: whoever can send to the VIP, under any source address, moves and breaks nothing with one kind of packet; for
//! what a pair can do, see `floods.md`.

use std::{net::SocketAddrV4, time::Duration};

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData};
use necp_ebpf::abi::{FlowBucket, names};
use necp_tests::{
    conversation::{Conversation, all_answer},
    frame::{Flow, flags},
    hand::Hand,
    line::{ECHO_AT_VIP, Line, TALK_AT_VIP, none_moved, one_farm},
    link,
    netns::wait_until,
    raw::RawSocket,
    topology::{NE, Topology, client_address},
};

const SOON: Duration = Duration::from_secs(10);
const UNITS: [[u32; 8]; 2] = [[1, 6, 7, 0, 0, 0, 0, 0], [1, 17, 53, 0, 0, 0, 0, 0]];

/// Somebody on the clients' link who knows every connection's addresses and ports, but not its sequence numbers.
struct Forger {
    socket: RawSocket,
    source_mac: [u8; 6],
    destination_mac: [u8; 6],
}

impl Forger {
    fn new(line: &Line) -> Result<Self> {
        Ok(Self {
            socket: RawSocket::open(line.bed().client(), "eth0")?,
            source_mac: [2, 0, 0, 0, 0x66, 0x66],
            destination_mac: link::mac(line.bed().ne(), "eth0")?,
        })
    }

    fn tcp(&self, source: SocketAddrV4, flags: u8, sequence: u32) -> Result<()> {
        let Self { source_mac, destination_mac, .. } = *self;
        let flow = Flow { source_mac, destination_mac, source, destination: TALK_AT_VIP, ttl: 64 };
        Ok(self.socket.send(&flow.tcp(flags, sequence, 77, b""))?)
    }

    /// The same forged segment, three times with different numbers, for every conversation.
    fn attack(&self, conversations: &[Conversation], flags: u8) -> Result<()> {
        for (number, one) in conversations.iter().enumerate() {
            for round in 0..3u32 {
                // Far from each other: at most one can be near the connection's own numbers by chance.
                self.tcp(one.local_v4(), flags, 0x2000_0000 + round * 0x5000_0000 + number as u32)?;
            }
        }
        Ok(())
    }
}

/// Held connections in every situation: on plain slots, on record, and on slots that changed without a record so far.
struct Scene {
    line: Line,
    guest: Hand,
    talk: Vec<Conversation>,
    echo: Vec<(necp_tests::conversation::Datagrams, String)>,
}

impl Scene {
    fn new() -> Result<Self> {
        let mut line = Line::start(Topology::builder().build()?, &one_farm(60.0))?;
        line.join_all(0..2)?;
        let (talk, echo) = (line.talk(60)?, line.echo(20)?);
        let guest = Hand::join(line.bed().server(2).ns(), NE)?;
        Ok(Self { line, guest, talk, echo })
    }

    fn check(&mut self, when: &str) -> Result<()> {
        all_answer(when, &mut self.talk)?;
        none_moved(when, &mut self.echo)
    }
}

fn forge(segment: &str, flags: u8) -> Result<()> {
    let mut scene = Scene::new()?;
    let forger = Forger::new(&scene.line)?;
    forger.attack(&scene.talk, flags)?;
    scene.check(&format!("forged {segment} on plain slots"))?;

    // Slots that changed: nothing is on record yet, and the forged segment comes before the client's next.
    assert_eq!(scene.guest.start(&UNITS)?, [[0; 8]; 0]);
    forger.attack(&scene.talk, flags)?;
    scene.check(&format!("forged {segment} on slots that have just changed"))?;
    scene.talk.extend(scene.line.talk(40)?);
    scene.talk.push(scene.line.talk_until("s3")?);
    forger.attack(&scene.talk, flags)?;
    scene.check(&format!("forged {segment} on flows on record"))?;

    // And back again.
    assert_eq!(scene.guest.stop(&UNITS)?, [[0; 8]; 0]);
    forger.attack(&scene.talk, flags)?;
    scene.check(&format!("forged {segment}, the guest has stopped"))?;
    forger.attack(&scene.talk, flags)?;
    assert_eq!(scene.guest.start(&UNITS)?, [[0; 8]; 0]);
    scene.check(&format!("forged {segment}, the guest is back"))
}

#[test]
fn a_forged_syn_moves_nothing() -> Result<()> {
    forge("SYN", flags::SYN)
}

#[test]
fn a_forged_fin_moves_nothing() -> Result<()> {
    forge("FIN", flags::FIN | flags::ACK)
}

#[test]
fn a_forged_rst_moves_nothing() -> Result<()> {
    forge("RST", flags::RST)
}

#[test]
fn a_forged_ack_moves_nothing() -> Result<()> {
    forge("ACK", flags::ACK)
}

#[test]
fn a_syn_flood_leaves_no_trace() -> Result<()> {
    // All slots have had one owner only: they are plain.
    let mut line = Line::with_servers(1, 5.0)?;
    let pin = line.bed().pins().join("ne");
    let mut talk = line.talk(20)?;
    assert_eq!(entries(&pin)?, 0);
    flood(&mut line)?;
    assert_eq!(entries(&pin)?, 0);
    all_answer("a flood of SYNs", &mut talk)
}

#[test]
fn a_syn_flood_in_a_transition_moves_nothing() -> Result<()> {
    let mut scene = Scene::new()?;
    let pin = scene.line.bed().pins().join("ne");
    assert_eq!(scene.guest.start(&UNITS)?, [[0; 8]; 0]);
    flood(&mut scene.line)?;
    // The flood's SYNs may be the beginnings of flows, and are remembered until somebody else needs the place.
    assert!(entries(&pin)? > 1000, "{} entries", entries(&pin)?);
    scene.check("a flood of SYNs in a transition")?;
    scene.talk.push(scene.line.talk_until("s3")?);
    assert_eq!(scene.guest.stop(&UNITS)?, [[0; 8]; 0]);
    flood(&mut scene.line)?;
    scene.check("a flood of SYNs, and the guest has stopped")
}

/// Sends 30,000 SYNs of as many flows, and waits until the packet path has seen most of them.
fn flood(line: &mut Line) -> Result<()> {
    const SYNS: usize = 30_000;
    let forger = Forger::new(line)?;
    let packets = |line: &mut Line| {
        let status = line.ne().status().ok()?;
        let rows = status["packets"].as_array()?.iter();
        rows.filter(|row| row["action"] == "transmit").filter_map(|row| row["packets"].as_u64()).reduce(|a, b| a + b)
    };
    let before = packets(line).context("no counters")?;
    for number in 0..SYNS {
        let source = SocketAddrV4::new(client_address(number % 20), 1024 + (number / 20) as u16);
        forger.tcp(source, flags::SYN, number as u32)?;
    }
    // A queue on the way may overflow: what is lost there is no matter here.
    wait_until("the flood has gone through", 3 * SOON, || packets(line) > Some(before + SYNS as u64 * 5 / 6))
}

/// UDP has no handshake: forged datagrams of a client's tuple go where the client's go, and change nothing.
#[test]
fn forged_datagrams_move_nothing() -> Result<()> {
    let mut line = Line::with_servers(2, 5.0)?;
    let mut echo = line.echo(40)?;
    let forger = Forger::new(&line)?;
    for (flow, _) in &echo {
        let Forger { source_mac, destination_mac, .. } = forger;
        let frame = Flow { source_mac, destination_mac, source: flow.local(), destination: ECHO_AT_VIP, ttl: 64 }
            .udp(b"forged");
        forger.socket.send(&frame)?;
    }
    none_moved("forged datagrams", &mut echo)?;
    line.kill_agent(0);
    line.wait_for_state(0, "lost")?;
    none_moved("forged datagrams, and s1's agent is lost", &mut echo)
}

#[repr(transparent)]
#[derive(Clone, Copy)]
struct Bucket(FlowBucket);

// SAFETY: plain old data without padding.
unsafe impl aya::Pod for Bucket {}

/// Entries of the flow table in use, candidates too.
fn entries(pin: &std::path::Path) -> Result<usize> {
    let map = Map::from_map_data(MapData::from_pin(pin.join(names::FLOWS))?)?;
    let flows = Array::<_, Bucket>::try_from(map)?;
    let used = |bucket: Bucket| bucket.0.entries.iter().filter(|entry| entry.state & 3 != 0).count();
    flows.iter().map(|bucket| Ok(used(bucket?))).sum()
}
