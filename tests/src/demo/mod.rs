//! The demonstration: a farm in network namespaces, real HTTP load, and servers that come, fall ill, go and vanish.
//!
//! ```text
//!   acts ──steps──► stage (namespaces, nginx, necp se, necp ne) ──► traffic ──events──┐
//!                     │ switch's port to the balancer ──► wire ──────────────────────► record ──► judge ──► summary
//!                     └ `necp status`, its log ──► watch ─────────────────────────────┘   └──► scene ──► view
//! ```
//! [`acts`], [`judge`], [`record`], [`wire`], [`scene`] and [`summary`] are pure; the rest has threads of its own.

pub mod acts;
pub mod judge;
pub mod record;
pub mod scene;
mod stage;
pub mod status;
pub mod summary;
mod traffic;
mod view;
mod watch;
pub mod wire;

use std::{
    collections::VecDeque,
    env,
    process::ExitCode,
    sync::{atomic::Ordering, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    capture::{self, WallTime},
    daemon::necp_binary,
    load::Event,
    process::hide_output,
};
use acts::{Step, UNWELL};
use judge::Cause;
use record::{Findings, Record};
use scene::Scene;
use stage::{Report, Stage};
use status::Standing;
use summary::Summary;
use view::View;
use watch::{Told, Watched};

/// Time between two pictures.
const PICTURE: Duration = Duration::from_millis(100);
/// Lines that are kept to be shown.
const SAID: usize = 200;

/// Plays it and prints the summary; success if every "must" holds.
///
/// # Errors
/// If something that it needs is missing, or breaks while it plays.
pub fn run(plain: bool) -> Result<ExitCode> {
    require()?;
    hide_output();
    println!("setting the stage: namespaces, nginx, necp");
    let (events, met) = mpsc::channel();
    let (reports, reported) = mpsc::channel();
    let stage = Stage::set(events, reports)?;
    let (watchers, watched) = watch::prepare(&stage)?;
    let (steps, played) = mpsc::channel();
    let told = Told::default();
    thread::scope(|scope| {
        let watching = scope.spawn(|| watchers.run(&told));
        let playing = scope.spawn(|| stage.play(played, &told.over));
        // However this closure ends, the threads end too, and with the stage's its namespaces.
        let _over = Over(&told);
        let mut view = View::open(plain)?;
        let mut play = Play::new(met, reported, watched, &told);
        let outcome = play.run(&mut view, steps, || !playing.is_finished() && !watching.is_finished());
        told.over.store(true, Ordering::Relaxed);
        // An error of the play says more than what it did to the witnesses.
        let missed = watching.join().map_err(|_| anyhow::anyhow!("the watcher has panicked"))??;
        drop(view);
        let quiet = outcome?;
        let took = play.began.elapsed();
        play.take_in();
        let Play { record, unwell, .. } = play;
        let unwell = unwell.0.zip(unwell.1);
        let summary = Summary { findings: record.findings(), record: &record, missed, quiet, unwell, took };
        println!("\n{}", summary.text());
        drop(playing.join());
        Ok(if summary.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

/// Says plainly what is missing.
fn require() -> Result<()> {
    // SAFETY: takes nothing and cannot fail.
    ensure!(unsafe { libc::geteuid() } == 0, "the demonstration builds network namespaces and needs root: try `sudo`");
    let path = env::var_os("PATH").unwrap_or_default();
    for (program, what) in [("nginx", "the web server"), ("ip", "iproute2")] {
        let found = env::split_paths(&path).any(|dir| dir.join(program).is_file());
        ensure!(found, "`{program}` ({what}) is not installed: `cargo xtask setup` installs it");
    }
    necp_binary().map(drop)
}

struct Over<'a>(&'a Told);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

/// The play as it goes on.
struct Play<'a> {
    told: &'a Told,
    met: mpsc::Receiver<Event>,
    reported: mpsc::Receiver<Report>,
    watched: mpsc::Receiver<Watched>,
    began: Instant,
    record: Record,
    findings: Findings,
    standings: Vec<Option<Standing>>,
    said: VecDeque<(Duration, String)>,
    said_ever: usize,
    unwell: (Option<WallTime>, Option<WallTime>),
    quiet: Option<bool>,
    failed: Option<String>,
}

impl<'a> Play<'a> {
    fn new(
        met: mpsc::Receiver<Event>,
        reported: mpsc::Receiver<Report>,
        watched: mpsc::Receiver<Watched>,
        told: &'a Told,
    ) -> Self {
        Self {
            told,
            met,
            reported,
            watched,
            began: Instant::now(),
            record: Record::default(),
            findings: Findings::default(),
            standings: Vec::new(),
            said: VecDeque::new(),
            said_ever: 0,
            unwell: (None, None),
            quiet: None,
            failed: None,
        }
    }

    /// To its end; true if everything under way came to its own.
    fn run(&mut self, view: &mut View, steps: mpsc::Sender<Step>, goes_on: impl Fn() -> bool) -> Result<bool> {
        let mut script = VecDeque::from(acts::script());
        let mut steps = Some(steps);
        let mut act = None;
        loop {
            let elapsed = self.began.elapsed();
            while let Some((_, step)) = script.pop_front_if(|(at, _)| *at <= elapsed) {
                self.note_health(step);
                // If the stage is gone, its last report says why.
                let _ = steps.as_ref().map(|steps| steps.send(step));
            }
            let now_playing = acts::act_at(elapsed);
            if act != Some(now_playing) {
                act = Some(now_playing);
                self.say(self.scene().title().1.to_owned());
            }
            if now_playing.is_none() {
                steps = None;
            }
            let alive = goes_on();
            self.take_in();
            self.findings = self.record.findings();
            view.show(&self.scene(), self.said_ever).context("the view")?;
            if let Some(failed) = self.failed.take() {
                bail!("{failed}");
            }
            if let Some(quiet) = self.quiet {
                return Ok(quiet);
            }
            ensure!(alive, "a thread of the play has ended before it");
            thread::sleep(PICTURE.saturating_sub(self.began.elapsed().saturating_sub(elapsed)));
        }
    }

    /// All that has come in; the wire first, which says whose connections the clients speak of.
    fn take_in(&mut self) {
        for watched in self.watched.try_iter().collect::<Vec<_>>() {
            match watched {
                Watched::Wire(seen) => self.record.wire(&seen),
                Watched::Lost { server, at } => {
                    self.told.look_closely.store(false, Ordering::Relaxed);
                    self.record.declared_lost(server, at);
                    self.say(format!("s{}: the balancer declares it lost", server + 1));
                }
                Watched::Standings(standings) => self.standings = standings,
                Watched::Failed(why) => self.failed = self.failed.take().or(Some(why)),
            }
        }
        let now = capture::now();
        for event in self.met.try_iter().collect::<Vec<_>>() {
            self.record.client(event, now);
        }
        for report in self.reported.try_iter().collect::<Vec<_>>() {
            match report {
                Report::Said(text) => self.say(text),
                Report::Marked(mark) => {
                    self.told.look_closely.store(mark.cause == Cause::Vanished, Ordering::Relaxed);
                    self.record.marks.push(mark);
                }
                Report::Quiet(quiet) => self.quiet = Some(quiet),
                Report::Failed(why) => self.failed = Some(why),
            }
        }
    }

    fn note_health(&mut self, step: Step) {
        if let Step::Health(UNWELL, index) = step {
            let which = if index == 100 { &mut self.unwell.1 } else { &mut self.unwell.0 };
            *which = Some(capture::now());
        }
    }

    fn say(&mut self, text: String) {
        self.said.push_back((self.began.elapsed(), text));
        self.said_ever += 1;
        if self.said.len() > SAID {
            self.said.pop_front();
        }
    }

    fn scene(&self) -> Scene<'_> {
        let elapsed = self.began.elapsed();
        Scene {
            elapsed,
            act: acts::act_at(elapsed),
            now: capture::now(),
            record: &self.record,
            findings: &self.findings,
            standings: &self.standings,
            said: &self.said,
        }
    }
}
