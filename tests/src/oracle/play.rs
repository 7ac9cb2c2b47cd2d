//! Plays a history and checks every promise, on a flow table with room for all.

use std::time::{Duration, Instant};

use necp_ebpf::{
    host::View,
    packet::{Packet, tcp},
    steer::Decision,
    verdict::{REASONS, Reason},
};
use necp_user::necp::message::{Exception, Flows, Scope};

use super::{
    clients::{CLIENTS, FLOWS, datagram, flows, is_of, segment, syn},
    step::{Forgery, Step},
    world::{CLOSING, HALF_OPEN, Kind, ORPHAN, Place, SERVERS, Size, TCP_IDLE, UDP_IDLE, World},
};

/// How strictly flows are held to their servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// The flow table has room for all: no flow ever moves.
    Every,
    /// It has not: a flow may move if it had no record after its last packet.
    Recorded,
}

/// What was seen on the way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Played {
    /// Packets by reason.
    pub reasons: [u64; REASONS as usize],
    /// Flows that lost their server.
    pub orphaned: u64,
    /// Flows that moved because they could not be recorded.
    pub moved: u64,
}

/// Plays; an error says which step broke what.
pub fn play(size: Size, promise: Promise, view: View<'_>, history: &[Step]) -> Result<Played, String> {
    let mut game = Game::new(size, promise, view);
    for (number, &step) in history.iter().enumerate() {
        game.step(step).map_err(|message| format!("step {number}, {step:?}: {message}"))?;
    }
    game.end()?;
    game.played.reasons = game.world.reasons;
    Ok(game.played)
}

/// A server element as the oracle knows it.
#[derive(Clone, Copy, Debug, Default)]
struct Se {
    session: bool,
    lost: Option<Instant>,
    started: bool,
    gone: bool,
    /// It had a next hop once, and has it no more.
    unreachable: bool,
    healthy: bool,
}

impl Se {
    fn takes_flows(&self) -> bool {
        self.session && self.started && self.healthy && !self.gone && !self.unreachable
    }
}

/// A flow that must stay where it is.
#[derive(Clone, Copy, Debug)]
struct Flow {
    place: Place,
    /// Of the server id that it began with: another START may ask for another one.
    forwarding: u8,
    id: u32,
    seen: Instant,
    limit: Duration,
    isn: u32,
    next: u32,
    established: bool,
    /// It certainly has a record, or needs none.
    sure: bool,
    /// [`Game::epoch`] when it began.
    epoch: u64,
}

/// An exception as the oracle knows it.
#[derive(Clone, Copy, Debug)]
struct Excepted {
    server: u8,
    flows: Flows,
    global: bool,
    /// When its time is over.
    end: Option<Instant>,
}

/// How long an exception may live on after its time.
const LINGERS: Duration = Duration::from_millis(250);

struct Game<'a> {
    world: World<'a>,
    promise: Promise,
    servers: [Se; SERVERS as usize],
    flows: [Option<Flow>; CLIENTS as usize],
    streams: [Option<Flow>; CLIENTS as usize],
    exceptions: Vec<Excepted>,
    /// Some server was there at some time: before that, packets are the host's own.
    served: bool,
    kind: Kind,
    numbers: u32,
    /// Nothing is being written just now.
    written: bool,
    /// Counts whatever may have changed the slots.
    epoch: u64,
    played: Played,
}

impl<'a> Game<'a> {
    fn new(size: Size, promise: Promise, view: View<'a>) -> Self {
        Self {
            world: World::new(size, view, Instant::now()),
            promise,
            servers: [Se::default(); SERVERS as usize],
            flows: [None; CLIENTS as usize],
            streams: [None; CLIENTS as usize],
            exceptions: Vec::new(),
            // What crossed the network element before any server was there goes on as it did.
            served: size.kind.crosses(),
            kind: size.kind,
            // The first flows' numbers wrap around.
            numbers: u32::MAX - 49,
            written: true,
            epoch: 0,
            played: Played::default(),
        }
    }

