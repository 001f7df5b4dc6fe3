//! `migrate status`: records and gates of this host.

use std::io::Write as _;
use std::pin::pin;
use std::time::Duration;

use console::Term;
use migrate_core::Phase;
use migrate_core::journal::{Record, Side, Stage};
use migrate_core::report::counted;
use migrate_gate::{Leftover, LeftoverMode, Role};
use migrate_session::park::MUTE;
use migrate_session::source::PARKED;
use migrate_session::{State, journal, sweep};
use serde::Serialize;

use super::migrate::seconds;
use crate::Output;
use crate::exit::Exit;
use crate::live::columns;
use crate::show::{complain, fitted, plain};

/// One migration as `--json` shows it.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    record: &'a Record,
    owner_alive: bool,
    /// Where the one that drives it has come; none without a gate.
    phase: Option<Phase>,
    rounds: Option<u32>,
    flows: Option<usize>,
    dirty_flows: Option<usize>,
}

/// How often it is shown.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show it again every second, or so many, until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = seconds)]
    pub watch: Option<f64>,
}

pub async fn run(args: &Args, output: &Output) -> Exit {
    let term = Term::stdout();
    let Some(every) = args.watch else {
        return once(output, None).err().unwrap_or(Exit::Done);
    };
    // The kernel tells nobody when a gate counts.
    let mut turn = tokio::time::interval(Duration::from_secs_f64(every));
    let terminal = term.is_term() && !output.json;
    // One for all turns: a signal that came while none waited would be lost.
    let mut interrupted = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            _ = turn.tick() => {}
            // Ends what would go on for ever.
            _ = &mut interrupted => return Exit::Done,
        }
        if let Err(exit) = once(output, terminal.then_some(&term)) {
            return exit;
        }
    }
}

/// Shows it, in the place of all else on a terminal that is given.
///
/// # Errors
///
/// How to end, for there is nothing to show or nobody to read it.
fn once(output: &Output, term: Option<&Term>) -> Result<(), Exit> {
    let gathered = State::open().and_then(|state| {
        let records = journal::all(&state)?;
        let gates = migrate_gate::leftovers(&state.gates())?;
        Ok((records, gates))
    });
    let (records, gates) = match gathered {
        Ok(gathered) => gathered,
        Err(error) => {
            complain(&format!("migrate status: {}", error.chain()));
            return Err(Exit::Internal);
        }
    };
    let lines = if output.json {
        json_lines(&records, &gates)
    } else {
        lines(&records, &gates, columns(&Term::stdout()))
    };
    let cleared = term.map_or(Ok(()), Term::clear_screen);
    let mut out = std::io::stdout().lock();
    cleared
        .and_then(|()| lines.iter().try_for_each(|line| writeln!(out, "{line}")))
        .and_then(|()| out.flush())
        // Whoever has read enough has gone.
        .map_err(|_| Exit::Done)
}

fn json_lines(records: &[Record], gates: &[Leftover]) -> Vec<String> {
    let line = |record| {
        let gate = gate_of(record, gates);
        Line {
            record,
            owner_alive: sweep::owner_alive(record),
            phase: gate.and_then(|gate| Phase::from_number(gate.progress.0)),
            rounds: gate.map(|gate| gate.progress.1),
            flows: gate.map(|gate| gate.flows),
            dirty_flows: gate.map(|gate| gate.dirty_flows),
        }
    };
    records
        .iter()
        .filter_map(|record| serde_json::to_string(&line(record)).ok())
        .collect()
}

fn lines(records: &[Record], gates: &[Leftover], columns: Option<usize>) -> Vec<String> {
    if records.is_empty() && gates.is_empty() {
        return vec!["nothing is under way and nothing was left behind".to_owned()];
    }
    let records = records.iter().map(|record| {
        let alive = sweep::owner_alive(record);
        let progress = gate_of(record, gates)
            .filter(|_| alive)
            .and_then(progress)
            .unwrap_or_default();
        format!("{}{progress}", sentence(record, alive))
    });
    let lines = records.chain(gates.iter().map(gate_sentence));
    lines
        .map(|line| fitted(&line, columns).into_owned())
        .collect()
}

