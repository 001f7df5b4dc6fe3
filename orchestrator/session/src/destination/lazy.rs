//! Memory that arrives while the copy runs: served by a process of its own, so
//! that neither can take the other down.

use std::ops::Range;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use migrate_channel::{Receiver, Sender};
use migrate_core::facts::TreeFacts;
use migrate_core::late::LateRuns;
use migrate_core::wire::{PAGE_BYTES, PageOwner, RestoreChoice};
use migrate_criu::ImageDir;
use migrate_memory::{
    Keeper, LatePages, LazyError, LazyOptions, LazyServer, LazyServing, PageStore, keep, probe_lazy,
};
use migrate_proc::Home;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::fetch::{Expected, Fetch};
use super::receive::nothing;
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
    /// The connection for what comes after the commit, until that is known.
    link: Option<(Sender, Receiver)>,
    late: Option<Late>,
    pages: u64,
    /// Giving its memory back takes a while, in which this process can map nothing
    /// else: not while peers wait. The keeper has it as well until all is in place.
    store: Option<PageStore>,
    /// For the end of a copy that cannot have its memory.
    home: String,
    pids: Vec<i32>,
}

/// Memory that comes after the commit.
#[derive(Debug)]
struct Late {
    pages: Arc<LatePages>,
    owned: watch::Sender<bool>,
    fetching: JoinHandle<Result<(), Error>>,
}

impl Drop for Late {
    fn drop(&mut self) {
        self.fetching.abort();
        if self.pages.missing() > 0 {
            // Nobody brings it any more.
            self.pages.lose();
        }
    }
}

impl Memory {
    /// What comes after the commit comes over this connection.
    pub(super) fn comes_over(&mut self, link: (Sender, Receiver)) {
        self.link = Some(link);
    }

