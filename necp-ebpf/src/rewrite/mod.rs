//! A decision → the frame that leaves. One module a forwarding type (draft §5.6.1).

pub mod l2;
