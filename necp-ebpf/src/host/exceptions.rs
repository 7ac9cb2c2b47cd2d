//! Writing exceptions, so that no packet sees half of one.

use alloc::vec::Vec;

use super::View;
use crate::{
    abi::{EXCEPTION_GLOBAL, Exception, ExceptionMasks, exception_buckets},
    exceptions::{
        CHOICES, ExceptionBucketWords, ExceptionKey, ExceptionMasksWords, ExceptionWords, bucket_of, has_tag, place_word,
    },
    tables::Tables,
    word::Word,
};

/// An exception could not be written: nothing of it is in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotWritten {
    /// There is no such record.
    NoRecord,
    /// All buckets in which it may be are full.
    NoPlace,
}

impl View<'_> {
    /// Number of records that there may be.
    pub fn exception_count(&self) -> usize {
        self.exceptions.records.len()
    }

    /// What the record of this number says; the default: nothing.
    pub fn exception_record(&self, number: u32) -> Option<Exception> {
        let words = self.exception(number)?;
        let [first, second] = &words.installers;
        let bytes = [words.addresses.load(), words.rest.load(), first.load(), second.load()];
        // SAFETY: both are 32 bytes, and every bit pattern is a record.
        Some(unsafe { core::mem::transmute::<[u64; 4], Exception>(bytes) })
    }

    /// Makes the record of this number say this; the default: nothing. False if it did already.
    pub fn set_exception(&self, number: u32, exception: &Exception) -> Result<bool, NotWritten> {
        let words = self.exception(number).ok_or(NotWritten::NoRecord)?;
        let old = self.exception_record(number).unwrap_or_default();
        if old == *exception {
            return Ok(false);
        }
        let same_key = ExceptionKey::of(&old) == ExceptionKey::of(exception);
        if same_key && old.state != 0 && exception.state != 0 {
            words.change(exception);
            return Ok(true);
        }
        if old.state != 0 {
            self.take_place(number, ExceptionKey::of(&old));
        }
        words.clear();
        if exception.state != 0 {
            words.fill(exception);
            if !self.give_place(number, ExceptionKey::of(exception)) {
                words.clear();
                return Err(NotWritten::NoPlace);
            }
        }
        Ok(true)
    }

    /// What the exceptions of a farm look at.
    pub fn exception_masks_record(&self, farm: u32) -> Option<ExceptionMasks> {
        let words = self.exception_masks(farm)?;
        let mut bytes = [0; size_of::<ExceptionMasks>() / 8];
        bytes[0] = words.count.load();
        for (to, from) in bytes[1..].iter_mut().zip(&words.masks) {
            *to = from.load();
        }
        // SAFETY: both have the same size, and every bit pattern is such a record.
        Some(unsafe { core::mem::transmute::<[u64; size_of::<ExceptionMasks>() / 8], ExceptionMasks>(bytes) })
    }

    /// Changes what the exceptions of a farm look at; false if there is no such farm.
    pub fn set_exception_masks(&self, farm: u32, masks: &ExceptionMasks) -> bool {
        let Some(words) = self.exception_masks(farm) else { return false };
        // SAFETY: both have the same size, and there is no padding.
        let bytes = unsafe { core::mem::transmute::<ExceptionMasks, [u64; size_of::<ExceptionMasks>() / 8]>(*masks) };
        for (to, from) in words.masks.iter().zip(&bytes[1..]) {
            put(to, *from);
        }
        put(&words.count, bytes[0]);
        true
    }

    /// Takes all exceptions away.
    pub fn clear_exceptions(&self) {
        for farm in self.exceptions.masks {
            put(&farm.count, 0);
            farm.masks.iter().for_each(|mask| put(mask, 0));
        }
        for bucket in self.exceptions.index {
            bucket.entries.iter().for_each(|entry| put(entry, 0));
            put(&bucket.passed, 0);
        }
        self.exceptions.records.iter().for_each(ExceptionWords::clear);
    }

    fn sequence(&self, hash: u64) -> impl Iterator<Item = &ExceptionBucketWords> {
        let mask = self.exception_bucket_mask();
        (0..CHOICES).filter_map(move |choice| self.exception_bucket(bucket_of(hash, choice, mask)))
    }

    /// Enters a record into the index; false if there is no room.
    fn give_place(&self, number: u32, key: ExceptionKey) -> bool {
        let hash = key.hash(self.exceptions.seed);
        let free = |bucket: &&ExceptionBucketWords| {
            let alike = bucket.entries.iter().any(|entry| has_tag(entry.load(), hash) != 0);
            if alike { None } else { bucket.entries.iter().position(|entry| entry.load() == 0) }
        };
        let Some((choice, entry)) =
            self.sequence(hash).enumerate().find_map(|(choice, bucket)| Some((choice, free(&bucket)?)))
        else {
            return false;
        };
        // Passed first: a lookup must not end before it gets there.
        for bucket in self.sequence(hash).take(choice) {
            bucket.passed.store(bucket.passed.load() + 1);
        }
        if let Some(bucket) = self.sequence(hash).nth(choice) {
            bucket.entries[entry].store(place_word(hash, number));
        }
        true
    }

    fn take_place(&self, number: u32, key: ExceptionKey) {
        let hash = key.hash(self.exceptions.seed);
        let wanted = place_word(hash, number);
        for (choice, bucket) in self.sequence(hash).enumerate() {
            let Some(entry) = bucket.entries.iter().find(|entry| entry.load() == wanted) else { continue };
            entry.store(0);
            for bucket in self.sequence(hash).take(choice) {
                bucket.passed.store(bucket.passed.load().saturating_sub(1));
            }
            return;
        }
    }
}

