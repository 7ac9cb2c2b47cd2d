//! The sans-IO decisions of a network element: who serves what, which slots that makes, what has to be written.
//!
//! ```text
//!  START, STOP, health, loss, neighbours ──► cluster ──► plan ──► apply ──► the maps (a View)
//!                                              ▲                               │
//!                                              └── ids seen ── collect ◄───────┘
//! ```
//!
//! 1. [`cluster`]: farms, server elements and their offers; every input returns a [`Change`](cluster::Change) number.
//! 2. [`slots`]: members and weights → slot table, the same on every NE. [`weight`]: health and slow start → weight.
//! 3. [`plan`]: desired − installed, and the writes that make it so. An ACK may go out once a change was applied.
//! 4. [`collect`]: what the packet path remembered and nobody needs any more; see "Collection" in the design.
//! 5. [`exceptions`]: flows that servers do not want.
//! 6. [`ids`]: server ids, never reused while anything may name them. [`adopt`]: starting anew on maps that are in use.
//!
//! Nothing here does I/O or reads a clock. [`Cluster::plan`](cluster::Cluster::plan), [`Plan::apply`](plan::Plan::apply) and
//! [`Collector::step`](collect::Collector::step) must be called from one thread: they race with the packet path only.

pub mod adopt;
pub mod cluster;
pub mod collect;
pub mod config;
pub mod exceptions;
pub mod ids;
pub mod layout;
mod lifecycle;
mod offers;
pub mod plan;
pub mod slots;
pub mod stable;
pub mod status;
#[cfg(test)]
mod testbed;
pub mod weight;
