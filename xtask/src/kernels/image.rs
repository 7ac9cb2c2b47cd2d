//! The initial RAM disk of a guest: programs with their libraries, modules, and what runs first.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::host::{self, Host};

/// A directory that becomes the guest's root.
pub struct Image<'a> {
    host: &'a Host,
    root: PathBuf,
    /// Modules in the order in which they can be loaded.
    modules: Vec<String>,
}

impl<'a> Image<'a> {
    /// An empty root with the mount points that a guest needs.
    pub fn new(host: &'a Host, root: PathBuf) -> Result<Self> {
        let _ = fs::remove_dir_all(&root);
        for dir in ["bin", "dev", "modules", "proc", "run", "sys", "tmp"] {
            fs::create_dir_all(root.join(dir)).with_context(|| format!("cannot make {}", root.display()))?;
        }
        Ok(Self { host, root, modules: Vec::new() })
    }

    /// A program as `/bin/NAME`, without its debug information, and the libraries that it is linked with.
    pub fn program(&mut self, name: &str, file: &Path) -> Result<()> {
        let place = self.root.join("bin").join(name);
        let mut strip = self.host.command("strip");
        strip.arg("-o").arg(&place).arg(file);
        host::execute(&mut strip, "package binutils has `strip`")?;
        // A program without libraries makes ldd fail.
        let output = self.host.command("ldd").arg(file).stderr(Stdio::null()).output().context("ldd did not start")?;
        for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
            let place = self.root.join(library.trim_start_matches('/'));
            if !place.exists() {
                fs::create_dir_all(place.parent().context("a library at the root")?)?;
                fs::copy(library, &place).with_context(|| format!("cannot copy {library}"))?;
            }
        }
        Ok(())
    }

    /// A module of the kernel by its path without ending, e.g. `drivers/net/veth`, and those that it needs.
    pub fn module(&mut self, all: &Path, path: &str) -> Result<()> {
        let index = index(all)?;
        let name = path.rsplit('/').next().unwrap_or(path);
        self.module_by_name(&index, name)
    }

    fn module_by_name(&mut self, index: &[PathBuf], name: &str) -> Result<()> {
        if self.modules.iter().any(|there| there == name) {
            return Ok(());
        }
        let file = index.iter().find(|file| module_name(file).as_deref() == Some(name));
        let file = file.with_context(|| format!("this kernel's package has no module {name}"))?;
        let bytes = if file.extension().is_some_and(|ending| ending == "xz") {
            let output = self.host.command("xz").arg("-dc").arg(file).output().context("xz did not start")?;
            ensure!(output.status.success(), "xz cannot read {}", file.display());
            output.stdout
        } else {
            fs::read(file)?
        };
        for needed in dependencies(&bytes) {
            self.module_by_name(index, &needed)?;
        }
        fs::write(self.root.join(format!("modules/{name}.ko")), bytes)?;
        self.modules.push(name.to_owned());
        Ok(())
    }

    /// Lines of a shell script that load the modules.
    pub fn load_modules(&self) -> String {
        self.modules.iter().fold(String::new(), |mut text, name| {
            let _ = writeln!(text, "insmod /modules/{name}.ko");
            text
        })
    }

    /// Writes the script that runs first, and packs everything into a file.
    pub fn pack(self, script: &str, file: &Path) -> Result<()> {
        let init = self.root.join("init");
        fs::write(&init, script)?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        let mut pack = self.host.command("sh");
        pack.args(["-c", "find . | busybox cpio --quiet -o -H newc >\"$0\""]).arg(file).current_dir(&self.root);
        host::execute(&mut pack, "package busybox-static has `cpio`")
    }
}

/// Absolute paths in ldd's output: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn libraries(ldd: &str) -> BTreeSet<&str> {
    ldd.split_whitespace().filter(|word| word.starts_with('/')).collect()
}

fn index(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(index(&path)?);
        } else {
            files.push(path);
        }
    }
    if files.is_empty() { bail!("no modules in {}", dir.display()) } else { Ok(files) }
}

/// `veth` of `…/veth.ko.xz`; the kernel makes no difference between `-` and `_`.
fn module_name(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    let name = name.strip_suffix(".xz").unwrap_or(name).strip_suffix(".ko")?;
    Some(name.replace('-', "_"))
}

/// The names after `depends=` in a module's information.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(place) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let rest = &module[place + KEY.len()..];
    let end = rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len());
    let names = String::from_utf8_lossy(&rest[..end]).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_off_ldd() {
        let ldd =
            "\tlinux-vdso.so.1 (0x7)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n\t/lib64/ld-linux-x86-64.so.2 (0x7)\n";
        assert_eq!(libraries(ldd).into_iter().collect::<Vec<_>>(), ["/lib/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert!(libraries("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn modules_name_what_they_need() {
        assert_eq!(module_name(Path::new("/a/ip_gre.ko.xz")).as_deref(), Some("ip_gre"));
        assert_eq!(module_name(Path::new("/a/virtio-rng.ko")).as_deref(), Some("virtio_rng"));
        assert_eq!(module_name(Path::new("/a/modules.order")), None);
        assert_eq!(dependencies(b"x\0license=GPL\0depends=ip_tunnel,gre\0name=ip_gre\0"), ["ip_tunnel", "gre"]);
        assert!(dependencies(b"\0depends=\0").is_empty() && dependencies(b"").is_empty());
    }
}
