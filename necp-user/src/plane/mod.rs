//! The kernel side: the only place that names aya and netlink.
