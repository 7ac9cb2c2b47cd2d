//! The sets of addresses that count when a packet crosses this host.

use std::{collections::BTreeSet, path::Path};

use aya::maps::{
    MapData,
    lpm_trie::{Key, LpmTrie},
};
use ipnet::IpNet;
use necp_ebpf::abi::{AddressSet, names};

use super::{Plane, PlaneError, counters::open_map};

/// The maps [`names::CROSSINGS`] and [`names::CROSSINGS6`].
pub(super) struct Crossings {
    four: Sets<8>,
    six: Sets<20>,
}

/// The sets of one family, whose keys have so many bytes.
struct Sets<const BYTES: usize> {
    name: &'static str,
    map: LpmTrie<MapData, [u8; BYTES], u32>,
}

impl Crossings {
    pub(super) fn open(pin: &Path) -> Result<Self, PlaneError> {
        Ok(Self { four: Sets::open(pin, names::CROSSINGS)?, six: Sets::open(pin, names::CROSSINGS6)? })
    }
}

impl Plane {
    /// Makes the sets contain these prefixes and no others. What is new is added before what is old goes.
    ///
    /// # Errors
    /// If a map cannot be read, or has no room; what could be added then is there.
    pub fn set_crossings(&mut self, wanted: &BTreeSet<(AddressSet, IpNet)>) -> Result<(), PlaneError> {
        let (mut four, mut six) = (BTreeSet::new(), BTreeSet::new());
        for &(AddressSet(set), net) in wanted {
            let length = u32::from(net.prefix_len()) + u32::BITS;
            match net {
                IpNet::V4(net) => four.insert((length, key(set, &net.network().octets()))),
                IpNet::V6(net) => six.insert((length, key(set, &net.network().octets()))),
            };
        }
        self.crossings.four.set(&four)?;
        self.crossings.six.set(&six)
    }
}

impl<const BYTES: usize> Sets<BYTES> {
    fn open(pin: &Path, name: &'static str) -> Result<Self, PlaneError> {
        let map = open_map(pin, name)?.try_into();
        let map = map.map_err(PlaneError::bpf(format!("opening the map `{name}`")))?;
        Ok(Self { name, map })
    }

    fn set(&mut self, wanted: &BTreeSet<(u32, [u8; BYTES])>) -> Result<(), PlaneError> {
        let (reading, writing) = ["reading", "writing"].map(|what| format!("{what} the map `{}`", self.name)).into();
        let there: BTreeSet<(u32, [u8; BYTES])> = self
            .map
            .keys()
            .map(|key| key.map(|key| (key.prefix_len(), key.data())))
            .collect::<Result<_, _>>()
            .map_err(PlaneError::bpf(reading))?;
        for &(length, data) in wanted.difference(&there) {
            self.map.insert(&Key::new(length, data), 1, 0).map_err(PlaneError::bpf(&*writing))?;
        }
        for &(length, data) in there.difference(wanted) {
            self.map.remove(&Key::new(length, data)).map_err(PlaneError::bpf(&*writing))?;
        }
        Ok(())
    }
}

/// The set, and the network as it stands in a header.
fn key<const BYTES: usize>(set: [u8; 4], network: &[u8]) -> [u8; BYTES] {
    let mut bytes = set.into_iter().chain(network.iter().copied());
    std::array::from_fn(|_| bytes.next().unwrap_or(0))
}
