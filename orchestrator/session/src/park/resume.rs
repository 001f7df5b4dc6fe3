//! Resuming: a directory in place of the source.
//!
//! It tells the destination's side, in the same process, what a source would
//! tell, from what lies on the disk:
//!
//! ```text
//!  of a stub: the host that keeps the set is asked for the images, which are
//!  checked as they come
//!  the set is whole: manifest, digests of every image, not resumed before
//!  Preflight            addresses, PIDs, files, CRIU, processor as they are now
//!  Prepare, pages, ...  behind a second gate, in front of the one from the boot
//!  Restored             the copy has not run an instruction
//!  mark                 from here on it may run: no second resume without force
//!  Go, Owned, Running   the gate from the boot goes, the tree runs
//!  mark, images gone
//! ```

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use migrate_channel::{Connection, Sender, StreamOptions};
use migrate_core::Phase;
use migrate_core::journal::Stage;
use migrate_core::parked::{Away, Manifest, Mark};
use migrate_core::preflight::{Finding, Severity};
use migrate_core::report::counted;
use migrate_core::unit::AdoptChoice;
use migrate_core::wire::{
    ImagePiece, Message, NetworkLock, PAGE_BYTES, PageRun, RestoreChoice, RunningReport,
    StdioChoice,
};
use migrate_criu::StoredRun;

use super::boot::Interfaces;
use super::elsewhere;
use super::keep::unix_s;
use super::place::{ParkError, Place};
use crate::cancel::Cancel;
use crate::destination::{self, Served};
use crate::error::Error;
use crate::images::ImagePlace;
use crate::inbox::Inbox;
use crate::journal;
use crate::progress::{Progress, Reporter};
use crate::state::State;

/// The longest a step may take: reading and restoring a large tree.
const STEP_LIMIT: Duration = Duration::from_secs(600);

/// How long another `migrate` may take to leave the set.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// Pages that are read from the disk at once: 1 MiB.
const PAGES_AT_ONCE: u64 = 256;

/// Entries of connection tracking in one message, which may have 4 MiB; one
/// takes 100 bytes at most.
const TRACKED_AT_ONCE: usize = 16 << 10;

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct Resume {
    /// The set.
    pub place: Place,
    /// Where standard streams lead, when not to where it was said at the
    /// parking.
    pub stdio: Option<StdioChoice>,
    /// Which unit is to have it.
    pub adopt: AdoptChoice,
    /// Also when it may have run since, or was parked on another machine.
    pub force: bool,
    /// Keep the images afterwards.
    pub keep: bool,
}

/// A tree that is back.
#[derive(Debug, Clone)]
pub struct Resumed {
    /// The set.
    pub name: String,
    /// Its root.
    pub root_pid: i32,
    /// Its connections.
    pub connections: usize,
    /// How long it was away, in seconds.
    pub parked_s: u64,
    /// How long it took to come back, in microseconds.
    pub took_us: u64,
    /// What the takeover had to tell.
    pub report: RunningReport,
    /// The unit that has it.
    pub unit: Option<String>,
}

