//! The client as a whole, over real TCP, against the network element's protocol machine.

mod proxy;
mod serve;

use super::fake_ne::{INSTALLER, Manner, Ne};
use super::*;
use crate::necp::{CloseReason, Listed, NeEvent, Operation, Scope, ServiceKey, ServiceUnit};

const SOON: Duration = Duration::from_secs(10);

fn offer(port: u16) -> ServiceUnit {
    ServiceUnit::new(crate::necp::Forwarding::L2, ServiceKey::new(6, port))
}

fn start(port: u16) -> Operation {
    Operation::Start(offer(port))
}

fn stop(port: u16) -> Operation {
    Operation::Stop(ServiceKey::new(6, port))
}

fn flows(port: u16) -> Flows {
    Flows { source: "203.0.113.0/24".parse().expect("a prefix"), protocol: 6, port, ..Flows::ALL }
}

fn global(port: u16, ttl: u32) -> Exception {
    Exception { scope: Scope::Global, ttl, flows: flows(port) }
}

fn at(port: u16) -> NeAddress {
    NeAddress { host: "127.0.0.1".into(), port }
}

/// A client of the elements on these ports that serves tcp/8080.
fn client(ports: &[u16]) -> Builder {
    let builder = Client::builder().retry_max(Duration::from_secs(1)).keepalive(Duration::from_millis(500));
    ports.iter().fold(builder, |builder, port| builder.ne(at(*port))).serve(offer(8080))
}

/// A port where nobody listens.
async fn free_port() -> u16 {
    let ne = Ne::start(0, Manner::Good).await;
    let port = ne.port;
    ne.end().await;
    port
}

async fn joined(client: &Client, count: usize) {
    assert!(tokio::time::timeout(SOON, client.joined(count)).await.expect("in time"));
}

fn results(answers: Answers<()>) -> Vec<Result<(), NeError>> {
    answers.0.into_iter().map(|(_, answer)| answer).collect()
}

/// Over IPv6: exceptions of IPv6 by the extension, installed again by a session of that family only, and listed.
#[tokio::test]
async fn exceptions_of_ipv6_come_go_and_are_listed() {
    let here: std::net::IpAddr = std::net::Ipv6Addr::LOCALHOST.into();
    let mut ne = Ne::start_at(here, 0, Manner::Good).await;
    let port = ne.port;
    let six = Flows { source: "2001:db8:7::9/48".parse().expect("a prefix"), protocol: 6, port: 80, ..Flows::ALL };
    let normal = six.normal().expect("flows");
    let builder = Client::builder().retry_max(Duration::from_secs(1)).keepalive(Duration::from_millis(500));
    // One of each family, as a server of both has.
    let mut four = Ne::start(0, Manner::Good).await;
    let builder = builder.ne(NeAddress { host: "::1".into(), port }).ne(at(four.port)).ne(at(free_port().await));
    let client = builder.serve(offer(8080)).join().expect("settings");
    joined(&client, 2).await;
    ne.joined().await;
    four.joined().await;
    assert_eq!((ne.operations().await, four.operations().await), (vec![start(8080)], vec![start(8080)]));
    assert!(matches!(client.nes()[0].standing, Standing::Joined { local: Some(local), .. } if local == here));

    let add = [Exception { scope: Scope::Local, ttl: 0, flows: six }, global(81, 0)];
    let answers = results(client.except(&add).await.expect("legal"));
    assert!(answers[0].is_ok() && answers[1].is_ok() && matches!(answers[2], Err(NeError::Away(_))));
    assert_eq!(ne.operations().await, [Operation::Except(Exception { flows: normal, ..add[0] })]);
    assert_eq!(four.operations().await, [Operation::Except(add[1])]);
    let listed = client.exceptions(Filter { family: Some(crate::necp::Family::V6), ..Filter::default() }).await;
    let listed = listed.0[0].1.as_ref().expect("listed");
    assert_eq!(listed.entries.iter().map(|entry| entry.flows).collect::<Vec<_>>(), [normal]);
    assert!(matches!(ne.event().await, NeEvent::Query { .. }));

    // An element that comes back is told of what concerns it.
    four.end().await;
    ne.end().await;
    let mut ne = Ne::start_at(here, port, Manner::Good).await;
    ne.joined().await;
    assert_eq!(ne.operations().await, [Operation::Except(Exception { flows: normal, ..add[0] })]);
    assert_eq!(ne.operations().await, [start(8080)]);
    assert!(client.unexcept(&[six]).await.expect("legal").any_ok());
    assert_eq!(ne.operations().await, [Operation::Unexcept(normal)]);
    assert!(client.unexcept(&[flows(99)]).await.expect("legal").any_ok(), "there is none, whoever would have it");
    let mixed = Flows { destination: "198.51.100.7/32".parse().expect("a prefix"), ..six };
    let error = client.except(&[Exception { flows: mixed, ..add[0] }]).await.expect_err("of both families");
    assert!(error.to_string().ends_with("source and destination are of different address families"), "{error}");
    client.leave().await;
}

