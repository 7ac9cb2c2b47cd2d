//! What all connections share, so that one cannot have it all: memory for what they leave unfinished, lines in the log,
//! and open files.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use ipnet::IpNet;

/// Bytes that the sessions of all peers may hold together: messages that are not complete, units to be repeated, answers
/// that nobody reads.
pub const HELD_MAX: usize = 128 << 20;
/// Bytes that each session may hold even then: 512 units.
pub const HELD_FREE: usize = 16 << 10;
/// Descriptors for everything but connections.
const OTHER_FILES: u64 = 256;

/// Shared by all connections, and their owner.
#[derive(Default)]
pub struct Limits {
    held: AtomicUsize,
    voices: Voices,
}

impl Limits {
    /// A share of the memory, nothing so far.
    pub fn share(&self) -> Share<'_> {
        Share { limits: self, held: 0 }
    }

    /// Who may write to the log.
    pub fn voices(&self) -> &Voices {
        &self.voices
    }
}

/// What one session holds of [`HELD_MAX`]; given back when dropped.
pub struct Share<'a> {
    limits: &'a Limits,
    held: usize,
}

impl Share<'_> {
    /// Notes what the session holds now, in bytes; false if that is too much for now, and it must go: nobody may hold more
    /// than what is left for others, so that it is the greedy who go when little is.
    pub fn set(&mut self, bytes: usize) -> bool {
        let before = self.limits.held.fetch_add(bytes, Ordering::Relaxed);
        self.limits.held.fetch_sub(self.held, Ordering::Relaxed);
        let all = (before + bytes).saturating_sub(self.held);
        self.held = bytes;
        bytes <= HELD_FREE || bytes <= HELD_MAX.saturating_sub(all)
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.limits.held.fetch_sub(self.held, Ordering::Relaxed);
    }
}

/// Lines that one server may have in the log in a row.
const LINES: u32 = 20;
/// The same of an IPv6 /64, whatever addresses its servers have.
const LINES_OF_NETWORK: u32 = 50 * LINES;
/// Calls of [`Voices::refill`] that bring one more, and a network fifty.
const CALLS_PER_LINE: u64 = 5;

/// The /64 that an IPv6 address is in: who has one address in it can have 2^64.
pub fn network(address: IpAddr) -> Option<IpNet> {
    match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(_) => IpNet::new(address, 64).ok().map(|net| net.trunc()),
    }
}

/// A server that comes and goes, or starts and stops, all the time must not bury what the others say.
#[derive(Default)]
pub struct Voices(Mutex<Spoken>);

#[derive(Default)]
struct Spoken {
    /// Single servers, and networks.
    by_net: HashMap<IpNet, Voice>,
    calls: u64,
}

#[derive(Default)]
struct Voice {
    lines: u32,
    hushed: u64,
}

impl Spoken {
    fn may_speak(&mut self, net: IpNet) -> bool {
        let voice = self.by_net.entry(net).or_default();
        if voice.lines < lines(net) {
            voice.lines += 1;
            return true;
        }
        voice.hushed += 1;
        false
    }
}

fn lines(net: IpNet) -> u32 {
    if net.prefix_len() == net.max_prefix_len() { LINES } else { LINES_OF_NETWORK }
}

impl Voices {
    /// Whether a line about this server may be written now; if not, it is counted.
    pub fn may_speak(&self, server: IpAddr) -> bool {
        let mut spoken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        network(server).is_none_or(|network| spoken.may_speak(network)) && spoken.may_speak(server.into())
    }

    /// To be called once a second. Returns who has been calm for long enough, and how many lines were left out.
    pub fn refill(&self) -> Vec<(IpNet, u64)> {
        let mut spoken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spoken.calls += 1;
        if !spoken.calls.is_multiple_of(CALLS_PER_LINE) {
            return Vec::new();
        }
        let mut told = Vec::new();
        spoken.by_net.retain(|net, voice| {
            voice.lines = voice.lines.saturating_sub(lines(*net) / LINES);
            if voice.lines < lines(*net) / 2 && voice.hushed > 0 {
                told.push((*net, std::mem::take(&mut voice.hushed)));
            }
            voice.lines > 0
        });
        told
    }
}

