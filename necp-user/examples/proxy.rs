//! A small TCP proxy that is a server element, as the draft's motivation has it (§2): some origins refuse to speak to a
//! proxy. When one does, the proxy asks its network element for an exception, and the clients reach it directly from then
//! on.
//!
//! It takes connections, connects to the origin for each, and copies both ways. An origin that refuses or resets the
//! connection before its first byte, or answers with HTTP status 403, is excepted.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::{Parser, ValueEnum};
use necp_user::client::{Client, HealthIndex, JoinError, NeAddress};
use necp_user::necp::service::TCP;
use necp_user::necp::{Exception, Flows, Forwarding, Scope, ServiceKey, ServiceUnit};
use tokio::io::{AsyncWriteExt as _, copy};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};

/// How long an origin may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Connections at a time; at this many the health is 0.
const MAX_CONNECTIONS: usize = 1000;
/// How much of the answer's beginning is looked at.
const HEAD: usize = 64;

/// A TCP proxy that is a server element (SE) of an NECP load balancer: an origin that refuses it is reached by the clients
/// directly from then on.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "proxy",
    after_help = "\
Examples:
  Before a fixed origin, for a virtual address that has tcp/8080 as a service; 5 minutes if the origin refuses us:
    proxy --ne 10.0.0.1 --listen 0.0.0.0:8080 --origin 198.51.100.7:80 --ttl 300

  For traffic that the balancer intercepts: the origin is where the client wanted to go (needs CAP_NET_ADMIN, a `tproxy`
  rule of nftables that hands the packets to this port, and a route that makes them local):
    proxy --ne 10.0.0.1 --listen 0.0.0.0:80 --transparent --scope global

