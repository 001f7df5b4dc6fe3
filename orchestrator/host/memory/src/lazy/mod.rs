//! Memory that arrives after the restore: pages in store are put in place while
//! the copy already runs.
//!
//! A [`LazyServer`] takes the place of `criu lazy-pages`. CRIU connects to its
//! socket and hands over a userfaultfd for each task; from then on every first
//! touch of a page waits for us, and once the tree runs all other pages are put
//! in place in the background.
//!
//! ```text
//! criu restore --connects--> LazyServer   pid + userfaultfd per task, "finished"
//! the copy     --faults----> one thread   answers at once, takes note of fork,
//!                                         mremap, munmap, madvise
//!                            fill threads put the rest in place
//! ```
//!
//! # What is kept true
//!
//! A page that was never put in place must never be taken for one of zeros,
//! which is what the kernel makes of it once its userfaultfd is closed. So:
//!
//! - Every page of the plan is looked up in store before the server starts.
//! - A userfaultfd is closed only when its memory is complete or has ended, or
//!   when CRIU gave up before the tree ran.
//! - When something fails after that, the userfaultfds stay open for as long as
//!   this process lives: threads that touch what is missing wait and never see
//!   zeros. The caller has to kill the tree. Dropping [`LazyServing`] stops
//!   nothing either.
//! - A page is put in place only where the process has not given it up since:
//!   nothing is copied between the arrival of an event and its being noted.
//!
//! What cannot be kept by one process: when it is killed, the kernel closes its
//! descriptors. So the server has a process of its own, the [`Keeper`], and the
//! one that has started it holds a duplicate of every userfaultfd:
//!
//! - The agent dies: the keeper serves on.
//! - The keeper dies: the agent goes on in its place. It has been told of every
//!   fork, remap and removal at once, so that it knows what is lacking where;
//!   filling what was filled before changes nothing. It has CRIU's connection,
//!   too: CRIU, which says over it that the tree may run, would kill the copy if
//!   it found that closed. So it goes on from the moment at which every task has
//!   been handed over. What the keeper had read and not yet passed on lies in
//!   memory that both see, for that is where it reads events to; the descriptor that
//!   comes with a fork is held by a second process with the same table of
//!   descriptors, from which the agent takes it (`holder.rs`). The last word of CRIU is
//!   passed on before it is taken. Should that second process die as well in those
//!   microseconds, or the keeper while CRIU hands tasks over, the agent says that
//!   the tree has to be killed ([`LazyError::Lost`]) and keeps everything closed to it
//!   until then.
//! - Both die at the same moment: nobody is left. They have different names,
//!   the keeper is deaf to the usual signals and lives in the tree's cgroup,
//!   which nobody kills without killing the tree.
//!
//! A userfaultfd that is complete is closed by the agent first, since somebody
//! has to answer as long as it is open.
//!
//! The kernel reports an unmapped range only after another thread may have got
//! the same addresses anew. Should that thread move unfilled memory to there
//! with `mremap`, and be heard first, the moved pages would be forgotten. The
//! window is that between two system calls' last instructions.

mod guard;
mod holder;
mod late;
mod partner;
mod plan;
mod serve;
mod sys;

pub use guard::{Keeper, keep, keep_until};
pub use late::LatePages;
pub use partner::Death;

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use migrate_core::late::LateRuns;
use migrate_core::wire::PageOwner;
use thiserror::Error;

use crate::PAGE;
use crate::arena::Mapping;
use crate::mask::SomePages;
use crate::store::{Content, PageStore};

/// Name of the socket in CRIU's working directory (`LAZY_PAGES_SOCK_NAME`,
/// CRIU `uffd.c`).
const SOCKET_NAME: &str = "lazy-pages.socket";

/// How long nothing may come of what is still on the source before the copy is
/// given up: longer than any network that recovers takes for a few segments sent
/// again, shorter than peers wait for a tree that stands still.
pub const LATE_LIMIT: Duration = Duration::from_secs(30);

