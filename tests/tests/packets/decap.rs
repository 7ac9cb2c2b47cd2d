//! What takes the outer headers off GRE at a server, in the kernel and on the host.

use aya::{
    Ebpf, TestRun as _,
    maps::HashMap,
    programs::{TestRunOptions, Xdp},
};
use necp_ebpf::{
    decap::{PROGRAM as NAME, SOURCES, Source, find, mapped, unwrap},
    frame::Frame,
    verdict::Reason,
};
use necp_tests::kernel::OWN_MAC;
use necp_user::plane::decap::PROGRAM;

use crate::{
    VERIFIED_INSTRUCTIONS,
    case::Bench,
    frames::{CLIENT_MAC, WEB_FLOW, checksum},
    setup::{OWN_ADDRESS, Setup, TUNNEL, mac},
};

const SERVER: [u8; 4] = [10, 0, 0, 11];
const XDP_PASS: u32 = 2;

/// fd00::1, whom the programs believe too.
const OWN6: [u8; 16] = *b"\xfd\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01";
const SERVER6: [u8; 16] = *b"\xfd\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x0b";

/// Who may send GRE.
fn sources() -> [Source; 2] {
    let [first, second, third, last] = [0, 4, 8, 12].map(|at| u32::from_ne_bytes(*OWN6[at..].first_chunk().unwrap()));
    [mapped(u32::from_ne_bytes(OWN_ADDRESS)), [first, second, third, last]]
}

/// The kernel program, which believes [`sources`].
struct Kernel(Ebpf);

impl Kernel {
    fn load() -> Self {
        let mut object = Ebpf::load(PROGRAM).unwrap();
        let mut map = HashMap::<_, Source, u64>::try_from(object.map_mut(SOURCES).unwrap()).unwrap();
        sources().into_iter().for_each(|source| map.insert(source, 0, 0).unwrap());
        let program: &mut Xdp = object.program_mut(NAME).unwrap().try_into().unwrap();
        program.load().unwrap();
        Self(object)
    }

    fn program(&self) -> &Xdp {
        self.0.program(NAME).unwrap().try_into().unwrap()
    }

    /// The frame as it goes on to the kernel.
    fn run(&self, frame: &[u8]) -> Vec<u8> {
        let mut out = vec![0; frame.len() + 64];
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.data_out = Some(&mut out);
        let result = self.program().test_run(options).unwrap();
        assert_eq!(result.return_value, XDP_PASS);
        out.truncate(result.data_size_out as usize);
        out
    }

    /// How many datagrams were unwrapped.
    fn count(&self) -> u64 {
        let map = HashMap::<_, Source, u64>::try_from(self.0.map(SOURCES).unwrap()).unwrap();
        sources().iter().map(|source| map.get(source, 0).unwrap()).sum()
    }
}

/// The same by the host build.
fn host(frame: &[u8]) -> Vec<u8> {
    let mut bytes = frame.to_vec();
    let start = bytes.as_mut_ptr().expose_provenance();
    // SAFETY: the buffer outlives the frame, and nobody else touches it meanwhile.
    let view = unsafe { Frame::new(start, start + bytes.len()) };
    match find(&view).filter(|wrapped| sources().contains(&wrapped.source)) {
        Some(wrapped) if unwrap(&view, wrapped.overhead) => bytes.split_off(wrapped.overhead),
        _ => bytes,
    }
}

/// A frame with a datagram in GRE.
#[derive(Clone)]
struct Wrapped {
    ether_type: [u8; 2],
    first_byte: Option<u8>,
    options: Vec<u8>,
    fragment: u16,
    protocol: u8,
    source: [u8; 4],
    /// GRE's flags and version, EtherType, optional fields.
    gre: Vec<u8>,
    inner: Vec<u8>,
    /// What the outer total length says too much, or too little.
    lie: i16,
    padding: usize,
}

impl Wrapped {
    fn plain() -> Self {
        Self {
            ether_type: [0x08, 0x00],
            first_byte: None,
            options: Vec::new(),
            fragment: 0x4000,
            protocol: 47,
            source: OWN_ADDRESS,
            gre: vec![0, 0, 0x08, 0x00],
            inner: WEB_FLOW.data(1).build().split_off(14),
            lie: 0,
            padding: 0,
        }
    }

    fn with(mut self, edit: impl FnOnce(&mut Self)) -> Self {
        edit(&mut self);
        self
    }

