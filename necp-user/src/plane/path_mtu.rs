//! How long a packet may be on the way to a server that is reached by GRE.
//!
//! The kernel keeps path MTUs by destination, and forgets them after `net.ipv4.route.mtu_expires` (10 min); but it heeds an
//! ICMP "fragmentation needed" (RFC 1191) only if some socket speaks the protocol that it quotes. This is such a socket, for
//! GRE: it receives nothing, and its error queue says about which destinations something was said. What it was, the
//! kernel's route says then ([`Route::mtu`](super::neighbours::Route::mtu)).

use std::{
    io,
    mem::{size_of, size_of_val, zeroed},
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use socket2::{Domain, Protocol, SockFilter, Socket, Type};

/// IP protocol number of GRE.
const GRE: i32 = 47;
/// A classic BPF program that takes no byte of any packet: `BPF_RET | BPF_K`, 0.
const NOTHING: SockFilter = SockFilter::new(0x06, 0, 0, 0);
/// Errors that are read at once; the rest waits for the next call.
const AT_ONCE: usize = 256;

/// The socket.
#[derive(Debug)]
pub struct PathMtus {
    socket: Socket,
}

impl PathMtus {
    /// Opens it in the calling thread's network namespace; from then on the kernel heeds errors about GRE.
    ///
    /// # Errors
    /// Without CAP_NET_RAW.
    pub fn open() -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::RAW.nonblocking().cloexec(), Some(Protocol::from(GRE)))?;
        socket.attach_filter(&[NOTHING])?;
        let on: libc::c_int = 1;
        // SAFETY: the option's value is a valid integer of the size that is told.
        let result = unsafe {
            let (value, length) = ((&raw const on).cast(), size_of_val(&on) as libc::socklen_t);
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_IP, libc::IP_RECVERR, value, length)
        };
        if result == 0 { Ok(Self { socket }) } else { Err(io::Error::last_os_error()) }
    }

    /// Destinations that ICMP errors came about since the last call.
    pub fn take(&self) -> Vec<IpAddr> {
        let mut destinations: Vec<_> = std::iter::from_fn(|| self.one()).take(AT_ONCE).collect();
        destinations.sort_unstable();
        destinations.dedup();
        destinations
    }

    fn one(&self) -> Option<IpAddr> {
        // SAFETY: both are plain old data, for which zeroes are valid.
        let (mut destination, mut message): (libc::sockaddr_in, libc::msghdr) = unsafe { (zeroed(), zeroed()) };
        message.msg_name = (&raw mut destination).cast();
        message.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        // SAFETY: the message points to an address of the size that it says, and to nothing else.
        let length = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut message, libc::MSG_ERRQUEUE) };
        (length >= 0).then(|| destination.sin_addr.s_addr.to_ne_bytes().into())
    }
}

impl AsFd for PathMtus {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for PathMtus {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
