//! Freeze and dump: from the closed gate to the last image.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use migrate_channel::{ChannelError, Sender};
use migrate_core::late::LateError;
use migrate_core::report::counted;
use migrate_core::wire::{ImagePiece, Message, PAGE_BYTES, PageDigest, PageOwner, PageRun};
use migrate_criu::{CriuError, DumpOptions, Notice, PARENT, PageSink, PageStats, serve_pages};
use migrate_memory::{ContentPrecopy, FrozenMemory, FrozenSegments, Listed, MemoryError};
use migrate_proc::Precedence;

use super::deliver::{Delivery, Following};
use super::pacer::Pacer;
use super::preflight::{externals, survey};
use super::segments::SegmentDump;
use super::{Engine, Migration, Target, not_yet};
use crate::error::Error;
use crate::images::ImagePlace;
use crate::progress::{Progress, Reporter};

/// Bytes of an image file in one frame.
const PIECE_BYTES: usize = 1 << 20;

impl Migration {
    /// Closes the gate and lets CRIU seize the tree.
    pub(super) async fn freeze(&mut self) -> Result<String, Error> {
        let plan = self.plan.as_ref().ok_or_else(|| not_yet("the plan"))?;
        if !plan.tree.still_same() {
            // A child that came or went is CRIU's business and fits the
            // destination or not; another process under the root's PID is not.
            self.must_be_checked()?;
        }
        let images = self.image_directory()?.to_owned();
        let options = DumpOptions {
            shell_job: plan.facts.shell_job,
            external: externals(&plan.facts.stdio),
            external_unix: true,
            track: self.precopied(),
            lock: crate::criu_lock(self.request.choices.lock),
            ..DumpOptions::new(self.request.pid, images)
        };
        let Engine::Ready(worker) = std::mem::replace(&mut self.engine, Engine::None) else {
            return Err(not_yet("CRIU"));
        };
        let session = worker.dump(&options).await.map_err(Error::DumpRefused)?;
        if let Some(fence) = &self.fence {
            self.watch = Some(fence.watch(session.holder()?)?);
        }
        self.engine = Engine::Dumping(session);
        self.expect(&Notice::PreDump, "the start of the dump")
            .await?;
        crate::pause::at("loaded");

        // The limit is for the tree's sake, and must not keep it frozen.
        self.link()?.sender.set_limit(None);
        let mut at = Instant::now();
        self.was_quiet = self.await_quiet().await;
        // Behind it, for new connections wait from here on.
        self.settle().await?;
        at = self.part("quiet_awaited", at);
        self.go_first();
        if let Some(gate) = self.gate() {
            gate.start_watching();
        }
        // CRIU is loaded and waits; the tree still runs. One map write, and
        // nothing reaches the tree any more. What it still says gets out: an
        // answer lost now would be sent again by the restored socket only
        // after 3 s, for that has no idea of the round-trip time.
        let gate_locks = self.request.choices.lock.is_gate();
        let closing = Instant::now();
        if let Some(gate) = self.gate().filter(|_| gate_locks) {
            gate.close_ingress()?;
        }
        let now = Instant::now();
        let mut closed_in = now - closing;
        self.moments.gate_closed = Some(now);
        self.frozen_until
            .send_replace(Some(now + self.request.choices.max_blackout));
        self.answer().await?;
        self.expect(&Notice::QueryExtFiles, "the frozen tree")
            .await?;
        // Nobody is left to say anything but the kernel, and CRIU is about to
        // take the sockets out of its hands.
        let closing = Instant::now();
        if let Some(gate) = self.gate().filter(|_| gate_locks) {
            gate.close()?;
            closed_in += closing.elapsed();
            self.gate_closed_in = Some(closed_in);
        }
        at = self.part("criu_freezes", at);
        self.moments.frozen = Some(at);
        // CRIU has taken it by its PID alone, and now it cannot end any more.
        self.must_be_checked()?;
        self.look_for_changed().await?;
        self.compare_segments()?;
        let looked = self.last_look().await;
        self.part("last_look", at);
        looked
    }

    /// This side and its CRIU go before whatever else runs here.
    pub(super) fn go_first(&mut self) {
        let criu = match &self.engine {
            Engine::Dumping(session) => Some(session.pid()),
            Engine::None | Engine::Ready(_) => None,
        };
        self.precedence
            .get_or_insert_with(|| Precedence::take(criu.as_slice()));
    }

