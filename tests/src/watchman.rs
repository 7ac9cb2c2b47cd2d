//! A server element that watches how well it is served: its keepalives, and how long STOP and START take.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddrV4, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use necp_user::necp::{Forwarding, RequestId, SeEvent, SeSession, ServiceKey, ServiceUnit, SessionConfig};

use crate::{conversation::connect, daemon::NECP_PORT, netns::Namespace, topology::NE};

/// Between two of its requests.
const PAUSE: Duration = Duration::from_millis(100);
/// Between two of its keepalives.
pub const KEEPALIVE: Duration = Duration::from_millis(500);

/// What it has seen.
#[derive(Clone, Debug, Default)]
pub struct Watched {
    /// Requests that were answered.
    pub answered: usize,
    /// The longest time from a STOP to its ACK.
    pub slowest_stop: Duration,
    /// The longest time from a START to its ACK.
    pub slowest_start: Duration,
    /// Keepalives that went unanswered until the next one was due.
    pub missed: u64,
    /// Why the session ended, if it did.
    pub ended: Option<String>,
}

/// It starts and stops one service again and again, from its own thread.
#[derive(Debug)]
pub struct Watchman {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Watched>>,
}

impl Watchman {
    /// Joins from the namespace's own address, to start and stop tcp/`port`.
    ///
    /// # Errors
    /// If it cannot connect.
    pub fn start(ns: &Namespace, port: u16) -> Result<Self> {
        let (_, stream) = ns.run(|| connect(None, SocketAddrV4::new(NE, NECP_PORT), Duration::from_secs(5)))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_millis(2)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stop);
        let thread = thread::Builder::new().name("watchman".into()).spawn(move || watch(stream, port, &ended))?;
        Ok(Self { stop, thread })
    }

    /// Ends the watch.
    ///
    /// # Errors
    /// If the connection failed.
    pub fn finish(self) -> Result<Watched> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the watchman has panicked")?
    }
}

fn watch(mut stream: TcpStream, port: u16, stop: &AtomicBool) -> Result<Watched> {
    let config = SessionConfig { keepalive: KEEPALIVE, jitter: Duration::ZERO, ..SessionConfig::default() };
    let mut machine = SeSession::new(config, Instant::now(), rand::random());
    let service = ServiceKey::new(6, port);
    let mut watched = Watched::default();
    let mut outstanding: Option<(RequestId, bool, Instant)> = None;
    let (mut serves, mut next) = (false, Instant::now());
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        while let Some(event) = machine.poll_event() {
            match event {
                SeEvent::HealthQuery { token, queries } => {
                    machine.answer_health(token, &vec![Some(100); queries.len()]);
                }
                SeEvent::Acked { id, .. } => {
                    if let Some((_, start, asked)) = outstanding.take_if(|(asked, ..)| *asked == id) {
                        let slowest = if start { &mut watched.slowest_start } else { &mut watched.slowest_stop };
                        *slowest = (*slowest).max(asked.elapsed());
                        watched.answered += 1;
                        (serves, next) = (start, Instant::now() + PAUSE);
                    }
                }
                _ => {}
            }
        }
        if outstanding.is_none() && machine.is_ready() && Instant::now() >= next {
            let id = match serves {
                false => machine.start(&[ServiceUnit::new(Forwarding::L2, service)]),
                true => machine.stop(&[service]),
            };
            outstanding = Some((id, !serves, Instant::now()));
        }
        while let Some(bytes) = machine.poll_transmit() {
            stream.write_all(&bytes)?;
        }
        let counters = machine.counters();
        watched.missed =
            watched.missed.max((counters.keepalives_sent - counters.keepalives_answered).saturating_sub(1));
        if let Some(reason) = machine.closed() {
            watched.ended = Some(reason.to_string());
            break;
        }
        match stream.read(&mut buffer) {
            Ok(0) => {
                watched.ended = Some("the network element closed the connection".into());
                break;
            }
            Ok(length) => machine.handle_input(Instant::now(), &buffer[..length]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
        machine.handle_timeout(Instant::now());
    }
    Ok(watched)
}
