//! Loading the program for an interface, and the maps that all interfaces and the next daemon share.

use std::{ffi::CString, fs, io, os::unix::ffi::OsStrExt as _, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, DevMap, MapData, ProgramArray, xdp::DevMapHash},
    programs::Xdp,
};
use aya_log::EbpfLogger;
use necp_ebpf::abi::{DEFAULT_SLOTS, LAYOUT_VERSION, Layout, MAX_PORTS, Port, Stage, exception_buckets, names};

use super::{
    KernelLog, PROGRAM, PlaneConfig, PlaneError, PortInfo, attach,
    counters::{Pod, open_map},
};

/// `BPF_FS_MAGIC`, from `linux/magic.h`.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// An interface with the program on it.
pub(super) struct LoadedPort {
    pub(super) info: PortInfo,
    /// Keeps the program's own maps.
    _program: Ebpf,
    pub(super) logger: Option<KernelLog>,
}

/// Creates the directory if need be, and checks that it can hold pins.
pub(super) fn prepare_pin_directory(pin: &Path) -> Result<(), PlaneError> {
    fs::create_dir_all(pin).map_err(PlaneError::io(format!("creating {}", pin.display())))?;
    let path = CString::new(pin.as_os_str().as_bytes()).map_err(|_| PlaneError::NotBpffs(pin.into()))?;
    // SAFETY: statfs is plain old data, and filled by the call below before it is read.
    let mut facts: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call.
    if unsafe { libc::statfs(path.as_ptr(), &mut facts) } != 0 {
        return Err(PlaneError::io(format!("looking at {}", pin.display()))(io::Error::last_os_error()));
    }
    if facts.f_type as i64 == BPF_FS_MAGIC { Ok(()) } else { Err(PlaneError::NotBpffs(pin.into())) }
}

/// The layout of the maps: the pinned ones', if they can serve this configuration, else a fresh one.
pub(super) fn agree_on_layout(config: &PlaneConfig) -> Result<(Layout, bool), PlaneError> {
    let wanted = Layout {
        version: LAYOUT_VERSION,
        slots: config.slots.max(DEFAULT_SLOTS),
        flow_buckets: config.flow_buckets,
        exceptions: config.exceptions,
        exception_seed: rand::random(),
    };
    match pinned_layout(&config.pin) {
        Some(old)
            if old.version == wanted.version
                && old.flow_buckets == wanted.flow_buckets
                && old.slots >= config.slots
                && old.exceptions >= config.exceptions =>
        {
            Ok((old, true))
        }
        old => {
            if let Some(old) = old {
                tracing::warn!(?old, ?wanted, "the pinned maps are of another layout; starting with empty ones");
            }
            attach::remove_maps(&config.pin)?;
            Ok((wanted, false))
        }
    }
}

/// The layout on record, if all maps are pinned and have the sizes that it says.
fn pinned_layout(pin: &Path) -> Option<Layout> {
    let layout = Array::<_, Pod<Layout>>::try_from(open_map(pin, names::LAYOUT).ok()?).ok()?;
    let layout = layout.get(&0, 0).ok()?.0;
    let size = |name: &str| MapData::from_pin(pin.join(name)).ok()?.info().ok().map(|info| info.max_entries());
    let complete = names::PINNED.iter().all(|name| size(name).is_some());
    let sizes = size(names::SLOTS) == Some(layout.slots) && size(names::FLOWS) == Some(layout.flow_buckets);
    let sizes = sizes
        && size(names::EXCEPTIONS) == Some(layout.exceptions)
        && size(names::EXCEPTION_INDEX) == Some(exception_buckets(layout.exceptions));
    (complete && sizes).then_some(layout)
}

/// Notes what the maps were created with.
pub(super) fn write_layout(pin: &Path, layout: &Layout) -> Result<(), PlaneError> {
    let mut map = Array::<_, Pod<Layout>>::try_from(open_map(pin, names::LAYOUT)?)
        .map_err(PlaneError::bpf("opening the map `layout`"))?;
    map.set(0, Pod(*layout), 0).map_err(PlaneError::bpf("writing the map `layout`"))
}

/// Creates and pins the maps without attaching the program anywhere.
pub(super) fn load_maps(config: &PlaneConfig, layout: &Layout) -> Result<(), PlaneError> {
    load_program(config, layout, MAX_PORTS, [0; 6]).map(drop)
}

/// Loads the program for an interface, attaches it or replaces the one there, and enters the interface into the maps.
pub(super) fn load_port(
    config: &PlaneConfig,
    layout: &Layout,
    index: u32,
    name: &str,
) -> Result<LoadedPort, PlaneError> {
    let ifindex = interface_index(name)?;
    let (mac, mtu) = interface_facts(name)?;
    let mut ebpf = load_program(config, layout, index, mac)?;
    let logger = EbpfLogger::init(&mut ebpf)
        .inspect_err(|error| tracing::warn!(%error, "no messages from the kernel program"))
        .ok();
    enter_port(&config.pin, index, &Port { mac, reserved: 0, ifindex, mtu })?;
    let program: &mut Xdp = ebpf
        .program_mut(names::PROGRAM)
        .expect("the embedded object has this program")
        .try_into()
        .map_err(PlaneError::bpf("finding the program"))?;
    program.load().map_err(PlaneError::bpf("loading the program"))?;
    enter_stages(&mut ebpf, &config.pin, index)?;
    let program: &mut Xdp = ebpf
        .program_mut(names::PROGRAM)
        .expect("the embedded object has this program")
        .try_into()
        .map_err(PlaneError::bpf("finding the program"))?;
    let mode = attach::attach(program, &config.pin, name, ifindex, config.mode)?;
    let info = PortInfo { index: index as u8, name: name.into(), ifindex, mac, mtu, mode };
    Ok(LoadedPort { info, _program: ebpf, logger })
}

