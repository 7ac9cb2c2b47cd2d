//! Bounds of the slot table.
