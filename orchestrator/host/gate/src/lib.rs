//! The packet gate: tc programs around a process tree's connections.
//!
//! ```text
//!              attach          close             open_egress        open
//!   (nothing) -------> open ----------> closed ------------> out ---------> open
//!        ^              |                  |   lease runs out  |
//!        |              |                  +-------------------+--> open, by itself
//!        +--------------+--- detach, unlock (from any state) ---------------
//! ```
//!
//! [`Gate::close_ingress`] may come before `close`: it leads from open to the
//! state that `open_egress` leads to as well.
//!
//! While closed, packets of the tree's flows and listeners are held, or dropped
//! where they cannot be, in both directions; nothing else is touched. Closing and opening is one store into
//! a page that the programs on every CPU read, so it costs nothing per flow.
//!
//! **The gate outlives its owner.** Programs and maps are pinned under
//! `DIRECTORY/ID-ROLE/` on a bpf file system. Dropping a [`Gate`] without
//! [`Gate::detach`] leaves it in place, on purpose: an owner that dies while
//! the tree is frozen must not let the kernel reset the peers' connections.
//! What bounds it is the lease: past its end the programs pass everything.
//! [`leftovers`] lists what is there, [`adopt`] takes it over, [`unlock`]
//! removes it.
//!
//! **Staged addresses** are kept quiet whatever the state and the lease: no
//! ARP or neighbour discovery speaks for them or reaches the host about them,
//! so that an address can be put on the destination's interface while the
//! source still answers for it.
//!
//! **Holding** is asked for with [`GateOptions::hold`]. Held packets wait in a
//! bounded store, are taken with [`Gate::held`] and go back with
//! [`Gate::inject_ingress`] and [`Gate::emit_egress`], on this host or on the
//! one to which they were carried. The order of a release matters:
//!
//! 1. the sockets are live;
//! 2. [`Gate::hold_answers`];
//! 3. what was held elsewhere goes in, then what was held here
//!    ([`HeldPackets::try_drain`]), the ingress still closed so that nothing
//!    newer overtakes it. The acknowledgements that this provokes are held, for
//!    their receivers would go on sending: 3 is repeated until nothing has come
//!    meanwhile, and until [`Gate::underway`] says that all has passed;
//! 4. [`Gate::open_ingress`];
//! 5. the acknowledgements go out, then [`Gate::open`];
//! 6. what came in between goes where it wanted to go (`try_drain`, then
//!    [`HeldPackets::next`] until the gate is detached).
//!
//! With 2 left out, senders of much data go on while 3 lasts, and at 4 what they
//! send overtakes what was held: they take it for lost and send it again. If the
//! acknowledgements were dropped, senders would wait for their timers after all.
//!
//! Not seen by the gate, so not held: a packet whose next hop's hardware
//! address is being asked for waits in front of the gate, and one that waits
//! behind it, in the interface's queue, leaves. Packets of interfaces without
//! Ethernet header are dropped, not held. Of interfaces stacked on each other
//! (a bond and its members, a VLAN and its parent) a gate takes one layer;
//! on both, a packet given back to the lower one is held again by the upper.
//!
//! **Tracking.** From [`Gate::start_tracking`] on every packet of a flow is
//! counted while it passes: packets, bytes and the time of the last one, per
//! direction. A flow is *dirty* when it had traffic since the round began
//! ([`Gate::next_round`]). Connections that the tree's listeners accept are
//! taken in by the programs themselves, up to a bound; those that the tree
//! opens are for the caller to name. From [`Gate::start_watching`] on, sequence
//! numbers are looked at too: what was sent again, and resets.
//!
//! With tracing at level TRACE for `migrate_gate::packets` when the gate is
//! attached, every dropped packet is traced (as [`Gate::counters`] is read);
//! otherwise the kernel leaves the tracing out of the programs.

mod bpffs;
pub mod cost;
mod error;
mod extend;
mod flows;
mod hold;
mod owner;
mod sys;
mod tables;
#[cfg(test)]
mod tests;
mod trace;

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, qdisc_add_clsact};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use migrate_core::{Flow, Listener};
use migrate_ebpf_common::parse::is_opening;
pub use migrate_ebpf_common::{Counters, Direction, Way};
use migrate_ebpf_common::{EXEMPT_MARK, Ended, FlowKey, Mode};

pub use crate::error::GateError;
pub use crate::extend::extend;
pub use crate::flows::{FlowActivity, FlowCount};
use crate::hold::Hold;
pub use crate::hold::frame::{FRAME_BYTES_MAX, FrameError};
pub use crate::hold::{HeldPacket, HeldPackets, HeldStats, HoldOptions, Repeats};
use crate::owner::Owner;
use crate::sys::DeviceKind;
use crate::tables::Tables;
use crate::trace::Trace;

