//! Everything a host knows through /proc, /sys and signals.
//!
//! The process tree and what it stands on ([`tree`], [`Tree`]), whether this
//! host can take one ([`compare_files`], [`compare_pids`], [`compare_hosts`]),
//! who would start it again ([`supervisor`]), what keeps it from running
//! after a dump ([`Fence`]), where it lives after a restore ([`Home`]), which unit
//! takes it then ([`adopt`]), and its connections when CRIU has left them half way ([`TcpSockets`]).
//! Sockets are only counted here; `migrate-net` judges them.

mod adopt;
mod cgroup;
mod cpu;
mod descriptors;
mod error;
mod fence;
mod files;
mod findings;
mod home;
mod host;
mod kernel;
mod parse;
mod precedence;
mod read;
mod repair;
mod signal;
mod socket;
mod supervisor;
mod systemd;
mod tree;
mod tunnel;

pub use adopt::{ADOPT_VERB, Adoption, adopt, bring_in, clear_adoptions, unit_facts};
pub use cpu::CpuWatch;
pub use error::ProcError;
pub use fence::{Fence, FenceKind, FenceRecord, FenceWatch, FencedProcess};
pub use files::compare_files;
pub use home::{Home, detach_from_session};
pub use host::{compare_hosts, compare_pids, host_facts, may_lock_memory, wanted_ids};
pub use precedence::{Precedence, end_behind_others, never_killed_for_memory};
pub use repair::TcpSockets;
pub use signal::{kill_tree, terminate};
pub use supervisor::{
    HoldDown, HoldDownRecord, Supervisor, hold_down, supervisor, supervisor_finding,
};
pub use tree::{ResidentMemory, Tree, start_ticks, tracer, tree, validate_target};
pub use tunnel::{TUNNEL_DEVICE, attach_tunnel, compare_tunnel};
