//! The agent as a whole, over real TCP, against the network element's protocol machine.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinHandle;

use super::health::HealthSource;
use super::protocol::{AgentStatus, NeAnswer};
use super::settings::Offer;
use super::*;
use crate::client::fake_ne::{Manner, Ne};
use crate::client::{HealthIndex, NeAddress};
use crate::necp::{CloseReason, NeEvent, Operation, ServiceKey, ServiceUnit};
use crate::plane::throwaway_netns::in_new_netns;

/// A running agent.
struct Agent {
    control: Control,
    task: JoinHandle<anyhow::Result<()>>,
    directory: TempDir,
}

impl Agent {
    /// Starts an agent for the elements on these ports, after `change` had its way with its settings.
    fn start(ports: &[u16], serve: &[&str], change: impl FnOnce(&mut Settings, &Path)) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut settings = Settings {
            decap: None,
            decap_from: Vec::new(),
            nes: ports.iter().map(|port| NeAddress { host: "127.0.0.1".into(), port: *port }).collect(),
            offers: serve.iter().map(|text| offer(text)).collect(),
            health: HealthSource::Constant(HealthIndex::FULL),
            health_interval: Duration::from_millis(10),
            health_timeout: Duration::from_secs(5),
            source: None,
            keepalive: Duration::from_millis(500),
            retry_max: Duration::from_secs(1),
            drain: Duration::from_secs(20),
            vips: Vec::new(),
            key_file: None,
            lock: directory.path().join("se.lock"),
            protection: crate::secret::tcp_security::Protection::default(),
            socket: directory.path().join("se.sock"),
        };
        change(&mut settings, directory.path());
        let control = Control::new();
        let task = tokio::spawn({
            let control = control.clone();
            async move { super::serve(settings, &control).await }
        });
        Self { control, task, directory }
    }

    /// Waits for its end, which must come within this time.
    async fn ends_within(self, time: Duration) -> Duration {
        let begun = Instant::now();
        tokio::time::timeout(time, self.task).await.expect("in time").expect("no panic").expect("no error");
        begun.elapsed()
    }
}

impl Agent {
    /// Says a line to its socket, and returns what it answers.
    async fn say(&self, line: &str) -> serde_json::Value {
        let path = self.directory.path().join("se.sock");
        let mut stream = tokio::net::UnixStream::connect(path).await.expect("it listens");
        stream.write_all(format!("{line}\n").as_bytes()).await.expect("written");
        let mut answer = String::new();
        let reading = tokio::io::BufReader::new(stream).read_line(&mut answer).await;
        assert!(reading.expect("an answer") > 0);
        serde_json::from_str(&answer).expect("JSON")
    }

    /// The results that a command had, in the order of the elements.
    async fn tell(&self, line: &str) -> Vec<String> {
        let mut answer = self.say(line).await;
        let answers: Vec<NeAnswer> = serde_json::from_value(answer["answers"].take()).expect(line);
        answers.into_iter().map(|answer| format!("{:?}", answer.result)).collect()
    }

