//! Installs what is missing. Every other task calls the part that it needs; with nothing missing that takes
//! milliseconds, because it only looks at files and asks one program for its version.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    apt,
    host::{self, Host, say},
};

/// The one toolchain; `rust-toolchain.toml` says the same.
const TOOLCHAIN: &str = "1.95.0";
const BPF_LINKER: &str = "0.10.3";
const CARGO_FUZZ: &str = "0.13.2";
const BPF_FS: &str = "/sys/fs/bpf";

/// What the namespaces, the demonstration, interception, the reader of the maps and the dissector's tests use: (program, Debian package).
const PROGRAMS: [(&str, &str); 7] = [
    ("ip", "iproute2"),
    ("nginx", "nginx"),
    ("squid", "squid"),
    ("nft", "nftables"),
    ("bpftool", "bpftool"),
    ("tshark", "tshark"),
    ("python3", "python3"),
];

/// What booting other kernels takes.
const GUEST_PROGRAMS: [(&str, &str); 5] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("xz", "xz-utils"),
    ("strip", "binutils"),
    ("dpkg-deb", "dpkg"),
];

/// `cargo xtask setup`: all of it.
pub fn everything(host: &Host) -> Result<()> {
    build(host)?;
    traffic(host)?;
    guests(host)?;
    say("nothing is missing");
    Ok(())
}

/// What building takes: the toolchain with its components, and the BPF linker.
pub fn build(host: &Host) -> Result<()> {
    toolchain(host)?;
    bpf_linker(host)
}

/// What running traffic takes: programs and the BPF file system.
pub fn traffic(host: &Host) -> Result<()> {
    programs(host, &PROGRAMS)?;
    bpf_file_system(host)
}

/// What `cargo xtask test --kernels` takes: an emulator, and what makes a guest's RAM disk.
pub fn guests(host: &Host) -> Result<()> {
    programs(host, &GUEST_PROGRAMS)
}

fn programs(host: &Host, wanted: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> = wanted.iter().filter(|(program, _)| host.which(program).is_none()).collect();
    if !missing.is_empty() {
        let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
        apt::install(host, &packages)?;
        for (program, package) in missing {
            ensure!(host.which(program).is_some(), "package {package} is installed, yet there is no `{program}`");
        }
    }
    Ok(())
}

/// The toolchain and the components that building and linting use.
pub fn toolchain(host: &Host) -> Result<()> {
    let rustup = host.which("rustup").context(
        "there is no rustup, which provides the pinned toolchain and its rust-src: install it from https://rustup.rs",
    )?;
    let advice = "check the network; `rustup toolchain list` shows what is there";
    let Some(sysroot) = sysroot(host) else {
        say(format_args!("installing Rust {TOOLCHAIN}"));
        let mut install = host.command(&rustup);
        install.args(["toolchain", "install", TOOLCHAIN, "--profile", "minimal"]);
        install.args(["--component", "rust-src", "--component", "rustfmt", "--component", "clippy"]);
        return host::execute(&mut install, advice);
    };
    let components = [
        ("rust-src", "lib/rustlib/src/rust/library/core/src/lib.rs"),
        ("rustfmt", "bin/cargo-fmt"),
        ("clippy", "bin/cargo-clippy"),
    ];
    for (component, file) in components {
        if !sysroot.join(file).exists() {
            say(format_args!("adding {component} to Rust {TOOLCHAIN}"));
            let mut add = host.command(&rustup);
            add.args(["component", "add", component, "--toolchain", TOOLCHAIN]);
            host::execute(&mut add, advice)?;
        }
    }
    Ok(())
}

fn bpf_linker(host: &Host) -> Result<()> {
    let wanted = format!("bpf-linker {BPF_LINKER}");
    let found = host.which("bpf-linker").and_then(|linker| host.command(linker).arg("--version").output().ok());
    if found.is_some_and(|version| String::from_utf8_lossy(&version.stdout).trim() == wanted) {
        return Ok(());
    }
    say(format_args!("installing {wanted} (once; some minutes)"));
    let mut install = host.command("rustup");
    install.args(["run", TOOLCHAIN, "cargo", "install", "bpf-linker", "--version", BPF_LINKER, "--locked"]);
    host::execute(&mut install, "see cargo's message above; it needs the network and a C compiler")
}

/// What fuzzing takes, which only `cargo xtask fuzz` asks for.
pub fn fuzz(host: &Host) -> Result<()> {
    toolchain(host)?;
    let wanted = format!("cargo-fuzz {CARGO_FUZZ}");
    let found = host.which("cargo-fuzz").and_then(|fuzz| host.command(fuzz).args(["fuzz", "--version"]).output().ok());
    if found.is_some_and(|version| String::from_utf8_lossy(&version.stdout).trim() == wanted) {
        return Ok(());
    }
    say(format_args!("installing {wanted} (once; a minute)"));
    let mut install = host.command("rustup");
    install.args(["run", TOOLCHAIN, "cargo", "install", "cargo-fuzz", "--version", CARGO_FUZZ, "--locked"]);
    host::execute(&mut install, "see cargo's message above; it needs the network and a C++ compiler")
}

fn bpf_file_system(host: &Host) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    let mounted = mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(BPF_FS) && fields.next() == Some("bpf")
    });
    if mounted {
        return Ok(());
    }
    if !host::is_root() {
        bail!("the BPF file system is not mounted; as root: `mount -t bpf bpf {BPF_FS}`");
    }
    say(format_args!("mounting the BPF file system on {BPF_FS}"));
    let advice = "the kernel needs CONFIG_BPF_SYSCALL, and a container the right to mount";
    host::execute(host.command("mount").args(["-t", "bpf", "bpf", BPF_FS]), advice)
}

fn sysroot(host: &Host) -> Option<PathBuf> {
    let toolchain = format!("+{TOOLCHAIN}");
    // `RUSTUP_AUTO_INSTALL=0`: to look must not download.
    let mut look = host.command("rustc");
    look.args([toolchain.as_str(), "--print", "sysroot"]).env("RUSTUP_AUTO_INSTALL", "0");
    let output = look.output().ok().filter(|output| output.status.success())?;
    Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
}
