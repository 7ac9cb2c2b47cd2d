//! The maps, and [`Tables`] on them. Names and capacities stand in [`abi`](necp_ebpf::abi).

use aya_ebpf::{
    btf_maps::{Array, DevMap, DevMapHash, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, lpm_trie::Key},
    macros::btf_map,
    programs::XdpContext,
};
use necp_ebpf::{
    abi::{
        Address6, AddressSet, Allowance, DEFAULT_EXCEPTIONS, DEFAULT_FLOW_BUCKETS, DEFAULT_SLOTS, Exception,
        ExceptionBucket, ExceptionMasks, FlowBucket, Layout, MAX_CROSSINGS, MAX_FARMS, MAX_FRAGMENTS, MAX_PORTS,
        MAX_SERVERS, MAX_STAGES, MAX_VIPS6, Port, SERVICE_BUCKETS, Server, ServerStats, ServiceBucket, Slot, Stage,
        exception_buckets, exception_records,
    },
    choice::{Chosen, NewFlow},
    digest::{SipHash, keys_of},
    exceptions::{ExceptionBucketWords, ExceptionMasksWords, ExceptionWords, Tuple, prefix6},
    flows::{FlowBucketWords, FlowWord},
    rare::{FragmentKey, FragmentPlace},
    rewrite::l2::Mac,
    room::insert_into,
    routed::{Claim, Reply},
    six,
    tables::{Addresses6, FarEnd, FarEnd6, NextHop, Tables},
    verdict::REASONS,
    word::Word,
};

// Defaults; user space says how many there are.
const EXCEPTION_RECORDS: u32 = exception_records(DEFAULT_EXCEPTIONS);
const EXCEPTION_BUCKETS: u32 = exception_buckets(EXCEPTION_RECORDS);

/// `BPF_F_MMAPABLE`: user space reads and changes these maps as memory.
const MMAPABLE: usize = 1 << 10;

#[btf_map(name = "services")]
static SERVICES: Array<ServiceBucket, { SERVICE_BUCKETS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "slots")]
static SLOTS: Array<Slot, { DEFAULT_SLOTS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "servers")]
static SERVERS: Array<Server, { MAX_SERVERS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "flows")]
static FLOWS: Array<FlowBucket, { DEFAULT_FLOW_BUCKETS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "vips6")]
static VIPS6: Array<Address6, { MAX_VIPS6 as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "except_masks")]
static EXCEPTION_MASKS: Array<ExceptionMasks, { MAX_FARMS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "except_index")]
static EXCEPTION_INDEX: Array<ExceptionBucket, { EXCEPTION_BUCKETS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "exceptions")]
static EXCEPTIONS: Array<Exception, { EXCEPTION_RECORDS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "reasons")]
static REASON_COUNTERS: PerCpuArray<u64, { REASONS as usize }> = PerCpuArray::new();
#[btf_map(name = "server_stats")]
static SERVER_STATS: PerCpuArray<ServerStats, { MAX_SERVERS as usize }> = PerCpuArray::new();
#[btf_map(name = "ports")]
static PORTS: Array<Port, { MAX_PORTS as usize }> = Array::new();
#[btf_map(name = "tx_ports")]
static TX_PORTS: DevMap<{ MAX_PORTS as usize }> = DevMap::new();
#[btf_map(name = "tx_links")]
static TX_LINKS: DevMapHash<{ MAX_PORTS as usize }> = DevMapHash::new();
#[btf_map(name = "fragments")]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentPlace, { MAX_FRAGMENTS as usize }> = LruHashMap::new();
#[btf_map(name = "stages")]
static STAGES: ProgramArray<{ MAX_STAGES as usize }> = ProgramArray::new();
#[btf_map(name = "crossings")]
static CROSSINGS: LpmTrie<[u32; 2], u32, { MAX_CROSSINGS as usize }> = LpmTrie::new();
#[btf_map(name = "crossings6")]
static CROSSINGS6: LpmTrie<[u32; 5], u32, { MAX_CROSSINGS as usize }> = LpmTrie::new();
#[btf_map(name = "allowance")]
static ALLOWANCE: PerCpuArray<Allowance, 1> = PerCpuArray::new();
/// Of the IPv6 packet that this CPU is at. Each instance of the program has its own.
#[btf_map(name = "addresses6")]
static ADDRESSES6: PerCpuArray<Addresses6, 1> = PerCpuArray::new();
#[btf_map(name = "layout")]
static LAYOUT: Array<Layout, 1> = Array::new();

