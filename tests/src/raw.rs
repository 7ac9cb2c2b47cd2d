//! Whole Ethernet frames, sent and received on an interface of a namespace (packet(7)).

use std::{
    borrow::Cow,
    io,
    mem::{self, MaybeUninit},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Namespace;

/// linux/if_ether.h, in network byte order where the kernel wants it so.
const ETH_P_ALL: u16 = 3;
const LARGEST_FRAME: usize = 65_536 + 64;
/// Frames in one system call.
const MOST_AT_ONCE: usize = 64;

/// An AF_PACKET socket on one interface.
#[derive(Debug)]
pub struct RawSocket {
    socket: Socket,
}

impl RawSocket {
    /// Opens it; what arrives from now on can be received.
    ///
    /// # Errors
    /// Without root, or if there is no such interface.
    pub fn open(ns: &Namespace, interface: &str) -> Result<Self> {
        let socket = ns.run(|| open(interface));
        Ok(Self { socket: socket.with_context(|| format!("no raw socket on {interface} in {}", ns.name()))? })
    }

    /// Sends a frame as it is, from the destination's hardware address on, without the frame check sequence.
    ///
    /// # Errors
    /// What the interface says: down, or the frame is too long.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.send(frame).map(drop)
    }

    /// Sends these frames in as few system calls as it takes; how many the interface took.
    ///
    /// # Errors
    /// If it took none, for another reason than that it is busy.
    pub fn send_all(&self, frames: &[Vec<u8>]) -> io::Result<usize> {
        // SAFETY: `iovec` and `mmsghdr` are plain numbers and pointers, for which zero is a value.
        let (mut pieces, mut messages): ([libc::iovec; MOST_AT_ONCE], [libc::mmsghdr; MOST_AT_ONCE]) =
            unsafe { (MaybeUninit::zeroed().assume_init(), MaybeUninit::zeroed().assume_init()) };
        let mut sent = 0;
        for batch in frames.chunks(MOST_AT_ONCE) {
            for ((piece, message), frame) in pieces.iter_mut().zip(&mut messages).zip(batch) {
                *piece = libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
                message.msg_hdr.msg_iov = piece;
                message.msg_hdr.msg_iovlen = 1;
            }
            // SAFETY: so many messages, each of one live buffer that is only read.
            let taken = unsafe {
                libc::sendmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), batch.len() as libc::c_uint, 0)
            };
            match usize::try_from(taken) {
                Ok(taken) => sent += taken,
                Err(_) => match io::Error::last_os_error() {
                    error if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                    error => return Err(error),
                },
            }
        }
        Ok(sent)
    }

    /// From now on frames go straight to the interface, past its queue.
    ///
    /// # Errors
    /// If the kernel cannot do that.
    pub fn bypass_queue(&self) -> io::Result<()> {
        let on: libc::c_int = 1;
        let length = mem::size_of_val(&on) as libc::socklen_t;
        let (level, option) = (libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS);
        // SAFETY: the option's value is a live number of that length.
        match unsafe { libc::setsockopt(self.socket.as_raw_fd(), level, option, (&raw const on).cast(), length) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The next frame that arrives within `timeout` and fits, as it was on the link: the kernel takes the first VLAN tag out
    /// before it shows a frame, and here it is put back. Frames that this host sends are not among them.
    ///
    /// # Errors
    /// If the interface went away.
    pub fn receive(&self, timeout: Duration, fits: impl Fn(&[u8]) -> bool) -> io::Result<Option<Vec<u8>>> {
        let end = Instant::now() + timeout;
        let mut frame = vec![0; LARGEST_FRAME];
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match receive_one(&self.socket, &mut frame) {
                Ok((_, libc::PACKET_OUTGOING, _)) => {}
                Ok((length, _, tag)) => {
                    let whole = tagged(&frame[..length], tag);
                    if fits(&whole) {
                        return Ok(Some(whole.into_owned()));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

fn open(interface: &str) -> io::Result<Socket> {
    let protocol = ETH_P_ALL.to_be();
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(protocol))))?;
    let name = std::ffi::CString::new(interface)?;
    // SAFETY: `name` is a string that ends in NUL, and lives.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    let mut address = empty_address();
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index.cast_signed();
    let length = mem::size_of_val(&address) as libc::socklen_t;
    let (level, option, on): (_, _, libc::c_int) = (libc::SOL_PACKET, libc::PACKET_AUXDATA, 1);
    // SAFETY: the option's value is a live number of that length.
    let told = unsafe {
        let length = mem::size_of_val(&on) as libc::socklen_t;
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), length)
    };
    // SAFETY: `address` is a live `sockaddr_ll` of that length.
    match told | unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A VLAN tag (IEEE 802.1Q): its Ethertype, priority and number.
type Tag = [u8; 4];

/// A frame's length, the kind of packet that it was to this host, and the tag that the kernel took out of it.
fn receive_one(socket: &Socket, frame: &mut [u8]) -> io::Result<(usize, u8, Option<Tag>)> {
    receive_with(socket, frame, taken_out)
}

/// A frame's length, the kind of packet that it was to this host, and what the control messages beside it say.
pub(crate) fn receive_with<T>(
    socket: &Socket,
    frame: &mut [u8],
    control_says: impl FnOnce(&libc::msghdr) -> T,
) -> io::Result<(usize, u8, T)> {
    let mut from = empty_address();
    let mut part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
    // Room for one `tpacket_auxdata`, or a time; aligned as a `cmsghdr` must be.
    let mut control = [0u64; 8];
    // SAFETY: `msghdr` is plain numbers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_name = (&raw mut from).cast();
    message.msg_namelen = mem::size_of_val(&from) as libc::socklen_t;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(&control);
    // SAFETY: everything that the message points to lives, and is as long as it says.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    Ok((length, from.sll_pkttype, control_says(&message)))
}

/// packet(7), PACKET_AUXDATA.
fn taken_out(message: &libc::msghdr) -> Option<Tag> {
    // SAFETY: the kernel has filled the message, whose control buffer lives; the macro returns a pointer into it.
    let header = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() }?;
    if (header.cmsg_level, header.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
        return None;
    }
    // SAFETY: the data of this kind is a `tpacket_auxdata`, at whatever alignment.
    let told = unsafe { libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned() };
    let [a, b] = told.tp_vlan_tpid.to_be_bytes();
    let [c, d] = told.tp_vlan_tci.to_be_bytes();
    (told.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some([a, b, c, d])
}

/// The frame with this tag behind its addresses.
fn tagged(frame: &[u8], tag: Option<Tag>) -> Cow<'_, [u8]> {
    match (frame.split_at_checked(12), tag) {
        (Some((addresses, rest)), Some(tag)) => [addresses, &tag, rest].concat().into(),
        _ => frame.into(),
    }
}

pub(crate) fn empty_address() -> libc::sockaddr_ll {
    // SAFETY: `sockaddr_ll` is plain numbers, for which zero is a value.
    unsafe { MaybeUninit::zeroed().assume_init() }
}
