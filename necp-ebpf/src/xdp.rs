//! Entry points.
use aya_ebpf::{macros::xdp, programs::XdpContext};

#[xdp]
fn necp(_ctx: XdpContext) -> u32 { 2 }

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: the verifier refuses a program in which this could be reached.
    unsafe { core::hint::unreachable_unchecked() }
}
