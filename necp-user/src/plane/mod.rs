//! The kernel side: the only place that names aya, netlink and raw sockets.
//!
//! [`Plane`] is one loaded instance of the packet path: its maps, pinned in a directory of their own, and the program on
//! every interface. Maps and links outlive the process; the next daemon takes them over.

mod attach;
mod counters;
mod crossings;
pub mod decap;
pub mod host_address;
pub mod host_routing;
mod load;
mod memory;
pub mod neighbours;
pub mod path_mtu;
#[cfg(test)]
pub(crate) mod throwaway_netns;

use std::{
    io,
    path::{Path, PathBuf},
};

use aya_log::EbpfLogger;
use log::Log;
use necp_ebpf::{abi::Layout, host::View};

pub use attach::{AttachMode, AttachedMode, attached, unload};
#[doc(hidden)]
pub use load::enter_stages;

/// The kernel program, as `build.rs` left it.
pub static PROGRAM: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/necp"));

/// The wrapper of `cargo xtask bench`; nothing in the product refers to it, so no product binary holds it.
#[doc(hidden)]
pub static BENCH_WRAPPER: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/necp-bench-wrapper"));

/// What [`Plane::open`] needs to know.
#[derive(Clone, Debug)]
pub struct PlaneConfig {
    /// Directory of the pins, on a BPF file system; one for each instance.
    pub pin: PathBuf,
    /// Names of the interfaces to attach to, at most [`MAX_PORTS`](necp_ebpf::abi::MAX_PORTS).
    pub interfaces: Vec<String>,
    /// How to attach.
    pub mode: AttachMode,
    /// Slots that are needed, 8 bytes each; the map has at least [`DEFAULT_SLOTS`](necp_ebpf::abi::DEFAULT_SLOTS).
    pub slots: u32,
    /// Buckets of the flow table, four flows and 64 bytes each; a power of two.
    pub flow_buckets: u32,
    /// Records of exceptions that are needed, 32 bytes each and about half of that for their index
    /// ([`exception_records`](necp_ebpf::abi::exception_records)).
    pub exceptions: u32,
    /// Whether servers may ask for layer 3: then packets that are no VIP's may be replies.
    pub replies: bool,
    /// Whether some farm intercepts: then packets that are no VIP's may be for it.
    pub intercepts: bool,
    /// The same of IPv6.
    pub intercepts6: bool,
}

/// One interface of a [`Plane`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortInfo {
    /// Its number in server records.
    pub index: u8,
    /// Its name.
    pub name: String,
    /// Its kernel index.
    pub ifindex: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its MTU in bytes.
    pub mtu: u32,
    /// How the program is attached to it.
    pub mode: AttachedMode,
}

/// Why the packet path is not there.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// The pin directory cannot hold pins.
    #[error(
        "{0} is not on a BPF file system: mount one with `mount -t bpf bpf /sys/fs/bpf`, or set `pin` to a directory on one"
    )]
    NotBpffs(PathBuf),
    /// There is no such interface.
    #[error("there is no interface {0}: see `ip link`, and `interfaces` in the configuration")]
    NoInterface(String),
    /// Too many interfaces.
    #[error("{0} interfaces are too many: at most {max}", max = necp_ebpf::abi::MAX_PORTS)]
    TooManyInterfaces(usize),
    /// The number of flow buckets is not a power of two.
    #[error("{0} flow buckets: the number must be a power of two")]
    FlowBuckets(u32),
    /// A file or a system call.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel refused the program or a map.
    #[error("{what}: {source:#}; it needs root (or CAP_BPF and CAP_NET_ADMIN) and Linux 5.18 or newer")]
    Bpf {
        /// What was being done.
        what: String,
        /// What aya said.
        source: anyhow::Error,
    },
}

impl PlaneError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        |source| Self::Io { what: what.into(), source }
    }

    fn bpf<E: Into<anyhow::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        |source| Self::Bpf { what: what.into(), source: source.into() }
    }
}

