//! The entry point: parse, steer, rewrite, verdict.

use aya_ebpf::{
    bindings::{
        xdp_action::{XDP_DROP, XDP_PASS, XDP_TX},
        xdp_md,
    },
    macros::xdp,
    programs::XdpContext,
};
use aya_log_ebpf::error;
use necp_ebpf::{
    abi::{GRE, LAYER_3, Stage},
    device::{Device, Ending, Out},
    frame::Frame,
    intercept,
    parse::{L2_LEN, parse},
    path::decide,
    rare,
    rewrite::l2::{self, Mac},
    routed, six,
    steer::Decision,
    verdict::{Action, Reason},
};

use super::{
    device::Interface,
    maps::{self, MAPS},
};

/// On every interface, natively where the driver can.
#[xdp(frags)]
#[inline(always)]
fn necp(ctx: XdpContext) -> u32 {
    let frame = Interface(ctx.ctx).frame();
    let (own_index, own_mac) = maps::own_port();
    let decision = decide(&frame, own_mac, &MAPS);
    match decision.action() {
        Action::Transmit => transmit::<false>(&ctx, &frame, decision, own_index, own_mac),
        Action::Drop => {
            if decision.reason == Reason::BadTables {
                error!(&ctx, "a service's slots are outside the slot table: please report this");
            }
            finish(decision.reason, XDP_DROP)
        }
        _ if decision.reason == Reason::NotOurs && maps::expects_replies() => {
            end_unless_crossing(&ctx, Ending(take_reply(ctx.ctx)))
        }
        _ => {
            if decision.reason == Reason::NotIp && six::is_ipv6(&frame) {
                maps::leave_to(&ctx, Stage::Six);
            } else if decision.reason.is_rare() {
                maps::leave_to(&ctx, Stage::Rare);
            } else if decision.reason == Reason::NotOurs && maps::intercepts() {
                maps::leave_to(&ctx, Stage::Crossing);
            }
            finish(decision.reason, XDP_PASS)
        }
    }
}

/// What the fast path leaves.
#[xdp(frags)]
#[inline(always)]
fn necp_rare(ctx: XdpContext) -> u32 {
    let device = Interface(ctx.ctx);
    if let Some(ending) = rare::handle(&device, &MAPS) {
        if ending.reason() == Reason::NotIp as u32 && device.datagram6_at() != 0 {
            maps::leave_to(&ctx, Stage::SixRare);
        }
        return end_unless_crossing(&ctx, ending);
    }
    maps::leave_to(&ctx, Stage::Ports);
    finish(Reason::Malformed, XDP_PASS)
}

/// What it leaves: datagrams with ports, in tagged frames, in parts, or in several buffers.
#[xdp(frags)]
#[inline(always)]
fn necp_ports(ctx: XdpContext) -> u32 {
    let ending = rare::with_ports(&Interface(ctx.ctx), &MAPS);
    end_unless_crossing(&ctx, ending)
}

/// What the others find to be for no VIP, if some farm intercepts.
#[xdp(frags)]
#[inline(always)]
fn necp_crossing(ctx: XdpContext) -> u32 {
    let ending = intercept::handle(&Interface(ctx.ctx), &MAPS);
    end(&ctx, ending)
}

/// IPv6, if it is not tagged.
#[xdp(frags)]
#[inline(always)]
fn necp_six(ctx: XdpContext) -> u32 {
    let (own_index, own_mac) = maps::own_port();
    let decision = six::decide(&Interface(ctx.ctx).frame(), own_mac, &MAPS);
    match decision.action() {
        // The frame's bounds are asked for again: they take less time than room on the stack.
        Action::Transmit => transmit::<true>(&ctx, &Interface(ctx.ctx).frame(), decision, own_index, own_mac),
        Action::Drop => finish(decision.reason, XDP_DROP),
        _ if decision.reason == Reason::NotOurs && maps::expects_replies() => match whose_reply6(ctx.ctx) {
            0 => end_unless_crossing6(&ctx, Ending::new(Reason::NotOurs, Out::Pass)),
            reply => {
                let (vip, server) = ((reply >> 32) as u32, reply as u32);
                end(&ctx, Interface(ctx.ctx).send_reply6(&MAPS, L2_LEN, vip, server))
            }
        },
        _ => {
            if decision.reason.is_rare() {
                maps::leave_to(&ctx, Stage::SixRare);
            } else if decision.reason == Reason::NotOurs && maps::intercepts6() {
                maps::leave_to(&ctx, Stage::SixCrossing);
            }
            finish(decision.reason, XDP_PASS)
        }
    }
}

/// What that leaves, and what is tagged.
#[xdp(frags)]
#[inline(always)]
fn necp_six_rare(ctx: XdpContext) -> u32 {
    if let Some(ending) = six::rare::handle(&Interface(ctx.ctx), &MAPS) {
        return end_unless_crossing6(&ctx, ending);
    }
    maps::leave_to(&ctx, Stage::SixPorts);
    finish(Reason::Malformed, XDP_PASS)
}

