//! A peer over a real loopback connection; the owner is the test.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;
use crate::control::cluster::Cluster;
use crate::control::config::{ClusterConfig, FarmConfig};
use crate::necp::message::{Flows, Listed, Scope};
use crate::necp::{Filter, Flags, Forwarding, Header, Opcode, Operation, ServiceKey, ServiceUnit, Unit};

const SERVER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

struct Bench {
    client: TcpStream,
    inputs: mpsc::Receiver<Input>,
    peer: JoinHandle<Ended>,
}

async fn bench(config: SessionConfig) -> Bench {
    let listener = TcpListener::bind((SERVER, 0)).await.expect("a port");
    let client = TcpStream::connect(listener.local_addr().expect("an address")).await.expect("connected");
    let (stream, _) = listener.accept().await.expect("accepted");
    let (owner, inputs) = mpsc::channel(16);
    let (kick, kicked) = mpsc::channel(1);
    let patron = Patron {
        server: SERVER,
        id: 7,
        kick,
        joined: Arc::default(),
        limits: Arc::default(),
        rejected: Arc::default(),
    };
    let peer = tokio::spawn(serve(stream, patron, kicked, (config, Access::Open), owner));
    Bench { client, inputs, peer }
}

fn message(opcode: Opcode, id: u16, units: &[Unit]) -> Vec<u8> {
    let mut bytes = Header::new(opcode, Flags::NONE, id, units.len()).encode().to_vec();
    units.iter().for_each(|unit| bytes.extend_from_slice(&unit.encode()));
    bytes
}

impl Bench {
    async fn send(&mut self, bytes: &[u8]) {
        self.client.write_all(bytes).await.expect("written");
    }

    /// Opcode, flags, request id and payload of the next message.
    async fn receive(&mut self) -> (u8, u16, u16, Vec<u8>) {
        let read = async {
            let mut header = [0; 20];
            self.client.read_exact(&mut header).await.expect("a header");
            let mut payload = vec![0; u32::from_be_bytes(header[16..].try_into().expect("four bytes")) as usize];
            self.client.read_exact(&mut payload).await.expect("a payload");
            (header[5], u16::from_be_bytes([header[2], header[3]]), u16::from_be_bytes([header[6], header[7]]), payload)
        };
        timeout(Duration::from_secs(5), read).await.expect("a message within 5 s")
    }

    async fn input(&mut self) -> Input {
        timeout(Duration::from_secs(5), self.inputs.recv()).await.expect("an input within 5 s").expect("one")
    }

    /// Nothing arrives for a while.
    async fn silent(&mut self) -> bool {
        timeout(Duration::from_millis(100), self.client.peek(&mut [0])).await.is_err()
    }

    async fn join(&mut self) -> mpsc::Sender<CloseReason> {
        self.send(&message(Opcode::INIT, 1, &[Unit([0; 8])])).await;
        let Input::Opened { from, kick, done } = self.input().await else { panic!("INIT opens") };
        assert_eq!(from, From { server: SERVER, session: 7 });
        assert!(self.silent().await, "INIT_ACK waits for the owner");
        done.send(Vec::new()).expect("awaited");
        let (opcode, flags, id, payload) = self.receive().await;
        assert_eq!((opcode, flags & 4, id, payload), (0x02, 0, 1, vec![0; 32]));
        kick
    }

    /// How the peer ended, and what the owner was told of it.
    async fn end(mut self) -> (Ended, Option<Input>) {
        let ended = timeout(Duration::from_secs(5), &mut self.peer).await.expect("within 5 s").expect("no panic");
        (ended, self.inputs.recv().await)
    }

    async fn closed(&mut self) {
        let mut rest = Vec::new();
        timeout(Duration::from_secs(5), self.client.read_to_end(&mut rest)).await.expect("closed").expect("no reset");
        assert!(rest.is_empty(), "without an answer: {rest:?}");
    }
}

#[tokio::test]
async fn a_start_is_acknowledged_only_after_the_owner_answered() {
    let mut bench = bench(SessionConfig::default()).await;
    bench.join().await;
    let web = ServiceUnit::new(Forwarding::L2, ServiceKey::new(6, 80));
    let tls = ServiceUnit::new(Forwarding::L2, ServiceKey::new(6, 443));
    bench.send(&message(Opcode::START, 2, &[web.unit(), tls.unit()])).await;
    let Input::Operations { operations, done, .. } = bench.input().await else { panic!("START operates") };
    assert_eq!(operations, [Operation::Start(web), Operation::Start(tls)]);
    assert!(bench.silent().await, "START_ACK waits for the owner");
    done.send(vec![1]).expect("awaited");
    let (opcode, flags, id, payload) = bench.receive().await;
    assert_eq!((opcode, flags & 4, id), (0x06, 4, 2), "F_Error");
    assert_eq!(payload, tls.unit().encode(), "exactly the failed unit");

    drop(bench.client);
    let lost = bench.inputs.recv().await;
    assert!(matches!(lost, Some(Input::Lost { reason: CloseReason::ClosedByPeer, .. })), "{lost:?}");
}