/// Whether memory can be put in place here while a copy runs: the kernel has
/// the userfaultfd that CRIU asks for, and this process may have one.
///
/// # Errors
///
/// What is missing.
pub fn probe_lazy() -> Result<(), LazyError> {
    sys::probe().map_err(|source| LazyError::Start { source })
}

/// How pages are put in place.
#[derive(Debug, Clone)]
pub struct LazyOptions {
    /// Threads that fill in the background; at least 1.
    pub threads: usize,
    /// Most bytes of one copy: 64 KiB to 1 MiB. A fault waits for at most one
    /// such copy per thread.
    pub piece_bytes: u64,
    /// How long the background fill may take once the tree runs.
    pub limit: Duration,
    /// What comes first, in this order: what was written most recently.
    pub first: Vec<(PageOwner, Range<u64>)>,
    /// What comes after that and before the rest.
    pub then: Vec<SomePages>,
}

impl Default for LazyOptions {
    fn default() -> Self {
        Self {
            threads: 2,
            // About 50 µs.
            piece_bytes: 128 << 10,
            limit: Duration::from_secs(600),
            first: Vec::new(),
            then: Vec::new(),
        }
    }
}

/// What a complete [`LazyServer`] has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LazyReport {
    /// Tasks that CRIU handed over.
    pub tasks: u32,
    /// Forks followed.
    pub forks: u32,
    /// Address spaces, forked ones included, that ended before they were
    /// complete: their processes exited or became other programs.
    pub ended: u32,
    /// Page faults answered.
    pub faults: u64,
    /// Pages put in place, by faults and in the background.
    pub filled_pages: u64,
    /// Pages that were there already and stayed as they were. Nobody but the
    /// server provides pages that are lacking, so that this is 0, unless the
    /// process has made guard pages of them.
    pub found_pages: u64,
    /// From the moment the tree may run to the last page, in microseconds.
    pub took_us: u64,
}

