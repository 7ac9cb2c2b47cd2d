//! Memory for one frame, at whose end is nothing: whoever reads or writes beyond it dies. What is written before it, or behind
//! one that does not lie at the end, is noticed. Reads before it are not, within the bytes that a rewrite may take for itself.

use std::{
    io::{self, Write as _},
    ops::Range,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Result, ensure};

use crate::host_path::HEADROOM;

/// The longest frame that has room.
const LONGEST: usize = 16 * 1024;
const PAGE: usize = 4096;
/// Bytes beside a frame that are looked at: what is beyond them is noticed when the frame lies at the other end.
const BESIDE: usize = 64;

/// Pages that can be read and written, between two that cannot.
pub(super) struct Room {
    start: NonNull<u8>,
}

impl Room {
    pub(super) fn new() -> Result<Self> {
        let length = LONGEST + 2 * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
        ensure!(start != libc::MAP_FAILED, "no memory: {}", io::Error::last_os_error());
        // SAFETY: within the mapping.
        let start = unsafe { start.cast::<u8>().add(PAGE) };
        // SAFETY: whole pages of the mapping.
        let opened = unsafe { libc::mprotect(start.cast(), LONGEST, libc::PROT_READ | libc::PROT_WRITE) };
        ensure!(opened == 0, "memory cannot be opened: {}", io::Error::last_os_error());
        install_handler();
        NonNull::new(start).map(|start| Self { start }).ok_or_else(|| anyhow::anyhow!("memory at address 0"))
    }

    /// All of the memory.
    pub(super) fn memory(&mut self) -> &mut [u8] {
        // SAFETY: mapped, writable, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), LONGEST) }
    }

    /// Puts a frame right at the memory's end, or at its beginning behind no more than [`HEADROOM`] bytes; `beside` stands
    /// in the bytes beside it.
    pub(super) fn put(&mut self, frame: &[u8], at_end: bool, beside: u8) -> Range<usize> {
        let start = if at_end { LONGEST - frame.len() } else { HEADROOM };
        let place = start..start + frame.len();
        let memory = self.memory();
        memory[place.start.saturating_sub(BESIDE)..place.start].fill(beside);
        let end = (place.end + BESIDE).min(LONGEST);
        memory[place.end..end].fill(beside);
        memory[place.clone()].copy_from_slice(frame);
        place
    }

    /// Whether the bytes beside the frame, which was at `put` and is at `now`, are as they were.
    pub(super) fn is_intact(&mut self, put: &Range<usize>, now: &Range<usize>, beside: u8) -> bool {
        let end = (put.end + BESIDE).min(LONGEST);
        let memory = self.memory();
        let before = put.start.saturating_sub(BESIDE).min(now.start)..now.start.min(put.start);
        memory[before].iter().chain(&memory[now.end.max(put.end)..end]).all(|&byte| byte == beside)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nobody has a reference to it any more.
        unsafe { libc::munmap(self.start.as_ptr().sub(PAGE).cast(), LONGEST + 2 * PAGE) };
    }
}

/// Which frame is being run: seed, history, number. For the message of a process that dies.
pub(super) static NOW: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

/// A read or write beyond the frame is a fault: says at which frame, then ends as a fault does.
fn install_handler() {
    // SAFETY: sigaction is plain numbers, for which zero is a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = fault as *const () as usize;
    action.sa_flags = libc::SA_RESETHAND;
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: the handler makes one write, of memory of its own, and returns to a fault that then kills.
        unsafe { libc::sigaction(signal, &action, ptr::null_mut()) };
    }
}

extern "C" fn fault(_: libc::c_int) {
    let mut text = [0u8; 160];
    let mut rest = &mut text[..];
    let [seed, history, frame] = [0, 1, 2].map(|at: usize| NOW[at].load(Ordering::Relaxed));
    // Formatting into an array allocates nothing.
    let _ = writeln!(rest, "\nmemory beyond a frame was touched: --seed {seed} --history {history}, frame {frame}");
    let length = 160 - rest.len();
    // SAFETY: the array's first bytes.
    unsafe { libc::write(2, text.as_ptr().cast(), length) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_beside_a_frame_is_noticed() {
        let mut room = Room::new().unwrap();
        for at_end in [false, true] {
            let place = room.put(&[1; 60], at_end, 0xa5);
            room.memory()[place.clone()].fill(7);
            assert!(room.is_intact(&place, &place, 0xa5));
        }
        let place = room.put(&[1; 60], false, 0xa5);
        room.memory()[place.end] = 0;
        assert!(!room.is_intact(&place, &place, 0xa5));
        let place = room.put(&[1; 60], true, 0xa5);
        room.memory()[place.start - 1] = 0;
        assert!(!room.is_intact(&place, &place, 0xa5));
        // A frame that grew to the front may have those bytes, and no more.
        let grown = place.start - 24..place.end;
        let place = room.put(&[1; 60], true, 0xa5);
        room.memory()[grown.clone()].fill(0);
        assert!(room.is_intact(&place, &grown, 0xa5));
        room.memory()[grown.start - 1] = 0;
        assert!(!room.is_intact(&place, &grown, 0xa5));
    }
}
