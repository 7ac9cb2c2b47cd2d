//! The only packet-pointer arithmetic.

use crate::flows::opaque;

/// A frame in memory, from its first byte to the one after its last.
#[derive(Clone, Copy)]
pub struct Frame {
    start: usize,
    end: usize,
}

impl Frame {
    /// # Safety
    /// `start..end` must be valid for reads and writes while the frame is in use.
    #[inline(always)]
    pub const unsafe fn new(start: usize, end: usize) -> Self {
        Self { start, end }
    }

    /// Its length in bytes.
    #[inline(always)]
    pub const fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether it has no byte at all.
    #[inline(always)]
    pub const fn is_empty(&self) -> bool {
        self.end == self.start
    }

    /// The frame from `offset` on, which may be beyond its end.
    ///
    /// To the compiler it begins somewhere: it would leave out checks that follow from others, and the verifier, to which each
    /// sum of a pointer and a variable is a pointer of its own, misses them.
    #[inline(always)]
    pub fn skip(&self, offset: usize) -> Self {
        Self { start: opaque((self.start + offset) as u64) as usize, end: self.end }
    }

    /// Reads a header, whose every bit pattern must be valid, at `offset`.
    #[inline(always)]
    pub fn read<H: Copy>(&self, offset: usize) -> Option<H> {
        // SAFETY: `at` has checked that the header lies within the frame.
        self.at(offset).map(|header: *mut H| unsafe { header.read_unaligned() })
    }

    /// Looks at a header, whose every bit pattern must be valid, at `offset`. Fields are read one by one, as they are used.
    #[inline(always)]
    pub fn header<H: Copy>(&self, offset: usize) -> Option<&H> {
        const { assert!(align_of::<H>() == 1, "headers may begin at any byte") };
        // SAFETY: `at` has checked that the header lies within the frame; it needs no alignment.
        self.at(offset).map(|header: *mut H| unsafe { &*header })
    }

    /// Writes a header at `offset`; false, and nothing written, if it does not fit.
    #[inline(always)]
    pub fn write<H: Copy>(&self, offset: usize, header: H) -> bool {
        match self.at::<H>(offset) {
            // SAFETY: `at` has checked that the header lies within the frame.
            Some(place) => unsafe { place.write_unaligned(header) },
            None => return false,
        }
        true
    }

    #[inline(always)]
    fn at<H>(&self, offset: usize) -> Option<*mut H> {
        let place = self.start + offset;
        (place + size_of::<H>() <= self.end).then_some(place as *mut H)
    }
}
