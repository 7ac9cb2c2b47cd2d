//! The packet path's counters, summed over CPUs.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use aya::{
    maps::{Map, MapData, PerCpuArray},
    util::nr_cpus,
};
use necp_ebpf::{
    abi::{ServerStats, names},
    verdict::{REASONS, Reason},
};

use super::{Plane, PlaneError};

/// A shared record as aya wants it.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(super) struct Pod<T>(pub(super) T);

// SAFETY: the shared records are plain old data without padding.
unsafe impl<T: Copy + 'static> aya::Pod for Pod<T> {}

pub(super) fn open_map(pin: &Path, name: &str) -> Result<Map, PlaneError> {
    let what = || format!("opening the pinned map `{name}`");
    let data = MapData::from_pin(pin.join(name)).map_err(PlaneError::bpf(what()))?;
    Map::from_map_data(data).map_err(PlaneError::bpf(what()))
}

/// The counter maps.
pub(super) struct Counters {
    reasons: PerCpuArray<MapData, u64>,
    servers: ServerMap,
}

/// `server_stats`, read as a whole: with tens of thousands of servers a call for each would take a tenth of a second.
struct ServerMap {
    map: MapData,
    entries: usize,
    cpus: usize,
}

impl Counters {
    pub(super) fn open(pin: &Path) -> Result<Self, PlaneError> {
        let reasons =
            open_map(pin, names::REASONS)?.try_into().map_err(PlaneError::bpf("opening the map `reasons`"))?;
        Ok(Self { reasons, servers: ServerMap::open(pin)? })
    }
}

/// linux/bpf.h, `enum bpf_cmd`.
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;

/// linux/bpf.h, `union bpf_attr`, the part of [`BPF_MAP_LOOKUP_BATCH`].
#[repr(C)]
struct LookupBatch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

impl ServerMap {
    fn open(pin: &Path) -> Result<Self, PlaneError> {
        let what = || "opening the map `server_stats`";
        let map = MapData::from_pin(pin.join(names::SERVER_STATS)).map_err(PlaneError::bpf(what()))?;
        let info = map.info().map_err(PlaneError::bpf(what()))?;
        if info.value_size() as usize != size_of::<ServerStats>() {
            return Err(PlaneError::io(what())(io::Error::new(
                io::ErrorKind::InvalidData,
                "its values have another size",
            )));
        }
        let cpus = nr_cpus().map_err(|(_, error)| PlaneError::io("counting CPUs")(error))?;
        Ok(Self { map, entries: info.max_entries() as usize, cpus })
    }

    /// The first entries, those of all CPUs one after the other; at most so many as there are.
    fn read(&self, count: usize) -> io::Result<Vec<ServerStats>> {
        let count = count.min(self.entries);
        // The kernel takes a value for each possible CPU, of a multiple of eight bytes, as these are.
        let mut values = vec![ServerStats::default(); count * self.cpus];
        let (mut keys, mut out_batch) = (vec![0_u32; count], 0_u32);
        if count == 0 {
            return Ok(values);
        }
        let mut call = LookupBatch {
            in_batch: 0,
            out_batch: std::ptr::from_mut(&mut out_batch) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: count as u32,
            map_fd: self.map.fd().as_fd().as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel writes `count` keys and values at most, which there is room for, and the two words named above.
        let outcome = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, std::ptr::from_mut(&mut call), size_of::<LookupBatch>())
        };
        match outcome {
            0 if call.count as usize == count => Ok(values),
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "not all of it came")),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Plane {
    /// Packets by [`Reason`], since the maps were created.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn reasons(&self) -> Result<[u64; REASONS as usize], PlaneError> {
        let mut sums = [0; REASONS as usize];
        for (reason, sum) in sums.iter_mut().enumerate() {
            *sum = self.packets(reason as u32)?;
        }
        Ok(sums)
    }

    /// Packets that have met a full flow table, since the maps were created.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn unrecorded(&self) -> Result<u64, PlaneError> {
        Ok(self.packets(Reason::Legacy as u32)? + self.packets(Reason::NewUnrecorded as u32)?)
    }

    fn packets(&self, reason: u32) -> Result<u64, PlaneError> {
        let values = self.counters.reasons.get(&reason, 0).map_err(PlaneError::bpf("reading the map `reasons`"))?;
        Ok(values.iter().sum())
    }

    /// What each server id below this one got, since the maps were created.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn server_stats(&self, below: u32) -> Result<Vec<ServerStats>, PlaneError> {
        let servers = &self.counters.servers;
        let values = servers.read(below as usize).map_err(PlaneError::io("reading the map `server_stats`"))?;
        let sum = |cpus: &[ServerStats]| {
            cpus.iter().fold(ServerStats::default(), |sum, cpu| ServerStats {
                packets: sum.packets + cpu.packets,
                bytes: sum.bytes + cpu.bytes,
                flows: sum.flows + cpu.flows,
                replies: sum.replies + cpu.replies,
            })
        };
        Ok(values.chunks_exact(servers.cpus).map(sum).collect())
    }
}