/// Brings a parked tree back.
///
/// # Errors
///
/// It waits as before, behind its gate; but after
/// [`Error::LostAfterCommit`] it may run or be lost.
pub async fn resume(wanted: Resume, reporter: Reporter, cancel: Cancel) -> Result<Resumed, Error> {
    let begun = Instant::now();
    let state = State::open()?;
    crate::sweep::sweep(&state).await;
    let place = &wanted.place;
    let manifest = place.manifest()?;
    let _lock = place.lock(LOCK_LIMIT).await?;
    let id = format!("resume-{}", crate::source::migration_id()?);
    let away = match place.away()? {
        Some(away) => Some(elsewhere::settle(&state, place, away).await?),
        None => None,
    };
    may_resume(&state, &wanted, &manifest)?;
    let fetched = match &away {
        Some(away) => {
            let fetching =
                elsewhere::fetch(&state, place, away, &manifest, wanted.force, &reporter);
            // Nothing is done here yet.
            tokio::select! {
                fetched = fetching => Some(fetched?),
                () = cancel.cancelled() => return Err(Error::Cancelled),
            }
        }
        None => {
            verify(place, &manifest).await?;
            None
        }
    };
    let mut directory = crate::hello(&id);
    directory.hostname = place.path().display().to_string();
    let host = crate::hello(&id);
    let peer = host.hostname.clone();
    let (ours, theirs) = Connection::pair(directory, host);
    let served = tokio::spawn(destination::serve_parked(
        theirs,
        cancel,
        manifest.id.clone(),
    ));
    let mut feeder = Feeder {
        wanted: &wanted,
        manifest: &manifest,
        images: fetched
            .as_ref()
            .map_or_else(|| place.images(), ImagePlace::images),
        fetched,
        reporter: &reporter,
        inbox: Inbox::new(peer.clone(), ours.receiver),
        sender: ours.sender,
        id: id.clone(),
        peer,
        marked: false,
    };
    let outcome = feeder.run().await;
    let marked = feeder.marked;
    // Without a regular end of the connection it is undone there.
    let _ = feeder.sender.close().await;
    let unit = match &outcome {
        Ok(report) if report.adopting => feeder.unit().await,
        _ => None,
    };
    drop(feeder);
    let served = served
        .await
        .unwrap_or_else(|error| Err(Error::Changed(format!("the restore has panicked: {error}"))));
    let error = match (outcome, served) {
        (Ok(report), Ok(Served::Running)) => {
            if let Some(away) = &away {
                told(place, away, wanted.keep, &reporter).await;
            }
            return Ok(Resumed {
                name: place.name().to_owned(),
                root_pid: manifest.tree.root_pid,
                connections: manifest.tree.flows.len(),
                parked_s: unix_s().saturating_sub(manifest.parked_unix_s),
                took_us: crate::source::micros(begun.elapsed()),
                report,
                unit,
            });
        }
        (Err(error), _) => error,
        (Ok(_), Err(error)) => return Err(error),
        (Ok(_), Ok(Served::Asked | Served::Kept)) => {
            Error::Changed("nothing was resumed".to_owned())
        }
    };
    if marked {
        // Its record says whether it has run; the answer binds.
        if journal::verdict(&state, &id)? != Stage::Undone {
            return Err(Error::LostAfterCommit(Box::new(error)));
        }
        place.remove_mark()?;
        super::guard(place, Interfaces::Here).await?;
    }
    Err(error)
}

/// Compares what lies on the disk with what was parked.
async fn verify(place: &Place, manifest: &Manifest) -> Result<(), Error> {
    let (place, manifest) = (place.clone(), manifest.clone());
    let checked = tokio::task::spawn_blocking(move || place.verify(&manifest));
    checked
        .await
        .map_err(|error| Error::Changed(format!("reading the images failed: {error}")))?
}

/// The host that has kept the tree need not any more. It would give the set to
/// nobody but this machine, which has it marked as resumed.
async fn told(place: &Place, away: &Away, keep: bool, reporter: &Reporter) {
    if let Err(error) = elsewhere::done(place, away, keep).await {
        reporter.warn(format!(
            "{0} was not told that the tree runs again; its copy of the memory lies there as {1}: \
             remove it ({2})",
            away.keeper,
            place.name(),
            error.chain()
        ));
    }
}

