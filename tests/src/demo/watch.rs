//! The witnesses: the capture at the balancer's port, the balancer's status and its log.

use std::{
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{
    stage::{SERVICE, Stage},
    status::{self, Standing},
    wire::{Observation, Wire},
};
use crate::capture::{self, Capture, WallTime};

/// Time between two looks at status and log.
const LOOK: Duration = Duration::from_millis(40);
/// The same while a server has vanished and the balancer has not declared it lost yet: that is to be timed.
const CLOSE_LOOK: Duration = Duration::from_millis(3);
/// How often the balancer may fail to answer in a row.
const SILENCES: u32 = 5;
/// What may still be in the capture's buffer at the end comes within this time.
const LAST: Duration = Duration::from_millis(200);

/// What a witness says.
#[derive(Clone, Debug, PartialEq)]
pub enum Watched {
    /// Something on the wire.
    Wire(Observation),
    /// The balancer has declared a server lost.
    Lost {
        /// The server, from 0.
        server: usize,
        /// When, by the balancer's log, or when its status first said so.
        at: WallTime,
    },
    /// What the balancer says of each server now.
    Standings(Vec<Option<Standing>>),
    /// A witness sees nothing any more.
    Failed(String),
}

/// What the witnesses are told.
#[derive(Debug, Default)]
pub struct Told {
    /// The play is over.
    pub over: AtomicBool,
    /// A loss is to be timed.
    pub look_closely: AtomicBool,
}

/// All witnesses.
#[derive(Debug)]
pub struct Watchers {
    capture: Capture,
    wire: Wire,
    socket: PathBuf,
    log: PathBuf,
    servers: Vec<Ipv4Addr>,
    sender: mpsc::Sender<Watched>,
}

/// Puts them in their places: what passes from now on will be told.
///
/// # Errors
/// If the capture cannot be opened.
pub fn prepare(stage: &Stage) -> Result<(Watchers, mpsc::Receiver<Watched>)> {
    let (sender, watched) = mpsc::channel();
    let wire = Wire::new(SERVICE, stage.hardware()?);
    let (socket, log, servers) = (stage.socket(), stage.log(), stage.addresses());
    Ok((Watchers { capture: stage.capture()?, wire, socket, log, servers, sender }, watched))
}

impl Watchers {
    /// Watches until it is over; returns how many frames the capture has missed.
    ///
    /// # Errors
    /// If the capture broke.
    pub fn run(self, told: &Told) -> Result<u32> {
        let Self { mut capture, mut wire, socket, log, servers, sender } = self;
        thread::scope(|scope| {
            let looks = sender.clone();
            scope.spawn(move || look(&socket, &log, &servers, &looks, told));
            loop {
                let last = told.over.load(Ordering::Relaxed);
                match capture.next(if last { LAST } else { LOOK }).context("the capture")? {
                    Some(captured) => wire.read(&captured).into_iter().for_each(|seen| {
                        // Nobody listens any more when the play has been broken off.
                        let _ = sender.send(Watched::Wire(seen));
                    }),
                    None if last => return Ok(capture.dropped()?),
                    None => {}
                }
            }
        })
    }
}

fn look(
    socket: &std::path::Path,
    log: &std::path::Path,
    servers: &[Ipv4Addr],
    sender: &mpsc::Sender<Watched>,
    told: &Told,
) {
    let mut lost = vec![false; servers.len()];
    let (mut read, mut silences) = (0, 0);
    while !told.over.load(Ordering::Relaxed) {
        let tell = |watched| {
            let _ = sender.send(watched);
        };
        for (at, server) in losses_in_log(log, &mut read, servers) {
            lost[server] = true;
            tell(Watched::Lost { server, at });
        }
        match status::fetch(socket, servers) {
            Ok(standings) => {
                silences = 0;
                let at = capture::now();
                for (server, standing) in standings.iter().enumerate() {
                    let Some(standing) = standing else { continue };
                    let is_lost = standing.is_lost();
                    if is_lost && !std::mem::replace(&mut lost[server], is_lost) {
                        tell(Watched::Lost { server, at });
                    }
                    lost[server] = is_lost;
                }
                tell(Watched::Standings(standings));
            }
            Err(error) => {
                silences += 1;
                if silences == SILENCES {
                    tell(Watched::Failed(format!("{error:#}")));
                }
            }
        }
        thread::sleep(if told.look_closely.load(Ordering::Relaxed) { CLOSE_LOOK } else { LOOK });
    }
}

/// Lines that the log has grown by: (time, server) of those that say that a session is lost.
fn losses_in_log(log: &std::path::Path, read: &mut usize, servers: &[Ipv4Addr]) -> Vec<(WallTime, usize)> {
    let text = fs::read(log).unwrap_or_default();
    let new = text.get(*read..).unwrap_or_default();
    // The last line may not be whole yet.
    let whole = new.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    *read += whole;
    String::from_utf8_lossy(&new[..whole]).lines().filter_map(|line| loss(line, servers)).collect()
}

/// `2026-01-31T12:34:56.123456Z  WARN …: session of 10.0.0.14 lost (…)…`
fn loss(line: &str, servers: &[Ipv4Addr]) -> Option<(WallTime, usize)> {
    let (before, after) = line.split_once("session of ")?;
    let (address, _) = after.split_once(" lost")?;
    let address: Ipv4Addr = address.parse().ok()?;
    let server = servers.iter().position(|server| *server == address)?;
    // A terminal's colours may stand before it.
    let time = before.split(|c: char| c.is_whitespace() || c == '\u{1b}' || c == 'm').find_map(rfc3339)?;
    Some((time, server))
}

/// A time in UTC, such as `2026-01-31T12:34:56.123456Z`.
fn rfc3339(text: &str) -> Option<WallTime> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.split('-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.split(':');
    let hour: u64 = time.next()?.parse().ok()?;
    let minute: u64 = time.next()?.parse().ok()?;
    let second: f64 = time.next()?.parse().ok()?;
    // Days from 0000-03-01, whose leap days come last in their years.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year.checked_sub(1)?, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day.checked_sub(1)?;
    let days = days.checked_sub(719_468)?;
    Some(Duration::from_secs(((days * 24 + hour) * 60 + minute) * 60) + Duration::try_from_secs_f64(second).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_the_log() {
        assert_eq!(rfc3339("1970-01-01T00:00:00Z"), Some(Duration::ZERO));
        assert_eq!(rfc3339("2000-02-29T12:00:01.5Z"), Some(Duration::from_millis(951_825_601_500)));
        assert_eq!(rfc3339("2026-11-22T10:31:00.250000Z"), Some(Duration::from_millis(1_795_343_460_250)));
        for text in ["", "Z", "2026-11-22", "2026-11-22T10:31Z", "2026-11-22T10:31:xxZ", "0-0-0T0:0:0Z"] {
            assert_eq!(rfc3339(text), None, "{text}");
        }
    }

    #[test]
    fn losses_are_found_in_the_log() {
        let servers = [Ipv4Addr::new(10, 0, 0, 11), Ipv4Addr::new(10, 0, 0, 12)];
        let line = "2000-02-29T12:00:01.5Z  WARN necp: session of 10.0.0.12 lost (dead): no new flows server=10.0.0.12";
        let expected = Some((Duration::from_millis(951_825_601_500), 1));
        assert_eq!(loss(line, &servers), expected);
        assert_eq!(loss(&format!("\u{1b}[2m{}", line.replacen("Z ", "Z\u{1b}[0m ", 1)), &servers), expected);
        assert_eq!(loss("2000-02-29T12:00:01.5Z INFO necp: 10.0.0.12 has joined", &servers), None);
        assert_eq!(loss(&line.replace("10.0.0.12", "10.0.0.99"), &servers), None);
    }
}
