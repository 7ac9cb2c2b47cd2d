//! What both roles share: framing in, messages out, request ids, the progress deadline, how it ended.

use std::collections::VecDeque;
use std::mem::{self, Discriminant};
use std::time::Instant;

use super::keepalive::{Asked, KeepaliveClock};
use super::rng::Rng;
use super::secure::{Rejected, Secure, Stamp};
use super::units::{AnyUnit, Form, Units};
use super::{Counters, Notice, SessionConfig};
use crate::necp::auth::{CREDENTIAL_LEN, Rejection, Signer};
use crate::necp::error::CloseReason;
use crate::necp::message::Query;
use crate::necp::service::ServiceKey;
use crate::necp::wire::{
    Decoder, Direction, Flags, HEADER_LEN, Header, Item, Opcode, PREAMBLE_LEN, Preamble, Unit, VERSION,
};

/// Output beyond which no more input is read: the peer must read first.
const OUTPUT_FULL: usize = 64 * 1024;
/// Output beyond which a streamed message waits for the peer, so that the answers behind it have room too, and input is read.
const STREAM_FULL: usize = OUTPUT_FULL / 2;
/// Input that may wait inside a session whose caller reads though it is told not to.
const BACKLOG_MAX: usize = 1024 * 1024;
/// Output handed over at once.
const CHUNK: usize = 64 * 1024;

/// What the stream brought.
#[derive(Debug)]
pub(super) enum Incoming {
    /// A message begins, on a connection that is not authenticated, or not yet.
    Header(Header),
    /// A message begins that was verified as a whole; its header is shown without the credential.
    Verified {
        header: Header,
        /// It is the first one after the peer has started over in place (§5.4).
        restarted: bool,
    },
    /// A message that is not executed, as a whole.
    Rejected(Rejected),
    /// Wide units follow; only after [`Link::read_wide`].
    Preamble(Preamble),
    Unit(AnyUnit),
    End,
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) config: SessionConfig,
    pub(super) counters: Counters,
    pub(super) keepalive: KeepaliveClock,
    decoder: Decoder,
    /// Only with a key.
    secure: Option<Box<Secure>>,
    /// Bytes that came while none were wanted.
    backlog: Vec<u8>,
    /// A header put back by [`Link::defer`].
    deferred: Option<Header>,
    out: Vec<u8>,
    out_start: usize,
    /// A message is in the making whose units come one by one; others wait in `held` for its end.
    streams: bool,
    stream_form: Form,
    stream_signer: Option<Signer>,
    held: Vec<u8>,
    closed: Option<CloseReason>,
    last_id: u16,
    told: Vec<Discriminant<Notice>>,
    notices: VecDeque<Notice>,
    /// When the message in progress must have brought more, and how much it has brought since that was set.
    progress: Option<Instant>,
    progress_bytes: usize,
    /// Whether input was left alone for a time, which must not count against the peer.
    paused: bool,
    /// Whether bytes of a message in progress came since the last tick of the keepalive clock.
    moved: bool,
    /// Whether the peer took some of a streamed message since then, or we read the end of a long one.
    excused: bool,
    /// The latest time that was told.
    pub(super) now: Instant,
}

impl Link {
    pub(super) fn new(config: SessionConfig, secure: Option<Secure>, now: Instant, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let last_id = rng.next() as u16;
        Self {
            keepalive: KeepaliveClock::new(&config, rng),
            config,
            counters: Counters::default(),
            decoder: Decoder::default(),
            secure: secure.map(Box::new),
            backlog: Vec::new(),
            deferred: None,
            out: Vec::new(),
            out_start: 0,
            streams: false,
            stream_form: Form::Basic,
            stream_signer: None,
            held: Vec::new(),
            closed: None,
            last_id,
            told: Vec::new(),
            notices: VecDeque::new(),
            progress: None,
            progress_bytes: 0,
            paused: false,
            moved: false,
            excused: false,
            now,
        }
    }

    pub(super) fn closed(&self) -> Option<&CloseReason> {
        self.closed.as_ref()
    }

    /// Ends the session; the first reason stays. Says whether this was it.
    pub(super) fn close(&mut self, reason: CloseReason) -> bool {
        if self.closed.is_some() {
            return false;
        }
        self.closed = Some(reason);
        self.backlog = Vec::new();
        self.deferred = None;
        self.progress = None;
        self.keepalive.stop();
        true
    }

