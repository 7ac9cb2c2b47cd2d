//! Clients of the servers in [`crate::echo`]: they know who answers, and notice when somebody else does.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, SocketAddrV4, SocketAddrV6, TcpStream, UdpSocket},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, Socket, Type};

use crate::{
    netns::Namespace,
    topology::{CLIENT6, client_address},
};

/// How long an answer may take before the server counts as silent. Only a failing test waits that long.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// More than fits a window, in a pattern without repetition.
const MEGABYTE: usize = 1 << 20;

/// How often a datagram is sent before the server counts as silent.
const TRIES: u32 = 5;

/// A TCP connection to a [`Hold`](crate::echo::Hold) server.
#[derive(Debug)]
pub struct Conversation {
    stream: BufReader<TcpStream>,
    local: SocketAddr,
    server: String,
    questions: u32,
}

impl Conversation {
    /// Connects from an address and port that no conversation of this process has had, for a bed's client host.
    ///
    /// # Errors
    /// If it is refused, or nobody greets within [`PATIENCE`].
    pub fn open(ns: &Namespace, to: impl Into<SocketAddr>) -> Result<Self> {
        let to = to.into();
        let (local, stream) = ns.run(|| connect_afresh(to))?;
        Self::greeted(local, stream).with_context(|| format!("{local} to {to}"))
    }

    /// Connects from whatever address the host chooses: for hosts other than the bed's client.
    ///
    /// # Errors
    /// As [`Conversation::open`].
    pub fn open_as_host(ns: &Namespace, to: impl Into<SocketAddr>) -> Result<Self> {
        let to = to.into();
        let (local, stream) = ns.run(|| connect_from(None, to, PATIENCE))?;
        Self::greeted(local, stream).with_context(|| format!("{local} to {to}"))
    }

    /// As many as are asked for, one after the other.
    ///
    /// # Errors
    /// As [`Conversation::open`].
    pub fn open_many(ns: &Namespace, count: usize, to: impl Into<SocketAddr>) -> Result<Vec<Self>> {
        let to = to.into();
        let open = || {
            let (local, stream) = connect_afresh(to)?;
            Self::greeted(local, stream).with_context(|| format!("{local} to {to}"))
        };
        ns.run(|| (0..count).map(|_| open()).collect())
    }

    /// The name of the server that greeted.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// The client's end.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// The client's end, over IPv4.
    ///
    /// # Panics
    /// Over IPv6.
    pub fn local_v4(&self) -> SocketAddrV4 {
        match self.local {
            SocketAddr::V4(local) => local,
            SocketAddr::V6(local) => panic!("{local} is of IPv6"),
        }
    }

    /// Says something that was not said before, and expects it back. A server that has not this connection resets it.
    ///
    /// # Errors
    /// If the connection is broken, or silent for [`PATIENCE`].
    pub fn ask(&mut self) -> Result<()> {
        self.ask_within(PATIENCE)
    }

    /// As [`Conversation::ask`], with less patience.
    ///
    /// # Errors
    /// If the connection is broken, or silent for so long.
    pub fn ask_within(&mut self, patience: Duration) -> Result<()> {
        self.questions += 1;
        let question = format!("{} asks {}\n", self.local, self.questions);
        let mut ask = || {
            self.stream.get_ref().set_read_timeout(Some(patience))?;
            self.stream.get_mut().write_all(question.as_bytes())?;
            let mut answer = String::new();
            self.stream.read_line(&mut answer)?;
            io::Result::Ok(answer)
        };
        let answer = ask().with_context(|| format!("{}'s connection to {}", self.local, self.server))?;
        ensure!(answer == question, "{} said {question:?} to {} and heard {answer:?}", self.local, self.server);
        Ok(())
    }

    fn greeted(local: SocketAddr, stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let mut stream = BufReader::new(stream);
        let mut server = String::new();
        stream.read_line(&mut server).context("no greeting")?;
        ensure!(server.ends_with('\n'), "the connection was closed before a greeting");
        Ok(Self { stream, local, server: server.trim().to_owned(), questions: 0 })
    }
}

/// A UDP flow to a [`UdpEcho`](crate::echo::UdpEcho) server.
#[derive(Debug)]
pub struct Datagrams {
    socket: UdpSocket,
    local: SocketAddrV4,
    questions: u32,
}

impl Datagrams {
    /// A flow from an address and port that no flow of this process has had, for a bed's client host.
    ///
    /// # Errors
    /// If the host has no route.
    pub fn open(ns: &Namespace, to: SocketAddrV4) -> Result<Self> {
        let local = fresh_source();
        let socket = ns.run(|| {
            let socket = UdpSocket::bind(local)?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(PATIENCE / TRIES))?;
            io::Result::Ok(socket)
        })?;
        Ok(Self { socket, local, questions: 0 })
    }

    /// As many as are asked for.
    ///
    /// # Errors
    /// As [`Datagrams::open`].
    pub fn open_many(ns: &Namespace, count: usize, to: SocketAddrV4) -> Result<Vec<Self>> {
        (0..count).map(|_| Self::open(ns, to)).collect()
    }

    /// The client's end.
    pub fn local(&self) -> SocketAddrV4 {
        self.local
    }

    /// Asks, and returns the name of the server that answers.
    ///
    /// # Errors
    /// If nobody does, however often it is asked within [`PATIENCE`].
    pub fn ask(&mut self) -> Result<String> {
        let mut last = None;
        for _ in 0..TRIES {
            self.questions += 1;
            let question = format!("{} asks {}", self.local, self.questions);
            match self.exchange(&question) {
                Ok(answer) => return Ok(answer),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("not asked")?).with_context(|| format!("no answer to {}'s datagrams", self.local))
    }

    fn exchange(&self, question: &str) -> io::Result<String> {
        self.socket.send(question.as_bytes())?;
        let mut datagram = [0; 512];
        loop {
            // An answer to an earlier question may be late.
            let length = self.socket.recv(&mut datagram)?;
            let answer = String::from_utf8_lossy(&datagram[..length]).into_owned();
            if let Some(name) = answer.strip_suffix(question) {
                return Ok(name.trim().to_owned());
            }
        }
    }
}

