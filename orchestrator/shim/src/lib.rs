//! What stands between CRIU and the kernel during the final dump.
//!
//! CRIU leaves a page out of a dump when it is in the parent image and has
//! not been written since, which it learns from the soft-dirty bit. The
//! tracker of a migration knows better and on kernels without that bit too: it
//! has write-protected the tree's memory with a userfaultfd. This library is
//! preloaded into an unmodified CRIU and gives that answer to CRIU's question:
//!
//! ```text
//!  CRIU                         here                            kernel
//!  PAGEMAP_SCAN: soft-dirty? -> PAGEMAP_SCAN: written,       -> by the protection
//!                               and may it be protected?
//!  soft-dirty                <- written, or not protectable  <-
//! ```
//!
//! A page counts as clean only where its mapping belongs to the tracker at
//! this moment and the page has not been written since it was last protected.
//! All else is dirty: what is mapped anew, moved or grown, what another
//! userfaultfd guards, and whatever is asked in a way that is not known here.
//! So a mistake costs time and never a page.
//!
//! CRIU wants no pages of files in that answer, for which the kernel looks at the
//! descriptor of every page. Where a whole range is one mapping of private memory
//! without a file, which `PROCMAP_QUERY` says, there are none, and the kernel is
//! not asked: the answer is the same, and most of the time it takes is saved.
//!
//! And of the tasks that `MIGRATE_SHIM_CLEAN` names CRIU hears nothing of clean pages in such a
//! range: they are listed by who has started it.
//!
//! More calls are looked at, and all others pass:
//!
//! - reads of a process's `pagemap`: soft-dirty is set in every entry. CRIU
//!   probes with one such read whether the kernel tracks at all; and a CRIU
//!   that does without `PAGEMAP_SCAN` finds everything dirty.
//! - `open`, `unlink` and `rename` of CRIU's cache of probes: what CRIU finds
//!   under this library must not be believed by a CRIU without it, so that
//!   the cache is kept where `MIGRATE_SHIM_KDAT` says, or else nowhere.
//! - `open` of a process's `smaps`: CRIU wants the flags of mappings from it, and the
//!   kernel looks at every page for the counts that stand beside them. Where
//!   `MIGRATE_SHIM_MAPPINGS` names a program that reads flags, CRIU gets what it reads of
//!   that file, made of `maps` and those flags; else, or where both do not fit each other,
//!   the file itself.
//! - `open` of a process's `clear_refs`: CRIU has the kernel forget which pages have been
//!   written, which takes it a walk through all of them and is of no use here. `/dev/null`
//!   takes what it writes.
//! - `kcmp`, which CRIU asks whether a descriptor is the file that an epoll set has it for:
//!   of sockets that is seen here, where the kernel would walk through the set for each.
//! - `lseek` for the data of a shared segment whose pages reach the destination
//!   another way: there is none. CRIU, which dumps such segments whole, then
//!   lists no page of it.
//! - `fstat` of `/dev/net/tun`, where `MIGRATE_SHIM_TUNNELS` asks for it: a device
//!   without a state, as `/dev/null` is one.
//!   CRIU dumps a tunnel device only along with a whole network namespace; so it
//!   writes down an open file, and the destination puts one in its place that
//!   it has attached to its own device.
//!
//! Nothing here allocates, panics or keeps a lock. The object needs three
//! functions of the C library, by names without a version, so that it can be
//! loaded by any: the one of the machine, or one that CRIU brought along.
#![no_std]
#![cfg_attr(
    not(preload),
    allow(dead_code, reason = "what the loader and CRIU call has no caller here")
)]

#[cfg(test)]
extern crate std;

mod clean;
mod epoll;
pub mod flags;
mod hooks;
pub mod mappings;
mod paths;
mod probe;
mod scan;
mod segments;
mod sys;
