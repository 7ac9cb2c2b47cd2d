//! [`Device`] on the kernel's helpers.

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as KernelLookup, xdp_md},
    helpers::{
        bpf_fib_lookup, bpf_ktime_get_coarse_ns, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len,
    },
};
use necp_ebpf::{
    abi::{ICMP_BURST, ICMP_RATE},
    device::{Device, Ending, Routed, Routed6, Way},
    flows::opaque,
    frame::Frame,
    rare::{FRAGMENT_TIME, FragmentKey, FragmentPlace, IPV4, IPV6, skip_tags},
    rewrite::l2::Mac,
    six::{
        head::{Walk, walk},
        routed,
    },
    tables::Tables,
};

use super::maps::{self, MAPS};

/// `AF_INET`, from `linux/socket.h`.
const AF_INET: u8 = 2;
/// `AF_INET6`, likewise.
const AF_INET6: u8 = 10;
const NANOSECONDS: u64 = 1_000_000_000;

/// The kernel's `struct bpf_fib_lookup` as words, because parts of words on the stack may be refused: family, protocol and
/// ports; length or MTU in the upper half; interface; type of service; source; destination; from word 13 on the MAC addresses.
#[repr(C, align(8))]
struct Lookup([u32; 16]);

const _: () = assert!(size_of::<Lookup>() == size_of::<KernelLookup>());

/// The frame that the program was called with.
pub(super) struct Interface(pub(super) *mut xdp_md);

impl Interface {
    /// Whether this is the kernel's index of the interface.
    #[inline(always)]
    pub(super) fn came_in_by(&self, link: u32) -> bool {
        self.link() == link
    }

    #[inline(always)]
    fn link(&self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { (*self.0).ingress_ifindex }
    }
}

impl Device for Interface {
    #[inline(always)]
    fn frame(&self) -> Frame {
        // SAFETY: the kernel's own bounds of the frame.
        unsafe { Frame::new((*self.0).data as usize, (*self.0).data_end as usize) }
    }

    #[inline(always)]
    fn length(&self) -> usize {
        // SAFETY: the context is valid.
        unsafe { bpf_xdp_get_buff_len(self.0) as usize }
    }

    #[inline(always)]
    fn datagram_at(&self) -> usize {
        // The verifier wants to see a bound, which the compiler knows already: at most two tags.
        (opaque(datagram_at(self.0)) & 0x1f) as usize
    }

    #[inline(always)]
    fn datagram6_at(&self) -> usize {
        (opaque(datagram6_at(self.0)) & 0x1f) as usize
    }

    #[inline(always)]
    fn walk6(&self, at: usize) -> Walk {
        Walk(walk_headers(self.0, at as u32))
    }

    #[inline(always)]
    fn grow(&self, bytes: u32) -> bool {
        // SAFETY: the context is valid; frames are looked at anew afterwards.
        unsafe { bpf_xdp_adjust_head(self.0, -(bytes as i32)) == 0 }
    }

    #[inline(always)]
    fn shorten(&self, bytes: u32) -> bool {
        // SAFETY: as above.
        unsafe { bpf_xdp_adjust_tail(self.0, -(bytes as i32)) == 0 }
    }

    #[inline(always)]
    fn own_mac(&self) -> Mac {
        maps::own_port().1
    }

    #[inline(always)]
    fn port_mac(&self, index: u32) -> Option<Mac> {
        let (own, mac) = maps::own_port();
        if index == own { Some(mac) } else { maps::port_mac(index) }
    }

    #[inline(always)]
    fn may_tell(&self) -> bool {
        let Some(allowance) = maps::allowance() else { return false };
        // SAFETY: this CPU's own entry; nobody else writes it while the program runs.
        let allowance = unsafe { &mut *allowance };
        // SAFETY: a helper without arguments.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        let since = now.wrapping_sub(allowance.reckoned);
        let more = if since >= NANOSECONDS { ICMP_BURST } else { since * ICMP_RATE / NANOSECONDS };
        if more > 0 {
            let left = allowance.left + more;
            (allowance.reckoned, allowance.left) = (now, if left > ICMP_BURST { ICMP_BURST } else { left });
        }
        let may = allowance.left > 0;
        allowance.left -= may as u64;
        may
    }

    #[inline(always)]
    fn remember(&self, key: &FragmentKey, place: FragmentPlace) {
        let FragmentKey { source, destination, id, protocol, reserved } = *key;
        let addresses = (source as u64) << 32 | destination as u64;
        let rest = (reserved as u64) << 24 | (id as u64) << 8 | protocol as u64;
        note_fragment(addresses, rest, (place.server as u64) << 32 | place.vip as u64);
    }

    #[inline(always)]
    fn recall(&self, key: &FragmentKey) -> Option<FragmentPlace> {
        let place = maps::fragment(key)?;
        // SAFETY: a helper without arguments.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        (now.wrapping_sub(place.at) <= FRAGMENT_TIME).then_some(place)
    }

    #[inline(always)]
    fn count(&self, server: u32, bytes: u64, begins: bool) {
        maps::count_for(server, bytes, begins);
    }

    #[inline(always)]
    fn count_reply(&self, server: u32) {
        maps::count_reply(server);
    }

