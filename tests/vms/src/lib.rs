//! Test hosts made of virtual machines: the hosts of [`migrate_test_hosts`], each with a kernel of
//! its own.
//!
//! A [`Machines`] is a set of guests under QEMU, with Debian kernels that `scripts/vms` has
//! fetched. Their root is made of files of this machine: programs, libraries, CRIU, what was built
//! here. They have the names and addresses of the hosts made of namespaces, an sshd where those
//! have one, and share a network that is a thread of this process; it leads nowhere else.
//!
//! ```text
//!   ┌───────────┐ ┌───────────┐ ┌───────────┐
//!   │ client    │ │ host1 6.1 │ │ host2 6.12│    QEMU, emulation unless MIGRATE_VM_KVM is set
//!   └─┬───────┬─┘ └─┬───────┬─┘ └─┬───────┬─┘
//!  frames   agent  ...     ...   ...     ...     datagram sockets; serial ports
//!   ┌─┴─────────────┴─────────────┴─┐     │
//!   │ switch                        │     └── Machine::command: a process of this machine that
//!   └───────────────────────────────┘         stands for a command in the guest
//! ```
//!
//! The consoles are watched: a guest that panics, oopses or locks up is dead from that line on, and
//! whatever waits for it fails with the line.
//!
//! PID 1 of a guest and the processes that stand for commands are this very executable under
//! another name; as in `migrate_test_hosts`, they take over before `main`.

mod agent;
mod disk;
mod error;
mod exec;
mod initramfs;
mod kernels;
mod machine;
mod root;
mod switch;
mod wire;

pub use agent::DISK;
pub use error::{Error, Result};
pub use kernels::{Fetched, Kernel};
pub use machine::{Finished, Machine, Machines, Order, Way, scratch};
pub use root::{Program, lacking};

#[used]
// SAFETY: the C library calls every function of this section once, before `main`, with three
// arguments, which a C function may leave unused. `on_start` returns at once in all but helpers.
#[unsafe(link_section = ".init_array")]
static ON_START: extern "C" fn() = on_start;

extern "C" fn on_start() {
    let mut words = std::env::args_os();
    let Some(name) = words.next() else { return };
    if agent::is_init(&name) {
        agent::run();
    }
    if name != exec::EXEC {
        return;
    }
    let code = exec::run(words).unwrap_or_else(|error| {
        eprintln!("{}: {}", exec::EXEC, error.chain());
        125
    });
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}