/// Raises the limit of open files to what `connections` need, as far as this process may.
///
/// # Errors
/// If that is not enough: what the limit is, and what it should be.
pub fn raise_open_files(connections: usize) -> Result<(), TooFewFiles> {
    let needed = connections as u64 + OTHER_FILES;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a valid rlimit.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(TooFewFiles { needed, limit: 0, source: Some(io::Error::last_os_error()) });
    }
    if limit.rlim_cur >= needed {
        return Ok(());
    }
    // Beyond the hard limit only with CAP_SYS_RESOURCE; up to it always.
    for hard in [limit.rlim_max.max(needed), limit.rlim_max] {
        let wanted = libc::rlimit { rlim_cur: needed.min(hard), rlim_max: hard };
        // SAFETY: the pointer is to a valid rlimit.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const wanted) } == 0 {
            return if wanted.rlim_cur >= needed {
                Ok(())
            } else {
                Err(TooFewFiles { needed, limit: wanted.rlim_cur, source: None })
            };
        }
    }
    Err(TooFewFiles { needed, limit: limit.rlim_cur, source: Some(io::Error::last_os_error()) })
}

/// Fewer files may be open than connections are served.
#[derive(Debug, thiserror::Error)]
#[error(
    "only {limit} files may be open, {needed} are needed for all connections that are served: raise the limit (`ulimit -n`, LimitNOFILE= in systemd)"
)]
pub struct TooFewFiles {
    /// Files that are needed.
    pub needed: u64,
    /// Files that may be open.
    pub limit: u64,
    /// Why there are not more.
    #[source]
    pub source: Option<io::Error>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[test]
    fn a_quarrelsome_server_is_hushed_and_the_others_are_not() {
        let voices = Voices::default();
        assert_eq!((0..1000).filter(|_| voices.may_speak(SERVER)).count(), LINES as usize);
        assert!(voices.may_speak(OTHER));
        let seconds = |count: u64| (0..count).flat_map(|_| voices.refill()).collect::<Vec<_>>();
        assert_eq!(seconds(CALLS_PER_LINE), []);
        assert!(voices.may_speak(SERVER) && !voices.may_speak(SERVER), "one line more");
        assert_eq!(seconds(20 * CALLS_PER_LINE), [(IpNet::from(SERVER), 981)]);
        assert!(voices.0.lock().expect("unpoisoned").by_net.is_empty(), "nobody is remembered for ever");
    }

    #[test]
    fn a_server_of_many_addresses_is_hushed_too() {
        let voices = Voices::default();
        let address = |number: u16| IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, number]);
        assert_eq!((0..5000).filter(|number| voices.may_speak(address(*number))).count(), LINES_OF_NETWORK as usize);
        assert!(voices.0.lock().expect("unpoisoned").by_net.len() <= LINES_OF_NETWORK as usize + 1);
        assert!(voices.may_speak([0x2001, 0xdb8, 0, 2, 0, 0, 0, 1].into()) && voices.may_speak(SERVER));
        let told: Vec<_> = (0..60).flat_map(|_| voices.refill()).collect();
        assert_eq!(
            told.iter().map(|(net, lines)| format!("{net} {lines}")).collect::<Vec<_>>(),
            ["2001:db8:0:1::/64 4000"]
        );
    }

    #[test]
    fn memory_is_shared_and_small_needs_are_always_met() {
        let limits = Limits::default();
        let mut greedy = limits.share();
        assert!(!greedy.set(HELD_MAX / 2 + 1), "others need something too");
        assert!(greedy.set(HELD_MAX / 2));
        let mut second = limits.share();
        assert!(second.set(HELD_MAX / 4));
        let mut modest = limits.share();
        assert!(modest.set(4 * HELD_FREE));
        assert!(!greedy.set(HELD_MAX / 2) && !second.set(HELD_MAX / 4), "the greedy go first");
        assert!(modest.set(4 * HELD_FREE));
        assert!(second.set(HELD_MAX / 2) || modest.set(HELD_FREE), "small needs are always met");
        drop(greedy);
        drop(second);
        assert!(modest.set(HELD_MAX / 2));
        drop(modest);
        assert_eq!(limits.held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_limit_of_open_files_is_raised_or_named() {
        raise_open_files(100).expect("there are so many always");
        let error = raise_open_files(usize::MAX / 2).expect_err("nobody has so many");
        assert!(error.to_string().contains("LimitNOFILE"), "{error}");
    }
}
