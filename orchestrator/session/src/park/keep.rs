//! The destination's side of a parking: a directory in place of a restore.
//!
//! It answers the source's messages as an agent does: in the same process, or in
//! the agent of a host that keeps the tree for the source's.
//!
//! ```text
//!  Keep        which set
//!  Preflight   space, memory, the directory itself
//!  Prepare     the set's directory is made and claimed
//!  ...         pages and images come in
//!  Dumped      images are written, synced to the disk and hashed -> Restored
//!                                                  before it, where it is another host's: Manifest
//!  Go          the manifest takes its place, by one rename      -> Owned   == the commit ==
//! ```
//!
//! Until the manifest is there everything is removed when the connection ends.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use migrate_channel::{Connection, Frame, Further, Receiver, Sender};
use migrate_core::facts::{HostFacts, TreeFacts};
use migrate_core::parked::{ImageFile, Keep, MANIFEST_VERSION, Manifest, Patience};
use migrate_core::policy::Policy;
use migrate_core::preflight::{Finding, refused};
use migrate_core::tracked::Tracked;
use migrate_core::wire::{MANIFEST_PIECE_BYTES, Message, RunningReport, StdioChoice};
use migrate_core::{Flow, Phase};
use migrate_criu::ImageDir;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;

use super::kept::Store;
use super::place::{Place, PlaceLock};
use crate::cancel::Cancel;
use crate::destination::{self, Memory, Questions, Served};
use crate::error::{Error, chain};
use crate::inbox::Inbox;

/// The longest silence of the source, which examines its tree or asks its user
/// meanwhile.
const SILENCE: Duration = Duration::from_secs(600);

/// How long another `migrate` may take to leave the set.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// How long another host's source may take from the last image on the disk to its
/// `Go`: it closes a fence. A connection that was cut without a word must not keep
/// the question unanswered what became of the tree.
const GO_LIMIT: Duration = Duration::from_secs(60);

/// How long connections that have joined may take to be handed over here.
const JOIN_LIMIT: Duration = Duration::from_secs(5);

/// Connections of a tree whose patience is noted: a manifest with more would be
/// too large to be read again.
const CONNECTIONS_MAX: usize = 1 << 20;

/// Images of processes, sockets and files beside the memory: 16 KiB each for a
/// thousand of them.
const IMAGES_OVERHEAD_BYTES: u64 = 16 << 20;

/// A connection to a directory, which is served by a task of this process.
pub(crate) fn connect(place: &Place, id: &str) -> Connection {
    let source = crate::hello(id);
    let mut directory = source.clone();
    directory.hostname = place.path().display().to_string();
    let (ours, theirs) = Connection::pair(source, directory);
    let host = place.path().display().to_string();
    let keeper = Keeper::new(place.clone(), host, theirs);
    // The source ends it by closing the connection.
    tokio::spawn(serve(keeper, Cancel::default()));
    ours
}

/// Keeps a tree for another host.
///
/// # Errors
///
/// It was not taken, and nothing of it is left here.
pub(crate) async fn keep(
    connection: Connection,
    order: Keep,
    policy: Arc<Policy>,
    cancel: Cancel,
) -> Result<Served, Error> {
    let ready = accept(
        &connection.hello.hostname,
        &connection.hello.migration_id,
        &order,
        &policy,
    );
    let (store, place) = match ready {
        Ok(ready) => ready,
        Err(error) => {
            refuse(connection, &error).await;
            return Err(error);
        }
    };
    let mut keeper = Keeper::new(place, crate::hostname(), connection);
    keeper.keep = Some(order);
    keeper.policy = policy;
    keeper.store = Some(store);
    serve(keeper, cancel).await?;
    Ok(Served::Kept)
}

/// Says so where the source looks for it: among the findings.
async fn refuse(mut connection: Connection, error: &Error) {
    tracing::warn!(error = %error.chain(), "nothing is kept here");
    let source = loop {
        match connection.receiver.control(SILENCE).await {
            Ok(Message::Preflight { source, .. }) => break source,
            Ok(Message::Patience(_)) => {}
            Ok(_) | Err(_) => return,
        }
    };
    let finding = Finding::refused(
        "keeping a tree",
        error.chain(),
        error.help().unwrap_or_default(),
    );
    let answer = Message::Findings {
        findings: vec![finding],
        destination: source,
    };
    let _ = connection.sender.control(&answer).await;
    let _ = connection.sender.close().await;
}

