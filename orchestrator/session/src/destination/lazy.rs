//! Memory that arrives while the copy runs: served by a process of its own, so
//! that neither can take the other down.

use std::ops::Range;
use std::process::{Command, Stdio};
use std::time::Duration;

use migrate_core::facts::TreeFacts;
use migrate_core::wire::{PAGE_BYTES, PageOwner, RestoreChoice};
use migrate_criu::ImageDir;
use migrate_memory::{
    Keeper, LazyError, LazyOptions, LazyServer, LazyServing, PageStore, keep, probe_lazy,
};
use migrate_proc::Home;

use crate::error::Error;
use crate::state::{Arriving, State};

/// The verb of this program that becomes the keeper.
const KEEPER_VERB: &str = "keep-memory";

/// How long CRIU may take from its last word about the copy to the last task's
/// userfaultfd being in our hands: it is under way already.
const HANDED_OVER_LIMIT: Duration = Duration::from_secs(10);

/// What this side has set up for memory that comes late; empty for a copy that
/// gets all of its memory at once.
#[derive(Debug, Default)]
pub(super) struct Memory {
    arriving: Option<Arriving>,
    keeper: Option<Keeper>,
    serving: Option<LazyServing>,
    pages: u64,
    /// For the end of a copy that cannot have its memory.
    home: String,
    pids: Vec<i32>,
}

impl Memory {
    /// Starts the keeper, if there is to be one, and tells the image directory.
    pub(super) fn prepare(
        &mut self,
        choice: RestoreChoice,
        state: &State,
        migration_id: &str,
        tree: &TreeFacts,
        home: &Home,
        images: &mut ImageDir,
    ) -> Result<(), Error> {
        if !choice.is_lazy(tree.processes.len(), tree.resident_bytes) {
            return Ok(());
        }
        if let Err(error) = probe_lazy() {
            let why = crate::error::chain(&error);
            if choice == RestoreChoice::Lazy {
                return Err(Error::NotLazy { why });
            }
            tracing::info!(why, "memory cannot arrive while the copy runs here");
            return Ok(());
        }
        self.home = home.path();
        self.pids = tree.processes.iter().map(|process| process.pid).collect();
        self.arriving = Some(state.arrives(migration_id, &self.pids)?);
        let mut command = Command::new("/proc/self/exe");
        command
            .args([KEEPER_VERB, "--home", &self.home])
            .args(self.pids.iter().map(ToString::to_string))
            .stderr(Stdio::null());
        let keeper = self.keeper.insert(Keeper::start(command)?);
        // Whoever kills everything there kills the copy as well, which then
        // misses nothing.
        home.place(keeper.pid())?;
        images.lazy()?;
        Ok(())
    }

    /// Gives the keeper its order, once all pages have come. `hot` comes first.
    pub(super) fn serve(
        &mut self,
        images: &ImageDir,
        store: &PageStore,
        hot: Vec<(PageOwner, Range<u64>)>,
    ) -> Result<(), Error> {
        let (Some(keeper), Some(arriving)) = (self.keeper.take(), &self.arriving) else {
            return Ok(());
        };
        let plan = images.lazy_ranges();
        let bytes: u64 = plan.iter().map(|(_, range)| range.end - range.start).sum();
        if bytes == 0 {
            return Ok(());
        }
        let hold = arriving
            .share()
            .map_err(Error::file("share", "the lock of memory that arrives"))?;
        let mut first = hot;
        first.extend(store.rewritten());
        let options = LazyOptions {
            first,
            ..LazyOptions::default()
        };
        let server = LazyServer::bind(images.path())?;
        self.serving = Some(keeper.serve(server, store, &plan, options, Some(hold))?);
        self.pages = bytes / PAGE_BYTES as u64;
        Ok(())
    }

    /// Whether memory will come late.
    pub(super) fn is_prepared(&self) -> bool {
        self.keeper.is_some()
    }

    /// Pages that come late.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Waits until somebody answers for every page that is missing.
    pub(super) async fn handed_over(&mut self) -> Result<(), Error> {
        let Some(mut serving) = self.serving.take() else {
            return Ok(());
        };
        let (serving, done) = blocking(move || {
            let done = serving.handed_over(HANDED_OVER_LIMIT);
            (serving, done)
        })
        .await?;
        self.serving = Some(serving);
        Ok(done?)
    }

    /// Waits until all memory is in place. A copy that can never have it is
    /// killed: it must not find zeros where its memory was.
    pub(super) async fn complete(mut self) -> Result<(), Error> {
        let Some(mut serving) = self.serving.take() else {
            self.give_up();
            return Ok(());
        };
        // The limit of the fill itself is shorter.
        let limit = LazyOptions::default().limit.saturating_mul(2);
        let (serving, end) = blocking(move || {
            let end = serving.wait(limit);
            (serving, end)
        })
        .await?;
        match end {
            Ok(report) => {
                tracing::info!(
                    faults = report.faults,
                    pages = report.filled_pages,
                    forks = report.forks,
                    ms = report.took_us / 1000,
                    "all memory is in place"
                );
                if report.found_pages > 0 {
                    tracing::warn!(
                        pages = report.found_pages,
                        "pages were there before they were put in place"
                    );
                }
            }
            Err(error @ LazyError::Unguarded) => {
                tracing::warn!(error = %crate::error::chain(&error), "memory is still arriving");
                // The record lasts for as long as the keeper does.
                return Ok(());
            }
            Err(error) => {
                end_copy(&self.home, &self.pids, &error);
                drop(serving);
                self.give_up();
                return Err(error.into());
            }
        }
        self.give_up();
        Ok(())
    }

    /// Nothing is missing, or nobody is left to miss it.
    pub(super) fn give_up(mut self) {
        self.serving = None;
        self.keeper = None;
        if let Some(arriving) = self.arriving.take() {
            arriving.done();
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Lazy(LazyError::Lost))
}

/// What the keeper does, from its order to its end; whether all memory came.
#[must_use]
pub fn keep_memory(home: &str, pids: &[i32]) -> bool {
    match keep() {
        Ok(report) => {
            tracing::info!(pages = report.filled_pages, "all memory is in place");
            true
        }
        Err(error @ LazyError::RestoreEnded) => {
            tracing::info!("{error}");
            true
        }
        Err(error) => {
            end_copy(home, pids, &error);
            false
        }
    }
}

/// Kills a copy whose memory cannot be had.
fn end_copy(home: &str, pids: &[i32], error: &LazyError) {
    tracing::error!(
        error = %crate::error::chain(error),
        ?pids,
        "the tree is killed: its memory cannot be put in place"
    );
    if let Err(error) = Home::end(home, pids) {
        tracing::error!(error = %crate::error::chain(&error), "the tree could not be killed");
    }
}
