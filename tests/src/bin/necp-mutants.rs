//! Takes the rules of just-enough tracking and of interception away one by one and requires that a test notices.
//!
//! `cargo run -p necp-tests --bin necp-mutants [PART OF A RULE'S NAME]...`, from the workspace's root. The sources are copied
//! and changed in the copy. Takes about half a minute a rule, so it is not part of `cargo xtask test`.

use std::{
    collections::BTreeSet,
    env, fs,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail, ensure};

/// A rule, and how to break it.
struct Mutant {
    rule: &'static str,
    /// The test that must notice.
    test: &'static str,
    /// (file, what stands there once, what shall stand there).
    edits: &'static [(&'static str, &'static str, &'static str)],
}

const STEER: &str = "necp-ebpf/src/steer.rs";
const CHOICE: &str = "necp-ebpf/src/choice.rs";
const EXCEPTIONS: &str = "necp-ebpf/src/exceptions.rs";
const FLOWS: &str = "necp-ebpf/src/flows.rs";
const SLOT: &str = "necp-ebpf/src/slot.rs";
const COLLECT: &str = "necp-user/src/control/collect.rs";
const HISTORIES: &str = "property_tracking";
const SCHEDULES: &str = "property_interleaving";
const PACKETS: &str = "packets";
const FRAMES: &str = "packet_frames";
const INTERCEPT: &str = "necp-ebpf/src/intercept.rs";
const SIX_INTERCEPT: &str = "necp-ebpf/src/six/intercept.rs";

