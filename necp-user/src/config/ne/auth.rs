//! How servers prove who they are: exactly one way per farm, and no two for one address.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use toml::Spanned;

use super::check::Check;
use super::file::Farm;
use super::{Auth, FarmConfig};

const CHOICES: &str = "write key_file = \"/etc/necp/web.key\", keys = { \"10.0.0.11\" = \"/etc/necp/11.key\" } or both, \
                       or auth = \"none\" and admit only prefixes that you trust in `servers`";

impl Check<'_> {
    pub(super) fn authentication(&mut self, farm: &Farm, name: &str) -> Auth {
        let has_keys = farm.key_file.is_some() || farm.keys.is_some();
        match &farm.auth {
            Some(auth) if auth.get_ref() != "none" => {
                self.at(auth, format!("auth = \"{}\" is not known; {CHOICES}", auth.get_ref()));
            }
            Some(auth) if has_keys => {
                self.at(
                    auth,
                    format!(
                        "farm `{name}` has keys, and auth = \"none\" says that it needs none; write one of the two"
                    ),
                );
            }
            Some(_) => {}
            None if has_keys => {}
            None => {
                self.at(
                    &farm.name,
                    format!("farm `{name}` does not say how its servers prove who they are; {CHOICES}"),
                );
            }
        }
        if !has_keys {
            return Auth::None;
        }
        let default = farm.key_file.as_ref().map(|path| self.key_path(path));
        let servers = self.keys(farm);
        if let (None, Some(keys)) = (&default, &farm.keys) {
            self.all_have_keys(farm, keys.span().start, &servers, name);
        }
        Auth::Keys { default, servers }
    }

    fn key_path(&mut self, path: &Spanned<PathBuf>) -> PathBuf {
        if !path.get_ref().is_absolute() {
            self.at(path, "the path of a key file must be absolute, such as /etc/necp/web.key".into());
        }
        path.get_ref().clone()
    }

    fn keys(&mut self, farm: &Farm) -> BTreeMap<IpAddr, PathBuf> {
        let mut keys = BTreeMap::new();
        let Some(given) = &farm.keys else { return keys };
        if given.get_ref().is_empty() {
            self.at(given, "`keys` is empty; write keys = { \"10.0.0.11\" = \"/etc/necp/11.key\" }".into());
        }
        for (server, path) in given.get_ref() {
            let text = server.get_ref();
            let path = self.key_path(path);
            match text.parse::<IpAddr>() {
                Err(_) => {
                    let message =
                        format!("`{text}` is no address; write keys = {{ \"10.0.0.11\" = \"/etc/necp/11.key\" }}");
                    self.at(server, message);
                }
                Ok(address) if !farm.servers.get_ref().iter().any(|net| net.get_ref().0.0.contains(&address)) => {
                    let message =
                        format!("{address} has a key but may not join; add it to `servers`, or take it away here");
                    self.at(server, message);
                }
                Ok(address) => _ = keys.insert(address, path),
            }
        }
        keys
    }

    /// Legal, but whoever has no key cannot join.
    fn all_have_keys(&mut self, farm: &Farm, place: usize, keys: &BTreeMap<IpAddr, PathBuf>, name: &str) {
        let nets = farm.servers.get_ref().iter().map(|net| net.get_ref().0.0);
        let nets = IpNet::aggregate(&nets.collect());
        if nets.iter().map(size).fold(0, u128::saturating_add) > keys.len() as u128 {
            let message =
                format!("servers of farm `{name}` that are not in `keys` cannot join: there is no `key_file`");
            self.note(place, message);
        }
    }

    /// INIT names no farm (§5.4.1), so an address that two farms admit, for different services, must prove itself to both
    /// in the same way.
    pub(super) fn one_proof_each(&mut self, sections: &[Spanned<Farm>], farms: &[FarmConfig]) {
        for (at, (section, farm)) in sections.iter().zip(farms).enumerate() {
            for other in &farms[..at] {
                if let Some(address) = disputed(farm, other) {
                    let section = section.get_ref();
                    let message = format!(
                        "farms `{}` and `{}` would both admit {address} and want different proof of it, and INIT names no \
                         farm; give both the same key file for it, or disjoint `servers`",
                        other.name, farm.name
                    );
                    self.at(&section.servers, message);
                }
            }
        }
    }
}

/// An address that both admit, and that would have to prove itself in two ways.
fn disputed(farm: &FarmConfig, other: &FarmConfig) -> Option<IpAddr> {
    let differs = |address: &IpAddr| farm.auth.of(*address) != other.auth.of(*address);
    let named = |auth: &Auth| match auth {
        Auth::None => Vec::new(),
        Auth::Keys { servers, .. } => servers.keys().copied().collect(),
    };
    let all_named = [named(&farm.auth), named(&other.auth)].concat();
    let both = |address: &IpAddr| farm.admits(*address) && other.admits(*address);
    if let Some(address) = all_named.iter().copied().find(|address| both(address) && differs(address)) {
        return Some(address);
    }
    // All that are not named are alike, so one of each overlap stands for the others.
    let pairs = farm.servers.iter().flat_map(|ours| other.servers.iter().map(move |theirs| (ours, theirs)));
    let overlaps = pairs.filter_map(|(ours, theirs)| match (ours.contains(theirs), theirs.contains(ours)) {
        (true, _) => Some(*theirs),
        (false, true) => Some(*ours),
        (false, false) => None,
    });
    overlaps
        .filter_map(|net| addresses(net).take(all_named.len() + 1).find(|address| !all_named.contains(address)))
        .find(differs)
}

fn size(net: &IpNet) -> u128 {
    1_u128.checked_shl(u32::from(net.max_prefix_len() - net.prefix_len())).unwrap_or(u128::MAX)
}

fn addresses(net: IpNet) -> impl Iterator<Item = IpAddr> {
    net.subnets(net.max_prefix_len()).into_iter().flatten().map(|one| one.addr())
}
