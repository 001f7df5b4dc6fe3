//! Receive and restore: pages and images come in, the copy is built and held
//! before its first instruction.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use migrate_channel::Frame;
use migrate_core::Flow;
use migrate_core::late::LateRuns;
use migrate_core::policy::Policy;
use migrate_core::wire::{ImagePiece, Message, PAGE_BYTES, PageDigest, PageOwner, PageRun};
use migrate_criu::{ImageDir, Notice, PARENT, Session};
use migrate_memory::{Content, Listed, PageStore};
use migrate_proc::Precedence;

use super::fetch::Expected;
use super::{Destination, Engine, Incoming, SILENCE};
use crate::error::Error;
use crate::inbox::{Inbox, broken};

/// What the source has counted and must have come.
#[derive(PartialEq, Eq)]
struct Announced {
    pages: u64,
    in_store: u64,
    images: u32,
    late: u64,
}

/// Memory that comes in.
pub(crate) struct Memory {
    /// What came in rounds, the latest of each page.
    store: PageStore,
    /// The rounds are over: what comes is CRIU's final list.
    frozen: bool,
    /// The final list, when somebody wants to compare.
    listed: Option<Listed>,
    /// Whose memory cannot be the tree's unless a digest says so.
    unproven: BTreeSet<PageOwner>,
    /// What the tree has written to last.
    hot: Vec<(PageOwner, Range<u64>)>,
    /// Bytes of the final list that may still come.
    room_bytes: u64,
    /// What comes after the commit, where that was agreed.
    late: Option<LateRuns>,
    /// Those of the next run that is in store.
    follows: Vec<PageRun>,
    /// Pages of these.
    follows_pages: u64,
}

impl Memory {
    /// A store may hold this many times the memory that preflight saw, for the
    /// tree may grow meanwhile; what is beyond ends the migration.
    const GROWTH_MAX: u64 = 2;

    /// And this much more, for small trees.
    const SPARE_BYTES: u64 = 256 << 20;

    pub(crate) fn new(resident_bytes: u64, policy: &Policy, verify: bool) -> Self {
        let room_bytes = resident_bytes
            .saturating_mul(Self::GROWTH_MAX)
            .saturating_add(Self::SPARE_BYTES)
            .min(policy.memory_bytes_max().unwrap_or(u64::MAX));
        Self {
            store: PageStore::new(room_bytes),
            room_bytes,
            frozen: false,
            listed: verify.then(Listed::default),
            unproven: BTreeSet::new(),
            hot: Vec::new(),
            late: None,
            follows: Vec::new(),
            follows_pages: 0,
        }
    }

    /// Pages may come after the commit.
    pub(crate) fn postcopy(&mut self) {
        self.late = Some(LateRuns::default());
    }

    /// The tree has unmapped these pages since they came.
    pub(crate) fn forget(&mut self, owner: PageOwner, pages: &[(u64, u64)]) -> Result<(), Error> {
        if self.frozen {
            return Err(not_gone());
        }
        let page = PAGE_BYTES as u64;
        for &(first, pages) in pages {
            let ends = first
                .checked_add(pages)
                .and_then(|end| end.checked_mul(page));
            let end = ends.ok_or_else(not_gone)?;
            self.store.drop_range(owner, first * page..end);
        }
        Ok(())
    }

    /// The rounds are over.
    pub(crate) fn freeze(&mut self) {
        self.frozen = true;
    }

