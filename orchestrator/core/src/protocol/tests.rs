use std::path::Path;

use super::recovery::{self, Evidence};
use super::*;
use crate::journal::Stage;
use crate::phase::Phase;

/// Compares with what is committed; with `UPDATE=1` writes it instead.
fn pinned(path: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, found).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        committed,
        found,
        "{} does not match: UPDATE=1 cargo test -p migrate-core protocol",
        path.display()
    );
}

#[test]
fn every_pair_is_pinned() {
    pinned("src/protocol/source.txt", &list::<source::Step>());
    pinned("src/protocol/destination.txt", &list::<destination::Step>());
}

#[test]
fn every_decision_of_recovery_is_pinned() {
    let stages = [
        Stage::Preparing,
        Stage::HandedOver,
        Stage::Owned,
        Stage::Done,
        Stage::Undone,
    ];
    let mut out = String::new();
    for stage in stages {
        let _ = writeln!(out, "source {stage:?}: {:?}", recovery::source(stage));
        let _ = writeln!(out, "told {stage:?}: {:?}", recovery::told(stage));
        let found = recovery::destination(stage);
        let _ = writeln!(out, "destination {stage:?}: {found:?}");
    }
    for record in stages.map(Some).into_iter().chain([None]) {
        let _ = writeln!(
            out,
            "asked with {record:?}: {:?}",
            recovery::verdict(record)
        );
        for own in stages {
            let may = recovery::may_write(record, own);
            let _ = writeln!(out, "{own:?} over {record:?}: {may}");
        }
    }
    for let_go in [false, true] {
        for alive in [false, true] {
            for (connected, in_repair) in [(0, 0), (2, 0), (2, 1), (2, 2)] {
                for complete in [false, true] {
                    let found = Evidence {
                        let_go,
                        alive,
                        connected,
                        in_repair,
                        complete,
                    };
                    let _ = writeln!(out, "{found:?}: {:?}", recovery::examined(found));
                }
            }
        }
    }
    pinned("src/protocol/recovery.txt", &out);
}

#[test]
fn the_diagrams_of_the_documentation_are_the_tables() {
    let path = "../../docs/ARCHITECTURE.md";
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let mut text = text.as_str();
    let mut fresh = String::new();
    for (name, drawn) in [
        ("source", draw::<source::Step>()),
        ("destination", draw::<destination::Step>()),
    ] {
        let begin = format!("<!-- the {name}'s table, drawn by a test -->\n```mermaid\n");
        let (before, rest) = text.split_once(&begin).expect("the diagram's beginning");
        let (_, rest) = rest.split_once("```\n").expect("the diagram's end");
        fresh += &format!("{before}{begin}{drawn}```\n");
        text = rest;
    }
    pinned(path, &(fresh + text));
}

/// No two arrows for one pair, everything reachable, an end from everywhere.
fn is_sound<S: Machine>() {
    for row in S::TABLE {
        let same = S::TABLE
            .iter()
            .filter(|other| (other.from, other.on) == (row.from, row.on));
        assert_eq!(same.count(), 1, "{row:?}");
    }
    for step in S::ALL {
        assert!(
            before(*step).contains(&S::ALL[0]),
            "{step:?} is never reached"
        );
        let mut ends = S::ALL.iter().filter(|step| step.is_end());
        assert!(
            ends.any(|end| before(*end).contains(step)),
            "{step:?} never ends"
        );
    }
}

#[test]
fn the_tables_are_sound() {
    is_sound::<source::Step>();
    is_sound::<destination::Step>();
}

#[test]
fn go_is_sent_behind_a_closed_fence_a_record_and_a_withdrawn_address() {
    use source::Step;
    let way: Vec<Step> = Step::TABLE
        .iter()
        .filter(|row| row.to == Step::Go)
        .map(|row| row.from)
        .collect();
    assert_eq!(way, [Step::Withdraw]);
    for (step, only_before) in [
        (Step::Withdraw, Step::Record),
        (Step::Record, Step::Prove),
        (Step::Prove, Step::Fence),
    ] {
        for row in Step::TABLE.iter().filter(|row| row.to == step) {
            assert_eq!(row.from, only_before);
        }
    }
}

#[test]
fn after_go_only_the_destinations_word_leads_back() {
    use source::{Event, Step};
    for row in Step::TABLE {
        if row.to == Step::TakeBack && row.from >= Step::Go {
            assert_eq!(row.on, Event::SaysNever, "{row:?}");
        }
        if row.to.phase() == Phase::Undecided {
            assert!(row.from >= Step::Go, "{row:?}");
        }
    }
}

#[test]
fn the_destination_undoes_nothing_once_it_owns() {
    use destination::Step;
    let undone = before(Step::Undo);
    for step in Step::ALL {
        if *step >= Step::Open && *step < Step::Undo {
            assert!(!undone.contains(step), "{step:?}");
        }
    }
}
