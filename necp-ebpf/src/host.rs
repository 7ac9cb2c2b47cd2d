//! The tables as memory of this process: the kernel's maps through mmap, or vectors of a test's own.

mod exceptions;

pub use exceptions::NotWritten;

use core::{marker::PhantomData, ptr::NonNull};

use crate::{
    abi::{AddressSet, Server, ServiceBucket},
    exceptions::{ExceptionBucketWords, ExceptionMasksWords, ExceptionWords},
    flows::FlowBucketWords,
    tables::{Address6, Addresses6, FarEnd, FarEnd6, NextHop, Tables, halves},
    word::Word,
};

/// The tables that [`steer`](crate::steer::steer) reads. Other threads and the kernel change them at any time.
#[derive(Clone, Copy)]
pub struct View<'a> {
    services: NonNull<[ServiceBucket]>,
    slots: &'a [Word],
    servers: NonNull<[Server]>,
    flows: &'a [FlowBucketWords],
    exceptions: ExceptionTables<'a>,
    crossings: &'a [Crossing],
    crossings6: &'a [Crossing6],
    vips6: &'a [VipWords],
    addresses6: Option<Addresses6>,
    memory: PhantomData<&'a ()>,
}

/// A prefix of a set of addresses: the set, network and mask as they stand in a header.
pub type Crossing = (AddressSet, u32, u32);

/// The same of IPv6.
pub type Crossing6 = (AddressSet, Address6, Address6);

/// [`Address6`](crate::abi::Address6), as words.
pub type VipWords = [Word; 2];

/// The tables of exceptions.
#[derive(Clone, Copy)]
pub struct ExceptionTables<'a> {
    /// By farm.
    pub masks: &'a [ExceptionMasksWords],
    /// Their number is a power of two.
    pub index: &'a [ExceptionBucketWords],
    /// By number.
    pub records: &'a [ExceptionWords],
    /// Seed of the hash.
    pub seed: u64,
}

// SAFETY: all access is by volatile or atomic single instructions, or to service entries, which change only while free.
unsafe impl Send for View<'_> {}
// SAFETY: as above.
unsafe impl Sync for View<'_> {}

impl<'a> View<'a> {
    /// # Safety
    /// `services` and `servers` must stay valid for reads and writes for `'a`, and be changed by nobody in user space but
    /// through this type. `flows` and the exceptions' index must have lengths that are powers of two.
    pub unsafe fn new(
        services: NonNull<[ServiceBucket]>,
        slots: &'a [Word],
        servers: NonNull<[Server]>,
        flows: &'a [FlowBucketWords],
        vips6: &'a [VipWords],
        exceptions: ExceptionTables<'a>,
    ) -> Self {
        debug_assert!(flows.len().is_power_of_two() && exceptions.index.len().is_power_of_two());
        Self {
            services,
            slots,
            servers,
            flows,
            exceptions,
            crossings: &[],
            crossings6: &[],
            vips6,
            addresses6: None,
            memory: PhantomData,
        }
    }

    /// The same tables with these sets of addresses; without, all are empty.
    pub fn with_crossings(self, crossings: &'a [Crossing], crossings6: &'a [Crossing6]) -> Self {
        Self { crossings, crossings6, ..self }
    }