    fn build(&self) -> Vec<u8> {
        let header = 20 + self.options.len();
        let total = (header + self.gre.len() + self.inner.len()) as u16;
        let mut outer = vec![self.first_byte.unwrap_or(0x40 | (header / 4) as u8), 0];
        outer.extend(total.wrapping_add_signed(self.lie).to_be_bytes());
        outer.extend([0x12, 0x34]);
        outer.extend(self.fragment.to_be_bytes());
        outer.extend([64, self.protocol, 0, 0]);
        outer.extend([self.source, SERVER].concat());
        outer.extend(&self.options);
        let sum = checksum(&outer);
        outer[10..12].copy_from_slice(&sum.to_be_bytes());
        let padding = vec![0; self.padding];
        [&OWN_MAC[..], &CLIENT_MAC, &self.ether_type, &outer, &self.gre, &self.inner, &padding].concat()
    }

    /// As it should come out.
    fn unwrapped(&self) -> Vec<u8> {
        [&OWN_MAC[..], &CLIENT_MAC, &[0x08, 0x00], &self.inner, &vec![0; self.padding]].concat()
    }
}

/// What is unwrapped, and what is none of the program's.
fn cases() -> Vec<(&'static str, Wrapped, bool)> {
    let plain = Wrapped::plain;
    let gre = |bytes: &[u8]| plain().with(|wrapped| wrapped.gre = bytes.to_vec());
    let inner = |edit: fn(&mut Vec<u8>)| plain().with(|wrapped| edit(&mut wrapped.inner));
    vec![
        ("plain GRE (RFC 2784)", plain(), true),
        ("four bytes of options outside", plain().with(|wrapped| wrapped.options = vec![1; 4]), true),
        ("forty bytes of options outside", plain().with(|wrapped| wrapped.options = vec![1; 40]), true),
        ("it may be fragmented", plain().with(|wrapped| wrapped.fragment = 0), true),
        ("padding behind it", plain().with(|wrapped| wrapped.padding = 6), true),
        ("bytes between the inner datagram's end and the outer's", inner(|inner| inner.extend([7; 9])), true),
        ("another EtherType outside", plain().with(|wrapped| wrapped.ether_type = [0x86, 0xdd]), false),
        ("a tag outside", plain().with(|wrapped| wrapped.ether_type = [0x81, 0x00]), false),
        ("version 6 outside", plain().with(|wrapped| wrapped.first_byte = Some(0x65)), false),
        ("a header of 16 bytes outside", plain().with(|wrapped| wrapped.first_byte = Some(0x44)), false),
        ("a header of 60 bytes that are not there", plain().with(|wrapped| wrapped.first_byte = Some(0x4f)), false),
        ("another protocol", plain().with(|wrapped| wrapped.protocol = 4), false),
        ("a first fragment", plain().with(|wrapped| wrapped.fragment = 0x2000), false),
        ("a later fragment", plain().with(|wrapped| wrapped.fragment = 3), false),
        ("a source that is not on the list", plain().with(|wrapped| wrapped.source = [10, 0, 0, 2]), false),
        ("a checksum (RFC 2784 §2.1)", gre(&[0x80, 0, 8, 0, 0, 0, 0, 0]), false),
        ("a key (RFC 2890)", gre(&[0x20, 0, 8, 0, 0, 0, 0, 1]), false),
        ("a sequence number (RFC 2890)", gre(&[0x10, 0, 8, 0, 0, 0, 0, 1]), false),
        ("reserved bits", gre(&[0, 8, 8, 0]), false),
        ("version 1 (PPTP, RFC 2637)", gre(&[0, 1, 8, 0]), false),
        ("an Ethernet frame inside", gre(&[0, 0, 0x65, 0x58]), false),
        ("IPv6 inside", gre(&[0, 0, 0x86, 0xdd]), false),
        ("version 6 inside", inner(|inner| inner[0] = 0x65), false),
        ("an inner length of one byte more than there is", inner(|inner| inner[3] += 1), false),
        ("the greatest inner length", inner(|inner| inner[2..4].fill(0xff)), false),
        ("no datagram inside", inner(Vec::clear), false),
        ("an outer length of one byte more than there is", plain().with(|wrapped| wrapped.lie = 1), false),
        ("an outer length of one byte less than the inner wants", plain().with(|wrapped| wrapped.lie = -1), false),
    ]
}

/// A frame with a datagram of IPv6 in GRE in IPv6.
#[derive(Clone)]
struct Wrapped6 {
    ether_type: [u8; 2],
    first_byte: u8,
    next_header: u8,
    extension: Vec<u8>,
    source: [u8; 16],
    gre: Vec<u8>,
    inner: Vec<u8>,
    lie: i16,
    padding: usize,
}

