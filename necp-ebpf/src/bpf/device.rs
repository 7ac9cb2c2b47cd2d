//! [`Device`] on the kernel's helpers.

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as KernelLookup, xdp_md},
    helpers::{
        bpf_fib_lookup, bpf_ktime_get_coarse_ns, bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len,
    },
};
use necp_ebpf::{
    abi::{ICMP_BURST, ICMP_RATE},
    device::{Device, Routed, Way},
    flows::opaque,
    frame::Frame,
    rare::{FRAGMENT_TIME, FragmentKey, FragmentPlace, skip_tags},
};

use super::maps;

/// `AF_INET`, from `linux/socket.h`.
const AF_INET: u8 = 2;
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
    fn own_mac(&self) -> [u8; 6] {
        maps::own_port().1
    }

    #[inline(always)]
    fn port_mac(&self, index: u32) -> Option<[u8; 6]> {
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
        let FragmentKey { source, destination, id, protocol, .. } = *key;
        let (addresses, rest) = ((source as u64) << 32 | destination as u64, (id as u64) << 8 | protocol as u64);
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
        let size = size_of::<Lookup>() as i32;
        // SAFETY: the kernel writes no more than the structure that it is given, which has the same size.
        let answer = unsafe { bpf_fib_lookup(self.0.cast(), (&raw mut lookup).cast(), size, 0) };
        let word = |index: usize| {
            // SAFETY: within the structure. Volatile, so that words are read as such: parts of them may not be aligned.
            unsafe { (&raw const lookup.0).cast::<u32>().add(index).read_volatile().to_ne_bytes() }
        };
        match answer as u32 {
            // Others' interfaces may not take packets from here.
            BPF_FIB_LKUP_RET_SUCCESS if !self.came_in_by(lookup.0[2]) && !maps::is_ours(lookup.0[2]) => Way::Kernel,
            BPF_FIB_LKUP_RET_SUCCESS => {
                let ([a, b, c, d], [e, f, g, h], [i, j, k, l]) = (word(13), word(14), word(15));
                Way::Out { link: lookup.0[2], from: [a, b, c, d, e, f], to: [g, h, i, j, k, l] }
            }
            BPF_FIB_LKUP_RET_FRAG_NEEDED => {
                let [_, _, a, b] = word(1);
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
    skip_tags(&Interface(ctx).frame()) as u64
}

/// [`Device::remember`]: a function, because key and value would take too much of the caller's stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn note_fragment(addresses: u64, rest: u64, place: u64) -> u64 {
    let (source, destination) = ((addresses >> 32) as u32, addresses as u32);
    let key = FragmentKey { source, destination, id: (rest >> 8) as u16, protocol: rest as u8, reserved: 0 };
    // SAFETY: a helper without arguments.
    let at = unsafe { bpf_ktime_get_coarse_ns() };
    maps::set_fragment(&key, &FragmentPlace { at, server: (place >> 32) as u32, vip: place as u32 });
    0
}