/// Which end of a migration a gate guards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The host that the tree leaves.
    Source,
    /// The host that it comes to.
    Destination,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "source" => Ok(Self::Source),
            "destination" => Ok(Self::Destination),
            _ => Err(()),
        }
    }
}

/// What a new gate is called, where it lives, and how many flows it takes.
#[derive(Clone, Debug)]
pub struct GateOptions {
    /// The migration's id: 1 to 64 characters of a-z, 0-9 and `-`.
    pub id: String,
    /// Which end this is.
    pub role: Role,
    /// How many flows fit. Memory is taken as they come, about 250 bytes each,
    /// and 16 at once.
    pub flow_capacity: u32,
    /// Where the pins go, for example `/run/migrate/bpf`. Made with mode 0700
    /// and mounted as a bpf file system if it is none; taken away again with
    /// the last gate in it, unless somebody else mounted it.
    pub directory: PathBuf,
    /// Whether and within which bounds packets are held rather than dropped.
    /// Where that is asked for and not possible, the gate drops and
    /// [`Gate::drop_reason`] says why.
    pub hold: Option<HoldOptions>,
    /// Whether it may be put on further interfaces after, see [`extend`]; then it
    /// needs none to begin with. What it holds is held of the first ones only.
    pub is_extensible: bool,
}

/// An attached gate. All methods take `&self`; see the [crate] for what
/// dropping it means.
#[derive(Debug)]
pub struct Gate {
    directory: PathBuf,
    path: PathBuf,
    tables: Tables,
    /// Keeps the programs attached should the pins vanish under a living owner.
    links: Vec<PinnedLink>,
    /// Where the programs are.
    hooks: Vec<Hook>,
    /// Keeps the file system mounted.
    root: File,
    trace: Trace,
    /// The means of holding, or why there are none.
    hold: Result<Hold, String>,
}

/// What attaching makes.
struct Parts {
    tables: Tables,
    links: Vec<PinnedLink>,
    hooks: Vec<Hook>,
    trace: Trace,
    hold: Result<Hold, String>,
}

impl Gate {
    /// Loads the programs, attaches them to every interface in front of all
    /// other tcx programs, and pins everything. The gate starts open and
    /// without a lease. Loopback is left out: CRIU probes over it, and what
    /// runs over it cannot leave the host anyway.
    ///
    /// # Errors
    ///
    /// Nothing stays behind when it fails.
    pub fn attach(interfaces: &[u32], options: &GateOptions) -> Result<Self, GateError> {
        let path = gate_path(&options.directory, &options.id, options.role)?;
        let kernel = KernelVersion::current().unwrap_or_else(|_| KernelVersion::new(0, 0, 0));
        if kernel < OLDEST_KERNEL {
            let release = nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_default();
            return Err(GateError::KernelTooOld { release });
        }
        let mut devices = Vec::with_capacity(interfaces.len());
        for &index in interfaces {
            let device = Device::find(index)?;
            if device.kind != DeviceKind::Loopback {
                devices.push(device);
            }
        }
        if devices.is_empty() && !options.is_extensible {
            return Err(GateError::NoInterface);
        }

        let root = bpffs::open_or_mount(&options.directory)?;
        if let Err(source) = DirBuilder::new().mode(0o700).create(&path) {
            return Err(if source.kind() == io::ErrorKind::AlreadyExists {
                GateError::AlreadyAttached { path }
            } else {
                GateError::Pin {
                    path,
                    source: source.into(),
                }
            });
        }
        match attach_in(&path, &devices, options) {
            Ok(Parts {
                tables,
                links,
                hooks,
                trace,
                hold,
            }) => {
                tracing::debug!(path = %path.display(), ?devices, holds = hold.is_ok(), "gate attached");
                Ok(Self {
                    directory: options.directory.clone(),
                    path,
                    tables,
                    links,
                    hooks,
                    root,
                    trace,
                    hold,
                })
            }
            Err(error) => {
                // The first error is the one to tell; what this one could not
                // remove, `unlock` can.
                if let Err(cleanup) = bpffs::remove_gate(&path) {
                    tracing::warn!(%cleanup, "a half-made gate stays behind");
                }
                drop(root);
                bpffs::release(&options.directory);
                Err(error)
            }
        }
    }

    /// Adds flows of the tree. Known ones may be added again.
    ///
    /// # Errors
    ///
    /// [`GateError::Full`] past the capacity; a part may then be in.
    pub fn add_flows(&self, flows: &[Flow]) -> Result<(), GateError> {
        self.tables.add_flows(flows)
    }

    /// Counts the packets of flows from now on; the first round begins.
    pub fn start_tracking(&self) {
        self.tables.start_tracking();
    }

