//! What the integration tests, the demonstration and the benchmark share.

pub mod kernel;