    /// The root is the process that preflight has examined, and not another one
    /// that has got its PID since.
    fn must_be_checked(&self) -> Result<(), Error> {
        let plan = self.plan.as_ref().ok_or_else(|| not_yet("the plan"))?;
        let checked = plan.tree.processes.first();
        let now = migrate_proc::start_ticks(self.request.pid);
        if now.is_some() && now == checked.map(|root| root.start_ticks) {
            return Ok(());
        }
        Err(Error::Changed(format!(
            "process {} is not the one that was checked",
            self.request.pid
        )))
    }

    /// The tree stands still: connections that came since the first look are
    /// added to the gate before CRIU touches a socket.
    async fn last_look(&mut self) -> Result<String, Error> {
        let net = self.net.as_ref().ok_or_else(|| not_yet("netlink"))?;
        let plan = self.plan.as_ref().ok_or_else(|| not_yet("the plan"))?;
        let tree = plan.tree.frozen()?;
        let sockets = survey(net, &self.request.choices, &tree).await?;
        let known = &plan.facts.addresses;
        if let Some(stranger) = sockets
            .addresses
            .iter()
            .find(|address| !known.iter().any(|other| other.ip == address.ip))
        {
            return Err(Error::Changed(format!(
                "the tree has begun to use {} since it was checked",
                stranger.ip
            )));
        }
        // CRIU has been told to take every end of a tunnel device for an open file,
        // and the destination has one to put in its place.
        if let Some(tunnel) = &plan.facts.tunnel
            && !tree.serves_only(tunnel)?
        {
            return Err(Error::Changed(format!(
                "the tree has opened or closed tunnel devices since it was checked, beside or \
                 instead of {}",
                tunnel.name
            )));
        }
        if let Some(&(listener, waiting)) = sockets.unaccepted.first() {
            return Err(Error::NotAccepted {
                listener,
                waiting,
                waited: Duration::ZERO,
            });
        }
        let pids: BTreeSet<i32> = tree.processes.iter().map(|process| process.pid).collect();
        self.forget_ended(&pids).await?;
        self.send(&Message::Frozen).await?;
        self.tell_ended(&sockets.ended, &sockets.flows).await?;
        self.let_end(&sockets.closing)?;
        self.tell_tracked_of(&sockets.flows).await?;
        self.send(&Message::Flows(sockets.flows.clone())).await?;
        if let Some(gate) = self.gate() {
            gate.add_flows(&sockets.flows)?;
        } else if !sockets.interfaces.is_empty() {
            return Err(Error::Changed(
                "the tree has begun to talk to the network since it was checked".to_owned(),
            ));
        }
        let detail = format!(
            "{}, {}{}",
            counted(tree.processes.len(), "process"),
            counted(sockets.flows.len(), "connection"),
            match (self.was_quiet, sockets.flows.is_empty()) {
                (_, true) => "",
                (true, false) => ", at a quiet moment",
                (false, false) => ", under steady traffic",
            }
        );
        if let Some(plan) = self.plan.as_mut() {
            plan.facts.flows = sockets.flows;
            plan.facts.processes.clone_from(&tree.processes);
            plan.tree = tree;
        }
        Ok(detail)
    }