// What user space sets before it loads the program on an interface; constants to the verifier.
#[unsafe(no_mangle)]
static PORT_INDEX: u32 = 0;
#[unsafe(no_mangle)]
static PORT_MAC: u64 = 0;
#[unsafe(no_mangle)]
static FLOW_MASK: u32 = DEFAULT_FLOW_BUCKETS - 1;
#[unsafe(no_mangle)]
static EXCEPTION_BUCKET_MASK: u32 = EXCEPTION_BUCKETS - 1;
#[unsafe(no_mangle)]
static EXCEPTION_SEED: u64 = 0;
#[unsafe(no_mangle)]
static REPLIES: u32 = 0;
#[unsafe(no_mangle)]
static INTERCEPTS: u32 = 0;
#[unsafe(no_mangle)]
static INTERCEPTS6: u32 = 0;

/// The interface that this instance of the program runs on: its index in `ports`, its MAC address.
#[inline(always)]
pub(super) fn own_port() -> (u32, Mac) {
    // SAFETY: both are initialised and never written while the program is loaded.
    let (index, mac) = unsafe { ((&raw const PORT_INDEX).read_volatile(), (&raw const PORT_MAC).read_volatile()) };
    (index, Mac::of(mac))
}

/// The MAC address of another interface, if there is one.
#[inline(always)]
pub(super) fn port_mac(index: u32) -> Option<Mac> {
    PORTS.get(index).filter(|port| port.ifindex != 0).map(|port| port.mac.into())
}

/// Sends the packet out by another interface.
#[inline(always)]
pub(super) fn redirect(index: u32) -> Option<u32> {
    TX_PORTS.redirect(index, 0).ok()
}

/// Whether the interface with this index of the kernel's is one of ours.
#[inline(always)]
pub(super) fn is_ours(link: u32) -> bool {
    redirect_to_link(link).is_some()
}

/// Sends the packet out by an interface of ours with this index of the kernel's; `None` if it is not ours.
#[inline(always)]
pub(super) fn redirect_to_link(link: u32) -> Option<u32> {
    // Its index in the map is the kernel's own.
    TX_LINKS.redirect(link, 0).ok()
}

/// Whether a packet may be a reply of a layer-3 server.
#[inline(always)]
pub(super) fn expects_replies() -> bool {
    // SAFETY: initialised and never written while the program is loaded.
    unsafe { (&raw const REPLIES).read_volatile() != 0 }
}

/// Whether some farm takes packets that are for no VIP.
#[inline(always)]
pub(super) fn intercepts() -> bool {
    // SAFETY: initialised and never written while the program is loaded.
    unsafe { (&raw const INTERCEPTS).read_volatile() != 0 }
}

/// The same of IPv6.
#[inline(always)]
pub(super) fn intercepts6() -> bool {
    // SAFETY: as above.
    unsafe { (&raw const INTERCEPTS6).read_volatile() != 0 }
}

/// Hands the frame to another program; returns only if it is not there.
#[inline(always)]
pub(super) fn leave_to(ctx: &XdpContext, stage: Stage) {
    // SAFETY: nothing here needs to be dropped.
    unsafe { STAGES.tail_call(ctx, stage.index(own_port().0)) };
}

/// Where a datagram's first part went, and when.
#[inline(always)]
pub(super) fn fragment(key: &FragmentKey) -> Option<FragmentPlace> {
    // SAFETY: entries are replaced as a whole, and none is written in place.
    unsafe { FRAGMENTS.get(key).copied() }
}

/// Remembers it.
#[inline(always)]
pub(super) fn set_fragment(key: &FragmentKey, place: &FragmentPlace) {
    // If there is no memory for it, the later parts are dropped and counted.
    let _ = FRAGMENTS.insert(key, place, 0);
}

/// What this CPU may still tell senders.
#[inline(always)]
pub(super) fn allowance() -> Option<*mut Allowance> {
    ALLOWANCE.get_ptr_mut(0)
}

/// Whether the maps have the layout that this program was built for.
#[inline(always)]
#[expect(dead_code, reason = "keeps the map in the object; user space reads it")]
pub(super) fn layout() -> Option<&'static Layout> {
    LAYOUT.get(0)
}