/// Why memory could not be put in place.
#[derive(Debug, Error)]
pub enum LazyError {
    /// The socket for CRIU could not be made.
    #[error("could not listen on {}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A page that is to come is not in store. Nothing has been touched.
    #[error("page {vaddr:#x} of {owner:?} is not in store")]
    PageMissing {
        /// Whose.
        owner: PageOwner,
        /// Where.
        vaddr: u64,
    },
    /// A thread could not be started, or a descriptor not be made.
    #[error("could not start to serve memory")]
    Start {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// CRIU closed its connection before the tree was complete, or never
    /// connected.
    #[error("criu gave up before the copy was complete")]
    RestoreEnded,
    /// What came over the socket is not what CRIU sends.
    #[error("criu sent something unknown about lazy memory: {what}")]
    Protocol {
        /// What it was.
        what: &'static str,
    },
    /// A system call failed for good.
    #[error("could not {attempt} memory of process {pid}")]
    Memory {
        /// What was tried.
        attempt: &'static str,
        /// Whose memory, as the tree itself numbers processes.
        pid: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The background fill took too long.
    #[error("{missing_bytes} bytes of memory were not in place after {limit:?}")]
    Slow {
        /// What was still missing.
        missing_bytes: u64,
        /// How long it could take.
        limit: Duration,
    },
    /// It is not done yet.
    #[error("memory is not complete after {waited:?}")]
    NotYet {
        /// How long was waited.
        waited: Duration,
    },
    /// Whoever serves has ended without a word.
    #[error("whoever puts the copy's memory in place has died")]
    Lost,
    /// Pages that were still on the source will never come.
    #[error("{missing} pages of memory have not come from the source")]
    NeverCame {
        /// How many.
        missing: u64,
    },
    /// The keeper has failed.
    #[error("the memory keeper has failed: {why}")]
    Keeper {
        /// In its own words.
        why: String,
    },
    /// The keeper has given up this process, which was too slow, and serves on
    /// without it.
    #[error("the memory keeper serves on by itself")]
    Unguarded,
}

impl LazyError {
    /// The way out, where there is one.
    #[must_use]
    pub fn help(&self) -> Option<&'static str> {
        match self {
            Self::Memory { .. }
            | Self::Slow { .. }
            | Self::Lost
            | Self::NeverCame { .. }
            | Self::PageMissing { .. }
            | Self::Keeper { .. } => {
                Some("the copy waits where memory is missing and cannot go on: it has to be killed")
            }
            Self::Listen { .. }
            | Self::Start { .. }
            | Self::RestoreEnded
            | Self::Protocol { .. }
            | Self::NotYet { .. }
            | Self::Unguarded => None,
        }
    }
}

/// A socket that waits for CRIU.
#[derive(Debug)]
pub struct LazyServer {
    listener: UnixListener,
}

impl LazyServer {
    /// Makes the socket in CRIU's working directory: the image directory. Do
    /// this before the restore is ordered.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn bind(directory: &Path) -> Result<Self, LazyError> {
        let path = directory.join(SOCKET_NAME);
        let failed = |source| LazyError::Listen {
            path: path.clone(),
            source,
        };
        let listener = UnixListener::bind(&path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener })
    }

    /// Serves `pages` to the tasks that CRIU restores, in this process: those
    /// that `plan` names, at the addresses they had. Everything else that a task
    /// touches is zeros. Returns at once.
    ///
    /// # Errors
    ///
    /// A page is not in store, or the threads cannot be started.
    pub fn start(
        self,
        pages: &PageStore,
        plan: &[(PageOwner, Range<u64>)],
        options: LazyOptions,
    ) -> Result<LazyServing, LazyError> {
        let failed = |source| LazyError::Start { source };
        let lacking = lacking(pages, &LateRuns::default(), plan)?;
        let bell = Arc::new(sys::event_fd().map_err(failed)?);
        let file = match pages.file() {
            Ok(file) => file.try_clone_to_owned(),
            // There are no pages.
            Err(_) => crate::arena::memory_file(c"migrate-pages").map(OwnedFd::from),
        };
        let file = file.map_err(failed)?;
        let (teller, told) = mpsc::channel();
        let server = serve::Server::new(serve::Task {
            pages: Arc::new(Mapping::of(file.as_fd()).map_err(failed)?),
            late: Arc::new(LatePages::new(0).map_err(failed)?),
            late_places: Vec::new(),
            plans: serve::plans(lacking, options.first, options.then),
            threads: options.threads,
            piece_bytes: options.piece_bytes,
            limit: options.limit,
            bell: Arc::clone(&bell),
            partner: None,
            teller: Some(teller.clone()),
        })
        .map_err(failed)?;
        std::thread::Builder::new()
            .name("lazy-faults".to_owned())
            .spawn(move || {
                let end = server.serve(&self.listener);
                // Nobody may want to know.
                let _ = teller.send(Told::End(end, Vec::new()));
            })
            .map_err(failed)?;
        Ok(LazyServing {
            told: Mutex::new(told),
            handed_over: false,
            bell,
            keeper: None,
            held: Vec::new(),
        })
    }
}

/// What a server lets know.
#[derive(Debug)]
enum Told {
    /// CRIU has handed over every task that lacks memory.
    HandedOver,
    /// The end, and what must stay open until the copy is dead.
    End(Result<LazyReport, LazyError>, Vec<OwnedFd>),
}

/// The parts of the plan that have content, with their place in the store's file
/// or, of what is not on this host yet, from [`late::LATE_FROM`] on; the rest is
/// zeros, which nobody has to put in place.
fn lacking(
    pages: &PageStore,
    late_runs: &LateRuns,
    plan: &[(PageOwner, Range<u64>)],
) -> Result<Vec<(PageOwner, Range<u64>, u64)>, LazyError> {
    let mut lacking = Vec::with_capacity(plan.len());
    let mut parts: Vec<(Range<u64>, Option<u64>)> = Vec::new();
    for (owner, range) in plan {
        let here = pages.range(*owner, range.clone()).map(|piece| {
            let end = piece.vaddr + piece.content.pages() * PAGE;
            let from = match piece.content {
                Content::Data(data) => Some(pages.offset(data)),
                Content::Zero(_) => None,
            };
            (piece.vaddr..end, from)
        });
        let there = late_runs.within(*owner, range.clone()).map(|run| {
            let from = late::LATE_FROM + run.first * PAGE;
            (run.range(), Some(from))
        });
        parts.extend(here.chain(there));
        parts.sort_by_key(|(part, _)| part.start);
        let mut at = range.start;
        for (part, from) in parts.drain(..) {
            if part.start != at {
                break;
            }
            at = part.end;
            if let Some(from) = from {
                lacking.push((*owner, part, from));
            }
        }
        if at < range.end {
            return Err(LazyError::PageMissing {
                owner: *owner,
                vaddr: at,
            });
        }
    }
    Ok(lacking)
}