/// An exception that concerns no session is refused, and not wanted any more.
#[tokio::test]
async fn exceptions_of_a_family_without_a_session_are_refused() {
    let mut ne = Ne::start(0, Manner::RefusesExceptions(81)).await;
    let client = client(&[ne.port]).join().expect("settings");
    joined(&client, 1).await;
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(8080)]);
    let six = Flows { source: "2001:db8:7::/48".parse().expect("a prefix"), ..Flows::ALL };
    let six = Exception { scope: Scope::Local, ttl: 0, flows: six.normal().expect("flows") };
    let answers = results(client.except(&[six]).await.expect("legal"));
    assert_eq!(answers, [Err(NeError::OtherFamily(vec![six.flows]))]);
    let answers = results(client.except(&[six, global(80, 0)]).await.expect("legal"));
    assert_eq!(answers, [Err(NeError::OtherFamily(vec![six.flows]))]);
    let answers = results(client.except(&[six, global(81, 0)]).await.expect("legal"));
    assert_eq!(answers, [Err(NeError::Exceptions(vec![flows(81)]))]);
    assert_eq!(client.wanted().iter().map(|wanted| wanted.flows).collect::<Vec<_>>(), [flows(80)]);
    assert_eq!(ne.operations().await, [Operation::Except(global(80, 0))], "the first one was not sent");
    client.leave().await;
}

#[tokio::test]
async fn exceptions_come_go_and_are_listed() {
    let mut ne = Ne::start(0, Manner::Good).await;
    let client = client(&[ne.port]).join().expect("settings");
    joined(&client, 1).await;
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(8080)]);

    // With host bits, which are nobody's business.
    let sloppy = Flows { source: "203.0.113.9/24".parse().expect("a prefix"), ..flows(80) };
    let local = Exception { scope: Scope::Local, ttl: 0, flows: flows(81) };
    client.except(&[Exception { flows: sloppy, ..global(80, 300) }, local]).await.expect("legal").all().expect("done");
    assert_eq!(ne.operations().await, [Operation::Except(global(80, 300)), Operation::Except(local)]);

    let listed = |scope, port| Listed { scope, installer: INSTALLER.into(), flows: flows(port) };
    let all = client.exceptions(Filter::default()).await.all().expect("done");
    assert_eq!(all[0].entries, [listed(Scope::Global, 80), listed(Scope::Local, 81)]);
    let filter = Filter { port: Some(81), ..Filter::default() };
    let some = client.exceptions(filter).await.all().expect("done");
    assert_eq!((&some[0].entries[..], some[0].more), (&[listed(Scope::Local, 81)][..], false));
    assert!(matches!(ne.event().await, NeEvent::Query { .. }) && matches!(ne.event().await, NeEvent::Query { .. }));

    client.unexcept(&[flows(81), flows(99)]).await.expect("legal").all().expect("done");
    assert_eq!(ne.operations().await, [Operation::Unexcept(flows(81)), Operation::Unexcept(flows(99))]);
    assert_eq!(client.wanted().len(), 1);
    client.reset_exceptions().await.all().expect("done");
    assert!(matches!(ne.event().await, NeEvent::Reset { .. }));
    assert_eq!(client.exceptions(Filter::default()).await.all().expect("done")[0].entries, []);
    assert_eq!(client.wanted(), []);
}