/// Counts a packet that no server gets.
#[inline(always)]
pub(super) fn count(reason: u32) {
    if let Some(counter) = REASON_COUNTERS.get_ptr_mut(reason) {
        // SAFETY: this CPU's own counter; nobody else writes it while the program runs.
        unsafe { *counter += 1 };
    }
}

/// Counts what a server gets.
#[inline(always)]
pub(super) fn count_for(server: u32, bytes: u64, begins: bool) {
    if let Some(stats) = SERVER_STATS.get_ptr_mut(server) {
        // SAFETY: this CPU's own entry; nobody else writes it while the program runs.
        unsafe {
            (*stats).packets += 1;
            (*stats).bytes += bytes;
            (*stats).flows += begins as u64;
        }
    }
}

/// Counts a reply of a server.
#[inline(always)]
pub(super) fn count_reply(server: u32) {
    if let Some(stats) = SERVER_STATS.get_ptr_mut(server) {
        // SAFETY: this CPU's own entry; nobody else writes it while the program runs.
        unsafe { (*stats).replies += 1 };
    }
}

/// A key of `crossings`: its length in bits, the set, the address.
#[repr(C, align(8))]
struct CrossingWords([u32; 3]);

/// A key of `crossings6`: its length in bits and the set in one word, the address.
#[repr(C, align(8))]
struct CrossingWords6([u64; 3]);

/// The kernel's tables, for packets of IPv4, or for one of IPv6.
pub(super) struct Maps<const SIX: bool>;
/// For IPv4.
pub(super) const MAPS: Maps<false> = Maps;
/// For the IPv6 packet whose addresses this CPU keeps.
const MAPS6: Maps<true> = Maps;

