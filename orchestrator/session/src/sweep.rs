//! Clearing what a dead orchestrator or agent has left, where that is safe.
//!
//! Only records whose owner is dead and that are not past the commit are
//! touched: the source's tree runs again, the destination's half-made copy is
//! removed. What is past the commit stays for `migrate status` and `unlock`.

use migrate_core::journal::{Record, Side, Stage};
use migrate_gate::Role;
use migrate_net::Net;
use migrate_proc::{Fence, FenceRecord, Home};

use crate::journal;
use crate::state::State;

/// Destination records are kept for a late question; more than this many ended
/// ones are not.
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
    let complain = |what: &str, error: &dyn std::error::Error| {
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
    if record.side == Side::Destination {
        Home::clear(&record.name, record.root_pid, &record.migration_id);
        match Net::open().await {
            Ok(net) => {
                for address in &record.addresses {
                    if let Err(error) = net.withdraw(address).await {
                        complain("withdraw the address", &error);
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
    if let Err(error) = migrate_gate::unlock(&state.gates(), &record.migration_id, role) {
        complain("remove the gate", &error);
    }
    if let Some(images) = &record.images {
        let _ = std::fs::remove_dir_all(images);
    }
    journal::remove(state, record);
}
