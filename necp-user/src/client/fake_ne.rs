//! A network element for tests: the real protocol machine on a real socket, and no packet path behind it.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::necp::{CloseReason, Flows, Listed, NeEvent, NeSession, Operation, Scope, SessionConfig, Token};

/// Longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// How it behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Carries out everything.
    Good,
    /// Refuses all exceptions for this destination port.
    RefusesExceptions(u16),
    /// Answers no EXCEPTION_ADD.
    NeverExcepts,
    /// Refuses to start services with this port, the first time it is asked in each session.
    RefusesOnce(u16),
    /// Opens the session, and never answers a STOP.
    NeverStops,
    /// Opens the session, and then neither reads nor writes any more.
    FallsSilent,
}

/// Ends with all its sessions when dropped.
pub struct Ne {
    /// Its port on 127.0.0.1.
    pub port: u16,
    events: mpsc::UnboundedReceiver<NeEvent>,
    task: JoinHandle<()>,
}

impl Ne {
    /// Listens on 127.0.0.1, on a free port if `port` is 0. It asks for health every 50 ms.
    pub async fn start(port: u16, manner: Manner) -> Self {
        Self::start_at(Ipv4Addr::LOCALHOST.into(), port, manner).await
    }

    /// The same on another address.
    pub async fn start_at(address: IpAddr, port: u16, manner: Manner) -> Self {
        let listener = TcpListener::bind((address, port)).await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let (sender, events) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A connection that breaks is told by the event `Closed`.
                let _ = converse(stream, manner, &sender).await;
            }
        });
        Self { port, events, task }
    }

    /// Ends it; its port is free then.
    pub async fn end(mut self) {
        self.task.abort();
        // The error is that it was aborted.
        let _ = (&mut self.task).await;
    }

    /// The next event that is neither about health nor about the progress of a list.
    pub async fn event(&mut self) -> NeEvent {
        loop {
            match self.any_event().await {
                NeEvent::Health(_) | NeEvent::ListMore { .. } => {}
                other => return other,
            }
        }
    }

    /// Waits until a health answer says `index`.
    pub async fn health(&mut self, index: u8) {
        let begun = Instant::now();
        loop {
            match self.any_event().await {
                NeEvent::Health(answers) if answers.iter().all(|answer| answer.health == index) => return,
                NeEvent::Health(_) => assert!(begun.elapsed() < PATIENCE, "health never became {index}"),
                other => panic!("{other:?} while waiting for health {index}"),
            }
        }
    }

    /// Expects an INIT.
    pub async fn joined(&mut self) {
        let event = self.event().await;
        assert!(matches!(event, NeEvent::Init { .. }), "{event:?}");
    }

    /// Expects operations, and returns them.
    pub async fn operations(&mut self) -> Vec<Operation> {
        match self.event().await {
            NeEvent::Operations { operations, .. } => operations,
            other => panic!("{other:?} in place of operations"),
        }
    }

    /// Whether no event but health comes for a while.
    pub async fn is_quiet_for(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.event()).await.is_err()
    }

    async fn any_event(&mut self) -> NeEvent {
        tokio::time::timeout(PATIENCE, self.events.recv()).await.expect("an event in time").expect("the element runs")
    }
}

impl Drop for Ne {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// As whom the element knows its only server.
pub const INSTALLER: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// One connection's side of the element.
struct Conversation {
    session: NeSession,
    manner: Manner,
    refused: bool,
    exceptions: BTreeMap<Flows, Scope>,
    /// What a query has found and is still to be sent.
    listing: Vec<Listed>,
}

impl Conversation {
    fn on_event(&mut self, event: &NeEvent) {
        match event {
            NeEvent::Init { token } => self.session.respond(*token, &[]),
            NeEvent::Operations { token, operations } => self.carry_out(*token, operations),
            NeEvent::Reset { token } => {
                self.exceptions.clear();
                self.session.respond(*token, &[]);
            }
            NeEvent::Query { token, filter } => {
                let all = self.exceptions.iter();
                let all =
                    all.map(|(flows, scope)| Listed { scope: *scope, installer: INSTALLER.into(), flows: *flows });
                self.listing = all.filter(|entry| filter.matches(entry)).collect();
                let count = u32::try_from(self.listing.len()).expect("few");
                self.session.list(*token, count);
            }
            NeEvent::ListMore { token, max } => {
                let piece: Vec<_> = self.listing.drain(..self.listing.len().min(*max)).collect();
                self.session.list_more(*token, &piece);
            }
            _ => {}
        }
    }

    fn carry_out(&mut self, token: Token, operations: &[Operation]) {
        let mut failed = Vec::new();
        for (at, operation) in operations.iter().enumerate() {
            let fails = match (operation, self.manner) {
                (Operation::Start(unit), Manner::RefusesOnce(port)) => unit.port == port && !self.refused,
                (Operation::Except(exception), Manner::RefusesExceptions(port)) => exception.flows.port == port,
                _ => false,
            };
            match operation {
                _ if fails => failed.push(at),
                Operation::Except(exception) => drop(self.exceptions.insert(exception.flows, exception.scope)),
                Operation::Unexcept(flows) => drop(self.exceptions.remove(flows)),
                _ => {}
            }
        }
        self.refused |= !failed.is_empty();
        let silent = |operation: &Operation| match self.manner {
            Manner::NeverStops => matches!(operation, Operation::Stop(_)),
            Manner::NeverExcepts => matches!(operation, Operation::Except(_)),
            _ => false,
        };
        if !operations.iter().any(silent) {
            self.session.respond(token, &failed);
        }
    }
}

async fn converse(mut stream: TcpStream, manner: Manner, events: &mpsc::UnboundedSender<NeEvent>) -> io::Result<()> {
    let config = SessionConfig { keepalive: Duration::from_millis(50), ..SessionConfig::default() };
    let session = NeSession::new(config, Instant::now(), 1);
    let (exceptions, listing) = (BTreeMap::new(), Vec::new());
    let mut this = Conversation { session, manner, refused: false, exceptions, listing };
    let mut input = [0; 4096];
    loop {
        // Room in the output makes new events.
        loop {
            while let Some(event) = this.session.poll_event() {
                this.on_event(&event);
                // The test may have ended.
                let _ = events.send(event);
            }
            let Some(bytes) = this.session.poll_transmit() else { break };
            stream.write_all(&bytes).await?;
        }
        let session = &mut this.session;
        if session.closed().is_some() {
            return Ok(());
        }
        if manner == Manner::FallsSilent && session.is_ready() {
            // Whatever else happens on this connection, the peer will hear nothing of it.
            tokio::time::sleep(Duration::from_secs(3)).await;
            return Ok(());
        }
        let due = session.poll_timeout().expect("an open session has a timer").into();
        tokio::select! {
            length = stream.read(&mut input), if session.wants_input() => match length {
                Ok(length @ 1..) => session.handle_input(Instant::now(), &input[..length]),
                _ => session.close(CloseReason::ClosedByPeer),
            },
            () = tokio::time::sleep_until(due) => session.handle_timeout(Instant::now()),
        }
    }
}
