//! The sets of addresses that count when a packet crosses this host.

use std::{collections::BTreeSet, path::Path};

use aya::maps::{
    MapData,
    lpm_trie::{Key, LpmTrie},
};
use ipnet::Ipv4Net;
use necp_ebpf::abi::{AddressSet, names};

use super::{Plane, PlaneError, counters::open_map};

/// The map [`names::CROSSINGS`].
pub(super) struct Crossings(LpmTrie<MapData, [u8; 8], u32>);

impl Crossings {
    pub(super) fn open(pin: &Path) -> Result<Self, PlaneError> {
        let map = open_map(pin, names::CROSSINGS)?.try_into();
        map.map(Self).map_err(PlaneError::bpf("opening the map `crossings`"))
    }
}

impl Plane {
    /// Makes the sets contain these prefixes and no others. What is new is added before what is old goes.
    ///
    /// # Errors
    /// If the map cannot be read, or has no room; what could be added then is there.
    pub fn set_crossings(&mut self, wanted: &BTreeSet<(AddressSet, Ipv4Net)>) -> Result<(), PlaneError> {
        let map = &mut self.crossings.0;
        let what = "writing the map `crossings`";
        let there: BTreeSet<(u32, [u8; 8])> = map
            .keys()
            .map(|key| key.map(|key| (key.prefix_len(), key.data())))
            .collect::<Result<_, _>>()
            .map_err(PlaneError::bpf("reading the map `crossings`"))?;
        let wanted: BTreeSet<(u32, [u8; 8])> = wanted.iter().map(|&(set, net)| key(set, net)).collect();
        for &(length, data) in wanted.difference(&there) {
            map.insert(&Key::new(length, data), 1, 0).map_err(PlaneError::bpf(what))?;
        }
        for &(length, data) in there.difference(&wanted) {
            map.remove(&Key::new(length, data)).map_err(PlaneError::bpf(what))?;
        }
        Ok(())
    }
}

fn key(AddressSet([a, b, c, d]): AddressSet, net: Ipv4Net) -> (u32, [u8; 8]) {
    let [e, f, g, h] = net.network().octets();
    (u32::from(net.prefix_len()) + u32::BITS, [a, b, c, d, e, f, g, h])
}