impl<const SIX: bool> Tables for Maps<SIX> {
    #[inline(always)]
    fn service_bucket(&self, index: u32) -> Option<&ServiceBucket> {
        SERVICES.get(index)
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<&Word> {
        // SAFETY: a slot is one aligned word.
        SLOTS.get_ptr(index).map(|slot| unsafe { &*slot.cast::<Word>() })
    }

    #[inline(always)]
    fn next_hop(&self, server: u32) -> Option<NextHop> {
        // SAFETY: the first eight bytes of an aligned record, read at once.
        SERVERS.get_ptr(server).map(|server| NextHop(unsafe { server.cast::<u64>().read_volatile() }))
    }

    #[inline(always)]
    fn flow_bucket(&self, index: u32) -> Option<&FlowBucketWords> {
        // SAFETY: both types have the same layout.
        FLOWS.get_ptr(index).map(|bucket| unsafe { &*bucket.cast::<FlowBucketWords>() })
    }

    #[inline(always)]
    fn flow_mask(&self) -> u32 {
        // SAFETY: initialised and never written while the program is loaded.
        unsafe { (&raw const FLOW_MASK).read_volatile() }
    }

    #[inline(always)]
    fn exception_masks(&self, farm: u32) -> Option<&ExceptionMasksWords> {
        // SAFETY: both types have the same layout.
        EXCEPTION_MASKS.get_ptr(farm).map(|masks| unsafe { &*masks.cast::<ExceptionMasksWords>() })
    }

    #[inline(always)]
    fn exception_bucket(&self, index: u32) -> Option<&ExceptionBucketWords> {
        // SAFETY: both types have the same layout.
        EXCEPTION_INDEX.get_ptr(index).map(|bucket| unsafe { &*bucket.cast::<ExceptionBucketWords>() })
    }

    #[inline(always)]
    fn exception_bucket_mask(&self) -> u32 {
        // SAFETY: initialised and never written while the program is loaded.
        unsafe { (&raw const EXCEPTION_BUCKET_MASK).read_volatile() }
    }

    #[inline(always)]
    fn exception(&self, index: u32) -> Option<&ExceptionWords> {
        // SAFETY: both types have the same layout.
        EXCEPTIONS.get_ptr(index).map(|record| unsafe { &*record.cast::<ExceptionWords>() })
    }

    #[inline(always)]
    fn exception_seed(&self) -> u64 {
        // SAFETY: initialised and never written while the program is loaded.
        unsafe { (&raw const EXCEPTION_SEED).read_volatile() }
    }

    #[inline(always)]
    fn host_number(&self, server: u32) -> u16 {
        // SAFETY: an aligned field of a record that is valid for as long as the map is.
        SERVERS.get_ptr(server).map_or(0, |server| unsafe { (&raw const (*server).host).read_volatile() })
    }

    #[inline(always)]
    fn far_end(&self, server: u32) -> Option<FarEnd> {
        let server = SERVERS.get_ptr(server)?;
        // SAFETY: aligned fields of a record that is valid for as long as the map is.
        unsafe {
            Some(FarEnd {
                address: (&raw const (*server).address).cast::<u32>().add(3).read_volatile(),
                source: (&raw const (*server).source).cast::<u32>().add(3).read_volatile(),
                mtu: (&raw const (*server).mtu).read_volatile(),
            })
        }
    }

    #[inline(always)]
    fn vip6(&self, index: u32) -> Option<[u64; 2]> {
        // SAFETY: an address is two aligned words, and changes only while no service entry names it.
        VIPS6.get_ptr(index).map(|address| unsafe { address.cast::<[u64; 2]>().read_volatile() })
    }

    #[inline(always)]
    fn far_end6(&self, server: u32) -> Option<FarEnd6> {
        let server = SERVERS.get_ptr(server)?;
        // SAFETY: aligned fields of a record that is valid for as long as the map is.
        unsafe {
            Some(FarEnd6 {
                address: (&raw const (*server).address).cast::<[u64; 2]>().read_volatile(),
                source: (&raw const (*server).source).cast::<[u64; 2]>().read_volatile(),
                mtu: (&raw const (*server).mtu).read_volatile(),
            })
        }
    }

    type Six = Maps<true>;

    #[inline(always)]
    fn six(&self, addresses: Addresses6) -> Option<Maps<true>> {
        let place = ADDRESSES6.get_ptr_mut(0)?;
        // SAFETY: this CPU's own entry; a program is not interrupted by another one on its CPU.
        unsafe { place.write_volatile(addresses) };
        Some(MAPS6)
    }

    #[inline(always)]
    fn is_six(&self) -> bool {
        SIX
    }

    #[inline(always)]
    fn addresses6(&self) -> Option<Addresses6> {
        if !SIX {
            return None;
        }
        // SAFETY: as above.
        ADDRESSES6.get_ptr(0).map(|place| unsafe { place.read_volatile() })
    }

    #[inline(always)]
    fn is_in(&self, set: AddressSet, address: u32) -> bool {
        let mut words = CrossingWords([0; 3]);
        for (word, value) in words.0.iter_mut().zip([u64::BITS, u32::from_ne_bytes(set.0), address]) {
            // SAFETY: an exclusive reference. Volatile, or two words become one store where the verifier wants an aligned one.
            unsafe { core::ptr::from_mut(word).write_volatile(value) };
        }
        // SAFETY: a key is these three words, and its alignment is one byte.
        CROSSINGS.get(unsafe { &*(&raw const words).cast::<Key<[u32; 2]>>() }).is_some()
    }

    #[inline(always)]
    fn is_in6(&self, set: AddressSet, [high, low]: [u64; 2]) -> bool {
        is_in_set6(u32::from_ne_bytes(set.0) as u64, high, low) != 0
    }

    #[inline(always)]
    fn choose(&self, flow: NewFlow) -> Chosen {
        let [a, b, c, d] = flow.to_words();
        Chosen(if SIX { choose_server6(a, b, c, d) } else { choose_server(a, b, c, d) })
    }

    #[inline(always)]
    fn insert(&self, buckets: [u32; 2], key: u64, value: FlowWord) -> bool {
        insert_flow((buckets[0] as u64) << 32 | buckets[1] as u64, key, value.0) != 0
    }

    #[inline(always)]
    fn matches(&self, flow: Tuple) -> u64 {
        let [a, b] = flow.to_words();
        if SIX { match_exceptions6(b) } else { match_exceptions(a, b) }
    }

    #[inline(always)]
    fn excludes(&self, flow: Tuple, matches: u64, host: u16) -> bool {
        let [a, b] = flow.to_words();
        let host = host as u64;
        (if SIX { exclude_host6(b, matches, host) } else { exclude_host(a, b, matches, host) }) != 0
    }

    #[inline(always)]
    fn claim_of_reply(&self, reply: Reply, vip: u32) -> Claim {
        let [a, b] = reply.to_words();
        Claim(claim_of_reply(a, b, vip as u64))
    }

    #[inline(always)]
    fn digest6(&self, [high, low]: [u64; 2], port: u16, seed: u64) -> u64 {
        digest_flow(high, low, port as u64, seed)
    }

    #[inline(always)]
    fn digest_crossing6(&self, port: u16, seed: u64) -> u64 {
        digest_crossing(port as u64, seed)
    }

    #[inline(always)]
    fn name6(&self, source_len: u64, destination_len: u64) -> u64 {
        // Word by word, for want of room on the stack. And no function: of a loop that calls one, and reads at an index too, older
        // kernels' verifiers (before 6.5) follow every way.
        let Some(place) = ADDRESSES6.get_ptr(0) else { return 0 };
        // SAFETY: as in `addresses6`.
        let address = |index: usize| unsafe { place.cast::<[u64; 2]>().add(index).read_volatile() };
        let of = |hash: SipHash, index, length| {
            let [high, low] = prefix6(address(index), length);
            hash.with(high).with(low)
        };
        let hash = of(SipHash::new(keys_of(self.exception_seed())), 0, source_len);
        of(hash, 1, destination_len).finish(4, 0)
    }

    #[inline(always)]
    fn claim_of_reply6(&self, reply: Reply, vip: u32) -> Claim {
        let [_, rest] = reply.to_words();
        Claim(claim_of_reply6(rest, vip as u64))
    }
}

// Global functions of scalars: the verifier follows each of them once, whoever calls it and from wherever.

/// [`NewFlow::choose`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn choose_server(a: u64, b: u64, c: u64, d: u64) -> u64 {
    NewFlow::from_words([a, b, c, d]).choose(&MAPS).0
}

