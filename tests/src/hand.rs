//! A server element by hand: every byte as the draft has it, written apart from the product's codec, so that both are
//! tested; and peers that speak something else.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{conversation::connect, daemon::NECP_PORT, netns::Namespace};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Flag of a basic payload (draft §5.2.1).
pub const BASIC_PAYLOAD: u16 = 0x0001;
/// Flag of an answer to what failed (draft §5.2.1).
pub const ERROR: u16 = 0x0004;

/// Opcodes (draft §5.3).
pub mod opcode {
    /// Opens the session.
    pub const INIT: u8 = 0x01;
    /// Answers INIT.
    pub const INIT_ACK: u8 = 0x02;
    /// Asks for a sign of life.
    pub const KEEPALIVE: u8 = 0x03;
    /// Answers KEEPALIVE.
    pub const KEEPALIVE_ACK: u8 = 0x04;
    /// Offers services.
    pub const START: u8 = 0x05;
    /// Answers START.
    pub const START_ACK: u8 = 0x06;
    /// Takes services back.
    pub const STOP: u8 = 0x07;
    /// Answers STOP.
    pub const STOP_ACK: u8 = 0x08;
    /// Adds exceptions.
    pub const EXCEPTION_ADD: u8 = 0x20;
    /// Answers EXCEPTION_ADD.
    pub const EXCEPTION_ADD_ACK: u8 = 0x21;
    /// Deletes exceptions.
    pub const EXCEPTION_DEL: u8 = 0x22;
    /// Answers EXCEPTION_DEL.
    pub const EXCEPTION_DEL_ACK: u8 = 0x23;
    /// Deletes all of the sender's exceptions.
    pub const EXCEPTION_RESET: u8 = 0x24;
    /// Answers EXCEPTION_RESET.
    pub const EXCEPTION_RESET_ACK: u8 = 0x25;
    /// Asks for exceptions.
    pub const EXCEPTION_QUERY: u8 = 0x26;
    /// Answers EXCEPTION_QUERY.
    pub const EXCEPTION_RESP: u8 = 0x27;
}

/// The payload's unit: data0 to data7 (draft §5.2.3).
pub type Unit = [u32; 8];

/// A unit of START (draft §5.6.1).
pub fn start_unit(forwarding: u32, protocol: u32, port: u32) -> Unit {
    [forwarding, protocol, port, 0, 0, 0, 0, 0]
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// See [`BASIC_PAYLOAD`], [`ERROR`].
    pub flags: u16,
    /// See [`opcode`].
    pub opcode: u8,
    /// Repeated in the answer.
    pub request_id: u16,
    /// The payload.
    pub units: Vec<Unit>,
}

impl Message {
    /// Its bytes (draft §5.2).
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0x41, 0x4a];
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend([1, self.opcode]);
        bytes.extend(self.request_id.to_be_bytes());
        bytes.extend(0u64.to_be_bytes());
        bytes.extend((self.units.len() as u32 * 32).to_be_bytes());
        bytes.extend(self.units.iter().flatten().flat_map(|word| word.to_be_bytes()));
        bytes
    }
}

/// A session that answers keepalives (with health 100) only while it waits for an answer itself.
#[derive(Debug)]
pub struct Hand {
    stream: TcpStream,
    last_id: u16,
}

impl Hand {
    /// Connects from the namespace's own address, and says nothing.
    ///
    /// # Errors
    /// If nobody listens.
    pub fn connect(ns: &Namespace, ne: Ipv4Addr) -> Result<Self> {
        let (_, stream) = ns.run(|| connect(None, SocketAddrV4::new(ne, NECP_PORT), PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, last_id: 100 })
    }

    /// Connects, says INIT, and takes the INIT_ACK.
    ///
    /// # Errors
    /// If it does not come, or is none.
    pub fn join(ns: &Namespace, ne: Ipv4Addr) -> Result<Self> {
        let mut hand = Self::connect(ns, ne)?;
        let ack = hand.request(opcode::INIT, &[[0; 8]])?;
        ensure!(ack.opcode == opcode::INIT_ACK && ack.flags & ERROR == 0, "INIT was answered by {ack:?}");
        ensure!(ack.units == [[0; 8]], "INIT_ACK has one unit of zeroes (§5.4.2), this is {ack:?}");
        Ok(hand)
    }

    /// START of these units; returns those that failed.
    ///
    /// # Errors
    /// If the answer does not come, or contradicts itself.
    pub fn start(&mut self, units: &[Unit]) -> Result<Vec<Unit>> {
        let ack = self.request(opcode::START, units)?;
        failed(ack, opcode::START_ACK)
    }

    /// STOP of these units; returns those that failed.
    ///
    /// # Errors
    /// As [`Hand::start`].
    pub fn stop(&mut self, units: &[Unit]) -> Result<Vec<Unit>> {
        let ack = self.request(opcode::STOP, units)?;
        failed(ack, opcode::STOP_ACK)
    }

