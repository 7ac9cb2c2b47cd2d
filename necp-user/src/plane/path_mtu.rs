//! How long a packet may be on the way to a server that is reached by GRE.
//!
//! The kernel keeps path MTUs by destination, and forgets them after `net.ipv4.route.mtu_expires` (10 min, as for IPv6
//! `net.ipv6.route.mtu_expires`); but it heeds an
//! ICMP "fragmentation needed" (RFC 1191), or ICMPv6 "packet too big" (RFC 8201), only if some socket speaks the protocol that it quotes. This is such a socket, for
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

/// The socket, of one family.
#[derive(Debug)]
pub struct PathMtus {
    socket: Socket,
    ipv6: bool,
}

impl PathMtus {
    /// Opens it in the calling thread's network namespace; from then on the kernel heeds errors about GRE over IPv4, or IPv6.
    ///
    /// # Errors
    /// Without CAP_NET_RAW.
    pub fn open(ipv6: bool) -> io::Result<Self> {
        let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::RAW.nonblocking().cloexec(), Some(Protocol::from(GRE)))?;
        socket.attach_filter(&[NOTHING])?;
        let (level, errors) =
            if ipv6 { (libc::SOL_IPV6, libc::IPV6_RECVERR) } else { (libc::SOL_IP, libc::IP_RECVERR) };
        let on: libc::c_int = 1;
        // SAFETY: the option's value is a valid integer of the size that is told.
        let result = unsafe {
            let (value, length) = ((&raw const on).cast(), size_of_val(&on) as libc::socklen_t);
            libc::setsockopt(socket.as_raw_fd(), level, errors, value, length)
        };
        if result == 0 { Ok(Self { socket, ipv6 }) } else { Err(io::Error::last_os_error()) }
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
        let (mut destination, mut message): (libc::sockaddr_in6, libc::msghdr) = unsafe { (zeroed(), zeroed()) };
        message.msg_name = (&raw mut destination).cast();
        message.msg_namelen = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
        // SAFETY: the message points to an address of the size that it says, and to nothing else.
        let length = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut message, libc::MSG_ERRQUEUE) };
        if length < 0 {
            return None;
        }
        if self.ipv6 {
            return Some(destination.sin6_addr.s6_addr.into());
        }
        // SAFETY: the kernel has written the shorter address of IPv4 to the same place.
        let destination: libc::sockaddr_in = unsafe { *(&raw const destination).cast() };
        Some(destination.sin_addr.s_addr.to_ne_bytes().into())
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
