//! What the kernel program and user space share: every map's name, capacity, key and value.
//!
//! The record types have plain named fields, because `bpftool map dump` prints those names. Where several CPUs and user
//! space change a record at the same time, the code goes through [`Word`](crate::word::Word) views of the same memory:
//! [`FlowBucketWords`](crate::flows::FlowBucketWords), [`Tables`](crate::tables::Tables). Addresses and ports in records
//! are in network byte order unless a field says otherwise; everything else is in the host's.

/// Raised whenever a record below, or what a field means, changes: pinned maps of another layout are never reused.
pub const LAYOUT_VERSION: u32 = 7;

/// Map and object names, as `bpftool` and the pin directory show them (at most 15 bytes, the kernel's limit).
pub mod names {
    /// The XDP program.
    pub const PROGRAM: &str = "necp";
    /// `Array<ServiceBucket>`: which service a packet belongs to.
    pub const SERVICES: &str = "services";
    /// `Array<Slot>`: the slot tables of all services, one after the other.
    pub const SLOTS: &str = "slots";
    /// `Array<Server>`: one entry per server id.
    pub const SERVERS: &str = "servers";
    /// `Array<FlowBucket>`: flows that the slot tables alone would misplace.
    pub const FLOWS: &str = "flows";
    /// `Array<Address6>`: the IPv6 VIPs, by [`Service::vip`](super::Service::vip).
    pub const VIPS6: &str = "vips6";
    /// `Array<ExceptionMasks>`: by farm, what its exceptions look at.
    pub const EXCEPTION_MASKS: &str = "except_masks";
    /// `Array<ExceptionBucket>`: where in [`EXCEPTIONS`] an exception is.
    pub const EXCEPTION_INDEX: &str = "except_index";
    /// `Array<Exception>`: flows that servers do not want.
    pub const EXCEPTIONS: &str = "exceptions";
    /// `PerCpuArray<u64>`: packets by [`Reason`](crate::verdict::Reason).
    pub const REASONS: &str = "reasons";
    /// `PerCpuArray<ServerStats>`: packets, bytes and new flows by server id.
    pub const SERVER_STATS: &str = "server_stats";
    /// `Array<Port>`: the interfaces that the program runs on.
    pub const PORTS: &str = "ports";
    /// `DevMap`: the same interfaces, as targets of redirects.
    pub const TX_PORTS: &str = "tx_ports";
    /// `DevMapHash`: the same interfaces, by the kernel's index of each.
    pub const TX_LINKS: &str = "tx_links";
    /// `LruHashMap<FragmentKey, FragmentPlace>`: where the first parts of datagrams went.
    pub const FRAGMENTS: &str = "fragments";
    /// `ProgramArray`: the programs that an interface's own hands over to, see [`Stage`](super::Stage).
    pub const STAGES: &str = "stages";
    /// `LpmTrie<[u8; 8], u32>`: addresses that count when a packet crosses this host, see [`AddressSet`](super::AddressSet).
    pub const CROSSINGS: &str = "crossings";
    /// `LpmTrie<[u8; 20], u32>`: the same of IPv6.
    pub const CROSSINGS6: &str = "crossings6";
    /// `PerCpuArray<Allowance>`: one entry, how many ICMP errors may still be sent.
    pub const ALLOWANCE: &str = "allowance";
    /// `Array<Layout>`: one entry, what the other maps were created with.
    pub const LAYOUT: &str = "layout";
    /// Read-only global: index in [`PORTS`] of the interface this instance of the program runs on.
    pub const PORT_INDEX: &str = "PORT_INDEX";
    /// Read-only global: that interface's MAC address, in the first six bytes of a u64.
    pub const PORT_MAC: &str = "PORT_MAC";
    /// Read-only global: number of flow buckets less one.
    pub const FLOW_MASK: &str = "FLOW_MASK";
    /// Read-only global: number of exception buckets less one.
    pub const EXCEPTION_BUCKET_MASK: &str = "EXCEPTION_BUCKET_MASK";
    /// Read-only global: seed of the exceptions' hash, a secret.
    pub const EXCEPTION_SEED: &str = "EXCEPTION_SEED";
    /// Read-only global: 1 if some service has a [`REPLY`](super::REPLY) entry, else 0 and no packet is asked about it.
    pub const REPLIES: &str = "REPLIES";
    /// Read-only global: 1 if some farm intercepts what crosses this host, else 0 and no packet is asked about it.
    pub const INTERCEPTS: &str = "INTERCEPTS";
    /// Read-only global: the same of IPv6.
    pub const INTERCEPTS6: &str = "INTERCEPTS6";
    /// All maps that outlive the daemon, by name.
    pub const PINNED: [&str; 19] = [
        SERVICES,
        SLOTS,
        SERVERS,
        FLOWS,
        VIPS6,
        EXCEPTION_MASKS,
        EXCEPTION_INDEX,
        EXCEPTIONS,
        REASONS,
        SERVER_STATS,
        PORTS,
        TX_PORTS,
        TX_LINKS,
        FRAGMENTS,
        STAGES,
        CROSSINGS,
        CROSSINGS6,
        ALLOWANCE,
        LAYOUT,
    ];
}

