//! The Wireshark dissector (`necp-user/wireshark/necp.lua`) on captures of the messages written by hand
//! (`necp-user/src/necp/vectors/messages.txt`): tshark says of every message what the file says of it. And on a session of the
//! real daemons, as it passed a server's interface.

use std::{
    collections::BTreeMap, fs, net::Ipv4Addr, os::unix::fs::PermissionsExt as _, path::Path, process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use etherparse::PacketBuilder;
use necp_tests::{
    capture::Capture,
    daemon::NECP_PORT,
    line::{Line, OFFERS, farm, top},
    topology::{Topology, VIP},
};

const NE: ([u8; 4], u16) = ([10, 0, 0, 1], 3262);
const SE: [u8; 4] = [10, 0, 0, 11];

/// A message of the file: its name, whether the NE sends it, its bytes, and what its lines say.
struct Vector {
    name: &'static str,
    from_ne: bool,
    bytes: Vec<u8>,
    says: Vec<&'static str>,
}

fn vectors() -> Vec<Vector> {
    let mut vectors: Vec<Vector> = Vec::new();
    let file = include_str!("../../necp-user/src/necp/vectors/messages.txt");
    for line in file.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(line) = line.strip_prefix("    ") {
            let (digits, says) = line.split_at(line.find(['=', '~', '!']).unwrap_or(line.len()));
            let digits: String = digits.split_whitespace().collect();
            let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal");
            let vector = vectors.last_mut().expect("a name comes first");
            vector.bytes.extend((0..digits.len()).step_by(2).map(byte));
            vector.says.push(says);
        } else {
            let name = line.split(' ').next().expect("a name");
            vectors.push(Vector { name, from_ne: line.contains(" NE>SE"), bytes: Vec::new(), says: Vec::new() });
        }
    }
    vectors
}

/// A file of captured packets (libpcap's format, Ethernet), of TCP segments that carry what they are told to.
struct Pcap {
    bytes: Vec<u8>,
    packets: u32,
    sequence: [u32; 2],
}

impl Pcap {
    fn new() -> Self {
        let mut bytes = Vec::new();
        for word in [0xa1b2_c3d4, 0x0004_0002, 0, 0, 65_535, 1_u32] {
            bytes.extend(word.to_le_bytes());
        }
        Self { bytes, packets: 0, sequence: [1000, 2000] }
    }

    /// A segment of the connection of the SE's port `port`, a tenth of a second after the one before.
    fn segment(&mut self, from_ne: bool, port: u16, payload: &[u8]) -> Result<()> {
        let (from, to) = if from_ne { (NE.0, SE) } else { (SE, NE.0) };
        let (from_port, to_port) = if from_ne { (NE.1, port) } else { (port, NE.1) };
        let sequence = &mut self.sequence[usize::from(from_ne)];
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(from, to, 64);
        let builder = builder.tcp(from_port, to_port, *sequence, 8192).ack(1).psh();
        *sequence += payload.len() as u32;
        let mut frame = Vec::new();
        builder.write(&mut frame, payload)?;
        self.frame(Duration::from_millis(100) * self.packets, &frame);
        Ok(())
    }

    /// A frame as it is.
    fn frame(&mut self, at: Duration, frame: &[u8]) {
        let length = frame.len() as u32;
        for word in [at.as_secs() as u32, at.subsec_micros(), length, length] {
            self.bytes.extend(word.to_le_bytes());
        }
        self.bytes.extend(frame);
        self.packets += 1;
    }

    /// What tshark says of these fields: a line for every packet, the values of a field joined by `;`.
    fn fields(&self, names: &[&str]) -> Result<Vec<Vec<String>>> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("necp.pcap");
        fs::write(&file, &self.bytes)?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../necp-user/wireshark/necp.lua");
        let mut tshark = Command::new("tshark");
        // Twice over the file, so that a request knows its answer.
        tshark.arg("-2").arg("-r").arg(&file).arg("-X").arg(format!("lua_script:{}", script.display()));
        tshark.args(["-T", "fields", "-E", "separator=|", "-E", "aggregator=;"]);
        for name in names {
            tshark.args(["-e", name]);
        }
        let output = tshark.output().context("tshark did not start; `cargo xtask setup` installs it")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && !errors.contains("Lua"), "tshark: {errors}");
        let lines = String::from_utf8(output.stdout)?;
        ensure!(!lines.contains("Lua Error"), "{lines}");
        Ok(lines.lines().map(|line| line.split('|').map(String::from).collect()).collect())
    }
}

