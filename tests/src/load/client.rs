//! One connection: hyper over a TCP socket bound in the namespace that the caller's task runs in.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    time::{Duration, Instant},
};

use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1::{self, SendRequest},
    header::HOST,
};
use hyper_util::rt::TokioIo;
use sha2::{Digest as _, Sha256};
use tokio::{net::TcpSocket, sync::watch, task::JoinSet, time::timeout};

use super::{Event, Failure, Kind, Outcome};
use crate::nginx::Content;

/// A client of one service. Its tasks must run in the client's namespace.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// The service.
    pub destination: SocketAddrV4,
    /// How long the handshake, the answer's head, or a pause within a body may take before the connection has failed.
    pub patience: Duration,
}

impl Client {
    /// Waits up to ten seconds for anything.
    pub fn new(destination: SocketAddrV4) -> Self {
        Self { destination, patience: Duration::from_secs(10) }
    }

    /// One request on a connection of its own.
    pub async fn short(&self, source: Ipv4Addr, path: &str, report: impl Fn(Event)) -> Outcome {
        let mut session = Session::new(self, Kind::Short, report);
        let failure = async {
            session.connect(source).await?;
            session.request(path).await.map(drop)
        };
        let failure = failure.await.err();
        session.end(failure)
    }

    /// One large answer, compared with what it should be.
    pub async fn download(&self, source: Ipv4Addr, path: &str, content: &Content, report: impl Fn(Event)) -> Outcome {
        let mut session = Session::new(self, Kind::Download, report);
        let failure = async {
            session.connect(source).await?;
            let (length, sha256) = session.request(path).await?;
            if (length, sha256) == (content.length, content.sha256) { Ok(()) } else { Err(Failure::Checksum) }
        };
        let failure = failure.await.err();
        session.end(failure)
    }

    /// A request every `pause` over one connection, until `stop` is true or its sender is gone; then a last one, so
    /// that a connection that broke during a pause is not taken for whole.
    pub async fn keep_alive(
        &self,
        source: Ipv4Addr,
        pause: Duration,
        mut stop: watch::Receiver<bool>,
        report: impl Fn(Event),
    ) -> Outcome {
        let mut session = Session::new(self, Kind::KeepAlive, report);
        let failure = async {
            session.connect(source).await?;
            let mut last = false;
            loop {
                session.request("/name").await?;
                if last {
                    return Ok(());
                }
                // An elapsed pause is the ordinary case.
                last = timeout(pause, stop.wait_for(|stop| *stop)).await.is_ok();
            }
        };
        let failure = failure.await.err();
        session.end(failure)
    }
}

struct Session<R> {
    client: Client,
    outcome: Outcome,
    sender: Option<SendRequest<Empty<Bytes>>>,
    /// Drives the connection; aborted, and so closed, with the session.
    driver: JoinSet<()>,
    report: R,
}

impl<R: Fn(Event)> Session<R> {
    fn new(client: &Client, kind: Kind, report: R) -> Self {
        let outcome = Outcome {
            kind,
            local: None,
            first_syn: Instant::now(),
            connected: None,
            lasted: Duration::ZERO,
            server: None,
            answered: 0,
            bytes: 0,
            failure: None,
        };
        Self { client: *client, outcome, sender: None, driver: JoinSet::new(), report }
    }

    async fn connect(&mut self, source: Ipv4Addr) -> Result<(), Failure> {
        let failed = |error: std::io::Error| Failure::Connect(error.to_string());
        let socket = TcpSocket::new_v4().map_err(failed)?;
        socket.bind(SocketAddrV4::new(source, 0).into()).map_err(failed)?;
        if let Ok(SocketAddr::V4(local)) = socket.local_addr() {
            self.outcome.local = Some(local);
        }
        self.outcome.first_syn = Instant::now();
        let stream = timeout(self.client.patience, socket.connect(self.client.destination.into())).await;
        let stream = stream.map_err(|_| Failure::Connect("no answer".to_owned()))?.map_err(failed)?;
        self.outcome.connected = Some(self.outcome.first_syn.elapsed());
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        self.driver.spawn(async move {
            // Its errors reach the request that they hit.
            let _ = connection.await;
        });
        self.sender = Some(sender);
        Ok(())
    }

    /// Asks for `path`; returns the body's length and SHA-256.
    async fn request(&mut self, path: &str) -> Result<(u64, [u8; 32]), Failure> {
        let sender = self.sender.as_mut().ok_or_else(|| Failure::Connect("not connected".to_owned()))?;
        let request = Request::get(path).header(HOST, self.client.destination.to_string()).body(Empty::new());
        let request = request.map_err(|error| Failure::Broken(format!("{path}: {error}")))?;
        let head = async {
            sender.ready().await?;
            sender.send_request(request).await
        };
        let response = timeout(self.client.patience, head).await.map_err(|_| silent())?.map_err(broken)?;
        let server = self.place(&response)?;
        let (length, sha256) = self.read(response.into_body()).await?;
        self.outcome.answered += 1;
        (self.report)(Event::Answered { kind: self.outcome.kind, server });
        Ok((length, sha256))
    }

    fn place(&mut self, response: &Response<Incoming>) -> Result<String, Failure> {
        let name = response.headers().get("x-server").and_then(|name| name.to_str().ok()).unwrap_or("?").to_owned();
        match &self.outcome.server {
            Some(from) if *from != name => return Err(Failure::Moved { from: from.clone(), to: name }),
            Some(_) => {}
            None => {
                self.outcome.server = Some(name.clone());
                let (kind, first_syn) = (self.outcome.kind, self.outcome.first_syn);
                (self.report)(Event::Placed { kind, server: name.clone(), first_syn });
            }
        }
        match response.status() {
            StatusCode::OK => Ok(name),
            status => Err(Failure::Status(status.as_u16())),
        }
    }

    async fn read(&mut self, mut body: Incoming) -> Result<(u64, [u8; 32]), Failure> {
        let (mut length, mut hash) = (0, Sha256::new());
        while let Some(frame) = timeout(self.client.patience, body.frame()).await.map_err(|_| silent())? {
            if let Some(data) = frame.map_err(broken)?.data_ref() {
                hash.update(data);
                length += data.len() as u64;
                self.outcome.bytes += data.len() as u64;
            }
        }
        Ok((length, hash.finalize().into()))
    }

    fn end(mut self, failure: Option<Failure>) -> Outcome {
        self.outcome.lasted = self.outcome.first_syn.elapsed();
        self.outcome.failure = failure;
        (self.report)(Event::Ended(self.outcome.clone()));
        self.outcome
    }
}

fn silent() -> Failure {
    Failure::Broken("silent for too long".to_owned())
}

fn broken(error: hyper::Error) -> Failure {
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Failure::Broken(format!("{error}{cause}"))
}