/// The packet path of one instance.
pub struct Plane {
    config: PlaneConfig,
    layout: Layout,
    reused: bool,
    memory: memory::Memory,
    counters: counters::Counters,
    crossings: crossings::Crossings,
    ports: Vec<load::LoadedPort>,
}

impl Plane {
    /// Loads the packet path and attaches it, or takes over what an earlier daemon left in the pin directory.
    ///
    /// # Errors
    /// See [`PlaneError`]; interfaces that were attached to before stay so.
    pub fn open(config: &PlaneConfig) -> Result<Self, PlaneError> {
        if config.interfaces.len() > necp_ebpf::abi::MAX_PORTS as usize {
            return Err(PlaneError::TooManyInterfaces(config.interfaces.len()));
        }
        if !config.flow_buckets.is_power_of_two() {
            return Err(PlaneError::FlowBuckets(config.flow_buckets));
        }
        load::prepare_pin_directory(&config.pin)?;
        let (layout, reused) = load::agree_on_layout(config)?;
        let mut ports = Vec::new();
        for (index, name) in config.interfaces.iter().enumerate() {
            ports.push(load::load_port(config, &layout, index as u32, name)?);
        }
        if config.interfaces.is_empty() {
            load::load_maps(config, &layout)?;
        }
        load::write_layout(&config.pin, &layout)?;
        attach::detach_others(&config.pin, &ports)?;
        let memory = memory::Memory::map(&config.pin, &layout)?;
        let counters = counters::Counters::open(&config.pin)?;
        let crossings = crossings::Crossings::open(&config.pin)?;
        Ok(Self { config: config.clone(), layout, reused, memory, counters, crossings, ports })
    }

    /// Whether the maps are those of an earlier daemon: its servers and flows are in them.
    pub fn reused(&self) -> bool {
        self.reused
    }

    /// What the maps were created with.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The directory of the pins.
    pub fn pin(&self) -> &Path {
        &self.config.pin
    }

    /// The tables, as memory.
    pub fn view(&self) -> View<'_> {
        self.memory.view()
    }

    /// The interfaces.
    pub fn ports(&self) -> Vec<PortInfo> {
        self.ports.iter().map(|port| port.info.clone()).collect()
    }

    /// Reads an interface's MAC address and MTU again and, if they have changed, replaces the program on it; false if not.
    ///
    /// # Errors
    /// See [`PlaneError`]; the old program stays then.
    pub fn refresh_port(&mut self, ifindex: u32) -> Result<bool, PlaneError> {
        let Some(place) = self.ports.iter().position(|port| port.info.ifindex == ifindex) else { return Ok(false) };
        let old = &self.ports[place].info;
        let (mac, mtu) = load::interface_facts(&old.name)?;
        if (mac, mtu) == (old.mac, old.mtu) {
            return Ok(false);
        }
        let (index, name) = (old.index as u32, old.name.clone());
        self.ports[place] = load::load_port(&self.config, &self.layout, index, &name)?;
        Ok(true)
    }

    /// Writes what the kernel program had to say since the last call to the log.
    pub fn flush_logs(&mut self) {
        for port in &mut self.ports {
            if let Some(logger) = &mut port.logger {
                logger.flush();
            }
        }
    }

    /// Ends this daemon's part. With `leave`, maps and programs stay as they are for the next one; else all of it goes.
    ///
    /// # Errors
    /// If a pin cannot be removed.
    pub fn close(self, leave: bool) -> Result<(), PlaneError> {
        let pin = self.config.pin.clone();
        drop(self);
        if leave { Ok(()) } else { attach::remove_all(&pin) }
    }
}

/// The name of an interface.
///
/// # Errors
/// If there is none with this index of the kernel's.
pub fn interface_name(ifindex: u32) -> io::Result<String> {
    let mut name = [0; libc::IFNAMSIZ];
    // SAFETY: the buffer is as long as the call demands.
    let found = unsafe { libc::if_indextoname(ifindex, name.as_mut_ptr()) };
    if found.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has written a C string.
    Ok(unsafe { std::ffi::CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
}

/// The kernel program's own messages, through the `log` crate.
type KernelLog = EbpfLogger<&'static dyn Log>;