/// A server at work. Dropping this does not stop it once CRIU has connected;
/// before that it ends. Drop it when the restore is given up and the copy dead.
#[derive(Debug)]
pub struct LazyServing {
    /// Locked only for the sake of the compiler: there is one that listens.
    told: Mutex<mpsc::Receiver<Told>>,
    handed_over: bool,
    bell: Arc<OwnedFd>,
    /// The connection to the keeper, when there is one, and what stands for it.
    keeper: Option<(OwnedFd, OwnedFd)>,
    /// Userfaultfds of a copy that must not run.
    held: Vec<OwnedFd>,
}

impl LazyServing {
    /// Waits until CRIU has handed over every task that lacks memory, at most
    /// `limit`. Before that the copy must not run. Blocks.
    ///
    /// # Errors
    ///
    /// [`LazyError::NotYet`], or the server has ended.
    pub fn handed_over(&mut self, limit: Duration) -> Result<(), LazyError> {
        let told = self.told.get_mut().unwrap_or_else(PoisonError::into_inner);
        let told = if self.handed_over {
            // Has it ended since?
            match told.try_recv() {
                Err(mpsc::TryRecvError::Empty) => return Ok(()),
                Err(mpsc::TryRecvError::Disconnected) => return Err(LazyError::Lost),
                Ok(told) => told,
            }
        } else {
            match told.recv_timeout(limit) {
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(LazyError::NotYet { waited: limit });
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(LazyError::Lost),
                Ok(told) => told,
            }
        };
        match told {
            Told::HandedOver => {
                self.handed_over = true;
                Ok(())
            }
            Told::End(end, held) => {
                self.held = held;
                end.and(Err(LazyError::Lost))
            }
        }
    }

    /// Whether the process that serves is there, for as long as there is a tree to
    /// go back to: this one would serve on, but not if it died as well.
    ///
    /// # Errors
    ///
    /// [`LazyError::Lost`].
    pub fn is_served(&self) -> Result<(), LazyError> {
        // By the kernel: whoever listens to it may not have come to that yet.
        match &self.keeper {
            Some((_, pidfd)) if sys::has_ended(pidfd.as_fd()) => Err(LazyError::Lost),
            _ => Ok(()),
        }
    }

    /// Waits until all memory is in place, at most `limit`. Blocks.
    ///
    /// # Errors
    ///
    /// [`LazyError::NotYet`] when it is not: it may be called again. All others
    /// are the end. [`LazyError::RestoreEnded`] leaves nothing behind; after
    /// those with a [`LazyError::help`] the tree must be killed.
    pub fn wait(&mut self, limit: Duration) -> Result<LazyReport, LazyError> {
        let told = self.told.get_mut().unwrap_or_else(PoisonError::into_inner);
        loop {
            match told.recv_timeout(limit) {
                Ok(Told::HandedOver) => self.handed_over = true,
                Ok(Told::End(end, held)) => {
                    self.held = held;
                    return end;
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(LazyError::NotYet { waited: limit });
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(LazyError::Lost),
            }
        }
    }
}

impl Drop for LazyServing {
    fn drop(&mut self) {
        sys::ring(self.bell.as_fd());
        if !self.handed_over
            && let Some((socket, _)) = &self.keeper
        {
            sys::hang_up(socket.as_fd());
        }
    }
}
