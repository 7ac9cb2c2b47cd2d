//! The tasks: the only place that names tokio.

pub mod se;