/// A tree must not come back twice, nor in two places.
fn may_resume(state: &State, wanted: &Resume, manifest: &Manifest) -> Result<(), Error> {
    let path = wanted.place.path();
    let what = match wanted.place.mark()? {
        None => None,
        Some(Mark::Resuming { id, boot_id }) => {
            // Of this very boot the journal knows how it ended.
            let undone =
                boot_id == super::boot_id()? && journal::verdict(state, &id)? == Stage::Undone;
            (!undone).then(|| "was about to run when an earlier resume was cut off".to_owned())
        }
        Some(Mark::Resumed {
            images_kept: false, ..
        }) => return Err(ParkError::ImagesGone(path).into()),
        Some(Mark::Resumed { .. }) => Some("was resumed before".to_owned()),
        // Kept here for another machine.
        Some(Mark::Taken { by, .. }) => Some(format!("was given to {by}, which may run it")),
    };
    if let Some(what) = what
        && !wanted.force
    {
        return Err(ParkError::MayHaveRun { path, what }.into());
    }
    if manifest.machine_id != super::machine_id() && !wanted.force {
        return Err(ParkError::OtherMachine(manifest.host.hostname.clone()).into());
    }
    Ok(())
}

/// Tells the destination's side what a source would.
struct Feeder<'a> {
    wanted: &'a Resume,
    manifest: &'a Manifest,
    /// Where they are.
    images: PathBuf,
    /// They came from the host that has kept them.
    fetched: Option<ImagePlace>,
    reporter: &'a Reporter,
    inbox: Inbox,
    sender: Sender,
    id: String,
    peer: String,
    /// From here on the tree may run.
    marked: bool,
}

