//! The packet path's counters, summed over CPUs.

use std::path::Path;

use aya::maps::{Map, MapData, PerCpuArray};
use necp_ebpf::{
    abi::{ServerStats, names},
    verdict::REASONS,
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
    servers: PerCpuArray<MapData, Pod<ServerStats>>,
}

impl Counters {
    pub(super) fn open(pin: &Path) -> Result<Self, PlaneError> {
        let reasons =
            open_map(pin, names::REASONS)?.try_into().map_err(PlaneError::bpf("opening the map `reasons`"))?;
        let servers = open_map(pin, names::SERVER_STATS)?
            .try_into()
            .map_err(PlaneError::bpf("opening the map `server_stats`"))?;
        Ok(Self { reasons, servers })
    }
}

impl Plane {
    /// Packets by [`Reason`](necp_ebpf::verdict::Reason), since the maps were created.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn reasons(&self) -> Result<[u64; REASONS as usize], PlaneError> {
        let mut sums = [0; REASONS as usize];
        for (reason, sum) in sums.iter_mut().enumerate() {
            let values =
                self.counters.reasons.get(&(reason as u32), 0).map_err(PlaneError::bpf("reading the map `reasons`"))?;
            *sum = values.iter().sum();
        }
        Ok(sums)
    }

    /// What each of these server ids got, since the maps were created.
    ///
    /// # Errors
    /// If the map cannot be read, or an id is out of range.
    pub fn server_stats(&self, ids: &[u32]) -> Result<Vec<ServerStats>, PlaneError> {
        let read = |id: &u32| {
            let values = self.counters.servers.get(id, 0).map_err(PlaneError::bpf("reading the map `server_stats`"))?;
            Ok(values.iter().fold(ServerStats::default(), |sum, Pod(cpu)| ServerStats {
                packets: sum.packets + cpu.packets,
                bytes: sum.bytes + cpu.bytes,
                flows: sum.flows + cpu.flows,
                replies: sum.replies + cpu.replies,
            }))
        };
        ids.iter().map(read).collect()
    }
}
