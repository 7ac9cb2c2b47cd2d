//! Services that come and go while the client has joined.

use super::*;
use crate::necp::Forwarding;

#[tokio::test]
async fn services_come_and_go_one_by_one() {
    let mut ne = Ne::start(0, Manner::Good).await;
    let port = ne.port;
    let client = client(&[port]).join().expect("settings");
    joined(&client, 1).await;
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(8080)]);

    client.serve(&[offer(8081), offer(8082)]).await.expect("services").all().expect("done");
    assert_eq!(ne.operations().await, [start(8081), start(8082)]);
    let gre = ServiceUnit::new(Forwarding::Gre, ServiceKey::new(6, 8081));
    client.serve(&[gre]).await.expect("services").all().expect("done");
    assert_eq!(ne.operations().await, [Operation::Start(gre)]);
    client.withdraw(&[ServiceKey::new(6, 8080)]).await.all().expect("done");
    assert_eq!(ne.operations().await, [stop(8080)]);
    assert_eq!(client.offers(), [gre, offer(8082)]);
    let Standing::Joined { started, stopped: false, .. } = client.nes()[0].standing.clone() else { panic!("joined") };
    assert_eq!(started, [8081, 8082].map(|port| ServiceKey::new(6, port)));

    // An element that comes back is told what is wanted now.
    ne.end().await;
    let mut ne = Ne::start(port, Manner::Good).await;
    ne.joined().await;
    assert_eq!(ne.operations().await, [Operation::Start(gre), start(8082)]);
    joined(&client, 1).await;
    client.leave().await;
}

#[tokio::test]
async fn what_is_offered_while_drained_waits_for_the_rest() {
    let mut ne = Ne::start(0, Manner::Good).await;
    let client = client(&[ne.port]).join().expect("settings");
    joined(&client, 1).await;
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(8080)]);
    client.drain(SOON).await.all().expect("done");
    assert_eq!(ne.operations().await, [stop(8080)]);
    client.serve(&[offer(8081)]).await.expect("services").all().expect("kept");
    assert!(ne.is_quiet_for(Duration::from_millis(200)).await);
    let Standing::Joined { stopped: true, .. } = client.nes()[0].standing else { panic!("still stopped") };
    client.resume().await.all().expect("done");
    assert_eq!(ne.operations().await, [start(8080), start(8081)]);
    client.leave().await;
}

#[tokio::test]
async fn one_that_is_refused_is_asked_for_again_alone_unless_it_is_taken_back() {
    let mut ne = Ne::start(0, Manner::RefusesOnce(8081)).await;
    let client = client(&[ne.port]).join().expect("settings");
    joined(&client, 1).await;
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(8080)]);
    let answers = results(client.serve(&[offer(8081)]).await.expect("a service"));
    assert_eq!(answers, [Err(NeError::Services(vec![ServiceKey::new(6, 8081)]))]);
    assert_eq!(ne.operations().await, [start(8081)]);
    assert_eq!(ne.operations().await, [start(8081)], "alone, a second later");
    joined(&client, 1).await;
    client.leave().await;

    let mut ne = Ne::start(0, Manner::RefusesOnce(8081)).await;
    let client = super::client(&[ne.port]).join().expect("settings");
    joined(&client, 1).await;
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(8080)]);
    assert!(!client.serve(&[offer(8081)]).await.expect("a service").any_ok());
    assert_eq!(ne.operations().await, [start(8081)]);
    client.withdraw(&[ServiceKey::new(6, 8081)]).await.all().expect("one that was not started is stopped");
    assert_eq!(ne.operations().await, [stop(8081)]);
    assert!(ne.is_quiet_for(Duration::from_millis(1500)).await);
    client.leave().await;
}

#[tokio::test]
async fn what_is_no_service_is_offered_to_nobody() {
    let mut ne = Ne::start(0, Manner::Good).await;
    let client = client(&[ne.port]).join().expect("settings");
    joined(&client, 1).await;
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(8080)]);
    let twice = client.serve(&[offer(8081), offer(8081)]).await.expect_err("one forwarding type");
    assert_eq!(twice, ServeError::Twice(ServiceKey::new(6, 8081)));
    let none = client.serve(&[offer(8081), offer(0)]).await.expect_err("no port");
    assert_eq!(none.to_string(), "tcp/0 is no service");
    assert_eq!(client.offers(), [offer(8080)], "nothing of it was taken");
    assert!(ne.is_quiet_for(Duration::from_millis(200)).await);
    client.leave().await;
}