    /// Lets CRIU write; pages go to the destination as they come, the small
    /// images after them.
    pub(super) async fn dump(&mut self) -> Result<String, Error> {
        let begun = Instant::now();
        let version = self.criu()?.version;
        let Engine::Dumping(session) = &mut self.engine else {
            return Err(not_yet("CRIU's dump"));
        };
        let link = self
            .link
            .as_mut()
            .ok_or_else(|| not_yet("the connection"))?;
        let socket = session
            .page_socket()
            .ok_or_else(|| not_yet("the page socket"))?;
        let moved_vdsos = match (&self.precopy, &self.soft_dirty) {
            (Some(precopy), _) => precopy.moved_vdsos()?,
            (None, Some(soft_dirty)) => soft_dirty.moved_vdsos()?,
            (None, None) => BTreeMap::new(),
        };
        let verify = self.request.choices.verify;
        let following = if self.postcopies {
            let plan = self.plan.as_ref().ok_or_else(|| not_yet("the plan"))?;
            let pids = plan.tree.processes.iter().map(|process| process.pid);
            let memory = FrozenMemory::open(pids, self.held_memory.take().as_ref())?;
            // What is marked clean by an attempt that failed is marked written again: nobody
            // may have seen it.
            let changed = std::mem::take(&mut self.changed).known().await?;
            Some(Following::of(memory, changed, verify))
        } else {
            None
        };
        session.answer(true).await.map_err(Error::DumpRefused)?;

        let mut sink = Outgoing::new(&mut link.sender);
        sink.content = self.content.as_ref();
        sink.segments = self.segments.as_mut();
        sink.moved_vdsos = moved_vdsos;
        sink.listed = verify.then(Listed::default);
        sink.following = following;
        let dumped = {
            let pages = serve_pages(socket, version, &mut sink, DUMP_LIMIT);
            tokio::pin!(pages);
            let mut streamed = None;
            loop {
                tokio::select! {
                    stats = &mut pages, if streamed.is_none() => {
                        // A failure vetoes the dump, which CRIU then reports;
                        // the cause is this one, not CRIU's report of it.
                        streamed = Some(stats);
                    }
                    message = link.inbox.next("the end of the dump") => {
                        break message.and_then(|message| {
                            Err(link.inbox.unexpected(&message, "the end of the dump"))
                        });
                    }
                    notice = session.next(DUMP_LIMIT) => match (notice, streamed.take()) {
                        // It ended the stream itself, and says why.
                        (Err(error), Some(Err(CriuError::PageStreamEnded { .. }) | Ok(_)) | None) => {
                            break Err(Error::DumpRefused(error));
                        }
                        (_, Some(Err(error))) => break Err(Error::Criu(error)),
                        (Ok(Notice::PostDump), Some(Ok(_))) => break Ok(()),
                        (Ok(Notice::NetworkLock), served) => {
                            streamed = served;
                            session.answer(true).await.map_err(Error::DumpRefused)?;
                        }
                        (Ok(other), _) => break Err(out_of_order(&other, "the end of the dump")),
                    }
                }
            }
        };
        if dumped.is_ok() {
            sink.send_code(&link.peer).await?;
        }
        self.pages = sink.pages;
        self.in_store = sink.in_store;
        let listed = sink.listed.take();
        self.following_pages = sink.following_pages;
        let mut following = sink.following.take().filter(|late| late.pages() > 0);
        drop(sink);
        let segments = self.segments.take().map(|dump| dump.segments);
        dumped?;
        let mut at = self.part("criu_dumps", begun);
        self.moments.dumped = Some(at);
        // The tree stands still, so its memory is what the copy's has to be.
        let digests = match listed {
            Some(listed) => {
                let masks = migrate_criu::rseq_areas(self.image_directory()?)?;
                let segments = segments.unwrap_or_default();
                let late = following.as_mut().and_then(|late| late.listed.take());
                let late = late.unwrap_or_default();
                Digests {
                    now: hashed(listed, masks.clone(), segments).await?,
                    late: hashed(late, masks.clone(), FrozenSegments::default()).await?,
                    masks,
                }
            }
            None => Digests::default(),
        };
        if verify {
            at = self.part("memory_hashed", at);
        }
        let late = following.as_ref().map_or(0, Following::pages);
        let detail = self.send_images(digests, late).await?;
        self.part("images_sent", at);
        let lane = self.late_lane.take();
        if let Some(following) = following {
            let lane = lane.ok_or_else(|| not_yet("the connection for late memory"))?;
            let limit = self.request.choices.stream.limit_bytes_per_s;
            let peer = self.link()?.peer.clone();
            self.delivery = Some(Delivery::start(peer, following, lane, limit));
        }
        Ok(detail)
    }

    /// Where CRIU writes what is no page.
    pub(super) fn image_directory(&self) -> Result<&Path, Error> {
        let place = self.images.as_ref().map(ImagePlace::path);
        place.ok_or_else(|| not_yet("the image directory"))
    }

