//! What the integration tests, the demonstration and the benchmark share.
//!
//! A test bed of network namespaces: hosts joined by veth and bridges, real servers in them, our daemons, and clients
//! that notice when a connection breaks or moves.
//!
//! ```text
//!  client ─ c0 ┐              ┌ s0 ─ server s1 (VIP on lo)
//!              ├ br0 (switch) ┤ s1 ─ server s2
//!      ne ─ ne0┘              └ …
//! ```
//!
//! [`topology::Topology`] builds it in a fraction of a second and takes it away again, however the process ends:
//! see [`cleanup`]. [`kernel`] runs the kernel program on single frames, without a network. Everything needs root, and says so.

pub mod attack;
pub mod both;
pub mod capture;
pub mod cleanup;
pub mod contention;
pub mod conversation;
pub mod daemon;
pub mod demo;
pub mod echo;
pub mod flood;
pub mod floor;
pub mod frame;
pub mod frames;
pub mod hand;
pub mod host_path;
pub mod kernel;
pub mod line;
pub mod link;
pub mod load;
pub mod netns;
pub mod nginx;
pub mod oracle;
pub mod process;
pub mod raw;
pub mod scale;
pub mod schedule;
pub mod squid;
pub mod swarm;
pub mod topology;
pub mod watchman;
pub mod xdp;