    fn step(&mut self, step: Step) -> Result<(), String> {
        match step {
            Step::Wait { seconds } => self.world.wait(Duration::from_secs(seconds.into())),
            Step::Rest { seconds } => self.world.rest(Duration::from_secs(seconds.into())),
            Step::Collect => self.world.collect(),
            Step::Start(server) => self.start(server),
            Step::Type(server) => self.world.change_type(server),
            Step::Stop(server) => {
                self.world.stop(server);
                self.servers[usize::from(server)].started = false;
            }
            Step::OpenDuringStop { client, server } => {
                self.servers[usize::from(server)].started = false;
                self.world.begin_stop(server);
                self.written = false;
                self.open(client, 0)?;
                self.written = true;
                self.world.sync();
            }
            Step::LoseSession(server) => self.lose(server),
            Step::HostDies(server) => {
                self.lose(server);
                self.servers[usize::from(server)].gone = true;
                self.world.host_gone(server);
            }
            Step::NeighbourLost(server) | Step::NeighbourFound(server) => self.neighbour(server, step),
            Step::Health(server, index) => self.health(server, index),
            Step::Except { server, flows: number, global, ttl } => self.except(server, self.named(number), global, ttl),
            Step::Unexcept { server, flows: number } => {
                let flows = self.named(number);
                self.world.unexcept(server, &flows);
                self.exceptions.retain(|one| one.server != server || one.flows != flows);
            }
            Step::ExceptReset(server) => {
                self.world.except_reset(server);
                self.exceptions.retain(|one| one.server != server);
            }
            Step::Open { client, data } => return self.open(client, data),
            Step::SynAgain(client) => return self.syn_again(client),
            Step::Data(client) => return self.segment(client, tcp::ACK, 100),
            Step::Ack(client) => return self.segment(client, tcp::ACK, 0),
            Step::Fin(client) => return self.segment(client, tcp::ACK | tcp::FIN, 0),
            Step::Rst(client) => return self.segment(client, tcp::RST, 0),
            Step::Forge(client, what) => return self.forge(client, what),
            Step::Datagram(client) => return self.datagram(client),
            Step::Error(client) => return self.error(client),
        }
        self.epoch += 1;
        let now = self.world.now;
        self.exceptions.retain(|one| one.end.is_none_or(|end| now < end + LINGERS));
        self.bury()
    }

    fn named(&self, number: u8) -> Flows {
        flows(number, self.kind.is_six())
    }

    fn except(&mut self, server: u8, flows: Flows, global: bool, ttl: u16) {
        if !self.servers[usize::from(server)].session {
            return;
        }
        // Nobody may cut everything through.
        let global = global && flows != self.named(FLOWS - 4);
        let scope = if global { Scope::Global } else { Scope::Local };
        self.world.except(server, &Exception { scope, ttl: ttl.into(), flows });
        let end = (ttl > 0).then(|| self.world.now + Duration::from_secs(ttl.into()));
        self.exceptions.retain(|one| one.server != server || one.flows != flows);
        self.exceptions.push(Excepted { server, flows, global, end });
    }

    /// The exceptions that a new flow meets; none: the time of one is just over, and it may be there or not.
    fn met(&self, packet: &Packet) -> Option<Vec<Excepted>> {
        let met: Vec<Excepted> = self.exceptions.iter().filter(|one| is_of(packet, &one.flows)).copied().collect();
        let over = |one: &Excepted| one.end.is_some_and(|end| end <= self.world.now);
        (!met.iter().any(over)).then_some(met)
    }

    fn start(&mut self, server: u8) {
        let se = &mut self.servers[usize::from(server)];
        self.world.start(server, se.session);
        *se = Se { session: true, lost: None, started: true, gone: false, unreachable: false, healthy: true };
        self.served = true;
    }

    fn lose(&mut self, server: u8) {
        let se = &mut self.servers[usize::from(server)];
        if se.session {
            self.world.lose_session(server);
            self.exceptions.retain(|one| one.server != server);
            (se.session, se.lost) = (false, Some(self.world.now));
        }
    }

    fn neighbour(&mut self, server: u8, step: Step) {
        let se = &mut self.servers[usize::from(server)];
        // That of a host that is gone is found again when it starts.
        if se.lost.is_some() || se.session && !se.gone {
            se.unreachable = step == Step::NeighbourLost(server);
            se.gone = false;
            match se.unreachable {
                true => self.world.neighbour_lost(server),
                false => self.world.neighbour_found(server),
            }
        }
    }

    fn health(&mut self, server: u8, index: u8) {
        let se = &mut self.servers[usize::from(server)];
        if se.session && se.started {
            self.world.health(server, index);
            se.healthy = index > 0;
        }
    }

    /// Forgets the flows of servers that are dead, which must be for one of the two reasons.
    fn bury(&mut self) -> Result<(), String> {
        for flow in self.flows.iter_mut().chain(&mut self.streams) {
            *flow = flow.filter(|flow| self.world.now < flow.seen + flow.limit);
            let Some(Flow { place: Some(place), id, sure, .. }) = *flow else { continue };
            if self.world.is_alive(id) {
                continue;
            }
            let se = &self.servers[usize::from(place)];
            let orphaned = se.lost.is_some_and(|lost| self.world.now >= lost + ORPHAN);
            // A server that came back after its death has a new id; its old flows are gone all the same.
            if !se.gone && !orphaned && (sure || self.promise == Promise::Every) {
                return Err(format!("server {place} (id {id}) was given up though its host lives"));
            }
            *flow = None;
            self.played.orphaned += 1;
        }
        Ok(())
    }