/// [`insert_into`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn insert_flow(buckets: u64, key: u64, value: u64) -> u64 {
    insert_into(&MAPS, [(buckets >> 32) as u32, buckets as u32], key, FlowWord(value)) as u64
}

/// [`Tuple::matches`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn match_exceptions(a: u64, b: u64) -> u64 {
    Tuple::from_words([a, b]).matches(&MAPS)
}

/// [`Tuple::excludes`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn exclude_host(a: u64, b: u64, matches: u64, host: u64) -> u64 {
    Tuple::from_words([a, b]).excludes(&MAPS, matches, host as u16) as u64
}

/// [`Reply::claim`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn claim_of_reply(a: u64, b: u64, vip: u64) -> u64 {
    Reply::from_words([a, b]).claim(&MAPS, vip as u32).0
}

/// [`NewFlow::choose`] of IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn choose_server6(a: u64, b: u64, c: u64, d: u64) -> u64 {
    NewFlow::from_words([a, b, c, d]).choose(&MAPS6).0
}

/// [`Tuple::matches`] of IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn match_exceptions6(rest: u64) -> u64 {
    Tuple::from_words([0, rest]).matches(&MAPS6)
}

/// [`Tuple::excludes`] of IPv6.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn exclude_host6(rest: u64, matches: u64, host: u64) -> u64 {
    Tuple::from_words([0, rest]).excludes(&MAPS6, matches, host as u16) as u64
}

/// [`Reply::claim6`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn claim_of_reply6(rest: u64, vip: u64) -> u64 {
    Reply::from_words([0, rest]).claim6(&MAPS6, vip as u32).0
}

/// [`digest`](six::digest).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn digest_flow(high: u64, low: u64, port: u64, seed: u64) -> u64 {
    six::digest([high, low], port as u16, seed)
}

/// [`digest_crossing`](six::intercept::digest_crossing) of the packet whose addresses this CPU keeps.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn digest_crossing(port: u64, seed: u64) -> u64 {
    six::intercept::digest_crossing(MAPS6.addresses6().unwrap_or_default(), port as u16, seed)
}

/// [`Tables::is_in6`]: a function, because the key would take too much of the caller's stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_in_set6(set: u64, high: u64, low: u64) -> u64 {
    let mut words = CrossingWords6([0; 3]);
    let [a, b, c, d] = (u32::BITS + u128::BITS).to_ne_bytes();
    let [e, f, g, h] = (set as u32).to_ne_bytes();
    for (word, value) in words.0.iter_mut().zip([u64::from_ne_bytes([a, b, c, d, e, f, g, h]), high, low]) {
        // SAFETY: an exclusive reference. Volatile, for the reason given above.
        unsafe { core::ptr::from_mut(word).write_volatile(value) };
    }
    // SAFETY: a key is these words, and its alignment is one byte.
    CROSSINGS6.get(unsafe { &*(&raw const words).cast::<Key<[u32; 5]>>() }).is_some() as u64
}
