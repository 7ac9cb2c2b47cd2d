//! Debian packages, without a terminal and without a service coming up.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::host::{self, Host, say};

const LISTS: &str = "/var/lib/apt/lists";

/// Installs packages, after `apt-get update` where the lists are missing or too old for the archive.
///
/// We want the programs of nginx and squid and never their services: we start servers of our own.
pub fn install(host: &Host, packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    if host.which("apt-get").is_none() {
        bail!(
            "missing: {names}. There is no apt-get here: install them with this system's package manager, then retry"
        );
    }
    if !host::is_root() {
        bail!("missing: {names}. As root: `apt-get install {names}` or `cargo xtask setup`");
    }
    if !has_lists(Path::new(LISTS)) {
        update(host)?;
    }
    say(format_args!("installing Debian packages: {names}"));
    let services = [("nginx", "nginx.service"), ("squid", "squid.service")];
    let unwanted = services.into_iter().filter(|(package, _)| packages.contains(package));
    let quiet: Vec<_> = unwanted.map(|(_, unit)| KeptStopped::new(host, unit)).collect();
    let advice = "see apt's message above; `apt-get install` by hand shows it in full";
    if host::execute(&mut apt_get(host, "install", packages), advice).is_err() {
        update(host)?;
        host::execute(&mut apt_get(host, "install", packages), advice)?;
    }
    drop(quiet);
    Ok(())
}

/// What a package depends on, of those whose names begin so.
///
/// # Errors
/// If the archive has no such package.
pub fn dependency(host: &Host, package: &str, prefix: &str) -> Result<String> {
    if host.which("apt-cache").is_none() {
        bail!("there is no apt-cache here, so no package {package}");
    }
    if !has_lists(Path::new(LISTS)) && host::is_root() {
        update(host)?;
    }
    let output = host.command("apt-cache").args(["depends", "--important", package]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found = first_dependency(&text, prefix).map(str::to_owned);
    found.with_context(|| format!("the archive in /etc/apt has no package {package}"))
}

/// Downloads a package into a directory, and does not install it.
///
/// # Errors
/// With apt's message above.
pub fn download(host: &Host, package: &str, dir: &Path) -> Result<PathBuf> {
    let fetch = || {
        // Root may write there, apt's own user may not.
        let mut command = apt_get(host, "download", &[]);
        command.args(["-o", "APT::Sandbox::User=root", package]).current_dir(dir);
        host::execute(&mut command, "see apt's message above; check the network and /etc/apt")
    };
    if fetch().is_err() {
        update(host)?;
        fetch()?;
    }
    let files = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    let mut archives = files.filter(|file| file.extension().is_some_and(|ending| ending == "deb"));
    archives.next().with_context(|| format!("apt-get downloaded no {package}"))
}

/// `  Depends: linux-image-6.1.0-56-cloud-amd64`
fn first_dependency<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    text.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).find(|name| name.starts_with(prefix))
}

fn update(host: &Host) -> Result<()> {
    say("fetching the package lists (apt-get update)");
    host::execute(&mut apt_get(host, "update", &[]), "check the network and /etc/apt/sources.list")
}

fn apt_get(host: &Host, verb: &str, packages: &[&str]) -> Command {
    let mut command = host.command("apt-get");
    command.args(["-q", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=3", verb]);
    if verb == "install" {
        command.args(["--yes", "--no-install-recommends"]).args(packages);
    }
    // In run level 1 (single user) invoke-rc.d starts no System V service; `KeptStopped` does the same for systemd.
    command.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1").env("PREVLEVEL", "N");
    command
}

fn has_lists(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|entries| entries.flatten().any(|file| is_list(&file.file_name().to_string_lossy())))
}

fn is_list(name: &str) -> bool {
    name.contains("_Packages")
}

/// Keeps a unit that a package is about to bring from being started, now and at the next boot, on hosts where systemd
/// runs: masked until the installation is over, then disabled.
struct KeptStopped<'a> {
    host: &'a Host,
    unit: &'static str,
    systemd: bool,
}

impl<'a> KeptStopped<'a> {
    fn new(host: &'a Host, unit: &'static str) -> Self {
        let guard = Self { host, unit, systemd: Path::new("/run/systemd/system").exists() };
        guard.systemctl(&["mask", "--runtime"]);
        guard
    }

    fn systemctl(&self, verb: &[&str]) {
        if !self.systemd {
            return;
        }
        let done = self.host.command("systemctl").args(["--quiet"]).args(verb).arg(self.unit).status();
        if !done.is_ok_and(|status| status.success()) {
            say(format_args!("`systemctl {} {}` failed: the service may be running", verb.join(" "), self.unit));
        }
    }
}

impl Drop for KeptStopped<'_> {
    fn drop(&mut self) {
        self.systemctl(&["unmask", "--runtime"]);
        self.systemctl(&["disable"]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dependency_is_found_by_the_beginning_of_its_name() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-base\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(first_dependency(text, "linux-image-"), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(first_dependency(text, "nginx"), None);
    }

    #[test]
    fn package_lists_are_known_by_name() {
        assert!(is_list("deb.debian.org_debian_dists_bookworm_main_binary-amd64_Packages.lz4"));
        assert!(!is_list("deb.debian.org_debian_dists_bookworm_InRelease"));
        assert!(!has_lists(Path::new("/nonexistent")));
    }
}
