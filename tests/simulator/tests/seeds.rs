//! The product's rules hold in many worlds, and wrong ones are found out.

use migrate_core::journal::Stage;
use migrate_core::protocol::{destination, recovery, source};
use migrate_simulator::{Rules, replay, run_many};

/// Runs of one test. `cargo xtask simulate` makes as many as it is told.
const RUNS: u64 = 50_000;

#[test]
fn no_seed_breaks_a_rule() {
    let tally = run_many(0, RUNS, &Rules::default());
    println!("{tally:?}");
    let tally = match tally {
        Ok(tally) => tally,
        Err(failure) => panic!(
            "{failure}: {}\n{}",
            failure.breach,
            failure.trace.join("\n")
        ),
    };
    // Not all of one kind, which would show that little is tried.
    assert!(tally.moved > RUNS / 10 && tally.stayed > RUNS / 10 && tally.undecided > 0);
    assert!(tally.lost > 0);
}

/// Seeds within which a wrong rule has to be found out.
const MUTANT_RUNS: u64 = 200_000;

fn is_found_out(what: &str, rules: &Rules) {
    let failure = run_many(1, MUTANT_RUNS, rules).expect_err(&format!("nobody notices: {what}"));
    println!("{what}: {}, seed {}", failure.breach, failure.seed);
    assert_eq!(replay(failure.seed, rules), Err(failure), "{what}");
}

#[test]
fn a_wrong_arrow_of_the_source_is_found_out() {
    use source::{Event, Step};
    for (from, on, to) in [
        (Step::Restore, Event::Done, Step::Record),
        (Step::Restore, Event::Done, Step::Prove),
        (Step::Fence, Event::Done, Step::Record),
        (Step::Prove, Event::Done, Step::Withdraw),
        (Step::Record, Event::Done, Step::Go),
        (Step::Go, Event::Failed, Step::TakeBack),
        (Step::Go, Event::Failed, Step::Remove),
        (Step::Go, Event::Done, Step::Remove),
        (Step::Await, Event::Failed, Step::TakeBack),
        (Step::Await, Event::Failed, Step::Remove),
        (Step::AskOwner, Event::SaysOwned, Step::Remove),
        (Step::AskOwner, Event::SaysOwned, Step::TakeBack),
        (Step::AskOwner, Event::SaysRuns, Step::TakeBack),
        (Step::AskOwner, Event::SaysNever, Step::Remove),
        (Step::AskOwner, Event::Failed, Step::TakeBack),
        (Step::AskOwner, Event::Failed, Step::Remove),
        (Step::AskRunner, Event::SaysNever, Step::Remove),
        (Step::AskRunner, Event::SaysRuns, Step::TakeBack),
        (Step::AskRunner, Event::Failed, Step::TakeBack),
        (Step::AskRunner, Event::Failed, Step::Remove),
        (Step::Await, Event::Done, Step::Remove),
        (Step::AskOwner, Event::SaysRuns, Step::Remove),
        (Step::AskRunner, Event::SaysRuns, Step::Remove),
        (Step::Deliver, Event::Failed, Step::Remove),
        (Step::Deliver, Event::Failed, Step::Committed),
        (Step::RemoveLost, Event::Done, Step::Committed),
        (Step::Deliver, Event::Failed, Step::TakeBack),
    ] {
        let mut rules = Rules::default();
        let row = rules.source.iter_mut();
        let row = row.filter(|row| (row.from, row.on) == (from, on)).last();
        row.expect("such an arrow").to = to;
        is_found_out(&format!("{from:?} + {on:?} -> {to:?}"), &rules);
    }
}

#[test]
fn a_wrong_arrow_of_the_destination_is_found_out() {
    use destination::{Event, Step};
    for (from, on, to) in [
        (Step::Restore, Event::Done, Step::Own),
        (Step::AwaitGo, Event::Done, Step::Open),
        (Step::AwaitGo, Event::Failed, Step::Own),
        (Step::Own, Event::Failed, Step::Open),
        (Step::Open, Event::Done, Step::Resume),
        (Step::Note, Event::Done, Step::Close),
        (Step::Note, Event::Failed, Step::Close),
        (Step::Resume, Event::Failed, Step::Undo),
        (Step::Resume, Event::Failed, Step::Close),
    ] {
        let mut rules = Rules::default();
        let row = rules.destination.iter_mut();
        let row = row.filter(|row| (row.from, row.on) == (from, on)).last();
        row.expect("such an arrow").to = to;
        is_found_out(&format!("{from:?} + {on:?} -> {to:?}"), &rules);
    }
}

#[test]
fn a_wrong_decision_after_a_crash_is_found_out() {
    let right = Rules::default;
    for (what, rules) in [
        (
            "a source handed over takes its tree back unasked",
            Rules {
                dead_source: |_| recovery::Source::TakeBack,
                ..right()
            },
        ),
        (
            "a source handed over removes its tree unasked",
            Rules {
                dead_source: |stage| match stage {
                    Stage::HandedOver => recovery::Source::Remove,
                    other => recovery::source(other),
                },
                ..right()
            },
        ),
        (
            "owned is taken for running",
            Rules {
                told: |stage| match stage {
                    Stage::Owned => Some(recovery::Source::Remove),
                    other => recovery::told(other),
                },
                ..right()
            },
        ),
        (
            "owned is taken for never",
            Rules {
                told: |stage| match stage {
                    Stage::Owned => Some(recovery::Source::TakeBack),
                    other => recovery::told(other),
                },
                ..right()
            },
        ),
        (
            "an owned copy is removed unexamined",
            Rules {
                examined: |_| Some(recovery::Destination::Remove),
                ..right()
            },
        ),
        (
            "an owned copy is taken for a running one",
            Rules {
                examined: |_| Some(recovery::Destination::Open),
                ..right()
            },
        ),
        (
            "an owned copy is removed by the record alone",
            Rules {
                dead_destination: |_| recovery::Destination::Remove,
                ..right()
            },
        ),
        (
            "a verdict that does not bind",
            Rules {
                verdict: |record| (recovery::verdict(record).0, None),
                ..right()
            },
        ),
        (
            "a closed record that is written to",
            Rules {
                may_write: |_, _| true,
                ..right()
            },
        ),
    ] {
        is_found_out(what, &rules);
    }
}
