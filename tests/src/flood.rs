//! Floods: frames as fast as one thread can send them, each time round from other addresses.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};

use crate::{netns::Namespace, raw::RawSocket};

/// A flood, until it is dropped.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    began: Instant,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// What it was.
#[derive(Clone, Copy, Debug)]
pub struct Flooded {
    /// Packets that the interface took.
    pub packets: u64,
    /// In this time.
    pub time: Duration,
}

impl Flooded {
    /// Packets per second.
    pub fn rate(&self) -> f64 {
        self.packets as f64 / self.time.as_secs_f64()
    }
}

impl Flood {
    /// Sends these frames on an interface of the namespace, again and again. `vary`: every time round their source addresses
    /// are others, within the same /8, with the same checksums.
    ///
    /// # Errors
    /// Without root, or if there is no such interface.
    pub fn start(ns: &Namespace, interface: &str, mut frames: Vec<Vec<u8>>, vary: bool) -> Result<Self> {
        let socket = RawSocket::open(ns, interface)?;
        socket.bypass_queue()?;
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&sent));
        let flood = move || {
            loop {
                for batch in frames.chunks_mut(256) {
                    if stopped.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                    counter.fetch_add(socket.send_all(batch)? as u64, Ordering::Relaxed);
                    if vary {
                        batch.iter_mut().for_each(|frame| move_source(frame));
                    }
                }
            }
        };
        let thread = thread::Builder::new().name("flood".to_owned()).spawn(flood)?;
        Ok(Self { stop, sent, began: Instant::now(), thread: Some(thread) })
    }

    /// Ends it.
    ///
    /// # Errors
    /// If it ended by itself, because the interface went away.
    pub fn finish(mut self) -> Result<Flooded> {
        self.stop.store(true, Ordering::Relaxed);
        let time = self.began.elapsed();
        let thread = self.thread.take().context("it runs")?;
        thread.join().map_err(|_| anyhow!("the flood panicked"))?.context("the flood ended early")?;
        Ok(Flooded { packets: self.sent.load(Ordering::Relaxed), time })
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What it ended with is asked for by `finish`.
            let _ = thread.join();
        }
    }
}

/// One more in the second byte of the source address, one less in its last two: the sum of both words, and so every checksum,
/// stays (RFC 1071).
fn move_source(frame: &mut [u8]) {
    let low = u16::from_be_bytes([frame[28], frame[29]]);
    if frame[27] < 255 && low > 0 {
        frame[27] += 1;
        frame[28..30].copy_from_slice(&(low - 1).to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddrV4};

    use super::*;
    use crate::frame::{Flow, flags};

    #[test]
    fn a_moved_source_has_right_checksums() {
        let flow = |source| Flow {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: [2, 0, 0, 0, 0, 2],
            source: SocketAddrV4::new(source, 40_000),
            destination: SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 10), 80),
            ttl: 64,
        };
        let mut frame = flow(Ipv4Addr::new(11, 7, 1, 0)).tcp(flags::SYN, 1, 0, b"");
        move_source(&mut frame);
        assert_eq!(frame, flow(Ipv4Addr::new(11, 8, 0, 255)).tcp(flags::SYN, 1, 0, b""));
    }
}
