//! What can happen, in words that a shrunken history can be read in.

use proptest::prelude::*;

use super::{
    clients::{CLIENTS, FLOWS},
    world::SERVERS,
};

/// One thing that happens. What makes no sense where it stands is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Time passes, and nobody collects.
    Wait {
        /// How much.
        seconds: u16,
    },
    /// Time passes, and user space collects all the while.
    Rest {
        /// How much.
        seconds: u16,
    },
    /// INIT if there is no session, and START: a server is new, or starts again, or comes back.
    Start(u8),
    /// The next START asks for another forwarding type.
    Type(u8),
    /// STOP.
    Stop(u8),
    /// A client begins a connection while a STOP is being written: the server's record is, the slots are not yet.
    OpenDuringStop {
        /// The client.
        client: u8,
        /// The server.
        server: u8,
    },
    /// The session is lost; the host lives.
    LoseSession(u8),
    /// The session is lost and the host is known to be gone.
    HostDies(u8),
    /// The server's next hop is not known for now: its slots stay, new flows go past them.
    NeighbourLost(u8),
    /// It is known again.
    NeighbourFound(u8),
    /// A health index.
    Health(u8, u8),
    /// EXCEPTION_ADD, if there is a session.
    Except {
        /// Whose.
        server: u8,
        /// Which flows, by [`flows`](super::clients::flows).
        flows: u8,
        /// Global, else local.
        global: bool,
        /// Time to live in seconds; 0: until it is taken away.
        ttl: u16,
    },
    /// EXCEPTION_DEL.
    Unexcept {
        /// Whose.
        server: u8,
        /// Which flows.
        flows: u8,
    },
    /// EXCEPTION_RESET.
    ExceptReset(u8),
    /// User space collects.
    Collect,
    /// A client begins a connection; if it had one, that has ended and its tuple is used again.
    Open {
        /// The client.
        client: u8,
        /// Bytes in the SYN.
        data: u16,
    },
    /// The client sends its SYN again.
    SynAgain(u8),
    /// The client sends data.
    Data(u8),
    /// The client acknowledges.
    Ack(u8),
    /// The client sends FIN.
    Fin(u8),
    /// The client sends RST.
    Rst(u8),
    /// Somebody forges a packet of the client's tuple.
    Forge(u8, Forgery),
    /// The client sends UDP.
    Datagram(u8),
    /// Somebody sends an ICMP error about a packet to the client.
    Error(u8),
}

/// What is forged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgery {
    /// SYN.
    Syn,
    /// SYN with data.
    SynData,
    /// FIN.
    Fin,
    /// RST.
    Rst,
    /// ACK without data.
    Ack,
}

const FORGERIES: [Forgery; 5] = [Forgery::Syn, Forgery::SynData, Forgery::Fin, Forgery::Rst, Forgery::Ack];

/// Histories of at most `length` steps.
pub fn histories(length: usize) -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(any::<u32>().prop_map(step), 1..=length)
}

/// A step from a number: cheaper to make than a choice of strategies, and smaller numbers are simpler steps.
fn step(number: u32) -> Step {
    let [kind, who, how, what] = number.to_le_bytes();
    let (server, client) = (who % SERVERS, who % CLIENTS);
    match kind {
        0..=47 => Step::Data(client),
        48..=54 => {
            let ttl = [0, 0, 30, 200][usize::from(how / 16) % 4];
            Step::Except { server, flows: what % FLOWS, global: how % 3 == 0, ttl }
        }
        55..=58 => Step::Unexcept { server, flows: what % FLOWS },
        59 => Step::ExceptReset(server),
        60..=109 => Step::Open { client, data: if how % 4 == 3 { 100 } else { 0 } },
        110..=129 => Step::Ack(client),
        130..=139 => Step::Fin(client),
        140..=144 => Step::Rst(client),
        145..=152 => Step::SynAgain(client),
        153..=167 => Step::Datagram(client),
        168..=179 => Step::Forge(client, FORGERIES[usize::from(how) % FORGERIES.len()]),
        180..=182 => Step::Error(client),
        183..=203 => Step::Start(server),
        204..=207 => Step::Type(server),
        208..=214 => Step::Stop(server),
        215..=217 => Step::OpenDuringStop { client: how % CLIENTS, server },
        218..=223 => Step::LoseSession(server),
        224..=226 => Step::HostDies(server),
        227 => Step::NeighbourLost(server),
        228 => {
            if how % 2 == 0 {
                Step::NeighbourLost(server)
            } else {
                Step::NeighbourFound(server)
            }
        }
        229..=233 => Step::Health(server, [100, 0, 50, 20][usize::from(how) % 4]),
        234..=243 => Step::Collect,
        244..=252 => Step::Wait { seconds: [1, 20, 50, 90, 150, 500][usize::from(how) % 6] },
        _ => Step::Rest { seconds: [50, 100, 190, 500, 700][usize::from(how) % 5] },
    }
}