impl Feeder<'_> {
    async fn run(&mut self) -> Result<RunningReport, Error> {
        let place = &self.wanted.place;
        let images = self.images.clone();
        let begun = Instant::now();
        let detail = self.preflight().await?;
        let begun = self.ended(Phase::Preflight, begun, detail);
        self.prepare().await?;
        let begun = self.ended(Phase::Prepare, begun, String::new());
        let detail = self.feed(&images).await?;
        // They have come in once more, and the tree will be made of them.
        let was_fetched = self.fetched.take().is_some();
        self.ended(Phase::Dump, begun, detail);
        let restore_us = match self.next("the restored copy").await? {
            Message::Restored { restore_us } => restore_us,
            other => return Err(self.inbox.unexpected(&other, "the restored copy")),
        };
        self.told(Phase::Restore, restore_us, String::new());
        let begun = Instant::now();
        crate::pause::at("resume-restored");
        place.write_mark(&Mark::Resuming {
            id: self.id.clone(),
            boot_id: super::boot_id()?,
        })?;
        self.marked = true;
        crate::pause::at("resume-marked");
        self.send(&Message::Go).await?;
        match self.next("the word that it may run").await? {
            Message::Owned => {}
            other => return Err(self.inbox.unexpected(&other, "the word that it may run")),
        }
        let report = match self.next("the running tree").await? {
            Message::Running(report) => report,
            other => return Err(self.inbox.unexpected(&other, "the running tree")),
        };
        self.ended(
            Phase::Takeover,
            begun,
            format!("runs in cgroup {}", report.cgroup),
        );
        self.used_up((!was_fetched).then_some(&images));
        if let Err(error) = super::tag::follow(place.directory(), self.manifest) {
            self.reporter.warn(format!(
                "could not look after the mark of the tree for a maintenance: {}",
                error.chain()
            ));
        }
        Ok(report)
    }

    /// Waits for the word which unit has the tree; it runs whatever is said.
    async fn unit(&mut self) -> Option<String> {
        let adopted = self.inbox.adopted().await.ok()?;
        if let Some(warning) = adopted.warning {
            self.reporter.warn(warning);
        }
        adopted.unit
    }

    /// The tree runs: what is left of it here is of the past.
    fn used_up(&self, images: Option<&PathBuf>) {
        let place = &self.wanted.place;
        let marked = place.write_mark(&Mark::Resumed {
            unix_s: unix_s(),
            images_kept: self.wanted.keep,
        });
        if let Err(error) = marked {
            self.reporter.warn(format!(
                "could not mark the set as resumed: {}",
                error.chain()
            ));
        }
        if !self.wanted.keep
            && let Some(images) = images
            && let Err(error) = fs::remove_dir_all(images)
        {
            self.reporter
                .warn(format!("could not remove {}: {error}", images.display()));
        }
    }

    async fn preflight(&mut self) -> Result<String, Error> {
        let stdio = self.wanted.stdio.as_ref();
        self.send(&Message::Preflight {
            tree: Box::new(self.manifest.tree.clone()),
            source: Box::new(self.manifest.host.clone()),
            stdio: stdio.unwrap_or(&self.manifest.stdio).clone(),
            adopt: self.wanted.adopt,
        })
        .await?;
        let (findings, here) = match self.next("the findings").await? {
            Message::Findings {
                findings,
                destination,
            } => (findings, destination),
            other => return Err(self.inbox.unexpected(&other, "the findings")),
        };
        let kernel = Finding::ok(
            "kernels",
            format!(
                "parked on {}, now {}",
                self.manifest.host.kernel,
                fs::read_to_string("/proc/sys/kernel/osrelease")
                    .unwrap_or_default()
                    .trim()
            ),
        );
        // What threads have registered stands in the images.
        let areas = migrate_criu::rseq_areas(&self.images)?;
        let findings: Vec<Finding> = std::iter::once(kernel)
            .chain(super::kernel_findings())
            .chain(migrate_core::kernel::refused_areas(&here, &areas))
            .chain(
                findings
                    .into_iter()
                    .map(|finding| in_place(finding, self.manifest)),
            )
            .collect();
        self.reporter.findings(&findings);
        let refused: Vec<String> = findings
            .iter()
            .filter(|finding| finding.severity == Severity::Refused)
            .map(|finding| format!("{}: {}", finding.subject, finding.finding))
            .collect();
        if refused.is_empty() {
            return Ok(counted(findings.len(), "check"));
        }
        let reason = "preflight refused the resume".to_owned();
        self.send(&Message::Abort { reason }).await?;
        Err(Error::Refused(refused))
    }

    async fn prepare(&mut self) -> Result<(), Error> {
        self.send(&Message::Prepare {
            blackout_limit_ms: u64::try_from(STEP_LIMIT.as_millis()).unwrap_or(u64::MAX),
            verify: false,
            streams: 1,
            restore: RestoreChoice::Eager,
            lock: NetworkLock::Gate,
            postcopy: false,
        })
        .await?;
        match self.next("the word that all is ready").await? {
            Message::Prepared => {}
            other => {
                return Err(self.inbox.unexpected(&other, "the word that all is ready"));
            }
        }
        self.send(&Message::Streams).await?;
        let options = StreamOptions {
            compress: migrate_core::stream::Compress::None,
            limit_bytes_per_s: None,
        };
        let striped = self.sender.stripe(Vec::new(), options).await;
        striped.map_err(|source| self.broken(source))
    }

    /// Everything that lies on the disk.
    async fn feed(&mut self, images: &std::path::Path) -> Result<String, Error> {
        self.send(&Message::Frozen).await?;
        for part in self.manifest.tracked.chunks(TRACKED_AT_ONCE) {
            self.send(&Message::Tracked(part.to_vec())).await?;
        }
        if !self.manifest.ended.is_empty() {
            let open = self.manifest.ended.clone();
            let over = Vec::new();
            self.send(&Message::Ended { open, over }).await?;
        }
        let mut pages = 0;
        let mut open: Option<(PathBuf, File)> = None;
        for stored in migrate_criu::stored_runs(images)? {
            let file = match open.take() {
                Some((path, file)) if path == stored.path => file,
                _ => File::open(&stored.path).map_err(Error::file("open", &stored.path))?,
            };
            pages += stored.run.pages;
            self.feed_run(&stored, &file).await?;
            open = Some((stored.path, file));
        }
        let small = migrate_criu::small_images(images)?;
        for image in &small {
            let data = fs::read(&image.path).map_err(Error::file("read", &image.path))?;
            let piece = ImagePiece {
                name: &image.name,
                last: true,
                data: &data,
            };
            let sent = self.sender.image(piece).await;
            sent.map_err(|source| self.broken(source))?;
        }
        let end = Message::Dumped {
            pages,
            in_store: 0,
            images: u32::try_from(small.len()).unwrap_or(u32::MAX),
            digests: Vec::new(),
            masks: Vec::new(),
            late: 0,
            late_digests: Vec::new(),
        };
        self.send(&end).await?;
        let ended = self.sender.unstripe().await;
        ended.map_err(|source| self.broken(source))?;
        Ok(format!(
            "{pages} pages and {} read",
            counted(small.len(), "image")
        ))
    }

    async fn feed_run(&mut self, stored: &StoredRun, file: &File) -> Result<(), Error> {
        let mut done = 0;
        while done < stored.run.pages {
            let pages = (stored.run.pages - done).min(PAGES_AT_ONCE);
            let offset = done * PAGE_BYTES as u64;
            let bytes = usize::try_from(pages).unwrap_or(0) * PAGE_BYTES;
            let mut data = vec![0; bytes];
            file.read_exact_at(&mut data, stored.at_bytes + offset)
                .map_err(Error::file("read", &stored.path))?;
            let run = PageRun {
                vaddr: stored.run.vaddr + offset,
                pages,
                ..stored.run
            };
            let sent = self.sender.pages(&run, &data).await;
            sent.map_err(|source| self.broken(source))?;
            done += pages;
        }
        Ok(())
    }

    async fn next(&mut self, awaited: &'static str) -> Result<Message, Error> {
        self.inbox.next_within(awaited, STEP_LIMIT).await
    }

    /// What the destination has said matters more than that it has gone.
    async fn send(&mut self, message: &Message) -> Result<(), Error> {
        let Err(source) = self.sender.control(message).await else {
            return Ok(());
        };
        let broken = self.broken(source);
        Err(self.inbox.reason_for(broken, LOCK_LIMIT).await)
    }

    fn broken(&self, source: migrate_channel::ChannelError) -> Error {
        Error::Channel {
            peer: self.peer.clone(),
            source,
        }
    }

    fn ended(&self, phase: Phase, begun: Instant, detail: String) -> Instant {
        self.told(phase, crate::source::micros(begun.elapsed()), detail);
        Instant::now()
    }

    fn told(&self, phase: Phase, took_us: u64, detail: String) {
        self.reporter.tell(Progress::Ended {
            phase,
            took_us,
            detail,
        });
    }
}