    /// All slots.
    pub fn slots(&self) -> &'a [Word] {
        self.slots
    }

    /// The flow table.
    pub fn flows(&self) -> &'a [FlowBucketWords] {
        self.flows
    }

    /// Number of server ids.
    pub fn server_count(&self) -> usize {
        self.servers.len()
    }

    /// One server's record.
    pub fn server(&self, id: u32) -> Option<Server> {
        // SAFETY: in bounds; only user space changes it, and this process's writer goes through `set_server`.
        self.server_ptr(id).map(|server| unsafe { server.read_volatile() })
    }

    /// Writes a server's record: what is not its next hop first, then the next hop in one store.
    pub fn set_server(&self, id: u32, server: &Server) -> bool {
        let Some(place) = self.server_ptr(id) else { return false };
        // SAFETY: in bounds and aligned; the packet path reads the first word only.
        unsafe {
            let from = core::ptr::from_ref(server).cast::<u64>();
            for word in (0..size_of::<Server>() / 8).rev() {
                place.cast::<u64>().add(word).write_volatile(*from.add(word));
            }
        }
        true
    }

    /// Changes where a server's packets go, in one store.
    pub fn set_next_hop(&self, id: u32, next_hop: NextHop) -> bool {
        let Some(place) = self.server_ptr(id) else { return false };
        // SAFETY: in bounds and aligned.
        unsafe { place.cast::<u64>().write_volatile(next_hop.0) };
        true
    }

    /// One bucket of the service table.
    pub fn services(&self, index: u32) -> Option<ServiceBucket> {
        // SAFETY: in bounds; see `new`.
        self.service_ptr(index).map(|bucket| unsafe { bucket.read_volatile() })
    }

    /// Writes one entry of the service table: the first word, which makes it valid, last.
    pub fn set_service(&self, bucket: u32, entry: usize, service: &crate::abi::Service) -> bool {
        let Some(place) = self.service_ptr(bucket).filter(|_| entry < crate::abi::SERVICES_PER_BUCKET) else {
            return false;
        };
        // SAFETY: in bounds and aligned; the entry is made invalid while it is being changed.
        unsafe {
            let place = (&raw mut (*place).entries[entry]).cast::<u64>();
            let from = core::ptr::from_ref(service).cast::<u64>();
            place.write_volatile(0);
            for word in (0..size_of::<crate::abi::Service>() / 8).rev() {
                core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
                place.add(word).write_volatile(*from.add(word));
            }
        }
        true
    }

    /// Writes the IPv6 VIP of this index, which no service entry may name meanwhile; false if there is none.
    pub fn set_vip6(&self, index: u32, address: [u8; 16]) -> bool {
        let Some([high, low]) = self.vips6.get(index as usize) else { return false };
        let halves = halves(address);
        high.store(halves[0]);
        low.store(halves[1]);
        true
    }

    fn server_ptr(&self, id: u32) -> Option<*mut Server> {
        // SAFETY: the index is within the slice.
        ((id as usize) < self.servers.len()).then(|| unsafe { self.servers.cast::<Server>().as_ptr().add(id as usize) })
    }

    fn service_ptr(&self, index: u32) -> Option<*mut ServiceBucket> {
        let services = self.services.cast::<ServiceBucket>().as_ptr();
        // SAFETY: the index is within the slice.
        ((index as usize) < self.services.len()).then(|| unsafe { services.add(index as usize) })
    }
}

impl Tables for View<'_> {
    fn service_bucket(&self, index: u32) -> Option<&ServiceBucket> {
        // SAFETY: in bounds; entries change only while their first word says that they are free.
        self.service_ptr(index).map(|bucket| unsafe { &*bucket })
    }

    fn slot(&self, index: u32) -> Option<&Word> {
        self.slots.get(index as usize)
    }

    fn next_hop(&self, server: u32) -> Option<NextHop> {
        // SAFETY: in bounds and aligned; one volatile read of a word.
        self.server_ptr(server).map(|server| NextHop(unsafe { server.cast::<u64>().read_volatile() }))
    }

    fn flow_bucket(&self, index: u32) -> Option<&FlowBucketWords> {
        self.flows.get(index as usize)
    }

    fn flow_mask(&self) -> u32 {
        self.flows.len() as u32 - 1
    }

    fn exception_masks(&self, farm: u32) -> Option<&ExceptionMasksWords> {
        self.exceptions.masks.get(farm as usize)
    }

    fn exception_bucket(&self, index: u32) -> Option<&ExceptionBucketWords> {
        self.exceptions.index.get(index as usize)
    }

    fn exception_bucket_mask(&self) -> u32 {
        self.exceptions.index.len() as u32 - 1
    }

    fn exception(&self, index: u32) -> Option<&ExceptionWords> {
        self.exceptions.records.get(index as usize)
    }

    fn exception_seed(&self) -> u64 {
        self.exceptions.seed
    }

    fn host_number(&self, server: u32) -> u16 {
        // SAFETY: in bounds and aligned; one volatile read of a field.
        self.server_ptr(server).map_or(0, |server| unsafe { (&raw const (*server).host).read_volatile() })
    }

    fn far_end(&self, server: u32) -> Option<FarEnd> {
        self.server(server).map(|server| FarEnd::of(&server))
    }

    fn vip6(&self, index: u32) -> Option<Address6> {
        self.vips6.get(index as usize).map(|[high, low]| [high.load(), low.load()])
    }

    fn far_end6(&self, server: u32) -> Option<FarEnd6> {
        self.server(server).map(|server| FarEnd6::of(&server))
    }

    type Six = Self;

    fn six(&self, addresses: Addresses6) -> Option<Self> {
        Some(Self { addresses6: Some(addresses), ..*self })
    }

    fn is_six(&self) -> bool {
        self.addresses6.is_some()
    }

    fn addresses6(&self) -> Option<Addresses6> {
        self.addresses6
    }

    fn is_in(&self, set: AddressSet, address: u32) -> bool {
        self.crossings.iter().any(|&(of, network, mask)| of == set && address & mask == network)
    }

    fn is_in6(&self, set: AddressSet, [high, low]: Address6) -> bool {
        let within = |network: Address6, mask: Address6| [high & mask[0], low & mask[1]] == network;
        self.crossings6.iter().any(|&(of, network, mask)| of == set && within(network, mask))
    }
}

