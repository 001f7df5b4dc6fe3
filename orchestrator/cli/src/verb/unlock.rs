//! `migrate unlock`: remove gates that were left behind.

use migrate_core::journal::Stage;
use migrate_gate::Leftover;
use migrate_session::park::MUTE;
use migrate_session::source::PARKED;
use migrate_session::{State, journal, sweep};

use crate::exit::Exit;
use crate::show::{complain, say};

/// Which gates.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this migration's
    #[arg(value_name = "MIGRATION")]
    pub id: Option<String>,
    /// Also where the owner lives or where the tree may run elsewhere: peers may see a reset
    #[arg(long)]
    pub force: bool,
}

pub async fn run(args: &Args) -> Exit {
    let state = match State::open() {
        Ok(state) => state,
        Err(error) => {
            complain(&format!("migrate unlock: {}", error.chain()));
            return Exit::Internal;
        }
    };
    // Whole migrations first: a fence or an address may hang on a gate.
    sweep::sweep(&state).await;
    let (gates, records) = match migrate_gate::leftovers(&state.gates()) {
        Ok(gates) => (gates, journal::all(&state).unwrap_or_default()),
        Err(error) => {
            complain(&format!(
                "migrate unlock: {}",
                migrate_session::error::chain(&error)
            ));
            return Exit::Internal;
        }
    };
    let wanted: Vec<&Leftover> = gates
        .iter()
        .filter(|gate| args.id.as_ref().is_none_or(|id| *id == gate.id))
        .collect();
    if wanted.is_empty() {
        say("no gate is left");
        return Exit::Done;
    }
    let mut exit = Exit::Done;
    for gate in wanted {
        let committed = records
            .iter()
            .any(|r| r.migration_id == gate.id && r.stage == Stage::HandedOver);
        if gate.owner_alive && !args.force {
            complain(&format!(
                "gate {} is held by process {}, which lives\nhelp: stop that process first, or use --force",
                gate.id, gate.owner_pid
            ));
            exit = Exit::Refused;
        } else if committed && !args.force {
            complain(&format!(
                "gate {} guards a tree that was handed over: without it this host would reset its connections\nhelp: see `migrate status` on the destination; then use --force",
                gate.id
            ));
            exit = Exit::Refused;
        } else if gate.id == MUTE && !args.force {
            complain(&format!(
                "gate {} keeps this host from sending resets, for what is parked could not be read\nhelp: `migrate guard-boot` looks again; --force removes it when you have given the tree up",
                gate.id
            ));
            exit = Exit::Refused;
        } else if gate.id.starts_with(PARKED) && !args.force {
            complain(&format!(
                "gate {} waits with a parked tree: without it this host would reset its connections\nhelp: `migrate resume` takes it away; --force does when you have given the tree up",
                gate.id
            ));
            exit = Exit::Refused;
        } else if let Err(error) = migrate_gate::unlock(&state.gates(), &gate.id, gate.role) {
            complain(&format!(
                "migrate unlock: {}",
                migrate_session::error::chain(&error)
            ));
            exit = Exit::Internal;
        } else {
            say(&format!("removed the gate of {}", gate.id));
        }
    }
    exit
}
