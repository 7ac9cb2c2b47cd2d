//! The kernel program. Everything it decides is in this package's library; here are its maps and its entry point.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod bpf {
    mod device;
    mod maps;
    mod xdp;

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        // SAFETY: the verifier refuses a program that could get here.
        unsafe { core::hint::unreachable_unchecked() }
    }

    /// Some helpers are for GPL-compatible programs only.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("this is a kernel program: `necp ne` has it embedded and loads it");
    std::process::exit(1);
}
