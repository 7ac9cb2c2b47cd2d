//! The messages in `messages.txt` against the codec; the sessions' tests read them too.

use std::net::IpAddr;

use super::auth::Key;
use super::message::{
    Exception, Filter, HealthAnswer, Init, InitAck, Listed, Operation, Query, ServiceUnit, UnitError, extension,
};
use super::wire::{
    Decoder, Flags, HEADER_LEN, Header, Item, Opcode, PREAMBLE_LEN, Preamble, UNIT_LEN, Unit, WIDE_UNIT_LEN, WideUnit,
};

/// The key of the authenticated messages.
const KEY: &[u8] = b"0123456789abcdef";

/// A message of the file.
#[derive(Debug, Clone)]
pub(super) struct Vector {
    pub(super) name: &'static str,
    /// `SE>NE`, `NE>SE` or `both`.
    pub(super) sender: &'static str,
    pub(super) answer: Option<&'static str>,
    /// The bytes of each line, and what they say.
    lines: Vec<(Vec<u8>, &'static str)>,
}

impl Vector {
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.lines.iter().flat_map(|(bytes, _)| bytes).copied().collect()
    }

    /// Whether it is of a session in which the extension was asked for.
    pub(super) fn is_wide(&self) -> bool {
        self.name.starts_with("wide-")
    }

    pub(super) fn is_authenticated(&self) -> bool {
        self.lines.last().is_some_and(|(_, says)| *says == "= credential")
    }

    fn header(&self) -> Header {
        Header::decode(self.lines[0].0[..].try_into().expect("the first line is the header")).expect("it is one")
    }
}

/// All of them, in the file's order.
pub(super) fn all() -> Vec<Vector> {
    let mut vectors: Vec<Vector> = Vec::new();
    for line in include_str!("messages.txt").lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if !line.starts_with(' ') {
            let (head, answer) = line.split_once(" > ").map_or((line, None), |(head, answer)| (head, Some(answer)));
            let [name, _section, sender] = head.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            vectors.push(Vector { name, sender, answer, lines: Vec::new() });
            continue;
        }
        let (digits, says) = line.split_at(line.find(['=', '~', '!']).unwrap_or(line.len()));
        let digits: Vec<u8> = digits.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        vectors.last_mut().expect("a name comes first").lines.push((digits.chunks(2).map(byte).collect(), says));
    }
    vectors
}

pub(super) fn named(name: &str) -> Vector {
    all().into_iter().find(|vector| vector.name == name).unwrap_or_else(|| panic!("no message is called {name}"))
}

/// A header in the file's words.
fn header_says(header: &Header) -> String {
    let name = header.opcode.name().map_or_else(|| format!("{:#04x}", header.opcode.0), Into::into);
    let mut says = format!("= {name} id {}", header.request_id);
    let flags = [
        (Flags::BASIC_PAYLOAD, " basic"),
        (Flags::AUTH_CREDENTIAL_PROVIDED, " credential"),
        (Flags::ERROR, " error"),
        (Flags::PROTOCOL_VERSION_MISMATCH, " version-mismatch"),
        (Flags::AUTH_REQUIRED, " auth-required"),
        (Flags::BAD_SEQUENCE_NUMBER, " bad-sequence"),
    ];
    flags.iter().filter(|(flag, _)| header.flags.has(*flag)).for_each(|(_, name)| says += name);
    if header.flags.0 & !0x3f != 0 {
        says += &format!(" {:#06x}", header.flags.0 & !0x3f);
    }
    if header.seq_num != 0 {
        says += &format!(" seq {:#018x}", header.seq_num);
    }
    if header.version != 1 {
        says += &format!(" version {}", header.version);
    }
    says
}

/// A failed answer repeats units of the request.
fn layout(header: &Header) -> Opcode {
    let error = header.flags.has(Flags::ERROR);
    if error && header.opcode.0 & 1 == header.opcode.0 >> 5 & 1 { Opcode(header.opcode.0 - 1) } else { header.opcode }
}

