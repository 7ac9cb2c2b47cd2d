//! XDP programs of two instructions, for the bed's own plumbing, loaded by bare system calls.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};

use crate::netns::Namespace;

/// What a program does with every packet: linux/bpf.h, `enum xdp_action`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Hands it to the kernel.
    Pass = 2,
    /// Sends it out where it came in.
    Transmit = 3,
}

/// A program on an interface, gone when this is dropped.
#[derive(Debug)]
pub struct Attached {
    _link: OwnedFd,
}

/// Attaches `return ACTION` to an interface of the namespace, in native mode.
///
/// # Errors
/// Without root, or if the interface has a program already.
pub fn attach(ns: &Namespace, interface: &str, action: Action) -> Result<Attached> {
    let link = ns.run(|| attach_here(interface, action));
    let link = link.with_context(|| format!("no XDP program on {interface} in {}", ns.name()))?;
    Ok(Attached { _link: link })
}

fn attach_here(interface: &str, action: Action) -> io::Result<OwnedFd> {
    // linux/bpf.h: commands, program and attach types; linux/if_link.h: native mode.
    const BPF_PROG_LOAD: i32 = 5;
    const BPF_LINK_CREATE: i32 = 28;
    const PROG_TYPE_XDP: u32 = 6;
    const ATTACH_XDP: u32 = 37;
    const DRIVER_MODE: u32 = 1 << 2;
    // r0 = ACTION; exit
    let code = [words(0xb7, action as u32), words(0x95, 0)];
    let length = code.len() as u32;
    let program = bpf(BPF_PROG_LOAD, &[words(PROG_TYPE_XDP, length), code.as_ptr() as u64, c"GPL".as_ptr() as u64])?;
    let name = CString::new(interface)?;
    // SAFETY: `name` is a string that ends in NUL, and lives.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    let program = program.as_raw_fd().cast_unsigned();
    bpf(BPF_LINK_CREATE, &[words(program, index), words(ATTACH_XDP, DRIVER_MODE)])
}

/// Two neighbouring 32-bit fields of a structure.
fn words(first: u32, second: u32) -> u64 {
    let [a, b, c, d] = first.to_ne_bytes();
    let [e, f, g, h] = second.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

fn bpf(command: i32, attributes: &[u64]) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are as long as said, and what they point to outlives the call.
    let made = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) };
    let made = i32::try_from(made).ok().filter(|made| *made >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}
