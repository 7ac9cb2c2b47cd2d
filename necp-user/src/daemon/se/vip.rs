//! The virtual addresses of layer-2 services on this server: on `lo`, and unknown to the link.
//!
//! A layer-2 server gets datagrams for the VIP unchanged, so the VIP must be its own address, but nobody may learn that
//! by ARP or neighbour discovery: the VIP is the network element's there. Hence
//! - the VIP is put on `lo` with a /32 and host scope (IPv6: /128, and deprecated), so that it is not chosen as the source of
//!   this host's own connections if there is another one;
//! - `arp_ignore` = 1: ARP requests are answered only for addresses of the interface on which they arrive;
//! - `arp_announce` = 2: this host's own ARP requests never carry the VIP as their sender, which a router would learn.
//!
//! The kernel uses the larger of the values of `all` and of the interface, so `all` is enough for every interface,
//! those that come later too; `lo` itself never sees ARP. A value that is large enough already is left alone.
//!
//! IPv6 needs no setting: the kernel answers neighbour solicitations only for addresses of the interface on which they
//! arrive, and sends its own from such, forwarding or not; on `lo` there are none.
//!
//! Taken away is exactly what was changed, also after a crash: the addresses and the former values stand in a state file
//! beside the lock, written before each change; an address must carry our label besides. A host may have several agents,
//! whose locks are in one directory: each reads the others' state files. It leaves alone what is another's, and what is of
//! several goes with the last of them, the settings with the last VIP of IPv4. Of agents with locks elsewhere only the
//! labels are seen: the settings stay while there is one.

mod state;

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use state::path_of as state_path;

use state::{Changed, State};

use crate::plane::host_address::{Added, HostAddressError, HostAddresses, Scope, interface_index};

/// Marks our addresses, see [`HostAddresses::open`].
const TAG: &str = "necp-se";
/// Where the VIPs go.
const LOOPBACK: &str = "lo";
/// The settings that keep a VIP unknown to the link, and the least value that does.
const SETTINGS: [(&str, u32); 2] =
    [("/proc/sys/net/ipv4/conf/all/arp_ignore", 1), ("/proc/sys/net/ipv4/conf/all/arp_announce", 2)];