impl Wrapped6 {
    fn plain() -> Self {
        let inner = [&[0x60, 0, 0, 0, 0, 9, 17, 63][..], &[7; 16], &[8; 16], &[5; 9]].concat();
        Self {
            ether_type: [0x86, 0xdd],
            first_byte: 0x60,
            next_header: 47,
            extension: Vec::new(),
            source: OWN6,
            gre: vec![0, 0, 0x86, 0xdd],
            inner,
            lie: 0,
            padding: 0,
        }
    }

    fn with(mut self, edit: impl FnOnce(&mut Self)) -> Self {
        edit(&mut self);
        self
    }

    fn build(&self) -> Vec<u8> {
        let payload = (self.extension.len() + self.gre.len() + self.inner.len()) as u16;
        let mut outer = vec![self.first_byte, 0, 0, 0];
        outer.extend(payload.wrapping_add_signed(self.lie).to_be_bytes());
        outer.extend([self.next_header, 64]);
        outer.extend([self.source, SERVER6].concat());
        let padding = vec![0; self.padding];
        let rest = [&self.extension[..], &self.gre, &self.inner, &padding].concat();
        [&OWN_MAC[..], &CLIENT_MAC, &self.ether_type, &outer, &rest].concat()
    }

    fn unwrapped(&self) -> Vec<u8> {
        [&OWN_MAC[..], &CLIENT_MAC, &[0x86, 0xdd], &self.inner, &vec![0; self.padding]].concat()
    }
}

fn cases6() -> Vec<(&'static str, Wrapped6, bool)> {
    let plain = Wrapped6::plain;
    let gre = |bytes: &[u8]| plain().with(|wrapped| wrapped.gre = bytes.to_vec());
    let inner = |edit: fn(&mut Vec<u8>)| plain().with(|wrapped| edit(&mut wrapped.inner));
    let empty = |wrapped: &mut Wrapped6| {
        wrapped.inner.truncate(40);
        wrapped.inner[5] = 0;
    };
    vec![
        ("plain GRE over IPv6 (RFC 7676)", plain(), true),
        ("a traffic class outside", plain().with(|wrapped| wrapped.first_byte = 0x6f), true),
        ("padding behind it", plain().with(|wrapped| wrapped.padding = 6), true),
        ("bytes between the inner datagram's end and the outer's", inner(|inner| inner.extend([7; 9])), true),
        ("an inner datagram that is a header only", plain().with(empty), true),
        ("another EtherType outside", plain().with(|wrapped| wrapped.ether_type = [0x08, 0x00]), false),
        ("a tag outside", plain().with(|wrapped| wrapped.ether_type = [0x81, 0x00]), false),
        ("version 4 outside", plain().with(|wrapped| wrapped.first_byte = 0x40), false),
        ("another next header", plain().with(|wrapped| wrapped.next_header = 41), false),
        (
            "destination options before it",
            plain().with(|wrapped| (wrapped.next_header, wrapped.extension) = (60, vec![47, 0, 1, 4, 0, 0, 0, 0])),
            false,
        ),
        (
            "a fragment",
            plain().with(|wrapped| (wrapped.next_header, wrapped.extension) = (44, vec![47, 0, 0, 1, 0, 0, 0, 9])),
            false,
        ),
        ("a source that is not on the list", plain().with(|wrapped| wrapped.source = SERVER6), false),
        (
            "IPv4's source in its mapped form",
            plain().with(|wrapped| {
                let [a, b, c, d] = OWN_ADDRESS;
                wrapped.source = std::net::Ipv4Addr::new(a, b, c, d).to_ipv6_mapped().octets();
            }),
            true,
        ),
        ("a checksum (RFC 2784 §2.1)", gre(&[0x80, 0, 0x86, 0xdd, 0, 0, 0, 0]), false),
        ("a key (RFC 2890)", gre(&[0x20, 0, 0x86, 0xdd, 0, 0, 0, 1]), false),
        ("version 1", gre(&[0, 1, 0x86, 0xdd]), false),
        ("IPv4 inside", gre(&[0, 0, 0x08, 0x00]), false),
        ("version 4 inside", inner(|inner| inner[0] = 0x45), false),
        ("an inner length of one byte more than there is", inner(|inner| inner[5] += 1), false),
        ("the greatest inner length", inner(|inner| inner[4..6].fill(0xff)), false),
        ("no datagram inside", inner(Vec::clear), false),
        ("an outer length of one byte more than there is", plain().with(|wrapped| wrapped.lie = 1), false),
        ("an outer length of one byte less than the inner wants", plain().with(|wrapped| wrapped.lie = -1), false),
        ("no outer length", plain().with(|wrapped| wrapped.lie = -53), false),
    ]
}

