//! Clearing what a dead orchestrator or agent has left, where that needs
//! nobody else's word. [`crate::recover`] does what is left.

use std::time::Duration;

use migrate_core::journal::{Record, Side, Stage};

use crate::journal;
use crate::recover;
use crate::state::State;

/// Destination records are kept for a late question; more than this many ended
/// ones are not, the oldest first.
const ENDED_RECORDS_MAX: usize = 64;

/// How long a standing agent waits for starts of units that another one has begun. What
/// takes longer is left to the next migration and to `migrate recover`.
const ADOPTIONS_LIMIT: Duration = Duration::from_secs(600);

/// Between two looks at them.
const LOOK_FOR_ADOPTIONS: Duration = Duration::from_secs(1);

/// Gives units that an agent has died over their own settings back, as soon as they have
/// started around their trees: a stop would end nothing until then.
pub async fn adoptions() {
    let settled = async {
        while let Ok(true) = tokio::task::spawn_blocking(migrate_proc::clear_adoptions).await {
            tokio::time::sleep(LOOK_FOR_ADOPTIONS).await;
        }
    };
    if tokio::time::timeout(ADOPTIONS_LIMIT, settled)
        .await
        .is_err()
    {
        tracing::warn!("a unit is still being started around a tree; `migrate recover` clears up");
    }
}

/// Clears this host; problems are logged, never fatal.
pub async fn sweep(state: &State) {
    migrate_proc::clear_adoptions();
    let records = match journal::all(state) {
        Ok(records) => records,
        Err(error) => {
            tracing::warn!(error = %error.chain(), "could not read the journal");
            return;
        }
    };
    // Whoever drove it: a standing agent outlives its migrations.
    let is_ended = |record: &Record| {
        record.side == Side::Destination
            && record.stage == Stage::Done
            && !state.is_arriving(&record.migration_id)
    };
    let ended = records.iter().filter(|record| is_ended(record)).count();
    let mut surplus = ended.saturating_sub(ENDED_RECORDS_MAX);
    for record in records {
        let ended = is_ended(&record);
        if !owner_alive(&record) {
            recover::settle(state, &record, None).await.log();
        }
        if ended && surplus > 0 {
            surplus -= 1;
            if let Err(error) = journal::retire(state, &record) {
                tracing::warn!(error = %error.chain(), "keeping the record of a migration that has ended");
            }
        }
    }
}

/// Whether the process that drives a record still runs.
#[must_use]
pub fn owner_alive(record: &Record) -> bool {
    process_alive(record.owner_pid, record.owner_start_ticks)
}

/// Whether the process that started at this moment still runs.
#[must_use]
pub fn process_alive(pid: i32, start_ticks: u64) -> bool {
    migrate_proc::start_ticks(pid) == Some(start_ticks)
}