/// Buckets of the service table. A power of two.
pub const SERVICE_BUCKETS: u32 = 8192;
/// Entries in a bucket of the service table: a lookup reads one bucket and no more.
pub const SERVICES_PER_BUCKET: usize = 4;
/// Server ids; an id is one server's offer of one service with one forwarding type.
pub const MAX_SERVERS: u32 = 65_536;
/// Interfaces of one instance.
pub const MAX_PORTS: u32 = 64;
/// Entries in a bucket of the flow table, 64 bytes together.
pub const FLOWS_PER_BUCKET: usize = 4;
/// Default number of flow buckets (32 MiB, 2,097,152 flows). A power of two; set at load.
pub const DEFAULT_FLOW_BUCKETS: u32 = 524_288;
/// Default capacity of the slot map, in slots (8 bytes each); set at load.
pub const DEFAULT_SLOTS: u32 = 1 << 20;

/// IPv6 VIPs of one instance, and one more: none has index 0.
pub const MAX_VIPS6: u32 = 4096;

/// Farms of one instance.
pub const MAX_FARMS: u32 = 1024;
/// Different masks of the exceptions of one farm: a new flow costs one lookup for each.
pub const EXCEPTION_MASKS: usize = 32;
/// SEs that may have a local exception for the same flows in one farm.
pub const EXCEPTION_INSTALLERS: usize = 8;
/// Entries in a bucket of the exceptions' index, 64 bytes together with how many more belong there.
pub const EXCEPTIONS_PER_BUCKET: usize = 7;
/// Default number of exceptions that all SEs together may have.
pub const DEFAULT_EXCEPTIONS: u32 = 1 << 20;

/// Records that the map [`names::EXCEPTIONS`] needs for this many exceptions: a number is not used again at once.
pub const fn exception_records(exceptions: u32) -> u32 {
    let spare = exceptions / 16;
    exceptions.saturating_add(if spare < 1024 { 1024 } else { spare })
}

/// Buckets that the map [`names::EXCEPTION_INDEX`] needs for this many records; a power of two.
pub const fn exception_buckets(records: u32) -> u32 {
    (records / 3 + 1).next_power_of_two()
}

/// Server id: nobody was ever there.
pub const NONE: u32 = 0;
/// Server id: cut through, the packet goes on as if there were no balancer.
pub const DIRECT: u32 = 1;
/// The first id of a real server.
pub const FIRST_SERVER: u32 = 2;

/// Where packets to one address, protocol and port go: the slot table of a service.
///
/// Written by user space only: first the fields, last `state` (with the rest of the first eight bytes, in one store).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// The VIP; of an IPv6 one the [fold](crate::hash::fold6), `vip` says which.
    pub address: [u8; 4],
    /// Destination port; 0 for protocols without.
    pub port: [u8; 2],
    /// IP protocol.
    pub protocol: u8,
    /// 0: this entry is free. 1: valid. [`REPLY`], [`VIP`], [`INTERCEPT`], [`SERVICE6`] and others: see there.
    pub state: u8,
    /// Index of the service's first slot in the map `slots`.
    pub slots_base: u32,
    /// Number of its slots.
    pub slots_size: u32,
    /// Seed of the farm's flow hash; the same on every NE that shares its traffic.
    pub seed: u64,
    /// Identifies this entry in flow records; [`UDP_CLASS`] is set unless the protocol is TCP.
    pub id: u16,
    /// [`ALWAYS_TRACKED`] or [`UNTRACKED`], or neither.
    pub flags: u16,
    /// Index of the farm.
    pub farm: u16,
    /// Index in [`names::VIPS6`] of an IPv6 VIP; else 0.
    pub vip: u16,
}

impl Service {
    /// The first eight bytes, by which the packet path finds the entry.
    pub const fn key(&self) -> u64 {
        let ([a, b, c, d], [e, f]) = (self.address, self.port);
        u64::from_ne_bytes([a, b, c, d, e, f, self.protocol, self.state])
    }
}

