//! An oracle that remembers every flow, against the packet path and the control plane that try not to.
//!
//! [`play`](play::play) takes a history ([`Step`](step::Step)s), plays it on a [`World`](world::World) (the real
//! [`steer`](necp_ebpf::steer::steer), the real [`Cluster`](necp_user::control::cluster::Cluster), host-side tables) and
//! says what broke a promise. Forgeries in scope are those of an attacker who cannot see the flow: a SYN with or without
//! data, FIN, RST and ACK with sequence numbers that are not the flow's own, and nothing that answers his own SYN
//! (its number + 1 comes only from somebody who chose that number). A flow that is still half open is not in his scope: a
//! later SYN of the same tuple overwrites its candidate, by design.

pub mod clients;
pub mod play;
pub mod step;
pub mod world;
