//! The same targets without coverage and without instrumentation: random changes to the seeds, in one loop, many times
//! as fast. `blind TARGET SECONDS SEED CORPUS` says how many scripts it has played; one that fails is written to
//! `crash-TARGET-SEED-N` and named.

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, fs};

use necp_fuzz::necp::chaos;

/// Longest script, in bytes.
const LONGEST: usize = 256;
/// Scripts between two looks at the clock.
const ROUND: u64 = 1 << 14;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().collect();
    let [_, target, seconds, seed, corpus] = &args[..] else { return usage() };
    let play: fn(&[u8]) = match target.as_str() {
        "wire" => chaos::wire,
        "session" => chaos::session,
        _ => return usage(),
    };
    let (Ok(seconds), Ok(seed)) = (seconds.parse(), seed.parse()) else { return usage() };
    let seeds: Vec<Vec<u8>> =
        fs::read_dir(corpus).into_iter().flatten().flatten().filter_map(|file| fs::read(file.path()).ok()).collect();
    let began = Instant::now();
    let mut script = Script { bytes: Vec::with_capacity(LONGEST), seeds, random: Random(seed) };
    let mut played = 0;
    while began.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..ROUND {
            script.next();
            played += 1;
            if catch_unwind(|| play(&script.bytes)).is_err() {
                let file = format!("crash-{target}-{seed}-{played}");
                let written = fs::write(&file, &script.bytes);
                eprintln!("blind: script {played} of {target} failed; {file}: {written:?}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("blind: {target}: {played} scripts in {:.1} s", began.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    eprintln!("usage: blind wire|session SECONDS SEED CORPUS");
    ExitCode::FAILURE
}

struct Script {
    bytes: Vec<u8>,
    seeds: Vec<Vec<u8>>,
    random: Random,
}

impl Script {
    /// Another script: changes upon changes, and from time to time a fresh start from a seed or from noise.
    fn next(&mut self) {
        let dice = self.random.next();
        if dice & 7 == 0 || self.bytes.is_empty() {
            self.bytes.clear();
            let seed = (dice >> 8) as usize % (self.seeds.len() + 1);
            match self.seeds.get(seed) {
                Some(seed) => self.bytes.extend_from_slice(&seed[..seed.len().min(LONGEST)]),
                None => self.noise(dice >> 40),
            }
        }
        for turn in 0..=dice >> 3 & 3 {
            let number = self.random.next().rotate_left(turn as u32);
            self.change(number);
        }
    }

    fn noise(&mut self, length: u64) {
        let length = length as usize % LONGEST;
        while self.bytes.len() < length {
            self.bytes.extend(self.random.next().to_le_bytes());
        }
    }

    fn change(&mut self, number: u64) {
        let length = self.bytes.len().max(1);
        let (at, from, byte) =
            ((number >> 8) as usize % length, (number >> 24) as usize % length, (number >> 40) as u8);
        let count = (number >> 48) as usize % 24;
        match number & 7 {
            0 | 1 if at < self.bytes.len() => self.bytes[at] = byte,
            2 if at < self.bytes.len() => self.bytes[at] ^= 1 << (byte & 7),
            3 if self.bytes.len() < LONGEST => self.bytes.insert(at.min(self.bytes.len()), byte),
            4 => drop(self.bytes.drain(at.min(self.bytes.len())..(at + count).min(self.bytes.len()))),
            5 if self.bytes.len() + count < LONGEST => {
                let part = self.bytes[from.min(self.bytes.len())..(from + count).min(self.bytes.len())].to_vec();
                self.bytes.splice(at.min(self.bytes.len())..at.min(self.bytes.len()), part);
            }
            6 if !self.seeds.is_empty() => {
                let seed = &self.seeds[(number >> 53) as usize % self.seeds.len()];
                let room = LONGEST - self.bytes.len();
                let from = from % seed.len().max(1);
                let part = &seed[from.min(seed.len())..];
                self.bytes.extend_from_slice(&part[..part.len().min(room).min(count * 4)]);
            }
            _ => self.bytes.push(byte),
        }
        self.bytes.truncate(LONGEST);
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