    pub(crate) fn take(
        &mut self,
        images: &mut ImageDir,
        run: PageRun,
        data: &[u8],
    ) -> Result<(), Error> {
        if run.flags & PARENT == 0 && !self.follows.is_empty() {
            return Err(misplaced());
        }
        if run.flags & PageRun::LATE != 0 {
            images.later(run)?;
            return self.take_late(run);
        }
        if !self.frozen {
            return Ok(self.store.put(run, data)?);
        }
        if run.flags & PageRun::AGAIN != 0 {
            let flags = PageRun::PRESENT;
            return Ok(self.store.put(PageRun { flags, ..run }, data)?);
        }
        self.room_bytes = self
            .room_bytes
            .checked_sub(data.len() as u64)
            .ok_or_else(too_much)?;
        let lazy = images.leaves_out(&run);
        if lazy && !data.is_empty() {
            let end = run.vaddr + run.pages * PAGE_BYTES as u64;
            self.hot.push((run.owner, run.vaddr..end));
        }
        if (lazy || self.listed.is_some()) && !data.is_empty() {
            self.store.put(run, data)?;
        }
        let follows = std::mem::take(&mut self.follows);
        self.follows_pages = 0;
        self.list(run, &follows)?;
        if !data.is_empty() {
            images.pages(run, data)?;
            return Ok(());
        }
        for late in follows {
            self.take_late(late)?;
        }
        images.gap(run)?;
        // The source still compares and dumps; later everybody would wait.
        if let PageOwner::Shared(id) = run.owner {
            images.fill_segment(id, &mut filler(&self.store))?;
        }
        Ok(())
    }

    /// Notes what is listed, but for what follows of it.
    fn list(&mut self, run: PageRun, follows: &[PageRun]) -> Result<(), Error> {
        let page = PAGE_BYTES as u64;
        // No address overflows: each run was checked when it was decoded.
        let end = run.vaddr + run.pages * page;
        let within = follows.iter().all(|late| {
            late.owner == run.owner
                && run.vaddr <= late.vaddr
                && late.vaddr + late.pages * page <= end
        });
        if !within {
            return Err(misplaced());
        }
        if let Some(listed) = &mut self.listed {
            for part in run.without(follows) {
                // Segments that CRIU has sent whole are no engine's work, and none of the
                // source's digests names them.
                if matches!(part.owner, PageOwner::Task(_)) || part.flags & PARENT != 0 {
                    self.unproven.insert(part.owner);
                }
                listed.add(part)?;
            }
        }
        Ok(())
    }

    /// Takes in what follows of the next run that is in store.
    fn follow(&mut self, owner: PageOwner, pages: Vec<(u64, u64)>) -> Result<(), Error> {
        if !self.frozen || self.late.is_none() {
            return Err(not_agreed());
        }
        let page = PAGE_BYTES as u64;
        let mut room = (self.room_bytes / page).saturating_sub(self.follows_pages);
        let mut at = self
            .follows
            .last()
            .map_or(0, |last| last.vaddr + last.pages * page);
        for (first, pages) in pages {
            room = room.checked_sub(pages).ok_or_else(too_much)?;
            let end = first
                .checked_add(pages)
                .and_then(|end| end.checked_mul(page));
            let end = end.ok_or_else(misplaced)?;
            let run = PageRun {
                owner,
                vaddr: first * page,
                pages,
                flags: PageRun::LATE,
            };
            if pages == 0 || run.vaddr < at {
                return Err(misplaced());
            }
            at = end;
            self.follows_pages += pages;
            self.follows.push(run);
        }
        Ok(())
    }

    /// Notes pages that come after the commit. What a round has sent of them is
    /// not what they hold now.
    fn take_late(&mut self, run: PageRun) -> Result<(), Error> {
        let late = self
            .late
            .as_mut()
            .filter(|_| self.frozen)
            .ok_or_else(not_agreed)?;
        let bytes = run.pages.checked_mul(PAGE_BYTES as u64);
        let bytes = bytes.ok_or_else(too_much)?;
        self.room_bytes = self.room_bytes.checked_sub(bytes).ok_or_else(too_much)?;
        late.add(&run)
            .map_err(|error| Error::Changed(error.to_string()))?;
        self.store
            .drop_range(run.owner, run.vaddr..run.vaddr.saturating_add(bytes));
        Ok(())
    }

    /// Puts the pages in store where the final list names them.
    pub(crate) fn fill(&self, images: &mut ImageDir) -> Result<(), Error> {
        Ok(images.fill(&mut filler(&self.store))?)
    }

    /// Compares with what the frozen tree's memory amounts to. Hashing all of it
    /// takes a while, and must not be in the way of a cancellation.
    pub(crate) async fn verified(
        mut self,
        digests: Vec<PageDigest>,
        masks: Vec<(u64, u32)>,
    ) -> Result<Self, Error> {
        let Some(listed) = self.listed.take() else {
            return Ok(self);
        };
        let verifying = tokio::task::spawn_blocking(move || {
            self.verify(&listed.sorted(), &digests, &masks)?;
            Ok(self)
        });
        match verifying.await {
            Ok(verified) => verified,
            Err(error) => Err(Error::Changed(format!("hashing memory failed: {error}"))),
        }
    }