    #[inline(always)]
    fn way(&self, packet: &Routed) -> Way {
        let mut lookup = Lookup([0; 16]);
        let [high, low] = packet.length.to_ne_bytes();
        lookup.0[0] = u32::from_ne_bytes([AF_INET, packet.protocol, 0, 0]);
        lookup.0[1] = u32::from_ne_bytes([0, 0, high, low]);
        lookup.0[2] = self.link();
        lookup.0[3] = u32::from_ne_bytes([packet.tos, 0, 0, 0]);
        lookup.0[4] = packet.source;
        lookup.0[8] = packet.destination;
        self.look_up(&mut lookup)
    }

    #[inline(always)]
    fn way6(&self, packet: &Routed6) -> Way {
        let mut lookup = Lookup([0; 16]);
        let [high, low] = packet.length.to_ne_bytes();
        lookup.0[0] = u32::from_ne_bytes([AF_INET6, packet.protocol, 0, 0]);
        lookup.0[1] = u32::from_ne_bytes([0, 0, high, low]);
        lookup.0[2] = self.link();
        // Traffic class and flow label, without the version.
        lookup.0[3] = packet.first & 0x0fff_ffffu32.to_be();
        for (place, half) in
            [(4, packet.source[0]), (6, packet.source[1]), (8, packet.destination[0]), (10, packet.destination[1])]
        {
            let [a, b, c, d, e, f, g, h] = half.to_ne_bytes();
            lookup.0[place] = u32::from_ne_bytes([a, b, c, d]);
            lookup.0[place + 1] = u32::from_ne_bytes([e, f, g, h]);
        }
        self.look_up(&mut lookup)
    }

    #[inline(always)]
    fn send_routed6<T: Tables>(&self, _: &T, server: u32, reason: u32, l3: usize) -> Ending {
        Ending(send_routed6(self.0, server, reason, l3 as u32))
    }

    #[inline(always)]
    fn send_reply6<T: Tables>(&self, _: &T, l3: usize, vip: u32, server: u32) -> Ending {
        Ending(send_reply6(self.0, l3 as u32, vip, server))
    }
}

impl Interface {
    // At most two tags come before a datagram; the verifier wants to see a bound.
    pub(super) const L3_MASK: u32 = 0x1f;

    #[inline(always)]
    fn look_up(&self, lookup: &mut Lookup) -> Way {
        let size = size_of::<Lookup>() as i32;
        // SAFETY: the kernel writes no more than the structure that it is given, which has the same size.
        let answer = unsafe { bpf_fib_lookup(self.0.cast(), (&raw mut *lookup).cast(), size, 0) };
        let word = |index: usize| {
            // SAFETY: within the structure. Volatile, so that words are read as such: parts of them may not be aligned.
            unsafe { (&raw const lookup.0).cast::<u32>().add(index).read_volatile() }
        };
        let two = |first: u32, second: u32| (u32::from_le(second) as u64) << 32 | u32::from_le(first) as u64;
        match answer as u32 {
            // Others' interfaces may not take packets from here.
            BPF_FIB_LKUP_RET_SUCCESS if !self.came_in_by(lookup.0[2]) && !maps::is_ours(lookup.0[2]) => Way::Kernel,
            BPF_FIB_LKUP_RET_SUCCESS => {
                let (from, to) = (two(word(13), word(14)), two(word(14), word(15)));
                // The second address begins in the middle of a word.
                Way::Out { link: lookup.0[2], from: Mac::of(from.to_le()), to: Mac::of((to >> 16).to_le()) }
            }
            BPF_FIB_LKUP_RET_FRAG_NEEDED => {
                let [_, _, a, b] = word(1).to_ne_bytes();
                Way::TooBig(u16::from_ne_bytes([a, b]))
            }
            _ => Way::Kernel,
        }
    }
}

/// [`skip_tags`]: a function, because the verifier follows all that comes after it once, not once for each number of tags.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn datagram_at(ctx: *mut xdp_md) -> u64 {
    skip_tags(&Interface(ctx).frame(), IPV4) as u64
}

/// The same of IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn datagram6_at(ctx: *mut xdp_md) -> u64 {
    skip_tags(&Interface(ctx).frame(), IPV6) as u64
}

/// [`walk`]: a function, because there are as many ways through it as extension headers can stand in a row.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_headers(ctx: *mut xdp_md, at: u32) -> u64 {
    // A quoted one is the furthest; the verifier wants to see a bound.
    walk(&Interface(ctx).frame().skip((at & 0x3ff) as usize)).0
}

/// [`Device::remember`]: a function, because key and value would take too much of the caller's stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn note_fragment(addresses: u64, rest: u64, place: u64) -> u64 {
    let (source, destination) = ((addresses >> 32) as u32, addresses as u32);
    let (id, protocol, reserved) = ((rest >> 8) as u16, rest as u8, (rest >> 24) as u8);
    let key = FragmentKey { source, destination, id, protocol, reserved };
    // SAFETY: a helper without arguments.
    let at = unsafe { bpf_ktime_get_coarse_ns() };
    maps::set_fragment(&key, &FragmentPlace { at, server: (place >> 32) as u32, vip: place as u32 });
    0
}

/// [`routed::send`] of IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn send_routed6(ctx: *mut xdp_md, server: u32, reason: u32, l3: u32) -> u64 {
    routed::send(&Interface(ctx), &MAPS, server, reason, (l3 & Interface::L3_MASK) as usize).0
}

/// [`routed::send_reply`] of IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn send_reply6(ctx: *mut xdp_md, l3: u32, vip: u32, server: u32) -> u64 {
    routed::send_reply(&Interface(ctx), &MAPS, (l3 & Interface::L3_MASK) as usize, vip, server).0
}
