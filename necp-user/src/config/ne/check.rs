//! What the values may be. All mistakes are collected, so that one run of `--check` shows them all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU8;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use toml::Spanned;

use super::file::{Destination, Farm, File, Hops, Md5Files, Number, Prefix, Vip};
use super::{FarmConfig, NeConfig, PIN, SOCKET};
use crate::config::strict::{Mistake, Text, place};
use crate::control::config::Family;
use crate::necp::service::TCP;
use crate::necp::{Forwarding, PORT, ServiceKey};
use necp_ebpf::abi::{MAX_PORTS, SERVICE_BUCKETS};

/// IP protocol number of ICMP.
const ICMP: u8 = 1;
/// Of ICMPv6.
const ICMPV6: u8 = 58;
/// Protocols whose checksums cover the addresses (DCCP, RFC 4340 §9.1; UDP-Lite, RFC 3828 §3.1), beside TCP and UDP.
const OTHER_CHECKSUMS: [u8; 2] = [33, 136];
/// Default of `table_size`.
const TABLE_SIZE: u32 = 65_537;
/// As `control` takes them.
const TABLE_SIZES: std::ops::RangeInclusive<i64> = 3..=1_048_573;
/// Addresses times services: half of what the service table holds, so that no bucket of it overflows.
const MAX_SERVICES: usize = SERVICE_BUCKETS as usize / 2;
/// What the maps hold: default and limit of `max_exceptions` at the top.
const MAX_EXCEPTIONS: u32 = 1 << 20;
/// Default of `max_exceptions` of a farm.
const MAX_EXCEPTIONS_OF_ONE: u32 = 65_536;
/// Longest path of a Unix socket (`sun_path` with its final NUL).
const SOCKET_PATH_MAX: usize = 107;
/// 100 days: no time is longer.
const MAX_TIME: f64 = 100.0 * 86_400.0;

pub(super) fn check(text: &str, file: File) -> Result<NeConfig, Vec<Mistake>> {
    let mut check = Check { text, mistakes: Vec::new(), notes: Vec::new() };
    let config = NeConfig {
        interfaces: check.interfaces(&file),
        listen: check.listen(&file),
        pin: check.path(&file.pin, "pin", PIN),
        socket: check.socket(&file),
        ttl_security: check.ttl_security(&file),
        mode: file.mode.map_or_else(Default::default, |mode| mode.0),
        manage_vips: file.manage_vips.unwrap_or(true),
        keepalive: check.seconds(&file.keepalive, "keepalive", 5.0, 0.05..=3600.0),
        grace: check.seconds(&file.grace, "grace", 60.0, 0.0..=86_400.0),
        max_exceptions: check.max_exceptions(&file.max_exceptions, MAX_EXCEPTIONS),
        farms: file.farm.iter().map(|farm| check.farm(farm.get_ref())).collect(),
        notes: Vec::new(),
    };
    if config.farms.is_empty() {
        check.mistake(
            None,
            "there is no farm; write a section [[farm]] with name, vips (or intercept), services, forwarding, servers and auth".into(),
        );
    }
    check.farms_together(&file.farm, &config);
    if check.mistakes.is_empty() { Ok(NeConfig { notes: check.notes, ..config }) } else { Err(check.mistakes) }
}

pub(super) struct Check<'a> {
    text: &'a str,
    mistakes: Vec<Mistake>,
    notes: Vec<Mistake>,
}

