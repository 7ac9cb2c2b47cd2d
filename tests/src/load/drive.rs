//! Many clients at once, in one namespace, on threads of their own.

use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicUsize, Ordering},
    sync::{Arc, mpsc},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{runtime::Runtime, sync::watch, task::JoinHandle};

use super::{Client, Event};
use crate::{
    netns::Namespace,
    nginx::Content,
    topology::{CLIENT_ADDRESSES, client_address},
};

/// What a load consists of. A worker begins its next connection when the last has ended.
#[derive(Clone, Debug)]
pub struct Mix {
    /// Workers with short requests.
    pub short: usize,
    /// Their pause between two requests.
    pub short_pause: Duration,
    /// Workers with downloads.
    pub downloads: usize,
    /// What they fetch, e.g. `/big?rate=500k`.
    pub download_path: String,
    /// What they should get.
    pub content: Content,
    /// Long-lived connections. One that fails is opened again after a tenth of a second.
    pub keep_alive: usize,
    /// The pause between two requests on each of them.
    pub keep_alive_pause: Duration,
    /// How many client addresses take turns (1 to [`CLIENT_ADDRESSES`]).
    pub sources: usize,
}

/// A running load. Dropping it cuts all connections off.
#[derive(Debug)]
pub struct Load {
    events: mpsc::Receiver<Event>,
    stop: watch::Sender<bool>,
    workers: Vec<JoinHandle<()>>,
    runtime: Option<Runtime>,
}

impl Load {
    /// Starts it in a namespace.
    ///
    /// # Errors
    /// If no thread can be had.
    pub fn start(ns: &Namespace, client: Client, mix: &Mix) -> Result<Self> {
        let runtime = ns.runtime(2).context("no threads for the load")?;
        let (sender, events) = mpsc::channel();
        let (stop, stopped) = watch::channel(false);
        let worker = Worker {
            client,
            mix: Arc::new(mix.clone()),
            turn: Arc::new(AtomicUsize::new(0)),
            events: sender,
            stop: stopped,
        };
        let mut workers = Vec::new();
        workers.extend((0..mix.short).map(|_| runtime.spawn(worker.clone().short())));
        workers.extend((0..mix.downloads).map(|_| runtime.spawn(worker.clone().downloads())));
        workers.extend((0..mix.keep_alive).map(|_| runtime.spawn(worker.clone().keep_alive())));
        Ok(Self { events, stop, workers, runtime: Some(runtime) })
    }

    /// What has happened since the last call, oldest first; waits up to `timeout` for something to happen.
    pub fn events(&self, timeout: Duration) -> Vec<Event> {
        self.events.recv_timeout(timeout).into_iter().chain(self.events.try_iter()).collect()
    }

    /// Begins nothing new, lets what is under way come to its end, and returns what has happened since the last call
    /// of [`Load::events`]. What takes longer than `timeout` is cut off, and has no `Ended` event: their number is
    /// the second value.
    pub fn finish(mut self, timeout: Duration) -> (Vec<Event>, usize) {
        self.stop.send_replace(true);
        let end = std::time::Instant::now() + timeout;
        let mut left = self.workers.iter().filter(|worker| !worker.is_finished()).count();
        let mut events = Vec::new();
        while left > 0 && std::time::Instant::now() < end {
            events.extend(self.events(Duration::from_millis(5)));
            left = self.workers.iter().filter(|worker| !worker.is_finished()).count();
        }
        self.workers.clear();
        events.extend(self.events.try_iter());
        (events, left)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Not `drop`, which must not be called within another runtime.
            runtime.shutdown_background();
        }
    }
}

#[derive(Clone)]
struct Worker {
    client: Client,
    mix: Arc<Mix>,
    turn: Arc<AtomicUsize>,
    events: mpsc::Sender<Event>,
    stop: watch::Receiver<bool>,
}

impl Worker {
    async fn short(mut self) {
        while !*self.stop.borrow() {
            let outcome = self.client.short(self.source(), "/", |event| self.report(event)).await;
            self.after(outcome.failure.is_some()).await;
            self.pause(self.mix.short_pause).await;
        }
    }

    async fn downloads(mut self) {
        while !*self.stop.borrow() {
            let (path, content) = (&self.mix.download_path, &self.mix.content);
            let outcome = self.client.download(self.source(), path, content, |event| self.report(event)).await;
            self.after(outcome.failure.is_some()).await;
        }
    }

    async fn keep_alive(mut self) {
        while !*self.stop.borrow() {
            let (pause, stop) = (self.mix.keep_alive_pause, self.stop.clone());
            let outcome = self.client.keep_alive(self.source(), pause, stop, |event| self.report(event)).await;
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
        // An elapsed pause is the ordinary case; so is a stop.
        let _ = tokio::time::timeout(pause, self.stop.wait_for(|stop| *stop)).await;
    }

    fn source(&self) -> Ipv4Addr {
        let sources = self.mix.sources.clamp(1, CLIENT_ADDRESSES);
        client_address(self.turn.fetch_add(1, Ordering::Relaxed) % sources)
    }
}