    fn verify(
        &mut self,
        listed: &[PageRun],
        digests: &[PageDigest],
        masks: &[(u64, u32)],
    ) -> Result<(), Error> {
        every_digest(&self.unproven, digests)?;
        for digest in digests {
            let owner = digest.owner;
            self.store.retain(owner, listed);
            let masks = match owner {
                PageOwner::Task(_) => [masks, &digest.taken].concat(),
                PageOwner::Shared(_) => Vec::new(),
            };
            if self.store.digest(owner, &masks) != digest.sha256 {
                return Err(Error::NotTheSame { owner });
            }
        }
        tracing::info!(owners = digests.len(), "the copy's memory is the tree's");
        Ok(())
    }
}

/// Whether each of these owners is among those of the digests: what is not compared is
/// not the same.
pub(super) fn every_digest(
    owners: &BTreeSet<PageOwner>,
    digests: &[PageDigest],
) -> Result<(), Error> {
    let told: BTreeSet<PageOwner> = digests.iter().map(|digest| digest.owner).collect();
    match owners.difference(&told).next() {
        Some(&owner) => Err(Error::NotCompared { owner }),
        None => Ok(()),
    }
}

/// Gives an image directory what is in store.
fn filler(
    store: &PageStore,
) -> impl FnMut(PageOwner, u64, u64, &mut dyn io::Write) -> io::Result<()> {
    move |owner, vaddr, pages, out| {
        let end = vaddr + pages * PAGE_BYTES as u64;
        let mut at = vaddr;
        for piece in store.range(owner, vaddr..end) {
            if piece.vaddr != at {
                break;
            }
            match piece.content {
                Content::Data(data) => out.write_all(data)?,
                Content::Zero(pages) => {
                    for _ in 0..pages {
                        out.write_all(&[0; PAGE_BYTES])?;
                    }
                }
            }
            at += piece.content.pages() * PAGE_BYTES as u64;
        }
        if at == end {
            Ok(())
        } else {
            Err(io::Error::new(io::ErrorKind::NotFound, "not in store"))
        }
    }
}

fn too_much() -> Error {
    Error::Changed("more memory has come than the tree had".to_owned())
}

fn not_gone() -> Error {
    Error::Changed("memory is said to be gone after the rounds, or where none can be".to_owned())
}

fn not_agreed() -> Error {
    Error::Changed("pages are to come late that nobody has agreed to".to_owned())
}

fn misplaced() -> Error {
    Error::Changed("pages are to come late that the list has not in store".to_owned())
}

impl Destination {
    /// Takes frames until `Dumped`.
    pub(super) async fn receive(
        &mut self,
        blackout_limit: Duration,
        verify: bool,
        postcopy: bool,
    ) -> Result<(), Error> {
        let resident_bytes = self
            .order
            .as_ref()
            .map_or(0, |order| order.tree.resident_bytes);
        let mut memory = Memory::new(resident_bytes, &self.policy, verify);
        if postcopy {
            memory.postcopy();
        }
        let (announced, digests, mut expected) = self
            .take_frames(SILENCE.max(blackout_limit), &mut memory)
            .await?;
        expected.verify = verify;
        self.dumped_at = Some(Instant::now());
        let mut at = self.clock.part("dump_arrives", self.clock.still_since());
        let Some(images) = &mut self.images else {
            return Err(nothing("the image directory"));
        };
        if !memory.follows.is_empty() {
            return Err(misplaced());
        }
        memory.fill(images)?;
        at = self.clock.part("images_filled", at);
        let memory = memory.verified(digests, expected.masks.clone()).await?;
        if verify {
            at = self.clock.part("memory_compared", at);
        }
        let stats = images.finish()?;
        // What the source says of its tree is its word; this is what CRIU obeys.
        for (name, credentials) in images.credentials()? {
            self.policy.admits(&name, &credentials)?;
        }
        let came = Announced {
            pages: stats.pages,
            in_store: stats.pages_in_gaps,
            images: stats.images,
            late: memory.late.as_ref().map_or(0, LateRuns::pages),
        };
        if came != announced {
            return Err(Error::Changed(format!(
                "{} pages, {} in store and {} images came; {}, {} and {} were sent",
                came.pages,
                came.in_store,
                came.images,
                announced.pages,
                announced.in_store,
                announced.images
            )));
        }
        let late = memory.late.unwrap_or_default();
        at = self.clock.part("page_maps_written", at);
        self.lazy
            .serve(&self.peer, images, memory.store, memory.hot, late, expected)?;
        self.clock.part("keeper_ordered", at);
        Ok(())
    }

