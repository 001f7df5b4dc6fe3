//! What the end-to-end suites share: workloads, strict clients, and the
//! questions a suite asks after a migration.
//!
//! The strict clients are the judges of this project. They hold every reply
//! against its request, so a byte that is lost, doubled or changed while a
//! connection moves cannot go unseen; their own tests put such faults on the
//! wire and demand that each is found.

pub mod client;
pub mod echo_wire;
pub mod field;
pub mod hosts;
pub mod migration;
pub mod parking;
pub mod refusals;
pub mod seccomp;
pub mod soak;
pub mod standing;
pub mod streams;
pub mod strict;
pub mod tunnel;
pub mod workload;
