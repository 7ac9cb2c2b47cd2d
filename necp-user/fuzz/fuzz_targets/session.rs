//! The session machines of both roles: `necp::chaos::session`.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| necp_fuzz::necp::chaos::session(script));