    async fn take_frames(
        &mut self,
        limit: Duration,
        memory: &mut Memory,
    ) -> Result<(Announced, Vec<PageDigest>, Expected), Error> {
        const AWAITED: &str = "pages and images";
        loop {
            let Incoming::Frames(receiver) = &mut self.incoming else {
                return Err(nothing("the stream of frames"));
            };
            let Some(images) = &mut self.images else {
                return Err(nothing("the image directory"));
            };
            let frame = receiver.next(limit).await;
            let frame = frame.map_err(|error| broken(&self.peer, error, AWAITED))?;
            match frame {
                Frame::Pages { run, data } => memory.take(images, run, &data)?,
                Frame::Image { name, last, data } => images.image_piece(&ImagePiece {
                    name: &name,
                    last,
                    data: &data,
                })?,
                Frame::Packet(_) => {
                    return Err(Error::Unexpected {
                        peer: self.peer.clone(),
                        got: "a packet".to_owned(),
                        awaited: AWAITED,
                    });
                }
                Frame::Control(Message::Follows { owner, pages }) => {
                    memory.follow(owner, pages)?;
                }
                Frame::Control(Message::Gone { owner, pages }) => memory.forget(owner, &pages)?,
                Frame::Control(Message::RoundSent) => self.send(&Message::RoundStored).await?,
                Frame::Control(Message::Frozen) => {
                    self.clock.frozen();
                    let criu = match &self.engine {
                        Engine::Parked(parked) => Some(parked.pid()),
                        Engine::None | Engine::Held(_) => None,
                    };
                    // The keeper goes on so: what touches memory waits for it.
                    let first: Vec<i32> = criu.into_iter().chain(self.lazy.keeper()).collect();
                    self.precedence = Some(Precedence::take(&first));
                    memory.freeze();
                }
                Frame::Control(Message::Flows(flows)) => {
                    if let Some(gate) = &self.gate {
                        gate.add_flows(&flows)?;
                        // The tree has connected with the same ports again.
                        for flow in &flows {
                            if self.ended.remove(flow).is_some() {
                                gate.answer_no_more(flow)?;
                            }
                        }
                    }
                    self.track_untracked(&flows);
                }
                Frame::Control(Message::Tracked(entries)) => self.track(entries)?,
                Frame::Control(Message::Ended { open, over }) => self.has_ended(&open, &over)?,
                Frame::Control(Message::Dumped {
                    pages,
                    in_store,
                    images,
                    digests,
                    masks,
                    late,
                    late_digests,
                }) => {
                    let announced = Announced {
                        pages,
                        in_store,
                        images,
                        late,
                    };
                    let expected = Expected {
                        digests: late_digests,
                        masks,
                        ..Expected::default()
                    };
                    let ended = receiver.unstripe(limit).await;
                    ended.map_err(|source| Error::Channel {
                        peer: self.peer.clone(),
                        source,
                    })?;
                    return Ok((announced, digests, expected));
                }
                Frame::Control(Message::Abort { reason }) => return Err(Error::Aborted(reason)),
                Frame::Control(other) => return Err(self.unexpected(&other, AWAITED)),
            }
        }
    }

    /// Peers of connections that the tree has closed are to be answered.
    pub(super) fn has_ended(&mut self, open: &[Flow], over: &[Flow]) -> Result<(), Error> {
        for (flows, is_open) in [(open, true), (over, false)] {
            if let Some(gate) = &self.gate {
                gate.answer_for(flows)?;
            }
            self.ended.extend(flows.iter().map(|flow| (*flow, is_open)));
        }
        Ok(())
    }