#[test]
fn gre_over_ipv6_is_unwrapped_as_described_in_the_kernel_and_on_the_host() {
    let kernel = Kernel::load();
    let mut unwrapped = 0;
    for (name, wrapped, taken) in cases6() {
        let frame = wrapped.build();
        let wanted = if taken { wrapped.unwrapped() } else { frame.clone() };
        assert_eq!(host(&frame), wanted, "{name}, on the host");
        assert_eq!(kernel.run(&frame), wanted, "{name}, in the kernel");
        unwrapped += u64::from(taken);
        assert_eq!(kernel.count(), unwrapped, "{name}");
    }
    // Cut anywhere, the outer header knowing of it or not.
    let whole = Wrapped6::plain().build();
    for end in 0..whole.len() {
        let mut frames = vec![whole[..end].to_vec()];
        if end >= 54 {
            let mut knowing = whole[..end].to_vec();
            knowing[18..20].copy_from_slice(&((end - 54) as u16).to_be_bytes());
            frames.push(knowing);
        }
        for frame in frames {
            assert_eq!(host(&frame), frame, "{end} bytes, on the host");
            assert!(end < 14 || kernel.run(&frame) == frame, "{end} bytes, in the kernel");
        }
    }
    assert_eq!(kernel.count(), unwrapped);
}

#[test]
fn what_is_wrapped_for_a_server_of_ipv6_is_unwrapped_there() {
    let (sent, wrapped, source) = crate::six::bed::through_the_tunnel();
    assert_eq!(source, OWN6);
    // One hop less, between the addresses of the tunnel's link.
    let mut inner = sent[14..].to_vec();
    inner[7] -= 1;
    let wanted = [&wrapped[..14], &inner].concat();
    assert_eq!(wrapped.len(), sent.len() + 44);
    assert_eq!((host(&wrapped), Kernel::load().run(&wrapped)), (wanted.clone(), wanted));
}

#[test]
fn gre_is_unwrapped_as_described_in_the_kernel_and_on_the_host() {
    let kernel = Kernel::load();
    let mut unwrapped = 0;
    for (name, wrapped, taken) in cases() {
        let frame = wrapped.build();
        let wanted = if taken { wrapped.unwrapped() } else { frame.clone() };
        assert_eq!(host(&frame), wanted, "{name}, on the host");
        assert_eq!(kernel.run(&frame), wanted, "{name}, in the kernel");
        unwrapped += u64::from(taken);
        assert_eq!(kernel.count(), unwrapped, "{name}");
    }
}

#[test]
fn gre_that_is_cut_anywhere_stays_as_it_is() {
    let kernel = Kernel::load();
    for options in [0, 40] {
        let whole = Wrapped::plain().with(|wrapped| wrapped.options = vec![1; options]).build();
        for end in 0..whole.len() {
            let mut frames = vec![whole[..end].to_vec()];
            if end >= 18 {
                // The outer header knows of the cut, the inner one does not.
                let mut knowing = whole[..end].to_vec();
                knowing[16..18].copy_from_slice(&((end - 14) as u16).to_be_bytes());
                frames.push(knowing);
            }
            for frame in frames {
                assert_eq!(host(&frame), frame, "{end} bytes, on the host");
                // The kernel takes no less than an Ethernet header.
                assert!(end < 14 || kernel.run(&frame) == frame, "{end} bytes, in the kernel");
            }
        }
    }
    assert_eq!(kernel.count(), 0);
}

#[test]
fn what_is_wrapped_for_a_server_is_unwrapped_there() {
    let kernel = Kernel::load();
    let mut bench = Bench::load();
    bench.install(&Setup::owned_by(TUNNEL));
    for spec in [WEB_FLOW.data(1), WEB_FLOW.data(1).with(|spec| spec.ip_options = vec![1; 40]), WEB_FLOW.ack(7)] {
        let sent = bench.kernel.run(&spec.build()).unwrap();
        assert_eq!(sent.reason, Reason::Plain);
        // One hop less, and the Ethernet header that it came with.
        let inner = spec.with(|spec| spec.ttl -= 1).build().split_off(14);
        let wanted = [&mac(TUNNEL)[..], &OWN_MAC, &[0x08, 0x00], &inner].concat();
        assert_eq!(kernel.run(&sent.frame), wanted);
        assert_eq!(host(&sent.frame), wanted);
    }
    assert_eq!(kernel.count(), 3);
}

#[test]
fn the_program_that_unwraps_is_far_from_the_verifiers_limit() {
    let count = Kernel::load().program().info().unwrap().verified_instruction_count().expect("told since 5.16");
    println!("verified: {NAME}: {count} instructions");
    assert!((1..VERIFIED_INSTRUCTIONS).contains(&count), "{count} instructions, more than {VERIFIED_INSTRUCTIONS}");
}