/// In [`Service::state`]: one of the VIPs whose servers' replies from this port may pass here (layer 3). `address` is its number
/// among those of the port, from 0 on in the host's order; `slots_base` is the VIP, as it stands in a header; the rest is 0.
pub const REPLY: u8 = 2;
/// In [`Service::state`]: `address` is a VIP, whatever the protocol and port, which are 0 like the rest but for `flags`.
pub const VIP: u8 = 3;
/// In the flags of a [`VIP`]: ICMP echo to it is dropped.
pub const NO_ECHO: u16 = 1;
/// In [`Service::state`]: a service of a farm that intercepts. `address` is 0; [`AddressSet`] says whose packets it takes.
pub const INTERCEPT: u8 = 4;
/// In [`Service::state`]: a service at an IPv6 VIP. `address` is the VIP's fold; a packet is for it only if it has the VIP's address.
pub const SERVICE6: u8 = 5;
/// In [`Service::state`]: [`REPLY`] of IPv6. `address` is the number; `vip` says which VIP; `slots_base` is 0.
pub const REPLY6: u8 = 6;
/// In [`Service::state`]: [`VIP`] of IPv6. `address` is its fold, `vip` says which.
pub const VIP6: u8 = 7;
/// In [`Service::state`]: [`INTERCEPT`] of IPv6.
pub const INTERCEPT6: u8 = 8;
/// VIPs of one protocol and port whose servers may ask for layer 3: a reply looks at each of them.
pub const REPLY_VIPS: u32 = 16;
/// In [`Service::id`]: records of this service count against the quota of flows that show no beginning.
pub const UDP_CLASS: u16 = 0x8000;
/// In [`Service::flags`]: every flow is recorded, whatever its slot says (UDP and other protocols, layer 3).
pub const ALWAYS_TRACKED: u16 = 1;
/// In [`Service::flags`]: no flow is ever recorded; every packet goes where the slot table says (UDP, opted out).
pub const UNTRACKED: u16 = 2;

/// An IPv6 address.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Address6 {
    /// As it stands in a header.
    pub bytes: [u8; 16],
}

/// One bucket of the service table.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceBucket {
    /// In no order; free ones in between.
    pub entries: [Service; SERVICES_PER_BUCKET],
}

/// One slot, one aligned 8-byte word; see [`SlotWord`](crate::slot::SlotWord).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Server id that new flows go to (24 bits).
    pub owner: u32,
    /// Server id that unrecorded flows began with, 0 if none: 24 bits, least significant byte first.
    pub legacy: [u8; 3],
    /// 1: TRACKED, some flow of this slot may be on record. 2: COLLECTING, user space is looking whether one is.
    pub flags: u8,
}

/// One server id: where its packets go, and whose it is.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Server {
    /// Next hop's MAC address.
    pub mac: [u8; 6],
    /// [`ALIVE`], [`ACCEPTS`], [`REACHABLE`], and the forwarding type from bit [`FORWARDING_SHIFT`] on. The first eight bytes are
    /// changed in one store.
    pub flags: u8,
    /// Index in [`names::PORTS`] of the interface that leads to the next hop.
    pub port: u8,
    /// The SE's address, IPv4 in its IPv6-mapped form.
    pub address: [u8; 16],
    /// Index of the farm.
    pub farm: u16,
    /// Destination port of the service (host byte order).
    pub service_port: u16,
    /// IP protocol of the service.
    pub protocol: u8,
    /// Forwarding type: 1 layer 2, 2 GRE, 3 layer 3 (draft §5.6.1).
    pub forwarding: u8,
    /// Number of the SE, the same in all of its records; exceptions name it. 0: none names it.
    pub host: u16,
    /// Source address of the outer header of GRE: this host's, IPv4 in its IPv6-mapped form.
    pub source: [u8; 16],
    /// Longest IP packet that gets to the server whole, in bytes, an outer header included. 0: not known.
    pub mtu: u16,
    /// 0.
    pub reserved: [u8; 14],
}

/// In [`Server::flags`]: its host is not known to be gone, flows on record may go there.
pub const ALIVE: u8 = 1;
/// In [`Server::flags`]: new flows may go there.
pub const ACCEPTS: u8 = 2;
/// In [`Server::flags`]: `mac` and `port` are known.
pub const REACHABLE: u8 = 4;
/// In [`Server::flags`]: from this bit on stands [`Server::forwarding`], so that one word says how a packet leaves. 0 is layer 2.
pub const FORWARDING_SHIFT: u32 = 4;
/// In [`Server::forwarding`].
pub const LAYER_2: u8 = 1;
/// In [`Server::forwarding`].
pub const GRE: u8 = 2;
/// In [`Server::forwarding`].
pub const LAYER_3: u8 = 3;

