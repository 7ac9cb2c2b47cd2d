//! What [`steer`](crate::steer::steer) asks: the BPF maps in the kernel, the same memory seen from user space on the host.

use crate::{
    abi::{ALIVE, AddressSet, FORWARDING_SHIFT, REACHABLE, Server, ServiceBucket},
    choice::{Chosen, NewFlow},
    exceptions::{ExceptionBucketWords, ExceptionMasksWords, ExceptionWords, Tuple, name6, prefix6},
    flows::{FlowBucketWords, FlowWord},
    rewrite::l2::Mac,
    room::insert_into,
    routed::{Claim, Reply},
    six::{digest, intercept::digest_crossing},
    word::Word,
};

/// The tables that decide where a packet goes. Nothing here is written but flow entries and the TRACKED bit of slots.
pub trait Tables {
    /// A bucket of the service table.
    fn service_bucket(&self, index: u32) -> Option<&ServiceBucket>;
    /// A slot.
    fn slot(&self, index: u32) -> Option<&Word>;
    /// Where a server id's packets go.
    fn next_hop(&self, server: u32) -> Option<NextHop>;
    /// A bucket of the flow table.
    fn flow_bucket(&self, index: u32) -> Option<&FlowBucketWords>;
    /// Number of flow buckets less one; the number is a power of two.
    fn flow_mask(&self) -> u32;
    /// What the exceptions of a farm look at.
    fn exception_masks(&self, farm: u32) -> Option<&ExceptionMasksWords>;
    /// A bucket of the exceptions' index.
    fn exception_bucket(&self, index: u32) -> Option<&ExceptionBucketWords>;
    /// Number of those buckets less one; the number is a power of two.
    fn exception_bucket_mask(&self) -> u32;
    /// An exception's record.
    fn exception(&self, index: u32) -> Option<&ExceptionWords>;
    /// Seed of the exceptions' hash.
    fn exception_seed(&self) -> u64;
    /// What exceptions call the host of a server id; 0: nothing.
    fn host_number(&self, server: u32) -> u16;
    /// What a packet that is routed to a server id needs to know.
    fn far_end(&self, server: u32) -> Option<FarEnd>;
    /// Whether an address, as it stands in a header, is in this set.
    fn is_in(&self, set: AddressSet, address: u32) -> bool;
    /// The same of an IPv6 address.
    fn is_in6(&self, set: AddressSet, address: Address6) -> bool;
    /// The IPv6 VIP of this index.
    fn vip6(&self, index: u32) -> Option<Address6>;
    /// [`far_end`](Self::far_end) of a server that is reached by IPv6.
    fn far_end6(&self, server: u32) -> Option<FarEnd6>;

    /// These tables for an IPv6 packet with these addresses.
    type Six: Tables;
    /// See there. Until the next call, in the kernel: the addresses are kept in one place for each CPU.
    fn six(&self, addresses: Addresses6) -> Option<Self::Six>;
    /// Whether these tables are for an IPv6 packet.
    #[inline(always)]
    fn is_six(&self) -> bool {
        false
    }
    /// The addresses of the IPv6 packet that these tables are for; of IPv4 there are none.
    #[inline(always)]
    fn addresses6(&self) -> Option<Addresses6> {
        None
    }

    // In the kernel each of these is a function of its own, which the verifier follows once.