    /// Waits until this holds for its status.
    async fn wait_for(&self, what: &str, holds: impl Fn(&AgentStatus) -> bool) -> AgentStatus {
        let begun = Instant::now();
        loop {
            let status = serde_json::from_value(self.say("{\"command\":\"status\"}").await["status"].take());
            let status: AgentStatus = status.expect("a status");
            if holds(&status) {
                return status;
            }
            assert!(begun.elapsed() < SOON, "{what}: {status:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn offer(text: &str) -> ServiceUnit {
    text.parse::<Offer>().expect(text).0
}

fn start(text: &str) -> Operation {
    Operation::Start(offer(text))
}

fn stop(text: &str) -> Operation {
    Operation::Stop(text.parse::<ServiceKey>().expect(text))
}

const SOON: Duration = Duration::from_secs(10);

#[tokio::test]
async fn joins_starts_answers_health_stops_and_leaves() {
    let mut ne = Ne::start(0, Manner::Good).await;
    let agent = Agent::start(&[ne.port], &["tcp/8081=l2", "udp/53=gre"], |settings, directory| {
        std::fs::write(directory.join("health"), "40").expect("written");
        settings.health = HealthSource::File(directory.join("health"));
    });
    ne.joined().await;
    assert_eq!(ne.operations().await, [start("tcp/8081=l2"), start("udp/53=gre")]);
    ne.health(40).await;
    std::fs::remove_file(agent.directory.path().join("health")).expect("removed");
    ne.health(0).await;
    agent.control.drain();
    assert_eq!(ne.operations().await, [stop("tcp/8081"), stop("udp/53")]);
    assert_eq!(ne.event().await, NeEvent::Closed(CloseReason::ClosedByPeer));
    agent.ends_within(SOON).await;
}

#[tokio::test]
async fn joins_every_element_and_stops_at_each() {
    let (mut first, mut second) = (Ne::start(0, Manner::Good).await, Ne::start(0, Manner::Good).await);
    let agent = Agent::start(&[first.port, second.port], &["tcp/8082=l2"], |_, _| {});
    for ne in [&mut first, &mut second] {
        ne.joined().await;
        assert_eq!(ne.operations().await, [start("tcp/8082=l2")]);
    }
    agent.control.drain();
    for ne in [&mut first, &mut second] {
        assert_eq!(ne.operations().await, [stop("tcp/8082")]);
    }
    agent.ends_within(SOON).await;
}

#[tokio::test]
async fn comes_back_to_an_element_that_was_restarted() {
    let mut ne = Ne::start(0, Manner::Good).await;
    let agent = Agent::start(&[ne.port], &["tcp/8083=l3"], |_, _| {});
    ne.joined().await;
    assert_eq!(ne.operations().await, [start("tcp/8083=l3")]);
    let port = ne.port;
    ne.end().await;
    let gone = Instant::now();
    let mut ne = Ne::start(port, Manner::Good).await;
    ne.joined().await;
    let away = gone.elapsed();
    assert!(away > Duration::from_millis(800) && away < Duration::from_secs(5), "retried after {away:?}, not 1 s");
    assert_eq!(ne.operations().await, [start("tcp/8083=l3")]);
    agent.control.drain();
    assert_eq!(ne.operations().await, [stop("tcp/8083")]);
    agent.ends_within(SOON).await;
}

#[tokio::test]
async fn leaves_an_element_that_is_dead_and_dials_again() {
    let mut ne = Ne::start(0, Manner::FallsSilent).await;
    let agent = Agent::start(&[ne.port], &["tcp/8084=l2"], |settings, _| {
        settings.keepalive = Duration::from_millis(100);
    });
    ne.joined().await;
    let begun = Instant::now();
    ne.joined().await;
    assert!(begun.elapsed() < SOON);
    agent.control.abort();
    agent.ends_within(SOON).await;
}

#[tokio::test]
async fn asks_again_for_what_was_refused_and_for_nothing_else() {
    let mut ne = Ne::start(0, Manner::RefusesOnce(8086)).await;
    let agent = Agent::start(&[ne.port], &["tcp/8085=l2", "tcp/8086=l2"], |_, _| {});
    ne.joined().await;
    assert_eq!(ne.operations().await, [start("tcp/8085=l2"), start("tcp/8086=l2")]);
    assert_eq!(ne.operations().await, [start("tcp/8086=l2")]);
    assert!(ne.is_quiet_for(Duration::from_millis(1500)).await, "it was granted");
    agent.control.drain();
    assert_eq!(ne.operations().await, [stop("tcp/8085"), stop("tcp/8086")]);
    agent.ends_within(SOON).await;
}

#[tokio::test]
async fn nobody_there_does_not_hold_up_the_end() {
    let free = Ne::start(0, Manner::Good).await.port;
    let agent = Agent::start(&[free], &["tcp/8087=l2"], |_, _| {});
    tokio::time::sleep(Duration::from_millis(50)).await;
    agent.control.drain();
    assert!(agent.ends_within(SOON).await < Duration::from_secs(3));
}

#[tokio::test]
async fn a_second_request_leaves_at_once() {
    let mut ne = Ne::start(0, Manner::NeverStops).await;
    let agent = Agent::start(&[ne.port], &["tcp/8088=l2"], |_, _| {});
    ne.joined().await;
    ne.operations().await;
    agent.control.drain();
    assert_eq!(ne.operations().await, [stop("tcp/8088")]);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!agent.task.is_finished(), "it waits for the acknowledgement");
    agent.control.abort();
    assert!(agent.ends_within(SOON).await < Duration::from_secs(2));
}

#[tokio::test]
async fn an_element_that_never_acknowledges_is_not_waited_for_without_end() {
    let mut ne = Ne::start(0, Manner::NeverStops).await;
    let agent = Agent::start(&[ne.port], &["tcp/8089=l2"], |_, _| {});
    ne.joined().await;
    ne.operations().await;
    agent.control.drain();
    let took = agent.ends_within(STOP_WAIT + SOON).await;
    assert!(took >= STOP_WAIT - Duration::from_millis(100), "{took:?}");
}

#[tokio::test]
async fn a_second_agent_is_refused() {
    let ne = Ne::start(0, Manner::Good).await;
    let first = Agent::start(&[ne.port], &[], |_, _| {});
    tokio::time::sleep(Duration::from_millis(50)).await;
    let lock = first.directory.path().join("se.lock");
    let second = Agent::start(&[ne.port], &[], |settings, _| settings.lock = lock);
    let error = second.task.await.expect("no panic").expect_err("the lock is held").to_string();
    assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
    first.control.drain();
    first.ends_within(SOON).await;
}

#[tokio::test]
async fn dials_from_the_address_it_is_told_to() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let source = Ipv4Addr::new(127, 3, 2, 1);
    let agent = Agent::start(&[port], &[], |settings, _| settings.source = Some(source.into()));
    let (_stream, peer) = tokio::time::timeout(SOON, listener.accept()).await.expect("in time").expect("accepted");
    assert_eq!(peer.ip(), source);
    agent.control.abort();
    agent.ends_within(SOON).await;
}

const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);