/// Why the VIPs could not be set up or taken away.
#[derive(Debug, Error)]
pub enum VipError {
    /// An address was refused.
    #[error("setting up a VIP: {0}")]
    Address(#[from] HostAddressError),
    /// A setting could not be read or written.
    #[error("setting up a VIP: {path}: {source} (needed is at least {least}; set it yourself, and it is left alone)")]
    Setting {
        /// The file under /proc/sys.
        path: String,
        /// The least value that is needed.
        least: u32,
        /// What the system said.
        source: io::Error,
    },
    /// The state file could not be written or removed, so that a crash could not be cleaned up after.
    #[error("setting up a VIP: the state file {}: {source}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// VIPs that are set up. [`Vips::withdraw`] takes them away; a value that is just dropped leaves them to the next start.
#[derive(Debug)]
pub struct Vips {
    addresses: HostAddresses,
    state: State,
    state_path: PathBuf,
}

impl Vips {
    /// Sets up `vips` in the calling thread's network namespace, and first clears away what an earlier run with this state
    /// file left there and `vips` no longer names. `None` when there is nothing to set up. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// See [`VipError`]; what had been changed until then is taken back.
    pub async fn establish(vips: &[IpAddr], state_path: &Path) -> Result<Option<Self>, VipError> {
        let left = State::load(state_path);
        if vips.is_empty() && left.is_none() {
            return Ok(None);
        }
        let (addresses, driver) = HostAddresses::open(TAG)?;
        tokio::spawn(driver);
        let here = State { place: state::place(), ..State::default() };
        let state = left.filter(|left| left.place == here.place).unwrap_or(here);
        let mut this = Self { addresses, state, state_path: state_path.into() };
        let _turn = this.turn().await?;
        match this.set_up(vips).await {
            Ok(()) if vips.is_empty() => this.take_away().await.map(|()| None),
            Ok(()) => Ok(Some(this)),
            Err(error) => {
                if let Err(second) = this.take_away().await {
                    tracing::warn!("taking back what was set up: {second}");
                }
                Err(error)
            }
        }
    }

    async fn set_up(&mut self, vips: &[IpAddr]) -> Result<(), VipError> {
        let lo = interface_index(LOOPBACK)?;
        let others = self.others()?;
        let unwanted = self.state.ours.iter().copied().filter(|one| !vips.contains(one)).collect();
        self.remove(lo, unwanted, &others).await?;
        if vips.is_empty() {
            return Ok(());
        }
        self.state.vips = vips.to_vec();
        // The settings first: an address that is there without them is answered for at once.
        if self.state.needs_settings() {
            self.inherit(&others);
            self.save()?;
            for (path, least) in SETTINGS {
                self.raise(path, least)?;
            }
        }
        for vip in vips {
            self.add(lo, *vip, &others).await?;
        }
        Ok(())
    }

    /// What other agents found before they changed it, for whoever of us is the last.
    fn inherit(&mut self, others: &[State]) {
        for one in others.iter().flat_map(|other| &other.changed) {
            let known = self.state.changed.iter().any(|own| own.path == one.path);
            if !known && SETTINGS.iter().any(|(path, _)| *path == one.path) {
                self.state.changed.push(one.clone());
            }
        }
    }

    async fn add(&mut self, lo: u32, vip: IpAddr, others: &[State]) -> Result<(), VipError> {
        let there = self.addresses.list().await?;
        let (here, elsewhere): (Vec<_>, Vec<_>) =
            there.into_iter().filter(|one| one.net.addr() == vip).partition(|one| one.ifindex == lo);
        if let Some(other) = elsewhere.into_iter().next() {
            tracing::warn!(
                %vip,
                "this VIP is also on interface {} and is answered for there: clients may go past the network element",
                other.label.unwrap_or_else(|| other.ifindex.to_string())
            );
        }
        // Written down before it is there; what is there without anybody's having written it down is not ours.
        let shared = others.iter().any(|other| other.ours.contains(&vip));
        if !self.state.ours.contains(&vip) && (here.is_empty() || shared) {
            self.state.ours.push(vip);
        }
        self.save()?;
        match self.addresses.add(LOOPBACK, vip.into(), Scope::Host).await? {
            Added::New => tracing::info!(%vip, "VIP set up on {LOOPBACK}"),
            Added::Ours if shared => tracing::info!(%vip, "VIP shared with another agent of this host"),
            Added::Ours if self.state.ours.contains(&vip) => tracing::info!(%vip, "VIP taken over from an earlier run"),
            Added::Ours | Added::Foreign => {
                tracing::info!(%vip, "VIP was on {LOOPBACK} already; it will stay");
                self.state.ours.retain(|one| *one != vip);
            }
        }
        Ok(())
    }

    /// Raises a setting to `least`, having written down what it was.
    fn raise(&mut self, path: &str, least: u32) -> Result<(), VipError> {
        let failed = |source| VipError::Setting { path: path.into(), least, source };
        let now = read_setting(path).map_err(failed)?;
        if now >= least {
            // If it is not what we left, somebody else has set it since: it is theirs now.
            self.state.changed.retain(|one| one.path != path || one.after == now);
            return Ok(());
        }
        self.state.changed.retain(|one| one.path != path);
        self.state.changed.push(Changed { path: path.into(), before: now, after: least });
        self.save()?;
        fs::write(path, least.to_string()).map_err(failed)
    }

    /// Takes away exactly what was set up: the addresses first, then the settings that still are what we made them. What
    /// another agent of this host has too stays for that one.
    ///
    /// # Errors
    /// The first [`VipError`]; everything is tried nevertheless. The state file then stays for the next start.
    pub async fn withdraw(mut self) -> Result<(), VipError> {
        let _turn = self.turn().await?;
        self.take_away().await
    }

    async fn take_away(&mut self) -> Result<(), VipError> {
        let lo = interface_index(LOOPBACK)?;
        let others = self.others()?;
        let removed = self.remove(lo, self.state.ours.clone(), &others).await;
        let there = self.addresses.list().await?;
        let heirs: Vec<_> = others.iter().filter(|other| other.needs_settings()).collect();
        if !heirs.is_empty() || there.iter().any(|one| one.ours && one.ifindex == lo && one.net.addr().is_ipv4()) {
            // Whoever has written down the same will change it back.
            self.state.changed.retain(|one| !heirs.iter().any(|heir| heir.changed.contains(one)));
            removed?;
        } else {
            removed.and(self.restore())?;
        }
        self.state.vips.clear();
        if !self.state.changed.is_empty() {
            return self.save();
        }
        match fs::remove_file(&self.state_path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed(error)),
            _ => Ok(()),
        }
    }

    /// Removes those that no other agent has too.
    async fn remove(&mut self, lo: u32, vips: Vec<IpAddr>, others: &[State]) -> Result<(), VipError> {
        let mut first = Ok(());
        for vip in vips {
            if others.iter().any(|other| other.ours.contains(&vip)) {
                tracing::info!(%vip, "VIP left on {LOOPBACK}: another agent of this host has it too");
            } else {
                match self.addresses.remove(lo, vip.into()).await {
                    Ok(true) => tracing::info!(%vip, "VIP removed from {LOOPBACK}"),
                    Ok(false) => tracing::info!(%vip, "VIP was no longer on {LOOPBACK}, or is somebody else's now"),
                    Err(error) => {
                        first = first.and(Err(error.into()));
                        continue;
                    }
                }
            }
            self.state.ours.retain(|one| *one != vip);
        }
        first
    }

    fn restore(&mut self) -> Result<(), VipError> {
        let mut first = Ok(());
        self.state.changed.retain(|Changed { path, before, after }| {
            let restored = read_setting(path)
                .and_then(|now| if now == *after { fs::write(path, before.to_string()) } else { Ok(()) });
            let failed = restored.map_err(|source| VipError::Setting { path: path.clone(), least: *before, source });
            let keep = failed.is_err();
            first = std::mem::replace(&mut first, Ok(())).and(failed);
            keep
        });
        first
    }

    async fn turn(&self) -> Result<File, VipError> {
        state::turn(&self.state_path).await.map_err(|error| self.failed(error))
    }

    fn others(&self) -> Result<Vec<State>, VipError> {
        State::of_others(&self.state_path, &self.state.place).map_err(|error| self.failed(error))
    }

    fn save(&self) -> Result<(), VipError> {
        self.state.save(&self.state_path).map_err(|error| self.failed(error))
    }

    fn failed(&self, source: io::Error) -> VipError {
        VipError::State { path: self.state_path.clone(), source }
    }
}

fn read_setting(path: &str) -> io::Result<u32> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("`{}`", text.trim())))
}

