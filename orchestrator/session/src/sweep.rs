//! Clearing what a dead orchestrator or agent has left, where that is safe.
//!
//! Only records whose owner is dead and that are not past the commit are
//! touched: the source's tree runs again, the destination's half-made copy is
//! removed. What is past the commit stays for `migrate status` and `unlock`.

use migrate_core::journal::{Record, Side, Stage};
use migrate_gate::{GateError, Role};
use migrate_net::{Net, NetError};
use migrate_proc::{Fence, FenceRecord, HoldDown, HoldDownRecord, Home};

use crate::journal;
use crate::state::State;

/// Destination records are kept for a late question; more than this many ended
/// ones are not, the oldest first.
const ENDED_RECORDS_MAX: usize = 64;

/// Clears this host; problems are logged, never fatal.
pub async fn sweep(state: &State) {
    let records = match journal::all(state) {
        Ok(records) => records,
        Err(error) => {
            tracing::warn!(error = %error.chain(), "could not read the journal");
            return;
        }
    };
    let ended = records
        .iter()
        .filter(|record| {
            matches!(record.stage, Stage::Done | Stage::Undone) && !owner_alive(record)
        })
        .count();
    let mut surplus = ended.saturating_sub(ENDED_RECORDS_MAX);
    for record in records {
        if owner_alive(&record) {
            continue;
        }
        match (record.side, record.stage) {
            (_, Stage::Preparing) | (Side::Destination, Stage::Undone) => {
                tracing::info!(id = record.migration_id, side = ?record.side, "clearing a dead owner's leftovers");
                clear(state, &record).await;
            }
            (_, Stage::Done | Stage::Undone) if surplus > 0 => {
                surplus -= 1;
                journal::remove(state, &record);
            }
            _ => {}
        }
    }
}

/// Whether the process that drives a record still runs.
#[must_use]
pub fn owner_alive(record: &Record) -> bool {
    migrate_proc::start_ticks(record.owner_pid)
        .is_some_and(|ticks| ticks == record.owner_start_ticks)
}

async fn clear(state: &State, record: &Record) {
    let mut cleared = true;
    let mut complain = |what: &str, error: &dyn std::error::Error| {
        cleared = false;
        tracing::warn!(id = record.migration_id, error = %crate::error::chain(error), "could not {what}");
    };
    if let Some(text) = &record.fence {
        match serde_json::from_str::<FenceRecord>(text) {
            Ok(fence) => {
                let fence = Fence::from_record(fence);
                if let Err(error) = fence.open().and_then(|()| fence.release()) {
                    complain("open the fence", &error);
                }
            }
            Err(error) => complain("read the fence", &error),
        }
    }
    if let Some(text) = &record.hold_down {
        match serde_json::from_str::<HoldDownRecord>(text) {
            Ok(held) => {
                if let Err(error) = HoldDown::from_record(Some(held)).release() {
                    complain("give the unit back to systemd", &error);
                }
            }
            Err(error) => complain("read who is held down", &error),
        }
    }
    if record.side == Side::Destination {
        Home::clear(&record.name, record.root_pid, &record.migration_id);
        match Net::open().await {
            Ok(net) => {
                for address in &record.addresses {
                    match net.withdraw(address).await {
                        // On record before it was staged.
                        Ok(_) | Err(NetError::NotHere { .. }) => {}
                        Err(error) => complain("withdraw the address", &error),
                    }
                }
            }
            Err(error) => complain("open netlink", &error),
        }
    }
    let role = match record.side {
        Side::Source => Role::Source,
        Side::Destination => Role::Destination,
    };
    match migrate_gate::unlock(&state.gates(), &record.migration_id, role) {
        Ok(()) | Err(GateError::NotFound { .. }) => {}
        Err(error) => complain("remove the gate", &error),
    }
    if let Some(images) = &record.images
        && let Err(error) = std::fs::remove_dir_all(images)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        complain("remove the images", &error);
    }
    // What is left is known to the next one by the record alone.
    if cleared {
        journal::remove(state, record);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use migrate_core::journal::RECORD_VERSION;

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
        assert_eq!(left(&state), ["b", "c", "d", "e"]);
        assert!(!images.exists());
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
