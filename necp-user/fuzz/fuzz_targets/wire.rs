//! The streaming decoder: `necp::chaos::wire`.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| necp_fuzz::necp::chaos::wire(script));
