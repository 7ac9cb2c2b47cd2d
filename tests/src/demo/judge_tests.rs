use std::net::Ipv4Addr;

use super::*;

const fn ms(millis: u64) -> WallTime {
    Duration::from_millis(1_700_000_000_000 + millis)
}

fn client(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 2), port)
}

/// A connection: port, first SYN, and where its SYNs were sent and when.
type Made<'a> = (u16, u64, &'a [(u64, usize)]);

fn attempts(list: &[Made<'_>]) -> Vec<Attempt> {
    let mut attempts = Attempts::default();
    for (port, first_syn, placed) in list {
        let (client, isn) = (client(*port), 7);
        attempts.note(&Observation { at: ms(*first_syn), what: What::SynArrived { client, isn } });
        for (at, server) in *placed {
            attempts.note(&Observation { at: ms(*at), what: What::SynPlaced { client, isn, server: *server } });
        }
    }
    attempts.all().to_vec()
}

fn outage(cause: Cause) -> Outage {
    Outage { server: 2, cause, done: ms(900), began: ms(1000), ended: Some(ms(5000)) }
}

fn end(server: Option<usize>, began: u64, ended: u64, failure: Option<Failure>) -> Ended {
    let (began, ended) = (ms(began), ms(ended));
    Ended { kind: Kind::Download, client: Some(client(1)), began, ended, server, answered: 0, failure }
}

fn broken() -> Option<Failure> {
    Some(Failure::Broken("reset".to_owned()))
}

#[test]
fn a_connection_placed_on_a_stopped_server_is_a_violation_after_ten_milliseconds() {
    for (first_syn, late_ones) in [(800, 0), (1000, 0), (1010, 0), (1011, 1), (4999, 1), (5000, 0)] {
        let attempts = attempts(&[(1, first_syn, &[(first_syn, 2)])]);
        for cause in [Cause::Stopped, Cause::AgentKilled, Cause::Vanished] {
            assert_eq!(late(&attempts, &[outage(cause)]).len(), late_ones, "{first_syn} {cause:?}");
        }
    }
}

#[test]
fn a_violation_says_who_and_how_late() {
    let attempts = attempts(&[(1, 1200, &[(1200, 0)]), (9, 1500, &[(1501, 2)])]);
    let found = late(&attempts, &[outage(Cause::Stopped)]);
    assert_eq!(found, [Late { server: 2, client: client(9), after: Duration::from_millis(500) }]);
}

#[test]
fn an_outage_without_end_lasts() {
    let attempts = attempts(&[(1, 99_000, &[(99_000, 2)])]);
    assert_eq!(late(&attempts, &[Outage { ended: None, ..outage(Cause::Stopped) }]).len(), 1);
}

#[test]
fn the_first_syn_counts_not_its_repetition() {
    // A retransmission on the stopped server: the same SYN goes to the same server.
    assert_eq!(late(&attempts(&[(1, 990, &[(990, 2), (1990, 2)])]), &[outage(Cause::Stopped)]), []);
    // A retransmission that goes to the stopped server, though the first SYN came late enough to know.
    assert_eq!(late(&attempts(&[(1, 1500, &[(1500, 0), (2500, 2)])]), &[outage(Cause::Stopped)]).len(), 1);
}

#[test]
fn another_connection_from_the_same_port_is_another_connection() {
    let mut attempts = Attempts::default();
    for (at, isn) in [(900, 1), (1500, 2)] {
        attempts.note(&Observation { at: ms(at), what: What::SynPlaced { client: client(1), isn, server: 2 } });
    }
    assert_eq!(late(attempts.all(), &[outage(Cause::Stopped)]).len(), 1);
    assert_eq!(attempts.of(client(1), ms(899), ms(1000)).map(|found| found.first_syn), Some(ms(900)));
    assert_eq!(attempts.of(client(1), ms(1499), ms(2000)).map(|found| found.first_syn), Some(ms(1500)));
    assert_eq!(attempts.of(client(1), ms(1600), ms(2000)), None);
}

#[test]
fn connections_in_the_dark_are_counted_apart() {
    let attempts = attempts(&[
        (1, 899, &[(899, 2)]),
        (2, 901, &[(901, 2), (1901, 0)]),
        (3, 950, &[(950, 0)]),
        (4, 1009, &[(1009, 2)]),
        (5, 1500, &[(1500, 2)]),
    ]);
    assert_eq!(in_the_dark(&attempts, &outage(Cause::Vanished)), 2);
    assert_eq!(late(&attempts, &[outage(Cause::Vanished)]).len(), 1);
}

#[test]
fn elsewhere_begins_after_the_last_connection_on_the_lost_server() {
    let since = ms(900);
    let measure = |list: &[Made<'_>]| first_elsewhere(&attempts(list), &outage(Cause::Vanished), since);
    assert_eq!(
        measure(&[(1, 905, &[(905, 0)]), (2, 930, &[(930, 2)]), (3, 935, &[(935, 1)]), (4, 940, &[(940, 0)])]),
        Some(Duration::from_millis(35))
    );
    assert_eq!(measure(&[(1, 890, &[(890, 2)]), (2, 903, &[(903, 1)])]), Some(Duration::from_millis(3)));
    assert_eq!(measure(&[(1, 903, &[(903, 2)])]), None);
    assert_eq!(measure(&[(1, 903, &[(903, 1)]), (2, 5001, &[(5001, 2)])]), Some(Duration::from_millis(3)));
}

#[test]
fn a_broken_connection_is_a_violation_unless_its_server_vanished() {
    let vanished = [outage(Cause::Vanished)];
    let judge = |end: &Ended, outages: &[Outage]| verdict(end, None, outages);
    assert_eq!(judge(&end(Some(2), 500, 2000, None), &vanished), Verdict::Whole);
    assert_eq!(judge(&end(Some(2), 500, 2000, broken()), &vanished), Verdict::WentWithItsServer);
    assert_eq!(judge(&end(Some(1), 500, 2000, broken()), &vanished), Verdict::Harmed, "another server");
    assert_eq!(judge(&end(Some(2), 500, 899, broken()), &vanished), Verdict::Harmed, "before it vanished");
    assert_eq!(judge(&end(Some(2), 1100, 2000, broken()), &vanished), Verdict::Harmed, "began after the loss");
    for cause in [Cause::Stopped, Cause::AgentKilled] {
        assert_eq!(judge(&end(Some(2), 500, 2000, broken()), &[outage(cause)]), Verdict::Harmed, "{cause:?}");
    }
    assert_eq!(judge(&end(Some(2), 500, 2000, Some(Failure::Checksum)), &[]), Verdict::Harmed);
}

#[test]
fn a_moved_connection_is_always_a_violation() {
    let moved = Some(Failure::Moved { from: "s3".to_owned(), to: "s1".to_owned() });
    assert_eq!(verdict(&end(Some(2), 500, 2000, moved), None, &[outage(Cause::Vanished)]), Verdict::Harmed);
}

#[test]
fn the_wire_counts_where_no_answer_came() {
    let vanished = [outage(Cause::Vanished)];
    assert_eq!(verdict(&end(None, 880, 2000, broken()), Some(2), &vanished), Verdict::WentWithItsServer);
    assert_eq!(verdict(&end(None, 880, 2000, broken()), Some(0), &vanished), Verdict::Harmed);
    assert_eq!(verdict(&end(None, 880, 2000, broken()), None, &vanished), Verdict::Harmed, "nothing excuses it");
}

#[test]
fn what_was_never_established_is_dark_or_refused() {
    let refused = Some(Failure::Connect("no answer".to_owned()));
    let judge = |wire, began| verdict(&end(None, began, 9000, refused.clone()), wire, &[outage(Cause::Vanished)]);
    assert_eq!(judge(Some(2), 950), Verdict::InTheDark);
    assert_eq!(judge(Some(1), 950), Verdict::Refused);
    assert_eq!(judge(None, 950), Verdict::Refused);
    assert_eq!(judge(Some(2), 1100), Verdict::Refused, "the loss was known");
}

#[test]
fn downloads_across_an_event_are_counted() {
    let ends = [
        end(Some(2), 500, 2000, None),
        end(Some(2), 500, 2000, broken()),
        end(Some(2), 500, 900, None),
        end(Some(2), 1100, 2000, None),
        end(Some(1), 500, 2000, None),
        Ended { kind: Kind::KeepAlive, ..end(Some(2), 500, 2000, None) },
    ];
    assert_eq!(downloads_across(&ends, 2, ms(1000)), (2, 1));
}

#[test]
fn a_share_is_of_first_choices() {
    let attempts = attempts(&[(1, 10, &[(10, 0)]), (2, 20, &[(20, 1), (1020, 0)]), (3, 30, &[]), (4, 99, &[(99, 0)])]);
    assert_eq!(share(&attempts, 0, ms(0), ms(50)), Some(0.5));
    assert_eq!(share(&attempts, 0, ms(200), ms(300)), None);
}

#[test]
fn an_outage_begins_when_the_balancer_knows_and_ends_with_start() {
    let (server, at) = (2, ms(100));
    let seen: Vec<Observation> = [
        (50, What::StopAck { server }),
        (120, What::StopAck { server: 1 }),
        (130, What::StopAck { server }),
        (150, What::SessionClosed { server }),
        (160, What::Start { server: 1 }),
        (200, What::Start { server }),
    ]
    .map(|(at, what)| Observation { at: ms(at), what })
    .to_vec();
    let began = |cause, declared: &[(WallTime, usize)]| {
        outage_of(&Mark { server, cause, at }, &seen, declared).map(|outage| (outage.began, outage.ended))
    };
    let end = Some(ms(200));
    assert_eq!(began(Cause::Stopped, &[]), Some((ms(130), end)));
    assert_eq!(began(Cause::AgentKilled, &[(ms(110), server)]), Some((ms(150), end)));
    assert_eq!(began(Cause::Vanished, &[]), Some((ms(150), end)));
    assert_eq!(began(Cause::Vanished, &[(ms(99), server), (ms(110), 1), (ms(140), server)]), Some((ms(140), end)));
    assert_eq!(outage_of(&Mark { server, cause: Cause::Stopped, at: ms(131) }, &seen, &[]), None, "not seen");
}
