//! The one kind of memory that the packet path on several CPUs and user space change at the same time.

use core::cell::UnsafeCell;

/// An aligned 8-byte word, shared between CPUs and with user space.
///
/// Reads and plain writes are single instructions; the others are atomic and fully ordered.
#[repr(transparent)]
pub struct Word(UnsafeCell<u64>);

// SAFETY: every access is a single volatile or atomic instruction on an aligned word.
unsafe impl Sync for Word {}

impl Word {
    /// A word of the host's own, outside any map.
    pub const fn new(value: u64) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// Reads the word, once.
    #[inline(always)]
    pub fn load(&self) -> u64 {
        step();
        // SAFETY: the pointer is valid and aligned; a volatile read of a word does not tear.
        unsafe { self.0.get().read_volatile() }
    }

    /// Writes the word, once; writes before it are visible to whoever sees it.
    #[inline(always)]
    pub fn store(&self, value: u64) {
        step();
        imp::store(&self.0, value);
    }

    /// Replaces `old` by `new`; returns what was there, which is `old` exactly if it was replaced.
    #[inline(always)]
    pub fn compare_exchange(&self, old: u64, new: u64) -> u64 {
        step();
        imp::compare_exchange(&self.0, old, new)
    }

    /// Sets `bits`.
    #[inline(always)]
    pub fn set_bits(&self, bits: u64) {
        step();
        imp::set_bits(&self.0, bits);
    }
}

#[cfg(target_arch = "bpf")]
mod imp {
    use core::{arch::asm, cell::UnsafeCell};

    // The compiler cannot select instructions for `AtomicU64`'s loads and stores, hence the volatile accesses and assembly.

    #[inline(always)]
    pub(super) fn store(word: &UnsafeCell<u64>, value: u64) {
        // SAFETY: the pointer is valid and aligned. The exchange is a full barrier, so what was written before is visible first.
        unsafe {
            asm!("{v} = xchg_64({p} + 0, {v})", p = in(reg) word.get(), v = inout(reg) value => _, options(nostack));
        }
    }

    #[inline(always)]
    pub(super) fn compare_exchange(word: &UnsafeCell<u64>, old: u64, new: u64) -> u64 {
        let found;
        // SAFETY: the pointer is valid and aligned.
        unsafe {
            asm!("r0 = cmpxchg_64({p} + 0, r0, {n})", p = in(reg) word.get(), n = in(reg) new,
                 inout("r0") old => found, options(nostack));
        }
        found
    }

    #[inline(always)]
    pub(super) fn set_bits(word: &UnsafeCell<u64>, bits: u64) {
        // SAFETY: the pointer is valid and aligned.
        unsafe { asm!("lock *(u64 *)({p} + 0) |= {b}", p = in(reg) word.get(), b = in(reg) bits, options(nostack)) };
    }
}

#[cfg(not(target_arch = "bpf"))]
mod imp {
    use core::{
        cell::UnsafeCell,
        sync::atomic::{AtomicU64, Ordering},
    };

    fn atomic(word: &UnsafeCell<u64>) -> &AtomicU64 {
        // SAFETY: aligned and valid for as long as the cell is; all writers use atomic or single-instruction accesses.
        unsafe { AtomicU64::from_ptr(word.get()) }
    }

    pub(super) fn store(word: &UnsafeCell<u64>, value: u64) {
        atomic(word).store(value, Ordering::SeqCst);
    }

    pub(super) fn compare_exchange(word: &UnsafeCell<u64>, old: u64, new: u64) -> u64 {
        atomic(word).compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).unwrap_or_else(|found| found)
    }

    pub(super) fn set_bits(word: &UnsafeCell<u64>, bits: u64) {
        atomic(word).fetch_or(bits, Ordering::SeqCst);
    }
}

#[cfg(not(all(feature = "interleave", not(target_arch = "bpf"))))]
#[inline(always)]
fn step() {}

#[cfg(all(feature = "interleave", not(target_arch = "bpf")))]
fn step() {
    interleave::step();
}

/// Lets a test decide which thread's next access to a [`Word`] comes first.
#[cfg(all(feature = "interleave", not(target_arch = "bpf")))]
pub mod interleave {
    extern crate std;
    use std::{boxed::Box, cell::RefCell, thread_local};

    thread_local! {
        static HOOK: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
    }

    /// Calls `hook` before every access of this thread to a word, until the next call.
    pub fn set_hook(hook: Option<Box<dyn FnMut()>>) {
        HOOK.with(|h| *h.borrow_mut() = hook);
    }

    pub(super) fn step() {
        HOOK.with(|h| {
            if let Some(hook) = h.borrow_mut().as_mut() {
                hook();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::Word;

    #[test]
    fn a_word_changes_only_when_the_old_value_matches() {
        let word = Word::new(1);
        assert_eq!(word.compare_exchange(2, 3), 1);
        assert_eq!(word.load(), 1);
        assert_eq!(word.compare_exchange(1, 4), 1);
        word.set_bits(3);
        assert_eq!(word.load(), 7);
        word.store(9);
        assert_eq!(word.load(), 9);
    }
}
