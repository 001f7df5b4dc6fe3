//! `migrate status`: records and gates of this host.

use migrate_core::journal::{Record, Side, Stage};
use migrate_core::report::counted;
use migrate_gate::{Leftover, LeftoverMode};
use migrate_session::{State, journal, sweep};
use serde::Serialize;

use crate::Output;
use crate::exit::Exit;

/// One migration as `--json` shows it.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    record: &'a Record,
    owner_alive: bool,
}

pub fn run(output: &Output) -> Exit {
    let gathered = State::open().and_then(|state| {
        let records = journal::all(&state)?;
        let gates = migrate_gate::leftovers(&state.gates())?;
        Ok((records, gates))
    });
    let (records, gates) = match gathered {
        Ok(gathered) => gathered,
        Err(error) => {
            eprintln!("migrate status: {}", error.chain());
            return Exit::Internal;
        }
    };
    if output.json {
        for record in &records {
            let line = Line {
                record,
                owner_alive: sweep::owner_alive(record),
            };
            if let Ok(line) = serde_json::to_string(&line) {
                println!("{line}");
            }
        }
        return Exit::Done;
    }
    if records.is_empty() && gates.is_empty() {
        println!("nothing is under way and nothing was left behind");
    }
    for record in &records {
        println!("{}", sentence(record, sweep::owner_alive(record)));
    }
    for gate in &gates {
        println!("{}", gate_sentence(gate));
    }
    Exit::Done
}

fn sentence(record: &Record, alive: bool) -> String {
    let Record {
        migration_id,
        side,
        stage,
        root_pid,
        name,
        peer,
        ..
    } = record;
    let tree = format!("{migration_id}  {root_pid} ({name})");
    let driver = if alive { "" } else { "; its owner is dead" };
    match (side, stage) {
        (Side::Source, Stage::Preparing) => format!("{tree}: moving to {peer}, runs here{driver}"),
        (Side::Source, Stage::HandedOver) => {
            format!(
                "{tree}: handed over to {peer}, fenced here; `migrate status` there says whether it runs{driver}"
            )
        }
        (Side::Source, _) => format!("{tree}: moved to {peer}"),
        (Side::Destination, Stage::Preparing) => {
            format!("{tree}: coming from {peer}, runs there{driver}")
        }
        (Side::Destination, Stage::Undone) => format!("{tree}: given up, runs on {peer}"),
        (Side::Destination, _) => format!("{tree}: came from {peer}, runs here"),
    }
}

fn gate_sentence(gate: &Leftover) -> String {
    let owner = if gate.owner_alive {
        format!("held by process {}", gate.owner_pid)
    } else {
        "its owner is dead: `migrate unlock` removes it".to_owned()
    };
    let mode = match gate.mode {
        LeftoverMode::Open => "open",
        LeftoverMode::Closed => "closed",
        LeftoverMode::Unknown => "unreadable",
    };
    format!(
        "gate {}: {mode}, {}, {owner}",
        gate.id,
        counted(gate.flows, "connection")
    )
}