fn accept(peer: &str, id: &str, order: &Keep, policy: &Policy) -> Result<(Store, Place), Error> {
    crate::journal::check_name(peer, id)?;
    let store = Store::make(policy)?;
    let place = store.place(&order.name)?;
    Ok((store, place))
}

async fn serve(mut keeper: Keeper, cancel: Cancel) -> Result<(), Error> {
    let ran = tokio::select! {
        ran = keeper.run() => ran,
        () = cancel.cancelled() => Err(Error::Stopped),
    };
    // From there on nothing is undone.
    let ran = if keeper.committed { Ok(()) } else { ran };
    if let Err(error) = &ran {
        tracing::warn!(error = %error.chain(), phase = %keeper.phase, "the tree was not parked");
        let failed = error.as_message(keeper.phase, keeper.host.clone());
        let _ = keeper.sender.control(&failed).await;
        keeper.undo();
    }
    let _ = keeper.sender.close().await;
    ran
}

/// The tree, as the source has told.
struct Order {
    tree: TreeFacts,
    source: HostFacts,
    stdio: StdioChoice,
}

struct Keeper {
    place: Place,
    /// Who keeps, for messages.
    host: String,
    /// Where, when it is for another host.
    store: Option<Store>,
    /// What may be kept here.
    policy: Arc<Policy>,
    id: String,
    peer: String,
    sender: Sender,
    /// The way to further connections, until they are there.
    further: Option<Further>,
    /// Until messages are read by a task of their own.
    receiver: Option<Receiver>,
    /// The longest silence of the source.
    silence: Duration,
    phase: Phase,
    keep: Option<Keep>,
    order: Option<Order>,
    patience: Vec<Patience>,
    /// The manifest is in its place.
    committed: bool,
    // Effects, in the order in which they come about.
    lock: Option<PlaceLock>,
    images: Option<ImageDir>,
    tracked: Vec<Tracked>,
    ended: Vec<Flow>,
}

impl Keeper {
    fn new(place: Place, host: String, connection: Connection) -> Self {
        Self {
            place,
            host,
            store: None,
            policy: Arc::default(),
            id: connection.hello.migration_id,
            peer: connection.hello.hostname,
            sender: connection.sender,
            further: Some(connection.further),
            receiver: Some(connection.receiver),
            silence: SILENCE,
            phase: Phase::Preflight,
            keep: None,
            order: None,
            patience: Vec::new(),
            committed: false,
            lock: None,
            images: None,
            tracked: Vec::new(),
            ended: Vec::new(),
        }
    }

    async fn run(&mut self) -> Result<(), Error> {
        let mut questions = Questions::default();
        loop {
            match self.message("what the source wants").await? {
                Message::Keep(order) if self.keep.is_none() => self.keep = Some(*order),
                Message::Patience(known) => {
                    self.patience.extend(known);
                    if self.patience.len() > CONNECTIONS_MAX {
                        return Err(Error::Changed(format!(
                            "more than {CONNECTIONS_MAX} connections"
                        )));
                    }
                }
                Message::Preflight {
                    tree,
                    source,
                    stdio,
                    ..
                } => {
                    questions.another(&self.peer)?;
                    self.preflight(*tree, *source, stdio).await?;
                }
                Message::Prepare {
                    verify,
                    streams,
                    blackout_limit_ms,
                    ..
                } => {
                    self.phase = Phase::Prepare;
                    if self.store.is_some() {
                        let blackout = Duration::from_millis(blackout_limit_ms);
                        self.silence = destination::SILENCE.max(blackout.min(SILENCE));
                    }
                    self.prepare(streams).await?;
                    self.phase = Phase::Dump;
                    let begun = self.receive(verify).await?;
                    self.phase = Phase::Restore;
                    return self.keep(begun).await;
                }
                Message::Abort { .. } => return Ok(()),
                other => return Err(self.unexpected(&other, "what the source wants")),
            }
        }
    }

