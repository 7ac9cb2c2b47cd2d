//! The benchmark's wrapper: writes a frame of the next flow into the buffer, then runs the target on it.
//!
//! BPF_PROG_TEST_RUN with `repeat` hands the same buffer to every run and restores nothing, so a program that changes its
//! packet would see its own output from the second run on. The cost of the wrapper is measured with a target that does
//! nothing, and subtracted.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod bpf {
    use aya_ebpf::{
        bindings::xdp_action::{XDP_ABORTED, XDP_PASS},
        btf_maps::{Array, ProgramArray},
        helpers::bpf_xdp_adjust_head,
        macros::{btf_map, xdp},
        programs::XdpContext,
    };
    use necp_ebpf::{
        frame::Frame,
        rewrite::{gre, six},
    };

    /// Words of a frame's template: an Ethernet frame of 64 bytes, whose source address and port come from the flow's number.
    const WORDS: usize = 16;
    /// Where the IPv4 source address stands, in bytes.
    const SOURCE: usize = 26;
    /// Where the source port stands, in bytes.
    const SOURCE_PORT: usize = 34;
    /// The same of IPv6: a frame of 84 bytes, of whose source address the last four count.
    const WORDS6: usize = 21;
    const SOURCE6: usize = 34;
    const SOURCE_PORT6: usize = 54;

    #[btf_map(name = "target")]
    static TARGET: ProgramArray<1> = ProgramArray::new();
    #[btf_map(name = "template")]
    static TEMPLATE: Array<[u32; WORDS], 1> = Array::new();
    #[btf_map(name = "template6")]
    static TEMPLATE6: Array<[u32; WORDS6], 1> = Array::new();
    /// Number of the last packet.
    #[btf_map(name = "position")]
    static POSITION: Array<u64, 1> = Array::new();

    /// Number of flows less one; the number is a power of two.
    #[unsafe(no_mangle)]
    static FLOW_NUMBERS: u32 = 0;

    #[xdp(frags)]
    #[inline(always)]
    fn wrapper(ctx: XdpContext) -> u32 {
        wrap(&ctx, TEMPLATE.get(0), SOURCE, SOURCE_PORT)
    }

    /// The same of IPv6.
    #[xdp(frags)]
    #[inline(always)]
    fn wrapper6(ctx: XdpContext) -> u32 {
        wrap(&ctx, TEMPLATE6.get(0), SOURCE6, SOURCE_PORT6)
    }

    #[inline(always)]
    fn wrap<T: Copy>(ctx: &XdpContext, template: Option<&T>, source: usize, port: usize) -> u32 {
        // What the last run put in front of the frame.
        let more = (ctx.data_end() - ctx.data()) as i32 - size_of::<T>() as i32;
        // SAFETY: the context is valid; the frame is looked at afterwards.
        if more != 0 && unsafe { bpf_xdp_adjust_head(ctx.ctx, more) } != 0 {
            return XDP_ABORTED;
        }
        // SAFETY: the kernel's own bounds of the frame.
        let frame = unsafe { Frame::new(ctx.data(), ctx.data_end()) };
        if write(&frame, template, source, port).is_none() {
            return XDP_ABORTED;
        }
        // SAFETY: returns only if there is no target.
        unsafe { TARGET.tail_call(ctx, 0) };
        XDP_ABORTED
    }

    #[inline(always)]
    fn write<T: Copy>(frame: &Frame, template: Option<&T>, source: usize, source_port: usize) -> Option<()> {
        let position = POSITION.get_ptr_mut(0)?;
        // SAFETY: one run at a time.
        let number = unsafe {
            *position += 1;
            *position
        };
        // SAFETY: initialised and never written while the program is loaded.
        let numbers = unsafe { (&raw const FLOW_NUMBERS).read_volatile() };
        // An odd step visits every flow once a round, never two neighbours one after the other.
        let flow = (number as u32).wrapping_mul(0x9e37_79b1) & numbers;
        let (address, port) = necp_ebpf::bench_flow(flow);
        (frame.write(0, *template?) && frame.write(source, address) && frame.write(source_port, port)).then_some(())
    }

    /// The floor.
    #[xdp(frags)]
    #[inline(always)]
    fn nothing(_: XdpContext) -> u32 {
        XDP_PASS
    }

    /// The floor of what grows: one call to grow by GRE's overhead, and with the next packet one to shrink again.
    #[xdp(frags)]
    #[inline(always)]
    fn grow(ctx: XdpContext) -> u32 {
        grow_by(&ctx, gre::OVERHEAD)
    }

    /// The same of GRE over IPv6.
    #[xdp(frags)]
    #[inline(always)]
    fn grow6(ctx: XdpContext) -> u32 {
        grow_by(&ctx, six::OVERHEAD)
    }

    #[inline(always)]
    fn grow_by(ctx: &XdpContext, bytes: usize) -> u32 {
        // SAFETY: the context is valid, and the frame is not looked at any more.
        let grown = unsafe { bpf_xdp_adjust_head(ctx.ctx, -(bytes as i32)) };
        if grown == 0 { XDP_PASS } else { XDP_ABORTED }
    }

    necp_ebpf::kernel_program!();
}

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("this is a kernel program: `cargo xtask bench` loads it");
    std::process::exit(1);
}
