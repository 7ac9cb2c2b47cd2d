//! The atomicity rules of the flow table and the slot word, under every interleaving of a few parties.
//!
//! Every access to a shared word is one step; [`necp_tests::schedule`] tries all orders with a bounded number of
//! preemptions. After each, nothing that a packet was promised may be lost.

use std::{
    fmt::Debug,
    time::{Duration, Instant},
};

use necp_ebpf::{
    abi::{DIRECT, NONE},
    flows::{FlowWord, MAX_AGE, State},
    packet::{Packet, tcp},
    slot::{SlotWord, TRACKED},
    tables::NextHop,
    verdict::Reason,
};
use necp_tests::{
    contention::{Bed, M, N, O, tables},
    oracle::clients::{segment, syn},
    schedule::explore,
};

const ISN: u32 = 1000;

/// Runs the threads under all schedules, and says how many those were.
fn explored(
    name: &str,
    bound: u32,
    bed: &Bed<'_>,
    threads: &[&(dyn Fn() + Sync)],
    check: &dyn Fn() -> Result<(), String>,
) {
    let begun = Instant::now();
    let result = explore(bound, threads, &|| bed.reset(), &|| bed.sound().and_then(|()| check()));
    match result {
        Ok(explored) => println!(
            "{name}: {} schedules of at most {} accesses, {} in {:.1} s",
            explored.schedules,
            explored.longest,
            if explored.exhaustive { "all".into() } else { format!("at most {} preemptions", explored.bound) },
            begun.elapsed().as_secs_f64()
        ),
        Err(failure) => panic!("{name}: {}\nafter this schedule: {}", failure.message, failure.schedule),
    }
}

fn same<T: PartialEq + Debug>(what: &str, found: T, wanted: T) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("{what}: {found:?} instead of {wanted:?}")) }
}

fn data(client: u8, sequence: u32) -> Packet {
    segment(client, tcp::ACK, sequence, 100)
}

fn changed() -> SlotWord {
    SlotWord::plain(N).with_legacy(O)
}

#[test]
fn a_flow_records_itself_while_its_slot_is_collected() {
    let mut owned = tables(1);
    let flow = data(0, 5000);
    let bed = Bed::new(owned.view(), changed(), &[]);
    explored(
        "a first packet after the change, and a collection",
        3,
        &bed,
        &[&|| bed.packet(0, flow), &|| bed.collect(Duration::ZERO)],
        &|| {
            same("the packet", bed.went(0), (O, Reason::Adopted))?;
            same("the record", bed.found(&flow)[1].server(), O)?;
            bed.tracked_if_on_record(&flow)?;
            bed.collect(Duration::from_secs(1));
            same("its next packet", bed.next(flow), O)
        },
    );
}

#[test]
fn a_recorded_flow_stays_while_its_slot_is_collected() {
    let mut owned = tables(1);
    let record = (data(0, 0), FlowWord::record(O, 77, false));
    let bed = Bed::new(owned.view(), SlotWord::plain(N).with_bits(TRACKED, 0), &[record]);
    explored(
        "a recorded flow's packets and a collection",
        3,
        &bed,
        &[
            &|| {
                bed.packet(0, data(0, 5000));
                bed.packet(1, data(0, 5100));
            },
            &|| bed.collect(Duration::ZERO),
        ],
        &|| {
            same("its packets", (bed.went(0), bed.went(1)), ((O, Reason::Record), (O, Reason::Record)))?;
            bed.tracked_if_on_record(&data(0, 0))
        },
    );
}

#[test]
fn a_legacy_goes_while_a_flow_records_itself() {
    // The legacy's time is over: the packet was in time, or it was not, but whatever it wrote must count.
    let mut owned = tables(1);
    let flow = data(0, 5000);
    let bed = Bed::new(owned.view(), changed(), &[]);
    explored(
        "a first packet, and the end of the legacy",
        3,
        &bed,
        &[&|| bed.packet(0, flow), &|| bed.collect(Duration::from_secs(8000))],
        &|| {
            let (server, reason) = bed.went(0);
            match reason {
                Reason::Adopted => same("its next packet", (server, bed.next(flow)), (O, O)),
                _ => same("a packet after its time", (server, bed.next(flow)), (N, N)),
            }?;
            bed.tracked_if_on_record(&flow)
        },
    );
}

