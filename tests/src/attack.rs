//! Peers that mean harm, or are broken: thousands of connections from as many addresses, all on one thread.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    daemon::NECP_PORT,
    hand::{BASIC_PAYLOAD, Message, Unit, opcode},
    netns::{Background, Namespace},
    topology::{NE, Topology, client_address},
};

/// What an attacker does with each of its connections; when it is closed, it comes again.
#[derive(Clone, Debug)]
pub enum Attack {
    /// Says nothing.
    Silence,
    /// Sends these bytes, waits to be closed, and comes again at once.
    Say(Vec<u8>),
    /// Sends these bytes one a second.
    Drip(Vec<u8>),
    /// Sends the first bytes, then the others without end; reads nothing.
    Flood {
        /// Once.
        first: Vec<u8>,
        /// Again and again.
        then: Vec<u8>,
        /// Whether it reads (and throws away) what comes.
        reads: bool,
    },
}

/// INIT, unauthenticated.
pub fn init() -> Vec<u8> {
    message(opcode::INIT, &[[0; 8]])
}

/// A message with these units.
pub fn message(opcode: u8, units: &[Unit]) -> Vec<u8> {
    let flags = if units.is_empty() { 0 } else { BASIC_PAYLOAD };
    Message { flags, opcode, request_id: 7, units: units.to_vec() }.bytes()
}

/// A header that announces this length, with or without units.
pub fn endless(opcode: u8, length: u32) -> Vec<u8> {
    let mut bytes = Message { flags: BASIC_PAYLOAD, opcode, request_id: 7, units: Vec::new() }.bytes();
    bytes[16..20].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Has the balancer reach the clients' addresses by one next hop: its table of neighbours is not what is attacked here.
///
/// # Errors
/// Without root.
pub fn route_attackers(bed: &Topology) -> Result<()> {
    bed.client().ip_batch("addr add 198.18.128.2/16 dev eth0\n")?;
    bed.ne().ip_batch("route add 198.18.0.0/17 via 198.18.128.2 dev eth0\n")
}

/// Attackers, until it is dropped.
#[derive(Debug)]
pub struct Attackers(#[expect(dead_code, reason = "it runs until it is dropped")] Background);

impl Attackers {
    /// `count` attackers, from [`client_address`] number `first` on, each with one connection at a time, every one doing the
    /// next attack of the list.
    ///
    /// # Errors
    /// If no thread can be had.
    pub fn start(ns: &Namespace, first: usize, count: usize, attacks: Vec<Attack>) -> Result<Self> {
        let attacks = Arc::new(attacks);
        let task = ns.background(async move {
            let mut tasks = JoinSet::new();
            for number in 0..count {
                let attacks = Arc::clone(&attacks);
                tasks.spawn(async move {
                    let attack = &attacks[number % attacks.len()];
                    loop {
                        if let Ok(Ok(mut stream)) = timeout(Duration::from_secs(5), connect(first + number)).await {
                            // Being closed is what it is there for.
                            let _ = attack.run(&mut stream).await;
                        }
                        sleep(Duration::from_millis(50)).await;
                    }
                });
            }
            while tasks.join_next().await.is_some() {}
        })?;
        Ok(Self(task))
    }
}

impl Attack {
    async fn run(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        let mut buffer = vec![0; 16 * 1024];
        match self {
            Self::Silence => while stream.read(&mut buffer).await? > 0 {},
            Self::Say(bytes) => {
                stream.write_all(bytes).await?;
                while stream.read(&mut buffer).await? > 0 {}
            }
            Self::Drip(bytes) => {
                for byte in bytes {
                    stream.write_all(&[*byte]).await?;
                    sleep(Duration::from_secs(1)).await;
                }
            }
            Self::Flood { first, then, reads } => {
                stream.write_all(first).await?;
                let (mut read, mut write) = stream.split();
                let drain = async {
                    while *reads && read.read(&mut buffer).await? > 0 {}
                    std::future::pending::<std::io::Result<()>>().await
                };
                let flood = async {
                    loop {
                        write.write_all(then).await?;
                    }
                };
                tokio::select! { end = drain => return end, end = flood => return end }
            }
        }
        Ok(())
    }
}

async fn connect(number: usize) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    let from: Ipv4Addr = client_address(number);
    socket.bind(SocketAddrV4::new(from, 0).into())?;
    socket.connect(SocketAddrV4::new(NE, NECP_PORT).into()).await
}
