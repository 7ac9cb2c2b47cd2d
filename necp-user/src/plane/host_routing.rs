//! What this host's own routing must do for the forwarding types that route.
//!
//! The packet path hands the kernel what it cannot send itself: a datagram in GRE that must be fragmented, a reply to a client
//! whose MAC address is not known yet. These come in by an interface with this host's own address as their source, which the
//! kernel drops as martian unless `accept_local` is set there; and it routes nothing unless `forwarding` is. Of IPv6 it drops nothing
//! for its source.

use std::{fs, io, path::PathBuf};

/// The interfaces that were changed.
#[derive(Debug, Default)]
pub struct HostRouting {
    changed: Vec<PathBuf>,
}

/// What stands in the way.
#[derive(Debug, thiserror::Error)]
pub enum HostRoutingError {
    /// It does not route.
    #[error(
        "the kernel does not route packets that come in by {0}: replies of l3 servers, fragments, and what farms with `intercept` let through need it; set it with `sysctl -w net.ipv4.ip_forward=1`"
    )]
    NotForwarding(String),
    /// It does not route IPv6.
    #[error(
        "the kernel does not route IPv6: replies of l3 servers, and what farms with `intercept` let through, need it; set it with `sysctl -w net.ipv6.conf.all.forwarding=1` (and net.ipv6.conf.IF.accept_ra=2 where this host learns its routes from router advertisements)"
    )]
    NotForwarding6,
    /// It has no IPv6.
    #[error(
        "{0} has no IPv6, so no packet of an IPv6 VIP comes or goes by it: set it with `sysctl -w net.ipv6.conf.{0}.disable_ipv6=0`"
    )]
    NoIpv6(String),
    /// It takes replies only by the interface that it would send to their source.
    #[error(
        "net.ipv4.conf.{0}.rp_filter is 1 (strict): it may drop what the kernel is to route for servers by gre and l3; set it to 0 or 2"
    )]
    StrictReversePath(String),
    /// A setting could not be read or written.
    #[error("{}: {source}", path.display())]
    Setting {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl HostRouting {
    /// Makes the interfaces accept packets from this host's own addresses, and says what else is missing.
    pub fn prepare(interfaces: &[String]) -> (Self, Vec<HostRoutingError>) {
        let (mut routing, mut problems) = (Self::default(), Vec::new());
        for interface in interfaces {
            match routing.prepare_one(interface) {
                Ok(missing) => problems.extend(missing),
                Err(error) => problems.push(error),
            }
        }
        (routing, problems)
    }

    /// Says which interfaces the kernel does not route from.
    pub fn missing(interfaces: &[String]) -> Vec<HostRoutingError> {
        let forwards = |interface: &String| match read(&setting(interface, "forwarding")) {
            Ok(0) => Some(HostRoutingError::NotForwarding(interface.clone())),
            Ok(_) => None,
            Err(error) => Some(error),
        };
        interfaces.iter().filter_map(forwards).collect()
    }

    /// Says what the kernel must still do for IPv6: be on, and route if some servers are reached so.
    pub fn missing6(interfaces: &[String], routes: bool) -> Vec<HostRoutingError> {
        let off = |interface: &&String| read(&setting6(interface, "disable_ipv6")).unwrap_or(1) != 0;
        let mut missing: Vec<_> =
            interfaces.iter().filter(off).map(|one| HostRoutingError::NoIpv6(one.clone())).collect();
        // Unlike with IPv4, this setting alone counts.
        if routes && read(&setting6("all", "forwarding")).unwrap_or(0) == 0 {
            missing.push(HostRoutingError::NotForwarding6);
        }
        missing
    }

    fn prepare_one(&mut self, interface: &str) -> Result<Vec<HostRoutingError>, HostRoutingError> {
        let accept = setting(interface, "accept_local");
        if read(&accept)? == 0 && read(&setting("all", "accept_local"))? == 0 {
            fs::write(&accept, "1").map_err(|source| HostRoutingError::Setting { path: accept.clone(), source })?;
            self.changed.push(accept);
        }
        let mut missing = Vec::new();
        if read(&setting(interface, "forwarding"))? == 0 {
            missing.push(HostRoutingError::NotForwarding(interface.into()));
        }
        // The larger of both is in force (Documentation/networking/ip-sysctl.rst).
        if read(&setting(interface, "rp_filter"))?.max(read(&setting("all", "rp_filter"))?) == 1 {
            missing.push(HostRoutingError::StrictReversePath(interface.into()));
        }
        Ok(missing)
    }

    /// Puts back what was changed, as far as the interfaces are still there.
    pub fn undo(self) {
        for path in self.changed {
            if let Err(error) = fs::write(&path, "0") {
                tracing::debug!(%error, "{} stays as it is", path.display());
            }
        }
    }
}

fn setting(interface: &str, name: &str) -> PathBuf {
    ["/proc/sys/net/ipv4/conf", interface, name].iter().collect()
}

fn setting6(interface: &str, name: &str) -> PathBuf {
    ["/proc/sys/net/ipv6/conf", interface, name].iter().collect()
}

fn read(path: &PathBuf) -> Result<u32, HostRoutingError> {
    let text = fs::read_to_string(path).map_err(|source| HostRoutingError::Setting { path: path.clone(), source })?;
    let number = text.trim().parse();
    number.map_err(|_| HostRoutingError::Setting { path: path.clone(), source: io::ErrorKind::InvalidData.into() })
}
