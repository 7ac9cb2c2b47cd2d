//! Configuration files: what they may say, and errors that name the line and what to write instead.

pub mod ne;
pub mod strict;
