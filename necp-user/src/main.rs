//! The `necp` command.

fn main() {}
