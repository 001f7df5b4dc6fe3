//! Test hosts made of namespaces: two machines and a client on one kernel.
//!
//! A [`Lab`] is one set of hosts. Each [`Host`] has its own PID, mount, network, UTS, IPC and
//! (where cgroup2 is there) cgroup namespace, a reaping init, `/proc`, `/sys`, terminals, a
//! memory-backed `/run`, `/srv` and `/dev/shm`, a name and an address. `host1` and `host2` run a
//! real sshd.
//!
//! ```text
//!            lab "demo"                            10.77.0.0/24, fd77::/64
//!   ┌──────────┐   ┌──────────┐   ┌──────────┐
//!   │ client   │   │ host1    │   │ host2    │     client     .1     ::1
//!   │          │   │ sshd     │   │ sshd     │     host1      .11    ::11
//!   │   eth0   │   │   eth0   │   │   eth0   │     host2      .12    ::12
//!   └────┬─────┘   └────┬─────┘   └────┬─────┘     workload   .100   ::100 (on host1 at first)
//!        └──────────┬───┴──────────────┘
//!               ┌───┴────┐
//!               │ switch │  a bridge in a namespace of its own; no way out
//!               └────────┘
//! ```
//!
//! Nothing of a lab is held by a mount or a file of the machine: the init processes are all that
//! keeps it alive, so killing them ends every process, mount, interface and BPF link in it.
//!
//! # The helper processes
//!
//! The inits and the processes that enter a host are this very executable, started again under
//! another name. They take over before `main` (see the `helper` module), so that any program that
//! links this crate can bring a lab up: a test as well as `xtask`.
//!
//! # Example
//!
//! ```no_run
//! use migrate_test_hosts::{HostName, Lab};
//!
//! let lab = Lab::scoped("example")?;
//! let out = lab.host(HostName::Host1).exec(["ssh", "host2", "hostname"])?;
//! assert_eq!(out.stdout, b"host2\n");
//! # Ok::<(), migrate_test_hosts::Error>(())
//! ```

mod authority;
mod cgroup;
mod error;
pub mod files;
mod helper;
mod host;
mod lab;
mod layout;
mod processes;

pub use authority::Authority;
pub use error::{Error, Result};
pub use host::Host;
pub use lab::{Lab, LabGuard, LabName};
pub use layout::{
    HostName, INTERFACE, PREFIX_BITS_V4, PREFIX_BITS_V6, STRANGER, WORKLOAD_V4, WORKLOAD_V6,
};