    // ---- input ----

    /// Adds bytes to those that wait.
    pub(super) fn feed(&mut self, now: Instant, bytes: &[u8]) {
        self.now = self.now.max(now);
        if self.closed.is_some() {
            return;
        }
        self.counters.bytes_in += bytes.len() as u64;
        self.backlog.extend_from_slice(bytes);
    }

    /// The next item of the stream; `None` when more bytes are needed, or the session has ended.
    pub(super) fn next_item(&mut self, consumed: &mut usize) -> Option<Incoming> {
        while self.closed.is_none() {
            if let Some(header) = self.deferred.take() {
                return Some(Incoming::Header(header));
            }
            if let Some(item) = self.secure.as_mut().and_then(|secure| secure.next_of_message()) {
                return Some(item);
            }
            match self.next_of_stream(consumed)? {
                Item::Header(header) if self.is_secured() => self.hold(header),
                Item::Header(header) => return Some(Incoming::Header(header)),
                Item::Unit(unit) => return Some(Incoming::Unit(AnyUnit::Basic(unit))),
                Item::Wide(unit) => return Some(Incoming::Unit(AnyUnit::Wide(unit))),
                Item::Preamble(preamble) => return Some(Incoming::Preamble(preamble)),
                Item::End => return Some(Incoming::End),
                Item::Payload => {
                    let payload = self.decoder.take_payload();
                    let secure = self.secure.as_mut()?;
                    return secure.examine(payload, self.config.max_failed_units);
                }
            }
        }
        None
    }

    fn next_of_stream(&mut self, consumed: &mut usize) -> Option<Item> {
        let mut rest = &self.backlog[*consumed..];
        let before = rest.len();
        let item = self.decoder.next(&mut rest);
        let taken = before - rest.len();
        *consumed += taken;
        match item {
            Ok(item) => {
                self.track_progress(taken);
                if let Some(Item::Header(_)) = item {
                    self.counters.messages_in += 1;
                }
                item
            }
            Err(lost) => {
                self.counters.framing_errors += 1;
                self.close(CloseReason::Framing { identifier: lost.identifier });
                None
            }
        }
    }

    /// Drops the bytes that were used; those that were not wanted stay, up to a limit.
    pub(super) fn keep_rest(&mut self, consumed: usize) {
        if self.closed.is_some() {
            return;
        }
        self.backlog.drain(..consumed);
        if self.backlog.len() > BACKLOG_MAX {
            self.close(CloseReason::Overflow(self.backlog.len()));
        } else if self.backlog.is_empty() {
            self.backlog = Vec::new();
        }
    }

    /// Puts a header back until later.
    pub(super) fn defer(&mut self, header: Header) {
        self.deferred = Some(header);
    }

    pub(super) fn has_deferred(&self) -> bool {
        self.deferred.is_some()
    }

    /// Whether there is input inside that was not looked at yet.
    pub(super) fn has_backlog(&self) -> bool {
        let verified = self.secure.as_ref().is_some_and(|secure| secure.has_message());
        self.deferred.is_some() || verified || !self.backlog.is_empty() || self.decoder.at_end()
    }

    pub(super) fn skip_payload(&mut self) {
        match &mut self.secure {
            Some(secure) if secure.has_message() => secure.skip_message(),
            _ => self.decoder.skip_payload(),
        }
    }

    /// Reads the payload of the message that begins with this header as wide units; [`Header::wide_units`] says whether it can
    /// be made of them.
    pub(super) fn read_wide(&mut self, header: &Header) {
        match &mut self.secure {
            Some(secure) if secure.has_message() => secure.read_wide(header),
            _ => self.decoder.read_wide(header),
        }
    }

    /// Whether the peer has read enough of what it was sent for us to read more of what it sends.
    pub(super) fn output_has_room(&self) -> bool {
        self.output_len() < OUTPUT_FULL
    }

    // ---- authentication ----

    /// The key's part, if this side has a key.
    pub(super) fn secure(&mut self) -> Option<&mut Secure> {
        self.secure.as_deref_mut()
    }

    /// Whether every message is held back until it is verified, and signed (§5.8).
    pub(super) fn is_secured(&self) -> bool {
        self.secure.as_ref().is_some_and(|secure| secure.is_established())
    }