    fn open(&mut self, client: u8, data: u16) -> Result<(), String> {
        let isn = self.number();
        let packet = syn(client, isn, data);
        let decision = self.world.steer(&packet);
        let flow = self.placed(&packet, &decision, HALF_OPEN)?;
        let sure = self.world.record(&packet).is_none() && decision.reason == Reason::Plain;
        let next = isn.wrapping_add(1).wrapping_add(u32::from(data));
        self.flows[usize::from(client)] = flow.map(|flow| Flow { isn, next, sure, ..flow });
        Ok(())
    }

    /// A new flow, which must go to a server that takes new flows, if there is one.
    fn placed(&self, packet: &Packet, decision: &Decision, limit: Duration) -> Result<Option<Flow>, String> {
        let place = self.world.place(decision);
        let unrecorded = matches!(decision.reason, Reason::NewUnrecorded | Reason::Direct | Reason::NoNextHop);
        if self.promise == Promise::Every || !unrecorded {
            let met = self.met(packet);
            let refuses = |server: u8| met.iter().flatten().any(|one| one.global || one.server == server);
            match place {
                Some(server) if refuses(server) => {
                    return Err(format!("a new flow went to server {server} in spite of {met:?} ({decision:?})"));
                }
                Some(server) if !self.servers[usize::from(server)].takes_flows() => {
                    return Err(format!("a new flow went to server {server}, which takes none ({decision:?})"));
                }
                None if self.settled()
                    && met.is_some()
                    && (0..).zip(&self.servers).any(|(number, se)| {
                        let has_slots =
                            || met.iter().flatten().next().is_none() || self.world.has_slots(number, packet);
                        se.takes_flows() && !refuses(number) && has_slots()
                    }) =>
                {
                    return Err(format!("a new flow went to no server though there is one ({decision:?})"));
                }
                _ => {}
            }
        }
        Ok((self.served && decision.reason != Reason::NoServer).then(|| self.flow(decision, limit)))
    }

    /// Slots and servers agree: else those that take new flows may have too few slots, or none.
    fn settled(&self) -> bool {
        self.written && !self.servers.iter().any(|se| se.unreachable)
    }

    fn flow(&self, decision: &Decision, limit: Duration) -> Flow {
        let (place, seen, epoch) = (self.world.place(decision), self.world.now, self.epoch);
        let forwarding = self.world.forwarding(decision.server);
        Flow {
            place,
            forwarding,
            id: decision.server,
            seen,
            limit,
            isn: 0,
            next: 0,
            established: false,
            sure: false,
            epoch,
        }
    }

    fn syn_again(&mut self, client: u8) -> Result<(), String> {
        let Some(flow) = self.live(client).filter(|flow| !flow.established) else { return Ok(()) };
        let data = flow.next.wrapping_sub(flow.isn).wrapping_sub(1);
        let packet = syn(client, flow.isn, data as u16);
        // A SYN that went to a plain slot's owner left no trace: after a change it is a new one.
        let known = flow.epoch == self.epoch || self.world.knows_syn(&packet);
        let decision = self.world.steer(&packet);
        if known {
            return self.stayed(&flow, &decision);
        }
        let again = self.placed(&packet, &decision, HALF_OPEN)?;
        self.flows[usize::from(client)] = again.map(|again| Flow { isn: flow.isn, next: flow.next, ..again });
        Ok(())
    }

    fn segment(&mut self, client: u8, flags: u8, payload: u16) -> Result<(), String> {
        let Some(mut flow) = self.live(client) else { return Ok(()) };
        let packet = segment(client, flags, flow.next, payload);
        let decision = self.world.steer(&packet);
        self.stayed(&flow, &decision)?;
        flow.seen = self.world.now;
        flow.next = flow.next.wrapping_add(u32::from(payload)).wrapping_add(u32::from(flags & tcp::FIN));
        flow.limit = match () {
            () if flags & (tcp::FIN | tcp::RST) != 0 => CLOSING,
            // Only data shows that a FIN was not the client's.
            () if payload != 0 || !flow.established => TCP_IDLE,
            () => flow.limit,
        };
        flow.established = true;
        self.note(&mut flow, &decision);
        flow.sure = decision.reason == Reason::Plain || self.world.record(&packet).is_some();
        self.flows[usize::from(client)] = Some(flow);
        Ok(())
    }

