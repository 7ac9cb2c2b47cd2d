//! The tables as memory of this process.

use std::{io, os::fd::AsFd as _, os::fd::AsRawFd as _, path::Path, ptr::NonNull};

use aya::maps::MapData;
use necp_ebpf::{
    abi::{
        Address6, Exception, ExceptionBucket, ExceptionMasks, FlowBucket, Layout, Server, ServiceBucket, Slot, names,
    },
    exceptions::{ExceptionBucketWords, ExceptionMasksWords, ExceptionWords},
    flows::FlowBucketWords,
    host::{ExceptionTables, View, VipWords},
    word::Word,
};

use super::PlaneError;

/// The mapped tables.
pub(super) struct Memory {
    services: Mapping,
    slots: Mapping,
    servers: Mapping,
    flows: Mapping,
    vips6: Mapping,
    exception_masks: Mapping,
    exception_index: Mapping,
    exceptions: Mapping,
    exception_seed: u64,
}

impl Memory {
    /// Maps the pinned maps.
    pub(super) fn map(pin: &Path, layout: &Layout) -> Result<Self, PlaneError> {
        Ok(Self {
            services: Mapping::new::<ServiceBucket>(pin, names::SERVICES)?,
            slots: Mapping::new::<Slot>(pin, names::SLOTS)?,
            servers: Mapping::new::<Server>(pin, names::SERVERS)?,
            flows: Mapping::new::<FlowBucket>(pin, names::FLOWS)?,
            vips6: Mapping::new::<Address6>(pin, names::VIPS6)?,
            exception_masks: Mapping::new::<ExceptionMasks>(pin, names::EXCEPTION_MASKS)?,
            exception_index: Mapping::new::<ExceptionBucket>(pin, names::EXCEPTION_INDEX)?,
            exceptions: Mapping::new::<Exception>(pin, names::EXCEPTIONS)?,
            exception_seed: layout.exception_seed,
        })
    }

    pub(super) fn view(&self) -> View<'_> {
        let Self { services, slots, servers, flows, vips6, .. } = self;
        // SAFETY: the mappings live as long as `self`, have these types' sizes and alignments, and words are shared by atomic
        // accesses only; the sizes of the flow map and of the exceptions' index are powers of two, which `load` sees to.
        unsafe {
            View::new(
                NonNull::slice_from_raw_parts(services.address.cast(), services.entries),
                slots.words::<Word>(),
                NonNull::slice_from_raw_parts(servers.address.cast(), servers.entries),
                flows.words::<FlowBucketWords>(),
                vips6.words::<VipWords>(),
                ExceptionTables {
                    masks: self.exception_masks.words::<ExceptionMasksWords>(),
                    index: self.exception_index.words::<ExceptionBucketWords>(),
                    records: self.exceptions.words::<ExceptionWords>(),
                    seed: self.exception_seed,
                },
            )
        }
    }
}

/// One array map in memory, as long as this lives.
struct Mapping {
    address: NonNull<u8>,
    length: usize,
    entries: usize,
}

// SAFETY: it owns the mapping; what it points to is shared as `View` says.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new<V>(pin: &Path, name: &str) -> Result<Self, PlaneError> {
        let what = || format!("mapping the map `{name}` into memory");
        let map = MapData::from_pin(pin.join(name)).map_err(PlaneError::bpf(what()))?;
        let info = map.info().map_err(PlaneError::bpf(what()))?;
        if info.value_size() as usize != size_of::<V>() {
            let text = format!("its values have {} bytes instead of {}", info.value_size(), size_of::<V>());
            return Err(PlaneError::io(what())(io::Error::new(io::ErrorKind::InvalidData, text)));
        }
        let entries = info.max_entries() as usize;
        let length = entries * size_of::<V>();
        // SAFETY: a new shared mapping of the map's values, which the kernel keeps while it exists.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        match NonNull::new(address.cast()).filter(|_| address != libc::MAP_FAILED) {
            Some(address) => Ok(Self { address, length, entries }),
            None => Err(PlaneError::io(what())(io::Error::last_os_error())),
        }
    }
}

impl Mapping {
    /// # Safety
    /// `W` must have the size of the map's values and consist of [`Word`]s.
    unsafe fn words<W>(&self) -> &[W] {
        // SAFETY: the mapping lives as long as `self` and has so many values of this size; pages are aligned for any type.
        unsafe { std::slice::from_raw_parts(self.address.cast::<W>().as_ptr(), self.entries) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody has a reference to it any more.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.length) };
    }
}
