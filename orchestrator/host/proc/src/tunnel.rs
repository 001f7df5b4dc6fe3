//! Tunnel devices: `/dev/net/tun`, open and attached to an interface.
//!
//! The open file is the program's end of an interface of the host. CRIU carries
//! it over only with a whole network namespace. Here the interface stays the
//! host's, and a copy's end is attached anew, to the interface of the same name:
//!
//! ```text
//!  tun0 (persistent) ── file ── program      dumped as a plain open file
//!  tun0 (persistent) ── file ── copy         opened, attached, and inherited by CRIU
//! ```
//!
//! So the interface must outlive the program, and nothing of it may be lost
//! that is the file's own: queues of several files, offsets of headers, filters.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use migrate_core::facts::TunnelFacts;
use migrate_core::preflight::Finding;

use crate::descriptors::Descriptor;
use crate::error::ProcError;
use crate::parse;
use crate::tree::Tree;

/// Where every such file comes from; also CRIU's name of the resource.
pub const TUNNEL_DEVICE: &str = "/dev/net/tun";

/// Its number (Documentation/admin-guide/devices.txt).
const NUMBER: (u32, u32) = (10, 200);

/// `IFF_TUN`, packets without an Ethernet header, of `linux/if_tun.h`.
const LAYER_3: u32 = 0x0001;
/// `IFF_PERSIST`.
const PERSISTENT: u32 = 0x0800;
/// `IFF_NO_PI`, and `IFF_ONE_QUEUE`, which says nothing any more: both are what
/// the one who attaches says.
const OF_THE_FILE: u32 = 0x1000 | 0x2000;

impl Tree {
    /// The tunnel device that the tree serves, if it has one that can be served
    /// by a copy.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn tunnel(&self) -> Result<Option<TunnelFacts>, ProcError> {
        let descriptors = self.descriptors()?;
        let ends: Vec<&Descriptor> = descriptors.iter().filter(|d| is_tunnel(d)).collect();
        Ok(match ends[..] {
            [end] => examine(end, 1).ok(),
            _ => None,
        })
    }

    /// Whether the tree has one tunnel device open, once, and it is this one.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn serves_only(&self, planned: &TunnelFacts) -> Result<bool, ProcError> {
        let descriptors = self.descriptors()?;
        let mut ends = descriptors.iter().filter(|d| is_tunnel(d));
        let end = ends.next().and_then(|end| examine(end, 1).ok());
        Ok(end.as_ref() == Some(planned) && ends.next().is_none())
    }
}

/// Whether a descriptor is open on the device.
pub(crate) fn is_tunnel(descriptor: &Descriptor) -> bool {
    descriptor.kind() == libc::S_IFCHR && (descriptor.major(), descriptor.minor()) == NUMBER
}

/// What preflight says of one of `ends` descriptors of the tree.
pub(crate) fn judge(subject: String, descriptor: &Descriptor, ends: usize) -> Finding {
    match examine(descriptor, ends) {
        Ok(tunnel) => Finding::ok(
            subject,
            format!("serves the tunnel device {}, which stays", tunnel.name),
        ),
        Err((finding, way_out)) => Finding::refused(subject, finding, way_out),
    }
}

type Refusal = (String, String);

fn examine(descriptor: &Descriptor, ends: usize) -> Result<TunnelFacts, Refusal> {
    let name = parse::value(&descriptor.info, "iff").unwrap_or_default();
    let flags = flags_here(name);
    if descriptor.link != TUNNEL_DEVICE {
        return Err((
            format!("has {} open for a tunnel device", descriptor.link),
            format!("have the program open {TUNNEL_DEVICE}"),
        ));
    }
    let flags = can_be_served(name, flags, ends)?;
    Ok(TunnelFacts {
        name: name.to_owned(),
        flags,
        open_flags: descriptor.flags,
    })
}

fn can_be_served(name: &str, flags: Option<u32>, ends: usize) -> Result<u32, Refusal> {
    let refused = |finding: String, way_out: &str| Err((finding, way_out.to_owned()));
    let Some(flags) = flags.filter(|_| !name.is_empty()) else {
        return refused(
            format!("has {TUNNEL_DEVICE} open and is attached to no interface"),
            "wait until the program has made its tunnel device",
        );
    };
    if ends > 1 {
        return refused(
            format!("is one of {ends} open ends of tunnel devices, of which CRIU can be given one"),
            "move only processes with one tunnel device, open once",
        );
    }
    if flags & LAYER_3 == 0 {
        return refused(
            format!("serves {name}, a tap device, whose filters nobody can read"),
            "use a tun device",
        );
    }
    let more = flags & !(LAYER_3 | PERSISTENT | OF_THE_FILE);
    if more != 0 {
        return refused(
            format!("serves {name} with several queues or headers of its own (flags {more:#x})"),
            "have the program use one queue and plain packets",
        );
    }
    if flags & PERSISTENT == 0 {
        return Err((
            format!("serves {name}, which goes with the program"),
            format!(
                "make the device before the program, as one that stays: ip tuntap add dev {name} \
                 mode tun, and have it made at each boot"
            ),
        ));
    }
    Ok(flags)
}

