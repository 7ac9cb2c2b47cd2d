//! What can be wrong with a frame: bytes, bits, lengths, flags, its end.

use rand::{RngExt as _, rngs::SmallRng};

use super::{
    once_in, pick,
    stack::{Stack, mend_header},
};

/// Headers are among these first bytes.
const HEADERS: usize = 120;
const INTERESTING: [u8; 8] = [0, 1, 4, 6, 17, 0x7f, 0x80, 0xff];
const LONGEST: usize = 9000;

/// Breaks the frame in one way; it may be well-formed after all.
pub fn mutate(stack: &mut Stack, random: &mut SmallRng) {
    let ip = stack.ip.filter(|&ip| ip + 20 <= stack.bytes.len());
    let transport = stack.transport.filter(|&at| at + 8 <= stack.bytes.len());
    match (random.random_range(0..16), ip, transport) {
        (0, ..) => byte(stack, random, |random, _| random.random()),
        (1, ..) => byte(stack, random, |random, old| old ^ 1 << random.random_range(0..8)),
        (2, ..) => byte(stack, random, |random, _| pick(random, &INTERESTING)),
        (3, ..) => cut(stack, random),
        (4, Some(ip), _) => {
            // Shorter, and the header says so.
            cut(stack, random);
            let total = stack.bytes.len().saturating_sub(ip) as u16;
            put(stack, ip + 2, total);
        }
        (5, ..) => {
            let more = random.random_range(1..64);
            let length = (stack.bytes.len() + more).min(LONGEST.max(stack.bytes.len()));
            stack.bytes.resize(length, 0);
        }
        (6, Some(ip), _) => stack.bytes[ip] = 0x40 | random.random_range(0..16u8),
        (7, Some(ip), _) => {
            let right = (stack.bytes.len() - ip) as u16;
            let total = pick(random, &[0, 19, 20, 28, 40, right, right + 1, right - 1, 0x7fff, 0xffff]);
            put(stack, ip + 2, total);
        }
        (8, Some(ip), _) => {
            let fragment = pick(random, &[0, 0x2000, 1, 0x1fff, 0x8000, 0x4000, 0x4001, 0x6000]);
            put(stack, ip + 6, fragment);
        }
        (9, Some(ip), _) => stack.bytes[ip + 9] = pick(random, &[0, 1, 4, 6, 6, 17, 17, 41, 47, 51, 132, 255]),
        // Data offset or UDP length, and what else is there.
        (10, _, Some(at)) => {
            let place = at + pick(random, &[4, 5, 12, 13]);
            if let Some(field) = stack.bytes.get_mut(place) {
                *field = if once_in(random, 2) { random.random::<u8>() & 0xf0 } else { random.random_range(0..32) };
            }
        }
        (11, _, Some(at)) => {
            let rest = (stack.bytes.len() - at) as u16;
            let length = pick(random, &[0, 7, 8, 9, rest, rest + 1, rest - 1, 0xffff]);
            put(stack, at + 4, length);
        }
        (12, ..) => splice(stack, random),
        (13, ..) => shift(stack, random),
        (14, ..) => put(stack, 12, pick(random, &[0x0800, 0x0800, 0x86dd, 0x8100, 0x88a8, 0x0806, 0x0008])),
        (15, Some(ip), _) => stack.bytes[ip] = random.random(),
        _ => cut(stack, random),
    }
    if let Some(ip) = stack.ip.filter(|_| once_in(random, 2)) {
        mend_header(&mut stack.bytes, ip);
    }
}

fn byte(stack: &mut Stack, random: &mut SmallRng, new: impl Fn(&mut SmallRng, u8) -> u8) {
    let most = stack.bytes.len().min(HEADERS);
    if most > 0 {
        let place = random.random_range(0..most);
        stack.bytes[place] = new(random, stack.bytes[place]);
    }
}

fn put(stack: &mut Stack, place: usize, value: u16) {
    if let Some(field) = stack.bytes.get_mut(place..place + 2) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

fn cut(stack: &mut Stack, random: &mut SmallRng) {
    let most = stack.bytes.len().min(if once_in(random, 4) { usize::MAX } else { HEADERS });
    stack.bytes.truncate(random.random_range(0..=most));
}

/// Some bytes over others.
fn splice(stack: &mut Stack, random: &mut SmallRng) {
    let length = stack.bytes.len();
    let run = random.random_range(1..=20);
    if length > run {
        let from = random.random_range(0..length - run);
        let to = random.random_range(0..(length - run).min(HEADERS));
        stack.bytes.copy_within(from..from + run, to);
    }
}

/// Some bytes more, or less, in the middle.
fn shift(stack: &mut Stack, random: &mut SmallRng) {
    let place = random.random_range(0..=stack.bytes.len().min(HEADERS));
    let run = pick(random, &[1, 2, 4, 8, 20]);
    if once_in(random, 2) {
        let end = (place + run).min(stack.bytes.len());
        stack.bytes.drain(place..end);
    } else {
        let value = random.random();
        stack.bytes.splice(place..place, std::iter::repeat_n(value, run));
    }
}