#[test]
fn two_flows_take_entries_of_one_bucket() {
    let mut owned = tables(1);
    let flows = [data(0, 5000), data(1, 6000)];
    let bed = Bed::new(owned.view(), changed(), &[]);
    explored("two flows in one bucket", 3, &bed, &[&|| bed.packet(0, flows[0]), &|| bed.packet(1, flows[1])], &|| {
        for flow in flows {
            same("the record", bed.found(&flow)[1].server(), O)?;
            bed.tracked_if_on_record(&flow)?;
            bed.change_owner(M);
            same("its next packet", bed.next(flow), O)?;
        }
        Ok(())
    });
}

#[test]
fn two_processors_adopt_one_flow() {
    for buckets in [1, 2] {
        let mut owned = tables(buckets);
        let flow = data(0, 5000);
        let bed = Bed::new(owned.view(), changed(), &[]);
        explored(
            &format!("one flow adopted twice, {buckets} buckets"),
            3,
            &bed,
            &[&|| bed.packet(0, flow), &|| bed.packet(1, flow)],
            &|| {
                same("both packets", (bed.went(0).0, bed.went(1).0), (O, O))?;
                same("the record", bed.found(&flow)[1].server(), O)?;
                reused(&bed, 0)
            },
        );
    }
}

#[test]
fn two_processors_confirm_one_flow() {
    let record = (data(0, 0), FlowWord::record(O, 77, false));
    let candidate = (data(0, 0), FlowWord::candidate(N, &syn(0, ISN, 0)));
    for entries in [vec![candidate], vec![record, candidate], vec![candidate, record]] {
        let mut owned = tables(1);
        let bed = Bed::new(owned.view(), changed(), &entries);
        let first = data(0, ISN + 1);
        explored(
            &format!("one flow confirmed twice, {} entries", entries.len()),
            3,
            &bed,
            &[&|| bed.packet(0, first), &|| bed.packet(1, first)],
            &|| {
                same("both packets", (bed.went(0).0, bed.went(1).0), (N, N))?;
                same("its next packet", bed.next(data(0, ISN + 101)), N)?;
                reused(&bed, 0)
            },
        );
    }
}

/// The tuple is used again, for a flow that the table says by itself: nothing of the old flow may come back.
fn reused(bed: &Bed<'_>, client: u8) -> Result<(), String> {
    const AGAIN: u32 = 500_000;
    bed.change_owner(M);
    same("the reused tuple's SYN", bed.next(syn(client, AGAIN, 0)), M)?;
    same("its first packet", bed.next(data(client, AGAIN + 1)), M)?;
    for slot in bed.view.slots() {
        slot.store(SlotWord::plain(M).with_bits(TRACKED, 0).0);
    }
    same("its second packet", bed.next(data(client, AGAIN + 101)), M)?;
    bed.collect(Duration::from_secs(1));
    same("its third packet, after a collection", bed.next(data(client, AGAIN + 201)), M)
}

#[test]
fn an_owner_changes_while_a_syn_proposes() {
    for (name, slot) in [("plain", SlotWord::plain(O)), ("changed", SlotWord::plain(O).with_legacy(M))] {
        let mut owned = tables(1);
        let bed = Bed::new(owned.view(), slot, &[]);
        explored(
            &format!("a SYN and its answer, {name} slot, and a change of owner and back"),
            3,
            &bed,
            &[
                &|| {
                    bed.packet(0, syn(0, ISN, 0));
                    bed.packet(1, data(0, ISN + 1));
                },
                &|| {
                    bed.change_owner(N);
                    bed.change_owner(O);
                },
            ],
            &|| {
                let (server, _) = bed.went(0);
                same("its first packet", bed.went(1).0, server)?;
                same("its next packet", bed.next(data(0, ISN + 101)), server)?;
                bed.tracked_if_on_record(&data(0, 0))?;
                bed.change_owner(M);
                same("its packet after one more change", bed.next(data(0, ISN + 201)), server)
            },
        );
    }
}

