//! The kernel program. Everything it decides is in this package's library; here are its maps and its entry point.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod bpf {
    mod device;
    mod maps;
    mod xdp;

    necp_ebpf::kernel_program!();
}

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("this is a kernel program: `necp ne` has it embedded and loads it");
    std::process::exit(1);
}
