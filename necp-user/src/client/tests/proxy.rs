//! The example `proxy`, against a network element and origins of our own.

#[path = "../../../examples/proxy.rs"]
#[expect(dead_code, reason = "its `main` is not called here")]
mod example;

use std::net::SocketAddr;

use clap::Parser as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;

/// A running proxy, its port, and its network element, which it has joined.
async fn start(origin: SocketAddr, more: &[&str]) -> (JoinHandle<()>, u16, Ne) {
    let mut ne = Ne::start(0, Manner::Good).await;
    let free = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("its address").port();
    let (at, listen, origin) = (format!("127.0.0.1:{}", ne.port), format!("127.0.0.1:{free}"), origin.to_string());
    let args = ["proxy", "--ne", &at, "--listen", &listen, "--origin", &origin];
    let args = example::Args::try_parse_from(args.iter().chain(more)).expect("arguments");
    let task = tokio::spawn(async move { example::run(args).await.expect("it runs") });
    ne.joined().await;
    let [Operation::Start(unit)] = ne.operations().await[..] else { panic!("START first") };
    assert_eq!(unit, offer(free));
    (task, free, ne)
}

/// An origin that says this to everyone.
async fn origin(says: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("its address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut question = [0; 64];
            let _ = stream.read(&mut question).await;
            let _ = stream.write_all(says.as_bytes()).await;
        }
    });
    address
}

/// What a client of the proxy is answered.
async fn ask(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("the proxy listens");
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("written");
    let mut answer = String::new();
    // A proxy whose origin is not there closes, with or without a reset.
    let _ = tokio::time::timeout(SOON, stream.read_to_string(&mut answer)).await.expect("in time");
    answer
}

async fn expect_exception(ne: &mut Ne, scope: Scope, ttl: u32, origin: SocketAddr) {
    let flows =
        Flows { destination: "127.0.0.1/32".parse().expect("a host"), protocol: 6, port: origin.port(), ..Flows::ALL };
    assert_eq!(ne.operations().await, [Operation::Except(Exception { scope, ttl, flows })]);
}

#[tokio::test]
async fn an_origin_that_refuses_the_connection_is_excepted_once() {
    let nobody = SocketAddr::from(([127, 0, 0, 1], free_port().await));
    let (proxy, port, mut ne) = start(nobody, &[]).await;
    assert_eq!(ask(port).await, "");
    expect_exception(&mut ne, Scope::Local, 300, nobody).await;
    assert_eq!(ask(port).await, "");
    assert!(ne.is_quiet_for(Duration::from_millis(200)).await, "it is excepted already");
    proxy.abort();
}

#[tokio::test]
async fn an_origin_that_forbids_is_excepted_and_its_answer_passed_on() {
    const FORBIDDEN: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n";
    let forbids = origin(FORBIDDEN).await;
    let (proxy, port, mut ne) = start(forbids, &["--scope", "global", "--ttl", "60"]).await;
    assert_eq!(ask(port).await, FORBIDDEN);
    expect_exception(&mut ne, Scope::Global, 60, forbids).await;
    proxy.abort();
}

#[tokio::test]
async fn an_origin_that_answers_is_left_alone() {
    const FINE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n403";
    let (proxy, port, mut ne) = start(origin(FINE).await, &[]).await;
    assert_eq!(ask(port).await, FINE);
    assert!(ne.is_quiet_for(Duration::from_millis(200)).await);
    proxy.abort();
}
