//! What as many plain TCP sessions cost with the same messages at the same rates: no protocol, no owner, no maps. Measured
//! in the same bed, it says what of the daemon's CPU time is the machine's and the kernel's.
//!
//! ```text
//!  client: one thread, as the swarm's ──── the packet path ──── a process of its own in the NE's namespace: the daemon's
//!                                                               runtime, socket options and priority, one task each
//! ```
//! Either side asks at its own time and answers what the other one asks.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Args;
use necp_user::daemon::{
    ne::{self, limits::raise_open_files},
    peer::prepare,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    netns::{Background, wait_until},
    process::Process,
    scale::cpu_over,
    topology::{NE, Topology, client_address},
};

/// Beside NECP's own port.
const PORT: u16 = 3263;
/// Connections that may wait to be accepted, as many as the daemon's.
const BACKLOG: u32 = 4096;
/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);
/// They come within about the time that the daemon takes to have so many join.
const ARRIVAL: Duration = Duration::from_secs(2);
/// The first byte of a question, and of its rest.
const ASK: u8 = 1;
/// The same of an answer.
const ANSWER: u8 = 2;

/// The sessions.
#[derive(Clone, Copy, Debug, Args)]
pub struct Floor {
    /// How many
    #[arg(long)]
    pub sessions: usize,
    /// Bytes of what the network element asks, and is answered
    #[arg(long)]
    pub from_ne: usize,
    /// Bytes of what a server asks, and is answered
    #[arg(long)]
    pub from_server: usize,
    /// Milliseconds between two questions of one side; a random fifth is added or taken off
    #[arg(long)]
    pub interval_ms: u64,
}

impl Floor {
    /// Share of one CPU that the network element's side takes. `program` is one whose arguments `floor …` lead to
    /// [`Floor::serve`].
    ///
    /// # Errors
    /// If not all sessions come about, or not all questions are answered.
    pub fn measure(&self, bed: &Topology, program: &Path, watch: Duration) -> Result<f64> {
        let mut command = bed.ne().command(program);
        command.arg("floor").args(self.arguments());
        let mut process = Process::spawn(command, "floor", bed.dir())?;
        process.wait_until("it listens", CONNECT, |_| bed.ne().listens(PORT))?;
        let crowd = Crowd::start(bed, *self)?;
        wait_until("all plain sessions are there", Duration::from_secs(60), || {
            crowd.counts.open.load(Ordering::Relaxed) == self.sessions
        })?;
        // As long as the daemon has to calm down.
        thread::sleep(Duration::from_secs(15));
        let (began, before) = (Instant::now(), crowd.counts.read());
        let share = cpu_over(process.pid(), watch)?;
        let (asked, answered) = crowd.counts.read();
        let due = self.sessions as f64 * began.elapsed().as_secs_f64() / self.interval().as_secs_f64();
        for (what, count) in [("asked", asked - before.0), ("answered", answered - before.1)] {
            ensure!((0.9..1.1).contains(&(count as f64 / due)), "{what} {count} times, should be {due:.0}");
        }
        ensure!(crowd.counts.open.load(Ordering::Relaxed) == self.sessions, "plain sessions were lost");
        Ok(share)
    }

    /// The network element's side: takes connections for ever.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn serve(self) -> Result<()> {
        raise_open_files(self.sessions)?;
        ne::raise_priority();
        ne::runtime()?.block_on(async {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORT).into())?;
            let listener = socket.listen(BACKLOG)?;
            // Accepts on a worker, as the daemon does.
            tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await?;
                    prepare(&stream, self.interval() * 3)?;
                    tokio::spawn(self.talk(stream, [self.from_ne, self.from_server], Arc::default()));
                }
            })
            .await?
        })
    }

    fn arguments(&self) -> Vec<String> {
        let Self { sessions, from_ne, from_server, interval_ms } = self;
        format!("--sessions {sessions} --from-ne {from_ne} --from-server {from_server} --interval-ms {interval_ms}")
            .split(' ')
            .map(str::to_owned)
            .collect()
    }

    fn interval(&self) -> Duration {
        Duration::from_millis(self.interval_ms)
    }

    /// Until the next question, as the sessions do it.
    fn delay(&self) -> Duration {
        self.interval().mul_f64(0.8 + 0.4 * rand::random::<f64>())
    }

    /// One session: questions of `mine` bytes go out, those of `theirs` are answered.
    async fn talk(self, mut stream: TcpStream, [mine, theirs]: [usize; 2], counts: Arc<Counts>) -> io::Result<()> {
        let (question, answer) = (vec![ASK; mine], vec![ANSWER; theirs]);
        let (mut asked, mut answered) = (0, 0);
        let mut buffer = [0; 512];
        let mut timer = pin!(sleep(self.delay()));
        loop {
            tokio::select! {
                count = stream.read(&mut buffer) => {
                    let bytes = &buffer[..count?];
                    if bytes.is_empty() {
                        return Ok(());
                    }
                    let asks = bytes.iter().filter(|byte| **byte == ASK).count();
                    (asked, answered) = (asked + asks, answered + bytes.len() - asks);
                    counts.answered.fetch_add((answered / mine) as u64, Ordering::Relaxed);
                    answered %= mine;
                    while asked >= theirs {
                        asked -= theirs;
                        counts.asked.fetch_add(1, Ordering::Relaxed);
                        stream.write_all(&answer).await?;
                    }
                }
                () = &mut timer => {
                    stream.write_all(&question).await?;
                    timer.as_mut().reset(tokio::time::Instant::now() + self.delay());
                }
            }
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    open: AtomicUsize,
    asked: AtomicU64,
    answered: AtomicU64,
}

impl Counts {
    fn read(&self) -> (u64, u64) {
        (self.asked.load(Ordering::Relaxed), self.answered.load(Ordering::Relaxed))
    }
}

/// The servers' side.
struct Crowd {
    counts: Arc<Counts>,
    _task: Background,
}

impl Crowd {
    fn start(bed: &Topology, floor: Floor) -> Result<Self> {
        let counts = Arc::new(Counts::default());
        let shared = Arc::clone(&counts);
        let task = bed.client().background(async move {
            let mut tasks = JoinSet::new();
            for index in 0..floor.sessions {
                let counts = Arc::clone(&shared);
                tasks.spawn(async move {
                    sleep(ARRIVAL.mul_f64(index as f64 / floor.sessions as f64)).await;
                    let stream = loop {
                        if let Ok(Ok(stream)) = timeout(CONNECT, connect(client_address(index))).await {
                            break stream;
                        }
                    };
                    counts.open.fetch_add(1, Ordering::Relaxed);
                    // Why it ended does not matter: that it did is seen.
                    let _ = floor.talk(stream, [floor.from_server, floor.from_ne], Arc::clone(&counts)).await;
                    counts.open.fetch_sub(1, Ordering::Relaxed);
                });
            }
            while tasks.join_next().await.is_some() {}
        })?;
        Ok(Self { counts, _task: task })
    }
}

async fn connect(from: Ipv4Addr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddrV4::new(from, 0).into())?;
    socket.set_nodelay(true)?;
    socket.connect(SocketAddrV4::new(NE, PORT).into()).await
}