    /// Holds the rest of this message back until it can be verified; one that is too large ends the session.
    pub(super) fn hold(&mut self, header: Header) {
        if header.payload_len as usize > self.config.max_message {
            self.counters.rejected.too_large += 1;
            self.skip_payload();
            if header.version == VERSION {
                self.refuse_as(&header, Flags::NONE, &[]);
            } else {
                self.answer_version(&header);
            }
            self.close(CloseReason::MessageTooLarge(header.payload_len));
        } else if let Some(secure) = &mut self.secure {
            secure.hold(header);
            self.decoder.hold_payload(&header);
        }
    }

    /// Answers a message that was rejected, and counts it; three in a row end the session.
    pub(super) fn reject(&mut self, rejected: &Rejected) {
        let Rejected { header, cause, units } = rejected;
        self.counters.rejected.count(*cause);
        self.notice(Notice::Rejected(*cause));
        let flags = match cause {
            Rejection::NoCredential | Rejection::BadCredential => Flags::AUTH_REQUIRED,
            Rejection::BadSequence => Flags::BAD_SEQUENCE_NUMBER,
        };
        if header.version != VERSION {
            self.answer_version(header);
        } else {
            // What a failed KEEPALIVE repeats are queries that are not supported (§5.5.3); and INIT_ACK has no failed units.
            let repeats = ![Opcode::KEEPALIVE, Opcode::INIT].contains(&header.opcode);
            self.refuse_as(header, flags, if repeats { units } else { &[] });
        }
        if self.secure.as_mut().is_some_and(|secure| secure.strike()) {
            self.close(CloseReason::Rejected(*cause));
        }
    }

    // ---- deadlines ----

    fn track_progress(&mut self, taken: usize) {
        if !self.decoder.in_message() {
            self.progress = None;
            return;
        }
        self.moved |= taken > 0;
        self.progress_bytes += taken;
        if self.progress.is_none() || self.progress_bytes >= self.config.progress_bytes as usize {
            self.restart_progress();
        }
    }

    fn restart_progress(&mut self) {
        self.progress_bytes = 0;
        self.progress = Some(self.now + self.config.progress_deadline);
    }

    pub(super) fn progress_deadline(&self) -> Option<Instant> {
        self.progress
    }