/// What that leaves: datagrams with ports, or parts of them.
#[xdp(frags)]
#[inline(always)]
fn necp_six_ports(ctx: XdpContext) -> u32 {
    let ending = six::rare::with_ports(&Interface(ctx.ctx), &MAPS);
    end_unless_crossing6(&ctx, ending)
}

/// What the others of IPv6 find to be for no VIP, if some farm intercepts it.
#[xdp(frags)]
#[inline(always)]
fn necp_six_cross(ctx: XdpContext) -> u32 {
    let ending = six::intercept::handle(&Interface(ctx.ctx), &MAPS);
    end(&ctx, ending)
}

#[inline(always)]
fn transmit<const SIX: bool>(ctx: &XdpContext, frame: &Frame, decision: Decision, own_index: u32, own_mac: Mac) -> u32 {
    let length = frame.len() as u64;
    if matches!(decision.next_hop.forwarding(), GRE | LAYER_3) {
        let (server, reason) = (decision.server, decision.reason as u32);
        let ending = if SIX {
            Interface(ctx.ctx).send_routed6(&MAPS, server, reason, L2_LEN)
        } else {
            Ending(send_routed(ctx.ctx, server, reason, L2_LEN as u32))
        };
        let verdict = end(ctx, ending);
        if verdict != XDP_DROP && matches!(ending.out(), Out::Port(_) | Out::Pass) {
            maps::count_for(decision.server, length, decision.begins);
        }
        return verdict;
    }
    let index = decision.next_hop.port() as u32;
    let (verdict, source) =
        if index == own_index { (Some(XDP_TX), Some(own_mac)) } else { (maps::redirect(index), maps::port_mac(index)) };
    let (Some(verdict), Some(source)) = (verdict, source) else { return finish(Reason::NoNextHop, XDP_DROP) };
    if !l2::rewrite(frame, decision.next_hop.mac(), source) {
        return finish(Reason::BadTables, XDP_DROP);
    }
    maps::count_for(decision.server, length, decision.begins);
    finish(decision.reason, verdict)
}

#[inline(always)]
fn finish(reason: Reason, verdict: u32) -> u32 {
    maps::count(reason as u32);
    verdict
}

/// The end of the frame's way, unless a farm may intercept it.
#[inline(always)]
fn end_unless_crossing(ctx: &XdpContext, ending: Ending) -> u32 {
    if maps::intercepts() && intercept::is_open(ending) {
        maps::leave_to(ctx, Stage::Crossing);
    }
    end(ctx, ending)
}

/// The same of IPv6.
#[inline(always)]
fn end_unless_crossing6(ctx: &XdpContext, ending: Ending) -> u32 {
    if maps::intercepts6() && intercept::is_open(ending) {
        maps::leave_to(ctx, Stage::SixCrossing);
    }
    end(ctx, ending)
}

#[inline(always)]
fn end(ctx: &XdpContext, ending: Ending) -> u32 {
    let verdict = match ending.out() {
        Out::Pass => Some(XDP_PASS),
        Out::Drop => Some(XDP_DROP),
        Out::Back => Some(XDP_TX),
        Out::Port(index) if index == maps::own_port().0 => Some(XDP_TX),
        Out::Port(index) => maps::redirect(index),
        Out::Link(link) if Interface(ctx.ctx).came_in_by(link) => Some(XDP_TX),
        Out::Link(link) => maps::redirect_to_link(link),
    };
    let Some(verdict) = verdict else { return finish(Reason::NoNextHop, XDP_DROP) };
    maps::count(ending.reason());
    verdict
}

// Global functions: the verifier follows each of them once, whoever calls it and from wherever.

/// [`routed::send`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn send_routed(ctx: *mut xdp_md, server: u32, reason: u32, l3: u32) -> u64 {
    routed::send(&Interface(ctx), &MAPS, server, reason, (l3 & Interface::L3_MASK) as usize).0
}

/// [`six::routed::whose_reply`]: the VIP's index and the server; 0 if the packet is no reply.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn whose_reply6(ctx: *mut xdp_md) -> u64 {
    let whose = match six::parse(&Interface(ctx).frame()) {
        Ok(packet) => six::routed::whose_reply(&packet, &MAPS),
        Err(_) => None,
    };
    whose.map_or(0, |(vip, server)| (vip as u64) << 32 | server as u64)
}

/// [`routed::reply`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_reply(ctx: *mut xdp_md) -> u64 {
    let device = Interface(ctx);
    let sent = match parse(&device.frame()) {
        Ok(packet) => routed::reply(&device, &MAPS, &packet, L2_LEN),
        Err(_) => None,
    };
    sent.map_or(Ending::new(Reason::NotOurs, Out::Pass), |sent| sent.ending).0
}