    /// Looks at sequence numbers as well from now on, and notes when a flow's
    /// next packet passes in each direction. Costs more, so it is for the time
    /// around the blackout.
    pub fn start_watching(&self) {
        self.tables.start_watching();
    }

    /// Ends a round and begins the next one.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn next_round(&self) -> Result<FlowCount, GateError> {
        self.tables.next_round()
    }

    /// Forgets flows that have ended: those that are not among `flows` and had
    /// no traffic in this round.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or changed.
    pub fn retain_flows(&self, flows: &[Flow]) -> Result<(), GateError> {
        self.tables.retain_flows(flows)
    }

    /// What is remembered of every flow.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn activity(&self) -> Result<Vec<FlowActivity>, GateError> {
        let dropped = self.hold.as_ref().ok().map(Hold::flow_dropped);
        self.tables.activity(dropped.as_ref())
    }

    /// How many packets of flows have passed so far: as long as the number
    /// stays the same, nobody speaks.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn tracked_packets(&self) -> Result<u64, GateError> {
        Ok(self.tables.counters()?.tracked_packets)
    }

    /// Notes where the migration stands, for [`leftovers`] to tell.
    pub fn set_progress(&self, phase: u8, rounds: u32) {
        self.tables.set_progress(phase, rounds);
    }

    /// When the watch was marked last, on the clock of [`Way::first_ns`].
    #[must_use]
    pub fn mark_ns(&self) -> u64 {
        self.tables.mark_ns()
    }

    /// Adds listening sockets of the tree: closed, the gate keeps new
    /// connections to them out as well. Known ones may be added again.
    ///
    /// # Errors
    ///
    /// [`GateError::Full`] past 4096 keys; a part may then be in.
    pub fn add_listeners(&self, listeners: &[Listener]) -> Result<(), GateError> {
        self.tables.add_listeners(listeners)
    }

    /// Keeps addresses quiet from now on. To be called before they are put on
    /// an interface.
    ///
    /// # Errors
    ///
    /// [`GateError::Full`] past 256 addresses.
    pub fn stage_addresses(&self, addresses: &[IpAddr]) -> Result<(), GateError> {
        self.tables.stage(addresses)
    }

    /// Lets addresses be seen. To be called before they are announced.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn unstage_addresses(&self, addresses: &[IpAddr]) -> Result<(), GateError> {
        self.tables.unstage(addresses)
    }

    /// Keeps new connections to the tree's listeners waiting, and nothing else:
    /// those that have begun come to their end before the gate closes.
    ///
    /// # Errors
    ///
    /// As [`close`](Self::close).
    pub fn hold_new(&self) -> Result<(), GateError> {
        self.tables.close_ingress(Mode::HoldNew)
    }

    /// Lets flows that the tree has closed come to their end on this host,
    /// whatever the mode, until [`end_all`](Self::end_all). Flows of the tree's
    /// own must not be among them.
    ///
    /// # Errors
    ///
    /// [`GateError::Full`] past 4096 flows; a part may then be in.
    pub fn let_end(&self, flows: &[Flow]) -> Result<(), GateError> {
        self.tables.end_flows(flows, Ended::Pass)
    }

    /// Takes back what [`let_end`](Self::let_end) has allowed: flows that the
    /// gate knows otherwise are kept back as the mode says.
    pub fn end_all(&self) {
        self.tables.forget_all_ended();
    }

    /// Speaks for flows that the tree has closed on another host, whatever the
    /// mode: an end of their peers that is still under way is acknowledged when
    /// it is given to [`inject_ingress`](Self::inject_ingress), and everything
    /// else of theirs stays unanswered. The kernel, which knows nothing of
    /// them, would answer with an RST.
    ///
    /// # Errors
    ///
    /// [`GateError::Full`] past 4096 flows; a part may then be in.
    pub fn answer_for(&self, flows: &[Flow]) -> Result<(), GateError> {
        self.tables.end_flows(flows, Ended::Answer)
    }

    /// Takes one back of those that [`answer_for`](Self::answer_for) was given.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn answer_no_more(&self, flow: &Flow) -> Result<(), GateError> {
        let key = tables::flow_key(flow);
        if let Ok(hold) = &self.hold {
            hold.forget_end(&key);
        }
        self.tables.forget_ended(&key)
    }

    /// When the peer of a flow that is [answered for](Self::answer_for) was heard
    /// to end it last: an end, which was acknowledged then, or a reset.
    #[must_use]
    pub fn end_heard_at(&self, flow: &Flow) -> Option<Instant> {
        let hold = self.hold.as_ref().ok()?;
        hold.end_heard_at(&tables::flow_key(flow))
    }

    /// Whether this flow is [answered for](Self::answer_for) still: not once its
    /// peer has begun another connection with the same ports.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn answers_for(&self, flow: &Flow) -> Result<bool, GateError> {
        let ended = self.tables.ended(&tables::flow_key(flow))?;
        Ok(ended == Some(Ended::Answer))
    }

    /// How many flows [`let_end`](Self::let_end) and
    /// [`answer_for`](Self::answer_for) take.
    pub const ENDED_MAX: usize = 4096;

    /// Lets no packet of the tree in, in one step; those on their way out are
    /// treated as before. From an open gate this is the state for the time
    /// between a closed ingress and a tree that stands still: replies that the
    /// tree still writes leave, where a fully closed gate would drop them.
    ///
    /// # Errors
    ///
    /// As [`close`](Self::close).
    pub fn close_ingress(&self) -> Result<(), GateError> {
        self.tables.close_ingress(self.closed_mode())
    }

    /// Holds the tree's packets in both directions, or drops them where they
    /// cannot be held. Packets already past the
    /// programs on another CPU may still arrive: freeze the tree afterwards,
    /// which takes longer than they do.
    ///
    /// # Errors
    ///
    /// [`GateError::LeaseExpired`] when the lease is over already: the gate is
    /// open then.
    pub fn close(&self) -> Result<(), GateError> {
        self.tables.close(self.closed_mode())
    }

    /// Keeps the host from sending any RST on the gate's interfaces, whosever
    /// connection it is about, and lets everything else pass: for where the
    /// tree's flows are not known.
    ///
    /// # Errors
    ///
    /// As [`close`](Self::close).
    pub fn mute(&self) -> Result<(), GateError> {
        self.tables.mute()
    }

    fn closed_mode(&self) -> Mode {
        if self.hold.is_ok() {
            Mode::Hold
        } else {
            Mode::Drop
        }
    }

    /// Whether a closed gate holds packets. Otherwise it drops them; see
    /// [`drop_reason`](Self::drop_reason).
    #[must_use]
    pub fn holds(&self) -> bool {
        self.hold.is_ok()
    }

    /// Why a closed gate drops packets rather than holding them; `None` when
    /// it holds them.
    #[must_use]
    pub fn drop_reason(&self) -> Option<&str> {
        self.hold.as_ref().err().map(String::as_str)
    }

    /// The packets that the gate holds, from the first on, whenever this is
    /// called. Once for a gate.
    ///
    /// # Errors
    ///
    /// [`GateError::NoHold`] when the gate drops, [`GateError::HeldTaken`] the
    /// second time.
    pub fn held(&self) -> Result<HeldPackets, GateError> {
        self.means()?.take()
    }

    /// Gives the stack a frame that was held on its way in, here or on another
    /// host, as if `interface_index` had just received it: addressed to that
    /// interface, whatever it was addressed to. It passes a closed gate.
    ///
    /// # Errors
    ///
    /// [`GateError::BadFrame`] and [`GateError::ForeignFrame`] for a frame that
    /// is not sound or not the workload's: the kernel has not seen it.
    /// [`GateError::NotHeld`] for an interface that this gate is not on.
    pub fn inject_ingress(&self, interface_index: u32, frame: &[u8]) -> Result<(), GateError> {
        self.give_back(Direction::Ingress, interface_index, frame)
    }

    /// Sends a frame that was held on its way out of `interface_index` on this
    /// host, addressed as it was. It passes a closed gate. Two hosts have
    /// different neighbours, so a frame held elsewhere is for the other one to
    /// send.
    ///
    /// # Errors
    ///
    /// As [`inject_ingress`](Self::inject_ingress).
    pub fn emit_egress(&self, interface_index: u32, frame: &[u8]) -> Result<(), GateError> {
        self.give_back(Direction::Egress, interface_index, frame)
    }

    fn give_back(
        &self,
        direction: Direction,
        interface_index: u32,
        frame: &[u8],
    ) -> Result<(), GateError> {
        let hold = self.means()?;
        if direction == Direction::Ingress
            && let Some((key, segment)) = hold::frame::segment_of(frame, direction)
        {
            let opens = is_opening(segment.flags);
            if opens && hold.was_opened(key, segment) {
                return Ok(());
            }
            if self.tables.ended(&key)? == Some(Ended::Answer) {
                if !opens {
                    return hold.answer(interface_index, frame);
                }
                self.tables.forget_ended(&key)?;
            }
        }
        let knows = |key: &FlowKey| self.tables.knows(key);
        hold.give_back(direction, interface_index, frame, knows)
    }

    /// How many of the frames given back ([`inject_ingress`](Self::inject_ingress),
    /// [`emit_egress`](Self::emit_egress)) have not passed the gate yet. Where an
    /// interface spreads what it receives over the CPUs (RPS), another one has
    /// them queued, and a packet that the interface receives itself may pass them.
    /// What the kernel has dropped in between stays in this number.
    ///
    /// # Errors
    ///
    /// [`GateError::NoHold`] when the gate drops; when the map cannot be read.
    pub fn underway(&self) -> Result<u64, GateError> {
        let hold = self.means()?;
        let counters = self.tables.counters()?;
        let passed = counters.injected + counters.emitted;
        Ok(hold.written_frames().saturating_sub(passed))
    }

    fn means(&self) -> Result<&Hold, GateError> {
        self.hold.as_ref().map_err(|reason| GateError::NoHold {
            reason: reason.clone(),
        })
    }

    /// Whether nobody has removed it meanwhile, nor put a tcx program in front
    /// of it, which may let packets pass that the gate has not seen. What came
    /// through to sockets that CRIU had read by then is acknowledged and in no
    /// image. To be asked in the network namespace of its interfaces.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        let links = entries(&self.path).filter(|pin| bpffs::parse_link(pin).is_some());
        links.count() == self.hooks.len() && (!has_tcx() || self.hooks.iter().all(Hook::is_first))
    }

    /// Lets the tree's packets out, still none in.
    ///
    /// # Errors
    ///
    /// None at present.
    pub fn open_egress(&self) -> Result<(), GateError> {
        self.tables.open_egress();
        Ok(())
    }

    /// Lets the tree's packets out, except for those that only acknowledge and those with
    /// which connections begin and end, and still none in. Where packets are not held, this is
    /// [`open_egress`](Self::open_egress): an acknowledgement that is dropped
    /// costs its receiver a timer.
    pub fn hold_answers(&self) {
        if self.hold.is_ok() {
            self.tables.hold_bare();
        } else {
            self.tables.open_egress();
        }
    }

    /// Lets the tree's packets in; those on their way out are treated as before.
    pub fn open_ingress(&self) {
        self.tables.open_ingress();
    }

    /// Lets the tree's packets pass in both directions.
    ///
    /// # Errors
    ///
    /// None at present.
    pub fn open(&self) -> Result<(), GateError> {
        self.tables.open_all();
        Ok(())
    }

    /// Sets or renews the lease. With `Some` the gate opens by itself after
    /// `ttl`; with `None` it stays as it is for ever (fail-closed: only right
    /// once the other host has the tree).
    ///
    /// # Errors
    ///
    /// [`GateError::LeaseExpired`] when the gate was closed and the lease has
    /// run out before this call. Peers may have been answered meanwhile, so
    /// the gate is not closed again: the migration has to be rolled back.
    pub fn lease(&self, ttl: Option<Duration>) -> Result<(), GateError> {
        self.tables.lease(ttl)
    }

    /// What the gate has done since it was attached, open times included.
    /// Also hands the programs' trace on, if there is one.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn counters(&self) -> Result<Counters, GateError> {
        self.trace.flush();
        let mut counters = self.tables.counters()?;
        if let Ok(hold) = &self.hold {
            counters.hold_dropped += hold.dropped_frames()?;
        }
        Ok(counters)
    }

    /// Leaves it as it is, for good and without an owner: closed, it drops
    /// packets until [`unlock`] removes it, or the machine ends.
    ///
    /// # Errors
    ///
    /// [`GateError::LeaseExpired`] when it has opened by itself before.
    pub fn leave(self) -> Result<(), GateError> {
        self.lease(None)?;
        self.tables.drop_instead_of_hold();
        Ok(())
    }

    /// Takes the programs off every interface and removes all pins.
    ///
    /// # Errors
    ///
    /// [`GateError::Remove`] with the first pin that stayed; the others are
    /// gone nevertheless.
    pub fn detach(self) -> Result<(), GateError> {
        let Self {
            directory,
            path,
            tables,
            links,
            hooks: _,
            root,
            trace,
            hold,
        } = self;
        trace.flush();
        let removed = bpffs::remove_gate(&path);
        // The TAP devices last, when no packet is moved to them any more.
        drop((tables, links, hold, root));
        bpffs::release(&directory);
        removed
    }
}