const MUTANTS: &[Mutant] = &[
    Mutant {
        rule: "only the SYN's number + 1 confirms a candidate",
        test: HISTORIES,
        edits: &[(FLOWS, ".wrapping_sub(1) <= syn_data", ".wrapping_sub(1) <= syn_data || true")],
    },
    Mutant {
        rule: "the SYN's own data may be skipped",
        test: HISTORIES,
        edits: &[(FLOWS, ".wrapping_sub(1) <= syn_data", ".wrapping_sub(1) <= syn_data * 0")],
    },
    Mutant {
        rule: "a flow that goes to the legacy records itself",
        test: HISTORIES,
        edits: &[(
            STEER,
            "reason: Reason::Adopted, write, forget: false",
            "reason: Reason::Adopted, write: { let _ = write; Write::Nothing }, forget: false",
        )],
    },
    Mutant {
        rule: "whoever writes an entry sets TRACKED",
        test: HISTORIES,
        edits: &[(STEER, "        self.slot.set_bits(TRACKED);\n", "        let _ = TRACKED;\n")],
    },
    Mutant {
        rule: "a living legacy is looked at",
        test: HISTORIES,
        edits: &[(
            STEER,
            "        if self.living(legacy) {\n            // It",
            "        if false && self.living(legacy) {\n            // It",
        )],
    },
    Mutant {
        rule: "a record is looked at",
        test: HISTORIES,
        edits: &[(
            STEER,
            "        let record = living.record;\n        if record != FlowWord::EMPTY {\n            return Ruling { server: record.server(), reason: Reason::Record, write: Write::Touch, forget: false };\n        }\n        let legacy",
            "        let legacy",
        )],
    },
    Mutant {
        rule: "a confirmed candidate replaces the record",
        test: HISTORIES,
        edits: &[(
            STEER,
            "if candidate != FlowWord::EMPTY && candidate.confirmed_by(",
            "if candidate != FlowWord::EMPTY && living.record == FlowWord::EMPTY && candidate.confirmed_by(",
        )],
    },
    Mutant {
        rule: "dead servers' entries do not count",
        test: HISTORIES,
        edits: &[(STEER, "if value != FlowWord::EMPTY && self.alive(value.server())", "if value != FlowWord::EMPTY")],
    },
    Mutant {
        rule: "the same SYN again: the candidate's server",
        test: HISTORIES,
        edits: &[(
            STEER,
            "if candidate != FlowWord::EMPTY && candidate.isn() == isn",
            "if false && candidate.isn() == isn",
        )],
    },
    Mutant {
        rule: "the same SYN again: the record's server",
        test: HISTORIES,
        edits: &[(STEER, "if record.isn() == isn", "if false && record.isn() == isn")],
    },
    Mutant {
        rule: "a SYN on a changed slot proposes",
        test: HISTORIES,
        edits: &[(STEER, " || self.word.legacy() != NONE {\n            // Its", " {\n            // Its")],
    },
    Mutant {
        rule: "a SYN of a tuple on record proposes",
        test: HISTORIES,
        edits: &[(STEER, "if always || record != FlowWord::EMPTY || chosen", "if always || chosen")],
    },
    Mutant {
        rule: "a SYN that goes past its owner proposes",
        test: HISTORIES,
        edits: &[(STEER, " || chosen != self.word.owner() ||", " ||")],
    },
    Mutant {
        rule: "a SYN that needs no record takes its tuple's old candidate away",
        // Only a packet with the number that confirms the old candidate would tell, and histories use no number twice.
        test: PACKETS,
        edits: &[(
            STEER,
            "Ruling { forget: true, ..ruling(chosen, Reason::New, Write::Nothing) }",
            "ruling(chosen, Reason::New, Write::Nothing)",
        )],
    },
    Mutant {
        rule: "who does not accept new flows gets none",
        test: HISTORIES,
        edits: &[(
            CHOICE,
            "let wanted = ALIVE | ACCEPTS | REACHABLE;",
            "let wanted = (ALIVE | ACCEPTS | REACHABLE) & !ACCEPTS;",
        )],
    },
    Mutant {
        rule: "UDP flows stay by their record",
        test: HISTORIES,
        edits: &[
            (
                STEER,
                "if record == FlowWord::EMPTY {\n            return None;",
                "if record == record {\n            return None;",
            ),
            (
                STEER,
                "        let record = living.record;\n        if record != FlowWord::EMPTY {\n            return Ruling { server: record.server(), reason: Reason::Record, write: Write::Touch, forget: false };\n        }\n        // What",
                "        let _ = living;\n        // What",
            ),
        ],
    },
    Mutant {
        rule: "a global exception cuts a new flow through",
        test: HISTORIES,
        edits: &[(CHOICE, "if matches & GLOBAL != 0", "if false && matches & GLOBAL != 0")],
    },
    Mutant {
        rule: "a local exception takes its installers out of the choice",
        test: HISTORIES,
        edits: &[(CHOICE, "matches != 0 && tables.excludes", "false && tables.excludes")],
    },
    Mutant {
        rule: "every local exception of a flow counts",
        test: HISTORIES,
        edits: &[(EXCEPTIONS, "Some(_) => matches |= 1 << index", "Some(_) => matches = 1 << index")],
    },
    Mutant {
        rule: "an exception for any port is for all",
        test: HISTORIES,
        edits: &[(EXCEPTIONS, "(self.byte(3) & 1).wrapping_neg() & 0xffff", "0xffff")],
    },
    Mutant {
        rule: "an exception is not for established flows",
        test: HISTORIES,
        edits: &[(
            STEER,
            "return at.forward(owner, Reason::Plain, false);",
            "return at.forward(at.choose().server(), Reason::Plain, false);",
        )],
    },
    Mutant {
        rule: "what an exception cuts through is on record where all is",
        test: HISTORIES,
        edits: &[(STEER, "chosen.server() == DIRECT && !chosen.is_excepted()", "chosen.server() == DIRECT")],
    },
    Mutant {
        rule: "the old owner becomes the legacy",
        test: HISTORIES,
        edits: &[(SLOT, "            legacy = old;\n", "            legacy = NONE;\n")],
    },
    Mutant {
        rule: "a living legacy stays",
        test: HISTORIES,
        edits: &[(SLOT, "if legacy == NONE && old != NONE && alive(old)", "if old != NONE && alive(old)")],
    },
    Mutant {
        rule: "a change back sets TRACKED",
        test: HISTORIES,
        edits: &[(SLOT, "moved.with_legacy(NONE).with_bits(TRACKED, 0)", "moved.with_legacy(NONE)")],
    },
    Mutant {
        rule: "a change back empties the legacy",
        test: HISTORIES,
        edits: &[(
            SLOT,
            "if legacy == owner { moved.with_legacy(NONE).with_bits(TRACKED, 0) }",
            "if legacy == owner { moved.with_bits(TRACKED, 0) }",
        )],
    },
    Mutant {
        rule: "data after FIN clears closing",
        test: HISTORIES,
        edits: &[(FLOWS, "Self(young & !CLOSING)", "Self(young)")],
    },
    Mutant {
        rule: "a packet makes its record young",
        test: HISTORIES,
        edits: &[(FLOWS, "let young = self.0 & !AGE_MASK;", "let young = self.0;")],
    },
    Mutant {
        rule: "a record is never overwritten by another flow",
        test: HISTORIES,
        edits: &[
            (FLOWS, "else { self.in_state(State::Candidate) };", "else { 15 & !self.in_state(State::Busy) };"),
            (FLOWS, "else { is_in(old, State::Candidate) };", "else { 1 ^ is_in(old, State::Busy) };"),
        ],
    },
    Mutant {
        rule: "records of an owner stay while there is a legacy",
        test: HISTORIES,
        edits: &[(COLLECT, "slot.legacy() == NONE && slot.owner() == server", "slot.owner() == server")],
    },
    Mutant {
        rule: "redundant records go",
        test: HISTORIES,
        edits: &[(COLLECT, "let redundant = slot.legacy() == NONE", "let redundant = false && slot.legacy() == NONE")],
    },
    Mutant {
        rule: "an entry lives its idle time",
        test: HISTORIES,
        edits: &[(COLLECT, "(value.age() < MAX_AGE).then", "(value.age() < MAX_AGE / 2).then")],
    },
    Mutant {
        rule: "a legacy lives an idle time",
        test: HISTORIES,
        edits: &[(
            COLLECT,
            "now > since + cluster.config().farms[farm].tcp_idle",
            "now > since + cluster.config().farms[farm].tcp_idle / 2",
        )],
    },
    Mutant {
        rule: "a slot whose entries stay is tracked again",
        test: HISTORIES,
        edits: &[(COLLECT, "if kept { TRACKED } else { 0 }", "if kept { 0 } else { 0 }")],
    },
    Mutant {
        rule: "tracked slots become plain in the end",
        test: HISTORIES,
        edits: &[(COLLECT, "if kept { TRACKED } else { 0 }", "if kept { TRACKED } else { TRACKED }")],
    },
    Mutant {
        rule: "an entry's key goes with it",
        test: HISTORIES,
        edits: &[(FLOWS, "            self.key.store(0);\n", "")],
    },
    Mutant {
        rule: "insert first, TRACKED then",
        test: SCHEDULES,
        edits: &[
            (STEER, "        self.slot.set_bits(TRACKED);\n", ""),
            (STEER, "        let written = found", "        self.slot.set_bits(TRACKED);\n        let written = found"),
        ],
    },
    Mutant {
        rule: "COLLECTING means tracked",
        test: SCHEDULES,
        edits: &[(SLOT, "self.0 & !ID_MASK == 0", "self.0 & !(ID_MASK | COLLECTING) == 0")],
    },
    Mutant {
        rule: "TRACKED goes before the scan",
        test: SCHEDULES,
        edits: &[
            (
                COLLECT,
                "old.with_bits(COLLECTING, TRACKED)\n            } else {",
                "old.with_bits(COLLECTING, 0)\n            } else {",
            ),
            (
                COLLECT,
                "if kept { TRACKED } else { 0 }, COLLECTING",
                "if kept { TRACKED } else { 0 }, COLLECTING | TRACKED",
            ),
        ],
    },
    Mutant {
        rule: "condemned by compare-and-swap",
        test: SCHEDULES,
        edits: &[(
            FLOWS,
            "let condemned = self.replace(old, FlowWord(BUSY));",
            "let condemned = old != FlowWord::EMPTY;\n        self.word.store(BUSY);",
        )],
    },
    Mutant {
        rule: "an entry is claimed before it is filled",
        test: SCHEDULES,
        edits: &[(
            FLOWS,
            "words.word.compare_exchange(old, BUSY) != old",
            "words.word.compare_exchange(old, value.0) != old",
        )],
    },
    Mutant {
        rule: "a busy entry is nobody's",
        test: SCHEDULES,
        edits: &[(FLOWS, " & is_in(value, state) & (1", " & (1")],
    },
    Mutant {
        rule: "a free entry is taken only while it is free",
        test: SCHEDULES,
        edits: &[(
            FLOWS,
            "{ is_in(old, State::Empty) }",
            "{ 1 ^ is_in(old, State::Record) ^ is_in(old, State::Busy) }",
        )],
    },
    Mutant {
        rule: "a slot changes by compare-and-swap",
        test: SCHEDULES,
        edits: &[(
            COLLECT,
            "else { SlotWord(slot.compare_exchange(old.0, new.0)) };",
            "else { slot.store(new.0); old };",
        )],
    },
    Mutant {
        rule: "a redundant record goes only if it is alone",
        test: SCHEDULES,
        edits: &[(COLLECT, " && class.alone(view, key)", "")],
    },
    Mutant {
        rule: "intercepted: not what is for this host",
        test: FRAMES,
        edits: &[(INTERCEPT, "\n        && !tables.is_in(AddressSet::OWN, packet.destination)", "")],
    },
    Mutant {
        rule: "intercepted: not what may be a proxy's own",
        test: FRAMES,
        edits: &[(
            INTERCEPT,
            "\n        && !tables.is_in(AddressSet::servers(service.farm as u32), packet.source)",
            "",
        )],
    },
    Mutant {
        rule: "intercepted: errors go to whoever sent what they quote",
        test: FRAMES,
        edits: &[(INTERCEPT, ".filter(|quoted| quoted.source == head.packet.destination)", "")],
    },
    Mutant {
        rule: "intercepted: errors are about the other direction",
        test: FRAMES,
        edits: &[(INTERCEPT, "about(&quoted.turned_round(), tables)", "about(&quoted, tables)")],
    },
    Mutant {
        rule: "intercepted: no errors about what a VIP sent",
        test: FRAMES,
        edits: &[(
            INTERCEPT,
            "if find_service(packet, tables).is_some()",
            "if false && find_service(packet, tables).is_some()",
        )],
    },
    Mutant {
        rule: "intercepted: parts follow the first",
        test: FRAMES,
        edits: &[(INTERCEPT, "    remember(device, &head, decision.server, 0);\n", "    let _ = remember::<D>;\n")],
    },
    Mutant {
        rule: "intercepted, IPv6: not what is for this host",
        test: FRAMES,
        edits: &[(SIX_INTERCEPT, "\n        && !six.is_in6(AddressSet::OWN, destination)", "")],
    },
    Mutant {
        rule: "intercepted, IPv6: not what may be a proxy's own",
        test: FRAMES,
        edits: &[(SIX_INTERCEPT, "\n        && !six.is_in6(AddressSet::servers(farm), source)", "")],
    },
    Mutant {
        rule: "intercepted, IPv6: errors go to whoever sent what they quote",
        test: FRAMES,
        edits: &[(SIX_INTERCEPT, "if quoted.addresses.source != to", "if false && quoted.addresses.source != to")],
    },
    Mutant {
        rule: "intercepted, IPv6: no errors about what a VIP sent",
        test: FRAMES,
        edits: &[(
            SIX_INTERCEPT,
            "if find_service(&packet, &six).is_some()",
            "if false && find_service(&packet, &six).is_some()",
        )],
    },
];

