//! Random and mutated peers without the key: no event, ever.

use proptest::prelude::*;

use super::*;

/// What somebody on the way can do with what was recorded, and with bytes of his own.
#[derive(Debug, Clone)]
enum Forgery {
    Bytes(Vec<u8>),
    /// A recorded message of this session, as it was.
    Again(usize),
    /// One with some bytes changed.
    Changed(usize, Vec<(usize, u8)>),
    /// One cut short, or two run together.
    Cut(usize, usize),
    /// A well-formed message without a credential, or with a random one.
    Forged {
        opcode: u8,
        seq: u64,
        credential: Option<[u8; 20]>,
    },
    Time(u64),
}

fn forgery() -> impl Strategy<Value = Forgery> {
    let changes = prop::collection::vec((any::<usize>(), 1u8..), 1..4);
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..80).prop_map(Forgery::Bytes),
        2 => any::<usize>().prop_map(Forgery::Again),
        4 => (any::<usize>(), changes).prop_map(|(which, changes)| Forgery::Changed(which, changes)),
        1 => (any::<usize>(), 1usize..100).prop_map(|(which, at)| Forgery::Cut(which, at)),
        4 => (0u8..0x28, 0u64..20, prop::option::of(any::<[u8; 20]>()))
            .prop_map(|(opcode, seq, credential)| Forgery::Forged { opcode, seq: TO_NE + seq, credential }),
        1 => (0u64..3_000).prop_map(Forgery::Time),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn without_the_key_nothing_is_executed(
        forgeries in prop::collection::vec(forgery(), 1..12),
        open in any::<bool>(),
    ) {
        let mut ne = if open { Ne::confirmed() } else { Ne::secured(SessionConfig::default(), &key()) };
        let recorded = [hex(INIT), hex(START), hex(STOP)];
        // What was sent in this session already; before it is open, nothing but the INIT of an older one.
        let recorded = if open { &recorded[..2] } else { &recorded[..1] };
        for forgery in forgeries {
            match forgery {
                Forgery::Bytes(bytes) => ne.input(&bytes),
                Forgery::Again(which) => ne.input(&recorded[which % recorded.len()]),
                Forgery::Changed(which, changes) => {
                    let mut bytes = recorded[which % recorded.len()].clone();
                    for (at, change) in changes {
                        let at = at % bytes.len();
                        bytes[at] ^= change;
                    }
                    ne.input(&bytes);
                }
                Forgery::Cut(which, at) => {
                    let bytes = &recorded[which % recorded.len()];
                    ne.input(&bytes[..at.min(bytes.len())]);
                }
                Forgery::Forged { opcode, seq, credential } => {
                    let flags = if credential.is_some() { Flags::AUTH_CREDENTIAL_PROVIDED } else { Flags::NONE };
                    let plain = Header::new(Opcode(opcode), flags, 5, 1);
                    let length = plain.payload_len + if credential.is_some() { 20 } else { 0 };
                    ne.input(&Header { seq_num: seq, payload_len: length, ..plain }.encode());
                    ne.input(&offer("tcp/81").unit().encode());
                    ne.input(&credential.map_or(Vec::new(), |credential| credential.to_vec()));
                }
                Forgery::Time(millis) => ne.pass(Duration::from_millis(millis)),
            }
            for event in ne.events() {
                prop_assert!(is_harmless(&event), "{event:?}");
            }
            prop_assert!(ne.session.held_bytes() < 1 << 20);
        }
        prop_assert_eq!(ne.session.started().count(), usize::from(open));
    }
}
