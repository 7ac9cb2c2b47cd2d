//! The packet path of an NECP network element, as a library that runs in the kernel and on the host alike.
//!
//! ```text
//!  frame ──► parse ──► steer ──► rewrite ──► verdict
//!             │          │          │           │
//!   Reason ◄──┘          │          └ new MACs   └ XDP action, one counter
//!  (passed on)           ▼
//!                     Tables ── service_bucket   which service?    one array lookup
//!                            ── exceptions       not wanted?       new flows only, one lookup a mask
//!                            ── slot             which owner?      one word
//!                            ── next_hop         where is it?      one word
//!                            ── flow_bucket      on record?        only if the slot is not plain
//! ```
//!
//! [`path`] strings the first two together.
//!
//! 1. [`parse`]: bytes → [`Packet`](packet::Packet), or the [`Reason`](verdict::Reason) why it is passed on.
//! 2. [`steer`]: a packet → a [`Decision`](steer::Decision); knows no map, asks [`Tables`](tables::Tables).
//! 3. [`rewrite`]: edits the frame for the server's forwarding type. GRE and layer 3 are [`routed`]: they need room in front of
//!    the frame, a way, and [`icmp`] errors for what does not fit; layer-3 replies are among them.
//! 4. [`verdict`]: every packet ends in exactly one reason, one action, one counter.
//!
//! [`six`] is the same for IPv6, in programs of its own. What comes seldom (tags, fragments, ICMP errors, several buffers) goes to programs of their own, [`rare`]. What all of
//! them ask of the interface is a [`device`], the kernel's or a test's. [`decap`] is the server's end of GRE, another program.
//!
//! The kernel program ([`abi::names::PROGRAM`]) is this crate's binary; `bpf/` has its maps and its entry point. [`host`] has the same
//! tables as memory: of the kernel's own maps, or of a test.
#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(not(target_arch = "bpf"))]
extern crate alloc;

pub mod abi;
pub mod choice;
pub mod decap;
pub mod device;
pub mod digest;
pub mod exceptions;
pub mod flows;
pub mod frame;
pub mod hash;
#[cfg(not(target_arch = "bpf"))]
pub mod host;
pub mod icmp;
pub mod intercept;
pub mod packet;
pub mod parse;
pub mod path;
pub mod rare;
pub mod rewrite;
pub mod room;
pub mod routed;
pub mod six;
pub mod slot;
pub mod steer;
pub mod tables;
pub mod verdict;
pub mod word;

/// What every kernel program needs beside its own code: a panic handler that is never reached, and its licence.
#[doc(hidden)]
#[macro_export]
macro_rules! kernel_program {
    () => {
        #[panic_handler]
        fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
            // SAFETY: the verifier refuses a program that could get here.
            unsafe { core::hint::unreachable_unchecked() }
        }

        /// Some helpers are for GPL-compatible programs only.
        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
    };
}

/// Source address and port, as they stand in a header, of the benchmark's flow of this number.
#[doc(hidden)]
#[inline(always)]
pub const fn bench_flow(number: u32) -> ([u8; 4], [u8; 2]) {
    ([10, 1, (number >> 16) as u8, (number >> 8) as u8], [0x80 | (number >> 24) as u8, number as u8])
}
