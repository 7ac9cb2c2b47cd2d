//! Every packet ends in exactly one [`Reason`], which is one counter and one [`Action`].

/// Why a packet went where it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Reason {
    /// Neither IPv4 nor IPv6: ARP, anything else.
    NotIp = 0,
    /// Its headers do not add up.
    Malformed = 1,
    /// A fragment of something that is not ours.
    Fragment = 2,
    /// No service for its destination.
    NotOurs = 3,
    /// IP, but sent to another host's MAC address or to many.
    OtherHost = 4,
    /// For a service that no server takes new flows of: the host's own stack answers.
    NoServer = 5,
    /// Cut through.
    Direct = 6,
    /// A plain slot's owner.
    Plain = 7,
    /// Its flow is on record.
    Record = 8,
    /// Its flow began before a change: sent to the slot's legacy, and recorded.
    Adopted = 9,
    /// Its flow began before a change, but the flow table had no room: sent to the slot's legacy.
    Legacy = 10,
    /// A slot in transition, no record: sent to the owner.
    Owner = 11,
    /// A new flow, placed.
    New = 12,
    /// A new flow, but the flow table had no room: sent where its next packet will go.
    NewUnrecorded = 13,
    /// The same SYN again, sent to the same server.
    Repeated = 14,
    /// The first packet after the SYN: its candidate became a record.
    Confirmed = 15,
    /// Its server's MAC address is not known.
    NoNextHop = 16,
    /// The tables contradict themselves: an error of ours.
    BadTables = 17,
    /// Longer than what gets to its server, and not to be fragmented: its sender is told so (RFC 1191 §4).
    TooBig = 18,
    /// Its time to live is over where it would be routed: its sender is told so (RFC 792).
    Expired = 19,
    /// Its sender should be told something, but may not be: too many were, or this is nothing to answer (RFC 1122 §3.2.2).
    Untold = 20,
    /// Made ready for its server, and too long for the way there: the kernel routes and fragments it.
    Fragmenting = 21,
    /// A server's reply, which leaves with the VIP's address (layer 3).
    Reply = 22,
    /// The same, but the packet path knows no way: the kernel routes it.
    ReplyRouted = 23,
    /// A later fragment, sent where the first one went.
    Part = 24,
    /// A later fragment to a VIP, whose first one is not known: nobody could put it together.
    StrayPart = 25,
    /// ICMP, but no error about a flow of ours.
    Icmp = 26,
    /// An ICMP error, sent to the server that has the flow which it quotes.
    Quoted = 27,
    /// ICMP echo to a VIP that does not answer any.
    Echo = 28,
    /// More IPv6 extension headers than are looked at, or a routing header with places left to go.
    Extended = 29,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It goes on to the kernel, untouched.
    Pass,
    /// It goes out, to a server or from one.
    Transmit,
    /// An ICMP error about it goes back to its sender.
    Answer,
    /// It goes on to the kernel, edited, to be routed.
    Route,
    /// It ends here.
    Drop,
}

/// How many reasons there are.
pub const REASONS: u32 = 30;

impl Reason {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; REASONS as usize] = [
        Self::NotIp,
        Self::Malformed,
        Self::Fragment,
        Self::NotOurs,
        Self::OtherHost,
        Self::NoServer,
        Self::Direct,
        Self::Plain,
        Self::Record,
        Self::Adopted,
        Self::Legacy,
        Self::Owner,
        Self::New,
        Self::NewUnrecorded,
        Self::Repeated,
        Self::Confirmed,
        Self::NoNextHop,
        Self::BadTables,
        Self::TooBig,
        Self::Expired,
        Self::Untold,
        Self::Fragmenting,
        Self::Reply,
        Self::ReplyRouted,
        Self::Part,
        Self::StrayPart,
        Self::Icmp,
        Self::Quoted,
        Self::Echo,
        Self::Extended,
    ];

    /// The fast path leaves what it finds so to the program for what comes seldom.
    #[inline(always)]
    pub const fn is_rare(self) -> bool {
        matches!(self, Self::NotIp | Self::Malformed | Self::Fragment | Self::Icmp)
    }

    /// The one action of each.
    #[inline(always)]
    pub const fn action(self) -> Action {
        match self {
            Self::NotIp
            | Self::Malformed
            | Self::Fragment
            | Self::NotOurs
            | Self::OtherHost
            | Self::NoServer
            | Self::Direct
            | Self::Icmp
            | Self::Extended => Action::Pass,
            Self::Plain
            | Self::Record
            | Self::Adopted
            | Self::Legacy
            | Self::Owner
            | Self::New
            | Self::NewUnrecorded
            | Self::Repeated
            | Self::Confirmed
            | Self::Reply
            | Self::Part
            | Self::Quoted => Action::Transmit,
            Self::TooBig | Self::Expired => Action::Answer,
            Self::Fragmenting | Self::ReplyRouted => Action::Route,
            Self::NoNextHop | Self::BadTables | Self::Untold | Self::StrayPart | Self::Echo => Action::Drop,
        }
    }

    /// Its name in `necp status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotIp => "not-ip",
            Self::Malformed => "malformed",
            Self::Fragment => "fragment",
            Self::NotOurs => "not-ours",
            Self::OtherHost => "other-host",
            Self::NoServer => "no-server",
            Self::Direct => "direct",
            Self::Plain => "plain",
            Self::Record => "record",
            Self::Adopted => "adopted",
            Self::Legacy => "legacy",
            Self::Owner => "owner",
            Self::New => "new",
            Self::NewUnrecorded => "new-unrecorded",
            Self::Repeated => "repeated",
            Self::Confirmed => "confirmed",
            Self::NoNextHop => "no-next-hop",
            Self::BadTables => "bad-tables",
            Self::TooBig => "too-big",
            Self::Expired => "expired",
            Self::Untold => "untold",
            Self::Fragmenting => "fragmenting",
            Self::Reply => "reply",
            Self::ReplyRouted => "reply-routed",
            Self::Part => "part",
            Self::StrayPart => "stray-part",
            Self::Icmp => "icmp",
            Self::Quoted => "quoted",
            Self::Echo => "echo",
            Self::Extended => "extended",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_order_agree_and_names_differ() {
        for (number, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, number);
            assert_eq!(Reason::ALL.iter().filter(|other| other.name() == reason.name()).count(), 1);
        }
    }
}
