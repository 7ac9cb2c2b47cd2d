//! The entry point: parse, steer, rewrite, verdict.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
    macros::xdp,
    programs::XdpContext,
};
use aya_log_ebpf::error;
use necp_ebpf::{
    frame::Frame,
    path::decide,
    rewrite::l2,
    steer::Decision,
    verdict::{Action, Reason},
};

use super::maps::{self, Maps};

/// On every interface, natively where the driver can.
#[xdp]
#[inline(always)]
fn necp(ctx: XdpContext) -> u32 {
    // SAFETY: the kernel's own bounds of the frame.
    let frame = unsafe { Frame::new(ctx.data(), ctx.data_end()) };
    let (own_index, own_mac) = maps::own_port();
    let decision = decide(&frame, own_mac, &Maps);
    match decision.action() {
        Action::Transmit => transmit(&frame, decision, own_index, own_mac),
        Action::Pass => finish(decision.reason, XDP_PASS),
        Action::Drop => {
            if decision.reason == Reason::BadTables {
                error!(&ctx, "a service's slots are outside the slot table: please report this");
            }
            finish(decision.reason, XDP_DROP)
        }
    }
}

#[inline(always)]
fn transmit(frame: &Frame, decision: Decision, own_index: u32, own_mac: [u8; 6]) -> u32 {
    let index = decision.next_hop.port() as u32;
    let (verdict, source) =
        if index == own_index { (Some(XDP_TX), Some(own_mac)) } else { (maps::redirect(index), maps::port_mac(index)) };
    let (Some(verdict), Some(source)) = (verdict, source) else { return finish(Reason::NoNextHop, XDP_DROP) };
    if !l2::rewrite(frame, decision.next_hop.mac(), source) {
        return finish(Reason::BadTables, XDP_DROP);
    }
    maps::count_transmitted(&decision, frame.len() as u64);
    verdict
}

#[inline(always)]
fn finish(reason: Reason, verdict: u32) -> u32 {
    maps::count(reason);
    verdict
}
