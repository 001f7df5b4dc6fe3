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
    /// Whether the gate would be on those had they come.
    pub follows: bool,
    /// It stood there already.
    pub was_there: bool,
}

/// The kernel's last PID: what it gives out next is higher.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// When the interfaces are there that a gate has to be on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interfaces {
    /// Now.
    Here,
    /// Each is told of with [`guard_interface`] when it comes: none need be here yet.
    Follow,
}

/// Closes a gate for a set that waits; none for one that has come back. One
/// that stands already is put on interfaces that have come since.
///
/// # Errors
///
/// The set cannot be read, there is no interface yet, or the gate cannot be
/// attached. Then the host has to be [`mute`] before the network comes up, or
/// peers may see a reset.
pub async fn guard(place: &Place, come: Interfaces) -> Result<Option<Guarded>, Error> {
    let manifest = place.manifest()?;
    if let Some(Mark::Resumed { .. }) = place.mark()? {
        return Ok(None);
    }
    let state = State::open()?;
    keep_pids_free(&manifest);
    let mut guarded = Guarded {
        name: place.name().to_owned(),
        connections: manifest.tree.flows.len(),
        interfaces: 0,
        missing: Vec::new(),
        follows: come == Interfaces::Follow,
        was_there: false,
    };
    let wanted: BTreeSet<&str> = manifest
        .tree
        .addresses
        .iter()
        .map(|address| address.interface.as_str())
        .collect();
    if wanted.is_empty() {
        return Ok(Some(guarded));
    }
    are_here(come).await?;
    let stands = migrate_gate::leftovers(&state.gates())?
        .into_iter()
        .find(|gate| gate.id == manifest.id && gate.role == Role::Source);
    guarded.was_there = stands.is_some();
    match stands {
        // That of the parking itself: nothing has been booted since.
        Some(gate) if !gate.is_extensible => {
            guarded.interfaces = gate.interfaces.len();
            return Ok(Some(guarded));
        }
        Some(_) => {}
        None => arm(&state, &manifest)?,
    }
    let interfaces = cover(&state, &manifest.id).await?;
    guarded.interfaces = interfaces.len();
    guarded.missing = wanted
        .into_iter()
        .filter(|name| !interfaces.iter().any(|interface| interface.name == **name))
        .map(str::to_owned)
        .collect();
    Ok(Some(guarded))
}

/// Puts what guards this host on an interface that has just come, named or numbered,
/// before it has an address; how many gates do.
///
/// # Errors
///
/// There is no such interface, or a gate cannot be attached to it.
pub fn guard_interface(interface: &str) -> Result<usize, Error> {
    let state = State::open()?;
    let mut gates = migrate_gate::leftovers(&state.gates())?;
    gates.retain(|gate| gate.is_extensible);
    if gates.is_empty() {
        return Ok(0);
    }
    let index = nix::net::if_::if_nametoindex(interface)
        .ok()
        .or_else(|| interface.parse().ok())
        .ok_or_else(|| ParkError::NoSuchInterface(interface.to_owned()))?;
    let mut guarding = 0;
    for gate in &gates {
        match migrate_gate::extend(&state.gates(), &gate.id, gate.role, index) {
            Ok(_) => guarding += 1,
            // Its tree has just come back.
            Err(GateError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(guarding)
}

/// The gate of a host that sends no resets.
pub const MUTE: &str = "park-mute";

/// Keeps this host from sending any reset, until [`speak`].
///
/// # Errors
///
/// There is no interface yet, or the gate cannot be attached. Then the network
/// must not come up.
pub async fn mute(come: Interfaces) -> Result<(), Error> {
    let state = State::open()?;
    are_here(come).await?;
    let is_mute = |gate: &Leftover| gate.id == MUTE && gate.mode == LeftoverMode::Closed;
    if !migrate_gate::leftovers(&state.gates())?.iter().any(is_mute) {
        // One that was left half-made.
        disarm(&state, MUTE)?;
        close(&state, MUTE.to_owned(), 1, Gate::mute)?;
    }
    cover(&state, MUTE).await.map(drop)
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
fn arm(state: &State, manifest: &Manifest) -> Result<(), Error> {
    let tree = &manifest.tree;
    let capacity = tree.flows.len() + manifest.ended.len() + 1;
    close(state, manifest.id.clone(), capacity, |gate| {
        gate.add_flows(&tree.flows)
            .and_then(|()| gate.add_flows(&manifest.ended))
            .and_then(|()| gate.add_listeners(&tree.listeners))
            .and_then(|()| gate.close())
    })
}

/// Makes and closes a gate, and leaves it, on no interface yet.
fn close(
    state: &State,
    id: String,
    capacity: usize,
    how: impl FnOnce(&Gate) -> Result<(), GateError>,
) -> Result<(), Error> {
    let gate = Gate::attach(
        &[],
        &GateOptions {
            id,
            role: Role::Source,
            flow_capacity: u32::try_from(capacity).unwrap_or(u32::MAX),
            directory: state.gates(),
            // Nobody is there who could keep packets.
            hold: None,
            is_extensible: true,
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

/// Whether there is an interface, where there has to be.
async fn are_here(come: Interfaces) -> Result<(), Error> {
    if come == Interfaces::Here && interfaces().await?.is_empty() {
        return Err(ParkError::NoInterface.into());
    }
    Ok(())
}

/// How often interfaces are listed while new ones keep coming.
const LISTINGS_MAX: u32 = 64;

/// Puts a gate on every interface. One may come while the others are seen to, and
/// whoever told of it ([`guard_interface`]) before the gate was there has told in vain,
/// so this ends when a listing has none that is new.
async fn cover(state: &State, id: &str) -> Result<Vec<Interface>, Error> {
    let mut covered = Vec::new();
    for _ in 0..LISTINGS_MAX {
        let mut is_new = false;
        covered = interfaces().await?;
        for interface in &covered {
            match migrate_gate::extend(&state.gates(), id, Role::Source, interface.index) {
                Ok(new) => is_new |= new,
                // It has gone again.
                Err(GateError::Interface { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if !is_new {
            break;
        }
    }
    Ok(covered)
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