    /// Lets CRIU build the copy and holds it.
    pub(super) async fn restore(&mut self) -> Result<(), Error> {
        let Incoming::Frames(receiver) = std::mem::replace(&mut self.incoming, Incoming::Closed)
        else {
            return Err(nothing("the stream of frames"));
        };
        let mut inbox = Inbox::new(self.peer.clone(), receiver);
        let begun = Instant::now();
        let session = self.released().await?;
        self.clock.part("criu_released", begun);
        // Nobody but the copy keeps the device served from here on.
        self.tunnel = None;
        self.engine = Engine::Held(session);
        let held = tokio::select! {
            held = self.held() => held,
            // Nothing is due from the source now but the end.
            message = inbox.next("the restored copy") => {
                match message {
                    Ok(message) => Err(crate::inbox::unexpected(&self.peer, &message, "the restored copy")),
                    Err(error) => Err(error),
                }
            }
        };
        self.incoming = Incoming::Messages(inbox);
        held?;
        let built = Instant::now();
        self.lazy.handed_over().await?;
        self.clock.part("memory_handed_over", built);
        let restore_us = self.dumped_at.map_or(0, |at| {
            u64::try_from(at.elapsed().as_micros()).unwrap_or(u64::MAX)
        });
        self.send(&Message::Restored { restore_us }).await
    }

    /// Lets the parked CRIU have the images. One that cannot be used any more,
    /// or was told otherwise than is true now, is replaced.
    async fn released(&mut self) -> Result<Session, Error> {
        let images = self
            .images
            .as_mut()
            .ok_or_else(|| nothing("the image directory"))?;
        let Engine::Parked(parked) = std::mem::replace(&mut self.engine, Engine::None) else {
            return Err(nothing("CRIU"));
        };
        images.part_offsets()?;
        for resource in &self.streams {
            images.redirect(resource)?;
        }
        let order = self.order.as_ref().ok_or_else(|| nothing("the tree"))?;
        let lazy = self.lazy.pages() > 0;
        let ordered = parked.options();
        if ordered.lazy == lazy && ordered.shell_job == order.tree.shell_job {
            match parked.release(images).await {
                Ok(session) => return Ok(session),
                Err(error) => {
                    tracing::warn!(error = %crate::error::chain(&error), "CRIU is started anew");
                }
            }
        }
        images.unpark()?;
        let (worker, options) = self.worker(lazy).await?;
        Ok(worker.restore(&options).await?)
    }

    /// CRIU is given up for stuck after this much silence; the source's
    /// `--max-blackout` is shorter as a rule and ends the connection.
    const RESTORE_LIMIT: Duration = Duration::from_secs(600);

    /// Answers CRIU until it has the copy complete and asks whether to let it go.
    async fn held(&mut self) -> Result<(), Error> {
        let Engine::Held(session) = &mut self.engine else {
            return Err(nothing("CRIU's restore"));
        };
        let mut at = Instant::now();
        loop {
            match session.next(Self::RESTORE_LIMIT).await? {
                Notice::PreRestore => {
                    at = self.clock.part("criu_reads_images", at);
                    session.answer(true).await?;
                }
                Notice::PostRestore { .. } => {
                    self.clock.part("criu_builds_copy", at);
                    return Ok(());
                }
                Notice::Finished(_) => {
                    return Err(Error::OutOfOrder {
                        got: "the end".to_owned(),
                        awaited: "the restored copy",
                    });
                }
                _ => session.answer(true).await?,
            }
        }
    }
}

pub(super) fn nothing(what: &'static str) -> Error {
    Error::Changed(format!("{what} is not there"))
}

#[cfg(test)]
mod tests {
    use migrate_memory::MemoryDigest;

    use super::*;

    const TASK: PageOwner = PageOwner::Task(7);

    /// What takes the pages of a frozen tree of 16 pages, some of which may follow.
    fn frozen() -> Memory {
        let mut memory = Memory::new(16 << 12, &Policy::default(), false);
        memory.postcopy();
        memory.freeze();
        memory
    }