/// A gate found on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The migration's id.
    pub id: String,
    /// Which end it guards.
    pub role: Role,
    /// The process that answers for it, 0 when that cannot be read.
    pub owner_pid: u32,
    /// Whether that very process still runs.
    pub owner_alive: bool,
    /// What it does with packets at this moment, an expired lease considered.
    pub mode: LeftoverMode,
    /// The interfaces it was attached to, by index.
    pub interfaces: Vec<u32>,
    /// Whether it may be put on further ones, see [`extend`].
    pub is_extensible: bool,
    /// How many flows it knows.
    pub flows: usize,
    /// How many of them had traffic since the last round began.
    pub dirty_flows: usize,
    /// What its owner has noted with [`Gate::set_progress`]: phase and rounds.
    pub progress: (u8, u32),
    /// When it opens by itself, zero if it has; `None` without a lease.
    pub deadline_in: Option<Duration>,
}

/// What a leftover gate does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftoverMode {
    /// It lets everything pass.
    Open,
    /// It drops the tree's packets in at least one direction.
    Closed,
    /// Its maps cannot be read: half made, or of another version.
    Unknown,
}

/// Lists the gates pinned under `directory`, those of living owners included.
/// A directory that is not there, or is no bpf file system, has none.
///
/// # Errors
///
/// [`GateError::OpenPin`] when the directory cannot be read.
pub fn leftovers(directory: &Path) -> Result<Vec<Leftover>, GateError> {
    let failed = |source: io::Error| GateError::OpenPin {
        path: directory.to_owned(),
        source: source.into(),
    };
    match bpffs::open(directory) {
        Ok(Some(_)) => {}
        Ok(None) => return Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if let Some((id, role)) = parse_gate_name(&path) {
            found.push(inspect(&path, id, role));
        }
    }
    found.sort_by(|a, b| (&a.id, a.role.name()).cmp(&(&b.id, b.role.name())));
    Ok(found)
}