    /// Sends what CRIU has written to tmpfs beside the pages.
    async fn send_images(&mut self, digests: Digests, late: u64) -> Result<String, Error> {
        let images = migrate_criu::small_images(self.image_directory()?)?;
        let (pages, in_store) = (self.pages, self.in_store);
        let link = self.link()?;
        let broken = |peer: &str| {
            let peer = peer.to_owned();
            move |source| Error::Channel { peer, source }
        };
        for image in &images {
            let data = std::fs::read(&image.path).map_err(Error::file("read", &image.path))?;
            if let Some(guard) = migrate_criu::guard_in_locked(&data) {
                // Preflight refuses what stays so.
                return Err(Error::Changed(format!(
                    "the tree has locked memory with a guard page in it since it was checked, at \
                     {:#x} ({}), which CRIU cannot restore",
                    guard.start, image.name
                )));
            }
            let mut pieces = data.chunks(PIECE_BYTES).peekable();
            loop {
                let data = pieces.next().unwrap_or_default();
                let last = pieces.peek().is_none();
                let piece = ImagePiece {
                    name: &image.name,
                    last,
                    data,
                };
                link.sender.image(piece).await.map_err(broken(&link.peer))?;
                if last {
                    break;
                }
            }
        }
        let end = Message::Dumped {
            pages,
            in_store,
            digests: digests.now,
            masks: digests.masks,
            late,
            late_digests: digests.late,
            images: u32::try_from(images.len()).unwrap_or(u32::MAX),
        };
        link.sender
            .control(&end)
            .await
            .map_err(broken(&link.peer))?;
        link.sender.unstripe().await.map_err(broken(&link.peer))?;
        self.sent_bytes = link.sender.sent_bytes();
        self.moments.sent = Some(Instant::now());
        let to_follow = match late {
            0 => String::new(),
            late => format!(" of which {late} follow"),
        };
        // CRIU has listed those as unchanged.
        self.pages += self.following_pages;
        self.in_store -= self.following_pages;
        Ok(format!(
            "{} pages sent{to_follow}, {} unchanged, {}",
            self.pages,
            self.in_store,
            counted(images.len(), "image")
        ))
    }

    /// Waits for the destination's copy.
    pub(super) async fn restore(&mut self) -> Result<String, Error> {
        const AWAITED: &str = "the restored copy";
        loop {
            match self.next_while_carrying(AWAITED, DUMP_LIMIT).await? {
                Message::Manifest { bytes, last } => {
                    self.stub.piece(&bytes)?;
                    if last {
                        self.write_stub().await?;
                    }
                }
                Message::Restored { restore_us } => {
                    if let Target::Keeper(_) = &self.request.target
                        && !self.stub.is_written()
                    {
                        return Err(not_yet("the stub"));
                    }
                    self.moments.restored = Some(Instant::now());
                    let took_ms = restore_us / 1000;
                    return Ok(match &self.request.target {
                        Target::Host(_) => format!("in {took_ms} ms on the destination"),
                        Target::Directory(_) => format!("on the disk in {took_ms} ms"),
                        Target::Keeper(_) => format!("on the keeper's disk in {took_ms} ms"),
                    });
                }
                other => return Err(self.unexpected(&other, AWAITED)),
            }
        }
    }

    /// What is known of the set, onto this disk: the other host must not have the tree
    /// before a boot of this one would guard its connections.
    async fn write_stub(&mut self) -> Result<(), Error> {
        let Target::Keeper(keeper) = &self.request.target else {
            return Err(not_yet("a keeper"));
        };
        let name = self
            .link
            .as_ref()
            .map_or_else(String::new, |link| link.peer.clone());
        self.stub
            .write(keeper, name, &self.id, self.request.pid)
            .await?;
        crate::pause::at("stub");
        Ok(())
    }

    async fn expect(&mut self, wanted: &Notice, awaited: &'static str) -> Result<(), Error> {
        let Engine::Dumping(session) = &mut self.engine else {
            return Err(not_yet("CRIU's dump"));
        };
        loop {
            let notice = session.next(DUMP_LIMIT).await.map_err(Error::DumpRefused)?;
            if notice == *wanted {
                return Ok(());
            }
            // Only said for trees with a network namespace of their own.
            if notice != Notice::NetworkLock {
                return Err(out_of_order(&notice, awaited));
            }
            session.answer(true).await.map_err(Error::DumpRefused)?;
        }
    }

    async fn answer(&mut self) -> Result<(), Error> {
        let Engine::Dumping(session) = &mut self.engine else {
            return Err(not_yet("CRIU's dump"));
        };
        session.answer(true).await.map_err(Error::DumpRefused)
    }
}

/// CRIU is given up for stuck after this much silence; `--max-blackout` is
/// shorter as a rule.
pub(super) const DUMP_LIMIT: Duration = Duration::from_secs(600);

pub(super) fn out_of_order(notice: &Notice, awaited: &'static str) -> Error {
    Error::OutOfOrder {
        got: format!("{notice:?}"),
        awaited,
    }
}

/// Digests of tasks and segments, and areas that do not count for them.
#[derive(Debug, Default)]
struct Digests {
    /// Of what goes over before the commit.
    now: Vec<PageDigest>,
    /// Of what follows.
    late: Vec<PageDigest>,
    masks: Vec<(u64, u32)>,
}