#[tokio::test]
async fn a_superseded_session_is_closed() {
    let mut bench = bench(SessionConfig::default()).await;
    let kick = bench.join().await;
    kick.try_send(CloseReason::Superseded).expect("room");
    bench.closed().await;
    let (client, peer) = (bench.client, bench.peer);
    drop(client);
    let ended = peer.await.expect("no panic");
    assert_eq!(ended, Ended { reason: CloseReason::Superseded, joined: true });
}

#[tokio::test]
async fn an_answer_that_never_comes_ends_the_session() {
    let mut bench = bench(SessionConfig::default()).await;
    bench.join().await;
    bench.send(&message(Opcode::STOP, 2, &[Operation::stop_unit(ServiceKey::new(6, 80))])).await;
    let Input::Operations { done, .. } = bench.input().await else { panic!("STOP operates") };
    drop(done);
    bench.closed().await;
}

#[tokio::test]
async fn garbage_is_closed_and_the_owner_never_hears_of_it() {
    for garbage in
        ["GET / HTTP/1.1\r\nHost: example.com\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}", "\0\0\0\0\0\0\0\0"]
    {
        let mut bench = bench(SessionConfig::default()).await;
        bench.send(garbage.as_bytes()).await;
        bench.closed().await;
        let (client, inputs) = (bench.client, bench.inputs);
        drop(client);
        let ended = bench.peer.await.expect("no panic");
        assert!(matches!(ended, Ended { reason: CloseReason::Framing { .. }, joined: false }), "{ended:?}");
        assert!(inputs.is_empty());
    }
}

#[tokio::test]
async fn a_silent_stranger_is_closed_at_the_deadline() {
    let config = SessionConfig { init_deadline: Duration::from_millis(50), ..SessionConfig::default() };
    let mut bench = bench(config).await;
    bench.closed().await;
    drop(std::mem::replace(&mut bench.client, TcpStream::from_std(unconnected()).expect("a socket")));
    let (ended, input) = bench.end().await;
    assert!(matches!(ended, Ended { reason: CloseReason::InitDeadline(_), joined: false }), "{ended:?}");
    assert!(input.is_none());
}

fn unconnected() -> std::net::TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.set_nonblocking(true).expect("non-blocking");
    socket.into()
}

#[tokio::test]
async fn a_peer_that_answers_no_keepalive_is_dead() {
    let config = SessionConfig {
        keepalive: Duration::from_millis(50),
        jitter: Duration::from_millis(10),
        ..SessionConfig::default()
    };
    let mut bench = bench(config).await;
    bench.join().await;
    let begin = Instant::now();
    let lost = bench.input().await;
    assert!(matches!(lost, Input::Lost { reason: CloseReason::DeadPeer(3), .. }), "{lost:?}");
    assert!(begin.elapsed() >= Duration::from_millis(100), "three intervals: {:?}", begin.elapsed());
}

/// What every keepalive says again stays here; what a START makes new is told it.
#[tokio::test]
async fn the_owner_hears_of_health_that_is_news() {
    let keepalive = Duration::from_millis(50);
    let config = SessionConfig { keepalive, jitter: Duration::ZERO, ..SessionConfig::default() };
    let mut bench = bench(config).await;
    bench.join().await;
    let web = ServiceUnit::new(Forwarding::L2, ServiceKey::new(6, 80));
    for round in 0..2 {
        bench.send(&message(Opcode::START, 2, &[web.unit()])).await;
        let Input::Operations { done, .. } = bench.input().await else { panic!("START operates") };
        done.send(Vec::new()).expect("awaited");
        let mut indices = [70, 70, 70, 40, 70].into_iter();
        let mut left = indices.len();
        while left > 0 {
            let (opcode, _, id, mut payload) = bench.receive().await;
            if opcode == Opcode::KEEPALIVE.0 {
                let mut units = Vec::new();
                if !payload.is_empty() {
                    payload[15] = indices.next().expect("one more");
                    left -= 1;
                    units.push(Unit::decode(payload.as_chunks().0.first().expect("a unit")));
                }
                bench.send(&message(Opcode::KEEPALIVE_ACK, id, &units)).await;
            }
        }
        for expected in [70, 40, 70] {
            let Input::Health { answers, .. } = bench.input().await else { panic!("health, in round {round}") };
            assert_eq!(answers, [HealthAnswer { service: web.key(), health: expected }], "in round {round}");
        }
        assert!(bench.inputs.is_empty());
    }
}

