//! The tasks: the only place that names tokio.

pub mod admin;
pub mod ne;
pub mod peer;
pub mod se;
pub mod status;
