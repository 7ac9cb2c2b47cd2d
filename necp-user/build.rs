//! Builds the kernel program (package `necp-ebpf`) for BPF and leaves it in `OUT_DIR`, to be embedded by `plane`.

use anyhow::Context as _;
use aya_build::{Package, Toolchain};

/// The one toolchain of this project (`rust-toolchain.toml` says the same).
const TOOLCHAIN: &str = "1.95.0";

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=../rust-toolchain.toml");
    // SAFETY: the build script has one thread so far.
    // `core` is built from source for the BPF target, which a stable compiler only allows with this variable.
    unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    // Otherwise every crate that the inner build compiles would show up as a warning of this one.
    // SAFETY: as above.
    unsafe { std::env::set_var("CARGO_TERM_QUIET", "true") };
    let root_dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../necp-ebpf");
    aya_build::build_ebpf([Package { name: "necp-ebpf", root_dir, ..Default::default() }], Toolchain::Custom(TOOLCHAIN))
        .context("the kernel program did not build; `cargo xtask setup` installs what that needs")
}
