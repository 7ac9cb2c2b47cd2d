//! Every order in which a few threads' accesses to shared words can come, one after the other (loom-style).
//!
//! The threads are real, but only one runs at a time: before each access to a [`Word`](necp_ebpf::word::Word) it asks the
//! schedule who goes on. A schedule is a list of such decisions; the next one differs from the last in the last decision
//! that has an alternative left, so that all are tried by running everything again. Leaving a thread that could go on is a
//! *preemption*; schedules with at most `bound` of them are tried, those with fewer first, so that the first failure is a
//! simple one. Accesses are sequentially consistent, as those of the packet path are (x86, and atomics with full barriers).

use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use necp_ebpf::word::interleave::set_hook;

/// What has been tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explored {
    /// Schedules with at most as many preemptions as allowed, all of them.
    pub schedules: u64,
    /// Preemptions allowed.
    pub bound: u32,
    /// Accesses in the longest schedule.
    pub longest: usize,
    /// No schedule was left out because of the bound.
    pub exhaustive: bool,
}

/// A schedule after which something was wrong.
#[derive(Debug)]
pub struct Failure {
    /// Who went on for how many accesses.
    pub schedule: String,
    /// What was wrong.
    pub message: String,
}

/// Runs `threads` under every schedule with at most `bound` preemptions: `reset` before each, `check` after each.
pub fn explore(
    bound: u32,
    threads: &[&(dyn Fn() + Sync)],
    reset: &dyn Fn(),
    check: &dyn Fn() -> Result<(), String>,
) -> Result<Explored, Failure> {
    let mut explored = Explored { schedules: 0, bound, longest: 0, exhaustive: true };
    for bound in 0..=bound {
        explored = explore_bound(bound, threads, reset, check)?;
        if explored.exhaustive {
            break;
        }
    }
    Ok(explored)
}

fn explore_bound(
    bound: u32,
    threads: &[&(dyn Fn() + Sync)],
    reset: &dyn Fn(),
    check: &dyn Fn() -> Result<(), String>,
) -> Result<Explored, Failure> {
    let baton = Arc::new(Baton::new(threads.len(), bound));
    thread::scope(|scope| {
        let _stop = Stop(&baton);
        for (index, body) in threads.iter().enumerate() {
            let baton = Arc::clone(&baton);
            scope.spawn(move || baton.serve(index, *body));
        }
        let mut explored = Explored { schedules: 0, bound, longest: 0, exhaustive: true };
        loop {
            reset();
            baton.run();
            explored.schedules += 1;
            let mut state = baton.lock();
            explored.longest = explored.longest.max(state.decisions.len());
            let panicked = state.panic.take();
            let checked = panicked.map_or_else(check, Err);
            if let Err(message) = checked {
                return Err(Failure { schedule: state.describe(), message });
            }
            if !state.advance() {
                explored.exhaustive = !state.bounded;
                return Ok(explored);
            }
        }
    })
}

/// Ends the threads, also when the check panics.
struct Stop<'a>(&'a Baton);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.lock().turn = Turn::Stop;
        self.0.changed.notify_all();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// The explorer's.
    Nobody,
    Thread(usize),
    Stop,
}

/// One decision: who makes the next access.
#[derive(Clone, Copy, Debug)]
struct Decision {
    /// Which of the alternatives: 0 is to go on.
    taken: u8,
    /// How many alternatives may be tried.
    allowed: u8,
    thread: u8,
}

struct State {
    turn: Turn,
    finished: Vec<bool>,
    decisions: Vec<Decision>,
    /// Decisions made in this run.
    made: usize,
    preemptions: u32,
    bound: u32,
    bounded: bool,
    panic: Option<String>,
}

struct Baton {
    state: Mutex<State>,
    changed: Condvar,
}

impl Baton {
    fn new(threads: usize, bound: u32) -> Self {
        let state = State {
            turn: Turn::Nobody,
            finished: vec![false; threads],
            decisions: Vec::new(),
            made: 0,
            preemptions: 0,
            bound,
            bounded: false,
            panic: None,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One schedule.
    fn run(&self) {
        let mut state = self.lock();
        state.finished.fill(false);
        (state.made, state.preemptions) = (0, 0);
        state.turn = state.decide(None);
        self.changed.notify_all();
        while state.turn != Turn::Nobody {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A thread: runs its body whenever a schedule begins with it.
    fn serve(self: Arc<Self>, index: usize, body: &(dyn Fn() + Sync)) {
        while self.wait_for(index) {
            let baton = Arc::clone(&self);
            let fresh = RefCell::new(true);
            set_hook(Some(Box::new(move || {
                // Who has just got the baton makes at least one access: another decision here would only repeat the last.
                if !fresh.replace(false) {
                    baton.access(index);
                }
            })));
            let outcome = catch_unwind(AssertUnwindSafe(body));
            set_hook(None);
            let mut state = self.lock();
            if let Err(panic) = outcome {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panicked");
                state.panic = Some(format!("thread {index}: {text}"));
            }
            state.finished[index] = true;
            state.turn = state.decide(None);
            self.changed.notify_all();
        }
    }

    fn access(&self, index: usize) {
        let mut state = self.lock();
        state.turn = state.decide(Some(index));
        if state.turn != Turn::Thread(index) {
            self.changed.notify_all();
            drop(state);
            self.wait_for(index);
        }
    }

    /// False if there is nothing more to do.
    fn wait_for(&self, index: usize) -> bool {
        let mut state = self.lock();
        loop {
            match state.turn {
                Turn::Stop => return false,
                Turn::Thread(turn) if turn == index => return true,
                Turn::Thread(_) | Turn::Nobody => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

impl State {
    /// Whose turn it is; `current` could go on.
    fn decide(&mut self, current: Option<usize>) -> Turn {
        let others = (0..self.finished.len()).filter(|&thread| !self.finished[thread] && Some(thread) != current);
        let options: Vec<usize> = current.into_iter().chain(others).collect();
        if options.is_empty() {
            return Turn::Nobody;
        }
        let preempts = current.is_some();
        if self.made == self.decisions.len() {
            let forced = preempts && self.preemptions >= self.bound;
            self.bounded |= forced && options.len() > 1;
            let allowed = if forced { 1 } else { options.len() as u8 };
            self.decisions.push(Decision { taken: 0, allowed, thread: 0 });
        }
        let decision = &mut self.decisions[self.made];
        let thread = options[usize::from(decision.taken)];
        decision.thread = thread as u8;
        self.made += 1;
        self.preemptions += u32::from(preempts && decision.taken > 0);
        Turn::Thread(thread)
    }

    /// The next schedule; false if that was the last.
    fn advance(&mut self) -> bool {
        self.decisions.truncate(self.made);
        while let Some(mut decision) = self.decisions.pop() {
            if decision.taken + 1 < decision.allowed {
                decision.taken += 1;
                self.decisions.push(decision);
                return true;
            }
        }
        false
    }

    fn describe(&self) -> String {
        let mut runs: Vec<(u8, usize)> = Vec::new();
        for decision in &self.decisions[..self.made] {
            match runs.last_mut() {
                Some((thread, accesses)) if *thread == decision.thread => *accesses += 1,
                _ => runs.push((decision.thread, 1)),
            }
        }
        let runs: Vec<String> = runs.iter().map(|(thread, n)| format!("thread {thread} makes {n} accesses")).collect();
        runs.join(", ")
    }
}