fn main() -> Result<ExitCode> {
    let wanted: Vec<String> = env::args().skip(1).collect();
    let is_wanted = |mutant: &&Mutant| wanted.is_empty() || wanted.iter().any(|part| mutant.rule.contains(part));
    let mutants: Vec<&Mutant> = MUTANTS.iter().filter(is_wanted).collect();
    ensure!(!mutants.is_empty(), "no rule's name contains any of {wanted:?}");
    ensure!(Path::new("necp-ebpf/src").is_dir(), "run this in the workspace's root");
    let scratch = tempfile::tempdir().context("a scratch directory")?;
    copy_sources(Path::new("."), scratch.path())?;
    let target = env::current_dir()?.join("target");
    let mut survivors = 0;
    for test in mutants.iter().map(|mutant| mutant.test).collect::<BTreeSet<_>>() {
        if let Some(failure) = failure(scratch.path(), &target, test)? {
            bail!("{test} fails without any change: {failure}");
        }
    }
    for mutant in mutants {
        for (file, old, new) in mutant.edits {
            edit(&scratch.path().join(file), old, new).with_context(|| format!("{}: {file}", mutant.rule))?;
        }
        match failure(scratch.path(), &target, mutant.test)? {
            Some(failure) => println!("noticed   {} ({}: {failure})", mutant.rule, mutant.test),
            None => {
                survivors += 1;
                println!("SURVIVES  {} ({})", mutant.rule, mutant.test);
            }
        }
        for (file, ..) in mutant.edits {
            fs::copy(file, scratch.path().join(file))?;
        }
    }
    Ok(if survivors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn edit(path: &Path, old: &str, new: &str) -> Result<()> {
    let text = fs::read_to_string(path)?;
    let times = text.matches(old).count();
    ensure!(times == 1, "{old:?} stands there {times} times, not once: the table of mutants is out of date");
    fs::write(path, text.replace(old, new))?;
    Ok(())
}

/// Runs a test in the copy; what it failed with, none if it passed. An error: it could not be built.
fn failure(root: &Path, target: &Path, test: &str) -> Result<Option<String>> {
    let cargo = |args: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(["test", "--quiet", "--package", "necp-tests", "--test", test]).args(args);
        command.current_dir(root).env("CARGO_TARGET_DIR", target.join("mutants")).env("RUST_BACKTRACE", "0");
        command.env("NECP_TRACKING_CASES", env::var("NECP_TRACKING_CASES").unwrap_or_else(|_| "20000".into()));
        command.output().context("cargo")
    };
    let built = cargo(&["--no-run"])?;
    ensure!(built.status.success(), "it does not build:\n{}", String::from_utf8_lossy(&built.stderr));
    let output = cargo(&["--", "--nocapture"])?;
    if output.status.success() {
        return Ok(None);
    }
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let mut messages = text.lines().skip_while(|line| !line.contains("panicked at")).filter(|line| !line.is_empty());
    // What a flow met says more than what a count lacked.
    let first = messages.clone().nth(1);
    let message = messages.find(|line| line.starts_with("Size") || line.contains("schedule")).or(first);
    Ok(Some(message.unwrap_or("no message").chars().take(200).collect()))
}

fn copy_sources(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (name, target) = (entry.file_name(), to.join(entry.file_name()));
        if name == "target" || name == ".git" {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::create_dir_all(&target)?;
            copy_sources(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}