fn inspect(path: &Path, id: String, role: Role) -> Leftover {
    let mut leftover = Leftover {
        id,
        role,
        owner_pid: 0,
        owner_alive: false,
        mode: LeftoverMode::Unknown,
        interfaces: attached_interfaces(path),
        is_extensible: extend::is_extensible(path),
        flows: 0,
        dirty_flows: 0,
        progress: (0, 0),
        deadline_in: None,
    };
    if let Ok(tables) = Tables::open(path) {
        let owner = tables.owner();
        let state = tables.state();
        leftover.owner_pid = owner.pid;
        leftover.owner_alive = owner.is_alive();
        leftover.deadline_in = tables.lease_left();
        let closed = (state.is_closed(Direction::Ingress) || state.is_closed(Direction::Egress))
            && leftover.deadline_in != Some(Duration::ZERO);
        leftover.mode = if closed {
            LeftoverMode::Closed
        } else {
            LeftoverMode::Open
        };
        let count = tables.count_flows().unwrap_or_default();
        leftover.flows = count.flows;
        leftover.dirty_flows = count.dirty;
        leftover.progress = tables.progress();
    }
    leftover
}

/// The flows for which gates of this host speak, see [`Gate::answer_for`]: its
/// kernel knows nothing of them. A gate that cannot be read has none.
///
/// # Errors
///
/// [`GateError::OpenPin`] when the directory cannot be read.
pub fn answered_flows(directory: &Path) -> Result<Vec<Flow>, GateError> {
    let mut flows = Vec::new();
    for gate in leftovers(directory)? {
        let path = gate_path(directory, &gate.id, gate.role)?;
        match Tables::open(&path).and_then(|tables| tables.answered()) {
            Ok(answered) => flows.extend(answered),
            Err(error) => tracing::debug!(%error, gate = gate.id, "a gate cannot be read"),
        }
    }
    flows.sort_unstable();
    flows.dedup();
    Ok(flows)
}

