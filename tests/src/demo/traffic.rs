//! The load: short requests at a steady rate whatever becomes of them, downloads that span the acts' events, and
//! connections that ask again and again.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{
    runtime::Runtime,
    sync::{Semaphore, watch},
    task::JoinHandle,
    time::{self, MissedTickBehavior},
};

use crate::{
    load::{Client, Event},
    netns::Namespace,
    nginx::Content,
    topology::client_address,
};

/// Short requests per second.
pub const SHORT_RATE: u64 = 200;
/// Bytes of a download.
pub const DOWNLOAD: usize = 1536 << 10;
/// At 256 KiB per second: six seconds.
const DOWNLOAD_PATH: &str = "/big?rate=256k";
const DOWNLOADS: u64 = 24;
/// Connections with a request every [`PAUSE`], replaced by new ones after [`LIFE`].
const REPEATING: u64 = 24;
const PAUSE: Duration = Duration::from_millis(250);
const LIFE: Duration = Duration::from_secs(6);
/// Time between the beginnings of two of the workers of one kind.
const STAGGER: Duration = Duration::from_millis(240);
/// Short requests under way at once, before new ones are given up: those that wait for a vanished server are many.
const SHORT_LIMIT: usize = 4000;
/// Client addresses that take turns.
const SOURCES: usize = 32;

/// A running load. Dropping it cuts all connections off.
#[derive(Debug)]
pub struct Traffic {
    worker: Worker,
    stop: watch::Sender<bool>,
    running: Vec<JoinHandle<()>>,
    runtime: Option<Runtime>,
}

impl Traffic {
    /// Starts it in the clients' namespace. What happens is sent to `events`.
    ///
    /// # Errors
    /// If no thread can be had.
    pub fn start(ns: &Namespace, client: Client, content: &Content, events: mpsc::Sender<Event>) -> Result<Self> {
        let runtime = ns.runtime(2).context("no threads for the load")?;
        let (stop, stopped) = watch::channel(false);
        let worker = Worker { client, content: content.clone().into(), turn: Arc::default(), events, stop: stopped };
        let mut running = vec![runtime.spawn(worker.clone().short_requests())];
        for turn in 0..DOWNLOADS.max(REPEATING) as u32 {
            let begin = STAGGER * turn;
            if u64::from(turn) < DOWNLOADS {
                running.push(runtime.spawn(worker.clone().downloads(begin)));
            }
            if u64::from(turn) < REPEATING {
                running.push(runtime.spawn(worker.clone().repeating(begin)));
            }
        }
        Ok(Self { worker, stop, running, runtime: Some(runtime) })
    }

    /// Opens so many connections that ask again and again to the end.
    pub fn lasting(&mut self, count: usize) {
        let Some(runtime) = &self.runtime else { return };
        self.running.extend((0..count).map(|_| runtime.spawn(self.worker.clone().lasting())));
    }

    /// Begins nothing new; what is under way comes to its end.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Is anything still under way?
    pub fn runs(&self) -> bool {
        self.running.iter().any(|worker| !worker.is_finished())
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Clone, Debug)]
struct Worker {
    client: Client,
    content: Arc<Content>,
    turn: Arc<AtomicUsize>,
    events: mpsc::Sender<Event>,
    stop: watch::Receiver<bool>,
}

impl Worker {
    async fn short_requests(mut self) {
        let places = Arc::new(Semaphore::new(SHORT_LIMIT));
        let mut clock = time::interval(Duration::from_micros(1_000_000 / SHORT_RATE));
        // What a busy machine has delayed is made up for: the rate is that of the clients.
        clock.set_missed_tick_behavior(MissedTickBehavior::Burst);
        loop {
            tokio::select! {
                _ = clock.tick() => {}
                _ = self.stop.wait_for(|stop| *stop) => break,
            }
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
            let worker = self.clone();
            tokio::spawn(async move {
                worker.client.short(worker.source(), "/", |event| worker.report(event)).await;
                drop(place);
            });
        }
        // All places free again: none is under way. The semaphore is never closed.
        let _ = places.acquire_many(SHORT_LIMIT as u32).await;
    }

    async fn downloads(mut self, begin: Duration) {
        self.pause(begin).await;
        while !*self.stop.borrow() {
            let report = |event| self.report(event);
            let outcome = self.client.download(self.source(), DOWNLOAD_PATH, &self.content, report).await;
            self.after(outcome.failure.is_some()).await;
        }
    }

    async fn repeating(mut self, begin: Duration) {
        self.pause(begin).await;
        while !*self.stop.borrow() {
            let (end, ended) = watch::channel(false);
            let mut stop = self.stop.clone();
            let life = async {
                // An elapsed life is the ordinary case; so is a stop.
                let _ = time::timeout(LIFE, stop.wait_for(|stop| *stop)).await;
                end.send_replace(true);
                std::future::pending().await
            };
            let failed = tokio::select! {
                outcome = self.client.keep_alive(self.source(), PAUSE, ended, |event| self.report(event)) => {
                    outcome.failure.is_some()
                }
                () = life => false,
            };
            self.after(failed).await;
        }
    }

    async fn lasting(mut self) {
        while !*self.stop.borrow() {
            let stop = self.stop.clone();
            let outcome = self.client.keep_alive(self.source(), PAUSE, stop, |event| self.report(event)).await;
            self.after(outcome.failure.is_some()).await;
        }
    }

    fn report(&self, event: Event) {
        // The receiver is gone only when the load is being cut off.
        let _ = self.events.send(event);
    }

    /// A failure that comes at once must not become a busy loop.
    async fn after(&mut self, failed: bool) {
        if failed {
            self.pause(Duration::from_millis(100)).await;
        }
    }

    async fn pause(&mut self, pause: Duration) {
        // As above.
        let _ = time::timeout(pause, self.stop.wait_for(|stop| *stop)).await;
    }

    fn source(&self) -> Ipv4Addr {
        client_address(self.turn.fetch_add(1, Ordering::Relaxed) % SOURCES)
    }
}
