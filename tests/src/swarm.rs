//! Thousands of server elements in one namespace, each at an address of its own: the product's own session machine over
//! nonblocking sockets, all on one thread.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use necp_user::necp::{Credentials, Key, RequestId, SeEvent, SeSession, ServiceUnit, SessionConfig};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{sleep, sleep_until, timeout},
};

use crate::{
    daemon::NECP_PORT,
    netns::{Background, Namespace, wait_until},
    topology::{NE, client_address},
};

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);
/// After a connection ended, or could not be had (draft §5.4: 1 s at first; these stay there).
const RETRY: Duration = Duration::from_secs(1);

/// What a swarm is made of.
#[derive(Clone, Debug)]
pub struct Members {
    /// The first address: [`client_address`] of this number.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// What each of them starts; all of it by one START.
    pub offers: Vec<ServiceUnit>,
    /// Time between two of their KEEPALIVEs.
    pub keepalive: Duration,
    /// What all of them prove themselves with, if they do.
    pub key: Option<Key>,
}

/// A running swarm; its connections are closed when it is dropped.
#[derive(Debug)]
pub struct Swarm {
    counts: Arc<Counts>,
    members: usize,
    _task: Background,
}

#[derive(Debug, Default)]
struct Counts {
    serving: AtomicUsize,
    started: AtomicU64,
    refused: AtomicU64,
    lost: AtomicU64,
    slowest_us: AtomicU64,
}

impl Swarm {
    /// All of them connect at once, and again whenever they are disconnected. The process may have to be allowed more open
    /// files.
    ///
    /// # Errors
    /// If no thread can be had.
    pub fn start(ns: &Namespace, members: &Members) -> Result<Self> {
        let counts = Arc::new(Counts::default());
        let (shared, offers) = (Arc::clone(&counts), Arc::new(members.offers.clone()));
        let (first, count, keepalive) = (members.first, members.count, members.keepalive);
        let key = members.key.clone();
        let task = ns.background(async move {
            let mut tasks = JoinSet::new();
            for index in first..first + count {
                let (counts, offers, key) = (Arc::clone(&shared), Arc::clone(&offers), key.clone());
                tasks.spawn(async move {
                    let address = client_address(index);
                    loop {
                        if let Ok(Ok(stream)) = timeout(CONNECT, connect(address)).await {
                            let mut member = Member::new(&counts, &offers, keepalive, key.as_ref());
                            member.serve(stream).await;
                        }
                        sleep(RETRY).await;
                    }
                });
            }
            while tasks.join_next().await.is_some() {}
        })?;
        Ok(Self { counts, members: count, _task: task })
    }

    /// Members whose START is acknowledged, on a session that is open.
    pub fn serving(&self) -> usize {
        self.counts.serving.load(Ordering::Relaxed)
    }

    /// Sessions that have ended, whoever ended them.
    pub fn lost(&self) -> u64 {
        self.counts.lost.load(Ordering::Relaxed)
    }

    /// STARTs of which a unit failed.
    pub fn refused(&self) -> u64 {
        self.counts.refused.load(Ordering::Relaxed)
    }

    /// The longest time from a connection to its START_ACK since this was asked last.
    pub fn take_slowest(&self) -> Duration {
        Duration::from_micros(self.counts.slowest_us.swap(0, Ordering::Relaxed))
    }

    /// Waits until all of them serve; returns how long that took.
    ///
    /// # Errors
    /// Says how many do, after `timeout`.
    pub fn wait_until_all_serve(&self, timeout: Duration) -> Result<Duration> {
        let began = Instant::now();
        wait_until("all members serve", timeout, || self.serving() == self.members)
            .with_context(|| format!("{} of {} serve, {} refused", self.serving(), self.members, self.refused()))?;
        Ok(began.elapsed())
    }
}

async fn connect(from: Ipv4Addr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddrV4::new(from, 0).into())?;
    socket.set_nodelay(true)?;
    socket.connect(SocketAddrV4::new(NE, NECP_PORT).into()).await
}

/// One session.
struct Member<'a> {
    counts: &'a Counts,
    offers: &'a [ServiceUnit],
    machine: SeSession,
    began: Instant,
    start: Option<RequestId>,
    serves: bool,
}

impl<'a> Member<'a> {
    fn new(counts: &'a Counts, offers: &'a [ServiceUnit], keepalive: Duration, key: Option<&Key>) -> Self {
        let config = SessionConfig { keepalive, jitter: keepalive / 5, ..SessionConfig::default() };
        let began = Instant::now();
        // The network element remembers no number of ours: any will do.
        let credentials = key.map(|key| Credentials { key: key.clone(), first_seq_num: 1 });
        let machine = SeSession::with_credentials(config, credentials, began, rand::random());
        Self { counts, offers, machine, began, start: None, serves: false }
    }

    async fn serve(&mut self, mut stream: TcpStream) {
        let mut buffer = [0; 512];
        while self.machine.closed().is_none() {
            while let Some(event) = self.machine.poll_event() {
                self.on_event(event);
            }
            while let Some(bytes) = self.machine.poll_transmit() {
                if stream.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            let due = self.machine.poll_timeout().unwrap_or_else(Instant::now);
            tokio::select! {
                ready = stream.readable() => match ready.and_then(|()| stream.try_read(&mut buffer)) {
                    Ok(0) => return,
                    Ok(length) => self.machine.handle_input(Instant::now(), &buffer[..length]),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(_) => return,
                },
                () = sleep_until(due.into()) => self.machine.handle_timeout(Instant::now()),
            }
        }
    }

    fn on_event(&mut self, event: SeEvent) {
        match event {
            SeEvent::Ready => self.start = Some(self.machine.start(self.offers)),
            SeEvent::HealthQuery { token, queries } => {
                self.machine.answer_health(token, &vec![Some(100); queries.len()]);
            }
            SeEvent::Acked { id, failed } if self.start == Some(id) => {
                if failed.is_empty() {
                    self.serves = true;
                    self.counts.serving.fetch_add(1, Ordering::Relaxed);
                    self.counts.started.fetch_add(1, Ordering::Relaxed);
                    let took = self.began.elapsed().as_micros() as u64;
                    self.counts.slowest_us.fetch_max(took, Ordering::Relaxed);
                } else {
                    self.counts.refused.fetch_add(1, Ordering::Relaxed);
                }
            }
            _ => {}
        }
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        self.counts.lost.fetch_add(1, Ordering::Relaxed);
        if self.serves {
            self.counts.serving.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
