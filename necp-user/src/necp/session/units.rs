//! The units of a message, basic or wide, as they are on the wire.

use crate::necp::message::Operation;
use crate::necp::wire::{Opcode, UNIT_LEN, Unit, WIDE_UNIT_LEN, WideUnit};

/// How the units of a message are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Form {
    /// §5.2.3.1.
    #[default]
    Basic,
    /// The extension's.
    Wide,
}

impl Form {
    pub(super) const fn unit_len(self) -> usize {
        match self {
            Self::Basic => UNIT_LEN,
            Self::Wide => WIDE_UNIT_LEN,
        }
    }
}

/// One unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AnyUnit {
    Basic(Unit),
    Wide(WideUnit),
}

impl AnyUnit {
    /// What it asks for, if it is well formed and of a request that is made of operations.
    pub(super) fn operation(&self, opcode: Opcode) -> Option<Operation> {
        match self {
            Self::Basic(unit) => Operation::parse(opcode, unit),
            Self::Wide(unit) => Operation::parse_wide(opcode, unit),
        }
    }
}

/// Units, all of one form.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Units {
    form: Form,
    bytes: Vec<u8>,
}

impl Units {
    pub(super) fn new(form: Form) -> Self {
        Self { form, bytes: Vec::new() }
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len() / self.form.unit_len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// One after the other, as they are sent.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes held.
    pub(super) fn held_bytes(&self) -> usize {
        self.bytes.capacity()
    }

    /// Appends one; one of another form, which no message can have, is left out.
    pub(super) fn push(&mut self, unit: &AnyUnit) {
        match (self.form, unit) {
            (Form::Basic, AnyUnit::Basic(unit)) => self.bytes.extend_from_slice(&unit.encode()),
            (Form::Wide, AnyUnit::Wide(unit)) => self.bytes.extend_from_slice(&unit.0),
            _ => debug_assert!(false, "a message has units of one form"),
        }
    }

    /// Appends `count` units of `other`, which is of the same form, from the first one on.
    pub(super) fn extend(&mut self, other: &Self, count: usize) {
        self.bytes.extend_from_slice(&other.bytes[..count * self.form.unit_len()]);
    }

    /// Those with a true beside them.
    pub(super) fn filtered(&self, wanted: &[bool]) -> Self {
        let chunks = self.bytes.chunks_exact(self.form.unit_len()).zip(wanted);
        Self {
            form: self.form,
            bytes: chunks.filter(|(_, wanted)| **wanted).flat_map(|(unit, _)| unit).copied().collect(),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = AnyUnit> {
        self.bytes.chunks_exact(self.form.unit_len()).map(|bytes| match self.form {
            Form::Basic => AnyUnit::Basic(Unit::decode(bytes.try_into().expect("a chunk of this length"))),
            Form::Wide => AnyUnit::Wide(WideUnit(bytes.try_into().expect("a chunk of this length"))),
        })
    }
}

impl From<&[Unit]> for Units {
    fn from(units: &[Unit]) -> Self {
        Self { form: Form::Basic, bytes: units.iter().flat_map(Unit::encode).collect() }
    }
}

impl From<&[WideUnit]> for Units {
    fn from(units: &[WideUnit]) -> Self {
        Self { form: Form::Wide, bytes: units.iter().flat_map(|unit| unit.0).collect() }
    }
}