impl Check<'_> {
    fn interfaces(&mut self, file: &File) -> Vec<String> {
        let names = file.interfaces.get_ref();
        if names.is_empty() {
            self.at(
                &file.interfaces,
                "no interface; write the one that clients' packets come in by, such as interfaces = [\"eth0\"]".into(),
            );
        }
        if names.len() > MAX_PORTS as usize {
            self.at(&file.interfaces, format!("{} interfaces are too many; at most {MAX_PORTS}", names.len()));
        }
        let mut seen = BTreeSet::new();
        for name in names {
            let text = name.get_ref();
            if text.is_empty()
                || text.len() >= libc::IFNAMSIZ
                || text.contains(|c: char| c == '/' || c.is_whitespace() || c == '\0')
            {
                self.at(name, format!("`{text}` is no interface name; `ip link` lists what there is"));
            } else if !seen.insert(text) {
                self.at(name, format!("interface `{text}` is listed twice; write it once"));
            }
        }
        names.iter().map(|name| name.get_ref().clone()).collect()
    }

    fn listen(&mut self, file: &File) -> Vec<SocketAddr> {
        let Some(listen) = &file.listen else { return Vec::new() };
        if listen.get_ref().is_empty() {
            self.at(listen, format!("no address to listen on: no server could join; write listen = [\"0.0.0.0:{PORT}\", \"[::]:{PORT}\"] or leave the key out"));
        }
        let mut seen: Vec<SocketAddr> = Vec::new();
        for one in listen.get_ref() {
            let address = one.get_ref().0.0;
            let same = |other: &&SocketAddr| {
                other.port() == address.port()
                    && other.is_ipv4() == address.is_ipv4()
                    && (other.ip() == address.ip() || other.ip().is_unspecified() || address.ip().is_unspecified())
            };
            if let Some(other) = seen.iter().find(same) {
                self.at(one, format!("{address} is already listened on by {other}; write only one of them"));
            }
            seen.push(address);
        }
        seen
    }

    fn path(&mut self, value: &Option<Spanned<PathBuf>>, key: &str, default: &str) -> PathBuf {
        let Some(path) = value else { return default.into() };
        if !path.get_ref().is_absolute() {
            self.at(path, format!("`{key}` must be an absolute path, such as {default}"));
        }
        path.get_ref().clone()
    }

    fn socket(&mut self, file: &File) -> PathBuf {
        let path = self.path(&file.socket, "socket", SOCKET);
        if let Some(spanned) = file.socket.as_ref().filter(|_| path.as_os_str().len() > SOCKET_PATH_MAX) {
            self.at(spanned, format!("the path of a Unix socket has at most {SOCKET_PATH_MAX} bytes; write a shorter one, such as {SOCKET}"));
        }
        path
    }

    fn seconds(
        &mut self,
        value: &Option<Number>,
        key: &str,
        default: f64,
        range: std::ops::RangeInclusive<f64>,
    ) -> Duration {
        let seconds = value.as_ref().map_or(default, |value| *value.get_ref());
        if let Some(value) = value.as_ref().filter(|_| !range.contains(&seconds)) {
            let (from, to) = (range.start(), range.end());
            self.at(
                value,
                format!("`{key}` is {seconds} s; write a number of seconds from {from} to {to} (default {default})"),
            );
            return Duration::from_secs_f64(default);
        }
        Duration::from_secs_f64(seconds)
    }

    fn ttl_security(&mut self, file: &File) -> Option<NonZeroU8> {
        let spanned = file.ttl_security.as_ref()?;
        let hops = match *spanned.get_ref() {
            Hops::OnLink(on) => i64::from(on),
            Hops::AtMost(hops) if (1..=254).contains(&hops) => hops,
            Hops::AtMost(hops) => {
                self.at(
                    spanned,
                    format!("`ttl_security` is {hops}; write true (servers on the same link) or from 1 to 254 hops"),
                );
                0
            }
        };
        NonZeroU8::new(hops as u8)
    }

    fn farm(&mut self, farm: &Farm) -> FarmConfig {
        let name = self.name(farm);
        FarmConfig {
            auth: self.authentication(farm, &name),
            vips: self.vips(farm),
            intercept: self.intercept(farm, &name),
            services: self.services(farm),
            forwarding: self.forwarding(farm, &name),
            servers: self.servers(farm),
            tcp_md5: self.tcp_md5(farm),
            table_size: self.table_size(farm),
            orphan_time: self.seconds(&farm.orphan_time, "orphan_time", 300.0, 1.0..=MAX_TIME),
            tcp_idle: self.seconds(&farm.tcp_idle, "tcp_idle", 7440.0, 1.0..=MAX_TIME),
            udp_idle: self.seconds(&farm.udp_idle, "udp_idle", 180.0, 1.0..=MAX_TIME),
            udp_tracking: farm.udp_tracking.unwrap_or(true),
            echo: farm.echo.unwrap_or(true),
            global_exceptions: farm.global_exceptions.unwrap_or(false),
            max_exceptions: self.max_exceptions(&farm.max_exceptions, MAX_EXCEPTIONS_OF_ONE),
            hash_seed: self.hash_seed(farm),
            capacity: self.capacity(farm),
            name,
        }
    }

    fn name(&mut self, farm: &Farm) -> String {
        let name = farm.name.get_ref();
        let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 32 || !name.chars().all(legal) {
            self.at(&farm.name, format!("`{name}` is no farm name; write 1 to 32 letters, digits, `-`, `_` or `.`"));
        }
        name.clone()
    }

    fn vips(&mut self, farm: &Farm) -> Vec<IpAddr> {
        let Some(vips) = &farm.vips else { return Vec::new() };
        self.some(vips, "vips", "the address that clients connect to, such as vips = [\"192.0.2.10\"]");
        self.distinct(vips, |vip: &Text<Vip>| vip.0.0, "VIP")
    }

    /// Either this or `vips`.
    fn intercept(&mut self, farm: &Farm, name: &str) -> Vec<IpNet> {
        let Some(prefixes) = &farm.intercept else {
            if farm.vips.is_none() {
                self.at(&farm.name, format!("farm `{name}` has neither `vips` nor `intercept`; write the address that clients connect to, such as vips = [\"192.0.2.10\"], or destinations whose packets it takes, such as intercept = [\"0.0.0.0/0\"]"));
            }
            return Vec::new();
        };
        if farm.vips.is_some() {
            self.at(prefixes, format!("farm `{name}` has `vips` and `intercept`; make them two farms"));
        }
        if let Some(l3) = farm.forwarding.get_ref().iter().find(|one| one.get_ref().0 == Forwarding::L3) {
            self.at(l3, "l3 addresses packets to the server, which could not tell whom they were for; a farm with `intercept` has l2 and gre".into());
        }
        if farm.udp_tracking == Some(false) {
            self.at(
                prefixes,
                "what is intercepted is on record, so that exceptions hold; drop udp_tracking = false".into(),
            );
        }
        self.some(prefixes, "intercept", "destinations whose packets it takes, such as intercept = [\"0.0.0.0/0\"]");
        self.distinct(prefixes, |prefix: &Text<Destination>| prefix.0.0, "prefix")
    }

    fn services(&mut self, farm: &Farm) -> Vec<ServiceKey> {
        self.some(&farm.services, "services", "what its servers may start, such as services = [\"tcp/80\"]");
        for service in farm.services.get_ref() {
            let key = service.get_ref().0;
            let (protocol, l3) =
                (key.protocol(), farm.forwarding.get_ref().iter().any(|one| one.get_ref().0 == Forwarding::L3));
            if [ICMP, ICMPV6].contains(&protocol) {
                let message = "ICMP is no service: errors go where the flows are that they are about";
                self.at(service, format!("protocol {protocol}: {message}"));
            }
            if l3 && OTHER_CHECKSUMS.contains(&protocol) {
                let message =
                    "its checksum covers the addresses, and l3 does not mend it: leave l3 out, or this service";
                self.at(service, format!("protocol {protocol}: {message}"));
            }
        }
        self.distinct(&farm.services, |service: &Text<ServiceKey>| service.0, "service")
    }

    fn forwarding(&mut self, farm: &Farm, name: &str) -> Vec<Forwarding> {
        self.some(&farm.forwarding, "forwarding", "what its servers may ask for, such as forwarding = [\"l2\"]");
        let asked = self.distinct(&farm.forwarding, |forwarding: &Text<Forwarding>| forwarding.0, "forwarding type");
        let untracked = farm.services.get_ref().iter().any(|service| service.get_ref().0.protocol() != TCP);
        if asked.contains(&Forwarding::L3) && untracked && farm.udp_tracking == Some(false) {
            let message = "l3 needs flows on record, so that replies find theirs: drop udp_tracking = false, or l3";
            self.at(&farm.forwarding, message.into());
        }
        if asked.contains(&Forwarding::L3) && asked.len() > 1 {
            let message = format!("with l3 every flow of farm `{name}` is on record, those by other types too");
            self.note(farm.forwarding.span().start, message);
        }
        asked
    }

    fn servers(&mut self, farm: &Farm) -> Vec<IpNet> {
        self.some(&farm.servers, "servers", "who may join, such as servers = [\"10.0.0.0/24\"]");
        self.distinct(&farm.servers, |prefix: &Text<Prefix>| prefix.0.0, "prefix")
    }

    fn tcp_md5(&mut self, farm: &Farm) -> Vec<(IpNet, PathBuf)> {
        let Some(spanned) = &farm.tcp_md5 else { return Vec::new() };
        let servers: Vec<IpNet> = farm.servers.get_ref().iter().map(|prefix| prefix.get_ref().0.0).collect();
        let files = match spanned.get_ref() {
            Md5Files::All(path) => servers.iter().map(|net| (*net, path.clone())).collect(),
            Md5Files::Each(files) => self.md5_by_prefix(spanned.span().start, files, &servers),
        };
        if files.iter().any(|(_, path)| !path.is_absolute()) {
            self.at(spanned, "the key files of `tcp_md5` must be absolute paths, such as /etc/necp/web.md5".into());
        }
        files
    }

    fn md5_by_prefix(
        &mut self,
        at: usize,
        files: &BTreeMap<String, PathBuf>,
        servers: &[IpNet],
    ) -> Vec<(IpNet, PathBuf)> {
        let mut found = Vec::new();
        for (text, path) in files {
            match text.parse::<Prefix>() {
                Err(message) => self.mistake(Some(at), message),
                Ok(Prefix(net)) if servers.iter().any(|servers| servers.contains(&net)) => {
                    found.push((net, path.clone()));
                }
                Ok(Prefix(net)) => self.mistake(
                    Some(at),
                    format!("{net} has a `tcp_md5` key but may not join; add it to `servers`, or take it away here"),
                ),
            }
        }
        found
    }

    fn table_size(&mut self, farm: &Farm) -> u32 {
        let Some(spanned) = &farm.table_size else { return TABLE_SIZE };
        let size = *spanned.get_ref();
        if !TABLE_SIZES.contains(&size) {
            let (from, to) = (TABLE_SIZES.start(), TABLE_SIZES.end());
            self.at(
                spanned,
                format!("`table_size` is {size}; write a prime from {from} to {to} (default {TABLE_SIZE})"),
            );
        } else if !is_prime(size) {
            let next = (size..=*TABLE_SIZES.end()).find(|size| is_prime(*size)).unwrap_or(*TABLE_SIZES.end());
            self.at(
                spanned,
                format!("`table_size` must be a prime, and {size} is none; write {next} (default {TABLE_SIZE})"),
            );
        } else {
            return size as u32;
        }
        TABLE_SIZE
    }

    fn max_exceptions(&mut self, value: &Option<Spanned<i64>>, default: u32) -> u32 {
        let Some(spanned) = value else { return default };
        let count = *spanned.get_ref();
        match u32::try_from(count) {
            Ok(count @ 0..=MAX_EXCEPTIONS) => count,
            _ => {
                let message = format!(
                    "`max_exceptions` is {count}; write a number from 0 to {MAX_EXCEPTIONS} (default {default})"
                );
                self.at(spanned, message);
                default
            }
        }
    }

    fn hash_seed(&mut self, farm: &Farm) -> Option<u64> {
        let spanned = farm.hash_seed.as_ref()?;
        let seed = u64::try_from(*spanned.get_ref()).ok();
        if seed.is_none() {
            self.at(spanned, "`hash_seed` must not be negative; write any number from 0 to 9223372036854775807, the same on every NE that shares this farm's traffic".into());
        }
        seed
    }

    fn capacity(&mut self, farm: &Farm) -> BTreeMap<IpAddr, f64> {
        let mut capacity = BTreeMap::new();
        for (server, value) in farm.capacity.iter().flatten() {
            let (text, number) = (server.get_ref(), *value.get_ref());
            if !(0.01..=1000.0).contains(&number) {
                self.at(
                    value,
                    format!(
                        "the capacity of {text} is {number}; write a number from 0.01 to 1000 (1 = an ordinary server)"
                    ),
                );
                continue;
            }
            match text.parse::<IpAddr>() {
                Err(_) => {
                    self.at(server, format!("`{text}` is no address; write capacity = {{ \"10.0.0.11\" = 2.0 }}"))
                }
                Ok(address) if !farm.servers.get_ref().iter().any(|net| net.get_ref().0.0.contains(&address)) => {
                    self.at(
                        server,
                        format!("{address} has a capacity but may not join; add it to `servers`, or take it away here"),
                    );
                }
                Ok(address) => _ = capacity.insert(address, number),
            }
        }
        capacity
    }

    fn farms_together(&mut self, sections: &[Spanned<Farm>], config: &NeConfig) {
        let farms = &config.farms;
        let crossed = |farm: &FarmConfig| Family::ALL.into_iter().filter(|family| farm.intercepts(*family)).count();
        let places = |farm: &FarmConfig| (farm.vips.len() + crossed(farm)).max(1);
        let total: usize = farms.iter().map(|farm| places(farm) * farm.services.len()).sum();
        if total > MAX_SERVICES {
            self.mistake(None, format!("{total} pairs of address and service are too many; at most {MAX_SERVICES}"));
        }
        let slots: u64 = farms.iter().map(|farm| u64::from(farm.table_size) * farm.tables() as u64).sum();
        if slots > 1 << 27 {
            self.mistake(
                None,
                format!(
                    "the slot tables need {slots} slots together, at most {}; write a smaller `table_size`",
                    1 << 27
                ),
            );
        }
        self.one_proof_each(sections, farms);
        let listen = config.listens_on();
        for (at, (section, farm)) in sections.iter().zip(farms).enumerate() {
            let section = section.get_ref();
            self.own_port(section, farm, &listen);
            self.families(section, farm);
            for other in &farms[..at] {
                self.two_farms(section, farm, other);
            }
        }
    }

    /// The packet path must not take the packets of server elements that connect to this host.
    fn own_port(&mut self, section: &Farm, farm: &FarmConfig, listen: &[SocketAddr]) {
        for address in listen {
            let same = |vip: &&IpAddr| vip.is_ipv4() == address.is_ipv4() && address.ip().is_unspecified();
            let hit = farm.vips.iter().find(|vip| same(vip) || address.ip() == **vip);
            if let (Some(vip), true) = (hit, farm.services.contains(&ServiceKey::new(TCP, address.port()))) {
                let port = address.port();
                self.at(&section.services, format!("tcp/{port} on {vip} is where this NE itself listens for servers; take it out of `services`, or listen on another port"));
            }
        }
    }

    /// The family of a server's session is the family of what it serves.
    fn families(&mut self, section: &Farm, farm: &FarmConfig) {
        let (name, intercepts) = (&farm.name, section.intercept.is_some());
        for family in Family::ALL {
            let server = farm.servers.iter().find(|net| Family::of(net.addr()) == family);
            let note = match (farm.serves(family), server) {
                (false, Some(net)) if intercepts => {
                    format!("servers in {net} have nothing to serve: farm `{name}` intercepts no {family}")
                }
                (false, Some(net)) => {
                    format!("servers in {net} have nothing to serve: farm `{name}` has no {family} VIP")
                }
                (true, None) if intercepts => {
                    format!(
                        "what farm `{name}` intercepts of {family} has no server: no prefix in `servers` is {family}"
                    )
                }
                (true, None) => {
                    format!("the {family} VIPs of farm `{name}` have no server: no prefix in `servers` is {family}")
                }
                _ => continue,
            };
            self.note(section.servers.span().start, note);
        }
    }

    fn two_farms(&mut self, section: &Farm, farm: &FarmConfig, other: &FarmConfig) {
        let (name, theirs) = (&farm.name, &other.name);
        if name == theirs {
            self.at(&section.name, format!("two farms are named `{name}`; give each its own name"));
        }
        let Some(service) = farm.services.iter().find(|service| other.services.contains(service)) else { return };
        let mut families = Family::ALL.into_iter();
        let both = families.any(|family| farm.intercepts(family) && other.intercepts(family));
        if let Some(prefixes) = section.intercept.as_ref().filter(|_| both) {
            self.at(prefixes, format!("{service} is intercepted by farm `{theirs}` already; give one of the two all prefixes, or `{name}` other services"));
        }
        let mut vips = section.vips.iter().flat_map(Spanned::get_ref);
        if let Some(vip) = vips.find(|vip| other.vips.contains(&vip.get_ref().0.0)) {
            let address = vip.get_ref().0.0;
            self.at(vip, format!("{service} on VIP {address} belongs to farm `{theirs}` already; give `{name}` another VIP or other services"));
        }
        let overlap =
            |net: &IpNet| other.servers.iter().find(|their| their.contains(net) || net.contains(*their)).copied();
        for prefix in section.servers.get_ref() {
            let net = prefix.get_ref().0.0;
            if let Some(their) = overlap(&net) {
                let both = if their.contains(&net) { net } else { their };
                self.at(prefix, format!("farms `{theirs}` and `{name}` would both admit {both} for {service}, and START names no farm; give them disjoint `servers` or different `services`"));
            }
        }
    }

    fn some<T>(&mut self, values: &Spanned<Vec<T>>, key: &str, write: &str) {
        if values.get_ref().is_empty() {
            self.at(values, format!("`{key}` is empty; write {write}"));
        }
    }

    fn distinct<T, V: Ord + Copy + std::fmt::Display>(
        &mut self,
        values: &Spanned<Vec<Spanned<T>>>,
        get: impl Fn(&T) -> V,
        what: &str,
    ) -> Vec<V> {
        let mut seen = BTreeSet::new();
        let mut found = Vec::new();
        for spanned in values.get_ref() {
            let value = get(spanned.get_ref());
            if seen.insert(value) {
                found.push(value);
            } else {
                self.at(spanned, format!("{what} {value} is listed twice; write it once"));
            }
        }
        found
    }

    pub(super) fn at<T>(&mut self, value: &Spanned<T>, message: String) {
        self.mistake(Some(value.span().start), message);
    }

    fn mistake(&mut self, offset: Option<usize>, message: String) {
        self.mistakes.push(Mistake { place: offset.map(|offset| place(self.text, offset)), message });
    }

    pub(super) fn note(&mut self, offset: usize, message: String) {
        self.notes.push(Mistake { place: Some(place(self.text, offset)), message });
    }
}

fn is_prime(number: i64) -> bool {
    number > 1 && (2..).take_while(|divisor| divisor * divisor <= number).all(|divisor| number % divisor != 0)
}
