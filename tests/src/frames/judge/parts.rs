//! Where the first parts of datagrams went, as the judge saw it: the others must follow.

use std::collections::HashMap;

use necp_ebpf::{
    abi::REACHABLE,
    verdict::{Action, Reason},
};

use super::{Class, Family, sent::Sent, six};
use crate::frames::scene::{VIP, VIP6};

/// Where a datagram's first part went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// To this server.
    Server(u32),
    /// To a client, as a server's reply.
    Client,
    /// To this host's own stack.
    Host,
    /// Nowhere, or it was answered: anything may become of the others.
    Unknown,
}

/// Source and destination address, identification and protocol (RFC 791 §3.2); of IPv6 without the protocol (RFC 8200 §4.5).
type Key = (Vec<u8>, u32, u8);

/// First parts since the last [`clear`](Self::clear).
#[derive(Default)]
pub struct Parts(HashMap<Key, Place>);

impl Parts {
    /// As the tables do when they are told to forget fragments.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Takes note of a first part; holds another one against what is noted.
    pub(super) fn hold(&mut self, class: Class, sent: &Sent<'_>) -> Result<(), String> {
        let header = &sent.before[sent.l3..];
        let (key, to_vip, is_first) = match sent.family {
            Family::Four => {
                let key = (header[12..20].to_vec(), u32::from(u16::from_be_bytes([header[4], header[5]])), header[9]);
                (key, header[16..20] == VIP, header[6] & 0x20 != 0)
            }
            Family::Six => {
                let datagram = six::Datagram::of(header, false).map_err(|not| format!("a part of {not:?}"))?;
                let (is_first, id) = datagram.part.unwrap_or_default();
                ((datagram.addresses().to_vec(), id, 0), header[six::DESTINATION] == VIP6, is_first)
            }
        };
        if class == Class::LaterPart {
            return self.follows(&key, to_vip, sent);
        }
        let place = match sent.deed.reason {
            _ if !is_first => None,
            Reason::Reply | Reason::ReplyRouted => Some(Place::Client),
            Reason::Fragmenting => Some(Place::Server(sent.to_be_fragmented()?)),
            reason => match reason.action() {
                Action::Transmit => Some(Place::Server(sent.to_server()?)),
                // Of what is cut through, and of what a VIP's host is to answer, all parts are the host's; and of what comes
                // after another datagram of that name.
                Action::Pass => {
                    (to_vip || class == Class::Crossing || self.0.contains_key(&key)).then_some(Place::Host)
                }
                Action::Answer | Action::Drop | Action::Route => Some(Place::Unknown),
            },
        };
        if let Some(place) = place {
            self.0.insert(key, place);
        }
        Ok(())
    }

    fn follows(&self, key: &Key, to_vip: bool, sent: &Sent<'_>) -> Result<(), String> {
        let reason = sent.deed.reason;
        let place = self.0.get(key);
        let answered = matches!(reason, Reason::Untold);
        let follows = match place {
            None if to_vip => reason == Reason::StrayPart,
            None | Some(Place::Host) => reason == Reason::Fragment,
            Some(Place::Unknown) => true,
            Some(Place::Client) => matches!(reason, Reason::Reply | Reason::ReplyRouted) || answered,
            Some(Place::Server(id)) => {
                let reachable = sent.tables.server(*id).is_some_and(|server| server.flags & REACHABLE != 0);
                match reason {
                    Reason::Part => sent.to_server()? == *id,
                    Reason::Fragmenting => sent.to_be_fragmented()? == *id,
                    Reason::NoNextHop => true,
                    Reason::Fragment => !reachable,
                    _ => answered,
                }
            }
        };
        if follows { Ok(()) } else { Err(format!("{reason:?} for another part of what went to {place:?}")) }
    }
}
