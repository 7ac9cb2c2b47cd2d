use std::net::{Ipv4Addr, SocketAddrV4};

use super::super::{
    acts::{DRAINED, VANISHED},
    judge::Mark,
    wire::{Observation, What},
};
use super::*;
use crate::load::{Failure, Kind};

const fn ms(millis: u64) -> WallTime {
    Duration::from_millis(1_700_000_000_000 + millis)
}

fn connection(record: &mut Record, at: u64, server: usize) {
    let client = SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 2), 2000 + record.attempts.all().len() as u16);
    for what in [What::SynArrived { client, isn: 1 }, What::SynPlaced { client, isn: 1, server }] {
        record.wire(&Observation { at: ms(at), what });
    }
}

fn end(server: usize, began: u64, ended: u64, failure: Option<Failure>) -> Ended {
    let (began, ended) = (ms(began), ms(ended));
    Ended { kind: Kind::Download, client: None, began, ended, server: Some(server), answered: 1, failure }
}

/// A play in which all is well.
fn good() -> Record {
    let mut record = Record::default();
    for (server, cause, at) in
        [(DRAINED, Cause::Stopped, 1000), (ORPHANED, Cause::AgentKilled, 2000), (VANISHED, Cause::Vanished, 3000)]
    {
        record.marks.push(Mark { server, cause, at: ms(at) });
    }
    for (at, what) in [
        (1004, What::StopAck { server: DRAINED }),
        (2001, What::SessionClosed { server: ORPHANED }),
        (2500, What::Start { server: ORPHANED }),
        (2600, What::Start { server: DRAINED }),
        (6000, What::Start { server: VANISHED }),
    ] {
        record.wire(&Observation { at: ms(at), what });
    }
    record.declared_lost(VANISHED, ms(5000));
    for (at, server) in [(900, DRAINED), (1010, 1), (1900, ORPHANED), (2010, 1), (3100, VANISHED), (5003, 1)] {
        connection(&mut record, at, server);
    }
    record.ends.push(end(ORPHANED, 1500, 4000, None));
    record.ends.push(end(VANISHED, 2800, 4000, Some(Failure::Broken("silent".to_owned()))));
    record
}

fn summary(record: &Record) -> Summary<'_> {
    let (findings, took) = (record.findings(), Duration::from_secs(57));
    Summary { record, findings, missed: 0, quiet: true, unwell: None, took }
}

#[test]
fn a_good_play_holds_and_is_told() {
    let record = good();
    let summary = summary(&record);
    let text = summary.text();
    assert!(summary.holds(), "{text}");
    for part in [
        "0 established connections broken",
        "0 new connections on",
        "1 of 1 downloads",
        "3 of 3 departures",
        "s3 stops: STOP_ACK 4.0 ms after SIGTERM",
        "first SYN that goes elsewhere 6.0 ms after STOP_ACK",
        "declared lost 2000 ms after its link went down",
        "goes elsewhere 3.0 ms after the loss, 2003 ms after the link went down",
        "1 new connections were sent to it in the dark",
        "1 broken with the server that vanished",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn each_must_can_fail() {
    type Spoil = fn(&mut Record);
    let spoilt: [(&str, Spoil); 7] = [
        ("broken on the drained server", |record| {
            record.ends.push(end(DRAINED, 900, 1500, Some(Failure::Broken("reset".to_owned()))));
        }),
        ("moved", |record| {
            let moved = Failure::Moved { from: "s4".to_owned(), to: "s1".to_owned() };
            record.ends.push(end(VANISHED, 2900, 5000, Some(moved)));
        }),
        ("placed on the stopped server", |record| connection(record, 1200, DRAINED)),
        ("placed on the server without agent", |record| connection(record, 2100, ORPHANED)),
        ("placed on the vanished server", |record| connection(record, 5500, VANISHED)),
        ("a download of the orphan that did not come whole", |record| {
            record.ends.push(end(ORPHANED, 1999, 2600, Some(Failure::Checksum)));
        }),
        ("a departure that was never seen", |record| record.marks[0].at = ms(1005)),
    ];
    for (what, spoil) in spoilt {
        let mut record = good();
        spoil(&mut record);
        let summary = summary(&record);
        assert!(!summary.holds() && summary.text().contains("FAILED"), "{what}");
    }
    let record = good();
    assert!(!Summary { missed: 1, ..summary(&record) }.holds());
    assert!(!Summary { quiet: false, ..summary(&record) }.holds());
    let mut record = good();
    record.ends.clear();
    assert!(!summary(&record).holds(), "no download was under way: nothing is shown");
}