#[test]
fn an_idle_record_is_condemned_while_its_packet_comes() {
    let idle = (data(0, 0), FlowWord::record(O, ISN, false).with_age(MAX_AGE));
    let mut owned = tables(1);
    let slot = SlotWord::plain(N).with_bits(TRACKED, 0);
    let bed = Bed::new(owned.view(), slot, &[idle]);
    explored(
        "an idle record, its packet and a collection",
        3,
        &bed,
        &[&|| bed.packet(0, data(0, 5000)), &|| bed.collect(Duration::from_secs(8000))],
        &|| {
            let (server, _) = bed.went(0);
            // In time: the record stays or went, but who found it was sent by it. Too late: as if it had never been.
            same("the server", server == O || server == N, true)?;
            match bed.found(&data(0, 0))[1].state() {
                State::Record => same("its next packet", (bed.next(data(0, 5100)), server), (O, O)),
                _ => same("its next packet", bed.next(data(0, 5100)), N),
            }?;
            bed.tracked_if_on_record(&data(0, 0))
        },
    );
}

#[test]
fn an_idle_record_is_condemned_while_its_tuple_is_used_again() {
    let idle = (data(0, 0), FlowWord::record(O, 77, false).with_age(MAX_AGE));
    let candidate = (data(0, 0), FlowWord::candidate(N, &syn(0, ISN, 0)));
    for entries in [vec![idle, candidate], vec![candidate, idle]] {
        let mut owned = tables(1);
        let slot = SlotWord::plain(M).with_bits(TRACKED, 0);
        let bed = Bed::new(owned.view(), slot, &entries);
        explored(
            "an idle record, its tuple's new flow and a collection",
            3,
            &bed,
            &[&|| bed.packet(0, data(0, ISN + 1)), &|| bed.collect(Duration::from_secs(8000))],
            &|| {
                same("its first packet", bed.went(0), (N, Reason::Confirmed))?;
                same("its next packet", bed.next(data(0, ISN + 101)), N)?;
                bed.tracked_if_on_record(&data(0, 0))
            },
        );
    }
}

#[test]
fn an_idle_record_is_condemned_while_its_tuple_begins_anew() {
    let idle = (data(0, 0), FlowWord::record(O, 77, false).with_age(MAX_AGE));
    let mut owned = tables(1);
    let bed = Bed::new(owned.view(), SlotWord::plain(N).with_legacy(M), &[idle]);
    explored(
        "an idle record, its tuple's SYN and first packet, and a collection",
        2,
        &bed,
        &[
            &|| {
                bed.packet(0, syn(0, ISN, 0));
                bed.packet(1, data(0, ISN + 1));
            },
            &|| bed.collect(Duration::from_secs(8000)),
        ],
        &|| {
            same("its SYN and first packet", (bed.went(0).0, bed.went(1).0), (N, N))?;
            bed.change_owner(O);
            same("its next packet", bed.next(data(0, ISN + 101)), N)?;
            bed.tracked_if_on_record(&data(0, 0))
        },
    );
}

#[test]
fn an_old_flow_is_adopted_while_its_tuple_begins_anew() {
    for buckets in [1, 2] {
        let mut owned = tables(buckets);
        let bed = Bed::new(owned.view(), changed(), &[]);
        explored(
            &format!("an old flow's packet and its tuple's SYN, {buckets} buckets"),
            3,
            &bed,
            &[&|| bed.packet(0, data(0, 5000)), &|| bed.packet(1, syn(0, ISN, 0))],
            &|| {
                same("the old flow's packet and the SYN", (bed.went(0).0, bed.went(1).0), (O, N))?;
                same("the new flow's first packet", bed.next(data(0, ISN + 1)), N)?;
                same("its next packet", bed.next(data(0, ISN + 101)), N)?;
                reused(&bed, 0)
            },
        );
    }
}