/// Pages on their way to the destination.
pub(super) struct Outgoing<'a> {
    pub(super) sender: &'a mut Sender,
    pub(super) pages: u64,
    in_store: u64,
    /// What rounds have sent, where CRIU cannot leave it out by itself.
    content: Option<&'a ContentPrecopy>,
    /// Segments that do not come from CRIU.
    pub(super) segments: Option<&'a mut SegmentDump>,
    /// What CRIU has listed, when somebody wants to compare.
    listed: Option<Listed>,
    /// What goes over after the commit.
    pub(super) following: Option<Following>,
    /// Pages of that which CRIU has listed as in store.
    pub(super) following_pages: u64,
    /// Where the vDSO is of tasks that have called exec since the last round: CRIU leaves
    /// it out, and no round has sent it.
    moved_vdsos: BTreeMap<u32, Range<u64>>,
    /// Pages of a task that CRIU puts code of its own into, by task.
    code: BTreeMap<u32, Vec<u64>>,
    /// Those that CRIU has sent, and what it has left out: what they hold is read when it
    /// has done.
    awaited: Vec<(u32, u64)>,
    /// Who wants to see it go.
    tally: Option<Tally>,
    /// Who stands back for the tree now and then.
    pacer: Option<&'a mut Pacer>,
}

/// Tells now and then how far a round has come.
struct Tally {
    reporter: Reporter,
    round: u32,
    pages_expected: u64,
    told: Instant,
}

impl Tally {
    /// A person sees no more of it.
    const TELL_EVERY: Duration = Duration::from_millis(100);

    fn tell(&mut self, pages: u64) {
        if self.told.elapsed() >= Self::TELL_EVERY {
            self.told = Instant::now();
            self.reporter.tell(Progress::Sending {
                round: self.round,
                pages,
                pages_expected: self.pages_expected,
            });
        }
    }
}

impl<'a> Outgoing<'a> {
    pub(super) fn new(sender: &'a mut Sender) -> Self {
        Self {
            sender,
            pages: 0,
            in_store: 0,
            content: None,
            segments: None,
            listed: None,
            following: None,
            following_pages: 0,
            moved_vdsos: BTreeMap::new(),
            code: BTreeMap::new(),
            awaited: Vec::new(),
            tally: None,
            pacer: None,
        }
    }

    /// The same, with somebody who wants to see a round's pages go.
    pub(super) fn of_round(
        sender: &'a mut Sender,
        reporter: Reporter,
        round: u32,
        pages_expected: u64,
        pacer: Option<&'a mut Pacer>,
    ) -> Self {
        Self {
            pacer,
            tally: Some(Tally {
                reporter,
                round,
                pages_expected,
                told: Instant::now(),
            }),
            ..Self::new(sender)
        }
    }

    pub(super) async fn send(&mut self, run: PageRun, data: &[u8]) -> Result<(), ChannelError> {
        if data.is_empty() {
            self.in_store += run.pages;
        } else {
            self.pages += run.pages;
        }
        if let Some(tally) = &mut self.tally {
            tally.tell(self.pages);
        }
        self.sender.pages(&run, data).await?;
        if let Some(pacer) = &mut self.pacer {
            pacer.pause().await;
        }
        Ok(())
    }

    /// Keeps what is listed, when somebody wants to compare.
    pub(super) fn list(&mut self, run: PageRun) -> Result<(), MemoryError> {
        self.listed
            .as_mut()
            .map_or(Ok(()), |listed| listed.add(run))
    }

    /// Sends what CRIU has listed, without the content of pages in which CRIU is
    /// at work.
    async fn send_stable(&mut self, run: PageRun, data: &Bytes) -> Result<(), DumpSinkError> {
        let PageOwner::Task(pid) = run.owner else {
            return self.send_listed(run, data).await;
        };
        if data.is_empty() {
            if let Some(vdso) = self.moved_vdsos.get(&pid) {
                let pages = (run.vaddr..).step_by(PAGE_BYTES);
                let pages = pages.take(usize::try_from(run.pages).unwrap_or(usize::MAX));
                let unsent = pages.filter(|page| vdso.contains(page));
                self.awaited.extend(unsent.map(|page| (pid, page)));
            }
            return self.send_listed(run, data).await;
        }
        let code = match self.code.entry(pid) {
            Entry::Occupied(pages) => pages.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(migrate_memory::code_pages(pid)?),
        };
        let end = run.vaddr + data.len() as u64;
        let within = code.partition_point(|&page| page < run.vaddr)
            ..code.partition_point(|&page| page < end);
        let pages = code[within].to_vec();
        let mut at = run.vaddr;
        let part = |from: u64, to: u64| {
            let offset = |vaddr: u64| usize::try_from(vaddr - run.vaddr).unwrap_or(data.len());
            let pages = (to - from) / PAGE_BYTES as u64;
            let run = PageRun {
                vaddr: from,
                pages,
                ..run
            };
            (run, data.slice(offset(from)..offset(to)))
        };
        for page in pages {
            if at < page {
                let (run, data) = part(at, page);
                self.send_listed(run, &data).await?;
            }
            at = page + PAGE_BYTES as u64;
            let flags = run.flags & !PageRun::PRESENT | PARENT;
            let (run, _) = part(page, at);
            let head = PageRun { flags, ..run };
            self.list(head)?;
            self.send(head, &[]).await?;
            self.awaited.push((pid, page));
        }
        if at < end {
            let (run, data) = part(at, end);
            self.send_listed(run, &data).await?;
        }
        Ok(())
    }

