//! Where the packet path runs: the interface that a frame came in by, and what can be done to a frame beside writing in it.

use crate::{
    frame::Frame,
    rare::{FragmentKey, FragmentPlace},
    rewrite::l2::Mac,
    six::{
        head::{Walk, walk},
        routed,
    },
    tables::{Address6, Tables},
    verdict::Reason,
};

/// The kernel's interface, or a test's.
pub trait Device {
    /// The frame as it is now.
    fn frame(&self) -> Frame;
    /// Its length in bytes; what is in the frame's first buffer may be less.
    fn length(&self) -> usize;
    /// Where the datagram begins ([`skip_tags`](crate::rare::skip_tags)).
    fn datagram_at(&self) -> usize;
    /// The same of IPv6.
    fn datagram6_at(&self) -> usize;
    /// What the extension headers of the IPv6 datagram at this offset say ([`walk`](crate::six::head::walk)).
    #[inline(always)]
    fn walk6(&self, at: usize) -> Walk {
        walk(&self.frame().skip(at))
    }
    /// Room for this many bytes before the frame's first one; what stands in them means nothing.
    fn grow(&self, bytes: u32) -> bool;
    /// Takes this many bytes from the frame's end.
    fn shorten(&self, bytes: u32) -> bool;
    /// MAC address of the interface that the frame came in by.
    fn own_mac(&self) -> Mac;
    /// MAC address of the interface with this index in [`names::PORTS`](crate::abi::names::PORTS).
    fn port_mac(&self, index: u32) -> Option<Mac>;
    /// Whether one more ICMP error may be sent now; it counts as sent.
    fn may_tell(&self) -> bool;
    /// Remembers from now on where a datagram's first part went.
    fn remember(&self, key: &FragmentKey, place: FragmentPlace);
    /// Where it went, if that was not long ago.
    fn recall(&self, key: &FragmentKey) -> Option<FragmentPlace>;
    /// Counts a packet of so many bytes for a server.
    fn count(&self, server: u32, bytes: u64, begins: bool);
    /// Counts a reply of a server.
    fn count_reply(&self, server: u32);
    /// Which way the kernel would route a packet that came in by this interface.
    fn way(&self, packet: &Routed) -> Way;
    /// The same of IPv6.
    fn way6(&self, packet: &Routed6) -> Way;

    // In the kernel each of these is a function of its own, with a stack of its own, on the kernel's tables.

    /// [`routed::send`].
    #[inline(always)]
    fn send_routed6<T: Tables>(&self, tables: &T, server: u32, reason: u32, l3: usize) -> Ending
    where
        Self: Sized,
    {
        routed::send(self, tables, server, reason, l3)
    }
    /// [`routed::send_reply`].
    #[inline(always)]
    fn send_reply6<T: Tables>(&self, tables: &T, l3: usize, vip: u32, server: u32) -> Ending
    where
        Self: Sized,
    {
        routed::send_reply(self, tables, l3, vip, server)
    }
}

/// What routing looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Routed {
    /// Source address, as it stands in the header.
    pub source: u32,
    /// Destination address, likewise.
    pub destination: u32,
    /// IP protocol.
    pub protocol: u8,
    /// Type of service.
    pub tos: u8,
    /// Total length in bytes.
    pub length: u16,
}

/// What routing looks at, of IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Routed6 {
    /// Source address.
    pub source: Address6,
    /// Destination address.
    pub destination: Address6,
    /// The header's first word, as it stands there: traffic class and flow label.
    pub first: u32,
    /// IP protocol.
    pub protocol: u8,
    /// Length in bytes, the IPv6 header included.
    pub length: u16,
}

/// What routing says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Out by this interface.
    Out {
        /// The kernel's index of it.
        link: u32,
        /// MAC address of the next hop.
        to: Mac,
        /// MAC address of the interface.
        from: Mac,
    },
    /// Out by an interface with this MTU, which is too small.
    TooBig(u16),
    /// The packet path cannot send it there itself: no neighbour yet, an interface that is not ours, no route at all.
    Kernel,
}

/// How a frame's way ends: one word, so that functions of the kernel program can return it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending(pub u64);

/// What becomes of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Out {
    /// On to the kernel.
    Pass,
    /// Nothing more.
    Drop,
    /// Back out by the interface that it came in by.
    Back,
    /// Out by the interface with this index in [`names::PORTS`](crate::abi::names::PORTS).
    Port(u32),
    /// Out by the interface with this index of the kernel's.
    Link(u32),
}

impl Ending {
    /// For this reason, this way.
    #[inline(always)]
    pub const fn new(reason: Reason, out: Out) -> Self {
        Self::numbered(reason as u32, out)
    }

    /// For the reason with this number.
    #[inline(always)]
    pub const fn numbered(reason: u32, out: Out) -> Self {
        let (kind, index) = match out {
            Out::Pass => (0, 0),
            Out::Drop => (1, 0),
            Out::Back => (2, 0),
            Out::Port(index) => (3, index),
            Out::Link(index) => (4, index),
        };
        Self(reason as u64 | kind << 8 | (index as u64) << 32)
    }

    /// It ends here.
    #[inline(always)]
    pub const fn drop(reason: Reason) -> Self {
        Self::new(reason, Out::Drop)
    }

    /// The number of the reason.
    #[inline(always)]
    pub const fn reason(self) -> u32 {
        self.0 as u8 as u32
    }

    /// What becomes of the frame.
    #[inline(always)]
    pub const fn out(self) -> Out {
        let index = (self.0 >> 32) as u32;
        match self.0 >> 8 & 0xff {
            0 => Out::Pass,
            2 => Out::Back,
            3 => Out::Port(index),
            4 => Out::Link(index),
            _ => Out::Drop,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ending_is_the_same_after_its_way_through_a_word() {
        for out in [Out::Pass, Out::Drop, Out::Back, Out::Port(63), Out::Link(0x8000_0001)] {
            for reason in Reason::ALL {
                let ending = Ending::new(reason, out);
                assert_eq!((ending.reason(), ending.out()), (reason as u32, out));
            }
        }
    }
}
