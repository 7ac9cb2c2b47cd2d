//! NECP, both roles: the network element's daemon and the server element's agent.

#[cfg(test)]
extern crate self as necp_user;

pub mod client;
pub mod config;
pub mod control;
pub mod daemon;
pub mod necp;
pub mod plane;
pub mod secret;
