//! All that has been seen so far, and what it comes to.

use std::{
    collections::VecDeque,
    time::{Duration, Instant, UNIX_EPOCH},
};

use super::{
    acts::SERVERS,
    judge::{self, Attempts, Cause, Ended, Late, Mark, Outage, Verdict},
    wire::{Observation, What},
};
use crate::{
    capture::WallTime,
    load::{Event, Kind, Outcome},
};

/// Servers' rates are over so much time.
const RATE_WINDOW: Duration = Duration::from_secs(1);

/// One server's numbers.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Requests that it answered.
    pub answered: u64,
    /// Requests that failed on connections of its.
    pub failed: u64,
    /// Its open connections, as far as it has answered on them: short ones, downloads, repeating ones.
    pub open: [usize; 3],
    answers: Rate,
    placed: Rate,
}

impl Tally {
    /// Requests answered in the last second.
    pub fn answers_per_second(&self, now: WallTime) -> usize {
        self.answers.count(now)
    }

    /// New connections in the last second, as the wire shows them.
    pub fn placed_per_second(&self, now: WallTime) -> usize {
        self.placed.count(now)
    }
}

/// Moments of the last second.
#[derive(Clone, Debug, Default)]
struct Rate(VecDeque<WallTime>);

impl Rate {
    fn note(&mut self, at: WallTime) {
        self.0.push_back(at);
        while self.0.front().is_some_and(|first| *first + RATE_WINDOW * 2 < at) {
            self.0.pop_front();
        }
    }

    fn count(&self, now: WallTime) -> usize {
        let from = now.saturating_sub(RATE_WINDOW);
        self.0.iter().filter(|at| (from..now).contains(*at)).count()
    }
}

/// What the "must" lines, and what stands beside them, come to.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Established connections that broke or moved and should not have.
    pub harmed: Vec<Ended>,
    /// New connections on servers that were known to be stopped or lost.
    pub late: Vec<Late>,
    /// Connections that ended with their server, when it vanished.
    pub went_with_server: usize,
    /// Connections that were never established, sent to a vanished server before its loss was known.
    pub failed_in_the_dark: usize,
    /// Connections that were never established for another reason.
    pub refused: Vec<Ended>,
    /// Marks whose outage was not seen: nothing can be said of them.
    pub unseen: Vec<Mark>,
    /// The outages that were.
    pub outages: Vec<Outage>,
}

/// The record.
#[derive(Debug)]
pub struct Record {
    /// One moment, by both clocks.
    base: (Instant, WallTime),
    /// Each server's numbers.
    pub servers: Vec<Tally>,
    /// Failed requests that no server can be named for.
    pub failed_nowhere: u64,
    /// All connection attempts on the wire.
    pub attempts: Attempts,
    /// NECP on the wire.
    control: Vec<Observation>,
    declared: Vec<(WallTime, usize)>,
    /// What was done to servers.
    pub marks: Vec<Mark>,
    /// All connections that have come to their end.
    pub ends: Vec<Ended>,
}

impl Default for Record {
    fn default() -> Self {
        // The wall clock first: a pause between the two makes connections seem older by it, never younger.
        let wall = UNIX_EPOCH.elapsed().unwrap_or_default();
        Self {
            base: (Instant::now(), wall),
            servers: vec![Tally::default(); SERVERS],
            failed_nowhere: 0,
            attempts: Attempts::default(),
            control: Vec::new(),
            declared: Vec::new(),
            marks: Vec::new(),
            ends: Vec::new(),
        }
    }
}

impl Record {
    /// Takes note of what a client has met with.
    pub fn client(&mut self, event: Event, now: WallTime) {
        match event {
            Event::Placed { kind, server, .. } => {
                if let Some(tally) = self.tally(&server) {
                    tally.open[place(kind)] += 1;
                }
            }
            Event::Answered { server, .. } => {
                if let Some(tally) = self.tally(&server) {
                    tally.answered += 1;
                    tally.answers.note(now);
                }
            }
            Event::Ended(outcome) => self.ended(&outcome),
        }
    }

    /// Takes note of what was seen on the wire. A sentence, if it is worth one.
    pub fn wire(&mut self, seen: &Observation) {
        self.attempts.note(seen);
        match seen.what {
            What::SynArrived { .. } => {}
            What::SynPlaced { server, .. } => self.servers[server].placed.note(seen.at),
            _ => self.control.push(*seen),
        }
    }

    /// Takes note that the balancer has declared a server lost.
    pub fn declared_lost(&mut self, server: usize, at: WallTime) {
        self.declared.push((at, server));
    }

    /// Requests answered by all servers.
    pub fn answered(&self) -> u64 {
        self.servers.iter().map(|server| server.answered).sum()
    }

    /// Requests failed.
    pub fn failed(&self) -> u64 {
        self.servers.iter().map(|server| server.failed).sum::<u64>() + self.failed_nowhere
    }

