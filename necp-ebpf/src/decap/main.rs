//! The kernel program of `necp se --decap`; what it decides is in this package's library.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod bpf {
    use aya_ebpf::{
        bindings::xdp_action::{XDP_DROP, XDP_PASS},
        btf_maps::HashMap,
        helpers::bpf_xdp_adjust_head,
        macros::{btf_map, xdp},
        programs::XdpContext,
    };
    use necp_ebpf::{
        decap::{MAX_SOURCES, Source, find, unwrap},
        frame::Frame,
    };

    #[btf_map(name = "sources")]
    static SOURCES: HashMap<Source, u64, { MAX_SOURCES as usize }> = HashMap::new();

    #[xdp]
    #[inline(always)]
    fn necp_decap(ctx: XdpContext) -> u32 {
        // SAFETY: the kernel's own bounds of the frame.
        let frame = unsafe { Frame::new(ctx.data(), ctx.data_end()) };
        let Some(wrapped) = find(&frame) else { return XDP_PASS };
        let Some(packets) = SOURCES.get_ptr_mut(wrapped.source) else { return XDP_PASS };
        if !unwrap(&frame, wrapped.overhead) {
            return XDP_PASS;
        }
        // SAFETY: the context is valid, and the frame is not looked at any more.
        if unsafe { bpf_xdp_adjust_head(ctx.ctx, wrapped.overhead as i32) } != 0 {
            return XDP_DROP;
        }
        // SAFETY: the entry stays for as long as the program runs; a count that is lost to another CPU is no harm.
        unsafe { packets.write_volatile(packets.read_volatile() + 1) };
        XDP_PASS
    }

    necp_ebpf::kernel_program!();
}

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("this is a kernel program: `necp se --decap` has it embedded and loads it");
    std::process::exit(1);
}
