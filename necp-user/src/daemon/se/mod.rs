//! The server element's agent.