/// A finding about two hosts in words for one that was away.
fn in_place(mut finding: Finding, manifest: &Manifest) -> Finding {
    const WORDS: [(&str, &str); 7] = [
        (
            "on the destination by this migration's own agent",
            "by this very command",
        ),
        ("on the destination", "on this host"),
        ("the destination's", "this host's"),
        ("the destination", "this host"),
        ("on the source", "when it was parked"),
        ("the source's", "the former"),
        ("the source", "the host as it was"),
    ];
    for (theirs, ours) in WORDS {
        finding.finding = finding.finding.replace(theirs, ours);
        finding.subject = finding.subject.replace(theirs, ours);
        finding.way_out = finding.way_out.replace(theirs, ours);
    }
    if finding.severity != Severity::Refused {
        return finding;
    }
    if let Some(path) = finding.subject.strip_prefix("file ") {
        let file = manifest.tree.files.iter().find(|file| file.path == path);
        let is_code = file.is_some_and(|file| file.build_id.is_some());
        if is_code {
            finding.way_out = format!(
                "the tree has the former {path} in use, as from before an upgrade: put that version \
                 back (its package, or the file alone), resume, then upgrade and restart at leisure; \
                 or start the workload anew and remove the set"
            );
        }
    } else if ["pid ", "thread ", "session ", "process group "]
        .iter()
        .any(|what| finding.subject.starts_with(what))
    {
        finding.way_out = "stop or restart what has it (systemctl restart gives it another), then \
                           resume again; `migrate guard-boot` early in the boot keeps these ids free"
            .to_owned();
    }
    finding
}