/// `tun_flags` of an interface of this host; none without such a device.
fn flags_here(name: &str) -> Option<u32> {
    let text = attribute(name, "tun_flags")?;
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

fn attribute(name: &str, attribute: &str) -> Option<String> {
    // As the kernel: no name leads elsewhere.
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return None;
    }
    let path = Path::new("/sys/class/net").join(name).join(attribute);
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// Whether this host has the device for a copy.
#[must_use]
pub fn compare_tunnel(tunnel: &TunnelFacts) -> Finding {
    let name = &tunnel.name;
    let up = attribute(name, "flags").is_some_and(|flags| is_up(&flags));
    // The carrier is there while somebody is attached, and read while it is up.
    let state = match attribute(name, "carrier").as_deref() {
        _ if !up => State::Down,
        Some("1") => State::Served,
        _ => State::Free,
    };
    compare(tunnel, flags_here(name), state)
}

/// What an interface is to a copy that wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// Somebody is attached.
    Served,
    /// Nothing passes, and nobody can see whether somebody is attached.
    Down,
}

/// Whether the flags that /sys has of an interface say that it is up.
fn is_up(flags: &str) -> bool {
    /// `IFF_UP` of `linux/if.h`.
    const UP: u32 = 0x1;
    let flags = flags.strip_prefix("0x").unwrap_or(flags);
    u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & UP != 0)
}

/// Whether one device may take the place of the other.
fn alike(one: u32, other: u32) -> bool {
    one & !OF_THE_FILE == other & !OF_THE_FILE
}

fn compare(tunnel: &TunnelFacts, here: Option<u32>, state: State) -> Finding {
    let name = &tunnel.name;
    let subject = format!("tunnel device {name}");
    match here {
        None => Finding::refused(
            subject,
            "is not there on the destination",
            format!(
                "make it as it was, with its addresses and routes: ip tuntap add dev {name} mode \
                 tun, ip address add ... dev {name}, ip link set {name} up"
            ),
        ),
        Some(flags) if !alike(flags, tunnel.flags) => Finding::refused(
            subject,
            format!(
                "has flags {flags:#x} on the destination and {:#x} on the source",
                tunnel.flags
            ),
            format!("make it anew as it was: ip -details link show {name} tells"),
        ),
        Some(_) if state == State::Down => Finding::refused(
            subject,
            "is down on the destination",
            format!("ip link set {name} up"),
        ),
        Some(_) if state == State::Served => Finding::refused(
            subject,
            "is served by another process on the destination",
            "end that process, which may be the same program, started at the boot",
        ),
        Some(_) => Finding::ok(subject, "is there on the destination, and free"),
    }
}

/// Opens an end of the device, as the tree had it.
///
/// # Errors
/// The device is not there, or another process has it.
pub fn attach_tunnel(tunnel: &TunnelFacts) -> io::Result<OwnedFd> {
    /// `TUNSETIFF` of `linux/if_tun.h`.
    const ATTACH: libc::c_ulong = 0x4004_54ca;
    // The kernel would make one that goes with the process.
    if !flags_here(&tunnel.name).is_some_and(|flags| alike(flags, tunnel.flags)) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(tunnel.open_flags & libc::O_NONBLOCK)
        .open(TUNNEL_DEVICE)?;
    let flags = libc::c_short::try_from(tunnel.flags & (LAYER_3 | OF_THE_FILE))
        .map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: a structure of numbers, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(tunnel.name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: an open file, and the structure that this request reads and writes.
    if unsafe { libc::ioctl(file.as_raw_fd(), ATTACH, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate_core::preflight::Severity;

    #[test]
    fn only_a_plain_device_that_stays_can_be_served_by_a_copy() {
        assert_eq!(can_be_served("tun0", Some(0x1801), 1), Ok(0x1801));
        for (name, flags, ends, words) in [
            ("", Some(0x1801), 1, "no interface"),
            ("tun0", None, 1, "no interface"),
            ("tun0", Some(0x1801), 2, "one of 2"),
            ("tap0", Some(0x1802), 1, "tap device"),
            ("tun0", Some(0x1901), 1, "0x100"),
            ("tun0", Some(0x5801), 1, "0x4000"),
            ("tun0", Some(0x1001), 1, "goes with the program"),
        ] {
            let (finding, way_out) = can_be_served(name, flags, ends).unwrap_err();
            assert!(finding.contains(words), "{finding}");
            assert!(!way_out.is_empty());
        }
    }

    #[test]
    fn the_other_device_has_to_be_alike_and_free() {
        let tunnel = TunnelFacts {
            name: "tun0".to_owned(),
            flags: 0x3801,
            open_flags: libc::O_RDWR,
        };
        for (here, state, words) in [
            (None, State::Down, "not there"),
            (Some(0x1901), State::Free, "0x1901"),
            (Some(0x1801), State::Served, "another process"),
            (Some(0x1801), State::Down, "is down"),
        ] {
            let finding = compare(&tunnel, here, state);
            assert_eq!(finding.severity, Severity::Refused);
            assert!(finding.finding.contains(words), "{finding:?}");
        }
        let finding = compare(&tunnel, Some(0x1801), State::Free);
        assert_eq!(finding.severity, Severity::Ok);
        assert!(is_up("0x1091") && is_up("0x10d1"));
        assert!(!is_up("0x1090") && !is_up(""));
    }

    #[test]
    fn a_device_that_is_not_there_is_not_made() {
        let tunnel = TunnelFacts {
            name: "no-such-tun".to_owned(),
            flags: 0x1801,
            open_flags: libc::O_RDWR,
        };
        let error = attach_tunnel(&tunnel).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(flags_here("../lo"), None);
    }
}
