//! Interfaces that come after their gate: a card that is slow to start, or plugged in.

use std::path::{Path, PathBuf};

use aya::programs::SchedClassifier;
use migrate_ebpf_common::Direction;

use crate::sys::DeviceKind;
use crate::{Device, GateError, Role, attach_to, bpffs, entries, existing, program_name};

/// Puts a gate, as it is, on one more interface; whether it was not there yet. Loopback
/// is left out, as ever. Of two that do this at once one has nothing to do.
///
/// # Errors
///
/// [`GateError::NotFound`] when there is no such gate, or none any more;
/// [`GateError::OpenPin`] for one that was not made for this
/// ([`GateOptions::is_extensible`](crate::GateOptions::is_extensible)). When one
/// direction cannot be attached the other may be.
pub fn extend(directory: &Path, id: &str, role: Role, interface: u32) -> Result<bool, GateError> {
    let path = existing(directory, id, role)?;
    let _locked = bpffs::lock(&path).map_err(|source| GateError::OpenPin {
        path: path.clone(),
        source: source.into(),
    })?;
    // Whoever had it locked may have removed it.
    let path = existing(directory, id, role)?;
    let mut device = Device::find(interface)?;
    for _ in 0..RENAMES_MAX {
        let tried = put_on(&path, &device);
        let now = Device::find(interface)?;
        if !matches!(tried, Err(GateError::Attach { .. })) || now.name == device.name {
            return tried;
        }
        device = now;
    }
    put_on(&path, &device)
}

/// A program is attached by the interface's name, and that is changed when a host boots: once
/// by udev, and perhaps by whoever configures the network.
const RENAMES_MAX: u32 = 4;

fn put_on(path: &Path, device: &Device) -> Result<bool, GateError> {
    if device.kind == DeviceKind::Loopback {
        return Ok(false);
    }
    let mut is_new = false;
    for direction in [Direction::Ingress, Direction::Egress] {
        let hangs = |pin: PathBuf| {
            bpffs::parse_link(&pin).is_some_and(|hook| {
                hook.direction == direction && hook.interface_index == device.index
            })
        };
        if entries(path).any(hangs) {
            continue;
        }
        let pin = path.join(program_name(direction, device.kind));
        let mut program = SchedClassifier::from_pin(&pin).map_err(|error| GateError::OpenPin {
            path: pin,
            source: error.into(),
        })?;
        // The pin keeps it there.
        attach_to(&mut program, device, direction, path)?;
        is_new = true;
    }
    Ok(is_new)
}

/// Whether the gate of this directory was made for [`extend`].
pub(crate) fn is_extensible(path: &Path) -> bool {
    path.join(program_name(Direction::Ingress, DeviceKind::Ethernet))
        .exists()
}
