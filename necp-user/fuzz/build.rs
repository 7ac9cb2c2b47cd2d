//! The core's scripts are compiled for tests and for fuzzing only; cargo-fuzz says which, plain cargo does not.
fn main() {
    println!("cargo::rustc-cfg=fuzzing");
    println!("cargo::rerun-if-changed=build.rs");
}