/// What a unit means, and how it is written.
fn unit_means(header: &Header, unit: &Unit) -> Result<(String, Unit), UnitError> {
    Ok(match layout(header) {
        Opcode::INIT => {
            let init = Init::parse(unit)?;
            let from = |number| format!("authenticate from {number:#018x}");
            (init.authenticate.map_or_else(|| "no authentication".into(), from), init.unit())
        }
        Opcode::INIT_ACK => {
            let ack = InitAck::parse(unit);
            (format!("first number {:#018x}", ack.first_seq_num), ack.unit())
        }
        Opcode::KEEPALIVE if extension::is_query(unit) => ("extension".into(), extension::query()),
        Opcode::KEEPALIVE_ACK if extension::is_query(unit) => {
            (format!("extension version {}", unit.0[3]), extension::answer(&extension::query()))
        }
        Opcode::KEEPALIVE => {
            let query = Query::parse(unit)?;
            (format!("health of {}", query.service), query.unit())
        }
        Opcode::KEEPALIVE_ACK => {
            let HealthAnswer { service, health } = HealthAnswer::parse(unit)?;
            (format!("health of {service} is {health}"), HealthAnswer::unit(&Query { service }.unit(), health))
        }
        Opcode::START => {
            let offer = ServiceUnit::parse(unit)?;
            (format!("{} {}", offer.forwarding, offer.key()), offer.unit())
        }
        Opcode::STOP => {
            let Operation::Stop(service) = Operation::parse_stop(unit)? else { panic!("it is no STOP") };
            (service.to_string(), Operation::stop_unit(service))
        }
        Opcode::EXCEPTION_ADD => {
            let exception = Exception::parse(unit)?;
            (format!("{} ttl {} {}", exception.scope, exception.ttl, exception.flows), exception.unit())
        }
        Opcode::EXCEPTION_DEL => {
            let flows = Exception::parse_del(unit)?;
            (flows.to_string(), Exception::del_unit(&flows))
        }
        Opcode::EXCEPTION_QUERY => {
            let filter = Filter::parse(unit)?;
            (filter_says(&filter), filter.unit())
        }
        Opcode::EXCEPTION_RESP => {
            let entry = Listed::parse(unit)?;
            (format!("{} by {} {}", entry.scope, entry.installer, entry.flows), entry.unit())
        }
        other => panic!("{other} has no units"),
    })
}

/// The same of a wide unit.
fn wide_unit_means(header: &Header, unit: &WideUnit) -> Result<(String, WideUnit), UnitError> {
    Ok(match layout(header) {
        Opcode::EXCEPTION_ADD => {
            let exception = Exception::parse_wide(unit)?;
            (format!("{} ttl {} {}", exception.scope, exception.ttl, exception.flows), exception.wide_unit())
        }
        Opcode::EXCEPTION_DEL => {
            let flows = Exception::parse_wide_del(unit)?;
            (flows.to_string(), Exception::wide_del_unit(&flows))
        }
        Opcode::EXCEPTION_QUERY => {
            let filter = Filter::parse_wide(unit)?;
            let family = filter.family.map(|family| family.to_string());
            let rest = filter_says(&filter);
            (family.map_or(rest.clone(), |family| format!("{family} {rest}")), filter.wide_unit())
        }
        Opcode::EXCEPTION_RESP => {
            let entry = Listed::parse_wide(unit)?;
            (format!("{} by {} {}", entry.scope, entry.installer, entry.flows), entry.wide_unit())
        }
        other => panic!("{other} has no wide units"),
    })
}

fn preamble_says(bytes: &[u8; PREAMBLE_LEN]) -> String {
    let preamble = Preamble::decode(bytes);
    assert_eq!(preamble.encode(), *bytes);
    let Preamble { magic, version, unit_len, .. } = preamble;
    if preamble == Preamble::SPOKEN {
        "= preamble EXC6 version 1".into()
    } else {
        format!("! preamble {magic:#010x} version {version} units of {unit_len} is not spoken")
    }
}

/// A unit, of either form, against what the file says of it.
fn reads_as_it_says<U: Copy + PartialEq + std::fmt::Debug>(
    name: &str,
    unit: U,
    means: impl Fn(&U) -> Result<(String, U), UnitError>,
    says: &str,
) {
    match (means(&unit), says.split_at(2)) {
        (Ok((means, written)), ("= ", expected)) => assert_eq!((&*means, written), (expected, unit), "{name}"),
        (Ok((meaning, written)), ("~ ", expected)) => {
            assert_eq!(meaning, expected, "{name}");
            assert_ne!(written, unit, "{name}");
            assert_eq!(means(&written), Ok((meaning, written)), "{name}");
        }
        (Err(error), ("! ", expected)) => assert_eq!(error.to_string(), expected, "{name}"),
        (means, says) => panic!("{name}: {means:?}, and the file says {says:?}"),
    }
}