    /// Says whether it is us who does not read for now; a message in progress gets its full time again after that.
    pub(super) fn set_paused(&mut self, paused: bool) {
        if (paused || self.paused) && self.progress.is_some() {
            self.restart_progress();
        }
        self.paused = paused;
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Closes if the message in progress is late.
    pub(super) fn check_progress(&mut self) {
        if self.progress.is_some_and(|deadline| self.now >= deadline) {
            self.close(CloseReason::ProgressDeadline(self.config.progress_deadline));
        }
    }

    /// Whether a message in progress has moved since this was asked last: its sender cannot answer in between, nor can
    /// its reader be asked.
    pub(super) fn take_moved(&mut self) -> bool {
        let (moved, excused) = (mem::take(&mut self.moved), mem::take(&mut self.excused));
        (moved && self.decoder.in_message()) || excused
    }

    /// A long message has just ended: what waited behind it comes now.
    pub(super) fn excuse(&mut self) {
        self.excused = true;
    }

    // ---- output ----

    pub(super) fn send(&mut self, opcode: Opcode, flags: Flags, request_id: u16, units: &[Unit]) {
        self.send_units(opcode, flags, request_id, &units.into());
    }

    /// As [`Self::send`], in either form.
    pub(super) fn send_units(&mut self, opcode: Opcode, flags: Flags, request_id: u16, units: &Units) {
        let stamp = self.secure.as_mut().map_or(Some(Stamp::Bare), |secure| secure.stamp());
        match stamp {
            Some(stamp) => self.send_as(stamp, opcode, flags, request_id, units),
            None => _ = self.close(CloseReason::NumbersExhausted),
        }
    }

    /// Sends a message with this number in place of the next one: INIT's, and INIT_ACK's in an open session (§5.9.2).
    pub(super) fn send_as(&mut self, stamp: Stamp, opcode: Opcode, flags: Flags, request_id: u16, units: &Units) {
        if self.closed.is_some() {
            return;
        }
        let (header, signer) = self.stamped(stamp, header(units.form(), opcode, flags, request_id, units.len()));
        let out = if self.streams { &mut self.held } else { &mut self.out };
        let start = out.len();
        out.reserve(HEADER_LEN + PREAMBLE_LEN + units.bytes().len() + CREDENTIAL_LEN);
        out.extend_from_slice(&header.encode());
        if units.form() == Form::Wide && !units.is_empty() {
            out.extend_from_slice(&Preamble::SPOKEN.encode());
        }
        out.extend_from_slice(units.bytes());
        if let Some(mut signer) = signer {
            signer.update(&out[start + HEADER_LEN..]);
            out.extend_from_slice(&signer.credential());
        }
        self.counters.messages_out += 1;
        self.counters.bytes_out += (out.len() - start) as u64;
    }

    fn stamped(&self, stamp: Stamp, plain: Header) -> (Header, Option<Signer>) {
        match (stamp, self.secure.as_deref()) {
            (Stamp::Number(number), Some(secure)) => {
                let header = Secure::stamped(plain, number);
                (header, Some(secure.signer(&header)))
            }
            _ => (plain, None),
        }
    }

    /// Begins a message whose `units` follow one by one, as the peer reads them; what is sent meanwhile goes out after it.
    pub(super) fn begin_stream(&mut self, opcode: Opcode, request_id: u16, form: Form, units: usize) {
        if self.closed.is_some() {
            return;
        }
        debug_assert!(!self.streams, "one at a time");
        let Some(stamp) = self.secure.as_mut().map_or(Some(Stamp::Bare), |secure| secure.stamp()) else {
            self.close(CloseReason::NumbersExhausted);
            return;
        };
        let (header, signer) = self.stamped(stamp, header(form, opcode, Flags::NONE, request_id, units));
        self.out.extend_from_slice(&header.encode());
        self.counters.bytes_out += HEADER_LEN as u64;
        self.counters.messages_out += 1;
        (self.stream_form, self.stream_signer, self.streams) = (form, signer, true);
        if form == Form::Wide && units > 0 {
            self.stream(&Preamble::SPOKEN.encode());
        }
    }

    /// Whether a message is in the making whose units come one by one.
    pub(super) fn is_streaming(&self) -> bool {
        self.streams
    }

    /// Bytes of a streamed message for which there is room: the peer must read first.
    pub(super) fn stream_room(&self) -> usize {
        STREAM_FULL.saturating_sub(self.out.len() - self.out_start)
    }

    /// The next unit of the message that was begun; one of another form than it has is left out.
    pub(super) fn stream_unit(&mut self, unit: &AnyUnit) {
        match (self.stream_form, unit) {
            (Form::Basic, AnyUnit::Basic(unit)) => self.stream(&unit.encode()),
            (Form::Wide, AnyUnit::Wide(unit)) => self.stream(&unit.0),
            _ => debug_assert!(false, "a message has units of one form"),
        }
    }

    fn stream(&mut self, bytes: &[u8]) {
        if self.closed.is_none() {
            self.out.extend_from_slice(bytes);
            if let Some(signer) = &mut self.stream_signer {
                signer.update(bytes);
            }
            self.counters.bytes_out += bytes.len() as u64;
        }
    }

    /// All units of the message that was begun are sent.
    pub(super) fn end_stream(&mut self) {
        self.excuse();
        self.streams = false;
        if let Some(signer) = self.stream_signer.take() {
            self.out.extend_from_slice(&signer.credential());
            self.counters.bytes_out += CREDENTIAL_LEN as u64;
        }
        self.out.append(&mut self.held);
        self.held = Vec::new();
    }

    /// Sends a KEEPALIVE that asks for the health of `services`.
    pub(super) fn send_keepalive(&mut self, services: Vec<ServiceKey>, id_in_use: impl Fn(u16) -> bool) {
        let request_id = self.fresh_id(id_in_use);
        let units: Vec<Unit> = services.iter().map(|service| Query { service: *service }.unit()).collect();
        self.send(Opcode::KEEPALIVE, Flags::NONE, request_id, &units);
        self.counters.keepalives_sent += 1;
        self.keepalive.sent(Asked { request_id, queries: services });
    }

    /// Refuses a request, or says nothing if its opcode has no answer.
    pub(super) fn refuse(&mut self, header: &Header, flags: Flags, units: &[Unit]) {
        self.refuse_units(header, flags, &units.into());
    }

    /// As [`Self::refuse`], in either form.
    pub(super) fn refuse_units(&mut self, header: &Header, flags: Flags, units: &Units) {
        if let Some(answer) = header.opcode.answer() {
            self.send_units(answer, flags.with(Flags::ERROR), header.request_id, units);
        }
    }

    /// As [`Self::refuse`], on an authenticated connection, but not what this role never receives.
    fn refuse_as(&mut self, header: &Header, flags: Flags, units: &[Unit]) {
        let ours = match header.opcode.direction() {
            Direction::Both => true,
            Direction::ToNe => self.secure.as_ref().is_some_and(|secure| secure.takes_init()),
            Direction::ToSe | Direction::Reserved => false,
        };
        if ours {
            self.refuse(header, flags, units);
        }
    }

    /// Answers a message of another version (§5.2.1), unless it is itself such an answer.
    pub(super) fn answer_version(&mut self, header: &Header) {
        debug_assert_ne!(header.version, VERSION);
        self.counters.version_mismatches += 1;
        self.notice(Notice::VersionMismatch { version: header.version });
        if !header.flags.has(Flags::PROTOCOL_VERSION_MISMATCH) {
            let opcode = header.opcode.answer().unwrap_or(header.opcode);
            let flags = Flags::ERROR.with(Flags::PROTOCOL_VERSION_MISMATCH);
            self.send(opcode, flags, header.request_id, &[]);
        }
    }

    pub(super) fn take_output(&mut self) -> Option<Vec<u8>> {
        let waiting = self.out.len() - self.out_start;
        if waiting == 0 {
            return None;
        }
        self.excused |= self.streams;
        if waiting <= CHUNK {
            let chunk = self.out.split_off(self.out_start);
            self.out = Vec::new();
            self.out_start = 0;
            return Some(chunk);
        }
        let chunk = self.out[self.out_start..self.out_start + CHUNK].to_vec();
        self.out_start += CHUNK;
        Some(chunk)
    }

    fn output_len(&self) -> usize {
        self.out.len() - self.out_start + self.held.len()
    }

    /// A request id distinct from those that are outstanding (§5.2.1).
    pub(super) fn fresh_id(&mut self, in_use: impl Fn(u16) -> bool) -> u16 {
        loop {
            self.last_id = self.last_id.wrapping_add(1);
            if !in_use(self.last_id) && !self.keepalive.uses(self.last_id) {
                return self.last_id;
            }
        }
    }

    // ---- what comes in and has no use ----

    /// Skips a message whose opcode this role does not receive (§5.3).
    pub(super) fn skip_foreign(&mut self, opcode: Opcode) {
        self.skip_payload();
        if opcode.direction() == Direction::Reserved {
            self.counters.reserved_opcodes += 1;
            self.notice(Notice::ReservedOpcode(opcode));
        } else {
            self.counters.wrong_direction += 1;
            self.notice(Notice::WrongDirection(opcode));
        }
    }

    pub(super) fn notice(&mut self, notice: Notice) {
        let kind = mem::discriminant(&notice);
        if !self.told.contains(&kind) {
            self.told.push(kind);
            self.notices.push_back(notice);
        }
    }

    pub(super) fn malformed(&mut self, opcode: Opcode) {
        self.counters.malformed += 1;
        self.notice(Notice::Malformed(opcode));
    }

    pub(super) fn unexpected(&mut self, opcode: Opcode) {
        self.counters.unexpected_answers += 1;
        self.notice(Notice::Unexpected(opcode));
    }

    pub(super) fn bad_health(&mut self) {
        self.counters.discarded_health += 1;
        self.notice(Notice::BadHealth);
    }

    pub(super) fn bad_entry(&mut self) {
        self.counters.discarded_entries += 1;
        self.notice(Notice::BadEntry);
    }

    pub(super) fn next_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// Bytes held.
    pub(super) fn held_bytes(&self) -> usize {
        let secure = self.secure.as_ref().map_or(0, |secure| secure.held_bytes());
        let input = self.backlog.capacity() + self.decoder.held() + secure;
        input + self.out.capacity() + self.held.capacity()
    }
}

fn header(form: Form, opcode: Opcode, flags: Flags, request_id: u16, units: usize) -> Header {
    match form {
        Form::Basic => Header::new(opcode, flags, request_id, units),
        Form::Wide => Header::wide(opcode, flags, request_id, units),
    }
}
