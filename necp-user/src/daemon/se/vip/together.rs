//! Several agents on one host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::*;
use crate::plane::throwaway_netns::in_new_netns;

const ONE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 10));
const TWO: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 11));
const SIX: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10));

/// A host with an agent's lock in each of these places, and nothing set up.
struct Host {
    directory: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        for (path, _) in SETTINGS {
            fs::write(path, "0").expect("a setting");
        }
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("elsewhere")).expect("a directory in it");
        Self { directory }
    }

    async fn start(&self, lock: &str, vips: &[IpAddr]) -> Option<Vips> {
        Vips::establish(vips, &state_path(&self.directory.path().join(lock))).await.expect("set up")
    }

    async fn run(&self, lock: &str, vips: &[IpAddr]) -> Vips {
        self.start(lock, vips).await.expect("something to set up")
    }

    /// Which of our VIPs are on `lo`, and whether the settings are raised.
    async fn shows(&self) -> (Vec<IpAddr>, bool) {
        let (addresses, driver) = HostAddresses::open(TAG).expect("netlink");
        tokio::spawn(driver);
        let there: Vec<_> = addresses.list().await.expect("a list").iter().map(|one| one.net.addr()).collect();
        let vips = [ONE, TWO, SIX].into_iter().filter(|vip| there.contains(vip)).collect();
        match SETTINGS.map(|(path, _)| read_setting(path).expect("a setting")) {
            [0, 0] => (vips, false),
            [1, 2] => (vips, true),
            other => panic!("{other:?}"),
        }
    }

    fn files(&self) -> usize {
        ["", "elsewhere"]
            .map(|name| fs::read_dir(self.directory.path().join(name)).expect("readable").count())
            .iter()
            .sum::<usize>()
            - 1
    }
}

#[test]
fn each_takes_away_its_own_vips_only() {
    in_new_netns(async || {
        let host = Host::new();
        let four = host.run("se.lock", &[ONE]).await;
        let six = host.run("se6.lock", &[SIX]).await;
        assert_eq!(host.shows().await, (vec![ONE, SIX], true), "the second one has left the first one's alone");
        six.withdraw().await.expect("taken away");
        assert_eq!(host.shows().await, (vec![ONE], true));
        let six = host.run("se6.lock", &[SIX]).await;
        four.withdraw().await.expect("taken away");
        assert_eq!(host.shows().await, (vec![SIX], false), "IPv6 needs no setting");
        six.withdraw().await.expect("taken away");
        assert_eq!((host.shows().await, host.files()), ((vec![], false), 0));
    });
}

#[test]
fn the_settings_stay_until_the_last_vip_of_ipv4_goes() {
    in_new_netns(async || {
        let host = Host::new();
        for first_leaves_first in [true, false] {
            let first = host.run("a.lock", &[ONE]).await;
            let second = host.run("b.lock", &[TWO]).await;
            let (leaves, stays, vip) = if first_leaves_first { (first, second, TWO) } else { (second, first, ONE) };
            leaves.withdraw().await.expect("taken away");
            assert_eq!((host.shows().await, host.files()), ((vec![vip], true), 1));
            stays.withdraw().await.expect("taken away");
            assert_eq!((host.shows().await, host.files()), ((vec![], false), 0));
        }
    });
}

#[test]
fn a_vip_of_two_goes_with_the_last() {
    in_new_netns(async || {
        let host = Host::new();
        for first_leaves_first in [true, false] {
            let first = host.run("a.lock", &[ONE, SIX]).await;
            let second = host.run("b.lock", &[ONE, SIX]).await;
            let (leaves, stays) = if first_leaves_first { (first, second) } else { (second, first) };
            leaves.withdraw().await.expect("taken away");
            assert_eq!(host.shows().await, (vec![ONE, SIX], true));
            stays.withdraw().await.expect("taken away");
            assert_eq!((host.shows().await, host.files()), ((vec![], false), 0));
        }
    });
}

#[test]
fn a_crash_of_one_is_cleaned_up_after_beside_the_other() {
    in_new_netns(async || {
        let host = Host::new();
        drop(host.run("a.lock", &[ONE, SIX]).await);
        let other = host.run("b.lock", &[TWO]).await;
        assert_eq!(host.shows().await, (vec![ONE, TWO, SIX], true), "the crashed one's stay for its next start");
        assert!(host.start("a.lock", &[]).await.is_none());
        assert_eq!(host.shows().await, (vec![TWO], true));
        other.withdraw().await.expect("taken away");
        assert_eq!((host.shows().await, host.files()), ((vec![], false), 0));
    });
}

#[test]
fn a_lock_elsewhere_keeps_its_vip_and_the_settings_with_it() {
    in_new_netns(async || {
        let host = Host::new();
        let first = host.run("a.lock", &[ONE]).await;
        let second = host.run("elsewhere/b.lock", &[ONE, TWO]).await;
        second.withdraw().await.expect("taken away");
        assert_eq!(host.shows().await, (vec![ONE], true), "that one is the first one's");
        let second = host.run("elsewhere/b.lock", &[TWO]).await;
        first.withdraw().await.expect("taken away");
        assert_eq!(host.shows().await, (vec![TWO], true), "what the first one found is written down still");
        second.withdraw().await.expect("taken away");
        assert!(host.start("a.lock", &[]).await.is_none());
        assert_eq!((host.shows().await, host.files()), ((vec![], false), 0));
    });
}

#[test]
fn what_is_no_state_file_of_ours_says_nothing() {
    in_new_netns(async || {
        let host = Host::new();
        let place = host.directory.path().join("other.state");
        let path = std::ffi::CString::new(place.as_os_str().as_encoded_bytes()).expect("no NUL");
        // SAFETY: `path` is a NUL-terminated string that outlives the call.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
        let changed = SETTINGS.map(|(path, after)| Changed { path: path.into(), before: 7, after }).to_vec();
        let state = State { place: state::place(), changed, vips: vec![TWO], ours: vec![ONE] };
        let foreign = host.directory.path().join("foreign.state");
        state.save(&foreign).expect("written");
        std::os::unix::fs::chown(&foreign, Some(65_534), None).expect("root may");
        let vips = host.run("a.lock", &[ONE]).await;
        vips.withdraw().await.expect("taken away");
        assert_eq!(host.shows().await, (vec![], false));
    });
}
