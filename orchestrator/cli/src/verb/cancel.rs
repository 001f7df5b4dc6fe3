//! `migrate cancel`: stop a migration that has not come to its commit.

use std::time::{Duration, Instant};

use migrate_core::journal::{Record, Side, Stage};
use migrate_session::{State, journal, sweep};

use crate::exit::Exit;
use crate::show::complain;

/// Which migration.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Root of the process tree, or the migration as `migrate status` names it
    #[arg(value_name = "PID|MIGRATION")]
    pub name: String,
}

/// A rollback takes well below a second; this is for a host in distress.
const ROLL_BACK_LIMIT: Duration = Duration::from_secs(60);

/// Nothing tells that somebody else's child has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

pub async fn run(args: &Args) -> Exit {
    let state = match State::open() {
        Ok(state) => state,
        Err(error) => return say(Exit::Internal, &error.chain(), None),
    };
    let records = match journal::all(&state) {
        Ok(records) => records,
        Err(error) => return say(Exit::Internal, &error.chain(), None),
    };
    let named: Vec<&Record> = records
        .iter()
        .filter(|record| super::is_named(record, &args.name))
        .collect();
    let driven = named
        .iter()
        .find(|record| record.side == Side::Source && sweep::owner_alive(record));
    if let Some(record) = driven {
        if let Some(exit) = past_commit(record) {
            return exit;
        }
        let owner = (record.owner_pid, record.owner_start_ticks);
        return stop(&state, owner, record.root_pid, Some(&record.migration_id)).await;
    }
    // Before anything was changed there is no record, only a claim.
    if let Ok(pid) = args.name.parse()
        && let Some(owner) = state.holder(pid)
    {
        return stop(&state, owner, pid, None).await;
    }
    match named.first() {
        Some(record) if record.side == Side::Destination && sweep::owner_alive(record) => say(
            Exit::Refused,
            &format!("{} comes from {}, which drives it", args.name, record.peer),
            Some("run `migrate cancel` there"),
        ),
        Some(record) if !sweep::owner_alive(record) && record.stage != Stage::Done => say(
            Exit::Refused,
            &format!("nobody moves {} any more: its owner is dead", args.name),
            Some("`migrate recover` brings it to its end"),
        ),
        _ => say(
            Exit::Refused,
            &format!("no migration of {} is under way here", args.name),
            Some("`migrate status` shows what is under way"),
        ),
    }
}

/// A refusal for what cannot be taken back.
fn past_commit(record: &Record) -> Option<Exit> {
    (record.stage != Stage::Preparing).then(|| {
        say(
            Exit::Refused,
            &format!(
                "{} ({}) was handed over to {}: that cannot be taken back",
                record.root_pid, record.name, record.peer
            ),
            Some("once it runs there, move it back from there with `migrate --to`"),
        )
    })
}

async fn stop(state: &State, owner: (i32, u64), pid: i32, id: Option<&str>) -> Exit {
    if let Err(error) = migrate_session::cancel::ask(owner.0, owner.1) {
        return say(Exit::Internal, &error.chain(), None);
    }
    let deadline = Instant::now() + ROLL_BACK_LIMIT;
    while sweep::process_alive(owner.0, owner.1) {
        if Instant::now() >= deadline {
            return say(
                Exit::RolledBack,
                &format!(
                    "process {} was asked to stop and has not ended within {} s",
                    owner.0,
                    ROLL_BACK_LIMIT.as_secs()
                ),
                Some("`migrate status` shows where it stands; kill it and run `migrate recover`"),
            );
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    let record = id.and_then(|id| journal::read(state, id, Side::Source).ok().flatten());
    match record {
        Some(record) => past_commit(&record).unwrap_or_else(|| {
            say(
                Exit::RolledBack,
                &format!("{pid} was rolled back with something left behind"),
                Some("run `migrate recover`"),
            )
        }),
        None if sweep::runs(pid) => {
            crate::show::say(&format!("cancelled: {pid} runs here"));
            Exit::Done
        }
        None => say(
            Exit::Refused,
            &format!("too late: {pid} was moved meanwhile"),
            Some("move it back from there with `migrate --to`"),
        ),
    }
}

fn say(exit: Exit, what: &str, help: Option<&str>) -> Exit {
    complain(&format!("migrate cancel: {what}"));
    if let Some(help) = help {
        complain(&format!("help: {help}"));
    }
    exit
}
