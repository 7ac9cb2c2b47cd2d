//! A decision → the frame that leaves. One module a forwarding type (draft §5.6.1), and what they share.

pub mod checksum;
pub mod gre;
pub mod ipv4;
pub mod l2;
pub mod l3;
pub mod six;