#[tokio::test]
async fn a_flood_without_reading_is_held_up_and_harms_nobody() {
    let mut bench = bench(SessionConfig::default()).await;
    bench.join().await;
    let keepalives: Vec<u8> =
        (0..64).flat_map(|id| message(Opcode::KEEPALIVE, id, &[Unit([1, 6, 80, 0, 0, 0, 0, 0]); 64])).collect();
    let mut sent = 0;
    while sent < 256 * 1024 * 1024 {
        match timeout(Duration::from_millis(500), bench.client.write(&keepalives)).await {
            Ok(Ok(count)) => sent += count,
            Ok(Err(_)) => break,
            Err(_) => break,
        }
    }
    assert!(sent < 128 * 1024 * 1024, "somebody took {sent} bytes whose answers nobody reads");
    drop(bench.client);
    let lost = timeout(Duration::from_secs(5), bench.inputs.recv()).await.expect("noticed");
    assert!(matches!(lost, Some(Input::Lost { .. })), "{lost:?}");
}

/// Entries of a list of 4 MiB.
const LONG: usize = 4 << 15;

/// The owner of a list that never ends before its time.
async fn give_lists(mut inputs: mpsc::Receiver<Input>) -> Option<CloseReason> {
    let entry = Listed { scope: Scope::Local, installer: std::net::Ipv4Addr::LOCALHOST.into(), flows: Flows::ALL };
    let config = ClusterConfig { farms: vec![FarmConfig::new("web")], ..ClusterConfig::default() };
    let cluster = Cluster::new(config, Instant::now()).expect("a configuration");
    while let Some(input) = inputs.recv().await {
        match input {
            Input::List { step: ListStep::Begin(_) | ListStep::Count(_), done, .. } => {
                let listing = cluster.except_list(Filter::default());
                done.send(ListPart::Counted(listing, LONG as u32)).expect("awaited");
            }
            Input::List { step: ListStep::Read(listing, max), done, .. } => {
                done.send(ListPart::Entries(Some(listing), vec![entry; max])).expect("awaited");
            }
            Input::Lost { reason, .. } => return Some(reason),
            other => panic!("{other:?}"),
        }
    }
    None
}

/// A long list goes to a slow reader for much longer than a peer may be silent; it answers what it gets, when it gets it.
#[tokio::test]
async fn a_slow_reader_of_a_long_list_is_alive() {
    const PIECE: usize = 16 * 1024;
    let keepalive = Duration::from_millis(400);
    let config = SessionConfig { keepalive, jitter: Duration::ZERO, ..SessionConfig::default() };
    let mut bench = bench(config).await;
    bench.join().await;
    bench.send(&message(Opcode::EXCEPTION_QUERY, 2, &[Filter::default().unit()])).await;
    let Bench { mut client, inputs, peer } = bench;
    let owner = tokio::spawn(give_lists(inputs));

    let (mut bytes, mut answered, mut listed) = (Vec::new(), 0, 0);
    let began = Instant::now();
    // So many keepalives after the list, too.
    while answered < 5 {
        let mut piece = vec![0; PIECE];
        let count =
            timeout(Duration::from_secs(10), client.read(&mut piece)).await.expect("in time").expect("no reset");
        assert_ne!(count, 0, "closed after {:?}: {:?}", began.elapsed(), owner.await);
        bytes.extend_from_slice(&piece[..count]);
        while let Some((header, payload)) = bytes.split_first_chunk() {
            let header = Header::decode(header).expect("framed");
            let Some(_) = payload.get(..header.payload_len as usize) else { break };
            if header.opcode == Opcode::KEEPALIVE {
                answered += usize::from(listed > 0);
                let ack = Header::new(Opcode::KEEPALIVE_ACK, Flags::NONE, header.request_id, 0);
                client.write_all(&ack.encode()).await.expect("written");
            } else if header.opcode == Opcode::EXCEPTION_RESP {
                listed = header.payload_len as usize / 32;
                assert!(began.elapsed() > 8 * keepalive, "read too fast to say anything: {:?}", began.elapsed());
            }
            bytes.drain(..20 + header.payload_len as usize);
        }
        if listed == 0 {
            // 1 MiB/s, and less where the machine is busy.
            tokio::time::sleep(Duration::from_millis(16)).await;
        }
    }
    assert_eq!(listed, LONG);
    drop(client);
    assert_eq!(owner.await.expect("no panic"), Some(CloseReason::ClosedByPeer));
    peer.await.expect("no panic");
}