/// Tables without exceptions, for so many farms.
pub(super) fn no_masks(farms: usize) -> Vec<ExceptionMasksWords> {
    let none = |_| ExceptionMasksWords { count: Word::new(0), masks: [const { Word::new(0) }; _] };
    (0..farms).map(none).collect()
}

/// An empty index for so many records.
pub(super) fn no_index(records: u32) -> Vec<ExceptionBucketWords> {
    let none = |_| ExceptionBucketWords { entries: [const { Word::new(0) }; _], passed: Word::new(0) };
    (0..exception_buckets(records)).map(none).collect()
}

/// So many records that say nothing.
pub(super) fn no_records(records: u32) -> Vec<ExceptionWords> {
    let none = |_| ExceptionWords {
        addresses: Word::new(0),
        rest: Word::new(0),
        installers: [const { Word::new(0) }; _],
    };
    (0..records).map(none).collect()
}

impl ExceptionWords {
    fn words(exception: &Exception) -> [u64; 4] {
        // SAFETY: both are 32 bytes without padding.
        unsafe { core::mem::transmute::<Exception, [u64; 4]>(*exception) }
    }

    /// Writes a record that was free; what makes it valid comes last.
    fn fill(&self, exception: &Exception) {
        let [addresses, rest, first, second] = Self::words(exception);
        self.addresses.store(addresses);
        self.installers[0].store(first);
        self.installers[1].store(second);
        self.rest.store(rest);
    }

    /// Changes state and installers of a record: a packet sees the old ones or the new ones.
    fn change(&self, exception: &Exception) {
        let [_, rest, first, second] = Self::words(exception);
        if exception.state == EXCEPTION_GLOBAL {
            put(&self.rest, rest);
        }
        put(&self.installers[0], first);
        put(&self.installers[1], second);
        put(&self.rest, rest);
    }

    /// Frees a record.
    fn clear(&self) {
        put(&self.rest, 0);
        put(&self.addresses, 0);
        self.installers.iter().for_each(|word| put(word, 0));
    }
}

/// Writes what differs: most of the memory has never been touched.
fn put(word: &Word, value: u64) {
    if word.load() != value {
        word.store(value);
    }
}
