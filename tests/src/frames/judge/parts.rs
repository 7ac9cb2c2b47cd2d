//! Where the first parts of datagrams went, as the judge saw it: the others must follow.

use std::collections::HashMap;

use necp_ebpf::{
    abi::REACHABLE,
    verdict::{Action, Reason},
};

use super::{Class, sent::Sent};
use crate::frames::scene::VIP;

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

/// Source and destination address, identification and protocol (RFC 791 §3.2).
type Key = ([u8; 8], [u8; 2], u8);

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
        let mut key: Key = ([0; 8], [header[4], header[5]], header[9]);
        key.0.copy_from_slice(&header[12..20]);
        let to_vip = header[16..20] == VIP;
        if class == Class::LaterPart {
            return self.follows(&key, to_vip, sent);
        }
        let is_first = header[6] & 0x20 != 0;
        let place = match sent.deed.reason {
            _ if !is_first => None,
            Reason::Reply | Reason::ReplyRouted => Some(Place::Client),
            Reason::Fragmenting => Some(Place::Server(sent.to_be_fragmented()?)),
            reason => match reason.action() {
                Action::Transmit => Some(Place::Server(sent.to_server()?)),
                Action::Pass => to_vip.then_some(Place::Host),
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
