//! After a boot, before the network: nothing may answer for parked trees.

use std::collections::BTreeSet;
use std::fs;

use migrate_core::parked::{Manifest, Mark};
use migrate_gate::{Gate, GateError, GateOptions, Role};
use migrate_net::Net;

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
    /// It stood there already.
    pub was_there: bool,
}

/// The kernel's last PID: what it gives out next is higher.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// Closes a gate for a set that waits; none for one that has come back.
///
/// # Errors
///
/// The set cannot be read, an interface is missing, or the gate cannot be
/// attached. Then the network must not come up, or peers may see a reset.
pub async fn guard(place: &Place) -> Result<Option<Guarded>, Error> {
    let manifest = place.manifest()?;
    if let Some(Mark::Resumed { .. }) = place.mark()? {
        return Ok(None);
    }
    let state = State::open()?;
    keep_pids_free(&manifest);
    let guarded = |interfaces, was_there| {
        Some(Guarded {
            name: place.name().to_owned(),
            connections: manifest.tree.flows.len(),
            interfaces,
            was_there,
        })
    };
    let stands = migrate_gate::leftovers(&state.gates())?
        .into_iter()
        .find(|gate| gate.id == manifest.id && gate.role == Role::Source);
    if let Some(gate) = stands {
        return Ok(guarded(gate.interfaces.len(), true));
    }
    let interfaces = interfaces(&manifest).await?;
    if interfaces.is_empty() {
        return Ok(guarded(0, false));
    }
    arm(&state, &manifest, &interfaces)?;
    Ok(guarded(interfaces.len(), false))
}

/// Attaches and closes the gate, and leaves it.
fn arm(state: &State, manifest: &Manifest, interfaces: &[u32]) -> Result<(), Error> {
    let tree = &manifest.tree;
    let capacity = tree.flows.len() + manifest.ended.len() + 1;
    let gate = Gate::attach(
        interfaces,
        &GateOptions {
            id: manifest.id.clone(),
            role: Role::Source,
            flow_capacity: u32::try_from(capacity).unwrap_or(u32::MAX),
            directory: state.gates(),
            // Nobody is there who could keep packets.
            hold: None,
        },
    )?;
    let closed = gate
        .add_flows(&tree.flows)
        .and_then(|()| gate.add_flows(&manifest.ended))
        .and_then(|()| gate.add_listeners(&tree.listeners))
        .and_then(|()| gate.close());
    match closed {
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

/// Every interface that is there, for names may have changed with the kernel;
/// the tree's own have to be among them, or packets would come where no gate
/// is.
async fn interfaces(manifest: &Manifest) -> Result<Vec<u32>, Error> {
    let wanted: BTreeSet<&str> = manifest
        .tree
        .addresses
        .iter()
        .map(|address| address.interface.as_str())
        .collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let here = Net::open().await?.interfaces().await?;
    if let Some(missing) = wanted
        .into_iter()
        .find(|name| !here.iter().any(|interface| interface.name == **name))
    {
        return Err(ParkError::NoInterface(missing.to_owned()).into());
    }
    Ok(here
        .iter()
        .filter(|interface| !interface.loopback)
        .map(|interface| interface.index)
        .collect())
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