    fn datagram(&mut self, client: u8) -> Result<(), String> {
        let packet = datagram(client);
        let on_record = self.world.record(&packet).is_some_and(|record| self.world.is_alive(record.server()));
        let decision = self.world.steer(&packet);
        let now = self.world.now;
        let known = self.streams[usize::from(client)].filter(|flow| now < flow.seen + flow.limit);
        let flow = match known {
            Some(mut flow) => {
                self.stayed(&flow, &decision)?;
                flow.seen = now;
                self.note(&mut flow, &decision);
                Some(flow)
            }
            // Silent for too long, but not collected yet.
            None if on_record => Some(self.flow(&decision, UDP_IDLE)),
            // What no server gets is not recorded, unless an exception had a say in it: it is the host's own.
            None => self.placed(&packet, &decision, UDP_IDLE)?.filter(|flow| {
                let recorded = || self.world.record(&packet).is_some();
                let crosses = self.kind.crosses();
                crosses || flow.place.is_some() || self.met(&packet).map_or_else(recorded, |met| !met.is_empty())
            }),
        };
        let sure = self.world.record(&packet).is_some();
        self.streams[usize::from(client)] = flow.map(|flow| Flow { sure, ..flow });
        Ok(())
    }

    fn forge(&mut self, client: u8, what: Forgery) -> Result<(), String> {
        let isn = self.number();
        let flow = self.live(client);
        if flow.is_some_and(|flow| !flow.established) {
            return Ok(());
        }
        let packet = match what {
            Forgery::Syn => syn(client, isn, 0),
            Forgery::SynData => syn(client, isn, 1400),
            Forgery::Fin => segment(client, tcp::FIN | tcp::ACK, isn, 0),
            Forgery::Rst => segment(client, tcp::RST, isn, 0),
            Forgery::Ack => segment(client, tcp::ACK, isn, 0),
        };
        let decision = self.world.steer(&packet);
        let (Some(mut flow), false) = (flow, packet.is_syn()) else { return Ok(()) };
        self.stayed(&flow, &decision)?;
        if packet.flags & (tcp::FIN | tcp::RST) != 0 {
            // It cannot be told from the client's own, so silence is the end sooner.
            flow.limit = CLOSING;
        }
        self.note(&mut flow, &decision);
        self.flows[usize::from(client)] = Some(flow);
        Ok(())
    }

    /// An ICMP error about an established flow finds its server, and leaves no trace.
    fn error(&mut self, client: u8) -> Result<(), String> {
        let Some(flow) = self.live(client).filter(|flow| flow.established && flow.place.is_some()) else {
            return Ok(());
        };
        let packet = segment(client, 0, flow.next, 0);
        let before = self.world.trace(&packet);
        let found = self.world.whose(&packet);
        if self.world.trace(&packet) != before {
            return Err("an ICMP error left a trace".into());
        }
        if found == Some(flow.id) || self.promise == Promise::Recorded && !flow.sure {
            return Ok(());
        }
        Err(format!("an ICMP error about a flow of id {} went to {found:?} ({packet:?}, {before:x?})", flow.id))
    }

    /// The client's flow, unless it has been silent for too long.
    fn live(&mut self, client: u8) -> Option<Flow> {
        let flow = &mut self.flows[usize::from(client)];
        let now = self.world.now;
        *flow = flow.filter(|flow| now < flow.seen + flow.limit);
        *flow
    }

    fn stayed(&self, flow: &Flow, decision: &Decision) -> Result<(), String> {
        let place = self.world.place(decision);
        let same = place == flow.place && self.world.forwarding(decision.server) == flow.forwarding;
        if same || self.promise == Promise::Recorded && !flow.sure {
            return Ok(());
        }
        Err(format!("the flow moved from {:?} to {place:?} ({decision:?}; {flow:?})", flow.place))
    }

    /// Where the flow is now.
    fn note(&mut self, flow: &mut Flow, decision: &Decision) {
        let place = self.world.place(decision);
        self.played.moved += u64::from(place != flow.place);
        (flow.place, flow.id) = (place, decision.server);
        flow.forwarding = self.world.forwarding(decision.server);
    }

    /// Initial sequence numbers far apart.
    fn number(&mut self) -> u32 {
        let number = self.numbers;
        self.numbers = number.wrapping_add(10_000_019);
        number
    }

    /// When nobody sends any more, nothing stays.
    fn end(&mut self) -> Result<(), String> {
        let mut remains = self.world.remains();
        for _ in 0..3 {
            if remains.is_none() {
                break;
            }
            self.world.rest(2 * TCP_IDLE);
            self.bury()?;
            remains = self.world.remains();
        }
        remains.map_or(Ok(()), |remains| Err(format!("at the end there are still {remains}")))
    }
}