#[tokio::test]
async fn a_new_session_gets_what_is_wanted_with_what_is_left_of_its_time() {
    let mut ne = Ne::start(0, Manner::Good).await;
    let client = client(&[ne.port]).join().expect("settings");
    joined(&client, 1).await;
    client
        .except(&[global(80, 100), global(81, 0), global(82, 1), global(83, 50)])
        .await
        .expect("legal")
        .all()
        .expect("ok");
    client.unexcept(&[flows(83)]).await.expect("legal").all().expect("done");
    let (port, added) = (ne.port, Instant::now());
    ne.joined().await;
    while ne.operations().await != [Operation::Unexcept(flows(83))] {}
    ne.end().await;
    tokio::time::sleep(Duration::from_millis(1200)).await;

    let mut ne = Ne::start(port, Manner::Good).await;
    ne.joined().await;
    let again = ne.operations().await;
    let [Operation::Except(first), Operation::Except(second)] = again[..] else { panic!("{again:?}") };
    assert_eq!((first.flows, first.scope, second), (flows(80), Scope::Global, global(81, 0)), "82 has expired");
    let gone = u32::try_from(added.elapsed().as_secs()).expect("short");
    assert!((99 - gone..=99).contains(&first.ttl), "{} s left after {gone} s", first.ttl);
    assert_eq!(ne.operations().await, [start(8080)], "after the exceptions");
}

#[tokio::test]
async fn an_element_that_is_away_is_told_when_it_is_there() {
    let (mut here, away) = (Ne::start(0, Manner::Good).await, free_port().await);
    let client = client(&[here.port, away]).join().expect("settings");
    joined(&client, 1).await;
    let answers = client.except(&[global(80, 0)]).await.expect("legal");
    assert!(!answers.is_ok() && answers.any_ok());
    let failures: Vec<_> = answers.failures().collect();
    assert!(matches!(failures[..], [(ne, NeError::Away(_))] if *ne == at(away)), "{failures:?}");
    here.joined().await;
    assert_eq!(here.operations().await, [start(8080)]);
    assert_eq!(here.operations().await, [Operation::Except(global(80, 0))]);

    let drained = results(client.drain(SOON).await);
    assert!(matches!(drained[..], [Ok(()), Err(NeError::Away(_))]), "{drained:?}");
    let mut late = Ne::start(away, Manner::Good).await;
    late.joined().await;
    assert_eq!(late.operations().await, [Operation::Except(global(80, 0))]);
    assert_eq!(late.operations().await, [stop(8080)], "it is drained");
    joined(&client, 2).await;
    client.resume().await.all().expect("both");
    assert_eq!(late.operations().await, [start(8080)]);
    assert!(
        client.nes().iter().all(|ne| matches!(&ne.standing, Standing::Joined { started, .. } if started.len() == 1))
    );
}

#[tokio::test]
async fn drain_and_resume_go_round() {
    let mut ne = Ne::start(0, Manner::Good).await;
    let client = client(&[ne.port]).join().expect("settings");
    joined(&client, 1).await;
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(8080)]);
    for _ in 0..3 {
        client.drain(SOON).await.all().expect("stopped");
        assert_eq!(ne.operations().await, [stop(8080)]);
        assert!(matches!(client.nes()[0].standing, Standing::Joined { stopped: true, .. }) && !client.is_serving());
        client.resume().await.all().expect("started");
        assert_eq!(ne.operations().await, [start(8080)]);
        assert!(matches!(client.nes()[0].standing, Standing::Joined { stopped: false, .. }) && client.is_serving());
    }
    client.leave().await;
    assert_eq!(ne.event().await, NeEvent::Closed(CloseReason::ClosedByPeer));
    assert_eq!(results(client.drain(SOON).await), [Err(NeError::Away("left".into()))]);
    assert!(!client.joined(1).await, "never again");
}

