//! One TCP connection of a server element: bytes in, inputs for the owner out, answers back.
//!
//! ```text
//!   socket ──read──► NeSession ──events──► owner (bounded channel)
//!          ◄─write──           ◄─respond── oneshot per token
//! ```
//! Bytes are read only while the session wants them, and taken from it only when those before are written, so that a peer
//! which does not read, or floods, holds up nobody but itself.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncRead as _, AsyncWrite as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::{Sleep, sleep, timeout};

use super::ne::input::{From, Input, ListPart, ListStep, SessionId};
use super::ne::keys::Tally;
use super::ne::limits::{Limits, Share};
use crate::control::exceptions::Listing;
use crate::necp::{Access, CloseReason, HealthAnswer, NeEvent, NeSession, Rejections, SessionConfig, Token};

/// Bytes read at once.
const READ: usize = 16 * 1024;
/// How long a peer may take to read our last words, and to close its side.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Bytes that the kernel may hold for a peer and has not sent: what is not here is still ours to count, and no KEEPALIVE
/// waits behind it.
const UNSENT: u32 = 32 * 1024;
/// Bytes that are read and thrown away while a connection is being closed.
const DISCARD: usize = 64 * 1024;

/// Ticks in a keepalive interval. On them fall the deadlines of all sessions, so that one wake-up serves many.
const TICKS: u32 = 256;

/// The jitter of keepalives that are this long apart (draft §5.5: a fifth), less what a deadline may have to wait for its
/// tick.
pub fn jitter(keepalive: Duration) -> Duration {
    keepalive / 5 - keepalive / TICKS
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Why.
    pub reason: CloseReason,
    /// Whether the peer had said INIT.
    pub joined: bool,
}

/// Answers of the owner that are awaited; `None` if it refuses to answer.
type Answers = FuturesUnordered<Pin<Box<dyn Future<Output = (Token, Option<Answer>)> + Send>>>;

/// What the owner answers.
enum Answer {
    /// It is done, except for these.
    Done(Vec<usize>),
    /// A step of a list.
    List(ListPart),
}

/// What a connection waits for.
enum Woken {
    Kicked(CloseReason),
    /// `None` if the owner refuses to answer.
    Answered(Token, Option<Answer>),
    /// So many bytes.
    Written(io::Result<usize>),
    /// So many bytes, which the session has; 0 is the end.
    Read(io::Result<usize>),
    Time,
}

/// Who has connected, and what the connection shares with others.
pub struct Patron {
    /// The server element: the source address.
    pub server: IpAddr,
    /// Names the connection.
    pub id: SessionId,
    /// The other end of what [`serve`] is ended by: handed on to the owner.
    pub kick: mpsc::Sender<CloseReason>,
    /// Set once the peer has said INIT.
    pub joined: Arc<AtomicBool>,
    /// What all connections share.
    pub limits: Arc<Limits>,
    /// Where rejected messages are counted.
    pub rejected: Arc<Tally>,
}

struct Peer<'a> {
    stream: TcpStream,
    session: NeSession,
    from: From,
    owner: mpsc::Sender<Input>,
    patron: &'a Patron,
    share: Share<'a>,
    answers: Answers,
    /// Lists that are counted and not sent to the end.
    lists: BTreeMap<Token, Listing>,
    /// The list that is being sent.
    sending: Option<Token>,
    joined: bool,
    /// Input was taken, and time was not looked at since.
    fed: bool,
    /// Between two ticks.
    tick: Duration,
    /// The health that the owner was told last, since the last START or STOP.
    told: Vec<HealthAnswer>,
    /// What of the session's rejections was counted.
    rejected: Rejections,
}

/// Serves one connection to its end. `kicked` is the owner's, and the listener's, way to end it.
pub async fn serve(
    stream: TcpStream,
    patron: Patron,
    mut kicked: mpsc::Receiver<CloseReason>,
    (config, access): (SessionConfig, Access),
    owner: mpsc::Sender<Input>,
) -> Ended {
    let server = patron.server;
    let (silence, tick) = (config.keepalive * 3, config.keepalive / TICKS);
    if let Err(error) = prepare(&stream, silence) {
        tracing::debug!(%server, %error, "socket options");
    }
    let mut peer = Peer {
        stream,
        session: NeSession::with_access(config, access, Instant::now(), rand::random()),
        from: From { server, session: patron.id },
        owner,
        patron: &patron,
        share: patron.limits.share(),
        answers: FuturesUnordered::new(),
        lists: BTreeMap::new(),
        sending: None,
        joined: false,
        fed: false,
        tick,
        told: Vec::new(),
        rejected: Rejections::default(),
    };
    let reason = peer.run(&mut kicked).await;
    let joined = peer.joined;
    let _ = timeout(LAST_WORDS, peer.say_goodbye()).await;
    Ended { reason, joined }
}

