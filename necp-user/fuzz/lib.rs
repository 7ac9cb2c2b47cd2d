//! The protocol core by itself: it does no I/O, so it needs neither the kernel program nor the runtime, and an
//! instrumented build takes seconds.

#[path = "../src/necp/mod.rs"]
pub mod necp;
