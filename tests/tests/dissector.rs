//! The Wireshark dissector (`necp-user/wireshark/necp.lua`) on captures of the messages written by hand
//! (`necp-user/src/necp/vectors/messages.txt`): tshark says of every message what the file says of it.

use std::{fs, net::Ipv4Addr, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use etherparse::PacketBuilder;

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
        let length = frame.len() as u32;
        for word in [self.packets / 10, self.packets % 10 * 100_000, length, length] {
            self.bytes.extend(word.to_le_bytes());
        }
        self.bytes.extend(frame);
        self.packets += 1;
        Ok(())
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
    let units = vector.says[1..].iter().filter(|says| !says.is_empty() && **says != "= credential");
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
        let lines = pcap.fields(&["necp.summary", "necp.unit", "_ws.expert.message", "necp.credential"])?;
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
    Ok(())
}
