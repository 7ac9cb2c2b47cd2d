//! The server element's side, for programs that want to be one.

mod address;
pub(crate) mod dial;
#[cfg(test)]
pub(crate) mod fake_ne;
mod health;

pub use address::{NeAddress, ParseNeError};
pub use health::HealthIndex;
