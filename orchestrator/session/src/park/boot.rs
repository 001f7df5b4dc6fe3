//! After a boot, before the network: nothing may answer for parked trees.
//!
//! A set that can be read has a gate for its connections. Where one cannot be,
//! nobody knows which they are; then the host sends no resets at all, for more
//! than that the kernel has not to say about a connection that it does not
//! know. Everything else of such a host works, logins among it.

use std::collections::BTreeSet;
use std::fs;

use migrate_core::parked::{Manifest, Mark};
use migrate_gate::{Gate, GateError, GateOptions, Leftover, LeftoverMode, Role};
use migrate_net::{Interface, Net};

use super::place::{ParkError, Place};
use crate::error::Error;
use crate::state::State;

/// What stands in front of a parked tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guarded {
    /// The set.
    pub name: String,
    /// Its connections that nothing answers for.
    pub connections: usize,
    /// How many interfaces the gate is on.
    pub interfaces: usize,
    /// Interfaces that the tree's addresses were on and that are not there.
    pub missing: Vec<String>,
    /// It stood there already.
    pub was_there: bool,
}

/// The kernel's last PID: what it gives out next is higher.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// Closes a gate for a set that waits; none for one that has come back.
///
/// # Errors
///
/// The set cannot be read, there is no interface yet, or the gate cannot be
/// attached. Then the host has to be [`mute`] before the network comes up, or
/// peers may see a reset.
pub async fn guard(place: &Place) -> Result<Option<Guarded>, Error> {
    let manifest = place.manifest()?;
    if let Some(Mark::Resumed { .. }) = place.mark()? {
        return Ok(None);
    }
    let state = State::open()?;
    keep_pids_free(&manifest);
    let guarded = |interfaces, missing, was_there| {
        Some(Guarded {
            name: place.name().to_owned(),
            connections: manifest.tree.flows.len(),
            interfaces,
            missing,
            was_there,
        })
    };
    let stands = migrate_gate::leftovers(&state.gates())?
        .into_iter()
        .find(|gate| gate.id == manifest.id && gate.role == Role::Source);
    if let Some(gate) = stands {
        return Ok(guarded(gate.interfaces.len(), Vec::new(), true));
    }
    let wanted: BTreeSet<&str> = manifest
        .tree
        .addresses
        .iter()
        .map(|address| address.interface.as_str())
        .collect();
    let Some(first) = wanted.first() else {
        return Ok(guarded(0, Vec::new(), false));
    };
    let interfaces = interfaces().await?;
    if interfaces.is_empty() {
        return Err(ParkError::NoInterface((*first).to_owned()).into());
    }
    let indices: Vec<u32> = interfaces.iter().map(|interface| interface.index).collect();
    arm(&state, &manifest, &indices)?;
    let missing = wanted
        .into_iter()
        .filter(|name| !interfaces.iter().any(|interface| interface.name == **name))
        .map(str::to_owned)
        .collect();
    Ok(guarded(indices.len(), missing, false))
}

/// The gate of a host that sends no resets.
pub const MUTE: &str = "park-mute";

/// Keeps this host from sending any reset, until [`speak`].
///
/// # Errors
///
/// There is no interface yet, or the gate cannot be attached. Then the network
/// must not come up.
pub async fn mute() -> Result<(), Error> {
    let state = State::open()?;
    let is_mute = |gate: &Leftover| gate.id == MUTE && gate.mode == LeftoverMode::Closed;
    if migrate_gate::leftovers(&state.gates())?.iter().any(is_mute) {
        return Ok(());
    }
    // One that was left half-made.
    disarm(&state, MUTE)?;
    let interfaces = interfaces().await?;
    let indices: Vec<u32> = interfaces.iter().map(|interface| interface.index).collect();
    close(&state, MUTE.to_owned(), 1, &indices, Gate::mute)
}

/// Ends what [`mute`] has begun, if it has; whether it had.
///
/// # Errors
///
/// The gate cannot be found out about, or removed.
pub fn speak() -> Result<bool, Error> {
    let state = State::open()?;
    let gates = migrate_gate::leftovers(&state.gates())?;
    let was_mute = gates.iter().any(|gate| gate.id == MUTE);
    disarm(&state, MUTE)?;
    Ok(was_mute)
}

/// A gate for the connections of a set.
fn arm(state: &State, manifest: &Manifest, interfaces: &[u32]) -> Result<(), Error> {
    let tree = &manifest.tree;
    let capacity = tree.flows.len() + manifest.ended.len() + 1;
    close(state, manifest.id.clone(), capacity, interfaces, |gate| {
        gate.add_flows(&tree.flows)
            .and_then(|()| gate.add_flows(&manifest.ended))
            .and_then(|()| gate.add_listeners(&tree.listeners))
            .and_then(|()| gate.close())
    })
}

/// Attaches and closes a gate, and leaves it.
fn close(
    state: &State,
    id: String,
    capacity: usize,
    interfaces: &[u32],
    how: impl FnOnce(&Gate) -> Result<(), GateError>,
) -> Result<(), Error> {
    let gate = Gate::attach(
        interfaces,
        &GateOptions {
            id,
            role: Role::Source,
            flow_capacity: u32::try_from(capacity).unwrap_or(u32::MAX),
            directory: state.gates(),
            // Nobody is there who could keep packets.
            hold: None,
        },
    )?;
    match how(&gate) {
        Ok(()) => Ok(gate.leave()?),
        Err(error) => {
            let _ = gate.detach();
            Err(error.into())
        }
    }
}

/// Takes the gate of a set away, wherever it came from.
pub(crate) fn disarm(state: &State, id: &str) -> Result<(), GateError> {
    match migrate_gate::unlock(&state.gates(), id, Role::Source) {
        Err(GateError::NotFound { .. }) => Ok(()),
        other => other,
    }
}

/// Every interface that is there, for names may have changed with the kernel,
/// and one that is made later, a VLAN or a bond, gets its packets from these.
async fn interfaces() -> Result<Vec<Interface>, Error> {
    let mut here = Net::open().await?.interfaces().await?;
    here.retain(|interface| !interface.loopback);
    Ok(here)
}

/// What starts from here on gets higher PIDs than the tree has, so that they
/// are free when it comes back.
fn keep_pids_free(manifest: &Manifest) {
    let highest = manifest
        .tree
        .processes
        .iter()
        .flat_map(|process| process.threads.iter().chain([&process.pid]))
        .max();
    let last = fs::read_to_string(LAST_PID)
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    if let (Some(&highest), Some(last)) = (highest, last)
        && highest > last
        && let Err(error) = fs::write(LAST_PID, highest.to_string())
    {
        tracing::warn!(%error, highest, "PIDs of the parked tree may be given to others");
    }
}