/// Removes a gate whoever owns it: its programs leave the interfaces, its pins
/// and maps vanish. Whether the owner lives is for the caller to look at.
///
/// # Errors
///
/// [`GateError::NotFound`] when there is none, [`GateError::Remove`] with the
/// first pin that stayed.
pub fn unlock(directory: &Path, id: &str, role: Role) -> Result<(), GateError> {
    let path = existing(directory, id, role)?;
    let removed = bpffs::remove_gate(&path);
    bpffs::release(directory);
    removed
}

/// Opens a pinned gate and becomes its owner.
///
/// # Errors
///
/// [`GateError::NotFound`] when there is none, [`GateError::Owned`] when
/// another living process owns it, [`GateError::Layout`] when another version
/// made it.
pub fn adopt(directory: &Path, id: &str, role: Role) -> Result<Gate, GateError> {
    let path = existing(directory, id, role)?;
    let root = bpffs::open_or_mount(directory)?;
    let tables = Tables::open(&path)?;
    let owner = tables.owner();
    let me = Owner::this_process();
    if owner != me && owner.is_alive() {
        return Err(GateError::Owned {
            path,
            pid: owner.pid,
        });
    }
    let mut links = Vec::new();
    for pin in entries(&path) {
        if bpffs::parse_link(&pin).is_some_and(|hook| hook.filter.is_none()) {
            links.push(
                PinnedLink::from_pin(&pin).map_err(|error| GateError::OpenPin {
                    path: pin,
                    source: error.into(),
                })?,
            );
        }
    }
    if owner != me {
        tables.drop_instead_of_hold();
    }
    tables.set_owner(me);
    Ok(Gate {
        directory: directory.to_owned(),
        path,
        tables,
        links,
        // Where they were is for the former owner to watch: this one only
        // removes them.
        hooks: Vec::new(),
        root,
        trace: Trace::default(),
        hold: Err("what held its packets has gone with its former owner".to_owned()),
    })
}