    async fn preflight(
        &mut self,
        tree: TreeFacts,
        source: HostFacts,
        stdio: StdioChoice,
    ) -> Result<(), Error> {
        let mut findings = Vec::new();
        findings.push(super::judge(&self.place, "takes the tree"));
        let here = match &self.store {
            Some(_) => migrate_proc::host_facts(self.place.directory()),
            None => source.clone(),
        };
        findings.extend(self.policy.judge_size(&tree));
        findings.extend(room(&self.place, &here, &tree));
        self.order = (!refused(&findings)).then_some(Order {
            tree,
            source,
            stdio,
        });
        let answer = Message::Findings {
            findings,
            destination: Box::new(here),
        };
        self.send(&answer).await
    }

    async fn prepare(&mut self, streams: u32) -> Result<(), Error> {
        const AWAITED: &str = "the page stream";
        // What it has refused is not to be had by asking for it all the same.
        self.keep.as_ref().ok_or_else(not_prepared)?;
        self.order()?;
        self.place.make()?;
        self.lock = Some(self.place.lock(LOCK_LIMIT).await?);
        self.images = Some(ImageDir::create_on_disk(self.place.images())?);
        let peer = self.peer.clone();
        let broken = |source| Error::Channel {
            peer: peer.clone(),
            source,
        };
        let further = self.further.take().ok_or_else(not_prepared)?;
        let expected = further.expect(streams.saturating_sub(1)).map_err(broken)?;
        if let Some(store) = &self.store {
            let store = Message::Store(store.id().clone());
            self.send(&store).await?;
        }
        self.send(&Message::Prepared).await?;
        match self.message(AWAITED).await? {
            Message::Streams => {}
            other => return Err(self.unexpected(&other, AWAITED)),
        }
        let lanes = expected.all(JOIN_LIMIT).await.map_err(broken)?;
        self.receiver()?.stripe(lanes).map_err(broken)
    }

    /// Takes frames until `Dumped`, and gets everything onto the disk.
    async fn receive(&mut self, verify: bool) -> Result<Instant, Error> {
        const AWAITED: &str = "pages and images";
        let resident_bytes = self.order()?.tree.resident_bytes;
        let mut memory = Memory::new(resident_bytes, &self.policy, verify);
        let (announced, digests, masks) = loop {
            let silence = self.silence;
            let frame = match self.receiver()?.next(silence).await {
                Ok(frame) => frame,
                Err(error) => return Err(self.lost(error, AWAITED)),
            };
            let images = self.images.as_mut().ok_or_else(not_prepared)?;
            match frame {
                Frame::Pages { run, data } => memory.take(images, run, &data)?,
                Frame::Image { name, last, data } => {
                    images.image_piece(&migrate_core::wire::ImagePiece {
                        name: &name,
                        last,
                        data: &data,
                    })?;
                }
                // Its sender has to send it again in any case.
                Frame::Packet(_) => {}
                Frame::Control(Message::Gone { owner, pages }) => memory.forget(owner, &pages)?,
                Frame::Control(Message::RoundSent) => self.send(&Message::RoundStored).await?,
                Frame::Control(Message::Frozen) => memory.freeze(),
                Frame::Control(Message::Flows(flows)) => {
                    self.order.as_mut().ok_or_else(not_prepared)?.tree.flows = flows;
                }
                Frame::Control(Message::Tracked(entries)) => self.tracked.extend(entries),
                // Those that are over altogether are forgotten by then.
                Frame::Control(Message::Ended { open, .. }) => self.ended.extend(open),
                Frame::Control(Message::Dumped {
                    pages,
                    in_store,
                    images,
                    digests,
                    masks,
                    // Nobody has agreed to any.
                    late: _,
                    late_digests: _,
                }) => break ((pages, in_store, images), digests, masks),
                Frame::Control(Message::Abort { reason }) => return Err(Error::Aborted(reason)),
                Frame::Control(other) => return Err(self.unexpected(&other, AWAITED)),
            }
        };
        let peer = self.peer.clone();
        let silence = self.silence;
        let ended = self.receiver()?.unstripe(silence).await;
        ended.map_err(|source| Error::Channel { peer, source })?;
        let begun = Instant::now();
        let mut images = self.images.take().ok_or_else(not_prepared)?;
        // The disk takes its time, and must not be in the way of the source's
        // giving up.
        let written = tokio::task::spawn_blocking(move || {
            memory.fill(&mut images)?;
            let stats = images.finish()?;
            Ok::<_, Error>((images, memory, stats))
        });
        let (images, memory, stats) = joined(written.await)??;
        self.images = Some(images);
        memory.verified(digests, masks).await?;
        let came = (stats.pages, stats.pages_in_gaps, stats.images);
        if came != announced {
            return Err(Error::Changed(format!(
                "{} pages, {} in store and {} images came; {}, {} and {} were sent",
                came.0, came.1, came.2, announced.0, announced.1, announced.2
            )));
        }
        Ok(begun)
    }