    /// What it all comes to so far. An outage that has not been seen yet is among the unseen.
    pub fn findings(&self) -> Findings {
        let mut findings = Findings::default();
        for mark in &self.marks {
            match judge::outage_of(mark, &self.control, &self.declared) {
                Some(outage) => findings.outages.push(outage),
                None => findings.unseen.push(*mark),
            }
        }
        // A server that has vanished and is not declared lost yet excuses what breaks meanwhile.
        let vanished = findings.unseen.iter().filter(|mark| mark.cause == Cause::Vanished);
        let open = vanished.map(|mark| Outage {
            server: mark.server,
            cause: mark.cause,
            done: mark.at,
            began: Duration::MAX / 2,
            ended: None,
        });
        let outages: Vec<Outage> = findings.outages.iter().copied().chain(open).collect();
        findings.late = judge::late(self.attempts.all(), &outages);
        for end in self.ends.iter().filter(|end| end.failure.is_some()) {
            match judge::verdict(end, self.on_the_wire(end), &outages) {
                Verdict::Whole => {}
                Verdict::Harmed => findings.harmed.push(end.clone()),
                Verdict::WentWithItsServer => findings.went_with_server += 1,
                Verdict::InTheDark => findings.failed_in_the_dark += 1,
                Verdict::Refused => findings.refused.push(end.clone()),
            }
        }
        findings
    }

    fn ended(&mut self, outcome: &Outcome) {
        let began = self.wall(outcome.first_syn);
        let end = Ended {
            kind: outcome.kind,
            client: outcome.local,
            began,
            ended: began + outcome.lasted,
            server: outcome.server.as_deref().and_then(number),
            answered: outcome.answered,
            failure: outcome.failure.clone(),
        };
        if let Some(server) = end.server {
            let open = &mut self.servers[server].open[place(end.kind)];
            *open = open.saturating_sub(1);
        }
        if end.failure.is_some() {
            match end.server.or_else(|| self.on_the_wire(&end)) {
                Some(server) => self.servers[server].failed += 1,
                None => self.failed_nowhere += 1,
            }
        }
        self.ends.push(end);
    }

    /// The server that a connection's last SYN was sent to.
    fn on_the_wire(&self, end: &Ended) -> Option<usize> {
        let attempt = self.attempts.of(end.client?, end.began, end.ended)?;
        attempt.placed.last().map(|(_, server)| *server)
    }

    fn wall(&self, at: Instant) -> WallTime {
        let (instant, wall) = self.base;
        match at.checked_duration_since(instant) {
            Some(after) => wall + after,
            None => wall.saturating_sub(instant.duration_since(at)),
        }
    }

    fn tally(&mut self, name: &str) -> Option<&mut Tally> {
        number(name).and_then(|server| self.servers.get_mut(server))
    }
}

/// `s1` is 0.
fn number(name: &str) -> Option<usize> {
    name.strip_prefix('s')?.parse::<usize>().ok()?.checked_sub(1).filter(|server| *server < SERVERS)
}

fn place(kind: Kind) -> usize {
    match kind {
        Kind::Short => 0,
        Kind::Download => 1,
        Kind::KeepAlive => 2,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddrV4};

    use super::*;
    use crate::load::Failure;

    const CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 2), 4000);

    fn outcome(record: &Record, server: Option<&str>, failure: Option<Failure>) -> Outcome {
        Outcome {
            kind: Kind::Short,
            local: Some(CLIENT),
            first_syn: record.base.0 + Duration::from_millis(100),
            connected: None,
            lasted: Duration::from_secs(2),
            server: server.map(str::to_owned),
            answered: u64::from(failure.is_none()),
            bytes: 0,
            failure,
        }
    }

    #[test]
    fn requests_are_counted_per_server() {
        let mut record = Record::default();
        let now = record.base.1;
        let first_syn = record.base.0;
        record.client(Event::Placed { kind: Kind::Short, server: "s2".to_owned(), first_syn }, now);
        assert_eq!(record.servers[1].open, [1, 0, 0]);
        record.client(Event::Answered { kind: Kind::Short, server: "s2".to_owned() }, now);
        record.client(Event::Ended(outcome(&record, Some("s2"), None)), now);
        record.client(Event::Ended(outcome(&record, None, Some(Failure::Connect("no answer".to_owned())))), now);
        assert_eq!((record.servers[1].answered, record.servers[1].open), (1, [0, 0, 0]));
        assert_eq!((record.answered(), record.failed(), record.failed_nowhere), (1, 1, 1));
        assert_eq!(record.findings().refused.len(), 1);
    }

    #[test]
    fn a_failure_is_the_servers_that_the_wire_shows() {
        let mut record = Record::default();
        let at = record.base.1 + Duration::from_millis(101);
        record.wire(&Observation { at, what: What::SynPlaced { client: CLIENT, isn: 1, server: 3 } });
        record.client(Event::Ended(outcome(&record, None, Some(Failure::Broken("silent".to_owned())))), at);
        assert_eq!((record.servers[3].failed, record.findings().harmed.len()), (1, 1));
        record.marks.push(Mark { server: 3, cause: Cause::Vanished, at });
        let findings = record.findings();
        assert_eq!((findings.harmed.len(), findings.went_with_server, findings.unseen.len()), (0, 1, 1));
    }

    #[test]
    fn rates_are_of_the_last_second() {
        let mut rate = Rate::default();
        let second = Duration::from_secs(1);
        for tenth in 0..40 {
            rate.note(second * 100 + second / 10 * tenth);
        }
        assert_eq!(rate.count(second * 104), 10);
        assert_eq!(rate.count(second * 106), 0);
        assert!(rate.0.len() <= 21);
    }
}