#[cfg(test)]
mod together;
#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use ipnet::IpNet;

    use super::*;
    use crate::plane::throwaway_netns::in_new_netns;

    const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
    const SECOND: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
    const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10);
    const SECOND6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x11);

    fn net(vip: Ipv4Addr) -> IpNet {
        std::net::IpAddr::V4(vip).into()
    }

    async fn addresses() -> Vec<(IpNet, bool)> {
        let (addresses, driver) = HostAddresses::open(TAG).expect("netlink");
        tokio::spawn(driver);
        let listed = addresses.list().await.expect("a list");
        listed.into_iter().filter(|one| !one.net.addr().is_loopback()).map(|one| (one.net, one.ours)).collect()
    }

    fn settings() -> [u32; 2] {
        SETTINGS.map(|(path, _)| read_setting(path).expect("a setting"))
    }

    fn set(values: [u32; 2]) {
        for ((path, _), value) in SETTINGS.into_iter().zip(values) {
            fs::write(path, value.to_string()).expect("a setting");
        }
    }

    fn state_in(directory: &tempfile::TempDir) -> PathBuf {
        state_path(&directory.path().join("se.lock"))
    }

    #[test]
    fn a_vip_comes_and_goes_without_a_trace() {
        in_new_netns(async || {
            let directory = tempfile::tempdir().expect("a directory");
            let state = state_in(&directory);
            set([0, 0]);
            let vips = Vips::establish(&[VIP.into(), SECOND.into()], &state)
                .await
                .expect("set up")
                .expect("something to set up");
            assert_eq!(addresses().await, [(net(VIP), true), (net(SECOND), true)]);
            assert_eq!(settings(), [1, 2]);
            assert!(state.exists());
            vips.withdraw().await.expect("taken away");
            assert_eq!((addresses().await, settings()), (vec![], [0, 0]));
            assert_eq!(fs::read_dir(&directory).expect("readable").count(), 0, "no file is left");
        });
    }

    #[test]
    fn what_was_there_before_stays() {
        in_new_netns(async || {
            let directory = tempfile::tempdir().expect("a directory");
            set([2, 0]);
            let (others, driver) = HostAddresses::open("other").expect("netlink");
            tokio::spawn(driver);
            others.add("lo", net(VIP), Scope::Global).await.expect("added");
            let vips = Vips::establish(&[VIP.into()], &state_in(&directory)).await.expect("set up").expect("something");
            assert_eq!(settings(), [2, 2], "a larger value does as well");
            vips.withdraw().await.expect("taken away");
            assert_eq!((addresses().await, settings()), (vec![(net(VIP), false)], [2, 0]));
        });
    }

    #[test]
    fn a_value_that_somebody_changed_meanwhile_stays() {
        in_new_netns(async || {
            let directory = tempfile::tempdir().expect("a directory");
            set([0, 0]);
            let vips = Vips::establish(&[VIP.into()], &state_in(&directory)).await.expect("set up").expect("something");
            set([8, 2]);
            vips.withdraw().await.expect("taken away");
            assert_eq!(settings(), [8, 0]);
        });
    }

    #[test]
    fn after_a_crash_the_next_start_takes_over_and_cleans_up() {
        in_new_netns(async || {
            let directory = tempfile::tempdir().expect("a directory");
            let state = state_in(&directory);
            set([0, 1]);
            drop(Vips::establish(&[VIP.into(), SECOND.into()], &state).await.expect("set up"));
            let vips = Vips::establish(&[SECOND.into()], &state).await.expect("set up").expect("something");
            assert_eq!(addresses().await, [(net(SECOND), true)], "the other one is no longer wanted");
            vips.withdraw().await.expect("taken away");
            assert_eq!((addresses().await, settings()), (vec![], [0, 1]), "the values before the crash");

            drop(Vips::establish(&[VIP.into()], &state).await.expect("set up"));
            assert!(Vips::establish(&[], &state).await.expect("cleaned up").is_none());
            assert_eq!((addresses().await, settings(), state.exists()), (vec![], [0, 1], false));
        });
    }

    #[test]
    fn leftovers_of_another_namespace_are_not_undone_here() {
        in_new_netns(async || {
            let directory = tempfile::tempdir().expect("a directory");
            let state = state_in(&directory);
            let changed = SETTINGS.map(|(path, after)| Changed { path: path.into(), before: 0, after }).to_vec();
            let foreign =
                State { place: "another boot/1".into(), changed, vips: vec![VIP.into()], ours: vec![VIP.into()] };
            fs::write(&state, serde_json::to_string(&foreign).expect("JSON")).expect("written");
            set([1, 2]);
            assert!(Vips::establish(&[], &state).await.expect("nothing to do").is_none());
            assert_eq!((settings(), state.exists()), ([1, 2], false));
        });
    }

    #[test]
    fn a_broken_state_file_is_no_obstacle() {
        in_new_netns(async || {
            let directory = tempfile::tempdir().expect("a directory");
            let state = state_in(&directory);
            fs::write(&state, b"{\"place\": 7").expect("written");
            let vips = Vips::establish(&[VIP.into()], &state).await.expect("set up").expect("something");
            vips.withdraw().await.expect("taken away");
            assert!(!state.exists());
        });
    }

    #[test]
    fn a_failure_takes_back_what_was_done() {
        in_new_netns(async || {
            let directory = tempfile::tempdir().expect("a directory");
            let state = state_in(&directory);
            set([0, 0]);
            let error = Vips::establish(&[VIP.into(), Ipv4Addr::new(224, 0, 0, 1).into()], &state).await;
            assert!(matches!(error, Err(VipError::Address(_))), "{error:?}");
            assert_eq!((addresses().await, settings(), state.exists()), (vec![], [0, 0], false));
        });
    }

    fn net6(vip: Ipv6Addr) -> IpNet {
        IpAddr::V6(vip).into()
    }

    /// Those of [`addresses`] that are VIPs of IPv6.
    async fn addresses6() -> Vec<(IpNet, bool)> {
        let all = addresses().await;
        all.into_iter().filter(|(net, _)| [net6(VIP6), net6(SECOND6)].contains(net)).collect()
    }

    #[test]
    fn ipv6_comes_and_goes_and_changes_no_setting() {
        in_new_netns(async || {
            let directory = tempfile::tempdir().expect("a directory");
            let state = state_in(&directory);
            set([0, 0]);
            let vips = Vips::establish(&[VIP6.into()], &state).await.expect("set up").expect("something to set up");
            assert_eq!((addresses6().await, settings()), (vec![(net6(VIP6), true)], [0, 0]));
            vips.withdraw().await.expect("taken away");
            assert_eq!((addresses6().await, state.exists()), (vec![], false));
            // Of both families.
            let both = [VIP.into(), VIP6.into()];
            let vips = Vips::establish(&both, &state).await.expect("set up").expect("something to set up");
            assert_eq!((addresses6().await, settings()), (vec![(net6(VIP6), true)], [1, 2]));
            assert!(addresses().await.contains(&(net(VIP), true)));
            vips.withdraw().await.expect("taken away");
            assert_eq!((addresses().await, settings()), (vec![], [0, 0]));
        });
    }

    #[test]
    fn ipv6_of_others_stays_and_what_a_crash_left_goes() {
        in_new_netns(async || {
            let directory = tempfile::tempdir().expect("a directory");
            let state = state_in(&directory);
            let (others, driver) = HostAddresses::open("other").expect("netlink");
            tokio::spawn(driver);
            others.add("lo", net6(SECOND6), Scope::Global).await.expect("added");
            drop(Vips::establish(&[VIP6.into(), SECOND6.into()], &state).await.expect("set up"));
            // A crash, and the next run wants nothing.
            assert!(Vips::establish(&[], &state).await.expect("cleaned up").is_none());
            assert_eq!((addresses6().await, state.exists()), (vec![(net6(SECOND6), false)], false));
            // A crash, and the next run wants the same.
            drop(Vips::establish(&[VIP6.into()], &state).await.expect("set up"));
            let vips = Vips::establish(&[VIP6.into()], &state).await.expect("set up").expect("something to set up");
            vips.withdraw().await.expect("taken away");
            assert_eq!(addresses6().await, [(net6(SECOND6), false)]);
        });
    }
}
