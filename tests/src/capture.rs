//! What passes an interface, both ways, with the kernel's time of each frame (packet(7)).
//!
//! The kernel filters, so that a busy link costs nothing and no frame is missed; whether one was, it says.

use std::{ffi::CString, io, mem, os::fd::AsRawFd as _, time::Duration};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    netns::Namespace,
    raw::{empty_address, receive_with},
};

/// linux/if_ether.h
const ETH_P_ALL: u16 = 3;
/// Longest part of a frame that is kept, in bytes.
const SNAPLEN: usize = 2048;
/// For bursts while the reader gets no CPU, in bytes.
const BUFFER: usize = 8 << 20;

/// A moment as the kernel stamps packets: time since 1970-01-01 00:00 UTC.
pub type WallTime = Duration;

/// A frame and when it passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// When the kernel saw it.
    pub at: WallTime,
    /// Whether the interface sent it (and did not receive it).
    pub outgoing: bool,
    /// From the destination's hardware address on; the first 2,048 bytes.
    pub frame: Vec<u8>,
}

/// An AF_PACKET socket that listens only.
#[derive(Debug)]
pub struct Capture {
    socket: Socket,
    buffer: Vec<u8>,
    dropped: u32,
}

impl Capture {
    /// Listens for first SYNs (SYN without ACK) to TCP port `service`, and for all TCP segments from and to port
    /// `control`, over IPv4 without VLAN tags and fragments.
    ///
    /// # Errors
    /// Without root, or if there is no such interface.
    pub fn open(ns: &Namespace, interface: &str, service: u16, control: u16) -> Result<Self> {
        let socket = ns.run(|| open(interface, &filter(service, control)));
        let socket = socket.with_context(|| format!("cannot capture on {interface} in {}", ns.name()))?;
        Ok(Self { socket, buffer: vec![0; SNAPLEN], dropped: 0 })
    }

    /// The next frame that passes within `timeout`.
    ///
    /// # Errors
    /// If the interface went away.
    pub fn next(&mut self, timeout: Duration) -> io::Result<Option<Captured>> {
        self.socket.set_read_timeout(Some(timeout.max(Duration::from_millis(1))))?;
        match receive(&self.socket, &mut self.buffer) {
            Ok(captured) => Ok(Some(captured)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How many frames fitted the filter and found no room, from the beginning on.
    ///
    /// # Errors
    /// As getsockopt(2).
    pub fn dropped(&mut self) -> io::Result<u32> {
        const PACKET_STATISTICS: libc::c_int = 6;
        // packet(7): (packets, drops), both set to 0 by reading them.
        let mut counts = [0u32; 2];
        let mut length = mem::size_of_val(&counts) as libc::socklen_t;
        // SAFETY: the pointers are to a live array of that length, and to its length.
        let got = unsafe {
            let counts = counts.as_mut_ptr().cast();
            libc::getsockopt(self.socket.as_raw_fd(), libc::SOL_PACKET, PACKET_STATISTICS, counts, &raw mut length)
        };
        if got != 0 {
            return Err(io::Error::last_os_error());
        }
        self.dropped += counts[1];
        Ok(self.dropped)
    }
}

/// The present moment, by the clock that stamps packets.
pub fn now() -> WallTime {
    std::time::UNIX_EPOCH.elapsed().unwrap_or_default()
}

fn open(interface: &str, filter: &[libc::sock_filter]) -> io::Result<Socket> {
    // Bound to no protocol it receives nothing, so that no frame comes before the filter.
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
    let fd = socket.as_raw_fd();
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    set(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
    set(fd, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1i32)?;
    set(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(BUFFER as i32))?;
    let name = CString::new(interface)?;
    // SAFETY: `name` is a string that ends in NUL, and lives.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    let mut address = empty_address();
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ETH_P_ALL.to_be();
    address.sll_ifindex = index.cast_signed();
    let length = mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: `address` is a live `sockaddr_ll` of that length.
    match unsafe { libc::bind(fd, (&raw const address).cast(), length) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set<T>(fd: libc::c_int, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the pointer is to a live value of that length, and what it points to itself lives as long.
    let done =
        unsafe { libc::setsockopt(fd, level, option, (&raw const *value).cast(), size_of::<T>() as libc::socklen_t) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Classic BPF: loads are from the frame's beginning; a jump's two numbers are instructions to skip if so, if not.
fn filter(service: u16, control: u16) -> Vec<libc::sock_filter> {
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_HALF_AT_X: u16 = 0x48;
    const LOAD_BYTE_AT_X: u16 = 0x50;
    const X_IS_IP_HEADER_LENGTH: u16 = 0xb1;
    const AND: u16 = 0x54;
    const IF_EQUAL: u16 = 0x15;
    const IF_ANY_BIT: u16 = 0x45;
    const RETURN: u16 = 0x06;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    vec![
        step(LOAD_HALF, 0, 0, 12),
        step(IF_EQUAL, 0, 13, 0x0800),
        step(LOAD_BYTE, 0, 0, 23),
        step(IF_EQUAL, 0, 11, 6),
        step(LOAD_HALF, 0, 0, 20),
        step(IF_ANY_BIT, 9, 0, 0x3fff),
        step(X_IS_IP_HEADER_LENGTH, 0, 0, 14),
        step(LOAD_HALF_AT_X, 0, 0, 14),
        step(IF_EQUAL, 7, 0, control.into()),
        step(LOAD_HALF_AT_X, 0, 0, 16),
        step(IF_EQUAL, 5, 0, control.into()),
        step(IF_EQUAL, 0, 3, service.into()),
        step(LOAD_BYTE_AT_X, 0, 0, 27),
        // SYN and ACK (RFC 9293 §3.1).
        step(AND, 0, 0, 0x12),
        step(IF_EQUAL, 1, 0, 0x02),
        step(RETURN, 0, 0, 0),
        step(RETURN, 0, 0, u32::MAX),
    ]
}

fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<Captured> {
    let (length, kind, at) = receive_with(socket, buffer, stamp)?;
    let at = at.ok_or_else(|| io::Error::other("a frame without a time"))?;
    Ok(Captured { at, outgoing: kind == libc::PACKET_OUTGOING, frame: buffer[..length].to_vec() })
}

/// socket(7), SO_TIMESTAMPNS.
fn stamp(message: &libc::msghdr) -> Option<WallTime> {
    // SAFETY: the kernel has filled the message, whose control buffer lives.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: the macros return pointers to whole headers within the control buffer.
        let (level, kind) = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
        if (level, kind) == (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) {
            // SAFETY: the data of this kind is a `timespec`, at whatever alignment.
            let time = unsafe { libc::CMSG_DATA(header).cast::<libc::timespec>().read_unaligned() };
            return Some(Duration::new(u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?));
        }
        // SAFETY: as for the first one.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    None
}