/// Tables of a process's own.
pub struct Owned {
    services: alloc::vec::Vec<ServiceBucket>,
    slots: alloc::vec::Vec<Word>,
    servers: alloc::vec::Vec<Server>,
    flows: alloc::vec::Vec<FlowBucketWords>,
    vips6: alloc::vec::Vec<VipWords>,
    exception_masks: alloc::vec::Vec<ExceptionMasksWords>,
    exception_index: alloc::vec::Vec<ExceptionBucketWords>,
    exceptions: alloc::vec::Vec<ExceptionWords>,
    crossings: alloc::vec::Vec<Crossing>,
    crossings6: alloc::vec::Vec<Crossing6>,
}

/// Farms of tables of a process's own that may have exceptions.
const FARMS: usize = 16;
/// Room for IPv6 VIPs in such tables.
const VIPS6: usize = 64;
/// Room for exceptions in such tables, unless they are made for more.
const EXCEPTIONS: u32 = 64;

impl Owned {
    /// Empty tables; `flow_buckets` must be a power of two.
    pub fn new(slots: usize, servers: usize, flow_buckets: usize) -> Self {
        assert!(flow_buckets.is_power_of_two(), "the number of flow buckets must be a power of two");
        let empty = || crate::flows::FlowWords { key: Word::new(0), word: Word::new(0) };
        Self {
            services: alloc::vec![ServiceBucket::default(); crate::abi::SERVICE_BUCKETS as usize],
            slots: (0..slots).map(|_| Word::new(0)).collect(),
            servers: alloc::vec![Server::default(); servers],
            flows: (0..flow_buckets).map(|_| FlowBucketWords { entries: core::array::from_fn(|_| empty()) }).collect(),
            vips6: (0..VIPS6).map(|_| [Word::new(0), Word::new(0)]).collect(),
            exception_masks: exceptions::no_masks(FARMS),
            exception_index: exceptions::no_index(EXCEPTIONS),
            exceptions: exceptions::no_records(EXCEPTIONS),
            crossings: alloc::vec::Vec::new(),
            crossings6: alloc::vec::Vec::new(),
        }
    }

    /// The same with room for this many records of exceptions; there are none in it.
    pub fn with_exceptions(self, records: u32) -> Self {
        let exception_index = exceptions::no_index(records);
        Self { exception_index, exceptions: exceptions::no_records(records), ..self }
    }

    /// Fills the sets of addresses.
    pub fn set_crossings(&mut self, crossings: alloc::vec::Vec<Crossing>, crossings6: alloc::vec::Vec<Crossing6>) {
        self.crossings = crossings;
        self.crossings6 = crossings6;
    }

    /// The tables, to be read and written.
    pub fn view(&mut self) -> View<'_> {
        let services = NonNull::from(self.services.as_mut_slice());
        let servers = NonNull::from(self.servers.as_mut_slice());
        let exceptions = ExceptionTables {
            masks: &self.exception_masks,
            index: &self.exception_index,
            records: &self.exceptions,
            seed: 0x0ddb_a11c_0ffe_e000,
        };
        // SAFETY: both are borrowed exclusively for as long as the view lives.
        let view = unsafe { View::new(services, &self.slots, servers, &self.flows, &self.vips6, exceptions) };
        view.with_crossings(&self.crossings, &self.crossings6)
    }
}