/// What the file says of a message, in tshark's words: header, units, errors.
fn expected(vector: &Vector) -> [String; 3] {
    let text = |says: &&str| says.get(2..).unwrap_or_default().to_owned();
    let is_unit =
        |says: &&&str| !says.is_empty() && !["= credential"].contains(says) && !says[2..].starts_with("preamble");
    let units = vector.says[1..].iter().filter(is_unit);
    let wrong = vector.says.iter().filter(|says| says.starts_with('!'));
    let joined = |texts: Vec<String>| texts.join(";");
    [text(&vector.says[0]), joined(units.map(text).collect()), joined(wrong.map(text).collect())]
}

/// Every message, in a connection of its own, each in one segment and in segments of seven bytes.
#[test]
fn tshark_says_of_every_message_what_the_file_says() -> Result<()> {
    let vectors = vectors();
    ensure!(vectors.len() > 70);
    for piece in [usize::MAX, 7] {
        let mut pcap = Pcap::new();
        let mut last = Vec::new();
        for (port, vector) in (40_000..).zip(&vectors) {
            let pieces: Vec<&[u8]> = vector.bytes.chunks(piece.min(vector.bytes.len())).collect();
            for bytes in pieces {
                pcap.segment(vector.from_ne, port, bytes)?;
            }
            last.push(pcap.packets as usize - 1);
        }
        let names = ["necp.summary", "necp.unit", "_ws.expert.message", "necp.credential", "necp.preamble"];
        let lines = pcap.fields(&names)?;
        for (vector, last) in vectors.iter().zip(last) {
            let [summary, units, wrong] = expected(vector);
            let line = &lines[last];
            assert_eq!((&line[0], &line[1]), (&summary, &units), "{} in pieces of {piece}", vector.name);
            for wrong in wrong.split(';').filter(|wrong| !wrong.is_empty()) {
                assert!(line[2].split(';').any(|said| said == wrong), "{}: {wrong} in {line:?}", vector.name);
            }
            let told = |text: &str| line[2].contains(text);
            assert_eq!(told("failed"), summary.contains(" error"), "{}: {line:?}", vector.name);
            assert_eq!(
                told("out of range") || told("not made of units"),
                {
                    let odd = vector.says.len() > 1 && vector.says[1].is_empty() && !summary.contains("version");
                    wrong.contains("out of range") || odd && !vector.name.ends_with("0x28")
                },
                "{}: {line:?}",
                vector.name
            );
            let spoken = vector.says.contains(&"= preamble EXC6 version 1");
            assert_eq!(line[4] == "EXC6 version 1", spoken, "{}: {line:?}", vector.name);
            let credential = vector.says.contains(&"= credential");
            assert_eq!(line[3].len(), if credential { 40 } else { 0 }, "{}: {line:?}", vector.name);
        }
    }
    Ok(())
}

/// Requests and answers find each other, out of order, several in a segment, and with an id that both sides use.
#[test]
fn tshark_matches_requests_and_answers() -> Result<()> {
    let vectors = vectors();
    let of =
        |name: &str| vectors.iter().find(|vector| vector.name == name).map(|vector| &vector.bytes[..]).expect(name);
    let mut pcap = Pcap::new();
    pcap.segment(false, 40_000, of("init"))?;
    pcap.segment(true, 40_000, of("init-ack"))?;
    pcap.segment(false, 40_000, &[of("start"), of("stop"), of("keepalive")].concat())?;
    pcap.segment(true, 40_000, of("keepalive"))?;
    pcap.segment(false, 40_000, of("keepalive-ack"))?;
    pcap.segment(true, 40_000, &[of("stop-ack"), of("keepalive-ack")].concat())?;
    pcap.segment(true, 40_000, of("start-ack"))?;
    // An answer to nothing, and the same ids in another connection.
    pcap.segment(true, 40_000, of("start-ack"))?;
    pcap.segment(true, 40_001, of("stop-ack"))?;
    let lines = pcap.fields(&["necp.response_in", "necp.response_to", "necp.time", "_ws.col.Info"])?;
    let column = |at: usize| lines.iter().map(|line| line[at].as_str()).collect::<Vec<_>>();
    assert_eq!(column(0), ["2", "", "7;6;6", "5", "", "", "", "", ""]);
    assert_eq!(column(1), ["", "1", "", "", "4", "3;3", "3", "", ""]);
    assert_eq!(lines[1][2], "0.100000000");
    assert_eq!(lines[6][2], "0.400000000");
    assert_eq!(lines[5][3], "STOP_ACK id 10; KEEPALIVE_ACK id 258");
    Ok(())
}