    /// EXCEPTION_ADD of these units (draft §5.7.1); returns those that failed.
    ///
    /// # Errors
    /// As [`Hand::start`].
    pub fn except_add(&mut self, units: &[Unit]) -> Result<Vec<Unit>> {
        let ack = self.request(opcode::EXCEPTION_ADD, units)?;
        failed(ack, opcode::EXCEPTION_ADD_ACK)
    }

    /// EXCEPTION_DEL of these units (draft §5.7.3); returns those that failed.
    ///
    /// # Errors
    /// As [`Hand::start`].
    pub fn except_del(&mut self, units: &[Unit]) -> Result<Vec<Unit>> {
        let ack = self.request(opcode::EXCEPTION_DEL, units)?;
        failed(ack, opcode::EXCEPTION_DEL_ACK)
    }

    /// EXCEPTION_RESET (draft §5.7.5).
    ///
    /// # Errors
    /// If it fails, or is not answered.
    pub fn except_reset(&mut self) -> Result<()> {
        let ack = self.request(opcode::EXCEPTION_RESET, &[])?;
        ensure!(failed(ack, opcode::EXCEPTION_RESET_ACK)?.is_empty(), "EXCEPTION_RESET failed");
        Ok(())
    }

    /// EXCEPTION_QUERY (draft §5.7.7); returns the entries that are listed.
    ///
    /// # Errors
    /// If it fails, or is not answered.
    pub fn except_query(&mut self, filter: Unit) -> Result<Vec<Unit>> {
        let answer = self.request(opcode::EXCEPTION_QUERY, &[filter])?;
        ensure!(answer.opcode == opcode::EXCEPTION_RESP && answer.flags & ERROR == 0, "no list: {answer:?}");
        Ok(answer.units)
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// If the connection ends first, or nothing comes within ten seconds.
    pub fn request(&mut self, opcode: u8, units: &[Unit]) -> Result<Message> {
        self.last_id += 1;
        let flags = if units.is_empty() { 0 } else { BASIC_PAYLOAD };
        let message = Message { flags, opcode, request_id: self.last_id, units: units.to_vec() };
        self.send(&message.bytes())?;
        loop {
            let answer = self.receive()?.context("the connection was closed before the answer")?;
            if answer.opcode == opcode::KEEPALIVE {
                self.answer_keepalive(answer)?;
            } else if answer.request_id == self.last_id {
                return Ok(answer);
            } else {
                bail!("an answer to nothing: {answer:?}");
            }
        }
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Waits until something has come, and leaves it there.
    ///
    /// # Errors
    /// If nothing comes within ten seconds.
    pub fn wait_for_bytes(&self) -> io::Result<()> {
        self.stream.peek(&mut [0]).map(|_| ())
    }

    /// The next message; `None` at the end of the connection.
    ///
    /// # Errors
    /// If nothing comes within ten seconds, or what comes is no NECP.
    pub fn receive(&mut self) -> Result<Option<Message>> {
        let mut header = [0; 20];
        match self.stream.read_exact(&mut header[..1]) {
            Err(error) if is_end(&error) => return Ok(None),
            first => first?,
        }
        self.stream.read_exact(&mut header[1..])?;
        ensure!(header[..2] == [0x41, 0x4a] && header[4] == 1, "no NECP of version 1: {header:02x?}");
        let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let length = u32::from_be_bytes([header[16], header[17], header[18], header[19]]) as usize;
        ensure!(length.is_multiple_of(32) && length <= 1 << 26, "a payload of {length} bytes");
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload)?;
        let unit = |bytes: &[u8]| {
            std::array::from_fn(|at| {
                let bytes = &bytes[at * 4..at * 4 + 4];
                u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
            })
        };
        let units = payload.chunks_exact(32).map(unit).collect();
        Ok(Some(Message { flags: word(2), opcode: header[5], request_id: word(6), units }))
    }

    /// Reads until the other side closes; returns how many bytes came.
    ///
    /// # Errors
    /// If it does not close within ten seconds of silence.
    pub fn read_to_end(&mut self) -> Result<usize> {
        let mut bytes = 0;
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(bytes),
                Ok(length) => bytes += length,
                Err(error) if is_end(&error) => return Ok(bytes),
                Err(error) => return Err(error).context("the connection was not closed"),
            }
        }
    }

    fn answer_keepalive(&mut self, keepalive: Message) -> Result<()> {
        let health = |[kind, protocol, port, ..]: Unit| [kind, protocol, port, 100, 0, 0, 0, 0];
        let units: Vec<Unit> = keepalive.units.into_iter().map(health).collect();
        let answer = Message { opcode: opcode::KEEPALIVE_ACK, units, ..keepalive };
        Ok(self.send(&answer.bytes())?)
    }
}

fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// What failed of a START or STOP, by its answer (draft §5.6.2).
fn failed(answer: Message, expected: u8) -> Result<Vec<Unit>> {
    ensure!(answer.opcode == expected, "expected was opcode {expected:#04x}, this is {answer:?}");
    let is_error = answer.flags & ERROR != 0;
    ensure!(is_error != answer.units.is_empty(), "F_Error goes with failed units: {answer:?}");
    Ok(answer.units)
}