    /// Nothing has ended the way to memory that is still to come.
    pub(super) fn is_coming(&self) -> Result<(), Error> {
        match &self.late {
            Some(late) if late.pages.is_lost() => Err(Error::Changed(
                "the connection for memory that is to follow has ended".to_owned(),
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// The tree is this host's: what does not come now is lost.
    pub(super) fn is_owned(&self) {
        if let Some(late) = &self.late {
            late.owned.send_replace(true);
        }
    }

    /// A copy that was given up, and may run all the same.
    pub(super) async fn abandoned(self) -> Result<(), Error> {
        if self.late.is_some() || self.is_served().is_err() {
            return self.complete().await.map(drop);
        }
        // The keeper does its work alone.
        Ok(())
    }

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
        if !choice.is_lazy(tree) {
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
        peer: &str,
        images: &ImageDir,
        store: PageStore,
        hot: Vec<(PageOwner, Range<u64>)>,
        late: LateRuns,
        expected: Expected,
    ) -> Result<(), Error> {
        let link = self.link.take();
        let (Some(keeper), Some(arriving)) = (self.keeper.take(), &self.arriving) else {
            give_back(store);
            return Ok(());
        };
        let plan = images.lazy_ranges();
        let bytes: u64 = plan.iter().map(|(_, range)| range.end - range.start).sum();
        if bytes == 0 {
            give_back(store);
            return Ok(());
        }
        let hold = arriving
            .share()
            .map_err(Error::file("share", "the lock of memory that arrives"))?;
        let options = LazyOptions {
            first: hot,
            then: store.rewritten(),
            ..LazyOptions::default()
        };
        let server = LazyServer::bind(images.path())?;
        let pages = LatePages::new(late.pages());
        let pages = Arc::new(pages.map_err(Error::file("make room for", "memory to come"))?);
        let shared = (Arc::clone(&pages), &late);
        let store = self.store.insert(store);
        self.serving = Some(keeper.serve(server, store, &plan, options, shared, Some(hold))?);
        if late.pages() > 0 {
            let link = link.ok_or_else(|| nothing("the connection for memory to come"))?;
            let (owned, is_owned) = watch::channel(false);
            let fetch = Fetch {
                peer: peer.to_owned(),
                pages: Arc::clone(&pages),
                runs: late,
                link,
                expected,
                owned: is_owned,
            };
            let fetching = fetched(fetch, self.home.clone(), self.pids.clone());
            self.late = Some(Late {
                pages,
                owned,
                fetching: tokio::spawn(fetching),
            });
        }
        self.pages = bytes / PAGE_BYTES as u64;
        Ok(())
    }

    /// Whether memory will come late.
    pub(super) fn is_prepared(&self) -> bool {
        self.keeper.is_some()
    }

    /// PID of who will serve them.
    pub(super) fn keeper(&self) -> Option<i32> {
        self.keeper.as_ref().map(Keeper::pid)
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

    /// Whether the keeper lives. This process would put memory in place without
    /// it, but nobody would if this one ended, too.
    pub(super) fn is_served(&self) -> Result<(), Error> {
        let serving = self.serving.as_ref();
        Ok(serving.map_or(Ok(()), LazyServing::is_served)?)
    }

    /// Waits until all memory is in place; whether it is, for a keeper may be at work
    /// without this process. A copy that can never have it is killed: it must not find
    /// zeros where its memory was.
    pub(super) async fn complete(mut self) -> Result<bool, Error> {
        if let Some(store) = self.store.take() {
            give_back(store);
        }
        let Some(mut serving) = self.serving.take() else {
            self.give_up();
            return Ok(true);
        };
        let fetched = match &mut self.late {
            Some(late) => (&mut late.fetching)
                .await
                .unwrap_or_else(|_| Err(nothing("whoever brings memory"))),
            None => Ok(()),
        };
        // The limit of the fill itself is shorter.
        let limit = LazyOptions::default().limit.saturating_mul(2);
        let (serving, end) = blocking(move || {
            let end = serving.wait(limit);
            (serving, end)
        })
        .await?;
        match fetched.and(end.map_err(Error::from)) {
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
            Err(Error::Lazy(error @ LazyError::Unguarded)) => {
                tracing::warn!(error = %crate::error::chain(&error), "memory is still arriving");
                // The record lasts for as long as the keeper does.
                return Ok(false);
            }
            Err(Error::Lazy(LazyError::RestoreEnded)) => {
                tracing::info!("the copy has never run and needs no memory");
            }
            Err(error) => {
                end_copy(&self.home, &self.pids, &error.chain());
                drop(serving);
                self.give_up();
                return Err(error);
            }
        }
        self.give_up();
        Ok(true)
    }

    /// Nothing is missing, or nobody is left to miss it.
    pub(super) fn give_up(mut self) {
        self.late = None;
        self.serving = None;
        self.keeper = None;
        if let Some(store) = self.store.take() {
            give_back(store);
        }
        if let Some(arriving) = self.arriving.take() {
            arriving.done();
        }
    }
}

/// Gives back a store's memory, for which nobody waits.
fn give_back(store: PageStore) {
    tokio::task::spawn_blocking(move || drop(store));
}

/// Brings all pages. Without them the copy cannot go on, and nobody waits with its
/// end until somebody asks.
async fn fetched(fetch: Fetch, home: String, pids: Vec<i32>) -> Result<(), Error> {
    let (pages, owned) = (Arc::clone(&fetch.pages), fetch.owned.clone());
    let brought = fetch.run().await;
    if let Err(error) = &brought {
        pages.lose();
        // Before that the migration rolls back, and removes the copy itself.
        if *owned.borrow() {
            let error = error.chain();
            let ended = tokio::task::spawn_blocking(move || end_copy(&home, &pids, &error)).await;
            if let Err(error) = ended {
                tracing::error!(%error, "the tree could not be killed");
            }
        }
    }
    brought
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
            end_copy(home, pids, &crate::error::chain(&error));
            false
        }
    }
}

/// Kills a copy whose memory cannot be had.
fn end_copy(home: &str, pids: &[i32], error: &str) {
    tracing::error!(
        error,
        ?pids,
        "the tree is killed: its memory cannot be put in place"
    );
    if let Err(error) = Home::end(home, pids) {
        tracing::error!(error = %crate::error::chain(&error), "the tree could not be killed");
    }
}