/// Per CPU and server id.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerStats {
    /// Packets sent to it.
    pub packets: u64,
    /// Bytes of them, from the Ethernet header on.
    pub bytes: u64,
    /// New flows: first TCP SYNs, retransmitted ones too, and new records of other protocols.
    pub flows: u64,
    /// Packets from it that were given the VIP's address (layer 3).
    pub replies: u64,
}

/// One interface.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Port {
    /// Its own MAC address.
    pub mac: [u8; 6],
    /// 0.
    pub reserved: u16,
    /// Its index.
    pub ifindex: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// ICMP errors that this CPU may still send.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowance {
    /// When it was last reckoned up, in nanoseconds of the kernel's monotonic clock.
    pub reckoned: u64,
    /// How many.
    pub left: u64,
}

/// A program that another one hands a frame over to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// What comes seldom.
    Rare,
    /// What of it has ports.
    Ports,
    /// What is for no VIP, if some farm intercepts.
    Crossing,
    /// IPv6.
    Six,
    /// What comes seldom of it.
    SixRare,
    /// What of that has ports.
    SixPorts,
    /// What of IPv6 is for no VIP, if some farm intercepts it.
    SixCrossing,
}

/// Entries of [`names::STAGES`].
pub const MAX_STAGES: u32 = Stage::ALL.len() as u32 * MAX_PORTS;

impl Stage {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Rare, Self::Ports, Self::Crossing, Self::Six, Self::SixRare, Self::SixPorts, Self::SixCrossing];

    /// The program's name.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Rare => "necp_rare",
            Self::Ports => "necp_ports",
            Self::Crossing => "necp_crossing",
            Self::Six => "necp_six",
            Self::SixRare => "necp_six_rare",
            Self::SixPorts => "necp_six_ports",
            Self::SixCrossing => "necp_six_cross",
        }
    }

    /// Its place in [`names::STAGES`], for the interface with this index in [`names::PORTS`].
    #[inline(always)]
    pub const fn index(self, port: u32) -> u32 {
        port * Self::ALL.len() as u32 + self as u32
    }
}

/// A set of addresses that [`names::CROSSINGS`] and [`names::CROSSINGS6`] hold as prefixes: the first four bytes of their keys. The
/// address follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AddressSet(pub [u8; 4]);

/// Prefixes of all sets together, of one family.
pub const MAX_CROSSINGS: u32 = 16_384;

impl AddressSet {
    /// This host's own: what is for it is never intercepted.
    pub const OWN: Self = Self([1, 0, 0, 0]);

    /// Destinations that this farm intercepts.
    #[inline(always)]
    pub const fn intercepted(farm: u32) -> Self {
        Self([2, 0, (farm >> 8) as u8, farm as u8])
    }

    /// Sources that it does not: who may be one of its servers.
    #[inline(always)]
    pub const fn servers(farm: u32) -> Self {
        Self([3, 0, (farm >> 8) as u8, farm as u8])
    }
}

/// Datagrams whose parts are on their way at once; the oldest are forgotten first.
pub const MAX_FRAGMENTS: u32 = 16_384;
/// ICMP errors that one CPU sends in a second, in the long run.
pub const ICMP_RATE: u64 = 1000;
/// ICMP errors that one CPU sends at once.
pub const ICMP_BURST: u64 = 100;

/// One entry of the flow table; see [`FlowWord`](crate::flows::FlowWord).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// The client's address.
    pub source: [u8; 4],
    /// The client's port.
    pub source_port: [u8; 2],
    /// [`Service::id`] (host byte order).
    pub service: u16,
    /// Bits 0–1 state (1 candidate, 2 record, 3 being written), 2 closing, 3–7 age, 8–26 server id, 27 there only because
    /// its slot has a legacy, 28–31 length of the SYN's data.
    pub state: u32,
    /// Initial sequence number of the SYN that this was made from, 0 if it was made from another packet.
    pub isn: u32,
}

/// One bucket of the flow table.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowBucket {
    /// In no order; free ones in between.
    pub entries: [Flow; FLOWS_PER_BUCKET],
}

/// What the exceptions of one farm look at: one lookup for each mask.
///
/// Written by user space only, each mask in one store.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExceptionMasks {
    /// One more than the index of the last mask in use; 0: the farm has no exceptions.
    pub count: u32,
    /// 0.
    pub reserved: u32,
    /// In no order; unused ones in between.
    pub masks: [ExceptionMask; EXCEPTION_MASKS],
}