/// Starts an agent with the VIP, serving one port on which there is a connection.
async fn serving(drain: Duration) -> (Ne, Agent, (TcpStream, TcpStream)) {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address").port();
    let mut ne = Ne::start(0, Manner::Good).await;
    let service = format!("tcp/{free}=l2");
    let agent = Agent::start(&[ne.port], &[&service], |settings, _| {
        settings.vips = vec![VIP.into()];
        settings.drain = drain;
    });
    ne.joined().await;
    assert_eq!(ne.operations().await, [start(&service)]);
    let listener = TcpListener::bind((VIP, free)).expect("the VIP is set up");
    // Not over 127.0.0.1, which would count as this host's own.
    let client = TcpStream::connect((VIP, free)).expect("connected");
    let (server, _) = listener.accept().expect("accepted");
    (ne, agent, (client, server))
}

#[test]
fn stays_until_the_connections_have_ended() {
    in_new_netns(async || {
        let (mut ne, agent, connection) = serving(Duration::from_secs(60)).await;
        agent.control.drain();
        assert!(matches!(ne.operations().await[..], [Operation::Stop(_)]));
        assert!(ne.is_quiet_for(Duration::from_millis(600)).await, "the session stays");
        assert!(!agent.task.is_finished(), "there is a connection");
        drop(connection);
        agent.ends_within(SOON).await;
        assert!(TcpListener::bind((VIP, 0)).is_err(), "the VIP is taken away");
    });
}

#[test]
fn waits_no_longer_than_it_is_told_to() {
    in_new_netns(async || {
        let (_ne, agent, _connection) = serving(Duration::from_millis(700)).await;
        agent.control.drain();
        let took = agent.ends_within(SOON).await;
        assert!(took >= Duration::from_millis(600), "{took:?}");
        assert!(TcpListener::bind((VIP, 0)).is_err(), "the VIP is taken away nevertheless");
    });
}

#[test]
fn an_element_that_comes_back_during_the_drain_is_told_to_stop() {
    in_new_netns(async || {
        let (ne, agent, connection) = serving(Duration::from_secs(60)).await;
        let port = ne.port;
        ne.end().await;
        agent.control.drain();
        let mut ne = Ne::start(port, Manner::Good).await;
        ne.joined().await;
        assert!(matches!(ne.operations().await[..], [Operation::Stop(_)]), "not START");
        drop(connection);
        agent.ends_within(SOON).await;
    });
}

/// One element that is there, and one that is not.
async fn half_joined() -> (Ne, Agent) {
    let free = Ne::start(0, Manner::Good).await;
    let away = free.port;
    free.end().await;
    let mut ne = Ne::start(0, Manner::Good).await;
    let agent = Agent::start(&[ne.port, away], &["tcp/8090=l2"], |_, _| {});
    ne.joined().await;
    assert_eq!(ne.operations().await, [start("tcp/8090=l2")]);
    agent.wait_for("it serves", |status| status.nes[0].state == "serving").await;
    (ne, agent)
}