/// Small messages go out at once, and a peer that acknowledges nothing is given up like one that answers nothing.
///
/// # Errors
/// As `setsockopt(2)`.
pub fn prepare(stream: &TcpStream, silence: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_notsent_lowat(UNSENT)?;
    socket.set_tcp_user_timeout(Some(silence))
}

impl Peer<'_> {
    /// Until the session is closed; the rest of its output is then still to be written.
    async fn run(&mut self, kicked: &mut mpsc::Receiver<CloseReason>) -> CloseReason {
        let mut output: Vec<u8> = Vec::new();
        let mut written = 0;
        // One for all of the session: it is moved only when the session's deadline has.
        let mut alarm = pin!(sleep(Duration::ZERO));
        let mut due = None;
        loop {
            self.pass_on_events().await;
            self.count_rejected();
            if let Some(reason) = self.session.closed() {
                let reason = reason.clone();
                // First of all: the flows must not wait for a peer that reads slowly.
                self.tell_owner(&reason).await;
                if written < output.len() {
                    let _ = timeout(LAST_WORDS, write_all(&self.stream, &output[written..])).await;
                }
                return reason;
            }
            if written == output.len() {
                output = self.session.poll_transmit().unwrap_or_default();
                written = 0;
            }
            let held = self.session.held_bytes() + output.len();
            if !self.share.set(held) {
                self.session.close(CloseReason::Overflow(held));
                continue;
            }
            let deadline = self.session.poll_timeout();
            if let Some(deadline) = deadline.filter(|_| due != deadline) {
                alarm.as_mut().reset(self.tick_from(deadline).into());
            }
            due = deadline;
            let alarm = due.is_some().then_some(alarm.as_mut());
            let mut waits = (&mut *kicked, &output[written..], alarm);
            match poll_fn(|context| self.poll(context, &mut waits)).await {
                Woken::Kicked(reason) => self.session.close(reason),
                Woken::Answered(token, Some(Answer::Done(failed))) => self.session.respond(token, &failed),
                Woken::Answered(token, Some(Answer::List(part))) => self.on_list(token, part).await,
                Woken::Answered(_, None) => self.session.close(CloseReason::Superseded),
                Woken::Written(Ok(count)) => written += count,
                Woken::Read(Ok(0)) => self.session.close(CloseReason::ClosedByPeer),
                // There is more, of one who floods us perhaps: it is somebody else's turn.
                Woken::Read(Ok(READ)) => yield_now().await,
                Woken::Read(Ok(_)) => {}
                Woken::Read(Err(error)) | Woken::Written(Err(error)) => self.on_error(&error),
                Woken::Time => self.session.handle_timeout(Instant::now()),
            }
        }
    }

    async fn tell_owner(&mut self, reason: &CloseReason) {
        if self.joined {
            // If the owner is gone, so is everything that it would have to take back.
            let _ = self.owner.send(Input::Lost { from: self.from, reason: reason.clone() }).await;
        }
    }

    /// The first common tick that is not before a deadline; one that is over is due at once.
    fn tick_from(&self, deadline: Instant) -> Instant {
        static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);
        let since = deadline.saturating_duration_since(*FIRST);
        if deadline <= Instant::now() || self.tick.is_zero() {
            return deadline;
        }
        let tick = self.tick.as_nanos() as u64;
        *FIRST + Duration::from_nanos((since.as_nanos() as u64).next_multiple_of(tick))
    }

    /// What comes first in this order: to be closed, an answer of the owner, room for `output`, input if it is wanted, time.
    /// Input comes before time because it may be what a deadline waits for, and has lain here while we could not look; but
    /// who always has some must not outlive its deadlines, so behind input time comes first.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        (kicked, output, alarm): &mut (&mut mpsc::Receiver<CloseReason>, &[u8], Option<Pin<&mut Sleep>>),
    ) -> Poll<Woken> {
        if let Poll::Ready(Some(reason)) = kicked.poll_recv(context) {
            return Poll::Ready(Woken::Kicked(reason));
        }
        if std::mem::take(&mut self.fed)
            && let Some(alarm) = alarm
            && alarm.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Woken::Time);
        }
        // An empty set is asked to no avail, and remembers nothing.
        if !self.answers.is_empty()
            && let Poll::Ready(Some((token, answer))) = self.answers.poll_next_unpin(context)
        {
            return Poll::Ready(Woken::Answered(token, answer));
        }
        if !output.is_empty()
            && let Poll::Ready(outcome) = Pin::new(&mut self.stream).poll_write(context, output)
        {
            return Poll::Ready(Woken::Written(outcome));
        }
        if self.session.wants_input()
            && let Poll::Ready(outcome) = self.poll_read(context)
        {
            return Poll::Ready(Woken::Read(outcome));
        }
        alarm.as_mut().map_or(Poll::Pending, |alarm| alarm.as_mut().poll(context).map(|()| Woken::Time))
    }

    /// The buffer lives on the stack, and only for this call: an idle session costs no buffer. It is much larger than what
    /// comes at once, as a rule: a read that does not fill it need not be followed by one that finds nothing.
    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut bytes = [const { MaybeUninit::uninit() }; READ];
        let mut buffer = ReadBuf::uninit(&mut bytes);
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer))?;
        if !buffer.filled().is_empty() {
            self.fed = true;
            self.session.handle_input(Instant::now(), buffer.filled());
        }
        Poll::Ready(Ok(buffer.filled().len()))
    }

    fn on_error(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
            // TCP_USER_TIMEOUT: nothing was acknowledged for three keepalives.
            io::ErrorKind::TimedOut => self.session.close(CloseReason::DeadPeer(crate::necp::session::MAX_MISSED)),
            _ => self.session.close(CloseReason::ClosedByPeer),
        }
    }

    async fn pass_on_events(&mut self) {
        while let Some(event) = self.session.poll_event() {
            let from = self.from;
            let input = match event {
                NeEvent::Init { token } => {
                    self.joined = true;
                    self.patron.joined.store(true, Ordering::Relaxed);
                    // The session sends on what was begun, and forgets the rest.
                    self.lists.retain(|token, _| Some(*token) == self.sending);
                    self.told.clear();
                    let done = self.await_answer(token);
                    Input::Opened { from, kick: self.patron.kick.clone(), done }
                }
                NeEvent::Operations { token, operations } => {
                    self.told.clear();
                    let done = self.await_answer(token);
                    Input::Operations { from, operations, done }
                }
                NeEvent::Reset { token } => {
                    let done = self.await_answer(token);
                    Input::Reset { from, done }
                }
                NeEvent::Query { token, filter } => self.list_step(token, ListStep::Begin(filter)),
                NeEvent::ListMore { token, max } => {
                    // Of a list whose end was sent nothing more is asked.
                    let Some(listing) = self.lists.remove(&token) else { continue };
                    self.sending = Some(token);
                    self.list_step(token, ListStep::Read(listing, max))
                }
                // Most answers are those of before; what a START has made new knows nothing of them yet.
                NeEvent::Health(answers) if answers == self.told => continue,
                NeEvent::Health(answers) => {
                    self.told.clone_from(&answers);
                    Input::Health { from, answers }
                }
                NeEvent::Notice(notice) => {
                    if self.patron.limits.voices().may_speak(from.server) {
                        tracing::info!(server = %from.server, "{notice}");
                    }
                    continue;
                }
                NeEvent::Closed(_) => continue,
            };
            if self.owner.send(input).await.is_err() {
                self.session.close(CloseReason::Shutdown);
            }
        }
    }

    fn count_rejected(&mut self) {
        let now = self.session.counters().rejected;
        if now != self.rejected {
            self.patron.rejected.add(&now, &self.rejected);
            self.rejected = now;
        }
    }

    fn await_answer(&mut self, token: Token) -> oneshot::Sender<Vec<usize>> {
        let (done, answer) = oneshot::channel();
        self.answers.push(Box::pin(async move { (token, answer.await.ok().map(Answer::Done)) }));
        done
    }

    fn list_step(&mut self, token: Token, step: ListStep) -> Input {
        let (done, answer) = oneshot::channel();
        self.answers.push(Box::pin(async move { (token, answer.await.ok().map(Answer::List)) }));
        Input::List { from: self.from, step, done }
    }

    async fn on_list(&mut self, token: Token, part: ListPart) {
        match part {
            ListPart::Counting(listing) => {
                let input = self.list_step(token, ListStep::Count(listing));
                if self.owner.send(input).await.is_err() {
                    self.session.close(CloseReason::Shutdown);
                }
            }
            ListPart::Counted(listing, count) => {
                if self.session.list(token, count) {
                    self.lists.insert(token, listing);
                }
            }
            ListPart::Entries(listing, entries) => {
                self.lists.extend(listing.map(|listing| (token, listing)));
                self.session.list_more(token, &entries);
            }
        }
    }

    /// Writes what is left, closes our side, and waits for the peer's, so that no reset overtakes our last answer.
    async fn say_goodbye(&mut self) {
        while let Some(output) = self.session.poll_transmit() {
            if write_all(&self.stream, &output).await.is_err() {
                return;
            }
        }
        let _ = socket2::SockRef::from(&self.stream).shutdown(std::net::Shutdown::Write);
        let mut discarded = 0;
        let mut buffer = [0; 512];
        while discarded < DISCARD && self.stream.readable().await.is_ok() {
            match self.stream.try_read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => discarded += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }
}

async fn write_all(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