/// Every field of a unit, and what is not NECP.
#[test]
fn tshark_shows_fields_and_strangers() -> Result<()> {
    let vectors = vectors();
    let of =
        |name: &str| vectors.iter().find(|vector| vector.name == name).map(|vector| &vector.bytes[..]).expect(name);
    let mut pcap = Pcap::new();
    pcap.segment(true, 40_000, of("exception-resp"))?;
    pcap.segment(false, 40_000, of("auth-init"))?;
    pcap.segment(false, 40_001, b"GET / HTTP/1.1\r\n\r\n")?;
    pcap.segment(true, 40_002, of("wide-exception-resp"))?;
    let names = ["scope", "installer", "source", "source_prefix_len", "destination", "protocol", "port"];
    let names = names.map(|name| format!("necp.{name}"));
    let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
    names.extend(["necp.init.first_seq_num", "necp.flags.auth_credential_provided", "_ws.expert.message"]);
    let lines = pcap.fields(&names)?;
    let installers = [Ipv4Addr::new(10, 0, 0, 11), Ipv4Addr::new(10, 0, 0, 12)].map(|address| address.to_string());
    assert_eq!(
        lines[0][..7],
        ["2;1", &installers.join(";"), "203.0.113.0;0.0.0.0", "24;0", "198.51.100.7;198.51.100.7", "6;0", "80;0"]
    );
    assert_eq!((lines[1][7].as_str(), lines[1][8].as_str()), ("0x2222222233333333", "1"));
    assert!(lines[2][9].contains("must begin with 0x414a"), "{:?}", lines[2]);
    assert_eq!((&*lines[3][0], &*lines[3][3], &*lines[3][5], &*lines[3][6]), ("2;1;1", "48;0;24", "6;0;6", "80;0;80"));
    let wide = ["necp.family", "necp.source6", "necp.installer6", "necp.preamble.version", "necp.preamble.unit_len"];
    let line = &pcap.fields(&wide)?[3];
    let installers = "2001:db8:a::11;2001:db8:a::11;::ffff:10.0.0.11";
    assert_eq!(line[..3], ["6;6;4", "2001:db8:7::;::;::ffff:203.0.113.0", installers]);
    assert_eq!(line[3..], ["1", "64"]);
    Ok(())
}

const SOON: Duration = Duration::from_secs(10);

/// A message as tshark tells of it.
struct Told {
    from_ne: bool,
    name: String,
    summary: String,
    units: Vec<String>,
    /// The frame with its answer, or with its request.
    partner: Option<u32>,
}

/// A session of the real agent with the real daemon, with a key, from INIT to its end: what passed the server's interface.
fn session() -> Result<Pcap> {
    let bed = Topology::builder().servers(1).build()?;
    let key = bed.dir().join("web.key");
    fs::write(&key, "a secret of sixteen bytes and more")?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    let farm = farm("web", VIP, &["10.0.0.0/24"], "").replace("auth = \"none\"", &format!("key_file = {key:?}"));
    let mut line = Line::start(bed, &(top(0.3) + &farm))?;
    let mut capture = Capture::open(line.bed().server(0).ns(), "eth0", 9, NECP_PORT)?;
    line.start_agent(0, &OFFERS, &["--key-file", &key.display().to_string(), "--keepalive", "0.3"])?;
    line.wait_until_serving(0)?;
    let flows = ["--src", "203.0.113.0/24", "--dst", "198.51.100.7", "--port", "tcp/80"];
    for args in [
        &[&["except", "add", "--ttl", "300"], &flows[..]].concat()[..],
        &["except", "add", "--src", "198.51.100.0/24"],
        &["except", "list"],
        &[&["except", "del"], &flows[..]].concat(),
        &["except", "reset"],
        &["except", "list"],
        &["drain"],
        &["resume"],
    ] {
        let output = line.agent(0).command(args)?;
        ensure!(output.status.success(), "`necp {}`: {output:?}", args.join(" "));
    }
    // Some keepalives of both sides.
    std::thread::sleep(Duration::from_millis(1500));
    ensure!(line.agent(0).process().terminate(SOON)?.success());
    let mut pcap = Pcap::new();
    while let Some(captured) = capture.next(Duration::from_millis(300))? {
        pcap.frame(captured.at, &captured.frame);
    }
    assert_eq!(capture.dropped()?, 0);
    Ok(pcap)
}

