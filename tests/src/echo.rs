//! Servers that answer with their name: UDP, and TCP connections that last.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
};

use crate::netns::{Background, Namespace};

const LARGEST_DATAGRAM: usize = 65_507;

/// Answers every datagram with `NAME `, followed by the datagram.
#[derive(Debug)]
pub struct UdpEcho {
    _task: Background,
}

impl UdpEcho {
    /// Starts it on a port of each of these addresses, from which it also answers: a socket on 0.0.0.0 would answer
    /// for a VIP from the server's own address. An address need not be there yet.
    ///
    /// # Errors
    /// If a port is taken.
    pub fn start<A: Into<IpAddr> + Copy + Sync>(
        ns: &Namespace,
        name: &str,
        addresses: &[A],
        port: u16,
    ) -> Result<Self> {
        let bind = |address: &A| bound(Type::DGRAM, SocketAddr::new((*address).into(), port));
        let sockets = ns.run(|| addresses.iter().map(bind).collect::<Result<Vec<_>>>())?;
        let name = name.to_owned();
        let task = ns.background(async move {
            let mut tasks = tokio::task::JoinSet::new();
            for socket in sockets {
                let socket = UdpSocket::from_std(socket.into()).expect("a nonblocking socket");
                tasks.spawn(answer(socket, name.clone()));
            }
            while tasks.join_next().await.is_some() {}
        })?;
        Ok(Self { _task: task })
    }
}

/// Greets every TCP connection with `NAME` and a line break, sends back whatever comes, and never closes first.
#[derive(Debug)]
pub struct Hold {
    _task: Background,
}

impl Hold {
    /// Starts it on a port of all addresses, of both families.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn start(ns: &Namespace, name: &str, port: u16) -> Result<Self> {
        let listen = |address: IpAddr| {
            let socket = bound(Type::STREAM, SocketAddr::new(address, port))?;
            socket.listen(4096).map(|()| socket).context("cannot listen")
        };
        let [four, six] = ns.run(|| [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()].map(listen));
        let (four, six, name) = (four?, six?, name.to_owned());
        let task = ns.background(async move {
            let [four, six] =
                [four, six].map(|socket| TcpListener::from_std(socket.into()).expect("a nonblocking socket"));
            let mut connections = tokio::task::JoinSet::new();
            // An error is the connection's (reset before it was accepted), not the listener's.
            loop {
                let accepted = tokio::select! {
                    accepted = four.accept() => accepted,
                    accepted = six.accept() => accepted,
                };
                if let Ok((stream, _)) = accepted {
                    connections.spawn(hold(stream, name.clone()));
                }
            }
        })?;
        Ok(Self { _task: task })
    }
}

/// A nonblocking socket bound to an address that need not be there yet (IP_FREEBIND).
fn bound(kind: Type, address: SocketAddr) -> Result<Socket> {
    let bind = || {
        let socket = Socket::new(Domain::for_address(address), kind, None)?;
        socket.set_nonblocking(true)?;
        socket.set_reuse_address(kind == Type::STREAM)?;
        match address {
            SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
            SocketAddr::V6(_) => {
                socket.set_only_v6(true)?;
                socket.set_freebind_v6(true)?;
            }
        }
        socket.bind(&address.into())?;
        std::io::Result::Ok(socket)
    };
    bind().with_context(|| format!("cannot bind {address}"))
}

async fn answer(socket: UdpSocket, name: String) {
    let mut datagram = vec![0; LARGEST_DATAGRAM];
    loop {
        // Errors are ICMP's about an earlier answer: the client has gone.
        let Ok((length, client)) = socket.recv_from(&mut datagram).await else { continue };
        let mut reply = format!("{name} ").into_bytes();
        reply.extend_from_slice(&datagram[..length.min(LARGEST_DATAGRAM - reply.len())]);
        let _ = socket.send_to(&reply, client).await;
    }
}

async fn hold(mut stream: TcpStream, name: String) {
    let mut bytes = vec![0; 16 * 1024];
    if stream.write_all(format!("{name}\n").as_bytes()).await.is_err() {
        return;
    }
    while let Ok(length @ 1..) = stream.read(&mut bytes).await {
        if stream.write_all(&bytes[..length]).await.is_err() {
            return;
        }
    }
}