/// Whether a process of this PID runs here.
#[must_use]
pub fn runs(pid: i32) -> bool {
    migrate_proc::start_ticks(pid).is_some()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use migrate_core::journal::{Claims, RECORD_VERSION};
    use migrate_proc::HoldDownRecord;

    use super::*;
    use crate::journal::Journal;

    /// Of an owner that is dead: no process starts that late.
    fn record(id: &str, stage: Stage) -> Record {
        Record {
            version: RECORD_VERSION,
            migration_id: id.to_owned(),
            side: Side::Source,
            stage,
            owner_pid: 1,
            owner_start_ticks: u64::MAX,
            root_pid: 7,
            pids: vec![7],
            name: "redis".to_owned(),
            peer: "host2".to_owned(),
            addresses: Vec::new(),
            images: None,
            fence: None,
            hold_down: None,
            route: None,
            withdrawn: None,
            network_lock: migrate_core::wire::NetworkLock::Gate,
            home: None,
            claims: Claims::default(),
        }
    }

    fn left(state: &State) -> Vec<String> {
        let mut ids: Vec<String> = journal::all(state)
            .unwrap()
            .into_iter()
            .map(|record| record.migration_id)
            .collect();
        ids.sort();
        ids
    }

    #[tokio::test]
    async fn only_what_is_dead_and_undecided_is_cleared() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path()).unwrap();
        let images = directory.path().join("images-of-a");
        fs::create_dir(&images).unwrap();
        let own_pid = std::process::id().cast_signed();
        let records = [
            Record {
                images: Some(images.display().to_string()),
                ..record("a", Stage::Preparing)
            },
            record("b", Stage::HandedOver),
            Record {
                owner_pid: own_pid,
                owner_start_ticks: migrate_proc::start_ticks(own_pid).unwrap(),
                ..record("c", Stage::Preparing)
            },
            Record {
                side: Side::Destination,
                ..record("d", Stage::Owned)
            },
            Record {
                side: Side::Destination,
                ..record("e", Stage::Done)
            },
        ];
        for record in records {
            Journal::begin(&state, record).unwrap();
        }
        sweep(&state).await;
        // Nothing shows that the copy of `d` was ever let go.
        assert_eq!(left(&state), ["b", "c", "e"]);
        assert!(!images.exists());
    }

    /// Of a standing agent: it outlives its migrations.
    #[tokio::test]
    async fn ended_records_of_an_agent_that_lives_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path()).unwrap();
        let own_pid = std::process::id().cast_signed();
        let of_this = |id: String, stage| Record {
            owner_pid: own_pid,
            owner_start_ticks: migrate_proc::start_ticks(own_pid).unwrap(),
            side: Side::Destination,
            ..record(&id, stage)
        };
        // The oldest ones: memory still comes for one, the other has not ended.
        let arriving = state.arrives("arriving", &[7]).unwrap();
        for (id, stage) in [("arriving", Stage::Done), ("owned", Stage::Owned)] {
            Journal::begin(&state, of_this(id.to_owned(), stage)).unwrap();
        }
        for number in 0..ENDED_RECORDS_MAX + 3 {
            Journal::begin(&state, of_this(format!("{number:03}"), Stage::Done)).unwrap();
        }
        sweep(&state).await;
        let kept = left(&state);
        assert_eq!(kept.len(), ENDED_RECORDS_MAX + 2);
        assert_eq!(kept[0], "003");
        assert_eq!(kept[ENDED_RECORDS_MAX..], ["arriving", "owned"]);
        // Each with its lock, and the names of those that are gone.
        let files = fs::read_dir(state.journal()).unwrap().count();
        assert_eq!(files, 2 * kept.len() + 1);
        for id in ["000", "002", "003"] {
            assert_eq!(journal::verdict(&state, id).unwrap(), Stage::Done, "{id}");
        }
        assert_eq!(journal::verdict(&state, "999").unwrap(), Stage::Undone);
        arriving.done();
    }

    #[tokio::test]
    async fn a_unit_that_was_held_down_is_released() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path()).unwrap();
        let drop_in = directory.path().join("unit.d/hold-down.conf");
        fs::create_dir(drop_in.parent().unwrap()).unwrap();
        fs::write(&drop_in, "").unwrap();
        let held = HoldDownRecord {
            unit: "unit".to_owned(),
            drop_in: drop_in.clone(),
            watchdog_us: None,
        };
        let record = Record {
            hold_down: Some(serde_json::to_string(&held).unwrap()),
            ..record("a", Stage::Preparing)
        };
        Journal::begin(&state, record).unwrap();
        sweep(&state).await;
        assert!(!drop_in.exists());
        // Where there is no systemd to take it, the record is kept for later.
        assert!(left(&state).len() <= 1);
    }

    #[tokio::test]
    async fn what_could_not_be_cleared_stays_on_record() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path()).unwrap();
        let record = Record {
            fence: Some("no fence of this version".to_owned()),
            ..record("a", Stage::Preparing)
        };
        Journal::begin(&state, record).unwrap();
        sweep(&state).await;
        assert_eq!(left(&state), ["a"]);
    }
}