#[tokio::test]
async fn a_refusal_is_one_elements_own() {
    let (first, second) = (Ne::start(0, Manner::Good).await, Ne::start(0, Manner::RefusesExceptions(81)).await);
    let client = client(&[first.port, second.port]).join().expect("settings");
    joined(&client, 2).await;
    let answers = client.except(&[global(80, 0), global(81, 0)]).await.expect("legal");
    assert_eq!(results(answers), [Ok(()), Err(NeError::Exceptions(vec![flows(81)]))]);
    assert_eq!(client.wanted().len(), 2, "one has taken it");
}

#[tokio::test]
async fn what_every_element_refuses_is_not_wanted_any_more() {
    let (first, second) =
        (Ne::start(0, Manner::RefusesExceptions(81)).await, Ne::start(0, Manner::RefusesExceptions(81)).await);
    let client = client(&[first.port, second.port]).join().expect("settings");
    joined(&client, 2).await;
    let answers = client.except(&[global(80, 0), global(81, 0)]).await.expect("legal");
    assert!(!answers.any_ok());
    assert_eq!(client.wanted().iter().map(|wanted| wanted.flows).collect::<Vec<_>>(), [flows(80)]);
}

#[tokio::test]
async fn an_element_that_does_not_answer_holds_up_nobody_without_end() {
    let (good, mute) = (Ne::start(0, Manner::Good).await, Ne::start(0, Manner::NeverExcepts).await);
    let limit = Duration::from_millis(300);
    let client = client(&[mute.port, good.port]).answer_within(limit).join().expect("settings");
    joined(&client, 2).await;
    let begun = Instant::now();
    let answers = results(client.except(&[global(80, 0)]).await.expect("legal"));
    assert_eq!(answers, [Err(NeError::Timeout(limit)), Ok(())]);
    assert!(begun.elapsed() < SOON);
    // Its session ends: what is outstanding is lost, not forgotten.
    mute.end().await;
}

