//! Links and addresses through `ip`, offloads through ethtool's ioctl, reachability through ICMP echo.

use std::{
    io::{self, Read as _, Write as _},
    mem::MaybeUninit,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsRawFd as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Namespace;

/// Offloads of an interface that the bed sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Transmit checksums (`ethtool -K DEV tx`). With it a sender on veth leaves checksums unfinished, and a program
    /// that edits packets would have to guess.
    TxChecksum,
    /// Generic receive offload (`ethtool -K DEV gro`). On veth it switches NAPI on, without which the *peer's*
    /// redirects are dropped. For XDP_TX it is not enough: see [`crate::xdp`].
    Gro,
    /// VLAN tags put in by the card (`ethtool -K DEV txvlan`). With it a sender on veth hands tags over beside the frame,
    /// where a program does not see them.
    TxVlan,
}

/// Switches an offload of an interface in the namespace.
///
/// # Errors
/// If there is no such interface, or it refuses.
pub fn set_offload(namespace: &Namespace, interface: &str, offload: Offload, on: bool) -> Result<()> {
    // linux/ethtool.h: ETHTOOL_STXCSUM, ETHTOOL_SGRO, ETHTOOL_GFLAGS and SFLAGS.
    namespace
        .run(|| match offload {
            Offload::TxChecksum => ethtool(interface, 0x17, u32::from(on)),
            Offload::Gro => ethtool(interface, 0x2c, u32::from(on)),
            Offload::TxVlan => {
                let others = ethtool(interface, 0x25, 0)? & !FLAG_TXVLAN;
                ethtool(interface, 0x26, others | if on { FLAG_TXVLAN } else { 0 })
            }
        })
        .map(drop)
        .with_context(|| format!("cannot switch {offload:?} of {interface} in {}", namespace.name()))
}

/// Reads an offload of an interface in the namespace.
///
/// # Errors
/// If there is no such interface.
pub fn offload(namespace: &Namespace, interface: &str, offload: Offload) -> Result<bool> {
    // linux/ethtool.h: ETHTOOL_GTXCSUM, ETHTOOL_GGRO, ETHTOOL_GFLAGS.
    let (command, bits) = match offload {
        Offload::TxChecksum => (0x16, u32::MAX),
        Offload::Gro => (0x2b, u32::MAX),
        Offload::TxVlan => (0x25, FLAG_TXVLAN),
    };
    Ok(namespace.run(|| ethtool(interface, command, 0))? & bits != 0)
}

/// The hardware address of an interface in the namespace.
///
/// # Errors
/// If there is no such interface.
pub fn mac(namespace: &Namespace, interface: &str) -> Result<[u8; 6]> {
    let read = || {
        let mut request = request_for(interface)?;
        ioctl(libc::SIOCGIFHWADDR, &mut request)?;
        // SAFETY: SIOCGIFHWADDR has filled this member of the union.
        let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
        io::Result::Ok(std::array::from_fn(|at| data[at].cast_unsigned()))
    };
    namespace.run(read).with_context(|| format!("cannot read the hardware address of {interface}"))
}

/// Sends ICMP echo requests until one is answered; returns how long that answer took.
///
/// # Errors
/// If none comes before `timeout`.
pub fn ping(namespace: &Namespace, destination: Ipv4Addr, timeout: Duration) -> Result<Duration> {
    let answer = namespace.run(|| echo(destination, timeout));
    answer.with_context(|| format!("{destination} does not answer {}", namespace.name()))
}

/// Runs `ip` outside of any namespace.
pub(crate) fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output().context("cannot run `ip`; `cargo xtask setup` installs it")?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`ip {}`: {}", args.join(" "), message.trim());
    Ok(())
}

pub(crate) fn ip_batch(namespace: &str, lines: &str) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(["-netns", namespace, "-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot run `ip`; `cargo xtask setup` installs it")?;
    let mut input = child.stdin.take().context("`ip` has no input")?;
    // `ip` may end at the first bad line: its message says more than our broken pipe.
    let written = input.write_all(lines.as_bytes());
    drop(input);
    let output = child.wait_with_output()?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`ip -netns {namespace} -batch -`: {}\nthe lines were:\n{lines}", message.trim());
    Ok(written?)
}

/// linux/ethtool.h, ETH_FLAG_TXVLAN.
const FLAG_TXVLAN: u32 = 1 << 7;

/// linux/ethtool.h, `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

fn ethtool(interface: &str, command: u32, data: u32) -> io::Result<u32> {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let mut value = EthtoolValue { command, data };
    let mut request = request_for(interface)?;
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    ioctl(SIOCETHTOOL, &mut request)?;
    Ok(value.data)
}

fn request_for(interface: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain numbers and pointers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn ioctl(code: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    // SAFETY: `request` is a live `ifreq`, whose data pointer, where the code reads one, points to a live value.
    match unsafe { libc::ioctl(socket.as_raw_fd(), code, request) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn echo(destination: Ipv4Addr, timeout: Duration) -> Result<Duration> {
    let mut socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
    socket.connect(&SocketAddrV4::new(destination, 0).into())?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let end = Instant::now() + timeout;
    for sequence in 0u16.. {
        let sent = Instant::now();
        if sent > end {
            break;
        }
        let sent_ok = socket.send(&echo_request(sequence));
        let mut packet = [0; 128];
        while sent_ok.is_ok()
            && let Ok(length) = socket.read(&mut packet)
        {
            if is_reply(&packet[..length], sequence) {
                return Ok(sent.elapsed());
            }
        }
    }
    bail!("no ICMP echo reply within {timeout:?}")
}

/// RFC 792: type 8, code 0, checksum, identifier, sequence number.
fn echo_request(sequence: u16) -> [u8; 8] {
    const TYPE_AND_CODE: u16 = 8 << 8;
    let identifier = echo_identifier();
    let words = [TYPE_AND_CODE, identifier, sequence];
    let sum: u32 = words.iter().map(|word| u32::from(*word)).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    let checksum = !(folded & 0xffff) as u16;
    let mut message = [0; 8];
    for (bytes, word) in message.chunks_exact_mut(2).zip([TYPE_AND_CODE, checksum, identifier, sequence]) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
    message
}

fn is_reply(packet: &[u8], sequence: u16) -> bool {
    let Some(message) = packet.first().and_then(|first| packet.get(usize::from(first & 0xf) * 4..)) else {
        return false;
    };
    message.first() == Some(&0)
        && message.get(4..6) == Some(&echo_identifier().to_be_bytes())
        && message.get(6..8) == Some(&sequence.to_be_bytes())
}

fn echo_identifier() -> u16 {
    std::process::id() as u16
}
