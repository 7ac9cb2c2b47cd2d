//! A network element for tests: the real protocol machine on a real socket, and no packet path behind it.

use std::io;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::necp::{CloseReason, NeEvent, NeSession, Operation, SessionConfig};

/// Longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// How it behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Carries out everything.
    Good,
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
        let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("a port");
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

    /// The next event that is not about health.
    pub async fn event(&mut self) -> NeEvent {
        loop {
            match self.any_event().await {
                NeEvent::Health(_) => {}
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
            other => panic!("{other:?} in place of START or STOP"),
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

async fn converse(mut stream: TcpStream, manner: Manner, events: &mpsc::UnboundedSender<NeEvent>) -> io::Result<()> {
    let config = SessionConfig { keepalive: Duration::from_millis(50), ..SessionConfig::default() };
    let mut session = NeSession::new(config, Instant::now(), 1);
    let (mut refused, mut input) = (false, [0; 4096]);
    loop {
        while let Some(event) = session.poll_event() {
            match &event {
                NeEvent::Init { token } => session.respond(*token, &[]),
                NeEvent::Operations { token, operations } => {
                    let fails = |operation: &Operation| {
                        matches!((operation, manner), (Operation::Start(unit), Manner::RefusesOnce(port))
                            if unit.port == port && !refused)
                    };
                    let failed: Vec<usize> = (0..operations.len()).filter(|at| fails(&operations[*at])).collect();
                    refused |= !failed.is_empty();
                    let stop = operations.iter().any(|operation| matches!(operation, Operation::Stop(_)));
                    if !(stop && manner == Manner::NeverStops) {
                        session.respond(*token, &failed);
                    }
                }
                _ => {}
            }
            // The test may have ended.
            let _ = events.send(event);
        }
        while let Some(bytes) = session.poll_transmit() {
            stream.write_all(&bytes).await?;
        }
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
