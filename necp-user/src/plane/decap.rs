//! The server's end of GRE (`necp se --decap`): a program on its interfaces that takes the outer headers off.
//!
//! The links are pinned, so that connections outlive an agent that crashes; the next one takes them over.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use aya::{Ebpf, maps::HashMap, programs::Xdp};
use necp_ebpf::decap::{MAX_SOURCES, PROGRAM as NAME, SOURCES, Source, mapped};

use super::{AttachMode, AttachedMode, PlaneError, attach, load};

/// The kernel program, as `build.rs` left it.
pub static PROGRAM: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/necp-decap"));

/// The program on some interfaces. [`Decap::remove`] takes it away; a value that is just dropped leaves it there.
#[derive(Debug)]
pub struct Decap {
    pin: PathBuf,
}

impl Decap {
    /// Puts it on these interfaces; datagrams in GRE from these addresses are unwrapped. `pin` is a directory on a BPF file
    /// system, this agent's own: what an earlier run has left there, on other interfaces, is taken away.
    ///
    /// # Errors
    /// See [`PlaneError`]; what was attached before the mistake is taken away again.
    pub fn attach(pin: &Path, interfaces: Vec<String>, sources: &[IpAddr]) -> Result<Self, PlaneError> {
        if sources.len() > MAX_SOURCES as usize {
            let many = io::Error::other(format!("at most {MAX_SOURCES} addresses may send GRE, not {}", sources.len()));
            return Err(PlaneError::io("unwrapping GRE")(many));
        }
        load::prepare_pin_directory(pin)?;
        let attached = interfaces.iter().try_for_each(|interface| {
            let mode = attach_one(pin, interface, sources)?;
            tracing::info!("GRE is unwrapped on {interface} in {mode} mode");
            Ok(())
        });
        match attached.and_then(|()| attach::detach_all_but(pin, &interfaces)) {
            Ok(()) => Ok(Self { pin: pin.into() }),
            Err(error) => {
                if let Err(second) = Self::remove_leftovers(pin) {
                    tracing::warn!("{second}");
                }
                Err(error)
            }
        }
    }

    /// Takes it away.
    ///
    /// # Errors
    /// If a pin cannot be removed.
    pub fn remove(self) -> Result<(), PlaneError> {
        Self::remove_leftovers(&self.pin)
    }

    /// Takes away what an earlier run has left there, if anything.
    ///
    /// # Errors
    /// If a pin cannot be removed.
    pub fn remove_leftovers(pin: &Path) -> Result<(), PlaneError> {
        attach::remove_all(pin)
    }
}

fn attach_one(pin: &Path, interface: &str, sources: &[IpAddr]) -> Result<AttachedMode, PlaneError> {
    let ifindex = load::interface_index(interface)?;
    let mut object = Ebpf::load(PROGRAM).map_err(PlaneError::bpf("creating the maps"))?;
    let map = object.map_mut(SOURCES).expect("the embedded object has this map");
    let mut map = HashMap::<_, Source, u64>::try_from(map).map_err(PlaneError::bpf("opening the map `sources`"))?;
    for source in sources {
        map.insert(as_in_header(*source), 0, 0).map_err(PlaneError::bpf("writing the map `sources`"))?;
    }
    let program: &mut Xdp = object
        .program_mut(NAME)
        .expect("the embedded object has this program")
        .try_into()
        .map_err(PlaneError::bpf("finding the program"))?;
    program.load().map_err(PlaneError::bpf("loading the program"))?;
    attach::attach(program, pin, interface, ifindex, AttachMode::Auto)
}

fn as_in_header(address: IpAddr) -> Source {
    match address {
        IpAddr::V4(address) => mapped(u32::from_ne_bytes(address.octets())),
        IpAddr::V6(address) => {
            let octets = address.octets();
            std::array::from_fn(|at| u32::from_ne_bytes(octets.as_chunks().0[at]))
        }
    }
}