/// Where one of the programs is attached.
#[derive(Clone, Debug)]
struct Hook {
    interface: String,
    direction: Direction,
    /// The kernel's number of the program.
    program: u32,
}

impl Hook {
    /// Whether it is the first one there, of those on tcx hooks.
    fn is_first(&self) -> bool {
        let at = match self.direction {
            Direction::Ingress => TcAttachType::Ingress,
            Direction::Egress => TcAttachType::Egress,
        };
        match SchedClassifier::query_tcx(&self.interface, at) {
            Ok((_, programs)) => programs.first().is_some_and(|p| p.id() == self.program),
            Err(error) => {
                tracing::warn!(%error, interface = self.interface, "the programs there cannot be listed");
                false
            }
        }
    }
}

/// An interface that the gate goes on.
#[derive(Clone, Debug)]
struct Device {
    index: u32,
    name: String,
    kind: DeviceKind,
    /// Of an Ethernet device.
    hardware_address: [u8; 6],
}

impl Device {
    fn find(index: u32) -> Result<Self, GateError> {
        let failed = |source| GateError::Interface { index, source };
        let name = nix::net::if_::if_indextoname(index)
            .map_err(|errno| failed(errno.into()))?
            .into_string()
            .map_err(|error| failed(io::Error::other(error)))?;
        let (kind, hardware_address) = sys::device_kind(&name).map_err(failed)?;
        Ok(Self {
            index,
            name,
            kind,
            hardware_address,
        })
    }
}

fn attach_in(path: &Path, devices: &[Device], options: &GateOptions) -> Result<Parts, GateError> {
    let (mut ebpf, tables) = tables::load(options.flow_capacity, own_mark()?)?;
    tables.set_owner(Owner::this_process());
    tables.pin(path)?;
    let mut links = Vec::with_capacity(devices.len() * 2);
    let mut hooks = Vec::with_capacity(devices.len() * 2);
    for direction in [Direction::Ingress, Direction::Egress] {
        for kind in [DeviceKind::Ethernet, DeviceKind::Bare] {
            let of_kind = || devices.iter().filter(|device| device.kind == kind);
            if of_kind().next().is_none() && !options.is_extensible {
                continue;
            }
            let program = load_program(&mut ebpf, direction, kind)?;
            let id = program
                .info()
                .map_err(|error| GateError::Load(error.into()))?
                .id();
            for device in of_kind() {
                links.extend(attach_to(program, device, direction, path)?);
                hooks.push(Hook {
                    interface: device.name.clone(),
                    direction,
                    program: id,
                });
            }
            if options.is_extensible {
                let pin = path.join(program_name(direction, kind));
                program.pin(&pin).map_err(|error| GateError::Pin {
                    path: pin,
                    source: error.into(),
                })?;
            }
        }
    }
    let trace = Trace::read(&mut ebpf);
    let hold = match options.hold {
        None => Err("not asked to".to_owned()),
        Some(bounds) => {
            let prefix = hold::device_prefix(&format!("{}-{}", options.id, options.role));
            Hold::set_up(&mut ebpf, devices, bounds, &prefix).map_err(|error| error.0)
        }
    };
    Ok(Parts {
        tables,
        links,
        hooks,
        trace,
        hold,
    })
}

/// A mark that nobody else guesses: whoever can set it passes the gate.
fn own_mark() -> Result<u32, GateError> {
    loop {
        let mark = sys::random().map_err(|error| GateError::Load(error.into()))?;
        if mark != 0 && mark != EXEMPT_MARK {
            return Ok(mark);
        }
    }
}

/// What a program is called in the object, and its pin in a gate that can be extended.
const fn program_name(direction: Direction, kind: DeviceKind) -> &'static str {
    match (direction, kind) {
        (Direction::Ingress, DeviceKind::Bare) => "gate_ingress_l3",
        (Direction::Egress, DeviceKind::Bare) => "gate_egress_l3",
        (Direction::Ingress, DeviceKind::Ethernet | DeviceKind::Loopback) => "gate_ingress",
        (Direction::Egress, DeviceKind::Ethernet | DeviceKind::Loopback) => "gate_egress",
    }
}

fn load_program(
    ebpf: &mut Ebpf,
    direction: Direction,
    kind: DeviceKind,
) -> Result<&mut SchedClassifier, GateError> {
    let name = program_name(direction, kind);
    let program: &mut SchedClassifier = ebpf
        .program_mut(name)
        .ok_or_else(|| GateError::Load(format!("the object has no program {name}").into()))?
        .try_into()
        .map_err(|error: ProgramError| GateError::Load(error.into()))?;
    load(program).map_err(|error| GateError::Load(error.into()))?;
    Ok(program)
}