fn filter_says(filter: &Filter) -> String {
    let address = |(address, length): (IpAddr, Option<u8>)| {
        length.map_or_else(|| address.to_string(), |length| format!("{address}/{length}"))
    };
    let parts = [
        filter.scope.map(|scope| scope.to_string()),
        filter.installer.map(|installer| format!("by {installer}")),
        filter.source.map(|source| format!("from {}", address(source))),
        filter.destination.map(|destination| format!("to {}", address(destination))),
        filter.protocol.map(|protocol| format!("protocol {protocol}")),
        filter.port.map(|port| format!("port {port}")),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() { "all".into() } else { parts.join(" ") }
}

/// Every opcode stands in the file, each with and without F_Error where it is an answer.
#[test]
fn every_opcode_has_a_vector() {
    let vectors = all();
    for code in (0..9).chain(0x20..0x28) {
        let of_code = |error: bool| {
            vectors.iter().any(|vector| {
                vector.header().opcode == Opcode(code) && vector.header().flags.has(Flags::ERROR) == error
            })
        };
        let is_answer = (1..=255).any(|request| Opcode(request).answer() == Some(Opcode(code)));
        assert!(of_code(false) && (!is_answer || of_code(true)), "{}", Opcode(code));
    }
    let mut names: Vec<_> = vectors.iter().map(|vector| vector.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), vectors.len(), "names are distinct");
}

/// Bytes to meaning and back, by the file's own words.
#[test]
fn every_vector_reads_as_it_says() {
    for vector in all() {
        let header = vector.header();
        assert_eq!(header_says(&header), vector.lines[0].1, "{}", vector.name);
        assert_eq!(header.encode()[..], vector.lines[0].0, "{}", vector.name);
        let payload: usize = vector.lines[1..].iter().map(|(bytes, _)| bytes.len()).sum();
        assert_eq!(header.payload_len as usize, payload, "{}", vector.name);
        for (bytes, says) in vector.lines[1..].iter().filter(|(_, says)| !says.is_empty() && *says != "= credential") {
            match bytes.len() {
                PREAMBLE_LEN => assert_eq!(preamble_says(bytes[..].try_into().unwrap()), *says, "{}", vector.name),
                WIDE_UNIT_LEN => {
                    let unit = WideUnit(bytes[..].try_into().unwrap());
                    reads_as_it_says(vector.name, unit, |unit| wide_unit_means(&header, unit), says);
                }
                _ => {
                    let bytes: &[u8; UNIT_LEN] = bytes[..].try_into().expect("a unit has 32 bytes");
                    let unit = Unit::decode(bytes);
                    assert_eq!(unit.encode(), *bytes, "{}", vector.name);
                    reads_as_it_says(vector.name, unit, |unit| unit_means(&header, unit), says);
                }
            }
        }
    }
}

/// §5.8.1: credentials that were computed elsewhere are right, and one bit makes them wrong.
#[test]
fn credentials_are_what_hmac_sha1_says() {
    let key = Key::new(KEY.to_vec()).unwrap();
    let authenticated: Vec<Vector> = all().into_iter().filter(Vector::is_authenticated).collect();
    assert!(authenticated.len() >= 8);
    for vector in authenticated {
        let bytes = vector.bytes();
        let (payload, credential) = bytes[HEADER_LEN..].split_at(bytes.len() - HEADER_LEN - 20);
        assert!(key.verifies(&vector.header(), payload, credential), "{}", vector.name);
        let mut signer = key.sign(&vector.header());
        signer.update(payload);
        assert_eq!(signer.credential()[..], *credential, "{}", vector.name);
        for bit in 0..8 * bytes.len() {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let Ok(header) = Header::decode(bytes[..HEADER_LEN].try_into().unwrap()) else { continue };
            let (payload, credential) = bytes[HEADER_LEN..].split_at(bytes.len() - HEADER_LEN - 20);
            assert!(!key.verifies(&header, payload, credential), "{} with bit {bit} flipped", vector.name);
        }
    }
}

/// The whole file as one stream, cut at every byte.
#[test]
fn the_file_cut_at_every_byte_gives_the_same_items() {
    let stream: Vec<u8> = all().iter().flat_map(Vector::bytes).collect();
    let decode = |pieces: &[&[u8]]| {
        let mut decoder = Decoder::default();
        let mut items = Vec::new();
        for mut piece in pieces.iter().copied() {
            while let Some(item) = decoder.next(&mut piece).unwrap() {
                if let Item::Header(header) = item {
                    decoder.read_wide(&header);
                }
                items.push(item);
            }
        }
        assert!(!decoder.in_message());
        items
    };
    let whole = decode(&[&stream]);
    assert_eq!(whole.iter().filter(|item| matches!(item, Item::Header(_))).count(), all().len());
    assert!(whole.iter().filter(|item| matches!(item, Item::Wide(_))).count() > 30);
    for at in 0..=stream.len() {
        assert_eq!(decode(&[&stream[..at], &stream[at..]]), whole, "cut at {at}");
    }
    assert_eq!(decode(&stream.chunks(1).collect::<Vec<_>>()), whole);
}