    fn said(taken: Result<(), Error>) -> String {
        taken.err().map_or_else(String::new, |error| error.chain())
    }

    #[test]
    fn pages_that_nobody_agreed_to_do_not_follow() {
        for (may, frozen) in [(false, true), (true, false)] {
            let mut memory = Memory::new(16 << 12, &Policy::default(), false);
            if may {
                memory.postcopy();
            }
            if frozen {
                memory.freeze();
            }
            let taken = memory.follow(TASK, vec![(1, 1)]);
            assert!(
                said(taken).contains("nobody has agreed to"),
                "{may}, {frozen}"
            );
        }
    }

    #[test]
    fn pages_that_follow_ascend_and_are_within_their_run() {
        for pages in [
            vec![(3, 2), (4, 1)],
            vec![(3, 0)],
            vec![(u64::MAX, 1)],
            vec![(1 << 60, 1)],
        ] {
            let taken = frozen().follow(TASK, pages.clone());
            assert!(said(taken).contains("has not in store"), "{pages:?}");
        }
        let mut memory = frozen();
        memory.follow(TASK, vec![(3, 1), (5, 2)]).unwrap();
        // The next message goes on behind it.
        assert!(said(memory.follow(TASK, vec![(6, 1)])).contains("has not in store"));
        let run = |owner, page: u64, pages| PageRun {
            owner,
            vaddr: page << 12,
            pages,
            flags: PARENT,
        };
        let follows = memory.follows.clone();
        for run in [
            run(TASK, 4, 8),
            run(TASK, 0, 6),
            run(PageOwner::Task(8), 0, 8),
        ] {
            assert!(said(memory.list(run, &follows)).contains("has not in store"));
        }
        memory.list(run(TASK, 3, 4), &follows).unwrap();
    }

    #[test]
    fn what_is_gone_makes_room_for_what_comes() {
        let mut memory = Memory::new(0, &Policy::default(), false);
        let (page, data) = (PAGE_BYTES as u64, [7; PAGE_BYTES]);
        let put = |memory: &mut Memory, number: u64| {
            let run = PageRun {
                owner: TASK,
                vaddr: number * page,
                pages: 1,
                flags: PageRun::PRESENT,
            };
            memory.store.put(run, &data)
        };
        let room = memory.room_bytes / page;
        for number in 0..room {
            put(&mut memory, number).unwrap();
        }
        put(&mut memory, room).unwrap_err();
        // Whole mappings, as it is known to a round; all that a process can have is more.
        memory.forget(TASK, &[(0, room / 2), (room, 1)]).unwrap();
        put(&mut memory, room).unwrap();
        assert_eq!(memory.store.range(TASK, 0..page).count(), 0);
        memory.forget(TASK, &[(0, 1 << 51)]).unwrap();
        assert_eq!(memory.store.pages(TASK).count(), 0);

        for pages in [(u64::MAX, 1), (1 << 52, 1)] {
            let gone = memory.forget(TASK, &[pages]);
            assert!(said(gone).contains("said to be gone"), "{pages:?}");
        }
        memory.freeze();
        assert!(said(memory.forget(TASK, &[(0, 1)])).contains("after the rounds"));
    }

    #[test]
    fn no_more_follows_than_the_tree_had() {
        let mut memory = Memory::new(0, &Policy::default(), false);
        memory.postcopy();
        memory.freeze();
        let room = memory.room_bytes >> 12;
        memory.follow(TASK, vec![(1, room - 1)]).unwrap();
        assert!(said(memory.follow(TASK, vec![(room, 2)])).contains("more memory"));
    }

    const PAGE: u64 = PAGE_BYTES as u64;
    const BASE: u64 = 1 << 20;
    const SEGMENT: PageOwner = PageOwner::Shared(9);

    fn listed(owner: PageOwner, page: u64, pages: u64, flags: u32) -> PageRun {
        PageRun {
            owner,
            vaddr: BASE + page * PAGE,
            pages,
            flags,
        }
    }

    /// A page that no other is like.
    fn content(page: u64) -> Vec<u8> {
        vec![u8::try_from(page + 1).unwrap(); PAGE_BYTES]
    }