/// The gate that belongs to a record.
fn gate_of<'a>(record: &Record, gates: &'a [Leftover]) -> Option<&'a Leftover> {
    let role = match record.side {
        Side::Source => Role::Source,
        Side::Destination => Role::Destination,
    };
    gates
        .iter()
        .find(|gate| gate.id == record.migration_id && gate.role == role)
}

/// Where a migration stands on its source, as its gate has it.
fn progress(gate: &Leftover) -> Option<String> {
    let (phase, rounds) = gate.progress;
    if gate.role != Role::Source {
        return None;
    }
    let phase = Phase::from_number(phase)?.name();
    let rounds = match rounds {
        0 => String::new(),
        rounds => {
            let rounds = usize::try_from(rounds).unwrap_or(usize::MAX);
            format!(", {} done", counted(rounds, "round"))
        }
    };
    Some(format!("\n  in {phase}{rounds}"))
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
    let peer = plain(peer);
    let tree = format!("{migration_id}  {root_pid} ({})", plain(name));
    let driver = if alive {
        ""
    } else {
        "; its owner is dead: run `migrate recover`"
    };
    match (side, stage) {
        (Side::Source, Stage::Preparing) => format!("{tree}: moving to {peer}, runs here{driver}"),
        (Side::Source, Stage::HandedOver) => {
            format!(
                "{tree}: handed over to {peer}, fenced here; `migrate status` there says whether it runs{driver}"
            )
        }
        (Side::Source, _) if alive => format!(
            "{tree}: moved to {peer}; what is left here goes when all of its memory is there"
        ),
        (Side::Source, _) => format!("{tree}: moved to {peer}{driver}"),
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
    } else if gate.id == MUTE {
        "no reset leaves this host, as what is parked could not be read: `migrate guard-boot` looks \
         again"
            .to_owned()
    } else if gate.id.starts_with(PARKED) {
        "it waits with a parked tree until `migrate resume`".to_owned()
    } else {
        "its owner is dead: `migrate unlock` removes it".to_owned()
    };
    let mode = match gate.mode {
        LeftoverMode::Open => "open",
        LeftoverMode::Closed => "closed",
        LeftoverMode::Unknown => "unreadable",
    };
    format!(
        "gate {}: {mode} on {}, {} ({} with traffic since the last round), {owner}",
        gate.id,
        places(&gate.interfaces),
        counted(gate.flows, "connection"),
        gate.dirty_flows
    )
}

/// More than these are counted, not named.
const NAMED_MAX: usize = 4;

/// The names of interfaces, as far as they are still there.
fn places(interfaces: &[u32]) -> String {
    if interfaces.is_empty() || interfaces.len() > NAMED_MAX {
        return counted(interfaces.len(), "interface");
    }
    let names = interfaces.iter().map(|&index| {
        let name = nix::net::if_::if_indextoname(index).ok();
        name.and_then(|name| name.into_string().ok())
            .unwrap_or_else(|| format!("interface {index}"))
    });
    names.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_migration_stands_is_told_on_its_source() {
        let mut gate = Leftover {
            id: "0123456789ab".into(),
            role: Role::Source,
            owner_pid: 77,
            owner_alive: true,
            mode: LeftoverMode::Open,
            interfaces: vec![1],
            is_extensible: false,
            flows: 21,
            dirty_flows: 20,
            progress: (Phase::Precopy.number(), 3),
            deadline_in: None,
        };
        let told = progress(&gate);
        assert_eq!(told.as_deref(), Some("\n  in precopy, 3 rounds done"));
        let lines = |columns| lines(&[], std::slice::from_ref(&gate), columns).concat();
        assert_eq!(
            lines(None),
            "gate 0123456789ab: open on lo, 21 connections (20 with traffic since the last round), \
             held by process 77"
        );
        assert_eq!(
            lines(Some(80)),
            "gate 0123456789ab: open on lo, 21 connections (20 with traffic since the last\n  \
             round), held by process 77"
        );
        gate.progress = (Phase::Prepare.number(), 0);
        assert_eq!(progress(&gate).as_deref(), Some("\n  in prepare"));
        gate.role = Role::Destination;
        assert_eq!(progress(&gate), None);
    }
}