/// Every conversation is asked once more; who talks to whom may not have changed, and no connection may have broken.
///
/// # Errors
/// Names those that did, with `when`.
pub fn all_answer<'a>(when: &str, conversations: impl IntoIterator<Item = &'a mut Conversation>) -> Result<()> {
    let asked = conversations.into_iter().filter_map(|one| one.ask().err());
    let broken: Vec<String> = asked.map(|error| format!("{error:#}")).collect();
    ensure!(broken.is_empty(), "{when}, {} connections broke:\n{}", broken.len(), broken.join("\n"));
    Ok(())
}

/// A TCP connection over IPv4 that sends nothing yet, and its local end.
///
/// # Errors
/// As `connect(2)`; `TimedOut` after `patience`.
pub fn connect(
    source: Option<SocketAddrV4>,
    to: SocketAddrV4,
    patience: Duration,
) -> io::Result<(SocketAddrV4, TcpStream)> {
    match connect_from(source.map(SocketAddr::V4), to.into(), patience)? {
        (SocketAddr::V4(local), stream) => Ok((local, stream)),
        (SocketAddr::V6(_), _) => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// As [`connect`], over either family.
///
/// # Errors
/// As there.
pub fn connect_from(
    source: Option<SocketAddr>,
    to: SocketAddr,
    patience: Duration,
) -> io::Result<(SocketAddr, TcpStream)> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    if let Some(source) = source {
        socket.set_reuse_address(true)?;
        socket.bind(&source.into())?;
    }
    socket.connect_timeout(&to.into(), patience)?;
    let stream = TcpStream::from(socket);
    Ok((stream.local_addr()?, stream))
}

/// An address and port of the bed's client that nobody has had in this process.
///
/// Few addresses: a server on the clients' link asks ARP for each of them, and the kernel has one neighbour table, of
/// 1024 entries, for all namespaces together.
pub fn fresh_source() -> SocketAddrV4 {
    const ADDRESSES: usize = 37;
    let number = fresh_number();
    SocketAddrV4::new(client_address(number % ADDRESSES), port(number))
}

/// As [`fresh_source`], of IPv6.
pub fn fresh_source6() -> SocketAddrV6 {
    SocketAddrV6::new(CLIENT6, port(fresh_number()), 0, 0)
}

fn fresh_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn port(number: usize) -> u16 {
    const PORTS: std::ops::Range<u16> = 20_000..60_000;
    PORTS.start + (number % PORTS.len()) as u16
}

/// Connects from a source of [`fresh_source`], or [`fresh_source6`]; the host may have given one to somebody else already.
fn connect_afresh(to: SocketAddr) -> io::Result<(SocketAddr, TcpStream)> {
    for _ in 0..TRIES {
        let source = if to.is_ipv4() { fresh_source().into() } else { fresh_source6().into() };
        match connect_from(Some(source), to, PATIENCE) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            other => return other,
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// A megabyte there and back again, over one new connection to a [`Hold`](crate::echo::Hold) server.
///
/// # Errors
/// If not all comes back, or something else does.
pub fn there_and_back(client: &Namespace, to: impl Into<SocketAddr>) -> Result<()> {
    let to = to.into();
    let sent: Vec<u8> = (0..MEGABYTE as u32 / 4).flat_map(|n| n.wrapping_mul(0x9e37_79b1).to_le_bytes()).collect();
    let (_, stream) = client.run(|| connect_afresh(to))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut reader: TcpStream = stream.try_clone()?;
    let mut greeting = Vec::new();
    while greeting.last() != Some(&b'\n') {
        let mut byte = [0];
        reader.read_exact(&mut byte).context("no greeting")?;
        greeting.push(byte[0]);
    }
    comes_back(&stream, &sent)
}

/// Sends this over a connection to a [`Hold`](crate::echo::Hold) server, which has greeted, while it reads what comes back.
///
/// # Errors
/// If not all comes back, or something else does.
///
/// # Panics
/// Never: what writes does not panic.
pub fn comes_back(mut stream: &TcpStream, sent: &[u8]) -> Result<()> {
    let back = std::thread::scope(|scope| {
        let mut other_way = stream;
        let writer = scope.spawn(move || other_way.write_all(sent));
        let mut back = vec![0; sent.len()];
        stream.read_exact(&mut back).context("not all came back")?;
        writer.join().expect("the writer does not panic")?;
        Ok::<_, anyhow::Error>(back)
    })?;
    ensure!(back == sent, "what came back is not what was sent");
    Ok(())
}