/// However many requests wait for one element, the others are told at once, and a drain waits no longer than it may.
#[tokio::test]
async fn a_full_queue_of_one_element_holds_up_nobody_else() {
    let (good, mute) = (Ne::start(0, Manner::Good).await, Ne::start(0, Manner::NeverExcepts).await);
    let client = client(&[mute.port, good.port]).answer_within(Duration::from_secs(20)).join().expect("settings");
    joined(&client, 2).await;
    let requests: Vec<_> = (1..=400u16)
        .map(|port| {
            let client = client.clone();
            tokio::spawn(async move { client.except(&[global(port, 0)]).await })
        })
        .collect();
    let begun = Instant::now();
    while client.wanted().len() < 400 {
        assert!(begun.elapsed() < SOON, "{} of 400 are told", client.wanted().len());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (begun, limit) = (Instant::now(), Duration::from_secs(1));
    assert_eq!(results(client.drain(limit).await), [Err(NeError::Timeout(limit)), Ok(())]);
    assert!(begun.elapsed() < 2 * limit, "{:?}", begun.elapsed());
    requests.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Requests that nobody waits for any more take no memory without end: the session is ended, and the next one tells it all.
#[tokio::test]
async fn an_element_that_is_asked_too_much_is_told_again() {
    let mut mute = Ne::start(0, Manner::NeverExcepts).await;
    let client = client(&[mute.port]).answer_within(Duration::from_millis(1)).join().expect("settings");
    joined(&client, 1).await;
    mute.joined().await;
    assert_eq!(mute.operations().await, [start(8080)]);
    let mut lost = false;
    for _ in 0..10 {
        let ask = || async { results(client.except(&[global(80, 0)]).await.expect("legal")) };
        let answers = futures_util::future::join_all((0..IN_PROGRESS).map(|_| ask())).await;
        lost = lost || answers.contains(&vec![Err(NeError::Lost)]);
        if lost {
            break;
        }
    }
    assert!(lost, "its queue is bounded");
    while !matches!(mute.event().await, NeEvent::Closed(_)) {}
    mute.joined().await;
    assert_eq!(mute.operations().await, [Operation::Except(global(80, 0))]);
    assert_eq!(mute.operations().await, [start(8080)]);
    assert!(mute.is_quiet_for(Duration::from_millis(500)).await, "the session stays");
}

#[tokio::test]
async fn the_session_that_ends_takes_the_answers_with_it() {
    let mute = Ne::start(0, Manner::NeverExcepts).await;
    let client = client(&[mute.port]).answer_within(SOON).join().expect("settings");
    joined(&client, 1).await;
    let asked = tokio::spawn({
        let client = client.clone();
        async move { client.except(&[global(80, 0)]).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    mute.end().await;
    assert_eq!(results(asked.await.expect("no panic").expect("legal")), [Err(NeError::Lost)]);
    assert_eq!(client.wanted().len(), 1, "for the next session");
}

#[tokio::test]
async fn what_cannot_be_is_asked_of_nobody() {
    let ne = Ne::start(0, Manner::Good).await;
    let client = client(&[ne.port]).max_exceptions(2).max_listed(1).join().expect("settings");
    joined(&client, 1).await;
    let port_of_nothing = Exception { flows: Flows { protocol: 0, port: 80, ..Flows::ALL }, ..global(80, 0) };
    assert!(matches!(client.except(&[global(80, 0), port_of_nothing]).await, Err(ExceptError::Invalid { .. })));
    assert!(matches!(client.unexcept(&[port_of_nothing.flows]).await, Err(ExceptError::Invalid { .. })));
    let many: Vec<_> = (1..4).map(|port| global(port, 0)).collect();
    assert_eq!(client.except(&many).await, Err(ExceptError::TooMany(2)));
    assert_eq!(client.wanted(), [], "all or none");
    client.except(&many[..2]).await.expect("few enough").all().expect("done");
    let listed = client.exceptions(Filter::default()).await.all().expect("done");
    assert_eq!((listed[0].entries.len(), listed[0].more), (1, true));
}

#[tokio::test]
async fn health_is_asked_for_by_service() {
    let mut ne = Ne::start(0, Manner::Good).await;
    let client = client(&[ne.port]).health(|service| HealthIndex::new((service.port() / 200) as u8).expect("small"));
    let _client = client.join().expect("settings");
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(8080)]);
    ne.health(40).await;
}

#[tokio::test]
async fn a_closure_that_hangs_is_health_0_and_the_session_lives() {
    let mut ne = Ne::start(0, Manner::Good).await;
    let client = client(&[ne.port]).health_timeout(Duration::from_millis(20)).health_async(|_| std::future::pending());
    let client = client.join().expect("settings");
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(8080)]);
    ne.health(0).await;
    client.drain(SOON).await.all().expect("it goes on");
}

#[tokio::test]
async fn many_at_once_are_all_done() {
    let ne = Ne::start(0, Manner::Good).await;
    let client = client(&[ne.port]).join().expect("settings");
    joined(&client, 1).await;
    let requests = (1..=400u16).map(|port| {
        let client = client.clone();
        tokio::spawn(async move { client.except(&[global(port, 0)]).await.expect("legal").all().map(drop) })
    });
    for request in requests.collect::<Vec<_>>() {
        request.await.expect("no panic").expect("done");
    }
    let listed = client.exceptions(Filter::default()).await.all().expect("done");
    assert_eq!((listed[0].entries.len(), client.wanted().len()), (400, 400));
}

#[tokio::test]
async fn the_last_clone_closes_the_sessions() {
    let mut ne = Ne::start(0, Manner::Good).await;
    let first = client(&[ne.port]).join().expect("settings");
    joined(&first, 1).await;
    let second = first.clone();
    drop(first);
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(8080)]);
    assert!(ne.is_quiet_for(Duration::from_millis(200)).await);
    drop(second);
    assert_eq!(ne.event().await, NeEvent::Closed(CloseReason::ClosedByPeer));
}
