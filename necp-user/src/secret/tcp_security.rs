//! What protects the TCP connections of NECP themselves, as it does BGP's: TTL security (GTSM, RFC 5082) and signed
//! segments (TCP-MD5, RFC 2385). Both are the kernel's: what does not fit is dropped, and gets no answer.

use std::io;
use std::net::IpAddr;
use std::num::NonZeroU8;
use std::os::fd::{AsFd, AsRawFd as _};
use std::path::Path;

use ipnet::IpNet;
use socket2::{Domain, SockRef};

use super::key_file::{self, KeyFileError};

/// What is sent; who is not further away than it may be cannot get a packet here with less than this minus the hops.
const TTL: u8 = 255;
/// RFC 2385 §4.5 asks for 80 printable bytes at least to be possible; the kernel takes no more.
const KEY_MAX: usize = libc::TCP_MD5SIG_MAXKEYLEN;
/// linux/tcp.h, TCP_MD5SIG_FLAG_PREFIX: the key is for all addresses of a prefix.
const FLAG_PREFIX: u8 = 1;

/// A key of TCP-MD5; its `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Md5Key(Vec<u8>);

impl Md5Key {
    /// Reads it: 1 to 80 bytes.
    ///
    /// # Errors
    /// See [`KeyFileError`].
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        key_file::read_secret(path, KEY_MAX).map(Self)
    }
}

impl std::fmt::Debug for Md5Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Md5Key(..)")
    }
}

/// Sends with TTL (hop limit) 255, and drops what has come over more than so many hops: 1 is the same link (255 only).
///
/// On a listening socket it holds for the connections that it accepts.
///
/// # Errors
/// As setsockopt(2).
pub fn set_ttl_security(socket: &impl AsFd, hops: NonZeroU8) -> io::Result<()> {
    let least = TTL - (hops.get() - 1);
    let (level, sent, received) = match SockRef::from(socket).domain()? {
        Domain::IPV6 => (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, libc::IPV6_MINHOPCOUNT),
        _ => (libc::IPPROTO_IP, libc::IP_TTL, libc::IP_MINTTL),
    };
    set_option(socket, level, sent, &libc::c_int::from(TTL))?;
    set_option(socket, level, received, &libc::c_int::from(least))
}

/// linux/tcp.h, `struct tcp_md5sig`.
#[repr(C)]
struct TcpMd5Sig {
    address: libc::sockaddr_storage,
    flags: u8,
    prefix_length: u8,
    key_length: u16,
    ifindex: libc::c_int,
    key: [u8; KEY_MAX],
}

/// Every segment to and from these addresses is signed with the key; those from there that are not are dropped. Segments
/// that are signed, from addresses without a key, are dropped too.
///
/// On a listening socket it holds for the connections that it accepts. Of several prefixes the longest counts.
///
/// # Errors
/// As setsockopt(2); `ENOPROTOOPT` if the kernel has no TCP-MD5, `EINVAL` if the socket is not of their family.
pub fn set_md5(socket: &impl AsFd, peers: IpNet, key: &Md5Key) -> io::Result<()> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut option: TcpMd5Sig = unsafe { std::mem::zeroed() };
    let address = socket2::SockAddr::from(std::net::SocketAddr::new(peers.trunc().addr(), 0));
    // SAFETY: sockaddr_storage is made to hold any address, and this one is as long as it says.
    unsafe {
        let to = std::ptr::from_mut(&mut option.address).cast::<u8>();
        std::ptr::copy_nonoverlapping(address.as_ptr().cast::<u8>(), to, address.len() as usize);
    }
    (option.flags, option.prefix_length) = (FLAG_PREFIX, peers.prefix_len());
    option.key_length = key.0.len() as u16;
    option.key[..key.0.len()].copy_from_slice(&key.0);
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_MD5SIG_EXT, &option)
}

/// What an SE's connection is protected by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Protection {
    /// See [`set_ttl_security`].
    pub ttl_hops: Option<NonZeroU8>,
    /// See [`set_md5`].
    pub md5: Option<Md5Key>,
}

impl Protection {
    /// Protects a socket that is to be connected to `peer`.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn apply(&self, socket: &impl AsFd, peer: IpAddr) -> io::Result<()> {
        if let Some(hops) = self.ttl_hops {
            set_ttl_security(socket, hops)?;
        }
        self.md5.as_ref().map_or(Ok(()), |key| set_md5(socket, peer.into(), key))
    }
}

fn set_option<T>(socket: &impl AsFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the pointer is to a value of this length, which the kernel only reads.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