#[test]
fn a_dead_record_is_condemned_while_its_tuple_is_adopted() {
    let dead = (data(0, 0), FlowWord::record(M, 77, false));
    let mut owned = tables(1);
    let bed = Bed::new(owned.view(), changed(), &[dead]);
    bed.view.set_next_hop(M, NextHop::new([2, 0, 0, 0, 0, 4], 0, 0));
    explored(
        "a dead record, its tuple's packet and a collection",
        3,
        &bed,
        &[&|| bed.packet(0, data(0, 5000)), &|| bed.collect(Duration::ZERO)],
        &|| {
            same("the packet", bed.went(0), (O, Reason::Adopted))?;
            same("its record", bed.found(&data(0, 0))[1].server(), O)?;
            bed.tracked_if_on_record(&data(0, 0))
        },
    );
}

#[test]
fn a_candidate_is_overwritten_while_it_is_confirmed() {
    let others = (1..4).map(|client| (data(client, 0), FlowWord::record(O, 0, false)));
    let candidate = (data(0, 0), FlowWord::candidate(N, &syn(0, ISN, 0)));
    let entries: Vec<_> = others.chain([candidate]).collect();
    let mut owned = tables(1);
    let bed = Bed::new(owned.view(), changed(), &entries);
    explored(
        "a candidate overwritten and confirmed",
        3,
        &bed,
        &[&|| bed.packet(0, data(0, ISN + 1)), &|| bed.packet(1, syn(5, 9000, 0))],
        &|| {
            for client in 1..4 {
                same("another flow's record", bed.found(&data(client, 0))[1].server(), O)?;
            }
            let (server, reason) = bed.went(0);
            let [_, record] = bed.found(&data(0, 0));
            match reason {
                // Confirmed in time, or in the other candidate's place: then that is gone, or never was.
                Reason::Confirmed if record.state() == State::Record => {
                    same("its next packet", (server, bed.next(data(0, ISN + 101))), (N, N))?;
                    let other = bed.went(1);
                    same("the other SYN", other == (O, Reason::NewUnrecorded) || other == (N, Reason::New), true)
                }
                // Seen, and overwritten before it could become a record: there is no room for one.
                Reason::Confirmed => same("the other's candidate", bed.found(&syn(5, 0, 0))[0].server(), N),
                // Overwritten in time, and the new candidate overwritten in turn by the record of the flow as an old one.
                Reason::Adopted => same("its next packet", (server, bed.next(data(0, ISN + 101))), (O, O)),
                Reason::Legacy => same("the other's candidate", (server, bed.found(&syn(5, 0, 0))[0].server()), (O, N)),
                other => Err(format!("{other:?}")),
            }
        },
    );
}

#[test]
fn an_entry_changes_hands_while_it_is_read() {
    // Client 0's candidate is the only entry that can be taken: client 5 takes it, and a third reads meanwhile.
    let others = (1..4).map(|client| (data(client, 0), FlowWord::record(M, 0, false)));
    let candidate = (data(0, 0), FlowWord::candidate(N, &syn(0, ISN, 0)));
    let entries: Vec<_> = others.chain([candidate]).collect();
    let mut owned = tables(1);
    let bed = Bed::new(owned.view(), changed(), &entries);
    // Its number confirms client 5's candidate, should somebody read that as client 0's.
    let reader = data(0, 9001);
    explored(
        "an entry changes hands twice while its first owner's packet reads it",
        2,
        &bed,
        &[
            &|| bed.packet(0, reader),
            &|| {
                bed.packet(1, syn(5, 9000, 0));
                bed.packet(2, data(5, 9001));
            },
            &|| bed.packet(3, data(5, 9001)),
        ],
        &|| {
            let (server, reason) = bed.went(0);
            same("the reader", (server, reason == Reason::Confirmed), (O, false))?;
            for client in 1..4 {
                same("another flow's record", bed.found(&data(client, 0))[1].server(), M)?;
            }
            let record = bed.found(&data(5, 0))[1];
            same("client 5's record", [NONE, DIRECT, O, N].contains(&record.server()), true)
        },
    );
}