SIGTERM and SIGINT: STOP, wait for the connections, leave."
)]
pub struct Args {
    /// A network element to join; repeat it for several
    #[arg(long, required = true, value_name = "ADDR[:PORT]")]
    ne: Vec<NeAddress>,
    /// Where to take connections; the port is the service that is started
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddrV4,
    /// How the packets are wanted: l2, gre or l3
    #[arg(long, value_name = "TYPE", default_value = "l2")]
    forwarding: Forwarding,
    /// Where all connections go; without it, to the address that the client connected to
    #[arg(long, value_name = "ADDR:PORT")]
    origin: Option<SocketAddrV4>,
    /// Take connections to addresses that are not this host's (IP_TRANSPARENT)
    #[arg(long, conflicts_with = "origin")]
    transparent: bool,
    /// How long an origin that refused us is left alone, in seconds
    #[arg(long, value_name = "SECS", default_value = "300", value_parser = clap::value_parser!(u32).range(1..))]
    ttl: u32,
    /// local: this proxy does not want the origin's flows, another one may; global: no proxy of the farm
    #[arg(long, value_enum, default_value = "local")]
    scope: ScopeArg,
    /// The longest time between two attempts to reach a network element, in seconds
    #[arg(long, value_name = "SECS", default_value = "256", value_parser = clap::value_parser!(u64).range(1..))]
    retry_max: u64,
    /// At the end, how long to wait for the connections, in seconds
    #[arg(long, value_name = "SECS", default_value = "30")]
    drain: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ScopeArg {
    Local,
    Global,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    match run(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxy: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Joins, and serves until a signal ends it.
pub async fn run(args: Args) -> Result<(), Box<dyn std::error::Error>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let listener = listen(&args)?;
    println!("proxy: listening on {}", listener.local_addr()?);
    let open = Arc::new(AtomicUsize::new(0));
    let client = join(&args, listener.local_addr()?, Arc::clone(&open))?;
    let proxy = Arc::new(Proxy { args, client: client.clone(), open: Arc::clone(&open) });
    tokio::select! {
        () = accept(listener, Arc::clone(&proxy)) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // An element that is away sends nothing; any other failure is worth a word.
    if let Err(error) = client.drain(Duration::from_secs(5)).await.all() {
        eprintln!("proxy: STOP: {error}");
    }
    let drained = async {
        while open.load(Ordering::Relaxed) > 0 {
            sleep(Duration::from_millis(100)).await;
        }
    };
    if timeout(Duration::from_secs(proxy.args.drain), drained).await.is_err() {
        eprintln!("proxy: {} connections left", open.load(Ordering::Relaxed));
    }
    client.leave().await;
    Ok(())
}

fn listen(args: &Args) -> std::io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    if args.transparent {
        socket2::SockRef::from(&socket).set_ip_transparent_v4(true)?;
    }
    socket.bind(args.listen.into())?;
    socket.listen(1024)
}

/// Full health when idle, 0 when no further connection is taken.
fn join(args: &Args, local: SocketAddr, open: Arc<AtomicUsize>) -> Result<Client, JoinError> {
    let service = ServiceUnit::new(args.forwarding, ServiceKey::new(TCP, local.port()));
    let builder = Client::builder().serve(service).retry_max(Duration::from_secs(args.retry_max));
    let builder = args.ne.iter().fold(builder, |builder, ne| builder.ne(ne.clone()));
    let health = move |_| {
        let free = MAX_CONNECTIONS.saturating_sub(open.load(Ordering::Relaxed)) * 100;
        u8::try_from(free.div_ceil(MAX_CONNECTIONS)).ok().and_then(HealthIndex::new).unwrap_or(HealthIndex::NONE)
    };
    builder.health(health).join()
}

struct Proxy {
    args: Args,
    client: Client,
    open: Arc<AtomicUsize>,
}

async fn accept(listener: TcpListener, proxy: Arc<Proxy>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if proxy.open.load(Ordering::Relaxed) < MAX_CONNECTIONS => {
                let place = Place::take(&proxy.open);
                let proxy = Arc::clone(&proxy);
                tokio::spawn(async move {
                    proxy.serve(stream).await;
                    drop(place);
                });
            }
            // Closed: there is no room.
            Ok(_) => {}
            Err(error) => {
                eprintln!("proxy: accept: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// One of the connections that are open.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Proxy {
    async fn serve(&self, mut client: TcpStream) {
        let origin = match (self.args.origin, client.local_addr()) {
            (Some(origin), _) => origin,
            (None, Ok(SocketAddr::V4(wanted))) => wanted,
            _ => return eprintln!("proxy: where did this client want to go?"),
        };
        // Only this host's own addresses can be bound to.
        if self.args.origin.is_none() && std::net::UdpSocket::bind((*origin.ip(), 0)).is_ok() {
            return eprintln!("proxy: a client came for {origin}, which is this host itself; name an --origin");
        }
        let refusal = match timeout(CONNECT, TcpStream::connect(origin)).await {
            Ok(Ok(mut server)) => converse(&mut client, &mut server).await,
            Ok(Err(error)) if is_refusal(&error) => Some(error.to_string()),
            // Unreachable or silent: no word of the origin's about proxies.
            Ok(Err(_)) | Err(_) => None,
        };
        if let Some(why) = refusal {
            self.except(origin, &why).await;
        }
    }

    async fn except(&self, origin: SocketAddrV4, why: &str) {
        let scope = match self.args.scope {
            ScopeArg::Local => Scope::Local,
            ScopeArg::Global => Scope::Global,
        };
        let flows = flows_to(*origin.ip(), origin.port());
        // What was excepted already is not told again and again.
        if self.client.wanted().iter().any(|wanted| wanted.flows == flows) {
            return;
        }
        println!("proxy: {origin} refuses us ({why}); an exception for {} s", self.args.ttl);
        match self.client.except(&[Exception { scope, ttl: self.args.ttl, flows }]).await {
            Ok(answers) => answers.failures().for_each(|(ne, error)| eprintln!("proxy: {ne}: {error}")),
            Err(error) => eprintln!("proxy: {error}"),
        }
    }
}

/// All flows to one port of one host.
fn flows_to(host: Ipv4Addr, port: u16) -> Flows {
    Flows { destination: IpAddr::V4(host).into(), protocol: TCP, port, ..Flows::ALL }
}

/// Copies both ways until both have ended; why the origin refuses us, if it does.
async fn converse(client: &mut TcpStream, server: &mut TcpStream) -> Option<String> {
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let up = async {
        // A connection that breaks on its way is no refusal.
        let _ = copy(&mut from_client, &mut to_server).await;
        let _ = to_server.shutdown().await;
    };
    let down = async {
        let mut head = [0; HEAD];
        let length = from_server.peek(&mut head).await?;
        let _ = copy(&mut from_server, &mut to_client).await;
        let _ = to_client.shutdown().await;
        Ok(is_forbidden(&head[..length]).then(|| "HTTP status 403".to_owned()))
    };
    match tokio::try_join!(
        async {
            up.await;
            Ok(())
        },
        down
    ) {
        Ok(((), refusal)) => refusal,
        Err(error) => is_refusal(&error).then(|| error.to_string()),
    }
}

fn is_refusal(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionRefused | ConnectionReset)
}

/// Whether these are the first bytes of `HTTP/1.1 403 Forbidden`.
fn is_forbidden(head: &[u8]) -> bool {
    head.starts_with(b"HTTP/1.") && head.get(8..12) == Some(b" 403")
}