    fn digest(owner: PageOwner, pages: Range<u64>) -> PageDigest {
        let mut digest = MemoryDigest::new();
        for page in pages {
            digest.add(BASE + page * PAGE, &content(page));
        }
        PageDigest {
            owner,
            sha256: digest.finish(),
            taken: Vec::new(),
        }
    }

    /// Takes in a run that holds what it should, but for the page `flipped`.
    fn take(
        memory: &mut Memory,
        images: &mut ImageDir,
        run: PageRun,
        flipped: Option<(PageOwner, u64)>,
    ) {
        let first = (run.vaddr - BASE) / PAGE;
        let mut data = Vec::new();
        if run.flags & PageRun::PRESENT != 0 {
            for page in first..first + run.pages {
                let at = data.len();
                data.extend(content(page));
                if flipped == Some((run.owner, page)) {
                    data[at + 100] ^= 1;
                }
            }
        }
        memory.take(images, run, &data).unwrap();
    }

    /// A task and a segment, of which pages came in a round and with the final list, and
    /// a segment that came whole.
    fn arrived(flipped: Option<(PageOwner, u64)>) -> Memory {
        let place = tempfile::tempdir().unwrap();
        let mut images = ImageDir::create_on_disk(place.path().join("images")).unwrap();
        let mut memory = Memory::new(16 << 12, &Policy::default(), true);
        for run in [
            listed(TASK, 0, 2, PageRun::PRESENT),
            // Given back since: the final list does not name it.
            listed(TASK, 7, 1, PageRun::PRESENT),
            listed(SEGMENT, 0, 1, PageRun::PRESENT),
        ] {
            take(&mut memory, &mut images, run, flipped);
        }
        memory.freeze();
        for run in [
            listed(TASK, 0, 2, PARENT),
            listed(TASK, 2, 2, PageRun::PRESENT),
            listed(SEGMENT, 0, 1, PARENT),
            listed(SEGMENT, 1, 1, PageRun::PRESENT),
            listed(PageOwner::Shared(10), 0, 1, PageRun::PRESENT),
        ] {
            take(&mut memory, &mut images, run, flipped);
        }
        memory
    }

    #[tokio::test]
    async fn one_byte_of_one_page_is_not_the_same() {
        let digests = || vec![digest(TASK, 0..4), digest(SEGMENT, 0..2)];
        assert!(arrived(None).verified(digests(), Vec::new()).await.is_ok());
        for (owner, page) in [(TASK, 0), (TASK, 1), (TASK, 3), (SEGMENT, 0), (SEGMENT, 1)] {
            let memory = arrived(Some((owner, page)));
            let Err(error) = memory.verified(digests(), Vec::new()).await else {
                panic!("page {page} of {owner} is another");
            };
            assert!(
                matches!(error, Error::NotTheSame { owner: other } if other == owner),
                "{error:?}"
            );
        }
    }

    #[tokio::test]
    async fn what_the_source_has_no_digest_of_is_not_compared() {
        let of_both = || vec![digest(TASK, 0..4), digest(SEGMENT, 0..2)];
        for missing in [TASK, SEGMENT] {
            let mut digests = of_both();
            digests.retain(|digest| digest.owner != missing);
            let Err(error) = arrived(None).verified(digests, Vec::new()).await else {
                panic!("nobody has compared {missing}");
            };
            assert!(
                matches!(error, Error::NotCompared { owner } if owner == missing),
                "{error:?}"
            );
        }
        assert!(
            arrived(None)
                .verified(Vec::new(), Vec::new())
                .await
                .is_err()
        );
        // A source that can tell of what came whole has to be right.
        let whole = PageOwner::Shared(10);
        let with = |page| [of_both(), vec![digest(whole, page..page + 1)]].concat();
        assert!(arrived(None).verified(with(0), Vec::new()).await.is_ok());
        assert!(arrived(None).verified(with(1), Vec::new()).await.is_err());
        // Who has not asked for it gets no digests.
        let memory = Memory::new(16 << 12, &Policy::default(), false);
        assert!(memory.verified(Vec::new(), Vec::new()).await.is_ok());
    }
}