    /// Everything is here: makes it last, and waits for the word.
    async fn keep(&mut self, begun: Instant) -> Result<(), Error> {
        const AWAITED: &str = "the source's go";
        let receiver = self.receiver.take().ok_or_else(not_prepared)?;
        let mut inbox = Inbox::new(self.peer.clone(), receiver);
        let place = self.place.clone();
        let files = tokio::task::spawn_blocking(move || place.persist());
        let files = tokio::select! {
            files = files => joined(files)??,
            message = inbox.next("the images on disk") => {
                let message = message?;
                return Err(crate::inbox::unexpected(&self.peer, &message, "the images on disk"));
            }
        };
        let mut manifest = self.manifest(files)?;
        self.show(&manifest).await?;
        crate::pause::at("shown");
        let restore_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.send(&Message::Restored { restore_us }).await?;
        self.phase = Phase::HandedOver;
        let limit = match self.store {
            Some(_) => GO_LIMIT,
            None => SILENCE,
        };
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match inbox.next_within(AWAITED, left).await? {
                Message::Go => break,
                // The last word on connections that were named before.
                Message::Ended { open, .. } => {
                    let known: HashSet<Flow> = manifest.ended.iter().copied().collect();
                    let fresh = open.into_iter().filter(|flow| !known.contains(flow));
                    manifest.ended.extend(fresh);
                }
                other => return Err(crate::inbox::unexpected(&self.peer, &other, AWAITED)),
            }
        }
        crate::pause::at("go");
        // No wait between here and the note: a task that is dropped does both or none.
        self.place.commit(&manifest)?;
        self.committed = true;
        crate::pause::at("parked");
        if let Some(images) = self.images.take() {
            let _ = images.keep();
        }
        self.phase = Phase::Takeover;
        let report = RunningReport {
            root_pid: manifest.tree.root_pid,
            ..RunningReport::default()
        };
        // The source may be gone; the tree is parked all the same.
        for message in [
            Message::Owned,
            Message::Running(report),
            Message::Seen(Vec::new()),
        ] {
            if let Err(error) = self.send(&message).await {
                tracing::warn!(error = %error.chain(), "could not tell the source that the tree is parked");
            }
        }
        inbox.closed(SILENCE).await;
        Ok(())
    }

    /// Lets the source have what will be in place: it guards its connections by
    /// that, and checks by it what it will be given.
    async fn show(&mut self, manifest: &Manifest) -> Result<(), Error> {
        if self.store.is_none() {
            return Ok(());
        }
        let text = serde_json::to_vec(manifest)
            .map_err(|error| Error::file("encode", "the manifest")(error.into()))?;
        let mut pieces = text.chunks(MANIFEST_PIECE_BYTES).peekable();
        while let Some(piece) = pieces.next() {
            let piece = Message::Manifest {
                bytes: piece.to_vec(),
                last: pieces.peek().is_none(),
            };
            self.send(&piece).await?;
        }
        Ok(())
    }

    fn manifest(&self, images: Vec<ImageFile>) -> Result<Manifest, Error> {
        let order = self.order()?;
        let keep = self.keep.as_ref().ok_or_else(not_prepared)?;
        let flows: HashSet<Flow> = order.tree.flows.iter().copied().collect();
        let patience = self.patience.iter().copied();
        Ok(Manifest {
            version: MANIFEST_VERSION,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            id: self.id.clone(),
            parked_unix_s: unix_s(),
            machine_id: keep.machine_id.clone(),
            boot_id: keep.boot_id.clone(),
            host: order.source.clone(),
            tree: order.tree.clone(),
            stdio: order.stdio.clone(),
            tracked: self.tracked.clone(),
            patience: patience
                .filter(|patience| flows.contains(&patience.flow))
                .collect(),
            ended: self.ended.clone(),
            images,
        })
    }

    /// Removes what was written. The manifest was not.
    fn undo(&mut self) {
        if let Some(images) = self.images.take()
            && let Err(error) = images.wipe()
        {
            tracing::error!(error = %chain(&error), "could not remove the images");
        }
        if let Some(_lock) = self.lock.take()
            && let Err(error) = self.place.remove()
        {
            tracing::error!(error = %error.chain(), "could not remove the directory");
        }
    }

    fn order(&self) -> Result<&Order, Error> {
        self.order.as_ref().ok_or_else(not_prepared)
    }

    fn receiver(&mut self) -> Result<&mut Receiver, Error> {
        self.receiver.as_mut().ok_or_else(not_prepared)
    }

    async fn message(&mut self, awaited: &'static str) -> Result<Message, Error> {
        let silence = self.silence;
        match self.receiver()?.control(silence).await {
            Ok(Message::Abort { reason }) if self.lock.is_some() => Err(Error::Aborted(reason)),
            Ok(message) => Ok(message),
            Err(error) => Err(self.lost(error, awaited)),
        }
    }

    fn lost(&self, error: migrate_channel::ChannelError, awaited: &'static str) -> Error {
        crate::inbox::broken(&self.peer, error, awaited)
    }

    async fn send(&mut self, message: &Message) -> Result<(), Error> {
        let sent = self.sender.control(message).await;
        sent.map_err(|source| Error::Channel {
            peer: self.peer.clone(),
            source,
        })
    }

    fn unexpected(&self, message: &Message, awaited: &'static str) -> Error {
        crate::inbox::unexpected(&self.peer, message, awaited)
    }
}

