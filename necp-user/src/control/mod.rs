//! The sans-IO decisions of a network element.