    /// CRIU has done with the tree: sends what it has put back in place of its
    /// own code.
    async fn send_code(&mut self, peer: &str) -> Result<(), Error> {
        for (pid, vaddr) in std::mem::take(&mut self.awaited) {
            let page = migrate_memory::read_page(pid, vaddr)?;
            let run = PageRun {
                owner: PageOwner::Task(pid),
                vaddr,
                pages: 1,
                flags: PageRun::PRESENT | PageRun::AGAIN,
            };
            let sent = self.sender.pages(&run, &page).await;
            sent.map_err(|source| Error::Channel {
                peer: peer.to_owned(),
                source,
            })?;
        }
        Ok(())
    }

    /// Sends what CRIU has listed; pages that are as a round has sent them go
    /// without their content.
    async fn send_listed(&mut self, run: PageRun, data: &Bytes) -> Result<(), DumpSinkError> {
        let (Some(content), PageOwner::Task(pid)) = (self.content, run.owner) else {
            return self.send_or_follow(run, data).await;
        };
        let addresses = (run.vaddr..).step_by(PAGE_BYTES);
        let held: Vec<bool> = data
            .chunks_exact(PAGE_BYTES)
            .zip(addresses)
            .map(|(page, vaddr)| content.holds(pid, vaddr, page))
            .collect();
        if held.is_empty() {
            return self.send_or_follow(run, data).await;
        }
        for (pages, held) in migrate_memory::alike(&held) {
            let part = PageRun {
                vaddr: run.vaddr + (pages.start * PAGE_BYTES) as u64,
                pages: pages.len() as u64,
                ..run
            };
            if held {
                let flags = run.flags & !PageRun::PRESENT | PARENT;
                self.send_or_follow(PageRun { flags, ..part }, &Bytes::new())
                    .await?;
            } else {
                let bytes = pages.start * PAGE_BYTES..pages.end * PAGE_BYTES;
                self.send_or_follow(part, &data.slice(bytes)).await?;
            }
        }
        Ok(())
    }
}

/// Why pages of the final dump did not go out.
#[derive(Debug, thiserror::Error)]
pub(super) enum DumpSinkError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Late(#[from] LateError),
}

/// What the frozen tree's memory amounts to. Hashing all of it takes a while,
/// and must not be in the way of a cancellation.
async fn hashed(
    listed: Listed,
    masks: Vec<(u64, u32)>,
    segments: FrozenSegments,
) -> Result<Vec<PageDigest>, Error> {
    let stop = Stop::default();
    let flag = stop.flag();
    let hashing = tokio::task::spawn_blocking(move || {
        migrate_memory::digests(listed, &masks, &segments, &flag)
    });
    match hashing.await {
        Ok(digests) => Ok(digests?),
        Err(error) => Err(Error::Changed(format!("hashing memory failed: {error}"))),
    }
}

/// Tells a thread that its result is not wanted any more.
#[derive(Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// What the thread looks at now and then.
    pub(super) fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl PageSink for Outgoing<'_> {
    type Error = DumpSinkError;

    async fn pages(&mut self, run: PageRun, data: Bytes) -> Result<(), DumpSinkError> {
        if !self
            .segments
            .as_ref()
            .is_some_and(|segments| segments.has(run.owner))
        {
            self.send_stable(run, &data).await?;
        }
        self.send_compared().await
    }

    async fn close(&mut self, _stats: PageStats) -> Result<(), DumpSinkError> {
        self.send_all_compared().await?;
        Ok(self.sender.flush().await?)
    }
}