    /// [`NewFlow::choose`] on these tables.
    #[inline(always)]
    fn choose(&self, flow: NewFlow) -> Chosen
    where
        Self: Sized,
    {
        flow.choose(self)
    }
    /// [`insert_into`] these tables.
    #[inline(always)]
    fn insert(&self, buckets: [u32; 2], key: u64, value: FlowWord) -> bool
    where
        Self: Sized,
    {
        insert_into(self, buckets, key, value)
    }
    /// [`Tuple::matches`] on these tables.
    #[inline(always)]
    fn matches(&self, flow: Tuple) -> u64
    where
        Self: Sized,
    {
        flow.matches(self)
    }
    /// [`Tuple::excludes`] on these tables.
    #[inline(always)]
    fn excludes(&self, flow: Tuple, matches: u64, host: u16) -> bool
    where
        Self: Sized,
    {
        flow.excludes(self, matches, host)
    }
    /// [`Reply::claim`] on these tables.
    #[inline(always)]
    fn claim_of_reply(&self, reply: Reply, vip: u32) -> Claim
    where
        Self: Sized,
    {
        reply.claim(self, vip)
    }
    /// [`digest`] of an IPv6 flow.
    #[inline(always)]
    fn digest6(&self, source: Address6, port: u16, seed: u64) -> u64 {
        digest(source, port, seed)
    }
    /// [`digest_crossing`] of the IPv6 packet that these tables are for.
    #[inline(always)]
    fn digest_crossing6(&self, port: u16, seed: u64) -> u64 {
        digest_crossing(self.addresses6().unwrap_or_default(), port, seed)
    }
    /// [`name6`] of the packet's addresses, of which so many bits count, under the exceptions' seed.
    #[inline(always)]
    fn name6(&self, source_len: u64, destination_len: u64) -> u64 {
        let Some(Addresses6 { source, destination }) = self.addresses6() else { return 0 };
        name6(prefix6(source, source_len), prefix6(destination, destination_len), self.exception_seed())
    }
    /// [`Reply::claim6`] on these tables, which have the reply's addresses.
    #[inline(always)]
    fn claim_of_reply6(&self, reply: Reply, vip: u32) -> Claim
    where
        Self: Sized,
    {
        reply.claim6(self, vip)
    }
}

/// Of a [`Server`]'s record; addresses as they stand in a header, read as native integers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FarEnd {
    /// The server's own address.
    pub address: u32,
    /// Source address of an outer header.
    pub source: u32,
    /// Longest packet that gets there whole, in bytes; 0: not known.
    pub mtu: u16,
}

impl FarEnd {
    /// From a server's record.
    pub fn of(server: &Server) -> Self {
        let last = |address: &[u8; 16]| u32::from_ne_bytes([address[12], address[13], address[14], address[15]]);
        Self { address: last(&server.address), source: last(&server.source), mtu: server.mtu }
    }
}

/// An IPv6 address: its two halves, as they stand in a header, read as native integers.
pub type Address6 = [u64; 2];

/// An IPv6 packet's addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Addresses6 {
    /// Source.
    pub source: Address6,
    /// Destination.
    pub destination: Address6,
}

impl Addresses6 {
    /// The other way.
    #[inline(always)]
    pub const fn turned_round(&self) -> Self {
        Self { source: self.destination, destination: self.source }
    }
}

/// The halves of an address as it stands in a record.
#[inline(always)]
pub const fn halves(bytes: [u8; 16]) -> Address6 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
    [u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u64::from_ne_bytes([i, j, k, l, m, n, o, p])]
}

/// Of a [`Server`]'s record that is reached by IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FarEnd6 {
    /// The server's own address.
    pub address: Address6,
    /// Source address of an outer header.
    pub source: Address6,
    /// Longest packet that gets there whole, in bytes; 0: not known.
    pub mtu: u16,
}

impl FarEnd6 {
    /// From a server's record.
    pub const fn of(server: &Server) -> Self {
        Self { address: halves(server.address), source: halves(server.source), mtu: server.mtu }
    }
}

/// The first word of a [`Server`], read at once: MAC address, flags, port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NextHop(pub u64);

impl NextHop {
    /// From its parts; `flags` as in [`Server::flags`](crate::abi::Server::flags).
    pub const fn new(mac: [u8; 6], flags: u8, port: u8) -> Self {
        let [a, b, c, d, e, f] = mac;
        Self(u64::from_ne_bytes([a, b, c, d, e, f, flags, port]))
    }

    /// The MAC address.
    #[inline(always)]
    pub const fn mac(self) -> Mac {
        Mac::of(self.0)
    }

    /// [`ALIVE`] and the others.
    #[inline(always)]
    pub const fn flags(self) -> u8 {
        self.0.to_ne_bytes()[6]
    }

    /// The forwarding type, [`GRE`](crate::abi::GRE) or [`LAYER_3`](crate::abi::LAYER_3); all else is layer 2.
    #[inline(always)]
    pub const fn forwarding(self) -> u8 {
        self.flags() >> FORWARDING_SHIFT
    }

    /// Index of the interface.
    #[inline(always)]
    pub const fn port(self) -> u8 {
        self.0.to_ne_bytes()[7]
    }

    /// Flows on record may go there.
    #[inline(always)]
    pub const fn is_alive(self) -> bool {
        self.flags() & ALIVE != 0
    }

    /// Its MAC address is known.
    #[inline(always)]
    pub const fn is_reachable(self) -> bool {
        self.flags() & REACHABLE != 0
    }
}
