//! Debian's kernels: downloaded and unpacked, never installed.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{
    apt,
    host::{self, Host, say},
};

/// A kernel that can boot.
pub struct Kernel {
    /// Its release, as `uname -r` says it.
    pub release: String,
    /// The compressed image.
    pub image: PathBuf,
    /// The directory of its modules.
    pub modules: PathBuf,
}

/// The newest kernel of a package that depends on one; from the cache below `target`, if it is there.
///
/// # Errors
/// If Debian does not offer it here, or it cannot be fetched.
pub fn kernel(host: &Host, package: &str) -> Result<Kernel> {
    let real = apt::dependency(host, package, "linux-image-")?;
    let release = real.trim_start_matches("linux-image-").to_owned();
    let dir = host.target.join("kernels");
    let unpacked = dir.join(&real);
    let kernel = Kernel {
        image: unpacked.join(format!("boot/vmlinuz-{release}")),
        modules: unpacked.join(format!("lib/modules/{release}/kernel")),
        release,
    };
    if kernel.image.exists() {
        return Ok(kernel);
    }
    say(format_args!("fetching {real} (once)"));
    // A directory of its own: unpacked whole, or not at all.
    let fresh = dir.join(format!("{real}.new"));
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(fresh.join("root")).with_context(|| format!("cannot make {}", fresh.display()))?;
    let archive = apt::download(host, &real, &fresh)?;
    let mut unpack = host.command("dpkg-deb");
    unpack.arg("-x").arg(archive).arg(fresh.join("root"));
    host::execute(&mut unpack, "see dpkg-deb's message above; is there room on the disk?")?;
    fs::rename(fresh.join("root"), &unpacked).with_context(|| format!("cannot make {}", unpacked.display()))?;
    fs::remove_dir_all(&fresh)?;
    Ok(kernel)
}