#[tokio::test]
async fn commands_reach_the_element_that_is_there_and_name_the_one_that_is_not() {
    let (mut ne, agent) = half_joined().await;
    let add = r#"{"command":"except-add","src":"203.0.113.9/24","dst":"198.51.100.7","port":"tcp/80","ttl":300,"scope":"global"}"#;
    assert_eq!(agent.tell(add).await, ["Accepted", "Away"]);
    let [Operation::Except(exception)] = ne.operations().await[..] else { panic!("an exception") };
    assert_eq!(exception.flows.to_string(), "203.0.113.0/24 -> 198.51.100.7/32 tcp/80");
    assert_eq!((exception.ttl, exception.scope), (300, crate::necp::Scope::Global));

    let list = agent.say(r#"{"command":"except-list","dst":"198.51.100.7"}"#).await;
    let entry = serde_json::json!({"installer": "127.0.0.1", "scope": "global", "src": "203.0.113.0/24",
        "dst": "198.51.100.7", "port": "tcp/80"});
    assert_eq!((&list["answers"][0]["entries"][0], &list["answers"][1]["result"]), (&entry, &"away".into()), "{list}");
    let none = agent.say(r#"{"command":"except-list","scope":"local"}"#).await;
    assert_eq!(none["answers"][0]["entries"], serde_json::json!([]));
    let status = agent.wait_for("counted", |status| status.exceptions.global == 1).await;
    assert_eq!((status.nes[1].state.as_str(), status.nes[1].why.is_some()), ("away", true));

    assert_eq!(agent.tell(r#"{"command":"except-del","dst":"198.51.100.7"}"#).await, ["Accepted", "Away"]);
    assert_eq!(agent.tell(r#"{"command":"except-reset"}"#).await, ["Accepted", "Away"]);
    let all = agent.say(r#"{"command":"except-list"}"#).await;
    assert_eq!(all["answers"][0]["entries"], serde_json::json!([]));
    agent.control.abort();
    agent.ends_within(SOON).await;
}

#[tokio::test]
async fn drained_and_resumed_by_command() {
    let (mut ne, agent) = half_joined().await;
    assert_eq!(agent.tell(r#"{"command":"drain"}"#).await, ["Accepted", "Away"]);
    assert_eq!(ne.operations().await, [stop("tcp/8090")]);
    let status = agent.wait_for("drained", |status| status.nes[0].state == "drained").await;
    assert!(!status.serving && status.connections == Some(0));
    assert_eq!(agent.tell(r#"{"command":"resume"}"#).await, ["Accepted", "Away"]);
    assert_eq!(ne.operations().await, [start("tcp/8090=l2")]);
    assert!(agent.wait_for("serving", |status| status.nes[0].state == "serving").await.serving);
    agent.control.drain();
    assert_eq!(ne.operations().await, [stop("tcp/8090")]);
    agent.ends_within(SOON).await;
}

#[tokio::test]
async fn health_is_overridden_and_given_back() {
    let (mut ne, agent) = half_joined().await;
    ne.health(100).await;
    let health = agent.say(r#"{"command":"health","set":40}"#).await;
    let expected = serde_json::json!({"index": 40, "source": "constant:100", "source_index": 100, "overridden": true});
    assert_eq!(health["health"], expected);
    ne.health(40).await;
    assert!(agent.say(r#"{"command":"health","set":101}"#).await["error"].is_string());
    assert_eq!(agent.say(r#"{"command":"health"}"#).await["health"], expected, "as it was");
    assert_eq!(agent.say(r#"{"command":"health","set":"auto"}"#).await["health"]["overridden"], false);
    ne.health(100).await;
    agent.control.abort();
    agent.ends_within(SOON).await;
}

#[tokio::test]
async fn rubbish_on_the_socket_is_answered_and_harms_nobody() {
    let (mut ne, agent) = half_joined().await;
    for line in [
        "",
        "status",
        "{}",
        "[]",
        r#"{"command":"stop"}"#,
        r#"{"command":"status","x":1,"command":"drain"}"#,
        r#"{"command":"except-add","sorce":"any"}"#,
        r#"{"command":"except-add","src":"2001:db8::1/129"}"#,
        r#"{"command":"except-add","port":"tcp/0"}"#,
        r#"{"command":"except-add","ttl":-1}"#,
        r#"{"command":"except-add","ttl":4294967296}"#,
        r#"{"command":"health","set":256}"#,
        r#"{"command":"health","set":"high"}"#,
    ] {
        let answer = agent.say(line).await;
        assert!(
            answer["error"].as_str().is_some_and(|error| error.contains("the commands are status")),
            "{line}: {answer}"
        );
    }
    let path = agent.directory.path().join("se.sock");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).expect("a socket").permissions());
    assert_eq!(mode & 0o777, 0o600);
    for rubbish in [vec![b'x'; 60_000], vec![0xff; 5000], b"\xff\xfe\n".to_vec()] {
        let mut stream = tokio::net::UnixStream::connect(&path).await.expect("it listens");
        stream.write_all(&rubbish).await.expect("written");
        let mut answer = Vec::new();
        // An overlong line ends the connection, any other is answered and the next one is awaited.
        stream.shutdown().await.expect("shut down");
        stream.read_to_end(&mut answer).await.expect("an answer");
        assert!(answer.starts_with(b"{\"error\":"), "{}", String::from_utf8_lossy(&answer));
        assert!(answer.len() < 1000, "bounded");
    }
    assert!(ne.is_quiet_for(Duration::from_millis(50)).await, "nothing of it reached the element");
    agent.control.drain();
    assert_eq!(ne.operations().await, [stop("tcp/8090")]);
    agent.ends_within(SOON).await;
    assert!(!path.exists(), "the socket goes with the agent");
}