fn not_prepared() -> Error {
    Error::Changed("nothing has been prepared".to_owned())
}

fn joined<T>(result: Result<T, tokio::task::JoinError>) -> Result<T, Error> {
    result.map_err(|error| Error::Changed(format!("writing the images failed: {error}")))
}

/// Seconds since 1970.
pub(super) fn unix_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Whether there is room for the tree: on the disk, and in memory for what
/// rounds bring.
fn room(place: &Place, host: &HostFacts, tree: &TreeFacts) -> Vec<Finding> {
    let directory = place.directory();
    let subject = format!("space in {}", directory.display());
    let mut findings = Vec::new();
    let needs = tree.resident_bytes.saturating_add(IMAGES_OVERHEAD_BYTES);
    if let Ok(disk) = statvfs(directory) {
        let free = disk.blocks_available().saturating_mul(disk.fragment_size());
        let finding = format!(
            "the images need {} MiB, {} MiB are free",
            needs >> 20,
            free >> 20
        );
        findings.push(if free < needs {
            Finding::refused(subject, finding, "free some, or name another directory")
        } else {
            Finding::ok(subject, finding)
        });
    }
    if statfs(directory).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC) {
        findings.push(Finding::note(
            format!("directory {}", directory.display()),
            "lies in memory: what is parked there does not outlive a reboot",
            "name a directory on a disk, unless the machine stays up",
        ));
    }
    if host.memory_available_bytes < tree.resident_bytes {
        findings.push(Finding::refused(
            "memory",
            format!(
                "{} MiB are available, and rounds keep the tree's {} MiB beside it",
                host.memory_available_bytes >> 20,
                tree.resident_bytes >> 20
            ),
            "free memory, or stop what is not needed during the maintenance",
        ));
    }
    findings
}