/// What tshark tells of every message, in their order, and that it has nothing to complain of.
fn told(pcap: &Pcap) -> Result<Vec<Told>> {
    const COMPLAINTS: [&str; 6] =
        ["0x414a", "Only version 1", "Reserved opcode", "not made of units", "out of range", "units, failed"];
    let names = ["tcp.srcport", "necp.summary", "necp.response_in", "necp.response_to", "necp.credential"];
    let names = [&names[..], &["necp.payload_len", "necp.unit", "_ws.malformed", "_ws.expert.message"]].concat();
    let names = [&names[..], &["necp.flags.basic_payload"]].concat();
    let mut all = Vec::new();
    for line in pcap.fields(&names)? {
        let split = |at: usize| line[at].split(';').filter(|value| !value.is_empty()).collect::<Vec<_>>();
        assert_eq!(line[7], "", "malformed: {line:?}");
        assert!(!COMPLAINTS.iter().any(|complaint| line[8].contains(complaint)), "{line:?}");
        let summaries = split(1);
        assert_eq!(split(4).len(), summaries.len(), "each has a credential: {line:?}");
        assert!(split(4).iter().all(|credential| credential.len() == 40), "{line:?}");
        let (mut answered_in, mut answer_to) = (split(2).into_iter(), split(3).into_iter());
        let (lengths, basic, mut units) = (split(5), split(9), split(6).into_iter());
        for ((summary, length), basic) in summaries.into_iter().zip(lengths).zip(basic) {
            let payload = length.parse::<usize>()? - 20;
            // Wide ones have a preamble before them.
            let count = if basic == "1" { payload / 32 } else { payload.saturating_sub(8) / 64 };
            let units = units.by_ref().take(count).map(String::from).collect();
            let name = summary.split(' ').next().unwrap_or_default().to_owned();
            let is_answer = name.ends_with("_ACK") || name == "EXCEPTION_RESP";
            let partner = if is_answer { answer_to.next() } else { answered_in.next() };
            let partner = partner.map(str::parse).transpose()?;
            all.push(Told { from_ne: line[0] == "3262", name, summary: summary.to_owned(), units, partner });
        }
        let left = [answered_in.next(), answer_to.next(), units.next()];
        assert_eq!(left, [None; 3], "{line:?}");
    }
    Ok(all)
}

#[test]
fn tshark_follows_a_session_of_the_real_daemons() -> Result<()> {
    let pcap = session()?;
    let all = told(&pcap)?;
    let names: Vec<&str> = all.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names[..2], ["INIT", "INIT_ACK"], "{names:?}");
    let mut requests: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for one in all.iter().filter(|one| !one.name.ends_with("_ACK") && one.name != "EXCEPTION_RESP") {
        let count = requests.entry(&one.name).or_default();
        count.0 += 1;
        count.1 += usize::from(one.partner.is_some());
    }
    let (keepalives, answered) = requests.remove("KEEPALIVE").context("keepalives")?;
    // The session may end on one of each side's.
    assert!(keepalives > 6 && answered + 2 >= keepalives, "{answered} of {keepalives} KEEPALIVEs were answered");
    for from_ne in [false, true] {
        let one = |told: &&Told| told.from_ne == from_ne && told.name == "KEEPALIVE";
        assert!(all.iter().filter(one).count() > 3, "both sides ask");
    }
    let expected = [
        ("EXCEPTION_ADD", 2),
        ("EXCEPTION_DEL", 1),
        ("EXCEPTION_QUERY", 2),
        ("EXCEPTION_RESET", 1),
        ("INIT", 1),
        ("START", 2),
        ("STOP", 2),
    ];
    let found: Vec<_> = requests.iter().map(|(name, (sent, answered))| (*name, *sent, *answered)).collect();
    assert_eq!(found, expected.map(|(name, count)| (name, count, count)), "each is answered");
    let answers = all.iter().filter(|one| one.name.ends_with("_ACK") || one.name == "EXCEPTION_RESP");
    assert!(answers.clone().all(|one| one.partner.is_some() && !one.summary.contains(" error")), "all succeed");
    assert!(answers.count() >= answered + 11);

    let of = |name: &str| -> Vec<&[String]> {
        all.iter().filter(|one| one.name == name).map(|one| &one.units[..]).collect()
    };
    assert_eq!(of("START"), [["l2 tcp/7", "l2 udp/53"]; 2]);
    assert_eq!(of("STOP"), [["tcp/7", "udp/53"]; 2]);
    assert_eq!(of("EXCEPTION_ADD")[0], ["local ttl 300 203.0.113.0/24 -> 198.51.100.7/32 tcp/80"]);
    assert_eq!(of("EXCEPTION_DEL"), [["203.0.113.0/24 -> 198.51.100.7/32 tcp/80"]]);
    let count = |name: &str| of(name).iter().map(|units| units.len()).collect::<Vec<_>>();
    assert_eq!(count("EXCEPTION_RESP"), [2, 0], "both, and none after the reset");
    assert_eq!((count("INIT"), count("INIT_ACK"), count("START_ACK")), (vec![1], vec![1], vec![0, 0]));
    // Health is asked of both services, and answered of both.
    let health = ["health of tcp/7 is 100", "health of udp/53 is 100"];
    assert!(all.iter().any(|one| !one.from_ne && one.name == "KEEPALIVE_ACK" && one.units == health));
    Ok(())
}
