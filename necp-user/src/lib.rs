//! NECP, both roles: the network element's daemon and the server element's agent.

pub mod config;
pub mod control;
pub mod daemon;
pub mod necp;
pub mod plane;
