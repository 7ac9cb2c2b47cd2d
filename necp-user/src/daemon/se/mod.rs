//! The server element's agent.

pub mod drain;
pub mod health;
pub mod lock;
pub mod vip;