/// The object with its maps, of which the shared ones are pinned or taken from their pins; the program is not loaded yet.
fn load_program(config: &PlaneConfig, layout: &Layout, index: u32, mac: [u8; 6]) -> Result<Ebpf, PlaneError> {
    let [a, b, c, d, e, f] = mac;
    let mac = u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]);
    let mask = layout.flow_buckets - 1;
    let exception_buckets = exception_buckets(layout.exceptions);
    let exception_mask = exception_buckets - 1;
    let [replies, intercepts, intercepts6] = [config.replies, config.intercepts, config.intercepts6].map(u32::from);
    let mut loader = EbpfLoader::new();
    loader
        .override_global(names::PORT_INDEX, &index, true)
        .override_global(names::PORT_MAC, &mac, true)
        .override_global(names::FLOW_MASK, &mask, true)
        .override_global(names::EXCEPTION_BUCKET_MASK, &exception_mask, true)
        .override_global(names::EXCEPTION_SEED, &layout.exception_seed, true)
        .override_global(names::REPLIES, &replies, true)
        .override_global(names::INTERCEPTS, &intercepts, true)
        .override_global(names::INTERCEPTS6, &intercepts6, true)
        .map_max_entries(names::SLOTS, layout.slots)
        .map_max_entries(names::FLOWS, layout.flow_buckets)
        .map_max_entries(names::EXCEPTIONS, layout.exceptions)
        .map_max_entries(names::EXCEPTION_INDEX, exception_buckets);
    for name in names::PINNED {
        loader.map_pin_path(name, config.pin.join(name));
    }
    loader.load(PROGRAM).map_err(PlaneError::bpf("creating the maps"))
}

/// Loads the programs that the one of the interface with this index hands over to. Public to the tests' kernel.
#[doc(hidden)]
pub fn enter_stages(ebpf: &mut Ebpf, pin: &Path, index: u32) -> Result<(), PlaneError> {
    let mut stages =
        ProgramArray::try_from(open_map(pin, names::STAGES)?).map_err(PlaneError::bpf("opening the map `stages`"))?;
    for stage in Stage::ALL {
        let what = || format!("loading the program {}", stage.program());
        let program: &mut Xdp = ebpf
            .program_mut(stage.program())
            .expect("the embedded object has this program")
            .try_into()
            .map_err(PlaneError::bpf(what()))?;
        program.load().map_err(PlaneError::bpf(what()))?;
        let descriptor = program.fd().map_err(PlaneError::bpf(what()))?;
        let place = stage.index(index);
        stages.set(place, descriptor, 0).map_err(PlaneError::bpf("writing the map `stages`"))?;
    }
    Ok(())
}

fn enter_port(pin: &Path, index: u32, port: &Port) -> Result<(), PlaneError> {
    let mut ports = Array::<_, Pod<Port>>::try_from(open_map(pin, names::PORTS)?)
        .map_err(PlaneError::bpf("opening the map `ports`"))?;
    ports.set(index, Pod(*port), 0).map_err(PlaneError::bpf("writing the map `ports`"))?;
    let mut targets =
        DevMap::try_from(open_map(pin, names::TX_PORTS)?).map_err(PlaneError::bpf("opening the map `tx_ports`"))?;
    targets.set(index, port.ifindex, None, 0).map_err(PlaneError::bpf("writing the map `tx_ports`"))?;
    let mut links =
        DevMapHash::try_from(open_map(pin, names::TX_LINKS)?).map_err(PlaneError::bpf("opening the map `tx_links`"))?;
    links.insert(port.ifindex, port.ifindex, None, 0).map_err(PlaneError::bpf("writing the map `tx_links`"))
}

pub(super) fn interface_index(name: &str) -> Result<u32, PlaneError> {
    let missing = || PlaneError::NoInterface(name.into());
    let c_name = CString::new(name).map_err(|_| missing())?;
    // SAFETY: the name is a valid C string.
    match unsafe { libc::if_nametoindex(c_name.as_ptr()) } {
        0 => Err(missing()),
        index => Ok(index),
    }
}

/// An interface's MAC address (zeroes if it has none) and MTU.
pub(super) fn interface_facts(name: &str) -> Result<([u8; 6], u32), PlaneError> {
    let request = |call: libc::Ioctl, what: &str| {
        // SAFETY: ifreq is plain old data.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
            *to = from as libc::c_char;
        }
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").map_err(PlaneError::io("opening a socket"))?;
        // SAFETY: the request is valid, and the calls below fill it.
        let result = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), call, &mut request) };
        if result != 0 {
            return Err(PlaneError::io(format!("reading the {what} of {name}"))(io::Error::last_os_error()));
        }
        Ok(request)
    };
    let hardware = request(libc::SIOCGIFHWADDR, "MAC address")?;
    let mtu = request(libc::SIOCGIFMTU, "MTU")?;
    // SAFETY: the kernel has filled these members of the unions.
    let (mac, mtu) = unsafe { (hardware.ifr_ifru.ifru_hwaddr.sa_data, mtu.ifr_ifru.ifru_mtu) };
    let mut bytes = [0; 6];
    for (to, from) in bytes.iter_mut().zip(mac) {
        *to = from as u8;
    }
    Ok((bytes, mtu as u32))
}