/// How often a program is loaded before it is given up, as libbpf does it.
const LOAD_TRIES: u32 = 5;

/// Loads a program. The kernel gives up with EAGAIN in the middle of it when a
/// signal comes, the end of a child for one.
pub(crate) fn load(program: &mut SchedClassifier) -> Result<(), ProgramError> {
    let mut tries = 1;
    loop {
        match program.load() {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.kind() == io::ErrorKind::WouldBlock && tries < LOAD_TRIES =>
            {
                tries += 1;
            }
            loaded => return loaded,
        }
    }
}

fn attach_to(
    program: &mut SchedClassifier,
    device: &Device,
    direction: Direction,
    path: &Path,
) -> Result<Option<PinnedLink>, GateError> {
    let failed = |source: ProgramError| GateError::Attach {
        interface: device.name.clone(),
        source: source.into(),
    };
    let (hook, prefix) = match direction {
        Direction::Ingress => (TcAttachType::Ingress, "ingress"),
        Direction::Egress => (TcAttachType::Egress, "egress"),
    };
    let unpinned = |pin: &Path| {
        let path = pin.to_owned();
        move |source| GateError::Pin { path, source }
    };
    if !has_tcx() {
        let link = attach_filter(program, &device.name, hook).map_err(failed)?;
        let handle = u32::from(link.handle().map_err(failed)?);
        // The name says where it hangs; the pin keeps the name.
        let pin = path.join(format!("{prefix}-{}-{handle}", device.index));
        let pinned = program
            .pin(&pin)
            .map_err(|error| unpinned(&pin)(error.into()));
        if let Err(error) = pinned {
            // Dropping it takes it off again.
            drop(link);
            return Err(error);
        }
        // As pinned links do, it outlives its owner.
        std::mem::forget(link);
        return Ok(None);
    }
    let id = program
        .attach_with_options(
            &device.name,
            hook,
            TcAttachOptions::TcxOrder(LinkOrder::first()),
        )
        .map_err(failed)?;
    let link = program.take_link(id).map_err(failed)?;
    let pin = path.join(format!("{prefix}-{}", device.index));
    FdLink::try_from(link)
        .map_err(|error| unpinned(&pin)(error.into()))?
        .pin(&pin)
        .map(Some)
        .map_err(|error| unpinned(&pin)(error.into()))
}

/// The oldest kernel on which the gate has been tried: Debian 12's.
const OLDEST_KERNEL: KernelVersion = KernelVersion::new(6, 1, 0);
/// Filters of this priority come first.
const FILTER_PRIORITY: u16 = 1;

/// Whether programs hang on tcx hooks (Linux commit e420bed02507), or on the
/// filters that came before them.
fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|kernel| kernel >= KernelVersion::new(6, 6, 0))
}

/// Attaches a program as a filter, in front of other eBPF filters. The queueing
/// discipline that it needs stays: others may have put theirs there meanwhile.
fn attach_filter(
    program: &mut SchedClassifier,
    interface: &str,
    hook: TcAttachType,
) -> Result<SchedClassifierLink, ProgramError> {
    // It may be there already; if not, attaching fails.
    let _ = qdisc_add_clsact(interface);
    let options = NlOptions {
        priority: FILTER_PRIORITY,
        ..NlOptions::default()
    };
    let id = program.attach_with_options(interface, hook, TcAttachOptions::Netlink(options))?;
    program.take_link(id)
}

fn gate_path(directory: &Path, id: &str, role: Role) -> Result<PathBuf, GateError> {
    let is_good = (1..=64).contains(&id.len())
        && id
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if !is_good {
        return Err(GateError::BadId { id: id.to_owned() });
    }
    Ok(directory.join(format!("{id}-{role}")))
}

fn existing(directory: &Path, id: &str, role: Role) -> Result<PathBuf, GateError> {
    let path = gate_path(directory, id, role)?;
    if path.is_dir() {
        Ok(path)
    } else {
        Err(GateError::NotFound { path })
    }
}

fn parse_gate_name(path: &Path) -> Option<(String, Role)> {
    let (id, role) = path.file_name()?.to_str()?.rsplit_once('-')?;
    Some((id.to_owned(), role.parse().ok()?))
}

fn entries(path: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(path)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
}

fn attached_interfaces(path: &Path) -> Vec<u32> {
    let mut indexes: Vec<u32> = entries(path)
        .filter_map(|pin| Some(bpffs::parse_link(&pin)?.interface_index))
        .collect();
    indexes.sort_unstable();
    indexes.dedup();
    indexes
}