/// What an exception looks at.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExceptionMask {
    /// Length of the source's prefix, 0–32, of IPv6 0–128.
    pub source_len: u8,
    /// Length of the destination's prefix, likewise.
    pub destination_len: u8,
    /// 1: the IP protocol counts. 0: any.
    pub protocol: u8,
    /// 1: the destination port counts. 0: any.
    pub port: u8,
    /// [`OF_IPV4`] or [`OF_IPV6`]: there are exceptions of this family with this mask. 0: this is free.
    pub used: u8,
    /// 0.
    pub reserved: [u8; 3],
}

/// In [`ExceptionMask::used`].
pub const OF_IPV4: u8 = 1;
/// In [`ExceptionMask::used`].
pub const OF_IPV6: u8 = 2;

/// Flows that servers do not want (draft §5.7); see [`ExceptionWords`](crate::exceptions::ExceptionWords).
///
/// Written by user space only: the second eight bytes last, and first when the record goes.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exception {
    /// Source address; bits that the mask does not look at are 0, here and below. Of IPv6 this and the destination are a digest of
    /// both addresses, see [`name6`](crate::exceptions::name6).
    pub source: [u8; 4],
    /// Destination address.
    pub destination: [u8; 4],
    /// Index of the farm.
    pub farm: u16,
    /// Destination port.
    pub port: [u8; 2],
    /// IP protocol.
    pub protocol: u8,
    /// Index in [`ExceptionMasks::masks`] of its farm.
    pub mask: u8,
    /// 0: this record is free. [`EXCEPTION_LOCAL`], or [`EXCEPTION_GLOBAL`]: some SE wants it cut through.
    pub state: u8,
    /// 0.
    pub reserved: u8,
    /// [`Server::host`] of the SEs that do not want it themselves; 0: none.
    pub installers: [u16; EXCEPTION_INSTALLERS],
}

/// In [`Exception::state`]: its installers do not want it.
pub const EXCEPTION_LOCAL: u8 = 1;
/// In [`Exception::state`]: no server of the farm is to have it.
pub const EXCEPTION_GLOBAL: u8 = 2;

/// One bucket of the exceptions' index.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExceptionBucket {
    /// In no order; free ones in between.
    pub entries: [ExceptionPlace; EXCEPTIONS_PER_BUCKET],
    /// Exceptions that would be in this bucket if it had had room: they are in the next one of their sequence, or further.
    pub passed: u64,
}

/// Where an exception is.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExceptionPlace {
    /// One more than its index in [`names::EXCEPTIONS`]; 0: this entry is free.
    pub record: u32,
    /// Part of its hash; no two entries of a bucket have the same.
    pub tag: u32,
}

/// What the pinned maps were created with.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// [`LAYOUT_VERSION`].
    pub version: u32,
    /// Capacity of `slots`.
    pub slots: u32,
    /// Number of buckets of `flows`.
    pub flow_buckets: u32,
    /// Number of records of `exceptions`; that of the buckets of their index follows ([`exception_buckets`]).
    pub exceptions: u32,
    /// Seed of the exceptions' hash.
    pub exception_seed: u64,
}

const _: () = {
    assert!(size_of::<Service>() == 32);
    assert!(size_of::<ServiceBucket>() == 128);
    assert!(size_of::<Slot>() == 8);
    assert!(size_of::<Address6>() == 16);
    assert!(MAX_FARMS <= 1 << 16 && MAX_VIPS6 <= 1 << 16 && MAX_SERVERS <= 1 << 24);
    assert!(size_of::<Server>() == 64);
    assert!(size_of::<ServerStats>() == 32);
    assert!(size_of::<Allowance>() == 16);
    assert!(size_of::<Port>() == 16);
    assert!(size_of::<Flow>() == 16);
    assert!(size_of::<FlowBucket>() == 64);
    assert!(size_of::<ExceptionMask>() == 8);
    assert!(size_of::<ExceptionMasks>() == 8 + 8 * EXCEPTION_MASKS);
    assert!(size_of::<Exception>() == 32);
    assert!(size_of::<ExceptionPlace>() == 8);
    assert!(size_of::<ExceptionBucket>() == 64);
    assert!(size_of::<Layout>() == 24);
    assert!(SERVICE_BUCKETS.is_power_of_two() && DEFAULT_FLOW_BUCKETS.is_power_of_two());
};
